#include "comm/config.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <numeric>
#include <sstream>
#include <stdexcept>

#include "core/limits.h"

namespace mimo_ext::comm {

namespace {

/// Rows of the whole sequence axis when a member holds `local` of them. Uneven shards cannot be told from one of them.
std::int64_t whole_rows(const core::Boundary& boundary, int member, std::int64_t local) {
  if (!boundary.sharded()) return local;
  const std::int64_t whole = core::saturating_mul(local, boundary.num_shards());
  std::int64_t rows = 0;
  for (const core::Run& run : boundary.runs_of_shard(boundary.shard_of(member), whole)) rows += run.length;
  if (rows != local) {
    throw std::invalid_argument("module '" + boundary.module + "': a shard of " + std::to_string(local) +
                                " rows does not tell the whole sequence; give the bridge static shapes (shape=)");
  }
  return whole;
}

class Describe {
 public:
  /// `holder`: the side whose lane `lane` holds the tensor.
  Describe(const BridgeConfig& config, const core::Boundary& holder, int lane)
      : config_(config), holder_(holder), lane_(lane), lanes_(holder.num_lanes()) {
    microbatch_.ndim = config.ndim;
    microbatch_.batch_dim = config.batch_dim;
    microbatch_.seq_dim = config.seq_dim;
    microbatch_.element_size = static_cast<int>(c10::elementSize(config.dtype));
  }

  core::Microbatch dense(const at::Tensor& x, int member, std::optional<std::int64_t> num_samples) {
    const std::int64_t mine = x.size(config_.batch_dim);
    set_samples(mine, num_samples, "samples along axis " + std::to_string(config_.batch_dim));
    for (int axis = 0; axis < config_.ndim; ++axis) microbatch_.shape[static_cast<std::size_t>(axis)] = x.size(axis);
    const auto seq = static_cast<std::size_t>(config_.seq_dim);
    microbatch_.shape[seq] = whole_rows(holder_, member, x.size(config_.seq_dim));
    microbatch_.shape[static_cast<std::size_t>(config_.batch_dim)] = 1;
    return microbatch_;
  }

  core::Microbatch ragged(const at::Tensor& x, int member, const std::vector<std::int64_t>& counts,
                          std::optional<std::int64_t> num_samples) {
    std::int64_t rows = 0;
    for (std::int64_t count : counts) {
      if (count < 0) bad("row_counts must not be negative, got " + std::to_string(count));
      rows = core::saturating_add(rows, count);
    }
    if (rows > core::kMaxElements) {
      bad("row_counts: expected at most " + std::to_string(core::kMaxElements) + " rows, got " + std::to_string(rows));
    }
    std::int64_t held = rows;
    if (holder_.sharded()) {
      held = 0;
      for (const core::Run& run : holder_.runs_of_shard(holder_.shard_of(member), rows)) {
        held += run.length;
      }
    }
    if (held != x.size(0)) {
      bad("row_counts of " + std::to_string(counts.size()) + " samples sum to " + std::to_string(rows) + " rows" +
          (held == rows ? "" : ", " + std::to_string(held) + " of them in this rank's shard") + ", got a tensor of " +
          std::to_string(x.size(0)) + " rows");
    }
    set_samples(static_cast<std::int64_t>(counts.size()), num_samples, "row_counts");
    if (microbatch_.samples > core::kMaxRowCounts) {
      bad("expected row_counts of at most " + std::to_string(core::kMaxRowCounts) + " samples in all lanes, got " +
          std::to_string(microbatch_.samples));
    }
    microbatch_.shape = {1, x.size(1), 1};
    microbatch_.rows.assign(static_cast<std::size_t>(microbatch_.samples), core::kUnknownRows);
    const auto first = static_cast<std::ptrdiff_t>(microbatch_.lane_begin(lane_, lanes_));
    std::copy(counts.begin(), counts.end(), microbatch_.rows.begin() + first);
    return microbatch_;
  }

  /// Rows without counts: equal numbers of rows per sample. Where the number of samples is not told either, the line is
  /// cut into the fewest equal parts that both sides' lanes are made of.
  core::Microbatch even(const at::Tensor& x, int member, std::optional<std::int64_t> num_samples) {
    const std::int64_t rows = whole_rows(holder_, member, x.size(0));
    const std::int64_t parts =
        std::lcm(std::int64_t{config_.source.num_lanes()}, std::int64_t{config_.destination.num_lanes()});
    microbatch_.samples = num_samples.value_or(parts);
    check_samples();
    const std::int64_t mine = microbatch_.lane_begin(lane_ + 1, lanes_) - microbatch_.lane_begin(lane_, lanes_);
    if (mine == 0 ? rows != 0 : rows % mine != 0) {
      bad("expected a number of rows that splits evenly into " + std::to_string(mine) +
          (num_samples ? " samples" : " parts (the lanes of both sides)") + ", got " + std::to_string(rows) +
          " rows; pass row_counts, the rows of each sample");
    }
    microbatch_.rows_per_sample = mine == 0 ? 0 : rows / mine;
    microbatch_.shape = {1, x.size(1), 1};
    return microbatch_;
  }

 private:
  void set_samples(std::int64_t mine, std::optional<std::int64_t> num_samples, const std::string& what) {
    microbatch_.samples = num_samples.value_or(core::saturating_mul(mine, lanes_));
    check_samples();
    const std::int64_t expected = microbatch_.lane_begin(lane_ + 1, lanes_) - microbatch_.lane_begin(lane_, lanes_);
    if (expected != mine) {
      bad("lane " + std::to_string(lane_) + " of " + std::to_string(lanes_) + " has " + std::to_string(expected) +
          " of " + std::to_string(microbatch_.samples) + " samples, got " + std::to_string(mine) + " " + what);
    }
  }

  /// Before they are multiplied.
  void check_samples() const {
    if (microbatch_.samples <= core::kMaxSamples) return;
    bad("expected at most " + std::to_string(core::kMaxSamples) + " samples in all lanes, got " +
        std::to_string(microbatch_.samples));
  }

  [[noreturn]] void bad(const std::string& what) const {
    throw std::invalid_argument("module '" + holder_.module + "': " + what);
  }

  const BridgeConfig& config_;
  const core::Boundary& holder_;
  int lane_;
  int lanes_;
  core::Microbatch microbatch_;
};

/// The rows of each sample of a source lane, as `row_shards` has them.
std::vector<std::int64_t> counts_of(const BridgeConfig& config, const core::RowShards& row_shards, int lane,
                                    const std::optional<std::vector<std::int64_t>>& row_counts,
                                    std::optional<std::int64_t> num_samples) {
  const std::string head = "module '" + config.source.module + "': row_shards: ";
  const std::int64_t samples = row_shards.num_samples();
  if (num_samples.value_or(samples) != samples) {
    throw std::invalid_argument(head + "expected shards of " + std::to_string(*num_samples) + " samples, got " +
                                std::to_string(samples));
  }
  const std::int64_t first = samples * lane / config.source.num_lanes();
  const std::int64_t last = samples * (lane + 1) / config.source.num_lanes();
  std::vector<std::int64_t> counts;
  for (std::int64_t sample = first; sample < last; ++sample) {
    counts.push_back(row_shards.rows(sample));
    if (counts.back() == core::kUnknownRows) {
      throw std::invalid_argument(head + "expected those of samples " + std::to_string(first) + ".." +
                                  std::to_string(last - 1) + " (lane " + std::to_string(lane) +
                                  "), got none of sample " + std::to_string(sample));
    }
  }
  if (row_counts && *row_counts != counts) throw std::invalid_argument(head + "other row counts than row_counts");
  return counts;
}

}  // namespace

Carrier parse_carrier(const std::string& text) {
  if (text == "direct") return Carrier::kDirect;
  if (text == "staged") return Carrier::kStaged;
  if (text == "groups") return Carrier::kGroups;
  throw std::invalid_argument("carrier: expected direct, staged or groups, got '" + text + "'");
}

core::Microbatch describe_microbatch(const BridgeConfig& config, const at::Tensor& x, int lane, int member,
                                     const std::optional<std::vector<std::int64_t>>& row_counts,
                                     std::optional<std::int64_t> num_samples,
                                     const std::shared_ptr<const core::RowShards>& row_shards) {
  if (row_shards) {
    const auto told = counts_of(config, *row_shards, lane, row_counts, num_samples);
    auto microbatch = describe_microbatch(config, x, lane, member, told, row_shards->num_samples(), nullptr);
    microbatch.row_shards = row_shards;
    return microbatch;
  }
  if (row_counts && config.ndim != 2) {
    throw std::invalid_argument("module '" + config.source.module +
                                "': row_counts are for 2-D tensors [rows, h], got " + std::to_string(config.ndim) +
                                "-D");
  }
  if (num_samples && *num_samples < 0) {
    throw std::invalid_argument("module '" + config.source.module + "': num_samples must not be negative, got " +
                                std::to_string(*num_samples));
  }
  Describe describe(config, config.source, lane);
  if (config.ndim == 3) return describe.dense(x, member, num_samples);
  if (row_counts) return describe.ragged(x, member, *row_counts, num_samples);
  return describe.even(x, member, num_samples);
}

core::Microbatch describe_unpaired_gradient(const BridgeConfig& config, const at::Tensor& gradient, int lane,
                                            int member) {
  if (gradient.defined()) {
    Describe describe(config, config.destination, lane);
    return config.ndim == 3 ? describe.dense(gradient, member, std::nullopt)
                            : describe.even(gradient, member, std::nullopt);
  }
  const std::vector<std::int64_t> shape(static_cast<std::size_t>(config.ndim), 0);
  return describe_unpaired_gradient(config, at::empty(shape, at::TensorOptions().dtype(config.dtype)), lane, member);
}

void check_tensor(const BridgeConfig& config, const at::Tensor& x, const std::string& module, int rank,
                  const char* operation) {
  std::ostringstream problem;
  if (x.layout() != at::kStrided) {
    problem << "expected a strided tensor, got layout " << x.layout();
  } else if (x.device() != config.device && config.device.is_cpu()) {
    problem << "expected a CPU tensor (this bridge runs over gloo), got device " << x.device();
  } else if (x.device() != config.device) {
    problem << "expected a tensor on " << config.device << ", got device " << x.device();
  } else if (x.dim() != config.ndim) {
    problem << "expected a tensor of " << config.ndim << " axes, got shape " << x.sizes();
  } else if (std::any_of(x.sizes().begin(), x.sizes().end(), [](auto size) { return size > core::kMaxElements; })) {
    problem << "expected axes of at most " << core::kMaxElements << ", got shape " << x.sizes();
  } else if (x.scalar_type() != config.dtype) {
    problem << "expected dtype " << config.dtype << ", got " << x.scalar_type();
  } else {
    return;
  }
  throw std::invalid_argument("bridge '" + config.name + "', rank " + std::to_string(rank) + ", module '" + module +
                              "': " + operation + ": " + problem.str());
}

}  // namespace mimo_ext::comm
