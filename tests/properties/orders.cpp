#include "orders.h"

#include <optional>

#include "reference.h"

namespace mimo_ext::properties {

using core::Direction;

namespace {

std::vector<Role> roles_of(const Setting& setting, bool destination) {
  const core::Boundary side = destination ? setting.destination() : setting.source();
  std::vector<Role> roles;
  for (int lane = 0; lane < side.num_lanes(); ++lane) {
    for (int member = 0; member < side.lane_size(); ++member) {
      roles.push_back(
          {side.lanes[at(lane)][at(member)], lane, member, elements_of(setting, destination, lane, member)});
    }
  }
  return roles;
}

}  // namespace

OneWay orders_of(const Setting& setting, const std::shared_ptr<const core::Sides>& sides, Direction direction) {
  OneWay way{direction, {}, {}};
  const bool forward = direction == Direction::kForward;
  for (const bool destination : {false, true}) {
    const std::string side = destination ? "destination" : "source";
    int lane = -1;
    std::optional<core::Plan> plan;
    for (Role& role : roles_of(setting, destination)) {
      if (role.lane != lane) {
        lane = role.lane;
        plan.emplace(sides, destination ? setting.known_to_destination(lane) : setting.known_to_source(lane), direction,
                     setting.options());
      }
      const Values shape = shape_of(setting, destination, role.lane, role.member);
      const std::pair place{role.lane, role.member};
      const std::string who = "shape of rank " + std::to_string(role.rank) + ", " + side;
      if (destination == forward) {
        auto order = std::make_shared<const comm::ReceiveOrder>(
            comm::receive_order(*plan, role.rank, place, setting.fixed == 0));
        if (order->shape != shape) fail(who);
        way.receivers.push_back({std::move(role), std::move(order)});
      } else {
        auto order =
            std::make_shared<const comm::SendOrder>(comm::send_order(*plan, role.rank, place, setting.fixed == 0));
        if (order->shape != shape) fail(who);
        way.senders.push_back({std::move(role), std::move(order)});
      }
    }
  }
  return way;
}

}  // namespace mimo_ext::properties
