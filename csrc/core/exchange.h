// All messages between two lanes: one overlap of a plan, on the path that is chosen for it.
//
// Both lanes hold the overlap in parts, each on its replicas. What a receiver has itself, as a sender, it keeps; the
// rest of each part is delivered to the replicas that lack it, in pieces that depend on the path. A message is the
// intersection of a receiver's piece with what a sender holds.
#pragma once

#include <vector>

#include "core/message.h"
#include "core/paths.h"
#include "core/pieces.h"
#include "core/sides.h"

namespace mimo_ext::core {

/// Lanes of the other side that can meet lane `lane`, whatever the number of samples.
std::pair<int, int> lanes_met(int lane, int lanes, int other_lanes);

class Exchange {
 public:
  /// One direction of an overlap of `microbatch`. All references outlive the exchange. Throws std::invalid_argument
  /// where a row count is needed that is not known.
  Exchange(const Sides& sides, const Microbatch& microbatch, const Overlap& overlap, bool forward,
           const PlanOptions& options);

  Path path() const { return path_; }
  const PathLoad& load() const { return load_; }
  const PathTimes& times() const { return times_; }

  /// Appends what a member of the sender lane sends, or what a member of the receiver lane receives.
  void add_sends(int member, std::vector<Message>& out) const { add_transfers(member, kAny, out); }
  void add_receives(int member, std::vector<Message>& out) const { add_transfers(kAny, member, out); }
  /// Appends what a member of the receiver lane forwards to its replicas, and what they forward to it.
  void add_copies(int member, std::vector<Message>& sends, std::vector<Message>& receives) const;

 private:
  static constexpr int kAny = -1;
  static constexpr int kNobody = -1;

  /// What members of the sender lane can send.
  struct Held {
    Replicas replicas;
    std::vector<Placed> whole;               ///< by any of them
    std::vector<std::vector<Placed>> parts;  ///< by each of them where they share the work equally
  };
  /// What one receiver is sent.
  struct Piece {
    int member = 0;
    int target = kNobody;  ///< whose other members it is forwarded to
    int chunk = 0;
    Placed placed;
  };

  void find_owners();
  PathLoad load_of(const Replicas& received) const;
  void keep_own(std::vector<Replicas> received, const Spread& spread);
  void deliver(int target, const Spread& spread);
  void add_pieces(int member, int target, int chunk, const std::vector<Placed>& placed);
  /// Which of `replicas` replicas take what is pipelined from this sender lane: the first, and their number.
  std::pair<int, int> group_of(int replicas) const;
  int leader_of(const std::vector<int>& members) const;
  /// The only sender of what a receiver is sent by these replicas; kNobody where they share the work.
  int sender_for(int receiver, const std::vector<int>& senders) const;
  void add_transfers(int sender, int receiver, std::vector<Message>& out) const;

  const Boundary& from_;
  const Boundary& to_;
  const Microbatch& microbatch_;
  const Overlap overlap_;
  const PlanOptions& options_;
  const bool row_sharded_;
  const bool even_rows_;  ///< as the source's lane sees it: what both ends know
  std::vector<Held> held_;
  std::vector<int> own_;  ///< by receiver: the member of the sender lane that is the same rank, or kNobody
  bool any_own_ = false;
  PathLoad load_;
  PathTimes times_;
  Path path_ = Path::kPipelined;
  std::vector<Replicas> targets_;  ///< members that are still to be served, and the part that they lack
  std::vector<Piece> pieces_;      ///< in ascending order of chunks
};

}  // namespace mimo_ext::core
