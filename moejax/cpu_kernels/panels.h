// Products of many rows: sums (M, kPanel) = or += rows (M, depth) panel (depth, kPanel).
//
// kPanel columns of a matrix are written down one after the other as float32 (or, for rows in bfloat16 where the
// processor multiplies it, as pairs of bfloat16) and met by kRows rows at a time, whose sums stay in registers.

#pragma once

#include <utility>
#include "values.h"

namespace {

constexpr int kBlock = 192;  // rows of a task, at most; of bfloat16 twice as many
constexpr int kDepth = 512;  // inputs of a panel, at most
constexpr int kPanels = 4;  // panels that are written at once
constexpr int kAhead = 16;  // inputs of a panel that are asked for before they are read

// Sums of rows, `stride` apart. `add`: to what is there.
struct Sums {
  float* at;
  long stride;
  bool add;

  Sums from_row(long r) const { return {at + r * stride, stride, add}; }

  void put(long r, Floats left, Floats right) const {
    float* row = at + r * stride;
    store(row, add ? load<Floats>(row) + left : left);
    store(row + kLanes, add ? load<Floats>(row + kLanes) + right : right);
  }

  // Asks for the lines that are about to be written, which come while sums are made.
  void fetch(int rows) const {
    for (int i = 0; i < rows; ++i) {
      __builtin_prefetch(at + i * stride, 1);
      __builtin_prefetch(at + i * stride + kLanes, 1);
    }
  }
};

// Row i of `a` begins at a + i * row, its inputs lie `next` apart.
template <int M>
void meet(long depth, const float* a, long row, long next, const float* panel, Sums sums) {
  sums.fetch(M);
  Floats left[M] = {}, right[M] = {};
  for (long k = 0; k < depth; ++k, a += next, panel += kPanel) {
    const Floats l = load<Floats>(panel);
    const Floats r = load<Floats>(panel + kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const Floats x = splat(a[i * row]);
      left[i] += x * l;
      right[i] += x * r;
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) sums.put(i, left[i], right[i]);
}

#ifdef __AVX512BF16__
constexpr bool kMultipliesHalves = true;

// The same for pairs of bfloat16: `depth` pairs of inputs.
template <int M>
void meet_halves(long depth, const uint32_t* a, long row, const uint32_t* panel, Sums sums) {
  sums.fetch(M);
  __m512 left[M] = {}, right[M] = {};
  for (long k = 0; k < depth; ++k, ++a, panel += kPanel) {
    const __m512bh l = (__m512bh)_mm512_loadu_si512(panel);
    const __m512bh r = (__m512bh)_mm512_loadu_si512(panel + kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(load<int32_t>(a + i * row));
      left[i] = _mm512_dpbf16_ps(left[i], x, l);
      right[i] = _mm512_dpbf16_ps(right[i], x, r);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) sums.put(i, (Floats)left[i], (Floats)right[i]);
}
#else
constexpr bool kMultipliesHalves = false;

template <int M>
void meet_halves(long, const uint32_t*, long, const uint32_t*, Sums) {}
#endif

void meet_all(long rows, long depth, const float* a, long row, long next, const float* panel, Sums sums) {
  for (long i = 0; i < rows; i += kRows) {
    with_rows(std::min<long>(kRows, rows - i),
              [&](auto m) { meet<m()>(depth, a + i * row, row, next, panel, sums.from_row(i)); });
  }
}

void meet_all(long rows, long depth, const uint32_t* a, long row, const uint32_t* panel, Sums sums) {
  for (long i = 0; i < rows; i += kRows) {
    with_rows(std::min<long>(kRows, rows - i),
              [&](auto m) { meet_halves<m()>(depth, a + i * row, row, panel, sums.from_row(i)); });
  }
}

#ifdef __AVX512BF16__
// Two rows of 16 outputs as pairs of bfloat16.
inline Ints pairs_of(Floats first, Floats second) {
  return ints((Halves)_mm512_cvtneps_pbh((__m512)first)) | ints((Halves)_mm512_cvtneps_pbh((__m512)second)) << 16;
}
#else
inline Ints pairs_of(Floats, Floats) { return Ints{}; }
#endif

// Inputs k to k + depth, outputs n to n + count of a matrix as panels one after the other, zero past the last output.
void write_panels(const Matrices& w, long e, long k, long depth, long n, long count, float* panels) {
  for (long i = 0; i < depth; ++i) {
    w.fetch(e, k + i + kAhead, n, count);
    for (long j = 0; j < count; j += kPanel) {
      float* at = panels + j * depth + i * kPanel;
      store(at, w.at_edge(e, k + i, n + j));
      store(at + kLanes, w.at_edge(e, k + i, n + j + kLanes));
    }
  }
}

// The same as pairs of bfloat16, with a zero behind an odd depth.
void write_panels_of_pairs(const Matrices& w, long e, long k, long depth, long n, long count, uint32_t* panels) {
  const long both = (depth + 1) / 2;
  for (long i = 0; i < both; ++i) {
    const bool second = 2 * i + 1 < depth;
    w.fetch(e, k + 2 * i + kAhead, n, count);
    w.fetch(e, k + 2 * i + kAhead + 1, n, count);
    for (long j = 0; j < count; j += kLanes) {
      const Floats a = w.at_edge(e, k + 2 * i, n + j), b = second ? w.at_edge(e, k + 2 * i + 1, n + j) : Floats{};
      store(panels + j / kPanel * kPanel * both + i * kPanel + j % kPanel, pairs_of(a, b));
    }
    if (count % kPanel && count % kPanel <= kLanes) {  // the second half of the last panel
      std::memset(panels + count / kPanel * kPanel * both + i * kPanel + kLanes, 0, kLanes * 4);
    }
  }
}

// 16 vectors, transposed in place: halves of pairs change places, `kStep` apart, then quarters, ...
template <int kStep, int... i>
inline void exchange(Floats& x, Floats& y, std::integer_sequence<int, i...>) {
  const Floats a = x, b = y;
  x = __builtin_shufflevector(a, b, (i & kStep ? kLanes + i - kStep : i)...);
  y = __builtin_shufflevector(a, b, (i & kStep ? kLanes + i : i + kStep)...);
}

template <int kStep>
inline void transpose(Floats (&a)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    if (!(i & kStep)) exchange<kStep>(a[i], a[i + kStep], std::make_integer_sequence<int, kLanes>{});
  }
  if constexpr (kStep > 1) transpose<kStep / 2>(a);
}

// Outputs k to k + depth, inputs n to n + count: panels of the transposed matrix.
void write_panels_transposed(const Matrices& w, long e, long k, long depth, long n, long count, float* panels) {
  for (long j = 0; j < (count + kPanel - 1) / kPanel * kPanel; j += kLanes) {
    float* panel = panels + j / kPanel * kPanel * depth + j % kPanel;
    for (long i = 0; i < depth; i += kLanes) {
      Floats a[kLanes] = {};
      for (long l = 0; l < kLanes && n + j + l < w.inputs; ++l) a[l] = w.at_edge(e, n + j + l, k + i);
      transpose<kLanes / 2>(a);
      for (long l = 0; l < kLanes && i + l < depth; ++l) {
        store(panel + (i + l) * kPanel, a[l]);
      }
    }
  }
}

// A float32 panel as pairs of bfloat16, with a zero behind an odd depth.
void write_pairs(const float* panel, long depth, uint32_t* pairs) {
  for (long k = 0; k < depth; k += 2, panel += 2 * kPanel, pairs += kPanel) {
    for (int j = 0; j < kPanel; j += kLanes) {
      const Floats second = k + 1 < depth ? load<Floats>(panel + kPanel + j) : Floats{};
      store(pairs + j, pairs_of(load<Floats>(panel + j), second));
    }
  }
}

// The rows of a task in working memory: float32, or bfloat16 in the first half of each.
float* read_rows(const Task& task, const Rows& x, bool halves, float* out) {
  const long row = stride(x.width), even = (x.width + 1) / 2 * 2;
  for (long r = 0; r < task.rows; ++r) {
    if (halves) {
      x.read_half(task.row + r, reinterpret_cast<uint16_t*>(out + r * row), even);
    } else {
      x.read(task.row + r, out + r * row, even);
    }
  }
  return out + task.rows * row;
}

// y = or += x w or x w^T for the rows of a task, outputs n to n + count, at most kPanels panels; `a` is of `read_rows`.
void panels_of_product(const Product& p, long rows, bool transposed, bool halves, long e, long n, long count,
                       const float* a, Sums sums) {
  const long row = stride(p.x.width);
  float* panels = scratch<float>(1, kDepth * kPanels * kPanel);
  for (long k = 0; k < p.x.width; k += kDepth, sums.add = true) {
    const long depth = std::min<long>(kDepth, p.x.width - k), both = (depth + 1) / 2;
    uint32_t* pairs = scratch<uint32_t>(2, kDepth * kPanels * kPanel / 2);
    if (transposed) {
      write_panels_transposed(p.w, e, k, depth, n, count, panels);
    } else if (halves) {
      write_panels_of_pairs(p.w, e, k, depth, n, count, pairs);
    } else {
      write_panels(p.w, e, k, depth, n, count, panels);
    }
    for (long j = 0; j < count; j += kPanel) {
      const Sums of_panel = {sums.at + j, sums.stride, sums.add};
      if (halves) {
        uint32_t* panel = pairs + j * both;
        if (transposed) write_pairs(panels + j * depth, depth, panel);
        meet_all(rows, both, reinterpret_cast<const uint32_t*>(a) + k / 2, row, panel, of_panel);
      } else {
        meet_all(rows, depth, a + k, row, 1, panels + j * depth, of_panel);
      }
    }
  }
}

// Calls f(n, count, sums) for columns `from` to `to` of y, a few panels at a time: with these themselves where they
// fill panels of float32.
template <typename F>
void for_panels(const Rows& y, const Task& task, long from, long to, const F& f) {
  for (long n = from; n < to; n += kPanels * kPanel) {
    const long count = std::min<long>(kPanels * kPanel, to - n);
    if (!y.half && count % kPanel == 0) {
      f(n, count, Sums{static_cast<float*>(y.values) + task.row * y.width + n, y.width, false});
      continue;
    }
    float* sums = scratch<float>(0, 2 * kBlock * kPanels * kPanel);
    f(n, count, Sums{sums, kPanels * kPanel, false});
    for (long r = 0; r < task.rows; ++r) y.write(task.row + r, n, sums + r * kPanels * kPanel, count);
  }
}

}  // namespace
