// Carries out bridges on all of their ranks in one thread, under the least helpful network there is: a message moves
// when both ends have posted it, never before.
//
// The model, which is that of csrc/comm (whose orders of messages, comm/transfers.h, are used as they are):
//
// * A message belongs to a stream (sender, receiver, tag). The n-th message that is sent in a stream meets the n-th
// that
//   is received, and both end when both are posted: a rendezvous. Nothing is buffered. Tags differ by bridge,
//   direction and kind (header, row counts, payload, lane copy). What meets must be the same message, of the same
//   microbatch and size.
// * A rank has a caller, which runs a script of sends, posts of receives, and waits. A send posts all of its messages
//   and returns; it waits only while `in_flight` earlier microbatches of its channel have not ended. With static shapes
//   a post posts the receives of the payload and of the lane's copies, else those of the headers. A header's message
//   may hold a small payload; the beginning of a larger one may follow it unasked, for which each sender has a receive
//   posted ahead: one for every microbatch whose headers have not come. (In csrc/comm a receive that ends posts those
//   of the next microbatch's headers, and of what may follow them, before the caller does. Here it does not: the
//   network is less helpful yet, and who ends here ends there.)
// * Every channel (a direction of a bridge on a rank) has a worker that ends its sends in order, and one that carries
//   out its receives, one microbatch after the other: what this rank sends to itself, headers, then the payload stage
//   by stage; each stage that has come is forwarded to the replicas; then the lane's copies, in order; and at last the
//   ends of its own forwards. (In csrc/comm the caller may take a receive over from the worker. It does the same in the
//   same order, and waits meanwhile, as the caller does here.)
//
// Every wait is for one given event, nothing asks "which came first", and each stream has one poster at each end. So
// what happened does not depend on the order in which ranks run (Kahn's networks), and one run to its end shows that
// all runs end; `order` lets tests see that it is so.
#pragma once

#include <coroutine>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "comm/transfers.h"
#include "setting.h"

namespace mimo_ext::properties {

using Values = std::vector<std::int64_t>;

/// What one rank does with one direction of a bridge, for every microbatch in turn.
struct ChannelOrders {
  std::string name;  ///< for messages
  int id = 0;        ///< of bridge and direction: equal at both ends
  bool fixed = false;
  std::int64_t window = 0;  ///< elements of receives that are posted at a time where senders take turns; 0: all
  std::int64_t in_flight = 32;
  std::vector<int> headers_to;    ///< ranks
  std::int64_t eager_bytes = 0;   ///< that may follow a header unasked
  std::vector<int> headers_from;  ///< one per sender lane that is met; may be this rank
  int first_sender_lane = 0;      ///< of those
  bool meets_itself = false;
  /// By microbatch; null where the rank is no sender, or no receiver.
  std::vector<std::shared_ptr<const comm::SendOrder>> sends;
  std::vector<std::shared_ptr<const comm::ReceiveOrder>> receives;
  bool row_counts = false;                            ///< do they follow each header?
  std::function<bool(int sender_lane)> has_gradient;  ///< null: all have
  bool sends_nothing = false;                         ///< this rank has none
  /// What is sent, and what has come (nothing where no lane has a gradient). Null: no values, sizes only.
  std::function<Values(std::size_t microbatch)> tensor;
  std::function<void(std::size_t microbatch, const std::optional<Values>&)> received;
};

/// Of a rank on a bridge between two boundaries: whom it tells, and who tells it (comm/channel.cpp).
void find_header_peers(const core::Boundary& sender, const core::Boundary& receiver, int rank, ChannelOrders& orders);

class Simulator {
 public:
  enum class Order : std::uint8_t { kFirst, kLast, kRandom };
  enum class Do : std::uint8_t { kSend, kPost, kWait };
  struct Step {
    Do what;
    std::size_t channel;  ///< as add_channel returned it
  };

  explicit Simulator(Order order = Order::kFirst, std::uint64_t seed = 0) : order_(order), random_(seed) {}
  ~Simulator();
  Simulator(const Simulator&) = delete;
  Simulator& operator=(const Simulator&) = delete;

  /// `orders` outlives the simulator.
  std::size_t add_channel(int rank, const ChannelOrders& orders);
  void add_caller(int rank, std::vector<Step> script);
  /// Until nothing moves. Throws std::runtime_error saying who waits for what where not everything has ended, where
  /// two messages meet that are not the same, and where one is left over.
  void run();
  std::size_t messages() const { return messages_; }

 private:
  struct Event {
    bool done = false;
    std::vector<std::coroutine_handle<>> waiters;
  };
  struct Slot {
    Event ended;
    const comm::Transfer* transfer = nullptr;  ///< null: a header, or row counts
    std::int64_t microbatch = 0;
    int id = 0;
    Values* tensor = nullptr;
    Values staged;
    std::int64_t volume = 0;  ///< of this message; less than the transfer's where its beginning has gone ahead
  };
  struct Job {
    Event begun;
    Event ended;
    std::deque<Slot> headers;
    std::deque<Slot> row_counts;
    std::deque<Slot> eager;         ///< sent ahead
    std::vector<Slot*> begun_with;  ///< by header: what has come ahead
    std::vector<Slot> payload;      ///< or what is received
    std::vector<Slot> lane_sends;
    std::vector<Slot> lane_receives;
    Values tensor;
    std::vector<Values> local;  ///< what this rank sends to itself
    std::size_t posted = 0;
    std::int64_t volume = 0;
  };
  struct Channel {
    int rank = 0;
    const ChannelOrders* orders = nullptr;
    std::vector<std::unique_ptr<Job>> sends;
    std::vector<std::unique_ptr<Job>> receives;
    std::size_t sent = 0;
    std::size_t posted = 0;
    std::size_t waited = 0;
    std::size_t headers_expected = 0;
    std::vector<std::deque<Slot*>> eager;  ///< by header sender: posted, and not announced yet
  };
  struct Thread {
    struct promise_type {
      std::exception_ptr error;
      std::string waits_for;
      Thread get_return_object() { return {std::coroutine_handle<promise_type>::from_promise(*this)}; }
      std::suspend_always initial_suspend() noexcept { return {}; }
      std::suspend_always final_suspend() noexcept { return {}; }
      void return_void() {}
      void unhandled_exception() { error = std::current_exception(); }
    };
    std::coroutine_handle<promise_type> handle;
  };
  struct Named {
    Thread thread;
    std::string name;
  };
  struct Wait {
    Event& event;
    const char* what;
    int peer;
    std::int64_t microbatch;
    bool await_ready() const { return event.done; }
    void await_suspend(std::coroutine_handle<Thread::promise_type> handle) const;
    void await_resume() const {}
  };
  using Stream = std::tuple<int, int, int>;  ///< sender, receiver, tag
  struct Posted {
    std::deque<Slot*> sends;
    std::deque<Slot*> receives;
  };
  enum Kind : std::uint8_t { kHeader, kPayload, kLane, kRows, kEager, kKinds };

  Thread run_caller(std::vector<Step> script);
  Thread run_sends(Channel& channel);
  Thread run_receives(Channel& channel);
  void start_send(Channel& channel);
  void post_receive(Channel& channel);
  void post_eager(Channel& channel);
  void post_payload(Channel& channel, Job& job, std::size_t microbatch);
  void post_receives(Channel& channel, Job& job, std::size_t microbatch);
  static std::size_t at_header(const Channel& channel, const comm::Transfer& transfer);
  static bool skips(const Channel& channel, int sender_lane);
  void post(bool sending, Slot& slot, const Channel& channel, int peer, Kind kind, std::size_t microbatch);
  void meet(const Stream& stream, Slot& send, Slot& receive);
  void set(Event& event);

  Order order_;
  Draw random_;
  std::deque<std::coroutine_handle<>> ready_;
  std::deque<Channel> channels_;
  std::deque<Slot> eager_;  ///< all receives of what is sent ahead
  std::deque<Named> threads_;
  std::map<Stream, Posted> streams_;
  std::size_t messages_ = 0;
};

}  // namespace mimo_ext::properties
