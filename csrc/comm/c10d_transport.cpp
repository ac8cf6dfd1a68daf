#include "comm/c10d_transport.h"

#include <algorithm>

namespace mimo_ext::comm {

namespace {

/// gloo has one exception type for a peer that died and one for a timeout, but c10d may rewrap either: the words
/// remain.
bool says_timeout(const std::string& what) {
  return what.find("imed out") != std::string::npos || what.find("imeout") != std::string::npos;
}

/// What happened, without the place in gloo's sources before it and the advice after it.
std::string words_of(const std::string& what) {
  const std::string before = what.substr(0, what.find(". This is typically caused by"));
  const std::size_t place = before.find(".cc:");
  const std::size_t end = before.find("] ");
  return before.rfind('[', 0) == 0 && place < end && end != std::string::npos ? before.substr(end + 2) : before;
}

template <typename Post>
Request posted(const Post& post) {
  try {
    return Request(post());
  } catch (const std::exception& error) {
    throw TransportError(words_of(error.what()), false);
  }
}

}  // namespace

bool Request::wait(std::chrono::milliseconds timeout) {
  // gloo reads 0 ms as "no timeout".
  const auto limit = std::max(timeout, std::chrono::milliseconds(1));
  try {
    return work_->wait(limit);
  } catch (const std::exception& error) {
    const std::string what = error.what();
    throw TransportError(words_of(what), says_timeout(what));
  }
}

void Request::interrupt() {
  try {
    // For gloo this wakes the waiting thread and nothing more: the message goes on, and may be waited for again.
    work_->abort();
  } catch (const std::exception&) {
    // A message that cannot be interrupted ends by its own timeout.
  }
}

void Request::probe() {
  constexpr std::chrono::seconds kNotWaited{60};  // gloo would close the connection after a time that is too short
  interrupt();
  wait(kNotWaited);
}

void Request::order() {
  try {
    work_->wait();  // without a limit, or the host would wait
  } catch (const std::exception& error) {
    throw TransportError(words_of(error.what()), says_timeout(error.what()));
  }
}

bool Request::complete() {
  try {
    if (!work_->isCompleted()) return false;
    if (const std::exception_ptr error = work_->exception()) std::rethrow_exception(error);
    return true;
  } catch (const std::exception& error) {
    throw TransportError(words_of(error.what()), says_timeout(error.what()));
  }
}

C10dTransport::C10dTransport(c10::intrusive_ptr<c10d::ProcessGroup> group, const std::vector<int>& ranks)
    : group_(std::move(group)), backend_(group_->getBackend(c10::DeviceType::CPU)) {
  if (static_cast<int>(ranks.size()) != group_->getSize()) {
    throw std::invalid_argument("process group: expected " + std::to_string(ranks.size()) + " ranks, got " +
                                std::to_string(group_->getSize()));
  }
  for (std::size_t index = 0; index < ranks.size(); ++index) group_ranks_[ranks[index]] = static_cast<int>(index);
  rank_ = ranks[static_cast<std::size_t>(group_->getRank())];
}

int C10dTransport::index_of(int peer) const {
  const auto found = group_ranks_.find(peer);
  if (found == group_ranks_.end()) {
    throw std::invalid_argument("rank " + std::to_string(peer) + " is not in the bridge's process group");
  }
  return found->second;
}

Request C10dTransport::send(std::vector<at::Tensor>& tensor, int index, int tag) {
  return posted([&] { return backend_->send(tensor, index, tag); });
}

Request C10dTransport::recv(std::vector<at::Tensor>& tensor, int index, int tag) {
  return posted([&] { return backend_->recv(tensor, index, tag); });
}

}  // namespace mimo_ext::comm
