// The transfer plan: who sends which box of the boundary tensor to whom, for one microbatch in one direction.
//
// A plan is the intersection of two partitions of the same line of samples. Each overlap of a sender lane with a
// receiver lane is cut separately, once over the sender's ranks and once over the receiver's; every non-empty
// intersection of two such parts is one message. Receivers that are replicas of one another then complete each other
// with lane copies: each rank forwards the part that it received, chunk by chunk. Fan-in, fan-out, unequal TP, ragged
// rows and hops between equal ranks need no cases of their own.
//
// Values only: a Plan is immutable, owns its memory and may be shared between threads. It needs no process group: the
// plan of any rank of any cluster can be computed anywhere.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/layout.h"
#include "core/microbatch.h"
#include "core/pieces.h"

namespace mimo_ext::core {

enum class Direction : std::uint8_t { kForward, kBackward };

/// One message. Boxes are in the coordinates of the tensors that the two ranks hold.
struct Message {
  int sender = 0;    ///< global rank
  int receiver = 0;  ///< global rank; the same as sender for a local copy
  int sender_lane = 0;
  int receiver_lane = 0;
  /// 0 writes the box. Higher values add to it, in ascending order: gradients of CP copies are partial and are summed.
  int contribution = 0;
  /// Chunks of one part are forwarded one after the other. Every list of a RankPlan is in ascending order of chunks.
  int chunk = 0;
  Box send_box;  ///< valid where the plan was asked for the sender, or all row counts are known
  Box recv_box;  ///< valid where the plan was asked for the receiver, or all row counts are known

  bool operator==(const Message&) const = default;
};

/// A rank's part of a plan. For any two ranks, the messages from one to the other have the same order in both ranks'
/// lists.
struct RankPlan {
  std::vector<Message> sends;
  std::vector<Message> receives;
  std::vector<Message>
      lane_sends;  ///< to replicas of this rank in its lane; send_box lies in this rank's received tensor
  std::vector<Message> lane_receives;  ///< from replicas
};

class Plan {
 public:
  /// `source` and `destination` are the two sides of the bridge, whatever the direction.
  /// Throws std::invalid_argument for a microbatch that does not fit, or chunks of no size.
  Plan(Boundary source, Boundary destination, Microbatch microbatch, Direction direction, Chunking chunking = {});

  /// The same microbatch in the other direction. An involution.
  Plan reversed() const;

  const Boundary& source() const { return source_; }
  const Boundary& destination() const { return destination_; }
  const Boundary& sender() const { return direction_ == Direction::kForward ? source_ : destination_; }
  const Boundary& receiver() const { return direction_ == Direction::kForward ? destination_ : source_; }
  const Microbatch& microbatch() const { return microbatch_; }
  /// The row shards of the destination, on the side that it is; null on the source's.
  const RowShards* sender_shards() const { return direction_ == Direction::kForward ? nullptr : row_shards(); }
  const RowShards* receiver_shards() const { return direction_ == Direction::kForward ? row_shards() : nullptr; }
  Direction direction() const { return direction_; }
  const Chunking& chunking() const { return chunking_; }

  /// All messages in which `rank` takes part. The cost grows with their number (and the size of the lanes met), not
  /// with the world.
  /// A rank on both sides may ask for one of its roles alone: as a sender it needs to know the rows of its own samples
  /// only.
  RankPlan for_rank(int rank, bool as_sender = true, bool as_receiver = true) const;
  /// Shape of the tensor that a rank holds as a sender or as a receiver. Needs the row counts of that rank's lane.
  std::array<std::int64_t, kMaxDims> sender_shape(int lane, int member) const;
  std::array<std::int64_t, kMaxDims> receiver_shape(int lane, int member) const;

  /// Lanes of the other side that can meet this lane, whatever the number of samples.
  static std::pair<int, int> lanes_met(int lane, int lanes, int other_lanes);

  /// FNV-1a over all that makes plans equal: the same on every machine.
  std::uint64_t hash() const;
  /// A table for people: one line per message of every rank, at most `max_lines` of them.
  std::string to_string(int max_lines) const;

  bool operator==(const Plan&) const = default;

 private:
  /// Messages of the rank at (lane, member) of the sender and of the receiver; lane -1: not there.
  RankPlan for_places(std::pair<int, int> as_sender, std::pair<int, int> as_receiver) const;

  const RowShards* row_shards() const { return microbatch_.row_shards.get(); }

  Boundary source_;
  Boundary destination_;
  Microbatch microbatch_;
  Direction direction_;
  Chunking chunking_;
};

/// FNV-1a of two boundaries and the tensor form: what two processes must agree on before the first microbatch.
std::uint64_t hash_of(const Boundary& source, const Boundary& destination);

/// "tp=2 cp=1, 3 lanes: [0 1] [2 3] [4 5]" (abbreviated for many lanes).
std::string describe(const Boundary& boundary);

}  // namespace mimo_ext::core
