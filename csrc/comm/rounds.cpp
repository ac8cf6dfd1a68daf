#include "comm/rounds.h"

namespace mimo_ext::comm {

namespace {

template <typename Round>
Round& round_of(std::vector<Round>& rounds, int number) {
  const auto index = static_cast<std::size_t>(number);
  if (rounds.size() <= index) rounds.resize(index + 1);
  return rounds[index];
}

}  // namespace

std::vector<std::vector<std::size_t>> send_rounds(const SendOrder& order) {
  std::vector<std::vector<std::size_t>> rounds;
  for (std::size_t index = 0; index < order.transfers.size(); ++index) {
    const Transfer& transfer = order.transfers[index];
    if (!transfer.local) round_of(rounds, transfer.chunk).push_back(index);
  }
  return rounds;
}

std::vector<ReceiveRound> receive_rounds(const ReceiveOrder& order) {
  std::vector<ReceiveRound> rounds;
  for (std::size_t index = 0; index < order.receives.size(); ++index) {
    const Transfer& transfer = order.receives[index];
    if (!transfer.local) round_of(rounds, transfer.chunk).receives.push_back(index);
  }
  for (std::size_t index = 0; index < order.stages.size(); ++index) {
    const int chunk = order.receives[order.stages[index].first_receive].chunk;
    round_of(rounds, chunk).stages.push_back(index);
  }
  for (std::size_t index = 0; index < order.lane_sends.size(); ++index) {
    round_of(rounds, order.lane_sends[index].chunk + 1).lane_sends.push_back(index);
  }
  for (std::size_t index = 0; index < order.lane_receives.size(); ++index) {
    round_of(rounds, order.lane_receives[index].chunk + 1).lane_receives.push_back(index);
  }
  return rounds;
}

std::vector<std::vector<GroupMessage>> group_order(const core::Plan& plan, int rank) {
  std::vector<std::vector<GroupMessage>> groups;
  const auto add = [&](std::size_t round, bool sending, const Transfer& transfer) {
    round_of(groups, static_cast<int>(round))
        .push_back({sending, transfer.peer, transfer.volume * plan.microbatch().element_size});
  };
  const std::pair<int, int> as_sender = plan.sender().find(rank);
  const std::pair<int, int> as_receiver = plan.receiver().find(rank);
  if (as_sender.first >= 0) {
    const SendOrder order = send_order(plan, rank, as_sender, false);
    const auto rounds = send_rounds(order);
    for (std::size_t round = 0; round < rounds.size(); ++round) {
      for (const std::size_t index : rounds[round]) add(round, true, order.transfers[index]);
    }
  }
  if (as_receiver.first >= 0) {
    const ReceiveOrder order = receive_order(plan, rank, as_receiver, false);
    const auto rounds = receive_rounds(order);
    for (std::size_t round = 0; round < rounds.size(); ++round) {
      for (const std::size_t index : rounds[round].receives) add(round, false, order.receives[index]);
      for (const std::size_t index : rounds[round].lane_sends) add(round, true, order.lane_sends[index]);
      for (const std::size_t index : rounds[round].lane_receives) add(round, false, order.lane_receives[index]);
    }
  }
  return groups;
}

}  // namespace mimo_ext::comm
