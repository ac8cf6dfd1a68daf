// Construction, plans, sending. Receiving is in channel_receive.cpp.
#include "comm/channel.h"

#include <ATen/Functions.h>
#include <c10/core/GradMode.h>

#include "comm/channel_jobs.h"

namespace mimo_ext::comm {

void Waiter::wait(Request& request, std::chrono::milliseconds timeout) {
  {
    const std::lock_guard lock(mutex_);
    if (aborted_) throw TransportError("aborted", false);
    current_ = &request;
  }
  std::exception_ptr error;
  try {
    request.wait(timeout);
  } catch (...) {
    error = std::current_exception();
  }
  const std::lock_guard lock(mutex_);
  current_ = nullptr;
  if (error) std::rethrow_exception(error);
}

void Waiter::abort() {
  const std::lock_guard lock(mutex_);
  aborted_ = true;
  if (current_ != nullptr) current_->abort();
}

Channel::Channel(const BridgeConfig& config, Transport& transport, Failure& failure, core::Direction direction)
    : config_(config),
      transport_(transport),
      failure_(failure),
      direction_(direction),
      sender_(direction == core::Direction::kForward ? config.source : config.destination),
      receiver_(direction == core::Direction::kForward ? config.destination : config.source) {
  std::tie(sender_lane_, sender_member_) = sender_.find(transport.rank());
  std::tie(receiver_lane_, receiver_member_) = receiver_.find(transport.rank());
  const std::string suffix = direction == core::Direction::kForward ? "fwd" : "bwd";
  if (is_sender()) send_worker_ = std::make_unique<Worker>("mimo-send-" + suffix);
  if (is_receiver()) receive_worker_ = std::make_unique<Worker>("mimo-recv-" + suffix);
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

void Channel::close() {
  if (send_worker_) send_worker_->close();
  if (receive_worker_) receive_worker_->close();
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

void Channel::wait_for(Waiter& waiter, Request& request, const char* what, int peer, const char* operation,
                       std::int64_t sequence) const {
  try {
    waiter.wait(request, config_.timeout);
  } catch (const TransportError& error) {
    failure_.check();  // aborted because of an earlier failure: that one is told
    if (&waiter == &receive_waiter_ && receives_aborted_) {
      throw BridgeError(where(operation, sequence) + ": the bridge was dropped");
    }
    const std::string head = where(operation, sequence) + ": " + what + " rank " + std::to_string(peer);
    if (error.timed_out()) {
      throw BridgeTimeoutError(head + ": nothing within " +
                               std::to_string(static_cast<double>(config_.timeout.count()) / 1000.0).substr(0, 6) +
                               " s (" + error.what() + ")");
    }
    throw BridgeError(head + ": the peer is gone or the connection broke (" + error.what() + ")");
  }
}

std::unique_ptr<Request> Channel::post(bool sending, const at::Tensor& tensor, int peer, int kind,
                                       const char* operation, std::int64_t sequence) const {
  try {
    return sending ? transport_.send(tensor, peer, tag(kind)) : transport_.recv(tensor, peer, tag(kind));
  } catch (const std::exception& error) {
    throw BridgeError(where(operation, sequence) + ": " + (sending ? "message to" : "message from") + " rank " +
                      std::to_string(peer) + ": the peer is gone or the connection broke (" + error.what() + ")");
  }
}

std::shared_ptr<const Channel::CachedPlan> Channel::plan_for(const core::Microbatch& microbatch, Role role) {
  auto& last = last_plans_[static_cast<std::size_t>(role)];
  {
    const std::lock_guard lock(plan_mutex_);
    if (last && last->plan.microbatch() == microbatch) return last;
  }
  core::Plan plan = config_.plan(microbatch, direction_);
  core::RankPlan mine = plan.for_rank(transport_.rank(), role == Role::kSend, role == Role::kReceive);
  auto cached = std::make_shared<const CachedPlan>(CachedPlan{std::move(plan), std::move(mine)});
  const std::lock_guard lock(plan_mutex_);
  last = cached;
  return cached;
}

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

void Channel::post_headers(const Header& header, SendJob& job) {
  const Header::Words words = header.encode();
  at::Tensor buffer = at::empty({static_cast<std::int64_t>(Header::kWords)}, at::kLong);
  std::copy(words.begin(), words.end(), buffer.data_ptr<std::int64_t>());
  at::Tensor extension;
  if (header.has_extension()) {
    extension = at::empty({header.num_rows}, at::kLong);
    std::copy(header.rows.begin(), header.rows.end(), extension.data_ptr<std::int64_t>());
  }
  const auto [first, last] = core::Plan::lanes_met(sender_lane_, sender_.num_lanes(), receiver_.num_lanes());
  for (int lane = first; lane < last; ++lane) {
    // Each rank of the receiver's lane hears from one member of this lane.
    for (int member = sender_member_; member < receiver_.lane_size(); member += sender_.lane_size()) {
      const int peer = receiver_.lanes[static_cast<std::size_t>(lane)][static_cast<std::size_t>(member)];
      if (peer == transport_.rank()) continue;
      job.pending.push_back({post(true, buffer, peer, kHeaderTag, send_name(), job.sequence), peer});
      if (extension.defined())
        job.pending.push_back({post(true, extension, peer, kRowsTag, send_name(), job.sequence), peer});
    }
  }
}

bool Channel::meets_itself() const {
  if (!is_sender() || !is_receiver()) return false;
  const auto [first, last] = core::Plan::lanes_met(sender_lane_, sender_.num_lanes(), receiver_.num_lanes());
  return first <= receiver_lane_ && receiver_lane_ < last;
}

std::shared_ptr<Delivery> Channel::send(const core::Microbatch& microbatch, const at::Tensor& x, bool expects_backward,
                                        std::int64_t forward_sequence) {
  failure_.check();
  const c10::NoGradGuard no_grad;
  const auto plan = plan_for(microbatch, Role::kSend);  // throws before anything is sent
  auto job = std::make_shared<SendJob>();
  job->sequence = next_send_;
  job->delivery = std::make_shared<Delivery>();

  // Parts first: what needs packing may fail (memory), sends should not.
  struct Part {
    at::Tensor tensor;
    int peer;
  };
  std::vector<Part> parts;
  LocalItem local;
  if (x.defined()) {
    // The caller may swap x.data once this returns. Lazy conjugation and negation are no part of the storage.
    const at::Tensor storage = x.detach().resolve_conj().resolve_neg();
    parts.reserve(plan->mine.sends.size());
    for (const core::Message& message : plan->mine.sends) {
      at::Tensor part = part_of(storage, message.send_box);
      if (message.receiver == transport_.rank()) {
        local.boxes.push_back(std::move(part));
      } else {
        parts.push_back({std::move(part), message.receiver});
      }
    }
  }
  try {
    if (!config_.fixed) {
      Header header = header_for(microbatch, !x.defined(), expects_backward);
      header.forward_sequence = forward_sequence;
      local.header = header;
      post_headers(header, *job);
    }
    for (Part& part : parts) {
      job->pending.push_back({post(true, part.tensor, part.peer, kPayloadTag, send_name(), job->sequence), part.peer});
    }
  } catch (const BridgeError&) {
    failure_.set(std::current_exception());
    failure_.check();
  }
  if (meets_itself()) {
    const std::lock_guard lock(local_mutex_);
    local_.push_back(std::move(local));
    local_changed_.notify_all();
  }
  ++next_send_;
  {
    const std::lock_guard lock(room_mutex_);
    ++in_flight_;
  }
  auto delivery = job->delivery;
  send_worker_->submit([this, job] { run_send(*job); });
  return delivery;
}

bool Channel::wait_for_room(std::chrono::milliseconds limit) {
  std::unique_lock lock(room_mutex_);
  room_changed_.wait_for(lock, limit, [this] { return in_flight_ < config_.max_in_flight || failure_.failed(); });
  return in_flight_ < config_.max_in_flight;
}

void Channel::run_send(SendJob& job) {
  try {
    for (SendJob::Pending& pending : job.pending) {
      failure_.check();
      wait_for(send_waiter_, *pending.request, "message to", pending.peer, send_name(), job.sequence);
      pending.request.reset();
    }
    job.delivery->set({});
  } catch (...) {
    job.delivery->set_error(failure_.set(std::current_exception()));
  }
  {
    const std::lock_guard lock(room_mutex_);
    --in_flight_;
  }
  room_changed_.notify_all();
}

}  // namespace mimo_ext::comm
