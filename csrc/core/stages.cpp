#include "core/stages.h"

#include <algorithm>
#include <cstddef>
#include <stdexcept>

#include "core/limits.h"

namespace mimo_ext::core {
namespace {

void check(std::span<const std::int64_t> weights, std::span<const std::vector<int>> downstream,
           std::span<const std::string> names, int target) {
  const auto count = weights.size();
  if (downstream.size() != count || names.size() != count) {
    throw std::invalid_argument("topology: expected as many successor lists and names as weights (" +
                                std::to_string(count) + "), got " + std::to_string(downstream.size()) + " and " +
                                std::to_string(names.size()));
  }
  const auto known = [count](int node) { return node >= 0 && static_cast<std::size_t>(node) < count; };
  if (target != -1 && !known(target)) {
    throw std::invalid_argument("topology: expected a target among " + std::to_string(count) + " modules, got index " +
                                std::to_string(target));
  }
  std::vector<std::size_t> listed_by(count, count);  // the last node that listed each one
  for (std::size_t node = 0; node < count; ++node) {
    if (weights[node] < 0 || weights[node] > kMaxStages) {
      throw std::invalid_argument("topology: module " + names[node] + " has " + std::to_string(weights[node]) +
                                  " pipeline stages");
    }
    for (const int next : downstream[node]) {
      if (!known(next)) {
        throw std::invalid_argument("topology: module " + names[node] + " leads to index " + std::to_string(next) +
                                    ", expected one of " + std::to_string(count) + " modules");
      }
      auto& last = listed_by[static_cast<std::size_t>(next)];
      if (last == node) {
        throw std::invalid_argument("topology: module " + names[node] + " lists " +
                                    names[static_cast<std::size_t>(next)] + " twice");
      }
      last = node;
    }
  }
}

/// One of the cycles among the nodes that could not be ordered: "a -> b -> a". Each of them has such a predecessor, so
/// that walking backwards must meet a node again.
std::string describe_cycle(std::span<const std::vector<int>> downstream, std::span<const std::string> names,
                           const std::vector<int>& unmet) {
  std::vector<int> predecessor(names.size(), -1);
  int start = -1;
  for (std::size_t node = 0; node < names.size(); ++node) {
    if (unmet[node] == 0) continue;
    start = static_cast<int>(node);
    for (const int next : downstream[node]) predecessor[static_cast<std::size_t>(next)] = static_cast<int>(node);
  }
  std::vector<bool> seen(names.size(), false);
  int node = start;
  while (!seen[static_cast<std::size_t>(node)]) {
    seen[static_cast<std::size_t>(node)] = true;
    node = predecessor[static_cast<std::size_t>(node)];
  }
  std::vector<int> cycle{node};
  for (int at = predecessor[static_cast<std::size_t>(node)]; at != node;
       at = predecessor[static_cast<std::size_t>(at)]) {
    cycle.push_back(at);
  }
  cycle.push_back(node);
  std::reverse(cycle.begin(), cycle.end());
  std::string text = names[static_cast<std::size_t>(cycle.front())];
  for (std::size_t i = 1; i < cycle.size(); ++i) text += " -> " + names[static_cast<std::size_t>(cycle[i])];
  return text;
}

}  // namespace

std::int64_t longest_path(std::span<const std::int64_t> weights, std::span<const std::vector<int>> downstream,
                          std::span<const std::string> names, int target) {
  check(weights, downstream, names, target);
  // Kahn's order: a node is finished once all its predecessors are, so each edge is looked at once.
  std::vector<int> unmet(weights.size(), 0);
  for (const auto& successors : downstream) {
    for (const int next : successors) ++unmet[static_cast<std::size_t>(next)];
  }
  std::vector<std::int64_t> length(weights.begin(), weights.end());  // longest path that ends at the node
  std::vector<std::size_t> order;
  order.reserve(weights.size());
  for (std::size_t node = 0; node < weights.size(); ++node) {
    if (unmet[node] == 0) order.push_back(node);
  }
  for (std::size_t i = 0; i < order.size(); ++i) {
    const std::size_t node = order[i];
    for (const int successor : downstream[node]) {
      const auto next = static_cast<std::size_t>(successor);
      length[next] = std::max(length[next], length[node] + weights[next]);
      if (--unmet[next] == 0) order.push_back(next);
    }
  }
  if (order.size() != weights.size()) {
    throw std::invalid_argument("topology has a cycle: " + describe_cycle(downstream, names, unmet) +
                                "; expected a directed acyclic graph");
  }
  if (target >= 0) return length[static_cast<std::size_t>(target)];
  return length.empty() ? 0 : *std::max_element(length.begin(), length.end());
}

}  // namespace mimo_ext::core
