// What is received before it is known what comes: headers, and the beginnings of payloads that follow them unasked.
#include <ATen/Functions.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>

#include <exception>
#include <utility>

#include "comm/channel_jobs.h"

namespace mimo_ext::comm {

template <typename Receive>
void Channel::post_next(const Receive& receive) {
  // Whoever asks for the microbatch ends these receives, maybe long after a profile that they would be part of.
  const at::DisableRecordFunctionGuard unrecorded;
  const c10::NoGradGuard no_grad;
  next_headers_.resize(header_senders_.size());
  for (std::size_t index = 0; index < header_senders_.size(); ++index) {
    const HeaderPeer& peer = header_senders_[index];
    if (peer.rank == transport_.rank()) continue;
    HeaderSlot& header = next_headers_[index];
    if (header.tensor.empty()) header.tensor = {at::empty({static_cast<std::int64_t>(Header::kMaxWords)}, at::kLong)};
    if (!header.request) header.request = receive(header.tensor, peer, kHeaderTag);
    while (eager_bytes_ > 0 && eager_[index].size() <= headers_expected_) {
      HeaderSlot slot;
      if (eager_free_.empty()) {
        slot.tensor = {at::empty({eager_bytes_}, at::kByte)};
      } else {
        slot.tensor = std::move(eager_free_.back());
        eager_free_.pop_back();
      }
      slot.request = receive(slot.tensor, peer, kEagerTag);
      eager_[index].push_back(std::move(slot));
    }
  }
}

void Channel::expect_next(ReceiveJob& job) {
  const std::lock_guard lock(ahead_mutex_);
  post_next([&](std::vector<at::Tensor>& tensor, const HeaderPeer& peer, int kind) {
    return post(false, tensor, peer.index, peer.rank, kind, recv_name(), job.sequence);
  });
  std::swap(job.headers, next_headers_);
  ++headers_expected_;
  job.eager.resize(header_senders_.size());
}

void Channel::announce_next() {
  if (config_.fixed) return;
  const std::lock_guard lock(ahead_mutex_);
  if (headers_expected_ > 0) return;  // the caller posts ahead, too
  try {
    post_next([this](std::vector<at::Tensor>& tensor, const HeaderPeer& peer, int kind) {
      return transport_.recv(tensor, peer.index, tag(kind));
    });
  } catch (const std::exception&) {
    // A sender that has sent its last microbatch may be gone. Whoever asks for one more is told.
  }
}

void Channel::take_eager(ReceiveJob& job, std::size_t header) {
  if (job.parsed[header].eager_bytes == 0) return;
  const std::lock_guard lock(ahead_mutex_);
  if (eager_[header].empty()) {
    throw BridgeError(where(recv_name(), job.sequence) + ": rank " + std::to_string(header_senders_[header].rank) +
                      " announced payload ahead of its turn, expected none");
  }
  job.eager[header] = std::move(eager_[header].front());
  eager_[header].pop_front();
}

std::size_t Channel::header_of(const Transfer& transfer) const {
  const int first_lane = core::Plan::lanes_met(receiver_lane_, receiver_.num_lanes(), sender_.num_lanes()).first;
  return static_cast<std::size_t>(transfer.sender_lane - first_lane);
}

void Channel::check_announced(const ReceiveJob& job) const {
  for (std::size_t index = 0; index < job.parsed.size(); ++index) {
    const Header& header = job.parsed[index];
    const ReceiveProgram::Announced& expected = job.program->announced[index];
    if (header.no_gradient || header_senders_[index].rank == transport_.rank()) continue;
    if (header.payload_bytes == expected.payload_bytes && header.eager_bytes == expected.eager_bytes) continue;
    throw BridgeError(where(recv_name(), job.sequence) + ": rank " + std::to_string(header_senders_[index].rank) +
                      " announced " + std::to_string(header.payload_bytes) + " + " +
                      std::to_string(header.eager_bytes) + " bytes of payload with its header, expected " +
                      std::to_string(expected.payload_bytes) + " + " + std::to_string(expected.eager_bytes));
  }
}

}  // namespace mimo_ext::comm
