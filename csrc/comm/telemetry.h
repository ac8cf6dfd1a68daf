// What a bridge counts about itself, always, and the trace that it keeps when asked to.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>
#include <vector>

#include "comm/delivery.h"

namespace mimo_ext::comm {

/// Of one direction. Any thread may read while others count.
struct Counters {
  std::atomic<std::int64_t> sends{0};
  std::atomic<std::int64_t> receives{0};
  std::atomic<std::int64_t> bytes_sent{0};      ///< payload, with what is forwarded to the lane
  std::atomic<std::int64_t> bytes_received{0};  ///< payload, from others
  std::atomic<std::int64_t> transfer_ns{0};     ///< of receives, from their start to their end
  std::atomic<std::int64_t> exposed_ns{0};      ///< for which callers waited for receives
};

/// One operation as its rank saw it: nanoseconds of std::chrono::steady_clock (CLOCK_MONOTONIC, one for all processes
/// of a host).
struct Event {
  bool is_send = false;
  bool is_forward = false;
  std::int64_t microbatch = 0;
  std::int64_t bytes = 0;
  Times times;
  std::int64_t wait_began = 0;  ///< 0 where nobody waited
  std::int64_t wait_ended = 0;
};

/// The last events of a bridge. Thread-safe; without a capacity it costs a load per operation.
class Trace {
 public:
  /// Forgets what was recorded and keeps the next `capacity` events; 0 ends recording.
  void start(std::size_t capacity) {
    const std::lock_guard lock(mutex_);
    events_.clear();
    capacity_.store(capacity, std::memory_order_relaxed);
  }
  bool on() const { return capacity_.load(std::memory_order_relaxed) > 0; }
  /// The oldest event makes room where there are too many.
  void add(const Event& event) {
    const std::lock_guard lock(mutex_);
    const std::size_t capacity = capacity_.load(std::memory_order_relaxed);
    if (capacity == 0) return;
    while (events_.size() >= capacity) events_.pop_front();
    events_.push_back(event);
  }
  std::vector<Event> events() const {
    const std::lock_guard lock(mutex_);
    return {events_.begin(), events_.end()};
  }

 private:
  mutable std::mutex mutex_;
  std::atomic<std::size_t> capacity_{0};
  std::deque<Event> events_;
};

}  // namespace mimo_ext::comm
