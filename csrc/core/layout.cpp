#include "core/layout.h"

#include <algorithm>
#include <stdexcept>
#include <unordered_set>

#include "core/limits.h"

namespace mimo_ext::core {

namespace {

std::string quoted(const std::string& module) {
  return module.empty() ? "layout" : "layout of module '" + module + "'";
}

bool is_data_parallel(const std::string& dim) {
  return dim == "dp" || dim == "gtp_remat";
}

bool is_known(const std::string& dim) {
  return dim == "tp" || dim == "cp" || dim == "pp" || is_data_parallel(dim);
}

/// Part `index` of `parts` nearly equal contiguous parts of [0, extent).
std::pair<std::int64_t, std::int64_t> part(std::int64_t extent, std::int64_t index, std::int64_t parts) {
  return {share(extent, index, parts), share(extent, index + 1, parts)};
}

}  // namespace

const char* to_string(CpPlacement placement) {
  switch (placement) {
    case CpPlacement::kContiguous:
      return "contiguous";
    case CpPlacement::kZigzag:
      return "zigzag";
    case CpPlacement::kReplicated:
      break;
  }
  return "replicated";
}

CpPlacement parse_cp_placement(const std::string& name) {
  for (auto placement : {CpPlacement::kReplicated, CpPlacement::kContiguous, CpPlacement::kZigzag}) {
    if (name == to_string(placement)) return placement;
  }
  throw std::invalid_argument("cp_placement: expected 'replicated', 'contiguous' or 'zigzag', got '" + name + "'");
}

int Boundary::num_shards() const {
  return (cp_placement == CpPlacement::kReplicated ? 1 : cp) * (sequence_parallel ? tp : 1);
}

int Boundary::shard_of(int member) const {
  const int cp_part = cp_placement == CpPlacement::kReplicated ? 0 : member / tp;
  return sequence_parallel ? cp_part * tp + member % tp : cp_part;
}

std::vector<int> Boundary::members_of_shard(int shard) const {
  std::vector<int> members;
  for (int member = 0; member < lane_size(); ++member) {
    if (shard_of(member) == shard) members.push_back(member);
  }
  return members;
}

std::vector<Run> Boundary::runs_of_shard(int shard, std::int64_t extent) const {
  if (shard < 0 || shard >= num_shards() || extent < 0 || extent > kMaxElements) {
    throw std::out_of_range(quoted(module) + ": expected a shard below " + std::to_string(num_shards()) +
                            " and an extent of 0.." + std::to_string(kMaxElements) + ", got shard " +
                            std::to_string(shard) + " of an extent of " + std::to_string(extent));
  }
  const int tp_parts = sequence_parallel ? tp : 1;
  const int cp_part = shard / tp_parts;
  std::vector<std::pair<std::int64_t, std::int64_t>> chunks;
  if (cp_placement == CpPlacement::kContiguous) {
    chunks = {part(extent, cp_part, cp)};
  } else if (cp_placement == CpPlacement::kZigzag) {
    chunks = {part(extent, cp_part, 2 * cp), part(extent, 2 * cp - 1 - cp_part, 2 * cp)};
  } else {
    chunks = {{0, extent}};
  }
  std::int64_t cp_rows = 0;
  for (const auto& [begin, end] : chunks) cp_rows += end - begin;
  // Sequence parallelism splits what the cp rank holds, in its local order.
  const auto [first, last] = part(cp_rows, shard % tp_parts, tp_parts);

  std::vector<Run> runs;
  std::int64_t local = 0;
  for (const auto& [begin, end] : chunks) {
    const std::int64_t from = std::max(first, local);
    const std::int64_t to = std::min(last, local + end - begin);
    if (from < to) runs.push_back({begin + from - local, to - from, from - first});
    local += end - begin;
  }
  return runs;
}

std::pair<int, int> Boundary::find(int rank) const {
  for (int lane = 0; lane < num_lanes(); ++lane) {
    const auto& members = lanes[static_cast<std::size_t>(lane)];
    const auto found = std::find(members.begin(), members.end(), rank);
    if (found != members.end()) return {lane, static_cast<int>(found - members.begin())};
  }
  return {-1, -1};
}

Layout::Layout(std::vector<int> ranks, std::vector<std::pair<std::string, int>> dims, CpPlacement cp_placement,
               bool sequence_parallel, std::string name)
    : ranks_(std::move(ranks)),
      dims_(std::move(dims)),
      cp_placement_(cp_placement),
      sequence_parallel_(sequence_parallel),
      name_(std::move(name)) {
  const std::string who = quoted(name_);
  std::int64_t product = 1;
  std::unordered_set<std::string> seen;
  std::string text;
  for (const auto& [dim, size] : dims_) {
    if (!seen.insert(dim).second) throw std::invalid_argument(who + ": dim '" + dim + "' is given twice");
    if (size < 1) {
      throw std::invalid_argument(who + ": size of dim '" + dim + "' must be positive, got " + std::to_string(size));
    }
    if (!is_known(dim) && size != 1) {
      throw std::invalid_argument(who + ": unknown dim '" + dim + "' of size " + std::to_string(size) +
                                  "; expected tp, cp, dp, pp or gtp_remat");
    }
    product = saturating_mul(product, size);
    text += (text.empty() ? "" : " * ") + dim + "=" + std::to_string(size);
  }
  if (static_cast<std::int64_t>(ranks_.size()) > kMaxRanks) {
    throw std::invalid_argument(who + ": expected at most " + std::to_string(kMaxRanks) + " ranks, got " +
                                std::to_string(ranks_.size()));
  }
  if (product != static_cast<std::int64_t>(ranks_.size())) {
    throw std::invalid_argument(who + ": " + (text.empty() ? "1" : text) + " needs " + std::to_string(product) +
                                " ranks, got " + std::to_string(ranks_.size()));
  }
  std::unordered_set<int> distinct;
  for (int rank : ranks_) {
    if (rank < 0) throw std::invalid_argument(who + ": ranks must not be negative, got " + std::to_string(rank));
    if (!distinct.insert(rank).second) {
      throw std::invalid_argument(who + ": rank " + std::to_string(rank) + " is listed twice");
    }
  }
}

int Layout::size_of(const std::string& dim) const {
  for (const auto& [name, size] : dims_) {
    if (name == dim) return size;
  }
  return 1;
}

Boundary Layout::boundary(int stage) const {
  const int pp = size_of("pp");
  const int wanted = stage < 0 ? stage + pp : stage;  // a negative and a positive number: no overflow
  if (wanted < 0 || wanted >= pp) {
    throw std::out_of_range(quoted(name_) + ": pipeline stage " + std::to_string(stage) + " of " + std::to_string(pp));
  }
  Boundary boundary{name_, size_of("tp"), size_of("cp"), cp_placement_, sequence_parallel_, {}};
  const auto lane_size = static_cast<std::size_t>(boundary.lane_size());
  boundary.lanes.assign(ranks_.size() / (lane_size * static_cast<std::size_t>(pp)), std::vector<int>(lane_size));
  for (std::size_t index = 0; index < ranks_.size(); ++index) {
    std::size_t rest = index;
    std::size_t tp_index = 0;
    std::size_t cp_index = 0;
    std::size_t lane = 0;
    std::size_t lane_stride = 1;
    int pp_index = 0;
    for (const auto& [dim, size] : dims_) {
      const auto extent = static_cast<std::size_t>(size);
      const std::size_t coordinate = rest % extent;
      rest /= extent;
      if (dim == "tp") {
        tp_index = coordinate;
      } else if (dim == "cp") {
        cp_index = coordinate;
      } else if (dim == "pp") {
        pp_index = static_cast<int>(coordinate);
      } else if (is_data_parallel(dim)) {
        lane += coordinate * lane_stride;
        lane_stride *= extent;
      }
    }
    if (pp_index == wanted) {
      boundary.lanes[lane][cp_index * static_cast<std::size_t>(boundary.tp) + tp_index] = ranks_[index];
    }
  }
  return boundary;
}

}  // namespace mimo_ext::core
