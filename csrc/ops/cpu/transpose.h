#pragma once

// Transposes matrices of elements of 1, 2, 4, 8 or 16 bytes, as bytes. C++ standard library only.
//
// A tile is a line of each of as many source rows as fill two lines of the destination. Every line of either side is
// touched once, however far apart rows are; where that is a power of two, they fall into few places of a cache, and
// what is left for later would be gone. In between a tile lies in the first level of the caches.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "ops/cpu/move.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace mimo_ext::ops {

/// Where rows of elements begin, and how many bytes after one another; elements of a row are contiguous.
template <typename Byte>
struct RowsAt {
  Byte* data;
  int64_t step;

  RowsAt at(int64_t row, int64_t bytes) const { return {data + row * step + bytes, step}; }
  operator RowsAt<const Byte>() const
    requires(!std::is_const_v<Byte>)
  {
    return {data, step};
  }
};

inline constexpr int64_t kTileLine = 64;  // bytes, of the caches

/// Of elements of kBytes bytes. Rows and columns are those of the source; transposed, a column is kRowBytes long.
template <int64_t kBytes>
struct TileOf {
  static constexpr int64_t kSide = 16 / kBytes;  // of a block
  static constexpr int64_t kColumns = kTileLine / kBytes;
  static constexpr int64_t kRowBytes = 2 * kTileLine;
  static constexpr int64_t kRows = kRowBytes / kBytes;
};

/// dst[column][row] = src[row][column].
template <int64_t kBytes>
void transpose_elements(RowsAt<const std::byte> src, RowsAt<std::byte> dst, int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      std::memcpy(dst.at(column, row * kBytes).data, src.at(row, column * kBytes).data, kBytes);
    }
  }
}

#if defined(__SSE2__)

/// first, second: the first and the second halves of two registers, an element of each in turn.
template <int64_t kBytes>
inline void interleave(const __m128i& a, const __m128i& b, __m128i& first, __m128i& second) {
  if constexpr (kBytes == 1) {
    first = _mm_unpacklo_epi8(a, b);
    second = _mm_unpackhi_epi8(a, b);
  } else if constexpr (kBytes == 2) {
    first = _mm_unpacklo_epi16(a, b);
    second = _mm_unpackhi_epi16(a, b);
  } else if constexpr (kBytes == 4) {
    first = _mm_unpacklo_epi32(a, b);
    second = _mm_unpackhi_epi32(a, b);
  } else {
    first = _mm_unpacklo_epi64(a, b);
    second = _mm_unpackhi_epi64(a, b);
  }
}

/// As many rows as a register has elements, and as many columns.
template <int64_t kBytes>
__attribute__((always_inline)) inline void transpose_block(RowsAt<const std::byte> src, RowsAt<std::byte> dst) {
  constexpr int64_t kSide = TileOf<kBytes>::kSide;
  __m128i block[kSide];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kSide; ++i) block[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src.at(i, 0).data));
  // Each round takes a bit of an element's row into its column, and one of its column into its row.
#pragma GCC unroll 4
  for (int64_t round = 1; round < kSide; round *= 2) {
    __m128i next[kSide];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kSide / 2; ++i) {
      interleave<kBytes>(block[i], block[i + kSide / 2], next[2 * i], next[2 * i + 1]);
    }
    std::memcpy(block, next, sizeof block);
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < kSide; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(dst.at(i, 0).data), block[i]);
}

#endif

/// A tile; `next` is the source of the tile after it, or any address: it is fetched, not read. kPast: dst is written
/// past the caches, and its lines are whole ones.
template <int64_t kBytes, bool kPast>
__attribute__((always_inline)) inline void transpose_tile(RowsAt<const std::byte> src, RowsAt<std::byte> dst,
                                                          const std::byte* next) {
  constexpr int64_t kColumns = TileOf<kBytes>::kColumns;
  constexpr int64_t kRows = TileOf<kBytes>::kRows;
#if defined(__SSE2__)
  constexpr int64_t kSide = TileOf<kBytes>::kSide;
  constexpr int64_t kRowBytes = TileOf<kBytes>::kRowBytes;
  alignas(kTileLine) std::byte memory[kColumns * kRowBytes];
  const RowsAt<std::byte> tile{memory, kRowBytes};
  for (int64_t row = 0; row < kRows; row += kSide) {
    for (int64_t i = row; i < row + kSide; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(next + i * src.step), _MM_HINT_T1);
    }
    for (int64_t column = 0; column < kColumns; column += kSide) {
      transpose_block<kBytes>(src.at(row, column * kBytes), tile.at(column, row * kBytes));
    }
  }
  for (int64_t column = 0; column < kColumns; ++column) {
    const std::byte* from = tile.at(column, 0).data;
    std::byte* to = dst.at(column, 0).data;
    if constexpr (kPast) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < kRowBytes; i += 16) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm_load_si128(reinterpret_cast<const __m128i*>(from + i)));
      }
    } else {
      std::memcpy(to, from, kRowBytes);
    }
  }
#else
  static_cast<void>(next);
  transpose_elements<kBytes>(src, dst, kRows, kColumns);
#endif
}

/// What is no whole tile. Here, too, lines are read and written once.
template <int64_t kBytes>
void transpose_part(RowsAt<const std::byte> src, RowsAt<std::byte> dst, int64_t rows, int64_t columns) {
#if defined(__SSE2__)
  constexpr int64_t kSide = TileOf<kBytes>::kSide;
  constexpr int64_t kRowBytes = TileOf<kBytes>::kRowBytes;
  if (rows < kSide || columns < kSide) return transpose_elements<kBytes>(src, dst, rows, columns);
  // Whole blocks are transposed. What pads them is never looked at.
  alignas(kTileLine) std::byte lines[TileOf<kBytes>::kRows * kTileLine];
  alignas(kTileLine) std::byte memory[TileOf<kBytes>::kColumns * kRowBytes];
  const RowsAt<std::byte> gathered{lines, kTileLine};
  const RowsAt<std::byte> tile{memory, kRowBytes};
  for (int64_t row = 0; row < rows; ++row) {
    std::memcpy(gathered.at(row, 0).data, src.at(row, 0).data, static_cast<size_t>(columns * kBytes));
  }
  for (int64_t row = 0; row < rows; row += kSide) {
    for (int64_t column = 0; column < columns; column += kSide) {
      transpose_block<kBytes>(gathered.at(row, column * kBytes), tile.at(column, row * kBytes));
    }
  }
  for (int64_t column = 0; column < columns; ++column) {
    std::memcpy(dst.at(column, 0).data, tile.at(column, 0).data, static_cast<size_t>(rows * kBytes));
  }
#else
  transpose_elements<kBytes>(src, dst, rows, columns);
#endif
}

template <int64_t kBytes, bool kPast>
__attribute__((always_inline)) inline void transpose_tiles(RowsAt<const std::byte> src, RowsAt<std::byte> dst,
                                                           int64_t rows, int64_t columns) {
  constexpr int64_t kColumns = TileOf<kBytes>::kColumns;
  constexpr int64_t kRows = TileOf<kBytes>::kRows;
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t some_rows = std::min(kRows, rows - row);
    int64_t column = 0;
    for (; some_rows == kRows && column + kColumns <= columns; column += kColumns) {
      const bool last = column + 2 * kColumns > columns;
      const RowsAt<const std::byte> next =
          last ? src.at(std::min(row + kRows, rows - kRows), 0) : src.at(row, (column + kColumns) * kBytes);
      transpose_tile<kBytes, kPast>(src.at(row, column * kBytes), dst.at(column, row * kBytes), next.data);
    }
    for (; column < columns; column += kColumns) {
      transpose_part<kBytes>(src.at(row, column * kBytes), dst.at(column, row * kBytes), some_rows,
                             std::min(kColumns, columns - column));
    }
  }
}

/// dst[column][row] = src[row][column] for `rows` x `columns` elements of `itemsize` bytes.
/// past_caches: where more moves than they hold; stores are then ordered with later ones by a fence of the caller's
/// (VectorKernels::finish_streams).
inline void transpose(int64_t itemsize, RowsAt<const std::byte> src, RowsAt<std::byte> dst, int64_t rows,
                      int64_t columns, bool past_caches) {
  const bool past = past_caches && reinterpret_cast<uintptr_t>(dst.data) % kTileLine == 0 && dst.step % kTileLine == 0;
  with_size(itemsize, [&]<size_t kBytes>() {
    (past ? transpose_tiles<kBytes, true> : transpose_tiles<kBytes, false>)(src, dst, rows, columns);
  });
}

}  // namespace mimo_ext::ops
