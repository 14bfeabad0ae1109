// SPDX-License-Identifier: Apache-2.0
// The terms of linear attention's products, and those of bf16 pairs as products of tiles
// (matrix_tiles.inl).
#pragma once

#include "matrix_tiles.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

// How the left factor lies: a(m, l) = a[m][l] or a[l][m].
enum class By { kRows, kColumns };

template <class Acc>
ATTNEXT_INLINE constexpr int64_t whole_vectors(int64_t n) {
  return (n + Simd<Acc>::kLanes - 1) / Simd<Acc>::kLanes * Simd<Acc>::kLanes;
}

// What becomes of c: kept times what c holds, or what is at `from`, plus taken times the product.
// Nothing is read unless `reads`. The same becomes of `also`, a matrix like c, if there is one.
template <class Acc>
struct Mix {
  bool reads;
  Acc kept = 1, taken = 1;
  const Acc* from = nullptr;
  Acc* also = nullptr;
  bool also_reads = false;

  Mix at(int64_t offset) const {
    return {reads, kept, taken, moved(from, offset), moved(also, offset), also_reads};
  }
  const Acc* source(const Acc* c) const { return from ? from : c; }
  // For that other matrix.
  Mix of_also() const { return {also_reads, kept, taken}; }

 private:
  template <class P>
  static P* moved(P* p, int64_t offset) {
    return p ? p + offset : p;
  }
};

namespace tiles {

// Left factors of up to kSide rows, kSpan numbers each: where they lie, or as a copy.
struct LeftFactors {
  static constexpr int64_t kMost = 16;
  const void* at[kMost];
  int64_t stride[kMost];
  alignas(64) Pair room[kMost][kSide * kSide];

  // Of a[m][l] for m < rows and pairs l in [0, depth); what a tile has beyond them is 0, or
  // anything.
  void take(const Pair* a, int64_t lda, int64_t rows, int64_t depth) {
    for (int64_t l = 0; l < depth; l += kSide) {
      const int64_t k = l / kSide, there = min64(kSide, depth - l);
      if (rows >= kSide && there == kSide) {
        at[k] = a + l, stride[k] = 4 * lda;
        continue;
      }
      at[k] = room[k], stride[k] = 4 * kSide;
      memset(room[k], 0, sizeof(room[k]));
      for (int64_t m = 0; m < min64(rows, kSide); ++m) {
        memcpy(room[k] + m * kSide, a + m * lda + l, sizeof(Pair) * there);
      }
    }
  }
};

// Adds to the sums of M by N tiles (matrix_tiles.inl) the products of left factors, of which each
// has a tile of rows, with rows of pairs, from `depth` of which on there may be anything.
template <int M, int N>
ATTNEXT_INLINE void add_spans(const LeftFactors* left, int64_t depth, const Pair* b, int64_t ldb) {
  constexpr int64_t kWidth = N * kSide;
  const auto add = [&](int64_t k, const Pair* right, int64_t row) {
    load<4>(left[0].at[k], left[0].stride[k]);
    load<6>(right, row);
    dot<0, 4, 6>();
    if constexpr (N > 1) load<7>(right + kSide, row), dot<1, 4, 7>();
    if constexpr (M > 1) load<5>(left[1].at[k], left[1].stride[k]), dot<2, 5, 6>();
    if constexpr (M > 1 && N > 1) dot<3, 5, 7>();
  };
  int64_t l = 0;
  for (; l + kSide <= depth; l += kSide) add(l / kSide, b + l * ldb, 4 * ldb);
  if (l == depth) return;
  alignas(64) Pair rest[kSide * kWidth];
  for (int64_t i = 0; i < kSide; ++i) {
    if (l + i < depth) {
      memcpy(rest + i * kWidth, b + (l + i) * ldb, sizeof(Pair) * kWidth);
    } else {
      memset(rest + i * kWidth, 0, sizeof(Pair) * kWidth);
    }
  }
  add(l / kSide, rest, 4 * kWidth);
}

// c[m][n] of M tiles of rows and N of columns, and at most LeftFactors::kMost spans.
template <int M, int N>
void product_tiles(const LeftFactors* left, int64_t rows, int64_t depth, const Pair* b, int64_t ldb,
                   float* c, int64_t ldc, Mix<float> mix) {
  const bool whole = rows == M * kSide && mix.taken == 1 && (!mix.reads || mix.kept == 1);
  const auto tile_rows = [](float* x, int64_t ld, float*(&at)[M]) {
    for (int64_t m = 0; m < M; ++m) at[m] = x + m * kSide * ld;
  };
  float* at[M];
  if (whole && mix.reads) {
    tile_rows(const_cast<float*>(mix.source(c)), ldc, at);
    load_sums<M, N>(at, 4 * ldc);
  } else {
    zero_sums<M, N>();
  }
  add_spans<M, N>(left, depth, b, ldb);
  if (whole) {
    tile_rows(c, ldc, at);
    return store_sums<M, N>(at, 4 * ldc);
  }
  constexpr int64_t kWidth = N * kSide;
  alignas(64) float sums[M * kSide * kWidth];
  tile_rows(sums, kWidth, at);
  store_sums<M, N>(at, 4 * kWidth);
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < kWidth; n += kSide) {
      const int64_t here = m * ldc + n;
      VecOf<float> sum = cpu::ATTNEXT_ISA::load(sums + m * kWidth + n) * mix.taken;
      if (mix.reads) sum += cpu::ATTNEXT_ISA::load(mix.source(c) + here) * mix.kept;
      cpu::ATTNEXT_ISA::store(c + here, sum);
    }
  }
}

// f(rows, columns, first column), types of numbers of tiles for M and N, for all of `columns` in
// pairs of tiles.
template <class F>
ATTNEXT_INLINE void each_tiles(int64_t rows, int64_t columns, F f) {
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  const auto all = [&](auto m) {
    int64_t n = 0;
    for (; n + kSide < columns; n += 2 * kSide) f(m, Two{}, n);
    if (n < columns) f(m, One{}, n);
  };
  rows > kSide ? all(Two{}) : all(One{});
}

// Left factors of up to two tiles of rows.
inline void take_rows(LeftFactors (&left)[2], const Pair* a, int64_t lda, int64_t rows,
                      int64_t depth) {
  left[0].take(a, lda, min64(rows, kSide), depth);
  if (rows > kSide) left[1].take(a + kSide * lda, lda, rows - kSide, depth);
}

// The product of numbers' name (linear_product.inl), by rows, over `depth` pairs: kMost spans at
// most.
inline void product(int64_t rows, int64_t columns, int64_t depth, const Pair* a, int64_t lda,
                    const Pair* b, int64_t ldb, float* c, int64_t ldc, Mix<float> mix,
                    Ahead* ahead) {
  LeftFactors left[2];
  for (int64_t m = 0, count; m < rows; m += count) {
    // What is no whole tile has a way by itself, and is alone on it.
    count = min64(rows - m >= 2 * kSide ? 2 * kSide : kSide, rows - m);
    take_rows(left, a + m * lda, lda, count, depth);
    each_tiles(count, columns, [&](auto tall, auto wide, int64_t n) {
      constexpr int M = decltype(tall)::value, N = decltype(wide)::value;
      const Mix<float> here = mix.at(m * ldc + n);
      product_tiles<M, N>(left, count, depth, b + n, ldb, c + m * ldc + n, ldc, here);
      if (here.also) {
        product_tiles<M, N>(left, count, depth, b + n, ldb, here.also, ldc, here.of_also());
      }
      if (ahead) ahead->start(M);
    });
  }
}

// c = a b + weights x values, whatever is not null: rows of `weights` are 0 beyond their own
// number. Rows of c go up to a whole pair of tiles.
inline void outputs(int64_t rows, int64_t columns, int64_t depth, const Pair* a, int64_t lda,
                    const Pair* b, const Pair* weights, int64_t ldw, const Pair* values,
                    int64_t ldb, float* c, int64_t ldc, Ahead* ahead) {
  LeftFactors of_state[2], of_values[2];
  for (int64_t m = 0; m < rows; m += 2 * kSide) {
    const int64_t count = min64(2 * kSide, rows - m), seen = (m + count + 1) / 2;
    if (b) take_rows(of_state, a + m * lda, lda, count, depth);
    if (weights) take_rows(of_values, weights + m * ldw, ldw, count, seen);
    each_tiles(count, columns, [&](auto tall, auto wide, int64_t n) {
      constexpr int M = decltype(tall)::value, N = decltype(wide)::value;
      float* at[M];
      for (int64_t i = 0; i < M; ++i) at[i] = c + (m + i * kSide) * ldc + n;
      zero_sums<M, N>();
      if (b) add_spans<M, N>(of_state, depth, b + n, ldb);
      if (weights) add_spans<M, N>(of_values, seen, values + n, ldb);
      store_sums<M, N>(at, 4 * ldc);
      if (ahead) ahead->start(M);
    });
  }
}

}  // namespace tiles
}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
