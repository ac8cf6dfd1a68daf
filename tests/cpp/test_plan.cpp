#include <gtest/gtest.h>

#include <set>
#include <stdexcept>

#include "plans.h"

namespace mimo_ext::core {
namespace {

PlanOptions on(Path path, Chunking chunking = {}) {
  return {chunking, path, {}};
}

const PlanOptions kPipelined = on(Path::kPipelined);
const Boundary kTwoLanes = side("images", {{0}, {1}}, 1);
const Boundary kOneLane = side("language", {{2, 3}}, 2);

TEST(Box, Intersection) {
  const Box a{{0, 0, 0}, {4, 4, 1}};
  const Box b{{2, 3, 0}, {4, 4, 1}};
  EXPECT_EQ(intersect(a, b), (Box{{2, 3, 0}, {2, 1, 1}}));
  EXPECT_EQ(intersect(a, Box{{4, 0, 0}, {1, 4, 1}}).volume(), 0);
}

TEST(Cut, TakesTheOutermostAxisThatDividesEvenly) {
  const auto rows = cut(Box{{10, 0, 0}, {6, 8, 1}}, 3);
  ASSERT_EQ(rows.size(), 3U);
  EXPECT_EQ(rows[1], (Box{{12, 0, 0}, {2, 8, 1}}));
  const auto columns = cut(Box{{0, 0, 0}, {5, 8, 1}}, 4);  // 5 rows do not divide, 8 columns do
  EXPECT_EQ(columns[3], (Box{{0, 6, 0}, {5, 2, 1}}));
  const auto many = cut(Box{{0, 0, 0}, {33, 8, 1}}, 4);  // nearly even, and contiguous
  EXPECT_EQ(many[0].size[0] + many[1].size[0] + many[2].size[0] + many[3].size[0], 33);
  const auto longest = cut(Box{{0, 0, 0}, {1, 3, 1}}, 2);
  EXPECT_EQ(longest[0].size[1] + longest[1].size[1], 3);
}

TEST(Cut, InnerAxesTakeWhatOuterOnesCannot) {
  // Two samples over four parts are half a sample each: contiguous, where a cut of the last axis would be strided.
  const auto halves = cut(Box{{4, 0, 0}, {2, 6, 8}}, 4);
  ASSERT_EQ(halves.size(), 4U);
  EXPECT_EQ(halves[0], (Box{{4, 0, 0}, {1, 3, 8}}));
  EXPECT_EQ(halves[1], (Box{{4, 3, 0}, {1, 3, 8}}));
  EXPECT_EQ(halves[2], (Box{{5, 0, 0}, {1, 3, 8}}));
  EXPECT_EQ(halves[3], (Box{{5, 3, 0}, {1, 3, 8}}));
  const auto thirds = cut(Box{{0, 0, 0}, {9, 4, 1}}, 6);  // three threes, each cut in two
  EXPECT_EQ(thirds[3], (Box{{3, 2, 0}, {3, 2, 1}}));
}

TEST(Cut, PartsDifferByAtMostOneUnitAndCoverTheBox) {
  for (std::int64_t a = 1; a < 20; ++a) {
    for (std::int64_t b = 1; b < 6; ++b) {
      for (int parts = 1; parts <= 12; ++parts) {
        const Box whole{{7, 3, 0}, {a, b, 2}};
        std::int64_t covered = 0;
        std::set<std::int64_t> sizes[kMaxDims];
        const auto boxes = cut(whole, parts);
        ASSERT_EQ(boxes.size(), static_cast<std::size_t>(parts));
        for (std::size_t index = 0; index < boxes.size(); ++index) {
          covered += boxes[index].volume();
          EXPECT_EQ(intersect(whole, boxes[index]).volume(), boxes[index].volume());
          for (std::size_t axis = 0; axis < kMaxDims; ++axis) sizes[axis].insert(boxes[index].size[axis]);
          for (std::size_t other = 0; other < index; ++other) {
            EXPECT_EQ(intersect(boxes[index], boxes[other]).volume(), 0);
          }
        }
        EXPECT_EQ(covered, whole.volume());
        std::size_t uneven = 0;
        for (const auto& of_axis : sizes) {
          EXPECT_LE(*of_axis.rbegin() - *of_axis.begin(), 1);
          uneven += of_axis.size() - 1;
        }
        EXPECT_LE(uneven, 1U) << a << " x " << b << " over " << parts;
      }
    }
  }
}

TEST(Plan, UnequalTpMeetsInFewContiguousMessages) {
  // Batch first, four samples, tp 8 -> tp 4: half a sample from each sender, a sample to each receiver.
  Microbatch microbatch;
  microbatch.ndim = 3;
  microbatch.seq_dim = 1;
  microbatch.samples = 4;
  microbatch.shape = {1, 576, 64};
  const Plan plan(side("images", {{0, 1, 2, 3, 4, 5, 6, 7}}, 8), side("language", {{8, 9, 10, 11}}, 4), microbatch,
                  Direction::kForward, kPipelined);
  for (int rank = 0; rank < 8; ++rank) {
    const auto sends = plan.for_rank(rank).sends;
    ASSERT_EQ(sends.size(), 1U);
    EXPECT_EQ(sends[0].receiver, 8 + rank / 2);
    EXPECT_EQ(sends[0].recv_box, (Box{{rank / 2, 288 * (rank % 2), 0}, {1, 288, 64}}));
  }
}

TEST(Plan, PartsThatAreForwardedAreCutIntoChunksOfEnoughBytes) {
  Microbatch microbatch = flat(1, 1024, 256);
  microbatch.element_size = 2;  // 512 KiB in all, 256 KiB for each receiver
  const auto chunks = [&](const Boundary& receiver, Chunking chunking) {
    const Plan plan(side("images", {{0, 1}}, 2), receiver, microbatch, Direction::kForward,
                    on(Path::kPipelined, chunking));
    const RankPlan sender = plan.for_rank(0);
    const RankPlan there = plan.for_rank(2);
    EXPECT_EQ(sender.sends.size(), there.receives.size());
    EXPECT_EQ(there.lane_sends.size(), there.lane_receives.size());
    for (std::size_t index = 0; index < sender.sends.size(); ++index) {
      EXPECT_EQ(sender.sends[index].chunk, static_cast<int>(index));
      EXPECT_EQ(there.receives[index], sender.sends[index]);
    }
    std::int64_t bytes = 0;
    for (const Message& message : there.receives) bytes += message.recv_box.volume() * microbatch.element_size;
    EXPECT_EQ(bytes, (512 << 10) / receiver.lane_size());
    return sender.sends.size();
  };
  const Boundary pair = side("language", {{2, 3}}, 2);
  EXPECT_EQ(chunks(pair, {}), 4U);
  EXPECT_EQ(chunks(pair, {3, 1}), 3U);
  EXPECT_EQ(chunks(pair, {1, 1}), 1U);
  EXPECT_EQ(chunks(pair, {8, 100 << 10}), 2U);
  EXPECT_EQ(chunks(pair, {8, 1 << 20}), 1U);
  // Nobody to forward to. (Both senders send: one message each.)
  const Plan alone(side("images", {{0, 1}}, 2), side("language", {{2}}, 1), microbatch, Direction::kForward,
                   kPipelined);
  EXPECT_EQ(alone.for_rank(2).receives.size(), 2U);
  EXPECT_TRUE(alone.for_rank(2).lane_sends.empty());
}

TEST(Plan, FirstChunksOfAllLanesGoFirst) {
  const Chunking chunking{4, 1};
  const Plan plan(side("images", {{0, 1}}, 2), side("language", {{2, 3}, {4, 5}}, 2), flat(4, 8, 16),
                  Direction::kForward, on(Path::kPipelined, chunking));
  int last = 0;
  std::set<int> lanes_of_first;
  for (const Message& message : plan.for_rank(0).sends) {
    EXPECT_GE(message.chunk, last);
    last = message.chunk;
    if (message.chunk == 0) lanes_of_first.insert(message.receiver_lane);
  }
  EXPECT_EQ(last, 3);
  EXPECT_EQ(lanes_of_first, (std::set<int>{0, 1}));
  EXPECT_NE(plan, Plan(plan.source(), plan.destination(), plan.microbatch(), Direction::kForward, kPipelined));
  EXPECT_EQ(plan.reversed().options().chunking, chunking);
  EXPECT_NE(plan.hash(),
            Plan(plan.source(), plan.destination(), plan.microbatch(), Direction::kForward, kPipelined).hash());
  for (const Chunking& wrong : {Chunking{0, 1}, Chunking{1, 0}}) {
    EXPECT_THROW(
        Plan(plan.source(), plan.destination(), plan.microbatch(), Direction::kForward, on(Path::kPipelined, wrong)),
        std::invalid_argument);
  }
}

TEST(Plan, FanIn) {
  const Plan plan(kTwoLanes, kOneLane, flat(4, 2, 8), Direction::kForward, kPipelined);
  EXPECT_EQ(plan.receiver_shape(0, 0), (std::array<std::int64_t, 3>{8, 8, 1}));
  EXPECT_EQ(plan.sender_shape(1, 0), (std::array<std::int64_t, 3>{4, 8, 1}));
  const RankPlan sender = plan.for_rank(1);
  // Equal lanes have a receiver each.
  ASSERT_EQ(sender.sends.size(), 1U);
  EXPECT_EQ(sender.sends[0].receiver, 3);
  EXPECT_EQ(sender.sends[0].send_box, (Box{{0, 0, 0}, {4, 8, 1}}));
  EXPECT_EQ(sender.sends[0].recv_box, (Box{{4, 0, 0}, {4, 8, 1}}));
  const RankPlan receiver = plan.for_rank(3);
  ASSERT_EQ(receiver.receives.size(), 1U);
  EXPECT_EQ(receiver.receives[0], sender.sends[0]);
  ASSERT_EQ(receiver.lane_sends.size(), 1U);
  EXPECT_EQ(receiver.lane_sends[0].receiver, 2);
  EXPECT_EQ(receiver.lane_receives.size(), 1U);
  EXPECT_TRUE(plan.for_rank(7).sends.empty());
}

TEST(Plan, UnequalLanesAreSharedByAllReceivers) {
  const Plan plan(kTwoLanes, kOneLane, ragged({3, 1, 2, 6}, 8), Direction::kForward, kPipelined);
  const RankPlan sender = plan.for_rank(1);
  ASSERT_EQ(sender.sends.size(), 2U);
  EXPECT_EQ(sender.sends[0].receiver, 2);
  EXPECT_EQ(sender.sends[0].send_box, (Box{{0, 0, 0}, {4, 8, 1}}));
  EXPECT_EQ(sender.sends[0].recv_box, (Box{{4, 0, 0}, {4, 8, 1}}));
  EXPECT_EQ(sender.sends[1].receiver, 3);
  const RankPlan receiver = plan.for_rank(3);
  ASSERT_EQ(receiver.receives.size(), 2U);
  EXPECT_EQ(receiver.receives[1], sender.sends[1]);
  EXPECT_EQ(receiver.lane_sends.size(), 2U);
  EXPECT_EQ(receiver.lane_receives.size(), 2U);
}

TEST(Plan, WhatAnEvenLaneSendsIsCutAsThatLaneKnowsIt) {
  // Lane 1 has two rows per sample and takes all lanes to be like it; the receiver knows that lane 0 is not.
  const Boundary four = side("language", {{2, 3, 4, 5}}, 4);
  Microbatch combined = ragged({1, 1, 2, 2}, 8);
  for (const bool told : {true, false}) {
    if (!told) combined.even_lanes = {0, 1};
    const Microbatch known = told ? ragged({kUnknownRows, kUnknownRows, 2, 2}, 8) : flat(4, 2, 8);
    const Plan sender(kTwoLanes, four, known, Direction::kForward, kPipelined);
    const Plan receiver(kTwoLanes, four, combined, Direction::kForward, kPipelined);
    std::vector<int> to;
    for (const Message& message : sender.for_rank(1).sends) to.push_back(message.receiver);
    EXPECT_EQ(to, told ? (std::vector{2, 3, 4, 5}) : (std::vector{4, 5}));
    std::vector<int> from_lane_1;
    for (int rank = 2; rank < 6; ++rank) {
      for (const Message& message : receiver.for_rank(rank).receives) {
        if (message.sender == 1) from_lane_1.push_back(rank);
      }
    }
    EXPECT_EQ(from_lane_1, to);
  }
  combined.even_lanes = {1, 0};
  EXPECT_THROW(Plan(kTwoLanes, four, combined, Direction::kForward), std::invalid_argument);
}

TEST(Plan, RaggedRowsFollowTheSamples) {
  const Plan plan(side("images", {{0, 1}}, 2), side("language", {{2}, {3}}, 1), ragged({3, 0, 5, 2}, 4),
                  Direction::kForward);
  EXPECT_EQ(plan.receiver_shape(0, 0)[0], 3);
  EXPECT_EQ(plan.receiver_shape(1, 0)[0], 7);
  std::int64_t elements = 0;
  for (const Message& message : plan.for_rank(3).receives) elements += message.recv_box.volume();
  EXPECT_EQ(elements, 7 * 4);
}

TEST(Plan, ASenderNeedsItsOwnRowsOnly) {
  const Boundary three = side("images", {{0}, {1}, {2}}, 1);
  const Boundary two = side("language", {{3, 4}, {5, 6}}, 2);
  const Plan all(three, two, ragged({3, 1, 4, 1, 5, 9}, 4), Direction::kForward);
  const Plan own(three, two, ragged({kUnknownRows, kUnknownRows, 4, 1, kUnknownRows, kUnknownRows}, 4),
                 Direction::kForward);
  const auto expected = all.for_rank(1).sends;
  const auto got = own.for_rank(1).sends;
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t index = 0; index < got.size(); ++index) {
    EXPECT_EQ(got[index].receiver, expected[index].receiver);
    EXPECT_EQ(got[index].send_box, expected[index].send_box);
  }
  EXPECT_THROW(own.receiver_shape(0, 0), std::invalid_argument);
}

TEST(Plan, CpCopiesOfTheDestinationEachContribute) {
  const Boundary copies = side("language", {{2, 3, 4, 5}}, 2, 2);
  const Plan backward(kTwoLanes, copies, flat(2, 4, 8), Direction::kBackward);
  const RankPlan source = backward.for_rank(0);
  std::int64_t elements[2] = {0, 0};
  for (const Message& message : source.receives) elements[message.contribution] += message.recv_box.volume();
  EXPECT_EQ(elements[0], 4 * 8);  // one copy of the gradient from each cp coordinate
  EXPECT_EQ(elements[1], 4 * 8);
  for (const Message& message : backward.reversed().for_rank(2).receives) EXPECT_EQ(message.contribution, 0);
}

TEST(Plan, ReversalIsAnInvolution) {
  const Plan plan(kTwoLanes, kOneLane, ragged({3, 1, 4, 1}, 4), Direction::kForward);
  EXPECT_EQ(plan.reversed().reversed(), plan);
  EXPECT_EQ(plan.reversed().sender(), plan.receiver());
  EXPECT_FALSE(plan.reversed() == plan);
}

TEST(Plan, HashTellsPlansApart) {
  std::set<std::uint64_t> hashes;
  std::size_t count = 0;
  for (const auto direction : {Direction::kForward, Direction::kBackward}) {
    for (const auto& microbatch : {flat(4, 2, 8), flat(8, 1, 8), flat(4, 2, 9), ragged({2, 2, 2, 2}, 8)}) {
      hashes.insert(Plan(kTwoLanes, kOneLane, microbatch, direction).hash());
      hashes.insert(Plan(kOneLane, kTwoLanes, microbatch, direction).hash());
      count += 2;
    }
  }
  EXPECT_EQ(hashes.size(), count);
  // The same on every machine: a changed value breaks the agreement between versions on purpose.
  EXPECT_EQ(hash_of(kTwoLanes, kOneLane), hash_of(kTwoLanes, kOneLane));
  EXPECT_NE(hash_of(kTwoLanes, kOneLane), hash_of(kOneLane, kTwoLanes));
}

TEST(Plan, WhatDoesNotCountChangesNeitherEqualityNorHash) {
  Microbatch microbatch = ragged({2, 3}, 8);
  const Plan plan(kTwoLanes, kOneLane, microbatch, Direction::kForward);
  microbatch.shape[0] = 5;          // the batch axis: given by the samples
  microbatch.rows_per_sample = 11;  // row counts are given
  const Plan same(kTwoLanes, kOneLane, microbatch, Direction::kForward);
  EXPECT_EQ(plan, same);
  EXPECT_EQ(plan.hash(), same.hash());
  const Plan renamed(side("video", {{0}, {1}}, 1), kOneLane, microbatch, Direction::kForward);
  EXPECT_FALSE(renamed == plan);
  EXPECT_NE(renamed.hash(), plan.hash());
}

TEST(Plan, LanesMet) {
  EXPECT_EQ(Plan::lanes_met(1, 3, 2), (std::pair{0, 2}));
  EXPECT_EQ(Plan::lanes_met(2, 3, 2), (std::pair{1, 2}));
  EXPECT_EQ(Plan::lanes_met(3, 4, 8), (std::pair{6, 8}));
}

TEST(Plan, MessagesGrowWithTheLaneNotWithTheWorld) {
  std::vector<std::vector<int>> sources;
  std::vector<std::vector<int>> destinations;
  for (int lane = 0; lane < 8192; ++lane) {
    sources.emplace_back();
    for (int tp = 0; tp < 8; ++tp) sources.back().push_back(lane * 8 + tp);
  }
  for (int lane = 0; lane < 2048; ++lane) {
    destinations.emplace_back();
    for (int member = 0; member < 32; ++member) destinations.back().push_back(65536 + lane * 32 + member);
  }
  const Plan plan(side("images", sources, 8), side("language", destinations, 8, 4), flat(8192, 256, 64),
                  Direction::kForward, kPipelined);
  // Four lanes of eight for 32 replicas: one message each.
  EXPECT_EQ(plan.for_rank(65535).sends.size(), 1U);
  EXPECT_EQ(plan.for_rank(131071).receives.size(), 1U);
  EXPECT_EQ(plan.for_rank(131071).lane_receives.size(), 31U);
}

TEST(Plan, RefusesWhatDoesNotFit) {
  const auto error = [](Microbatch microbatch, const Boundary& source = kTwoLanes) -> std::string {
    try {
      const Plan plan(source, kOneLane, std::move(microbatch), Direction::kForward);
      plan.for_rank(0);
    } catch (const std::invalid_argument& problem) {
      return problem.what();
    }
    return "no error";
  };
  Microbatch bad = flat(4, 2, 8);
  bad.ndim = 4;
  EXPECT_NE(error(bad).find("expected 2 or 3 axes, got 4"), std::string::npos);
  bad = flat(4, 2, 8);
  bad.batch_dim = 1;
  EXPECT_NE(error(bad).find("2-D tensors are [rows, h]"), std::string::npos);
  bad = flat(-1, 2, 8);
  EXPECT_NE(error(bad).find("samples >= 0, got -1"), std::string::npos);
  bad = flat(4, 2, -8);
  EXPECT_NE(error(bad).find("extent of axis 1 is -8"), std::string::npos);
  bad = ragged({1, 2}, 8);
  bad.samples = 3;
  EXPECT_NE(error(bad).find("expected 3 row counts, got 2"), std::string::npos);
  bad = ragged({1, -2}, 8);
  EXPECT_NE(error(bad).find("a sample has -2 rows"), std::string::npos);
  EXPECT_NE(error(flat(4, 2, 8), side("images", {}, 1)).find("source of the bridge ('images') has no ranks"),
            std::string::npos);
}

TEST(Plan, RaggedShardsAtTheDestinationAreRefusedByName) {
  Boundary sharded = kOneLane;
  sharded.sequence_parallel = true;
  const Plan plan(kTwoLanes, sharded, ragged({3, kUnknownRows}, 4), Direction::kForward);
  try {
    plan.for_rank(0, true, false);
    FAIL() << "expected an error";
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find("module 'language' holds 2-D tensors sharded along their rows"),
              std::string::npos);
  }
}

TEST(PlanText, LongLanesAndUnknownRowsAreAbbreviated) {
  const Boundary wide = side("images", {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}}, 10);
  EXPECT_EQ(describe(wide), "tp=10 cp=1, 1 lane: [0 1 2 3 4 5 6 ... 9]");
  EXPECT_EQ(describe(side("images", {{0, 1, 2, 3, 4, 5, 6, 7}}, 8)), "tp=8 cp=1, 1 lane: [0 1 2 3 4 5 6 7]");
  const Plan plan(kTwoLanes, kOneLane, ragged({kUnknownRows, 2}, 4), Direction::kForward, kPipelined);
  const std::string text = plan.to_string(64);
  EXPECT_NE(text.find("[0:1, 0:4] -> [? +1, 0:4]"), std::string::npos) << text;
  EXPECT_NE(text.find("row counts of other lanes are not known here"), std::string::npos) << text;
}

TEST(PlanText, IsATableThatPeopleCanRead) {
  const Plan plan(kTwoLanes, kOneLane, flat(4, 2, 8), Direction::kForward, kPipelined);
  const std::string text = plan.to_string(64);
  EXPECT_NE(text.find("Plan forward: images -> language"), std::string::npos);
  EXPECT_NE(text.find("sender   tp=1 cp=1, 2 lanes: [0] [1]"), std::string::npos);
  EXPECT_NE(text.find("[0:4, 0:8] -> [4:8, 0:8]"), std::string::npos);
  const std::string first_lines = plan.to_string(2);
  EXPECT_NE(first_lines.find("more messages are not shown"), std::string::npos);
  EXPECT_LT(first_lines.size(), text.size());
}

}  // namespace
}  // namespace mimo_ext::core
