// The outcome of one operation that is under way.
#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <optional>

#include "core/plan.h"

namespace mimo_ext::comm {

/// Set once by a worker, awaited by any thread. Thread-safe.
class Delivery {
 public:
  /// True once the operation has ended, well or not.
  bool wait_for(std::chrono::milliseconds limit) const {
    std::unique_lock lock(mutex_);
    return ended_.wait_for(lock, limit, [this] { return done_; });
  }
  bool done() const {
    const std::lock_guard lock(mutex_);
    return done_;
  }
  /// The received tensor (undefined for a send, and where there is no gradient). Only after it is done; rethrows its
  /// error.
  at::Tensor get() const {
    const std::lock_guard lock(mutex_);
    if (error_) std::rethrow_exception(error_);
    return tensor_;
  }
  /// What was received; only after it is done without an error.
  const core::Microbatch& microbatch() const { return microbatch_; }
  bool expects_backward() const { return expects_backward_; }

  void set(at::Tensor tensor, core::Microbatch microbatch = {}, bool expects_backward = false) {
    const std::lock_guard lock(mutex_);
    tensor_ = std::move(tensor);
    microbatch_ = std::move(microbatch);
    expects_backward_ = expects_backward;
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
  mutable std::mutex mutex_;
  mutable std::condition_variable ended_;
  bool done_ = false;
  at::Tensor tensor_;
  core::Microbatch microbatch_;
  bool expects_backward_ = false;
  std::exception_ptr error_;
};

}  // namespace mimo_ext::comm
