// The properties of one bridge and one microbatch, checked against a reference that shares no code with the plan.
#pragma once

#include <cstdint>
#include <string>

#include "setting.h"

namespace mimo_ext::properties {

struct Outcome {
  bool refused = false;      ///< 2-D shards of ragged rows that a rank cannot know: an error by design
  std::uint64_t hash = 0;    ///< of the plans of both directions
  std::size_t messages = 0;  ///< that were simulated
  std::size_t transfers = 0;
};

/// Throws std::runtime_error naming the first property that does not hold:
///
/// * shapes: what each rank is said to send and to receive is what the reference says;
/// * agreement: each two ranks, each of which knows no more rows than it does in a run, list the same messages between
///   them in the same order, and each stands for the same elements of the global tensor;
/// * coverage: every element of a receiver is written once, and every contribution to it added once, or it is copied
///   once from a replica;
/// * balance and economy: replicas carry equal parts, and no element crosses between lanes more often than it must;
/// * reversal: an involution, and equal plans have equal hashes;
/// * no deadlock and right values: all ranks carry it out in the simulator (see there), forward and backward, and get
///   what the reference says;
/// * adjointness: <Ax, y> == <x, A'y>.
Outcome check(const Setting& setting);

}  // namespace mimo_ext::properties
