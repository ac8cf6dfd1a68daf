// What a bridge leaves behind on connections that other bridges share.
#pragma once

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace mimo_ext::comm {

/// Receives that are still posted when their bridge ends. gloo reads the messages of a connection in order: one that
/// comes for a receive that was dropped stays there, and nothing after it is read. So they are held for as long as the
/// connections, by whoever holds these. Thread-safe.
class Remains {
 public:
  template <typename T>
  void keep(std::unique_ptr<T> receives) {
    const std::lock_guard lock(mutex_);
    kept_.push_back(std::shared_ptr<T>(std::move(receives)));
  }

 private:
  std::mutex mutex_;
  std::vector<std::shared_ptr<void>> kept_;
};

}  // namespace mimo_ext::comm
