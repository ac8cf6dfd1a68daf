#include "core/plan.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <stdexcept>

namespace mimo_ext::core {

namespace {

/// Part of an overlap that one member of a lane sends or receives.
struct Piece {
  int member = 0;
  int contribution = 0;
  int chunk = 0;
  std::int64_t shift = 0;  ///< added to a lane coordinate of the sequence axis to get the member's own
  Box box;                 ///< relative to the overlap on the batch axis
};

/// Samples [first, last) that a sender lane and a receiver lane share.
struct Overlap {
  int sender_lane = 0;
  int receiver_lane = 0;
  std::int64_t first = 0;
  std::int64_t last = 0;

  bool empty() const { return first >= last; }
};

Overlap overlap_of(const Microbatch& microbatch, int sender_lane, int senders, int receiver_lane, int receivers) {
  return {
      sender_lane, receiver_lane,
      std::max(microbatch.lane_begin(sender_lane, senders), microbatch.lane_begin(receiver_lane, receivers)),
      std::min(microbatch.lane_begin(sender_lane + 1, senders), microbatch.lane_begin(receiver_lane + 1, receivers))};
}

Box box_of(const Microbatch& microbatch, std::int64_t first, std::int64_t last) {
  Box box;
  for (std::size_t axis = 0; axis < kMaxDims; ++axis) box.size[axis] = microbatch.shape[axis];
  box.size[static_cast<std::size_t>(microbatch.batch_dim)] = microbatch.extent(first, last);
  return box;
}

std::optional<std::int64_t> extent_if_known(const Microbatch& microbatch, std::int64_t first, std::int64_t last) {
  if (microbatch.ragged()) {
    for (std::int64_t sample = first; sample < last; ++sample) {
      if (microbatch.rows[static_cast<std::size_t>(sample)] == kUnknownRows) return std::nullopt;
    }
  }
  return microbatch.extent(first, last);
}

[[noreturn]] void throw_flat_shards(const Boundary& boundary, int lane) {
  throw std::invalid_argument("module '" + boundary.module +
                              "' holds 2-D tensors sharded along their rows (sequence or context parallel): " +
                              "expected row counts of every sample of its lane " + std::to_string(lane) +
                              ", or equal counts; got ragged counts that the other side does not know");
}

/// The members of one side of an overlap with the parts that they carry. Where `partial`, each cp copy carries all of
/// it.
std::vector<Piece> pieces_of(const Boundary& boundary, int lane, const Overlap& overlap, const Microbatch& microbatch,
                             bool partial) {
  const Box whole = box_of(microbatch, overlap.first, overlap.last);
  std::vector<Piece> pieces;
  if (whole.volume() == 0) return pieces;
  const auto seq = static_cast<std::size_t>(microbatch.seq_dim);
  const bool flat = microbatch.seq_dim == microbatch.batch_dim;  // 2-D: the sequence axis runs through the samples
  for (int shard = 0; shard < boundary.num_shards(); ++shard) {
    std::vector<Run> runs{{0, whole.size[seq], 0}};
    if (boundary.sharded()) {
      std::int64_t extent = whole.size[seq];
      std::int64_t origin = 0;
      if (flat) {
        const std::int64_t begin = microbatch.lane_begin(lane, boundary.num_lanes());
        const auto rows = extent_if_known(microbatch, begin, microbatch.lane_begin(lane + 1, boundary.num_lanes()));
        if (!rows) throw_flat_shards(boundary, lane);
        extent = *rows;
        origin = microbatch.extent(begin, overlap.first);
      }
      runs = boundary.runs_of_shard(shard, extent);
      for (Run& run : runs) run.start -= origin;
      // From here on start is relative to the overlap; the shift below is taken in lane coordinates.
      for (Run& run : runs) run.local_start -= run.start + origin;
    }
    const std::vector<int> members = boundary.members_of_shard(shard);
    for (const Run& run : runs) {
      Box range = whole;
      range.start[seq] = run.start;
      range.size[seq] = run.length;
      const Box box = intersect(whole, range);
      if (box.volume() == 0) continue;
      const std::int64_t shift = boundary.sharded() ? run.local_start : 0;
      // Replicas carry equal parts of the box. Partial copies (one group per cp coordinate) carry all of it between
      // them.
      for (std::size_t begin = 0; begin < members.size();) {
        std::size_t end = members.size();
        if (partial) {
          end = begin;
          while (end < members.size() && members[end] / boundary.tp == members[begin] / boundary.tp) ++end;
        }
        const bool copies = partial && boundary.cp_placement == CpPlacement::kReplicated;
        const int contribution = copies ? members[begin] / boundary.tp : 0;
        const auto boxes = cut(box, static_cast<int>(end - begin));
        for (std::size_t index = begin; index < end; ++index) {
          if (boxes[index - begin].volume() > 0) {
            pieces.push_back({members[index], contribution, 0, shift, boxes[index - begin]});
          }
        }
        begin = end;
      }
    }
  }
  return pieces;
}

/// Cuts what replicas forward to one another into chunks; in ascending order of chunks.
std::vector<Piece> chunks_of(std::vector<Piece> pieces, const Boundary& boundary, const Microbatch& microbatch,
                             const Chunking& chunking) {
  const auto replicas = static_cast<std::size_t>(boundary.lane_size() / boundary.num_shards());
  if (replicas < 2 || chunking.max_chunks < 2) return pieces;
  std::vector<Piece> cut_up;
  for (const Piece& piece : pieces) {
    const std::int64_t fitting = piece.box.volume() * microbatch.element_size / chunking.min_bytes;
    const int chunks = static_cast<int>(std::clamp<std::int64_t>(fitting, 1, chunking.max_chunks));
    const std::vector<Box> boxes = cut(piece.box, chunks);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (boxes[static_cast<std::size_t>(chunk)].volume() == 0) continue;
      Piece& part = cut_up.emplace_back(piece);
      part.chunk = chunk;
      part.box = boxes[static_cast<std::size_t>(chunk)];
    }
  }
  std::stable_sort(cut_up.begin(), cut_up.end(), [](const Piece& a, const Piece& b) { return a.chunk < b.chunk; });
  return cut_up;
}

/// Moves a box from overlap coordinates to those of the tensor that the member holds.
class ToLocal {
 public:
  ToLocal(const Boundary& boundary, int lane, const Overlap& overlap, const Microbatch& microbatch)
      : batch_(static_cast<std::size_t>(microbatch.batch_dim)),
        seq_(static_cast<std::size_t>(microbatch.seq_dim)),
        origin_(extent_if_known(microbatch, microbatch.lane_begin(lane, boundary.num_lanes()), overlap.first)) {}

  Box operator()(Box box, std::int64_t shift) const {
    if (!origin_) {
      box.start[batch_] = kUnknownRows;
      return box;
    }
    box.start[batch_] += *origin_;
    box.start[seq_] += shift;
    return box;
  }

 private:
  std::size_t batch_;
  std::size_t seq_;
  std::optional<std::int64_t> origin_;
};

class Fnv {
 public:
  void add(std::int64_t value) {
    for (int byte = 0; byte < 8; ++byte) {
      hash_ = (hash_ ^ ((static_cast<std::uint64_t>(value) >> (8 * byte)) & 0xffU)) * 0x100000001b3ULL;
    }
  }
  void add(const std::string& text) {
    add(static_cast<std::int64_t>(text.size()));
    for (const char letter : text) add(static_cast<std::int64_t>(letter));
  }
  void add(const Boundary& boundary) {
    add(boundary.module);
    add(boundary.tp);
    add(boundary.cp);
    add(static_cast<std::int64_t>(boundary.cp_placement));
    add(boundary.sequence_parallel ? 1 : 0);
    add(boundary.num_lanes());
    for (const auto& lane : boundary.lanes) {
      for (int rank : lane) add(rank);
    }
  }
  std::uint64_t value() const { return hash_; }

 private:
  std::uint64_t hash_ = 0xcbf29ce484222325ULL;
};

void check_boundary(const Boundary& boundary, const char* side) {
  if (boundary.lanes.empty()) {
    throw std::invalid_argument(std::string(side) + " of the bridge ('" + boundary.module + "') has no ranks");
  }
}

}  // namespace

Box intersect(const Box& a, const Box& b) {
  Box both;
  for (std::size_t axis = 0; axis < kMaxDims; ++axis) {
    const std::int64_t from = std::max(a.start[axis], b.start[axis]);
    const std::int64_t to = std::min(a.start[axis] + a.size[axis], b.start[axis] + b.size[axis]);
    both.start[axis] = from;
    both.size[axis] = std::max<std::int64_t>(0, to - from);
  }
  return both;
}

std::vector<Box> cut(const Box& box, int parts) {
  constexpr std::int64_t kEvenEnough = 8;  // parts of at least this many units differ by at most one in eight
  std::vector<Box> boxes{box};
  const auto split = [&boxes](std::size_t axis, int pieces) {
    std::vector<Box> finer;
    finer.reserve(boxes.size() * static_cast<std::size_t>(pieces));
    for (const Box& whole : boxes) {
      for (int piece = 0; piece < pieces; ++piece) {
        const std::int64_t from = whole.size[axis] * piece / pieces;
        Box& part = finer.emplace_back(whole);
        part.start[axis] += from;
        part.size[axis] = whole.size[axis] * (piece + 1) / pieces - from;
      }
    }
    boxes = std::move(finer);
  };
  std::int64_t left = parts;
  for (std::size_t axis = 0; axis < kMaxDims && left > 1; ++axis) {
    const std::int64_t size = box.size[axis];
    const std::int64_t pieces = size >= kEvenEnough * left ? left : std::gcd(size, left);
    split(axis, static_cast<int>(pieces));
    left /= pieces;
  }
  if (left > 1) {
    const auto& size = boxes.front().size;
    split(static_cast<std::size_t>(std::max_element(size.begin(), size.end()) - size.begin()), static_cast<int>(left));
  }
  return boxes;
}

std::int64_t Microbatch::extent(std::int64_t first, std::int64_t last) const {
  if (ndim == 3) return last - first;
  if (!ragged()) return (last - first) * rows_per_sample;
  std::int64_t total = 0;
  for (std::int64_t sample = first; sample < last; ++sample) {
    const std::int64_t count = rows[static_cast<std::size_t>(sample)];
    if (count == kUnknownRows) {
      throw std::invalid_argument("the number of rows of sample " + std::to_string(sample) + " is not known here");
    }
    total += count;
  }
  return total;
}

Plan::Plan(Boundary source, Boundary destination, Microbatch microbatch, Direction direction, Chunking chunking)
    : source_(std::move(source)),
      destination_(std::move(destination)),
      microbatch_(std::move(microbatch)),
      direction_(direction),
      chunking_(chunking) {
  // What does not count has one value: plans of the same messages are equal.
  if (microbatch_.batch_dim >= 0 && microbatch_.batch_dim < kMaxDims) {
    microbatch_.shape[static_cast<std::size_t>(microbatch_.batch_dim)] = 1;
  }
  if (microbatch_.ragged() || microbatch_.ndim == 3) microbatch_.rows_per_sample = 1;
  check_boundary(source_, "source");
  check_boundary(destination_, "destination");
  if (chunking_.max_chunks < 1 || chunking_.min_bytes < 1) {
    throw std::invalid_argument("chunks: expected a positive number of positive size, got " +
                                std::to_string(chunking_.max_chunks) + " of " + std::to_string(chunking_.min_bytes) +
                                " bytes");
  }
  const Microbatch& m = microbatch_;
  const auto bad = [](const std::string& what) { throw std::invalid_argument("microbatch: " + what); };
  if (m.ndim != 2 && m.ndim != 3) bad("expected 2 or 3 axes, got " + std::to_string(m.ndim));
  if (m.samples < 0) bad("expected samples >= 0, got " + std::to_string(m.samples));
  for (int axis : {m.batch_dim, m.seq_dim}) {
    if (axis < 0 || axis >= m.ndim) bad("axis " + std::to_string(axis) + " of a tensor of " + std::to_string(m.ndim));
  }
  if (m.ndim == 2 && (m.batch_dim != 0 || m.seq_dim != 0))
    bad("2-D tensors are [rows, h]: batch_dim and seq_dim must be 0");
  if (m.ndim == 3 && m.batch_dim == m.seq_dim) bad("batch_dim and seq_dim are both " + std::to_string(m.seq_dim));
  if (m.ndim == 2 && m.shape[2] != 1) bad("axis 2 of a 2-D tensor must have extent 1");
  for (int axis = 0; axis < m.ndim; ++axis) {
    const std::int64_t extent = m.shape[static_cast<std::size_t>(axis)];
    if (axis != m.batch_dim && extent < 0)
      bad("extent of axis " + std::to_string(axis) + " is " + std::to_string(extent));
  }
  if (m.ragged()) {
    if (m.ndim != 2) bad("row counts are for 2-D tensors, got " + std::to_string(m.ndim) + " axes");
    if (static_cast<std::int64_t>(m.rows.size()) != m.samples) {
      bad("expected " + std::to_string(m.samples) + " row counts, got " + std::to_string(m.rows.size()));
    }
    for (std::int64_t rows : m.rows) {
      if (rows < kUnknownRows) bad("a sample has " + std::to_string(rows) + " rows");
    }
  } else if (m.rows_per_sample < 0) {
    bad("rows_per_sample is " + std::to_string(m.rows_per_sample));
  }
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
      const auto sent = pieces_of(from, overlap.sender_lane, overlap, microbatch_, partial);
      const auto received =
          chunks_of(pieces_of(to, overlap.receiver_lane, overlap, microbatch_, false), to, microbatch_, chunking_);
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
    const auto replicas = to.members_of_shard(to.shard_of(member));
    each_overlap(lane, false, [&, me = member](const Overlap& overlap, const auto& sent, const auto& received) {
      transfers(overlap, sent, received, [me](const Piece&, const Piece& r) { return r.member == me; }, plan.receives);
      const ToLocal local(to, overlap.receiver_lane, overlap, microbatch_);
      const auto& ranks = to.lanes[static_cast<std::size_t>(overlap.receiver_lane)];
      for (const Piece& piece : received) {
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
          const bool of_my_shard = to.shard_of(piece.member) == to.shard_of(me);
          if (replica == me && of_my_shard) plan.lane_receives.push_back(copy);
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

namespace {

std::array<std::int64_t, kMaxDims> local_shape(const Boundary& boundary, const Microbatch& microbatch, int lane,
                                               int member) {
  const std::int64_t first = microbatch.lane_begin(lane, boundary.num_lanes());
  const std::int64_t last = microbatch.lane_begin(lane + 1, boundary.num_lanes());
  Box box = box_of(microbatch, first, last);
  if (boundary.sharded()) {
    const auto seq = static_cast<std::size_t>(microbatch.seq_dim);
    std::int64_t rows = 0;
    for (const Run& run : boundary.runs_of_shard(boundary.shard_of(member), box.size[seq])) rows += run.length;
    box.size[seq] = rows;
  }
  return box.size;
}

}  // namespace

std::array<std::int64_t, kMaxDims> Plan::sender_shape(int lane, int member) const {
  return local_shape(sender(), microbatch_, lane, member);
}

std::array<std::int64_t, kMaxDims> Plan::receiver_shape(int lane, int member) const {
  return local_shape(receiver(), microbatch_, lane, member);
}

std::uint64_t Plan::hash() const {
  Fnv fnv;
  fnv.add(source_);
  fnv.add(destination_);
  fnv.add(static_cast<std::int64_t>(direction_));
  const Microbatch& m = microbatch_;
  for (std::int64_t value : {std::int64_t{m.ndim}, std::int64_t{m.batch_dim}, std::int64_t{m.seq_dim}, m.samples}) {
    fnv.add(value);
  }
  for (std::int64_t extent : m.shape) fnv.add(extent);
  fnv.add(m.rows_per_sample);
  fnv.add(static_cast<std::int64_t>(m.rows.size()));
  for (std::int64_t rows : m.rows) fnv.add(rows);
  fnv.add(m.element_size);
  fnv.add(chunking_.max_chunks);
  fnv.add(chunking_.min_bytes);
  return fnv.value();
}

std::uint64_t hash_of(const Boundary& source, const Boundary& destination) {
  Fnv fnv;
  fnv.add(source);
  fnv.add(destination);
  return fnv.value();
}

}  // namespace mimo_ext::core
