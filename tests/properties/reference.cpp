#include "reference.h"

#include <numeric>

namespace mimo_ext::properties {

namespace {

using Numbers = std::vector<std::int64_t>;

Numbers part(const Numbers& all, std::int64_t index, std::int64_t parts) {
  const auto count = static_cast<std::int64_t>(all.size());
  return {all.begin() + count * index / parts, all.begin() + count * (index + 1) / parts};
}

Numbers counted(std::int64_t first, std::int64_t last) {
  Numbers numbers(static_cast<std::size_t>(last - first));
  std::iota(numbers.begin(), numbers.end(), first);
  return numbers;
}

/// Of the sequence `all`, what a member holds by the placement of its side.
Numbers placed(const Side& side, const Numbers& all, std::int64_t member) {
  const std::int64_t cp = member / side.tp;
  Numbers mine = all;
  if (side.placement == 1) mine = part(all, cp, side.cp);
  if (side.placement == 2) {
    mine = part(all, cp, 2 * side.cp);
    const Numbers mirrored = part(all, 2 * side.cp - 1 - cp, 2 * side.cp);
    mine.insert(mine.end(), mirrored.begin(), mirrored.end());
  }
  return side.sp != 0 ? part(mine, member % side.tp, side.tp) : mine;
}

/// Positions of the sequence axis that a member holds: rows of the global 2-D tensor, or places in a sequence.
Numbers positions(const Setting& setting, bool destination, std::int64_t lane, std::int64_t member) {
  const Side& side = destination ? setting.dst : setting.src;
  if (setting.is_3d()) return placed(side, counted(0, setting.seq), member);
  const std::int64_t begin = setting.rows_of(0, setting.samples * lane / side.lanes);
  const std::int64_t end = setting.rows_of(0, setting.samples * (lane + 1) / side.lanes);
  if (!destination || setting.shards == 0) return placed(side, counted(begin, end), member);
  const std::int64_t shard = setting.shards == 1 ? member / side.tp : member;
  const std::vector<int> of = setting.shard_of_rows();
  Numbers mine;
  for (std::int64_t row = begin; row < end; ++row) {
    if (of[static_cast<std::size_t>(row)] == shard) mine.push_back(row);
  }
  return mine;
}

}  // namespace

std::int64_t num_elements(const Setting& setting) {
  return setting.hidden * (setting.is_3d() ? setting.samples * setting.seq : setting.rows_of(0, setting.samples));
}

Numbers shape_of(const Setting& setting, bool destination, std::int64_t lane, std::int64_t member) {
  const Side& side = destination ? setting.dst : setting.src;
  const auto extent = static_cast<std::int64_t>(positions(setting, destination, lane, member).size());
  if (!setting.is_3d()) return {extent, setting.hidden};
  Numbers shape(3, setting.hidden);
  shape[static_cast<std::size_t>(setting.batch_dim)] =
      setting.samples * (lane + 1) / side.lanes - setting.samples * lane / side.lanes;
  shape[static_cast<std::size_t>(setting.seq_dim)] = extent;
  return shape;
}

Numbers elements_of(const Setting& setting, bool destination, std::int64_t lane, std::int64_t member) {
  const Side& side = destination ? setting.dst : setting.src;
  const Numbers held = positions(setting, destination, lane, member);
  Numbers elements;
  if (!setting.is_3d()) {
    for (std::int64_t row : held) {
      for (std::int64_t column = 0; column < setting.hidden; ++column) {
        elements.push_back(row * setting.hidden + column);
      }
    }
    return elements;
  }
  const std::int64_t first = setting.samples * lane / side.lanes;
  const Numbers shape = shape_of(setting, destination, lane, member);
  const std::int64_t hidden_dim = 3 - setting.batch_dim - setting.seq_dim;
  Numbers at(3);
  for (at[0] = 0; at[0] < shape[0]; ++at[0]) {
    for (at[1] = 0; at[1] < shape[1]; ++at[1]) {
      for (at[2] = 0; at[2] < shape[2]; ++at[2]) {
        const std::int64_t sample = first + at[static_cast<std::size_t>(setting.batch_dim)];
        const std::int64_t position = held[static_cast<std::size_t>(at[static_cast<std::size_t>(setting.seq_dim)])];
        const std::int64_t column = at[static_cast<std::size_t>(hidden_dim)];
        elements.push_back((sample * setting.seq + position) * setting.hidden + column);
      }
    }
  }
  return elements;
}

std::int64_t num_gradients(const Setting& setting) {
  return setting.dst.placement == 0 && setting.shards == 0 ? setting.dst.cp : 1;
}

std::int64_t gradient_of(const Setting& setting, std::int64_t member) {
  return num_gradients(setting) > 1 ? member / setting.dst.tp : 0;
}

}  // namespace mimo_ext::properties
