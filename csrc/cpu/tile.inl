// SPDX-License-Identifier: Apache-2.0
// The two products of attention, as register tiles. Lanes are queries (or head_dim in the key and
// value gradients); the rows of the other operand are read where they lie and broadcast, so that
// nothing is packed and a run of keys needs no alignment.
//
//   product       out[m][lanes]  = sum_c rows[m][c] * b[c][lanes]    (scores; dK, dV)
//   accumulate    o[d][lanes]   += sum_j rows[j][d] * p[j][lanes]    (output; dQ)
//
// A tile with hardly a query (decoding) would waste its lanes: row_scores and row_accumulate do one
// query at a time with keys and with head_dim in the lanes.
//
// kRows x 2 vectors of accumulators fill the register file. Where only one vector is active, tiles
// are taller, for a multiply-add's latency needs eight sums to hide. Tails are instantiated, not
// padded.
#pragma once

#include "simd.h"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

constexpr int kRows = ATTNEXT_TILE_ROWS;

template <class T, class U>
struct Same {
  static constexpr bool value = false;
};
template <class T>
struct Same<T, T> {
  static constexpr bool value = true;
};

// What products of a dtype contract over.
template <class T>
struct ElemOf {
  using type = float;
};
template <>
struct ElemOf<double> {
  using type = double;
};
#if ATTNEXT_BF16_DOT
template <>
struct ElemOf<bf16> {
  using type = Pair;
};
#endif
#if ATTNEXT_MATRIX_TILES
template <>
struct ElemOf<fp16> {
  using type = Pair;
};
#endif
// How many bf16 stand for a number where Pair is its element.
template <class T>
constexpr int kPartsOf = Same<T, fp16>::value ? 2 : 1;
template <class Elem>
using AccOf = typename Contraction<Elem>::Acc;

constexpr int most_score_rows(int vectors) { return vectors == 2 || kRows > 8 ? kRows : 8; }
constexpr int most_dims(int vectors) { return vectors == 2 ? kRows : 2 * kRows; }

// Rows of memory that will be wanted soon: they start loading a few at a time, between the tiles of
// products. All at once they would wait for each other, and the products with them.
class Ahead {
 public:
  void clear() { at_ = count_ = 0, all_ = 0; }
  // To be read, or (`write`) written: `count` rows that lie `step` bytes apart.
  void add(const void* row, int64_t bytes, bool write, int64_t step = 0, int64_t count = 1) {
    if (count_ == kMost || count <= 0) return;
    rows_[count_++] = {static_cast<const char*>(row), step, count, int32_t(bytes), write};
    all_ += count;
  }
  // Begun after each of `steps` products, all of them are.
  void pace(int64_t steps) { each_ = (all_ - 1) / max64(steps, 1) + 1; }
  // After `products` of them.
  ATTNEXT_INLINE void start(int64_t products) {
    if (at_ < count_) start_rows(products * each_);
  }
  void start_all() { start_rows(all_); }

 private:
  static constexpr int kMost = 512;  // eight tensors of 64 lanes, each a row by itself
  static constexpr int64_t kLine = 64;
  struct Rows {
    const char* at;
    int64_t step, count;
    int32_t bytes;
    bool write;
  };
  void start_rows(int64_t rows) {
    for (; rows > 0 && at_ < count_; --rows) {
      Rows& row = rows_[at_];
      for (int64_t c = 0; c < row.bytes; c += kLine) {
        if (row.write) {
          __builtin_prefetch(row.at + c, 1, 3);
        } else {
          __builtin_prefetch(row.at + c, 0, 2);
        }
        asm volatile("");  // a function that only prefetches is thought to be without effect
      }
      row.at += row.step;
      if (--row.count == 0) ++at_;
    }
  }

  Rows rows_[kMost];
  int at_ = 0, count_ = 0;
  int64_t all_ = 0, each_ = 1;
};

// Rows of the next tile. The last two tiles share what is left: a short one would be slow.
ATTNEXT_INLINE int64_t next_rows(int64_t left, int64_t most) {
  return left >= 2 * most ? most : left > most ? (left + 1) / 2 : left;
}

template <class Elem, int M, int N>
ATTNEXT_INLINE void product_tile(const Elem* const (&rows)[M], int64_t depth, const Elem* b,
                                 int64_t ld_b, VecOf<AccOf<Elem>> (&acc)[M][N]) {
  using C = Contraction<Elem>;
  constexpr int kLanes = Simd<AccOf<Elem>>::kLanes;
  for (int64_t c = 0; c < depth; ++c, b += ld_b) {
    VecOf<AccOf<Elem>> column[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) column[n] = C::load_elems(b + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) acc[m][n] = C::fma(acc[m][n], rows[m] + c, column[n]);
    }
  }
}

template <class Elem, int M, int N>
ATTNEXT_INLINE void score_tile(const Elem* const* keys, int64_t depth, const Elem* b, int64_t ld_b,
                               AccOf<Elem>* out, int64_t ld_out) {
  const Elem* rows[M];
  VecOf<AccOf<Elem>> acc[M][N] = {};
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) rows[m] = keys[m];
  product_tile<Elem, M, N>(rows, depth, b, ld_b, acc);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      store(out + m * ld_out + n * Simd<AccOf<Elem>>::kLanes, acc[m][n]);
    }
  }
}

template <class Elem, int M, int N>
void score_rows(int64_t count, const Elem* const* keys, int64_t depth, const Elem* b, int64_t ld_b,
                AccOf<Elem>* out, int64_t ld_out) {
  if constexpr (M > 0) {
    if (count == M) return score_tile<Elem, M, N>(keys, depth, b, ld_b, out, ld_out);
    score_rows<Elem, M - 1, N>(count, keys, depth, b, ld_b, out, ld_out);
  }
}

// out[j][lanes] for keys j in [begin, end), N vectors of lanes.
template <class Elem, int N>
void scores(const Elem* const* keys, int64_t begin, int64_t end, int64_t depth, const Elem* b,
            int64_t ld_b, AccOf<Elem>* out, int64_t ld_out, Ahead* ahead = nullptr) {
  for (int64_t j = begin; j < end;) {
    constexpr int kMost = most_score_rows(N);
    const int64_t rows = next_rows(end - j, kMost);
    score_rows<Elem, kMost, N>(rows, keys + j, depth, b, ld_b, out + j * ld_out, ld_out);
    if (ahead) ahead->start(1);
    j += rows;
  }
}

template <class Elem, int M, int N>
ATTNEXT_INLINE void accumulate_tile(const Elem* const* rows, int64_t begin, int64_t end, int64_t d,
                                    const Elem* p, int64_t ld_p, AccOf<Elem>* o, int64_t ld_o,
                                    const VecOf<AccOf<Elem>>* factor) {
  using C = Contraction<Elem>;
  using Acc = AccOf<Elem>;
  constexpr int kLanes = Simd<Acc>::kLanes;
  VecOf<Acc> acc[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) acc[m][n] = load(o + (d + m) * ld_o + n * kLanes) * factor[n];
  }
  for (int64_t j = begin; j < end; ++j) {
    const Elem* row = rows[j] + d;
    VecOf<Acc> weight[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) weight[n] = C::load_elems(p + j * ld_p + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) acc[m][n] = C::fma(acc[m][n], row + m, weight[n]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) store(o + (d + m) * ld_o + n * kLanes, acc[m][n]);
  }
}

template <class Elem, int M, int N>
void accumulate_rows(int64_t count, const Elem* const* rows, int64_t begin, int64_t end, int64_t d,
                     const Elem* p, int64_t ld_p, AccOf<Elem>* o, int64_t ld_o,
                     const VecOf<AccOf<Elem>>* factor) {
  if constexpr (M > 0) {
    if (count == M) {
      return accumulate_tile<Elem, M, N>(rows, begin, end, d, p, ld_p, o, ld_o, factor);
    }
    accumulate_rows<Elem, M - 1, N>(count, rows, begin, end, d, p, ld_p, o, ld_o, factor);
  }
}

// o[d][lanes] = o[d][lanes] * factor[lanes] + sum over rows [begin, end), for d < dim.
template <class Elem, int N>
void accumulate(const Elem* const* rows, int64_t begin, int64_t end, int64_t dim, const Elem* p,
                int64_t ld_p, AccOf<Elem>* o, int64_t ld_o, const VecOf<AccOf<Elem>>* factor) {
  for (int64_t d = 0; d < dim;) {
    constexpr int kMost = most_dims(N);
    const int64_t count = next_rows(dim - d, kMost);
    accumulate_rows<Elem, kMost, N>(count, rows, begin, end, d, p, ld_p, o, ld_o, factor);
    d += count;
  }
}

template <class Elem, int M, int N>
ATTNEXT_INLINE void outer_tile(const Elem* p, int64_t ld_p, int64_t depth, const Elem* b,
                               int64_t ld_b, AccOf<Elem>* const* out, int64_t d) {
  using Acc = AccOf<Elem>;
  constexpr int kLanes = Simd<Acc>::kLanes;
  const Elem* rows[M];
  VecOf<Acc> acc[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    rows[m] = p + m * ld_p;
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) acc[m][n] = VecOf<Acc>{};
  }
  product_tile<Elem, M, N>(rows, depth, b + d, ld_b, acc);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      Acc* const to = out[m] + d + n * kLanes;
      store(to, load(to) + acc[m][n]);  // one rounding of the sum so far, not one a lane
    }
  }
}

template <class Elem, int M>
void outer_rows(int64_t count, const Elem* p, int64_t ld_p, int64_t depth, const Elem* b,
                int64_t ld_b, AccOf<Elem>* const* out, int64_t dim) {
  if constexpr (M > 0) {
    if (count < M) return outer_rows<Elem, M - 1>(count, p, ld_p, depth, b, ld_b, out, dim);
    constexpr int64_t kLanes = Simd<AccOf<Elem>>::kLanes;
    int64_t d = 0;
    for (; d + kLanes < dim; d += 2 * kLanes) {
      outer_tile<Elem, M, 2>(p, ld_p, depth, b, ld_b, out, d);
    }
    if (d < dim) outer_tile<Elem, M, 1>(p, ld_p, depth, b, ld_b, out, d);
  }
}

// out[j][d] += sum over lanes l < depth of p[j][l] * b[l][d], for j < count; rows of `out` and `b`
// are padded to whole vectors. `out` lists the accumulator rows.
template <class Elem>
void outer(const Elem* p, int64_t ld_p, int64_t count, int64_t depth, const Elem* b, int64_t ld_b,
           AccOf<Elem>* const* out, int64_t dim) {
  for (int64_t j = 0; j < count;) {
    const int64_t rows = next_rows(count - j, kRows);
    outer_rows<Elem, kRows>(rows, p + j * ld_p, ld_p, depth, b, ld_b, out + j, dim);
    j += rows;
  }
}

// Scores of one query with G vectors of keys, transposed in registers: for the same bits that
// `scores` gives, a sum runs over its dims in order. Several vectors hide the latency of that.
template <class Elem, int G>
ATTNEXT_INLINE void row_scores_tile(const Elem* const* keys, int64_t count, int64_t depth,
                                    const Elem* q, AccOf<Elem>* out, int64_t ld_out) {
  using C = Contraction<Elem>;
  using Acc = AccOf<Elem>;
  constexpr int kLanes = Simd<Acc>::kLanes;
  VecOf<Acc> acc[G] = {};
  for (int64_t c = 0; c < depth; c += kLanes) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      VecOf<Acc> column[kLanes];
#pragma GCC unroll 16
      for (int m = 0; m < kLanes; ++m) {
        const Elem* row = keys[min64(g * kLanes + m, count - 1)] + c;
        if (c + kLanes <= depth) {
          column[m] = C::load_elems(row);
        } else {
          Elem tail[kLanes] = {};
          memcpy(tail, row, sizeof(Elem) * (depth - c));
          column[m] = C::load_elems(tail);
        }
      }
      transpose_vectors<Acc>(column);
#pragma GCC unroll 16
      for (int m = 0; m < kLanes; ++m) acc[g] = C::fma(acc[g], q + c + m, column[m]);
    }
  }
  for (int64_t j = 0; j < count; ++j) out[j * ld_out] = acc[j / kLanes][j % kLanes];
}

// out[j * ld_out] = sum_c keys[j][c] * q[c] for keys j in [begin, end). q is padded with zeros.
template <class Elem>
void row_scores(const Elem* const* keys, int64_t begin, int64_t end, int64_t depth, const Elem* q,
                AccOf<Elem>* out, int64_t ld_out) {
  constexpr int64_t kLanes = Simd<AccOf<Elem>>::kLanes;
  for (int64_t j = begin; j < end;) {
    const int64_t count = min64(end - j, 4 * kLanes);
    if (count > kLanes) {
      row_scores_tile<Elem, 4>(keys + j, count, depth, q, out + j * ld_out, ld_out);
    } else {
      row_scores_tile<Elem, 1>(keys + j, count, depth, q, out + j * ld_out, ld_out);
    }
    j += count;
  }
}

template <class Elem, int N>
ATTNEXT_INLINE void row_accumulate_tile(const Elem* const* rows, int64_t begin, int64_t end,
                                        int64_t d, const Elem* p, int64_t ld_p, AccOf<Elem>* o) {
  using C = Contraction<Elem>;
  constexpr int kLanes = Simd<AccOf<Elem>>::kLanes;
  VecOf<AccOf<Elem>> acc[N] = {};
  for (int64_t j = begin; j < end; ++j) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      acc[n] = C::fma(acc[n], p + j * ld_p, C::load_elems(rows[j] + d + n * kLanes));
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) store(o + d + n * kLanes, acc[n]);
}

// o[d] = sum over rows [begin, end) of p[j * ld_p] * rows[j][d] for d < dim.
template <class Elem>
void row_accumulate(const Elem* const* rows, int64_t begin, int64_t end, int64_t dim, const Elem* p,
                    int64_t ld_p, AccOf<Elem>* o) {
  constexpr int kLanes = Simd<AccOf<Elem>>::kLanes;
  int64_t d = 0;
  for (; d + 8 * kLanes <= dim; d += 8 * kLanes) {
    row_accumulate_tile<Elem, 8>(rows, begin, end, d, p, ld_p, o);
  }
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes) {
    row_accumulate_tile<Elem, 4>(rows, begin, end, d, p, ld_p, o);
  }
  for (; d + kLanes <= dim; d += kLanes) {
    row_accumulate_tile<Elem, 1>(rows, begin, end, d, p, ld_p, o);
  }
  for (; d < dim; ++d) {
    VecOf<AccOf<Elem>> acc{};
    for (int64_t j = begin; j < end; ++j) {
      Elem one[kLanes] = {rows[j][d]};
      acc = Contraction<Elem>::fma(acc, p + j * ld_p, Contraction<Elem>::load_elems(one));
    }
    o[d] = acc[0];
  }
}

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
