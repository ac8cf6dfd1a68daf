// Groups of messages over a c10d process group, on whatever device it serves.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceType.h>

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <vector>

#include "comm/transport.h"

namespace mimo_ext::comm {

/// Of the 16 tags of a bridge, behind those of single messages: one for each direction. What goes in groups is told
/// apart by its order alone.
inline constexpr int kFirstGroupTag = 14;

/// Used by one thread at a time: the one whose stream the messages belong to. Holds a reference to the process group.
///
/// A group is one launch on the communicator's stream, after what the caller's stream held when it was issued. Tensors
/// are kept by the caller until the request is complete; nothing is recorded on a stream here.
class GroupTransport {
 public:
  struct Message {
    bool sending;
    int index;  ///< of the peer in the process group
    int peer;   ///< its global rank
    std::vector<at::Tensor>* tensor;
  };

  /// A backend without groups (gloo) gets them from GroupedBackend.
  GroupTransport(const c10::intrusive_ptr<c10d::ProcessGroup>& group, c10::DeviceType device, int tag);

  /// Whether requests are ordered before the caller's stream (Request::order) and complete by themselves. Otherwise
  /// they are waited for.
  bool on_streams() const { return on_streams_; }
  /// All messages, of which there is at least one, as one request. Throws TransportError; the process group is then
  /// unusable.
  Request issue(const std::vector<Message>& messages);

 private:
  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  c10::intrusive_ptr<c10d::Backend> backend_;
  const bool on_streams_;
  const int tag_;
};

}  // namespace mimo_ext::comm
