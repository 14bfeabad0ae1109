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

#include "query_tile.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

// `Keys` says which keys a tile walks: Boxes, or Lists.
template <class T, class Keys>
class Window : public QueryTile<T, Keys> {
 public:
  using Base = QueryTile<T, Keys>;
  using Base::ahead;
  using Base::arena;
  using Base::dp;
  using Base::dvp;
  using Base::kBlock;
  using Base::kDepth;
  using Base::kInPlace;
  using Base::kKeptBlocks;
  using Base::kLanes;
  using Base::kMost;
  using Base::kPairs;
  using Base::kParts;
  using Base::kTiles;
  using Base::kTogether;
  using Base::max_lanes;
  using Base::ot;
  using Base::p;
  using Base::padded;
  using Base::part_of_lanes;
  using Base::plan;
  using Base::qt;
  using Base::tile;
  using Base::unit;
  using Base::widen_tail;
  using Base::zeros;
  using typename Base::Acc;
  using typename Base::Elem;
  using typename Base::Plan;
  using typename Base::Tile;
  using typename Base::Vec;
  using Walk = typename Keys::template Walk<T>;

  // ---- scratch ---------------------------------------------------------------------------------

  Window(const WindowParams& params, const Plan& view, void* scratch, bool backward)
      : Base(params, view, scratch) {
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
    no_bias = arena.template take<Acc>(kLanes);
    key_rows = arena.template take<const Elem*>(kBlock);
    value_rows = arena.template take<const Elem*>(kBlock);
    const int64_t widest = max64(dp, dvp);
    if (kTiles) {
      staged = arena.template take<Elem>(kParts * part_of_rows(widest));
    } else if (!kInPlace) {
      staged_key = arena.template take<Elem>(kBlock * dp);
      staged_value = arena.template take<Elem>(kBlock * dvp);
    }
    q_row = arena.template take<Elem>(dp);
    row_out = arena.template take<Acc>(dvp);
    s = arena.template take<Acc>(kBlock * max_lanes);
    if (kPairs) pair_s = arena.template take<Elem>(kParts * part_of_weights());
    ot = arena.template take<Acc>((backward ? widest : dvp) * max_lanes);
    if (backward) {
      dot_t = arena.template take<Elem>(kParts * dvp / kDepth * max_lanes);
      q_rows = arena.template take<Elem>(kParts * part_of_lanes() * dp);
      do_rows = arena.template take<Elem>(kParts * part_of_lanes() * dvp);
      ds = arena.template take<Acc>(kBlock * max_lanes);
      if (kPairs) {
        lane_p = arena.template take<Elem>(kParts * kBlock * part_of_lanes());
        lane_ds = arena.template take<Elem>(kParts * kBlock * part_of_lanes());
      }
      if (p.softcap > 0) slope = arena.template take<Acc>(kBlock * max_lanes);
      if (p.drow_scale.data) raw = arena.template take<Acc>(kBlock * max_lanes);
      dk_rows = arena.template take<Acc*>(kBlock);
      dv_rows = arena.template take<Acc*>(kBlock);
    }
    if (scratch) memset(no_bias, 0, sizeof(Acc) * kLanes);
  }

  // Logits beyond are rounded by 8 and more.
  static constexpr Acc kFarLogit = sizeof(Acc) == 4 ? Acc(int64_t(1) << 27) : Acc(int64_t(1) << 56);

  // Elements of one part of staged rows and of weights.
  static constexpr int64_t part_of_rows(int64_t ld) { return kTogether * ld / kDepth; }
  int64_t part_of_weights() const { return kBlock / 2 * max_lanes; }

  void start_tile(const int64_t index[3]) {
    tile.init(plan, index, kLanes, p.extra_keys);
    tile_is_placed();
  }
  void tile_is_placed() {
    // A query that is redone alone must come out with the same bits.
    sparse = !kTiles && __builtin_popcountll(tile.whole) <= kFewQueries;
    kept = 0;
  }

  // The products of scores of the tile's walk, `times` as many.
  int64_t products(int times) const {
    return times * tile.total * ((tile.vectors + 1) / 2) / (kTiles ? tiles::kSide : kRows);
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
        constexpr int64_t kUnit = kTiles ? tiles::kSpan : kRows;
        keys = ((left + count - 1) / count + kUnit - 1) / kUnit * kUnit;
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
    if (kTiles) return;  // they stage what they take together
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
        if (wide.has(src[j])) {
          out[j] = reinterpret_cast<const Acc*>(src[j]);
        } else {
          widen_row(src[j], dim, staged + j * ld);
          out[j] = staged + j * ld;
        }
      }
    }
  }
  void interleave(const T** src, int64_t dim, int64_t ld, Elem* staged, const Elem** out) {
    if constexpr (kPairs) {
      for (int64_t j = 0; j < block.count; j += 2) {
        Acc* dst = reinterpret_cast<Acc*>(staged + j / 2 * ld);
        int64_t d = 0;
        for (; d + kLanes <= dim; d += kLanes) {
          store(dst + d, join_pairs(widen(src[j] + d), widen(src[j + 1] + d)));
        }
        if (d < dim) {
          store(dst + d,
                join_pairs(widen_tail(src[j] + d, dim - d), widen_tail(src[j + 1] + d, dim - d)));
        }
        out[j / 2] = staged + j / 2 * ld;
      }
    }
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

  // ---- a block's products ----------------------------------------------------------------------

  // The block's rows of a tensor: where they lie, as operands of vectors, and as those of tiles.
  struct BlockRows {
    const T* const* row;
    const Elem* const* staged;
    const ReadyKeys::Rows* made;
    int64_t dim;
  };
  BlockRows keys() const { return {block.key, key_rows, &ready.key, p.head_dim}; }
  BlockRows values() const { return {block.value, value_rows, &ready.value, p.head_dim_v}; }

  // out[j][lanes] = the products of the rows with columns_in[dim][lanes].
  void contract_dims(const BlockRows& rows, const Elem* columns_in, Acc* out) {
    if constexpr (kTiles) {
      tile_scores(rows, columns_in, out);
    } else {
      block_scores(rows, columns_in, out);
    }
  }
  // target[d][lanes] = target * factor + sum over the block of row[d] * weight[lanes]. Pairs of
  // weights are those at pair_weights().
  void contract_keys(const BlockRows& rows, const Elem* weights, Acc* target, const Vec* factor) {
    if constexpr (kTiles) {
      tile_accumulate(rows, target, factor);
    } else {
      block_accumulate(rows, weights, target, factor);
    }
  }

  void block_scores(const BlockRows& rows, const Elem* columns_in, Acc* out) {
    const Elem* const* const keys = rows.staged;
    const int64_t depth = (rows.dim + kDepth - 1) / kDepth;
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
          this->pair_up(load(weights + j * ld + v * kLanes),
                        load(weights + (j + 1) * ld + v * kLanes), pair_weights(v, j),
                        part_of_weights());
        }
      }
      return pair_s;
    } else {
      return weights;
    }
  }
  // Where those of keys j and j + 1 are.
  ATTNEXT_INLINE Acc* pair_weights(int v, int64_t j) const {
    return reinterpret_cast<Acc*>(pair_s) + j / 2 * tile.lanes + v * kLanes;
  }

  void block_accumulate(const BlockRows& rows, const Elem* w, Acc* target, const Vec* factor) {
    const Elem* const* const row = rows.staged;
    const int64_t dim = rows.dim;
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

  // ---- a block's products in tiles -------------------------------------------------------------

  // Calls f(v, two, begin, end) with the keys that two vectors, or one that is the last, attend of
  // [from, to), in whole tiles of `size` keys.
  template <class F>
  ATTNEXT_INLINE void for_tiles(int64_t from, int64_t to, int64_t size, F f) const {
    for (int v = 0; v < tile.vectors; v += 2) {
      const bool two = v + 1 < tile.vectors;
      int64_t lo = block.lo[v], hi = block.hi[v];
      if (two && (lo >= hi || block.lo[v + 1] < block.hi[v + 1])) {
        lo = lo < hi ? min64(lo, block.lo[v + 1]) : block.lo[v + 1];
        hi = max64(hi, block.hi[v + 1]);
      }
      lo = max64(lo, from), hi = min64(hi, to);
      if (lo < hi) f(v, two, lo / size * size, tiles::round_up(hi, size));
    }
  }
  void tile_scores(const BlockRows& rows, const Elem* columns_in, Acc* out) {
    if constexpr (kTiles) {
      constexpr int64_t kSide = tiles::kSide;
      const int64_t ld = padded(rows.dim), width = sizeof(Elem) * tile.lanes;
      tiles::Left groups[kBlock / kSide];
      const auto products = [&](int v, bool two, int64_t begin, int64_t end) {
        const tiles::Right right{columns_in + v * kLanes, width, ld / kDepth * width};
        (two ? tiles::scores<kParts, true>
             : tiles::scores<kParts, false>)(groups + begin / kSide, (end - begin) / kSide, ld,
                                             right, out + begin * tile.lanes + v * kLanes,
                                             tile.lanes);
        ahead.start((end - begin) / kSide);
      };
      const int64_t place = place_of(rows.row, rows.made->lined_up, *rows.made);
      if (place >= 0) {
        tiles::Left all =
            KeyRows<T>::lined_up(rows.made->lined_up + ready_head * ready.head_bytes, ld);
        const char* at = static_cast<const char*>(all.at) + place * all.row;
        for (int64_t j = 0; j < block.count; j += kSide, at += kSide * all.row) {
          groups[j / kSide] = all, groups[j / kSide].at = at;
        }
      }
      for (int64_t from = 0; from < block.count; from += kTogether) {
        const int64_t to = min64(from + kTogether, block.count);
        bool there = place >= 0;
        for_tiles(from, to, kSide, [&](int v, bool two, int64_t begin, int64_t end) {
          if (!there) line_up(rows.row, from, to, rows.dim, ld, groups);
          there = true;
          products(v, two, begin, end);
        });
      }
    }
  }
  void tile_accumulate(const BlockRows& rows, Acc* target, const Vec* factor) {
    if constexpr (kTiles) {
      constexpr int64_t kSpan = tiles::kSpan;
      const int64_t ld = padded(rows.dim), size = sizeof(Elem);
      for (int v = 0; factor && v < tile.vectors; ++v) {
        for (int64_t d = 0; d < rows.dim; ++d) {
          Acc* const x = target + d * tile.lanes + v * kLanes;
          store(x, load(x) * factor[v]);
        }
      }
      tiles::Left turned = KeyRows<T>::turned(staged, ld);
      const auto products = [&](int64_t from, int v, bool two, int64_t begin, int64_t end) {
        for (int k = v; k < v + 1 + two; ++k) clear_weights(k, begin, end);
        tiles::Left left = turned;
        left.at = static_cast<const char*>(turned.at) + (begin - from) / kSpan * turned.span;
        (two ? tiles::accumulate<kParts, true>
             : tiles::accumulate<kParts, false>)(left,
                                                 {pair_weights(v, begin), size * tile.lanes,
                                                  size * part_of_weights()},
                                                 (end - begin) / kSpan, ld, target + v * kLanes,
                                                 tile.lanes);
      };
      const int64_t place =
          block.count % kSpan ? -1 : place_of(rows.row, rows.made->turned, *rows.made);
      const bool is_ready = place >= 0 && place % kSpan == 0;
      if (is_ready) {
        turned.at = rows.made->turned + ready_head * ready.head_bytes + place / kSpan * turned.span;
      }
      for (int64_t from = 0; from < block.count; from += kTogether) {
        const int64_t to = min64(from + kTogether, block.count);
        bool there = is_ready;
        for_tiles(from, to, kSpan, [&](int v, bool two, int64_t begin, int64_t end) {
          if (!there) turn_rows(rows.row, from, to, rows.dim, ld);
          there = true;
          products(is_ready ? 0 : from, v, two, begin, end);
        });
      }
    }
  }
  // Weights of keys in [begin, end) that vector v does not attend are 0.
  void clear_weights(int v, int64_t begin, int64_t end) {
    const auto clear = [&](int64_t from, int64_t to) {
      for (int64_t j = from; j < to; j += 2) {
        for (int i = 0; i < kParts; ++i) store(pair_weights(v, j) + i * part_of_weights(), Vec{});
      }
    };
    clear(begin, min64(block.lo[v], end));
    clear(max64(block.hi[v], begin), end);
  }
  // Where the block begins among the keys that are ready, if it is of them, one after the other;
  // otherwise, or if that was not made, -1.
  int64_t place_of(const T* const* src, const void* made_of, const ReadyKeys::Rows& made) const {
    if (ready.count == 0 || !made_of || made.step == 0) return -1;
    const intptr_t first = reinterpret_cast<intptr_t>(made.source) + ready_head * made.head;
    const intptr_t offset = reinterpret_cast<intptr_t>(src[0]) - first;
    const int64_t place = offset / made.step;
    if (offset % made.step != 0 || place < 0 || place + block.count > ready.count) return -1;
    return evenly_apart(src, block.count, made.step) ? place : -1;
  }
  static bool evenly_apart(const T* const* src, int64_t count, int64_t step) {
    const auto address = [&](int64_t i) { return reinterpret_cast<intptr_t>(src[i]); };
    bool even = true;
    for (int64_t i = 1; i < count; ++i) even &= address(i) == address(0) + i * step;
    return even;
  }
  // Rows [from, to) of ld numbers, in groups: where they lie one step apart, or copied.
  void line_up(const T* const* src, int64_t from, int64_t to, int64_t dim, int64_t ld,
               tiles::Left* groups) {
    using Rows = KeyRows<T>;
    constexpr int64_t kSide = tiles::kSide;
    bf16* copy = reinterpret_cast<bf16*>(staged);
    for (int64_t j = from; j < to; j += kSide, copy += kSide * kParts * ld) {
      const int64_t count = min64(kSide, to - j);
      tiles::Left& group = groups[j / kSide];
      group = Rows::lined_up(copy, ld);
      if (kParts == 1 && dim == ld && count == kSide) {
        const int64_t step =
            reinterpret_cast<intptr_t>(src[j + 1]) - reinterpret_cast<intptr_t>(src[j]);
        if (evenly_apart(src + j, count, step)) {
          group.at = src[j], group.row = step;
          continue;
        }
      }
      for (int64_t i = 0; i < kSide; ++i) {
        Rows::line_up(i < count ? src[j + i] : zeros, dim, ld, copy + i * kParts * ld);
      }
    }
  }
  // The same rows turned to [dims][keys].
  void turn_rows(const T* const* src, int64_t from, int64_t to, int64_t dim, int64_t ld) {
    constexpr int64_t kSpan = tiles::kSpan;
    bf16* out = reinterpret_cast<bf16*>(staged);
    for (int64_t j = from; j < to; j += kSpan, out += kParts * ld * kSpan) {
      const T* row[kSpan];
      for (int64_t i = 0; i < kSpan; ++i) row[i] = j + i < to ? src[j + i] : zeros;
      KeyRows<T>::turn(row, dim, ld, out);
    }
  }

  // ---- logits ----------------------------------------------------------------------------------

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
      for (int l = 0; l < kLanes; ++l) level[l] = this->log2_of(sum[l]);
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
    if (!sparse) return contract_dims(keys(), qt, s);
    const int64_t depth = (p.head_dim + kDepth - 1) / kDepth;
    memset(s, 0, sizeof(Acc) * block.count * tile.lanes);  // as in dead lanes of a full tile
    for (uint64_t rest = tile.live; rest; rest &= rest - 1) {
      const int lane = __builtin_ctzll(rest), v = lane / kLanes;
      memset(q_row, 0, sizeof(Elem) * dp);
      for (int64_t c = 0; c < depth; ++c) q_row[c] = qt[c * tile.lanes + lane];
      row_scores<Elem>(key_rows, block.lo[v], block.hi[v], depth, q_row, s + lane, tile.lanes);
    }
  }

  // ---- state -----------------------------------------------------------------------------------

  ReadyKeys ready;                  // for tiles
  WideKeys wide;                    // rows that are numbers of products already
  int64_t ready_head = 0;           // the walk's, counted from the first that is ready
  KeyBlock<T> block;                // the current one
  KeyBlock<T> blocks[kKeptBlocks];  // where it and those that are kept lie
  int64_t kept = 0;                 // of the tile's walk, for the heads that follow
  bool sparse = false;
  uint64_t* walk_mask;
  Acc* no_bias;
  const Elem **key_rows, **value_rows;
  Elem *staged_key = nullptr, *staged_value = nullptr, *staged = nullptr;
  Elem* q_row;
  Acc *row_out, *s;
  Elem* pair_s = nullptr;  // weights as pairs of keys
  [[no_unique_address]] tiles::SessionIf<kTiles> session;
  Elem *dot_t = nullptr, *q_rows = nullptr, *do_rows = nullptr;
  Acc *ds = nullptr, *slope = nullptr, *raw = nullptr;
  Elem *lane_p = nullptr, *lane_ds = nullptr;
  Acc **dk_rows = nullptr, **dv_rows = nullptr;
};

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
