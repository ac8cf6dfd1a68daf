// The two sides of a bridge, with what every plan needs to know of them: computed once, whatever the number of ranks.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "core/layout.h"

namespace mimo_ext::core {

/// Immutable; shared by all plans of a bridge.
class Sides {
 public:
  /// Throws std::invalid_argument for a side without ranks, or with lanes of other than tp * cp ranks.
  Sides(Boundary source, Boundary destination);

  const Boundary& source() const { return source_; }
  const Boundary& destination() const { return destination_; }
  /// (lane, member) of a global rank at the source, or at the destination; lane -1 where it is not there.
  std::pair<int, int> find_source(int rank) const { return find(source_places_, rank); }
  std::pair<int, int> find_destination(int rank) const { return find(destination_places_, rank); }
  /// No rank is on both sides.
  bool disjoint() const { return disjoint_; }
  /// Of both, the same on every machine.
  std::uint64_t hash() const { return hash_; }

  bool operator==(const Sides& other) const;

 private:
  struct Place {
    int rank = 0;
    int lane = 0;
    int member = 0;
  };
  static std::vector<Place> places_of(const Boundary& boundary);
  static std::pair<int, int> find(const std::vector<Place>& places, int rank);

  Boundary source_;
  Boundary destination_;
  std::vector<Place> source_places_;       ///< in ascending order of ranks
  std::vector<Place> destination_places_;  ///< in ascending order of ranks
  bool disjoint_;
  std::uint64_t hash_;
};

/// Of two boundaries: what two processes must agree on before the first microbatch.
std::uint64_t hash_of(const Boundary& source, const Boundary& destination);

}  // namespace mimo_ext::core
