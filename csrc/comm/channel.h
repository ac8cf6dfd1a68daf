// One direction of one bridge on one rank: carries out the plan of each microbatch.
//
// Threads: the caller's thread posts; a worker waits for receives, forwards parts to the replicas of the lane and
// completes deliveries; a second worker waits for sends. Workers exist only where the rank has that role, never touch
// Python, and process microbatches in order. They are what lets gloo's messages complete while the caller computes.
//
// Order of messages between two ranks: headers, payload and lane copies have a tag each, and each tag's messages are
// posted by one thread in the order of the plan, microbatch after microbatch, on both sides.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "comm/config.h"
#include "comm/delivery.h"
#include "comm/errors.h"
#include "comm/header.h"
#include "comm/transport.h"
#include "comm/worker.h"

namespace mimo_ext::comm {

/// Waits for one request at a time and can be aborted from any thread.
class Waiter {
 public:
  void wait(Request& request, std::chrono::milliseconds timeout);
  void abort();

 private:
  std::mutex mutex_;
  Request* current_ = nullptr;
  bool aborted_ = false;
};

/// Not thread-safe: send() and recv() are called by one thread at a time. `transport` and `failure` outlive the
/// channel.
class Channel {
 public:
  Channel(const BridgeConfig& config, Transport& transport, Failure& failure, core::Direction direction);
  ~Channel();

  bool is_sender() const { return sender_lane_ >= 0; }
  bool is_receiver() const { return receiver_lane_ >= 0; }

  /// Enqueues all messages of one microbatch and returns without waiting for any peer. Holds `x`'s storage until they
  /// are gone. An undefined `x` says that there is no gradient. The delivery ends when the storage is free again.
  std::shared_ptr<Delivery> send(const core::Microbatch& microbatch, const at::Tensor& x, bool expects_backward,
                                 std::int64_t forward_sequence = 0);
  /// Fewer than max_in_flight microbatches are being sent? Waits up to `limit` for it.
  bool wait_for_room(std::chrono::milliseconds limit);

  /// Posts the receives of the next microbatch: of its headers, or where `known` is its final shape and shapes are
  /// static, of its payload. `known` of a backward microbatch is what the forward one, number `forward_sequence`, was
  /// (none and Header::kUnpaired: no forward microbatch has been sent yet).
  std::shared_ptr<Delivery> recv(std::optional<core::Microbatch> known, std::int64_t forward_sequence = 0);

  /// Gives up the receives that are under way, and those only. From the thread that uses the channel.
  void abort_receives();
  /// Is a microbatch being sent?
  bool sending();

  /// Waits for everything that is under way (each wait has its timeout), then ends the workers. After a failure: at
  /// once.
  void close();

 private:
  struct CachedPlan {
    core::Plan plan;
    core::RankPlan mine;
  };
  struct Slot;
  struct HeaderSlot;
  struct Incoming;
  struct ReceiveJob;
  struct SendJob;
  /// What this rank sends to itself.
  struct LocalItem {
    Header header;
    std::vector<at::Tensor> boxes;
  };

  enum class Role : std::uint8_t { kSend, kReceive };
  /// This rank's messages in one role; the last plan of each role is kept.
  std::shared_ptr<const CachedPlan> plan_for(const core::Microbatch& microbatch, Role role);
  Header header_for(const core::Microbatch& microbatch, bool no_gradient, bool expects_backward) const;
  void post_headers(const Header& header, SendJob& job);
  bool meets_itself() const;

  std::unique_ptr<Incoming> post_payload(std::int64_t sequence, const core::Microbatch& microbatch,
                                         const std::vector<int>& without_gradient, std::vector<at::Tensor> local_boxes);
  void run_receive(ReceiveJob& job);
  void receive(ReceiveJob& job);
  std::vector<Header> receive_headers(ReceiveJob& job, const LocalItem* local);
  void check_header(const Header& header, int peer, const ReceiveJob& job) const;
  core::Microbatch combine(const std::vector<Header>& headers) const;
  static void finish_slot(Slot& slot, Incoming& incoming);
  LocalItem take_local(std::int64_t sequence);

  /// Posts a message; an error of the transport is told as a BridgeError that names the peer.
  std::unique_ptr<Request> post(bool sending, const at::Tensor& tensor, int peer, int kind, const char* operation,
                                std::int64_t sequence) const;
  void run_send(SendJob& job);
  void wait_for(Waiter& waiter, Request& request, const char* what, int peer, const char* operation,
                std::int64_t sequence) const;
  std::string where(const char* operation, std::int64_t sequence) const;
  const char* send_name() const;
  const char* recv_name() const;
  int tag(int kind) const;

  const BridgeConfig& config_;
  Transport& transport_;
  Failure& failure_;
  const core::Direction direction_;
  const core::Boundary& sender_;
  const core::Boundary& receiver_;
  int sender_lane_ = -1;
  int sender_member_ = -1;
  int receiver_lane_ = -1;
  int receiver_member_ = -1;

  std::int64_t next_send_ = 0;
  std::int64_t next_recv_ = 0;
  std::mutex plan_mutex_;
  std::array<std::shared_ptr<const CachedPlan>, 2> last_plans_;  ///< by role

  std::atomic<bool> receives_aborted_{false};

  std::mutex room_mutex_;
  std::condition_variable room_changed_;
  int in_flight_ = 0;

  std::mutex local_mutex_;
  std::condition_variable local_changed_;
  std::deque<LocalItem> local_;

  Waiter receive_waiter_;
  Waiter send_waiter_;
  std::unique_ptr<Worker> receive_worker_;
  std::unique_ptr<Worker> send_worker_;
};

}  // namespace mimo_ext::comm
