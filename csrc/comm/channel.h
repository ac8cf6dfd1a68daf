// One direction of one bridge on one rank: carries out the plan of each microbatch.
//
// Threads. The caller's thread posts. What is received is waited for, forwarded to the replicas of the lane and
// completed either by the caller, when it blocks for this very microbatch and nothing is ahead of it (a message to
// another thread and back costs more than a small transfer), or by a worker, so that receives posted ahead make
// progress while the caller computes. A second worker waits for sends, some time after they were posted: nothing
// depends on that but the release of their storage. Workers exist only where the rank has that role, never touch
// Python, and process microbatches in order.
//
// Staged tensors (of a device, over a process group of the host): what is sent is copied to host memory by the device,
// and posted by a third worker when it is there; headers, whose contents the host knows, go at once. What is received
// is put together in host memory as above, and then copied to the device. Nobody but the third worker waits for copies.
//
// Messages in groups (rounds.h): the caller issues them, a worker only looks whether sends are complete. A receive that
// is posted ahead is carried out when somebody waits for it: the device would be kept busy by it.
//
// Order of messages between two ranks: headers, payload and lane copies have a tag each, and each tag's messages are
// posted by one thread at a time in the order of the plan, microbatch after microbatch, on both sides.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "comm/config.h"
#include "comm/delivery.h"
#include "comm/errors.h"
#include "comm/fifo.h"
#include "comm/flight.h"
#include "comm/group_log.h"
#include "comm/group_transport.h"
#include "comm/header.h"
#include "comm/last_words.h"
#include "comm/program.h"
#include "comm/remains.h"
#include "comm/staging.h"
#include "comm/telemetry.h"
#include "comm/transport.h"
#include "comm/waiter.h"
#include "comm/worker.h"

namespace mimo_ext::comm {

/// A header on the wire, its row counts, or what follows it unasked.
struct HeaderSlot {
  std::vector<at::Tensor> tensor;
  Request request;
};

/// Not thread-safe: send() and recv() are called by one thread at a time. What the constructor is given outlives the
/// channel.
class Channel {
 public:
  Channel(const BridgeConfig& config, Transport& transport, Failure& failure, Counters& counters, Trace& trace,
          FlightRecorder& flight, core::Direction direction, GroupLog& group_log, GroupTransport* groups = nullptr);
  ~Channel();

  bool is_sender() const { return sender_lane_ >= 0; }
  bool is_receiver() const { return receiver_lane_ >= 0; }

  /// This rank's messages of a microbatch; a few programs are kept. With static shapes the argument is not looked at.
  /// Throws std::invalid_argument.
  std::shared_ptr<SendProgram> send_program(const core::Microbatch& microbatch);
  std::shared_ptr<ReceiveProgram> receive_program(const core::Microbatch& microbatch);

  /// Enqueues all messages of one microbatch and returns without waiting for any peer. Holds `x`'s storage until they
  /// are gone. An undefined `x` says that there is no gradient. The delivery (where one is wanted) ends when the
  /// storage is free again.
  std::shared_ptr<Delivery> send(std::shared_ptr<SendProgram> program, const at::Tensor& x, bool expects_backward,
                                 std::int64_t forward_sequence, bool want_delivery);
  /// Fewer than max_in_flight microbatches are being sent? Waits up to `limit` for it.
  bool wait_for_room(std::chrono::milliseconds limit);
  /// What has been sent is looked after now: somebody waits for it.
  void hurry_sends();
  /// Every receiver of this send is known to have it: what it holds is let go of here and now, without a worker.
  void end_answered(std::int64_t sequence);
  /// Does whoever is sent a part of `program`'s microbatch send something back, in the direction of `back`? Then this
  /// many bytes, else -1.
  std::int64_t answer_bytes(const SendProgram& program, Channel& back) const;

  struct Expected {
    /// Backward: what the forward microbatch was; null: no forward microbatch has been sent yet (or this is forward).
    std::shared_ptr<const core::Microbatch> known;
    std::int64_t forward_sequence = 0;                  ///< its number; Header::kUnpaired where none has been sent
    std::shared_ptr<const core::RowShards> row_shards;  ///< forward: which rows the receiver's ranks use
  };
  /// Posts the receives of the next microbatch: of its headers, or with static shapes of its payload. A worker takes it
  /// from there: at once, or where the caller is about to wait for it, a little later.
  std::shared_ptr<Delivery> recv(Expected expected, bool waits_soon);
  /// The same, carried out here as far as possible. Returns when the operation has ended. `poll` is called every 100 ms
  /// and may throw: the receive then goes on by itself.
  /// `posted` is called once the receive counts, whatever becomes of it.
  std::shared_ptr<Delivery> recv_now(Expected expected, const std::function<void()>& poll,
                                     const std::function<void(const std::shared_ptr<Delivery>&)>& posted);

  /// Carries out a receive that no worker has begun, if it is the next one; as recv_now.
  void take_over(const Delivery& delivery, const std::function<void()>& poll);

  /// What tells why a peer is gone, and takes the receives that are still posted at the end. Outlive the channel.
  void set_end(LastWords* last_words, Remains* remains) {
    last_words_ = last_words;
    remains_ = remains;
  }
  /// Tells whoever waits for a header that none will come, and why; waits for that until `deadline` at most. After it
  /// nothing is sent. Who waits for anything else, hears it by LastWords.
  void give_up(const std::string& reason, std::chrono::steady_clock::time_point deadline);
  /// The receive that is under way looks whether one of its peers has died. From any thread.
  void nudge_receives() { receive_waiter_.nudge(); }
  /// The send that is waited for looks whether its receiver has given up. From any thread.
  void nudge_sends() { send_waiter_.nudge(); }
  /// Gives up the receives that are under way, and those only. From the thread that uses the channel.
  void abort_receives();
  /// Is a microbatch being sent?
  bool sending();
  /// Buffers that received microbatches have been put together in for their device, so far.
  std::int64_t host_buffers() const { return host_pool_ ? host_pool_->allocations() : 0; }

  /// Messages in groups: carries out the receives that nobody has waited for. Before close().
  void drain(const std::function<void()>& poll);
  /// Messages in groups: throws BridgeError where a send cannot end before its receive on this very rank.
  void check_not_deferred(std::int64_t sequence) const;

  /// Waits for everything that is under way (each wait has its timeout), then ends the workers. After a failure: at
  /// once.
  void close();
  /// The same, up to `limit`; false where something is still under way. Nothing can be sent or received after it.
  bool close_within(std::chrono::milliseconds limit);

 private:
  struct HeaderPeer {
    int rank;
    int index;
    int lane;  ///< of the receiver
  };
  struct Issued;
  struct Flying;
  struct SendJob;
  struct Outcome;
  struct ReceiveJob;
  /// What this rank sends to itself.
  struct LocalItem {
    Header header;
    std::vector<at::Tensor> boxes;
  };

  // Sending.
  Header header_for(const core::Microbatch& microbatch, bool no_gradient, bool expects_backward) const;
  /// Of the rows that two lanes share; 0 where all of them go to every rank.
  std::uint64_t row_shards_hash(const core::Microbatch& microbatch, int sender_lane, int receiver_lane) const;
  void post_headers(Header& header, const core::Microbatch& microbatch, SendJob& job);
  void post_messages(SendJob& job);
  void push_local(LocalItem local);
  void run_send(std::unique_ptr<SendJob> job);

  // Staged.
  /// Enqueues the copies of what is sent.
  void stage_out(SendJob& job, const at::Tensor& x, LocalItem& local);
  /// The third worker's part of a send.
  void run_staged_send(std::unique_ptr<SendJob> job, Worker::When when);
  /// Enqueues the copy of what was received, and makes `tensor` the one that it fills.
  std::shared_ptr<Copy> stage_in(ReceiveJob& job, at::Tensor& tensor);
  /// Lets go of what copies to the device have used; waits up to `limit` for those that are under way. False: for more.
  bool reap_landed(std::chrono::milliseconds limit);

  // In groups. Every rank issues rounds in ascending order; see rounds.h.
  using Messages = std::vector<GroupTransport::Message>;
  void add_sends(SendJob& job, std::size_t round, Messages& messages) const;
  void add_receives(ReceiveJob& job, std::size_t round, Messages& messages) const;
  /// Without a request where there are no messages.
  Issued issue(const Messages& messages, const char* operation, std::int64_t sequence);
  /// "...: group of messages with ranks 1, 2"
  std::string group_text(const Issued& issued, const char* operation, std::int64_t sequence) const;
  void wait_for_group(Waiter& waiter, Issued& issued, FlightPhase phase, std::uint64_t flight, const char* operation,
                      std::int64_t sequence, const std::function<void()>& poll) const;
  void issue_sends(SendJob& job);
  /// With the sends of the same microbatch, where this rank has some.
  void take_own(ReceiveJob& job);
  void receive_in_rounds(ReceiveJob& job, const std::function<void()>& poll);
  void issue_rounds(ReceiveJob& job, const std::function<void()>& poll);
  void wait_for_round(ReceiveJob& job, const std::function<void()>& poll);
  /// Whether the stream of the caller has a part in this round: after it, before it.
  bool unpacks(const ReceiveJob& job, std::size_t round) const;
  bool packs(const ReceiveJob& job, std::size_t round) const;
  void finish_round(ReceiveJob& job);
  void flush_deferred();
  /// The worker's part of a send.
  void wait_for_sent(SendJob& job);
  /// The buffers of a microbatch go back to its program when its messages are complete.
  void keep_until_complete(ReceiveJob& job);
  /// False where some are still under way.
  bool reap_flying();

  void submit_send(std::unique_ptr<SendJob> job, Worker::When when);
  /// For what cannot be waited for in a way that ends when the bridge does. `what` begins messages.
  void poll_until(const std::function<bool()>& complete, const std::string& what) const;

  // Receiving: every step may be left by Interrupted and entered again.
  std::unique_ptr<ReceiveJob> post_receive(Expected expected);
  void queue_receive(std::unique_ptr<ReceiveJob> job, Worker::When when);
  void run_queued_receives();
  /// In the caller's thread, while it has the turn.
  void drive(std::unique_ptr<ReceiveJob> job, const std::function<void()>& poll);
  /// Tells the outcome when all that the receive has used is free again.
  void end_receive(std::unique_ptr<ReceiveJob> job);
  /// What it has used is there for the next one.
  void recycle(std::unique_ptr<ReceiveJob> job);
  /// Ends the delivery, well or not, or throws Interrupted.
  void run_receive(ReceiveJob& job, const std::function<void()>& poll);
  void receive(ReceiveJob& job, const std::function<void()>& caller);
  void receive_headers(ReceiveJob& job, const std::function<void()>& poll);
  void check_header(const Header& header, int peer, const ReceiveJob& job) const;
  /// What the headers describe. Posts the receives of the payload unless no sender has a gradient.
  std::shared_ptr<const core::Microbatch> agree(ReceiveJob& job);
  void check_gradient(const ReceiveJob& job, const core::Microbatch& microbatch) const;
  core::Microbatch combine(const std::vector<Header>& headers) const;
  /// Both sides must have dealt the rows that they share in the same way.
  void check_row_shards(const ReceiveJob& job, const core::Microbatch& microbatch) const;
  void post_payload(ReceiveJob& job, const core::Microbatch& microbatch, std::vector<int> without_gradient);
  void post_receives(ReceiveJob& job);
  /// The tensor in which a microbatch is put together.
  at::Tensor new_result(ReceiveJob& job);
  /// Posts the receive of one transfer; false where nothing is to be waited for.
  bool post_part(ReceiveJob& job, const Transfer& transfer, Slots& slots, std::size_t index, int kind);
  /// Posts the receives of what begins the microbatch after those that are expected, its headers and their eager
  /// payload, as far as they are not posted yet. `receive` posts one. Holds `ahead_mutex_`.
  template <typename Receive>
  void post_next(const Receive& receive);
  /// The caller asks for that microbatch: its headers are `job`'s.
  void expect_next(ReceiveJob& job);
  /// Posts them before anybody asks for it: in a pipeline whoever asks has just sent something of its own, behind which
  /// what announces a receive to its sender would wait at the network card.
  void announce_next();
  /// The oldest of them is this microbatch's.
  void take_eager(ReceiveJob& job, std::size_t header);
  std::size_t header_of(const Transfer& transfer) const;
  void check_announced(const ReceiveJob& job) const;
  void receive_payload(ReceiveJob& job, const std::function<void()>& poll);
  /// Writes what has arrived beside the tensor into it.
  void unpack_stage(ReceiveJob& job, const ReceiveOrder::Stage& stage);
  /// Throws where a message has failed whose turn to be waited for has not come: its sender died while another one is
  /// awaited, who may be busy for long.
  void look_around(ReceiveJob& job) const;
  void deliver(ReceiveJob& job, at::Tensor tensor, std::shared_ptr<const core::Microbatch> microbatch);
  LocalItem take_local(std::int64_t sequence, const std::function<void()>& poll);

  /// Posts a message; an error of the transport is told as a BridgeError that names the peer.
  Request post(bool sending, std::vector<at::Tensor>& tensor, int index, int peer, int kind, const char* operation,
               std::int64_t sequence) const;
  /// Of operation `id` of the flight recorder.
  void wait_for(Waiter& waiter, Request& request, FlightPhase phase, int peer, std::uint64_t id, const char* operation,
                std::int64_t sequence, const std::function<void()>& poll) const;
  BridgeError connection_broke(FlightPhase phase, int peer, const char* operation, std::int64_t sequence,
                               const TransportError& error) const;
  /// What the one behind a broken connection has said before; empty where that is nothing.
  std::string last_words_of(int peer) const;
  /// Who is waited for, by the thread that waits.
  struct Awaited {
    int peer = -1;
    bool gave_up = false;  ///< was seen once: what it sent before has had its time to come
  };
  /// Throws where the one that is waited for has given up: over connections that other bridges share, and keep, no
  /// message fails.
  void check_awaited(Awaited& awaited, const char* operation, std::int64_t sequence) const;
  std::string where(const char* operation, std::int64_t sequence) const;
  const char* send_name() const;
  const char* recv_name() const;
  int tag(int kind) const;
  template <typename Program>
  std::shared_ptr<Program> program_for(const core::Microbatch& microbatch, std::pair<int, int> place,
                                       std::vector<std::shared_ptr<Program>>& programs);
  std::shared_ptr<Delivery> new_delivery(bool is_send, std::int64_t sequence);

  const BridgeConfig& config_;
  Transport& transport_;
  Failure& failure_;
  Counters& counters_;
  Trace& trace_;
  FlightRecorder& flight_;
  const core::Direction direction_;
  const core::Boundary& sender_;
  const core::Boundary& receiver_;
  int sender_lane_ = -1;
  int sender_member_ = -1;
  int receiver_lane_ = -1;
  int receiver_member_ = -1;
  bool meets_itself_ = false;
  std::vector<HeaderPeer> header_receivers_;  ///< whom this rank tells
  std::vector<HeaderPeer> header_senders_;    ///< who tells this rank, one per sender lane; may be itself

  std::int64_t next_send_ = 0;
  std::int64_t next_recv_ = 0;
  std::mutex programs_mutex_;
  std::vector<std::shared_ptr<SendProgram>> send_programs_;  ///< the newest last
  std::vector<std::shared_ptr<ReceiveProgram>> receive_programs_;
  Pool<SendJob> send_jobs_;
  Pool<ReceiveJob> receive_jobs_;
  std::vector<std::shared_ptr<Delivery>> send_deliveries_;
  std::vector<std::shared_ptr<Delivery>> receive_deliveries_;

  std::atomic<bool> receives_aborted_{false};
  LastWords* last_words_ = nullptr;
  Remains* remains_ = nullptr;
  mutable Awaited received_from_;
  mutable Awaited sent_to_;

  // What is received before it is known what comes.
  std::mutex ahead_mutex_;
  /// Of the next microbatch that is asked for; posted where there is a request.
  std::vector<HeaderSlot> next_headers_;
  std::int64_t eager_bytes_ = 0;  ///< of each eager receive; 0: there are none
  /// By header sender, in the order in which they were posted. What is not announced waits for the next microbatch:
  /// there are at least as many as microbatches whose headers have not come.
  std::vector<Fifo<HeaderSlot>> eager_;
  std::vector<std::vector<at::Tensor>> eager_free_;
  std::size_t headers_expected_ = 0;

  // Receives are carried out one after the other, by whoever has the turn.
  std::mutex queue_mutex_;
  Fifo<std::unique_ptr<ReceiveJob>> queued_;
  bool turn_taken_ = false;

  std::mutex room_mutex_;
  std::condition_variable room_changed_;
  int in_flight_ = 0;

  std::mutex local_mutex_;
  std::condition_variable local_changed_;
  Fifo<LocalItem> local_;

  /// What a copy to the device uses.
  struct Landed {
    std::shared_ptr<Copy> copy;
    at::Tensor tensor;
    at::Tensor host;
  };
  const std::unique_ptr<Staging> staging_;  ///< null where nothing is staged
  const std::unique_ptr<HostPool> host_pool_;
  std::mutex landed_mutex_;
  std::vector<Landed> landed_;

  // In groups. One thread at a time issues: who has the turn to receive, or else the caller that sends.
  GroupTransport* const groups_;  ///< null where messages go one by one
  GroupLog& group_log_;
  mutable std::mutex groups_mutex_;
  Fifo<std::unique_ptr<SendJob>> deferred_;  ///< of a rank on both sides, until it receives
  Fifo<Flying> flying_;

  Waiter receive_waiter_;
  Waiter send_waiter_;
  std::unique_ptr<Worker> receive_worker_;
  std::unique_ptr<Worker> send_worker_;
  std::atomic<std::int64_t> sends_ended_{0};
  std::unique_ptr<Worker> stage_worker_;
};

}  // namespace mimo_ext::comm
