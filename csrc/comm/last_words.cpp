#include "comm/last_words.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <set>
#include <thread>

#include "comm/channel_jobs.h"
#include "core/plan.h"

namespace mimo_ext::comm {

namespace {

/// For what has been sent, but was read off another connection than the one that broke.
constexpr std::chrono::milliseconds kGrace{100};
constexpr std::chrono::milliseconds kGlance{2};

/// Everybody who may send something to `rank`, or receive something from it: with both directions the same.
std::set<int> peers_of(const BridgeConfig& config, int rank) {
  std::set<int> peers;
  const auto add = [&](const core::Boundary& mine, const core::Boundary& other) {
    const int lane = mine.find(rank).first;
    if (lane < 0) return;
    const auto& members = mine.lanes[static_cast<std::size_t>(lane)];
    peers.insert(members.begin(), members.end());
    const auto [first, last] = core::Plan::lanes_met(lane, mine.num_lanes(), other.num_lanes());
    for (int met = first; met < last; ++met) {
      const auto& others = other.lanes[static_cast<std::size_t>(met)];
      peers.insert(others.begin(), others.end());
    }
  };
  add(config.source, config.destination);
  add(config.destination, config.source);
  peers.erase(rank);
  return peers;
}

std::vector<at::Tensor> message() {
  return {at::zeros({static_cast<std::int64_t>(Header::kWords)}, at::kLong)};
}

}  // namespace

void settle(std::vector<Request> requests, std::chrono::steady_clock::time_point deadline) {
  if (requests.empty()) return;
  constexpr std::chrono::seconds kInterruptedBefore{60};
  std::mutex mutex;
  std::condition_variable changed;
  bool settled = false;
  std::thread alarm([&] {
    std::unique_lock lock(mutex);
    if (changed.wait_until(lock, deadline, [&settled] { return settled; })) return;
    for (Request& request : requests) request.interrupt();
  });
  for (Request& request : requests) {
    try {
      request.wait(kInterruptedBefore);
    } catch (const std::exception&) {
      continue;  // the peer is gone
    }
  }
  {
    const std::lock_guard lock(mutex);
    settled = true;
  }
  changed.notify_one();
  alarm.join();
}

LastWords::LastWords(const BridgeConfig& config, Transport& transport)
    : transport_(transport), tag_(config.tag_offset + kLastWordsTag) {
  const std::set<int> peers = peers_of(config, transport.rank());
  speakers_.reserve(peers.size());
  for (const int rank : peers) {
    Speaker& speaker = speakers_.emplace_back(Speaker{rank, transport.index_of(rank), message(), {}, {}});
    try {
      speaker.request = transport.recv(speaker.tensor, speaker.index, tag_);
    } catch (const TransportError&) {
      continue;  // it has come and gone; whoever waits for it will be told
    }
  }
}

void LastWords::say(const std::string& reason, std::chrono::steady_clock::time_point deadline) {
  Header header;
  header.gave_up = reason.empty() ? "no reason was given" : reason;
  const Header::Words words = header.encode();
  std::vector<at::Tensor> tensor = message();
  std::copy(words.begin(), words.end(), tensor.front().data_ptr<std::int64_t>());
  std::vector<Request> requests;
  for (const Speaker& peer : speakers_) {
    try {
      requests.push_back(transport_.send(tensor, peer.index, tag_));
    } catch (const std::exception&) {
      continue;  // it is gone
    }
  }
  settle(std::move(requests), deadline);  // who does not answer hears it by the end of the connection
}

void LastWords::listen(Speaker& speaker) {
  if (!speaker.request) return;
  auto* data = speaker.tensor.front().mutable_data_ptr<std::int64_t>();
  // The transport cannot be asked whether a message is there; its first word can. The rest follows at once.
  if (std::atomic_ref<std::int64_t>(*data).load(std::memory_order_relaxed) != Header::kMagic) return;
  try {
    if (!speaker.request.wait(std::chrono::seconds(1))) return;
    Header::Words words{};
    std::copy_n(data, Header::kWords, words.begin());
    speaker.reason = Header::decode(words).gave_up;
  } catch (const std::exception&) {
    // The connection has ended in the middle of it.
  }
  speaker.request.reset();
}

std::string LastWords::heard_from(int peer) {
  const std::lock_guard lock(mutex_);
  const auto speaker =
      std::find_if(speakers_.begin(), speakers_.end(), [peer](const Speaker& other) { return other.rank == peer; });
  if (speaker == speakers_.end()) return {};
  listen(*speaker);
  return speaker->reason.empty() ? "" : "rank " + std::to_string(peer) + " gave up: " + speaker->reason;
}

std::string LastWords::heard_at_the_end_of(int peer) {
  const auto deadline = std::chrono::steady_clock::now() + kGrace;
  for (;;) {
    std::string text = heard_from(peer);
    if (!text.empty() || std::chrono::steady_clock::now() > deadline) return text;
    std::this_thread::sleep_for(kGlance);
  }
}

}  // namespace mimo_ext::comm
