#include <gtest/gtest.h>

#include <stdexcept>

#include "core/layout.h"

namespace mimo_ext::core {
namespace {

using Dims = std::vector<std::pair<std::string, int>>;

Layout make(std::vector<int> ranks, Dims dims, CpPlacement placement = CpPlacement::kReplicated, bool sp = false) {
  return Layout(std::move(ranks), std::move(dims), placement, sp, "images");
}

std::string error_of(std::vector<int> ranks, Dims dims) {
  try {
    make(std::move(ranks), std::move(dims));
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "no error";
}

TEST(Layout, FirstDimVariesFastest) {
  const auto boundary = make({0, 1, 2, 3, 4, 5, 6, 7}, {{"tp", 2}, {"cp", 2}, {"dp", 2}}).boundary(-1);
  EXPECT_EQ(boundary.lanes, (std::vector<std::vector<int>>{{0, 1, 2, 3}, {4, 5, 6, 7}}));
}

TEST(Layout, MembersAreTpFastestWhateverTheOrderOfDims) {
  const auto boundary = make({0, 1, 2, 3, 4, 5, 6, 7}, {{"dp", 2}, {"cp", 2}, {"tp", 2}}).boundary(-1);
  EXPECT_EQ(boundary.lanes, (std::vector<std::vector<int>>{{0, 4, 2, 6}, {1, 5, 3, 7}}));
}

TEST(Layout, StagesOfThePipeline) {
  const auto layout = make({8, 9, 10, 11}, {{"tp", 2}, {"pp", 2}});
  EXPECT_EQ(layout.boundary(0).lanes, (std::vector<std::vector<int>>{{8, 9}}));
  EXPECT_EQ(layout.boundary(-1).lanes, (std::vector<std::vector<int>>{{10, 11}}));
  EXPECT_EQ(layout.boundary(1), layout.boundary(-1));
  EXPECT_THROW(layout.boundary(2), std::out_of_range);
  EXPECT_THROW(layout.boundary(-3), std::out_of_range);
}

TEST(Layout, RematCountsAsDataParallel) {
  const auto boundary = make({0, 1, 2, 3, 4, 5}, {{"gtp_remat", 2}, {"dp", 3}}).boundary(0);
  EXPECT_EQ(boundary.num_lanes(), 6);
  EXPECT_EQ(boundary.lanes[3], std::vector<int>{3});
}

TEST(Layout, RefusesWhatDoesNotTile) {
  EXPECT_EQ(error_of({0, 1, 2}, {{"tp", 2}}), "layout of module 'images': tp=2 needs 2 ranks, got 3");
  EXPECT_EQ(error_of({0, 0}, {{"tp", 2}}), "layout of module 'images': rank 0 is listed twice");
  EXPECT_EQ(error_of({0, -1}, {{"tp", 2}}), "layout of module 'images': ranks must not be negative, got -1");
  EXPECT_EQ(error_of({}, {{"tp", 0}}), "layout of module 'images': size of dim 'tp' must be positive, got 0");
  EXPECT_EQ(error_of({0, 1}, {{"tp", 2}, {"tp", 1}}), "layout of module 'images': dim 'tp' is given twice");
  EXPECT_NE(error_of({0, 1}, {{"ep", 2}}).find("unknown dim 'ep' of size 2"), std::string::npos);
  EXPECT_EQ(error_of({0}, {{"ep", 1}}), "no error");
}

TEST(Layout, PlacementNames) {
  for (auto placement : {CpPlacement::kReplicated, CpPlacement::kContiguous, CpPlacement::kZigzag}) {
    EXPECT_EQ(parse_cp_placement(to_string(placement)), placement);
  }
  EXPECT_THROW(parse_cp_placement("zig-zag"), std::invalid_argument);
}

TEST(Boundary, ReplicasAreOneShard) {
  const auto boundary = make({0, 1, 2, 3}, {{"tp", 2}, {"cp", 2}}).boundary(0);
  EXPECT_FALSE(boundary.sharded());
  EXPECT_EQ(boundary.members_of_shard(0), (std::vector<int>{0, 1, 2, 3}));
  EXPECT_EQ(boundary.runs_of_shard(0, 10), (std::vector<core::Run>{{0, 10, 0}}));
}

TEST(Boundary, SequenceParallelShards) {
  const auto boundary = make({0, 1, 2, 3}, {{"tp", 2}, {"cp", 2}}, CpPlacement::kReplicated, true).boundary(0);
  EXPECT_EQ(boundary.num_shards(), 2);
  EXPECT_EQ(boundary.members_of_shard(1), (std::vector<int>{1, 3}));  // the tp rank 1 of both cp copies
  EXPECT_EQ(boundary.runs_of_shard(1, 10), (std::vector<core::Run>{{5, 5, 0}}));
}

TEST(Boundary, ZigzagTakesAChunkFromEachEnd) {
  const auto boundary = make({0, 1}, {{"cp", 2}}, CpPlacement::kZigzag).boundary(0);
  EXPECT_EQ(boundary.runs_of_shard(0, 8), (std::vector<core::Run>{{0, 2, 0}, {6, 2, 2}}));
  EXPECT_EQ(boundary.runs_of_shard(1, 8), (std::vector<core::Run>{{2, 2, 0}, {4, 2, 2}}));
}

TEST(Boundary, SequenceParallelSplitsWhatTheCpRankHolds) {
  const auto boundary = make({0, 1, 2, 3}, {{"tp", 2}, {"cp", 2}}, CpPlacement::kZigzag, true).boundary(0);
  EXPECT_EQ(boundary.num_shards(), 4);
  EXPECT_EQ(boundary.runs_of_shard(boundary.shard_of(0), 16), (std::vector<core::Run>{{0, 4, 0}}));
  EXPECT_EQ(boundary.runs_of_shard(boundary.shard_of(1), 16), (std::vector<core::Run>{{12, 4, 0}}));
}

/// Every row belongs to exactly one shard, and local rows are numbered without gaps.
TEST(Boundary, ShardsTileTheSequence) {
  for (auto placement : {CpPlacement::kReplicated, CpPlacement::kContiguous, CpPlacement::kZigzag}) {
    for (bool sp : {false, true}) {
      const auto boundary = make({0, 1, 2, 3, 4, 5}, {{"tp", 2}, {"cp", 3}}, placement, sp).boundary(0);
      for (std::int64_t extent : {0, 1, 5, 12, 37}) {
        std::vector<int> seen(static_cast<std::size_t>(extent), 0);
        for (int shard = 0; shard < boundary.num_shards(); ++shard) {
          std::int64_t local = 0;
          for (const core::Run& run : boundary.runs_of_shard(shard, extent)) {
            EXPECT_EQ(run.local_start, local);
            local += run.length;
            for (std::int64_t row = run.start; row < run.start + run.length; ++row) {
              ++seen[static_cast<std::size_t>(row)];
            }
          }
        }
        EXPECT_EQ(seen, std::vector<int>(static_cast<std::size_t>(extent), 1));
      }
    }
  }
}

TEST(Boundary, Find) {
  const auto boundary = make({5, 6, 7, 8}, {{"tp", 2}, {"dp", 2}}).boundary(0);
  EXPECT_EQ(boundary.find(7), (std::pair{1, 0}));
  EXPECT_EQ(boundary.find(4), (std::pair{-1, -1}));
}

}  // namespace
}  // namespace mimo_ext::core
