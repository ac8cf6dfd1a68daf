#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "ops/rescale.h"
#include "ops/strided.h"

namespace mimo_ext::ops {
namespace {

// The sum of squares is defined by these two numbers: a block has one partial sum, kept in kLanes interleaved parts.
constexpr int64_t kBlock = 16384;  // elements
constexpr size_t kLanes = 16;

constexpr size_t kChunk = 64;     // elements of one step through contiguous memory, a multiple of kLanes
constexpr int64_t kTask = 32768;  // elements that are worth a thread; changes no result

/// Elements [begin, end) of one buffer.
struct Block {
  size_t buffer;
  int64_t begin;
  int64_t end;
};

/// What one block adds to the results.
struct Partial {
  double sumsq = 0;
  bool found_inf = false;
};

/// Scales the elements of one block, run by run, and keeps the block's running sums.
template <typename scalar_t, bool kSumsq, bool kFoundInf>
class BlockScaler {
 public:
  explicit BlockScaler(double factor) : factor_(static_cast<opmath_t>(factor)) {}

  /// `count` elements, each `stride` after the one before.
  void run(scalar_t* data, int64_t stride, int64_t count) {
    // Copies that no store to `data` can change: the sums stay in registers.
    const opmath_t factor = factor_;
    Lanes squares = squares_;
    Lanes zeros = zeros_;
    int64_t i = 0;
    if (stride == 1) {
      constexpr auto kStep = static_cast<int64_t>(kChunk);
      // Two loops of a fixed length: the compiler vectorises both, and the second finds its values in the cache.
      for (; i + kStep <= count; i += kStep) {
        scalar_t* chunk = data + i;
        for (size_t j = 0; j < kChunk; ++j) chunk[j] = scale(chunk[j], factor);
        for (size_t j = 0; j < kChunk; j += kLanes) {
          for (size_t l = 0; l < kLanes; ++l) add(chunk[j + l], squares[l], zeros[l]);
        }
      }
    }
    for (size_t l = 0; i < count; ++i, l = (l + 1) % kLanes) {
      const scalar_t scaled = scale(data[i * stride], factor);
      data[i * stride] = scaled;
      add(scaled, squares[l], zeros[l]);
    }
    squares_ = squares;
    zeros_ = zeros;
  }

  Partial finish() const {
    Partial partial;
    double zero = 0;
    for (size_t l = 0; l < kLanes; ++l) {
      partial.sumsq += squares_[l];
      zero += zeros_[l];
    }
    // A square of a float32 or narrower value is finite in float64, and so is the sum of a block of them.
    partial.found_inf = kFoundInf && !std::isfinite(kSquaresCannotOverflow ? partial.sumsq : zero);
    return partial;
  }

 private:
  using opmath_t = at::opmath_type<scalar_t>;
  using Lanes = std::array<double, kLanes>;
  static constexpr bool kSquaresCannotOverflow = !std::is_same_v<scalar_t, double>;

  static scalar_t scale(scalar_t value, opmath_t factor) {
    return static_cast<scalar_t>(static_cast<opmath_t>(value) * factor);
  }

  static void add(scalar_t scaled, double& squares, double& zeros) {
    const auto value = static_cast<double>(static_cast<opmath_t>(scaled));
    if constexpr (kSumsq || (kFoundInf && kSquaresCannotOverflow)) squares += value * value;
    if constexpr (kFoundInf && !kSquaresCannotOverflow) zeros += value - value;  // NaN for infinities and NaNs
  }

  opmath_t factor_;
  Lanes squares_{};
  Lanes zeros_{};
};

template <typename scalar_t, bool kSumsq, bool kFoundInf>
Partial scale_block(scalar_t* data, const Strided& region, const Block& block, double factor) {
  BlockScaler<scalar_t, kSumsq, kFoundInf> scaler(factor);
  for_each_run(region, block.begin, block.end,
               [&](int64_t offset, int64_t count) { scaler.run(data + offset, region.strides.back(), count); });
  return scaler.finish();
}

template <typename scalar_t>
Partial scale_block(const at::Tensor& t, const Strided& region, const Block& block, double factor, bool with_sumsq,
                    bool with_found_inf) {
  auto* data = t.mutable_data_ptr<scalar_t>();
  if (with_sumsq && with_found_inf) return scale_block<scalar_t, true, true>(data, region, block, factor);
  if (with_sumsq) return scale_block<scalar_t, true, false>(data, region, block, factor);
  if (with_found_inf) return scale_block<scalar_t, false, true>(data, region, block, factor);
  return scale_block<scalar_t, false, false>(data, region, block, factor);
}

Partial scale_block(const at::Tensor& t, const Strided& region, const Block& block, double factor, bool with_sumsq,
                    bool with_found_inf) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return scale_block<float>(t, region, block, factor, with_sumsq, with_found_inf);
    case at::kDouble:
      return scale_block<double>(t, region, block, factor, with_sumsq, with_found_inf);
    case at::kBFloat16:
      return scale_block<at::BFloat16>(t, region, block, factor, with_sumsq, with_found_inf);
    default:  // check_rescale_ has let nothing else through
      return scale_block<at::Half>(t, region, block, factor, with_sumsq, with_found_inf);
  }
}

std::tuple<at::Tensor, at::Tensor> rescale_cpu(at::TensorList buffers, const at::Tensor& factor, bool with_sumsq,
                                               bool with_found_inf) {
  check_rescale_(buffers, factor);
  const double scalar = factor.scalar_type() == at::kDouble ? *factor.const_data_ptr<double>()
                                                            : static_cast<double>(*factor.const_data_ptr<float>());
  std::vector<Strided> regions;
  std::vector<Block> blocks;
  int64_t total = 0;
  for (size_t i = 0; i < buffers.size(); ++i) {
    const int64_t numel = buffers[i].numel();
    regions.push_back(in_memory_order(buffers[i]));
    total += numel;
    for (int64_t begin = 0; begin < numel; begin += kBlock) {
      blocks.push_back({i, begin, std::min(begin + kBlock, numel)});
    }
  }
  std::vector<Partial> partials(blocks.size());
  const auto num_blocks = static_cast<int64_t>(blocks.size());
  // In blocks: those of small buffers are small.
  const int64_t grain = num_blocks == 0 ? 1 : at::divup(kTask, std::max<int64_t>(1, total / num_blocks));
  at::parallel_for(0, num_blocks, grain, [&](int64_t begin, int64_t end) {
    for (auto b = static_cast<size_t>(begin); b < static_cast<size_t>(end); ++b) {
      const Block& block = blocks[b];
      partials[b] =
          scale_block(buffers[block.buffer], regions[block.buffer], block, scalar, with_sumsq, with_found_inf);
    }
  });
  Partial result;
  for (const Partial& partial : partials) {
    result.sumsq += partial.sumsq;
    result.found_inf = result.found_inf || partial.found_inf;
  }
  at::Tensor sumsq = at::empty({}, factor.options().dtype(at::kDouble));
  at::Tensor found_inf = at::empty({}, factor.options().dtype(at::kFloat));
  *sumsq.mutable_data_ptr<double>() = with_sumsq ? result.sumsq : 0.0;
  *found_inf.mutable_data_ptr<float>() = result.found_inf ? 1.0F : 0.0F;
  return {sumsq, found_inf};
}

}  // namespace

TORCH_LIBRARY_IMPL(mimo_ext, CPU, m) {
  m.impl("rescale_", rescale_cpu);
}

}  // namespace mimo_ext::ops
