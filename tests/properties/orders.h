// What every rank of a bridge sends and receives, each from what it knows itself.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "comm/transfers.h"
#include "setting.h"
#include "simulator.h"

namespace mimo_ext::properties {

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error(what);
}

inline std::size_t at(std::int64_t index) {
  return static_cast<std::size_t>(index);
}

/// A rank's part of one direction, from what it knows itself.
struct Role {
  int rank = 0;
  int lane = 0;
  int member = 0;
  Values elements;  ///< of the global tensor, as it holds them
};

struct Sender : Role {
  std::shared_ptr<const comm::SendOrder> order;
};

struct Receiver : Role {
  std::shared_ptr<const comm::ReceiveOrder> order;
};

struct OneWay {
  core::Direction direction;
  std::vector<Sender> senders;
  std::vector<Receiver> receivers;
};

/// Throws std::invalid_argument where a rank refuses, std::runtime_error where it takes its tensor for another shape.
OneWay orders_of(const Setting& setting, const std::shared_ptr<const core::Sides>& sides, core::Direction direction);

/// Calls visit(offset) for every element of a transfer, in its order.
template <typename Visit>
void each_element(const comm::Transfer& transfer, const Values& shape, const Visit& visit) {
  const std::size_t ndim = shape.size();
  std::int64_t volume = 0;
  std::int64_t first = -1;
  for (std::size_t box = 0; box < transfer.starts.size(); box += ndim) {
    const auto axis = [&](const auto& self, std::size_t index, std::int64_t offset) -> void {
      if (index == ndim) {
        if (first < 0) first = offset;
        if (transfer.in_place && offset != transfer.offset + volume) fail("a transfer in place is not one range");
        ++volume;
        return visit(offset);
      }
      const std::int64_t start = transfer.starts[box + index];
      const std::int64_t size = transfer.sizes[box + index];
      if (start < 0 || size < 1 || start + size > shape[index]) fail("a box outside of the tensor");
      for (std::int64_t place = start; place < start + size; ++place)
        self(self, index + 1, offset * shape[index] + place);
    };
    axis(axis, 0, 0);
  }
  if (volume != transfer.volume) fail("a transfer of another volume than its boxes");
}

/// Inside of each overlap of lanes replicas carry equal parts, on the pipelined path; throws std::runtime_error.
void check_balance(const Setting& setting, const core::Plan& plan);
/// No element crosses between lanes more often than the path says; of sides without common ranks.
void check_economy(const Setting& setting, const OneWay& way);

}  // namespace mimo_ext::properties
