// Host memory that tensors of a device travel through, and the copies to and from it.
//
// Streams. Copies run on two streams of their own (one per way), after what the caller's stream held when they were
// enqueued; the host waits for none of them. Ownership: whoever enqueues a copy keeps its tensors until complete() is
// true. The allocator knows nothing of these streams, and nothing here records a tensor on one: memory that is kept
// until then cannot be given to anyone else.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

namespace mimo_ext::comm {

/// A copy that is under way. Thread-safe.
class Copy {
 public:
  Copy() = default;
  Copy(const Copy&) = delete;
  Copy& operator=(const Copy&) = delete;
  virtual ~Copy() = default;
  /// Never waits. Throws what went wrong with the copy.
  virtual bool complete() = 0;
  /// What the calling thread enqueues on its current stream from now on comes after the copy. A device is told so at
  /// once; where there are no streams this waits, up to `limit`: false where the copy is not complete by then.
  virtual bool order(std::chrono::milliseconds limit) = 0;
};

/// Thread-safe.
class Staging {
 public:
  /// A tensor on the device that a copy will fill. It belongs to the stream that it was made for, as if it had been
  /// allocated there.
  struct Landing {
    at::Tensor tensor;
    std::shared_ptr<c10::Event> vacant;  ///< nobody else uses its memory after this; null where there are no streams
  };

  Staging() = default;
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  virtual ~Staging() = default;

  /// New host memory that copies need not wait for (pinned, where there is a device).
  virtual at::Tensor host_memory(at::IntArrayRef shape, at::ScalarType dtype) const = 0;
  /// The calling thread's current one.
  virtual c10::Stream current_stream() const = 0;
  /// Calls `enqueue`, which enqueues copies to the host (and kernels before them), on the stream for that way: at once,
  /// or (where there are no streams) later, in another thread.
  virtual std::shared_ptr<Copy> copy_out(std::function<void()> enqueue) = 0;
  /// May be called by any thread, whatever stream is current there.
  virtual Landing land(at::IntArrayRef shape, at::ScalarType dtype, const c10::Stream& owner) const = 0;
  virtual std::shared_ptr<Copy> copy_in(const Landing& to, const at::Tensor& from) = 0;
};

/// For tensors on `device`. For the CPU an imitation with which the whole asynchronous path can be run anywhere: copies
/// are made by another thread, one after the other, each `delay` after its turn has come. Throws std::invalid_argument
/// for a device that this PyTorch cannot use.
std::unique_ptr<Staging> make_staging(const c10::Device& device, std::chrono::microseconds delay);

/// Host memory of finished microbatches for the next ones. Thread-safe.
class HostPool {
 public:
  explicit HostPool(const Staging& staging) : staging_(staging) {}
  at::Tensor take(at::IntArrayRef shape, at::ScalarType dtype);
  /// Nobody reads or writes it any more.
  void give(at::Tensor memory);
  /// How often there was none of the size.
  std::int64_t allocations() const;

 private:
  const Staging& staging_;
  mutable std::mutex mutex_;
  std::vector<at::Tensor> free_;  ///< the newest last
  std::int64_t allocations_ = 0;
};

}  // namespace mimo_ext::comm
