// A header from a peer: any 64 words, then any row counts. It is refused, or everything in it is in range, a header
// made of it again is the same, and a plan can be made for what it describes.
#include <algorithm>
#include <cstring>
#include <vector>

#include "comm/header.h"
#include "core/limits.h"
#include "core/plan.h"
#include "numbers.h"

namespace mimo_ext {
namespace {

using comm::Header;
using fuzz::accepted;
using fuzz::require;

constexpr std::int64_t kSmall = 4096;  // samples for which a plan is made here

void check_ranges(const Header& header) {
  require(header.ndim == 2 || header.ndim == 3);
  for (std::int64_t extent : header.shape) require(extent >= 0 && extent <= core::kMaxElements);
  require(header.samples >= 0 && header.samples <= core::kMaxSamples);
  require(header.payload_bytes >= 0 && header.payload_bytes <= Header::kMaxPayloadBytes);
  require(header.eager_bytes >= 0 && header.eager_bytes <= Header::kMaxEagerBytes);
  require(header.num_rows >= 0 && header.num_rows <= header.samples && header.num_rows <= core::kMaxRowCounts);
  std::int64_t total = 0;
  for (std::int64_t rows : header.rows) {
    require(rows >= 0);
    total += rows;  // the sanitizer watches
  }
  require(total <= core::kMaxElements);
}

void check_same(const Header& a, const Header& b) {
  require(a.sequence == b.sequence && a.forward_sequence == b.forward_sequence && a.config_hash == b.config_hash);
  require(a.row_shards_hash == b.row_shards_hash && a.no_gradient == b.no_gradient && a.dtype == b.dtype);
  require(a.expects_backward == b.expects_backward && a.ndim == b.ndim && a.shape == b.shape);
  require(a.samples == b.samples && a.rows_per_sample == b.rows_per_sample && a.num_rows == b.num_rows);
  require(a.gave_up == b.gave_up && a.payload_bytes == b.payload_bytes && a.eager_bytes == b.eager_bytes);
  require(a.has_extension() == b.has_extension() && (a.has_extension() || a.rows == b.rows));
}

/// What a receiver makes of the header of the only sender lane.
void check_plan(const Header& header) {
  const auto boundary = [](std::vector<int> ranks, int tp, int dp) {
    return core::Layout(std::move(ranks), {{"tp", tp}, {"dp", dp}}, core::CpPlacement::kReplicated, false, "module")
        .boundary(0);
  };
  static const auto sides = std::make_shared<const core::Sides>(boundary({0, 1}, 2, 1), boundary({2, 3, 4}, 1, 3));
  core::Microbatch microbatch;
  microbatch.ndim = static_cast<int>(header.ndim);
  microbatch.seq_dim = microbatch.ndim == 3 ? 1 : 0;
  microbatch.samples = header.samples;
  microbatch.shape = header.shape;
  microbatch.rows_per_sample = header.rows_per_sample;
  microbatch.element_size = 4;
  microbatch.rows = header.rows;
  accepted([&] {
    const core::Plan plan(sides, microbatch, core::Direction::kForward);
    for (int rank = 0; rank < 5; ++rank) plan.for_rank(rank);
    plan.reversed().for_rank(0);
  });
}

}  // namespace
}  // namespace mimo_ext

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace mimo_ext;
  Header::Words words{};
  const std::size_t count = std::min(size, sizeof(words));
  if (count > 0) std::memcpy(words.data(), data, count);
  // The magic and the version are seldom guessed: the first byte says whether they are right.
  if (size > 0 && data[0] % 8 != 0) {
    words[0] = Header::kMagic;
    words[1] = Header::kVersion;
  }
  Header header;
  if (!accepted([&] { header = Header::decode(words); })) return 0;
  check_ranges(header);
  check_same(header, Header::decode(header.encode()));
  if (!header.gave_up.empty()) {
    for (const char letter : header.gave_up) require(letter >= ' ' && letter <= '~');
    return 0;
  }
  if (header.has_extension()) {
    std::vector<std::int64_t> rows((size - count) / sizeof(std::int64_t));
    if (!rows.empty()) std::memcpy(rows.data(), data + count, rows.size() * sizeof(std::int64_t));
    // As many as were announced, or not: both happen.
    if (size % 2 == 1 && header.num_rows <= kSmall) rows.resize(static_cast<std::size_t>(header.num_rows));
    if (!accepted([&] { header.set_extension(rows); })) return 0;
    require(static_cast<std::int64_t>(header.rows.size()) == header.num_rows);
    check_ranges(header);
  }
  if (header.samples <= kSmall) check_plan(header);
  return 0;
}
