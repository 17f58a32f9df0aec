// The operations on pages of `cpu.py`: quantize K and V into pages, attend over pages. Any format a side.
//
// One arithmetic for every batch: a query row meets the pages of its sequence in order, each page's sums run
// over d or over tokens in order, one lane of a vector per result, and partial softmaxes are merged at fixed
// token positions. Rows only share loads. So a row's bits do not depend on the rows around it, on the number
// of threads or on whether it is decoded or part of a prefill chunk. (Not to be built with -ffast-math.)
//
// Tensors: T tokens, H kv heads, G query heads per kv head, D head_dim (a multiple of 16), P page_tokens.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace {

// ---- vectors of 16 lanes -------------------------------------------------------------------------------

constexpr int LANES = 16;
typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef uint16_t U16 __attribute__((vector_size(32)));
typedef uint32_t U4 __attribute__((vector_size(16)));

#ifdef __AVX512F__
constexpr int WIDE = 4;  // vectors of results that stay in registers, times 4 rows
#else
constexpr int WIDE = 1;
#endif
constexpr int TILE_ROWS = 64;        // query rows that share one dequantized page
constexpr int CHUNK_TOKENS = 1024;   // partial softmaxes are merged at multiples of this
constexpr float NEVER = -INFINITY;
constexpr float LOG2E = 1.44269504088896f;

template <class V> inline V load(const void* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
template <class V> inline void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }
template <class V, class W> inline V bits(W w) { static_assert(sizeof(V) == sizeof(W)); return load<V>(&w); }
inline F splat(float x) { return x - F{}; }
inline F to_float(U u) { return __builtin_convertvector((I)u, F); }
inline F max(F a, F b) { return a > b ? a : b; }

inline F lane_numbers() {
  F v;
  for (int i = 0; i < LANES; i++) v[i] = (float)i;
  return v;
}

#define SWAP_LANES(x, h) __builtin_shuffle(x, (I{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} ^ (h)))

inline float lane_sum(F x) {
  x += SWAP_LANES(x, 8); x += SWAP_LANES(x, 4); x += SWAP_LANES(x, 2); x += SWAP_LANES(x, 1);
  return x[0];
}

inline float lane_max(F x) {
  x = max(x, SWAP_LANES(x, 8)); x = max(x, SWAP_LANES(x, 4));
  x = max(x, SWAP_LANES(x, 2)); x = max(x, SWAP_LANES(x, 1));
  return x[0];
}

// 2^x, relative error 2e-7: nearest integer by the 1.5 * 2^23 trick, polynomial on the rest. 2^0 is exactly 1.
inline F exp2(F x) {
  const F magic = splat(12582912.0f), clamped = x > 127.0f ? splat(127.0f) : x;
  const F shifted = clamped + magic, f = clamped - (shifted - magic);
  F p = splat(1.54035304e-4f);
  p = p * f + 1.33335581e-3f;
  p = p * f + 9.61812911e-3f;
  p = p * f + 5.55041087e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  p = p * f + 1.0f;
  const F scaled = (F)((I)p + ((I)shifted << 23));
  return x < -126.0f ? F{} : scaled;
}

inline float exp2_of(float x) { return exp2(splat(x))[0]; }

// x becomes 1 - 2 / (e^2x + 1), times `cap`.
inline F softcap(F x, float cap) {
  const F e = exp2(x * (2.0f * LOG2E / cap));
  return cap - (2.0f * cap) / (e + 1.0f);
}

}  // namespace

// ---- what cpu.py passes: keep in step with its ctypes structures ----------------------------------------

enum Codes : int32_t { FP32, BF16, FP8, INT8, INT4 };

struct Side {
  const float* shift_HD;  // or null
  const float* scale_HD;  // or null
  int64_t codes_at, scales_at;
  Codes codes;
  int32_t groups;  // 0: no scales in the page
  int32_t rotate, transposed;

  int bits_each() const { return codes == FP32 ? 32 : codes == BF16 ? 16 : codes == INT4 ? 4 : 8; }
};

struct Cache {
  uint8_t* pool;
  int64_t pages, page_bytes, head_bytes;
  int32_t heads, head_dim, page_tokens, unused;
  Side k, v;

  uint8_t* cell(int64_t page, int head) const { return pool + page * page_bytes + head * head_bytes; }
};

struct Rows {  // [T, heads, D], the last axis dense
  const void* data;
  int64_t token_stride, head_stride;  // in elements
  int32_t is_bf16, heads;

  void read(int64_t t, int h, int n, float* out) const {
    const int64_t at = t * token_stride + h * head_stride;
    if (!is_bf16) { std::memcpy(out, (const float*)data + at, n * sizeof(float)); return; }
    const uint16_t* x = (const uint16_t*)data + at;
    for (int i = 0; i < n; i++) out[i] = bits<float>((uint32_t)x[i] << 16);
  }
};

struct Batch {
  const int32_t *query_start, *kv_tokens, *page_table;
  int64_t table_stride, sequences;
};

struct Spec {
  float scale, softcap;  // softcap 0: none
  int64_t window;        // 0: none
};

namespace {

inline uint16_t bf16_of(float x) {
  const uint32_t u = bits<uint32_t>(x);
  return x != x ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// x R of transform.py: a fast Walsh-Hadamard transform per block of the largest power of two that divides n.
template <int H> inline F butterfly(F x) {
  F sign;
  for (int i = 0; i < LANES; i++) sign[i] = i & H ? -1.0f : 1.0f;
  return x * sign + SWAP_LANES(x, H);
}

void rotate(float* x, int n) {
  const int size = n & -n;
  const float norm = 1.0f / std::sqrt((float)size);
  for (int i = 0; i < n; i += LANES) {
    const F v = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(load<F>(x + i)))));
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

// ---- write: codec.py's encode, one token and head at a time ----------------------------------------------

constexpr float MIN_SCALE = 1.0f / 16384, MAX_SCALE = 65504.0f, FP8_MAX = 448.0f;

inline float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
inline float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }  // for |x| < 2^22

// fp16 bits of a number that is zero or within fp16's normal range, and back.
inline uint16_t half_of(float x) {
  const uint32_t u = bits<uint32_t>(x);
  return x == 0 ? 0 : (uint16_t)(((u + 0xfff + ((u >> 13) & 1)) >> 13) - (112 << 10));
}
inline float half_value(uint16_t h) { return bits<float>((uint32_t)h << 13) * 0x1p112f; }

inline uint8_t fp8_of(float x) {  // e4m3, |x| <= 448
  const uint32_t u = bits<uint32_t>(x), sign = (u >> 24) & 0x80, a = u & 0x7fffffff;
  if (a < bits<uint32_t>(0x1p-6f)) return (uint8_t)(sign | (uint32_t)round_even(std::fabs(x) * 512.0f));
  return (uint8_t)(sign | (((a + 0x7ffff + ((a >> 20) & 1)) >> 20) - (120 << 3)));
}

// Codes 0..255 of one group of n numbers, one a byte; its scale goes to `entry`.
void quantize(const Side& side, const float* x, int n, uint8_t* code, uint8_t* entry) {
  float scale = 1, zero = 8, low = 0, high = 0;
  for (int i = 0; i < n; i++) { low = std::min(low, x[i]); high = std::max(high, x[i]); }
  if (side.groups) {
    const float top = side.codes == FP8 ? FP8_MAX : 127;
    const float wide = side.codes == INT4 ? (high - low) / 15 : std::max(-low, high) / top;
    const uint16_t stored = half_of(clamp(wide, MIN_SCALE, MAX_SCALE));
    scale = half_value(stored);
    store(entry, stored);
    if (side.codes == INT4) {
      zero = round_even(clamp(-low / scale, 0, 15));
      store(entry + 2, half_of(zero));
    }
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

// One token's numbers into its cell; x is overwritten.
void write_side(const Cache& c, const Side& side, float* x, int head, uint8_t* cell, int at) {
  const int D = c.head_dim, P = c.page_tokens, row_bytes = D * side.bits_each() / 8;
  const float* shift = side.shift_HD ? side.shift_HD + head * D : nullptr;
  const float* scale = side.scale_HD ? side.scale_HD + head * D : nullptr;
  if (shift) for (int i = 0; i < D; i++) x[i] -= shift[i];
  if (scale) for (int i = 0; i < D; i++) x[i] /= scale[i];
  if (side.rotate) rotate(x, D);
  uint8_t* codes = cell + side.codes_at;
  if (side.codes == FP32) { std::memcpy(codes + at * row_bytes, x, row_bytes); return; }
  if (side.codes == BF16) {
    uint16_t* row = (uint16_t*)(codes + at * row_bytes);
    for (int i = 0; i < D; i++) row[i] = bf16_of(x[i]);
    return;
  }
  for (int i = 0; i < D; i++) x[i] = x[i] != x[i] ? 0 : clamp(x[i], -3.4028235e38f, 3.4028235e38f);
  const int groups = std::max(1, side.groups), n = D / groups, entry_bytes = side.codes == INT4 ? 4 : 2;
  uint8_t code[1024];
  for (int g = 0; g < groups; g++)
    quantize(side, x + g * n, n, code + g * n, cell + side.scales_at + (g * P + at) * entry_bytes);
  if (side.codes == INT4) for (int i = 0; i < D / 2; i++) code[i] |= code[i + D / 2] << 4;
  if (!side.transposed) std::memcpy(codes + at * row_bytes, code, row_bytes);
  else for (int i = 0; i < row_bytes; i++) codes[i * P + at] = code[i];
}

// ---- read: one side of one cell to fp32 -------------------------------------------------------------------

// Scales and zeros of a cell as floats [groups][P]; without scales, what makes the dequantization exact.
void read_scales(const Side& side, const uint8_t* cell, int P, float* scale, float* zero) {
  const uint8_t* at = cell + side.scales_at;
  for (int i = 0; i < std::max(1, side.groups) * P; i += LANES) {
    F s = splat(1), z = splat(8);
    if (side.groups && side.codes == INT4) {
      const U u = load<U>(at + 4 * i);
      s = (F)((u & 0x7fff) << 13) * 0x1p112f;
      z = (F)((u >> 16 & 0x7fff) << 13) * 0x1p112f;
    } else if (side.groups) {
      s = (F)((__builtin_convertvector(load<U16>(at + 2 * i), U) & 0x7fff) << 13) * 0x1p112f;
    }
    store(scale + i, s);
    store(zero + i, z);
  }
}

// 16 rows of 16 bytes: word j of every row in w[j], rows in lane order.
inline void gather_words(const uint8_t* p, int64_t stride, U w[4]) {
  typedef uint32_t U8 __attribute__((vector_size(32)));
  U r[4];
  for (int i = 0; i < 4; i++) {
    const U8 low = __builtin_shufflevector(load<U4>(p + i * stride), load<U4>(p + (i + 4) * stride), 0, 1, 2, 3, 4, 5, 6, 7);
    const U8 high = __builtin_shufflevector(load<U4>(p + (i + 8) * stride), load<U4>(p + (i + 12) * stride), 0, 1, 2, 3, 4, 5, 6, 7);
    r[i] = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
#define LOW32(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define HIGH32(a, b) __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define LOW64(a, b) __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define HIGH64(a, b) __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
  const U a = LOW32(r[0], r[1]), b = LOW32(r[2], r[3]), c = HIGH32(r[0], r[1]), d = HIGH32(r[2], r[3]);
  w[0] = LOW64(a, b);
  w[1] = HIGH64(a, b);
  w[2] = LOW64(c, d);
  w[3] = HIGH64(c, d);
}

// fp32 numbers 16 lanes wide out of such words: emit(element of the row, numbers); int4's high nibbles go to `high`.
template <Codes C, class Emit, class High> inline void unpack(const U w[4], Emit emit, High high) {
  for (int j = 0; j < 4; j++) {
    if constexpr (C == FP32) emit(j, (F)w[j]);
    if constexpr (C == BF16) { emit(2 * j, (F)(w[j] << 16)); emit(2 * j + 1, (F)(w[j] & 0xffff0000u)); }
    if constexpr (C == FP32 || C == BF16) continue;
    for (int i = 0; i < 4; i++) {
      if constexpr (C == INT8) emit(4 * j + i, __builtin_convertvector((I)((w[j] ^ 0x80808080u) << (24 - 8 * i)) >> 24, F));
      if constexpr (C == FP8) {
        const U u = w[j] >> (8 * i);
        emit(4 * j + i, (F)((u & 0x7f) << 20 | (u & 0x80) << 24) * 0x1p120f);
      }
      if constexpr (C == INT4) {
        emit(4 * j + i, to_float(w[j] >> (8 * i) & 15));
        high(4 * j + i, to_float(w[j] >> (8 * i + 4) & 15));
      }
    }
  }
}

// The number at element d of token t, any format and grouping: slow, for shapes the vector path does not fit.
float read_one(const Cache& c, const Side& side, const uint8_t* codes, const float* scale, const float* zero, int d, int t) {
  const int D = c.head_dim, P = c.page_tokens, j = side.codes == INT4 ? d % (D / 2) : d;
  const int row = D * side.bits_each() / 8, group = d / (D / std::max(1, side.groups));
  const uint8_t u = codes[side.transposed ? j * P + t : t * row + j];
  const float s = scale[group * P + t];
  if (side.codes == INT8) return (float)((int)u - 128) * s;
  if (side.codes == INT4) return ((float)(d < D / 2 ? u & 15 : u >> 4) - zero[group * P + t]) * s;
  return bits<float>((uint32_t)(u & 0x7f) << 20 | (uint32_t)(u & 0x80) << 24) * 0x1p120f * s;
}

// Whether every 16 channels share a scale and codes come in whole vectors.
bool vectors_fit(const Cache& c, const Side& side) {
  const int group = c.head_dim / std::max(1, side.groups);
  return (side.groups <= 1 || group % LANES == 0) && (side.codes != INT4 || c.head_dim % (2 * LANES) == 0);
}

// K of a cell as [D][P].
template <Codes C> void read_k(const Cache& c, const uint8_t* cell, const float* scale, const float* zero, float* out) {
  const int D = c.head_dim, P = c.page_tokens, row = D * c.k.bits_each() / 8;
  constexpr int each = C == FP32 ? 4 : C == BF16 ? 8 : 16;  // elements in 16 bytes
  const int group = D / std::max(1, c.k.groups);
  const uint8_t* codes = cell + c.k.codes_at;
  for (int t = 0; t < P; t += LANES)
    for (int b = 0; b < row / 16; b++) {
      U w[4];
      gather_words(codes + t * row + 16 * b, row, w);
      const int d = b * each, other = d + D / 2, at = d / group * P + t, other_at = other / group * P + t;
      const F s = load<F>(scale + at), z = load<F>(zero + at);
      if constexpr (C == FP32 || C == BF16) {
        unpack<C>(w, [&](int i, F x) { store(out + (d + i) * P + t, x); }, 0);
      } else if constexpr (C == INT4) {
        const F s2 = load<F>(scale + other_at), z2 = load<F>(zero + other_at);
        unpack<C>(w, [&](int i, F x) { store(out + (d + i) * P + t, (x - z) * s); },
                  [&](int i, F x) { store(out + (other + i) * P + t, (x - z2) * s2); });
      } else {
        unpack<C>(w, [&](int i, F x) { store(out + (d + i) * P + t, x * s); }, 0);
      }
    }
}

// V of a cell as [tokens][D]; tokens past the last may be garbage.
template <Codes C> void read_v(const Cache& c, const uint8_t* cell, const float* scale, const float* zero, int tokens, float* out) {
  const int D = c.head_dim, P = c.page_tokens;
  const uint8_t* codes = cell + c.v.codes_at;
  if constexpr (C == FP32) { std::memcpy(out, codes, sizeof(float) * D * tokens); return; }
  if constexpr (C == BF16) {
    for (int i = 0; i < D * tokens; i += LANES)
      store(out + i, (F)(__builtin_convertvector(load<U16>(codes + 2 * i), U) << 16));
    return;
  }
  const int group = D / std::max(1, c.v.groups), rows = C == INT4 ? D / 2 : D;
  for (int d = 0; d < rows; d += LANES) {
    const int other = d + D / 2;
    const float *s = scale + d / group * P, *z = zero + d / group * P;
    const float *s2 = scale + other / group * P, *z2 = zero + other / group * P;
    for (int t = 0; t < tokens; t += 16) {
      U w[4];
      gather_words(codes + d * P + t, P, w);
      if constexpr (C == INT4)
        unpack<C>(w, [&](int i, F x) { store(out + (t + i) * D + d, (x - z[t + i]) * s[t + i]); },
                  [&](int i, F x) { store(out + (t + i) * D + other, (x - z2[t + i]) * s2[t + i]); });
      else
        unpack<C>(w, [&](int i, F x) { store(out + (t + i) * D + d, x * s[t + i]); }, 0);
    }
  }
}

// A whole cell's K as [D][P] and V as [tokens][D], for the formats that the vector path does not fit.
void read_slowly(const Cache& c, const Side& side, const uint8_t* cell, const float* scale, const float* zero, bool k, float* out) {
  for (int d = 0; d < c.head_dim; d++)
    for (int t = 0; t < c.page_tokens; t++)
      out[k ? d * c.page_tokens + t : t * c.head_dim + d] = read_one(c, side, cell + side.codes_at, scale, zero, d, t);
}

// ---- attend -----------------------------------------------------------------------------------------------

// C[r] = alpha[r] * C[r] + sum over k < n, in order, of A[r][k] * B[k], for R rows and N vectors of results.
template <int R, int N>
void product(const float* A, int lda, const float* B, int ldb, int n, const float* alpha, float* C, int ldc, const uint8_t* ahead, int step) {
  F sum[R][N];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < N; v++) sum[r][v] = alpha ? load<F>(C + r * ldc + v * LANES) * alpha[r] : F{};
  for (int k = 0; k < n; k++) {
    __builtin_prefetch(ahead + (int64_t)k * step);
    __builtin_prefetch(ahead + (int64_t)k * step + step / 2);
    F b[N];
    for (int v = 0; v < N; v++) b[v] = load<F>(B + k * ldb + v * LANES);
    for (int r = 0; r < R; r++)
      for (int v = 0; v < N; v++) sum[r][v] += A[r * lda + k] * b[v];
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < N; v++) store(C + r * ldc + v * LANES, sum[r][v]);
}

template <int R>
void product_rows(const float* A, int lda, const float* B, int ldb, int n, const float* alpha, float* C, int ldc, int columns, const uint8_t* ahead, int step) {
  int at = 0;
  for (; at + WIDE * LANES <= columns; at += WIDE * LANES) product<R, WIDE>(A, lda, B + at, ldb, n, alpha, C + at, ldc, ahead, step);
  for (; at < columns; at += LANES) product<R, 1>(A, lda, B + at, ldb, n, alpha, C + at, ldc, ahead, step);
}

void product_all(const float* A, int lda, const float* B, int ldb, int n, const float* alpha, float* C, int ldc, int rows, int columns, const uint8_t* ahead, int step) {
  for (int r = 0; r < rows; r += 4) {
    const float* scales = alpha ? alpha + r : nullptr;
    switch (std::min(4, rows - r)) {
      case 4: product_rows<4>(A + r * lda, lda, B, ldb, n, scales, C + r * ldc, ldc, columns, ahead, step); break;
      case 3: product_rows<3>(A + r * lda, lda, B, ldb, n, scales, C + r * ldc, ldc, columns, ahead, step); break;
      case 2: product_rows<2>(A + r * lda, lda, B, ldb, n, scales, C + r * ldc, ldc, columns, ahead, step); break;
      case 1: product_rows<1>(A + r * lda, lda, B, ldb, n, scales, C + r * ldc, ldc, columns, ahead, step); break;
    }
  }
}

// Rows (query token, query head of the group) of one sequence and kv head that are attended together.
struct Tile {
  int sequence, head, tokens;  // query tokens
  int64_t token;               // the first, in the step
  int64_t position;            // of the first, in the sequence
  int first_chunk, chunks;     // of CHUNK_TOKENS, that any row sees
};

// An unfinished softmax over some of the keys, per row: maximum logit (in powers of 2), sum, weighted values.
struct Partial {
  float *max, *sum, *out;  // [rows], [rows], [rows][D]

  Partial(float* memory, int rows) : max(memory), sum(memory + rows), out(memory + 2 * rows) {}
  static size_t size(int rows, int D) { return (size_t)rows * (D + 2); }
  void clear(int rows, int D) {
    std::fill_n(max, rows, NEVER);
    std::fill_n(sum, rows, 0.0f);
    std::fill_n(out, rows * D, 0.0f);
  }
};

void merge(Partial& into, const Partial& next, int rows, int D) {
  for (int r = 0; r < rows; r++) {
    const float top = std::max(into.max[r], next.max[r]), base = top == NEVER ? 0 : top;
    const float a = exp2_of(into.max[r] - base), b = exp2_of(next.max[r] - base);
    into.max[r] = top;
    into.sum[r] = into.sum[r] * a + next.sum[r] * b;
    for (int i = r * D; i < (r + 1) * D; i += LANES) {
      const F scaled = load<F>(into.out + i) * a;
      store(into.out + i, scaled + load<F>(next.out + i) * b);
    }
  }
}

struct Attention {
  const Cache& c;
  const Rows& q;
  const Batch& batch;
  const Spec& spec;
  void* out;
  int G;
  bool k_fits, v_fits;

  int tile_rows() const { return std::max(1, TILE_ROWS / G) * G; }
  std::vector<Tile> tiles() const;
  void chunk(const Tile& tile, int number, float* scratch, Partial& part) const;
  void finish(const Tile& tile, Partial& all, float* row) const;
  size_t scratch_size() const {
    const int rows = tile_rows(), D = c.head_dim, P = c.page_tokens;
    return (size_t)rows * (D + P + 1) + 2 * D * P + 2 * P * std::max({1, c.k.groups, c.v.groups});
  }

 private:
  void read_queries(const Tile& tile, float* q_RD) const;
  void keys(const uint8_t* cell, float* scales, float* k_DP) const;
  void values(const uint8_t* cell, float* scales, int tokens, float* v_PD) const;
  void softmax(const Tile& tile, int64_t page_start, float* s_RP, float* alpha, Partial& part) const;
};

std::vector<Tile> Attention::tiles() const {
  std::vector<Tile> tiles;
  const int most = std::max(1, TILE_ROWS / G);
  for (int s = 0; s < batch.sequences; s++)
    for (int h = 0; h < c.heads; h++) {
      const int64_t start = batch.query_start[s], n = batch.query_start[s + 1] - start;
      for (int64_t i = 0; i < n; i += most) {
        const int tokens = (int)std::min<int64_t>(most, n - i);
        const int64_t position = batch.kv_tokens[s] - n + i;
        const int64_t oldest = spec.window ? std::max<int64_t>(0, position - spec.window + 1) : 0;
        const int first = (int)(oldest / CHUNK_TOKENS), last = (int)((position + tokens - 1) / CHUNK_TOKENS);
        tiles.push_back({s, h, tokens, start + i, position, first, last - first + 1});
      }
    }
  return tiles;
}

// Queries as stored keys want them, times the softmax scale, so that logits come out as powers of 2.
void Attention::read_queries(const Tile& tile, float* q_RD) const {
  const int D = c.head_dim;
  const float scale = spec.softcap ? spec.scale : spec.scale * LOG2E;
  for (int r = 0; r < tile.tokens * G; r++) {
    float* row = q_RD + r * D;
    q.read(tile.token + r / G, tile.head * G + r % G, D, row);
    if (c.k.scale_HD) for (int i = 0; i < D; i++) row[i] *= c.k.scale_HD[tile.head * D + i];
    if (c.k.rotate) rotate(row, D);
    for (int i = 0; i < D; i++) row[i] *= scale;
  }
}

void Attention::keys(const uint8_t* cell, float* scales, float* k_DP) const {
  float* zeros = scales + std::max(1, c.k.groups) * c.page_tokens;
  read_scales(c.k, cell, c.page_tokens, scales, zeros);
  if (!k_fits) return read_slowly(c, c.k, cell, scales, zeros, true, k_DP);
  switch (c.k.codes) {
    case FP32: return read_k<FP32>(c, cell, scales, zeros, k_DP);
    case BF16: return read_k<BF16>(c, cell, scales, zeros, k_DP);
    case FP8: return read_k<FP8>(c, cell, scales, zeros, k_DP);
    case INT8: return read_k<INT8>(c, cell, scales, zeros, k_DP);
    case INT4: return read_k<INT4>(c, cell, scales, zeros, k_DP);
  }
}

void Attention::values(const uint8_t* cell, float* scales, int tokens, float* v_PD) const {
  float* zeros = scales + std::max(1, c.v.groups) * c.page_tokens;
  read_scales(c.v, cell, c.page_tokens, scales, zeros);
  if (!v_fits) return read_slowly(c, c.v, cell, scales, zeros, false, v_PD);
  switch (c.v.codes) {
    case FP32: return read_v<FP32>(c, cell, scales, zeros, tokens, v_PD);
    case BF16: return read_v<BF16>(c, cell, scales, zeros, tokens, v_PD);
    case FP8: return read_v<FP8>(c, cell, scales, zeros, tokens, v_PD);
    case INT8: return read_v<INT8>(c, cell, scales, zeros, tokens, v_PD);
    case INT4: return read_v<INT4>(c, cell, scales, zeros, tokens, v_PD);
  }
}

// Logits of one page to probabilities under the maximum so far; alpha[r] brings older sums under it. A row
// that sees nothing of the page is left as it is: alpha 1, probabilities 0.
void Attention::softmax(const Tile& tile, int64_t page_start, float* s_RP, float* alpha, Partial& part) const {
  const int P = c.page_tokens;
  const F lane = lane_numbers();
  for (int r = 0; r < tile.tokens * G; r++) {
    float* s = s_RP + r * P;
    const int64_t position = tile.position + r / G - page_start;  // of the query, from the page's first token
    const float last = (float)std::min<int64_t>(position, P);
    const float first = spec.window ? (float)std::max<int64_t>(position - spec.window + 1, 0) : 0.0f;
    F top = splat(NEVER);
    for (int t = 0; t < P; t += LANES) {
      F x = load<F>(s + t);
      if (spec.softcap) x = softcap(x, spec.softcap) * LOG2E;
      const F token = lane + (float)t;
      x = token <= last ? x : splat(NEVER);
      x = token >= first ? x : splat(NEVER);
      top = max(x, top);
      store(s + t, x);
    }
    const float highest = std::max(part.max[r], lane_max(top)), base = highest == NEVER ? 0 : highest;
    F sum{};
    for (int t = 0; t < P; t += LANES) {
      const F p = exp2(load<F>(s + t) - base);
      sum += p;
      store(s + t, p);
    }
    alpha[r] = part.max[r] == highest ? 1.0f : exp2_of(part.max[r] - base);
    part.max[r] = highest;
    part.sum[r] = part.sum[r] * alpha[r] + lane_sum(sum);
  }
}

// The tile's rows over the pages of one chunk of the sequence.
void Attention::chunk(const Tile& tile, int number, float* scratch, Partial& part) const {
  const int D = c.head_dim, P = c.page_tokens, rows = tile.tokens * G;
  const int64_t newest = tile.position + tile.tokens - 1;
  const int64_t oldest = spec.window ? std::max<int64_t>(0, tile.position - spec.window + 1) : 0;
  const int64_t begin = std::max<int64_t>((int64_t)number * CHUNK_TOKENS, oldest) / P;
  const int64_t end = std::min<int64_t>((int64_t)(number + 1) * CHUNK_TOKENS - 1, newest) / P + 1;
  float *q_RD = scratch, *s_RP = q_RD + rows * D, *alpha = s_RP + rows * P;
  float *k_DP = alpha + rows, *v_PD = k_DP + D * P, *scales = v_PD + D * P;
  read_queries(tile, q_RD);
  part.clear(rows, D);
  for (int64_t page = begin; page < end; page++) {
    const int tokens = (int)std::min<int64_t>(P, newest + 1 - page * P);
    const uint8_t* next = c.cell(batch.page_table[tile.sequence * batch.table_stride + std::min(page + 1, end - 1)], tile.head);
    const uint8_t* cell = c.cell(batch.page_table[tile.sequence * batch.table_stride + page], tile.head);
    keys(cell, scales, k_DP);
    product_all(q_RD, D, k_DP, P, D, nullptr, s_RP, P, rows, P, next + c.k.codes_at, P * c.k.bits_each() / 8);
    softmax(tile, page * P, s_RP, alpha, part);
    values(cell, scales, tokens, v_PD);
    product_all(s_RP, P, v_PD, D, tokens, alpha, part.out, D, rows, D, next + c.v.codes_at, D * c.v.bits_each() / 8);
  }
}

// Divide, undo V's static transform and hand over in the queries' type.
void Attention::finish(const Tile& tile, Partial& all, float* row) const {
  const int D = c.head_dim, heads = c.heads * G;
  for (int r = 0; r < tile.tokens * G; r++) {
    for (int i = 0; i < D; i++) row[i] = all.out[r * D + i] / all.sum[r];
    if (c.v.rotate) rotate(row, D);
    if (c.v.scale_HD) for (int i = 0; i < D; i++) row[i] *= c.v.scale_HD[tile.head * D + i];
    if (c.v.shift_HD) for (int i = 0; i < D; i++) row[i] += c.v.shift_HD[tile.head * D + i];
    const int64_t at = ((tile.token + r / G) * heads + tile.head * G + r % G) * D;
    if (!q.is_bf16) std::memcpy((float*)out + at, row, D * sizeof(float));
    else for (int i = 0; i < D; i++) ((uint16_t*)out)[at + i] = bf16_of(row[i]);
  }
}

bool pages_exist(const Cache& c, const Batch& batch) {
  for (int64_t s = 0; s < batch.sequences; s++)
    for (int64_t i = 0; i < (batch.kv_tokens[s] + c.page_tokens - 1) / c.page_tokens; i++) {
      const int64_t page = batch.page_table[s * batch.table_stride + i];
      if (page < 0 || page >= c.pages) return false;
    }
  return true;
}

}  // namespace

// ---- what cpu.py calls; false: a slot or page lies outside the pool and nothing was done --------------------

extern "C" bool quire_write(const Cache* cache, const Rows* k, const Rows* v, const int64_t* slots, int64_t tokens, int threads) {
  const Cache& c = *cache;
  for (int64_t t = 0; t < tokens; t++)
    if (slots[t] >= c.pages * c.page_tokens) return false;
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * c.heads >= 64)
  for (int64_t t = 0; t < tokens; t++) {
    if (slots[t] < 0) continue;
    float x[1024];
    for (int h = 0; h < c.heads; h++) {
      uint8_t* cell = c.cell(slots[t] / c.page_tokens, h);
      k->read(t, h, c.head_dim, x);
      write_side(c, c.k, x, h, cell, (int)(slots[t] % c.page_tokens));
      v->read(t, h, c.head_dim, x);
      write_side(c, c.v, x, h, cell, (int)(slots[t] % c.page_tokens));
    }
  }
  return true;
}

extern "C" bool quire_attend(const Cache* cache, const Rows* q, void* out, const Batch* batch, const Spec* spec, int threads) {
  const Cache& c = *cache;
  if (!pages_exist(c, *batch)) return false;
  const Attention attention{c, *q, *batch, *spec, out, q->heads / c.heads, vectors_fit(c, c.k), vectors_fit(c, c.v)};
  const std::vector<Tile> tiles = attention.tiles();
  std::vector<int64_t> starts{0};  // of each tile's chunks, were every chunk a task
  for (const Tile& tile : tiles) starts.push_back(starts.back() + tile.chunks);
  const int rows = attention.tile_rows(), D = c.head_dim;
  const size_t part_size = Partial::size(rows, D);
  const bool split = tiles.size() < (size_t)(2 * threads);  // too few to keep the threads busy
  const int64_t tasks = split ? starts.back() : (int64_t)tiles.size();
  std::unique_ptr<float[]> parts(new float[split ? tasks * part_size : 0]);
#pragma omp parallel num_threads(threads)
  {
    std::unique_ptr<float[]> memory(new float[attention.scratch_size() + 2 * part_size]);
    float* scratch = memory.get() + 2 * part_size;
    const auto merged = [&](size_t i, bool ready) {
      const Tile& tile = tiles[i];
      const int n = tile.tokens * attention.G;
      Partial all(memory.get(), n);
      all.clear(n, D);
      for (int j = 0; j < tile.chunks; j++) {
        Partial part(ready ? parts.get() + (starts[i] + j) * part_size : memory.get() + part_size, n);
        if (!ready) attention.chunk(tile, tile.first_chunk + j, scratch, part);
        merge(all, part, n, D);
      }
      attention.finish(tile, all, scratch);
    };
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < tasks; i++) {
      if (!split) { merged(i, false); continue; }
      const size_t tile = std::upper_bound(starts.begin(), starts.end(), i) - starts.begin() - 1;
      Partial part(parts.get() + i * part_size, tiles[tile].tokens * attention.G);
      attention.chunk(tiles[tile], tiles[tile].first_chunk + (int)(i - starts[tile]), scratch, part);
    }
    if (split) {
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < (int64_t)tiles.size(); i++) merged(i, true);
    }
  }
  return true;
}
