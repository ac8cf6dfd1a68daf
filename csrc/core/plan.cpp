#include "core/plan.h"

#include <algorithm>
#include <stdexcept>

#include "core/hash.h"

namespace mimo_ext::core {

namespace {

void add(Fnv& fnv, const Boundary& boundary) {
  fnv.add(boundary.module);
  fnv.add(boundary.tp);
  fnv.add(boundary.cp);
  fnv.add(static_cast<std::int64_t>(boundary.cp_placement));
  fnv.add(boundary.sequence_parallel ? 1 : 0);
  fnv.add(boundary.num_lanes());
  for (const auto& lane : boundary.lanes) {
    for (int rank : lane) fnv.add(rank);
  }
}

void check_boundary(const Boundary& boundary, const char* side) {
  if (boundary.lanes.empty()) {
    throw std::invalid_argument(std::string(side) + " of the bridge ('" + boundary.module + "') has no ranks");
  }
}

}  // namespace

Plan::Plan(Boundary source, Boundary destination, Microbatch microbatch, Direction direction, Chunking chunking)
    : source_(std::move(source)),
      destination_(std::move(destination)),
      microbatch_(microbatch.normalized()),
      direction_(direction),
      chunking_(chunking) {
  check_boundary(source_, "source");
  check_boundary(destination_, "destination");
  if (chunking_.max_chunks < 1 || chunking_.min_bytes < 1) {
    throw std::invalid_argument("chunks: expected a positive number of positive size, got " +
                                std::to_string(chunking_.max_chunks) + " of " + std::to_string(chunking_.min_bytes) +
                                " bytes");
  }
  microbatch_.check();
  if (row_shards() != nullptr) row_shards()->shard_of(destination_, 0);  // throws where they do not fit
}

Plan Plan::reversed() const {
  return Plan(source_, destination_, microbatch_,
              direction_ == Direction::kForward ? Direction::kBackward : Direction::kForward, chunking_);
}

std::pair<int, int> Plan::lanes_met(int lane, int lanes, int other_lanes) {
  const std::int64_t first = std::int64_t{lane} * other_lanes / lanes;
  const std::int64_t last = ((std::int64_t{lane} + 1) * other_lanes + lanes - 1) / lanes;
  return {static_cast<int>(first), static_cast<int>(last)};
}

RankPlan Plan::for_rank(int rank, bool as_sender, bool as_receiver) const {
  constexpr std::pair kNowhere{-1, -1};
  return for_places(as_sender ? sender().find(rank) : kNowhere, as_receiver ? receiver().find(rank) : kNowhere);
}

RankPlan Plan::for_places(std::pair<int, int> as_sender, std::pair<int, int> as_receiver) const {
  RankPlan plan;
  const Boundary& from = sender();
  const Boundary& to = receiver();
  const bool partial = direction_ == Direction::kBackward;

  const auto each_overlap = [&](int lane, bool sending, const auto& visit) {
    const int mine = sending ? from.num_lanes() : to.num_lanes();
    const int others = sending ? to.num_lanes() : from.num_lanes();
    const auto [first, last] = lanes_met(lane, mine, others);
    for (int other = first; other < last; ++other) {
      const Overlap overlap =
          overlap_of(microbatch_, sending ? lane : other, from.num_lanes(), sending ? other : lane, to.num_lanes());
      if (overlap.empty()) continue;
      const auto sent = spread(pieces_of(from, overlap.sender_lane, overlap, microbatch_, partial, sender_shards()),
                               from, overlap.sender_lane, overlap, microbatch_, sender_shards());
      const auto received =
          spread(chunks_of(pieces_of(to, overlap.receiver_lane, overlap, microbatch_, false, receiver_shards()), to,
                           microbatch_, chunking_, receiver_shards()),
                 to, overlap.receiver_lane, overlap, microbatch_, receiver_shards());
      visit(overlap, sent, received);
    }
  };
  // The same nesting on both sides: messages between two ranks come in the same order in both ranks' lists.
  const auto transfers = [&](const Overlap& overlap, const std::vector<Piece>& sent, const std::vector<Piece>& received,
                             const auto& wanted, std::vector<Message>& out) {
    const ToLocal send_box(from, overlap.sender_lane, overlap, microbatch_);
    const ToLocal recv_box(to, overlap.receiver_lane, overlap, microbatch_);
    const auto& senders = from.lanes[static_cast<std::size_t>(overlap.sender_lane)];
    const auto& receivers = to.lanes[static_cast<std::size_t>(overlap.receiver_lane)];
    for (const Piece& s : sent) {
      for (const Piece& r : received) {
        if (!wanted(s, r)) continue;
        const Box box = intersect(s.box, r.box);
        if (box.volume() == 0) continue;
        out.push_back({senders[static_cast<std::size_t>(s.member)], receivers[static_cast<std::size_t>(r.member)],
                       overlap.sender_lane, overlap.receiver_lane, s.contribution, r.chunk, send_box(box, s.shift),
                       recv_box(box, r.shift)});
      }
    }
  };

  if (const auto [lane, member] = as_sender; lane >= 0) {
    each_overlap(lane, true, [&, me = member](const Overlap& overlap, const auto& sent, const auto& received) {
      transfers(overlap, sent, received, [me](const Piece& s, const Piece&) { return s.member == me; }, plan.sends);
    });
  }
  if (const auto [lane, member] = as_receiver; lane >= 0) {
    const auto replicas = replicas_of(to, member, receiver_shards());
    each_overlap(lane, false, [&, me = member](const Overlap& overlap, const auto& sent, const auto& received) {
      transfers(overlap, sent, received, [me](const Piece&, const Piece& r) { return r.member == me; }, plan.receives);
      const ToLocal local(to, overlap.receiver_lane, overlap, microbatch_);
      const auto& ranks = to.lanes[static_cast<std::size_t>(overlap.receiver_lane)];
      for (const Piece& piece : received) {
        if (std::find(replicas.begin(), replicas.end(), piece.member) == replicas.end()) continue;
        const Box box = local(piece.box, piece.shift);
        for (int replica : replicas) {
          if (replica == piece.member) continue;
          const Message copy{ranks[static_cast<std::size_t>(piece.member)],
                             ranks[static_cast<std::size_t>(replica)],
                             overlap.sender_lane,
                             overlap.receiver_lane,
                             0,
                             piece.chunk,
                             box,
                             box};
          if (piece.member == me) plan.lane_sends.push_back(copy);
          if (replica == me) plan.lane_receives.push_back(copy);
        }
      }
    });
  }
  // The first chunks of all lanes go first. Two ranks meet in one overlap only, so the order between them stays.
  for (std::vector<Message>* list : {&plan.sends, &plan.receives, &plan.lane_sends, &plan.lane_receives}) {
    std::stable_sort(list->begin(), list->end(), [](const Message& a, const Message& b) { return a.chunk < b.chunk; });
  }
  return plan;
}

std::array<std::int64_t, kMaxDims> Plan::sender_shape(int lane, int member) const {
  return local_shape(sender(), microbatch_, lane, member, sender_shards());
}

std::array<std::int64_t, kMaxDims> Plan::receiver_shape(int lane, int member) const {
  return local_shape(receiver(), microbatch_, lane, member, receiver_shards());
}

std::uint64_t Plan::hash() const {
  Fnv fnv;
  add(fnv, source_);
  add(fnv, destination_);
  fnv.add(static_cast<std::int64_t>(direction_));
  const Microbatch& m = microbatch_;
  for (std::int64_t value : {std::int64_t{m.ndim}, std::int64_t{m.batch_dim}, std::int64_t{m.seq_dim}, m.samples}) {
    fnv.add(value);
  }
  for (std::int64_t extent : m.shape) fnv.add(extent);
  fnv.add(m.rows_per_sample);
  fnv.add(static_cast<std::int64_t>(m.rows.size()));
  for (std::int64_t rows : m.rows) fnv.add(rows);
  if (m.row_shards != nullptr) {
    fnv.add(m.row_shards->first_known());
    fnv.add(static_cast<std::int64_t>(m.row_shards->hash(m.row_shards->first_known(), m.row_shards->last_known())));
  }
  fnv.add(m.element_size);
  fnv.add(chunking_.max_chunks);
  fnv.add(chunking_.min_bytes);
  return fnv.value();
}

std::uint64_t hash_of(const Boundary& source, const Boundary& destination) {
  Fnv fnv;
  add(fnv, source);
  add(fnv, destination);
  return fnv.value();
}

}  // namespace mimo_ext::core
