// One thread that runs tasks in order.
#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

#include "comm/fifo.h"

namespace mimo_ext::comm {

/// Tasks must not throw. All but the constructor may be called from any thread but the worker's own. The thread starts
/// when it is first needed, so that an idle direction of a bridge costs nothing, and never touches Python.
///
/// To wake a thread for each task would cost the caller more than many a task is worth. A thread that was busy a moment
/// ago looks around by itself, every `kTick`, and goes to sleep only after `kLinger` of idleness.
class Worker {
 public:
  static constexpr std::chrono::milliseconds kTick{20};
  static constexpr std::chrono::milliseconds kLinger{1000};

  enum class When : std::uint8_t {
    kNow,
    kSoon,  ///< within a tick
  };

  /// `name` (at most 15 characters are shown) names the thread in debuggers. `watch` is called once in a tick while
  /// watching is on and no task runs.
  explicit Worker(std::string name, std::function<void()> watch = {})
      : name_(std::move(name)), watch_(std::move(watch)) {}
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;
  /// Runs what is queued, then joins.
  ~Worker() { close(); }

  /// Throws std::logic_error after close().
  void submit(std::function<void()> task, When when);
  /// What is queued runs now.
  void hurry();
  /// Runs the first task that is queued in the calling thread, unless one is running or `wanted()` is false (it is
  /// asked under the lock, while no task runs). For tasks that are known to end at once: that of another thread costs
  /// more.
  template <typename Wanted>
  bool help(const Wanted& wanted) {
    std::unique_lock lock(mutex_);
    if (running_ || closed_ || tasks_.empty() || !wanted()) return false;
    run_first(lock);
    if (awaited_) changed_.notify_all();
    return true;
  }
  void watching(bool on);
  /// Runs what is queued, then joins. Later tasks are refused.
  void close();
  /// Likewise, waiting up to `limit`; false where the thread still runs.
  bool close_within(std::chrono::milliseconds limit);

 private:
  void run();
  /// Runs the first task without the lock.
  void run_first(std::unique_lock<std::mutex>& lock);
  /// Starts or wakes the thread unless it looks around by itself. Under the lock.
  void rouse();

  const std::string name_;
  const std::function<void()> watch_;
  std::mutex mutex_;
  std::condition_variable changed_;
  Fifo<std::function<void()>> tasks_;
  bool running_ = false;  ///< a task, in whatever thread
  bool awaited_ = false;  ///< the thread waits for a helper's
  bool urgent_ = false;
  bool watching_ = false;
  bool asleep_ = false;
  bool closed_ = false;
  bool ended_ = false;  ///< the thread runs nothing any more
  std::thread thread_;
};

}  // namespace mimo_ext::comm
