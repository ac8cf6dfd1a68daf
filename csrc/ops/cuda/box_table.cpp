#include "ops/cuda/box_table.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <limits>
#include <utility>

namespace mimo_ext::ops::cuda {
namespace {

static_assert(sizeof(BoxTable) + 64 <= 4096, "arguments of a kernel");

/// Boxes that a new one is compared with. Where there are more, a launch begins although none may share an element.
constexpr size_t kCompared = 256;

/// Sizes and strides of a box, in elements, as few dimensions as possible.
struct Region {
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
  int64_t offset = 0;
  int64_t first = 0;
  int64_t count = 1;
};

Region region_of(const Sides& sides, const int64_t* start, const int64_t* size) {
  Region region;
  for (int d = 0; d < sides.num_dims; ++d) {
    const int64_t stride = sides.strides[d];
    region.offset += start[d] * stride;
    region.count *= size[d];
    if (size[d] == 1) continue;
    if (!region.sizes.empty() && region.strides.back() == size[d] * stride) {
      region.sizes.back() *= size[d];
      region.strides.back() = stride;
    } else {
      region.sizes.push_back(size[d]);
      region.strides.push_back(stride);
    }
  }
  if (region.sizes.empty()) {
    region.sizes.push_back(1);
    region.strides.push_back(1);
  }
  return region;
}

bool fits(const Sides& sides, const Region& region, int64_t unit) {
  const auto aligned = [unit](uintptr_t address, int64_t itemsize) {
    return address % static_cast<uintptr_t>(std::min<int64_t>(unit * itemsize, 16)) == 0;
  };
  if (region.strides.back() != 1 || !aligned(sides.strided_address, sides.strided_itemsize) ||
      !aligned(sides.dense_address, sides.dense_itemsize)) {
    return false;
  }
  if (region.sizes.back() % unit != 0 || region.offset % unit != 0 || region.first % unit != 0) return false;
  return std::all_of(region.strides.begin(), region.strides.end() - 1, [&](int64_t s) { return s % unit == 0; });
}

/// `region` in units. It has kBoxDims dimensions or fewer.
Box box_of(const Region& region, int64_t unit) {
  Box box{};
  box.num_dims = static_cast<int>(region.sizes.size());
  for (size_t d = 0; d < region.sizes.size(); ++d) {
    const bool inner = d + 1 == region.sizes.size();
    box.size[d] = inner ? region.sizes[d] / unit : region.sizes[d];
    box.stride[d] = inner ? region.strides[d] : region.strides[d] / unit;
    box.divisor[d] = divisor_of(box.size[d]);
  }
  box.offset = region.offset / unit;
  box.first = region.first / unit;
  box.count = region.count / unit;
  return box;
}

bool share_elements(int num_dims, const int64_t* starts, const int64_t* sizes, int64_t a, int64_t b) {
  for (int d = 0; d < num_dims; ++d) {
    const int64_t i = a * num_dims + d;
    const int64_t j = b * num_dims + d;
    if (starts[i] + sizes[i] <= starts[j] || starts[j] + sizes[j] <= starts[i]) return false;
  }
  return true;
}

/// Collects boxes into launches.
class Tables {
 public:
  void begin_launch() { open_ = false; }

  void add(const Region& region, int64_t unit) {
    const int64_t blocks = (region.count / unit - 1) / kUnitsPerBlock + 1;
    const bool full = open_ && (tables_.back().num_boxes == kBoxes || tables_.back().unit != unit ||
                                last_block() > std::numeric_limits<int32_t>::max() - blocks);
    if (!open_ || full) {
      tables_.push_back({});
      tables_.back().unit = static_cast<int>(unit);
      open_ = true;
    }
    BoxTable& table = tables_.back();
    table.box[table.num_boxes] = box_of(region, unit);
    const int64_t end = last_block() + blocks;
    table.first_block[++table.num_boxes] = static_cast<int32_t>(end);
  }

  std::vector<BoxTable> take() { return std::move(tables_); }

 private:
  int64_t last_block() const { return tables_.back().first_block[tables_.back().num_boxes]; }

  std::vector<BoxTable> tables_;
  bool open_ = false;
};

/// Adds a region of any number of dimensions: the outer ones that a box has no room for become boxes of their own.
void add_region(Tables& tables, const Sides& sides, Region region, int64_t unit) {
  if (region.sizes.size() > kBoxDims) {
    const int64_t outer = region.sizes.front();
    const int64_t stride = region.strides.front();
    region.sizes.erase(region.sizes.begin());
    region.strides.erase(region.strides.begin());
    region.count /= outer;
    for (int64_t i = 0; i < outer; ++i) {
      add_region(tables, sides, region, unit);
      region.offset += stride;
      region.first += region.count;
    }
    return;
  }
  tables.add(region, fits(sides, region, unit) ? unit : 1);
}

}  // namespace

Divisor divisor_of(int64_t constant) {
  // With l = ceil(log2(constant)) and magic = ceil(2^(63 + l) / constant) < 2^64, the error magic * constant - 2^(63 +
  // l) is below 2^l: for n < 2^63, n * magic / 2^(63 + l) is above n / constant by less than 1 / constant.
  if (constant == 1) return {};
  const auto l = static_cast<int>(std::bit_width(static_cast<uint64_t>(constant - 1)));
  __extension__ typedef unsigned __int128 Wide;
  const auto by = static_cast<Wide>(constant);
  return {static_cast<uint64_t>(((Wide{1} << (63 + l)) + by - 1) / by), l - 1};
}

std::vector<BoxTable> box_tables(const Sides& sides, const int64_t* starts, const int64_t* sizes, int64_t num_boxes,
                                 int unit, bool writes_boxes) {
  Tables tables;
  int64_t first = 0;
  std::vector<int64_t> together;  // boxes since the last launch was begun on purpose
  for (int64_t i = 0; i < num_boxes; ++i) {
    Region region = region_of(sides, starts + i * sides.num_dims, sizes + i * sides.num_dims);
    region.first = first;
    first += region.count;
    if (region.count == 0) continue;
    if (writes_boxes) {
      const bool shares = std::any_of(together.begin(), together.end(), [&](int64_t other) {
        return share_elements(sides.num_dims, starts, sizes, other, i);
      });
      if (shares || together.size() == kCompared) {
        tables.begin_launch();
        together.clear();
      }
      together.push_back(i);
    }
    add_region(tables, sides, std::move(region), unit);
  }
  return tables.take();
}

}  // namespace mimo_ext::ops::cuda
