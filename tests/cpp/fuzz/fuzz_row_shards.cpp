// Row shards of any numbers, and a plan that deals its rows by them. They are refused by name, or every row has one
// shard, and each member of the destination receives the rows of its own.
#include <optional>
#include <vector>

#include "core/limits.h"
#include "core/plan.h"
#include "numbers.h"

namespace mimo_ext {
namespace {

using core::RowShards;
using core::Segment;
using fuzz::accepted;
using fuzz::Numbers;
using fuzz::require;

std::shared_ptr<const RowShards> row_shards_of(Numbers& in) {
  const int num_shards = in.byte() < 250 ? static_cast<int>(1 + in.below(8)) : in.any_int();
  std::vector<std::vector<Segment>> segments(static_cast<std::size_t>(in.below(17)));
  for (auto& of_sample : segments) {
    for (std::int64_t left = in.below(6); left > 0; --left) {
      of_sample.push_back({in.byte() < 254 ? static_cast<int>(in.below(8)) % std::max(1, num_shards) : in.any_int(),
                           in.byte() < 250 ? in.below(9) : in.any()});
    }
  }
  const std::int64_t first = in.byte() < 192 ? 0 : in.any();
  const auto known = static_cast<std::int64_t>(segments.size());
  const std::int64_t samples =
      in.byte() < 250 ? core::saturating_add(std::max<std::int64_t>(0, first), known) : in.any();
  std::shared_ptr<const RowShards> shards;
  accepted([&] { shards = std::make_shared<const RowShards>(segments, num_shards, samples, first); });
  return shards;
}

/// What may be asked of it with any numbers.
void check_questions(const RowShards& shards, Numbers& in) {
  const std::int64_t first = in.any();
  const std::int64_t last = in.any();
  const int shard = in.any_int();
  accepted([&] { shards.rows_of_shard(shard, first, last); });
  accepted([&] { shards.segments(first, last); });
  accepted([&] { shards.hash(first, last); });
  require(shards.rows(first) >= core::kUnknownRows);
  std::int64_t by_sample = 0;
  std::int64_t by_segment = 0;
  for (std::int64_t sample = shards.first_known(); sample < shards.last_known(); ++sample) {
    by_sample += shards.rows(sample);
    for (const Segment& segment : shards.segments(sample, sample + 1)) {
      require(segment.shard >= 0 && segment.shard < shards.num_shards() && segment.rows > 0);
      by_segment += segment.rows;
    }
  }
  require(by_sample == by_segment && by_sample <= core::kMaxElements);
}

void check_plan(const std::shared_ptr<const RowShards>& shards, Numbers& in) {
  const auto boundary = [&in](int first_rank, int tp, int cp, int dp) {
    std::vector<int> ranks;
    for (int rank = 0; rank < tp * cp * dp; ++rank) ranks.push_back(first_rank + rank);
    const auto placement = static_cast<core::CpPlacement>(in.below(3));
    return core::Layout(ranks, {{"tp", tp}, {"cp", cp}, {"dp", dp}}, placement, in.flag(), "module").boundary(0);
  };
  const auto size = [&in](std::int64_t end) { return static_cast<int>(1 + in.below(end)); };
  const auto sides = std::make_shared<const core::Sides>(boundary(0, size(2), size(2), size(3)),
                                                         boundary(in.flag() ? 32 : 1, size(4), size(3), size(3)));
  core::Microbatch microbatch;
  microbatch.samples = in.byte() < 250 ? shards->num_samples() : in.any();
  microbatch.shape = {1, in.byte() < 250 ? in.below(4) : in.any(), 1};
  microbatch.row_shards = shards;
  core::PlanOptions options;
  options.chunking = {static_cast<int>(1 + in.below(5)), 1 + in.below(64)};
  options.path = static_cast<core::Path>(in.below(4));
  if (microbatch.samples > 4096) return;  // takes long
  const core::Boundary& destination = sides->destination();
  accepted([&] {
    const core::Plan plan(sides, microbatch, core::Direction::kForward, options);
    for (int lane = 0; lane < destination.num_lanes(); ++lane) {
      for (int member = 0; member < destination.lane_size(); ++member) {
        accepted([&] {
          const auto shape = plan.receiver_shape(lane, member);
          const int rank = destination.lanes[static_cast<std::size_t>(lane)][static_cast<std::size_t>(member)];
          const core::RankPlan mine = plan.for_rank(rank, false, true);
          std::int64_t arrived = 0;
          for (const auto* list : {&mine.receives, &mine.lane_receives}) {
            for (const core::Message& message : *list) {
              for (std::size_t axis = 0; axis < 2; ++axis) {
                require(message.recv_box.start[axis] >= 0);
                require(message.recv_box.start[axis] + message.recv_box.size[axis] <= shape[axis]);
              }
              arrived += message.recv_box.volume();
            }
          }
          require(arrived == shape[0] * shape[1]);
        });
      }
    }
    for (const auto& lane : sides->source().lanes) {
      for (int rank : lane) accepted([&] { plan.for_rank(rank, true, false); });
    }
    const core::Plan back = plan.reversed();
    for (const auto& lane : destination.lanes) {
      for (int rank : lane) accepted([&] { back.for_rank(rank); });
    }
  });
}

}  // namespace
}  // namespace mimo_ext

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace mimo_ext;
  Numbers in(data, size);
  const auto shards = row_shards_of(in);
  if (!shards) return 0;
  check_questions(*shards, in);
  check_plan(shards, in);
  return 0;
}
