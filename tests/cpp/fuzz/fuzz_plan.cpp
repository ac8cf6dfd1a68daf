// Layouts and microbatches of any numbers. They are refused by name, or their plan is complete: every element of every
// receiver arrives exactly once from the sender's side, inside both tensors, and both ends list the same messages.
#include <algorithm>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "core/limits.h"
#include "core/plan.h"
#include "numbers.h"

namespace mimo_ext {
namespace {

using core::Box;
using core::Message;
using core::Plan;
using fuzz::accepted;
using fuzz::Numbers;
using fuzz::require;

constexpr int kMostRanks = 12;         // of a side: the check looks at all pairs
constexpr std::int64_t kFew = 1 << 9;  // elements that are counted one by one

std::optional<core::Layout> layout_of(Numbers& in, int first_rank) {
  static const char* const names[] = {"tp", "cp", "dp", "pp", "gtp_remat", "ep"};
  std::vector<std::pair<std::string, int>> dims;
  std::int64_t product = 1;
  for (std::int64_t left = in.below(6); left > 0; --left) {
    const int size = in.byte() < 240 ? static_cast<int>(1 + in.below(4)) : in.any_int();
    dims.emplace_back(names[in.below(6)], size);
    product = size > 0 ? core::saturating_mul(product, size) : 0;
  }
  // Mostly as many ranks as the dims need.
  const std::int64_t wanted = in.byte() < 250 ? product : in.byte();
  std::vector<int> ranks;
  const bool odd = in.byte() >= 250;
  for (std::int64_t rank = 0; rank < std::min<std::int64_t>(wanted, kMostRanks); ++rank) {
    ranks.push_back(odd ? in.any_int() : first_rank + static_cast<int>(rank));
  }
  const auto placement = static_cast<core::CpPlacement>(in.below(3));
  std::optional<core::Layout> layout;
  const bool sequence_parallel = in.flag();
  accepted([&] { layout.emplace(ranks, dims, placement, sequence_parallel, "module"); });
  return layout;
}

core::Microbatch microbatch_of(Numbers& in) {
  core::Microbatch microbatch;
  const std::int64_t kind = in.byte();
  microbatch.ndim = kind >= 250 ? in.any_int() : kind % 2 == 0 ? 2 : 3;
  microbatch.batch_dim = kind >= 248 ? in.any_int() : microbatch.ndim == 3 ? static_cast<int>(in.below(3)) : 0;
  const auto other = static_cast<int>((std::int64_t{microbatch.batch_dim} + 1 + in.below(2)) % 3);
  microbatch.seq_dim = kind >= 248 ? in.any_int() : microbatch.ndim == 3 ? other : 0;
  microbatch.samples = in.any();
  for (std::int64_t& extent : microbatch.shape) extent = in.any();
  if (microbatch.ndim == 2 && in.byte() < 250) microbatch.shape[2] = 1;
  microbatch.rows_per_sample = in.any();
  if (in.flag()) {
    const bool fits = in.byte() < 250 && microbatch.samples >= 0 && microbatch.samples <= 64;
    microbatch.rows.resize(static_cast<std::size_t>(fits ? microbatch.samples : in.below(65)));
    for (std::int64_t& rows : microbatch.rows) rows = in.any();
  }
  microbatch.element_size = in.byte() < 250 ? 1 << in.below(5) : in.any_int();
  return microbatch;
}

core::PlanOptions options_of(Numbers& in) {
  core::PlanOptions options;
  options.chunking.max_chunks = in.byte() < 250 ? static_cast<int>(1 + in.below(9)) : in.any_int();
  options.chunking.min_bytes = in.any();
  options.path = static_cast<core::Path>(in.below(4));
  if (in.flag()) {
    options.links = {in.any(), in.any(), in.any(), in.any(), in.any_int()};
  }
  return options;
}

std::int64_t volume_of(const std::array<std::int64_t, core::kMaxDims>& shape) {
  return Box{.size = shape}.volume();
}

void check_inside(const Box& box, const std::array<std::int64_t, core::kMaxDims>& shape) {
  for (std::size_t axis = 0; axis < core::kMaxDims; ++axis) {
    require(box.size[axis] >= 0);
    if (box.start[axis] == core::kUnknownRows) continue;
    require(box.start[axis] >= 0 && box.start[axis] + box.size[axis] <= shape[axis]);
  }
  require(box.volume() > 0);
}

/// The elements of a receiver's tensor, and how often each arrives.
class Arrivals {
 public:
  explicit Arrivals(const std::array<std::int64_t, core::kMaxDims>& shape)
      : shape_(shape), times_(static_cast<std::size_t>(volume_of(shape))) {}

  void add(const Box& box) {
    for (std::int64_t a = 0; a < box.size[0]; ++a) {
      for (std::int64_t b = 0; b < box.size[1]; ++b) {
        for (std::int64_t c = 0; c < box.size[2]; ++c) {
          const std::int64_t row = (box.start[0] + a) * shape_[1] + box.start[1] + b;
          ++times_.at(static_cast<std::size_t>(row * shape_[2] + box.start[2] + c));
        }
      }
    }
  }
  bool each(int times) const {
    return std::all_of(times_.begin(), times_.end(), [times](int count) { return count == times; });
  }

 private:
  std::array<std::int64_t, core::kMaxDims> shape_;
  std::vector<int> times_;
};

/// Of one rank as a receiver: everything arrives as often as there are contributions.
void check_receiver(const Plan& plan, int lane, int member, const core::RankPlan& mine) {
  const auto shape = plan.receiver_shape(lane, member);
  for (const Message& message : mine.receives) check_inside(message.recv_box, shape);
  for (const Message& message : mine.lane_receives) check_inside(message.recv_box, shape);
  if (volume_of(shape) == 0 || volume_of(shape) > kFew) return;
  std::map<int, Arrivals> by_contribution;
  by_contribution.emplace(0, shape);
  for (const Message& message : mine.receives) {
    const auto [of, added] = by_contribution.emplace(message.contribution, shape);
    of->second.add(message.recv_box);
  }
  // What replicas forward is the sum of all contributions; what is received here of a later one was added before.
  for (const Message& message : mine.lane_receives) by_contribution.at(0).add(message.recv_box);
  require(by_contribution.at(0).each(1));
}

void check_plan(const Plan& plan) {
  std::map<std::pair<int, int>, std::vector<Message>> sent;
  std::map<std::pair<int, int>, std::vector<Message>> received;
  bool all_known = true;
  const auto visit = [&](const core::Boundary& boundary, bool sending) {
    for (int lane = 0; lane < boundary.num_lanes(); ++lane) {
      for (int member = 0; member < boundary.lane_size(); ++member) {
        const int rank = boundary.lanes[static_cast<std::size_t>(lane)][static_cast<std::size_t>(member)];
        const bool known = accepted([&] {
          const core::RankPlan mine = plan.for_rank(rank, sending, !sending);
          if (sending) {
            const auto shape = plan.sender_shape(lane, member);
            for (const Message& message : mine.sends) check_inside(message.send_box, shape);
          } else {
            check_receiver(plan, lane, member, mine);
          }
          for (const Message& m : mine.sends) sent[{m.sender, m.receiver}].push_back(m);
          for (const Message& m : mine.receives) received[{m.sender, m.receiver}].push_back(m);
          for (const Message& m : mine.lane_sends) sent[{m.sender, -1 - m.receiver}].push_back(m);
          for (const Message& m : mine.lane_receives) received[{m.sender, -1 - m.receiver}].push_back(m);
        });
        all_known = all_known && known;
      }
    }
  };
  visit(plan.sender(), true);
  visit(plan.receiver(), false);
  if (!all_known) return;
  require(sent.size() == received.size());
  for (const auto& [between, messages] : sent) {
    const auto& others = received[between];
    require(messages.size() == others.size());
    for (std::size_t index = 0; index < messages.size(); ++index) {
      require(messages[index].send_box.size == others[index].send_box.size);
      require(messages[index].recv_box.size == others[index].recv_box.size);
      require(messages[index].chunk == others[index].chunk);
      require(messages[index].contribution == others[index].contribution);
    }
  }
}

}  // namespace
}  // namespace mimo_ext

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace mimo_ext;
  Numbers in(data, size);
  const auto source = layout_of(in, 0);
  // Sides that share ranks, wholly or in part, too.
  const auto destination = layout_of(in, in.flag() ? kMostRanks : static_cast<int>(in.below(8)));
  if (!source || !destination) return 0;
  const int stage = in.byte() < 240 ? -1 : in.any_int();
  const core::Microbatch microbatch = microbatch_of(in);
  const core::PlanOptions options = options_of(in);
  accepted([&] {
    const auto sides = std::make_shared<const core::Sides>(source->boundary(stage), destination->boundary(0));
    const Plan plan(sides, microbatch, core::Direction::kForward, options);
    require(plan.hash() == Plan(sides, microbatch, core::Direction::kForward, options).hash());
    check_plan(plan);
    check_plan(plan.reversed());
    plan.paths();
    plan.to_string(8);
  });
  return 0;
}
