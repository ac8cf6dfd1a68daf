#include "comm/communicator.h"

#include <ATen/Functions.h>
#include <c10/core/GradMode.h>

#include <sstream>

#include "comm/leftovers.h"

namespace mimo_ext::comm {

namespace {

constexpr std::chrono::milliseconds kInterruptPeriod{100};

std::string text_of(at::IntArrayRef shape) {
  std::ostringstream out;
  out << shape;
  return out.str();
}

}  // namespace

Communicator::Communicator(BridgeConfig config, std::unique_ptr<Transport> forward, std::unique_ptr<Transport> backward,
                           int rank)
    : config_(std::move(config)),
      rank_(rank),
      forward_transport_(std::move(forward)),
      backward_transport_(std::move(backward)) {
  if (!forward_transport_) return;
  Transport& back = backward_transport_ ? *backward_transport_ : *forward_transport_;
  forward_ = std::make_unique<Channel>(config_, *forward_transport_, failure_, core::Direction::kForward);
  backward_ = std::make_unique<Channel>(config_, back, failure_, core::Direction::kBackward);
}

Communicator::~Communicator() {
  close(true);
}

void Communicator::close(bool abort) {
  if (closed_) return;
  closed_ = true;
  if (!forward_) return;
  if (abort) failure_.set(std::make_exception_ptr(BridgeError(where("close") + ": the bridge was closed")));
  forward_->close();
  backward_->close();
  forward_.reset();
  backward_.reset();
  forward_transport_.reset();
  backward_transport_.reset();
}

void Communicator::leave() {
  if (closed_) return;
  closed_ = true;
  if (!forward_) return;
  forward_->abort_receives();
  backward_->abort_receives();
  if (forward_->sending() || backward_->sending()) {
    Leftovers::instance().add(shared_from_this());
  } else {
    finish_sends();
  }
}

void Communicator::finish_sends() {
  // Nothing is destroyed here: abort_sends() may run at the same time.
  forward_->close();
  backward_->close();
}

void Communicator::abort_sends() {
  failure_.set(std::make_exception_ptr(BridgeError(where("close") + ": the process ends")));
}

std::string Communicator::where(const char* operation) const {
  return "bridge '" + config_.name + "', rank " + std::to_string(rank_) + ": " + operation;
}

void Communicator::check_open(bool needed, const char* operation, const char* role) const {
  if (closed_) throw BridgeError(where(operation) + ": the bridge is closed");
  failure_.check();
  if (!needed) {
    throw BridgeError(where(operation) + ": expected a rank of the " + role + " (source " +
                      core::describe(config_.source) + "; destination " + core::describe(config_.destination) +
                      "), got rank " + std::to_string(rank_));
  }
}

void Communicator::wait_for_room(Channel& channel, const char* operation) const {
  const auto deadline = std::chrono::steady_clock::now() + config_.timeout;
  while (!channel.wait_for_room(kInterruptPeriod)) {
    failure_.check();
    if (interrupt_check_) interrupt_check_();
    if (std::chrono::steady_clock::now() > deadline) {
      throw BridgeTimeoutError(where(operation) + ": " + std::to_string(config_.max_in_flight) +
                               " earlier microbatches (max_in_flight) were not received in time");
    }
  }
}

std::shared_ptr<Delivery> Communicator::send_forward(const at::Tensor& x,
                                                     const std::optional<std::vector<std::int64_t>>& row_counts,
                                                     std::optional<std::int64_t> num_samples) {
  constexpr const char* kOperation = "send_forward";
  check_open(is_source(), kOperation, "source");
  check_tensor(config_, x, config_.source.module, rank_, kOperation);
  const auto [lane, member] = config_.source.find(rank_);
  core::Microbatch microbatch;
  try {
    if (config_.fixed) {
      microbatch = *config_.fixed;
      const core::Plan plan = config_.plan(microbatch, core::Direction::kForward);
      const auto expected = plan.sender_shape(lane, member);
      const at::IntArrayRef shape(expected.data(), static_cast<std::size_t>(config_.ndim));
      if (x.sizes() != shape) {
        throw std::invalid_argument("module '" + config_.source.module + "': static shapes: expected " +
                                    text_of(shape) + ", got " + text_of(x.sizes()));
      }
    } else {
      microbatch = describe_microbatch(config_, x, lane, member, row_counts, num_samples);
    }
    wait_for_room(*forward_, kOperation);
    const bool expects_backward = c10::GradMode::is_enabled();
    auto delivery = forward_->send(microbatch, x, expects_backward);
    if (expects_backward && unpaired_receives_ > 0) {
      --unpaired_receives_;
    } else if (expects_backward) {
      sent_.push_back({num_sent_, microbatch});
    }
    ++num_sent_;
    last_ = std::move(microbatch);
    return delivery;
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(where(kOperation) + ": " + error.what());
  }
}

void Communicator::skip_without_backward() {
  while (!received_.empty() && received_.front().delivery->done() && !received_.front().delivery->expects_backward()) {
    received_.front().delivery->get();
    received_.pop_front();
  }
}

std::shared_ptr<Delivery> Communicator::recv_forward() {
  check_open(is_destination(), "recv_forward", "destination");
  skip_without_backward();  // or evaluation would keep every tensor that it received
  auto delivery = forward_->recv(std::nullopt);
  if (c10::GradMode::is_enabled() && unpaired_sends_ > 0) {
    --unpaired_sends_;
  } else if (c10::GradMode::is_enabled()) {
    received_.push_back({num_received_, delivery});
  }
  ++num_received_;
  return delivery;
}

core::Microbatch Communicator::microbatch_of_gradient(const at::Tensor& gradient) const {
  constexpr const char* kOperation = "send_backward";
  if (received_.empty() && config_.unpaired_backward) {
    if (config_.fixed) return *config_.fixed;
    const auto [lane, member] = config_.destination.find(rank_);
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
  if (!received_.front().delivery->done()) {
    throw BridgeError(where(kOperation) +
                      ": the microbatch has not been received yet: wait for its recv_forward first");
  }
  return received_.front().delivery->microbatch();
}

std::shared_ptr<Delivery> Communicator::send_backward(const at::Tensor& gradient) {
  constexpr const char* kOperation = "send_backward";
  check_open(is_destination(), kOperation, "destination");
  skip_without_backward();
  if (gradient.defined()) check_tensor(config_, gradient, config_.destination.module, rank_, kOperation);
  const core::Microbatch microbatch = microbatch_of_gradient(gradient);
  const auto [lane, member] = config_.destination.find(rank_);
  const core::Plan plan = config_.plan(microbatch, core::Direction::kForward);
  const auto expected = plan.receiver_shape(lane, member);
  const at::IntArrayRef shape(expected.data(), static_cast<std::size_t>(config_.ndim));
  at::Tensor payload = gradient;
  if (gradient.defined()) {
    if (gradient.sizes() != shape) {
      throw std::invalid_argument(where(kOperation) + ": module '" + config_.destination.module +
                                  "': expected a gradient of shape " + text_of(shape) + ", got " +
                                  text_of(gradient.sizes()));
    }
  } else if (config_.fixed) {
    payload = at::zeros(shape, at::TensorOptions().dtype(config_.dtype));  // no header could say "none"
  }
  wait_for_room(*backward_, kOperation);
  auto delivery =
      backward_->send(microbatch, payload, false, received_.empty() ? Header::kUnpaired : received_.front().sequence);
  if (received_.empty()) {
    ++unpaired_sends_;
  } else {
    received_.pop_front();
  }
  return delivery;
}

std::shared_ptr<Delivery> Communicator::recv_backward() {
  check_open(is_source(), "recv_backward", "source");
  if (sent_.empty() && config_.unpaired_backward) {
    auto delivery = backward_->recv(std::nullopt, Header::kUnpaired);
    ++unpaired_receives_;
    return delivery;
  }
  if (sent_.empty()) {
    throw BridgeError(where("recv_backward") +
                      ": no sent microbatch waits for its gradient (forward operations under "
                      "torch.no_grad() expect none)");
  }
  auto delivery = backward_->recv(sent_.front().microbatch, sent_.front().sequence);
  sent_.pop_front();
  return delivery;
}

at::Tensor Communicator::wait(const Delivery& delivery) const {
  while (!delivery.wait_for(kInterruptPeriod)) {
    if (interrupt_check_) interrupt_check_();
  }
  return delivery.get();
}

std::optional<core::Plan> Communicator::last_plan() const {
  if (config_.fixed) return config_.plan(*config_.fixed, core::Direction::kForward);
  if (!last_) return std::nullopt;
  return config_.plan(*last_, core::Direction::kForward);
}

}  // namespace mimo_ext::comm
