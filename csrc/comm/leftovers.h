// Communicators that were dropped without close(): their sends end in the background.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "comm/fork.h"

namespace mimo_ext::comm {

class Communicator;

/// A send returns before its peer has received; a program that then drops the communicator still expects the message to
/// arrive, and must not wait in a garbage collection. Each communicator is kept, with a thread of its own, until its
/// sends are gone (at most its timeout). Thread-safe.
class Leftovers {
 public:
  /// The one of this process. It is empty again once all sends have ended.
  static Leftovers& instance();

  /// `communicator` is no longer used by anyone else.
  void add(std::shared_ptr<Communicator> communicator);
  /// Returns when all sends have ended. `abort`: they are not waited for. `poll` is called every 100 ms and may throw.
  void finish(bool abort, const std::function<void()>& poll);

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::shared_ptr<Communicator>> pending_;
  const std::uint64_t generation_ = fork_generation();
};

}  // namespace mimo_ext::comm
