// The parts of an overlap of two lanes that the ranks of one of them send or receive. The plan is made of the
// intersections of the sender's pieces with the receiver's.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "core/layout.h"
#include "core/microbatch.h"

namespace mimo_ext::core {

/// Into how many chunks the part of a receiver is cut that it forwards to its replicas. Must be equal on all ranks.
struct Chunking {
  int max_chunks = 8;                               ///< more did not help in measurements; 1: no chunks
  std::int64_t min_bytes = std::int64_t{64} << 10;  ///< of a chunk: below, the number of messages decides

  bool operator==(const Chunking&) const = default;
};

/// Part of an overlap that one member of a lane sends or receives.
struct Piece {
  int member = 0;
  int contribution = 0;
  int chunk = 0;
  int shard = 0;           ///< of row shards
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

Overlap overlap_of(const Microbatch& microbatch, int sender_lane, int senders, int receiver_lane, int receivers);

/// The members of one side of an overlap with the parts that they carry. Where `partial`, each cp copy carries all of
/// it. With `row_shards` the rows of a box count along those of the piece's shard in this overlap, until `spread`.
std::vector<Piece> pieces_of(const Boundary& boundary, int lane, const Overlap& overlap, const Microbatch& microbatch,
                             bool partial, const RowShards* row_shards);

/// Cuts what replicas forward to one another into chunks; in ascending order of chunks.
std::vector<Piece> chunks_of(std::vector<Piece> pieces, const Boundary& boundary, const Microbatch& microbatch,
                             const Chunking& chunking, const RowShards* row_shards);

/// Puts pieces of row shards where their rows are in the overlap: one piece for each run of rows. Without row shards
/// pieces stay as they are.
std::vector<Piece> spread(std::vector<Piece> pieces, const Boundary& boundary, int lane, const Overlap& overlap,
                          const Microbatch& microbatch, const RowShards* row_shards);

/// The members that hold what `member` holds, itself included, ascending.
std::vector<int> replicas_of(const Boundary& boundary, int member, const RowShards* row_shards);

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
