// One bridge and one global microbatch, drawn at random: what every property is checked on.
//
// A setting is a flat list of named integers, so that a failing one can be printed on a line, read back, and made
// smaller field by field.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/plan.h"

namespace mimo_ext::properties {

/// One side of the bridge.
struct Side {
  std::int64_t lanes = 1;
  std::int64_t tp = 1;
  std::int64_t cp = 1;
  std::int64_t placement = 0;  ///< a core::CpPlacement
  std::int64_t sp = 0;         ///< sequence parallel
  std::int64_t first = 0;      ///< rank
  std::int64_t mixed = 0;      ///< 1: neighbouring ranks are in different lanes (dp varies fastest)

  core::Boundary boundary(const char* name) const;
  std::int64_t ranks() const { return lanes * tp * cp; }
  bool sharded() const { return (placement != 0 && cp > 1) || (sp != 0 && tp > 1); }

  bool operator==(const Side&) const = default;
};

struct Setting {
  Side src;
  Side dst;
  std::int64_t ndim = 2;
  std::int64_t batch_dim = 0;  ///< of 3-D tensors, as seq_dim, seq
  std::int64_t seq_dim = 1;
  std::int64_t samples = 1;
  std::int64_t seq = 1;
  std::int64_t hidden = 1;
  std::vector<std::int64_t> rows;  ///< of each sample of a 2-D tensor
  std::int64_t told = 0;           ///< bit l: source lane l tells the rows of its samples; else they are all equal
  std::int64_t fixed = 0;          ///< static shapes: nothing but payload travels
  std::int64_t element = 1;        ///< bytes
  std::int64_t path = 0;           ///< a core::Path
  std::int64_t chunks = 8;
  std::int64_t chunk_bytes = 65536;
  std::int64_t links = 0;   ///< 0: not given; else one of a few
  std::int64_t hosts = 0;   ///< ranks per host, where links are given
  std::int64_t shards = 0;  ///< 1: row shards, one for each cp rank of the destination; 2: one for each of its tp * cp
  std::int64_t dealt = 0;   ///< seed of the row shards
  // How it is used.
  std::int64_t microbatches = 1;
  std::int64_t in_flight = 32;
  std::int64_t turns = 0;  ///< 1: a backward after each forward; 0: after all of them
  std::int64_t none = 0;   ///< bit l: destination lane l has no gradient

  /// Throws std::invalid_argument for a name that is not a field, or no number.
  static Setting parse(const std::string& text);
  /// Fields that differ from the defaults above, e.g. "src.lanes=2 dst.tp=2 rows=3,1".
  std::string to_string() const;
  /// Could a program set it up? Drawn settings always.
  bool valid() const;
  /// Settings that are a little simpler, the simplest first.
  std::vector<Setting> simpler() const;

  core::Boundary source() const { return src.boundary("images"); }
  core::Boundary destination() const { return dst.boundary("language"); }
  core::PlanOptions options() const;
  std::int64_t rows_of(std::int64_t first_sample, std::int64_t last_sample) const;
  bool tells(std::int64_t source_lane) const { return (told >> source_lane & 1) != 0; }
  bool has_gradient(std::int64_t destination_lane) const { return (none >> destination_lane & 1) == 0; }
  bool is_3d() const { return ndim == 3; }

  /// With all that there is to know.
  core::Microbatch microbatch() const;
  /// What a rank of a source lane knows before it sends, and what a rank of a destination lane has learned from the
  /// headers that it gets: comm/config.cpp and comm/channel_headers.cpp. Throw std::invalid_argument where these
  /// refuse.
  core::Microbatch known_to_source(int lane) const;
  core::Microbatch known_to_destination(int lane) const;
  /// The shard of each row of the global microbatch.
  std::vector<int> shard_of_rows() const;

  bool operator==(const Setting&) const = default;

 private:
  core::Microbatch shape() const;
  std::shared_ptr<const core::RowShards> row_shards(std::int64_t first_sample, std::int64_t last_sample) const;
};

/// The `index`-th setting of a seed, the same on every machine.
Setting draw(std::uint64_t seed, std::uint64_t index);

/// Numbers of a seed that are the same with every standard library, unlike those of std::uniform_int_distribution.
class Draw {
 public:
  explicit Draw(std::uint64_t seed) : engine_(seed) {}
  /// In [low, high].
  std::int64_t operator()(std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(engine_() % static_cast<std::uint64_t>(high - low + 1));
  }
  bool once_in(std::int64_t times) { return (*this)(1, times) == 1; }
  std::int64_t one_of(std::initializer_list<std::int64_t> values) {
    return *(values.begin() + (*this)(0, static_cast<std::int64_t>(values.size()) - 1));
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace mimo_ext::properties
