// What a receiver learns from headers, and what it checks.
#include <ATen/Functions.h>

#include <algorithm>

#include "comm/channel_jobs.h"
#include "core/limits.h"

namespace mimo_ext::comm {

namespace {

/// "8 samples of [16, *, 64]": the batch axis is not part of a header.
std::string text_of(const Header& header, int batch_dim) {
  std::string text = std::to_string(header.samples) + " samples of [";
  for (std::int64_t axis = 0; axis < header.ndim; ++axis) {
    const std::int64_t extent = header.shape[static_cast<std::size_t>(axis)];
    text += (axis > 0 ? ", " : "") + (axis == batch_dim ? std::string("*") : std::to_string(extent));
  }
  return text + "]";
}

}  // namespace

void Channel::give_up(const std::string& reason, std::chrono::steady_clock::time_point deadline) {
  if (config_.fixed || !is_sender()) return;  // nobody waits for a header
  Header header;
  header.gave_up = reason.empty() ? "no reason was given" : reason;
  const Header::Words words = header.encode();
  std::vector<at::Tensor> tensor{at::empty({static_cast<std::int64_t>(Header::kWords)}, at::kLong)};
  std::copy(words.begin(), words.end(), tensor.front().data_ptr<std::int64_t>());
  std::vector<Request> requests;
  for (const HeaderPeer& peer : header_receivers_) {
    try {
      requests.push_back(transport_.send(tensor, peer.index, tag(kHeaderTag)));
    } catch (const std::exception&) {
      continue;  // it is gone
    }
  }
  settle(std::move(requests), deadline);
}

void Channel::receive_headers(ReceiveJob& job, const std::function<void()>& poll) {
  while (job.parsed.size() < header_senders_.size()) {
    const std::size_t index = job.parsed.size();
    const int peer = header_senders_[index].rank;
    if (peer == transport_.rank()) {
      if (!job.has_local) throw BridgeError(where(recv_name(), job.sequence) + ": no header from this rank itself");
      job.parsed.push_back(job.local.header);
      continue;
    }
    HeaderSlot& slot = job.headers[index];
    if (slot.request) {
      wait_for(receive_waiter_, slot.request, FlightPhase::kHeader, peer, job.flight, recv_name(), job.sequence, poll);
    }
    Header::Words words{};
    std::copy_n(slot.tensor.front().data_ptr<std::int64_t>(), Header::kWords, words.begin());
    Header header;
    try {
      header = Header::decode(words);
      if (!header.gave_up.empty()) {
        throw BridgeError(where(recv_name(), job.sequence) + ": rank " + std::to_string(peer) +
                          " gave up: " + header.gave_up);
      }
      if (header.has_extension()) {
        HeaderSlot& counts = job.row_counts;
        if (counts.tensor.empty()) {
          counts.tensor = {at::empty({header.num_rows}, at::kLong)};
          counts.request =
              post(false, counts.tensor, header_senders_[index].index, peer, kRowsTag, recv_name(), job.sequence);
        }
        wait_for(receive_waiter_, counts.request, FlightPhase::kRowCounts, peer, job.flight, recv_name(), job.sequence,
                 poll);
        const std::int64_t* data = counts.tensor.front().data_ptr<std::int64_t>();
        header.set_extension({data, data + header.num_rows});
        counts.tensor.clear();
      }
    } catch (const std::invalid_argument& error) {
      throw BridgeError(where(recv_name(), job.sequence) + ": from rank " + std::to_string(peer) + ": " + error.what());
    }
    check_header(header, peer, job);
    job.parsed.push_back(std::move(header));
    take_eager(job, index);
    if (job.times.started == 0) job.times.started = Times::now();
  }
  if (job.times.started == 0) job.times.started = Times::now();
  const std::lock_guard lock(ahead_mutex_);
  --headers_expected_;
}

std::shared_ptr<const core::Microbatch> Channel::agree(ReceiveJob& job) {
  const std::vector<Header>& headers = job.parsed;
  const auto [first, last] = core::Plan::lanes_met(receiver_lane_, receiver_.num_lanes(), sender_.num_lanes());
  std::vector<int> without_gradient;
  for (int lane = first; lane < last; ++lane) {
    if (headers[static_cast<std::size_t>(lane - first)].no_gradient) without_gradient.push_back(lane);
  }
  core::Microbatch microbatch = combine(headers);
  job.expects_backward = headers.front().expects_backward;
  for (std::size_t index = 1; index < headers.size(); ++index) {
    if (headers[index].expects_backward != job.expects_backward) {
      throw BridgeError(where(recv_name(), job.sequence) + ": ranks " + std::to_string(header_senders_.front().rank) +
                        " and " + std::to_string(header_senders_[index].rank) +
                        " differ on whether they expect a gradient: one of them runs under torch.no_grad()");
    }
  }
  if (static_cast<int>(without_gradient.size()) == last - first) {
    return std::make_shared<const core::Microbatch>(std::move(microbatch));
  }
  if (job.expected.known) {
    check_gradient(job, microbatch);
    check_row_shards(job, *job.expected.known);
    post_payload(job, *job.expected.known, std::move(without_gradient));
  } else {
    microbatch.row_shards = job.expected.row_shards;
    check_row_shards(job, microbatch);
    post_payload(job, microbatch, std::move(without_gradient));
  }
  return nullptr;
}

void Channel::check_gradient(const ReceiveJob& job, const core::Microbatch& microbatch) const {
  // The sender of a gradient and its receiver each remember the forward microbatch; what they both know must agree.
  // Row counts of this lane were sent from here; equal counts elsewhere may look even to the other side.
  const core::Microbatch& mine = *job.expected.known;
  const bool even = !mine.ragged() && !microbatch.ragged();
  const bool unpaired = std::any_of(job.parsed.begin(), job.parsed.end(),
                                    [](const Header& header) { return header.forward_sequence == Header::kUnpaired; });
  if (unpaired && !even) {
    throw BridgeError(where(recv_name(), job.sequence) +
                      ": a gradient that was sent before its microbatch was received has evenly split rows, "
                      "expected those of a microbatch with row counts");
  }
  if (mine.samples != microbatch.samples || mine.shape != microbatch.shape ||
      (even && mine.rows_per_sample != microbatch.rows_per_sample)) {
    throw BridgeError(where(recv_name(), job.sequence) + ": the gradient's shape differs from the activation's");
  }
}

void Channel::check_row_shards(const ReceiveJob& job, const core::Microbatch& microbatch) const {
  const int first_lane = core::Plan::lanes_met(receiver_lane_, receiver_.num_lanes(), sender_.num_lanes()).first;
  for (std::size_t index = 0; index < job.parsed.size(); ++index) {
    if (job.parsed[index].no_gradient) continue;
    std::uint64_t mine = 0;
    try {
      mine = row_shards_hash(microbatch, first_lane + static_cast<int>(index), receiver_lane_);
    } catch (const std::invalid_argument& error) {
      throw BridgeError(where(recv_name(), job.sequence) + ": row_shards: " + error.what());
    }
    const std::uint64_t theirs = job.parsed[index].row_shards_hash;
    if (mine == theirs) continue;
    const auto text = [](std::uint64_t hash) {
      return hash == 0 ? std::string("none") : "shards with hash " + std::to_string(hash);
    };
    throw BridgeError(where(recv_name(), job.sequence) + ": rank " + std::to_string(header_senders_[index].rank) +
                      " deals the rows of module '" + config_.source.module +
                      "' in another way (row_shards): expected " + text(mine) + ", got " + text(theirs));
  }
}

void Channel::check_header(const Header& header, int peer, const ReceiveJob& job) const {
  const auto differ = [&](const char* what, auto expected, auto got) {
    throw BridgeError(where(recv_name(), job.sequence) + ": rank " + std::to_string(peer) + " sent another " + what +
                      ": expected " + std::to_string(expected) + ", got " + std::to_string(got));
  };
  if (header.config_hash != config_.hash) differ("layout (hash)", config_.hash, header.config_hash);
  if (header.sequence != job.sequence) differ("microbatch", job.sequence, header.sequence);
  if (header.dtype != static_cast<std::int64_t>(config_.dtype)) {
    differ("dtype", static_cast<std::int64_t>(config_.dtype), header.dtype);
  }
  const bool unpaired = config_.unpaired_backward && (header.forward_sequence == Header::kUnpaired ||
                                                      job.expected.forward_sequence == Header::kUnpaired);
  if (direction_ == core::Direction::kBackward && !unpaired &&
      header.forward_sequence != job.expected.forward_sequence) {
    throw BridgeError(where(recv_name(), job.sequence) + ": rank " + std::to_string(peer) +
                      " sent the gradient of forward microbatch " + std::to_string(header.forward_sequence) +
                      ", expected that of " + std::to_string(job.expected.forward_sequence) +
                      ": did one side alone run a forward under torch.no_grad()?");
  }
  if (header.ndim != config_.ndim) differ("number of axes", std::int64_t{config_.ndim}, header.ndim);
}

core::Microbatch Channel::combine(const std::vector<Header>& headers) const {
  const Header& first = headers.front();
  core::Microbatch microbatch;
  microbatch.ndim = config_.ndim;
  microbatch.batch_dim = config_.batch_dim;
  microbatch.seq_dim = config_.seq_dim;
  microbatch.element_size = static_cast<int>(c10::elementSize(config_.dtype));
  microbatch.samples = first.samples;
  microbatch.shape = first.shape;
  microbatch.shape[static_cast<std::size_t>(config_.batch_dim)] = 1;
  microbatch.rows_per_sample = first.rows_per_sample;
  bool ragged = false;
  for (const Header& header : headers) {
    if (header.samples != first.samples || header.shape != first.shape) {
      throw std::invalid_argument("the lanes of module '" + sender_.module +
                                  "' sent different microbatches: expected " + text_of(first, config_.batch_dim) +
                                  ", got " + text_of(header, config_.batch_dim));
    }
    // Even rows may still differ from lane to lane: that is a ragged microbatch.
    ragged = ragged || header.num_rows > 0 || header.rows_per_sample != first.rows_per_sample;
  }
  if (config_.ndim == 3 || !ragged) return microbatch;
  microbatch.rows_per_sample = 1;
  if (microbatch.samples > core::kMaxRowCounts) {  // before anything is allocated for them
    throw std::invalid_argument("module '" + sender_.module + "': expected row counts of at most " +
                                std::to_string(core::kMaxRowCounts) + " samples, got " +
                                std::to_string(microbatch.samples));
  }
  microbatch.rows.assign(static_cast<std::size_t>(microbatch.samples), core::kUnknownRows);
  const int first_lane = core::Plan::lanes_met(receiver_lane_, receiver_.num_lanes(), sender_.num_lanes()).first;
  for (std::size_t index = 0; index < headers.size(); ++index) {
    const int lane = first_lane + static_cast<int>(index);
    const std::int64_t begin = microbatch.lane_begin(lane, sender_.num_lanes());
    const std::int64_t end = microbatch.lane_begin(lane + 1, sender_.num_lanes());
    const Header& header = headers[index];
    if (header.num_rows > 0 && header.num_rows != end - begin) {
      throw std::invalid_argument("lane " + std::to_string(lane) + " of module '" + sender_.module + "': expected " +
                                  std::to_string(end - begin) + " row counts, got " + std::to_string(header.num_rows));
    }
    if (direction_ == core::Direction::kForward && receiver_.sharded() && header.num_rows == 0 && begin < end) {
      // The lanes cut shards of a sequence that each believes to be even: they would not meet.
      throw std::invalid_argument("module '" + receiver_.module +
                                  "' holds 2-D tensors sharded along their rows: expected equal rows per sample in all "
                                  "lanes of module '" +
                                  sender_.module + "', got " + std::to_string(first.rows_per_sample) + " and others");
    }
    if (direction_ == core::Direction::kForward && header.num_rows == 0) microbatch.even_lanes.push_back(lane);
    for (std::int64_t sample = begin; sample < end; ++sample) {
      microbatch.rows[static_cast<std::size_t>(sample)] =
          header.num_rows > 0 ? header.rows[static_cast<std::size_t>(sample - begin)] : header.rows_per_sample;
    }
  }
  return microbatch;
}

}  // namespace mimo_ext::comm
