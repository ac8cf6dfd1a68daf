// Tensors of a device that travel through host memory.
#include <ATen/Functions.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <thread>

#include "comm/channel_jobs.h"

namespace mimo_ext::comm {

void Channel::stage_out(SendJob& job, const at::Tensor& x, LocalItem& local) {
  struct Part {
    std::size_t transfer;
    at::Tensor host;
  };
  std::vector<Part> parts;
  const std::vector<Transfer>& transfers = job.program->transfers;
  for (std::size_t index = 0; index < transfers.size(); ++index) {
    if (transfers[index].local) {
      local.boxes.push_back(staging_->host_memory({transfers[index].volume}, config_.dtype));  // outlives the job
      parts.push_back({index, local.boxes.back()});
    } else {
      parts.push_back({index, job.payload->beside(index)});
    }
  }
  job.source = x.detach();  // the storage, whatever becomes of the caller's tensor
  job.copy = staging_->copy_out([program = job.program, source = job.source, parts = std::move(parts)] {
    for (const Part& part : parts) part.host.copy_(part_of(program->transfers[part.transfer], source), true);
  });
}

void Channel::run_staged_send(std::unique_ptr<SendJob> job, Worker::When when) {
  const c10::NoGradGuard no_grad;
  try {
    failure_.check();
    if (job->copy) {
      poll_until([&] { return job->copy->complete(); }, where(send_name(), job->sequence) + ": copy to the host");
    }
    job->source.reset();
    post_messages(*job);
  } catch (...) {
    failure_.set(std::current_exception());
  }
  job->source.reset();
  job->copy.reset();
  if (meets_itself_) push_local(std::move(job->local));
  job->local = {};
  submit_send(std::move(job), when);
}

std::shared_ptr<Copy> Channel::stage_in(ReceiveJob& job, at::Tensor& tensor) {
  std::shared_ptr<Copy> copy = staging_->copy_in(job.landing, tensor);
  at::Tensor landed = std::move(job.landing.tensor);
  job.landing = {};
  {
    const std::lock_guard lock(landed_mutex_);
    landed_.push_back({copy, landed, std::move(tensor)});
  }
  tensor = std::move(landed);
  return copy;
}

bool Channel::reap_landed(std::chrono::milliseconds limit) {
  constexpr std::chrono::microseconds kPause{100};
  if (!staging_) return true;
  const auto deadline = std::chrono::steady_clock::now() + limit;
  std::vector<Landed> ended;  // let go outside the lock
  for (;;) {
    {
      const std::lock_guard lock(landed_mutex_);
      const auto under_way = [](const Landed& landed) {
        try {
          return !landed.copy->complete();
        } catch (const std::exception&) {
          return false;  // told by whoever wants the tensor
        }
      };
      const auto rest = std::stable_partition(landed_.begin(), landed_.end(), under_way);
      for (auto landed = rest; landed != landed_.end(); ++landed) {
        host_pool_->give(std::move(landed->host));
        ended.push_back(std::move(*landed));
      }
      landed_.erase(rest, landed_.end());
      if (landed_.empty()) return true;
    }
    if (std::chrono::steady_clock::now() >= deadline) return false;
    std::this_thread::sleep_for(kPause);
  }
}

}  // namespace mimo_ext::comm
