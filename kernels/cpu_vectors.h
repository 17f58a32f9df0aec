// Sixteen fp32 numbers at a time: the arithmetic that the CPU's operations on pages are written in.
//
// GCC's vector types: AVX-512, AVX2, NEON or plain code come out of the same lines. Every sum has one order,
// and a multiplication joins an addition only where `fma` says so (build with -ffp-contract=off): equal
// inputs give equal bits, however the surrounding code was inlined or unrolled.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef uint16_t U16 __attribute__((vector_size(32)));  // 16 lanes of 16 bits
typedef uint32_t U4 __attribute__((vector_size(16)));
typedef uint32_t U8 __attribute__((vector_size(32)));

template <class V> inline V load(const void* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
template <class V> inline void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }
template <class V, class W> inline V bits(W w) { static_assert(sizeof(V) == sizeof(W)); return load<V>(&w); }

inline F splat(float x) { return x - F{}; }
inline U widen(U16 u) { return __builtin_convertvector(u, U); }
inline F max(F a, F b) { return a > b ? a : b; }

inline F fma(F a, F b, F c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FP_FAST_FMAF)
  F r;
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);  // becomes vector instructions
  return r;
#else
  return a * b + c;
#endif
}

inline I lane_numbers() { return I{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// Lane i and lane i ^ H change places.
template <int H> inline F swapped(F x) { return __builtin_shuffle(x, lane_numbers() ^ H); }

inline float lane_sum(F x) {
  x += swapped<8>(x);
  x += swapped<4>(x);
  x += swapped<2>(x);
  return (x + swapped<1>(x))[0];
}

inline float lane_max(F x) {
  x = max(x, swapped<8>(x));
  x = max(x, swapped<4>(x));
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
  for (int i = 0; i < n; i += LANES)
    store(x + i, butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(load<F>(x + i))))) * norm);
  for (int h = LANES; h < size; h *= 2)
    for (int i = 0; i < n; i += 2 * h)
      for (int j = i; j < i + h; j += LANES) {
        const F a = load<F>(x + j), b = load<F>(x + j + h);
        store(x + j, a + b);
        store(x + j + h, a - b);
      }
}

// 16 rows of 16 bytes: out[j] is word j of every row, a row per lane.
inline void transpose_words(const uint8_t* rows, int stride, U out[4]) {
  U r[4];
  for (int i = 0; i < 4; i++) {  // row i and every fourth after it, 128 bits each
    const auto row = [&](int j) { return load<U4>(rows + (i + 4 * j) * stride); };
    const U8 low = __builtin_shufflevector(row(0), row(1), 0, 1, 2, 3, 4, 5, 6, 7);
    const U8 high = __builtin_shufflevector(row(2), row(3), 0, 1, 2, 3, 4, 5, 6, 7);
    r[i] = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
  const auto low32 = [](U a, U b) {  // then 4 by 4 within each 128 bits
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  };
  const auto high32 = [](U a, U b) {
    return __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  };
  const auto low64 = [](U a, U b) {
    return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
  };
  const auto high64 = [](U a, U b) {
    return __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  };
  const U a = low32(r[0], r[1]), b = low32(r[2], r[3]), c = high32(r[0], r[1]), d = high32(r[2], r[3]);
  out[0] = low64(a, b);
  out[1] = high64(a, b);
  out[2] = low64(c, d);
  out[3] = high64(c, d);
}

}  // namespace
