// Whose turn it is to receive: a worker's, or that of the caller who waits for this very microbatch.
#include "comm/channel_jobs.h"

namespace mimo_ext::comm {

void Channel::queue_receive(std::unique_ptr<ReceiveJob> job, Worker::When when) {
  {
    const std::lock_guard lock(queue_mutex_);
    queued_.push_back(std::move(job));
  }
  if (!groups_) receive_worker_->submit([this] { run_queued_receives(); }, when);
}

void Channel::run_queued_receives() {
  std::unique_lock lock(queue_mutex_);
  while (!turn_taken_ && !queued_.empty()) {
    std::unique_ptr<ReceiveJob> job = std::move(queued_.front());
    queued_.pop_front();
    turn_taken_ = true;
    lock.unlock();
    run_receive(*job, {});
    end_receive(std::move(job));
    lock.lock();
    turn_taken_ = false;
  }
}

void Channel::drive(std::unique_ptr<ReceiveJob> job, const std::function<void()>& poll) {
  receive_worker_->watching(true);
  std::exception_ptr interrupted;
  try {
    run_receive(*job, poll);
  } catch (const Interrupted& by) {
    interrupted = by.reason;
  }
  receive_worker_->watching(false);
  if (!interrupted) end_receive(std::move(job));
  bool others = false;
  {
    const std::lock_guard lock(queue_mutex_);
    turn_taken_ = false;
    if (interrupted) queued_.push_front(std::move(job));
    others = !queued_.empty() && !groups_;
  }
  if (others) receive_worker_->submit([this] { run_queued_receives(); }, Worker::When::kNow);
  if (interrupted) std::rethrow_exception(interrupted);
}

std::shared_ptr<Delivery> Channel::recv(Expected expected, bool waits_soon) {
  auto job = post_receive(std::move(expected));
  auto delivery = job->delivery;
  queue_receive(std::move(job), waits_soon ? Worker::When::kSoon : Worker::When::kNow);
  return delivery;
}

std::shared_ptr<Delivery> Channel::recv_now(Expected expected, const std::function<void()>& poll,
                                            const std::function<void(const std::shared_ptr<Delivery>&)>& posted) {
  auto job = post_receive(std::move(expected));
  const FlightRecorder::Blocked blocked(flight_, FlightCaller::In::kReceive, direction_ == core::Direction::kForward,
                                        job->sequence, job->times.posted);
  auto delivery = job->delivery;
  posted(delivery);
  if (groups_) {
    queue_receive(std::move(job), Worker::When::kNow);
    take_over(*delivery, poll);
    return delivery;
  }
  {
    const std::lock_guard lock(queue_mutex_);
    if (!turn_taken_ && queued_.empty()) {
      turn_taken_ = true;
    } else {
      queued_.push_back(std::move(job));
    }
  }
  if (job) {
    drive(std::move(job), poll);
  } else {
    receive_worker_->submit([this] { run_queued_receives(); }, Worker::When::kNow);
  }
  return delivery;
}

void Channel::take_over(const Delivery& delivery, const std::function<void()>& poll) {
  std::unique_ptr<ReceiveJob> job;
  {
    const std::lock_guard lock(queue_mutex_);
    // In groups nobody else carries out those before it.
    const bool is_next = !queued_.empty() && (groups_ || queued_.front()->delivery.get() == &delivery);
    if (!turn_taken_ && is_next) {
      job = std::move(queued_.front());
      queued_.pop_front();
      turn_taken_ = true;
    }
  }
  if (job) {
    drive(std::move(job), poll);
    if (groups_ && !delivery.done()) take_over(delivery, poll);
  } else if (receive_worker_) {
    receive_worker_->hurry();
  }
}

void Channel::drain(const std::function<void()>& poll) {
  while (groups_ && !failure_.failed()) {
    std::unique_ptr<ReceiveJob> job;
    {
      const std::lock_guard lock(queue_mutex_);
      if (turn_taken_ || queued_.empty()) return;
      job = std::move(queued_.front());
      queued_.pop_front();
      turn_taken_ = true;
    }
    drive(std::move(job), poll);
  }
}

}  // namespace mimo_ext::comm
