// Groups for a backend that has none (gloo): what is issued in one starts when the group ends, and is waited for as
// one.
#pragma once

#include <ATen/core/Tensor.h>

#include <mutex>
#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <utility>
#include <vector>

namespace mimo_ext::comm {

/// Answers to startCoalescing, send, recv and endCoalescing as NCCL's backend does, on the CPU: for tests of what NCCL
/// is given. Used by one thread at a time; what it returns may be waited for by several.
class GroupedBackend final : public c10d::Backend {
 public:
  explicit GroupedBackend(c10::intrusive_ptr<c10d::Backend> single);

  const std::string getBackendName() const override { return single_->getBackendName() + ", in groups"; }
  bool supportsCoalescing() const override { return true; }
  /// Throws std::logic_error within a group.
  void startCoalescing() override;
  /// Throws std::logic_error without one.
  c10::intrusive_ptr<c10d::Work> endCoalescing() override;
  /// Within a group: null, and nothing happens before its end. Throws std::logic_error outside.
  c10::intrusive_ptr<c10d::Work> send(std::vector<at::Tensor>& tensors, int peer, int tag) override;
  c10::intrusive_ptr<c10d::Work> recv(std::vector<at::Tensor>& tensors, int peer, int tag) override;

 private:
  struct Message {
    bool sending;
    std::vector<at::Tensor> tensors;
    int peer;
    int tag;
  };
  c10::intrusive_ptr<c10d::Work> add(bool sending, const std::vector<at::Tensor>& tensors, int peer, int tag);

  c10::intrusive_ptr<c10d::Backend> single_;
  bool in_group_ = false;
  std::vector<Message> messages_;
};

}  // namespace mimo_ext::comm
