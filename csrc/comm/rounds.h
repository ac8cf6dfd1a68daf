// Messages in groups, for process groups that know no tags and run what they are given in order (NCCL).
//
// A microbatch goes over in rounds, and a rank issues all messages of a round as one group: in round k the k-th chunks,
// and the lane copies of the chunks before them. A group ends when all of its messages have ended, and the groups of
// one communicator end one after the other; every rank issues (microbatch, round) in ascending order, and both ends
// of a message know it to be of the same round. So the group that is the first of all that have not ended has all its
// peers: nothing can wait for itself. Pure functions of the order of transfers, like everything in transfers.h.
#pragma once

#include <cstdint>
#include <vector>

#include "comm/transfers.h"

namespace mimo_ext::comm {

/// Places in a SendOrder's transfers, by round. What a rank sends to itself is in no group.
std::vector<std::vector<std::size_t>> send_rounds(const SendOrder& order);

/// Places in the lists of a ReceiveOrder.
struct ReceiveRound {
  std::vector<std::size_t> receives;
  std::vector<std::size_t> lane_sends;
  std::vector<std::size_t> lane_receives;
  std::vector<std::size_t> stages;  ///< what is complete with this round (and what the rank sends to itself)
};
std::vector<ReceiveRound> receive_rounds(const ReceiveOrder& order);

/// One message of a group, as one of its ends sees it.
struct GroupMessage {
  bool sending = false;
  int peer = 0;
  std::int64_t bytes = 0;
};
/// All that `rank` issues for one microbatch, as a sender, a receiver or both: sends, receives, lane copies to and from
/// others, in this order in each group. A round without messages is none, but has its place.
std::vector<std::vector<GroupMessage>> group_order(const core::Plan& plan, int rank);

}  // namespace mimo_ext::comm
