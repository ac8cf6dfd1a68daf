// Waiting for messages, abortable from any thread.
#pragma once

#include <chrono>
#include <exception>
#include <functional>
#include <mutex>

#include "comm/errors.h"
#include "comm/transport.h"

namespace mimo_ext::comm {

/// What a wait throws when its poll did: the message is still in flight and may be waited for again.
struct Interrupted {
  std::exception_ptr reason;
};

/// Waits for one request at a time; used by one thread at a time.
class Waiter {
 public:
  /// Returns when the message is complete. Throws TransportError, at the latest `timeout` after `began`. `poll` is
  /// called after each nudge; where it throws anything but a BridgeError, Interrupted is thrown.
  void wait(Request& request, std::chrono::steady_clock::time_point began, std::chrono::milliseconds timeout,
            const std::function<void()>& poll);
  /// From any thread: lets a wait that is under way call its poll.
  void nudge();
  /// From any thread: the wait that is under way, and all later ones, fail.
  void abort();

 private:
  std::mutex mutex_;
  Request* current_ = nullptr;
  bool aborted_ = false;
};

}  // namespace mimo_ext::comm
