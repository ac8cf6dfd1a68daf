#include "comm/transfers.h"

#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <numeric>

#include "comm/header.h"

namespace mimo_ext::comm {

namespace {

/// Boxes below this are packed together: copying them costs less than a message of their own (some 20 us with gloo).
constexpr std::int64_t kSmallBytes = std::int64_t{32} << 10;
constexpr std::int64_t kPackedBytes = std::int64_t{256} << 10;

std::vector<std::int64_t> shape_of(const std::array<std::int64_t, core::kMaxDims>& extents, int ndim) {
  return {extents.begin(), extents.begin() + ndim};
}

/// Whether the box is one range of a row-major tensor, and where it begins.
bool one_range(const core::Box& box, const std::vector<std::int64_t>& shape, std::int64_t& offset) {
  offset = 0;
  bool partial = false;  // an axis that is not covered has been seen, from the innermost outwards
  bool one = true;
  std::int64_t stride = 1;
  for (std::size_t axis = shape.size(); axis-- > 0;) {
    offset += box.start[axis] * stride;
    stride *= shape[axis];
    if (partial && box.size[axis] != 1) one = false;
    if (box.size[axis] != shape[axis]) partial = true;
  }
  return one;
}

void seal(Transfer& transfer, const std::vector<core::Box>& boxes, bool sending,
          const std::vector<std::int64_t>& shape) {
  // What is added to something that is there already arrives beside it.
  transfer.in_place =
      boxes.size() == 1 && (sending || transfer.contribution == 0) && one_range(boxes.front(), shape, transfer.offset);
  for (const core::Box& box : boxes) {
    for (std::size_t axis = 0; axis < shape.size(); ++axis) {
      transfer.starts.push_back(box.start[axis]);
      transfer.sizes.push_back(box.size[axis]);
    }
  }
}

/// In order of their first messages.
std::vector<int> peers_of(const std::vector<Transfer>& transfers) {
  std::vector<int> peers;
  for (const Transfer& transfer : transfers) {
    if (std::find(peers.begin(), peers.end(), transfer.peer) == peers.end()) peers.push_back(transfer.peer);
  }
  return peers;
}

/// How far behind this rank, at `place` of its side, the receiver of `transfer` is. Were all ranks to send in the same
/// order, all would send to one, then to the next.
int distance(const core::Boundary& receiver, const Transfer& transfer, std::pair<int, int> place) {
  const int ranks = receiver.num_lanes() * receiver.lane_size();
  const auto& lane = receiver.lanes[static_cast<std::size_t>(transfer.receiver_lane)];
  const auto member = static_cast<int>(std::find(lane.begin(), lane.end(), transfer.peer) - lane.begin());
  const int theirs = transfer.receiver_lane * receiver.lane_size() + member;
  const int mine = place.first * receiver.lane_size() + place.second;
  return ((theirs - mine) % ranks + ranks) % ranks;
}

/// The messages of `list` in its order; small boxes of the same stage between the same ranks become one message. Both
/// ends see the same sequence.
std::vector<Transfer> transfers_of(const std::vector<core::Message>& list, bool sending,
                                   const std::vector<std::int64_t>& shape, int element_size, int rank) {
  using Key = std::array<int, 6>;
  std::map<Key, std::size_t> open;  // where a further small box goes
  std::vector<Transfer> transfers;
  std::vector<std::vector<core::Box>> boxes;
  std::size_t locals = 0;
  for (const core::Message& message : list) {
    const core::Box& box = sending ? message.send_box : message.recv_box;
    const std::int64_t volume = box.volume();
    const bool is_small = volume * element_size < kSmallBytes;
    const Key key{message.sender,        message.receiver,     message.sender_lane,
                  message.receiver_lane, message.contribution, message.chunk};
    const auto found = open.find(key);
    if (is_small && found != open.end() && (transfers[found->second].volume + volume) * element_size <= kPackedBytes) {
      transfers[found->second].volume += volume;
      boxes[found->second].push_back(box);
      continue;
    }
    Transfer& transfer = transfers.emplace_back();
    transfer.peer = sending ? message.receiver : message.sender;
    transfer.local = transfer.peer == rank;
    if (transfer.local) transfer.local_index = locals++;
    transfer.sender_lane = message.sender_lane;
    transfer.receiver_lane = message.receiver_lane;
    transfer.chunk = message.chunk;
    transfer.contribution = message.contribution;
    transfer.volume = volume;
    boxes.push_back({box});
    // A box that comes after a large one must not overtake it: the messages of two ranks have one order.
    if (is_small) {
      open[key] = transfers.size() - 1;
    } else {
      open.erase(key);
    }
  }
  for (std::size_t index = 0; index < transfers.size(); ++index) seal(transfers[index], boxes[index], sending, shape);
  return transfers;
}

/// Marks what comes with the header, between the rank that sends it and the one that it is for: all of a small
/// transfer, if it is the only one, else the beginning of the first. Both ends see the same order and decide alike.
void mark_announced(std::vector<Transfer>& transfers, int element_size,
                    const std::function<std::int64_t(const Transfer&)>& eager_bytes) {
  std::unordered_map<int, int> counts;
  for (const Transfer& transfer : transfers) ++counts[transfer.peer];
  for (Transfer& transfer : transfers) {
    int& count = counts[transfer.peer];
    if (transfer.local || count == 0) continue;  // 0: not the first
    const std::int64_t bytes = eager_bytes(transfer);
    transfer.with_header = bytes >= 0 && count == 1 && transfer.volume * element_size <= Header::kMaxPayloadBytes;
    if (!transfer.with_header && bytes > 0) transfer.eager = std::min(transfer.volume, bytes / element_size);
    count = 0;
  }
}

}  // namespace

std::int64_t eager_bytes_of(int sender_lanes, int receiver_lanes) {
  // What several lanes begin with at once would collide at a card; without it they take turns there.
  return sender_lanes == receiver_lanes ? Header::kMaxEagerBytes : 0;
}

SendOrder send_order(const core::Plan& plan, int rank, std::pair<int, int> place, bool headers) {
  SendOrder order;
  order.shape = shape_of(plan.sender_shape(place.first, place.second), plan.microbatch().ndim);
  const core::RankPlan mine = plan.for_rank(rank, true, false);
  order.transfers = transfers_of(mine.sends, true, order.shape, plan.microbatch().element_size, rank);
  std::stable_sort(order.transfers.begin(), order.transfers.end(), [&](const Transfer& a, const Transfer& b) {
    return std::pair(a.chunk, distance(plan.receiver(), a, place)) <
           std::pair(b.chunk, distance(plan.receiver(), b, place));
  });
  if (!headers) return order;
  mark_announced(order.transfers, plan.microbatch().element_size, [&](const Transfer& transfer) {
    const int member = plan.receiver().find(transfer.peer).second;
    if (member % plan.sender().lane_size() != place.second) return std::int64_t{-1};
    return eager_bytes_of(plan.sender().num_lanes(), plan.receiver().num_lanes());
  });
  for (std::size_t index = 0; index < order.transfers.size(); ++index) {
    const Transfer& transfer = order.transfers[index];
    if (transfer.with_header || transfer.eager > 0) order.announced[transfer.peer] = index;
  }
  return order;
}

ReceiveOrder receive_order(const core::Plan& plan, int rank, std::pair<int, int> place, bool headers) {
  ReceiveOrder order;
  auto& [shape, receives, announced, unpack_order, lane_sends, lane_receives, stages, takes_turns] = order;
  shape = shape_of(plan.receiver_shape(place.first, place.second), plan.microbatch().ndim);
  const core::RankPlan mine = plan.for_rank(rank, false, true);
  const auto transfers = [&](const std::vector<core::Message>& list, bool sending) {
    return transfers_of(list, sending, order.shape, plan.microbatch().element_size, rank);
  };
  receives = transfers(mine.receives, false);
  lane_sends = transfers(mine.lane_sends, true);
  lane_receives = transfers(mine.lane_receives, false);

  if (headers) {
    const int teller = place.second % plan.sender().lane_size();
    const auto [first, last] =
        core::Plan::lanes_met(place.first, plan.receiver().num_lanes(), plan.sender().num_lanes());
    const std::int64_t most = eager_bytes_of(plan.sender().num_lanes(), plan.receiver().num_lanes());
    mark_announced(receives, plan.microbatch().element_size, [&](const Transfer& transfer) {
      return plan.sender().find(transfer.peer).second == teller ? most : std::int64_t{-1};
    });
    announced.resize(static_cast<std::size_t>(last - first));
    for (const Transfer& transfer : receives) {
      ReceiveOrder::Announced& header = announced[static_cast<std::size_t>(transfer.sender_lane - first)];
      if (transfer.with_header) header.payload_bytes = transfer.volume * plan.microbatch().element_size;
      header.eager_bytes += transfer.eager * plan.microbatch().element_size;
    }
  }

  const auto stage_of = [](const Transfer& transfer) { return std::pair(transfer.chunk, transfer.sender_lane); };
  const auto by_stage = [&](const Transfer& a, const Transfer& b) { return stage_of(a) < stage_of(b); };
  // Messages of two ranks belong to one stage, or come in the order of the stages already.
  std::stable_sort(receives.begin(), receives.end(), by_stage);
  std::stable_sort(lane_sends.begin(), lane_sends.end(), [&](const Transfer& a, const Transfer& b) {
    return std::pair(stage_of(a), distance(plan.receiver(), a, place)) <
           std::pair(stage_of(b), distance(plan.receiver(), b, place));
  });

  // Senders that serve several receivers each: every receiver begins with another one, or all would share one card and
  // then the next. Not where the order counts: for replicas, which forward by stages, and for contributions.
  const std::vector<int> peers = peers_of(receives);
  const bool adds = std::any_of(receives.begin(), receives.end(), [](const Transfer& t) { return t.contribution > 0; });
  takes_turns = peers.size() > 1 && !adds && lane_sends.empty() && lane_receives.empty();
  if (takes_turns) {
    const auto turn = static_cast<std::size_t>(place.first + place.second);
    const auto turned = [&](const Transfer& transfer) {
      const auto index = static_cast<std::size_t>(std::find(peers.begin(), peers.end(), transfer.peer) - peers.begin());
      return (index + turn) % peers.size();
    };
    std::stable_sort(receives.begin(), receives.end(),
                     [&](const Transfer& a, const Transfer& b) { return turned(a) < turned(b); });
  }
  std::size_t send = 0;
  for (std::size_t begin = 0; begin < receives.size();) {
    ReceiveOrder::Stage& stage = stages.emplace_back();
    stage.sender_lane = receives[begin].sender_lane;
    stage.first_receive = begin;
    const auto key = stage_of(receives[begin]);
    while (begin < receives.size() && stage_of(receives[begin]) == key) ++begin;
    stage.last_receive = begin;
    stage.first_send = send;
    while (send < lane_sends.size() && stage_of(lane_sends[send]) == key) ++send;
    stage.last_send = send;
  }
  unpack_order.resize(receives.size());
  std::iota(unpack_order.begin(), unpack_order.end(), std::size_t{0});
  for (const ReceiveOrder::Stage& stage : stages) {
    std::stable_sort(unpack_order.begin() + static_cast<std::ptrdiff_t>(stage.first_receive),
                     unpack_order.begin() + static_cast<std::ptrdiff_t>(stage.last_receive),
                     [&receives = receives](std::size_t a, std::size_t b) {
                       return receives[a].contribution < receives[b].contribution;
                     });
  }
  return order;
}

}  // namespace mimo_ext::comm
