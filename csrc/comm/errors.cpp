#include "comm/errors.h"

namespace mimo_ext::comm {

std::exception_ptr Failure::set(std::exception_ptr error) {
  std::vector<std::function<void()>> listeners;
  {
    const std::lock_guard lock(mutex_);
    if (error_) return error_;
    error_ = std::move(error);
    failed_.store(true, std::memory_order_release);
    listeners.swap(listeners_);
  }
  // Outside the lock: a listener may ask for the error.
  for (const auto& listener : listeners) listener();
  return get();
}

void Failure::check() const {
  if (!failed()) return;
  std::rethrow_exception(get());
}

std::exception_ptr Failure::get() const {
  const std::lock_guard lock(mutex_);
  return error_;
}

void Failure::on_failure(std::function<void()> listener) {
  {
    const std::lock_guard lock(mutex_);
    if (!error_) {
      listeners_.push_back(std::move(listener));
      return;
    }
  }
  listener();
}

}  // namespace mimo_ext::comm
