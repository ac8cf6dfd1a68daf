// The small host-side message that goes ahead of a payload whose shape the receiver does not know.
//
// Wire format: kWords little-endian int64, in the same message the payload where it is small (`payload_bytes`, filled
// up to whole words), then (only where there are more than kInlineRows row counts) one int64 per row count as a second
// message with a tag of its own. The beginning of a larger payload (`eager_bytes`) follows at once, with a tag of its
// own: its receive is posted before it is known what comes, and carries data while the rest is agreed on. Where the
// sender has given up, its reason stands in the place of the row counts, and nothing follows. Parsing trusts nothing:
// magic, version, sizes and ranges are checked.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace mimo_ext::comm {

struct Header {
  static constexpr std::int64_t kMagic = 0x4d494d4f45585431;  // "MIMOEXT1"
  static constexpr std::int64_t kVersion = 4;
  static constexpr std::size_t kWords = 64;
  static constexpr std::size_t kFixedWords = 17;
  static constexpr std::size_t kInlineRows = kWords - kFixedWords;
  /// A message of its own, and the answer that it waits for, cost more than this takes on the wire.
  static constexpr std::int64_t kMaxPayloadBytes = 16384;
  static constexpr std::size_t kMaxWords = kWords + kMaxPayloadBytes / 8;
  static constexpr std::size_t kTextBytes = kInlineRows * sizeof(std::int64_t);
  static constexpr std::int64_t kUnpaired = -1;  ///< `forward_sequence` of a gradient sent before its microbatch came
  static constexpr std::int64_t kMaxEagerBytes = 262144;
  using Words = std::array<std::int64_t, kWords>;

  std::int64_t sequence = 0;          ///< microbatch, counted per direction
  std::int64_t forward_sequence = 0;  ///< backward: the forward microbatch that this is the gradient of
  std::uint64_t config_hash = 0;      ///< layouts and tensor form that the sender believes in
  std::uint64_t row_shards_hash = 0;  ///< of the rows that the two lanes share; 0: every rank gets all rows
  bool no_gradient = false;           ///< backward: there is no gradient, and no payload follows
  bool expects_backward = true;       ///< forward: the sender will call recv_backward for this microbatch
  std::int64_t dtype = 0;             ///< c10::ScalarType
  std::int64_t ndim = 2;
  std::array<std::int64_t, 3> shape{1, 1, 1};  ///< of the whole lane; the batch axis is not used
  std::int64_t samples = 0;                    ///< of the global microbatch
  std::int64_t rows_per_sample = 0;            ///< 2-D without row counts
  std::int64_t num_rows = 0;                   ///< number of row counts: 0 or the samples of the sender's lane
  std::int64_t payload_bytes = 0;              ///< that follow in the same message
  std::int64_t eager_bytes = 0;                ///< that follow in a message of their own, unasked
  std::vector<std::int64_t> rows;              ///< row counts, num_rows of them
  std::string gave_up;                         ///< not empty: why nothing more comes; the rest does not count

  bool has_extension() const { return num_rows > static_cast<std::int64_t>(kInlineRows); }
  Words encode() const;
  /// Everything but the extension's row counts. Throws std::invalid_argument saying what is wrong.
  static Header decode(const Words& words);
  /// Takes the row counts of the second message. Throws std::invalid_argument.
  void set_extension(std::vector<std::int64_t> counts);
};

}  // namespace mimo_ext::comm
