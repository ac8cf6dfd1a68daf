// The transfer plan: who sends which box of the boundary tensor to whom, for one microbatch in one direction.
//
// A plan is the intersection of two partitions of the same line of samples. Each overlap of a sender lane with a
// receiver lane is cut separately, once over the sender's ranks and once over the receiver's; every non-empty
// intersection of two such parts is one message. How receivers that are replicas of one another come by their copies is
// the path of the overlap: see core/paths.h. Fan-in, fan-out, unequal TP, ragged rows and hops between equal ranks need
// no cases of their own.
//
// Values only: a Plan is immutable, owns its memory and may be shared between threads. It needs no process group: the
// plan of any rank of any cluster can be computed anywhere.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/exchange.h"
#include "core/message.h"
#include "core/microbatch.h"
#include "core/paths.h"
#include "core/sides.h"

namespace mimo_ext::core {

enum class Direction : std::uint8_t { kForward, kBackward };

class Plan {
 public:
  /// `sides` are those of the bridge, whatever the direction.
  /// Throws std::invalid_argument for a microbatch or options that do not fit.
  Plan(std::shared_ptr<const Sides> sides, Microbatch microbatch, Direction direction, PlanOptions options = {});
  /// Where there is one plan only. Otherwise make the sides once: they hold every rank of both.
  Plan(Boundary source, Boundary destination, Microbatch microbatch, Direction direction, PlanOptions options = {});

  /// The same microbatch in the other direction. An involution.
  Plan reversed() const;

  const std::shared_ptr<const Sides>& sides() const { return sides_; }
  const Boundary& source() const { return sides_->source(); }
  const Boundary& destination() const { return sides_->destination(); }
  const Boundary& sender() const { return forward() ? source() : destination(); }
  const Boundary& receiver() const { return forward() ? destination() : source(); }
  const Microbatch& microbatch() const { return microbatch_; }
  /// The row shards of the destination, on the side that it is; null on the source's.
  const RowShards* sender_shards() const { return direction_ == Direction::kForward ? nullptr : row_shards(); }
  const RowShards* receiver_shards() const { return direction_ == Direction::kForward ? row_shards() : nullptr; }
  Direction direction() const { return direction_; }
  const PlanOptions& options() const { return options_; }

  /// All messages in which `rank` takes part. The cost grows with their number (and the size of the lanes met), not
  /// with the world.
  /// A rank on both sides may ask for one of its roles alone: as a sender it needs to know the rows of its own samples
  /// only.
  RankPlan for_rank(int rank, bool as_sender = true, bool as_receiver = true) const;
  /// Shape of the tensor that a rank holds as a sender or as a receiver. Needs the row counts of that rank's lane.
  /// Throws std::out_of_range for another lane or member.
  std::array<std::int64_t, kMaxDims> sender_shape(int lane, int member) const;
  std::array<std::int64_t, kMaxDims> receiver_shape(int lane, int member) const;

  /// Lanes of the other side that can meet this lane, whatever the number of samples.
  static std::pair<int, int> lanes_met(int lane, int lanes, int other_lanes) {
    return core::lanes_met(lane, lanes, other_lanes);
  }

  /// What was chosen for the overlaps whose row counts are known here.
  struct Paths {
    std::vector<Path> taken;  ///< each once, in the order of kPaths
    std::int64_t bytes = 0;   ///< of the largest overlap
    PathTimes times;          ///< of the largest overlap
  };
  Paths paths() const;

  /// The same on every machine for equal plans. The cost does not grow with the world.
  std::uint64_t hash() const;
  /// A table for people: one line per message of every rank, at most `max_lines` of them.
  std::string to_string(int max_lines) const;

  bool operator==(const Plan& other) const;

 private:
  bool forward() const { return direction_ == Direction::kForward; }
  /// Messages of the rank at (lane, member) of the sender and of the receiver; lane -1: not there.
  RankPlan for_places(std::pair<int, int> as_sender, std::pair<int, int> as_receiver) const;
  /// Calls visit(Exchange) for every overlap of a sender lane, or of a receiver lane, in order of the other lanes.
  template <typename Visit>
  void each_exchange(int lane, bool sending, const Visit& visit) const;

  const RowShards* row_shards() const { return microbatch_.row_shards.get(); }

  std::shared_ptr<const Sides> sides_;
  Microbatch microbatch_;
  Direction direction_;
  PlanOptions options_;
};

/// "tp=2 cp=1, 3 lanes: [0 1] [2 3] [4 5]" (abbreviated for many lanes).
std::string describe(const Boundary& boundary);

}  // namespace mimo_ext::core
