// SPDX-License-Identifier: Apache-2.0
// The matrix products of linear attention, as register tiles of kRows x 2 vectors:
//
//   product        c[m][n] = kept c[m][n] + taken sum_l a(m, l) b[l][n]
//                  a by rows, or by columns: a(m, l) = a[l][m]
//   product_lower  the same for m >= l only, so that no later row is touched, not even by a zero
//
// a and b are numbers or pairs of bf16 along l, of which there are half as many then. Rows of b and
// c are whole vectors. A sum runs over l in order whatever the tile, so an entry has the same bits
// in any cut of the problem.
#pragma once

#include "linear_tiles.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

template <By kBy, class Elem>
ATTNEXT_INLINE const Elem* tile_row(const Elem* a, int64_t lda, int m) {
  return kBy == By::kRows ? a + m * lda : a + m;
}

// The first of each pair, and nothing for the second.
ATTNEXT_INLINE VecOf<float> first_of_pairs(VecOf<float> pairs) {
  return (VecOf<float>)((IntOf<float>)pairs & 0xffff);
}

// acc += sum over l < depth; then, with kTriangle, over the M numbers from there on, up to number m
// for row m.
template <By kBy, bool kTriangle, class Elem, int M, int N>
ATTNEXT_INLINE void multiply_add(const Elem* a, int64_t lda, int64_t depth, const Elem* b,
                                 int64_t ldb, VecOf<AccOf<Elem>> (&acc)[M][N]) {
  using C = Contraction<Elem>;
  constexpr int kLanes = Simd<AccOf<Elem>>::kLanes;
  const Elem* rows[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) rows[m] = tile_row<kBy>(a, lda, m);
  const int64_t step = kBy == By::kRows ? 1 : lda;
  int64_t at = 0;
  for (int64_t l = 0; l < depth; ++l, at += step, b += ldb) {
    VecOf<AccOf<Elem>> column[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) column[n] = C::load_elems(b + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] = C::fma(acc[m][n], rows[m] + at, column[n]);
    }
  }
  if constexpr (kTriangle) {
#pragma GCC unroll 16
    for (int l = 0; l < M; l += C::kDepth, at += step, b += ldb) {
#pragma GCC unroll 16
      for (int m = l; m < M; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
          VecOf<AccOf<Elem>> column = C::load_elems(b + n * kLanes);
          if constexpr (C::kDepth == 2) {
            if (m == l) column = first_of_pairs(column);
          }
          acc[m][n] = C::fma(acc[m][n], rows[m] + at, column);
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

template <By kBy, bool kTriangle, class Elem, int M, int N>
ATTNEXT_INLINE void product_tile(const Elem* a, int64_t lda, int64_t depth, const Elem* b,
                                 int64_t ldb, AccOf<Elem>* c, int64_t ldc, Mix<AccOf<Elem>> mix) {
  VecOf<AccOf<Elem>> acc[M][N] = {};
  multiply_add<kBy, kTriangle, Elem, M, N>(a, lda, depth, b, ldb, acc);
  if (mix.taken != 1) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] *= mix.taken;
    }
  }
  blend<AccOf<Elem>>(acc, mix.reads, mix.kept, mix.source(c), c, ldc);
  if (mix.also) blend<AccOf<Elem>>(acc, mix.also_reads, mix.kept, mix.also, mix.also, ldc);
}

template <By kBy, bool kTriangle, class Elem, int M, int N>
void product_rows(int64_t count, const Elem* a, int64_t lda, int64_t depth, const Elem* b,
                  int64_t ldb, AccOf<Elem>* c, int64_t ldc, Mix<AccOf<Elem>> mix) {
  if constexpr (M > 0) {
    if (count == M) {
      return product_tile<kBy, kTriangle, Elem, M, N>(a, lda, depth, b, ldb, c, ldc, mix);
    }
    product_rows<kBy, kTriangle, Elem, M - 1, N>(count, a, lda, depth, b, ldb, c, ldc, mix);
  }
}

template <By kBy, bool kTriangle, class Elem, int N>
void product_columns(int64_t rows, const Elem* a, int64_t lda, int64_t depth, const Elem* b,
                     int64_t ldb, AccOf<Elem>* c, int64_t ldc, Mix<AccOf<Elem>> mix, Ahead* ahead) {
  for (int64_t m = 0; m < rows;) {
    const int64_t count = next_rows(rows - m, kRows);
    const Elem* from = kBy == By::kRows ? a + m * lda : a + m;
    product_rows<kBy, kTriangle, Elem, kRows, N>(count, from, lda, depth, b, ldb, c + m * ldc, ldc,
                                                 mix.at(m * ldc));
    if (ahead) ahead->start(1);
    m += count;
  }
}

// Whether products of these elements are those of tiles, and the rows of a product at a time.
template <class Elem>
constexpr bool kInTiles = ATTNEXT_MATRIX_TILES && Contraction<Elem>::kDepth == 2;
template <class Elem>
constexpr int64_t kRowBlock = kInTiles<Elem> ? tiles::kSide : kRows;

// The tiles, about, that a product of so many rows and columns is made of.
template <class Elem>
int64_t count_tiles(int64_t rows, int64_t columns) {
  constexpr int64_t kBlock = kRowBlock<Elem>, kStrip = 2 * Simd<AccOf<Elem>>::kLanes;
  return (rows + kBlock - 1) / kBlock * ((columns + kStrip - 1) / kStrip);
}

// `depth` counts elements: pairs, if they are pairs.
template <By kBy, bool kTriangle, class Elem>
void product(int64_t rows, int64_t columns, int64_t depth, const Elem* a, int64_t lda,
             const Elem* b, int64_t ldb, AccOf<Elem>* c, int64_t ldc, Mix<AccOf<Elem>> mix,
             Ahead* ahead = nullptr) {
  if constexpr (kInTiles<Elem> && !kTriangle) {
    return tiles::product<kBy>(rows, columns, depth, a, lda, b, ldb, c, ldc, mix, ahead);
  }
  constexpr int64_t kLanes = Simd<AccOf<Elem>>::kLanes;
  int64_t n = 0;
  for (; n + kLanes < columns; n += 2 * kLanes) {
    product_columns<kBy, kTriangle, Elem, 2>(rows, a, lda, depth, b + n, ldb, c + n, ldc, mix.at(n),
                                             ahead);
  }
  if (n < columns) {
    product_columns<kBy, kTriangle, Elem, 1>(rows, a, lda, depth, b + n, ldb, c + n, ldc, mix.at(n),
                                             ahead);
  }
}

template <By kBy, class Elem>
void product(int64_t rows, int64_t columns, int64_t depth, const Elem* a, int64_t lda,
             const Elem* b, int64_t ldb, AccOf<Elem>* c, int64_t ldc, bool add,
             Ahead* ahead = nullptr) {
  product<kBy, false>(rows, columns, depth, a, lda, b, ldb, c, ldc, Mix<AccOf<Elem>>{add}, ahead);
}

// Rows [first, first + rows) of a product with a lower triangle in tiles, kRowBlock of them at
// most, of which `first` is a multiple. `a` and `c` point at the first.
template <class Elem>
void product_lower(int64_t first, int64_t rows, int64_t columns, const Elem* a, int64_t lda,
                   const Elem* b, int64_t ldb, float* c, int64_t ldc, Mix<float> mix,
                   Ahead* ahead) {
  // All of the block's columns, and if a later row may have been touched, once more without.
  constexpr int64_t kLanes = Simd<float>::kLanes, kStrip = 2 * kLanes;
  const int64_t depth = (first + rows + 1) / 2;
  alignas(64) float sums[tiles::kSide * kStrip];
  for (int64_t n = 0; n < columns; n += kStrip) {
    const int64_t strip = min64(kStrip, columns - n);
    tiles::product<By::kRows>(rows, strip, depth, a, lda, b + n, ldb, sums, kStrip,
                              Mix<float>{false}, ahead);
    VecOf<float> bad{};
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t i = 0; i < strip; i += kLanes) bad += load(sums + m * kStrip + i) * 0.0f;
    }
    bool finite = true;
    for (int64_t i = 0; i < kLanes; ++i) finite &= bad[i] == 0;
    if (!finite) {
      for (int64_t m = 0; m < rows; m += kRows) {
        product<By::kRows, true>(min64(kRows, rows - m), strip, (first + m) / 2, a + m * lda, lda,
                                 b + n, ldb, c + m * ldc + n, ldc, mix);
      }
      continue;
    }
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t i = 0; i < strip; i += kLanes) {
        float* const to = c + m * ldc + n + i;
        const VecOf<float> sum = load(sums + m * kStrip + i) * mix.taken;
        store(to, mix.reads ? load(to) * mix.kept + sum : sum);
      }
    }
  }
}

// ---- outputs of a chunk -------------------------------------------------------------------------

// Their terms: features of queries times the state, times a factor of the row's; and scores times
// values, of which a row has those up to its own. Beyond them scores are 0 if they are of pairs.
template <class Elem>
struct OutputTerms {
  const Elem* feature;
  int64_t feature_ld, depth;  // elements
  const Elem* state;          // null: only scores times values
  const AccOf<Elem>* factor;  // null: 1
  const Elem* score;          // null: only features times the state
  int64_t score_ld;
  const Elem* value;
  int64_t ld;                   // of states and values
  const AccOf<Elem>* constant;  // null: 0
  AccOf<Elem> scale;            // of the sum
};

// Rows from m and columns from n on; `c` points at the first.
template <By kBy, class Elem, int M, int N>
ATTNEXT_INLINE void output_tile(const OutputTerms<Elem>& x, int64_t m, int64_t n, AccOf<Elem>* c,
                                int64_t ldc) {
  constexpr int kLanes = Simd<AccOf<Elem>>::kLanes;
  VecOf<AccOf<Elem>> acc[M][N] = {};
  if (x.state) {
    multiply_add<kBy, false, Elem, M, N>(tile_row<kBy>(x.feature, x.feature_ld, m), x.feature_ld,
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
    multiply_add<By::kRows, true, Elem, M, N>(x.score + m * x.score_ld, x.score_ld,
                                              m / Contraction<Elem>::kDepth, x.value + n, x.ld,
                                              acc);
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      if (x.constant) acc[i][j] += load(x.constant + (m + i) * x.ld + n + j * kLanes);
      store(c + i * ldc + j * kLanes, acc[i][j] * x.scale);
    }
  }
}

template <By kBy, class Elem, int M, int N>
void output_rows(int64_t count, const OutputTerms<Elem>& x, int64_t m, int64_t n, AccOf<Elem>* c,
                 int64_t ldc) {
  if constexpr (M > 0) {
    if (count == M) return output_tile<kBy, Elem, M, N>(x, m, n, c, ldc);
    output_rows<kBy, Elem, M - 1, N>(count, x, m, n, c, ldc);
  }
}

template <By kBy, class Elem>
void outputs(int64_t rows, int64_t columns, const OutputTerms<Elem>& x, AccOf<Elem>* c, int64_t ldc,
             Ahead* ahead) {
  using Acc = AccOf<Elem>;
  constexpr int64_t kLanes = Simd<Acc>::kLanes;
  if constexpr (kInTiles<Elem>) {
    if (x.state) {
      product<kBy>(rows, columns, x.depth, x.feature, x.feature_ld, x.state, x.ld, c, ldc, false,
                   ahead);
    }
    for (int64_t m = 0; m < rows; ++m) {
      const Acc factor = (x.factor ? x.factor[m] : Acc(1)) * x.scale;
      for (int64_t n = 0; (!x.state || factor != 1) && n < columns; n += kLanes) {
        store(c + m * ldc + n, x.state ? load(c + m * ldc + n) * factor : VecOf<Acc>{});
      }
    }
    for (int64_t m = 0; x.score && m < rows; m += kRowBlock<Elem>) {
      product_lower(m, min64(kRowBlock<Elem>, rows - m), columns, x.score + m * x.score_ld,
                    x.score_ld, x.value, x.ld, c + m * ldc, ldc, Mix<Acc>{true, 1, x.scale}, ahead);
    }
    for (int64_t m = 0; x.constant && m < rows; ++m) {
      for (int64_t n = 0; n < columns; n += kLanes) {
        Acc* const to = c + m * ldc + n;
        store(to, load(to) + load(x.constant + m * x.ld + n) * x.scale);
      }
    }
    return;
  }
  for (int64_t n = 0; n < columns; n += 2 * kLanes) {
    for (int64_t m = 0; m < rows; m += kRows) {
      const int64_t count = min64(kRows, rows - m);
      Acc* const to = c + m * ldc + n;
      if (n + kLanes < columns) {
        output_rows<kBy, Elem, kRows, 2>(count, x, m, n, to, ldc);
      } else {
        output_rows<kBy, Elem, kRows, 1>(count, x, m, n, to, ldc);
      }
      ahead->start(1);
    }
  }
}

// ---- operands: numbers as they are, or pairs of bf16
// ---------------------------------------------

template <class Elem>
ATTNEXT_INLINE constexpr int64_t elements(int64_t numbers) {
  return (numbers + Contraction<Elem>::kDepth - 1) / Contraction<Elem>::kDepth;
}

// [rows][ld] to be contracted over rows: [elements(rows)][ld], in `room` if it is not x itself.
template <class Elem>
ATTNEXT_INLINE const Elem* along_rows(const AccOf<Elem>* x, int64_t rows, int64_t ld, int64_t width,
                                      Elem* room) {
  if constexpr (Contraction<Elem>::kDepth == 1) {
    return x;
  } else {
    constexpr int64_t kLanes = Simd<float>::kLanes;
    for (int64_t r = 0; r < rows; r += 2) {
      const float *even = x + r * ld, *odd = even + (r + 1 < rows ? ld : 0);
      float* to = reinterpret_cast<float*>(room + r / 2 * ld);
      for (int64_t c = 0; c < width; c += kLanes) {
        const VecOf<float> second = load(odd + c);
        store(to + c, make_pairs(load(even + c), r + 1 < rows ? second : VecOf<float>{}));
      }
    }
    return room;
  }
}

// [rows][ld] to be contracted over lanes: [rows][elements(ld)].
template <class Elem>
ATTNEXT_INLINE const Elem* along_lanes(const AccOf<Elem>* x, int64_t rows, int64_t ld,
                                       int64_t width, Elem* room) {
  if constexpr (Contraction<Elem>::kDepth == 1) {
    return x;
  } else {
    constexpr int64_t kLanes = Simd<float>::kLanes;
    bf16* const to = reinterpret_cast<bf16*>(room);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < width; c += kLanes) {
        narrow_quickly(to + r * ld + c, load(x + r * ld + c));
      }
    }
    return room;
  }
}

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
