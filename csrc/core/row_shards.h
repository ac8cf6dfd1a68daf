// How the rows of a 2-D tensor are dealt to the members of a destination lane, sample by sample.
//
// A consumer that splits its sequence over ranks uses on each of them the rows at that rank's positions only. Where
// those lie depends on the data (on `input_ids`), so both sides compute it from the same data, each for the samples
// that it has.
#pragma once

#include <cstdint>
#include <vector>

#include "core/layout.h"

namespace mimo_ext::core {

/// `rows` consecutive rows of a sample that go to one shard.
struct Segment {
  int shard = 0;
  std::int64_t rows = 0;

  bool operator==(const Segment&) const = default;
};

/// Immutable. Shards are numbered as the parts of a Boundary: with num_shards == tp * cp shard m belongs to member m of
/// the lane; with num_shards == cp shard c belongs to the tp members of cp coordinate c, which are replicas.
///
/// A member holds the rows of its shard ordered by sample, then by row.
class RowShards {
 public:
  /// `segments[i]` are those of sample `first_sample + i`, in the order of its rows; no other sample is known here.
  /// Empty segments and the seams between segments of one shard do not count. Throws std::invalid_argument for shards,
  /// rows or samples out of range.
  RowShards(const std::vector<std::vector<Segment>>& segments, int num_shards, std::int64_t num_samples,
            std::int64_t first_sample = 0);

  int num_shards() const { return num_shards_; }
  /// Of the global microbatch.
  std::int64_t num_samples() const { return num_samples_; }
  /// Samples [first_known, last_known) have segments here.
  std::int64_t first_known() const { return first_; }
  std::int64_t last_known() const { return first_ + static_cast<std::int64_t>(offsets_.size()) - 1; }
  bool knows(std::int64_t first, std::int64_t last) const;

  /// Rows of a sample; kUnknownRows where it is not known here.
  std::int64_t rows(std::int64_t sample) const;
  /// Rows of a shard in samples [first, last). This and what follows throw std::invalid_argument for samples that are
  /// not known here.
  std::int64_t rows_of_shard(int shard, std::int64_t first, std::int64_t last) const;
  /// The segments of samples [first, last) as one line; neighbours of one shard are one.
  std::vector<Segment> segments(std::int64_t first, std::int64_t last) const;
  /// FNV-1a over the segments of samples [first, last), the same on every machine: what two processes compare that
  /// share these samples.
  std::uint64_t hash(std::int64_t first, std::int64_t last) const;

  /// The shard of a member of a lane. Throws std::invalid_argument where the number of shards is neither tp * cp nor
  /// cp.
  int shard_of(const Boundary& boundary, int member) const;
  /// The replicas of a shard, by member index, ascending.
  std::vector<int> members_of_shard(const Boundary& boundary, int shard) const;

  bool operator==(const RowShards& other) const;

 private:
  void require(std::int64_t first, std::int64_t last) const;
  std::size_t offset(std::int64_t sample) const { return offsets_[static_cast<std::size_t>(sample - first_)]; }

  int num_shards_;
  std::int64_t num_samples_;
  std::int64_t first_;
  std::vector<Segment> segments_;     ///< of all known samples, one after the other
  std::vector<std::size_t> offsets_;  ///< of each known sample's first segment, and the end
  std::uint64_t hash_;                ///< of everything
};

}  // namespace mimo_ext::core
