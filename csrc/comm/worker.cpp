#include "comm/worker.h"

#include <pthread.h>

#include <stdexcept>

namespace mimo_ext::comm {

void Worker::rouse() {
  if (!thread_.joinable()) {
    thread_ = std::thread([this] { run(); });
  } else if (asleep_) {
    asleep_ = false;
    changed_.notify_one();
  }
}

void Worker::submit(std::function<void()> task, When when) {
  const std::lock_guard lock(mutex_);
  if (closed_) throw std::logic_error("worker '" + name_ + "' is closed");
  tasks_.push_back(std::move(task));
  rouse();
  if (when == When::kNow && !urgent_) {
    urgent_ = true;
    changed_.notify_one();
  }
}

void Worker::run_first(std::unique_lock<std::mutex>& lock) {
  auto task = std::move(tasks_.front());
  tasks_.pop_front();
  running_ = true;
  lock.unlock();
  task();
  task = nullptr;  // what the task holds is released before the next wait
  lock.lock();
  running_ = false;
}

void Worker::hurry() {
  const std::lock_guard lock(mutex_);
  if (tasks_.empty() || urgent_) return;
  urgent_ = true;
  changed_.notify_one();
}

void Worker::watching(bool on) {
  const std::lock_guard lock(mutex_);
  watching_ = on;
  if (on && !closed_) rouse();
}

void Worker::close() {
  std::thread thread;
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    thread.swap(thread_);
  }
  changed_.notify_all();
  if (thread.joinable()) thread.join();
}

bool Worker::close_within(std::chrono::milliseconds limit) {
  {
    std::unique_lock lock(mutex_);
    closed_ = true;
    changed_.notify_all();
    if (thread_.joinable() && !changed_.wait_for(lock, limit, [this] { return ended_; })) return false;
  }
  close();
  return true;
}

void Worker::run() {
  pthread_setname_np(pthread_self(), name_.substr(0, 15).c_str());
  auto busy = std::chrono::steady_clock::now();
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait_for(lock, kTick, [this] { return closed_ || urgent_; });
    // All that is queued, whenever it is due: the thread is awake.
    if (watching_ || !tasks_.empty()) busy = std::chrono::steady_clock::now();
    if (watching_ && watch_) {
      lock.unlock();
      watch_();
      lock.lock();
    }
    while (!tasks_.empty() || running_) {
      if (running_) {
        awaited_ = true;
        changed_.wait(lock, [this] { return !running_; });
        awaited_ = false;
      } else {
        run_first(lock);
      }
    }
    urgent_ = false;
    if (closed_) {
      ended_ = true;
      changed_.notify_all();
      return;
    }
    if (!watching_ && std::chrono::steady_clock::now() - busy > kLinger) {
      asleep_ = true;
      changed_.wait(lock, [this] { return closed_ || urgent_ || !asleep_; });
      asleep_ = false;
      busy = std::chrono::steady_clock::now();
    }
  }
}

}  // namespace mimo_ext::comm
