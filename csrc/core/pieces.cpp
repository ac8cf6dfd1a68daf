#include "core/pieces.h"

#include <algorithm>
#include <stdexcept>

namespace mimo_ext::core {

namespace {

[[noreturn]] void throw_flat_shards(const Boundary& boundary, int lane) {
  throw std::invalid_argument("module '" + boundary.module +
                              "' holds 2-D tensors sharded along their rows (sequence or context parallel): " +
                              "expected row counts of every sample of its lane " + std::to_string(lane) +
                              ", or equal counts; got ragged counts that the other side does not know");
}

/// The members of each row shard are replicas. Every row has one shard, so nothing is partial.
std::vector<Replicas> replicas_of_shards(const Boundary& boundary, const Overlap& overlap, const Microbatch& microbatch,
                                         const RowShards& row_shards) {
  std::vector<Replicas> parts;
  for (int shard = 0; shard < row_shards.num_shards(); ++shard) {
    Box box;
    box.size = {row_shards.rows_of_shard(shard, overlap.first, overlap.last), microbatch.shape[1], 1};
    if (box.volume() > 0) parts.push_back({row_shards.members_of_shard(boundary, shard), 0, shard, 0, box});
  }
  return parts;
}

}  // namespace

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

std::vector<Replicas> replicas_of(const Boundary& boundary, int lane, const Overlap& overlap,
                                  const Microbatch& microbatch, bool partial, const RowShards* row_shards) {
  if (row_shards != nullptr) return replicas_of_shards(boundary, overlap, microbatch, *row_shards);
  const Box whole = box_of(microbatch, overlap.first, overlap.last);
  std::vector<Replicas> parts;
  if (whole.volume() == 0) return parts;
  const auto seq = static_cast<std::size_t>(microbatch.seq_dim);
  const bool flat = microbatch.seq_dim == microbatch.batch_dim;  // 2-D: the sequence axis runs through the samples
  const bool copies = partial && boundary.cp_placement == CpPlacement::kReplicated;
  std::int64_t extent = whole.size[seq];
  std::int64_t origin = 0;
  if (boundary.sharded() && flat) {
    const std::int64_t begin = microbatch.lane_begin(lane, boundary.num_lanes());
    const auto rows = extent_if_known(microbatch, begin, microbatch.lane_begin(lane + 1, boundary.num_lanes()));
    if (!rows) throw_flat_shards(boundary, lane);
    extent = *rows;
    origin = microbatch.extent(begin, overlap.first);
  }
  for (int shard = 0; shard < boundary.num_shards(); ++shard) {
    std::vector<Run> runs{{0, whole.size[seq], 0}};
    if (boundary.sharded()) {
      runs = boundary.runs_of_shard(shard, extent);
      // Starts become relative to the overlap, local starts the shift of lane coordinates.
      for (Run& run : runs) run = {run.start - origin, run.length, run.local_start - run.start};
    }
    const std::vector<int> members = boundary.members_of_shard(shard);
    for (const Run& run : runs) {
      Box range = whole;
      range.start[seq] = run.start;
      range.size[seq] = run.length;
      const Box box = intersect(whole, range);
      if (box.volume() == 0) continue;
      for (auto first = members.begin(); first != members.end();) {
        const auto last = copies
                              ? std::find_if(first, members.end(),
                                             [&](int member) { return member / boundary.tp != *first / boundary.tp; })
                              : members.end();
        parts.push_back({{first, last}, copies ? *first / boundary.tp : 0, 0, run.local_start, box});
        first = last;
      }
    }
  }
  return parts;
}

Spread::Spread(const Boundary& boundary, int lane, const Overlap& overlap, const Microbatch& microbatch,
               const RowShards* row_shards)
    : row_sharded_(row_shards != nullptr) {
  if (!row_sharded_) return;
  const std::int64_t begin = microbatch.lane_begin(lane, boundary.num_lanes());
  // The other side does not know the samples before the overlap, nor where in its tensor a member puts the rows.
  const bool whole_lane = row_shards->knows(begin, overlap.first);
  if (whole_lane) origin_ = microbatch.extent(begin, overlap.first);
  shards_.resize(static_cast<std::size_t>(row_shards->num_shards()));
  if (whole_lane) {
    for (int shard = 0; shard < row_shards->num_shards(); ++shard) {
      shards_[static_cast<std::size_t>(shard)].before = row_shards->rows_of_shard(shard, begin, overlap.first);
    }
  }
  std::int64_t row = 0;
  for (const Segment& segment : row_shards->segments(overlap.first, overlap.last)) {
    auto& runs = shards_[static_cast<std::size_t>(segment.shard)].runs;
    const std::int64_t taken = runs.empty() ? 0 : runs.back().local_start + runs.back().length;
    runs.push_back({row, segment.rows, taken});
    row += segment.rows;
  }
}

std::vector<Placed> Spread::operator()(const Replicas& replicas, const Box& part) const {
  if (!row_sharded_) return {{part, replicas.shift}};
  const ShardRuns& shard = shards_[static_cast<std::size_t>(replicas.shard)];
  const std::int64_t first = part.start[0];
  const std::int64_t last = first + part.size[0];
  std::vector<Placed> placed;
  auto run = std::partition_point(shard.runs.begin(), shard.runs.end(), [first](const Run& candidate) {
    return candidate.local_start + candidate.length <= first;
  });
  for (; run != shard.runs.end() && run->local_start < last; ++run) {
    const std::int64_t from = std::max(first, run->local_start);
    const std::int64_t to = std::min(last, run->local_start + run->length);
    Box box = part;
    box.start[0] = run->start + from - run->local_start;
    box.size[0] = to - from;
    placed.push_back({box, shard.before + from - (origin_ + box.start[0])});
  }
  return placed;
}

std::array<std::int64_t, kMaxDims> local_shape(const Boundary& boundary, const Microbatch& microbatch, int lane,
                                               int member, const RowShards* row_shards) {
  const std::int64_t first = microbatch.lane_begin(lane, boundary.num_lanes());
  const std::int64_t last = microbatch.lane_begin(lane + 1, boundary.num_lanes());
  if (row_shards != nullptr) {
    return {row_shards->rows_of_shard(row_shards->shard_of(boundary, member), first, last), microbatch.shape[1], 1};
  }
  Box box = box_of(microbatch, first, last);
  if (boundary.sharded()) {
    const auto seq = static_cast<std::size_t>(microbatch.seq_dim);
    std::int64_t rows = 0;
    for (const Run& run : boundary.runs_of_shard(boundary.shard_of(member), box.size[seq])) rows += run.length;
    box.size[seq] = rows;
  }
  return box.size;
}

}  // namespace mimo_ext::core
