// The element types of a KV cache, and their conversion to and from floats. The types of 16 bits need the flag SIXTEEN_BITS.
#pragma once
#include "multiply.h"

inline float to_float(float x) { return x; }
inline void store(float x, float* to) { *to = x; }
// WIDTH elements as a vector of floats.
template <int64_t WIDTH>
inline typename Vector<WIDTH>::Type load(const float* from) {
  return *reinterpret_cast<const typename Vector<WIDTH>::Type*>(from);
}

#ifdef SIXTEEN_BITS  // only then, since the intrinsics take a while to compile
#ifdef __F16C__
#include <immintrin.h>
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
// Round to nearest, ties to even, as do all of these.
inline void store(float x, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // A NaN stays one, also where its bits would overflow when rounded.
  to->bits = x != x ? 0x7FC0 : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

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

// Vectors by intrinsics, since GCC 12 converts those of _Float16 element by element where the processor does not compute in them,
// and those of integers in halves.
#ifdef __AVX512F__
inline __m512 load_16(const BFloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline __m512 load_16(const Float16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
#endif
#if defined(__AVX2__) && defined(__F16C__)
inline __m256 load_8(const BFloat16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __m256 load_8(const Float16* from) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
#endif

template <int64_t WIDTH, typename Narrow>
inline typename Vector<WIDTH>::Type load(const Narrow* from) {
  typename Vector<WIDTH>::Type wide;
#ifdef __AVX512F__
  if constexpr (WIDTH == 16) {
    const __m512 x = load_16(from);
    std::memcpy(&wide, &x, sizeof(wide));
    return wide;
  }
#endif
#if defined(__AVX2__) && defined(__F16C__)
  if constexpr (WIDTH % 8 == 0) {
    __m256 x[WIDTH / 8];
    for (int64_t i = 0; i < WIDTH / 8; ++i) x[i] = load_8(from + i * 8);
    std::memcpy(&wide, x, sizeof(wide));
    return wide;
  }
#endif
  for (int64_t i = 0; i < WIDTH; ++i) wide[i] = to_float(from[i]);
  return wide;
}
#endif
