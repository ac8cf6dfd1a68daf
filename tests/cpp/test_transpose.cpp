// Transposing in tiles, against one element after the other: every size of element, whole tiles and what is left of
// them, steps wider than rows, any alignment. Memory is exact, so that the sanitizer sees a step too far.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "ops/cpu/transpose.h"
#include "ops/cpu/vector_kernels.h"

namespace mimo_ext::ops {
namespace {

using Memory = std::unique_ptr<std::byte, decltype(&std::free)>;

/// `bytes` bytes, rounded up to whole lines, the first of which begins a line.
Memory lines_of(int64_t bytes) {
  const auto whole = static_cast<size_t>((bytes + 64) / 64 * 64);
  return {static_cast<std::byte*>(std::aligned_alloc(64, whole)), &std::free};
}

/// rows x columns elements, rows `wider` bytes farther apart than they are long, both sides `shift` bytes into a line.
void check(int64_t itemsize, int64_t rows, int64_t columns, int64_t wider, int64_t shift, bool past_caches) {
  const int64_t src_step = columns * itemsize + wider;
  const int64_t dst_step = rows * itemsize + wider;
  const Memory src = lines_of(shift + rows * src_step);
  const Memory dst = lines_of(shift + columns * dst_step);
  std::mt19937 random(static_cast<unsigned>(rows * 1000 + columns));
  for (int64_t i = 0; i < shift + rows * src_step; ++i) src.get()[i] = static_cast<std::byte>(random());
  for (int64_t i = 0; i < shift + columns * dst_step; ++i) dst.get()[i] = std::byte{0xA5};
  std::vector<std::byte> expected(dst.get(), dst.get() + shift + columns * dst_step);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      for (int64_t i = 0; i < itemsize; ++i) {
        expected[static_cast<size_t>(shift + column * dst_step + row * itemsize + i)] =
            src.get()[shift + row * src_step + column * itemsize + i];
      }
    }
  }
  transpose(itemsize, {src.get() + shift, src_step}, {dst.get() + shift, dst_step}, rows, columns, past_caches);
  if (past_caches) cpu::vector_kernels().finish_streams();
  ASSERT_TRUE(std::equal(expected.begin(), expected.end(), dst.get()))
      << rows << " x " << columns << " elements of " << itemsize << " bytes, " << wider << " more, at " << shift;
}

class ElementsOf : public testing::TestWithParam<int> {};

TEST_P(ElementsOf, AllShapesStepsAndAlignments) {
  const int64_t itemsize = GetParam();
  const int64_t line = 64 / itemsize;
  for (const int64_t rows : {int64_t{0}, int64_t{1}, 2 * line - 1, 2 * line, 4 * line + 3}) {
    for (const int64_t columns : {int64_t{0}, int64_t{1}, line - 1, line, 3 * line, 3 * line + 1}) {
      for (const int64_t wider : {0, 16, 64}) {
        for (const bool past_caches : {false, true}) {
          check(itemsize, rows, columns, wider * itemsize, 0, past_caches);
          check(itemsize, rows, columns, wider * itemsize, itemsize, past_caches);
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Transpose, ElementsOf, testing::Values(1, 2, 4, 8, 16), testing::PrintToStringParamName());

TEST(Transpose, OtherSizesAreRefused) {
  std::byte element{};
  EXPECT_THROW(transpose(3, {&element, 3}, {&element, 3}, 1, 1, false), std::invalid_argument);
}

}  // namespace
}  // namespace mimo_ext::ops
