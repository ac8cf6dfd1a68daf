// The tensor that crosses a bridge: the global microbatch, and boxes of it.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "core/row_shards.h"

namespace mimo_ext::core {

inline constexpr int kMaxDims = 3;
inline constexpr std::int64_t kUnknownRows = -1;

/// A rectangular range of a tensor of two or three axes; a 2-D box has start 0 and size 1 on axis 2.
struct Box {
  std::array<std::int64_t, kMaxDims> start{};
  std::array<std::int64_t, kMaxDims> size{1, 1, 1};

  /// Elements. Where an axis is empty the product of the others may be anything.
  std::int64_t volume() const { return size[0] == 0 || size[1] == 0 || size[2] == 0 ? 0 : size[0] * size[1] * size[2]; }
  bool operator==(const Box&) const = default;
};

/// The intersection of two boxes; volume 0 where they do not meet.
Box intersect(const Box& a, const Box& b);

/// Cut `box` into `parts` boxes that differ by at most one unit along one axis. Outer axes are cut first, as far as
/// they yield equal (or, where there are many units, nearly equal) pieces, so that a part is contiguous where possible:
/// two samples over four parts are half a sample each.
std::vector<Box> cut(const Box& box, int parts);

/// The global microbatch, all lanes together, as far as it is known here.
///
/// 3-D tensors: samples lie along batch_dim, one index each; shape holds the extents of the other two axes
/// (shape[batch_dim] is ignored). 2-D tensors [rows, h]: batch_dim == seq_dim == 0, sample s has rows[s] rows
/// (kUnknownRows where this process does not know), or rows_per_sample each where `rows` is empty.
struct Microbatch {
  int ndim = 2;
  int batch_dim = 0;
  int seq_dim = 0;
  std::int64_t samples = 0;
  std::array<std::int64_t, kMaxDims> shape{1, 1, 1};
  std::int64_t rows_per_sample = 1;
  std::vector<std::int64_t> rows;
  int element_size = 1;  ///< bytes
  /// 2-D tensors: which rows each member of a destination lane holds, whatever the placement of its boundary says.
  /// Null: the boundary decides. Row counts that it knows need not be in `rows`.
  std::shared_ptr<const RowShards> row_shards;
  /// Source lanes that do not tell the rows that are in `rows`, because their own samples are equal: other lanes' are
  /// not. Such a lane sends by what it knows, as if all rows were even. Ascending; empty unless ragged.
  std::vector<int> even_lanes{};

  bool ragged() const { return !rows.empty(); }
  /// Does this lane of the source take all samples to have equally many rows?
  bool even_for(int source_lane) const {
    return !ragged() || std::binary_search(even_lanes.begin(), even_lanes.end(), source_lane);
  }
  /// First sample of lane `lane` of `lanes`: floor(lane * samples / lanes).
  std::int64_t lane_begin(int lane, int lanes) const { return samples * lane / lanes; }
  /// Extent of samples [first, last) along the batch axis. Throws std::invalid_argument where it needs an unknown row
  /// count.
  std::int64_t extent(std::int64_t first, std::int64_t last) const;

  /// Gives what does not count one value: microbatches of the same messages are equal. Row counts are taken from
  /// row_shards where they are not given.
  void normalize();
  /// Throws std::invalid_argument for axes, extents or row counts that do not fit together, or that are too large.
  void check() const;
  /// Of everything, the same on every machine: one pass over the row counts.
  std::uint64_t hash() const;

  bool operator==(const Microbatch& other) const;

 private:
  void check_volume() const;
};

/// The extent of samples [first, last) along the batch axis; none where it needs an unknown row count.
std::optional<std::int64_t> extent_if_known(const Microbatch& microbatch, std::int64_t first, std::int64_t last);

}  // namespace mimo_ext::core
