// SPDX-License-Identifier: Apache-2.0
// A tile's queries and whatever else has a row for each of them: from the tensors' rows to the
// operands of products, and back. Included by window.inl.
#pragma once

#include <math.h>

#include "ready_keys.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

// `Keys` says which keys a tile walks: Boxes, or Lists.
template <class T, class Keys>
class QueryTile {
 public:
  using Plan = typename Keys::Plan;
  using Tile = typename Keys::Tile;
  using Walk = typename Keys::template Walk<T>;
  using Elem = typename ElemOf<T>::type;
  using Acc = typename Contraction<Elem>::Acc;
  using Vec = VecOf<Acc>;
  static constexpr int kLanes = Simd<Acc>::kLanes;
  static constexpr int kDepth = Contraction<Elem>::kDepth;
  static constexpr bool kInPlace = Same<T, Elem>::value;
  static constexpr bool kPairs = kDepth == 2;
  // Whether products are those of matrix_tiles.inl.
  static constexpr bool kTiles = ATTNEXT_MATRIX_TILES && kPairs;
  // Pairs hold T as it is, and weights are rounded to it; or a part of it each.
  static constexpr int kParts = kPairs ? kPartsOf<T> : 1;
  static constexpr bool kRounds = kPairs && kParts == 1;
  // Keys per block, at most: one softmax rescale per block; blocks that are widened first stay in
  // L1.
  static constexpr int64_t kBlock = kPairs ? 128 : kInPlace || Keys::kAreCopied ? 160 : 64;
  static constexpr int64_t kMost = kBlock / kRows * kRows;  // whole tiles of rows
  // Blocks that are kept for the heads that follow.
  static constexpr int64_t kKeptBlocks = 8;
  // Keys that tiles take together: what is made of them stays in L1.
  static constexpr int64_t kTogether = kBlock / kParts;
  // Accumulator rows are whole vectors, and what is contracted over dims whole tiles.
  static constexpr int64_t kPad = kTiles ? tiles::kSpan : kLanes;

  static int64_t padded(int64_t d) { return (d + kPad - 1) / kPad * kPad; }

  QueryTile(const WindowParams& params, const Plan& view, void* scratch)
      : p(params), plan(view), arena(scratch) {
    max_lanes = plan.vectors * kLanes;
    dp = padded(p.head_dim);
    dvp = padded(p.head_dim_v);
    const int64_t widest = max64(dp, dvp);
    tile.allocate(arena, plan, kBlock);
    zeros = arena.template take<T>(widest + kPad);
    rows = arena.template take<Acc>(max_lanes * widest);
    columns = arena.template take<Acc>(widest * max_lanes);
    qt = arena.template take<Elem>(kParts * dp / kDepth * max_lanes);
    if (scratch) {
      memset(zeros, 0, sizeof(T) * (widest + kPad));
      for (int lane = 0; lane < max_lanes; ++lane) scale[lane] = Acc(p.scale);
      plain_scale = split_scales();
    }
  }

  int64_t scratch_bytes() const { return arena.used(); }

  // Rows of the queries as what is contracted.
  int64_t part_of_lanes() const {
    return kTiles ? tiles::round_up(max_lanes, tiles::kSpan) / kDepth : max_lanes / kDepth;
  }

  // Queries of a tile are far apart in memory: a tile ahead, nobody waits for them.
  static void fetch_queries(const WindowParams& p, const Plan& plan, int64_t b, int64_t h,
                            const int64_t index[3]) {
    Tile next;
    next.place(plan, index, kLanes);
    fetch_rows(p.query, p.head_dim, next, b, h);
  }
  // Queues the rows of a tensor that a tile has.
  void look_ahead(const TensorRef& t, int64_t dim, const Tile& of, int64_t b, int64_t h,
                  bool write) {
    for (uint64_t rest = of.whole; rest; rest &= rest - 1) {
      const int lane = __builtin_ctzll(rest);
      ahead.add(static_cast<const T*>(t.data) + offset_of(t, of, lane, b, h),
                dim * static_cast<int64_t>(sizeof(T)), write);
    }
  }
  // Inlined, as whatever calls it for this alone: a call would be thought to be without effect,
  // and go.
  static ATTNEXT_INLINE void fetch_rows(const TensorRef& t, int64_t dim, const Tile& tile,
                                        int64_t b, int64_t h) {
    for (uint64_t rest = tile.whole; rest; rest &= rest - 1) {
      const int lane = __builtin_ctzll(rest);
      fetch(static_cast<const T*>(t.data) + offset_of(t, tile, lane, b, h), dim);
    }
  }

  static ATTNEXT_INLINE int64_t offset_of(const TensorRef& t, const Tile& tile, int lane, int64_t b,
                                          int64_t h) {
    const int64_t x[3] = {tile.query[0][lane], tile.query[1][lane], tile.query[2][lane]};
    return at(t, b, x, h + tile.head[lane]);
  }
  int64_t offset_of(const TensorRef& t, int lane, int64_t b, int64_t h) const {
    return offset_of(t, tile, lane, b, h);
  }

  // `rows`[lane][ld] = the tile's rows of a tensor, zero in dead lanes and in the padding.
  void load_rows(const TensorRef& t, int64_t dim, int64_t ld, int64_t b, int64_t h) {
    for (int lane = 0; lane < tile.lanes; ++lane) {
      Acc* dst = rows + lane * ld;
      if (!(tile.live >> lane & 1)) {
        memset(dst, 0, sizeof(Acc) * ld);
        continue;
      }
      const T* src = static_cast<const T*>(t.data) + offset_of(t, lane, b, h);
      int64_t d = 0;
      for (; d + kLanes <= dim; d += kLanes) store(dst + d, widen(src + d));
      for (; d < ld; d += kLanes) store(dst + d, widen_tail(src + d, dim - d));
    }
  }
  static ATTNEXT_INLINE Vec widen_tail(const T* src, int64_t n) {
    return widen_part<T, Acc>(src, n);
  }

  // Multiplies row `lane` by factor[lane].
  void scale_rows(int64_t ld, const Acc* factor) {
    for (int lane = 0; lane < tile.lanes; ++lane) {
      Acc* row = rows + lane * ld;
      for (int64_t d = 0; d < ld; d += kLanes) store(row + d, load(row + d) * factor[lane]);
    }
  }

  // The tile's rows of a tensor times factor[lane], where there is one, as dst[dim][lanes], the
  // operand the keys' rows are contracted with; zero in dead lanes and in the padding.
  template <class To>
  void pack_columns(const TensorRef& t, int64_t dim, int64_t ld, const Acc* factor, To* dst,
                    int64_t b, int64_t h) {
    constexpr int kStep = Contraction<To>::kDepth;
    const T* row[kMaxLanes];
    for (int lane = 0; lane < tile.lanes; ++lane) {
      row[lane] =
          tile.live >> lane & 1 ? static_cast<const T*>(t.data) + offset_of(t, lane, b, h) : zeros;
    }
    for (int l = 0; l < tile.lanes; l += kLanes) {
      for (int64_t d = 0; d < ld; d += kLanes) {
        Vec r[kLanes];
        if (d + kLanes <= dim) {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) r[i] = widen(row[l + i] + d);
        } else {
          for (int i = 0; i < kLanes; ++i) r[i] = widen_tail(row[l + i] + d, dim - d);
        }
        transpose_vectors<Acc>(r);
        if (factor) {
          for (int i = 0; i < kLanes; ++i) r[i] *= load(factor + l);
        }
        Acc* out = reinterpret_cast<Acc*>(dst) + d / kStep * tile.lanes + l;
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i += kStep) {
          Acc* const to = out + i / kStep * tile.lanes;
          if constexpr (kStep == 1) {
            store(to, r[i]);
          } else {
            pair_up(r[i], r[i + 1], to, ld / kStep * tile.lanes);
          }
        }
      }
    }
  }

  // Two rows of numbers as one of pairs, whose parts are as far apart as is said.
  static ATTNEXT_INLINE void pair_up(Vec even, Vec odd, Acc* to, int64_t apart) {
    if constexpr (kPairs && kParts > 1) {
      store_pairs(even, odd, to, apart);
    } else if constexpr (kPairs) {
      store(to, make_pairs(even, odd));
    }
  }
  // rows[lane][dim] -> dst, the operand that is contracted over lanes.
  void pack_lanes(int64_t ld, Elem* dst) {
    if constexpr (kPairs) {
      const int64_t part = part_of_lanes() * ld;
      for (int l = 0; l < tile.lanes; l += 2) {
        for (int64_t d = 0; d < ld; d += kLanes) {
          pair_up(load(rows + l * ld + d), load(rows + (l + 1) * ld + d),
                  reinterpret_cast<Acc*>(dst) + l / 2 * ld + d, part);
        }
      }
      const int64_t first = tile.lanes / 2, last = tiles::round_up(tile.lanes, tiles::kSpan) / 2;
      for (int i = 0; kTiles && i < kParts; ++i) {
        memset(dst + i * part + first * ld, 0, sizeof(Elem) * (last - first) * ld);
      }
    } else {
      memcpy(dst, rows, sizeof(Acc) * tile.lanes * ld);
    }
  }

  // dst[column][lanes] = each live lane's own row, and back. Whole vectors of columns.
  void take_up(Acc* const* src, int64_t num_columns, Acc* dst) const {
    each_block(num_columns, [&](int lane, int64_t c, Vec* r) {
      for (int i = 0; i < kLanes; ++i) {
        r[i] = tile.live >> (lane + i) & 1 ? load(src[lane + i] + c) : Vec{};
      }
      transpose_vectors<Acc>(r);
      for (int i = 0; i < kLanes; ++i) store(dst + (c + i) * tile.lanes + lane, r[i]);
    });
  }
  void lay_down(const Acc* src, int64_t num_columns, Acc* const* dst) const {
    each_block(num_columns, [&](int lane, int64_t c, Vec* r) {
      for (int i = 0; i < kLanes; ++i) r[i] = load(src + (c + i) * tile.lanes + lane);
      transpose_vectors<Acc>(r);
      for (int i = 0; i < kLanes; ++i) {
        if (tile.live >> (lane + i) & 1) store(dst[lane + i] + c, r[i]);
      }
    });
  }
  // ot[d][lanes] = ot * factor + rows[lane][d].
  void add_rows(int64_t ld, const Vec* factor) {
    each_block(ld, [&](int lane, int64_t c, Vec* r) {
      const Vec f = factor[lane / kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) r[i] = load(rows + (lane + i) * ld + c);
      transpose_vectors<Acc>(r);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        Acc* const to = ot + (c + i) * tile.lanes + lane;
        store(to, load(to) * f + r[i]);
      }
    });
  }
  template <class F>
  ATTNEXT_INLINE void each_block(int64_t num_columns, F f) const {
    Vec r[kLanes];
    for (int lane = 0; lane < tile.lanes; lane += kLanes) {
      for (int64_t c = 0; c < num_columns; c += kLanes) f(lane, c, r);
    }
  }

  // ot[dim][lanes] * factor[lanes] -> the tensor's rows, rounded once.
  void store_rows(const TensorRef& t, int64_t dim, const Acc* factor, int64_t b, int64_t h) {
    T* row[kMaxLanes];
    for (uint64_t rest = tile.live; rest; rest &= rest - 1) {
      const int lane = __builtin_ctzll(rest);
      row[lane] = static_cast<T*>(t.data) + offset_of(t, lane, b, h);
    }
    for (int l = 0; l < tile.lanes; l += kLanes) {
      const Vec scale_by = load(factor + l);
      for (int64_t d = 0; d < dim; d += kLanes) {
        Vec r[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) r[i] = load(ot + (d + i) * tile.lanes + l) * scale_by;
        transpose_vectors<Acc>(r);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          if (!(tile.live >> (l + i) & 1)) continue;
          if (d + kLanes <= dim) {
            narrow(row[l + i] + d, r[i]);
          } else {
            T tail[kLanes];
            narrow(tail, r[i]);
            memcpy(row[l + i] + d, tail, sizeof(T) * (dim - d));
          }
        }
      }
    }
  }

  static void write_row(const Acc* src, T* dst, int64_t dim) {
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) narrow(dst + d, load(src + d));
    if (d < dim) {
      T tail[kLanes];
      narrow(tail, load(src + d));
      memcpy(dst + d, tail, sizeof(T) * (dim - d));
    }
  }

  // Splits each lane's scale in `unit` and `sign`. A unit is what a score is multiplied with to be
  // a logit in base 2, or logit / softcap, positive and finite; what else a scale is (negative, 0,
  // NaN) goes into the query. False if that was anything.
  bool split_scales() {
    const double base = p.softcap > 0 ? 1 / p.softcap : kLog2E;
    bool untouched = true;
    for (int lane = 0; lane < max_lanes; ++lane) {
      const double exact = (p.row_scale.data ? double(scale[lane]) : p.scale) * base;
      const Acc magnitude = static_cast<Acc>(::fabs(exact));
      const bool apart = magnitude > 0 && magnitude * 0 == 0;
      unit[lane] = apart ? magnitude : Acc(1);
      sign[lane] = !apart ? static_cast<Acc>(exact) : exact < 0 ? Acc(-1) : Acc(1);
      untouched &= sign[lane] == 1;
    }
    return untouched;
  }
  void load_queries(int64_t b, int64_t h) {
    bool plain = plain_scale;
    if (p.row_scale.data) {
      for (int lane = 0; lane < max_lanes; ++lane) {
        scale[lane] = Acc(p.scale);
        if (tile.live >> lane & 1) {
          scale[lane] *=
              static_cast<const Acc*>(p.row_scale.data)[offset_of(p.row_scale, lane, b, h)];
        }
      }
      plain = split_scales();
    }
    pack_columns(p.query, p.head_dim, dp, plain ? nullptr : sign, qt, b, h);
  }

  // Whether `ot`[dim][lanes], or what is of its size, holds neither NaN nor inf.
  bool output_is_finite(int64_t dim) const { return is_finite(ot, dim); }
  bool is_finite(const Acc* x, int64_t dim) const {
    Vec bad{};
    for (int64_t i = 0; i < dim * tile.lanes; i += kLanes) bad += load(x + i) * Acc(0);
    for (int l = 0; l < kLanes; ++l) {
      if (bad[l] != 0) return false;
    }
    return true;
  }

  static float exp2_of(float x) { return ::exp2f(x); }
  static double exp2_of(double x) { return ::exp2(x); }
  static float log2_of(float x) { return ::log2f(x); }
  static double log2_of(double x) { return ::log2(x); }

  // ---- state -----------------------------------------------------------------------------------

  const WindowParams& p;
  const Plan& plan;
  Arena arena;
  Tile tile;
  Ahead ahead;
  int max_lanes;
  int64_t dp, dvp;          // head dims of operands
  bool plain_scale = true;  // every score only needs its unit
  T* zeros;
  Acc *rows, *columns;  // a tensor's rows of the tile, [lanes][dim] or [dim][lanes]
  Elem* qt;             // the queries, [dim][lanes]
  Acc* ot;              // what becomes of the tile, [dim][lanes]
  alignas(64) Acc scale[kMaxLanes];
  alignas(64) Acc unit[kMaxLanes];
  alignas(64) Acc sign[kMaxLanes];
};

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
