// The receiving half of a channel: from posting to handing out. What is posted before it is known what comes is in
// channel_ahead.cpp, headers are in channel_headers.cpp, and who carries a receive out in channel_turns.cpp.
#include <ATen/Functions.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "comm/channel_jobs.h"

namespace mimo_ext::comm {

std::unique_ptr<Channel::ReceiveJob> Channel::post_receive(Expected expected) {
  if (groups_) reap_flying();
  failure_.check();
  const c10::NoGradGuard no_grad;
  auto job = receive_jobs_.take();
  if (!job) job = std::make_unique<ReceiveJob>();
  job->sequence = next_recv_;
  job->expected = std::move(expected);
  job->expects_backward = true;
  job->parsed.clear();
  job->has_local = false;
  job->times = {};
  job->times.posted = Times::now();
  if (staging_) {
    job->stream = staging_->current_stream();
    reap_landed(std::chrono::milliseconds(0));
  }
  job->flight = flight_.record(false, direction_ == core::Direction::kForward, job->sequence, 0, job->times.posted);
  job->delivery = new_delivery(false, job->sequence);
  try {
    if (config_.fixed) {
      // Everything is known: the payload's receives are posted now, ahead of whatever this rank sends next.
      job->times.started = job->times.posted;
      post_payload(*job, *config_.fixed, {});
    } else {
      expect_next(*job);
    }
  } catch (const BridgeError&) {
    flight_.retire(job->flight, true, Times::now());
    failure_.set(std::current_exception());
    failure_.check();
  }
  ++next_recv_;
  return job;
}

void Channel::end_receive(std::unique_ptr<ReceiveJob> job) {
  // Whoever waits for this may post the next receive at once: what is kept for it would else grow by a set of buffers,
  // sooner or later.
  const std::shared_ptr<Delivery> delivery = job->delivery;
  std::optional<Outcome> outcome = std::exchange(job->outcome, std::nullopt);
  const Times times = job->times;
  recycle(std::move(job));
  if (!outcome) return;
  delivery->set(std::move(outcome->tensor), std::move(outcome->microbatch), outcome->expects_backward, times,
                outcome->bytes, std::move(outcome->copy));
}

void Channel::recycle(std::unique_ptr<ReceiveJob> job) {
  // After a failure messages may still arrive in these buffers.
  if (failure_.failed() || receives_aborted_) {
    job->landing = {};
    if (remains_ != nullptr) remains_->keep(std::move(job));
    return;
  }
  if (groups_) {
    keep_until_complete(*job);
    job->round = 0;
  } else if (job->incoming) {
    job->program->give(std::move(job->incoming));
  }
  for (HeaderSlot& slot : job->eager) {
    if (slot.tensor.empty()) continue;
    const std::lock_guard lock(ahead_mutex_);
    eager_free_.push_back(std::move(slot.tensor));
    slot = {};
  }
  job->program.reset();
  job->expected = {};
  job->local = {};
  job->landing = {};
  job->delivery.reset();
  receive_jobs_.give(std::move(job));
}

void Channel::post_payload(ReceiveJob& job, const core::Microbatch& microbatch, std::vector<int> without_gradient) {
  job.program = receive_program(microbatch);
  if (config_.announces()) check_announced(job);
  job.incoming = job.program->take();
  flight_.set_bytes(job.flight, job.program->bytes_received);
  ReceiveProgram::Incoming& incoming = *job.incoming;
  incoming.without_gradient = std::move(without_gradient);
  incoming.result = new_result(job);
  if (!incoming.without_gradient.empty()) incoming.result.zero_();
  if (groups_) return;  // until they are waited for
  post_receives(job);
  for (std::size_t index = 0; index < job.program->lane_receives.size(); ++index) {
    post_part(job, job.program->lane_receives[index], incoming.lane_receives, index, kLaneTag);
  }
}

at::Tensor Channel::new_result(ReceiveJob& job) {
  const std::vector<std::int64_t>& shape = job.program->shape;
  if (!staging_) return at::empty(shape, config_.options());
  job.landing = staging_->land(shape, config_.dtype, *job.stream);
  return host_pool_->take(shape, config_.dtype);
}

bool Channel::post_part(ReceiveJob& job, const Transfer& transfer, Slots& slots, std::size_t index, int kind) {
  if (transfer.local || job.incoming->skips(transfer.sender_lane)) return false;
  slots.aim(index, job.incoming->result);
  if (transfer.with_header) {
    const at::Tensor& header = job.headers[header_of(transfer)].tensor.front();
    const at::Tensor& into = slots.tensor(index).front();
    std::memcpy(into.mutable_data_ptr(), header.data_ptr<std::int64_t>() + Header::kWords, into.nbytes());
    return false;
  }
  if (!slots.has_message(index)) return false;
  slots[index].request =
      post(false, slots.message(index), transfer.index, transfer.peer, kind, recv_name(), job.sequence);
  return true;
}

void Channel::post_receives(ReceiveJob& job) {
  // With headers every sender is known to have begun. Where many send to many, each connection takes what it gets of
  // the links; a few messages at a time, from other senders in each receiver's turn, share them better.
  constexpr std::int64_t kWindowBytes = std::int64_t{1} << 20;
  const std::int64_t window = config_.fixed || !job.program->takes_turns
                                  ? std::numeric_limits<std::int64_t>::max()
                                  : kWindowBytes / job.program->microbatch->element_size;
  ReceiveProgram::Incoming& incoming = *job.incoming;
  const std::vector<Transfer>& transfers = job.program->receives;
  for (; incoming.posted < transfers.size() && incoming.volume < window; ++incoming.posted) {
    const Transfer& transfer = transfers[incoming.posted];
    if (post_part(job, transfer, incoming.receives, incoming.posted, kPayloadTag)) incoming.volume += transfer.volume;
  }
}

void Channel::run_receive(ReceiveJob& job, const std::function<void()>& poll) {
  const c10::NoGradGuard no_grad;  // grad mode is per thread
  try {
    failure_.check();
    if (receives_aborted_) throw BridgeError(where(recv_name(), job.sequence) + ": the bridge was dropped");
    receive(job, poll);
  } catch (const Interrupted&) {
    throw;
  } catch (const BridgeError&) {
    // What was dropped is no failure: the sends go on.
    const auto error = std::current_exception();
    flight_.retire(job.flight, true, Times::now());
    job.delivery->set_error(receives_aborted_ && !failure_.failed() ? error : failure_.set(error));
  } catch (const std::exception& error) {
    flight_.retire(job.flight, true, Times::now());
    const auto named = std::make_exception_ptr(BridgeError(where(recv_name(), job.sequence) + ": " + error.what()));
    job.delivery->set_error(failure_.set(named));
  }
}

void Channel::look_around(ReceiveJob& job) const {
  const auto probe = [&](Request& request, FlightPhase phase, int peer) {
    if (!request) return;
    try {
      request.probe();
    } catch (const TransportError& error) {
      failure_.check();
      flight_.update(job.flight, phase, peer, Times::now());
      throw connection_broke(phase, peer, recv_name(), job.sequence, error);
    }
  };
  for (std::size_t index = job.parsed.size(); index < job.headers.size(); ++index) {
    probe(job.headers[index].request, FlightPhase::kHeader, header_senders_[index].rank);
  }
  for (std::size_t index = 0; index < job.eager.size(); ++index) {
    probe(job.eager[index].request, FlightPhase::kPayload, header_senders_[index].rank);
  }
  check_awaited(received_from_, recv_name(), job.sequence);
  if (!job.incoming) return;
  ReceiveProgram::Incoming& incoming = *job.incoming;
  const auto& [stages, receives, lane_receives, lane_sends] = incoming.progress;
  for (std::size_t index = receives; index < incoming.posted; ++index) {
    probe(incoming.receives[index].request, FlightPhase::kPayload, job.program->receives[index].peer);
  }
  for (std::size_t index = lane_receives; index < job.program->lane_receives.size(); ++index) {
    probe(incoming.lane_receives[index].request, FlightPhase::kLaneCopyFrom, job.program->lane_receives[index].peer);
  }
}

void Channel::receive(ReceiveJob& job, const std::function<void()>& caller) {
  struct {
    const Channel& channel;
    ReceiveJob& job;
    const std::function<void()>& caller;
  } nudged{*this, job, caller};
  // One pointer: std::function allocates for more.
  const std::function<void()> poll = [&nudged] {
    nudged.channel.look_around(nudged.job);
    if (nudged.caller) nudged.caller();
  };
  if (groups_) take_own(job);
  if (meets_itself_ && !job.has_local) {
    flight_.update(job.flight, FlightPhase::kItself, transport_.rank(), Times::now());
    job.local = take_local(job.sequence, poll);
    job.has_local = true;
  }
  std::shared_ptr<const core::Microbatch> without_gradient;
  if (!job.incoming) {
    receive_headers(job, poll);
    without_gradient = agree(job);
  }
  if (groups_) {
    receive_in_rounds(job, poll);
  } else if (job.incoming) {
    receive_payload(job, poll);
  }
  // Not before everything is here: a sender that has closed its end of a connection would answer by resetting it, and
  // what is still on its way would be lost.
  announce_next();
  if (!job.incoming) return deliver(job, {}, without_gradient);  // no sender has one
  deliver(job, job.incoming->result, job.program->microbatch);
}

void Channel::receive_payload(ReceiveJob& job, const std::function<void()>& poll) {
  const ReceiveProgram& program = *job.program;
  ReceiveProgram::Incoming& incoming = *job.incoming;
  auto& [stages, receives, lane_receives, lane_sends] = incoming.progress;
  const auto wait = [&](Request& request, FlightPhase phase, int peer) {
    if (request) wait_for(receive_waiter_, request, phase, peer, job.flight, recv_name(), job.sequence, poll);
  };
  // What has arrived is forwarded to the replicas while the next lane's chunk, or the next chunk, is still on the wire.
  for (; stages < program.stages.size(); ++stages) {
    const ReceiveProgram::Stage& stage = program.stages[stages];
    if (incoming.skips(stage.sender_lane)) {
      receives = stage.last_receive;
      continue;
    }
    for (; receives < stage.last_receive; ++receives) {
      const Transfer& transfer = program.receives[receives];
      Slot& slot = incoming.receives[receives];
      if (transfer.eager > 0 && !transfer.local) {
        HeaderSlot& eager = job.eager[header_of(transfer)];
        wait(eager.request, FlightPhase::kPayload, transfer.peer);
        std::memcpy(slot.head.front().mutable_data_ptr(), eager.tensor.front().const_data_ptr(),
                    slot.head.front().nbytes());
      }
      if (!slot.request) continue;
      wait(slot.request, FlightPhase::kPayload, transfer.peer);
      incoming.volume -= transfer.volume;
      post_receives(job);
    }
    unpack_stage(job, stage);
    for (std::size_t index = stage.first_send; index < stage.last_send; ++index) {
      const Transfer& copy = program.lane_sends[index];
      incoming.lane_sends.load(index, incoming.result);
      incoming.lane_sends[index].request =
          post(true, incoming.lane_sends.tensor(index), copy.index, copy.peer, kLaneTag, recv_name(), job.sequence);
    }
  }
  for (; lane_receives < program.lane_receives.size(); ++lane_receives) {
    const Transfer& copy = program.lane_receives[lane_receives];
    if (incoming.skips(copy.sender_lane)) continue;
    wait(incoming.lane_receives[lane_receives].request, FlightPhase::kLaneCopyFrom, copy.peer);
    incoming.lane_receives.unpack(lane_receives, incoming.result);
  }
  // The tensor is handed out when the replicas have their copies: its new owner may change it in place.
  for (; lane_sends < program.lane_sends.size(); ++lane_sends) {
    wait(incoming.lane_sends[lane_sends].request, FlightPhase::kLaneCopyTo, program.lane_sends[lane_sends].peer);
  }
}

void Channel::unpack_stage(ReceiveJob& job, const ReceiveOrder::Stage& stage) {
  ReceiveProgram::Incoming& incoming = *job.incoming;
  // Contributions are added in a fixed order, whatever the order of arrival: results are reproducible.
  for (std::size_t place = stage.first_receive; place < stage.last_receive; ++place) {
    const std::size_t index = job.program->unpack_order[place];
    const Transfer& transfer = job.program->receives[index];
    if (transfer.local) {
      write_part(transfer, incoming.result, job.local.boxes.at(transfer.local_index).reshape({-1}));
    } else {
      incoming.receives.unpack(index, incoming.result);
    }
  }
}

void Channel::deliver(ReceiveJob& job, at::Tensor tensor, std::shared_ptr<const core::Microbatch> microbatch) {
  job.times.ended = Times::now();
  std::int64_t bytes = 0;
  if (job.incoming) {
    const ReceiveProgram& program = *job.program;
    const auto volume = [&](const std::vector<Transfer>& transfers) {
      std::int64_t total = 0;
      for (const Transfer& transfer : transfers) {
        if (!transfer.local && !job.incoming->skips(transfer.sender_lane)) total += transfer.volume;
      }
      return total * program.microbatch->element_size;
    };
    const bool all = job.incoming->without_gradient.empty();
    bytes = all ? program.bytes_received : volume(program.receives) + volume(program.lane_receives);
    counters_.bytes_forwarded.add(all ? program.bytes_forwarded : volume(program.lane_sends));
  }
  flight_.retire(job.flight, false, job.times.ended);
  counters_.receives.add(1);
  counters_.bytes_received.add(bytes);
  counters_.transfer_ns.add(job.times.ended - job.times.started);
  const bool expects_backward = tensor.defined() && job.expects_backward;
  if (job.incoming) job.incoming->result.reset();
  auto copy = staging_ && tensor.defined() ? stage_in(job, tensor) : nullptr;
  job.outcome = Outcome{std::move(tensor), std::move(microbatch), expects_backward, bytes, std::move(copy)};
}

Channel::LocalItem Channel::take_local(std::int64_t sequence, const std::function<void()>& poll) {
  constexpr std::chrono::milliseconds kPollPeriod{100};
  const auto deadline = std::chrono::steady_clock::now() + config_.timeout;
  std::unique_lock lock(local_mutex_);
  while (!local_changed_.wait_for(lock, kPollPeriod,
                                  [this] { return !local_.empty() || failure_.failed() || receives_aborted_; })) {
    if (poll) {
      lock.unlock();
      try {
        poll();
      } catch (const BridgeError&) {
        throw;
      } catch (...) {
        throw Interrupted{std::current_exception()};
      }
      lock.lock();
    }
    if (std::chrono::steady_clock::now() > deadline) {
      throw BridgeTimeoutError(where(recv_name(), sequence) + ": this rank, which is on both sides, did not call " +
                               send_name() + " in time");
    }
  }
  failure_.check();
  if (receives_aborted_) throw BridgeError(where(recv_name(), sequence) + ": the bridge was dropped");
  LocalItem item = std::move(local_.front());
  local_.pop_front();
  return item;
}

}  // namespace mimo_ext::comm
