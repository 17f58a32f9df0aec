// One side of one cell: encode a token into it (the arithmetic of codec.py), decode all of it to fp32.
//
// Legend: D head_dim (a multiple of 16), P page_tokens (16, 32 or 64).

#pragma once

#include <algorithm>

#include "cpu_vectors.h"

// ---- what cpu.py passes: keep in step with its ctypes structures ----------------------------------------

enum Codes : int32_t { FP32, BF16, FP8, INT8, INT4 };

struct Side {
  const float *shift_HD, *scale_HD;  // null: none
  int64_t codes_at, scales_at;       // bytes from the start of the head's cells
  Codes codes;
  int32_t groups;  // dynamic scales per token; 0: static or none
  int32_t rotate, transposed;

  int bits_each() const { return codes == FP32 ? 32 : codes == BF16 ? 16 : codes == INT4 ? 4 : 8; }
  int scale_rows() const { return std::max(1, groups); }
};

struct Cache {
  uint8_t* pool;
  int64_t pages, page_bytes, head_bytes;
  int32_t heads, head_dim, page_tokens;
  Side k, v;

  uint8_t* cell(int64_t page, int head) const { return pool + page * page_bytes + head * head_bytes; }
};

namespace {

// ---- numbers of 16 and 8 bits ---------------------------------------------------------------------------

constexpr float MIN_SCALE = 0x1p-24f, MAX_SCALE = 65504.0f, FP8_MAX = 448.0f, FP32_MAX = 3.4028235e38f;

inline float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
inline float round_even(float x) { return std::copysign((x + 12582912.0f) - 12582912.0f, x); }  // |x| < 2^22

inline uint16_t bf16_of(float x) {
  const uint32_t u = bits<uint32_t>(x);
  return x != x ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// fp16 of a number in -0..65504, and back. No bit pattern decodes to NaN: what is in slots not yet written may
// be multiplied by 0.
inline uint16_t half_of(float x) {
  const uint32_t u = bits<uint32_t>(x), sign = (u >> 16) & 0x8000;
  if (x < 0x1p-14f) return (uint16_t)(sign | (uint32_t)round_even(x * 0x1p24f));  // counts in steps of 2^-24
  return (uint16_t)(((u + 0xfff + ((u >> 13) & 1)) >> 13) - (112 << 10));
}
inline float float_of_half(uint16_t h) { return bits<float>((uint32_t)h << 13) * 0x1p112f; }
inline F floats_of_halves(U h) { return (F)((h & 0x7fff) << 13) * 0x1p112f; }

// e4m3 of a number in -448..448, and back (no NaN either).
inline uint8_t fp8_of(float x) {
  const uint32_t u = bits<uint32_t>(x), sign = (u >> 24) & 0x80, size = u & 0x7fffffff;
  if (size < bits<uint32_t>(0x1p-6f)) return (uint8_t)(sign | (uint32_t)round_even(std::fabs(x) * 512.0f));
  return (uint8_t)(sign | (((size + 0x7ffff + ((size >> 20) & 1)) >> 20) - (120 << 3)));
}
template <class Float, class Unsigned> inline Float float_of_fp8(Unsigned u) {
  return bits<Float>(((u & 0x7f) << 20) | ((u & 0x80) << 24)) * 0x1p120f;
}

// ---- encode ---------------------------------------------------------------------------------------------

// Codes of one group of n numbers, one a byte; a dynamic scale goes to `entry`.
void quantize(const Side& side, const float* x, int n, uint8_t* code, uint8_t* entry) {
  float scale = 1, zero = 8, low = 0, high = 0;
  if (side.groups) {
    for (int i = 0; i < n; i++) low = std::min(low, x[i]), high = std::max(high, x[i]);
    const float span = side.codes == INT4   ? (high - low) / 15
                       : side.codes == INT8 ? std::max(-low, high) / 127
                                            : std::max(-low, high) / FP8_MAX;
    const uint16_t stored = half_of(clamp(span, MIN_SCALE, MAX_SCALE));
    scale = float_of_half(stored);
    zero = round_even(clamp(-low / scale, 0, 15));
    store(entry, stored);
    if (side.codes == INT4) store(entry + 2, half_of(zero));
  }
  if (side.codes == FP8)
    for (int i = 0; i < n; i++) code[i] = fp8_of(clamp(x[i] / scale, -FP8_MAX, FP8_MAX));
  else if (side.codes == INT8)
    for (int i = 0; i < n; i++) code[i] = (uint8_t)(int)(round_even(clamp(x[i] / scale, -127, 127)) + 128);
  else if (side.groups)
    for (int i = 0; i < n; i++) code[i] = (uint8_t)(int)round_even(clamp(x[i] / scale + zero, 0, 15));
  else
    for (int i = 0; i < n; i++) code[i] = (uint8_t)(int)(round_even(clamp(x[i], -7, 7)) + 8);
}

// One token's numbers, transformed and encoded, into its cell. x is overwritten.
void write_token(const Cache& c, const Side& side, float* x, int head, uint8_t* cell, int at) {
  const int D = c.head_dim, P = c.page_tokens, row_bytes = D * side.bits_each() / 8;
  if (side.shift_HD) for (int i = 0; i < D; i++) x[i] -= side.shift_HD[head * D + i];
  if (side.scale_HD) for (int i = 0; i < D; i++) x[i] /= side.scale_HD[head * D + i];
  if (side.rotate) rotate(x, D);
  uint8_t* codes = cell + side.codes_at;
  if (side.codes == FP32) { std::memcpy(codes + at * row_bytes, x, row_bytes); return; }
  if (side.codes == BF16) {
    for (int i = 0; i < D; i++) store(codes + at * row_bytes + 2 * i, bf16_of(x[i]));
    return;
  }
  for (int i = 0; i < D; i++) x[i] = x[i] != x[i] ? 0 : clamp(x[i], -FP32_MAX, FP32_MAX);
  const int n = D / side.scale_rows(), entry_bytes = side.codes == INT4 ? 4 : 2;
  uint8_t code[1024];
  for (int g = 0; g < side.scale_rows(); g++)
    quantize(side, x + g * n, n, code + g * n, cell + side.scales_at + (g * P + at) * entry_bytes);
  if (side.codes == INT4) for (int i = 0; i < D / 2; i++) code[i] |= code[i + D / 2] << 4;
  if (side.transposed) for (int i = 0; i < row_bytes; i++) codes[i * P + at] = code[i];
  else std::memcpy(codes + at * row_bytes, code, row_bytes);
}

// ---- decode ---------------------------------------------------------------------------------------------

// Decodes one side's cells. K comes out as [D][P], V as [P][D]: what the two products of attention run along.
class Reader {
 public:
  Reader(const Cache& c, const Side& side)
      : side(side), D(c.head_dim), P(c.page_tokens), group(D / side.scale_rows()),
        vectors_fit((side.scale_rows() == 1 || group % 16 == 0) && (side.codes != INT4 || D % 32 == 0)) {}

  size_t scratch_size() const { return (size_t)2 * side.scale_rows() * P; }

  void keys(const uint8_t* cell, float* scratch, float* k_DP) const {
    read_scales(cell, scratch);
    if (!vectors_fit) return one_by_one(cell, scratch, k_DP, P, 1);
    switch (side.codes) {
      case FP32: return keys<FP32>(cell, scratch, k_DP);
      case BF16: return keys<BF16>(cell, scratch, k_DP);
      case FP8: return keys<FP8>(cell, scratch, k_DP);
      case INT8: return keys<INT8>(cell, scratch, k_DP);
      case INT4: return keys<INT4>(cell, scratch, k_DP);
    }
  }

  // Of the first `tokens` only: 16-bit values of slots not yet written may be NaN.
  void values(const uint8_t* cell, int tokens, float* scratch, float* v_PD) const {
    read_scales(cell, scratch);
    if (!vectors_fit) return one_by_one(cell, scratch, v_PD, 1, D);
    switch (side.codes) {
      case FP32: std::memcpy(v_PD, cell + side.codes_at, sizeof(float) * D * tokens); return;
      case BF16:
        for (int i = 0; i < D * tokens; i += LANES)
          store(v_PD + i, widen(load<U16>(cell + side.codes_at + 2 * i)) << 16);
        return;
      case FP8: return values<FP8>(cell, tokens, scratch, v_PD);
      case INT8: return values<INT8>(cell, tokens, scratch, v_PD);
      case INT4: return values<INT4>(cell, tokens, scratch, v_PD);
    }
  }

 private:
  const Side& side;
  const int D, P, group;   // channels that share a scale
  const bool vectors_fit;  // every 16 bytes of codes are of one scale and one half

  // Scales [groups][P], then as many zeros, as fp32; static codes get 1 and 8.
  void read_scales(const uint8_t* cell, float* out) const {
    const int n = side.scale_rows() * P;
    const uint8_t* in = cell + side.scales_at;
    for (int i = 0; i < n; i += LANES) {
      F scale = splat(1), zero = splat(8);
      if (side.groups && side.codes == INT4) {
        const U entry = load<U>(in + 4 * i);
        scale = floats_of_halves(entry);
        zero = floats_of_halves(entry >> 16);
      } else if (side.groups) {
        scale = floats_of_halves(widen(load<U16>(in + 2 * i)));
      }
      store(out + i, scale);
      store(out + n + i, zero);
    }
  }

  // From the words of rows: emit(element within a row's 16 bytes, numbers of the rows, half), where half
  // is 1 for int4's high nibbles, which belong D/2 channels further on.
  template <Codes C, class Emit> static void integers_to_floats(const U w[4], Emit emit) {
    for (int j = 0; j < 4; j++) {
      if constexpr (C == FP32) emit(j, (F)w[j], 0);
      if constexpr (C == BF16) {
        emit(2 * j, (F)(w[j] << 16), 0);
        emit(2 * j + 1, (F)(w[j] & 0xffff0000u), 0);
      }
      if constexpr (C == FP8)
        for (int i = 0; i < 4; i++) emit(4 * j + i, float_of_fp8<F>(w[j] >> (8 * i)), 0);
      if constexpr (C == INT8)
        for (int i = 0; i < 4; i++) {
          const I q = (I)((w[j] ^ 0x80808080u) << (24 - 8 * i)) >> 24;  // q + 128 to q, sign extended
          emit(4 * j + i, __builtin_convertvector(q, F), 0);
        }
      if constexpr (C == INT4)
        for (int i = 0; i < 8; i++)
          emit(4 * j + i / 2, __builtin_convertvector((I)(w[j] >> (4 * i) & 15), F), i % 2);
    }
  }

  template <Codes C> void keys(const uint8_t* cell, const float* scales, float* k_DP) const {
    constexpr int each = C == FP32 ? 4 : C == BF16 ? 8 : 16;  // elements in 16 bytes, of each half for int4
    const int row = D * side.bits_each() / 8, zeros = side.scale_rows() * P;
    for (int t = 0; t < P; t += LANES)
      for (int b = 0; b < row / 16; b++) {
        U w[4];
        transpose_words(cell + side.codes_at + t * row + 16 * b, row, w);
        const int d[2] = {b * each, b * each + (C == INT4 ? D / 2 : 0)};
        const float* s[2] = {scales + d[0] / group * P + t, scales + d[1] / group * P + t};
        const F scale[2] = {load<F>(s[0]), load<F>(s[1])};
        const F zero[2] = {load<F>(s[0] + zeros), load<F>(s[1] + zeros)};
        integers_to_floats<C>(w, [&](int i, F x, int half) {
          if constexpr (C == INT4) x -= zero[half];
          if constexpr (C >= FP8) x *= scale[half];
          store(k_DP + (d[half] + i) * P + t, x);
        });
      }
  }

  template <Codes C> void values(const uint8_t* cell, int tokens, const float* scales, float* v_PD) const {
    const int zeros = side.scale_rows() * P;
    for (int d0 = 0; d0 < (C == INT4 ? D / 2 : D); d0 += LANES) {
      const int d[2] = {d0, d0 + (C == INT4 ? D / 2 : 0)};
      const float* s[2] = {scales + d[0] / group * P, scales + d[1] / group * P};
      for (int t = 0; t < tokens; t += 16) {
        U w[4];
        transpose_words(cell + side.codes_at + d0 * P + t, P, w);
        integers_to_floats<C>(w, [&](int i, F x, int half) {
          if constexpr (C == INT4) x -= s[half][zeros + t + i];
          store(v_PD + (t + i) * D + d[half], x * s[half][t + i]);
        });
      }
    }
  }

  // For int4 of an odd number of half vectors and groups that are no multiple of 16: right, not fast.
  void one_by_one(const uint8_t* cell, const float* scales, float* out, int d_stride, int t_stride) const {
    const int code_rows = side.codes == INT4 ? D / 2 : D, zeros = side.scale_rows() * P;
    for (int d = 0; d < D; d++)
      for (int t = 0; t < P; t++) {
        const int j = d % code_rows, at = side.transposed ? j * P + t : t * code_rows + j;
        const uint32_t u = cell[side.codes_at + at];
        const float *s = scales + d / group * P + t, nibble = (float)(d < code_rows ? u & 15 : u >> 4);
        const float x = side.codes == FP8    ? float_of_fp8<float>(u)
                        : side.codes == INT8 ? (float)((int)u - 128)
                                             : nibble - s[zeros];
        out[d * d_stride + t * t_stride] = x * s[0];
      }
  }
};

}  // namespace
