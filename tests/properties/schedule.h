// A whole training step of several modules: bridges, hops between pipeline stages, 1F1B on every rank.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "checks.h"
#include "setting.h"

namespace mimo_ext::properties {

/// Modules on ranks of their own, a graph between them, and a schedule. Lists have an entry for each module.
///
/// What each rank does is what Megatron's 1F1B (forward_backward_pipelining_without_interleaving) asks of
/// MultiModulePipelineCommunicator, with the length of its warm-up, and what mimo_ext/megatron/stage_io.py and
/// overlap.py make of it: every send before the receives of the same operation; all receives of an operation posted
/// before the first is waited for; with `ahead`, so many posted before they are asked for.
struct Schedule {
  std::vector<std::int64_t> dp{1};
  std::vector<std::int64_t> tp{1};
  std::vector<std::int64_t> cp{1};
  std::vector<std::int64_t> pp{1};
  std::vector<std::int64_t> sp{0};
  std::vector<std::int64_t> slack{0};  ///< microbatches of warm-up more than the schedule needs
  std::vector<std::int64_t> edges;     ///< 10 * from + to
  std::int64_t microbatches = 1;
  std::int64_t steps = 1;
  std::int64_t extra_warmup = 0;
  std::int64_t ahead = 0;  ///< receives that are posted ahead; 0: no overlap
  std::int64_t forward_only = 0;
  std::int64_t in_flight = 0;  ///< 0: as many as the communicator allows
  std::int64_t ndim = 3;
  std::int64_t rows = 0;  ///< seed of the rows of each microbatch (2-D)
  std::int64_t element = 1;
  std::int64_t hidden = 2;
  std::int64_t path = 0;
  std::int64_t chunks = 8;
  std::int64_t chunk_bytes = 65536;
  std::int64_t links = 0;

  static Schedule parse(const std::string& text);
  std::string to_string() const;
  bool valid() const;
  std::vector<Schedule> simpler() const;
  bool operator==(const Schedule&) const = default;

  std::size_t modules() const { return dp.size(); }
  /// Pipeline stages up to and including stage `stage` of a module, along the longest path that leads there.
  std::int64_t stages_to(std::size_t module, std::int64_t stage) const;
  /// Along the longest path of all.
  std::int64_t total_stages() const;
  /// What MultiModulePipelineCommunicator lets a bridge have under way: pipeline_hooks.py.
  std::int64_t most_in_flight() const;
};

/// The `index`-th schedule of a seed.
Schedule draw_schedule(std::uint64_t seed, std::uint64_t index);

/// Carries the schedule out in the simulator; throws std::runtime_error where it does not end.
Outcome check(const Schedule& schedule);

}  // namespace mimo_ext::properties
