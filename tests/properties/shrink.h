// A failing case, made as simple as it goes.
#pragma once

#include <exception>
#include <string>

namespace mimo_ext::properties {

template <typename Case>
struct Shrunk {
  Case least;
  std::string error;
  Case original;
};

/// Follows simpler() as long as `check` throws. What it throws may change on the way: the simplest failure counts.
template <typename Case, typename Check>
Shrunk<Case> shrink(const Case& original, const Check& check) {
  const auto error_of = [&](const Case& candidate) -> std::string {
    try {
      check(candidate);
    } catch (const std::exception& error) {
      return error.what();
    }
    return "";
  };
  Shrunk<Case> found{original, error_of(original), original};
  for (bool smaller = true; smaller;) {
    smaller = false;
    for (const Case& candidate : found.least.simpler()) {
      const std::string error = error_of(candidate);
      if (error.empty()) continue;
      found.least = candidate;
      found.error = error;
      smaller = true;
      break;
    }
  }
  return found;
}

template <typename Case>
std::string report(const Shrunk<Case>& shrunk, const std::string& option) {
  return "  drawn:    " + option + " '" + shrunk.original.to_string() + "'\n  simplest: " + option + " '" +
         shrunk.least.to_string() + "'\n  " + shrunk.error + "\n";
}

}  // namespace mimo_ext::properties
