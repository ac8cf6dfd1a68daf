#include "core/sides.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/hash.h"

namespace mimo_ext::core {

namespace {

void add(Fnv& fnv, const Boundary& boundary) {
  fnv.add(boundary.module);
  fnv.add(boundary.tp);
  fnv.add(boundary.cp);
  fnv.add(static_cast<std::int64_t>(boundary.cp_placement));
  fnv.add(boundary.sequence_parallel ? 1 : 0);
  fnv.add(boundary.num_lanes());
  for (const auto& lane : boundary.lanes) {
    for (int rank : lane) fnv.add(rank);
  }
}

void check_boundary(const Boundary& boundary, const char* side) {
  if (boundary.lanes.empty()) {
    throw std::invalid_argument(std::string(side) + " of the bridge ('" + boundary.module + "') has no ranks");
  }
  for (const auto& lane : boundary.lanes) {
    if (static_cast<std::int64_t>(lane.size()) == std::int64_t{boundary.tp} * boundary.cp && !lane.empty()) continue;
    throw std::invalid_argument(std::string(side) + " of the bridge ('" + boundary.module + "'): expected lanes of " +
                                std::to_string(boundary.tp) + " * " + std::to_string(boundary.cp) + " ranks, got " +
                                std::to_string(lane.size()));
  }
}

}  // namespace

std::uint64_t hash_of(const Boundary& source, const Boundary& destination) {
  Fnv fnv;
  add(fnv, source);
  add(fnv, destination);
  return fnv.value();
}

Sides::Sides(Boundary source, Boundary destination) : source_(std::move(source)), destination_(std::move(destination)) {
  check_boundary(source_, "source");
  check_boundary(destination_, "destination");
  source_places_ = places_of(source_);
  destination_places_ = places_of(destination_);
  disjoint_ = std::none_of(source_places_.begin(), source_places_.end(),
                           [this](const Place& place) { return find_destination(place.rank).first >= 0; });
  hash_ = hash_of(source_, destination_);
}

bool Sides::operator==(const Sides& other) const {
  return this == &other || (hash_ == other.hash_ && source_ == other.source_ && destination_ == other.destination_);
}

std::vector<Sides::Place> Sides::places_of(const Boundary& boundary) {
  std::vector<Place> places;
  for (int lane = 0; lane < boundary.num_lanes(); ++lane) {
    int member = 0;
    for (int rank : boundary.lanes[static_cast<std::size_t>(lane)]) places.push_back({rank, lane, member++});
  }
  std::sort(places.begin(), places.end(), [](const Place& a, const Place& b) { return a.rank < b.rank; });
  return places;
}

std::pair<int, int> Sides::find(const std::vector<Place>& places, int rank) {
  const auto found = std::lower_bound(places.begin(), places.end(), rank,
                                      [](const Place& place, int wanted) { return place.rank < wanted; });
  if (found == places.end() || found->rank != rank) return {-1, -1};
  return {found->lane, found->member};
}

}  // namespace mimo_ext::core
