#include "core/microbatch.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

#include "core/hash.h"
#include "core/limits.h"

namespace mimo_ext::core {

Box intersect(const Box& a, const Box& b) {
  Box both;
  for (std::size_t axis = 0; axis < kMaxDims; ++axis) {
    const std::int64_t from = std::max(a.start[axis], b.start[axis]);
    const std::int64_t to = std::min(a.start[axis] + a.size[axis], b.start[axis] + b.size[axis]);
    both.start[axis] = from;
    both.size[axis] = std::max<std::int64_t>(0, to - from);
  }
  return both;
}

std::vector<Box> cut(const Box& box, int parts) {
  constexpr std::int64_t kEvenEnough = 8;  // parts of at least this many units differ by at most one in eight
  std::vector<Box> boxes{box};
  const auto split = [&boxes](std::size_t axis, int pieces) {
    std::vector<Box> finer;
    finer.reserve(boxes.size() * static_cast<std::size_t>(pieces));
    for (const Box& whole : boxes) {
      for (int piece = 0; piece < pieces; ++piece) {
        const std::int64_t from = share(whole.size[axis], piece, pieces);
        Box& part = finer.emplace_back(whole);
        part.start[axis] += from;
        part.size[axis] = share(whole.size[axis], piece + 1, pieces) - from;
      }
    }
    boxes = std::move(finer);
  };
  std::int64_t left = parts;
  for (std::size_t axis = 0; axis < kMaxDims && left > 1; ++axis) {
    const std::int64_t size = box.size[axis];
    const std::int64_t pieces = size >= kEvenEnough * left ? left : std::gcd(size, left);
    split(axis, static_cast<int>(pieces));
    left /= pieces;
  }
  if (left > 1) {
    const auto& size = boxes.front().size;
    split(static_cast<std::size_t>(std::max_element(size.begin(), size.end()) - size.begin()), static_cast<int>(left));
  }
  return boxes;
}

std::int64_t Microbatch::extent(std::int64_t first, std::int64_t last) const {
  if (ndim == 3) return last - first;
  if (!ragged()) return (last - first) * rows_per_sample;
  std::int64_t total = 0;
  for (std::int64_t sample = first; sample < last; ++sample) {
    const std::int64_t count = rows[static_cast<std::size_t>(sample)];
    if (count == kUnknownRows) {
      throw std::invalid_argument("the number of rows of sample " + std::to_string(sample) + " is not known here");
    }
    total += count;
  }
  return total;
}

void Microbatch::normalize() {
  if (batch_dim >= 0 && batch_dim < kMaxDims) shape[static_cast<std::size_t>(batch_dim)] = 1;
  if (row_shards != nullptr && ndim == 2 && row_shards->num_samples() == samples) {
    if (!ragged()) rows.assign(static_cast<std::size_t>(samples), kUnknownRows);
    for (std::size_t sample = 0; sample < rows.size(); ++sample) {
      if (rows[sample] == kUnknownRows) rows[sample] = row_shards->rows(static_cast<std::int64_t>(sample));
    }
  }
  if (ragged() || ndim == 3) rows_per_sample = 1;
  if (!ragged()) even_lanes.clear();
}

std::uint64_t Microbatch::hash() const {
  Fnv fnv;
  for (std::int64_t value : {std::int64_t{ndim}, std::int64_t{batch_dim}, std::int64_t{seq_dim}, samples}) {
    fnv.add(value);
  }
  for (std::int64_t extent : shape) fnv.add(extent);
  fnv.add(rows_per_sample);
  fnv.add(static_cast<std::int64_t>(rows.size()));
  for (std::int64_t count : rows) fnv.add(count);
  for (int lane : even_lanes) fnv.add(lane);
  fnv.add(element_size);
  if (row_shards != nullptr) {
    fnv.add(row_shards->first_known());
    fnv.add(static_cast<std::int64_t>(row_shards->hash(row_shards->first_known(), row_shards->last_known())));
  }
  return fnv.value();
}

bool Microbatch::operator==(const Microbatch& other) const {
  const bool equal_shards =
      row_shards == other.row_shards || (row_shards && other.row_shards && *row_shards == *other.row_shards);
  return equal_shards && ndim == other.ndim && batch_dim == other.batch_dim && seq_dim == other.seq_dim &&
         samples == other.samples && shape == other.shape && rows_per_sample == other.rows_per_sample &&
         rows == other.rows && even_lanes == other.even_lanes && element_size == other.element_size;
}

void Microbatch::check() const {
  const auto bad = [](const std::string& what) { throw std::invalid_argument("microbatch: " + what); };
  if (ndim != 2 && ndim != 3) bad("expected 2 or 3 axes, got " + std::to_string(ndim));
  if (samples < 0) bad("expected samples >= 0, got " + std::to_string(samples));
  if (samples > kMaxSamples) {
    bad("expected at most " + std::to_string(kMaxSamples) + " samples, got " + std::to_string(samples));
  }
  if (element_size < 1 || element_size > kMaxElementSize) {
    bad("expected elements of 1.." + std::to_string(kMaxElementSize) + " bytes, got " + std::to_string(element_size));
  }
  for (int axis : {batch_dim, seq_dim}) {
    if (axis < 0 || axis >= ndim) bad("axis " + std::to_string(axis) + " of a tensor of " + std::to_string(ndim));
  }
  if (ndim == 2 && (batch_dim != 0 || seq_dim != 0)) bad("2-D tensors are [rows, h]: batch_dim and seq_dim must be 0");
  if (ndim == 3 && batch_dim == seq_dim) bad("batch_dim and seq_dim are both " + std::to_string(seq_dim));
  if (ndim == 2 && shape[2] != 1) bad("axis 2 of a 2-D tensor must have extent 1");
  for (int axis = 0; axis < ndim; ++axis) {
    const std::int64_t extent = shape[static_cast<std::size_t>(axis)];
    if (axis != batch_dim && extent < 0)
      bad("extent of axis " + std::to_string(axis) + " is " + std::to_string(extent));
  }
  if (ragged()) {
    if (ndim != 2) bad("row counts are for 2-D tensors, got " + std::to_string(ndim) + " axes");
    if (static_cast<std::int64_t>(rows.size()) != samples) {
      bad("expected " + std::to_string(samples) + " row counts, got " + std::to_string(rows.size()));
    }
    if (samples > kMaxRowCounts) {
      bad("expected row counts of at most " + std::to_string(kMaxRowCounts) + " samples, got " +
          std::to_string(samples));
    }
    for (std::int64_t count : rows) {
      if (count < kUnknownRows) bad("a sample has " + std::to_string(count) + " rows");
    }
    if (!std::is_sorted(even_lanes.begin(), even_lanes.end())) bad("even_lanes are not in ascending order");
  } else if (rows_per_sample < 0) {
    bad("rows_per_sample is " + std::to_string(rows_per_sample));
  }
  check_volume();
  if (row_shards != nullptr) {
    if (ndim != 2) bad("row shards are for 2-D tensors, got " + std::to_string(ndim) + " axes");
    if (row_shards->num_samples() != samples) {
      bad("expected row shards of " + std::to_string(samples) + " samples, got " +
          std::to_string(row_shards->num_samples()));
    }
    for (std::int64_t sample = row_shards->first_known(); sample < row_shards->last_known(); ++sample) {
      const std::int64_t count = extent(sample, sample + 1);
      if (count != row_shards->rows(sample)) {
        bad("sample " + std::to_string(sample) + " has " + std::to_string(count) + " rows, and row shards of " +
            std::to_string(row_shards->rows(sample)));
      }
    }
  }
}

void Microbatch::check_volume() const {
  std::int64_t along_batch = samples;
  if (ragged()) {
    along_batch = 0;
    for (std::int64_t count : rows) along_batch = saturating_add(along_batch, std::max<std::int64_t>(0, count));
  } else if (ndim == 2) {
    along_batch = saturating_mul(samples, rows_per_sample);
  }
  std::int64_t volume = along_batch;
  std::int64_t longest = along_batch;
  std::string text;
  for (int axis = 0; axis < ndim; ++axis) {
    const std::int64_t extent = axis == batch_dim ? along_batch : shape[static_cast<std::size_t>(axis)];
    text += (axis > 0 ? ", " : "") + std::to_string(extent);
    if (axis != batch_dim) volume = saturating_mul(volume, extent);
    longest = std::max(longest, extent);
  }
  // Where one axis is empty the others are still added up and cut.
  if (volume <= kMaxElements && longest <= kMaxElements) return;
  throw std::invalid_argument("microbatch: expected at most " + std::to_string(kMaxElements) +
                              " elements in all lanes together, got [" + text + "]");
}

std::optional<std::int64_t> extent_if_known(const Microbatch& microbatch, std::int64_t first, std::int64_t last) {
  if (microbatch.ragged()) {
    for (std::int64_t sample = first; sample < last; ++sample) {
      if (microbatch.rows[static_cast<std::size_t>(sample)] == kUnknownRows) return std::nullopt;
    }
  }
  return microbatch.extent(first, last);
}

}  // namespace mimo_ext::core
