// Whole pages as bytes, for `page_copy.py`: copies and checksums, by the calling thread alone.
#pragma once

#include <algorithm>

#include "cpu_vectors.h"

// The sum of (w + 1) P(x) over the words w of a page, x counting them from its end, P(x) = 4x² + 6x + 1.
//
// Words go through it in order, a row at a time, one lane for each of a row. With X counting rows from the end,
// `once`, the sum of all sums so far, has every word X times, and `twice`, the sum of those, X (X + 1) / 2 times: a
// lane's P is a combination of the three, and no word is multiplied. (ZFS's fletcher_4 goes the same way.)
class Checksum {
  static constexpr uint64_t ROW = LANES / 2;  // sums as wide as a register: GCC keeps wider ones in memory

 public:
  static constexpr int64_t ROW_BYTES = sizeof(U_half);

  explicit Checksum(int64_t page_bytes) : words_(page_bytes / sizeof(uint32_t)) {}

  void add_rows(const uint8_t* bytes, int64_t size) {
    U64 words = words_sum_, once = once_, twice = twice_;
    const auto add = [&](int64_t at) {
      words += widen(load<U_half>(bytes + at));
      once += words;
      twice += once;
    };
    int64_t at = 0;
    for (; at + LINE <= size; at += LINE) {
      __builtin_prefetch(bytes + at + AHEAD);
#pragma GCC unroll 8
      for (int64_t row = 0; row < LINE; row += ROW_BYTES) add(at + row);
    }
    for (; at < size; at += ROW_BYTES) add(at);
    words_sum_ = words, once_ = once, twice_ = twice;
  }

  // `rest`: what is left of the page behind its rows.
  uint64_t end(const uint8_t* rest) const {
    const uint64_t n = words_, left = n % ROW;
    uint64_t sum = of_ones(n);
    for (uint64_t i = 0; i < left; i++) sum += load<uint32_t>(rest + i * sizeof(uint32_t)) * weight(left - i);
    for (uint64_t lane = 0; lane < ROW; lane++) {
      const uint64_t s = left - lane;  // P(ROW X + s) in terms of 1, X and X (X + 1) / 2; below 0 modulo 2**64
      const uint64_t linear = 8 * ROW * s + 6 * ROW - 4 * ROW * ROW;
      sum += weight(s) * words_sum_[lane] + linear * once_[lane] + 8 * ROW * ROW * twice_[lane];
    }
    return sum;
  }

 private:
  static constexpr int64_t LINE = 64;     // bytes of the processor's cache, at least two rows
  static constexpr int64_t AHEAD = 8192;  // bytes: the hardware's own reading ahead ends with every 4096

  static uint64_t weight(uint64_t x) { return (4 * x + 6) * x + 1; }
  static uint64_t of_ones(uint64_t n) {  // P(1) + ... + P(n)
    return (uint64_t)((unsigned __int128)n * (n + 1) * (2 * n + 1) / 6) * 4 + 3 * n * (n + 1) + n;
  }

  int64_t words_;
  U64 words_sum_{}, once_{}, twice_{};
};

// Between rows of `pool`, `stride` bytes apart, and the dense rows of `bytes`. What is copied is summed while it is in
// the cache; `sums`, if any, are added to, `sum_stride` apart.
extern "C" void quire_copy_pages(uint8_t* pool, int64_t stride, const int64_t* pages, int64_t count,
                                 int64_t row_bytes, uint8_t* bytes, bool scatter, int64_t* sums, int64_t sum_stride) {
  const int64_t piece = 4096, summed = row_bytes / Checksum::ROW_BYTES * Checksum::ROW_BYTES;
  for (int64_t i = 0; i < count; i++) {
    uint8_t *page = pool + pages[i] * stride, *row = bytes + i * row_bytes;
    const uint8_t* from = scatter ? row : page;
    uint8_t* to = scatter ? page : row;
    if (!sums) {
      std::memcpy(to, from, row_bytes);
      continue;
    }
    Checksum sum(row_bytes);
    for (int64_t at = 0; at < row_bytes; at += piece) {
      std::memcpy(to + at, from + at, std::min(piece, row_bytes - at));
      sum.add_rows(from + at, std::min(piece, summed - at));
    }
    sums[i * sum_stride] += (int64_t)sum.end(from + summed);
  }
}

extern "C" void quire_checksum_pages(const uint8_t* bytes, int64_t rows, int64_t row_bytes, int64_t* sums) {
  const int64_t summed = row_bytes / Checksum::ROW_BYTES * Checksum::ROW_BYTES;
  for (int64_t m = 0; m < rows; m++, bytes += row_bytes) {
    Checksum sum(row_bytes);
    sum.add_rows(bytes, summed);
    sums[m] = (int64_t)sum.end(bytes + summed);
  }
}
