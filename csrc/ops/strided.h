#pragma once

// Walks over the elements of a strided tensor, or of a box of one, in contiguous runs. Host-side arithmetic only:
// offsets and strides are counted in elements, and nothing here touches data.

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>

namespace mimo_ext::ops {

using Dims = c10::SmallVector<int64_t, 5>;

/// Sizes and strides of a region and the offset of its first element. Has at least one dimension.
struct Strided {
  Dims sizes;
  Dims strides;
  int64_t offset = 0;

  int64_t numel() const {
    return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, [](int64_t a, int64_t b) { return a * b; });
  }
};

/// The same elements in the same order with as few dimensions as possible: neighbours that follow one another in memory
/// become one, so that a region without gaps is a single run.
inline Strided merge_dims(at::IntArrayRef sizes, at::IntArrayRef strides, int64_t offset) {
  Strided merged;
  merged.offset = offset;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 1) continue;
    if (!merged.sizes.empty() && merged.strides.back() == sizes[d] * strides[d]) {
      merged.sizes.back() *= sizes[d];
      merged.strides.back() = strides[d];
    } else {
      merged.sizes.push_back(sizes[d]);
      merged.strides.push_back(strides[d]);
    }
  }
  if (merged.sizes.empty()) {
    merged.sizes.push_back(1);
    merged.strides.push_back(1);
  }
  return merged;
}

/// Positions of the dimensions of `t` from the one with the largest stride to the one with the smallest.
inline c10::SmallVector<size_t, 5> dims_by_stride(const at::Tensor& t) {
  c10::SmallVector<size_t, 5> order(static_cast<size_t>(t.dim()));
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return t.strides()[a] > t.strides()[b]; });
  return order;
}

/// All elements of `t` in the order in which they lie in memory: a transposed dense tensor is a single run.
inline Strided in_memory_order(const at::Tensor& t) {
  Dims sizes;
  Dims strides;
  for (const size_t d : dims_by_stride(t)) {
    sizes.push_back(t.sizes()[d]);
    strides.push_back(t.strides()[d]);
  }
  return merge_dims(sizes, strides, 0);
}

/// Whether two indices of `t` may name the same memory (expanded tensors, overlapping windows). Errs on the side of
/// true: a stride has to step over everything that the smaller strides reach.
inline bool may_overlap_itself(const at::Tensor& t) {
  if (t.numel() < 2) return false;
  const auto order = dims_by_stride(t);
  int64_t reach = 0;  // largest offset that the dimensions seen so far reach
  for (auto d = order.rbegin(); d != order.rend(); ++d) {
    if (t.sizes()[*d] == 1) continue;
    if (t.strides()[*d] <= reach) return true;
    reach += (t.sizes()[*d] - 1) * t.strides()[*d];
  }
  return false;
}

/// The rows (runs along the last axis) of a region that is not empty, in row-major order.
class Rows {
 public:
  /// At row `row`.
  explicit Rows(const Strided& region, int64_t row = 0)
      : region_(region), index_(region.sizes.size() - 1, 0), offset_(region.offset) {
    for (size_t d = index_.size(); d-- > 0 && row > 0;) {
      index_[d] = row % region.sizes[d];
      row /= region.sizes[d];
      offset_ += index_[d] * region.strides[d];
    }
  }

  /// Of the row's first element.
  int64_t offset() const { return offset_; }

  void next() {
    for (size_t d = index_.size(); d-- > 0;) {
      offset_ += region_.strides[d];
      if (++index_[d] < region_.sizes[d]) break;
      offset_ -= index_[d] * region_.strides[d];
      index_[d] = 0;
    }
  }

 private:
  const Strided& region_;
  Dims index_;
  int64_t offset_;
};

/// Calls `run(offset, count)` for the elements [begin, end) of `region`, counted in row-major order: `count` elements,
/// the first at `offset`, each `region.strides.back()` after the one before.
template <typename Run>
void for_each_run(const Strided& region, int64_t begin, int64_t end, Run&& run) {
  if (begin >= end) return;
  const int64_t row = region.sizes.back();
  Rows rows(region, begin / row);
  int64_t first = begin % row;  // only the first run may start in the middle of a row
  while (begin < end) {
    const int64_t count = std::min(row - first, end - begin);
    run(rows.offset() + first * region.strides.back(), count);
    begin += count;
    first = 0;
    rows.next();
  }
}

/// Calls `run(offset, later)` for each row of a region that is not empty. later: the offset of the row that comes
/// `ahead` rows after it, or of the last one.
template <typename Run>
void for_each_row(const Strided& region, int64_t ahead, Run&& run) {
  const int64_t count = region.numel() / region.sizes.back();
  Rows rows(region);
  Rows later(region, std::min(ahead, count - 1));
  for (int64_t row = 0; row < count; ++row) {
    run(rows.offset(), later.offset());
    rows.next();
    if (row + ahead + 1 < count) later.next();
  }
}

}  // namespace mimo_ext::ops
