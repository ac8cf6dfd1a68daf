#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/limits.h"
#include "core/plan.h"
#include "core/stages.h"

namespace mimo_ext::core {
namespace {

constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max();
constexpr int kHugeInt = std::numeric_limits<int>::max();

Boundary boundary(std::vector<int> ranks, int tp, int dp, bool sequence_parallel = false) {
  return Layout(std::move(ranks), {{"tp", tp}, {"dp", dp}}, CpPlacement::kReplicated, sequence_parallel, "module")
      .boundary(0);
}

Plan plan_of(const Microbatch& microbatch, const PlanOptions& options = {}) {
  return Plan(boundary({0, 1}, 2, 1), boundary({2, 3}, 1, 2), microbatch, Direction::kForward, options);
}

void expect_refused(const std::function<void()>& code, const std::string& expected) {
  try {
    code();
    ADD_FAILURE() << "not refused: " << expected;
  } catch (const std::exception& error) {
    EXPECT_NE(std::string(error.what()).find(expected), std::string::npos) << error.what();
  }
}

TEST(Limits, SharesDoNotOverflowAndAreThoseOfTheSimpleFormula) {
  for (std::int64_t extent : {0, 1, 7, 100}) {
    for (std::int64_t parts : {1, 2, 3, 8}) {
      for (std::int64_t index = 0; index <= parts; ++index) {
        EXPECT_EQ(share(extent, index, parts), extent * index / parts);
      }
    }
  }
  EXPECT_EQ(share(kMaxElements, kMaxRanks / 2, kMaxRanks), kMaxElements / 2);
  EXPECT_EQ(share(kMaxElements + 1, kMaxRanks, kMaxRanks), kMaxElements + 1);
}

TEST(Limits, SizesThatOverflowTheNumberOfRanksAreRefused) {
  std::vector<std::pair<std::string, int>> dims;
  for (const char* dim : {"tp", "cp", "dp", "pp", "gtp_remat"}) dims.emplace_back(dim, kHugeInt);
  expect_refused([&] { Layout({0, 1}, dims, CpPlacement::kReplicated, false, "module"); }, "ranks, got 2");
}

TEST(Limits, ShardsAndExtentsOutOfRangeAreRefused) {
  const Boundary side = boundary({0, 1}, 2, 1, true);
  expect_refused([&] { side.runs_of_shard(2, 8); }, "expected a shard below 2");
  expect_refused([&] { side.runs_of_shard(-1, 8); }, "got shard -1");
  expect_refused([&] { side.runs_of_shard(0, kHuge); }, "of an extent of " + std::to_string(kHuge));
  const std::vector<core::Run> half = side.runs_of_shard(1, kMaxElements);
  ASSERT_EQ(half.size(), 1U);
  EXPECT_EQ(half.front(), (core::Run{kMaxElements / 2, kMaxElements / 2, 0}));
}

TEST(Limits, MicrobatchesThatNoMemoryHoldsAreRefused) {
  Microbatch microbatch;
  microbatch.samples = kHuge;
  expect_refused([&] { plan_of(microbatch); }, "expected at most " + std::to_string(kMaxSamples) + " samples");
  microbatch.samples = 4;
  microbatch.rows_per_sample = kHuge;
  expect_refused([&] { plan_of(microbatch); }, "elements in all lanes together, got [");
  microbatch.rows_per_sample = 2;
  microbatch.shape = {1, kHuge, 1};
  expect_refused([&] { plan_of(microbatch); }, "elements in all lanes together, got [8, " + std::to_string(kHuge));
  microbatch.shape = {1, 3, 1};
  microbatch.rows = {kHuge, kHuge, kHuge, kHuge};
  expect_refused([&] { plan_of(microbatch); }, "elements in all lanes together");
  microbatch.rows.clear();
  microbatch.element_size = kHugeInt;
  expect_refused([&] { plan_of(microbatch); }, "expected elements of 1..64 bytes");
  microbatch.element_size = 4;
  // An empty axis hides no overflow in the others.
  microbatch.samples = 0;
  microbatch.shape = {1, kHuge, 1};
  expect_refused([&] { plan_of(microbatch); }, "elements in all lanes together, got [0, ");
}

TEST(Limits, ChunksWithoutBoundAreRefused) {
  Microbatch microbatch;
  microbatch.samples = 4;
  microbatch.shape = {1, 1 << 20, 1};
  PlanOptions options;
  options.chunking = {kHugeInt, 1};
  expect_refused([&] { plan_of(microbatch, options); }, "chunks: expected 1..4096 of positive size");
}

TEST(Limits, TheModelHasAResultForTheSlowestLinksAndTheLargestLoad) {
  PathLoad load;
  load.bytes = kMaxElements * kMaxElementSize;
  load.senders = 8;
  load.contributions = 8;
  load.replicas = 1 << 15;
  load.receiver_lanes = load.sender_lanes = 1 << 19;
  PlanOptions options;
  options.links = Links{1, 1, kMaxLinkValue, kMaxLinkValue, 1};
  options.check();
  const PathTimes times = times_of(load, options);
  for (const Path path : kPaths) EXPECT_GT(times.of(path), 0);
  options.links->latency_ns = kHuge;
  expect_refused([&] { options.check(); }, "links: latency must be at most");
}

TEST(Limits, PlacesThatAreNotThereAreRefused) {
  Microbatch microbatch;
  microbatch.samples = 4;
  microbatch.rows = {1, 2, 3, 4};
  const Plan plan = plan_of(microbatch);
  EXPECT_EQ(plan.receiver_shape(1, 0)[0], 7);
  for (const auto& [lane, member] : std::vector<std::pair<int, int>>{{2, 0}, {-1, 0}, {0, 1}, {kHugeInt, 0}}) {
    expect_refused([&, lane = lane, member = member] { plan.receiver_shape(lane, member); },
                   "expected one of 2 lanes of 1 ranks, got lane " + std::to_string(lane));
  }
  expect_refused([&] { plan.sender_shape(0, 2); }, "expected one of 1 lanes of 2 ranks, got lane 0, member 2");
}

TEST(Limits, LanesOfAnotherSizeThanTpTimesCpAreRefused) {
  Boundary broken = boundary({0, 1}, 2, 1);
  broken.lanes.front().pop_back();
  expect_refused([&] { Sides(broken, boundary({2}, 1, 1)); }, "expected lanes of 2 * 1 ranks, got 1");
}

TEST(Limits, RowShardsOfAnyNumbersAreRefusedOrInRange) {
  const std::vector<std::vector<Segment>> one{{{0, 3}, {1, 2}}};
  expect_refused([&] { RowShards(one, 2, kHuge); }, "row shards: expected at most");
  expect_refused([&] { RowShards(one, 2, kHuge, kHuge); }, "from sample " + std::to_string(kHuge) + " on");
  expect_refused([&] { RowShards({{{0, kHuge}, {1, kHuge}}}, 2, 1); }, "rows, got more with sample 0");
  const RowShards shards(one, 2, 1);
  EXPECT_EQ(shards.rows(kHuge), kUnknownRows);
  EXPECT_EQ(shards.rows(std::numeric_limits<std::int64_t>::min()), kUnknownRows);
  EXPECT_EQ(shards.hash(kHuge, std::numeric_limits<std::int64_t>::min()), shards.hash(1, 1));
  expect_refused([&] { shards.segments(0, kHuge); }, "are needed");
}

TEST(Limits, EmptyTensorsHaveNoElementsHoweverLongTheirOtherAxesAre) {
  const std::int64_t extent = std::int64_t{1} << 40;
  const auto empty = [](Box box) { return box.volume() == 0; };
  EXPECT_TRUE(empty({.size = {extent, extent, 0}}));
  EXPECT_TRUE(empty({.size = {extent, 0, extent}}));
  EXPECT_TRUE(empty({.size = {0, extent, extent}}));
  Microbatch microbatch;
  microbatch.ndim = 3;
  microbatch.samples = extent;
  microbatch.shape = {1, extent, 0};
  microbatch.seq_dim = 1;
  const Sides sides(boundary({0}, 1, 1), boundary({1, 2}, 2, 1));
  const Plan plan(std::make_shared<const Sides>(sides), microbatch, Direction::kForward, {});
  for (const int rank : {1, 2}) {
    EXPECT_TRUE(plan.for_rank(rank, false, true).receives.empty());
    EXPECT_TRUE(plan.reversed().for_rank(rank, true, false).sends.empty());
  }
}

TEST(Limits, StagesThatOverflowAreRefused) {
  const std::vector<std::int64_t> weights{kHuge, kHuge};
  const std::vector<std::vector<int>> downstream{{1}, {}};
  const std::vector<std::string> names{"a", "b"};
  expect_refused([&] { longest_path(weights, downstream, names, -1); }, "module a has " + std::to_string(kHuge));
}

}  // namespace
}  // namespace mimo_ext::core
