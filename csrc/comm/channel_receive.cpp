// The receiving half of a channel.
#include <ATen/Functions.h>
#include <c10/core/GradMode.h>

#include <algorithm>

#include "comm/channel_jobs.h"
#include "ops/pack.h"

namespace mimo_ext::comm {

namespace {

/// The view of `x` that `box` covers.
at::Tensor view_of(const at::Tensor& x, const core::Box& box) {
  at::Tensor view = x;
  for (std::int64_t axis = 0; axis < x.dim(); ++axis) {
    const auto index = static_cast<std::size_t>(axis);
    if (box.size[index] != x.size(axis)) view = view.narrow(axis, box.start[index], box.size[index]);
  }
  return view;
}

/// "8 samples of [16, *, 64]": the batch axis is not part of a header.
std::string text_of(const Header& header, int batch_dim) {
  std::string text = std::to_string(header.samples) + " samples of [";
  for (std::int64_t axis = 0; axis < header.ndim; ++axis) {
    const std::int64_t extent = header.shape[static_cast<std::size_t>(axis)];
    text += (axis > 0 ? ", " : "") + (axis == batch_dim ? std::string("*") : std::to_string(extent));
  }
  return text + "]";
}

at::IntArrayRef starts_of(const core::Box& box, const at::Tensor& x) {
  return {box.start.data(), static_cast<std::size_t>(x.dim())};
}

at::IntArrayRef sizes_of(const core::Box& box, const at::Tensor& x) {
  return {box.size.data(), static_cast<std::size_t>(x.dim())};
}

}  // namespace

at::Tensor part_of(const at::Tensor& x, const core::Box& box) {
  at::Tensor view = view_of(x, box);
  if (view.is_contiguous()) return view;
  return ops::pack(x, starts_of(box, x), sizes_of(box, x));
}

std::shared_ptr<Delivery> Channel::recv(std::optional<core::Microbatch> known, std::int64_t forward_sequence) {
  failure_.check();
  const c10::NoGradGuard no_grad;
  auto job = std::make_shared<ReceiveJob>();
  job->sequence = next_recv_;
  job->known = std::move(known);
  job->forward_sequence = forward_sequence;
  job->delivery = std::make_shared<Delivery>();
  try {
    if (config_.fixed) {
      // Everything is known: the payload's receives are posted now, ahead of whatever this rank sends next.
      if (!meets_itself()) job->incoming = post_payload(job->sequence, *config_.fixed, {}, {});
    } else {
      const auto [first, last] = core::Plan::lanes_met(receiver_lane_, receiver_.num_lanes(), sender_.num_lanes());
      for (int lane = first; lane < last; ++lane) {
        const auto& members = sender_.lanes[static_cast<std::size_t>(lane)];
        HeaderSlot slot;
        slot.peer = members[static_cast<std::size_t>(receiver_member_ % sender_.lane_size())];
        if (slot.peer != transport_.rank()) {
          slot.buffer = at::empty({static_cast<std::int64_t>(Header::kWords)}, at::kLong);
          slot.request = post(false, slot.buffer, slot.peer, kHeaderTag, recv_name(), job->sequence);
        }
        job->headers.push_back(std::move(slot));
      }
    }
  } catch (const BridgeError&) {
    failure_.set(std::current_exception());
    failure_.check();
  }
  ++next_recv_;
  auto delivery = job->delivery;
  receive_worker_->submit([this, job] { run_receive(*job); });
  return delivery;
}

std::unique_ptr<Channel::Incoming> Channel::post_payload(std::int64_t sequence, const core::Microbatch& microbatch,
                                                         const std::vector<int>& without_gradient,
                                                         std::vector<at::Tensor> local_boxes) {
  const auto plan = plan_for(microbatch, Role::kReceive);
  auto incoming = std::make_unique<Incoming>();
  const auto extents = plan->plan.receiver_shape(receiver_lane_, receiver_member_);
  const at::IntArrayRef shape(extents.data(), static_cast<std::size_t>(config_.ndim));
  const auto options = at::TensorOptions().dtype(config_.dtype);
  incoming->result = without_gradient.empty() ? at::empty(shape, options) : at::zeros(shape, options);
  const auto skipped = [&](const core::Message& message) {
    return std::find(without_gradient.begin(), without_gradient.end(), message.sender_lane) != without_gradient.end();
  };
  const auto slot_for = [&](const core::Message& message) {
    Slot slot;
    slot.message = message;
    if (message.contribution == 0) {
      slot.buffer = view_of(incoming->result, message.recv_box);
      slot.in_place = slot.buffer.is_contiguous();
    }
    if (!slot.in_place && message.sender != transport_.rank()) {
      slot.buffer = at::empty({message.recv_box.volume()}, options);
    }
    return slot;
  };
  std::size_t next_local = 0;
  for (const core::Message& message : plan->mine.receives) {
    if (skipped(message)) continue;
    Slot slot = slot_for(message);
    if (message.sender == transport_.rank()) {
      slot.in_place = false;
      slot.buffer = local_boxes.at(next_local++).reshape({-1});
    } else {
      slot.request = post(false, slot.buffer, message.sender, kPayloadTag, recv_name(), sequence);
    }
    incoming->receives[{message.chunk, message.sender_lane}].push_back(std::move(slot));
  }
  for (const core::Message& message : plan->mine.lane_receives) {
    if (skipped(message)) continue;
    Slot slot = slot_for(message);
    slot.request = post(false, slot.buffer, message.sender, kLaneTag, recv_name(), sequence);
    incoming->lane_receives.push_back(std::move(slot));
  }
  for (const core::Message& message : plan->mine.lane_sends) {
    if (!skipped(message)) incoming->lane_sends[{message.chunk, message.sender_lane}].push_back(message);
  }
  return incoming;
}

void Channel::run_receive(ReceiveJob& job) {
  const c10::NoGradGuard no_grad;  // grad mode is per thread
  try {
    failure_.check();
    if (receives_aborted_) throw BridgeError(where(recv_name(), job.sequence) + ": the bridge was dropped");
    receive(job);
  } catch (const BridgeError&) {
    // What was dropped is no failure: the sends go on.
    const auto error = std::current_exception();
    job.delivery->set_error(receives_aborted_ && !failure_.failed() ? error : failure_.set(error));
  } catch (const std::exception& error) {
    const auto named = std::make_exception_ptr(BridgeError(where(recv_name(), job.sequence) + ": " + error.what()));
    job.delivery->set_error(failure_.set(named));
  }
}

void Channel::receive(ReceiveJob& job) {
  core::Microbatch microbatch = config_.fixed ? *config_.fixed : core::Microbatch{};
  bool expects_backward = true;
  LocalItem local;
  if (meets_itself()) local = take_local(job.sequence);
  std::vector<int> without_gradient;
  if (!config_.fixed) {
    const std::vector<Header> headers = receive_headers(job, meets_itself() ? &local : nullptr);
    const auto [first, last] = core::Plan::lanes_met(receiver_lane_, receiver_.num_lanes(), sender_.num_lanes());
    for (int lane = first; lane < last; ++lane) {
      if (headers[static_cast<std::size_t>(lane - first)].no_gradient) without_gradient.push_back(lane);
    }
    microbatch = combine(headers);
    expects_backward = headers.front().expects_backward;
    for (std::size_t index = 1; index < headers.size(); ++index) {
      if (headers[index].expects_backward != expects_backward) {
        throw BridgeError(where(recv_name(), job.sequence) + ": ranks " + std::to_string(job.headers.front().peer) +
                          " and " + std::to_string(job.headers[index].peer) +
                          " differ on whether they expect a gradient: one of them runs under torch.no_grad()");
      }
    }
    if (static_cast<int>(without_gradient.size()) == last - first) {
      job.delivery->set({}, std::move(microbatch), false);
      return;
    }
    if (job.known) {
      // The sender of a gradient and its receiver each remember the forward microbatch; what they both know must agree.
      // Row counts of this lane were sent from here; equal counts elsewhere may look even to the other side.
      const core::Microbatch& mine = *job.known;
      const bool even = !mine.ragged() && !microbatch.ragged();
      const bool unpaired = std::any_of(headers.begin(), headers.end(), [](const Header& header) {
        return header.forward_sequence == Header::kUnpaired;
      });
      if (unpaired && !even) {
        throw BridgeError(where(recv_name(), job.sequence) +
                          ": a gradient that was sent before its microbatch was received has evenly split rows, "
                          "expected those of a microbatch with row counts");
      }
      if (mine.samples != microbatch.samples || mine.shape != microbatch.shape ||
          (even && mine.rows_per_sample != microbatch.rows_per_sample)) {
        throw BridgeError(where(recv_name(), job.sequence) + ": the gradient's shape differs from the activation's");
      }
      microbatch = *job.known;
    }
  }
  if (!job.incoming) job.incoming = post_payload(job.sequence, microbatch, without_gradient, std::move(local.boxes));
  Incoming& incoming = *job.incoming;

  // What has arrived is forwarded to the replicas while the next lane's chunk, or the next chunk, is still on the wire.
  for (auto& [stage, slots] : incoming.receives) {
    for (Slot& slot : slots) {
      if (slot.request) {
        wait_for(receive_waiter_, *slot.request, "payload from", slot.message.sender, recv_name(), job.sequence);
      }
    }
    // Contributions are added in a fixed order, whatever the order of arrival: results are reproducible.
    std::stable_sort(slots.begin(), slots.end(),
                     [](const Slot& a, const Slot& b) { return a.message.contribution < b.message.contribution; });
    for (Slot& slot : slots) finish_slot(slot, incoming);
    for (const core::Message& copy : incoming.lane_sends[stage]) {
      const at::Tensor part = part_of(incoming.result, copy.send_box);
      job.forwarded.push_back({post(true, part, copy.receiver, kLaneTag, recv_name(), job.sequence), copy.receiver});
    }
  }
  for (Slot& slot : incoming.lane_receives) {
    wait_for(receive_waiter_, *slot.request, "lane copy from", slot.message.sender, recv_name(), job.sequence);
    finish_slot(slot, incoming);
  }
  // The tensor is handed out when the replicas have their copies: its new owner may change it in place.
  for (SendJob::Pending& pending : job.forwarded) {
    wait_for(receive_waiter_, *pending.request, "lane copy to", pending.peer, recv_name(), job.sequence);
  }
  job.delivery->set(incoming.result, std::move(microbatch), expects_backward);
}

void Channel::finish_slot(Slot& slot, Incoming& incoming) {
  slot.request.reset();
  if (slot.in_place) return;
  const core::Box& box = slot.message.recv_box;
  ops::unpack_(incoming.result, slot.buffer, starts_of(box, incoming.result), sizes_of(box, incoming.result),
               slot.message.contribution > 0);
}

Channel::LocalItem Channel::take_local(std::int64_t sequence) {
  std::unique_lock lock(local_mutex_);
  const bool came = local_changed_.wait_for(
      lock, config_.timeout, [this] { return !local_.empty() || failure_.failed() || receives_aborted_; });
  failure_.check();
  if (receives_aborted_) throw BridgeError(where(recv_name(), sequence) + ": the bridge was dropped");
  if (!came) {
    throw BridgeTimeoutError(where(recv_name(), sequence) + ": this rank, which is on both sides, did not call " +
                             send_name() + " in time");
  }
  LocalItem item = std::move(local_.front());
  local_.pop_front();
  return item;
}

std::vector<Header> Channel::receive_headers(ReceiveJob& job, const LocalItem* local) {
  std::vector<Header> headers;
  for (HeaderSlot& slot : job.headers) {
    if (!slot.request) {
      if (local == nullptr) throw BridgeError(where(recv_name(), job.sequence) + ": no header from this rank itself");
      headers.push_back(local->header);
      continue;
    }
    wait_for(receive_waiter_, *slot.request, "header from", slot.peer, recv_name(), job.sequence);
    Header::Words words{};
    std::copy_n(slot.buffer.data_ptr<std::int64_t>(), Header::kWords, words.begin());
    Header header;
    try {
      header = Header::decode(words);
      if (header.has_extension()) {
        at::Tensor counts = at::empty({header.num_rows}, at::kLong);
        const auto request = post(false, counts, slot.peer, kRowsTag, recv_name(), job.sequence);
        wait_for(receive_waiter_, *request, "row counts from", slot.peer, recv_name(), job.sequence);
        const std::int64_t* data = counts.data_ptr<std::int64_t>();
        header.set_extension({data, data + header.num_rows});
      }
    } catch (const std::invalid_argument& error) {
      throw BridgeError(where(recv_name(), job.sequence) + ": from rank " + std::to_string(slot.peer) + ": " +
                        error.what());
    }
    check_header(header, slot.peer, job);
    headers.push_back(std::move(header));
  }
  return headers;
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
  const bool unpaired = config_.unpaired_backward &&
                        (header.forward_sequence == Header::kUnpaired || job.forward_sequence == Header::kUnpaired);
  if (direction_ == core::Direction::kBackward && !unpaired && header.forward_sequence != job.forward_sequence) {
    throw BridgeError(where(recv_name(), job.sequence) + ": rank " + std::to_string(peer) +
                      " sent the gradient of forward microbatch " + std::to_string(header.forward_sequence) +
                      ", expected that of " + std::to_string(job.forward_sequence) +
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
    for (std::int64_t sample = begin; sample < end; ++sample) {
      microbatch.rows[static_cast<std::size_t>(sample)] =
          header.num_rows > 0 ? header.rows[static_cast<std::size_t>(sample - begin)] : header.rows_per_sample;
    }
  }
  return microbatch;
}

}  // namespace mimo_ext::comm
