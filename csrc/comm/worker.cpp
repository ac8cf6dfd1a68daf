#include "comm/worker.h"

#include <pthread.h>

#include <stdexcept>

namespace mimo_ext::comm {

void Worker::submit(std::function<void()> task) {
  {
    const std::lock_guard lock(mutex_);
    if (closed_) throw std::logic_error("worker '" + name_ + "' is closed");
    tasks_.push_back(std::move(task));
    if (!thread_.joinable()) thread_ = std::thread([this] { run(); });
  }
  changed_.notify_one();
}

void Worker::close() {
  std::thread thread;
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    thread.swap(thread_);
  }
  changed_.notify_one();
  if (thread.joinable()) thread.join();
}

void Worker::run() {
  pthread_setname_np(pthread_self(), name_.substr(0, 15).c_str());
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return closed_ || !tasks_.empty(); });
    if (tasks_.empty()) return;
    auto task = std::move(tasks_.front());
    tasks_.pop_front();
    lock.unlock();
    task();
    task = nullptr;  // what the task holds is released before the next wait
    lock.lock();
  }
}

}  // namespace mimo_ext::comm
