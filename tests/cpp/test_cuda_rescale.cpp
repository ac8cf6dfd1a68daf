// The arithmetic of the CUDA rescale kernels on the host: the functions that the device's threads run, for all threads
// one after another, against plain loops.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "ops/cuda/rescale_table.h"
#include "ops/cuda/rescale_thread.h"

namespace mimo_ext::ops::cuda {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// One thread block's sum, as sum_of_block of rescale.cu.
double sum_of_block(std::vector<double> parts) {
  const auto threads = static_cast<int>(parts.size());
  for (int width = threads / 2; width > 0; width /= 2) {
    for (int thread = 0; thread < threads; ++thread) add_partner(parts.data(), thread, width);
  }
  return parts[0];
}

/// Both kernels over all buffers.
template <bool kLook>
Found run(const std::vector<RescaleBuffer>& buffers, Factor factor) {
  std::vector<double> squares;
  std::vector<char> inf;
  for (const RescaleTable& table : rescale_tables(buffers)) {
    EXPECT_EQ(table.earlier_chunks, static_cast<int64_t>(squares.size()));
    for (int64_t chunk = 0; chunk < table.num_chunks; ++chunk) {
      std::vector<double> parts;
      bool any = false;
      for (int thread = 0; thread < kRescaleThreads; ++thread) {
        const Found found = scale_chunk<kLook>(table, chunk, factor, thread);
        parts.push_back(found.squares);
        any = any || found.inf;
      }
      squares.push_back(sum_of_block(parts));
      inf.push_back(any);
    }
  }
  const auto flags = std::make_unique<bool[]>(inf.size() + 1);
  std::copy(inf.begin(), inf.end(), flags.get());
  std::vector<double> parts;
  Found all;
  for (int thread = 0; thread < kReduceThreads; ++thread) {
    const Found found = sum_chunks(squares.data(), flags.get(), static_cast<int64_t>(squares.size()), thread);
    parts.push_back(found.squares);
    all.inf = all.inf || found.inf;
  }
  all.squares = sum_of_block(parts);
  return all;
}

template <typename T>
struct Type;
template <>
struct Type<float> {
  static constexpr Number kNumber = Number::kFloat32;
};
template <>
struct Type<double> {
  static constexpr Number kNumber = Number::kFloat64;
};
template <>
struct Type<BFloat16> {
  static constexpr Number kNumber = Number::kBFloat16;
};
template <>
struct Type<Float16> {
  static constexpr Number kNumber = Number::kFloat16;
};

/// Numbers in memory that begins `shift` elements after an address of 16 bytes, with a guard on either side.
template <typename T>
class Memory {
 public:
  Memory(size_t numel, size_t shift, unsigned seed) : numel_(numel), shift_(shift), data_(numel + shift + 9) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (T& each : data_) store_number(each, static_cast<typename Arithmetic<T>::type>(normal(random)));
    begin_ = 0;
    while (reinterpret_cast<uintptr_t>(data_.data() + begin_) % 16 != 0) ++begin_;
    begin_ += shift_;
    before_ = data_;
  }

  T* begin() { return data_.data() + begin_; }
  size_t numel() const { return numel_; }
  RescaleBuffer buffer() { return {begin(), static_cast<int64_t>(numel_), Type<T>::kNumber}; }
  void set(size_t i, double value) {
    store_number(begin()[i], static_cast<typename Arithmetic<T>::type>(value));
    before_ = data_;
  }

  /// Every element is what one multiplication makes of it, and nothing else has changed. Returns the sum of squares.
  double check(double factor) const {
    using Wide = typename Arithmetic<T>::type;
    double sum = 0;
    for (size_t i = 0; i < data_.size(); ++i) {
      T expected = before_[i];
      if (i >= begin_ && i < begin_ + numel_) {
        store_number(expected, static_cast<Wide>(load_number(before_[i]) * static_cast<Wide>(factor)));
        const auto value = static_cast<double>(load_number(expected));
        sum += value * value;
      }
      const auto got = load_number(data_[i]);
      const auto want = load_number(expected);
      EXPECT_TRUE(got == want || (std::isnan(got) && std::isnan(want))) << i;
    }
    return sum;
  }

 private:
  size_t numel_;
  size_t shift_;
  std::vector<T> data_;
  std::vector<T> before_;
  size_t begin_ = 0;
};

template <typename T>
class CudaRescale : public testing::Test {};
using Types = testing::Types<float, double, BFloat16, Float16>;
TYPED_TEST_SUITE(CudaRescale, Types);

TYPED_TEST(CudaRescale, ScalesEverySizeAndAlignmentAndTheSumDoesNotDependOnTheAlignment) {
  const float factor = 0.3F;
  for (const size_t numel :
       {size_t{1}, size_t{7}, size_t{1000}, size_t{16383}, size_t{16384}, size_t{16385}, size_t{40000}}) {
    std::vector<double> sums;
    for (const size_t shift : {0U, 1U, 2U, 5U}) {
      // The values do not depend on the shift: they are put in anew.
      Memory<TypeParam> memory(numel, shift, 1);
      std::mt19937 random(static_cast<unsigned>(numel));
      std::normal_distribution<double> normal;
      for (size_t i = 0; i < numel; ++i) store_number(memory.begin()[i], static_cast<float>(normal(random)));
      memory.set(0, 0.5);
      const Found found = run<true>({memory.buffer()}, {&factor, false});
      const double sum = memory.check(static_cast<double>(factor));
      EXPECT_NEAR(found.squares, sum, 1e-13 * sum);
      EXPECT_FALSE(found.inf);
      sums.push_back(found.squares);
    }
    for (const double sum : sums) EXPECT_EQ(sum, sums[0]) << numel;
  }
}

TYPED_TEST(CudaRescale, ScalesWithoutLooking) {
  const double factor = -1.7;
  Memory<TypeParam> memory(20000, 0, 3);
  const Found found = run<false>({memory.buffer()}, {&factor, true});
  memory.check(factor);
  EXPECT_EQ(found.squares, 0);
  EXPECT_FALSE(found.inf);
}

TYPED_TEST(CudaRescale, FindsAnInfinityOrNaNWhereverItIs) {
  const float factor = 2;
  for (const double bad : {kInfinity, -kInfinity, std::nan("")}) {
    for (const size_t where : {size_t{0}, size_t{4095}, size_t{16384}, size_t{17000}}) {
      Memory<TypeParam> memory(17001, where % 3, 4);
      memory.set(where, bad);
      EXPECT_TRUE(run<true>({memory.buffer()}, {&factor, false}).inf);
      memory.check(2);
    }
  }
}

TEST(CudaRescaleTable, ManyBuffersOfAllTypesInFewLaunches) {
  std::vector<Memory<float>> singles;
  std::vector<Memory<Float16>> halves;
  std::vector<Memory<double>> doubles;
  for (size_t i = 0; i < 150; ++i) {
    singles.emplace_back(i % 40, i % 4, static_cast<unsigned>(i));
    halves.emplace_back(i == 70 ? 50000 : 1 + i % 9, i % 5, static_cast<unsigned>(i));
    doubles.emplace_back(i == 3 ? 16384 : i % 3, i % 2, static_cast<unsigned>(i));
  }
  std::vector<RescaleBuffer> buffers;
  size_t not_empty = 0;
  for (size_t i = 0; i < 150; ++i) {
    for (const RescaleBuffer& buffer : {singles[i].buffer(), halves[i].buffer(), doubles[i].buffer()}) {
      buffers.push_back(buffer);
      not_empty += buffer.numel > 0;
    }
  }
  EXPECT_EQ(rescale_tables(buffers).size(), (not_empty + kRescaleBuffers - 1) / kRescaleBuffers);
  const double factor = 0.99;
  const Found found = run<true>(buffers, {&factor, true});
  double sum = 0;
  for (size_t i = 0; i < 150; ++i) sum += singles[i].check(factor) + halves[i].check(factor) + doubles[i].check(factor);
  EXPECT_NEAR(found.squares, sum, 1e-13 * sum);
  EXPECT_FALSE(found.inf);
}

TEST(CudaRescaleTable, OverflowIsFoundAfterRoundingToTheNarrowType) {
  const float factor = 2;
  Memory<Float16> memory(5, 0, 0);
  memory.set(2, 4e4);
  EXPECT_TRUE(run<true>({memory.buffer()}, {&factor, false}).inf);
  Memory<double> large(5, 0, 0);  // the square is infinite, the value is not
  large.set(2, 1e200);
  const Found found = run<true>({large.buffer()}, {&factor, false});
  EXPECT_EQ(found.squares, kInfinity);
  EXPECT_FALSE(found.inf);
}

TEST(CudaRescaleTable, ChunksAreCountedIn64Bits) {
  // No memory behind it: only the table is looked at.
  float first = 0;
  const int64_t numel = (int64_t{1} << 40) + 1;
  const std::vector<RescaleTable> tables =
      rescale_tables({{&first, 3, Number::kFloat32}, {&first, numel, Number::kFloat32}});
  ASSERT_EQ(tables.size(), 1U);
  EXPECT_EQ(tables[0].num_chunks, 1 + (int64_t{1} << 26) + 1);
  EXPECT_EQ(buffer_of_chunk(tables[0], 0), 0);
  EXPECT_EQ(buffer_of_chunk(tables[0], 1), 1);
  EXPECT_EQ(buffer_of_chunk(tables[0], tables[0].num_chunks - 1), 1);
  EXPECT_TRUE(rescale_tables({{nullptr, 0, Number::kFloat64}}).empty());
}

}  // namespace
}  // namespace mimo_ext::ops::cuda
