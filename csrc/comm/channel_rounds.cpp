// Messages in groups: everything here runs in the caller's thread, and nothing but a header keeps it waiting where the
// device has streams.
#include <algorithm>
#include <sstream>

#include "comm/channel_jobs.h"

namespace mimo_ext::comm {

void Channel::add_sends(SendJob& job, std::size_t round, Messages& messages) const {
  if (!job.payload || round >= job.program->rounds.size()) return;
  for (const std::size_t index : job.program->rounds[round]) {
    const Transfer& transfer = job.program->transfers[index];
    messages.push_back({true, transfer.index, transfer.peer, &job.payload->message(index)});
  }
}

void Channel::add_receives(ReceiveJob& job, std::size_t round, Messages& messages) const {
  if (!job.incoming || round >= job.program->rounds.size()) return;
  const ReceiveProgram& program = *job.program;
  const ReceiveRound& mine = program.rounds[round];
  ReceiveProgram::Incoming& incoming = *job.incoming;
  const auto receive = [&](const Transfer& transfer, Slots& slots, std::size_t index) {
    if (incoming.skips(transfer.sender_lane)) return;
    slots.aim(index, incoming.result);
    messages.push_back({false, transfer.index, transfer.peer, &slots.message(index)});
  };
  for (const std::size_t index : mine.receives) receive(program.receives[index], incoming.receives, index);
  for (const std::size_t index : mine.lane_sends) {
    const Transfer& copy = program.lane_sends[index];
    if (incoming.skips(copy.sender_lane)) continue;
    incoming.lane_sends.load(index, incoming.result);
    messages.push_back({true, copy.index, copy.peer, &incoming.lane_sends.message(index)});
  }
  for (const std::size_t index : mine.lane_receives) {
    receive(program.lane_receives[index], incoming.lane_receives, index);
  }
}

Channel::Issued Channel::issue(const Messages& messages, const char* operation, std::int64_t sequence) {
  Issued issued;
  if (messages.empty()) return issued;
  group_log_.issued(direction_ == core::Direction::kForward, sequence, messages);
  for (const GroupTransport::Message& message : messages) {
    auto& peers = issued.peers;
    if (std::find(peers.begin(), peers.end(), message.peer) == peers.end()) peers.push_back(message.peer);
  }
  try {
    issued.request = groups_->issue(messages);
  } catch (const TransportError& error) {
    throw BridgeError(group_text(issued, operation, sequence) + ": " + error.what());
  }
  return issued;
}

std::string Channel::group_text(const Issued& issued, const char* operation, std::int64_t sequence) const {
  std::ostringstream text;
  text << where(operation, sequence) << ": group of messages with rank" << (issued.peers.size() > 1 ? "s" : "");
  for (std::size_t index = 0; index < issued.peers.size(); ++index)
    text << (index > 0 ? ", " : " ") << issued.peers[index];
  return text.str();
}

void Channel::wait_for_group(Waiter& waiter, Issued& issued, FlightPhase phase, std::uint64_t flight,
                             const char* operation, std::int64_t sequence, const std::function<void()>& poll) const {
  const auto began = std::chrono::steady_clock::now();
  flight_.update(flight, phase, issued.peers.front(), began.time_since_epoch().count());
  try {
    waiter.wait(issued.request, began, config_.timeout, poll);
    issued.request.reset();
  } catch (const TransportError& error) {
    failure_.check();
    if (!error.timed_out()) throw BridgeError(group_text(issued, operation, sequence) + ": " + error.what());
    std::ostringstream seconds;
    seconds << static_cast<double>(config_.timeout.count()) / 1000.0;
    throw BridgeTimeoutError(group_text(issued, operation, sequence) + ": not complete within " + seconds.str() + " s");
  }
}

void Channel::issue_sends(SendJob& job) {
  Messages messages;
  for (std::size_t round = 0; job.payload && round < job.program->rounds.size(); ++round) {
    messages.clear();
    add_sends(job, round, messages);
    if (!messages.empty()) job.issued.push_back(issue(messages, send_name(), job.sequence));
  }
}

void Channel::receive_in_rounds(ReceiveJob& job, const std::function<void()>& poll) {
  try {
    issue_rounds(job, poll);
  } catch (const Interrupted&) {
    throw;
  } catch (...) {
    failure_.set(std::current_exception());
    if (job.own) submit_send(std::move(job.own), Worker::When::kNow);  // who waits for it is told
    throw;
  }
  if (job.own) submit_send(std::move(job.own), Worker::When::kNow);
}

void Channel::issue_rounds(ReceiveJob& job, const std::function<void()>& poll) {
  Messages messages;
  const std::size_t receives = job.incoming ? job.program->rounds.size() : 0;
  const std::size_t sends = job.own && job.own->payload ? job.own->program->rounds.size() : 0;
  for (; job.round < std::max(receives, sends); ++job.round, job.round_issued = false) {
    if (!job.round_issued) {
      messages.clear();
      if (job.own) add_sends(*job.own, job.round, messages);
      const bool sends_own = !messages.empty();
      add_receives(job, job.round, messages);
      job.issued = issue(messages, recv_name(), job.sequence);
      job.round_issued = true;
      if (sends_own) job.own->issued.push_back({job.issued.request.share(), job.issued.peers});
    }
    if (job.round < receives) {
      // The last round, and one that the caller's own stream goes on with.
      const bool last = job.round + 1 == receives;
      if (last || !groups_->on_streams() || unpacks(job, job.round) || packs(job, job.round + 1)) {
        wait_for_round(job, poll);
      }
      finish_round(job);
    }
    // On streams requests complete by themselves; others have been waited for, or are the sends' alone.
    if (groups_->on_streams() && job.issued.request) job.under_way.push_back(std::move(job.issued));
    job.issued = {};
  }
}

void Channel::wait_for_round(ReceiveJob& job, const std::function<void()>& poll) {
  if (!groups_->on_streams()) {
    if (!job.issued.request) return;
    return wait_for_group(receive_waiter_, job.issued, FlightPhase::kPayload, job.flight, recv_name(), job.sequence,
                          poll);
  }
  const auto order = [&](Issued& issued) {
    if (!issued.request) return;
    try {
      issued.request.order();
    } catch (const TransportError& error) {
      throw BridgeError(group_text(issued, recv_name(), job.sequence) + ": " + error.what());
    }
  };
  for (Issued& issued : job.under_way) order(issued);
  order(job.issued);
}

bool Channel::unpacks(const ReceiveJob& job, std::size_t round) const {
  if (!job.incoming || round >= job.program->rounds.size()) return false;
  const ReceiveProgram& program = *job.program;
  const auto beside = [](const std::vector<Transfer>& transfers, const std::vector<std::size_t>& places) {
    return std::any_of(places.begin(), places.end(), [&](std::size_t place) { return !transfers[place].in_place; });
  };
  return beside(program.receives, program.rounds[round].receives) ||
         beside(program.lane_receives, program.rounds[round].lane_receives);
}

bool Channel::packs(const ReceiveJob& job, std::size_t round) const {
  if (!job.incoming || round >= job.program->rounds.size()) return false;
  const std::vector<Transfer>& copies = job.program->lane_sends;
  const auto& places = job.program->rounds[round].lane_sends;
  return std::any_of(places.begin(), places.end(), [&](std::size_t place) { return !copies[place].in_place; });
}

void Channel::finish_round(ReceiveJob& job) {
  const ReceiveProgram& program = *job.program;
  ReceiveProgram::Incoming& incoming = *job.incoming;
  const ReceiveRound& round = program.rounds[job.round];
  for (const std::size_t stage : round.stages) {
    if (incoming.skips(program.stages[stage].sender_lane)) continue;
    unpack_stage(job, program.stages[stage]);
  }
  for (const std::size_t index : round.lane_receives) {
    if (!incoming.skips(program.lane_receives[index].sender_lane)) {
      incoming.lane_receives.unpack(index, incoming.result);
    }
  }
}

void Channel::take_own(ReceiveJob& job) {
  // A rank on both sides issues its part of both in the same groups: each of them waits for peers that do the same.
  if (!is_sender() || job.own) return;
  const std::lock_guard lock(groups_mutex_);
  if (deferred_.empty() || deferred_.front()->sequence != job.sequence) {
    throw BridgeError(where(recv_name(), job.sequence) + ": expected " + send_name() +
                      " of the same microbatch first: this rank is on both sides, and its messages go in groups");
  }
  job.own = std::move(deferred_.front());
  deferred_.pop_front();
}

void Channel::flush_deferred() {
  for (;;) {
    std::unique_ptr<SendJob> job;
    {
      const std::lock_guard lock(groups_mutex_);
      if (deferred_.empty()) return;
      job = std::move(deferred_.front());
      deferred_.pop_front();
    }
    try {
      failure_.check();
      issue_sends(*job);
    } catch (...) {
      failure_.set(std::current_exception());
    }
    submit_send(std::move(job), Worker::When::kNow);
  }
}

void Channel::check_not_deferred(std::int64_t sequence) const {
  const std::lock_guard lock(groups_mutex_);
  if (deferred_.empty() || sequence < deferred_.front()->sequence) return;
  throw BridgeError(where(send_name(), sequence) + ": waited for before " + recv_name() +
                    " of the same microbatch: this rank is on both sides, and its messages go in groups");
}

void Channel::wait_for_sent(SendJob& job) {
  for (Issued& issued : job.issued) {
    failure_.check();
    if (!groups_->on_streams()) {
      wait_for_group(send_waiter_, issued, FlightPhase::kMessage, job.flight, send_name(), job.sequence, {});
      continue;
    }
    flight_.update(job.flight, FlightPhase::kMessage, issued.peers.front(), Times::now());
    poll_until([&] { return issued.request.complete(); }, group_text(issued, send_name(), job.sequence));
  }
  job.issued.clear();
}

void Channel::keep_until_complete(ReceiveJob& job) {
  if (job.under_way.empty()) {
    if (job.incoming) job.program->give(std::move(job.incoming));
    return;
  }
  Flying flying{std::move(job.under_way), job.sequence, std::chrono::steady_clock::now() + config_.timeout, job.program,
                std::move(job.incoming)};
  job.under_way.clear();
  const std::lock_guard lock(groups_mutex_);
  flying_.push_back(std::move(flying));
}

bool Channel::reap_flying() {
  const std::lock_guard lock(groups_mutex_);
  // In order: the groups of one communicator end one after the other.
  while (!flying_.empty()) {
    Flying& oldest = flying_.front();
    for (Issued& issued : oldest.issued) {
      const auto what = [&] { return group_text(issued, recv_name(), oldest.sequence); };
      try {
        if (issued.request.complete()) continue;
        if (std::chrono::steady_clock::now() < oldest.deadline) return false;
        throw BridgeTimeoutError(what() + ": not complete within the bridge's timeout");
      } catch (const TransportError& error) {
        failure_.set(std::make_exception_ptr(BridgeError(what() + ": " + error.what())));
        return false;
      } catch (const BridgeError&) {
        failure_.set(std::current_exception());
        return false;
      }
    }
    if (oldest.incoming) oldest.program->give(std::move(oldest.incoming));
    flying_.pop_front();
  }
  return true;
}

}  // namespace mimo_ext::comm
