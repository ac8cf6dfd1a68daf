// Transport over a c10d process group with the gloo backend (CPU tensors).
#pragma once

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <unordered_map>
#include <vector>

#include "comm/transport.h"

namespace mimo_ext::comm {

/// Holds a reference to the group: it stays usable after torch.distributed has forgotten it, until this object is
/// destroyed. Throws std::invalid_argument where the group has no backend for CPU tensors.
class C10dTransport final : public Transport {
 public:
  /// `ranks[i]` is the global rank of the group's rank i.
  C10dTransport(c10::intrusive_ptr<c10d::ProcessGroup> group, const std::vector<int>& ranks);

  int rank() const override { return rank_; }
  int index_of(int peer) const override;
  Request send(std::vector<at::Tensor>& tensor, int index, int tag) override;
  Request recv(std::vector<at::Tensor>& tensor, int index, int tag) override;

 private:
  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  c10::intrusive_ptr<c10d::Backend> backend_;
  std::unordered_map<int, int> group_ranks_;
  int rank_;
};

}  // namespace mimo_ext::comm
