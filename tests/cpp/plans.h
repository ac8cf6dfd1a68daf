// Boundaries and microbatches of tests.
#pragma once

#include <numeric>
#include <vector>

#include "core/plan.h"

namespace mimo_ext::core {

/// Replicated over tp and cp, with these ranks in its lanes.
inline Boundary side(const char* name, std::vector<std::vector<int>> lanes, int tp, int cp = 1) {
  return {name, tp, cp, CpPlacement::kReplicated, false, std::move(lanes)};
}

/// Lanes of consecutive ranks.
inline Boundary side(const char* name, int first_rank, int lanes, int tp, int cp = 1) {
  std::vector<std::vector<int>> ranks;
  for (int lane = 0; lane < lanes; ++lane) {
    ranks.emplace_back(static_cast<std::size_t>(tp * cp));
    std::iota(ranks.back().begin(), ranks.back().end(), first_rank + lane * tp * cp);
  }
  return side(name, std::move(ranks), tp, cp);
}

/// [samples * rows_per_sample, hidden]
inline Microbatch flat(std::int64_t samples, std::int64_t rows_per_sample, std::int64_t hidden) {
  Microbatch microbatch;
  microbatch.samples = samples;
  microbatch.rows_per_sample = rows_per_sample;
  microbatch.shape = {1, hidden, 1};
  return microbatch;
}

inline Microbatch ragged(std::vector<std::int64_t> rows, std::int64_t hidden) {
  Microbatch microbatch = flat(static_cast<std::int64_t>(rows.size()), 1, hidden);
  microbatch.rows = std::move(rows);
  return microbatch;
}

}  // namespace mimo_ext::core
