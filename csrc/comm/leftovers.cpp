#include "comm/leftovers.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "comm/communicator.h"

namespace mimo_ext::comm {

Leftovers& Leftovers::instance() {
  // Never destroyed: a thread may still hold its mutex when the process ends. A forked child has its own: the threads
  // are the parent's, and so is what they send.
  static std::atomic<Leftovers*> current{new Leftovers};
  Leftovers* found = current.load();
  if (found->generation_ != fork_generation()) {
    auto fresh = std::make_unique<Leftovers>();
    if (current.compare_exchange_strong(found, fresh.get())) found = fresh.release();
  }
  return *found;
}

void Leftovers::add(std::shared_ptr<Communicator> communicator) {
  {
    const std::lock_guard lock(mutex_);
    pending_.push_back(communicator);
  }
  std::thread([this, communicator = std::move(communicator)]() mutable {
    communicator->finish_sends();
    const Communicator* ended = communicator.get();
    communicator.reset();
    // Declared before the lock, so that the communicator's destructor runs after it.
    std::shared_ptr<Communicator> last;
    const std::lock_guard lock(mutex_);
    const auto entry = std::find_if(pending_.begin(), pending_.end(), [&](const auto& p) { return p.get() == ended; });
    last = std::move(*entry);
    pending_.erase(entry);
    changed_.notify_all();
  }).detach();
}

void Leftovers::finish(bool abort, const std::function<void()>& poll) {
  std::unique_lock lock(mutex_);
  if (abort) {
    const auto pending = pending_;
    lock.unlock();
    for (const auto& communicator : pending) communicator->abort_sends();
    lock.lock();
  }
  while (!changed_.wait_for(lock, std::chrono::milliseconds(100), [this] { return pending_.empty(); })) {
    lock.unlock();
    poll();
    lock.lock();
  }
}

}  // namespace mimo_ext::comm
