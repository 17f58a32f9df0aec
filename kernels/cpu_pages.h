// Whole pages as bytes, for `pages.py`: copies and checksums, by the calling thread alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

// base**i of a checksum is a product of two tables: within a chunk of words, and before it.
struct ChecksumWeights {
  const uint64_t *within, *before;
  int64_t chunk_words;
};

static inline uint64_t sum_chunk(const uint32_t* words, int64_t count, const uint64_t* within) {
  uint64_t sum = 0;
  for (int64_t k = 0; k < count; k++) sum += ((uint64_t)words[k] + 1) * within[k];
  return sum;
}

// The lines of a chunk, two chunks before they are read: the hardware's own reading ahead ends with every 4 KB.
static inline void read_ahead(const void* bytes, int64_t chunk_bytes) {
  const char* ahead = (const char*)bytes + 2 * chunk_bytes;
  for (int64_t at = 0; at < chunk_bytes; at += 64) __builtin_prefetch(ahead + at);
}

// Between rows of `pool`, `stride` bytes apart, and the dense rows of `bytes`. A chunk is summed while it is in the
// cache; `sums`, if any, are added to, `sum_stride` apart.
extern "C" void quire_copy_pages(uint8_t* pool, int64_t stride, const int64_t* pages, int64_t count,
                                 int64_t row_bytes, uint8_t* bytes, bool scatter, const ChecksumWeights* weights,
                                 int64_t* sums, int64_t sum_stride) {
  const int64_t step = weights->chunk_words * (int64_t)sizeof(uint32_t);
  for (int64_t i = 0; i < count; i++) {
    uint8_t *page = pool + pages[i] * stride, *row = bytes + i * row_bytes;
    const uint8_t* from = scatter ? row : page;
    uint8_t* to = scatter ? page : row;
    if (!sums) {
      std::memcpy(to, from, row_bytes);
      continue;
    }
    uint64_t sum = 0;
    for (int64_t at = 0, c = 0; at < row_bytes; at += step, c++) {
      const int64_t n = std::min(step, row_bytes - at);
      read_ahead(from + at, step);
      std::memcpy(to + at, from + at, n);
      sum += sum_chunk((const uint32_t*)(from + at), n / sizeof(uint32_t), weights->within) * weights->before[c];
    }
    sums[i * sum_stride] += (int64_t)sum;
  }
}

// sums[m] = the sum over the words w_i of row m of (w_i + 1) * base**i.
extern "C" void quire_checksum_pages(const uint32_t* words, int64_t rows, int64_t row_words,
                                     const ChecksumWeights* weights, uint64_t* sums) {
  for (int64_t m = 0; m < rows; m++, words += row_words) {
    sums[m] = 0;
    for (int64_t at = 0, c = 0; at < row_words; at += weights->chunk_words, c++) {
      const int64_t n = std::min(weights->chunk_words, row_words - at);
      read_ahead(words + at, weights->chunk_words * (int64_t)sizeof(uint32_t));
      sums[m] += sum_chunk(words + at, n, weights->within) * weights->before[c];
    }
  }
}
