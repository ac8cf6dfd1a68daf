// The operations of a communicator. How it ends is in communicator_end.cpp.
#include "comm/communicator.h"

#include <ATen/Functions.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <array>
#include <exception>
#include <sstream>

#include "comm/fork.h"

namespace mimo_ext::comm {

namespace {

std::string text_of(at::IntArrayRef shape) {
  std::ostringstream out;
  out << shape;
  return out.str();
}

}  // namespace

class Communicator::Telling {
 public:
  explicit Telling(Communicator& communicator) : communicator_(communicator) {}
  Telling(const Telling&) = delete;
  Telling& operator=(const Telling&) = delete;
  ~Telling() {
    if (std::uncaught_exceptions() > before_ && communicator_.failure_.failed()) communicator_.told_ = true;
  }

 private:
  Communicator& communicator_;
  const int before_ = std::uncaught_exceptions();
};

Communicator::Communicator(BridgeConfig config, std::unique_ptr<Transport> forward, std::unique_ptr<Transport> backward,
                           int rank, std::unique_ptr<GroupTransport> forward_groups,
                           std::unique_ptr<GroupTransport> backward_groups)
    : config_(std::move(config)),
      rank_(rank),
      generation_(fork_generation()),
      forward_transport_(std::move(forward)),
      backward_transport_(std::move(backward)),
      forward_groups_(std::move(forward_groups)),
      backward_groups_(std::move(backward_groups)) {
  if (!forward_transport_) return;
  Transport& back = backward_transport_ ? *backward_transport_ : *forward_transport_;
  forward_ = std::make_unique<Channel>(config_, *forward_transport_, failure_, forward_counters_, trace_, flight_,
                                       core::Direction::kForward, group_log_, forward_groups_.get());
  backward_ = std::make_unique<Channel>(config_, back, failure_, backward_counters_, trace_, flight_,
                                        core::Direction::kBackward, group_log_, backward_groups_.get());
  last_words_ = std::make_unique<LastWords>(config_, *forward_transport_);
  forward_->set_end(last_words_.get(), remains_.get());
  backward_->set_end(last_words_.get(), remains_.get());
}

std::string Communicator::where(const char* operation) const {
  return "bridge '" + config_.name + "', rank " + std::to_string(rank_) + ": " + operation;
}

void Communicator::check_process(const char* operation) const {
  if (!forked()) return;
  throw BridgeError(where(operation) +
                    ": the bridge belongs to the process that this one was forked off from; it cannot be used here");
}

void Communicator::check_open(bool needed, const char* operation, const char* role) const {
  check_process(operation);
  if (closed_) throw BridgeError(where(operation) + ": the bridge is closed");
  failure_.check();
  if (!needed) {
    throw BridgeError(where(operation) + ": expected a rank of the " + role + " (source " +
                      core::describe(config_.source) + "; destination " + core::describe(config_.destination) +
                      "), got rank " + std::to_string(rank_));
  }
}

void Communicator::wait_for_room(Channel& channel, bool is_forward, const char* operation) {
  if (channel.wait_for_room(std::chrono::milliseconds(0))) return;
  const auto began = std::chrono::steady_clock::now();
  const auto deadline = began + config_.timeout;
  const FlightRecorder::Blocked blocked(flight_, FlightCaller::In::kRoom, is_forward, 0,
                                        began.time_since_epoch().count());
  while (!channel.wait_for_room(kInterruptPeriod)) {
    channel.nudge_sends();
    failure_.check();
    if (interrupt_check_) interrupt_check_();
    if (std::chrono::steady_clock::now() > deadline) {
      throw BridgeTimeoutError(where(operation) + ": " + std::to_string(config_.max_in_flight) +
                               " earlier microbatches (max_in_flight) were not received in time");
    }
  }
}

core::Microbatch Communicator::microbatch_of_activation(const at::Tensor& x,
                                                        const std::optional<std::vector<std::int64_t>>& row_counts,
                                                        std::optional<std::int64_t> num_samples,
                                                        const RowShards& row_shards) {
  if (config_.fixed) {
    if (row_shards) throw std::invalid_argument("row_shards differ from microbatch to microbatch: not with shape=");
    if (row_counts) throw std::invalid_argument("row_counts differ from microbatch to microbatch: not with shape=");
    if (num_samples && *num_samples != config_.fixed->samples) {
      throw std::invalid_argument("num_samples: expected " + std::to_string(config_.fixed->samples) +
                                  " (static shapes), got " + std::to_string(*num_samples));
    }
    return {};  // the channel knows
  }
  const auto [lane, member] = config_.sides->find_source(rank_);
  return describe_microbatch(config_, x, lane, member, row_counts, num_samples, row_shards);
}

std::shared_ptr<Delivery> Communicator::send_forward(const at::Tensor& x,
                                                     const std::optional<std::vector<std::int64_t>>& row_counts,
                                                     std::optional<std::int64_t> num_samples,
                                                     const RowShards& row_shards, bool want_delivery) {
  constexpr const char* kOperation = "send_forward";
  MIMO_EXT_RANGE("mimo_ext::send_forward");
  const Telling telling(*this);
  check_open(is_source(), kOperation, "source");
  check_tensor(config_, x, config_.source.module, rank_, kOperation);
  try {
    auto program = forward_->send_program(microbatch_of_activation(x, row_counts, num_samples, row_shards));
    if (config_.fixed && x.sizes() != program->shape) {
      throw std::invalid_argument("module '" + config_.source.module + "': static shapes: expected " +
                                  text_of(program->shape) + ", got " + text_of(x.sizes()));
    }
    wait_for_room(*forward_, true, kOperation);
    const bool expects_backward = c10::GradMode::is_enabled();
    if (expects_backward && !program->answer_bytes) {
      program->answer_bytes = config_.unpaired_backward ? -1 : forward_->answer_bytes(*program, *backward_);
    }
    const std::int64_t answer_bytes = program->answer_bytes.value_or(-1);
    last_ = program->microbatch;
    auto delivery = forward_->send(std::move(program), x, expects_backward, 0, want_delivery);
    if (expects_backward && unpaired_receives_ > 0) {
      --unpaired_receives_;
    } else if (expects_backward) {
      sent_.push_back({num_sent_, last_, answer_bytes});
    }
    ++num_sent_;
    return delivery;
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(where(kOperation) + ": " + error.what());
  }
}

bool Communicator::Received::ended() {
  if (!delivery) return true;
  if (!delivery->done()) return false;
  delivery->check();
  microbatch = delivery->microbatch();
  expects_backward = delivery->expects_backward();
  delivery.reset();
  return true;
}

void Communicator::skip_without_backward() {
  while (!received_.empty() && received_.front().ended() && !received_.front().expects_backward) received_.pop_front();
}

Channel::Expected Communicator::expected_forward(const RowShards& row_shards) {
  check_open(is_destination(), "recv_forward", "destination");
  if (row_shards && config_.fixed) {
    throw std::invalid_argument(where("recv_forward") +
                                ": row_shards differ from microbatch to microbatch: not with shape=");
  }
  skip_without_backward();  // or evaluation would keep every microbatch that it received
  return {nullptr, 0, row_shards};
}

void Communicator::note_received(const std::shared_ptr<Delivery>& delivery) {
  if (c10::GradMode::is_enabled() && unpaired_sends_ > 0) {
    --unpaired_sends_;
  } else if (c10::GradMode::is_enabled()) {
    received_.push_back({num_received_, delivery, nullptr, false});
  }
  ++num_received_;
}

std::shared_ptr<Delivery> Communicator::irecv_forward(const RowShards& row_shards, bool waits_soon) {
  MIMO_EXT_RANGE("mimo_ext::recv_forward");
  const Telling telling(*this);
  auto expected = expected_forward(row_shards);
  auto delivery = forward_->recv(std::move(expected), waits_soon);
  note_received(delivery);
  return delivery;
}

at::Tensor Communicator::recv_forward(const RowShards& row_shards) {
  MIMO_EXT_RANGE("mimo_ext::recv_forward.wait");
  const Telling telling(*this);
  auto expected = expected_forward(row_shards);
  const std::int64_t began = Times::now();
  auto delivery =
      forward_->recv_now(std::move(expected), interrupt_check_, [this](const auto& posted) { note_received(posted); });
  at::Tensor y = finish(*delivery, began);
  const bool wants = c10::GradMode::is_enabled() && delivery->expects_backward();
  if (wants && (y.is_floating_point() || y.is_complex())) y.set_requires_grad(true);
  return y;
}

core::Microbatch Communicator::microbatch_of_gradient(const at::Tensor& gradient) {
  constexpr const char* kOperation = "send_backward";
  if (received_.empty() && config_.unpaired_backward) {
    if (config_.fixed) return *config_.fixed;
    const auto [lane, member] = config_.sides->find_destination(rank_);
    try {
      return describe_unpaired_gradient(config_, gradient, lane, member);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(where(kOperation) + " before its microbatch was received: " + error.what());
    }
  }
  if (received_.empty()) {
    throw BridgeError(where(kOperation) +
                      ": no received microbatch waits for its gradient (forward operations under "
                      "torch.no_grad() expect none)");
  }
  if (!received_.front().ended()) {
    throw BridgeError(where(kOperation) +
                      ": the microbatch has not been received yet: wait for its recv_forward first");
  }
  return *received_.front().microbatch;
}

std::shared_ptr<Delivery> Communicator::send_backward(const at::Tensor& gradient, bool want_delivery) {
  constexpr const char* kOperation = "send_backward";
  MIMO_EXT_RANGE("mimo_ext::send_backward");
  const Telling telling(*this);
  check_open(is_destination(), kOperation, "destination");
  skip_without_backward();
  if (gradient.defined()) check_tensor(config_, gradient, config_.destination.module, rank_, kOperation);
  auto program = backward_->send_program(microbatch_of_gradient(gradient));
  at::Tensor payload = gradient;
  if (gradient.defined()) {
    if (gradient.sizes() != program->shape) {
      throw std::invalid_argument(where(kOperation) + ": module '" + config_.destination.module +
                                  "': expected a gradient of shape " + text_of(program->shape) + ", got " +
                                  text_of(gradient.sizes()));
    }
  } else if (config_.fixed) {
    payload = at::zeros(program->shape, config_.options());  // no header could say "none"
  }
  wait_for_room(*backward_, false, kOperation);
  const bool unpaired = received_.empty();
  const std::int64_t of = unpaired ? Header::kUnpaired : received_.front().sequence;
  auto delivery = backward_->send(std::move(program), payload, false, of, want_delivery);
  if (unpaired) {
    ++unpaired_sends_;
  } else {
    received_.pop_front();
  }
  return delivery;
}

Channel::Expected Communicator::expected_backward() {
  check_open(is_source(), "recv_backward", "source");
  if (sent_.empty() && config_.unpaired_backward) return {nullptr, Header::kUnpaired, nullptr};
  if (sent_.empty()) {
    throw BridgeError(where("recv_backward") +
                      ": no sent microbatch waits for its gradient (forward operations under "
                      "torch.no_grad() expect none)");
  }
  return {sent_.front().microbatch, sent_.front().sequence, nullptr};
}

void Communicator::note_backward_posted() {
  if (sent_.empty()) {
    ++unpaired_receives_;
  } else {
    sent_.pop_front();
  }
}

std::shared_ptr<Delivery> Communicator::irecv_backward(bool waits_soon) {
  MIMO_EXT_RANGE("mimo_ext::recv_backward");
  const Telling telling(*this);
  auto expected = expected_backward();
  auto delivery = backward_->recv(std::move(expected), waits_soon);
  note_backward_posted();
  return delivery;
}

at::Tensor Communicator::recv_backward() {
  MIMO_EXT_RANGE("mimo_ext::recv_backward.wait");
  const Telling telling(*this);
  auto expected = expected_backward();
  const std::int64_t began = Times::now();
  const Sent sent = sent_.empty() ? Sent{} : sent_.front();
  auto delivery =
      backward_->recv_now(std::move(expected), interrupt_check_, [this](const auto&) { note_backward_posted(); });
  at::Tensor gradient = finish(*delivery, began);
  // Who sends a gradient has received its microbatch.
  if (gradient.defined() && delivery->bytes() == sent.answer_bytes) forward_->end_answered(sent.sequence);
  return gradient;
}

at::Tensor Communicator::finish(Delivery& delivery, std::int64_t began) {
  const FlightRecorder::Blocked blocked(flight_,
                                        delivery.is_send() ? FlightCaller::In::kSend : FlightCaller::In::kReceive,
                                        delivery.is_forward(), delivery.sequence(), began);
  if (delivery.is_send() && forward_) {
    (delivery.is_forward() ? *forward_ : *backward_).check_not_deferred(delivery.sequence());
    // Nobody looks after sends at once unless somebody waits.
    forward_->hurry_sends();
    backward_->hurry_sends();
  } else if (forward_ && !delivery.done()) {
    (delivery.is_forward() ? *forward_ : *backward_).take_over(delivery, interrupt_check_);
  }
  const bool waits = !delivery.done();
  while (!delivery.wait_for(kInterruptPeriod)) {
    if (interrupt_check_) interrupt_check_();
    if (config_.carrier == Carrier::kGroups) failure_.check();  // what is deferred may never end
    if (!delivery.is_send() && forward_) (delivery.is_forward() ? *forward_ : *backward_).nudge_receives();
  }
  delivery.check();
  const auto copy = delivery.copy();
  if (copy) order_after(*copy, delivery);
  at::Tensor tensor = delivery.take();
  if (delivery.is_send() || !kTelemetry) return tensor;
  // Where the receive ended in this thread, it has looked at the clock already.
  const std::int64_t ended = waits || copy || trace_.on() ? Times::now() : delivery.times().ended;
  counters(delivery.is_forward()).exposed_ns.add_shared(std::max<std::int64_t>(0, ended - began));
  if (trace_.on()) {
    trace_.add({false, delivery.is_forward(), delivery.sequence(), delivery.bytes(), delivery.times(), began, ended});
  }
  return tensor;
}

void Communicator::order_after(Copy& copy, const Delivery& delivery) {
  const auto deadline = std::chrono::steady_clock::now() + config_.timeout;
  const std::string head = where(delivery.is_forward() ? "recv_forward" : "recv_backward") + " of microbatch " +
                           std::to_string(delivery.sequence()) + ": copy to the device: ";
  try {
    while (!copy.order(kInterruptPeriod)) {
      failure_.check();
      if (interrupt_check_) interrupt_check_();
      if (std::chrono::steady_clock::now() > deadline) {
        throw BridgeTimeoutError(head + "not complete within the bridge's timeout");
      }
    }
  } catch (const BridgeError&) {
    std::rethrow_exception(failure_.set(std::current_exception()));
  } catch (const c10::Error& error) {
    std::rethrow_exception(failure_.set(std::make_exception_ptr(BridgeError(head + error.what_without_backtrace()))));
  }
}

at::Tensor Communicator::wait(Delivery& delivery) {
  static constexpr std::array<const char*, 4> kRanges{"mimo_ext::recv_backward.wait", "mimo_ext::recv_forward.wait",
                                                      "mimo_ext::send_backward.wait", "mimo_ext::send_forward.wait"};
  check_process("wait");
  MIMO_EXT_RANGE(kRanges[(delivery.is_send() ? 2U : 0U) + (delivery.is_forward() ? 1U : 0U)]);
  const Telling telling(*this);
  return finish(delivery, Times::now());
}

std::optional<core::Plan> Communicator::last_plan() const {
  if (config_.fixed) return config_.plan(*config_.fixed, core::Direction::kForward);
  if (!last_) return std::nullopt;
  return config_.plan(*last_, core::Direction::kForward);
}

}  // namespace mimo_ext::comm
