// What was issued in groups, for tests and people who look for a difference between ranks.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <mutex>
#include <vector>

#include "comm/group_transport.h"
#include "comm/rounds.h"

namespace mimo_ext::comm {

struct GroupEntry {
  bool is_forward = false;
  std::int64_t microbatch = 0;
  std::vector<GroupMessage> messages;
};

/// Thread-safe. Off until it is started; then it keeps everything.
class GroupLog {
 public:
  void start() {
    const std::lock_guard lock(mutex_);
    on_ = true;
    entries_.clear();
  }
  void issued(bool is_forward, std::int64_t microbatch, const std::vector<GroupTransport::Message>& messages) {
    const std::lock_guard lock(mutex_);
    if (!on_) return;
    GroupEntry& entry = entries_.emplace_back(GroupEntry{is_forward, microbatch, {}});
    for (const auto& message : messages) {
      const auto bytes = static_cast<std::int64_t>(message.tensor->front().nbytes());
      entry.messages.push_back({message.sending, message.peer, bytes});
    }
  }
  std::vector<GroupEntry> entries() const {
    const std::lock_guard lock(mutex_);
    return entries_;
  }

 private:
  mutable std::mutex mutex_;
  bool on_ = false;
  std::vector<GroupEntry> entries_;
};

}  // namespace mimo_ext::comm
