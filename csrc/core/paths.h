// Which way an overlap takes to the replicas of its receivers, chosen by a model of the links.
//
// Both ends of an overlap choose by themselves and must choose the same: the model is integer arithmetic over what both
// know (the overlap, the two lanes, the links that all ranks were given), so it has one result on every machine.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>

namespace mimo_ext::core {

enum class Path : std::uint8_t {
  kAuto,       ///< the one of the others that the model finds fastest
  kPipelined,  ///< each replica receives an equal part, from all senders, and forwards it chunk by chunk
  kDirect,     ///< every replica receives everything from one sender; senders take turns, nothing is forwarded
  kLeader,     ///< one replica receives everything, from one sender, and forwards it whole
};

inline constexpr std::array kPaths{Path::kPipelined, Path::kDirect, Path::kLeader};

const char* to_string(Path path);
/// Inverse of to_string; throws std::invalid_argument for an unknown name.
Path parse_path(const std::string& name);

/// What the model takes the links of every rank to be. Must be equal on all ranks. The defaults are gloo over Ethernet.
struct Links {
  std::int64_t nic = 1'000'000'000;   ///< bytes per second of a rank's network card, each way
  std::int64_t host = 4'000'000'000;  ///< bytes per second between ranks of one host, each way
  std::int64_t latency_ns = 30'000;   ///< until a message of no bytes has arrived
  std::int64_t overhead_ns = 20'000;  ///< that a message keeps its sender and its receiver busy, besides its bytes
  /// Consecutive ranks on one host. 0: not known; then lanes are taken to be inside a host each, and any two lanes to
  /// be on different ones.
  int ranks_per_host = 0;

  /// Throws std::invalid_argument for bandwidths that are not positive, and negative times.
  void check() const;
  bool operator==(const Links&) const = default;
};

/// Into how many chunks the part of a receiver is cut that it forwards to its replicas. Must be equal on all ranks.
struct Chunking {
  int max_chunks = 8;                               ///< more did not help in measurements; 1: no chunks
  std::int64_t min_bytes = std::int64_t{64} << 10;  ///< of a chunk: below, the number of messages decides

  /// Of a part of so many bytes; at least 1.
  int chunks_of(std::int64_t bytes) const;
  bool operator==(const Chunking&) const = default;
};

/// How plans are made, besides what they are for. Must be equal on all ranks.
struct PlanOptions {
  Chunking chunking;
  Path path = Path::kAuto;
  /// Where they are known, the number of chunks is the model's choice too. Otherwise it follows from the bytes alone:
  /// one chunk too many costs a message, one too few a part of the transfer.
  std::optional<Links> links;

  /// Throws std::invalid_argument for values out of range.
  void check() const;
  bool operator==(const PlanOptions&) const = default;
};

/// One overlap of a sender lane and a receiver lane, as the model sees it.
struct PathLoad {
  std::int64_t bytes = 0;   ///< of the overlap, each element once
  int contributions = 1;    ///< partial gradients that the receivers add up
  int senders = 1;          ///< replicas of each sender shard (of one contribution)
  int sender_shards = 1;    ///< different parts that the senders hold
  int replicas = 1;         ///< of each receiver shard
  int receiver_shards = 1;  ///< different parts that the receivers hold
  int receiver_lanes = 1;   ///< that this sender lane meets: each of its ranks sends to all of them
  int sender_lanes = 1;     ///< that this receiver lane meets
  int far_replicas = 0;     ///< of a receiver, on other hosts
  bool same_host = false;   ///< both lanes are on one host
  /// Of the replicas that share what one sender lane sends: all of them, or where equal overlaps come from several
  /// lanes, as many as each lane can have for itself. One sender then serves one receiver.
  int group = 0;  ///< 0: all of them
};

/// Modelled nanoseconds until every overlap of the two lanes has arrived, were all like this one, by path.
struct PathTimes {
  std::int64_t pipelined = 0;
  std::int64_t leader = 0;
  std::int64_t direct = 0;
  int chunks = 1;         ///< of each part that is pipelined
  int leader_chunks = 1;  ///< of what a leader forwards

  std::int64_t of(Path path) const;
  /// The fastest; of equals the one that is named first above.
  Path best() const;
  bool operator==(const PathTimes&) const = default;
};

PathTimes times_of(const PathLoad& load, const PlanOptions& options);

}  // namespace mimo_ext::core
