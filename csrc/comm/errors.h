// Errors of the communicator, and the place where the first one is kept.
#pragma once

#include <atomic>
#include <exception>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace mimo_ext::comm {

/// A transfer failed: a peer died, sent something else than expected, or the bridge is closed. The message names the
/// bridge, this rank, the operation, the microbatch and the peer.
class BridgeError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A peer did not come within the bridge's timeout.
class BridgeTimeoutError : public BridgeError {
 public:
  using BridgeError::BridgeError;
};

/// The first error of a bridge. Every later operation rethrows it: after an error nothing is sent or handed out any
/// more. Thread-safe.
class Failure {
 public:
  /// Keeps `error` if it is the first, and calls the listeners once. Returns the error that is kept.
  std::exception_ptr set(std::exception_ptr error);
  bool failed() const { return failed_.load(std::memory_order_acquire); }
  /// Rethrows the kept error, if any.
  void check() const;
  std::exception_ptr get() const;
  /// `listener` must not throw; it is called from the failing thread, or at once where the failure has happened
  /// already.
  void on_failure(std::function<void()> listener);

 private:
  mutable std::mutex mutex_;
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
  std::vector<std::function<void()>> listeners_;
};

}  // namespace mimo_ext::comm
