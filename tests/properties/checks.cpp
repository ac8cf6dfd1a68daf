#include "checks.h"

#include <algorithm>
#include <map>
#include <set>
#include <stdexcept>
#include <tuple>

#include "core/hash.h"
#include "orders.h"
#include "reference.h"
#include "simulator.h"

namespace mimo_ext::properties {

namespace {

using core::Direction;

/// The messages of two ranks in their order: kind, chunk, contribution, elements.
using Line = std::vector<std::tuple<int, int, Values>>;
using Lines = std::map<std::tuple<int, int, int>, Line>;  ///< by kind, sender, receiver

void add_lines(Lines& lines, int kind, bool sending, const Role& role, const std::vector<comm::Transfer>& transfers,
               const Values& shape) {
  for (const comm::Transfer& transfer : transfers) {
    Values elements;
    each_element(transfer, shape, [&](std::int64_t offset) { elements.push_back(role.elements.at(at(offset))); });
    const int from = sending ? role.rank : transfer.peer;
    const int to = sending ? transfer.peer : role.rank;
    if (transfer.local != (from == to)) fail("local, and between two ranks");
    lines[{kind, from, to}].emplace_back(transfer.chunk, transfer.contribution, std::move(elements));
  }
}

void check_agreement(const OneWay& way) {
  Lines sent;
  Lines received;
  for (const Sender& sender : way.senders)
    add_lines(sent, 0, true, sender, sender.order->transfers, sender.order->shape);
  for (const Receiver& receiver : way.receivers) {
    const comm::ReceiveOrder& order = *receiver.order;
    add_lines(received, 0, false, receiver, order.receives, order.shape);
    add_lines(sent, 1, true, receiver, order.lane_sends, order.shape);
    add_lines(received, 1, false, receiver, order.lane_receives, order.shape);
  }
  for (const Lines* lines : {&sent, &received}) {
    for (const auto& [key, line] : *lines) {
      const auto ours = sent.find(key);
      const auto theirs = received.find(key);
      if (ours != sent.end() && theirs != received.end() && ours->second == theirs->second) continue;
      const auto& [kind, from, to] = key;
      fail(std::string("agreement: ") + (kind == 0 ? "payload" : "lane copies") + " of rank " + std::to_string(from) +
           " to rank " + std::to_string(to) + ": " + std::to_string(ours == sent.end() ? 0 : ours->second.size()) +
           " messages sent, " + std::to_string(theirs == received.end() ? 0 : theirs->second.size()) +
           " expected, or other elements in them");
    }
  }
}

void check_coverage(const Setting& setting, const OneWay& way) {
  const bool forward = way.direction == Direction::kForward;
  const auto contributions = at(forward ? 1 : num_gradients(setting));
  for (const Receiver& receiver : way.receivers) {
    const comm::ReceiveOrder& order = *receiver.order;
    std::vector<std::vector<int>> written(contributions + 1, std::vector<int>(receiver.elements.size()));
    const auto count = [&](const std::vector<comm::Transfer>& transfers, bool copies) {
      for (const comm::Transfer& transfer : transfers) {
        const std::size_t row = copies ? contributions : at(transfer.contribution);
        if (row > contributions || (row == contributions && !copies)) fail("coverage: a contribution too many");
        each_element(transfer, order.shape, [&](std::int64_t offset) { ++written[row][at(offset)]; });
      }
    };
    count(order.receives, false);
    count(order.lane_receives, true);
    for (std::size_t element = 0; element < receiver.elements.size(); ++element) {
      const int copied = written[contributions][element];
      for (std::size_t row = 0; row < contributions; ++row) {
        if (written[row][element] + copied == 1) continue;
        fail("coverage: element " + std::to_string(element) + " of rank " + std::to_string(receiver.rank) +
             ": contribution " + std::to_string(row) + " comes " + std::to_string(written[row][element]) +
             " times, copies " + std::to_string(copied) + " times");
      }
    }
  }
}

void check_reversal(const core::Plan& plan, const core::Plan& back) {
  if (!(plan.reversed() == back) || !(back.reversed() == plan)) fail("reversal: not an involution");
  if (plan.reversed().hash() != back.hash() || plan.reversed().reversed().hash() != plan.hash()) {
    fail("reversal: equal plans with different hashes");
  }
  if (plan == back || plan.hash() == back.hash()) fail("reversal: both directions are the same");
}

std::int64_t activation(std::size_t microbatch, std::int64_t element) {
  return static_cast<std::int64_t>(microbatch + 1) * 10'007 + element * 31 + 5;
}

std::int64_t gradient(std::size_t microbatch, std::int64_t element, std::int64_t copy) {
  return static_cast<std::int64_t>(microbatch + 1) * 1'009 + element * 17 + (copy + 1) * 1'000'003 +
         element * element * copy;
}

/// Runs all microbatches on all ranks, and compares values.
class Run {
 public:
  Run(const Setting& setting, const core::Sides& sides, const OneWay& forward, const OneWay& backward)
      : setting_(setting), sides_(sides), ways_{&forward, &backward} {}

  std::size_t operator()(Simulator::Order order) {
    Simulator simulator(order, 1);
    add_channels(simulator, false);
    add_channels(simulator, true);
    for (const auto& [rank, channels] : channels_) add_caller(simulator, rank, channels);
    simulator.run();
    for (const auto& [key, times] : due_) {
      if (times != 0) fail("values: something was not received");
    }
    if (setting_.none == 0) check_adjoint();
    return simulator.messages();
  }

 private:
  struct Channels {
    std::optional<std::size_t> send[2];     ///< by direction
    std::optional<std::size_t> receive[2];  ///< likewise; the same channel where the rank is on both sides
  };

  void add_channels(Simulator& simulator, bool backward) {
    const OneWay& way = *ways_[backward ? 1 : 0];
    const core::Boundary& from = backward ? sides_.destination() : sides_.source();
    const core::Boundary& to = backward ? sides_.source() : sides_.destination();
    std::map<int, ChannelOrders*> by_rank;
    const auto orders_of = [&](int rank) -> ChannelOrders& {
      if (const auto found = by_rank.find(rank); found != by_rank.end()) return *found->second;
      ChannelOrders& orders = orders_.emplace_back();
      by_rank[rank] = &orders;
      orders.name = backward ? "backward" : "forward";
      orders.id = backward ? 1 : 0;
      orders.fixed = setting_.fixed != 0;
      orders.window = std::max<std::int64_t>(1, (std::int64_t{1} << 20) / setting_.element);
      orders.in_flight = setting_.in_flight;
      orders.row_counts = setting_.samples > 4 && setting_.told != 0;
      find_header_peers(from, to, rank, orders);
      if (backward) {
        orders.has_gradient = [this](int lane) { return setting_.has_gradient(lane); };
      }
      return orders;
    };
    for (const Sender& sender : way.senders) {
      ChannelOrders& orders = orders_of(sender.rank);
      orders.sends.assign(at(setting_.microbatches), sender.order);
      orders.sends_nothing = backward && !setting_.has_gradient(sender.lane);
      const std::int64_t copy = gradient_of(setting_, sender.member);
      orders.tensor = [&sender, backward, copy](std::size_t microbatch) {
        Values values;
        for (std::int64_t element : sender.elements) {
          values.push_back(backward ? gradient(microbatch, element, copy) : activation(microbatch, element));
        }
        return values;
      };
    }
    for (const Receiver& receiver : way.receivers) {
      ChannelOrders& orders = orders_of(receiver.rank);
      orders.receives.assign(at(setting_.microbatches), receiver.order);
      due_[{backward, receiver.rank}] = setting_.microbatches;
      orders.received = [this, &receiver, backward](std::size_t microbatch, const std::optional<Values>& values) {
        --due_[{backward, receiver.rank}];
        backward ? receive_gradient(receiver, microbatch, values) : receive_activation(receiver, microbatch, values);
      };
    }
    for (const auto& [rank, orders] : by_rank) {
      const std::size_t channel = simulator.add_channel(rank, *orders);
      if (!orders->sends.empty()) channels_[rank].send[backward ? 1 : 0] = channel;
      if (!orders->receives.empty()) channels_[rank].receive[backward ? 1 : 0] = channel;
    }
  }

  void add_caller(Simulator& simulator, int rank, const Channels& channels) {
    std::vector<Simulator::Step> script;
    const auto both = [&](int direction) {
      if (channels.send[direction]) script.push_back({Simulator::Do::kSend, *channels.send[direction]});
      if (channels.receive[direction]) {
        script.push_back({Simulator::Do::kPost, *channels.receive[direction]});
        script.push_back({Simulator::Do::kWait, *channels.receive[direction]});
      }
    };
    for (std::int64_t microbatch = 0; microbatch < setting_.microbatches; ++microbatch) {
      both(0);
      if (setting_.turns != 0) both(1);
    }
    for (std::int64_t microbatch = 0; setting_.turns == 0 && microbatch < setting_.microbatches; ++microbatch) both(1);
    simulator.add_caller(rank, std::move(script));
  }

  void compare(const Receiver& receiver, const char* what, std::size_t index, std::int64_t got, std::int64_t expected) {
    if (got == expected) return;
    fail(std::string("values: ") + what + " of rank " + std::to_string(receiver.rank) + ": element " +
         std::to_string(index) + ": expected " + std::to_string(expected) + ", got " + std::to_string(got));
  }

  void receive_activation(const Receiver& receiver, std::size_t microbatch, const std::optional<Values>& values) {
    if (!values) fail("values: no activation");
    if (values->size() != receiver.elements.size()) fail("values: an activation of another size");
    const std::int64_t copy = gradient_of(setting_, receiver.member);
    for (std::size_t index = 0; index < values->size(); ++index) {
      const std::int64_t element = receiver.elements[index];
      compare(receiver, "activation", index, (*values)[index], activation(microbatch, element));
      activations_[{copy, element}] = (*values)[index];
    }
  }

  void receive_gradient(const Receiver& receiver, std::size_t microbatch, const std::optional<Values>& values) {
    // Lanes of the destination that this one meets, and which of its elements come from lanes without a gradient.
    const std::int64_t copies = num_gradients(setting_);
    if (!values && setting_.none == 0) fail("values: no gradient");
    if (values && values->size() != receiver.elements.size()) fail("values: a gradient of another size");
    for (std::size_t index = 0; index < receiver.elements.size(); ++index) {
      const std::int64_t element = receiver.elements[index];
      std::int64_t expected = 0;
      if (setting_.has_gradient(lane_of(element))) {
        for (std::int64_t copy = 0; copy < copies; ++copy) expected += gradient(microbatch, element, copy);
        if (!values) fail("values: no gradient where a lane has one");
      }
      if (!values) continue;
      compare(receiver, "gradient", index, (*values)[index], expected);
      gradients_[element] = (*values)[index];
    }
  }

  /// Of the destination.
  std::int64_t lane_of(std::int64_t element) const {
    std::int64_t sample = 0;
    if (setting_.is_3d()) {
      sample = element / (setting_.seq * setting_.hidden);
    } else {
      const std::int64_t row = element / setting_.hidden;
      while (setting_.rows_of(0, sample + 1) <= row) ++sample;
    }
    std::int64_t lane = 0;
    while (setting_.samples * (lane + 1) / setting_.dst.lanes <= sample) ++lane;
    return lane;
  }

  /// Of the last microbatch: each cp copy of the destination counts, tp replicas count once.
  void check_adjoint() const {
    const auto last = at(setting_.microbatches - 1);
    std::int64_t left = 0;
    for (const auto& [key, value] : activations_) left += value * gradient(last, key.second, key.first);
    std::int64_t right = 0;
    for (const auto& [element, value] : gradients_) right += value * activation(last, element);
    if (left != right) fail("adjointness: <Ax, y> = " + std::to_string(left) + ", <x, A'y> = " + std::to_string(right));
  }

  const Setting& setting_;
  const core::Sides& sides_;
  const OneWay* ways_[2];
  std::deque<ChannelOrders> orders_;
  std::map<int, Channels> channels_;
  std::map<std::pair<bool, int>, std::int64_t> due_;
  std::map<std::pair<std::int64_t, std::int64_t>, std::int64_t> activations_;  ///< by copy and element
  std::map<std::int64_t, std::int64_t> gradients_;
};

}  // namespace

Outcome check(const Setting& setting) {
  if (!setting.valid()) throw std::invalid_argument("not a valid setting");
  Outcome outcome;
  const auto sides = std::make_shared<const core::Sides>(setting.source(), setting.destination());
  const core::Plan plan(sides, setting.microbatch(), Direction::kForward, setting.options());
  const core::Plan back(sides, setting.microbatch(), Direction::kBackward, setting.options());
  core::Fnv fnv;
  for (const core::Plan* one : {&plan, &back}) fnv.add(static_cast<std::int64_t>(one->hash()));
  outcome.hash = fnv.value();
  check_reversal(plan, back);
  std::optional<OneWay> ways[2];
  try {
    for (const Direction direction : {Direction::kForward, Direction::kBackward}) {
      ways[static_cast<int>(direction)] = orders_of(setting, sides, direction);
    }
  } catch (const std::invalid_argument& error) {
    const bool may = !setting.is_3d() && setting.fixed == 0 && (setting.src.sharded() || setting.dst.sharded());
    if (!may) fail(std::string("refused: ") + error.what());
    outcome.refused = true;
    return outcome;
  }
  for (const auto& way : ways) {
    check_agreement(*way);
    check_coverage(setting, *way);
    if (sides->disjoint()) check_economy(setting, *way);
    for (const Sender& sender : way->senders) outcome.transfers += sender.order->transfers.size();
  }
  if (sides->disjoint()) {
    check_balance(setting, plan);
    check_balance(setting, back);
  }
  const auto order = static_cast<Simulator::Order>(outcome.hash % 3);
  outcome.messages = Run(setting, *sides, *ways[0], *ways[1])(order);
  return outcome;
}

}  // namespace mimo_ext::properties
