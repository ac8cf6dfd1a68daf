#include "core/plan.h"

#include <algorithm>
#include <stdexcept>

#include "core/hash.h"

namespace mimo_ext::core {

Plan::Plan(std::shared_ptr<const Sides> sides, Microbatch microbatch, Direction direction, PlanOptions options)
    : sides_(std::move(sides)), microbatch_(std::move(microbatch)), direction_(direction), options_(options) {
  microbatch_.normalize();
  options_.check();
  microbatch_.check();
  if (row_shards() != nullptr) row_shards()->shard_of(destination(), 0);  // throws where they do not fit
}

Plan::Plan(Boundary source, Boundary destination, Microbatch microbatch, Direction direction, PlanOptions options)
    : Plan(std::make_shared<const Sides>(std::move(source), std::move(destination)), std::move(microbatch), direction,
           options) {}

Plan Plan::reversed() const {
  return Plan(sides_, microbatch_, forward() ? Direction::kBackward : Direction::kForward, options_);
}

bool Plan::operator==(const Plan& other) const {
  return direction_ == other.direction_ && options_ == other.options_ && *sides_ == *other.sides_ &&
         microbatch_ == other.microbatch_;
}

template <typename Visit>
void Plan::each_exchange(int lane, bool sending, const Visit& visit) const {
  const int senders = sender().num_lanes();
  const int receivers = receiver().num_lanes();
  const auto [first, last] =
      sending ? core::lanes_met(lane, senders, receivers) : core::lanes_met(lane, receivers, senders);
  for (int other = first; other < last; ++other) {
    const Overlap overlap = overlap_of(microbatch_, sending ? lane : other, senders, sending ? other : lane, receivers);
    if (!overlap.empty()) {
      visit(Exchange(*sides_, microbatch_, overlap, forward(), options_));
    }
  }
}

RankPlan Plan::for_rank(int rank, bool as_sender, bool as_receiver) const {
  constexpr std::pair kNowhere{-1, -1};
  const auto source = (forward() ? as_sender : as_receiver) ? sides_->find_source(rank) : kNowhere;
  const auto destination = (forward() ? as_receiver : as_sender) ? sides_->find_destination(rank) : kNowhere;
  return forward() ? for_places(source, destination) : for_places(destination, source);
}

RankPlan Plan::for_places(std::pair<int, int> as_sender, std::pair<int, int> as_receiver) const {
  RankPlan plan;
  if (const auto [lane, member] = as_sender; lane >= 0) {
    each_exchange(lane, true, [&, me = member](const Exchange& exchange) { exchange.add_sends(me, plan.sends); });
  }
  if (const auto [lane, member] = as_receiver; lane >= 0) {
    each_exchange(lane, false, [&, me = member](const Exchange& exchange) {
      exchange.add_receives(me, plan.receives);
      exchange.add_copies(me, plan.lane_sends, plan.lane_receives);
    });
  }
  // The first chunks of all lanes go first. Two ranks meet in one overlap only, so the order between them stays.
  for (std::vector<Message>* list : {&plan.sends, &plan.receives, &plan.lane_sends, &plan.lane_receives}) {
    std::stable_sort(list->begin(), list->end(), [](const Message& a, const Message& b) { return a.chunk < b.chunk; });
  }
  return plan;
}

namespace {

void check_place(const Boundary& boundary, int lane, int member) {
  if (lane >= 0 && lane < boundary.num_lanes() && member >= 0 && member < boundary.lane_size()) return;
  throw std::out_of_range("module '" + boundary.module + "': expected one of " + std::to_string(boundary.num_lanes()) +
                          " lanes of " + std::to_string(boundary.lane_size()) + " ranks, got lane " +
                          std::to_string(lane) + ", member " + std::to_string(member));
}

}  // namespace

std::array<std::int64_t, kMaxDims> Plan::sender_shape(int lane, int member) const {
  check_place(sender(), lane, member);
  return local_shape(sender(), microbatch_, lane, member, sender_shards());
}

std::array<std::int64_t, kMaxDims> Plan::receiver_shape(int lane, int member) const {
  check_place(receiver(), lane, member);
  return local_shape(receiver(), microbatch_, lane, member, receiver_shards());
}

Plan::Paths Plan::paths() const {
  Paths paths;
  std::array<bool, kPaths.size()> taken{};
  for (int lane = 0; lane < sender().num_lanes(); ++lane) {
    try {
      each_exchange(lane, true, [&](const Exchange& exchange) {
        if (exchange.load().bytes == 0) return;
        taken[static_cast<std::size_t>(std::find(kPaths.begin(), kPaths.end(), exchange.path()) - kPaths.begin())] =
            true;
        if (exchange.load().bytes <= paths.bytes) return;
        paths.bytes = exchange.load().bytes;
        paths.times = exchange.times();
      });
    } catch (const std::invalid_argument&) {
      continue;  // row counts of another lane
    }
  }
  for (std::size_t index = 0; index < kPaths.size(); ++index) {
    if (taken[index]) paths.taken.push_back(kPaths[index]);
  }
  return paths;
}

std::uint64_t Plan::hash() const {
  Fnv fnv;
  fnv.add(static_cast<std::int64_t>(sides_->hash()));
  fnv.add(static_cast<std::int64_t>(direction_));
  fnv.add(static_cast<std::int64_t>(microbatch_.hash()));
  fnv.add(options_.chunking.max_chunks);
  fnv.add(options_.chunking.min_bytes);
  fnv.add(static_cast<std::int64_t>(options_.path));
  fnv.add(options_.links.has_value() ? 1 : 0);
  const Links links = options_.links.value_or(Links{});
  for (std::int64_t value :
       {links.nic, links.host, links.latency_ns, links.overhead_ns, std::int64_t{links.ranks_per_host}}) {
    fnv.add(value);
  }
  return fnv.value();
}

}  // namespace mimo_ext::core
