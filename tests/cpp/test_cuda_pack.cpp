// The arithmetic of the CUDA pack kernels on the host: tables of boxes, and the functions that the device's threads
// run, for all threads one after another, against loops over indices.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "ops/cuda/box_table.h"
#include "ops/cuda/pack_thread.h"

namespace mimo_ext::ops::cuda {
namespace {

using Indices = std::vector<int64_t>;
__extension__ typedef unsigned __int128 Sixteen;  // bytes

TEST(Divisor, IsExactForAllNumbersBelow2To63) {
  std::mt19937_64 random(0);
  const int64_t most = std::numeric_limits<int64_t>::max();
  std::vector<int64_t> constants{1, 2, 3, 5, 7, 10, 641, most, most - 1, (int64_t{1} << 62), (int64_t{1} << 62) + 1};
  for (int bit = 0; bit < 63; ++bit) constants.push_back(static_cast<int64_t>(random() >> (1 + bit)) + 1);
  for (const int64_t constant : constants) {
    const Divisor by = divisor_of(constant);
    std::vector<int64_t> numbers{0, 1, constant - 1, constant, most, most - 1, most - most % constant};
    for (const int64_t factor : {int64_t{1}, most / constant}) {
      numbers.push_back(constant * factor);
      numbers.push_back(constant * factor - 1);
    }
    for (int i = 0; i < 200; ++i) numbers.push_back(static_cast<int64_t>(random() >> (1 + i % 63)));
    for (const int64_t number : numbers)
      ASSERT_EQ(divide(number, by), number / constant) << number << " / " << constant;
  }
}

/// A tensor in memory, and boxes of it.
struct Case {
  Indices shape;
  Indices strides;
  int64_t offset = 0;
  Indices starts;
  Indices sizes;

  size_t dims() const { return shape.size(); }
  int64_t num_boxes() const { return static_cast<int64_t>(starts.size() / dims()); }

  /// One past the largest offset, in elements.
  int64_t extent() const {
    int64_t last = offset;
    for (size_t d = 0; d < dims(); ++d) last += (shape[d] - 1) * strides[d];
    return last + 1;
  }

  /// Offsets of the elements of all boxes, in the order of the dense buffer.
  std::vector<std::vector<int64_t>> elements() const {
    std::vector<std::vector<int64_t>> all;
    for (size_t box = 0; box < starts.size(); box += dims()) {
      std::vector<int64_t> offsets{offset};
      for (size_t d = 0; d < dims(); ++d) {
        std::vector<int64_t> next;
        for (const int64_t base : offsets) {
          for (int64_t i = 0; i < sizes[box + d]; ++i) next.push_back(base + (starts[box + d] + i) * strides[d]);
        }
        offsets = std::move(next);
      }
      all.push_back(std::move(offsets));
    }
    return all;
  }
};

template <typename Strided, typename Dense>
std::vector<BoxTable> tables_of(const Case& of, const Strided* strided, const Dense* dense, int unit, bool writes) {
  const Sides sides{of.strides.data(), static_cast<int>(of.dims()),
                    sizeof(Strided),   reinterpret_cast<uintptr_t>(strided + of.offset),
                    sizeof(Dense),     reinterpret_cast<uintptr_t>(dense)};
  return box_tables(sides, of.starts.data(), of.sizes.data(), of.num_boxes(), unit, writes);
}

template <typename Work>
void run_threads(const BoxTable& table, Work&& work) {
  for (int64_t block = 0; block < table.first_block[table.num_boxes]; ++block) {
    for (int thread = 0; thread < kMoveThreads; ++thread) work(block, thread);
  }
}

/// launch_move of pack.cu.
void move(const BoxTable& table, int itemsize, void* strided, void* dense, bool to_dense) {
  const auto run = [&]<typename Unit>(Unit) {
    run_threads(table, [&](int64_t block, int thread) {
      move_units(table, static_cast<Unit*>(strided), static_cast<Unit*>(dense), to_dense, block, thread);
    });
  };
  switch (table.unit * itemsize) {
    case 1:
      return run(uint8_t{});
    case 2:
      return run(uint16_t{});
    case 4:
      return run(uint32_t{});
    case 8:
      return run(uint64_t{});
    case 16:
      return run(Together<uint64_t, 2>{});
    default:
      FAIL() << table.unit << " elements of " << itemsize;
  }
}

/// Memory that begins at an address of 16 bytes.
template <typename T>
class Aligned {
 public:
  explicit Aligned(int64_t count) : data_(static_cast<size_t>(count) + 16 / sizeof(T) + 1) {
    while (reinterpret_cast<uintptr_t>(begin()) % 16 != 0) ++first_;
  }
  T* begin() { return data_.data() + first_; }

 private:
  std::vector<T> data_;
  size_t first_ = 0;
};

/// Copies there and back, element sizes of 1 to 16 bytes; what is outside the boxes stays. Returns the units used.
template <typename T>
std::vector<int> check_moves(const Case& of) {
  const auto elements = of.elements();
  int64_t total = 0;
  for (const auto& box : elements) total += static_cast<int64_t>(box.size());
  Aligned<T> memory(of.extent());
  Aligned<T> dense(total);
  for (int64_t i = 0; i < of.extent(); ++i) memory.begin()[i] = static_cast<T>(i * 7 + 1);
  const int unit = static_cast<int>(16 / sizeof(T));
  std::vector<int> units;
  T* strided = memory.begin() + of.offset;
  for (const BoxTable& table : tables_of(of, memory.begin(), dense.begin(), unit, false)) {
    units.push_back(table.unit);
    move(table, sizeof(T), strided, dense.begin(), true);
  }
  int64_t at = 0;
  for (const auto& box : elements) {
    for (const int64_t offset : box) EXPECT_EQ(dense.begin()[at++], static_cast<T>(offset * 7 + 1));
  }
  std::vector<T> expected(memory.begin(), memory.begin() + of.extent());
  for (int64_t i = 0; i < total; ++i) dense.begin()[i] = static_cast<T>(i * 3 + 2);
  at = 0;
  for (const auto& box : elements) {
    for (const int64_t offset : box) expected[static_cast<size_t>(offset)] = static_cast<T>(at++ * 3 + 2);
  }
  for (const BoxTable& table : tables_of(of, memory.begin(), dense.begin(), unit, true)) {
    move(table, sizeof(T), strided, dense.begin(), false);
  }
  EXPECT_TRUE(std::equal(expected.begin(), expected.end(), memory.begin()));
  return units;
}

void check_all_sizes(const Case& of) {
  check_moves<uint8_t>(of);
  check_moves<uint16_t>(of);
  check_moves<uint32_t>(of);
  check_moves<uint64_t>(of);
  check_moves<Sixteen>(of);
}

TEST(CudaPack, RowsMoveInUnitsOf16BytesWhereEverythingIsAMultipleOfThem) {
  // [s, b, h] = [9, 4, 64], samples 1 and 2 of rows 2 to 8.
  const Case rows{{9, 4, 64}, {256, 64, 1}, 0, {2, 1, 0}, {7, 2, 64}};
  EXPECT_EQ(check_moves<uint16_t>(rows), std::vector<int>{8});
  EXPECT_EQ(check_moves<float>(rows), std::vector<int>{4});
  EXPECT_EQ(check_moves<uint8_t>(rows), std::vector<int>{16});
  // An address, a size or a stride that is none: one element at a time.
  EXPECT_EQ(check_moves<uint16_t>({{9, 4, 64}, {256, 64, 1}, 4, {2, 1, 0}, {7, 2, 64}}), std::vector<int>{1});
  EXPECT_EQ(check_moves<uint16_t>({{9, 4, 64}, {256, 64, 1}, 0, {2, 1, 0}, {7, 2, 60}}), std::vector<int>{1});
  EXPECT_EQ(check_moves<uint16_t>({{9, 4, 64}, {257, 64, 1}, 0, {2, 1, 0}, {7, 2, 64}}), std::vector<int>{1});
  EXPECT_EQ(check_moves<uint16_t>({{64, 4, 9}, {1, 64, 256}, 0, {0, 1, 2}, {64, 2, 7}}), std::vector<int>{1});
}

TEST(CudaPack, ManyBlocksOfManyBoxes) {
  Case of{{5000, 3}, {4, 1}, 0, {}, {}};
  for (int64_t i = 0; i < 50; ++i) {
    of.starts.insert(of.starts.end(), {i * 100, i % 2});
    of.sizes.insert(of.sizes.end(), {i == 3 ? 0 : i == 7 ? 3000 : 90, 2});
  }
  check_all_sizes(of);  // box 7 shares elements with the boxes after it: what is written last stays
}

TEST(CudaPack, AnyNumberOfDimensions) {
  check_all_sizes({{2, 3, 2, 3, 2, 3}, {1000, 300, 100, 31, 12, 2}, 5, {0, 1, 0, 0, 0, 0}, {2, 2, 2, 3, 2, 3}});
  check_all_sizes({{3}, {5}, 1, {0}, {3}});
  check_all_sizes({{3}, {5}, 1, {2}, {1}});
}

TEST(CudaPack, RandomBoxesOfRandomStrides) {
  std::mt19937 random(0);
  const auto number = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  for (int repeat = 0; repeat < 300; ++repeat) {
    Case of;
    const auto dims = static_cast<size_t>(number(1, 5));
    of.shape.resize(dims);
    of.strides.resize(dims);
    std::vector<size_t> order(dims);
    for (size_t d = 0; d < dims; ++d) order[d] = d;
    std::shuffle(order.begin(), order.end(), random);
    int64_t reach = number(0, 2) == 0 ? 8 : 1;
    for (const size_t d : order) {
      of.shape[d] = number(1, 6);
      of.strides[d] = reach;
      reach *= of.shape[d] + number(0, 1);
    }
    of.offset = number(0, 1) * 16;
    for (int64_t box = number(0, 6); box > 0; --box) {
      for (size_t d = 0; d < dims; ++d) {
        of.starts.push_back(number(0, of.shape[d]));
        of.sizes.push_back(number(0, of.shape[d] - of.starts.back()));
      }
    }
    check_all_sizes(of);
    if (HasFailure()) FAIL() << "repeat " << repeat;
  }
}

TEST(CudaPack, OffsetsBeyond32Bits) {
  const Case of{{8, int64_t{1} << 40}, {int64_t{1} << 40, 1}, 0, {3, 5, 0, (int64_t{1} << 33) + 1}, {5, 1, 1, 3}};
  const auto tables = tables_of(of, static_cast<uint8_t*>(nullptr), static_cast<uint8_t*>(nullptr), 16, false);
  ASSERT_EQ(tables.size(), 1U);
  std::vector<int64_t> found;
  run_threads(tables[0], [&](int64_t block, int thread) {
    const ThreadUnits units = units_of_thread(tables[0], block, thread);
    for (int k = 0; k < units.count; ++k) found.push_back(units.strided[k]);
  });
  std::vector<int64_t> expected;
  for (const auto& box : Case{{8, 1}, of.strides, 0, {3, 5}, {5, 1}}.elements()) {
    expected.insert(expected.end(), box.begin(), box.end());
  }
  for (int64_t i = 1; i < 4; ++i) expected.push_back((int64_t{1} << 33) + i);
  EXPECT_EQ(found, expected);
}

TEST(CudaPack, IndicesBeyond32Bits) {
  // 2^40 rows of one expanded row: the last thread block.
  const Case of{{int64_t{1} << 40, 3}, {0, 1}, 0, {0, 0}, {int64_t{1} << 35, 3}};
  const auto tables = tables_of(of, static_cast<uint32_t*>(nullptr), static_cast<uint32_t*>(nullptr), 4, false);
  ASSERT_EQ(tables.size(), 1U);
  const ThreadUnits units = units_of_thread(tables[0], tables[0].first_block[1] - 1, kMoveThreads - 1);
  ASSERT_EQ(units.count, kUnitsPerThread);
  EXPECT_EQ(units.dense[3], 3 * (int64_t{1} << 35) - 1);
  EXPECT_EQ(units.strided[3], 2);
}

// Sums and conversions.

template <typename T>
double value_of(T stored) {
  return static_cast<double>(load_number(stored));
}

template <typename T>
constexpr Number kNumberOf = Number::kFloat32;
template <>
constexpr Number kNumberOf<double> = Number::kFloat64;
template <>
constexpr Number kNumberOf<BFloat16> = Number::kBFloat16;
template <>
constexpr Number kNumberOf<Float16> = Number::kFloat16;

/// launch_convert of convert.cu.
void convert(const BoxTable& table, Numbers strided, Numbers dense, Direction direction) {
  const auto run = [&]<typename Wide, int kCount>(Together<Wide, kCount>) {
    run_threads(table, [&](int64_t block, int thread) {
      convert_units<Wide, kCount>(table, strided, dense, direction, block, thread);
    });
  };
  const Number written = direction == Direction::kToDense ? dense.type : strided.type;
  if (written == Number::kFloat64) {
    return table.unit == 4 ? run(Together<double, 4>{}) : run(Together<double, 1>{});
  }
  ASSERT_TRUE(table.unit == 4 || table.unit == 1);
  return table.unit == 4 ? run(Together<float, 4>{}) : run(Together<float, 1>{});
}

template <typename Strided, typename Dense>
void check_conversions(const Case& of, int expected_unit) {
  const auto elements = of.elements();
  int64_t total = 0;
  for (const auto& box : elements) total += static_cast<int64_t>(box.size());
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  const auto fill = [&]<typename T>(T* data, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
      store_number(data[i], static_cast<typename Arithmetic<T>::type>(normal(random)));
  };
  Aligned<Strided> memory(of.extent());
  Aligned<Dense> dense(total);
  fill(memory.begin(), of.extent());
  const Numbers boxes{memory.begin() + of.offset, kNumberOf<Strided>};
  const Numbers buffer{dense.begin(), kNumberOf<Dense>};
  for (const BoxTable& table : tables_of(of, memory.begin(), dense.begin(), 4, false)) {
    EXPECT_EQ(table.unit, expected_unit);
    convert(table, boxes, buffer, Direction::kToDense);
  }
  int64_t at = 0;
  for (const auto& box : elements) {
    for (const int64_t offset : box) {
      Dense expected;
      store_number(expected, static_cast<typename Arithmetic<Dense>::type>(load_number(memory.begin()[offset])));
      EXPECT_EQ(value_of(dense.begin()[at++]), value_of(expected));
    }
  }
  for (const Direction direction : {Direction::kToBoxes, Direction::kAddToBoxes}) {
    fill(dense.begin(), total);
    std::vector<Strided> expected(memory.begin(), memory.begin() + of.extent());
    using Wide = typename Arithmetic<Strided>::type;
    at = 0;
    for (const auto& box : elements) {
      for (const int64_t offset : box) {
        auto value = static_cast<Wide>(load_number(dense.begin()[at++]));
        Strided& to = expected[static_cast<size_t>(offset)];
        if (direction == Direction::kAddToBoxes) value = static_cast<Wide>(load_number(to)) + value;
        store_number(to, value);
      }
    }
    for (const BoxTable& table : tables_of(of, memory.begin(), dense.begin(), 4, true)) {
      convert(table, boxes, buffer, direction);
    }
    for (int64_t i = 0; i < of.extent(); ++i) {
      EXPECT_EQ(value_of(memory.begin()[i]), value_of(expected[static_cast<size_t>(i)])) << i;
    }
  }
}

template <typename Strided>
void check_conversions_from(const Case& of, int expected_unit) {
  check_conversions<Strided, float>(of, expected_unit);
  check_conversions<Strided, double>(of, expected_unit);
  check_conversions<Strided, BFloat16>(of, expected_unit);
  check_conversions<Strided, Float16>(of, expected_unit);
}

TEST(CudaPack, ConvertsAndAddsBetweenAllTypes) {
  const Case fours{{9, 4, 32}, {128, 32, 1}, 16, {2, 1, 0, 0, 0, 8}, {7, 2, 32, 3, 4, 20}};  // the boxes share elements
  const Case odd{{9, 4, 31}, {128, 31, 1}, 3, {2, 1, 0, 0, 0, 7}, {7, 2, 31, 3, 4, 21}};
  check_conversions_from<float>(fours, 4);
  check_conversions_from<double>(fours, 4);
  check_conversions_from<BFloat16>(fours, 4);
  check_conversions_from<Float16>(fours, 4);
  check_conversions_from<float>(odd, 1);
  check_conversions_from<double>(odd, 1);
  check_conversions_from<BFloat16>(odd, 1);
  check_conversions_from<Float16>(odd, 1);
}

TEST(CudaPack, IntegersAreAddedWithWrapAround) {
  const Case of{{300, 5}, {6, 1}, 2, {0, 0, 10, 1}, {300, 5, 3, 2}};
  Aligned<uint8_t> memory(of.extent());
  Aligned<uint8_t> dense(1506);
  for (int64_t i = 0; i < of.extent(); ++i) memory.begin()[i] = static_cast<uint8_t>(i);
  for (int64_t i = 0; i < 1506; ++i) dense.begin()[i] = static_cast<uint8_t>(3 * i + 200);
  std::vector<uint8_t> expected(memory.begin(), memory.begin() + of.extent());
  int64_t at = 0;
  for (const auto& box : of.elements()) {
    for (const int64_t offset : box) {
      auto& to = expected[static_cast<size_t>(offset)];
      to = static_cast<uint8_t>(to + dense.begin()[at++]);
    }
  }
  for (const BoxTable& table : tables_of(of, memory.begin(), dense.begin(), 1, true)) {
    run_threads(table, [&](int64_t block, int thread) {
      add_integers(table, memory.begin() + of.offset, dense.begin(), block, thread);
    });
  }
  EXPECT_TRUE(std::equal(expected.begin(), expected.end(), memory.begin()));
}

TEST(CudaPack, BoxesThatAreWrittenAndShareElementsAreLaunchesOfTheirOwn) {
  const Case of{{10, 4}, {4, 1}, 0, {0, 0, 5, 0, 4, 0, 9, 0}, {5, 4, 4, 4, 2, 4, 1, 4}};
  std::vector<std::vector<int64_t>> firsts;
  for (const BoxTable& table : tables_of(of, static_cast<float*>(nullptr), static_cast<float*>(nullptr), 4, true)) {
    firsts.emplace_back();
    for (int box = 0; box < table.num_boxes; ++box) firsts.back().push_back(table.box[box].first * table.unit);
  }
  EXPECT_EQ(firsts, (std::vector<std::vector<int64_t>>{{0, 20}, {36, 44}}));
  EXPECT_EQ(tables_of(of, static_cast<float*>(nullptr), static_cast<float*>(nullptr), 4, false).size(), 1U);
  // 1000 boxes apart from one another: as few launches as their arguments allow, or a few more.
  Case many{{1000, 4}, {4, 1}, 0, {}, {}};
  for (int64_t i = 0; i < 1000; ++i) {
    many.starts.insert(many.starts.end(), {i, 0});
    many.sizes.insert(many.sizes.end(), {1, 4});
  }
  const size_t launches = tables_of(many, static_cast<float*>(nullptr), static_cast<float*>(nullptr), 4, true).size();
  EXPECT_GE(launches, 1000U / kBoxes);
  EXPECT_LE(launches, 1000U / kBoxes + 5);
}

}  // namespace
}  // namespace mimo_ext::ops::cuda
