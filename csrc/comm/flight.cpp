#include "comm/flight.h"

#include <algorithm>

namespace mimo_ext::comm {

namespace {

// A slot's `progress`: peer + 1 (32 bits), outcome, phase and kind (8 bits each).
constexpr unsigned kOutcomeShift = 16;
constexpr unsigned kPhaseShift = 8;
constexpr unsigned kPeerShift = 32;
constexpr std::uint64_t kByte = 0xff;
constexpr std::uint64_t kSend = 1;
constexpr std::uint64_t kForward = 2;

std::uint64_t packed(FlightPhase phase, int peer) {
  return static_cast<std::uint64_t>(static_cast<std::uint32_t>(peer + 1)) << kPeerShift |
         static_cast<std::uint64_t>(phase) << kPhaseShift;
}

}  // namespace

const char* text_of(FlightPhase phase) {
  switch (phase) {
    case FlightPhase::kPosted:
      break;
    case FlightPhase::kHeader:
      return "header from";
    case FlightPhase::kRowCounts:
      return "row counts from";
    case FlightPhase::kPayload:
      return "payload from";
    case FlightPhase::kLaneCopyFrom:
      return "lane copy from";
    case FlightPhase::kLaneCopyTo:
      return "lane copy to";
    case FlightPhase::kMessage:
      return "message to";
    case FlightPhase::kItself:
      return "a send of this rank itself";
  }
  return nullptr;
}

std::uint64_t FlightRecorder::record(bool is_send, bool is_forward, std::int64_t microbatch, std::int64_t bytes,
                                     std::int64_t now) {
  const std::uint64_t id = last_.load(std::memory_order_relaxed) + 1;
  Slot& at = slot(id);
  at.id.store(0, std::memory_order_relaxed);
  // Releases: whoever reads one of these sees that the slot is being written.
  at.microbatch.store(microbatch, std::memory_order_release);
  at.bytes.store(bytes, std::memory_order_release);
  at.posted.store(now, std::memory_order_release);
  at.since.store(now, std::memory_order_release);
  at.progress.store(packed(FlightPhase::kPosted, -1) | (is_send ? kSend : 0U) | (is_forward ? kForward : 0U),
                    std::memory_order_release);
  at.id.store(id, std::memory_order_release);
  last_.store(id, std::memory_order_release);
  return id;
}

void FlightRecorder::set_bytes(std::uint64_t id, std::int64_t bytes) {
  Slot& at = slot(id);
  if (at.id.load(std::memory_order_relaxed) == id) at.bytes.store(bytes, std::memory_order_relaxed);
}

void FlightRecorder::update(std::uint64_t id, FlightPhase phase, int peer, std::int64_t now) {
  Slot& at = slot(id);
  if (at.id.load(std::memory_order_relaxed) != id) return;
  const std::uint64_t kind = at.progress.load(std::memory_order_relaxed) & kByte;
  at.since.store(now, std::memory_order_relaxed);
  at.progress.store(kind | packed(phase, peer), std::memory_order_relaxed);
}

void FlightRecorder::retire(std::uint64_t id, bool failed, std::int64_t now) {
  Slot& at = slot(id);
  if (at.id.load(std::memory_order_relaxed) != id) return;
  const std::uint64_t progress = at.progress.load(std::memory_order_relaxed);
  const auto outcome = static_cast<std::uint64_t>(failed ? FlightOutcome::kFailed : FlightOutcome::kDone);
  const std::uint64_t kept = failed ? progress : (progress & kByte);
  at.since.store(now, std::memory_order_relaxed);
  at.progress.store((kept & ~(kByte << kOutcomeShift)) | outcome << kOutcomeShift, std::memory_order_relaxed);
}

std::vector<FlightEntry> FlightRecorder::entries() const {
  const std::uint64_t last = last_.load(std::memory_order_acquire);
  std::vector<FlightEntry> found;
  found.reserve(std::min<std::uint64_t>(last, kCapacity));
  for (std::uint64_t id = last - std::min<std::uint64_t>(last, kCapacity) + 1; id <= last; ++id) {
    const Slot& at = ring_[id % kCapacity];
    if (at.id.load(std::memory_order_acquire) != id) continue;  // a newer one is taking its place
    FlightEntry& entry = found.emplace_back();
    entry.id = id;
    entry.microbatch = at.microbatch.load(std::memory_order_acquire);
    entry.bytes = at.bytes.load(std::memory_order_acquire);
    entry.posted = at.posted.load(std::memory_order_acquire);
    entry.since = at.since.load(std::memory_order_acquire);
    const std::uint64_t progress = at.progress.load(std::memory_order_acquire);
    if (at.id.load(std::memory_order_relaxed) != id) {
      found.pop_back();
      continue;
    }
    entry.is_send = (progress & kSend) != 0;
    entry.is_forward = (progress & kForward) != 0;
    entry.phase = static_cast<FlightPhase>((progress >> kPhaseShift) & kByte);
    entry.outcome = static_cast<FlightOutcome>((progress >> kOutcomeShift) & kByte);
    // A done operation's bits say peer 0, hence -1.
    entry.peer = static_cast<int>(progress >> kPeerShift) - 1;
  }
  return found;
}

FlightCaller FlightRecorder::caller() const {
  const std::uint64_t bits = caller_.load(std::memory_order_acquire);
  FlightCaller caller;
  caller.in = static_cast<FlightCaller::In>(bits & 7U);
  caller.is_forward = (bits & 8U) != 0;
  caller.microbatch = static_cast<std::int64_t>(bits >> 4U);
  caller.since = caller_since_.load(std::memory_order_relaxed);
  return caller;
}

FlightRecorder::Blocked::Blocked(FlightRecorder& recorder, FlightCaller::In in, bool is_forward,
                                 std::int64_t microbatch, std::int64_t now)
    : recorder_(recorder) {
  recorder_.caller_since_.store(now, std::memory_order_relaxed);
  recorder_.caller_.store(
      static_cast<std::uint64_t>(microbatch) << 4U | (is_forward ? 8U : 0U) | static_cast<std::uint64_t>(in),
      std::memory_order_release);
}

FlightRecorder::Blocked::~Blocked() {
  recorder_.caller_.store(0, std::memory_order_relaxed);
}

}  // namespace mimo_ext::comm
