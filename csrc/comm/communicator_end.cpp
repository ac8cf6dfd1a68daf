// How a communicator ends: closed, dropped, or left in a process that was forked off.
#include <exception>

#include "comm/communicator.h"
#include "comm/fork.h"
#include "comm/leftovers.h"

namespace mimo_ext::comm {

namespace {

/// How long a rank that gives up stays to say why.
constexpr std::chrono::milliseconds kLastWords{100};

}  // namespace

Communicator::~Communicator() {
  if (forked()) {
    abandon();
    return;
  }
  interrupt_check_ = nullptr;  // nothing may be thrown from here
  close(true);
  disconnect();  // also after leave()
}

void Communicator::disconnect() {
  forward_.reset();
  backward_.reset();
  if (last_words_) remains_->keep(std::move(last_words_));
  remains_.reset();
  forward_transport_.reset();
  backward_transport_.reset();
  forward_groups_.reset();
  backward_groups_.reset();
}

bool Communicator::forked() const {
  return generation_ != fork_generation();
}

void Communicator::abandon() {
  closed_ = true;
  // The threads that they would join are the parent's, and the connections are still in use there.
  static_cast<void>(forward_.release());
  static_cast<void>(backward_.release());
  static_cast<void>(last_words_.release());
  static_cast<void>(new std::shared_ptr<Remains>(std::move(remains_)));
  static_cast<void>(forward_transport_.release());
  static_cast<void>(backward_transport_.release());
  static_cast<void>(forward_groups_.release());
  static_cast<void>(backward_groups_.release());
}

void Communicator::close(bool abort, const std::string& reason) {
  if (closed_) return;
  if (forked()) return abandon();
  closed_ = true;
  if (!forward_) return;
  if (abort && !reason.empty()) {
    const auto deadline = std::chrono::steady_clock::now() + kLastWords;
    // First where somebody listens in any case.
    if (last_words_) last_words_->say(reason, deadline);
    forward_->give_up(reason, deadline);
    backward_->give_up(reason, deadline);
  }
  const FlightRecorder::Blocked blocked(flight_, FlightCaller::In::kClose, true, 0, Times::now());
  const auto fail = [this] {
    failure_.set(std::make_exception_ptr(BridgeError(where("close") + ": the bridge was closed")));
  };
  std::exception_ptr interrupted;
  if (abort) {
    told_ = true;
    fail();
  }
  for (Channel* channel : {forward_.get(), backward_.get()}) {
    try {
      channel->drain(interrupt_check_);
    } catch (...) {
      interrupted = std::current_exception();
      fail();
    }
    while (!channel->close_within(kInterruptPeriod)) {
      channel->nudge_sends();
      channel->nudge_receives();
      if (interrupted || !interrupt_check_) continue;
      try {
        interrupt_check_();
      } catch (...) {
        interrupted = std::current_exception();
        fail();
      }
    }
  }
  disconnect();
  if (interrupted) std::rethrow_exception(interrupted);
  if (failure_.failed() && !told_) {
    told_ = true;
    failure_.check();
  }
}

void Communicator::leave() {
  if (closed_) return;
  if (forked()) return abandon();
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

}  // namespace mimo_ext::comm
