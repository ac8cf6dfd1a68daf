#include "comm/waiter.h"

namespace mimo_ext::comm {

void Waiter::wait(Request& request, std::chrono::steady_clock::time_point began, std::chrono::milliseconds timeout,
                  const std::function<void()>& poll) {
  const auto deadline = began + timeout;
  auto left = timeout;
  for (;;) {
    {
      const std::lock_guard lock(mutex_);
      if (aborted_) throw TransportError("aborted", false);
      current_ = &request;
    }
    bool complete = false;
    std::exception_ptr error;
    try {
      complete = request.wait(left);
    } catch (...) {
      error = std::current_exception();
    }
    {
      const std::lock_guard lock(mutex_);
      current_ = nullptr;
    }
    if (error) std::rethrow_exception(error);
    if (complete) return;
    if (poll) {
      try {
        poll();
      } catch (const BridgeError&) {
        throw;
      } catch (...) {
        throw Interrupted{std::current_exception()};
      }
    }
    left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
  }
}

void Waiter::nudge() {
  const std::lock_guard lock(mutex_);
  if (current_ != nullptr) current_->interrupt();
}

void Waiter::abort() {
  const std::lock_guard lock(mutex_);
  aborted_ = true;
  if (current_ != nullptr) current_->interrupt();
}

}  // namespace mimo_ext::comm
