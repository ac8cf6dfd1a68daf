#include "core/pieces.h"

#include <algorithm>
#include <stdexcept>

namespace mimo_ext::core {

namespace {

Box box_of(const Microbatch& microbatch, std::int64_t first, std::int64_t last) {
  Box box;
  for (std::size_t axis = 0; axis < kMaxDims; ++axis) box.size[axis] = microbatch.shape[axis];
  box.size[static_cast<std::size_t>(microbatch.batch_dim)] = microbatch.extent(first, last);
  return box;
}

[[noreturn]] void throw_flat_shards(const Boundary& boundary, int lane) {
  throw std::invalid_argument("module '" + boundary.module +
                              "' holds 2-D tensors sharded along their rows (sequence or context parallel): " +
                              "expected row counts of every sample of its lane " + std::to_string(lane) +
                              ", or equal counts; got ragged counts that the other side does not know");
}

/// The members of each row shard share its rows: replicas carry equal parts. Every row has one shard, so nothing is
/// partial.
std::vector<Piece> pieces_of_shards(const Boundary& boundary, const Overlap& overlap, const Microbatch& microbatch,
                                    const RowShards& row_shards) {
  std::vector<Piece> pieces;
  for (int shard = 0; shard < row_shards.num_shards(); ++shard) {
    Box box;
    box.size = {row_shards.rows_of_shard(shard, overlap.first, overlap.last), microbatch.shape[1], 1};
    const std::vector<int> members = row_shards.members_of_shard(boundary, shard);
    const std::vector<Box> boxes = cut(box, static_cast<int>(members.size()));
    for (std::size_t index = 0; index < members.size(); ++index) {
      if (boxes[index].volume() > 0) pieces.push_back({members[index], 0, 0, shard, 0, boxes[index]});
    }
  }
  return pieces;
}

}  // namespace

Overlap overlap_of(const Microbatch& microbatch, int sender_lane, int senders, int receiver_lane, int receivers) {
  return {
      sender_lane, receiver_lane,
      std::max(microbatch.lane_begin(sender_lane, senders), microbatch.lane_begin(receiver_lane, receivers)),
      std::min(microbatch.lane_begin(sender_lane + 1, senders), microbatch.lane_begin(receiver_lane + 1, receivers))};
}

std::vector<Piece> pieces_of(const Boundary& boundary, int lane, const Overlap& overlap, const Microbatch& microbatch,
                             bool partial, const RowShards* row_shards) {
  if (row_shards != nullptr) return pieces_of_shards(boundary, overlap, microbatch, *row_shards);
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
            pieces.push_back({members[index], contribution, 0, 0, shift, boxes[index - begin]});
          }
        }
        begin = end;
      }
    }
  }
  return pieces;
}

std::vector<Piece> chunks_of(std::vector<Piece> pieces, const Boundary& boundary, const Microbatch& microbatch,
                             const Chunking& chunking, const RowShards* row_shards) {
  const int shards = row_shards != nullptr ? row_shards->num_shards() : boundary.num_shards();
  if (boundary.lane_size() / shards < 2 || chunking.max_chunks < 2) return pieces;
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

std::vector<Piece> spread(std::vector<Piece> pieces, const Boundary& boundary, int lane, const Overlap& overlap,
                          const Microbatch& microbatch, const RowShards* row_shards) {
  if (row_shards == nullptr) return pieces;
  const std::int64_t begin = microbatch.lane_begin(lane, boundary.num_lanes());
  // The other side does not know the samples before the overlap, nor where in its tensor a member puts the rows.
  const bool whole_lane = row_shards->knows(begin, overlap.first);
  const std::int64_t origin = whole_lane ? microbatch.extent(begin, overlap.first) : 0;
  std::vector<std::vector<Run>> runs(static_cast<std::size_t>(row_shards->num_shards()));
  std::vector<std::int64_t> taken(runs.size(), 0);  // rows of each shard in the overlap so far
  std::int64_t row = 0;
  for (const Segment& segment : row_shards->segments(overlap.first, overlap.last)) {
    const auto shard = static_cast<std::size_t>(segment.shard);
    runs[shard].push_back({row, segment.rows, taken[shard]});
    taken[shard] += segment.rows;
    row += segment.rows;
  }
  std::vector<Piece> spread_out;
  for (const Piece& piece : pieces) {
    const std::int64_t before = whole_lane ? row_shards->rows_of_shard(piece.shard, begin, overlap.first) : 0;
    const std::int64_t first = piece.box.start[0];
    const std::int64_t last = first + piece.box.size[0];
    const auto& of_shard = runs[static_cast<std::size_t>(piece.shard)];
    auto run = std::partition_point(of_shard.begin(), of_shard.end(), [first](const Run& candidate) {
      return candidate.local_start + candidate.length <= first;
    });
    for (; run != of_shard.end() && run->local_start < last; ++run) {
      const std::int64_t from = std::max(first, run->local_start);
      const std::int64_t to = std::min(last, run->local_start + run->length);
      Piece& part = spread_out.emplace_back(piece);
      part.box.start[0] = run->start + from - run->local_start;
      part.box.size[0] = to - from;
      part.shift = before + from - (origin + part.box.start[0]);
    }
  }
  return spread_out;
}

std::vector<int> replicas_of(const Boundary& boundary, int member, const RowShards* row_shards) {
  if (row_shards == nullptr) return boundary.members_of_shard(boundary.shard_of(member));
  return row_shards->members_of_shard(boundary, row_shards->shard_of(boundary, member));
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
