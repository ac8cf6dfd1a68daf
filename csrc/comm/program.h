// A plan as one rank carries it out: prepared once per plan, used for every microbatch that it fits.
//
// A program knows which ranges of the rank's tensor travel in which message, and keeps the buffers of finished
// microbatches for the next ones: a steady state allocates nothing but the tensors that it hands out. Programs are
// immutable but for these buffers, which have a mutex of their own; a set of buffers belongs to one microbatch at a
// time.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "comm/config.h"
#include "comm/rounds.h"
#include "comm/staging.h"
#include "comm/transfers.h"
#include "comm/transport.h"
#include "core/plan.h"

namespace mimo_ext::comm {

/// The tensors of a transfer while it is under way.
struct Slot {
  std::vector<at::Tensor> view;     ///< one: a range of the tensor that is sent or received
  std::vector<at::Tensor> staging;  ///< one, where the transfer is packed
  bool staged = false;              ///< which of the two is in use
  std::vector<at::Tensor> head;     ///< the eager elements of the transfer
  std::vector<at::Tensor> rest;     ///< all others, where there are eager ones
  Request head_request;
  Request request;
};

/// The slots of a list of transfers.
class Slots {
 public:
  /// Of tensors with `options`. `staging`: what is not sent or received in place waits in its memory.
  Slots(const std::vector<Transfer>& transfers, const at::TensorOptions& options, const Staging* staging = nullptr);

  std::size_t size() const { return slots_.size(); }
  Slot& operator[](std::size_t index) { return slots_[index]; }
  /// Makes transfer `index` carry its part of `x`: a view of a contiguous `x`, else packed.
  void load(std::size_t index, const at::Tensor& x);
  /// Makes transfer `index` arrive in the contiguous `result` itself, or beside it.
  void aim(std::size_t index, const at::Tensor& result);
  /// Makes transfer `index` carry what the caller writes into the tensor that is returned.
  at::Tensor& beside(std::size_t index) {
    stage(index);
    return slots_[index].staging.front();
  }
  /// What load(), aim() or beside() has prepared.
  std::vector<at::Tensor>& tensor(std::size_t index) {
    return slots_[index].staged ? slots_[index].staging : slots_[index].view;
  }
  /// The part of it that is a message of its own; none where all of it is eager.
  bool has_message(std::size_t index) const { return transfers_[index].eager < transfers_[index].volume; }
  std::vector<at::Tensor>& message(std::size_t index) {
    return transfers_[index].eager > 0 ? slots_[index].rest : tensor(index);
  }
  /// Writes what came beside `result` into it.
  void unpack(std::size_t index, const at::Tensor& result);
  /// Lets go of the tensor that was sent or received.
  void release();

 private:
  void stage(std::size_t index);
  void view(std::size_t index, const at::Tensor& whole);
  /// Prepares what travels eagerly and what does not.
  void divide(std::size_t index);
  void point(std::vector<at::Tensor>& tensor, const at::Tensor& whole, std::int64_t offset, std::int64_t volume) const;

  const std::vector<Transfer>& transfers_;
  at::TensorOptions options_;
  const Staging* staging_;
  at::Storage nothing_;
  std::vector<Slot> slots_;
};

/// Objects that one microbatch after the other uses. Thread-safe.
template <typename T>
class Pool {
 public:
  /// Null where none is free.
  std::unique_ptr<T> take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) return nullptr;
    auto object = std::move(free_.back());
    free_.pop_back();
    return object;
  }
  void give(std::unique_ptr<T> object) {
    const std::lock_guard lock(mutex_);
    free_.push_back(std::move(object));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<T>> free_;
};

/// The elements of `transfer` in `x`, in a tensor of their own: a view where possible.
at::Tensor part_of(const Transfer& transfer, const at::Tensor& x);
/// Writes (or adds) the elements of `transfer` into `result`.
void write_part(const Transfer& transfer, const at::Tensor& result, const at::Tensor& buffer);

class SendProgram : public SendOrder {
 public:
  SendProgram(const BridgeConfig& config, const Transport& transport, const core::Microbatch& of,
              core::Direction direction, std::pair<int, int> place);

  const std::shared_ptr<const core::Microbatch> microbatch;
  const std::int64_t bytes;                            ///< sent to others
  const std::vector<std::vector<std::size_t>> rounds;  ///< where messages go in groups
  Pool<Slots> pool;
  /// Bytes of the gradient that answers an activation: when so many have come, everything that was sent has been
  /// received. -1: the gradient does not tell. Only the caller's thread looks at it.
  std::optional<std::int64_t> answer_bytes;
};

class ReceiveProgram : public ReceiveOrder {
 public:
  ReceiveProgram(const BridgeConfig& config, const Transport& transport, const core::Microbatch& of,
                 core::Direction direction, std::pair<int, int> place);

  /// The buffers of one microbatch, and how far it has come.
  struct Incoming {
    explicit Incoming(const ReceiveProgram& program);
    at::Tensor result;
    Slots receives;
    Slots lane_sends;
    Slots lane_receives;
    std::vector<int> without_gradient;      ///< sender lanes that have none
    std::array<std::size_t, 4> progress{};  ///< stages, receives, lane receives, lane sends that are complete
    std::size_t posted = 0;                 ///< receives
    std::int64_t volume = 0;                ///< of those that are posted and not complete
    bool skips(int sender_lane) const;
  };
  std::unique_ptr<Incoming> take();
  void give(std::unique_ptr<Incoming> incoming);

  const std::shared_ptr<const core::Microbatch> microbatch;
  const at::TensorOptions options;    ///< of what is put together
  const std::int64_t bytes_received;  ///< from others
  const std::int64_t bytes_forwarded;
  const std::vector<ReceiveRound> rounds;  ///< where messages go in groups

 private:
  Pool<Incoming> pool_;
};

/// As below, and none where no headers are sent.
std::int64_t eager_bytes_of(const BridgeConfig& config, int sender_lanes, int receiver_lanes);

}  // namespace mimo_ext::comm
