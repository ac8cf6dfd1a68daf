#include "comm/grouped_backend.h"

#include <stdexcept>

namespace mimo_ext::comm {

namespace {

class GroupWork final : public c10d::Work {
 public:
  explicit GroupWork(std::vector<c10::intrusive_ptr<c10d::Work>> works) : works_(std::move(works)) {}

  bool wait(std::chrono::milliseconds timeout) override {
    const std::lock_guard lock(mutex_);
    for (; complete_ < works_.size(); ++complete_) {
      if (!works_[complete_]->wait(timeout)) return false;  // interrupted
    }
    return true;
  }
  void abort() override {
    for (const auto& work : works_) work->abort();
  }

 private:
  const std::vector<c10::intrusive_ptr<c10d::Work>> works_;
  std::mutex mutex_;
  std::size_t complete_ = 0;
};

}  // namespace

GroupedBackend::GroupedBackend(c10::intrusive_ptr<c10d::Backend> single)
    : Backend(single->getRank(), single->getSize()), single_(std::move(single)) {}

void GroupedBackend::startCoalescing() {
  if (in_group_) throw std::logic_error("a group within a group");
  in_group_ = true;
}

c10::intrusive_ptr<c10d::Work> GroupedBackend::add(bool sending, const std::vector<at::Tensor>& tensors, int peer,
                                                   int tag) {
  if (!in_group_) throw std::logic_error("a message outside of a group");
  messages_.push_back({sending, tensors, peer, tag});
  return {};
}

c10::intrusive_ptr<c10d::Work> GroupedBackend::send(std::vector<at::Tensor>& tensors, int peer, int tag) {
  return add(true, tensors, peer, tag);
}

c10::intrusive_ptr<c10d::Work> GroupedBackend::recv(std::vector<at::Tensor>& tensors, int peer, int tag) {
  return add(false, tensors, peer, tag);
}

c10::intrusive_ptr<c10d::Work> GroupedBackend::endCoalescing() {
  if (!in_group_) throw std::logic_error("the end of no group");
  in_group_ = false;
  const std::vector<Message> messages = std::exchange(messages_, {});
  std::vector<c10::intrusive_ptr<c10d::Work>> works;
  // Receives first: a connection announces them, behind whatever it carries.
  for (const bool sending : {false, true}) {
    for (const Message& message : messages) {
      if (message.sending != sending) continue;
      std::vector<at::Tensor> tensors = message.tensors;
      works.push_back(sending ? single_->send(tensors, message.peer, message.tag)
                              : single_->recv(tensors, message.peer, message.tag));
    }
  }
  return c10::make_intrusive<GroupWork>(std::move(works));
}

}  // namespace mimo_ext::comm
