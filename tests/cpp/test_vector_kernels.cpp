// The vector loops of the CPU kernels: every level that this processor has, against conversions written out one by one,
// and against one another, bit by bit.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "ops/cpu/vector_kernels.h"
#include "ops/narrow.h"

namespace mimo_ext::ops {
namespace {

using cpu::Number;
using cpu::VectorKernels;

constexpr Number kAll[] = {Number::kFloat32, Number::kFloat64, Number::kBFloat16, Number::kFloat16};

size_t size_of(Number type) {
  return type == Number::kFloat64 ? 8 : type == Number::kFloat32 ? 4 : 2;
}

size_t index_of(Number type) {
  return static_cast<size_t>(type);
}

using Bytes = std::vector<unsigned char>;

/// Element i of memory without alignment, as float64.
double get(const unsigned char* data, Number type, size_t i) {
  const unsigned char* at = data + i * size_of(type);
  if (type == Number::kFloat64) {
    double value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  if (type == Number::kFloat32) {
    float value;
    std::memcpy(&value, at, sizeof value);
    return static_cast<double>(value);
  }
  uint16_t bits;
  std::memcpy(&bits, at, sizeof bits);
  return static_cast<double>(type == Number::kBFloat16 ? widen(BFloat16{bits}) : widen(Float16{bits}));
}

void put(unsigned char* data, Number type, size_t i, double value) {
  unsigned char* at = data + i * size_of(type);
  if (type == Number::kFloat64) {
    std::memcpy(at, &value, sizeof value);
    return;
  }
  const auto narrow = static_cast<float>(value);
  const uint16_t bits = type == Number::kBFloat16 ? to_bfloat16(narrow).bits : to_float16(narrow).bits;
  if (type == Number::kFloat32) {
    std::memcpy(at, &narrow, sizeof narrow);
  } else {
    std::memcpy(at, &bits, sizeof bits);
  }
}

/// The arithmetic of a type: float64 for itself, else float32.
double in_arithmetic(Number type, double value) {
  return type == Number::kFloat64 ? value : static_cast<double>(static_cast<float>(value));
}

bool same(const unsigned char* a, const unsigned char* b, Number type, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const double x = get(a, type, i);
    const double y = get(b, type, i);
    if (std::isnan(x) != std::isnan(y) || std::signbit(x) != std::signbit(y)) return false;
    if (!std::isnan(x) && x != y) return false;
  }
  return true;
}

/// Values of every size, both signs, zeros, infinities.
Bytes sample(Number type, size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::uniform_int_distribution<int> exponent(-26, 17);
  Bytes data(count * size_of(type));
  for (size_t i = 0; i < count; ++i) {
    double value = std::ldexp(normal(random), exponent(random));
    if (i % 23 == 5) value = 0;
    if (i % 97 == 40) value = -std::numeric_limits<double>::infinity();
    put(data.data(), type, i, value);
  }
  return data;
}

TEST(Narrow, EveryFloat16SurvivesTheWayToFloat32AndBack) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float wide = widen(Float16{static_cast<uint16_t>(bits)});
    const uint32_t magnitude = bits & 0x7FFFU;
    if (magnitude > 0x7C00U) {
      EXPECT_TRUE(std::isnan(wide));
      EXPECT_EQ(to_float16(wide).bits & 0x7FFFU, 0x7E00U);
      continue;
    }
    // What the number is, from its parts.
    const int exponent = static_cast<int>(magnitude >> 10U);
    const auto mantissa = static_cast<double>(magnitude & 0x3FFU);
    double expected = exponent == 0    ? std::ldexp(mantissa, -24)
                      : exponent == 31 ? std::numeric_limits<double>::infinity()
                                       : std::ldexp(1024 + mantissa, exponent - 25);
    if (bits & 0x8000U) expected = -expected;
    EXPECT_EQ(static_cast<double>(wide), expected);
    EXPECT_EQ(std::signbit(wide), (bits & 0x8000U) != 0);
    EXPECT_EQ(to_float16(wide).bits, bits);
  }
}

/// Neighbours of a narrow type, and what lies between: the nearer one is chosen, the even one of two equally near.
template <typename Narrow, typename Round>
void check_rounding(uint16_t low_bits, Round round) {
  const float low = widen(Narrow{low_bits});
  const float high = widen(Narrow{static_cast<uint16_t>(low_bits + 1)});
  if (!std::isfinite(low) || !std::isfinite(high)) return;
  const auto middle = static_cast<float>((static_cast<double>(low) + static_cast<double>(high)) / 2);
  const auto even = static_cast<uint16_t>(low_bits + (low_bits & 1U));
  ASSERT_EQ(round(low).bits, low_bits);
  ASSERT_EQ(round(middle).bits, even) << low_bits;
  ASSERT_EQ(round(std::nextafterf(middle, low)).bits, low_bits) << low_bits;
  ASSERT_EQ(round(std::nextafterf(middle, high)).bits, low_bits + 1) << low_bits;
}

TEST(Narrow, RoundsToTheNearestAndTiesToEven) {
  for (uint32_t bits = 0; bits < 0x7FFF; ++bits) {
    check_rounding<Float16>(static_cast<uint16_t>(bits), to_float16);
    check_rounding<Float16>(static_cast<uint16_t>(0x8000U + bits), to_float16);
    check_rounding<BFloat16>(static_cast<uint16_t>(bits), to_bfloat16);
    check_rounding<BFloat16>(static_cast<uint16_t>(0x8000U + bits), to_bfloat16);
  }
  EXPECT_EQ(to_float16(65519.996F).bits, 0x7BFF);
  EXPECT_EQ(to_float16(65520.0F).bits, 0x7C00);
  EXPECT_EQ(to_float16(-1e30F).bits, 0xFC00);
  EXPECT_EQ(to_bfloat16(std::numeric_limits<float>::max()).bits, 0x7F80);
  EXPECT_EQ(to_bfloat16(std::nanf("")).bits, 0x7FC0);
  EXPECT_EQ(to_bfloat16(-std::numeric_limits<float>::infinity()).bits, 0xFF80);
}

class EveryLevel : public testing::TestWithParam<const VectorKernels*> {};

TEST_P(EveryLevel, ScalesAndSumsSquaresInLanes) {
  for (const Number type : kAll) {
    for (const size_t count : {0U, 1U, 3U, 15U, 16U, 17U, 31U, 64U, 100U, 1027U}) {
      for (const double factor : {0.37, -3.0}) {
        // One element before and one after, not aligned; they stay.
        const Bytes values = sample(type, count + 2, static_cast<unsigned>(count));
        Bytes expected = values;
        cpu::Lanes squares{};
        squares[3] = 5;
        cpu::Lanes expected_squares = squares;
        for (size_t i = 0; i < count; ++i) {
          const double value = in_arithmetic(type, get(values.data(), type, i + 1));
          put(expected.data(), type, i + 1, in_arithmetic(type, value * in_arithmetic(type, factor)));
          const double scaled = get(expected.data(), type, i + 1);
          expected_squares[i % cpu::kLanes] += scaled * scaled;
        }
        Bytes plain(values.size() + 1);
        std::memcpy(plain.data() + 1, values.data(), values.size());
        Bytes with_squares = plain;
        unsigned char* first = plain.data() + 1 + size_of(type);
        GetParam()->scale[index_of(type)](first, static_cast<int64_t>(count), factor);
        EXPECT_TRUE(same(plain.data() + 1, expected.data(), type, count + 2)) << index_of(type) << " " << count;
        first = with_squares.data() + 1 + size_of(type);
        GetParam()->scale_squares[index_of(type)](first, static_cast<int64_t>(count), factor, squares);
        EXPECT_EQ(with_squares, plain);
        EXPECT_EQ(squares, expected_squares) << index_of(type) << " " << count;
      }
    }
  }
}

TEST_P(EveryLevel, WhatFollowsTheEndAddsNothingEvenToAnInfiniteFactor) {
  Bytes values(4 * sizeof(float));
  cpu::Lanes squares{};
  GetParam()->scale_squares[0](values.data(), 0, std::numeric_limits<double>::infinity(), squares);
  for (size_t i = 0; i < 3; ++i) put(values.data(), Number::kFloat32, i, 1);
  GetParam()->scale_squares[0](values.data(), 3, 1e20, squares);
  EXPECT_EQ(get(values.data(), Number::kFloat32, 3), 0);
  for (size_t i = 0; i < cpu::kLanes; ++i) EXPECT_EQ(std::isfinite(squares[i]) && squares[i] > 0, i < 3);
}

TEST_P(EveryLevel, ConvertsAndAddsBetweenAllTypes) {
  for (const Number dst : kAll) {
    for (const Number src : kAll) {
      for (const size_t count : {0U, 1U, 7U, 16U, 33U, 500U}) {
        const Bytes from = sample(src, count + 1, 1);
        const Bytes before = sample(dst, count + 1, 2);
        for (const bool add : {false, true}) {
          Bytes expected = before;
          for (size_t i = 0; i < count; ++i) {
            double value = in_arithmetic(dst, get(from.data(), src, i));
            if (add) value = in_arithmetic(dst, get(before.data(), dst, i) + value);
            put(expected.data(), dst, i, value);
          }
          Bytes to = before;
          const auto& table = add ? GetParam()->add : GetParam()->convert;
          table[index_of(dst)][index_of(src)](to.data(), from.data(), static_cast<int64_t>(count));
          EXPECT_TRUE(same(to.data(), expected.data(), dst, count + 1))
              << index_of(dst) << " from " << index_of(src) << ", " << count << ", add " << add;
        }
      }
    }
  }
}

TEST_P(EveryLevel, LargeConversionsAndSumsGiveTheSameBytesWhateverTheAlignment) {
  constexpr size_t kBefore = 96;  // bytes that stay, and at least as many after
  const VectorKernels& kernels = *GetParam();
  for (const Number dst : kAll) {
    for (const Number src : kAll) {
      const Bytes from = sample(src, 2500, 3);
      const Bytes before = sample(dst, 2600, 4);
      // The longest fetch within themselves first, and then what comes next.
      for (const size_t count : {0U, 1U, 31U, 64U, 95U, 127U, 400U, 1800U, 2500U}) {
        for (const size_t shift : {0U, 1U, 2U, 8U, 14U, 16U, 31U, 32U, 62U}) {
          const auto n = static_cast<int64_t>(count);
          const size_t at = kBefore + shift;
          Bytes expected = before;
          Bytes to = before;
          kernels.convert[index_of(dst)][index_of(src)](expected.data() + at, from.data(), n);
          kernels.convert_large[index_of(dst)][index_of(src)](to.data() + at, from.data(), n, from.data());
          kernels.finish_streams();
          ASSERT_EQ(to, expected) << index_of(dst) << " from " << index_of(src) << ", " << count << " at " << shift;
          expected = to = before;
          kernels.add[index_of(dst)][index_of(src)](expected.data() + at, from.data(), n);
          kernels.add_large[index_of(dst)][index_of(src)](to.data() + at, from.data(), n, nullptr);
          ASSERT_EQ(to, expected) << index_of(dst) << " and " << index_of(src) << ", " << count << " at " << shift;
        }
      }
    }
  }
}

TEST_P(EveryLevel, CopiesPastTheCachesWhateverTheAlignment) {
  std::vector<unsigned char> from(9000);
  for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<unsigned char>(i * 7 + 1);
  for (const size_t bytes : {0U, 1U, 31U, 127U, 128U, 161U, 900U, 4097U, 8800U}) {
    for (size_t shift = 0; shift < 66; ++shift) {
      std::vector<unsigned char> to(9000, 0);
      GetParam()->stream(to.data() + shift, from.data() + 65 - shift, static_cast<int64_t>(bytes), nullptr);
      GetParam()->finish_streams();
      std::vector<unsigned char> expected(9000, 0);
      std::memcpy(expected.data() + shift, from.data() + 65 - shift, bytes);
      ASSERT_EQ(to, expected) << bytes << " at " << shift;
    }
  }
}

TEST_P(EveryLevel, RoundsEveryFloat32ThatIsNearAFloat16OrBFloat16) {
  std::vector<float> values;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    for (const float exact : {widen(Float16{static_cast<uint16_t>(bits)}), float_of(bits << 16U)}) {
      const uint32_t wide = bits_of(exact);
      for (const uint32_t step : {0U, 1U, 0x0FFFU, 0x1000U, 0x1001U, 0x7FFFU, 0x8000U, 0x8001U, 0xFFFFU}) {
        values.push_back(float_of(wide + step));
      }
    }
  }
  for (const Number type : {Number::kBFloat16, Number::kFloat16}) {
    std::vector<uint16_t> got(values.size());
    GetParam()->convert[index_of(type)][0](got.data(), values.data(), static_cast<int64_t>(values.size()));
    for (size_t i = 0; i < values.size(); ++i) {
      const uint16_t want = type == Number::kBFloat16 ? to_bfloat16(values[i]).bits : to_float16(values[i]).bits;
      const bool nan = std::isnan(values[i]) && (got[i] & 0x7FFFU) > (type == Number::kBFloat16 ? 0x7F80U : 0x7C00U);
      ASSERT_TRUE(nan || got[i] == want) << values[i] << " became " << got[i] << ", expected " << want;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(VectorKernels, EveryLevel, testing::ValuesIn(cpu::usable_vector_kernels()),
                         [](const auto& given) { return std::string(given.param->level); });

TEST(VectorKernels, TheWidestIsUsed) {
  EXPECT_EQ(&cpu::vector_kernels(), cpu::usable_vector_kernels().back());
  EXPECT_STREQ(cpu::usable_vector_kernels().front()->level, "baseline");
}

}  // namespace
}  // namespace mimo_ext::ops
