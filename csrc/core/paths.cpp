#include "core/paths.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "core/limits.h"

namespace mimo_ext::core {

namespace {

constexpr std::int64_t kNanosPerMilli = 1'000'000;

/// Integers that stop at the largest one: the model must have a result for every load and all links.
struct Amount {
  std::int64_t value = 0;

  constexpr Amount(std::int64_t of) : value(of) {}  // NOLINT: a number is an amount
  friend constexpr Amount operator+(Amount a, Amount b) { return saturating_add(a.value, b.value); }
  friend constexpr Amount operator*(Amount a, Amount b) { return saturating_mul(a.value, b.value); }
  friend constexpr Amount operator-(Amount a, Amount b) { return a.value - b.value; }  // of values >= 0
  friend constexpr Amount operator/(Amount a, Amount b) { return a.value / b.value; }
  friend constexpr auto operator<=>(Amount, Amount) = default;
};

Amount ceil_div(Amount dividend, Amount divisor) {
  return (dividend + divisor - 1) / divisor;
}

/// Nanoseconds that `bytes` take at `speed` bytes per second.
Amount nanos(Amount bytes, std::int64_t speed) {
  constexpr std::int64_t kExact = std::int64_t{1} << 43;  // bytes that cannot overflow below
  const Amount per_milli = std::max<std::int64_t>(1, speed / 1000);
  return bytes < kExact ? bytes * kNanosPerMilli / per_milli : bytes / per_milli * kNanosPerMilli;
}

/// The number of chunks of a part of `bytes` that is forwarded, and the time that `in_chunks` gives it.
template <typename Time>
std::pair<int, std::int64_t> best_chunks(Amount bytes, const PlanOptions& options, const Time& in_chunks) {
  int chunks = options.chunking.chunks_of(bytes.value);
  Amount least = in_chunks(chunks);
  for (int fewer = chunks / 2; options.links && fewer > 0; fewer /= 2) {
    if (const Amount nanoseconds = in_chunks(fewer); nanoseconds < least) {
      least = nanoseconds;
      chunks = fewer;
    }
  }
  return {chunks, least.value};
}

}  // namespace

const char* to_string(Path path) {
  switch (path) {
    case Path::kPipelined:
      return "pipelined";
    case Path::kLeader:
      return "leader";
    case Path::kDirect:
      return "direct";
    case Path::kAuto:
      break;
  }
  return "auto";
}

Path parse_path(const std::string& name) {
  for (auto path : {Path::kAuto, Path::kPipelined, Path::kLeader, Path::kDirect}) {
    if (name == to_string(path)) return path;
  }
  throw std::invalid_argument("path: expected 'auto', 'pipelined', 'leader' or 'direct', got '" + name + "'");
}

void Links::check() const {
  const auto bad = [](const std::string& what, std::int64_t got, const char* unit) {
    throw std::invalid_argument("links: " + what + ", got " + std::to_string(got) + unit);
  };
  const std::string limit = " must be at most " + std::to_string(kMaxLinkValue);
  for (const auto& [name, value] : {std::pair{"bandwidth nic", nic}, std::pair{"bandwidth host", host}}) {
    if (value < 1) bad(std::string(name) + " must be positive", value, " bytes/s");
    if (value > kMaxLinkValue) bad(name + limit, value, " bytes/s");
  }
  for (const auto& [name, value] : {std::pair{"latency", latency_ns}, std::pair{"overhead", overhead_ns},
                                    std::pair{"ranks_per_host", std::int64_t{ranks_per_host}}}) {
    if (value < 0) bad(std::string(name) + " must not be negative", value, "");
    if (value > kMaxLinkValue) bad(name + limit, value, "");
  }
}

int Chunking::chunks_of(std::int64_t bytes) const {
  return static_cast<int>(std::clamp<std::int64_t>(bytes / min_bytes, 1, max_chunks));
}

void PlanOptions::check() const {
  if (chunking.max_chunks < 1 || chunking.max_chunks > kMaxChunks || chunking.min_bytes < 1) {
    throw std::invalid_argument("chunks: expected 1.." + std::to_string(kMaxChunks) + " of positive size, got " +
                                std::to_string(chunking.max_chunks) + " of " + std::to_string(chunking.min_bytes) +
                                " bytes");
  }
  if (links) links->check();
}

std::int64_t PathTimes::of(Path path) const {
  switch (path) {
    case Path::kPipelined:
      return pipelined;
    case Path::kLeader:
      return leader;
    case Path::kDirect:
      return direct;
    case Path::kAuto:
      break;
  }
  return of(best());
}

Path PathTimes::best() const {
  return *std::min_element(kPaths.begin(), kPaths.end(), [this](Path a, Path b) { return of(a) < of(b); });
}

PathTimes times_of(const PathLoad& load, const PlanOptions& options) {
  const Links links = options.links.value_or(Links{});
  const std::int64_t first_link = load.same_host ? links.host : links.nic;
  const Amount far = load.far_replicas;
  const Amount replicas = load.replicas;
  const Amount incoming = Amount{load.sender_lanes} * load.contributions;
  const Amount of_shard = ceil_div(load.bytes, load.receiver_shards);
  // What one replica asks of one sender shard, and how many of these it asks, where nothing is cut further.
  const Amount request = ceil_div(load.bytes, std::max(load.sender_shards, load.receiver_shards));
  const Amount asked = std::max<Amount>(1, ceil_div(load.sender_shards, load.receiver_shards));
  const Amount asking = std::max<Amount>(1, ceil_div(load.receiver_shards, load.sender_shards));
  const auto time = [&links](Amount wire, Amount messages, Amount rounds) {
    return wire + messages * links.overhead_ns + rounds * links.latency_ns;
  };
  // While one chunk is on the wire, the messages of the others are dealt with.
  const auto hidden = [&links](Amount wire, Amount messages, Amount chunks) {
    return std::min(wire, messages * links.overhead_ns) / chunks * (chunks - 1);
  };
  PathTimes times;

  {
    const Amount received = incoming * asked;
    const Amount sent = ceil_div(load.receiver_lanes * replicas * asking, load.senders);
    const Amount bytes = std::max(incoming * of_shard, sent * request);
    times.direct = time(nanos(bytes, first_link), std::max(received, sent), 1).value;
  }
  {
    // Overlaps of one receiver lane have different leaders.
    const Amount led = ceil_div(load.sender_lanes, replicas);
    const Amount received = led * load.contributions * asked;
    const Amount sent = ceil_div(load.receiver_lanes * asking, load.senders);
    const Amount bytes = std::max(led * load.contributions * of_shard, sent * request);
    const Amount copied = led * (replicas - 1);
    const Amount copies = replicas > 1 ? copied + load.sender_lanes - load.sender_lanes / replicas : 0;
    const Amount near_bytes = std::max(led * (replicas - 1 - far), replicas > 1 ? Amount{load.sender_lanes} : 0);
    const Amount first = nanos(bytes, first_link);
    const Amount then = std::max(nanos(near_bytes * of_shard, links.host), nanos(led * far * of_shard, links.nic));
    const auto in_chunks = [&](Amount chunks) {
      const Amount wire = std::max(first, then) + std::min(first, then) / chunks;
      const Amount messages = chunks * std::max(received + copies, sent);
      return time(wire, messages, replicas > 1 ? 2 : 1) - hidden(std::max(first, then), messages, chunks);
    };
    std::tie(times.leader_chunks, times.leader) = best_chunks(replicas > 1 ? of_shard : 0, options, in_chunks);
  }
  {
    const Amount group = load.group > 0 ? load.group : replicas;
    const Amount lanes_taken = ceil_div(load.sender_lanes * group, replicas);  // by each replica
    const Amount incoming_parts = lanes_taken * load.contributions;
    const Amount parts = load.receiver_shards * group;
    const Amount sender_parts = Amount{load.sender_shards} * load.senders;
    const Amount part = ceil_div(load.bytes, parts);
    const Amount bytes = std::max(incoming_parts * part, load.receiver_lanes * ceil_div(load.bytes, sender_parts));
    // Each chunk is forwarded to all other replicas, while theirs come in.
    const Amount copies = lanes_taken * (replicas - 1);
    const Amount first = nanos(bytes, first_link);
    const Amount near_copies = nanos(lanes_taken * (replicas - 1 - far) * part, links.host);
    const Amount far_copies = nanos(lanes_taken * far * part, links.nic);
    const auto in_chunks = [&](Amount chunks) {
      const Amount received = incoming_parts * std::max(chunks, ceil_div(sender_parts, parts));
      const Amount sent = load.receiver_lanes * std::max<Amount>(1, ceil_div(chunks * parts, sender_parts));
      const Amount wire =
          std::max(first + far_copies, near_copies) + std::min(first, near_copies + far_copies) / chunks;
      const Amount messages = std::max(received + 2 * copies * chunks, sent);
      return time(wire, messages, replicas > 1 ? 2 : 1) - hidden(std::max(first, near_copies), messages, chunks);
    };
    std::tie(times.chunks, times.pipelined) = best_chunks(replicas > 1 ? part : 0, options, in_chunks);
  }
  return times;
}

}  // namespace mimo_ext::core
