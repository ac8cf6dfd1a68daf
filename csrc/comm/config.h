// What the two sides of a bridge agree on before the first microbatch.
#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/plan.h"

namespace mimo_ext::comm {

/// How tensors reach the process group.
enum class Carrier : std::uint8_t {
  kDirect,  ///< as they are, messages one by one, a thread waits for them
  kStaged,  ///< through host memory
  kGroups,  ///< as they are, in groups that nobody waits for where the device has streams
};
/// "direct", "staged", "groups". Throws std::invalid_argument.
Carrier parse_carrier(const std::string& text);

struct BridgeConfig {
  std::string name;  ///< of the edge, for messages: "images -> language"
  std::shared_ptr<const core::Sides> sides;
  int ndim = 2;
  int batch_dim = 0;
  int seq_dim = 0;  ///< the same as batch_dim for 2-D tensors
  at::ScalarType dtype = at::kFloat;
  std::optional<core::Microbatch> fixed;  ///< static shapes: every microbatch is this one, and no headers are sent
  std::chrono::milliseconds timeout{600000};
  int max_in_flight = 32;  ///< microbatches sent that have not arrived, per direction; a further send waits
  core::PlanOptions plan_options;
  bool unpaired_backward = false;  ///< gradients may travel before (or without) the forward microbatch they belong to
  int tag_offset = 0;              ///< first of the 16 tags of this bridge in its process groups
  std::uint64_t hash = 0;          ///< of all of the above that must be equal on every rank
  c10::Device device = at::kCPU;   ///< of the tensors that are sent and received, on this rank
  Carrier carrier = Carrier::kDirect;
  std::chrono::microseconds copy_delay{0};  ///< of imitated copies (staged tensors of the CPU)
  const core::Boundary& source = sides->source();
  const core::Boundary& destination = sides->destination();

  at::TensorOptions options() const { return at::TensorOptions().dtype(dtype).device(device); }
  /// Of what messages are made of.
  at::TensorOptions message_options() const {
    return carrier == Carrier::kGroups ? options() : at::TensorOptions().dtype(dtype);
  }
  /// Whether headers take payload with them: where it is at hand when they leave.
  bool announces() const { return !fixed && carrier == Carrier::kDirect; }
  core::Plan plan(const core::Microbatch& microbatch, core::Direction direction) const {
    return core::Plan(sides, microbatch, direction, plan_options);
  }
};

/// The global microbatch as far as the rank that sends `x` knows it. `x` is the tensor of lane `lane`, member `member`
/// of the source; `row_counts` the rows of each sample of the lane (2-D only); `row_shards` tells them,
/// too. Throws std::invalid_argument naming
/// module, expected and got.
core::Microbatch describe_microbatch(const BridgeConfig& config, const at::Tensor& x, int lane, int member,
                                     const std::optional<std::vector<std::int64_t>>& row_counts,
                                     std::optional<std::int64_t> num_samples,
                                     const std::shared_ptr<const core::RowShards>& row_shards);

/// The global microbatch that a gradient without a forward microbatch belongs to: every lane holds as many samples
/// (3-D) or rows (2-D) as lane `lane` of the destination. An undefined `gradient` stands for an empty one. Throws
/// std::invalid_argument.
core::Microbatch describe_unpaired_gradient(const BridgeConfig& config, const at::Tensor& gradient, int lane,
                                            int member);

/// Throws std::invalid_argument unless `x` is a strided tensor of the bridge's device, dtype and number of axes.
void check_tensor(const BridgeConfig& config, const at::Tensor& x, const std::string& module, int rank,
                  const char* operation);

}  // namespace mimo_ext::comm
