#include "core/exchange.h"

#include <algorithm>

namespace mimo_ext::core {

namespace {

bool contains(const std::vector<int>& members, int member) {
  return std::find(members.begin(), members.end(), member) != members.end();
}

/// Are all ranks on one host, as far as that is known?
bool on_one_host(const std::vector<int>& ranks, int ranks_per_host) {
  const auto host = [ranks_per_host](int rank) { return rank / ranks_per_host; };
  return std::all_of(ranks.begin(), ranks.end(), [&](int rank) { return host(rank) == host(ranks.front()); });
}

}  // namespace

std::pair<int, int> lanes_met(int lane, int lanes, int other_lanes) {
  const std::int64_t first = std::int64_t{lane} * other_lanes / lanes;
  const std::int64_t last = ((std::int64_t{lane} + 1) * other_lanes + lanes - 1) / lanes;
  return {static_cast<int>(first), static_cast<int>(last)};
}

Exchange::Exchange(const Sides& sides, const Microbatch& microbatch, const Overlap& overlap, bool forward,
                   const PlanOptions& options)
    : from_(forward ? sides.source() : sides.destination()),
      to_(forward ? sides.destination() : sides.source()),
      microbatch_(microbatch),
      overlap_(overlap),
      options_(options),
      row_sharded_(microbatch.row_shards != nullptr),
      even_rows_(microbatch.even_for(forward ? overlap.sender_lane : overlap.receiver_lane)) {
  const RowShards* sent_shards = forward ? nullptr : microbatch.row_shards.get();
  const RowShards* received_shards = forward ? microbatch.row_shards.get() : nullptr;
  for (Replicas& part : replicas_of(from_, overlap.sender_lane, overlap, microbatch, !forward, sent_shards)) {
    held_.push_back({std::move(part), {}, {}});
  }
  std::vector<Replicas> received = replicas_of(to_, overlap.receiver_lane, overlap, microbatch, false, received_shards);
  if (held_.empty()) return;
  if (!sides.disjoint()) find_owners();
  load_ = load_of(received.front());
  times_ = times_of(load_, options);
  path_ = options.path == Path::kAuto ? times_.best() : options.path;
  // One leader is as good as all replicas only where the other lanes' leaders have as much to do.
  const bool chosen = options.path == Path::kAuto && path_ == Path::kLeader;
  const bool alone = load_.sender_lanes > 1 && load_.group == load_.replicas;
  if (chosen && alone && times_.leader_chunks > 1) path_ = Path::kPipelined;

  const Spread spread_sent(from_, overlap.sender_lane, overlap, microbatch, sent_shards);
  for (Held& held : held_) {
    const Replicas& replicas = held.replicas;
    held.whole = spread_sent(replicas, replicas.box);
    if (path_ != Path::kPipelined) continue;
    for (const Box& part : cut(replicas.box, static_cast<int>(replicas.members.size()))) {
      held.parts.push_back(spread_sent(replicas, part));
    }
  }
  const Spread spread_received(to_, overlap.receiver_lane, overlap, microbatch, received_shards);
  keep_own(std::move(received), spread_received);
  for (int target = 0; target < static_cast<int>(targets_.size()); ++target) deliver(target, spread_received);
  std::stable_sort(pieces_.begin(), pieces_.end(), [](const Piece& a, const Piece& b) { return a.chunk < b.chunk; });
}

void Exchange::find_owners() {
  const auto& senders = from_.lanes[static_cast<std::size_t>(overlap_.sender_lane)];
  for (int rank : to_.lanes[static_cast<std::size_t>(overlap_.receiver_lane)]) {
    const auto found = std::find(senders.begin(), senders.end(), rank);
    own_.push_back(found == senders.end() ? kNobody : static_cast<int>(found - senders.begin()));
    any_own_ = any_own_ || own_.back() != kNobody;
  }
}

PathLoad Exchange::load_of(const Replicas& received) const {
  PathLoad load;
  const Box whole = box_of(microbatch_, overlap_.first, overlap_.last);
  load.bytes = whole.volume() * microbatch_.element_size;
  for (const Held& held : held_) load.contributions = std::max(load.contributions, held.replicas.contribution + 1);
  load.senders = static_cast<int>(held_.front().replicas.members.size());
  load.sender_shards = from_.lane_size() / (load.senders * load.contributions);
  load.replicas = static_cast<int>(received.members.size());
  load.receiver_shards = to_.lane_size() / load.replicas;
  load.group = group_of(load.replicas).second;
  const auto [first_receiver, last_receiver] = lanes_met(overlap_.sender_lane, from_.num_lanes(), to_.num_lanes());
  const auto [first_sender, last_sender] = lanes_met(overlap_.receiver_lane, to_.num_lanes(), from_.num_lanes());
  load.receiver_lanes = last_receiver - first_receiver;
  load.sender_lanes = last_sender - first_sender;
  if (const int ranks_per_host = options_.links ? options_.links->ranks_per_host : 0; ranks_per_host > 0) {
    const auto& senders = from_.lanes[static_cast<std::size_t>(overlap_.sender_lane)];
    const auto& receivers = to_.lanes[static_cast<std::size_t>(overlap_.receiver_lane)];
    const auto host = [&](int member) { return receivers[static_cast<std::size_t>(member)] / ranks_per_host; };
    load.far_replicas =
        static_cast<int>(std::count_if(received.members.begin(), received.members.end(),
                                       [&](int member) { return host(member) != host(received.members.front()); }));
    load.same_host = on_one_host(receivers, ranks_per_host) && on_one_host(senders, ranks_per_host) &&
                     senders.front() / ranks_per_host == receivers.front() / ranks_per_host;
  }
  return load;
}

void Exchange::add_pieces(int member, int target, int chunk, const std::vector<Placed>& placed) {
  for (const Placed& part : placed) pieces_.push_back({member, target, chunk, part});
}

void Exchange::keep_own(std::vector<Replicas> received, const Spread& spread) {
  // Partial gradients are summed by those who forward the sum: nobody has that before. The parts of row shards are no
  // boxes of the overlap.
  const bool may_own = any_own_ && load_.contributions == 1 && !row_sharded_;
  for (Replicas& part : received) {
    const auto owns = [&](const Held& held, int receiver) {
      return contains(held.replicas.members, own_[static_cast<std::size_t>(receiver)]);
    };
    const bool some_own = may_own && std::any_of(held_.begin(), held_.end(), [&](const Held& held) {
                            return intersect(held.replicas.box, part.box).volume() > 0 &&
                                   std::any_of(part.members.begin(), part.members.end(),
                                               [&](int receiver) { return owns(held, receiver); });
                          });
    if (!some_own) {
      targets_.push_back(std::move(part));
      continue;
    }
    for (const Held& held : held_) {
      Replicas rest{{}, 0, 0, part.shift, intersect(held.replicas.box, part.box)};
      if (rest.box.volume() == 0) continue;
      for (int receiver : part.members) {
        if (owns(held, receiver)) {
          add_pieces(receiver, kNobody, 0, spread(part, rest.box));
        } else {
          rest.members.push_back(receiver);
        }
      }
      if (!rest.members.empty()) targets_.push_back(std::move(rest));
    }
  }
}

std::pair<int, int> Exchange::group_of(int replicas) const {
  const auto [first, last] = lanes_met(overlap_.receiver_lane, to_.num_lanes(), from_.num_lanes());
  const int lanes = last - first;
  // Lanes that send more than others want all receivers; ranks that keep their own are no equals of the others.
  const bool equal = from_.num_lanes() % to_.num_lanes() == 0 && even_rows_ &&
                     microbatch_.samples % from_.num_lanes() == 0 && !any_own_;
  if (!equal || (replicas % lanes != 0 && lanes % replicas != 0)) return {0, replicas};
  return {(overlap_.sender_lane - first) * replicas / lanes, std::max(1, replicas / lanes)};
}

int Exchange::leader_of(const std::vector<int>& members) const {
  const auto [first, last] = lanes_met(overlap_.receiver_lane, to_.num_lanes(), from_.num_lanes());
  const std::size_t count = members.size();
  // Overlaps of one lane take different leaders.
  const std::size_t turn =
      static_cast<std::size_t>(overlap_.sender_lane - first) * count / static_cast<std::size_t>(last - first);
  for (std::size_t step = 0; any_own_ && step < count; ++step) {
    const int member = members[(turn + step) % count];
    if (own_[static_cast<std::size_t>(member)] != kNobody) return member;
  }
  return members[turn];
}

void Exchange::deliver(int target, const Spread& spread) {
  const Replicas& lacking = targets_[static_cast<std::size_t>(target)];
  const std::vector<int>& members = lacking.members;
  if (path_ == Path::kDirect) {
    for (int member : members) add_pieces(member, kNobody, 0, spread(lacking, lacking.box));
    return;
  }
  const auto deliver_part = [&](int member, const Box& part, int most) {
    const std::int64_t bytes = part.volume() * microbatch_.element_size;
    if (bytes == 0) return;
    const int chunks = members.size() < 2 ? 1 : std::min(most, options_.chunking.chunks_of(bytes));
    const std::vector<Box> boxes = cut(part, chunks);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const Box& box = boxes[static_cast<std::size_t>(chunk)];
      if (box.volume() > 0) add_pieces(member, target, chunk, spread(lacking, box));
    }
  };
  if (path_ == Path::kLeader) return deliver_part(leader_of(members), lacking.box, times_.leader_chunks);
  const auto [begin, count] = group_of(static_cast<int>(members.size()));
  const std::vector<Box> parts = cut(lacking.box, count);
  for (std::size_t part = 0; part < parts.size(); ++part) {
    deliver_part(members[static_cast<std::size_t>(begin) + part], parts[part], times_.chunks);
  }
}

int Exchange::sender_for(int receiver, const std::vector<int>& senders) const {
  if (any_own_ && contains(senders, own_[static_cast<std::size_t>(receiver)])) {
    return own_[static_cast<std::size_t>(receiver)];
  }
  if (path_ == Path::kPipelined) return kNobody;
  // The members of all receiver lanes that this lane meets take turns, so that the senders' shares are equal.
  const auto [first, last] = lanes_met(overlap_.sender_lane, from_.num_lanes(), to_.num_lanes());
  const std::int64_t turn = std::int64_t{overlap_.receiver_lane - first} * to_.lane_size() + receiver;
  const std::int64_t turns = std::int64_t{last - first} * to_.lane_size();
  return senders[static_cast<std::size_t>(turn * static_cast<std::int64_t>(senders.size()) / turns)];
}

void Exchange::add_transfers(int sender, int receiver, std::vector<Message>& out) const {
  if (pieces_.empty()) return;
  const ToLocal send_box(from_, overlap_.sender_lane, overlap_, microbatch_);
  const ToLocal recv_box(to_, overlap_.receiver_lane, overlap_, microbatch_);
  const auto& senders = from_.lanes[static_cast<std::size_t>(overlap_.sender_lane)];
  const auto& receivers = to_.lanes[static_cast<std::size_t>(overlap_.receiver_lane)];
  const auto add = [&](int member, const Held& held, const std::vector<Placed>& sent, const Piece& piece) {
    if (sender != kAny && member != sender) return;
    for (const Placed& part : sent) {
      const Box box = intersect(part.box, piece.placed.box);
      if (box.volume() == 0) continue;
      out.push_back({senders[static_cast<std::size_t>(member)], receivers[static_cast<std::size_t>(piece.member)],
                     overlap_.sender_lane, overlap_.receiver_lane, held.replicas.contribution, piece.chunk,
                     send_box(box, part.shift), recv_box(box, piece.placed.shift)});
    }
  };
  // The same nesting on both sides: messages between two ranks come in the same order in both ranks' lists.
  for (const Piece& piece : pieces_) {
    if (receiver != kAny && piece.member != receiver) continue;
    for (const Held& held : held_) {
      const std::vector<int>& members = held.replicas.members;
      if (const int only = sender_for(piece.member, members); only != kNobody) {
        add(only, held, held.whole, piece);
        continue;
      }
      for (std::size_t part = 0; part < members.size(); ++part) add(members[part], held, held.parts[part], piece);
    }
  }
}

void Exchange::add_copies(int member, std::vector<Message>& sends, std::vector<Message>& receives) const {
  if (pieces_.empty()) return;
  const ToLocal local(to_, overlap_.receiver_lane, overlap_, microbatch_);
  const auto& ranks = to_.lanes[static_cast<std::size_t>(overlap_.receiver_lane)];
  for (const Piece& piece : pieces_) {
    if (piece.target == kNobody) continue;
    const std::vector<int>& replicas = targets_[static_cast<std::size_t>(piece.target)].members;
    if (!contains(replicas, member)) continue;
    const Box box = local(piece.placed.box, piece.placed.shift);
    for (int replica : replicas) {
      if (replica == piece.member || (piece.member != member && replica != member)) continue;
      auto& list = piece.member == member ? sends : receives;
      list.push_back({ranks[static_cast<std::size_t>(piece.member)], ranks[static_cast<std::size_t>(replica)],
                      overlap_.sender_lane, overlap_.receiver_lane, 0, piece.chunk, box, box});
    }
  }
}

}  // namespace mimo_ext::core
