// What one rank sends and receives for a plan, message by message, in the order in which it is posted and completed.
//
// Both ends of a message derive its place among the messages of the two ranks by themselves: everything that decides on
// an order is here, and nothing here knows torch or a process group, so that the orders of all ranks can be computed,
// and carried out, in one process. Values and pure functions: safe from any thread.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/plan.h"

namespace mimo_ext::comm {

/// One message: a box of the tensor, or several small ones that travel together.
struct Transfer {
  int peer = 0;   ///< global rank
  int index = 0;  ///< what the transport calls it; set where there is one
  int sender_lane = 0;
  int receiver_lane = 0;
  int chunk = 0;
  int contribution = 0;         ///< 0 writes, higher ones add, in ascending order
  bool local = false;           ///< from this rank to itself
  bool with_header = false;     ///< small, and its sender is who tells the receiver: part of the header's message
  std::int64_t eager = 0;       ///< elements at its beginning that are sent before the receiver asks for the rest
  std::size_t local_index = 0;  ///< among those
  bool in_place = false;        ///< one range of a contiguous tensor: no packing
  std::int64_t offset = 0;
  std::int64_t volume = 0;           ///< elements
  std::vector<std::int64_t> starts;  ///< of the boxes, as ops::pack takes them
  std::vector<std::int64_t> sizes;
};

/// What a rank sends.
struct SendOrder {
  std::vector<std::int64_t> shape;  ///< of the tensor that this rank sends
  std::vector<Transfer> transfers;
  /// By receiver: the transfer that comes with its header, or begins right after it.
  std::unordered_map<int, std::size_t> announced;
};

/// What a rank receives, and forwards to the replicas of its lane.
struct ReceiveOrder {
  /// What is forwarded together: one chunk from one sender lane. Ranges of `receives` and `lane_sends`.
  struct Stage {
    int sender_lane = 0;
    std::size_t first_receive = 0;
    std::size_t last_receive = 0;
    std::size_t first_send = 0;
    std::size_t last_send = 0;
  };
  /// What the header of one sender lane must announce.
  struct Announced {
    std::int64_t payload_bytes = 0;
    std::int64_t eager_bytes = 0;
  };

  std::vector<std::int64_t> shape;        ///< of the tensor that this rank receives
  std::vector<Transfer> receives;         ///< by stage
  std::vector<Announced> announced;       ///< by header
  std::vector<std::size_t> unpack_order;  ///< of receives, within each stage: contributions in ascending order
  std::vector<Transfer> lane_sends;       ///< by stage
  std::vector<Transfer> lane_receives;
  std::vector<Stage> stages;
  bool takes_turns = false;  ///< its senders serve several receivers each: a few messages at a time
};

/// Of `rank`, which is at `place` (lane, member) of the plan's sender, or of its receiver. `headers`: shapes vary, so
/// that headers go ahead, and may take something with them.
SendOrder send_order(const core::Plan& plan, int rank, std::pair<int, int> place, bool headers);
ReceiveOrder receive_order(const core::Plan& plan, int rank, std::pair<int, int> place, bool headers);

/// How many bytes a header may be followed by unasked, between modules of so many lanes.
std::int64_t eager_bytes_of(int sender_lanes, int receiver_lanes);

}  // namespace mimo_ext::comm
