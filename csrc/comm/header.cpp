#include "comm/header.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "core/limits.h"

namespace mimo_ext::comm {

namespace {

constexpr std::int64_t kNoGradient = 1;
constexpr std::int64_t kExpectsBackward = 2;
constexpr std::int64_t kGaveUp = 4;
constexpr std::int64_t kMaxExtent = core::kMaxElements;

[[noreturn]] void bad(const std::string& what) {
  throw std::invalid_argument("malformed header: " + what);
}

void check_range(const char* name, std::int64_t value, std::int64_t last) {
  if (value < 0 || value > last) {
    bad(std::string(name) + " is " + std::to_string(value) + ", expected 0.." + std::to_string(last));
  }
}

void check_rows(const std::vector<std::int64_t>& rows) {
  std::int64_t total = 0;
  for (std::int64_t count : rows) {
    check_range("a row count", count, kMaxExtent);
    total += count;
    check_range("the sum of the row counts", total, kMaxExtent);
  }
}

}  // namespace

namespace {

/// Of a peer: as much as is there, in characters that any log can show.
std::string text_of(const std::array<char, Header::kTextBytes>& bytes) {
  std::string text(bytes.begin(), std::find(bytes.begin(), bytes.end(), '\0'));
  std::replace_if(text.begin(), text.end(), [](char letter) { return letter < ' ' || letter > '~'; }, '?');
  return text.empty() ? "no reason was given" : text;
}

}  // namespace

Header::Words Header::encode() const {
  Words words{};
  const std::int64_t flags =
      (no_gradient ? kNoGradient : 0) | (expects_backward ? kExpectsBackward : 0) | (gave_up.empty() ? 0 : kGaveUp);
  const std::array<std::int64_t, kFixedWords> fixed{kMagic,
                                                    kVersion,
                                                    sequence,
                                                    static_cast<std::int64_t>(config_hash),
                                                    flags,
                                                    dtype,
                                                    ndim,
                                                    shape[0],
                                                    shape[1],
                                                    shape[2],
                                                    samples,
                                                    rows_per_sample,
                                                    num_rows,
                                                    forward_sequence,
                                                    static_cast<std::int64_t>(row_shards_hash),
                                                    payload_bytes,
                                                    eager_bytes};
  std::copy(fixed.begin(), fixed.end(), words.begin());
  if (!gave_up.empty()) {
    std::memcpy(&words[kFixedWords], gave_up.data(), std::min(gave_up.size(), kTextBytes));
    return words;
  }
  if (!has_extension()) std::copy(rows.begin(), rows.end(), words.begin() + kFixedWords);
  return words;
}

Header Header::decode(const Words& words) {
  if (words[0] != kMagic) bad("this is not a header of mimo_ext");
  if (words[1] != kVersion) {
    bad("format version " + std::to_string(words[1]) + ", expected " + std::to_string(kVersion) +
        ": the ranks run different versions of mimo_ext");
  }
  Header header;
  header.sequence = words[2];
  header.forward_sequence = words[13];
  header.config_hash = static_cast<std::uint64_t>(words[3]);
  header.row_shards_hash = static_cast<std::uint64_t>(words[14]);
  check_range("flags", words[4], kNoGradient | kExpectsBackward | kGaveUp);
  if ((words[4] & kGaveUp) != 0) {
    std::array<char, kTextBytes> bytes{};
    std::memcpy(bytes.data(), &words[kFixedWords], kTextBytes);
    header.gave_up = text_of(bytes);
    return header;
  }
  header.payload_bytes = words[15];
  check_range("payload_bytes", header.payload_bytes, kMaxPayloadBytes);
  header.eager_bytes = words[16];
  check_range("eager_bytes", header.eager_bytes, kMaxEagerBytes);
  header.no_gradient = (words[4] & kNoGradient) != 0;
  header.expects_backward = (words[4] & kExpectsBackward) != 0;
  header.dtype = words[5];
  check_range("dtype", header.dtype, 127);
  header.ndim = words[6];
  if (header.ndim != 2 && header.ndim != 3) bad("ndim is " + std::to_string(header.ndim) + ", expected 2 or 3");
  for (std::size_t axis = 0; axis < 3; ++axis) {
    header.shape[axis] = words[7 + axis];
    check_range("an extent", header.shape[axis], kMaxExtent);
  }
  header.samples = words[10];
  check_range("samples", header.samples, core::kMaxSamples);
  header.rows_per_sample = words[11];
  check_range("rows_per_sample", header.rows_per_sample, kMaxExtent);
  if (header.samples > 0 && header.rows_per_sample > kMaxExtent / header.samples) {
    bad(std::to_string(header.samples) + " samples of " + std::to_string(header.rows_per_sample) + " rows");
  }
  header.num_rows = words[12];
  check_range("the number of row counts", header.num_rows, std::min(header.samples, core::kMaxRowCounts));
  if (!header.has_extension()) {
    const auto begin = words.begin() + kFixedWords;
    header.rows.assign(begin, begin + header.num_rows);
    check_rows(header.rows);
  }
  return header;
}

void Header::set_extension(std::vector<std::int64_t> counts) {
  if (static_cast<std::int64_t>(counts.size()) != num_rows) {
    bad("expected " + std::to_string(num_rows) + " row counts, got " + std::to_string(counts.size()));
  }
  check_rows(counts);
  rows = std::move(counts);
}

}  // namespace mimo_ext::comm
