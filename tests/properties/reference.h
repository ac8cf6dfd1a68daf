// The slow and obvious way: which elements of the global tensor a rank holds, in its order. Shares no code with the
// plan.
#pragma once

#include <cstdint>
#include <vector>

#include "setting.h"

namespace mimo_ext::properties {

/// Elements of the global tensor are numbered from 0.
std::int64_t num_elements(const Setting& setting);
/// What member `member` of lane `lane` of a side holds, in row-major order.
std::vector<std::int64_t> elements_of(const Setting& setting, bool destination, std::int64_t lane, std::int64_t member);
std::vector<std::int64_t> shape_of(const Setting& setting, bool destination, std::int64_t lane, std::int64_t member);
/// Number of different (partial) gradients that the cp ranks of the destination hold, and which one a member has.
std::int64_t num_gradients(const Setting& setting);
std::int64_t gradient_of(const Setting& setting, std::int64_t member);

}  // namespace mimo_ext::properties
