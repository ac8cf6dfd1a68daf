#include "core/paths.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>
#include <utility>

namespace mimo_ext::core {

namespace {

constexpr std::int64_t kNanosPerMilli = 1'000'000;

std::int64_t ceil_div(std::int64_t dividend, std::int64_t divisor) {
  return (dividend + divisor - 1) / divisor;
}

/// Nanoseconds that `bytes` take at `speed` bytes per second.
std::int64_t nanos(std::int64_t bytes, std::int64_t speed) {
  constexpr std::int64_t kExact = std::int64_t{1} << 43;  // bytes that cannot overflow below
  const std::int64_t per_milli = std::max<std::int64_t>(1, speed / 1000);
  return bytes < kExact ? bytes * kNanosPerMilli / per_milli : bytes / per_milli * kNanosPerMilli;
}

/// The number of chunks of a part of `bytes` that is forwarded, and the time that `in_chunks` gives it.
template <typename Time>
std::pair<int, std::int64_t> best_chunks(std::int64_t bytes, const PlanOptions& options, const Time& in_chunks) {
  int chunks = options.chunking.chunks_of(bytes);
  std::int64_t least = in_chunks(chunks);
  for (int fewer = chunks / 2; options.links && fewer > 0; fewer /= 2) {
    if (const std::int64_t nanoseconds = in_chunks(fewer); nanoseconds < least) {
      least = nanoseconds;
      chunks = fewer;
    }
  }
  return {chunks, least};
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
  for (const auto& [name, value] : {std::pair{"nic", nic}, std::pair{"host", host}}) {
    if (value < 1) {
      throw std::invalid_argument(std::string("links: bandwidth ") + name + " must be positive, got " +
                                  std::to_string(value) + " bytes/s");
    }
  }
  for (const auto& [name, value] : {std::pair{"latency", latency_ns}, std::pair{"overhead", overhead_ns},
                                    std::pair{"ranks_per_host", std::int64_t{ranks_per_host}}}) {
    if (value < 0) {
      throw std::invalid_argument(std::string("links: ") + name + " must not be negative, got " +
                                  std::to_string(value));
    }
  }
}

int Chunking::chunks_of(std::int64_t bytes) const {
  return static_cast<int>(std::clamp<std::int64_t>(bytes / min_bytes, 1, max_chunks));
}

void PlanOptions::check() const {
  if (chunking.max_chunks < 1 || chunking.min_bytes < 1) {
    throw std::invalid_argument("chunks: expected a positive number of positive size, got " +
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
  const std::int64_t far = load.far_replicas;
  const std::int64_t replicas = load.replicas;
  const std::int64_t incoming = std::int64_t{load.sender_lanes} * load.contributions;
  const std::int64_t of_shard = ceil_div(load.bytes, load.receiver_shards);
  // What one replica asks of one sender shard, and how many of these it asks, where nothing is cut further.
  const std::int64_t request = ceil_div(load.bytes, std::max(load.sender_shards, load.receiver_shards));
  const std::int64_t asked = std::max<std::int64_t>(1, ceil_div(load.sender_shards, load.receiver_shards));
  const std::int64_t asking = std::max<std::int64_t>(1, ceil_div(load.receiver_shards, load.sender_shards));
  const auto time = [&links](std::int64_t wire, std::int64_t messages, std::int64_t rounds) {
    return wire + links.overhead_ns * messages + links.latency_ns * rounds;
  };
  // While one chunk is on the wire, the messages of the others are dealt with.
  const auto hidden = [&links](std::int64_t wire, std::int64_t messages, std::int64_t chunks) {
    return std::min(wire, links.overhead_ns * messages) / chunks * (chunks - 1);
  };
  PathTimes times;

  {
    const std::int64_t received = incoming * asked;
    const std::int64_t sent = ceil_div(load.receiver_lanes * replicas * asking, load.senders);
    const std::int64_t bytes = std::max(incoming * of_shard, sent * request);
    times.direct = time(nanos(bytes, first_link), std::max(received, sent), 1);
  }
  {
    // Overlaps of one receiver lane have different leaders.
    const std::int64_t led = ceil_div(load.sender_lanes, replicas);
    const std::int64_t received = led * load.contributions * asked;
    const std::int64_t sent = ceil_div(load.receiver_lanes * asking, load.senders);
    const std::int64_t bytes = std::max(led * load.contributions * of_shard, sent * request);
    const std::int64_t copied = led * (replicas - 1);
    const std::int64_t copies = replicas > 1 ? copied + load.sender_lanes - load.sender_lanes / replicas : 0;
    const std::int64_t near_bytes =
        std::max(led * (replicas - 1 - far), replicas > 1 ? std::int64_t{load.sender_lanes} : 0);
    const std::int64_t first = nanos(bytes, first_link);
    const std::int64_t then =
        std::max(nanos(near_bytes * of_shard, links.host), nanos(led * far * of_shard, links.nic));
    const auto in_chunks = [&](std::int64_t chunks) {
      const std::int64_t wire = std::max(first, then) + std::min(first, then) / chunks;
      const std::int64_t messages = chunks * std::max(received + copies, sent);
      return time(wire, messages, replicas > 1 ? 2 : 1) - hidden(std::max(first, then), messages, chunks);
    };
    std::tie(times.leader_chunks, times.leader) = best_chunks(replicas > 1 ? of_shard : 0, options, in_chunks);
  }
  {
    const std::int64_t group = load.group > 0 ? load.group : replicas;
    const std::int64_t lanes_taken = ceil_div(load.sender_lanes * group, replicas);  // by each replica
    const std::int64_t incoming_parts = lanes_taken * load.contributions;
    const std::int64_t parts = load.receiver_shards * group;
    const std::int64_t sender_parts = std::int64_t{load.sender_shards} * load.senders;
    const std::int64_t part = ceil_div(load.bytes, parts);
    const std::int64_t bytes =
        std::max(incoming_parts * part, load.receiver_lanes * ceil_div(load.bytes, sender_parts));
    // Each chunk is forwarded to all other replicas, while theirs come in.
    const std::int64_t copies = lanes_taken * (replicas - 1);
    const std::int64_t first = nanos(bytes, first_link);
    const std::int64_t near_copies = nanos(lanes_taken * (replicas - 1 - far) * part, links.host);
    const std::int64_t far_copies = nanos(lanes_taken * far * part, links.nic);
    const auto in_chunks = [&](std::int64_t chunks) {
      const std::int64_t received = incoming_parts * std::max(chunks, ceil_div(sender_parts, parts));
      const std::int64_t sent = load.receiver_lanes * std::max<std::int64_t>(1, ceil_div(chunks * parts, sender_parts));
      const std::int64_t wire =
          std::max(first + far_copies, near_copies) + std::min(first, near_copies + far_copies) / chunks;
      const std::int64_t messages = std::max(received + 2 * copies * chunks, sent);
      return time(wire, messages, replicas > 1 ? 2 : 1) - hidden(std::max(first, near_copies), messages, chunks);
    };
    std::tie(times.chunks, times.pipelined) = best_chunks(replicas > 1 ? part : 0, options, in_chunks);
  }
  return times;
}

}  // namespace mimo_ext::core
