// The sending half of a channel.
#include <ATen/Functions.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cstring>

#include "comm/channel_jobs.h"

namespace mimo_ext::comm {

Header Channel::header_for(const core::Microbatch& microbatch, bool no_gradient, bool expects_backward) const {
  Header header;
  header.sequence = next_send_;
  header.config_hash = config_.hash;
  header.no_gradient = no_gradient;
  header.expects_backward = expects_backward;
  header.dtype = static_cast<std::int64_t>(config_.dtype);
  header.ndim = microbatch.ndim;
  header.shape = microbatch.shape;
  header.shape[static_cast<std::size_t>(microbatch.batch_dim)] = 0;
  header.samples = microbatch.samples;
  header.rows_per_sample = microbatch.ragged() ? 0 : microbatch.rows_per_sample;
  if (microbatch.ragged()) {
    const auto first = microbatch.rows.begin() + microbatch.lane_begin(sender_lane_, sender_.num_lanes());
    const auto last = microbatch.rows.begin() + microbatch.lane_begin(sender_lane_ + 1, sender_.num_lanes());
    header.rows.assign(first, last);
    header.num_rows = static_cast<std::int64_t>(header.rows.size());
  }
  return header;
}

std::uint64_t Channel::row_shards_hash(const core::Microbatch& microbatch, int sender_lane, int receiver_lane) const {
  if (!microbatch.row_shards) return 0;
  const core::Overlap shared =
      core::overlap_of(microbatch, sender_lane, sender_.num_lanes(), receiver_lane, receiver_.num_lanes());
  if (shared.empty()) return 1;
  // 0 says that there are none.
  return std::max<std::uint64_t>(1, microbatch.row_shards->hash(shared.first, shared.last));
}

void Channel::post_headers(Header& header, const core::Microbatch& microbatch, SendJob& job) {
  if (job.headers.empty()) {
    for (std::size_t index = 0; index < header_receivers_.size(); ++index) {
      job.words.push_back(at::empty({static_cast<std::int64_t>(Header::kMaxWords)}, at::kLong));
      job.headers.emplace_back().tensor = {job.words.back()};
    }
  }
  at::Tensor row_counts;
  job.row_counts.clear();
  if (header.has_extension()) {
    row_counts = at::empty({header.num_rows}, at::kLong);
    std::copy(header.rows.begin(), header.rows.end(), row_counts.data_ptr<std::int64_t>());
    for (std::size_t index = 0; index < header_receivers_.size(); ++index) {
      job.row_counts.emplace_back().tensor = {row_counts};
    }
  }
  for (std::size_t index = 0; index < header_receivers_.size(); ++index) {
    const HeaderPeer& peer = header_receivers_[index];
    header.row_shards_hash = row_shards_hash(microbatch, sender_lane_, peer.lane);
    const auto announced = job.program->announced.find(peer.rank);
    header.payload_bytes = header.eager_bytes = 0;
    at::Tensor payload;
    if (job.payload && announced != job.program->announced.end()) {
      const Transfer& transfer = job.program->transfers[announced->second];
      header.eager_bytes = transfer.eager * microbatch.element_size;
      if (transfer.with_header) payload = job.payload->tensor(announced->second).front();
    }
    if (payload.defined()) header.payload_bytes = static_cast<std::int64_t>(payload.nbytes());
    const Header::Words words = header.encode();
    auto* message = job.words[index].data_ptr<std::int64_t>();
    std::copy(words.begin(), words.end(), message);
    if (payload.defined()) std::memcpy(message + Header::kWords, payload.const_data_ptr(), payload.nbytes());
    HeaderSlot& slot = job.headers[index];
    // The receiver has room for the largest header: gloo takes less than that.
    slot.tensor.front().unsafeGetTensorImpl()->set_sizes_contiguous(
        {static_cast<std::int64_t>(Header::kWords) + (header.payload_bytes + 7) / 8});
    slot.request = post(true, slot.tensor, peer.index, peer.rank, kHeaderTag, send_name(), job.sequence);
    if (row_counts.defined()) {
      HeaderSlot& counts = job.row_counts[index];
      counts.request = post(true, counts.tensor, peer.index, peer.rank, kRowsTag, send_name(), job.sequence);
    }
  }
}

std::shared_ptr<Delivery> Channel::send(std::shared_ptr<SendProgram> program, const at::Tensor& given,
                                        bool expects_backward, std::int64_t forward_sequence, bool want_delivery) {
  if (groups_) reap_flying();
  failure_.check();
  const c10::NoGradGuard no_grad;
  const bool tracing = trace_.on();
  const std::int64_t now = Times::now();
  auto job = send_jobs_.take();
  if (!job) job = std::make_unique<SendJob>();
  job->sequence = next_send_;
  job->times = {};
  job->times.posted = tracing ? now : 0;
  job->program = std::move(program);
  const core::Microbatch& microbatch = *job->program->microbatch;
  const std::vector<Transfer>& transfers = job->program->transfers;
  if (want_delivery) job->delivery = new_delivery(true, job->sequence);

  // Parts first: what needs packing may fail (memory), sends should not.
  LocalItem local;
  if (given.defined()) {
    // Lazy conjugation and negation are no part of the storage.
    const bool lazy = given.is_conj() || given.is_neg();
    const at::Tensor x = lazy ? given.resolve_conj().resolve_neg() : given;
    job->payload = job->program->pool.take();
    if (!job->payload) job->payload = std::make_unique<Slots>(transfers, config_.message_options(), staging_.get());
    if (staging_) stage_out(*job, x, local);
    for (std::size_t index = 0; !staging_ && index < transfers.size(); ++index) {
      if (transfers[index].local) {
        local.boxes.push_back(part_of(transfers[index], x.detach()));  // outlives the job
      } else {
        job->payload->load(index, x);
      }
    }
  }
  job->flight = flight_.record(true, direction_ == core::Direction::kForward, job->sequence,
                               given.defined() ? job->program->bytes : 0, now);
  try {
    if (!config_.fixed) {
      Header header = header_for(microbatch, !given.defined(), expects_backward);
      header.forward_sequence = forward_sequence;
      post_headers(header, microbatch, *job);
      if (meets_itself_) {
        header.row_shards_hash = row_shards_hash(microbatch, sender_lane_, receiver_lane_);
        header.payload_bytes = header.eager_bytes = 0;
        local.header = std::move(header);
      }
    }
    if (!staging_ && !groups_) post_messages(*job);
    if (groups_ && !is_receiver()) issue_sends(*job);
  } catch (const BridgeError&) {
    flight_.retire(job->flight, true, Times::now());
    failure_.set(std::current_exception());
    failure_.check();
  }
  if (staging_) {
    job->local = std::move(local);
  } else if (meets_itself_) {
    push_local(std::move(local));
  }
  ++next_send_;
  counters_.sends.add(1);
  if (job->payload) counters_.bytes_sent.add(job->program->bytes);
  bool crowded = false;
  {
    const std::lock_guard lock(room_mutex_);
    ++in_flight_;
    crowded = 2 * in_flight_ >= config_.max_in_flight;
  }
  auto delivery = job->delivery;
  // torch.profiler cannot evaluate a profile that ends before gloo's messages do.
  const auto when = crowded || tracing || at::hasCallbacks() ? Worker::When::kNow : Worker::When::kSoon;
  if (stage_worker_) {
    SendJob* raw = job.release();
    stage_worker_->submit([this, raw, when] { run_staged_send(std::unique_ptr<SendJob>(raw), when); },
                          Worker::When::kNow);
  } else if (groups_ && is_receiver()) {
    const std::lock_guard lock(groups_mutex_);
    deferred_.push_back(std::move(job));
  } else {
    submit_send(std::move(job), when);
  }
  return delivery;
}

void Channel::submit_send(std::unique_ptr<SendJob> job, Worker::When when) {
  SendJob* raw = job.release();
  send_worker_->submit([this, raw] { run_send(std::unique_ptr<SendJob>(raw)); }, when);
}

void Channel::post_messages(SendJob& job) {
  const std::vector<Transfer>& transfers = job.program->transfers;
  for (std::size_t index = 0; job.payload && index < transfers.size(); ++index) {
    const Transfer& transfer = transfers[index];
    if (transfer.local || transfer.with_header) continue;
    Slot& slot = (*job.payload)[index];
    if (transfer.eager > 0) {
      slot.head_request = post(true, slot.head, transfer.index, transfer.peer, kEagerTag, send_name(), job.sequence);
    }
    if (!job.payload->has_message(index)) continue;
    slot.request =
        post(true, job.payload->message(index), transfer.index, transfer.peer, kPayloadTag, send_name(), job.sequence);
  }
}

void Channel::push_local(LocalItem local) {
  const std::lock_guard lock(local_mutex_);
  local_.push_back(std::move(local));
  local_changed_.notify_all();
}

void Channel::hurry_sends() {
  if (send_worker_) send_worker_->hurry();
}

void Channel::end_answered(std::int64_t sequence) {
  if (staging_ || groups_) return;  // their sends are other workers' as well
  send_worker_->help([&] { return sends_ended_ == sequence; });
}

std::int64_t Channel::answer_bytes(const SendProgram& program, Channel& back) const {
  const auto answers = back.receive_program(*program.microbatch);
  const auto answered = [&](int rank) {
    return std::any_of(answers->receives.begin(), answers->receives.end(),
                       [&](const Transfer& transfer) { return !transfer.local && transfer.peer == rank; });
  };
  const bool all = std::all_of(program.transfers.begin(), program.transfers.end(),
                               [&](const Transfer& transfer) { return transfer.local || answered(transfer.peer); });
  const bool headers = config_.fixed || std::all_of(header_receivers_.begin(), header_receivers_.end(),
                                                    [&](const HeaderPeer& peer) { return answered(peer.rank); });
  return all && headers ? answers->bytes_received : -1;
}

bool Channel::wait_for_room(std::chrono::milliseconds limit) {
  std::unique_lock lock(room_mutex_);
  room_changed_.wait_for(lock, limit, [this] { return in_flight_ < config_.max_in_flight || failure_.failed(); });
  return in_flight_ < config_.max_in_flight;
}

void Channel::run_send(std::unique_ptr<SendJob> job) {
  std::exception_ptr failed;
  try {
    if (staging_ || groups_) failure_.check();  // perhaps nothing was posted
    const std::int64_t sequence = job->sequence;
    struct {
      const Channel& channel;
      std::int64_t sequence;
    } nudged{*this, sequence};
    // One pointer: std::function allocates for more.
    const std::function<void()> poll = [&nudged] {
      nudged.channel.check_awaited(nudged.channel.sent_to_, nudged.channel.send_name(), nudged.sequence);
    };
    const auto wait = [&](Request& request, int peer) {
      if (!request) return;
      failure_.check();
      wait_for(send_waiter_, request, FlightPhase::kMessage, peer, job->flight, send_name(), sequence, poll);
    };
    for (std::size_t index = 0; index < job->headers.size(); ++index) {
      wait(job->headers[index].request, header_receivers_[index].rank);
      if (index < job->row_counts.size()) wait(job->row_counts[index].request, header_receivers_[index].rank);
    }
    for (std::size_t index = 0; job->payload && index < job->payload->size(); ++index) {
      wait((*job->payload)[index].head_request, job->program->transfers[index].peer);
      wait((*job->payload)[index].request, job->program->transfers[index].peer);
    }
    if (groups_) wait_for_sent(*job);
  } catch (...) {
    failed = failure_.set(std::current_exception());
  }
  const std::int64_t now = Times::now();
  flight_.retire(job->flight, failed != nullptr, now);
  const std::int64_t bytes = job->payload ? job->program->bytes : 0;
  if (trace_.on() && job->times.posted != 0 && !failed) {
    job->times.started = job->times.posted;
    job->times.ended = now;
    trace_.add({true, direction_ == core::Direction::kForward, job->sequence, bytes, job->times, 0, 0});
  }
  // The storage goes before anybody is told.
  if (job->payload) {
    job->payload->release();
    if (!failed) job->program->pool.give(std::move(job->payload));
    job->payload.reset();
  }
  job->program.reset();
  if (auto delivery = std::move(job->delivery)) {
    if (failed) {
      delivery->set_error(failed);
    } else {
      delivery->set({}, nullptr, false, job->times, bytes);
    }
  }
  if (!failed) send_jobs_.give(std::move(job));
  ++sends_ended_;
  {
    const std::lock_guard lock(room_mutex_);
    --in_flight_;
  }
  room_changed_.notify_all();
}

}  // namespace mimo_ext::comm
