// Pipeline stage counting across the modules of a model: the longest path in a DAG, by node weight.
//
// Pure functions of their arguments: safe from any thread.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace mimo_ext::core {

/// Largest sum of weights along a path of the graph; time and memory are linear in nodes plus edges.
///
/// Nodes are 0 .. weights.size() - 1. `weights` are the numbers of pipeline stages (not negative), downstream[i] the
/// direct successors of node i, `names` the nodes' names for messages. With `target` >= 0 only paths that end at that
/// node count; with -1 all paths do. An empty graph has length 0.
///
/// Throws std::invalid_argument where the lengths differ, an index is out of range, a weight is negative, a successor
/// is listed twice, or the graph has a cycle, anywhere, whose nodes the message names in order. The sum must fit 64
/// bits.
std::int64_t longest_path(std::span<const std::int64_t> weights, std::span<const std::vector<int>> downstream,
                          std::span<const std::string> names, int target = -1);

}  // namespace mimo_ext::core
