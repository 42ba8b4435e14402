// The element types of a KV cache, and their conversion to and from floats, in vectors of WIDTH elements.
#pragma once
#include "multiply.h"

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

// Round to nearest, ties to even.
inline void store(float x, float* to) { *to = x; }
inline void store(float x, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // A NaN stays one, also where its bits would overflow when rounded.
  to->bits = x != x ? 0x7FC0 : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

template <int64_t WIDTH>
inline typename Vector<WIDTH>::Type load(const float* from) {
  return *reinterpret_cast<const typename Vector<WIDTH>::Type*>(from);
}
template <int64_t WIDTH>
struct BitsVector {
  typedef uint16_t Narrow __attribute__((vector_size(WIDTH * sizeof(uint16_t)), aligned(sizeof(uint16_t)), may_alias));
  typedef uint32_t Wide __attribute__((vector_size(WIDTH * sizeof(uint32_t))));
};
template <int64_t WIDTH>
inline typename Vector<WIDTH>::Type load(const BFloat16* from) {
  using Bits = BitsVector<WIDTH>;
  const typename Bits::Wide bits =
      __builtin_convertvector(*reinterpret_cast<const typename Bits::Narrow*>(from), typename Bits::Wide) << 16;
  typename Vector<WIDTH>::Type wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

#ifdef FLOAT16  // only then, since the intrinsics take a while to compile
#ifdef __F16C__
#include <immintrin.h>
#endif

struct Float16 {
  uint16_t bits;
};

#ifdef __F16C__
inline float to_float(Float16 x) { return _cvtsh_ss(x.bits); }
inline void store(float x, Float16* to) { to->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#else
inline float to_float(Float16 x) {
  _Float16 narrow;
  std::memcpy(&narrow, &x, 2);
  return narrow;
}
inline void store(float x, Float16* to) {
  const _Float16 narrow = x;
  std::memcpy(to, &narrow, 2);
}
#endif

// By intrinsics, since GCC converts vectors of _Float16 element by element where the processor does not compute in them.
template <int64_t WIDTH>
inline typename Vector<WIDTH>::Type load(const Float16* from) {
  typename Vector<WIDTH>::Type wide;
#ifdef __AVX512F__
  if constexpr (WIDTH == 16) {
    const __m512 x = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    std::memcpy(&wide, &x, sizeof(wide));
    return wide;
  }
#endif
#ifdef __F16C__
  if constexpr (WIDTH % 8 == 0) {
    __m256 x[WIDTH / 8];
    for (int64_t i = 0; i < WIDTH / 8; ++i) x[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i));
    std::memcpy(&wide, x, sizeof(wide));
    return wide;
  } else if constexpr (WIDTH == 4) {
    const __m128 x = _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    std::memcpy(&wide, &x, sizeof(wide));
    return wide;
  }
#endif
  for (int64_t i = 0; i < WIDTH; ++i) wide[i] = to_float(from[i]);
  return wide;
}
#endif
