#include "comm/staging.h"

#include <ATen/Functions.h>
#include <c10/core/GradMode.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <condition_variable>
#include <stdexcept>
#include <thread>

#include "comm/worker.h"

namespace mimo_ext::comm {

namespace {

/// Any device that PyTorch has streams and events for. No header of CUDA is needed: what it links in registers itself.
class DeviceStaging final : public Staging {
 public:
  explicit DeviceStaging(const c10::Device& device)
      : device_(device),
        guard_(device.type()),
        out_(guard_.getStreamFromGlobalPool(device)),
        in_(guard_.getStreamFromGlobalPool(device)) {}

  at::Tensor host_memory(at::IntArrayRef shape, at::ScalarType dtype) const override {
    return at::empty(shape, at::TensorOptions().dtype(dtype).pinned_memory(true));
  }

  c10::Stream current_stream() const override { return guard_.getStream(device_); }

  std::shared_ptr<Copy> copy_out(std::function<void()> enqueue) override {
    c10::Event ready(device_.type());
    ready.record(current_stream());
    ready.block(out_);
    const c10::StreamGuard on(out_);
    enqueue();
    return std::make_shared<DeviceCopy>(*this, out_);
  }

  Landing land(at::IntArrayRef shape, at::ScalarType dtype, const c10::Stream& owner) const override {
    const c10::StreamGuard on(owner);
    Landing landing{at::empty(shape, at::TensorOptions().dtype(dtype).device(device_)),
                    std::make_shared<c10::Event>(device_.type())};
    landing.vacant->record(owner);
    return landing;
  }

  std::shared_ptr<Copy> copy_in(const Landing& to, const at::Tensor& from) override {
    to.vacant->block(in_);
    const c10::StreamGuard on(in_);
    at::Tensor tensor = to.tensor;
    tensor.copy_(from, true);
    return std::make_shared<DeviceCopy>(*this, in_);
  }

 private:
  class DeviceCopy final : public Copy {
   public:
    /// Of all that `stream` holds.
    DeviceCopy(const DeviceStaging& staging, const c10::Stream& stream)
        : device_(staging.device_), done_(device_.type()) {
      done_.record(stream);
    }
    bool complete() override { return done_.query(); }
    bool order(std::chrono::milliseconds) override {
      done_.block(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
      return true;
    }

   private:
    const c10::Device device_;  // the copy may outlive the staging
    c10::Event done_;
  };

  const c10::Device device_;
  const c10::impl::VirtualGuardImpl guard_;
  const c10::Stream out_;
  const c10::Stream in_;
};

/// Tensors of the CPU, and a thread in place of both streams.
class ImitatedStaging final : public Staging {
 public:
  explicit ImitatedStaging(std::chrono::microseconds delay) : delay_(delay), thread_("mimo-copies") {}

  at::Tensor host_memory(at::IntArrayRef shape, at::ScalarType dtype) const override {
    return at::empty(shape, at::TensorOptions().dtype(dtype));
  }

  c10::Stream current_stream() const override {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(c10::DeviceType::CPU));
  }

  std::shared_ptr<Copy> copy_out(std::function<void()> enqueue) override { return run(std::move(enqueue)); }

  Landing land(at::IntArrayRef shape, at::ScalarType dtype, const c10::Stream&) const override {
    return {at::empty(shape, at::TensorOptions().dtype(dtype)), nullptr};
  }

  std::shared_ptr<Copy> copy_in(const Landing& to, const at::Tensor& from) override {
    return run([tensor = to.tensor, from] { tensor.copy_(from); });
  }

 private:
  class ImitatedCopy final : public Copy {
   public:
    bool complete() override {
      const std::lock_guard lock(mutex_);
      if (error_) std::rethrow_exception(error_);
      return done_;
    }
    bool order(std::chrono::milliseconds limit) override {
      {
        std::unique_lock lock(mutex_);
        ended_.wait_for(lock, limit, [this] { return done_ || error_; });
      }
      return complete();
    }
    void end(std::exception_ptr error) {
      const std::lock_guard lock(mutex_);
      error_ = std::move(error);
      done_ = true;
      ended_.notify_all();
    }

   private:
    std::mutex mutex_;
    std::condition_variable ended_;
    bool done_ = false;
    std::exception_ptr error_;
  };

  std::shared_ptr<Copy> run(std::function<void()> copies) {
    auto copy = std::make_shared<ImitatedCopy>();
    auto task = [copy, copies = std::move(copies), delay = delay_]() mutable {
      std::this_thread::sleep_for(delay);
      std::exception_ptr error;
      try {
        const c10::NoGradGuard no_grad;
        copies();
      } catch (...) {
        error = std::current_exception();
      }
      copies = nullptr;  // what it holds goes before anybody is told
      copy->end(error);
    };
    thread_.submit(std::move(task), Worker::When::kNow);
    return copy;
  }

  const std::chrono::microseconds delay_;
  Worker thread_;
};

}  // namespace

std::unique_ptr<Staging> make_staging(const c10::Device& device, std::chrono::microseconds delay) {
  if (device.is_cpu()) return std::make_unique<ImitatedStaging>(delay);
  if (!c10::impl::hasDeviceGuardImpl(device.type())) {
    throw std::invalid_argument("device " + device.str() + ": this build of PyTorch has no support for it");
  }
  return std::make_unique<DeviceStaging>(device);
}

at::Tensor HostPool::take(at::IntArrayRef shape, at::ScalarType dtype) {
  {
    const std::int64_t numel = c10::multiply_integers(shape);
    const std::lock_guard lock(mutex_);
    const auto fits = [&](const at::Tensor& memory) {
      return memory.numel() == numel && memory.scalar_type() == dtype;
    };
    const auto found = std::find_if(free_.rbegin(), free_.rend(), fits);
    if (found != free_.rend()) {
      at::Tensor memory = std::move(*found);
      free_.erase(std::next(found).base());
      return memory.view(shape);
    }
    ++allocations_;
  }
  return staging_.host_memory(shape, dtype);
}

void HostPool::give(at::Tensor memory) {
  constexpr std::size_t kKept = 16;  // sizes may change for ever
  at::Tensor oldest;                 // freed outside the lock
  const std::lock_guard lock(mutex_);
  if (free_.size() == kKept) {
    oldest = std::move(free_.front());
    free_.erase(free_.begin());
  }
  free_.push_back(std::move(memory));
}

std::int64_t HostPool::allocations() const {
  const std::lock_guard lock(mutex_);
  return allocations_;
}

}  // namespace mimo_ext::comm
