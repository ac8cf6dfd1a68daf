// What one rank sends to another: the entries of a plan.
#pragma once

#include <vector>

#include "core/microbatch.h"

namespace mimo_ext::core {

/// One message. Boxes are in the coordinates of the tensors that the two ranks hold.
struct Message {
  int sender = 0;    ///< global rank
  int receiver = 0;  ///< global rank; the same as sender for a local copy
  int sender_lane = 0;
  int receiver_lane = 0;
  /// 0 writes the box. Higher values add to it, in ascending order: gradients of CP copies are partial and are summed.
  int contribution = 0;
  /// Chunks of one part are forwarded one after the other. Every list of a RankPlan is in ascending order of chunks.
  int chunk = 0;
  Box send_box;  ///< valid where the plan was asked for the sender, or all row counts are known
  Box recv_box;  ///< valid where the plan was asked for the receiver, or all row counts are known

  bool operator==(const Message&) const = default;
};

/// A rank's part of a plan. For any two ranks, the messages from one to the other have the same order in both ranks'
/// lists.
struct RankPlan {
  std::vector<Message> sends;
  std::vector<Message> receives;
  /// To replicas of this rank in its lane; send_box lies in this rank's received tensor.
  std::vector<Message> lane_sends;
  std::vector<Message> lane_receives;  ///< from replicas
};

}  // namespace mimo_ext::core
