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
  std::unique_ptr<Request> send(const at::Tensor& tensor, int peer, int tag) override;
  std::unique_ptr<Request> recv(const at::Tensor& tensor, int peer, int tag) override;

 private:
  int group_rank(int peer) const;

  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  c10::intrusive_ptr<c10d::Backend> backend_;
  std::unordered_map<int, int> group_ranks_;
  int rank_;
};

}  // namespace mimo_ext::comm
