// Point-to-point messages between ranks, whatever carries them.
#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <stdexcept>
#include <string>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <utility>
#include <vector>

namespace mimo_ext::comm {

/// What a transport throws from send(), recv() and Request::wait; the channel adds who, what and when.
class TransportError : public std::runtime_error {
 public:
  TransportError(const std::string& what, bool timed_out) : std::runtime_error(what), timed_out_(timed_out) {}
  bool timed_out() const { return timed_out_; }

 private:
  bool timed_out_;
};

/// A message in flight, or none. Dropping it before wait() has returned true may cancel the message. wait() is called
/// by one thread at a time; interrupt() by any.
class Request {
 public:
  Request() = default;
  explicit Request(c10::intrusive_ptr<c10d::Work> work) : work_(std::move(work)) {}
  Request(Request&&) noexcept = default;
  Request& operator=(Request&&) noexcept = default;

  explicit operator bool() const { return static_cast<bool>(work_); }
  void reset() { work_.reset(); }
  /// Blocks until the buffer may be reused (send) or holds the data (receive): true. False: somebody interrupted it,
  /// and the message is still in flight. Throws TransportError.
  bool wait(std::chrono::milliseconds timeout);
  /// Makes a wait that is under way, or comes next, return soon.
  void interrupt();
  /// Throws TransportError where the message has failed, without waiting. By the thread that waits.
  void probe();

  // Messages on a stream:
  /// What the calling thread enqueues on its current stream from now on comes after them. Throws TransportError.
  void order();
  /// Never waits. Throws TransportError where they have failed.
  bool complete();
  /// The same messages.
  Request share() const { return Request(work_); }

 private:
  c10::intrusive_ptr<c10d::Work> work_;
};

/// Messages between the same two ranks with the same tag arrive in the order in which they were sent and received.
/// send() and recv() never wait for the peer. They may be called from several threads, but for one (peer, tag) only
/// from one thread at a time. `tensor` is one contiguous tensor, in the vector that c10d wants; the caller keeps it and
/// its storage until the request has ended. Dtype and number of elements must be equal on both sides.
class Transport {
 public:
  Transport() = default;
  Transport(const Transport&) = delete;
  Transport& operator=(const Transport&) = delete;
  virtual ~Transport() = default;
  virtual int rank() const = 0;
  /// What send() and recv() call the global rank `peer`. Throws std::invalid_argument for a stranger.
  virtual int index_of(int peer) const = 0;
  virtual Request send(std::vector<at::Tensor>& tensor, int index, int tag) = 0;
  virtual Request recv(std::vector<at::Tensor>& tensor, int index, int tag) = 0;
};

}  // namespace mimo_ext::comm
