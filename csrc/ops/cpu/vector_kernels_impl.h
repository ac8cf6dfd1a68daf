// The loops of VectorKernels. Included once by each vector_kernels_<level>.cpp, which first defines
//     MIMO_EXT_LEVEL       name of the version
//     MIMO_EXT_TARGET      attribute that lets a function use the level's instructions
//     MIMO_EXT_WIDTH       float32 numbers in a register
//     MIMO_EXT_AVX         if the level has 256-bit vectors and converts float16 with an instruction
// Everything here has internal linkage: a function compiled for one level must never be merged with another's.
//
// Vectors are those of the compiler (GCC and clang).

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "ops/cpu/vector_kernels.h"

namespace mimo_ext::ops::cpu {
namespace {

constexpr size_t kWidth = MIMO_EXT_WIDTH;
constexpr size_t kParts = kLanes / kWidth;  // vectors of one step
static_assert(kLanes % kWidth == 0);

/// kWidth elements, whatever their size, and half as many.
template <typename T>
struct VectorOf {
  typedef T Whole __attribute__((vector_size(kWidth * sizeof(T))));
  typedef T Half __attribute__((vector_size(kWidth / 2 * sizeof(T))));
};
template <typename T>
using Vector = typename VectorOf<T>::Whole;
template <typename T>
using Half = typename VectorOf<T>::Half;

#define MIMO_EXT_INLINE MIMO_EXT_TARGET inline __attribute__((always_inline))

#ifdef MIMO_EXT_AVX
constexpr int64_t kLine = 64;           // of the caches
constexpr uintptr_t kReadOn = 4 << 10;  // bytes; farther ahead than the processor fetches by itself
// Bytes that large moves fetch at once, and then read. With less, or with much more, memory changes between reads and
// writes at a pace that costs up to a tenth.
constexpr int64_t kFetchStep = 256;

/// Of elements or bytes of `size` bytes, those before the first that begins a line; -1 where none does.
inline int64_t before_line(const void* data, size_t size) {
  const size_t past = reinterpret_cast<uintptr_t>(data) % kLine;
  if (past % size != 0) return -1;
  return static_cast<int64_t>((kLine - past) % kLine / size);
}

/// Lines at `at`, which may be any address, into the second level of the caches.
template <int64_t kBytes>
MIMO_EXT_INLINE void fetch(uintptr_t at) {
  for (uintptr_t part = 0; part < kBytes; part += kLine) {
    _mm_prefetch(reinterpret_cast<const char*>(at + part), _MM_HINT_T1);
  }
}

/// Lines that are read once, into the first level of the caches, and on their way out of it into none.
template <int64_t kBytes>
MIMO_EXT_INLINE void fetch_once(uintptr_t at) {
  for (uintptr_t part = 0; part < kBytes; part += kLine) {
    _mm_prefetch(reinterpret_cast<const char*>(at + part), _MM_HINT_NTA);
  }
}

/// Where a run of `bytes` bytes, after which `next` is read, has what is read kFetchAhead bytes after its byte i: at
/// in_run + i before the turn, at in_next + i from there on. A loop for each is faster than one that chooses. Without a
/// `next` it is byte i itself, and fetching it does nothing.
struct ReadAhead {
  ReadAhead(const void* run, int64_t bytes, const void* next)
      : turn(next == nullptr ? bytes : std::max(int64_t{0}, bytes - kFetchAhead)),
        in_run(reinterpret_cast<uintptr_t>(run) + (next == nullptr ? 0 : kFetchAhead)),
        in_next(reinterpret_cast<uintptr_t>(next) - static_cast<uintptr_t>(turn)) {}

  int64_t turn;
  uintptr_t in_run;
  uintptr_t in_next;
};
#endif

template <typename V>
MIMO_EXT_INLINE void load(V& vector, const void* from) {
  std::memcpy(&vector, from, sizeof vector);
}

/// kPast: past the caches; `to` is aligned to the vector then, or to 32 bytes.
template <bool kPast = false, typename V>
MIMO_EXT_INLINE void store(void* to, const V& vector) {
#ifdef MIMO_EXT_AVX
  if constexpr (kPast && sizeof vector == 16) {
    __m128i part;
    std::memcpy(&part, &vector, sizeof part);
    _mm_stream_si128(static_cast<__m128i*>(to), part);
    return;
  } else if constexpr (kPast) {
    __m256i parts[sizeof vector / 32];
    std::memcpy(&parts, &vector, sizeof parts);
    for (size_t i = 0; i < sizeof vector / 32; ++i) _mm256_stream_si256(static_cast<__m256i*>(to) + i, parts[i]);
    return;
  }
#endif
  std::memcpy(to, &vector, sizeof vector);
}

template <typename To, typename From>
MIMO_EXT_INLINE void reinterpret(To& to, const From& from) {
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
}

// An element type: how a vector is loaded as float32 (float64 for float64) and stored, rounded once; it then holds what
// was stored. Vectors go by reference: by value, their calling convention would depend on the level.

struct Float32 {
  using Wide = float;
  using Stored = float;
  MIMO_EXT_INLINE static void load_wide(Vector<float>& wide, const float* from) { load(wide, from); }
  template <bool kPast = false>
  MIMO_EXT_INLINE static void store_wide(float* to, Vector<float>& wide) {
    store<kPast>(to, wide);
  }
};

struct Float64 {
  using Wide = double;
  using Stored = double;
  MIMO_EXT_INLINE static void load_wide(Vector<double>& wide, const double* from) { load(wide, from); }
  template <bool kPast = false>
  MIMO_EXT_INLINE static void store_wide(double* to, Vector<double>& wide) {
    store<kPast>(to, wide);
  }
};

struct BFloat16 {
  using Wide = float;
  using Stored = uint16_t;
  MIMO_EXT_INLINE static void load_wide(Vector<float>& wide, const uint16_t* from) {
    Vector<uint16_t> stored;
    load(stored, from);
    const Vector<uint32_t> bits = __builtin_convertvector(stored, Vector<uint32_t>) << 16U;
    reinterpret(wide, bits);
  }
  template <bool kPast = false>
  MIMO_EXT_INLINE static void store_wide(uint16_t* to, Vector<float>& wide) {
    Vector<uint32_t> bits;
    reinterpret(bits, wide);
    const Vector<uint32_t> quiet_nan = bits - bits + 0x7FC0U;
    const Vector<uint32_t> nearest = (bits + 0x7FFFU + ((bits >> 16U) & 1U)) >> 16U;
    const Vector<uint32_t> rounded = wide == wide ? nearest : quiet_nan;
    const Vector<uint32_t> back = rounded << 16U;
    reinterpret(wide, back);
    store<kPast>(to, __builtin_convertvector(rounded, Vector<uint16_t>));
  }
#ifdef MIMO_EXT_AVX
  /// Two vectors, which keep their values. Taken apart into the upper and the lower halves of all bits, they are
  /// rounded in half as many steps.
  template <bool kPast>
  MIMO_EXT_INLINE static void store_pair(uint16_t* to, const Vector<float> (&wide)[2]) {
    Bits bits[2];
    for (size_t i = 0; i < 2; ++i) {
      Vector<uint32_t> number;
      reinterpret(number, wide[i]);
      const Vector<uint32_t> quiet_nan = number - number + 0x7FC00000U;
      const Vector<uint32_t> chosen = wide[i] == wide[i] ? number : quiet_nan;
      reinterpret(bits[i], chosen);
    }
    Bits upper;
    Bits lower;
    take_apart(upper, lower, bits);
    Pair kept;
    reinterpret(kept, upper);
    // lower + 0x7FFF + the last bit kept, halved: its first bit is what the sum carries.
    const Pair added = (kept & 1U) | 0x7FFEU;
    Bits half;
    reinterpret(half, added);
    half = average(lower, half);
    Pair carried;
    reinterpret(carried, half);
    carried = kept + (carried >> 15U);
    in_order(carried);
    store<kPast>(to, carried);
  }

 private:
  typedef uint16_t Pair __attribute__((vector_size(2 * kWidth * sizeof(uint16_t))));
#if MIMO_EXT_WIDTH == 16
  using Bits = __m512i;
  MIMO_EXT_INLINE static void take_apart(Bits& upper, Bits& lower, const Bits (&bits)[2]) {
    Pair second;
    for (size_t i = 0; i < 2 * kWidth; ++i) second[i] = static_cast<uint16_t>(2 * i);
    Bits evens;
    reinterpret(evens, second);
    second += 1U;
    Bits odds;
    reinterpret(odds, second);
    upper = _mm512_permutex2var_epi16(bits[0], odds, bits[1]);
    lower = _mm512_permutex2var_epi16(bits[0], evens, bits[1]);
  }
  MIMO_EXT_INLINE static Bits average(const Bits& a, const Bits& b) { return _mm512_avg_epu16(a, b); }
  MIMO_EXT_INLINE static void in_order(Pair&) {}
#else
  using Bits = __m256i;
  /// Within the halves of a register: of the first vector, of the second, of the first, of the second.
  MIMO_EXT_INLINE static void take_apart(Bits& upper, Bits& lower, const Bits (&bits)[2]) {
    const Bits mask = _mm256_set1_epi32(0xFFFF);
    upper = _mm256_packus_epi32(_mm256_srli_epi32(bits[0], 16), _mm256_srli_epi32(bits[1], 16));
    lower = _mm256_packus_epi32(_mm256_and_si256(bits[0], mask), _mm256_and_si256(bits[1], mask));
  }
  MIMO_EXT_INLINE static Bits average(const Bits& a, const Bits& b) { return _mm256_avg_epu16(a, b); }
  MIMO_EXT_INLINE static void in_order(Pair& pair) {
    Bits bits;
    reinterpret(bits, pair);
    bits = _mm256_permute4x64_epi64(bits, 0xD8);
    reinterpret(pair, bits);
  }
#endif
#endif
};

struct Float16 {
  using Wide = float;
  using Stored = uint16_t;
#ifdef MIMO_EXT_AVX
  // In one piece: parts that are put together in memory are not forwarded to a wider load.
#if MIMO_EXT_WIDTH == 16
  static constexpr __mmask16 kAll = 0xFFFF;  // without a mask, GCC 12 warns of its own header
  using Values = __m512;
  MIMO_EXT_INLINE static void widen(__m512& values, const __m256i& stored) {
    values = _mm512_maskz_cvtph_ps(kAll, stored);
  }
  MIMO_EXT_INLINE static void narrow(__m256i& stored, const __m512& values) {
    stored = _mm512_maskz_cvtps_ph(kAll, values, _MM_FROUND_TO_NEAREST_INT);
  }
  using Narrow = __m256i;
#else
  using Values = __m256;
  MIMO_EXT_INLINE static void widen(__m256& values, const __m128i& stored) { values = _mm256_cvtph_ps(stored); }
  MIMO_EXT_INLINE static void narrow(__m128i& stored, const __m256& values) {
    stored = _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT);
  }
  using Narrow = __m128i;
#endif
  MIMO_EXT_INLINE static void load_wide(Vector<float>& wide, const uint16_t* from) {
    Narrow stored;
    load(stored, from);
    Values values;
    widen(values, stored);
    reinterpret(wide, values);
  }
  template <bool kPast = false>
  MIMO_EXT_INLINE static void store_wide(uint16_t* to, Vector<float>& wide) {
    Values values;
    reinterpret(values, wide);
    Narrow stored;
    narrow(stored, values);
    store<kPast>(to, stored);
    widen(values, stored);
    reinterpret(wide, values);
  }
#else
  // As in ops/narrow.h, with both sides of each condition computed.
  MIMO_EXT_INLINE static void widen(Vector<float>& wide, const Vector<uint32_t>& stored) {
    const Vector<uint32_t> sign = (stored & 0x8000U) << 16U;
    const Vector<uint32_t> rest = (stored & 0x7FFFU) << 13U;
    Vector<float> scaled;
    reinterpret(scaled, rest);
    scaled *= 0x1p112F;
    Vector<uint32_t> finite;
    reinterpret(finite, scaled);
    const Vector<uint32_t> is_finite = reinterpret_cast<Vector<uint32_t> >(rest < 0x0F800000U);
    const Vector<uint32_t> bits = sign | (finite & is_finite) | ((rest + 0x70000000U) & ~is_finite);
    reinterpret(wide, bits);
  }
  MIMO_EXT_INLINE static void load_wide(Vector<float>& wide, const uint16_t* from) {
    Vector<uint16_t> stored;
    load(stored, from);
    widen(wide, __builtin_convertvector(stored, Vector<uint32_t>));
  }
  template <bool kPast = false>
  MIMO_EXT_INLINE static void store_wide(uint16_t* to, Vector<float>& wide) {
    Vector<uint32_t> bits;
    reinterpret(bits, wide);
    const Vector<uint32_t> sign = (bits >> 16U) & 0x8000U;
    const Vector<uint32_t> magnitude = bits & 0x7FFFFFFFU;
    Vector<float> with_half;
    reinterpret(with_half, magnitude);
    with_half += 0.5F;
    Vector<uint32_t> small;
    reinterpret(small, with_half);
    small -= 0x3F000000U;
    const Vector<uint32_t> normal = (magnitude - 0x38000000U + 0xFFFU + ((magnitude >> 13U) & 1U)) >> 13U;
    const Vector<uint32_t> is_small = reinterpret_cast<Vector<uint32_t> >(magnitude < 0x38800000U);
    const Vector<uint32_t> is_large = reinterpret_cast<Vector<uint32_t> >(magnitude >= 0x47800000U);
    const Vector<uint32_t> is_nan = reinterpret_cast<Vector<uint32_t> >(magnitude > 0x7F800000U);
    const Vector<uint32_t> rounded =
        sign | (small & is_small) | (normal & ~is_small & ~is_large) | (0x7C00U & is_large) | (0x0200U & is_nan);
    widen(wide, rounded);
    store<kPast>(to, __builtin_convertvector(rounded, Vector<uint16_t>));
  }
#endif
};

/// The two halves of a vector, in float64.
template <typename T>
MIMO_EXT_INLINE void widen_halves(Half<double> (&wide)[2], const Vector<T>& vector) {
  Half<T> halves[2];
  reinterpret(halves, vector);
  wide[0] = __builtin_convertvector(halves[0], Half<double>);
  wide[1] = __builtin_convertvector(halves[1], Half<double>);
}

/// Adds squares. Those of float32 are exact in float64, so that fusing product and sum changes nothing; those of
/// float64 are rounded, and no level may fuse them.
template <typename T>
MIMO_EXT_INLINE void add_squares(Half<double> (&squares)[2], const Vector<T>& vector) {
  Half<double> values[2];
  widen_halves<T>(values, vector);
  for (size_t h = 0; h < 2; ++h) {
    Half<double> product = values[h] * values[h];
    if constexpr (sizeof(T) == sizeof(double)) asm("" : "+m"(product));
    squares[h] += product;
  }
}

template <typename T, bool kSquares>
MIMO_EXT_INLINE void scale_run(void* data, int64_t count, double factor, Lanes* lanes) {
  constexpr auto kStep = static_cast<int64_t>(kLanes);
  auto* at = static_cast<typename T::Stored*>(data);
  const auto wide_factor = static_cast<typename T::Wide>(factor);
  Half<double> squares[kParts][2] = {};
  if constexpr (kSquares) std::memcpy(&squares, lanes->data(), sizeof squares);
  for (; count >= kStep; count -= kStep, at += kLanes) {
#ifdef MIMO_EXT_AVX
    fetch<kStep * sizeof(typename T::Stored)>(reinterpret_cast<uintptr_t>(at) + kReadOn);
#endif
#pragma GCC unroll 4
    for (size_t part = 0; part < kParts; ++part) {
      Vector<typename T::Wide> wide;
      T::load_wide(wide, at + part * kWidth);
      wide *= wide_factor;
      T::store_wide(at + part * kWidth, wide);
      if constexpr (kSquares) add_squares<typename T::Wide>(squares[part], wide);
    }
  }
  if constexpr (kSquares) std::memcpy(lanes->data(), &squares, sizeof squares);
  // The rest, in vectors that end in zeros; what these would add (NaN if the factor is infinite) is left out.
  for (size_t part = 0; count > 0; ++part) {
    const auto rest = std::min(static_cast<size_t>(count), kWidth);
    typename T::Stored stored[kWidth] = {};
    std::memcpy(stored, at, rest * sizeof stored[0]);
    Vector<typename T::Wide> wide;
    T::load_wide(wide, stored);
    wide *= wide_factor;
    T::store_wide(stored, wide);
    std::memcpy(at, stored, rest * sizeof stored[0]);
    if constexpr (kSquares) {
      Half<double> added[2] = {};
      add_squares<typename T::Wide>(added, wide);
      double each[kWidth];
      std::memcpy(each, &added, sizeof each);
      for (size_t i = 0; i < rest; ++i) (*lanes)[part * kWidth + i] += each[i];
    }
    at += rest;
    count -= static_cast<int64_t>(rest);
  }
}

template <typename T>
MIMO_EXT_TARGET void scale(void* data, int64_t count, double factor) {
  scale_run<T, false>(data, count, factor, nullptr);
}

template <typename T>
MIMO_EXT_TARGET void scale_squares(void* data, int64_t count, double factor, Lanes& squares) {
  scale_run<T, true>(data, count, factor, &squares);
}

/// A vector of what is to be stored at `to`.
template <typename Dst, typename Src, bool kAdd>
MIMO_EXT_INLINE void load_converted(Vector<typename Dst::Wide>& wide, const typename Dst::Stored* to,
                                    const typename Src::Stored* from) {
  Vector<typename Src::Wide> loaded;
  Src::load_wide(loaded, from);
  wide = __builtin_convertvector(loaded, Vector<typename Dst::Wide>);
  if constexpr (kAdd) {
    Vector<typename Dst::Wide> before;
    Dst::load_wide(before, to);
    wide = before + wide;
  }
}

template <typename Dst, typename Src, bool kAdd, bool kPast = false>
MIMO_EXT_INLINE void convert_vector(typename Dst::Stored* to, const typename Src::Stored* from) {
  Vector<typename Dst::Wide> wide;
  load_converted<Dst, Src, kAdd>(wide, to, from);
  Dst::template store_wide<kPast>(to, wide);
}

/// Two vectors.
template <typename Dst, typename Src, bool kAdd, bool kPast = false>
MIMO_EXT_INLINE void convert_pair(typename Dst::Stored* to, const typename Src::Stored* from) {
#ifdef MIMO_EXT_AVX
  if constexpr (std::is_same_v<Dst, BFloat16>) {
    Vector<float> wide[2];
    for (size_t i = 0; i < 2; ++i) load_converted<Dst, Src, kAdd>(wide[i], to + i * kWidth, from + i * kWidth);
    return Dst::template store_pair<kPast>(to, wide);
  }
#endif
  convert_vector<Dst, Src, kAdd, kPast>(to, from);
  convert_vector<Dst, Src, kAdd, kPast>(to + kWidth, from + kWidth);
}

template <typename Dst, typename Src, bool kAdd>
MIMO_EXT_TARGET void convert(void* dst, const void* src, int64_t count) {
  auto* to = static_cast<typename Dst::Stored*>(dst);
  const auto* from = static_cast<const typename Src::Stored*>(src);
  int64_t i = 0;
  constexpr auto kVector = static_cast<int64_t>(kWidth);
  for (; i + 2 * kVector <= count; i += 2 * kVector) convert_pair<Dst, Src, kAdd>(to + i, from + i);
  for (; i + kVector <= count; i += kVector) convert_vector<Dst, Src, kAdd>(to + i, from + i);
  if (i == count) return;
  const auto rest = static_cast<size_t>(count - i);
  typename Dst::Stored rest_to[kWidth] = {};
  typename Src::Stored rest_from[kWidth] = {};
  if constexpr (kAdd) std::memcpy(rest_to, to + i, rest * sizeof rest_to[0]);
  std::memcpy(rest_from, from + i, rest * sizeof rest_from[0]);
  convert_vector<Dst, Src, kAdd>(rest_to, rest_from);
  std::memcpy(to + i, rest_to, rest * sizeof rest_to[0]);
}

#ifdef MIMO_EXT_AVX
/// The whole steps of kStep elements of [i, end) of a large conversion; returns where the rest begins. Dst is written
/// past the caches, but for sums. ahead: of ReadAhead.
template <typename Dst, typename Src, bool kAdd, int64_t kStep>
MIMO_EXT_INLINE int64_t convert_steps(typename Dst::Stored* to, const typename Src::Stored* from, int64_t i,
                                      int64_t end, uintptr_t ahead) {
  constexpr int64_t kPair = 2 * kWidth;
  constexpr int64_t kFrom = sizeof(typename Src::Stored);
  constexpr int64_t kRead = kAdd ? sizeof(typename Dst::Stored) : kFrom;
  for (; i + kStep <= end; i += kStep) {
    fetch_once<kStep * kRead>(ahead + static_cast<uintptr_t>(i * kRead));
    if constexpr (kAdd) fetch_once<kStep * kFrom>(reinterpret_cast<uintptr_t>(from + i) + kFetchAhead);
#pragma GCC unroll 8
    for (int64_t part = i; part < i + kStep; part += kPair) {
      convert_pair<Dst, Src, kAdd, !kAdd>(to + part, from + part);
    }
  }
  return i;
}
#endif

template <typename Dst, typename Src, bool kAdd>
MIMO_EXT_TARGET void convert_large(void* dst, const void* src, int64_t count, const void* next) {
#ifdef MIMO_EXT_AVX
  using To = typename Dst::Stored;
  using From = typename Src::Stored;
  constexpr int64_t kRead = kAdd ? sizeof(To) : sizeof(From);
  auto* to = static_cast<To*>(dst);
  const auto* from = static_cast<const From*>(src);
  const ReadAhead ahead(kAdd ? dst : src, count * kRead, next);
  int64_t i = 0;
  if constexpr (!kAdd) {
    i = before_line(dst, sizeof(To));
    if (i < 0 || i >= count) return convert<Dst, Src, kAdd>(dst, src, count);
    if (i > 0) convert<Dst, Src, kAdd>(dst, src, i);
  }
  i = convert_steps<Dst, Src, kAdd, kFetchStep / kRead>(to, from, i, ahead.turn / kRead, ahead.in_run);
  i = convert_steps<Dst, Src, kAdd, kFetchStep / kRead>(to, from, i, count, ahead.in_next);
  i = convert_steps<Dst, Src, kAdd, 2 * kWidth>(to, from, i, count, ahead.in_next);
  if (i < count) convert<Dst, Src, kAdd>(to + i, from + i, count - i);
#else
  static_cast<void>(next);
  convert<Dst, Src, kAdd>(dst, src, count);
#endif
}

#ifdef MIMO_EXT_AVX
template <int64_t kStep>
MIMO_EXT_INLINE int64_t stream_steps(unsigned char* to, const unsigned char* from, int64_t i, int64_t end,
                                     uintptr_t ahead) {
  constexpr int64_t kVector = 32;
  for (; i + kStep <= end; i += kStep) {
    fetch_once<kStep>(ahead + static_cast<uintptr_t>(i));
#pragma GCC unroll 8
    for (int64_t part = i; part < i + kStep; part += kVector) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + part),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + part)));
    }
  }
  return i;
}
#endif

MIMO_EXT_TARGET void stream(void* dst, const void* src, int64_t bytes, const void* next) {
#ifdef MIMO_EXT_AVX
  auto* to = static_cast<unsigned char*>(dst);
  const auto* from = static_cast<const unsigned char*>(src);
  const ReadAhead ahead(src, bytes, next);
  int64_t i = std::min(bytes, before_line(to, 1));
  std::memcpy(to, from, static_cast<size_t>(i));
  i = stream_steps<kFetchStep>(to, from, i, ahead.turn, ahead.in_run);
  i = stream_steps<kFetchStep>(to, from, i, bytes, ahead.in_next);
  i = stream_steps<kLine>(to, from, i, bytes, ahead.in_next);
  std::memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
#else
  static_cast<void>(next);
  std::memcpy(dst, src, static_cast<size_t>(bytes));
#endif
}

MIMO_EXT_TARGET void finish_streams() {
#ifdef MIMO_EXT_AVX
  _mm_sfence();
#endif
}

template <typename Dst, bool kAdd>
constexpr std::array<Convert, kNumNumbers> convert_to() {
  return {convert<Dst, Float32, kAdd>, convert<Dst, Float64, kAdd>, convert<Dst, BFloat16, kAdd>,
          convert<Dst, Float16, kAdd>};
}

template <typename Dst, bool kAdd>
constexpr std::array<ConvertLarge, kNumNumbers> convert_large_to() {
  return {convert_large<Dst, Float32, kAdd>, convert_large<Dst, Float64, kAdd>, convert_large<Dst, BFloat16, kAdd>,
          convert_large<Dst, Float16, kAdd>};
}

constexpr VectorKernels kKernels{
    MIMO_EXT_LEVEL,
    stream,
    finish_streams,
    {scale<Float32>, scale<Float64>, scale<BFloat16>, scale<Float16>},
    {scale_squares<Float32>, scale_squares<Float64>, scale_squares<BFloat16>, scale_squares<Float16>},
    {convert_to<Float32, false>(), convert_to<Float64, false>(), convert_to<BFloat16, false>(),
     convert_to<Float16, false>()},
    {convert_to<Float32, true>(), convert_to<Float64, true>(), convert_to<BFloat16, true>(),
     convert_to<Float16, true>()},
    {convert_large_to<Float32, false>(), convert_large_to<Float64, false>(), convert_large_to<BFloat16, false>(),
     convert_large_to<Float16, false>()},
    {convert_large_to<Float32, true>(), convert_large_to<Float64, true>(), convert_large_to<BFloat16, true>(),
     convert_large_to<Float16, true>()},
};

}  // namespace
}  // namespace mimo_ext::ops::cpu
