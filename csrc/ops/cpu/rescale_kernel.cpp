#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "ops/cpu/move.h"
#include "ops/cpu/numbers.h"
#include "ops/cpu/vector_kernels.h"
#include "ops/rescale.h"
#include "ops/strided.h"

namespace mimo_ext::ops {
namespace {

// The sum of squares is defined by this number and cpu::kLanes: a block has one partial sum, kept in interleaved parts.
constexpr int64_t kBlock = 16384;  // elements

constexpr int64_t kTile = 512;    // elements that are gathered from memory with gaps, a multiple of cpu::kLanes
constexpr int64_t kTask = 32768;  // elements that are worth a thread; changes no result

/// What is to be done with a buffer.
struct Job {
  std::byte* data;
  int64_t itemsize;
  size_t dtype;  // a cpu::Number
  Strided region;
};

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

/// Calls `visit(data, count)` for contiguous pieces of a block; those of memory with gaps are copies that are written
/// back.
template <typename Visit>
void for_each_piece(const Job& job, const Block& block, Visit&& visit) {
  const int64_t step = job.region.strides.back() * job.itemsize;
  for_each_run(job.region, block.begin, block.end, [&](int64_t offset, int64_t count) {
    std::byte* run = job.data + offset * job.itemsize;
    if (step == job.itemsize) return visit(run, count);
    std::array<std::byte, kTile * sizeof(double)> tile;
    for (int64_t first = 0; first < count; first += kTile, run += kTile * step) {
      const int64_t n = std::min(kTile, count - first);
      move_run(job.itemsize, run, step, tile.data(), job.itemsize, n);
      visit(tile.data(), n);
      move_run(job.itemsize, tile.data(), job.itemsize, run, step, n);
    }
  });
}

bool has_inf_or_nan(const Job& job, const Block& block) {
  bool found = false;
  for_each_piece(job, block, [&](const std::byte* piece, int64_t count) {
    const auto* values = reinterpret_cast<const double*>(piece);
    found = found || !std::all_of(values, values + count, [](double value) { return std::isfinite(value); });
  });
  return found;
}

Partial scale_block(const Job& job, const Block& block, double factor, bool with_sumsq, bool with_found_inf) {
  const cpu::VectorKernels& kernels = cpu::vector_kernels();
  Partial partial;
  if (!with_sumsq && !with_found_inf) {
    for_each_piece(job, block,
                   [&](std::byte* piece, int64_t count) { kernels.scale[job.dtype](piece, count, factor); });
    return partial;
  }
  cpu::Lanes squares{};
  for_each_piece(job, block, [&](std::byte* piece, int64_t count) {
    kernels.scale_squares[job.dtype](piece, count, factor, squares);
  });
  for (const double part : squares) partial.sumsq += part;
  // An infinity or NaN makes the sum one. Without any, the squares of a block of float32 or narrower values are finite
  // in float64, and so is their sum; those of float64 may overflow.
  partial.found_inf = with_found_inf && !std::isfinite(partial.sumsq) &&
                      (job.dtype != static_cast<size_t>(cpu::Number::kFloat64) || has_inf_or_nan(job, block));
  return partial;
}

std::tuple<at::Tensor, at::Tensor> rescale_cpu(at::TensorList buffers, const at::Tensor& factor, bool with_sumsq,
                                               bool with_found_inf) {
  check_rescale_(buffers, factor);
  const double scalar = factor.scalar_type() == at::kDouble ? *factor.const_data_ptr<double>()
                                                            : static_cast<double>(*factor.const_data_ptr<float>());
  std::vector<Job> jobs;
  std::vector<Block> blocks;
  int64_t total = 0;
  for (size_t i = 0; i < buffers.size(); ++i) {
    const int64_t numel = buffers[i].numel();
    const at::ScalarType dtype = buffers[i].scalar_type();
    jobs.push_back({static_cast<std::byte*>(buffers[i].mutable_data_ptr()),
                    static_cast<int64_t>(c10::elementSize(dtype)), *number_of(dtype), in_memory_order(buffers[i])});
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
      partials[b] = scale_block(jobs[block.buffer], block, scalar, with_sumsq, with_found_inf);
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
