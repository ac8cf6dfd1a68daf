// Why a rank gives up, for all ranks that exchange something with it, whatever they wait for.
#pragma once

#include <chrono>
#include <mutex>
#include <string>
#include <vector>

#include "comm/config.h"
#include "comm/transport.h"

namespace mimo_ext::comm {

/// Waits for all of them, until `deadline` at most. What is not complete then is dropped; the connections, which a wait
/// that times out would close for everybody, stay.
void settle(std::vector<Request> requests, std::chrono::steady_clock::time_point deadline);

/// A receive from each rank that this one may wait for, posted once and for all: what such a rank says when it gives up
/// is here before its connection ends. It is looked at when a wait has failed, or lasts long. Thread-safe.
class LastWords {
 public:
  /// Of all ranks that this one exchanges something with over the bridge.
  LastWords(const BridgeConfig& config, Transport& transport);

  /// Tells all of them, and waits for that until `deadline` at most.
  void say(const std::string& reason, std::chrono::steady_clock::time_point deadline);
  /// "rank 3 gave up: ...": what `peer` has said; empty where that is nothing.
  std::string heard_from(int peer);
  /// The same, after a connection to `peer` has broken: waits a little for words that came over another one.
  std::string heard_at_the_end_of(int peer);

 private:
  struct Speaker {
    int rank;
    int index;
    std::vector<at::Tensor> tensor;
    Request request;
    std::string reason;
  };
  /// Takes what has come, if something has.
  static void listen(Speaker& speaker);

  Transport& transport_;
  const int tag_;
  std::mutex mutex_;
  std::vector<Speaker> speakers_;
};

}  // namespace mimo_ext::comm
