// What the ranks of one side hold of an overlap of two lanes.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "core/layout.h"
#include "core/microbatch.h"

namespace mimo_ext::core {

/// Samples [first, last) that a sender lane and a receiver lane share.
struct Overlap {
  int sender_lane = 0;
  int receiver_lane = 0;
  std::int64_t first = 0;
  std::int64_t last = 0;

  bool empty() const { return first >= last; }
};

Overlap overlap_of(const Microbatch& microbatch, int sender_lane, int senders, int receiver_lane, int receivers);

/// The whole of an overlap, its batch axis starting at 0. Throws where a row count is not known.
Box box_of(const Microbatch& microbatch, std::int64_t first, std::int64_t last);

/// Members of a lane that hold the same part of an overlap.
struct Replicas {
  std::vector<int> members;  ///< ascending
  int contribution = 0;      ///< of partial gradients
  int shard = 0;             ///< of row shards
  std::int64_t shift = 0;    ///< added to a lane coordinate of the sequence axis to get the members' own
  Box box;                   ///< relative to the overlap on the batch axis; of row shards: see Spread
};

/// The parts that one side of an overlap is held in, with the members that hold each. Where `partial`, each cp copy is
/// a contribution of its own to all of it. `row_shards`: of this side, or null.
std::vector<Replicas> replicas_of(const Boundary& boundary, int lane, const Overlap& overlap,
                                  const Microbatch& microbatch, bool partial, const RowShards* row_shards);

/// A box of an overlap, and what is added to a lane coordinate of the sequence axis to get the holder's own.
struct Placed {
  Box box;
  std::int64_t shift = 0;
};

/// Puts parts of replicas where their rows are in the overlap. The rows of a row shard count from 0 in its own order,
/// so that they can be cut into equal parts; they lie in one or more runs. Without row shards nothing changes.
class Spread {
 public:
  Spread(const Boundary& boundary, int lane, const Overlap& overlap, const Microbatch& microbatch,
         const RowShards* row_shards);

  /// `part`: a box in the coordinates of the replicas' box.
  std::vector<Placed> operator()(const Replicas& replicas, const Box& part) const;

 private:
  struct ShardRuns {
    std::int64_t before = 0;  ///< rows of the shard in the lane ahead of the overlap; 0 where that is not known
    std::vector<Run> runs;    ///< rows of the overlap; local_start counts the shard's rows in it
  };
  bool row_sharded_;
  std::int64_t origin_ = 0;  ///< of the overlap in the lane; 0 where it is not known
  std::vector<ShardRuns> shards_;
};

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

/// Shape of the tensor that a member of a lane holds. Throws std::invalid_argument where it needs an unknown row count.
std::array<std::int64_t, kMaxDims> local_shape(const Boundary& boundary, const Microbatch& microbatch, int lane,
                                               int member, const RowShards* row_shards);

}  // namespace mimo_ext::core
