// Point-to-point messages between global ranks, whatever carries them.
#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <memory>
#include <stdexcept>
#include <string>

namespace mimo_ext::comm {

/// What a transport throws from Request::wait; the channel adds who, what and when.
class TransportError : public std::runtime_error {
 public:
  TransportError(const std::string& what, bool timed_out) : std::runtime_error(what), timed_out_(timed_out) {}
  bool timed_out() const { return timed_out_; }

 private:
  bool timed_out_;
};

/// A message in flight. Owns a reference to the tensor's storage until it is destroyed; destroying it before wait() has
/// returned may cancel the message. wait() is called at most once, by one thread; abort() by any thread at any time.
class Request {
 public:
  Request() = default;
  Request(const Request&) = delete;
  Request& operator=(const Request&) = delete;
  virtual ~Request() = default;
  /// Blocks until the buffer may be reused (send) or holds the data (receive). Throws TransportError.
  virtual void wait(std::chrono::milliseconds timeout) = 0;
  /// Makes a wait that is under way, or comes later, fail soon.
  virtual void abort() = 0;
};

/// Messages between the same two ranks with the same tag arrive in the order in which they were sent and received.
/// send() and recv() never wait for the peer. They may be called from several threads, but for one (peer, tag) only
/// from one thread at a time. The tensor must be contiguous; its dtype and number of elements must be equal on both
/// sides.
class Transport {
 public:
  Transport() = default;
  Transport(const Transport&) = delete;
  Transport& operator=(const Transport&) = delete;
  virtual ~Transport() = default;
  virtual int rank() const = 0;
  virtual std::unique_ptr<Request> send(const at::Tensor& tensor, int peer, int tag) = 0;
  virtual std::unique_ptr<Request> recv(const at::Tensor& tensor, int peer, int tag) = 0;
};

}  // namespace mimo_ext::comm
