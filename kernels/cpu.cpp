// The operations on pages of `cpu.py`: write a step's K and V, attend over pages. Any format on each side.
//
// One arithmetic for every batch: a query row meets the pages of its sequence in order, sums run over d or
// over tokens in order with one lane per result, and partial softmaxes are merged at fixed token positions.
// Rows and threads share loads and nothing else, so a row's bits do not depend on the rows around it, on the
// number of threads, or on whether it is decoded or part of a prefill chunk.
//
// Legend: T tokens of the step, R rows of a tile, D head_dim, P page_tokens, G query heads per kv head.

#include <memory>
#include <vector>

#include "cpu_cells.h"
#include "cpu_pages.h"

// ---- what cpu.py passes: keep in step with its ctypes structures ----------------------------------------

struct Rows {  // [T, heads, D], the last axis dense
  const void* data;
  int64_t token_stride, head_stride;  // in elements
  int64_t tokens;
  int32_t heads, is_bf16;

  void read(int64_t t, int h, int n, float* out) const {
    const int64_t at = t * token_stride + h * head_stride;
    if (!is_bf16) { std::memcpy(out, (const float*)data + at, n * sizeof(float)); return; }
    for (int i = 0; i < n; i += LANES)
      store(out + i, widen(load<U16>((const uint16_t*)data + at + i)) << 16);
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

#if defined(__AVX512F__) || defined(__ARM_NEON)  // 32 registers
constexpr int WIDE = 4;  // vectors of results kept in registers for each of 4 rows
#else
constexpr int WIDE = 2;
#endif
constexpr int TILE_ROWS = 64;       // query rows that share one decoded page
constexpr int CHUNK_TOKENS = 1024;  // partial softmaxes are merged at multiples of this
constexpr float LOG2E = 1.44269504f, NOTHING = -INFINITY;

// ---- products -------------------------------------------------------------------------------------------

// out[r] = alpha[r] * out[r] + the sum over k < n, in order, of a[r][k] * b[k]. On the way, bytes that the
// next page needs are prefetched evenly: a burst of prefetches would wait as long as the reads it replaces.
struct Product {
  const float* a; int a_stride;
  const float* b; int b_stride;
  int n;
  const float* alpha;  // null: start from zero
  float* out; int out_stride;
  const uint8_t* ahead; int ahead_step;  // bytes of the next page per k

  void run(int rows, int columns) const {
    int r = 0;
    for (; r + 4 <= rows; r += 4) across<4>(r, columns);
    if (rows - r == 3) across<3>(r, columns);
    if (rows - r == 2) across<2>(r, columns);
    if (rows - r == 1) across<1>(r, columns);
  }

 private:
  template <int ROWS> void across(int r, int columns) const {
    int column = 0;
    for (; column + WIDE * LANES <= columns; column += WIDE * LANES) block<ROWS, WIDE>(r, column);
    for (; column < columns; column += LANES) block<ROWS, 1>(r, column);
  }

  template <int ROWS, int VECTORS> void block(int r0, int column) const {
    const bool first = r0 == 0 && column == 0;
    const uint8_t* next = first ? ahead : (const uint8_t*)b;
    const int64_t step = first ? ahead_step : 0;
    const float* left = a + (int64_t)r0 * a_stride;
    F sum[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECTORS; v++)
        sum[r][v] = alpha ? load<F>(out_at(r0 + r, column, v)) * alpha[r0 + r] : F{};
    for (int k = 0; k < n; k++) {
      __builtin_prefetch(next + k * step);
      __builtin_prefetch(next + k * step + step / 2);
      F right[VECTORS];
      for (int v = 0; v < VECTORS; v++) right[v] = load<F>(b + (int64_t)k * b_stride + column + v * LANES);
      for (int r = 0; r < ROWS; r++) {
        const F x = splat(left[r * a_stride + k]);
        for (int v = 0; v < VECTORS; v++) sum[r][v] = fma(x, right[v], sum[r][v]);
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECTORS; v++) store(out_at(r0 + r, column, v), sum[r][v]);
  }

  float* out_at(int r, int column, int v) const { return out + (int64_t)r * out_stride + column + v * LANES; }
};

// ---- attention ------------------------------------------------------------------------------------------

// Query rows (token, head of the group) of one sequence and kv head that are attended together.
struct Tile {
  int64_t sequence;
  int head, tokens;
  int64_t token;     // the first query token, counted in the step
  int64_t position;  // of it in the sequence
  int64_t oldest;    // position of the first key that any row sees

  int64_t newest() const { return position + tokens - 1; }
  int64_t first_chunk() const { return oldest / CHUNK_TOKENS; }
  int64_t chunks() const { return newest() / CHUNK_TOKENS - first_chunk() + 1; }
};

// An unfinished softmax over some of the keys, per row: greatest logit (of base 2), sum, sum of values.
struct Partial {
  float *max_R, *sum_R, *out_RD;

  Partial(float* memory, int rows) : max_R(memory), sum_R(memory + rows), out_RD(memory + 2 * rows) {}
  static int64_t size(int rows, int D) { return (int64_t)rows * (D + 2); }

  void clear(int rows, int D) const {
    std::fill_n(max_R, rows, NOTHING);
    std::fill_n(sum_R, rows, 0.0f);
    std::fill_n(out_RD, rows * D, 0.0f);
  }

  void merge(const Partial& later, int rows, int D) const {
    for (int r = 0; r < rows; r++) {
      const float top = std::max(max_R[r], later.max_R[r]), base = top == NOTHING ? 0 : top;
      const float ours = exp2(max_R[r] - base), theirs = exp2(later.max_R[r] - base);
      max_R[r] = top;
      sum_R[r] = sum_R[r] * ours + later.sum_R[r] * theirs;
      for (int i = r * D; i < (r + 1) * D; i += LANES)
        store(out_RD + i, load<F>(out_RD + i) * ours + load<F>(later.out_RD + i) * theirs);
    }
  }
};

class Attention {
 public:
  Attention(const Cache& c, const Rows& q, const Batch& batch, const Spec& spec, void* out)
      : G(q.heads / c.heads), most_tokens(std::max(1, TILE_ROWS / G)), c(c), q(q), batch(batch), spec(spec),
        out(out), k(c, c.k), v(c, c.v), D(c.head_dim), P(c.page_tokens) {}

  const int G, most_tokens;  // query tokens of a tile

  int64_t scratch_size() const {
    return (int64_t)most_tokens * G * (D + P + 1) + 2 * D * P + std::max(k.scratch_size(), v.scratch_size());
  }

  std::vector<Tile> tiles() const {
    std::vector<Tile> tiles;
    for (int64_t s = 0; s < batch.sequences; s++)
      for (int h = 0; h < c.heads; h++) {
        const int64_t start = batch.query_start[s], n = batch.query_start[s + 1] - start;
        for (int64_t i = 0; i < n; i += most_tokens) {
          const int64_t position = batch.kv_tokens[s] - n + i;
          const int64_t oldest = spec.window ? std::max<int64_t>(0, position - spec.window + 1) : 0;
          tiles.push_back({s, h, (int)std::min<int64_t>(most_tokens, n - i), start + i, position, oldest});
        }
      }
    return tiles;
  }

  // The tile's rows over the keys of one chunk of the sequence.
  void chunk(const Tile& tile, int64_t number, float* scratch, const Partial& part) const {
    const int rows = tile.tokens * G;
    const int64_t begin = std::max(number * CHUNK_TOKENS, tile.oldest) / P;
    const int64_t end = std::min((number + 1) * CHUNK_TOKENS - 1, tile.newest()) / P + 1;
    float *q_RD = scratch, *s_RP = q_RD + rows * D, *alpha_R = s_RP + rows * P;
    float *k_DP = alpha_R + rows, *v_PD = k_DP + D * P, *scales = v_PD + D * P;
    read_queries(tile, q_RD);
    part.clear(rows, D);
    for (int64_t page = begin; page < end; page++) {
      const int tokens = (int)std::min<int64_t>(P, tile.newest() + 1 - page * P);
      const uint8_t *cell = cell_of(tile, page), *next = cell_of(tile, std::min(page + 1, end - 1));
      k.keys(cell, scales, k_DP);
      Product{q_RD, D, k_DP, P, D, nullptr, s_RP, P, next + c.k.codes_at, P * c.k.bits_each() / 8}
          .run(rows, P);
      softmax(tile, page * P, s_RP, alpha_R, part);
      v.values(cell, tokens, scales, v_PD);
      Product{s_RP, P, v_PD, D, tokens, alpha_R, part.out_RD, D, next + c.v.codes_at, D * c.v.bits_each() / 8}
          .run(rows, D);
    }
  }

  // Divide, undo V's static transform, hand over in the queries' type.
  void finish(const Tile& tile, const Partial& all, float* row_D) const {
    for (int r = 0; r < tile.tokens * G; r++) {
      for (int i = 0; i < D; i++) row_D[i] = all.out_RD[r * D + i] / all.sum_R[r];
      if (c.v.rotate) rotate(row_D, D);
      if (c.v.scale_HD) for (int i = 0; i < D; i++) row_D[i] *= c.v.scale_HD[tile.head * D + i];
      if (c.v.shift_HD) for (int i = 0; i < D; i++) row_D[i] += c.v.shift_HD[tile.head * D + i];
      const int64_t at = ((tile.token + r / G) * q.heads + tile.head * G + r % G) * D;
      if (!q.is_bf16) std::memcpy((float*)out + at, row_D, D * sizeof(float));
      else for (int i = 0; i < D; i++) ((uint16_t*)out)[at + i] = bf16_of(row_D[i]);
    }
  }

 private:
  const Cache& c;
  const Rows& q;
  const Batch& batch;
  const Spec& spec;
  void* const out;
  const Reader k, v;
  const int D, P;

  const uint8_t* cell_of(const Tile& tile, int64_t page) const {
    return c.cell(batch.page_table[tile.sequence * batch.table_stride + page], tile.head);
  }

  // Queries as stored keys want them, times the softmax scale, so that logits come out as powers of 2.
  void read_queries(const Tile& tile, float* q_RD) const {
    const float scale = spec.softcap ? spec.scale : spec.scale * LOG2E;
    for (int r = 0; r < tile.tokens * G; r++) {
      float* row = q_RD + r * D;
      q.read(tile.token + r / G, tile.head * G + r % G, D, row);
      if (c.k.scale_HD) for (int i = 0; i < D; i++) row[i] *= c.k.scale_HD[tile.head * D + i];
      if (c.k.rotate) rotate(row, D);
      for (int i = 0; i < D; i++) row[i] *= scale;
    }
  }

  // Logits of one page to probabilities under the greatest logit so far; alpha brings older sums under it.
  // A row that sees nothing of the page keeps what it has, to the bit: alpha 1, probabilities 0.
  void softmax(const Tile& tile, int64_t page_start, float* s_RP, float* alpha_R, const Partial& part) const {
    for (int r = 0; r < tile.tokens * G; r++) {
      float* s_P = s_RP + r * P;
      const int64_t position = tile.position + r / G - page_start;  // counted from the page's first token
      const int last = (int)std::min<int64_t>(position, P);
      const int64_t oldest = spec.window ? std::max<int64_t>(position - spec.window + 1, 0) : 0;
      const int first = (int)std::min<int64_t>(oldest, P);
      F top = splat(NOTHING);
      for (int t = 0; t < P; t += LANES) {
        F s = load<F>(s_P + t);
        if (spec.softcap) s = softcap(s, spec.softcap) * LOG2E;
        const I token = lane_numbers() + t;
        s = (token <= last) & (token >= first) ? s : splat(NOTHING);
        top = max(s, top);
        store(s_P + t, s);
      }
      const float greatest = std::max(part.max_R[r], lane_max(top));
      const float base = greatest == NOTHING ? 0 : greatest;
      F sum{};
      for (int t = 0; t < P; t += LANES) {
        const F p = exp2(load<F>(s_P + t) - base);
        sum += p;
        store(s_P + t, p);
      }
      alpha_R[r] = part.max_R[r] == greatest ? 1.0f : exp2(part.max_R[r] - base);
      part.max_R[r] = greatest;
      part.sum_R[r] = part.sum_R[r] * alpha_R[r] + lane_sum(sum);
    }
  }
};

// Whether all that the batch names exists: query rows, and pages for every key.
bool fits(const Batch& batch, const Cache& c, const Rows& q) {
  for (int64_t s = 0; s < batch.sequences; s++) {
    const int64_t start = batch.query_start[s], end = batch.query_start[s + 1];
    if (start < 0 || end > q.tokens || end - start > batch.kv_tokens[s]) return false;
    if (batch.kv_tokens[s] > batch.table_stride * c.page_tokens) return false;
    for (int64_t i = 0; i * c.page_tokens < batch.kv_tokens[s]; i++) {
      const int64_t page = batch.page_table[s * batch.table_stride + i];
      if (page < 0 || page >= c.pages) return false;
    }
  }
  return true;
}

}  // namespace

// ---- what cpu.py calls; false: something named does not exist, nothing was done -------------------------

extern "C" bool quire_write(const Cache* cache, const Rows* k, const Rows* v, const int64_t* slots,
                            int64_t tokens, int threads) {
  const Cache& c = *cache;
  for (int64_t t = 0; t < tokens; t++)
    if (slots[t] >= c.pages * c.page_tokens) return false;
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * c.heads >= 64)
  for (int64_t t = 0; t < tokens; t++) {
    if (slots[t] < 0) continue;
    const int at = (int)(slots[t] % c.page_tokens);
    for (int h = 0; h < c.heads; h++) {
      float x[1024];
      uint8_t* cell = c.cell(slots[t] / c.page_tokens, h);
      k->read(t, h, c.head_dim, x);
      write_token(c, c.k, x, h, cell, at);
      v->read(t, h, c.head_dim, x);
      write_token(c, c.v, x, h, cell, at);
    }
  }
  return true;
}

extern "C" bool quire_attend(const Cache* cache, const Rows* q, void* out, const Batch* batch,
                             const Spec* spec, int threads) {
  if (!fits(*batch, *cache, *q)) return false;
  const Attention attention(*cache, *q, *batch, *spec, out);
  const std::vector<Tile> tiles = attention.tiles();
  std::vector<int64_t> start{0};  // of each tile's chunks, counted over all tiles
  for (const Tile& tile : tiles) start.push_back(start.back() + tile.chunks());
  // Where tiles are too few to keep the threads busy, a task is a chunk. The arithmetic is the same.
  const bool by_chunk = tiles.size() < (size_t)2 * threads;
  const int64_t tasks = by_chunk ? start.back() : tiles.size(), D = cache->head_dim;
  const int64_t part_size = Partial::size(attention.most_tokens * attention.G, D);
  std::unique_ptr<float[]> parts(new float[by_chunk ? tasks * part_size : 0]);

#pragma omp parallel num_threads(threads)
  {
    std::unique_ptr<float[]> memory(new float[2 * part_size + attention.scratch_size()]);
    float* scratch = memory.get() + 2 * part_size;
    const auto attend_tile = [&](size_t i) {
      const Tile& tile = tiles[i];
      const int rows = tile.tokens * attention.G;
      const Partial all(memory.get(), rows);
      all.clear(rows, D);
      for (int64_t j = 0; j < tile.chunks(); j++) {
        float* own = memory.get() + part_size;
        const Partial part(by_chunk ? parts.get() + (start[i] + j) * part_size : own, rows);
        if (!by_chunk) attention.chunk(tile, tile.first_chunk() + j, scratch, part);
        all.merge(part, rows, D);
      }
      attention.finish(tile, all, scratch);
    };
    if (by_chunk) {
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < tasks; task++) {
        const size_t i = std::upper_bound(start.begin(), start.end(), task) - start.begin() - 1;
        const Partial part(parts.get() + task * part_size, tiles[i].tokens * attention.G);
        attention.chunk(tiles[i], tiles[i].first_chunk() + task - start[i], scratch, part);
      }
    }
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < tiles.size(); i++) attend_tile(i);
  }
  return true;
}
