// What a channel's workers work on. Private to the channel's two source files.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "comm/channel.h"

namespace mimo_ext::comm {

inline constexpr int kHeaderTag = 0;
inline constexpr int kPayloadTag = 1;
inline constexpr int kLaneTag = 2;
/// Row counts that do not fit into a header. Their receives are posted by the worker, those of headers by the caller,
/// who may be microbatches ahead: a tag of their own keeps both in order.
inline constexpr int kRowsTag = 3;
inline constexpr int kNumTags = 4;

/// The view of `x` that `box` covers, or a packed copy where that is not contiguous.
at::Tensor part_of(const at::Tensor& x, const core::Box& box);

struct Channel::SendJob {
  struct Pending {
    std::unique_ptr<Request> request;
    int peer;
  };
  std::int64_t sequence = 0;
  std::vector<Pending> pending;
  std::shared_ptr<Delivery> delivery;
};

struct Channel::Slot {
  core::Message message;
  at::Tensor buffer;  ///< a view of the result where `in_place`
  bool in_place = false;
  std::unique_ptr<Request> request;  ///< null for a local copy
};

struct Channel::HeaderSlot {
  int peer = 0;
  at::Tensor buffer;
  std::unique_ptr<Request> request;  ///< null where the sender is this rank
};

struct Channel::Incoming {
  at::Tensor result;
  using Stage = std::pair<int, int>;            ///< chunk, sender lane: what is forwarded together
  std::map<Stage, std::vector<Slot>> receives;  ///< each in the plan's order
  std::vector<Slot> lane_receives;
  std::map<Stage, std::vector<core::Message>> lane_sends;
};

struct Channel::ReceiveJob {
  std::int64_t sequence = 0;
  std::optional<core::Microbatch> known;
  std::int64_t forward_sequence = 0;  ///< backward: whose gradient is expected
  std::vector<HeaderSlot> headers;
  std::unique_ptr<Incoming> incoming;
  std::vector<SendJob::Pending> forwarded;
  std::shared_ptr<Delivery> delivery;
};

}  // namespace mimo_ext::comm
