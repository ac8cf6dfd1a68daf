// The paths of an overlap: who sends what on each, and which one the model of the links chooses.
#include <gtest/gtest.h>

#include <map>
#include <set>
#include <stdexcept>

#include "plans.h"

namespace mimo_ext::core {
namespace {

Plan plan_on(Path path, const Boundary& source, const Boundary& destination, const Microbatch& microbatch,
             Direction direction = Direction::kForward, const std::optional<Links>& links = std::nullopt) {
  return Plan(source, destination, microbatch, direction, {{}, path, links});
}

std::vector<int> ranks_of(const Boundary& boundary) {
  std::vector<int> ranks;
  for (const auto& lane : boundary.lanes) ranks.insert(ranks.end(), lane.begin(), lane.end());
  return ranks;
}

/// Elements between two different ranks, by (sender, receiver), lane copies included.
std::map<std::pair<int, int>, std::int64_t> moved(const Plan& plan) {
  std::map<std::pair<int, int>, std::int64_t> elements;
  std::set<int> ranks;
  for (const Boundary* boundary : {&plan.source(), &plan.destination()}) {
    for (int rank : ranks_of(*boundary)) ranks.insert(rank);
  }
  for (int rank : ranks) {
    const RankPlan mine = plan.for_rank(rank);
    for (const auto* list : {&mine.sends, &mine.lane_sends}) {
      for (const Message& message : *list) {
        if (message.receiver != rank) elements[{rank, message.receiver}] += message.recv_box.volume();
      }
    }
  }
  return elements;
}

using Moved = std::map<std::pair<int, int>, std::int64_t>;

TEST(Path, NamesAreReadBack) {
  for (Path path : {Path::kAuto, Path::kPipelined, Path::kLeader, Path::kDirect}) {
    EXPECT_EQ(parse_path(to_string(path)), path);
  }
  try {
    parse_path("fast");
    FAIL() << "expected an error";
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(), "path: expected 'auto', 'pipelined', 'leader' or 'direct', got 'fast'");
  }
}

TEST(Path, DirectGivesEachReplicaAllOfItFromASenderOfItsOwn) {
  const Plan plan = plan_on(Path::kDirect, side("images", 0, 1, 4), side("language", 4, 1, 4), flat(2, 3, 8));
  EXPECT_EQ(moved(plan), (Moved{{{0, 4}, 48}, {{1, 5}, 48}, {{2, 6}, 48}, {{3, 7}, 48}}));
  for (int rank = 4; rank < 8; ++rank) {
    const RankPlan mine = plan.for_rank(rank);
    ASSERT_EQ(mine.receives.size(), 1U);
    EXPECT_EQ(mine.receives[0].recv_box, (Box{{0, 0, 0}, {6, 8, 1}}));
    EXPECT_TRUE(mine.lane_sends.empty());
    EXPECT_TRUE(mine.lane_receives.empty());
  }
}

TEST(Path, DirectSpreadsTheWorkOverTheSenders) {
  // More senders than receivers: they take turns over all lanes that they meet. Fewer: each serves as many.
  const Plan fan_out = plan_on(Path::kDirect, side("images", 0, 1, 8), side("language", 8, 2, 2), flat(2, 3, 8));
  EXPECT_EQ(moved(fan_out), (Moved{{{0, 8}, 24}, {{2, 9}, 24}, {{4, 10}, 24}, {{6, 11}, 24}}));
  const Plan few = plan_on(Path::kDirect, side("images", 0, 1, 2), side("language", 2, 1, 4), flat(1, 3, 8));
  EXPECT_EQ(moved(few), (Moved{{{0, 2}, 24}, {{0, 3}, 24}, {{1, 4}, 24}, {{1, 5}, 24}}));
}

TEST(Path, LeaderSendsOnceAndForwardsToTheOthers) {
  const Plan plan = plan_on(Path::kLeader, side("images", 0, 1, 2), side("language", 2, 1, 3), flat(1, 3, 8));
  EXPECT_EQ(moved(plan), (Moved{{{0, 2}, 24}, {{2, 3}, 24}, {{2, 4}, 24}}));
}

TEST(Path, OverlapsOfOneLaneHaveDifferentLeaders) {
  const Plan plan = plan_on(Path::kLeader, side("images", 0, 4, 1), side("language", 4, 1, 4), flat(4, 3, 8));
  for (int rank = 0; rank < 4; ++rank) {
    const auto sends = plan.for_rank(rank).sends;
    ASSERT_EQ(sends.size(), 1U);
    EXPECT_EQ(sends[0].receiver, 4 + rank);
    EXPECT_EQ(plan.for_rank(4 + rank).lane_sends.size(), 3U);
    EXPECT_EQ(plan.for_rank(4 + rank).lane_receives.size(), 3U);
  }
}

TEST(Path, PartialGradientsReachEveryReplicaOnEveryPath) {
  // Backward: two cp copies of two tp ranks each contribute all of it.
  const Boundary source = side("images", 0, 1, 2);
  const Boundary copies = side("language", 2, 1, 2, 2);
  for (Path path : kPaths) {
    const Plan plan = plan_on(path, source, copies, flat(2, 4, 8), Direction::kBackward);
    std::map<std::pair<int, int>, std::int64_t> elements;  // by receiver and contribution
    for (int rank : {0, 1}) {
      for (const Message& message : plan.for_rank(rank).receives) {
        elements[{rank, message.contribution}] += message.recv_box.volume();
        EXPECT_EQ((message.sender - 2) / 2, message.contribution);
      }
    }
    const std::int64_t share = path == Path::kPipelined ? 32 : 64;
    Moved expected{{{0, 0}, share}, {{0, 1}, share}};
    if (path != Path::kLeader) expected.insert({{{1, 0}, share}, {{1, 1}, share}});
    EXPECT_EQ(elements, expected) << to_string(path);
    EXPECT_EQ(plan.for_rank(0).lane_sends.size(), path == Path::kDirect ? 0U : 1U);
  }
}

TEST(Path, WhatARankHasItselfIsNotSent) {
  // The same two ranks: tp 2 -> dp 2 moves nothing; the way back moves each lane's half to the other rank, once.
  const Boundary together = side("images", 0, 1, 2);
  const Boundary apart = side("language", 0, 2, 1);
  for (Path path : kPaths) {
    EXPECT_TRUE(moved(plan_on(path, together, apart, flat(2, 4, 8))).empty()) << to_string(path);
    const Plan back = plan_on(path, together, apart, flat(2, 4, 8), Direction::kBackward);
    EXPECT_EQ(moved(back), (Moved{{{0, 1}, 32}, {{1, 0}, 32}})) << to_string(path);
  }
}

TEST(Path, SequenceShardsOfTheSameRanksAreGatheredOnce) {
  Boundary shards = side("images", 0, 1, 4);
  shards.sequence_parallel = true;
  const Boundary whole = side("language", 0, 1, 4);
  for (Path path : kPaths) {
    // Each rank lacks three quarters.
    std::map<int, std::int64_t> received;
    for (const auto& [ranks, elements] : moved(plan_on(path, shards, whole, flat(1, 16, 8)))) {
      received[ranks.second] += elements;
    }
    EXPECT_EQ(received, (std::map<int, std::int64_t>{{0, 96}, {1, 96}, {2, 96}, {3, 96}})) << to_string(path);
  }
}

TEST(Path, OverlappingRanksKeepTheirOwnAndServeTheRest) {
  // Ranks 2 and 3 are on both sides; 4 and 5 lack everything and share the work of getting it.
  const Plan plan = plan_on(Path::kPipelined, side("images", 0, 1, 4), side("language", 2, 1, 4), flat(1, 16, 8));
  EXPECT_EQ(moved(plan), (Moved{{{0, 4}, 32}, {{1, 4}, 32}, {{2, 5}, 32}, {{3, 5}, 32}, {{4, 5}, 64}, {{5, 4}, 64}}));
}

TEST(PathModel, IsExactIntegerArithmetic) {
  // tp 4 -> tp 4, 1 MiB, 1 GB/s and 4 GB/s, 30 us and 20 us.
  PathLoad load;
  load.bytes = 1 << 20;
  load.senders = load.replicas = 4;
  const PathTimes times = times_of(load, {});
  EXPECT_EQ(times.direct, 1048576 + 20'000 + 30'000);
  // Eight chunks: each one message, then three more from the leader, which take less time than what comes in; the
  // copies of the last chunk are left. Seven eighths of what messages cost are hidden behind the wire.
  EXPECT_EQ(times.leader, 1048576 + 3 * 262144 / 8 + 8 * (1 + 3 + 1) * 20'000 - 800'000 / 8 * 7 + 2 * 30'000);
  // Four chunks of 64 KiB, 3 * 256 KiB of copies: 4 received, 12 forwarded, 12 more received.
  EXPECT_EQ(times.pipelined, 262144 + 196608 / 4 + (4 + 24) * 20'000 - 262144 / 4 * 3 + 2 * 30'000);
  EXPECT_EQ(times.best(), Path::kPipelined);
  EXPECT_EQ(times.of(Path::kAuto), times.pipelined);
}

TEST(PathModel, SmallPayloadsGoDirectLargeOnesPipelined) {
  PathLoad load;
  load.senders = load.replicas = 4;
  Path last = Path::kDirect;
  for (load.bytes = 1; load.bytes < std::int64_t{1} << 50; load.bytes *= 2) {
    const Path path = times_of(load, {}).best();
    EXPECT_TRUE(load.bytes > 64 << 10 || path == Path::kDirect) << load.bytes;
    EXPECT_TRUE(load.bytes < 1 << 20 || path == Path::kPipelined) << load.bytes;
    EXPECT_TRUE(path == last || last == Path::kDirect) << load.bytes;
    last = path;
  }
}

TEST(PathModel, OneSenderLeavesSmallCopiesToALeader) {
  PathLoad load;
  load.bytes = 4 << 10;
  load.replicas = 8;
  Links fabric;
  fabric.nic = 25'000'000;
  fabric.host = 10'000'000'000;
  EXPECT_EQ(times_of(load, {{}, Path::kAuto, fabric}).best(), Path::kLeader);
  load.senders = 8;
  EXPECT_EQ(times_of(load, {}).best(), Path::kDirect);
}

TEST(PathModel, WithoutReplicasFewerMessagesWin) {
  PathLoad load;
  load.bytes = 16 << 20;
  load.senders = 4;
  const PathTimes times = times_of(load, {});
  EXPECT_LT(times.direct, times.pipelined);
  EXPECT_EQ(times.direct, times.leader);
  EXPECT_EQ(times.best(), Path::kDirect);
}

TEST(PathModel, ChunksAreFewerWhereMessagesCostMoreThanTheyHide) {
  PathLoad load;
  load.bytes = 64 << 20;
  load.senders = load.replicas = 8;
  Links links;
  EXPECT_EQ(times_of(load, {}).chunks, 8);
  links.overhead_ns = 0;
  EXPECT_EQ(times_of(load, {{}, Path::kAuto, links}).chunks, 8);
  links.overhead_ns = 1'000'000;
  const PathTimes times = times_of(load, {{}, Path::kAuto, links});
  EXPECT_EQ(times.chunks, 1);
  // 8 MiB over the card, seven copies of it inside the host, one message in and seven each way in the lane.
  EXPECT_EQ(times.pipelined, 8388608 + 7 * 2097152 + 15 * 1'000'000 + 2 * 30'000);
  const auto chunks_sent = [](const Links& known) {
    Microbatch microbatch = flat(1, 4096, 8192);
    microbatch.element_size = 2;
    const Plan plan = plan_on(Path::kPipelined, side("images", 0, 1, 8), side("language", 8, 1, 8), microbatch,
                              Direction::kForward, known);
    return plan.for_rank(0).sends.size();
  };
  EXPECT_EQ(chunks_sent(links), 1U);
  links.overhead_ns = 1000;
  EXPECT_EQ(chunks_sent(links), 8U);
}

TEST(PathModel, HostsCountWhereTheyAreKnown) {
  const Boundary source = side("images", 0, 1, 4);
  const Boundary destination = side("language", 4, 1, 4);
  Links links;
  links.nic = 100'000'000;
  links.host = 10'000'000'000;
  const Microbatch microbatch = flat(1, 1024, 1024);
  const auto times = [&](int ranks_per_host) {
    links.ranks_per_host = ranks_per_host;
    return plan_on(Path::kAuto, source, destination, microbatch, Direction::kForward, links).paths().times;
  };
  const PathTimes unknown = times(0);
  EXPECT_EQ(times(4), unknown);
  EXPECT_EQ(times(8).direct, unknown.direct - 1048576 * 10 + 1048576 / 10);  // the fast link
  EXPECT_EQ(times(2).direct, unknown.direct);
  EXPECT_GT(times(2).pipelined, unknown.pipelined);  // copies leave the host
}

TEST(PathModel, RefusesLinksThatCannotBe) {
  const auto error = [](const Links& links) -> std::string {
    try {
      plan_on(Path::kAuto, side("images", 0, 1, 1), side("language", 1, 1, 1), flat(1, 1, 1), Direction::kForward,
              links);
    } catch (const std::invalid_argument& problem) {
      return problem.what();
    }
    return "no error";
  };
  Links links;
  links.nic = 0;
  EXPECT_EQ(error(links), "links: bandwidth nic must be positive, got 0 bytes/s");
  links = {};
  links.latency_ns = -1;
  EXPECT_EQ(error(links), "links: latency must not be negative, got -1");
}

TEST(Path, TheHashTellsPathsAndLinksApart) {
  std::set<std::uint64_t> hashes;
  const Boundary source = side("images", 0, 1, 4);
  const Boundary destination = side("language", 4, 1, 4);
  for (Path path : {Path::kAuto, Path::kPipelined, Path::kLeader, Path::kDirect}) {
    const Plan plan = plan_on(path, source, destination, flat(1, 1024, 1024));
    hashes.insert(plan.hash());
    EXPECT_EQ(plan.reversed().options(), plan.options());
    EXPECT_EQ(plan.reversed().reversed(), plan);
    EXPECT_EQ(plan == plan_on(Path::kAuto, source, destination, flat(1, 1024, 1024)), path == Path::kAuto);
  }
  Links links;
  links.overhead_ns += 1;
  hashes.insert(plan_on(Path::kAuto, source, destination, flat(1, 1024, 1024), Direction::kForward, links).hash());
  EXPECT_EQ(hashes.size(), 5U);
}

TEST(Path, SourceAndDestinationChooseTheSameFromWhatTheyKnow) {
  // Ragged: a source knows its own samples only. One overlap is small, the other large.
  const Boundary source = side("images", 0, 2, 4);
  const Boundary destination = side("language", 8, 1, 4);
  Microbatch all = flat(2, 1, 1024);
  all.rows = {4, 4096};
  const Plan whole = plan_on(Path::kAuto, source, destination, all);
  EXPECT_EQ(whole.paths().taken, (std::vector{Path::kPipelined, Path::kDirect}));
  for (int lane : {0, 1}) {
    Microbatch own = all;
    own.rows[static_cast<std::size_t>(1 - lane)] = kUnknownRows;
    const Plan known = plan_on(Path::kAuto, source, destination, own);
    EXPECT_EQ(known.paths().taken, (std::vector{lane == 0 ? Path::kDirect : Path::kPipelined}));
    for (int member = 0; member < 4; ++member) {
      const auto sends = known.for_rank(4 * lane + member).sends;
      const auto expected = whole.for_rank(4 * lane + member).sends;
      ASSERT_EQ(sends.size(), expected.size());
      for (std::size_t index = 0; index < sends.size(); ++index) {
        EXPECT_EQ(sends[index].receiver, expected[index].receiver);
        EXPECT_EQ(sends[index].send_box, expected[index].send_box);
        EXPECT_EQ(sends[index].chunk, expected[index].chunk);
      }
    }
  }
}

TEST(Sides, FindRanksWhereverTheyAre) {
  Boundary scattered = side("images", 0, 2, 2);
  scattered.lanes = {{9, 3}, {100000, 5}};
  const Sides sides(scattered, side("language", 4, 3, 2));
  for (int rank : {0, 3, 4, 5, 6, 7, 8, 9, 10, 100000, 100001}) {
    EXPECT_EQ(sides.find_source(rank), sides.source().find(rank)) << rank;
    EXPECT_EQ(sides.find_destination(rank), sides.destination().find(rank)) << rank;
  }
  EXPECT_FALSE(sides.disjoint());
  EXPECT_TRUE(Sides(side("images", 0, 2, 2), side("language", 4, 3, 2)).disjoint());
  EXPECT_EQ(sides.hash(), hash_of(sides.source(), sides.destination()));
}

TEST(PlanText, ThePathAndItsAlternativesAreNamed) {
  const Plan plan = plan_on(Path::kAuto, side("images", 0, 1, 4), side("language", 4, 1, 4), flat(1, 1024, 1024));
  EXPECT_NE(plan.to_string(1).find("  path: pipelined (auto); modelled: pipelined 734.7 us, direct 1.1 ms, leader "
                                   "1.3 ms (overlaps of 1.0 MiB)\n"),
            std::string::npos)
      << plan.to_string(1);
  const Plan given = plan_on(Path::kLeader, plan.source(), plan.destination(), plan.microbatch());
  EXPECT_NE(given.to_string(1).find("  path: leader (given); modelled"), std::string::npos);
  const Plan empty = plan_on(Path::kAuto, plan.source(), plan.destination(), flat(0, 1, 1));
  EXPECT_NE(empty.to_string(1).find("  path: none: nothing moves\n"), std::string::npos);
}

}  // namespace
}  // namespace mimo_ext::core
