// SPDX-License-Identifier: Apache-2.0
// The matrix products of linear attention, as register tiles of kRows x 2 vectors:
//
//   product        c[m][n] (+)= sum_l a(m, l) b[l][n]       a by rows, or by columns: a(m, l) =
//   a[l][m] product_lower  the same for m >= l only, so that no later row is touched, not even by a
//   zero
//
// Rows of b and c are whole vectors. A sum runs over l in order whatever the tile, so an entry has
// the same bits in any cut of the problem.
#pragma once

#include "tile.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

enum class By { kRows, kColumns };

template <class Acc>
ATTNEXT_INLINE constexpr int64_t whole_vectors(int64_t n) {
  return (n + Simd<Acc>::kLanes - 1) / Simd<Acc>::kLanes * Simd<Acc>::kLanes;
}

template <By kBy, int M, class Acc>
ATTNEXT_INLINE const Acc* tile_row(const Acc* a, int64_t lda, int m) {
  return kBy == By::kRows ? a + m * lda : a + m;
}

// acc += sum over l < depth; then, with kTriangle, over l in [depth, depth + m] for row m.
template <By kBy, bool kTriangle, class Acc, int M, int N>
ATTNEXT_INLINE void multiply_add(const Acc* a, int64_t lda, int64_t depth, const Acc* b,
                                 int64_t ldb, VecOf<Acc> (&acc)[M][N]) {
  constexpr int kLanes = Simd<Acc>::kLanes;
  const Acc* rows[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) rows[m] = tile_row<kBy, M>(a, lda, m);
  const int64_t step = kBy == By::kRows ? 1 : lda;
  int64_t at = 0;
  for (int64_t l = 0; l < depth; ++l, at += step, b += ldb) {
    VecOf<Acc> column[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) column[n] = load(b + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] += rows[m][at] * column[n];
    }
  }
  if constexpr (kTriangle) {
#pragma GCC unroll 16
    for (int l = 0; l < M; ++l, at += step, b += ldb) {
#pragma GCC unroll 16
      for (int m = l; m < M; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[m][n] += rows[m][at] * load(b + n * kLanes);
      }
    }
  }
}

template <By kBy, bool kTriangle, class Acc, int M, int N>
ATTNEXT_INLINE void product_tile(const Acc* a, int64_t lda, int64_t depth, const Acc* b,
                                 int64_t ldb, Acc* c, int64_t ldc, bool add) {
  constexpr int kLanes = Simd<Acc>::kLanes;
  VecOf<Acc> acc[M][N] = {};
  if (add) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] = load(c + m * ldc + n * kLanes);
    }
  }
  multiply_add<kBy, kTriangle, Acc, M, N>(a, lda, depth, b, ldb, acc);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(c + m * ldc + n * kLanes, acc[m][n]);
  }
}

template <By kBy, bool kTriangle, class Acc, int M, int N>
void product_rows(int64_t count, const Acc* a, int64_t lda, int64_t depth, const Acc* b,
                  int64_t ldb, Acc* c, int64_t ldc, bool add) {
  if constexpr (M > 0) {
    if (count == M) {
      return product_tile<kBy, kTriangle, Acc, M, N>(a, lda, depth, b, ldb, c, ldc, add);
    }
    product_rows<kBy, kTriangle, Acc, M - 1, N>(count, a, lda, depth, b, ldb, c, ldc, add);
  }
}

template <By kBy, bool kTriangle, class Acc, int N>
void product_columns(int64_t rows, const Acc* a, int64_t lda, int64_t depth, const Acc* b,
                     int64_t ldb, Acc* c, int64_t ldc, bool add) {
  for (int64_t m = 0; m < rows;) {  // of a triangle, `depth` is that of the first row
    const int64_t count = next_rows(rows - m, kRows);
    const Acc* from = kBy == By::kRows ? a + m * lda : a + m;
    product_rows<kBy, kTriangle, Acc, kRows, N>(count, from, lda, kTriangle ? depth + m : depth, b,
                                                ldb, c + m * ldc, ldc, add);
    m += count;
  }
}

template <By kBy, bool kTriangle = false, class Acc>
void product(int64_t rows, int64_t columns, int64_t depth, const Acc* a, int64_t lda, const Acc* b,
             int64_t ldb, Acc* c, int64_t ldc, bool add) {
  constexpr int64_t kLanes = Simd<Acc>::kLanes;
  int64_t n = 0;
  for (; n + kLanes < columns; n += 2 * kLanes) {
    product_columns<kBy, kTriangle, Acc, 2>(rows, a, lda, depth, b + n, ldb, c + n, ldc, add);
  }
  if (n < columns) {
    product_columns<kBy, kTriangle, Acc, 1>(rows, a, lda, depth, b + n, ldb, c + n, ldc, add);
  }
}

// Rows [first, first + rows) of a product with a lower triangle; `a` and `c` point at the first.
template <class Acc>
void product_lower(int64_t first, int64_t rows, int64_t columns, const Acc* a, int64_t lda,
                   const Acc* b, int64_t ldb, Acc* c, int64_t ldc, bool add) {
  product<By::kRows, true>(rows, columns, first, a, lda, b, ldb, c, ldc, add);
}

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
