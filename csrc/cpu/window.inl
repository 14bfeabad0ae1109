// SPDX-License-Identifier: Apache-2.0
// Window attention, one tile at a time: FlashAttention's online softmax (arXiv 2205.14135) with
// queries in the lanes. Included by each ISA unit. Here is what both passes share: scratch,
// queries, blocks of keys and their logits.
//
// Forward, per block of keys:   1 walk   2 scores S = K Q'   3 modify and mask   4 softmax
//                               5 output O += V' P
// Backward, per block of keys:  1 walk   2 S and dP = V dO'   3 P and dS   4 dQ += K' dS
//                               5 dV += P dO, dK += dS Q
// Logits live in base 2. Scores are those of the queries as they are, exact products even of bf16;
// the scale and log2(e) multiply them in the softmax, where a fused multiply-add costs what a
// subtraction did.
#pragma once

#include <math.h>

#include "keywalk.inl"
#include "matrix_tiles.inl"
#include "window.h"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

// `Keys` says which keys a tile walks: Boxes, or Lists.
template <class T, class Keys>
class Window {
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
  // Keys per block, at most: one softmax rescale per block; blocks that are widened first stay in
  // L1.
  static constexpr int64_t kBlock = kInPlace ? 160 : kPairs ? 128 : 64;
  static constexpr int64_t kMost = kBlock / kRows * kRows;  // whole tiles of rows
  // Blocks that are kept for the heads that follow.
  static constexpr int64_t kKeptBlocks = 8;
  // Accumulator rows are whole vectors, and what is contracted over dims whole tiles.
  static constexpr int64_t kPad = kTiles ? tiles::kSpan : kLanes;

  static int64_t padded(int64_t d) { return (d + kPad - 1) / kPad * kPad; }

  // ---- scratch ---------------------------------------------------------------------------------

  Window(const WindowParams& params, const Plan& view, void* scratch, bool backward)
      : p(params), plan(view), arena(scratch) {
    max_lanes = plan.vectors * kLanes;
    dp = padded(p.head_dim);
    dvp = padded(p.head_dim_v);
    tile.allocate(arena, plan, kBlock);
    walk_mask = arena.template take<uint64_t>(kBlock);
    for (int64_t k = 0; k < (Keys::kHeadsWalkAlike && !backward ? kKeptBlocks : 1); ++k) {
      blocks[k].key = arena.template take<const T*>(kBlock);
      blocks[k].value = arena.template take<const T*>(kBlock);
      blocks[k].mask = arena.template take<uint64_t>(kBlock);
      blocks[k].bias = arena.template take<int64_t>(kBlock);
      blocks[k].fresh = arena.template take<bool>(kBlock);
      blocks[k].landmark_begin = arena.template take<int64_t>(kBlock);
      blocks[k].landmark_at = arena.template take<int64_t>(kBlock);
      blocks[k].row = arena.template take<int64_t>(backward ? kBlock : 0);
    }
    zeros = arena.template take<T>(max64(dp, dvp) + kPad);
    no_bias = arena.template take<Acc>(kLanes);
    key_rows = arena.template take<const Elem*>(kBlock);
    value_rows = arena.template take<const Elem*>(kBlock);
    if (!kInPlace) {
      staged_key = arena.template take<Elem>(kBlock * dp);
      staged_value = arena.template take<Elem>(kBlock * dvp);
    }
    const int64_t widest = max64(dp, dvp);
    rows = arena.template take<Acc>(max_lanes * widest);
    columns = arena.template take<Acc>(widest * max_lanes);
    qt = arena.template take<Elem>(dp * max_lanes);
    q_row = arena.template take<Elem>(dp);
    row_out = arena.template take<Acc>(dvp);
    s = arena.template take<Acc>(kBlock * max_lanes);
    if (kPairs) pair_s = arena.template take<Elem>(kBlock / 2 * max_lanes);
    if (kTiles) {
      turned = arena.template take<bf16>(kBlock * max_lanes);
      key_groups = arena.template take<tiles::RowGroup>(kBlock / tiles::kSide + 1);
      value_groups = arena.template take<tiles::RowGroup>(kBlock / tiles::kSide + 1);
    }
    ot = arena.template take<Acc>((backward ? widest : dvp) * max_lanes);
    if (backward) {
      dot_t = arena.template take<Elem>(dvp * max_lanes);
      q_rows = arena.template take<Elem>(max_lanes * dp);
      do_rows = arena.template take<Elem>(max_lanes * dvp);
      ds = arena.template take<Acc>(kBlock * max_lanes);
      if (kPairs) {
        lane_p = arena.template take<Elem>(kBlock * max_lanes);
        lane_ds = arena.template take<Elem>(kBlock * max_lanes);
      }
      if (p.softcap > 0) slope = arena.template take<Acc>(kBlock * max_lanes);
      if (p.drow_scale.data) raw = arena.template take<Acc>(kBlock * max_lanes);
      dk_rows = arena.template take<Acc*>(kBlock);
      dv_rows = arena.template take<Acc*>(kBlock);
    }
    if (scratch) {
      memset(zeros, 0, sizeof(T) * (max64(dp, dvp) + kPad));
      memset(no_bias, 0, sizeof(Acc) * kLanes);
      for (int lane = 0; lane < max_lanes; ++lane) scale[lane] = Acc(p.scale);
      plain_scale = split_scales();
    }
  }

  int64_t scratch_bytes() const { return arena.used(); }

  // ---- queries ---------------------------------------------------------------------------------

  void start_tile(const int64_t index[3]) {
    tile.init(plan, index, kLanes, p.extra_keys);
    tile_is_placed();
  }
  void tile_is_placed() {
    // A query that is redone alone must come out with the same bits.
    sparse = !kTiles && __builtin_popcountll(tile.whole) <= kFewQueries;
    kept = 0;
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
  // The products of scores of the tile's walk, `times` as many.
  int64_t products(int times) const {
    return times * tile.total * ((tile.vectors + 1) / 2) / (kTiles ? tiles::kSide : kRows);
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
    T tail[kLanes] = {};
    if (n > 0) memcpy(tail, src, sizeof(T) * n);
    return widen(tail);
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
          Vec x = r[i];
          if constexpr (kStep == 2) x = make_pairs(r[i], r[i + 1]);
          store(out + i / kStep * tile.lanes, x);
        }
      }
    }
  }

  // rows[lane][dim] -> dst, the operand that is contracted over lanes.
  void pack_lanes(int64_t ld, Elem* dst) {
    if constexpr (kPairs) {
      for (int l = 0; l < tile.lanes; l += 2) {
        for (int64_t d = 0; d < ld; d += kLanes) {
          store(reinterpret_cast<Acc*>(dst) + l / 2 * ld + d,
                make_pairs(load(rows + l * ld + d), load(rows + (l + 1) * ld + d)));
        }
      }
      if (kTiles) {
        const int64_t first = tile.lanes / 2, last = tiles::round_up(tile.lanes, tiles::kSpan) / 2;
        memset(dst + first * ld, 0, sizeof(Elem) * (last - first) * ld);
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
  // ot[d][lanes] = ot * factor + rows[lane][d]; without `factor`, all 1.
  void add_rows(int64_t ld, const Vec* factor) {
    each_block(ld, [&](int lane, int64_t c, Vec* r) {
      const Vec f = factor ? factor[lane / kLanes] : broadcast(Acc(1));
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

  // ---- a block of keys -------------------------------------------------------------------------

  bool next_block(const Walk& walk, int64_t* from, int64_t to, bool backward) {
    do {
      if (*from >= to) return false;
      block = blocks[kept];
      // What is left in blocks of about the same size: a short one costs nearly as much.
      int64_t keys = kBlock;
      if (Keys::kHeadsWalkAlike) {
        const int64_t left = to - *from, count = (left + kMost - 1) / kMost;
        keys = ((left + count - 1) / count + kRows - 1) / kRows * kRows;
      }
      *from = walk.fill(*from, to, keys, &block);  // an even number: an odd count has room
    } while (block.count == 0);
    if (kPairs) {
      if (block.count % 2) {  // pairs of keys: a last one that nobody attends
        const int64_t j = block.count++;
        block.key[j] = block.value[j] = zeros;
        block.mask[j] = 0;
        block.bias[j] = kNoBias;
        block.fresh[j] = false;
        if (walk.local) block.row[j] = walk.local->dump_row;
        block.masked = true;
      }
      for (int v = 0; v < tile.vectors; ++v) {
        block.lo[v] &= ~int64_t(1);
        block.hi[v] = (block.hi[v] + 1) & ~int64_t(1);
      }
    }
    stage_block(backward);
    return true;
  }
  void stage_block(bool backward) {
    if (kTiles) {
      line_up(block.key, p.head_dim, dp, staged_key, key_groups);
      if (backward) {
        line_up(block.value, p.head_dim_v, dvp, staged_value, value_groups);
      } else {
        interleave(block.value, p.head_dim_v, dvp, staged_value, value_rows);
      }
      return;
    }
    stage(block.key, p.head_dim, dp, staged_key, key_rows, true);
    stage(block.value, p.head_dim_v, dvp, staged_value, value_rows, backward);
  }

  // Makes `out` rows that the products can broadcast from. As the operand of `scores` a row keeps
  // its pairs of dims; as the operand of `accumulate` two rows become one of pairs of keys.
  void stage(const T** src, int64_t dim, int64_t ld, Elem* staged, const Elem** out, bool by_dim) {
    if constexpr (kInPlace) {
      memcpy(out, src, sizeof(*out) * block.count);
    } else if constexpr (kPairs) {
      if (!by_dim) return interleave(src, dim, ld, staged, out);
      for (int64_t j = 0; j < block.count; ++j) {
        if (dim % 2) {
          memcpy(staged + j * ld, src[j], sizeof(T) * dim);
          reinterpret_cast<T*>(staged + j * ld)[dim] = T{};
          out[j] = staged + j * ld;
        } else {
          out[j] = reinterpret_cast<const Elem*>(src[j]);
        }
      }
    } else {
      for (int64_t j = 0; j < block.count; ++j) {
        Acc* dst = staged + j * ld;
        int64_t d = 0;
        for (; d + kLanes <= dim; d += kLanes) store(dst + d, widen(src[j] + d));
        if (d < dim) store(dst + d, widen_tail(src[j] + d, dim - d));
        out[j] = dst;
      }
    }
  }
  // Rows of ld numbers in groups that are one step apart: where they lie, if they do, or copied.
  void line_up(const T** src, int64_t dim, int64_t ld, Elem* staged, tiles::RowGroup* out) {
    constexpr int64_t kSide = tiles::kSide;
    T* to = reinterpret_cast<T*>(staged);
    for (int64_t j = 0; j < block.count; j += kSide, ++out, to += kSide * ld) {
      const int64_t count = min64(kSide, block.count - j);
      const int64_t step =
          reinterpret_cast<intptr_t>(src[j + (count > 1)]) - reinterpret_cast<intptr_t>(src[j]);
      bool in_place = dim == ld && count == kSide;
      for (int64_t i = 1; in_place && i < kSide; ++i) {
        in_place = reinterpret_cast<intptr_t>(src[j + i]) ==
                   reinterpret_cast<intptr_t>(src[j + i - 1]) + step;
      }
      if (in_place) {
        *out = {reinterpret_cast<const char*>(src[j]), step};
        continue;
      }
      *out = {reinterpret_cast<const char*>(to), static_cast<int64_t>(sizeof(T)) * ld};
      memset(to, 0, sizeof(T) * kSide * ld);
      for (int64_t i = 0; i < count; ++i) memcpy(to + i * ld, src[j + i], sizeof(T) * dim);
    }
  }
  void interleave(const T** src, int64_t dim, int64_t ld, Elem* staged, const Elem** out) {
    if constexpr (kPairs) {
      if (kTiles) {
        const int64_t count = block.count / 2;
        const int64_t all = tiles::round_up(block.count, tiles::kSpan) / 2;
        memset(staged + count * ld, 0, sizeof(Elem) * (all - count) * ld);
      }
      for (int64_t j = 0; j < block.count; j += 2) {
        Acc* dst = reinterpret_cast<Acc*>(staged + j / 2 * ld);
        int64_t d = 0;
        for (; d + kLanes <= dim; d += kLanes) {
          store(dst + d, join(widen(src[j] + d), widen(src[j + 1] + d)));
        }
        for (; d < (kTiles ? ld : dim); d += kLanes) {
          store(dst + d,
                join(widen_tail(src[j] + d, dim - d), widen_tail(src[j + 1] + d, dim - d)));
        }
        out[j / 2] = staged + j / 2 * ld;
      }
    }
  }
  // Numbers that came from bf16 go back without rounding.
  static ATTNEXT_INLINE VecOf<float> join(VecOf<float> even, VecOf<float> odd) {
    typedef uint32_t U __attribute__((vector_size(ATTNEXT_VECTOR_BYTES)));
    return (VecOf<float>)(((U)even >> 16) | ((U)odd & 0xffff0000u));
  }

  // Calls f(first vector, number of vectors, begin, end) so that together the calls cover each
  // vector's active keys, two vectors at a time where both are active.
  template <class F>
  ATTNEXT_INLINE void for_ranges(F f) const {
    for (int v = 0; v < tile.vectors; v += 2) {
      const int64_t lo = block.lo[v], hi = block.hi[v];
      if (v + 1 == tile.vectors) {
        if (lo < hi) f(v, 1, lo, hi);
        return;
      }
      const int64_t lo1 = block.lo[v + 1], hi1 = block.hi[v + 1];
      const int64_t both_lo = max64(lo, lo1), both_hi = min64(hi, hi1);
      if (both_lo >= both_hi) {
        if (lo < hi) f(v, 1, lo, hi);
        if (lo1 < hi1) f(v + 1, 1, lo1, hi1);
        continue;
      }
      if (lo < both_lo) f(v, 1, lo, both_lo);
      if (lo1 < both_lo) f(v + 1, 1, lo1, both_lo);
      f(v, 2, both_lo, both_hi);
      if (both_hi < hi) f(v, 1, both_hi, hi);
      if (both_hi < hi1) f(v + 1, 1, both_hi, hi1);
    }
  }

  // The active keys of two vectors, or of one that is the last, in whole tiles of `size` keys.
  template <class F>
  ATTNEXT_INLINE void for_tiles(int64_t size, F f) const {
    for (int v = 0; v < tile.vectors; v += 2) {
      const bool two = v + 1 < tile.vectors;
      int64_t lo = block.lo[v], hi = block.hi[v];
      if (two && (lo >= hi || block.lo[v + 1] < block.hi[v + 1])) {
        lo = lo < hi ? min64(lo, block.lo[v + 1]) : block.lo[v + 1];
        hi = max64(hi, block.hi[v + 1]);
      }
      if (lo < hi) f(v, two, lo / size * size, tiles::round_up(hi, size));
    }
  }

  void block_scores(const Elem* const* keys, int64_t dim, const Elem* columns_in, Acc* out) {
    if constexpr (kTiles) {
      const tiles::RowGroup* const groups = keys == key_rows ? key_groups : value_groups;
      return for_tiles(tiles::kSide, [&](int v, bool two, int64_t begin, int64_t end) {
        const auto products = two ? tiles::scores<true> : tiles::scores<false>;
        products(groups, begin / tiles::kSide, end / tiles::kSide, padded(dim),
                 columns_in + v * kLanes, out + v * kLanes, tile.lanes);
        ahead.start((end - begin) / tiles::kSide);
      });
    }
    const int64_t depth = (dim + kDepth - 1) / kDepth;
    const int ld = tile.lanes;
    for_ranges([&](int v, int n, int64_t begin, int64_t end) {
      const Elem* b = columns_in + v * kLanes;
      if (n == 2) {
        scores<Elem, 2>(keys, begin, end, depth, b, ld, out + v * kLanes, ld, &ahead);
      } else {
        scores<Elem, 1>(keys, begin, end, depth, b, ld, out + v * kLanes, ld, &ahead);
      }
    });
  }

  // [keys][lanes] as the operand of `accumulate`.
  const Elem* pack_keys(const Acc* weights) {
    const int ld = tile.lanes;
    if constexpr (kPairs) {
      for (int v = 0; v < tile.vectors; ++v) {
        for (int64_t j = block.lo[v]; j < block.hi[v]; j += 2) {
          store(reinterpret_cast<Acc*>(pair_s) + j / 2 * ld + v * kLanes,
                make_pairs(load(weights + j * ld + v * kLanes),
                           load(weights + (j + 1) * ld + v * kLanes)));
        }
      }
      return pair_s;
    } else {
      return weights;
    }
  }
  // rows[lane][d] = rows * factor + sum over the block of key[d] * w[lane], w [pairs of
  // keys][lanes].
  void tile_accumulate(const Elem* const* keys, int64_t dim, const Elem* w, const Vec* factor) {
    if constexpr (kTiles) {
      const int64_t ld = padded(dim);
      for (int lane = 0; factor && lane < tile.lanes; ++lane) {
        const Acc f = factor[lane / kLanes][lane % kLanes];
        if (f == 1) continue;
        for (int64_t d = 0; d < ld; d += kLanes) {
          store(rows + lane * ld + d, load(rows + lane * ld + d) * f);
        }
      }
      for_tiles(tiles::kSpan, [&](int v, bool two, int64_t begin, int64_t end) {
        const int64_t count = (end - begin) / tiles::kSpan;
        for (int k = 0; k < 1 + two; ++k) {
          tiles::turn_weights(w + (v + k) * kLanes, tile.lanes, begin, end, block.lo[v + k],
                              block.hi[v + k], turned + k * count * tiles::kNumbers);
        }
        const auto products = two ? tiles::accumulate<true> : tiles::accumulate<false>;
        products(turned, count, keys[0] + begin / 2 * ld, ld, rows + v * kLanes * ld, ld);
      });
    }
  }

  // target[d][lanes] = target * factor + sum over the block of row[d] * w[lanes].
  void block_accumulate(const Elem* const* row, int64_t dim, const Elem* w, Acc* target,
                        const Vec* factor) {
    const int ld = tile.lanes;
    const Vec one = broadcast(Acc(1));
    Vec rest[kMaxVectors + 1];
    for (int v = 0; v < tile.vectors; ++v) rest[v] = factor ? factor[v] : one;
    for_ranges([&](int v, int n, int64_t begin, int64_t end) {
      begin /= kDepth, end /= kDepth;
      if (n == 2) {
        accumulate<Elem, 2>(row, begin, end, dim, w + v * kLanes, ld, target + v * kLanes, ld,
                            rest + v);
      } else {
        accumulate<Elem, 1>(row, begin, end, dim, w + v * kLanes, ld, target + v * kLanes, ld,
                            rest + v);
      }
      for (int k = v; k < v + n; ++k) rest[k] = one;  // later ranges of the block add up
    });
  }

  // Logits of vector v in base 2 from scores: softcap (its slope goes to `slope` if asked), bias.
  void modify(int v, const Acc* bias, bool want_slope) {
    const int ld = tile.lanes;
    Acc* x = s + v * kLanes;
    Vec factor = load(unit + v * kLanes);
    if (p.softcap > 0) {
      const Acc cap = Acc(p.softcap * kLog2E);
      for (int64_t j = block.lo[v]; j < block.hi[v]; ++j) {
        const Vec t = tanh<Acc>(load(x + j * ld) * factor);
        if (want_slope) store(slope + j * ld + v * kLanes, Acc(1) - t * t);
        store(x + j * ld, t * cap);
      }
      factor = broadcast(Acc(1));
    }
    if (bias) {
      for (int64_t j = block.lo[v]; j < block.hi[v]; ++j) {
        store(x + j * ld, load(x + j * ld) * factor + load(bias_row(bias, v, j)));
      }
    }
  }
  // Logits of vector v in base 2, where a landmark stands for its block: log of the share that the
  // block's softmax gives a key, plus the landmark's own. The landmark itself gets none.
  void divide_among_blocks(int v) {
    const int ld = tile.lanes, shift = v * kLanes;
    Acc* x = s + shift;
    const Vec factor = load(unit + shift), lowest = broadcast(Acc(-INFINITY));
    int64_t done = block.lo[v];
    const auto plain_up_to = [&](int64_t end) {
      for (; done < end; ++done) store(x + done * ld, load(x + done * ld) * factor);
    };
    for (int64_t n = 0; n < block.num_landmarks; ++n) {
      const int64_t begin = block.landmark_begin[n], mark = block.landmark_at[n];
      const uint64_t later = block.mask[mark] & tile.live;
      if (!(later >> shift & ((uint64_t(1) << kLanes) - 1))) continue;
      plain_up_to(begin);
      Vec top = lowest, sum{};
      for (int64_t j = begin; j < mark; ++j) top = max_or_second(load(x + j * ld), top);
      for (int64_t j = begin; j < mark; ++j) sum += exp2((load(x + j * ld) - top) * factor);
      alignas(64) Acc level[kLanes];
      for (int l = 0; l < kLanes; ++l) level[l] = log2_of(sum[l]);
      const Vec rest = load(x + mark * ld) * factor - load(level);
      for (int64_t j = begin; j < mark; ++j) {
        const Vec y = load(x + j * ld);
        const Vec divided = (y - top) * factor + rest;
        store(x + j * ld, select_bits<Acc>(block.mask[mark] >> shift, divided, y * factor));
      }
      store(x + mark * ld, lowest);
      done = mark + 1;
    }
    plain_up_to(block.hi[v]);
  }

  // Makes what is in `s` for vector v a logit in base 2.
  ATTNEXT_INLINE Vec logit_unit(int v, bool modified) const {
    return modified ? broadcast(Acc(1)) : load(unit + v * kLanes);
  }
  ATTNEXT_INLINE const Acc* bias_row(const Acc* bias, int v, int64_t j) const {
    return block.bias[j] == kNoBias ? no_bias : bias + block.bias[j] + tile_shift(v);
  }
  int64_t tile_shift(int v) const { return -tile.bias_shift[v]; }

  // Both passes take the scores from here. A tile that hardly has a query in one of them may have
  // many in the other, and the bits are the same, or weights would not add up to one.
  static constexpr int kFewQueries = kLanes >= 8 ? kLanes / 4 : 1;

  void query_scores() {
    if (!sparse) return block_scores(key_rows, p.head_dim, qt, s);
    const int64_t depth = (p.head_dim + kDepth - 1) / kDepth;
    memset(s, 0, sizeof(Acc) * block.count * tile.lanes);  // as in dead lanes of a full tile
    for (uint64_t rest = tile.live; rest; rest &= rest - 1) {
      const int lane = __builtin_ctzll(rest), v = lane / kLanes;
      memset(q_row, 0, sizeof(Elem) * dp);
      for (int64_t c = 0; c < depth; ++c) q_row[c] = qt[c * tile.lanes + lane];
      row_scores<Elem>(key_rows, block.lo[v], block.hi[v], depth, q_row, s + lane, tile.lanes);
    }
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
  KeyBlock<T> block;                // the current one
  KeyBlock<T> blocks[kKeptBlocks];  // where it and those that are kept lie
  int64_t kept = 0;                 // of the tile's walk, for the heads that follow
  int max_lanes;
  bool sparse = false;
  bool plain_scale = true;  // every score only needs its unit
  int64_t dp, dvp;
  uint64_t* walk_mask;
  T* zeros;
  Acc* no_bias;
  const Elem **key_rows, **value_rows;
  Elem *staged_key = nullptr, *staged_value = nullptr;
  Acc *rows, *columns;
  Elem *qt, *q_row;
  Acc *row_out, *s, *ot;
  Elem* pair_s = nullptr;
  bf16* turned = nullptr;  // two vectors' weights as left factors
  // What stands for key_rows and value_rows in products over dims.
  tiles::RowGroup *key_groups = nullptr, *value_groups = nullptr;
  [[no_unique_address]] tiles::SessionIf<kTiles> session;
  Elem *dot_t = nullptr, *q_rows = nullptr, *do_rows = nullptr;
  Acc *ds = nullptr, *slope = nullptr, *raw = nullptr;
  Elem *lane_p = nullptr, *lane_ds = nullptr;
  Acc **dk_rows = nullptr, **dv_rows = nullptr;
  alignas(64) Acc scale[kMaxLanes];
  alignas(64) Acc unit[kMaxLanes];
  alignas(64) Acc sign[kMaxLanes];
};

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
