// A vector of fp32 numbers: the arithmetic that the CPU's operations on pages are written in.
//
// GCC's vector types, as wide as the machine's registers: AVX-512, AVX2, NEON and SSE come out of the same
// lines. Every sum has one order, and a multiplication joins an addition only where `fma` says so (build with
// -ffp-contract=off): equal inputs give equal bits, however the surrounding code was inlined or unrolled.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t U16 __attribute__((vector_size(2 * LANES)));  // as many lanes of 16 bits
typedef uint32_t U_half __attribute__((vector_size(2 * LANES)));  // half as many
typedef uint64_t U64 __attribute__((vector_size(4 * LANES)));
typedef uint32_t U4 __attribute__((vector_size(16)));
typedef uint32_t U8 __attribute__((vector_size(32)));

template <class V> inline V load(const void* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
template <class V> inline void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }
template <class V, class W> inline V bits(W w) { static_assert(sizeof(V) == sizeof(W)); return load<V>(&w); }

inline F splat(float x) { return x - F{}; }

// What holds numbers of twice the size: one instruction, of which GCC 12 makes four.
#if LANES == 16
inline U widen(U16 u) { return (U)_mm512_cvtepu16_epi32((__m256i)u); }
inline U64 widen(U_half u) { return (U64)_mm512_cvtepu32_epi64((__m256i)u); }
#elif LANES == 8
inline U widen(U16 u) { return (U)_mm256_cvtepu16_epi32((__m128i)u); }
inline U64 widen(U_half u) { return (U64)_mm256_cvtepu32_epi64((__m128i)u); }
#else
inline U widen(U16 u) { return __builtin_convertvector(u, U); }
inline U64 widen(U_half u) { return __builtin_convertvector(u, U64); }
#endif

inline F max(F a, F b) { return a > b ? a : b; }

inline F fma(F a, F b, F c) {
#if defined(__FMA__) && LANES == 16
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__) && LANES == 8
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__FP_FAST_FMAF)
  F r;
  for (int i = 0; i < LANES; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#else
  return a * b + c;
#endif
}

inline I lane_numbers() {
#if LANES == 16
  return I{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif LANES == 8
  return I{0, 1, 2, 3, 4, 5, 6, 7};
#else
  return I{0, 1, 2, 3};
#endif
}

// Lane i and lane i ^ H change places.
template <int H> inline F swapped(F x) { return __builtin_shuffle(x, lane_numbers() ^ H); }

inline float lane_sum(F x) {
  if constexpr (LANES > 8) x += swapped<8>(x);
  if constexpr (LANES > 4) x += swapped<4>(x);
  x += swapped<2>(x);
  return (x + swapped<1>(x))[0];
}

inline float lane_max(F x) {
  if constexpr (LANES > 8) x = max(x, swapped<8>(x));
  if constexpr (LANES > 4) x = max(x, swapped<4>(x));
  x = max(x, swapped<2>(x));
  return max(x, swapped<1>(x))[0];
}

// 2^x to 2e-7, exactly 1 at 0 and 0 below 2^-126: a polynomial on the distance to the nearest integer.
inline F exp2(F x) {
  const float to_integer = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  const F capped = x > 127.0f ? splat(127.0f) : x, shifted = capped + to_integer;
  const F f = capped - (shifted - to_integer);
  F p = fma(splat(1.54035304e-4f), f, splat(1.33335581e-3f));
  p = fma(p, f, splat(9.61812911e-3f));
  p = fma(p, f, splat(5.55041087e-2f));
  p = fma(p, f, splat(2.40226507e-1f));
  p = fma(p, f, splat(6.93147181e-1f));
  p = fma(p, f, splat(1.0f));
  return x < -126.0f ? F{} : (F)((I)p + ((I)shifted << 23));
}

inline float exp2(float x) { return exp2(splat(x))[0]; }

// cap * tanh(x / cap)
inline F softcap(F x, float cap) {
  const float log2e = 1.44269504f;
  return cap - (2.0f * cap) / (exp2(x * (2.0f * log2e / cap)) + 1.0f);
}

template <int H> inline F butterfly(F x) {
  const F sign = (lane_numbers() & H) != 0 ? splat(-1.0f) : splat(1.0f);
  return swapped<H>(x) + x * sign;
}

// x R of transform.py: a fast Walsh-Hadamard transform per block of the largest power of two that divides n.
inline void rotate(float* x, int n) {
  const int size = n & -n;
  const float norm = 1.0f / std::sqrt((float)size);
  for (int i = 0; i < n; i += LANES) {
    F v = butterfly<2>(butterfly<1>(load<F>(x + i)));
    if constexpr (LANES > 4) v = butterfly<4>(v);
    if constexpr (LANES > 8) v = butterfly<8>(v);
    store(x + i, v * norm);
  }
  for (int h = LANES; h < size; h *= 2)
    for (int i = 0; i < n; i += 2 * h)
      for (int j = i; j < i + h; j += LANES) {
        const F a = load<F>(x + j), b = load<F>(x + j + h);
        store(x + j, a + b);
        store(x + j + h, a - b);
      }
}

// Rows i, i + 4, i + 8 ... of 16 bytes each, side by side.
inline U every_fourth(const uint8_t* rows, [[maybe_unused]] int stride) {
#if LANES == 4
  return load<U4>(rows);
#else
  const auto row = [&](int j) { return load<U4>(rows + 4 * j * stride); };
  const U8 low = __builtin_shufflevector(row(0), row(1), 0, 1, 2, 3, 4, 5, 6, 7);
#if LANES == 8
  return low;
#else
  const U8 high = __builtin_shufflevector(row(2), row(3), 0, 1, 2, 3, 4, 5, 6, 7);
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#endif
#endif
}

// LANES rows of 16 bytes: out[j] is word j of every row, a row per lane.
inline void transpose_words(const uint8_t* rows, int stride, U out[4]) {
  U r[4];
  for (int i = 0; i < 4; i++) r[i] = every_fourth(rows + i * stride, stride);
  // Then 4 by 4 words within each 16 bytes: first pairs of words of two rows, then of four.
  const I lane = lane_numbers(), quad = lane & ~3, at = lane & 3;
  const I words = quad + (at >> 1) + (at & 1) * LANES, pairs = quad + (at & 1) + (at >> 1) * LANES;
  const U a = __builtin_shuffle(r[0], r[1], words), b = __builtin_shuffle(r[2], r[3], words);
  const U c = __builtin_shuffle(r[0], r[1], words + 2), d = __builtin_shuffle(r[2], r[3], words + 2);
  out[0] = __builtin_shuffle(a, b, pairs);
  out[1] = __builtin_shuffle(a, b, pairs + 2);
  out[2] = __builtin_shuffle(c, d, pairs);
  out[3] = __builtin_shuffle(c, d, pairs + 2);
}

}  // namespace
