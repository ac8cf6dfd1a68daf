#include "core/row_shards.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/hash.h"
#include "core/limits.h"
#include "core/microbatch.h"

namespace mimo_ext::core {

RowShards::RowShards(const std::vector<std::vector<Segment>>& segments, int num_shards, std::int64_t num_samples,
                     std::int64_t first_sample)
    : num_shards_(num_shards), num_samples_(num_samples), first_(first_sample), offsets_{0} {
  const auto bad = [](const std::string& what) { throw std::invalid_argument("row shards: " + what); };
  const auto known = static_cast<std::int64_t>(segments.size());
  if (num_shards < 1) bad("expected a positive number of shards, got " + std::to_string(num_shards));
  if (first_sample < 0 || first_sample > kMaxRowCounts || num_samples < 0 || num_samples > kMaxRowCounts ||
      known > kMaxRowCounts) {
    bad("expected at most " + std::to_string(kMaxRowCounts) + " samples, got " + std::to_string(num_samples) +
        ", of which " + std::to_string(known) + " from sample " + std::to_string(first_sample) + " on");
  }
  if (first_sample > num_samples - known) {
    bad("expected samples of [0, " + std::to_string(num_samples) + "), got [" + std::to_string(first_sample) + ", " +
        std::to_string(first_sample + known) + ")");
  }
  offsets_.reserve(segments.size() + 1);
  std::int64_t total = 0;
  for (std::size_t index = 0; index < segments.size(); ++index) {
    for (const Segment& segment : segments[index]) {
      if (segment.shard < 0 || segment.shard >= num_shards || segment.rows < 0) {
        bad("sample " + std::to_string(first_sample + static_cast<std::int64_t>(index)) + ": expected shards below " +
            std::to_string(num_shards) + " and rows of 0 or more, got " + std::to_string(segment.rows) +
            " rows of shard " + std::to_string(segment.shard));
      }
      if (segment.rows == 0) continue;
      total = saturating_add(total, segment.rows);
      if (total > kMaxElements) {
        bad("expected at most " + std::to_string(kMaxElements) + " rows, got more with sample " +
            std::to_string(first_sample + static_cast<std::int64_t>(index)));
      }
      if (segments_.size() > offsets_.back() && segments_.back().shard == segment.shard) {
        segments_.back().rows += segment.rows;
      } else {
        segments_.push_back(segment);
      }
    }
    offsets_.push_back(segments_.size());
  }
  Fnv fnv;
  fnv.add(num_samples_);
  fnv.add(first_);
  fnv.add(static_cast<std::int64_t>(hash(first_known(), last_known())));
  hash_ = fnv.value();
}

bool RowShards::knows(std::int64_t first, std::int64_t last) const {
  return first >= last || (first >= first_known() && last <= last_known());
}

void RowShards::require(std::int64_t first, std::int64_t last) const {
  if (knows(first, last)) return;
  throw std::invalid_argument("row shards of samples [" + std::to_string(first) + ", " + std::to_string(last) +
                              ") are needed, those of [" + std::to_string(first_known()) + ", " +
                              std::to_string(last_known()) + ") are known here");
}

std::int64_t RowShards::rows(std::int64_t sample) const {
  if (sample < first_known() || sample >= last_known()) return kUnknownRows;
  std::int64_t total = 0;
  for (std::size_t index = offset(sample); index < offset(sample + 1); ++index) total += segments_[index].rows;
  return total;
}

std::int64_t RowShards::rows_of_shard(int shard, std::int64_t first, std::int64_t last) const {
  require(first, last);
  if (first >= last) return 0;
  std::int64_t total = 0;
  for (std::size_t index = offset(first); index < offset(last); ++index) {
    if (segments_[index].shard == shard) total += segments_[index].rows;
  }
  return total;
}

std::vector<Segment> RowShards::segments(std::int64_t first, std::int64_t last) const {
  require(first, last);
  std::vector<Segment> line;
  if (first >= last) return line;
  for (std::size_t index = offset(first); index < offset(last); ++index) {
    if (!line.empty() && line.back().shard == segments_[index].shard) {
      line.back().rows += segments_[index].rows;
    } else {
      line.push_back(segments_[index]);
    }
  }
  return line;
}

std::uint64_t RowShards::hash(std::int64_t first, std::int64_t last) const {
  require(first, last);
  Fnv fnv;
  fnv.add(num_shards_);
  fnv.add(first < last ? last - first : 0);
  for (std::int64_t sample = first; sample < last; ++sample) {
    fnv.add(static_cast<std::int64_t>(offset(sample + 1) - offset(sample)));
    for (std::size_t index = offset(sample); index < offset(sample + 1); ++index) {
      fnv.add(segments_[index].shard);
      fnv.add(segments_[index].rows);
    }
  }
  return fnv.value();
}

int RowShards::shard_of(const Boundary& boundary, int member) const {
  if (num_shards_ == boundary.lane_size()) return member;
  if (num_shards_ == boundary.cp) return member / boundary.tp;
  throw std::invalid_argument("module '" + boundary.module + "' (tp=" + std::to_string(boundary.tp) +
                              ", cp=" + std::to_string(boundary.cp) +
                              "): expected row shards for its cp ranks or for its tp * cp ranks, got " +
                              std::to_string(num_shards_) + " shards");
}

std::vector<int> RowShards::members_of_shard(const Boundary& boundary, int shard) const {
  std::vector<int> members;
  for (int member = 0; member < boundary.lane_size(); ++member) {
    if (shard_of(boundary, member) == shard) members.push_back(member);
  }
  return members;
}

bool RowShards::operator==(const RowShards& other) const {
  return this == &other ||
         (hash_ == other.hash_ && num_shards_ == other.num_shards_ && num_samples_ == other.num_samples_ &&
          first_ == other.first_ && offsets_ == other.offsets_ && segments_ == other.segments_);
}

}  // namespace mimo_ext::core
