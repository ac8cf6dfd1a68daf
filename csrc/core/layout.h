// Which rank holds which part of a module's boundary tensor.
//
// Values only: everything here is immutable after construction, owns its memory and may be shared between threads
// freely.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace mimo_ext::core {

/// How the context-parallel ranks of a lane hold the sequence axis.
enum class CpPlacement : std::uint8_t {
  kReplicated,  ///< every cp rank holds every row
  kContiguous,  ///< cp rank c holds the c-th contiguous part
  kZigzag,      ///< of 2 * cp chunks, cp rank c holds chunks c and 2 * cp - 1 - c (Megatron's causal load balancing)
};

const char* to_string(CpPlacement placement);
/// Inverse of to_string; throws std::invalid_argument for an unknown name.
CpPlacement parse_cp_placement(const std::string& name);

/// A contiguous range of the sequence axis: rows [start, start + length) of the lane's tensor are rows
/// [local_start, local_start + length) of the tensor that the rank holds.
struct Run {
  std::int64_t start = 0;
  std::int64_t length = 0;
  std::int64_t local_start = 0;

  bool operator==(const Run&) const = default;
};

/// The ranks of one pipeline stage of a module, as the bridge sees them: lanes of tp * cp ranks. A lane shares the same
/// samples; there is one lane per data-parallel coordinate. Member m of a lane has tp coordinate m % tp and cp
/// coordinate m / tp.
struct Boundary {
  std::string module;
  int tp = 1;
  int cp = 1;
  CpPlacement cp_placement = CpPlacement::kReplicated;
  bool sequence_parallel = false;
  std::vector<std::vector<int>> lanes;

  int num_lanes() const { return static_cast<int>(lanes.size()); }
  int lane_size() const { return tp * cp; }
  bool sharded() const { return num_shards() > 1; }
  /// Number of different parts in which the members of a lane hold the sequence axis (1: all are replicas).
  int num_shards() const;
  /// Of 0 <= member < lane_size().
  int shard_of(int member) const;
  /// The replicas of a shard, by member index, ascending.
  std::vector<int> members_of_shard(int shard) const;
  /// The rows of a sequence axis of `extent` rows that the replicas of `shard` hold, in local order. Throws
  /// std::out_of_range for another shard or extent.
  std::vector<Run> runs_of_shard(int shard, std::int64_t extent) const;
  /// (lane, member) of a global rank; lane is -1 where the rank is not here.
  std::pair<int, int> find(int rank) const;

  bool operator==(const Boundary&) const = default;
};

/// A module's ranks factorised by named dims, the first dim varying fastest (as in Megatron's HyperCommGrid).
///
/// Dims: tp, cp, dp, pp in any order, any of them absent (size 1); gtp_remat counts as data parallel. Other names are
/// accepted with size 1 only.
class Layout {
 public:
  /// `ranks` are global ranks in grid order; their number must be the product of the dims.
  /// Throws std::invalid_argument naming the module, what was expected and what was given.
  Layout(std::vector<int> ranks, std::vector<std::pair<std::string, int>> dims, CpPlacement cp_placement,
         bool sequence_parallel, std::string name);

  const std::vector<int>& ranks() const { return ranks_; }
  const std::vector<std::pair<std::string, int>>& dims() const { return dims_; }
  const std::string& name() const { return name_; }
  CpPlacement cp_placement() const { return cp_placement_; }
  bool sequence_parallel() const { return sequence_parallel_; }
  /// Size of a dim; 1 where the layout lacks it.
  int size_of(const std::string& dim) const;

  /// The lanes of pipeline stage `stage`; negative counts from the last stage. Throws std::out_of_range.
  Boundary boundary(int stage) const;

  bool operator==(const Layout&) const = default;

 private:
  std::vector<int> ranks_;
  std::vector<std::pair<std::string, int>> dims_;
  CpPlacement cp_placement_;
  bool sequence_parallel_;
  std::string name_;
};

}  // namespace mimo_ext::core
