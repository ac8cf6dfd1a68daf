// What a channel works on. Private to the channel's source files.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "comm/channel.h"

namespace mimo_ext::comm {

inline constexpr int kHeaderTag = 0;
inline constexpr int kPayloadTag = 1;
inline constexpr int kLaneTag = 2;
/// Row counts that do not fit into a header. Their receives are posted when the header has come, those of headers
/// ahead of it, maybe for several microbatches: a tag of their own keeps both in order.
inline constexpr int kRowsTag = 3;
/// The beginning of a payload: its receives are posted together with those of headers.
inline constexpr int kEagerTag = 4;
inline constexpr int kNumTags = 5;
/// After those of both directions.
inline constexpr int kLastWordsTag = 2 * kNumTags;
static_assert(kLastWordsTag < kFirstGroupTag);

/// Messages that have been issued together.
struct Channel::Issued {
  Request request;
  std::vector<int> peers;
};

struct Channel::SendJob {
  std::int64_t sequence = 0;
  std::uint64_t flight = 0;  ///< its entry in the flight recorder
  std::shared_ptr<SendProgram> program;
  std::unique_ptr<Slots> payload;      ///< null where there is no gradient
  std::vector<at::Tensor> words;       ///< encoded headers, one per lane of the receiver
  std::vector<HeaderSlot> headers;     ///< one per receiver
  std::vector<HeaderSlot> row_counts;  ///< likewise, where they do not fit into a header
  // Staged:
  std::shared_ptr<Copy> copy;  ///< to the host
  at::Tensor source;           ///< until that is complete
  LocalItem local;
  std::vector<Issued> issued;  ///< in groups
  std::shared_ptr<Delivery> delivery;
  Times times;
};

/// What a receive that went well hands out.
struct Channel::Outcome {
  at::Tensor tensor;
  std::shared_ptr<const core::Microbatch> microbatch;
  bool expects_backward = false;
  std::int64_t bytes = 0;
  std::shared_ptr<Copy> copy;
};

struct Channel::ReceiveJob {
  std::int64_t sequence = 0;
  std::uint64_t flight = 0;  ///< its entry in the flight recorder
  Expected expected;
  bool expects_backward = true;
  std::vector<HeaderSlot> headers;  ///< one per sender lane; no request where the sender is this rank
  std::vector<Header> parsed;       ///< as far as they have come
  std::vector<HeaderSlot> eager;    ///< by header, where the beginning of the payload is announced
  HeaderSlot row_counts;
  bool has_local = false;
  LocalItem local;
  std::optional<c10::Stream> stream;  ///< staged: what is received will belong to it
  Staging::Landing landing;
  // In groups:
  std::unique_ptr<SendJob> own;   ///< the same microbatch, where this rank is on both sides
  std::size_t round = 0;          ///< that is next, or being waited for
  bool round_issued = false;      ///< the latter
  Issued issued;                  ///< of this round
  std::vector<Issued> under_way;  ///< of earlier rounds
  std::shared_ptr<ReceiveProgram> program;
  std::unique_ptr<ReceiveProgram::Incoming> incoming;
  std::shared_ptr<Delivery> delivery;
  std::optional<Outcome> outcome;  ///< until it is told
  Times times;
};

/// What a microbatch that has been handed out still uses.
struct Channel::Flying {
  std::vector<Issued> issued;
  std::int64_t sequence = 0;
  std::chrono::steady_clock::time_point deadline;
  std::shared_ptr<ReceiveProgram> program;
  std::unique_ptr<ReceiveProgram::Incoming> incoming;
};

}  // namespace mimo_ext::comm
