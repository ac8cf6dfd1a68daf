#include "comm/c10d_transport.h"

namespace mimo_ext::comm {

namespace {

/// gloo has one exception type for a peer that died and one for a timeout, but c10d may rewrap either: the words
/// remain.
bool says_timeout(const std::string& what) {
  return what.find("imed out") != std::string::npos || what.find("imeout") != std::string::npos;
}

/// What happened, without the advice that gloo adds to it.
std::string without_advice(const std::string& what) {
  return what.substr(0, what.find(". This is typically caused by"));
}

class WorkRequest final : public Request {
 public:
  WorkRequest(c10::intrusive_ptr<c10d::Work> work, at::Tensor tensor)
      : work_(std::move(work)), tensor_(std::move(tensor)) {}

  void wait(std::chrono::milliseconds timeout) override {
    // gloo reads 0 ms as "no timeout".
    const auto limit = std::max(timeout, std::chrono::milliseconds(1));
    bool completed = false;
    try {
      completed = work_->wait(limit);
    } catch (const std::exception& error) {
      const std::string what = error.what();
      throw TransportError(without_advice(what), says_timeout(what));
    }
    if (!completed) throw TransportError("aborted", false);
  }

  void abort() override {
    try {
      work_->abort();
    } catch (const std::exception&) {
      // A message that cannot be aborted ends by its own timeout.
    }
  }

 private:
  c10::intrusive_ptr<c10d::Work> work_;
  at::Tensor tensor_;
};

}  // namespace

C10dTransport::C10dTransport(c10::intrusive_ptr<c10d::ProcessGroup> group, const std::vector<int>& ranks)
    : group_(std::move(group)), backend_(group_->getBackend(c10::DeviceType::CPU)) {
  if (static_cast<int>(ranks.size()) != group_->getSize()) {
    throw std::invalid_argument("process group: expected " + std::to_string(ranks.size()) + " ranks, got " +
                                std::to_string(group_->getSize()));
  }
  for (std::size_t index = 0; index < ranks.size(); ++index) group_ranks_[ranks[index]] = static_cast<int>(index);
  rank_ = ranks[static_cast<std::size_t>(group_->getRank())];
}

int C10dTransport::group_rank(int peer) const {
  const auto found = group_ranks_.find(peer);
  if (found == group_ranks_.end()) {
    throw std::invalid_argument("rank " + std::to_string(peer) + " is not in the bridge's process group");
  }
  return found->second;
}

std::unique_ptr<Request> C10dTransport::send(const at::Tensor& tensor, int peer, int tag) {
  std::vector<at::Tensor> tensors{tensor};
  return std::make_unique<WorkRequest>(backend_->send(tensors, group_rank(peer), tag), tensor);
}

std::unique_ptr<Request> C10dTransport::recv(const at::Tensor& tensor, int peer, int tag) {
  std::vector<at::Tensor> tensors{tensor};
  return std::make_unique<WorkRequest>(backend_->recv(tensors, group_rank(peer), tag), tensor);
}

}  // namespace mimo_ext::comm
