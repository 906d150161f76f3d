// Products of few rows: they read the matrix once, where it lies, kAtOnce inputs or a block at a time.

#pragma once

#include <atomic>
#include <cmath>
#include "values.h"

namespace {

constexpr int kMostBlock = 64;  // inputs of a block of int4 whose products are made in integers
constexpr int kAtOnce = 8;  // inputs that few rows take at once
constexpr long kWideColumns = 4096;  // outputs that few rows take at once
constexpr long kPartBytes = 1 << 18;  // of a matrix in one task of theirs, at least
constexpr long kParts = 16;  // of a matrix, at most, unless it is wide

// Asks for the part of a row that lies kAtOnce rows, or a block, further on, into the second cache: the first one waits
// for too few lines at a time to read memory at its speed.
template <typename T>
inline void fetch(const T* row, long ahead, int count) {
  for (int i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(row + ahead + i, 0, 2);
}

// sums (M, ..) += x times inputs k to k + kDeep, for kWide vectors of outputs from n on; int8 without its scale.
template <int M, int kDeep, int kWide, Kind kind>
inline void add_products(const Matrices& w, long e, const float* x, long row, long k, long n, float* sums, long next) {
  Floats sum[M][kWide];
  for (int m = 0; m < M; ++m) {
    for (int i = 0; i < kWide; ++i) sum[m][i] = load<Floats>(sums + m * next + i * kLanes);
  }
#pragma GCC unroll 8
  for (int j = 0; j < kDeep; ++j) {
    Floats value[kWide];
    if constexpr (kind == Kind::kFloat) {
      const float* at = w.row<float>(e, k + j, n);
      fetch(at, kDeep * w.outputs, kWide * kLanes);
      for (int i = 0; i < kWide; ++i) value[i] = load<Floats>(at + i * kLanes);
    } else if constexpr (kind == Kind::kHalf) {
      const uint16_t* at = w.row<uint16_t>(e, k + j, n);
      fetch(at, kDeep * w.outputs, kWide * kLanes);
      for (int i = 0; i < kWide; ++i) value[i] = widen(load<Halves>(at + i * kLanes));
    } else {
      const int8_t* at = w.row<int8_t>(e, k + j, n);
      fetch(at, kDeep * w.outputs, kWide * kLanes);
      for (int i = 0; i < kWide; ++i) value[i] = floats(load<SignedBytes>(at + i * kLanes));
    }
    for (int m = 0; m < M; ++m) {
      for (int i = 0; i < kWide; ++i) sum[m][i] += splat(x[m * row + k + j]) * value[i];
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int i = 0; i < kWide; ++i) store(sums + m * next + i * kLanes, sum[m][i]);
  }
}

// sums (M, ..) += x times block b of int4; `eights`: 8 times the sum of the block's x, of each row.
template <int M, int kWide>
inline void add_block(const Matrices& w, long e, const float* x, long row, long b, const float* eights, long n,
                      float* sums, long next) {
  const long half = w.block / 2;
  Floats low[M][kWide], high[M][kWide];
  for (int m = 0; m < M; ++m) {
    for (int i = 0; i < kWide; ++i) low[m][i] = splat(-eights[m]), high[m][i] = Floats{};
  }
  const uint8_t* q = w.row<uint8_t>(e, b * half, n);
  for (long j = 0; j < half; ++j, q += w.outputs) {
    fetch(q, half * w.outputs, kWide * kLanes);
    for (int i = 0; i < kWide; ++i) {
      const Ints two = ints(load<Bytes>(q + i * kLanes));
      const Floats first = floats(two & 15), second = floats(two >> 4);
      for (int m = 0; m < M; ++m) {
        low[m][i] += splat(x[m * row + b * w.block + j]) * first;
        high[m][i] += splat(x[m * row + b * w.block + j + half]) * second;
      }
    }
  }
  for (int i = 0; i < kWide; ++i) {
    const Floats scale = widen(load<Halves>(w.scale_of_block(e, b, n + i * kLanes)));
    for (int m = 0; m < M; ++m) {
      store(sums + m * next + i * kLanes, load<Floats>(sums + m * next + i * kLanes) + (low[m][i] + high[m][i]) * scale);
    }
  }
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
// A block of each row in 16 bits: integers of which `scale` times is x, in pairs of inputs j and j + block / 2.
template <int M>
struct Block16 {
  int32_t pairs[M][kMostBlock / 2];
  float scale[M];
  int32_t eights[M];  // 8 times the sum of the integers

  Block16(const float* x, long row, long block) {
    for (int m = 0; m < M; ++m, x += row) {
      float most = 0, bad = 0;  // NaN if there is one, or an infinity
      for (long j = 0; j < block; ++j) most = std::max(most, std::fabs(x[j])), bad += x[j] * 0;
      scale[m] = most / 32767 + bad;
      const float by = most > 1e-30f && bad == 0 ? 32767 / most : 0;  // what is smaller counts as zero
      int32_t sum = 0;
      for (long j = 0; j < block / 2; ++j) {
        const int32_t a = by ? std::lrint(x[j] * by) : 0, b = by ? std::lrint(x[j + block / 2] * by) : 0;
        pairs[m][j] = int32_t((uint32_t(a) & 0xffff) | uint32_t(b) << 16);
        sum += a + b;
      }
      eights[m] = 8 * sum;
    }
  }
};

// `add_block` for 32 kWide outputs, in integers: two products in an instruction, and no value becomes a float.
template <int M, int kWide>
inline void add_block16(const Matrices& w, long e, const Block16<M>& x, long b, long n, float* sums, long next) {
  const long half = w.block / 2;
  __m512i left[M][kWide], right[M][kWide];
  for (int m = 0; m < M; ++m) {
    for (int i = 0; i < kWide; ++i) left[m][i] = right[m][i] = _mm512_setzero_si512();
  }
  const uint8_t* q = w.row<uint8_t>(e, b * half, n);
  const __m512i fifteen = _mm512_set1_epi16(15);
  for (long j = 0; j < half; ++j, q += w.outputs) {
    fetch(q, half * w.outputs, 32 * kWide);
    for (int i = 0; i < kWide; ++i) {
      const __m512i two = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + 32 * i)));
      const __m512i low = _mm512_and_si512(two, fifteen), high = _mm512_srli_epi16(two, 4);
      // Outputs 0 to 3 of each eight, and 4 to 7.
      const __m512i first = _mm512_unpacklo_epi16(low, high), second = _mm512_unpackhi_epi16(low, high);
      for (int m = 0; m < M; ++m) {
        const __m512i pair = _mm512_set1_epi32(x.pairs[m][j]);
        left[m][i] = _mm512_dpwssd_epi32(left[m][i], first, pair);
        right[m][i] = _mm512_dpwssd_epi32(right[m][i], second, pair);
      }
    }
  }
  const __m512i front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i back = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int i = 0; i < kWide; ++i) {
    const uint16_t* scale = w.scale_of_block(e, b, n + 32 * i);
    for (int m = 0; m < M; ++m) {
      const Ints eights = x.eights[m] - Ints{};
      float* at = sums + m * next + 32 * i;
      const Ints a = (Ints)_mm512_permutex2var_epi32(left[m][i], front, right[m][i]) - eights;
      const Ints c = (Ints)_mm512_permutex2var_epi32(left[m][i], back, right[m][i]) - eights;
      store(at, load<Floats>(at) + floats(a) * splat(x.scale[m]) * widen(load<Halves>(scale)));
      store(at + kLanes, load<Floats>(at + kLanes) + floats(c) * splat(x.scale[m]) * widen(load<Halves>(scale + kLanes)));
    }
  }
}
#endif

// Calls f(W, n) for outputs from n on, kWide vectors at a time and then one.
template <int kWide, typename F>
inline void for_vectors(long from, long to, const F& f) {
  long n = from;
  for (; n + kWide * kLanes <= to; n += kWide * kLanes) f(std::integral_constant<int, kWide>{}, n);
  for (; n + kLanes <= to; n += kLanes) f(std::integral_constant<int, 1>{}, n);
}

// Part of a matrix: outputs `from` to `to` of inputs k to `end`.
struct Part {
  long from, to, k, end;
};

template <int M, Kind kind>
void stream_kind(const Matrices& w, long e, const float* x, long row, const Part& part, float* sums, long next) {
  // So many that the sums stay in registers; int4 has two of each.
  constexpr int kSums = kind == Kind::kInt4 ? kRows : 2 * kRows, kWide = std::clamp(kSums / M, 1, 4);
  const long from = part.from, to = part.to;
  long k = part.k;
  if constexpr (kind == Kind::kInt4) {
    for (; k < part.end; k += w.block) {
      long n = from;
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
      if (w.block <= kMostBlock) {
        const Block16<M> in16(x + k, row, w.block);
        constexpr int kInts = M <= 4 ? 2 : 1;
        for (; n + 32 * kInts <= to; n += 32 * kInts) {
          add_block16<M, kInts>(w, e, in16, k / w.block, n, sums + n - from, next);
        }
      }
#endif
      float eights[M];
      for (int m = 0; m < M; ++m) {
        float sum = 0;
        for (long j = 0; j < w.block; ++j) sum += x[m * row + k + j];
        eights[m] = 8 * sum;
      }
      for_vectors<kWide>(n, to, [&](auto wide, long n) {
        add_block<M, wide()>(w, e, x, row, k / w.block, eights, n, sums + n - from, next);
      });
    }
  } else {
    for (; k + kAtOnce <= part.end; k += kAtOnce) {
      for_vectors<kWide>(from, to, [&](auto wide, long n) {
        add_products<M, kAtOnce, wide(), kind>(w, e, x, row, k, n, sums + n - from, next);
      });
    }
    for (; k < part.end; ++k) {
      for_vectors<kWide>(from, to, [&](auto wide, long n) {
        add_products<M, 1, wide(), kind>(w, e, x, row, k, n, sums + n - from, next);
      });
    }
  }
  if constexpr (kind == Kind::kInt8) {
    for_vectors<1>(from, to, [&](auto, long n) {
      const Floats scale = load<Floats>(w.scale_of_outputs(e, n));
      for (int m = 0; m < M; ++m) store(sums + m * next + n - from, load<Floats>(sums + m * next + n - from) * scale);
    });
  }
}

// sums (M, ..) = x (M, inputs) times a part of w[e]; sums are zero before.
template <int M>
void stream(const Matrices& w, long e, const float* x, long row, const Part& part, float* sums, long next) {
  switch (w.kind) {
    case Kind::kFloat:
      stream_kind<M, Kind::kFloat>(w, e, x, row, part, sums, next);
      break;
    case Kind::kHalf:
      stream_kind<M, Kind::kHalf>(w, e, x, row, part, sums, next);
      break;
    case Kind::kInt8:
      stream_kind<M, Kind::kInt8>(w, e, x, row, part, sums, next);
      break;
    case Kind::kInt4:
      stream_kind<M, Kind::kInt4>(w, e, x, row, part, sums, next);
  }
  for (long n = part.from + (part.to - part.from) / kLanes * kLanes; n < part.to; ++n) {  // outputs that fill no vector
    for (int m = 0; m < M; ++m) {
      float sum = 0;
      for (long k = part.k; k < part.end; ++k) sum += x[m * row + k] * w.one(e, k, n);
      sums[m * next + n - part.from] = sum;
    }
  }
}

// How few rows share a matrix out among threads: in wide columns, and these in pieces of inputs that lie together in
// memory. Shapes alone decide, so that sums do not depend on the number of threads.
struct Cut {
  long columns, depth;  // of a part
  long across, pieces;  // parts side by side, and one above the other

  explicit Cut(const Matrices& w) {
    const long eighths = w.kind == Kind::kFloat ? 32 : w.kind == Kind::kHalf ? 16 : w.kind == Kind::kInt8 ? 8 : 4;
    across = (w.outputs + kWideColumns - 1) / kWideColumns;
    columns = ((w.outputs + across - 1) / across + kLanes - 1) / kLanes * kLanes;
    const long parts = std::min<long>(w.inputs * w.outputs * eighths / 8 / kPartBytes, kParts);
    const long unit = std::max<long>(w.block, kAtOnce), units = (w.inputs + unit - 1) / unit;
    pieces = std::clamp<long>(parts / across, 1, units);
    depth = (units + pieces - 1) / pieces * unit;
    pieces = (w.inputs + depth - 1) / depth;
  }

  Part part(const Matrices& w, long i) const {
    const long from = i / pieces * columns, k = i % pieces * depth;
    return {from, std::min(from + columns, w.outputs), k, std::min(k + depth, w.inputs)};
  }
};

// Few rows times a matrix, part by part; the last part that is done adds them up, in their order.
struct FewRows {
  const Task* task;
  const Product* product;
  const Rows* y;
  Cut cut;
  float* sums;                                   // (parts, rows, columns)
  std::unique_ptr<std::atomic<long>[]> missing;  // of each of `cut.across`

  FewRows(const Task& task, const Product& product, const Rows& y)
      : task(&task), product(&product), y(&y), cut(product.w), missing(new std::atomic<long>[cut.across]) {
    for (long i = 0; i < cut.across; ++i) missing[i] = cut.pieces;
  }

  long parts() const { return cut.across * cut.pieces; }
  long size() const { return task->rows * cut.columns; }  // of a part's sums

  void run(long i, long first) const {
    const long row = stride(product->x.width), size = this->size();
    float* x = scratch<float>(3, kFew * row);
    for (long r = 0; r < task->rows; ++r) product->x.read(task->row + r, x + r * row, product->x.width);
    const Part part = cut.part(product->w, i);
    float* mine = sums + i * size;
    std::fill(mine, mine + size, 0.f);
    with_rows<>(task->rows, [&](auto m) {
      if constexpr (m() <= kFew) stream<m()>(product->w, first + task->expert, x, row, part, mine, cut.columns);
    });
    if (--missing[i / cut.pieces]) return;
    float* all = sums + i / cut.pieces * cut.pieces * size;
    for (long p = 1; p < cut.pieces; ++p) {
      for (long j = 0; j < size; ++j) all[j] += all[p * size + j];
    }
    for (long r = 0; r < task->rows; ++r) {
      y->write(task->row + r, part.from, all + r * cut.columns, part.to - part.from);
    }
  }
};

}  // namespace
