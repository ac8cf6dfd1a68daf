#include "ops/cuda/rescale_table.h"

#include <limits>

namespace mimo_ext::ops::cuda {

static_assert(sizeof(RescaleTable) + 64 <= 4096, "arguments of a kernel");

std::vector<RescaleTable> rescale_tables(const std::vector<RescaleBuffer>& buffers) {
  std::vector<RescaleTable> tables;
  for (const RescaleBuffer& buffer : buffers) {
    if (buffer.numel == 0) continue;
    const int64_t chunks = (buffer.numel - 1) / kRescaleChunk + 1;
    const bool full = !tables.empty() && (tables.back().num_buffers == kRescaleBuffers ||
                                          tables.back().num_chunks > std::numeric_limits<int32_t>::max() - chunks);
    if (tables.empty() || full) {
      const int64_t earlier = tables.empty() ? 0 : tables.back().earlier_chunks + tables.back().num_chunks;
      tables.push_back({});
      tables.back().earlier_chunks = earlier;
    }
    RescaleTable& table = tables.back();
    const auto i = static_cast<size_t>(table.num_buffers++);
    table.data[i] = buffer.data;
    table.numel[i] = buffer.numel;
    table.dtype[i] = buffer.dtype;
    table.first_chunk[i] = table.num_chunks;
    table.num_chunks += chunks;
    table.first_chunk[i + 1] = table.num_chunks;
  }
  return tables;
}

}  // namespace mimo_ext::ops::cuda
