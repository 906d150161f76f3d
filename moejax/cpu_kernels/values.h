// What products are made of: vectors, matrices in every format (moejax/weights.py), rows, working memory.
//
// Vectors are GCC's and Clang's own.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16;  // floats of a vector
constexpr int kRows = 12;   // rows that meet a panel at once: 24 of 32 registers hold sums
#else
constexpr int kLanes = 8;
constexpr int kRows = 6;  // 12 of 16 registers, or 24 of 32 half as wide
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef int8_t SignedBytes __attribute__((vector_size(kLanes)));

constexpr int kPanel = 2 * kLanes;  // columns of a panel
constexpr int kFew = 8;  // rows that read a matrix where it lies

// Vectors from and to memory that need not be aligned.
template <typename Vector>
inline Vector load(const void* at) {
  Vector a;
  std::memcpy(&a, at, sizeof(a));
  return a;
}

template <typename Vector>
inline void store(void* at, Vector a) {
  std::memcpy(at, &a, sizeof(a));
}

inline Floats splat(float a) { return a - Floats{}; }

inline float widen(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float a;
  std::memcpy(&a, &wide, 4);
  return a;
}

// Wider integers. GCC 12 converts vectors of bytes one element at a time, so there are the processor's instructions.
#ifdef __AVX512F__
inline Ints ints(Halves a) { return (Ints)_mm512_cvtepu16_epi32((__m256i)a); }
inline Ints ints(Bytes a) { return (Ints)_mm512_cvtepu8_epi32((__m128i)a); }
inline Ints ints(SignedBytes a) { return (Ints)_mm512_cvtepi8_epi32((__m128i)a); }
#elif defined(__AVX2__)
inline Ints ints(Halves a) { return (Ints)_mm256_cvtepu16_epi32((__m128i)a); }
inline Ints ints(Bytes a) { return (Ints)_mm256_cvtepu8_epi32(_mm_set_epi64x(0, (int64_t)a)); }
inline Ints ints(SignedBytes a) { return (Ints)_mm256_cvtepi8_epi32(_mm_set_epi64x(0, (int64_t)a)); }
#else
template <typename Narrow>
inline Ints ints(Narrow a) {
  return __builtin_convertvector(a, Ints);
}
#endif

inline Floats floats(Ints a) { return __builtin_convertvector(a, Floats); }
inline Floats floats(SignedBytes a) { return floats(ints(a)); }

inline Floats widen(Halves a) { return (Floats)(ints(a) << 16); }

// To bfloat16, to the nearest, ties to even; NaN stays NaN.
inline uint16_t narrow(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, 4);
  if (a != a) return uint16_t(bits >> 16) | 64;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

enum class Kind { kFloat, kHalf, kInt8, kInt4 };

// Matrices (N, inputs, outputs).
struct Matrices {
  Kind kind;
  const void* values;
  const void* scale;  // (N, 1, outputs) float32 of int8, (N, inputs / block, outputs) bfloat16 of int4
  long inputs, outputs, block;

  // Where row `k` of the values lies, from column `n` on.
  template <typename T>
  const T* row(long e, long k, long n) const {
    const long rows = kind == Kind::kInt4 ? inputs / 2 : inputs;
    return static_cast<const T*>(values) + (e * rows + k) * outputs + n;
  }

  const float* scale_of_outputs(long e, long n) const {
    return static_cast<const float*>(scale) + e * outputs + n;
  }

  const uint16_t* scale_of_block(long e, long b, long n) const {
    return static_cast<const uint16_t*>(scale) + (e * (inputs / block) + b) * outputs + n;
  }

  // Asks for outputs n to n + count of input k.
  void fetch(long e, long k, long n, long count) const {
    if (k >= inputs || kind == Kind::kInt4) return;  // int4 computes longer than it reads
    const long bytes = kind == Kind::kFloat ? 4 : kind == Kind::kHalf ? 2 : 1;
    const char* at = static_cast<const char*>(values) + ((e * inputs + k) * outputs + n) * bytes;
    for (long i = 0; i < count * bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
  }

  // Input `k`, outputs from n on.
  inline Floats at(long e, long k, long n) const {
    switch (kind) {
      case Kind::kFloat:
        return load<Floats>(row<float>(e, k, n));
      case Kind::kHalf:
        return widen(load<Halves>(row<uint16_t>(e, k, n)));
      case Kind::kInt8:
        return floats(load<SignedBytes>(row<int8_t>(e, k, n))) *
               load<Floats>(scale_of_outputs(e, n));
      default: {
        const long b = k / block, j = k % block, half = block / 2;
        const Bytes two = load<Bytes>(row<uint8_t>(e, b * half + j % half, n));
        const Ints q = ints(two);
        return floats((j < half ? q & 15 : q >> 4) - 8) *
               widen(load<Halves>(scale_of_block(e, b, n)));
      }
    }
  }

  // The same for one output.
  inline float one(long e, long k, long n) const {
    switch (kind) {
      case Kind::kFloat:
        return *row<float>(e, k, n);
      case Kind::kHalf:
        return widen(*row<uint16_t>(e, k, n));
      case Kind::kInt8:
        return *row<int8_t>(e, k, n) * *scale_of_outputs(e, n);
      default: {
        const long b = k / block, j = k % block, half = block / 2;
        const int q = *row<uint8_t>(e, b * half + j % half, n);
        return ((j < half ? q & 15 : q >> 4) - 8) * widen(*scale_of_block(e, b, n));
      }
    }
  }

  // The same, zero past the last output.
  inline Floats at_edge(long e, long k, long n) const {
    if (n + kLanes <= outputs) return at(e, k, n);
    Floats a = {};
    for (long i = 0; n + i < outputs; ++i) a[i] = one(e, k, n + i);
    return a;
  }
};

// Rows (R, width), float32 or bfloat16, of which `at` names one for each row of a product.
struct Rows {
  bool half;
  void* values;
  const int32_t* at;
  long width;

  long where(long r) const { return (at ? at[r] : r) * width; }

  // Row r as float32, zero from `width` to `padded`.
  void read(long r, float* out, long padded) const {
    if (half) {
      const uint16_t* a = static_cast<const uint16_t*>(values) + where(r);
      for (long i = 0; i < width; ++i) out[i] = widen(a[i]);
    } else {
      std::memcpy(out, static_cast<const float*>(values) + where(r), width * sizeof(float));
    }
    std::fill(out + width, out + padded, 0.f);
  }

  // Row r as float32: itself, or written to `out`.
  const float* floats(long r, float* out) const {
    if (!half) return static_cast<const float*>(values) + where(r);
    read(r, out, width);
    return out;
  }

  void read_half(long r, uint16_t* out, long padded) const {
    std::memcpy(out, static_cast<const uint16_t*>(values) + where(r), width * sizeof(uint16_t));
    std::fill(out + width, out + padded, uint16_t{0});
  }

  void write(long r, long n, const float* in, long count) const {
    if (half) {
      uint16_t* a = static_cast<uint16_t*>(values) + r * width + n;
      for (long i = 0; i < count; ++i) a[i] = narrow(in[i]);
    } else {
      std::memcpy(static_cast<float*>(values) + r * width + n, in, count * sizeof(float));
    }
  }

  void clear(long r, long count) const {
    const size_t size = half ? 2 : 4;
    std::memset(static_cast<char*>(values) + r * width * size, 0, count * width * size);
  }
};

// At least `size` floats: from one piece of a matrix to the next, an odd number of lines, so that the same rows of many
// pieces fall on different sets of the cache.
long apart(long size) { return ((size + kLanes - 1) / kLanes | 1) * kLanes; }

// A row in pieces of kSize floats, `next` floats apart; what lies past its end is left as it was.
template <int kSize>
void copy_pieces(const float* row, long width, float* out, long next) {
  long i = 0;
  for (; i + kSize <= width; i += kSize, out += next) std::memcpy(out, row + i, kSize * sizeof(float));
  if (i < width) std::memcpy(out, row + i, (width - i) * sizeof(float));
}

// Between rows of working memory: so many floats that rows do not fall on the same lines of the cache.
long stride(long width) { return (width + 2 * kLanes - 1) / kLanes * kLanes + kLanes; }

struct Task {
  long expert, row, rows;
};

struct Product {
  Rows x;
  Matrices w;
};

// Calls f with a constant M = rows, 1 to kRows.
template <typename F, int M = kRows>
inline void with_rows(long rows, const F& f) {
  if constexpr (M > 1) {
    if (rows < M) return with_rows<F, M - 1>(rows, f);
  }
  f(std::integral_constant<int, M>{});
}

// Working memory of a thread, of which each `slot` is one piece; it is kept and grows.
template <typename T>
T* scratch(int slot, size_t size) {
  struct Piece {
    std::unique_ptr<char[]> memory;
    size_t bytes = 0;
  };
  thread_local Piece pieces[5];
  Piece& piece = pieces[slot];
  const size_t bytes = size * sizeof(T) + 64;
  if (piece.bytes < bytes) {
    piece.memory.reset(new char[bytes]);
    piece.bytes = bytes;
  }
  const uintptr_t at = reinterpret_cast<uintptr_t>(piece.memory.get());
  return reinterpret_cast<T*>((at + 63) & ~uintptr_t{63});
}

}  // namespace
