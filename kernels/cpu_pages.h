// Whole pages as bytes, for `pages.py`: copies and checksums, by the calling thread alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

// Between rows of `pool`, `stride` bytes apart, and the dense rows of `bytes`.
extern "C" void quire_copy_pages(uint8_t* pool, int64_t stride, const int64_t* pages, int64_t count,
                                 int64_t row_bytes, uint8_t* bytes, bool scatter) {
  for (int64_t i = 0; i < count; i++) {
    uint8_t *page = pool + pages[i] * stride, *row = bytes + i * row_bytes;
    std::memcpy(scatter ? page : row, scatter ? row : page, row_bytes);
  }
}

// sums[m] = the sum over the words w_i of row m of (w_i + 1) * base**i, where base**i is a product of two tables.
extern "C" void quire_checksum_pages(const uint32_t* words, int64_t rows, int64_t row_words, const uint64_t* within,
                                     const uint64_t* before, int64_t chunk_words, uint64_t* sums) {
  for (int64_t m = 0; m < rows; m++, words += row_words) {
    uint64_t sum = 0;
    for (int64_t at = 0, c = 0; at < row_words; at += chunk_words, c++) {
      const int64_t n = std::min(chunk_words, row_words - at);
      uint64_t part = 0;
      for (int64_t k = 0; k < n; k++) part += ((uint64_t)words[at + k] + 1) * within[k];
      sum += part * before[c];
    }
    sums[m] = sum;
  }
}
