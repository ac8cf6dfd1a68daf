// The flight recorder: what a bridge did last, for whoever asks why nothing happens.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <vector>

namespace mimo_ext::comm {

/// What an operation waits for. Only the first that is missing is known: waits go in the order of the plan.
enum class FlightPhase : std::uint8_t {
  kPosted,  ///< nobody has begun to wait
  kHeader,
  kRowCounts,
  kPayload,
  kLaneCopyFrom,
  kLaneCopyTo,
  kMessage,  ///< of a send, until its receiver has it
  kItself,   ///< a rank on both sides, for its own send
};
enum class FlightOutcome : std::uint8_t { kRunning, kDone, kFailed };

/// "payload from"; nullptr where nothing is waited for.
const char* text_of(FlightPhase phase);

/// One operation. Nanoseconds of std::chrono::steady_clock.
struct FlightEntry {
  std::uint64_t id = 0;  ///< operations of a bridge count from 1
  bool is_send = false;
  bool is_forward = false;
  std::int64_t microbatch = 0;
  std::int64_t bytes = 0;  ///< payload, as far as it is known
  std::int64_t posted = 0;
  std::int64_t since = 0;  ///< when the wait began, or the operation ended
  FlightPhase phase = FlightPhase::kPosted;
  FlightOutcome outcome = FlightOutcome::kRunning;
  int peer = -1;  ///< that is waited for (failed: was waited for); -1: none
};

/// What blocks the caller of a bridge.
struct FlightCaller {
  enum class In : std::uint8_t {
    kNothing,
    kReceive,
    kSend,   ///< a handle of a send, or close()
    kRoom,   ///< max_in_flight microbatches are on their way
    kClose,  ///< everything that is under way
  };
  In in = In::kNothing;
  bool is_forward = false;
  std::int64_t microbatch = 0;
  std::int64_t since = 0;
};

/// The last operations of one bridge, in a ring of fixed size: always on, a few stores per operation and message, no
/// locks and no allocation.
///
/// Thread safety: record() and block() are called by the thread that uses the bridge, update() and retire() by whoever
/// carries the operation out, entries() by anyone. An operation that was overtaken by a whole ring is forgotten. What
/// is read while it changes may mix two moments of the same operation.
class FlightRecorder {
 public:
  static constexpr std::size_t kCapacity = 256;

  /// A new operation; its id. `now`: when it was posted.
  std::uint64_t record(bool is_send, bool is_forward, std::int64_t microbatch, std::int64_t bytes, std::int64_t now);
  void set_bytes(std::uint64_t id, std::int64_t bytes);
  /// The operation waits for `peer`.
  void update(std::uint64_t id, FlightPhase phase, int peer, std::int64_t now);
  /// The operation has ended. Where it has failed, what it waited for is kept.
  void retire(std::uint64_t id, bool failed, std::int64_t now);

  /// The oldest first.
  std::vector<FlightEntry> entries() const;
  FlightCaller caller() const;

  /// While it lives, the caller is blocked.
  class Blocked {
   public:
    Blocked(FlightRecorder& recorder, FlightCaller::In in, bool is_forward, std::int64_t microbatch, std::int64_t now);
    ~Blocked();
    Blocked(const Blocked&) = delete;
    Blocked& operator=(const Blocked&) = delete;

   private:
    FlightRecorder& recorder_;
  };

 private:
  /// One cache line.
  struct alignas(64) Slot {
    std::atomic<std::uint64_t> id{0};  ///< 0: being written
    std::atomic<std::int64_t> microbatch{0};
    std::atomic<std::int64_t> bytes{0};
    std::atomic<std::int64_t> posted{0};
    std::atomic<std::int64_t> since{0};
    std::atomic<std::uint64_t> progress{0};  ///< kind, phase, outcome and peer
  };
  Slot& slot(std::uint64_t id) { return ring_[id % kCapacity]; }

  std::array<Slot, kCapacity> ring_;
  std::atomic<std::uint64_t> last_{0};
  std::atomic<std::uint64_t> caller_{0};  ///< microbatch, direction and what blocks
  std::atomic<std::int64_t> caller_since_{0};
};

}  // namespace mimo_ext::comm
