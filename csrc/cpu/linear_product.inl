// SPDX-License-Identifier: Apache-2.0
// The matrix products of linear attention, as register tiles of kRows x 2 vectors:
//
//   product   c[m][n] = kept c[m][n] + taken sum_l a(m, l) b[l][n]
//             a by rows, or by columns: a(m, l) = a[l][m]
//   outputs   features times the state, and scores times values for m >= l only, so that no later
//             row is touched, not even by a zero
//
// Rows of b and c are whole vectors. A sum runs over l in order whatever the tile, so an entry has
// the same bits in any cut of the problem. Products of bf16 pairs are in linear_tiles.inl.
#pragma once

#include "linear_tiles.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

template <By kBy, class Acc>
ATTNEXT_INLINE const Acc* tile_row(const Acc* a, int64_t lda, int m) {
  return kBy == By::kRows ? a + m * lda : a + m;
}

// acc += sum over l < depth; then, with kTriangle, over the M numbers from there on, up to number m
// for row m.
template <By kBy, bool kTriangle, class Acc, int M, int N>
ATTNEXT_INLINE void multiply_add(const Acc* a, int64_t lda, int64_t depth, const Acc* b,
                                 int64_t ldb, VecOf<Acc> (&acc)[M][N]) {
  using C = Contraction<Acc>;
  constexpr int kLanes = Simd<Acc>::kLanes;
  const Acc* rows[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) rows[m] = tile_row<kBy>(a, lda, m);
  const int64_t step = kBy == By::kRows ? 1 : lda;
  int64_t at = 0;
  for (int64_t l = 0; l < depth; ++l, at += step, b += ldb) {
    VecOf<Acc> column[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) column[n] = load(b + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] = C::fma(acc[m][n], rows[m] + at, column[n]);
    }
  }
  if constexpr (kTriangle) {
#pragma GCC unroll 16
    for (int l = 0; l < M; ++l, at += step, b += ldb) {
#pragma GCC unroll 16
      for (int m = l; m < M; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
          acc[m][n] = C::fma(acc[m][n], rows[m] + at, load(b + n * kLanes));
        }
      }
    }
  }
}

// c = kept from + sums, or sums alone.
template <class Acc, int M, int N>
ATTNEXT_INLINE void blend(const VecOf<Acc> (&sums)[M][N], bool reads, Acc kept, const Acc* from,
                          Acc* c, int64_t ldc) {
  constexpr int kLanes = Simd<Acc>::kLanes;
  const auto each = [&](auto f) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
        store(c + m * ldc + n * kLanes, f(m * ldc + n * kLanes, sums[m][n]));
    }
  };
  if (reads) {
    each([&](int64_t at, VecOf<Acc> sum) { return load(from + at) * kept + sum; });
  } else {
    each([&](int64_t, VecOf<Acc> sum) { return sum; });
  }
}

template <By kBy, class Acc, int M, int N>
ATTNEXT_INLINE void product_tile(const Acc* a, int64_t lda, int64_t depth, const Acc* b,
                                 int64_t ldb, Acc* c, int64_t ldc, Mix<Acc> mix) {
  VecOf<Acc> acc[M][N] = {};
  multiply_add<kBy, false, Acc, M, N>(a, lda, depth, b, ldb, acc);
  if (mix.taken != 1) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] *= mix.taken;
    }
  }
  blend<Acc>(acc, mix.reads, mix.kept, mix.source(c), c, ldc);
  if (mix.also) blend<Acc>(acc, mix.also_reads, mix.kept, mix.also, mix.also, ldc);
}

template <By kBy, class Acc, int M, int N>
void product_rows(int64_t count, const Acc* a, int64_t lda, int64_t depth, const Acc* b,
                  int64_t ldb, Acc* c, int64_t ldc, Mix<Acc> mix) {
  if constexpr (M > 0) {
    if (count == M) return product_tile<kBy, Acc, M, N>(a, lda, depth, b, ldb, c, ldc, mix);
    product_rows<kBy, Acc, M - 1, N>(count, a, lda, depth, b, ldb, c, ldc, mix);
  }
}

template <By kBy, class Acc, int N>
void product_columns(int64_t rows, const Acc* a, int64_t lda, int64_t depth, const Acc* b,
                     int64_t ldb, Acc* c, int64_t ldc, Mix<Acc> mix, Ahead* ahead) {
  for (int64_t m = 0; m < rows;) {
    const int64_t count = next_rows(rows - m, kRows);
    product_rows<kBy, Acc, kRows, N>(count, tile_row<kBy>(a, lda, m), lda, depth, b, ldb,
                                     c + m * ldc, ldc, mix.at(m * ldc));
    if (ahead) ahead->start(1);
    m += count;
  }
}

// The tiles, about, that a product of so many rows and columns is made of, kBlock rows each.
template <class Acc, int64_t kBlock = kRows>
int64_t count_tiles(int64_t rows, int64_t columns) {
  constexpr int64_t kStrip = 2 * Simd<Acc>::kLanes;
  return (rows + kBlock - 1) / kBlock * ((columns + kStrip - 1) / kStrip);
}

template <By kBy, class Acc>
void product(int64_t rows, int64_t columns, int64_t depth, const Acc* a, int64_t lda, const Acc* b,
             int64_t ldb, Acc* c, int64_t ldc, Mix<Acc> mix, Ahead* ahead = nullptr) {
  constexpr int64_t kLanes = Simd<Acc>::kLanes;
  int64_t n = 0;
  for (; n + kLanes < columns; n += 2 * kLanes) {
    product_columns<kBy, Acc, 2>(rows, a, lda, depth, b + n, ldb, c + n, ldc, mix.at(n), ahead);
  }
  if (n < columns) {
    product_columns<kBy, Acc, 1>(rows, a, lda, depth, b + n, ldb, c + n, ldc, mix.at(n), ahead);
  }
}

template <By kBy, class Acc>
void product(int64_t rows, int64_t columns, int64_t depth, const Acc* a, int64_t lda, const Acc* b,
             int64_t ldb, Acc* c, int64_t ldc, bool add, Ahead* ahead = nullptr) {
  product<kBy>(rows, columns, depth, a, lda, b, ldb, c, ldc, Mix<Acc>{add}, ahead);
}

// ---- outputs of a chunk -------------------------------------------------------------------------

// Their terms: features of queries times the state, times a factor of the row's; and scores times
// values, of which a row has those up to its own.
template <class Acc>
struct OutputTerms {
  const Acc* feature;
  int64_t feature_ld, depth;
  const Acc* state;   // null: only scores times values
  const Acc* factor;  // null: 1
  const Acc* score;   // null: only features times the state
  int64_t score_ld;
  const Acc* value;
  int64_t ld;  // of states and values
  Acc scale;   // of the sum
};

// Rows from m and columns from n on; `c` points at the first.
template <By kBy, class Acc, int M, int N>
ATTNEXT_INLINE void output_tile(const OutputTerms<Acc>& x, int64_t m, int64_t n, Acc* c,
                                int64_t ldc) {
  constexpr int kLanes = Simd<Acc>::kLanes;
  VecOf<Acc> acc[M][N] = {};
  if (x.state) {
    multiply_add<kBy, false, Acc, M, N>(tile_row<kBy>(x.feature, x.feature_ld, m), x.feature_ld,
                                        x.depth, x.state + n, x.ld, acc);
    if (x.factor) {
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) acc[i][j] *= x.factor[m + i];
      }
    }
  }
  if (x.score) {
    multiply_add<By::kRows, true, Acc, M, N>(x.score + m * x.score_ld, x.score_ld, m, x.value + n,
                                             x.ld, acc);
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) store(c + i * ldc + j * kLanes, acc[i][j] * x.scale);
  }
}

template <By kBy, class Acc, int M, int N>
void output_rows(int64_t count, const OutputTerms<Acc>& x, int64_t m, int64_t n, Acc* c,
                 int64_t ldc) {
  if constexpr (M > 0) {
    if (count == M) return output_tile<kBy, Acc, M, N>(x, m, n, c, ldc);
    output_rows<kBy, Acc, M - 1, N>(count, x, m, n, c, ldc);
  }
}

template <By kBy, class Acc>
void outputs(int64_t rows, int64_t columns, const OutputTerms<Acc>& x, Acc* c, int64_t ldc,
             Ahead* ahead) {
  constexpr int64_t kLanes = Simd<Acc>::kLanes;
  for (int64_t n = 0; n < columns; n += 2 * kLanes) {
    for (int64_t m = 0; m < rows; m += kRows) {
      const int64_t count = min64(kRows, rows - m);
      Acc* const to = c + m * ldc + n;
      if (n + kLanes < columns) {
        output_rows<kBy, Acc, kRows, 2>(count, x, m, n, to, ldc);
      } else {
        output_rows<kBy, Acc, kRows, 1>(count, x, m, n, to, ldc);
      }
      ahead->start(1);
    }
  }
}

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
