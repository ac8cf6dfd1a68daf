// The outcome of one operation that is under way.
#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>

#include "comm/staging.h"
#include "core/plan.h"

namespace mimo_ext::comm {

/// When an operation was posted, when its first byte was known to be on its way, and when it was complete: nanoseconds
/// of std::chrono::steady_clock.
struct Times {
  std::int64_t posted = 0;
  std::int64_t started = 0;
  std::int64_t ended = 0;

  static std::int64_t now() { return std::chrono::steady_clock::now().time_since_epoch().count(); }
};

/// Set once, by a worker or by the caller, and awaited by any thread. Thread-safe.
class Delivery {
 public:
  Delivery(bool is_send, bool is_forward) : is_send_(is_send), is_forward_(is_forward) {}

  /// Makes it the outcome of operation number `sequence`, not ended yet. Only while nobody else holds it.
  void begin(std::int64_t sequence) {
    sequence_ = sequence;
    done_ = false;
    tensor_.reset();
    microbatch_.reset();
    copy_.reset();
    error_ = nullptr;
  }

  bool is_send() const { return is_send_; }
  bool is_forward() const { return is_forward_; }
  std::int64_t sequence() const { return sequence_; }

  /// True once the operation has ended, well or not.
  bool wait_for(std::chrono::milliseconds limit) const {
    std::unique_lock lock(mutex_);
    return ended_.wait_for(lock, limit, [this] { return done_; });
  }
  bool done() const {
    const std::lock_guard lock(mutex_);
    return done_;
  }
  /// Rethrows the error of an operation that ended with one.
  void check() const {
    const std::lock_guard lock(mutex_);
    if (error_) std::rethrow_exception(error_);
  }
  /// Hands out the received tensor (undefined for a send, and where there is no gradient); once, after it is done.
  at::Tensor take() {
    const std::lock_guard lock(mutex_);
    if (error_) std::rethrow_exception(error_);
    return std::move(tensor_);
  }
  // Only after it is done without an error.
  const std::shared_ptr<const core::Microbatch>& microbatch() const { return microbatch_; }
  bool expects_backward() const { return expects_backward_; }
  const Times& times() const { return times_; }
  std::int64_t bytes() const { return bytes_; }
  /// The copy that still fills the tensor; null where there is none.
  const std::shared_ptr<Copy>& copy() const { return copy_; }

  void set(at::Tensor tensor, std::shared_ptr<const core::Microbatch> microbatch, bool expects_backward, Times times,
           std::int64_t bytes, std::shared_ptr<Copy> copy = nullptr) {
    const std::lock_guard lock(mutex_);
    tensor_ = std::move(tensor);
    copy_ = std::move(copy);
    microbatch_ = std::move(microbatch);
    expects_backward_ = expects_backward;
    times_ = times;
    bytes_ = bytes;
    done_ = true;
    ended_.notify_all();
  }
  /// Without effect where the operation has ended already: what was handed out stays good.
  void set_error(std::exception_ptr error) {
    const std::lock_guard lock(mutex_);
    if (done_) return;
    error_ = std::move(error);
    done_ = true;
    ended_.notify_all();
  }

 private:
  const bool is_send_;
  const bool is_forward_;
  std::int64_t sequence_ = 0;
  mutable std::mutex mutex_;
  mutable std::condition_variable ended_;
  bool done_ = false;
  at::Tensor tensor_;
  std::shared_ptr<Copy> copy_;
  std::shared_ptr<const core::Microbatch> microbatch_;
  bool expects_backward_ = false;
  Times times_;
  std::int64_t bytes_ = 0;
  std::exception_ptr error_;
};

}  // namespace mimo_ext::comm
