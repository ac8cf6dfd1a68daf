// The bridge between two modules: both directions of one edge, on one rank.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "comm/channel.h"
#include "comm/config.h"
#include "comm/delivery.h"
#include "comm/fifo.h"
#include "comm/flight.h"
#include "comm/last_words.h"
#include "comm/remains.h"
#include "comm/telemetry.h"
#include "comm/transport.h"

namespace mimo_ext::comm {

/// Thread safety: used by one thread at a time; deliveries may be awaited by others. Lifetime: owns the transport and
/// its worker threads; close() (or the destructor, which aborts) joins them. Tensors given to a send are held until
/// their messages are gone; received tensors belong to the caller.
///
/// Microbatches are matched by order: the n-th recv_forward receives the n-th send_forward, and gradients travel in the
/// order of the forward microbatches that expect one (those sent while autograd recorded). With `unpaired_backward` the
/// n-th gradient may also travel before the n-th of these microbatches, or without it; its rows are then split evenly.
class Communicator : public std::enable_shared_from_this<Communicator> {
 public:
  /// `forward` carries what belongs to the forward direction. Where `backward` is null it carries both. Null on a rank
  /// that is on neither side; every operation then throws.
  /// The groups carry the payload where it goes in groups: with Carrier::kGroups both are given.
  Communicator(BridgeConfig config, std::unique_ptr<Transport> forward, std::unique_ptr<Transport> backward, int rank,
               std::unique_ptr<GroupTransport> forward_groups = nullptr,
               std::unique_ptr<GroupTransport> backward_groups = nullptr);
  ~Communicator();

  bool is_source() const { return forward_ && forward_->is_sender(); }
  bool is_destination() const { return forward_ && forward_->is_receiver(); }
  const BridgeConfig& config() const { return config_; }
  /// How many microbatches may be under way from now on, per direction. What is under way already stays so.
  void set_max_in_flight(int microbatches) { config_.max_in_flight = microbatches; }

  /// Called every 100 ms while an operation blocks its caller; may throw (Python: to honour Ctrl-C).
  void set_interrupt_check(std::function<void()> check) { interrupt_check_ = std::move(check); }

  using RowShards = std::shared_ptr<const core::RowShards>;  ///< null: every rank of the destination gets all rows

  /// x: source lane's tensor (this rank's shard of it). Throws std::invalid_argument before anything is sent;
  /// BridgeError after a failure. Blocks only while max_in_flight earlier microbatches are still being sent. Without
  /// `want_delivery` nothing tells when the storage is free again, and null is returned.
  std::shared_ptr<Delivery> send_forward(const at::Tensor& x,
                                         const std::optional<std::vector<std::int64_t>>& row_counts,
                                         std::optional<std::int64_t> num_samples, const RowShards& row_shards,
                                         bool want_delivery);
  /// The gradient of the oldest received microbatch that expects one; none: undefined (with static shapes zeros
  /// travel).
  std::shared_ptr<Delivery> send_backward(const at::Tensor& gradient, bool want_delivery);
  /// Post a receive and return; a worker carries it out. `waits_soon`: the caller waits for it next, and may then do
  /// so itself.
  std::shared_ptr<Delivery> irecv_forward(const RowShards& row_shards, bool waits_soon);
  std::shared_ptr<Delivery> irecv_backward(bool waits_soon);
  /// Receive here and now. The activation is a leaf that requires grad where both sides want a gradient.
  at::Tensor recv_forward(const RowShards& row_shards);
  at::Tensor recv_backward();
  /// Blocks until `delivery` has ended and hands out its tensor, once; rethrows its error.
  at::Tensor wait(Delivery& delivery);

  /// Of one direction.
  Counters& counters(bool is_forward) { return is_forward ? forward_counters_ : backward_counters_; }
  Trace& trace() { return trace_; }
  GroupLog& group_log() { return group_log_; }
  const FlightRecorder& flight() const { return flight_; }
  bool failed() const { return failure_.failed(); }
  /// Staged: buffers that received microbatches have been put together in, so far; both directions.
  std::int64_t host_buffers() const { return forward_ ? forward_->host_buffers() + backward_->host_buffers() : 0; }

  /// Forward microbatches whose gradient has not been asked for yet: {as source, as destination}.
  std::pair<std::size_t, std::size_t> outstanding() const { return {sent_.size(), received_.size()}; }

  /// The plan of the last forward microbatch (or of the static one), if there is one.
  std::optional<core::Plan> last_plan() const;

  /// Waits for what is under way, then joins the threads and drops the transport. `abort`: does not wait; peers that
  /// wait for this rank learn the `reason`, where there is one. Idempotent. Rethrows a failure that no operation has
  /// told, and what the interrupt check throws: the rest then does not wait.
  void close(bool abort, const std::string& reason = {});
  bool closed() const { return closed_; }
  /// To be held by whoever keeps the connections after close(); null after it.
  std::shared_ptr<Remains> remains() const { return remains_; }

  /// Closes without waiting: receives are given up, sends go on in the background (see Leftovers). For a communicator
  /// that nobody will use again.
  void leave();
  /// The background's part of leave(): returns when the sends have ended, at most a timeout later.
  void finish_sends();
  /// Ends finish_sends() at once. From any thread.
  void abort_sends();

 private:
  /// How often a caller that waits looks for Ctrl-C.
  static constexpr std::chrono::milliseconds kInterruptPeriod{100};

  /// While a caller is inside of an operation: notes that the failure has been told.
  class Telling;

  void check_open(bool needed, const char* operation, const char* role) const;
  void wait_for_room(Channel& channel, bool is_forward, const char* operation);
  void check_process(const char* operation) const;
  /// Lets go of the channels and the connections.
  void disconnect();
  /// True in a process that was forked off after the construction.
  bool forked() const;
  /// There: lets go of everything without touching it.
  void abandon();
  std::string where(const char* operation) const;

  BridgeConfig config_;
  const int rank_;
  const std::uint64_t generation_;
  std::unique_ptr<Transport> forward_transport_;
  std::unique_ptr<Transport> backward_transport_;  ///< null: the same as forward
  std::unique_ptr<GroupTransport> forward_groups_;
  std::unique_ptr<GroupTransport> backward_groups_;
  std::unique_ptr<LastWords> last_words_;
  std::shared_ptr<Remains> remains_ = std::make_shared<Remains>();
  Failure failure_;
  bool told_ = false;  ///< an operation has thrown the failure
  Counters forward_counters_;
  Counters backward_counters_;
  Trace trace_;
  GroupLog group_log_;
  FlightRecorder flight_;
  std::unique_ptr<Channel> forward_;
  std::unique_ptr<Channel> backward_;
  using Known = std::shared_ptr<const core::Microbatch>;
  struct Sent {
    std::int64_t sequence = 0;  ///< forward microbatches are counted on both sides
    Known microbatch;
    std::int64_t answer_bytes = -1;  ///< see SendProgram
  };
  struct Received {
    std::int64_t sequence = 0;
    std::shared_ptr<Delivery> delivery;  ///< null once it has ended: the tensor is not held
    Known microbatch;
    bool expects_backward = false;

    bool ended();
  };
  core::Microbatch microbatch_of_gradient(const at::Tensor& gradient);
  core::Microbatch microbatch_of_activation(const at::Tensor& x,
                                            const std::optional<std::vector<std::int64_t>>& row_counts,
                                            std::optional<std::int64_t> num_samples, const RowShards& row_shards);
  Channel::Expected expected_forward(const RowShards& row_shards);
  Channel::Expected expected_backward();
  void note_received(const std::shared_ptr<Delivery>& delivery);
  void note_backward_posted();
  at::Tensor finish(Delivery& delivery, std::int64_t began);
  /// What the caller enqueues from now on comes after the copy.
  void order_after(Copy& copy, const Delivery& delivery);
  /// Microbatches that their sender does not want a gradient for (it ran under no_grad) are passed over.
  void skip_without_backward();

  Fifo<Sent> sent_;                     ///< expecting a gradient
  Fifo<Received> received_;             ///< possibly expecting one
  std::int64_t unpaired_receives_ = 0;  ///< gradients received ahead of the microbatches that will expect them
  std::int64_t unpaired_sends_ = 0;     ///< gradients sent ahead of them
  std::int64_t num_sent_ = 0;
  std::int64_t num_received_ = 0;
  Known last_;
  std::function<void()> interrupt_check_;
  bool closed_ = false;
};

}  // namespace mimo_ext::comm
