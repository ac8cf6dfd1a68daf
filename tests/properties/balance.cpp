// That nobody does more than its share.
#include <algorithm>
#include <map>
#include <tuple>

#include "orders.h"

namespace mimo_ext::properties {

using core::Direction;

/// Nobody is on both sides, so every element crosses: once per contribution on the pipelined and leader paths, and for
/// every replica where each is served directly.
void check_economy(const Setting& setting, const OneWay& way) {
  const auto path = static_cast<core::Path>(setting.path);
  if (path == core::Path::kAuto) return;
  const bool forward = way.direction == Direction::kForward;
  std::map<std::pair<std::int64_t, int>, std::int64_t> crossings;  // by element and contribution
  std::map<std::int64_t, std::int64_t> held;                       // by how many receivers
  for (const Receiver& receiver : way.receivers) {
    for (std::int64_t element : receiver.elements) ++held[element];
    for (const comm::Transfer& transfer : receiver.order->receives) {
      each_element(transfer, receiver.order->shape, [&](std::int64_t offset) {
        ++crossings[{receiver.elements.at(at(offset)), transfer.contribution}];
      });
    }
  }
  // A leader, or an equal part of each replica, per different holding of the element.
  const auto replicas = [&](const Side& side, bool dealt) {
    if (dealt && setting.shards == 2) return std::int64_t{1};
    return (dealt && setting.shards == 1 ? side.tp
                                         : (side.placement == 0 ? side.cp : 1) * (side.sp != 0 ? 1 : side.tp));
  };
  const std::int64_t each = forward ? replicas(setting.dst, true) : replicas(setting.src, false);
  for (const auto& [key, times] : crossings) {
    const std::int64_t holders = held[key.first];
    const std::int64_t expected = path == core::Path::kDirect ? holders : holders / each;
    if (times != expected) {
      fail("economy: element " + std::to_string(key.first) + ", held by " + std::to_string(holders) + ", crosses " +
           std::to_string(times) + " times, expected " + std::to_string(expected));
    }
  }
}

/// What members of a lane send and receive of an overlap differs by at most one unit along one axis.
void check_balance(const Setting& setting, const core::Plan& plan) {
  if (static_cast<core::Path>(setting.path) != core::Path::kPipelined || setting.shards != 0) return;
  if (setting.src.sharded() || setting.dst.sharded()) return;
  const bool forward = plan.direction() == Direction::kForward;
  using Volumes = std::map<std::tuple<int, int, int, int>, std::pair<std::int64_t, core::Box>>;
  Volumes parts[2];  // of senders and of receivers: by sender lane, receiver lane, contribution, rank
  std::map<std::pair<int, int>, core::Box> whole;
  for (const auto& lane : plan.sender().lanes) {
    for (int rank : lane) {
      for (const core::Message& message : plan.for_rank(rank, true, false).sends) {
        for (const bool receiving : {false, true}) {
          const core::Box& box = receiving ? message.recv_box : message.send_box;
          const std::tuple key{message.sender_lane, message.receiver_lane, message.contribution,
                               receiving ? message.receiver : message.sender};
          auto [found, is_new] = parts[receiving ? 1 : 0].try_emplace(key, 0, box);
          found->second.first += box.volume();
          core::Box& hull = found->second.second;
          for (std::size_t axis = 0; axis < core::kMaxDims; ++axis) {
            const std::int64_t first = std::min(hull.start[axis], box.start[axis]);
            hull.size[axis] = std::max(hull.start[axis] + hull.size[axis], box.start[axis] + box.size[axis]) - first;
            hull.start[axis] = first;
          }
        }
      }
    }
  }
  for (const Volumes& volumes : parts) {
    std::map<std::tuple<int, int, int>, std::vector<core::Box>> shares;
    for (const auto& [key, part] : volumes) {
      if (part.first != part.second.volume()) fail("balance: a share that is no box");
      shares[{std::get<0>(key), std::get<1>(key), std::get<2>(key)}].push_back(part.second);
    }
    for (const auto& [key, boxes] : shares) {
      int uneven = 0;
      for (std::size_t axis = 0; axis < core::kMaxDims; ++axis) {
        const auto [least, most] =
            std::minmax_element(boxes.begin(), boxes.end(),
                                [axis](const core::Box& a, const core::Box& b) { return a.size[axis] < b.size[axis]; });
        uneven += least->size[axis] != most->size[axis] ? 1 : 0;
        if (most->size[axis] - least->size[axis] > 1) fail("balance: shares that differ by more than one unit");
      }
      if (uneven > 1) fail("balance: shares that differ along two axes");
      // Some have nothing only where a unit each is all that the others have.
      const core::Boundary& side = &volumes == &parts[0] ? plan.sender() : plan.receiver();
      const bool grouped = &volumes == &parts[1] && side.num_lanes() < plan.sender().num_lanes();
      const auto members = at(&volumes == &parts[0] && !forward ? side.tp : side.lane_size());
      if (grouped || boxes.size() == members) continue;
      const auto& size = boxes.front().size;
      if (uneven > 0 || std::find(size.begin(), size.end(), 1) == size.end())
        fail("balance: a replica without a share");
    }
  }
}

}  // namespace mimo_ext::properties
