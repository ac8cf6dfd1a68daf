// What a bridge counts about itself, always, and the trace that it keeps when asked to.
//
// MIMO_EXT_TELEMETRY=0 builds without any of it: benchmarks/bench_telemetry.py measures against that what it costs.
#pragma once

#include <ATen/record_function.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>
#include <vector>

#include "comm/delivery.h"

#ifndef MIMO_EXT_TELEMETRY
#define MIMO_EXT_TELEMETRY 1
#endif

#if MIMO_EXT_TELEMETRY
/// A range of torch.profiler up to the end of the block.
#define MIMO_EXT_RANGE(name) RECORD_USER_SCOPE(name)
#else
#define MIMO_EXT_RANGE(name) static_cast<void>(name)
#endif

namespace mimo_ext::comm {

inline constexpr bool kTelemetry = MIMO_EXT_TELEMETRY != 0;

/// Any thread may read while others add.
class Count {
 public:
  /// By one thread at a time: an addition that shuts out others costs several times as much.
  void add(std::int64_t amount) {
    if constexpr (kTelemetry) value_.store(load() + amount, std::memory_order_relaxed);
  }
  /// By any threads.
  void add_shared(std::int64_t amount) {
    if constexpr (kTelemetry) value_.fetch_add(amount, std::memory_order_relaxed);
  }
  std::int64_t load() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<std::int64_t> value_{0};
};

/// Of one direction. Sends are counted by the caller that sends, receives by whoever has the turn to carry one out.
struct Counters {
  Count sends;
  Count receives;
  Count bytes_sent;       ///< payload
  Count bytes_forwarded;  ///< of what was received, to the lane
  Count bytes_received;   ///< payload, from others
  Count transfer_ns;      ///< of receives, from their start to their end
  Count exposed_ns;       ///< for which callers waited for receives; shared
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
  bool on() const { return kTelemetry && capacity_.load(std::memory_order_relaxed) > 0; }
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
