// Construction, programs, and what sending and receiving share.
#include "comm/channel.h"

#include <algorithm>
#include <sstream>
#include <thread>

#include "comm/channel_jobs.h"

namespace mimo_ext::comm {

namespace {

/// Shapes alternate in practice (the last microbatch of an epoch, evaluation); each program holds buffers.
constexpr std::size_t kPrograms = 4;

/// Nobody can tell these apart from here.
constexpr const char* kConnectionBroke = ": the peer is gone, or gave up and broke the connection (";

template <typename Program>
std::shared_ptr<Program> find(const std::vector<std::shared_ptr<Program>>& programs, const core::Microbatch& microbatch,
                              bool any) {
  const auto fits = [&](const auto& program) { return any || *program->microbatch == microbatch; };
  const auto found = std::find_if(programs.rbegin(), programs.rend(), fits);
  return found == programs.rend() ? nullptr : *found;
}

template <typename Program>
void keep(std::vector<std::shared_ptr<Program>>& programs, const std::shared_ptr<Program>& program) {
  if (programs.size() == kPrograms) programs.erase(programs.begin());
  programs.push_back(program);
}

}  // namespace

Channel::Channel(const BridgeConfig& config, Transport& transport, Failure& failure, Counters& counters, Trace& trace,
                 FlightRecorder& flight, core::Direction direction, GroupLog& group_log, GroupTransport* groups)
    : config_(config),
      transport_(transport),
      failure_(failure),
      counters_(counters),
      trace_(trace),
      flight_(flight),
      direction_(direction),
      sender_(direction == core::Direction::kForward ? config.source : config.destination),
      receiver_(direction == core::Direction::kForward ? config.destination : config.source),
      staging_(config.carrier == Carrier::kStaged ? make_staging(config.device, config.copy_delay) : nullptr),
      host_pool_(staging_ ? std::make_unique<HostPool>(*staging_) : nullptr),
      groups_(groups),
      group_log_(group_log) {
  std::tie(sender_lane_, sender_member_) = sender_.find(transport.rank());
  std::tie(receiver_lane_, receiver_member_) = receiver_.find(transport.rank());
  const std::string suffix = direction == core::Direction::kForward ? "fwd" : "bwd";
  const auto peer = [&](int rank, int lane) { return HeaderPeer{rank, transport.index_of(rank), lane}; };
  if (is_sender()) {
    send_worker_ = std::make_unique<Worker>("mimo-send-" + suffix);
    if (staging_) stage_worker_ = std::make_unique<Worker>("mimo-stage-" + suffix);
    const auto [first, last] = core::Plan::lanes_met(sender_lane_, sender_.num_lanes(), receiver_.num_lanes());
    meets_itself_ = first <= receiver_lane_ && receiver_lane_ < last;
    for (int lane = first; lane < last; ++lane) {
      // Each rank of the receiver's lane hears from one member of this lane.
      for (int member = sender_member_; member < receiver_.lane_size(); member += sender_.lane_size()) {
        const int rank = receiver_.lanes[static_cast<std::size_t>(lane)][static_cast<std::size_t>(member)];
        if (rank != transport.rank()) header_receivers_.push_back(peer(rank, lane));
      }
    }
  }
  if (is_receiver()) {
    receive_worker_ = std::make_unique<Worker>("mimo-recv-" + suffix, [this, ticks = 0]() mutable {
      // Five ticks of a worker: a caller that waits looks for Ctrl-C this often.
      if (++ticks % 5 == 0) receive_waiter_.nudge();
    });
    const auto [first, last] = core::Plan::lanes_met(receiver_lane_, receiver_.num_lanes(), sender_.num_lanes());
    for (int lane = first; lane < last; ++lane) {
      const auto& members = sender_.lanes[static_cast<std::size_t>(lane)];
      header_senders_.push_back(
          peer(members[static_cast<std::size_t>(receiver_member_ % sender_.lane_size())], receiver_lane_));
    }
  }
  if (is_receiver()) {
    eager_bytes_ = eager_bytes_of(config_, sender_.num_lanes(), receiver_.num_lanes());
    eager_.resize(header_senders_.size());
  }
  failure_.on_failure([this] {
    send_waiter_.abort();
    receive_waiter_.abort();
    {
      const std::lock_guard lock(local_mutex_);  // not between a waiter's look at failed() and its sleep
    }
    local_changed_.notify_all();
    room_changed_.notify_all();
  });
}

Channel::~Channel() {
  close();
  if (remains_ == nullptr) return;
  while (!queued_.empty()) {
    queued_.front()->landing = {};
    remains_->keep(std::move(queued_.front()));
    queued_.pop_front();
  }
  if (!eager_.empty()) remains_->keep(std::make_unique<std::vector<Fifo<HeaderSlot>>>(std::move(eager_)));
  if (!next_headers_.empty()) remains_->keep(std::make_unique<std::vector<HeaderSlot>>(std::move(next_headers_)));
}

void Channel::abort_receives() {
  receives_aborted_ = true;
  receive_waiter_.abort();
  {
    const std::lock_guard lock(local_mutex_);  // not between a waiter's look at the flag and its sleep
  }
  local_changed_.notify_all();
}

bool Channel::sending() {
  const std::lock_guard lock(room_mutex_);
  return in_flight_ > 0;
}

bool Channel::close_within(std::chrono::milliseconds limit) {
  flush_deferred();
  for (Worker* worker : {stage_worker_.get(), send_worker_.get(), receive_worker_.get()}) {
    if (worker != nullptr && !worker->close_within(limit)) return false;
  }
  const bool landed = reap_landed(limit);
  const bool complete = reap_flying();
  if (!complete) std::this_thread::sleep_for(std::min(limit, std::chrono::milliseconds(1)));
  return (landed && complete) || failure_.failed();
}

void Channel::close() {
  flush_deferred();
  // In this order: what one has done is the next one's.
  for (Worker* worker : {stage_worker_.get(), send_worker_.get(), receive_worker_.get()}) {
    if (worker != nullptr) worker->close();
  }
  reap_landed(config_.timeout);
  while (!reap_flying() && !failure_.failed()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

const char* Channel::send_name() const {
  return direction_ == core::Direction::kForward ? "send_forward" : "send_backward";
}

const char* Channel::recv_name() const {
  return direction_ == core::Direction::kForward ? "recv_forward" : "recv_backward";
}

int Channel::tag(int kind) const {
  return config_.tag_offset + (direction_ == core::Direction::kForward ? 0 : kNumTags) + kind;
}

std::string Channel::where(const char* operation, std::int64_t sequence) const {
  return "bridge '" + config_.name + "', rank " + std::to_string(transport_.rank()) + ": " + operation +
         " of microbatch " + std::to_string(sequence);
}

void Channel::wait_for(Waiter& waiter, Request& request, FlightPhase phase, int peer, std::uint64_t id,
                       const char* operation, std::int64_t sequence, const std::function<void()>& poll) const {
  const auto began = std::chrono::steady_clock::now();
  flight_.update(id, phase, peer, began.time_since_epoch().count());
  Awaited& awaited = &waiter == &receive_waiter_ ? received_from_ : sent_to_;
  awaited = {peer, false};
  try {
    waiter.wait(request, began, config_.timeout, poll);
    awaited.peer = -1;
    request.reset();
  } catch (const TransportError& error) {
    failure_.check();  // aborted because of an earlier failure: that one is told
    if (&waiter == &receive_waiter_ && receives_aborted_) {
      throw BridgeError(where(operation, sequence) + ": the bridge was dropped");
    }
    const std::string head = where(operation, sequence) + ": " + text_of(phase) + " rank " + std::to_string(peer);
    if (error.timed_out()) {
      std::ostringstream seconds;
      seconds << static_cast<double>(config_.timeout.count()) / 1000.0;
      throw BridgeTimeoutError(head + ": nothing within " + seconds.str() + " s");
    }
    throw connection_broke(phase, peer, operation, sequence, error);
  }
}

void Channel::poll_until(const std::function<bool()>& complete, const std::string& what) const {
  constexpr std::chrono::microseconds kShortest{10};
  constexpr std::chrono::microseconds kLongest{320};
  const auto deadline = std::chrono::steady_clock::now() + config_.timeout;
  try {
    for (auto pause = kShortest; !complete(); pause = std::min(2 * pause, kLongest)) {
      failure_.check();
      if (std::chrono::steady_clock::now() > deadline) {
        std::ostringstream seconds;
        seconds << static_cast<double>(config_.timeout.count()) / 1000.0;
        throw BridgeTimeoutError(what + ": not complete within " + seconds.str() + " s");
      }
      std::this_thread::sleep_for(pause);
    }
  } catch (const c10::Error& error) {
    throw BridgeError(what + ": " + error.what_without_backtrace());
  } catch (const TransportError& error) {
    throw BridgeError(what + ": " + error.what());
  }
}

BridgeError Channel::connection_broke(FlightPhase phase, int peer, const char* operation, std::int64_t sequence,
                                      const TransportError& error) const {
  if (const std::string reason = last_words_of(peer); !reason.empty()) {
    return BridgeError(where(operation, sequence) + ": " + reason);
  }
  return BridgeError(where(operation, sequence) + ": " + text_of(phase) + " rank " + std::to_string(peer) +
                     kConnectionBroke + error.what() + ")");
}

std::string Channel::last_words_of(int peer) const {
  return last_words_ == nullptr ? std::string() : last_words_->heard_at_the_end_of(peer);
}

void Channel::check_awaited(Awaited& awaited, const char* operation, std::int64_t sequence) const {
  if (last_words_ == nullptr || awaited.peer < 0) return;
  const std::string reason = last_words_->heard_from(awaited.peer);
  if (reason.empty()) return;
  if (awaited.gave_up) throw BridgeError(where(operation, sequence) + ": " + reason);
  awaited.gave_up = true;
}

Request Channel::post(bool sending, std::vector<at::Tensor>& tensor, int index, int peer, int kind,
                      const char* operation, std::int64_t sequence) const {
  try {
    return sending ? transport_.send(tensor, index, tag(kind)) : transport_.recv(tensor, index, tag(kind));
  } catch (const std::exception& error) {
    if (const std::string reason = last_words_of(peer); !reason.empty()) {
      throw BridgeError(where(operation, sequence) + ": " + reason);
    }
    throw BridgeError(where(operation, sequence) + ": " + (sending ? "message to" : "message from") + " rank " +
                      std::to_string(peer) + kConnectionBroke + error.what() + ")");
  }
}

template <typename Program>
std::shared_ptr<Program> Channel::program_for(const core::Microbatch& microbatch, std::pair<int, int> place,
                                              std::vector<std::shared_ptr<Program>>& programs) {
  {
    const std::lock_guard lock(programs_mutex_);
    if (auto program = find(programs, microbatch, config_.fixed.has_value())) return program;
  }
  // Outside the lock: to plan takes a while.
  auto program = std::make_shared<Program>(config_, transport_, config_.fixed.value_or(microbatch), direction_, place);
  const std::lock_guard lock(programs_mutex_);
  keep(programs, program);
  return program;
}

std::shared_ptr<SendProgram> Channel::send_program(const core::Microbatch& microbatch) {
  return program_for(microbatch, {sender_lane_, sender_member_}, send_programs_);
}

std::shared_ptr<ReceiveProgram> Channel::receive_program(const core::Microbatch& microbatch) {
  return program_for(microbatch, {receiver_lane_, receiver_member_}, receive_programs_);
}

std::shared_ptr<Delivery> Channel::new_delivery(bool is_send, std::int64_t sequence) {
  constexpr std::size_t kKept = 8;
  auto& kept = is_send ? send_deliveries_ : receive_deliveries_;
  for (const auto& delivery : kept) {
    if (delivery.use_count() > 1) continue;
    delivery->begin(sequence);
    return delivery;
  }
  auto delivery = std::make_shared<Delivery>(is_send, direction_ == core::Direction::kForward);
  delivery->begin(sequence);
  if (kept.size() < kKept) kept.push_back(delivery);
  return delivery;
}

}  // namespace mimo_ext::comm
