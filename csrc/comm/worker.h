// One thread that runs tasks in order.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

namespace mimo_ext::comm {

/// Tasks must not throw. submit() and drain() may be called from any thread but the worker's own. The thread starts
/// with the first task, so that an idle direction of a bridge costs nothing, and never touches Python.
class Worker {
 public:
  /// `name` (at most 15 characters are shown) names the thread in debuggers.
  explicit Worker(std::string name) : name_(std::move(name)) {}
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;
  /// Runs what is queued, then joins.
  ~Worker() { close(); }

  void submit(std::function<void()> task);
  /// Runs what is queued, then joins. Later tasks are refused (std::logic_error).
  void close();

 private:
  void run();

  const std::string name_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  bool closed_ = false;
  std::thread thread_;
};

}  // namespace mimo_ext::comm
