#include "core/stages.h"

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace mimo_ext::core {
namespace {

struct Graph {
  std::vector<std::int64_t> weights;
  std::vector<std::vector<int>> downstream;
  std::vector<std::string> names;

  std::int64_t length(int target = -1) const { return longest_path(weights, downstream, names, target); }

  std::string error(int target = -1) const {
    try {
      length(target);
    } catch (const std::invalid_argument& refused) {
      return refused.what();
    }
    return "";
  }
};

// images (2 stages) and audio (3) feed language (4), which feeds a generator (1).
const Graph kModel{{2, 3, 4, 1}, {{2}, {2}, {3}, {}}, {"images", "audio", "language", "generator"}};

TEST(LongestPath, TakesTheDeeperEncoder) {
  EXPECT_EQ(kModel.length(), 3 + 4 + 1);
}

TEST(LongestPath, EndsAtTheTarget) {
  EXPECT_EQ(kModel.length(0), 2);
  EXPECT_EQ(kModel.length(1), 3);
  EXPECT_EQ(kModel.length(2), 3 + 4);
  EXPECT_EQ(kModel.length(3), 3 + 4 + 1);
}

TEST(LongestPath, SeparateModelsDoNotAdd) {
  const Graph two{{5, 7, 1}, {{2}, {}, {}}, {"a", "b", "c"}};
  EXPECT_EQ(two.length(), 7);
  EXPECT_EQ(two.length(2), 6);
}

TEST(LongestPath, NodesInAnyOrder) {
  const Graph reversed{{1, 4, 3, 2}, {{}, {0}, {1}, {1}}, {"generator", "language", "audio", "images"}};
  EXPECT_EQ(reversed.length(), 8);
}

TEST(LongestPath, EmptyGraphHasNoStages) {
  EXPECT_EQ((Graph{{}, {}, {}}).length(), 0);
}

TEST(LongestPath, IsLinearWherePathsAreExponential) {
  // A ladder of diamonds: 2^1000 paths. Odd nodes 3k + 1 weigh 2, even branches 1.
  Graph ladder;
  constexpr int kDiamonds = 1000;
  for (int k = 0; k < kDiamonds; ++k) {
    const int first = 3 * k;
    ladder.weights.insert(ladder.weights.end(), {1, 2, 1});
    ladder.downstream.push_back({first + 1, first + 2});
    ladder.downstream.push_back({first + 3});
    ladder.downstream.push_back({first + 3});
  }
  ladder.weights.push_back(1);
  ladder.downstream.emplace_back();
  ladder.names.assign(ladder.weights.size(), "m");
  EXPECT_EQ(ladder.length(), 3 * kDiamonds + 1);
}

TEST(LongestPath, CycleIsNamedInOrder) {
  const Graph cyclic{{1, 1, 1, 1}, {{1}, {2}, {3}, {1}}, {"start", "a", "b", "c"}};
  const auto message = cyclic.error();
  // The cycle may be told from any of its modules on; the one outside it must not appear.
  EXPECT_TRUE(message.find("a -> b -> c -> a") != std::string::npos ||
              message.find("b -> c -> a -> b") != std::string::npos ||
              message.find("c -> a -> b -> c") != std::string::npos)
      << message;
  EXPECT_EQ(message.find("start"), std::string::npos) << message;
}

TEST(LongestPath, CycleIsNotBlamedOnWhatItFeeds) {
  const Graph cyclic{{1, 1, 1}, {{1}, {0, 2}, {}}, {"a", "b", "sink"}};
  const auto message = cyclic.error();
  EXPECT_NE(message.find("cycle"), std::string::npos) << message;
  EXPECT_EQ(message.find("sink"), std::string::npos) << message;
}

TEST(LongestPath, CycleElsewhereIsRefusedForAnyTarget) {
  const Graph cyclic{{1, 1, 1}, {{1}, {0}, {}}, {"a", "b", "alone"}};
  EXPECT_NE(cyclic.error(2).find("cycle"), std::string::npos);
}

TEST(LongestPath, SelfLoopIsACycle) {
  EXPECT_NE((Graph{{1}, {{0}}, {"a"}}).error().find("a -> a"), std::string::npos);
}

TEST(LongestPath, RefusesWhatIsNoGraph) {
  EXPECT_NE((Graph{{1}, {{}, {}}, {"a"}}).error().find("expected as many"), std::string::npos);
  EXPECT_NE((Graph{{1}, {{1}}, {"a"}}).error().find("index 1"), std::string::npos);
  EXPECT_NE((Graph{{1}, {{-1}}, {"a"}}).error().find("index -1"), std::string::npos);
  EXPECT_NE((Graph{{-1}, {{}}, {"a"}}).error().find("a has -1"), std::string::npos);
  EXPECT_NE((Graph{{1, 1}, {{1, 1}, {}}, {"a", "b"}}).error().find("a lists b twice"), std::string::npos);
  EXPECT_NE(kModel.error(4).find("index 4"), std::string::npos);
  EXPECT_NE(kModel.error(-2).find("index -2"), std::string::npos);
}

}  // namespace
}  // namespace mimo_ext::core
