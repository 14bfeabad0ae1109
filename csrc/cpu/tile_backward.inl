// SPDX-License-Identifier: Apache-2.0
// Backward pass of one tile: five products. The gradients of its keys are added to rows that the
// caller gives, fp32 and its own.
#pragma once

#include <limits>

#include "window.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

template <class T, class Keys>
class TileBackward : public Window<T, Keys> {
 public:
  using Base = Window<T, Keys>;
  using Base::block;
  using Base::kBlock;
  using Base::kLanes;
  using Base::kPairs;
  using Base::kParts;
  using Base::kTiles;
  using Base::p;
  using Base::plan;
  using Base::tile;
  using typename Base::Acc;
  using typename Base::Elem;
  using typename Base::Plan;
  using typename Base::Vec;
  using typename Base::Walk;

  TileBackward(const WindowParams& params, const Plan& view, void* scratch)
      : Base(params, view, scratch, true) {
    if (kPairs) {
      if (kTiles) {
        tile_sums = this->arena.template take<Acc>(tiles::kSide * max64(this->dp, this->dvp));
      } else {
        pair_key = this->arena.template take<Elem>(kBlock / 2 * this->dp);
        pair_key_rows = this->arena.template take<const Elem*>(kBlock);
      }
    }
  }

  // Columns of one accumulator row: dK, then dV.
  static int64_t row_size(const WindowParams& p) {
    return Base::padded(p.head_dim) + Base::padded(p.head_dim_v);
  }

  // ---- queries ---------------------------------------------------------------------------------

  // Loads q, dO, O, lse for the live lanes; false if any of it is not finite.
  bool load_tile(int64_t b, int64_t h) {
    const int64_t dp = this->dp, dvp = this->dvp;
    Vec bad{};
    const auto check = [&](int64_t ld) {
      for (int64_t i = 0; i < tile.lanes * ld; i += kLanes) bad += load(this->rows + i) * Acc(0);
    };
    // delta = sum dO * O - dLSE, and the log-sum-exp in base 2.
    // The sum runs as that of dP does, so that a query with one key gets a dS of exactly 0.
    this->pack_columns(p.out, p.head_dim_v, dvp, nullptr, this->columns, b, h);
    this->pack_columns(p.dout, p.head_dim_v, dvp, nullptr, this->dot_t, b, h);
    const Acc* dout_columns;
    if constexpr (kPairs) {
      this->pack_columns(p.dout, p.head_dim_v, dvp, nullptr, this->ot, b, h);
      dout_columns = this->ot;
    } else {
      dout_columns = this->dot_t;
    }
    for (int l = 0; l < tile.lanes; l += kLanes) {
      Vec dot{};
      for (int64_t d = 0; d < p.head_dim_v; ++d) {
        dot += load(dout_columns + d * tile.lanes + l) * load(this->columns + d * tile.lanes + l);
      }
      store(delta + l, dot);
    }
    this->load_rows(p.dout, p.head_dim_v, dvp, b, h);
    check(dvp);
    this->pack_lanes(dvp, this->do_rows);
    bool finite = true;
    for (int lane = 0; lane < tile.lanes; ++lane) {
      lse2[lane] = Acc(INFINITY);  // weights 0
      lse2_rest[lane] = 0;
      if (!(tile.live >> lane & 1)) {
        delta[lane] = 0;
        continue;
      }
      const Acc lse = static_cast<const Acc*>(p.lse.data)[this->offset_of(p.lse, lane, b, h)];
      if (p.dlse.data && lse != Acc(-INFINITY)) {
        delta[lane] -= static_cast<const Acc*>(p.dlse.data)[this->offset_of(p.dlse, lane, b, h)];
      }
      if (lse != Acc(-INFINITY)) {
        const double exact = lse * kLog2E;
        lse2[lane] = static_cast<Acc>(exact);
        lse2_rest[lane] = lse * 0 == 0 ? static_cast<Acc>(exact - double(lse2[lane])) : Acc(0);
      }
      dsink_of[lane] = 0;
      if (p.dsink_logits && lse != Acc(-INFINITY)) {
        const Acc sink = static_cast<const Acc*>(p.sink_logits)[h + tile.head[lane]];
        dsink_of[lane] = -this->exp2_of((sink - lse) * Acc(kLog2E)) * delta[lane];
      }
      finite &= delta[lane] * 0 == 0 && (lse * 0 == 0 || lse == Acc(-INFINITY));
    }

    this->load_queries(b, h);
    this->load_rows(p.query, p.head_dim, dp, b, h);
    check(dp);
    for (int l = 0; l < kLanes; ++l) finite &= bad[l] == 0;
    this->scale_rows(dp, this->scale);
    this->pack_lanes(dp, this->q_rows);  // dK takes scale * q
    return finite;
  }

  // ---- a block of keys -------------------------------------------------------------------------

  template <bool kMasked>
  void differentiate(int v, Vec in_base_2) {
    const int shift = v * kLanes;
    const Vec level = load(lse2 + shift), rest = load(lse2_rest + shift);
    const auto below = [&](Vec y) { return (y * in_base_2 - level) - rest; };
    if (any_beyond(level, Base::kFarLogit)) {
      // lse is rounded by more than weights span: what is no further from it has all of the weight.
      const Vec magnitude = level < 0 ? -level : level;
      const auto far = magnitude > Base::kFarLogit;
      const Vec slack = magnitude * std::numeric_limits<Acc>::epsilon();
      differentiate<kMasked>(v, [&](Vec y) {
        const Vec x = below(y);
        return exp2(far && x > -slack ? Vec{} : x);
      });
    } else {
      differentiate<kMasked>(v, [&](Vec y) { return exp2(below(y)); });
    }
  }
  template <bool kMasked, class Power>
  ATTNEXT_INLINE void differentiate(int v, Power power) {
    const int ld = tile.lanes, shift = v * kLanes;
    Acc *x = this->s + shift, *dx = this->ds + shift;
    const Vec mean = load(delta + shift);
    for (int64_t j = block.lo[v]; j < block.hi[v]; ++j) {
      Vec w = power(load(x + j * ld));
      Vec g = w * (load(dx + j * ld) - mean);
      if constexpr (kMasked) {
        w = select_bits<Acc>(block.mask[j] >> shift, w, Vec{});
        g = select_bits<Acc>(block.mask[j] >> shift, g, Vec{});
      }
      store(x + j * ld, w);
      store(dx + j * ld, g);
    }
  }

  // Bias gradient, then back through the softcap.
  void chain(int v, Acc* dbias) {
    const int ld = tile.lanes, shift = v * kLanes;
    Acc* dx = this->ds + shift;
    if (dbias) {
      for (int64_t j = block.lo[v]; j < block.hi[v]; ++j) {
        if (block.bias[j] == kNoBias) continue;
        Acc* row = dbias + block.bias[j] + this->tile_shift(v);
        // Lanes without a query have no mask: what a NaN makes of them is nobody's.
        store(row, load(row) + select_bits<Acc>(tile.live >> shift, load(dx + j * ld), Vec{}));
      }
    }
    if (p.softcap > 0) {
      for (int64_t j = block.lo[v]; j < block.hi[v]; ++j) {
        store(dx + j * ld, load(dx + j * ld) * load(this->slope + j * ld + shift));
      }
    }
  }

  // What a block's keys got together is its landmark's; of it each key gives back its share.
  void gather_at_landmarks(int v) {
    const int ld = tile.lanes, shift = v * kLanes;
    const Acc* w = this->s + shift;
    Acc* dx = this->ds + shift;
    for (int64_t n = 0; n < block.num_landmarks; ++n) {
      const int64_t begin = block.landmark_begin[n], mark = block.landmark_at[n];
      const uint64_t later = block.mask[mark] >> shift;
      if (!(later & (tile.live >> shift) & ((uint64_t(1) << kLanes) - 1))) continue;
      Vec share{}, total{};
      for (int64_t j = begin; j < mark; ++j) {
        share += load(w + j * ld);
        total += load(dx + j * ld);
      }
      const Vec ratio = share == Vec{} ? Vec{} : total / share;
      for (int64_t j = begin; j < mark; ++j) {
        const Vec g = load(dx + j * ld);
        store(dx + j * ld, select_bits<Acc>(later, g - load(w + j * ld) * ratio, g));
      }
      store(dx + mark * ld, select_bits<Acc>(later, total, Vec{}));
    }
  }

  // The gradient of a row's scale is sum dS (q k): before anything is rounded to bf16. Of a key
  // that a row does not attend q k may be infinite.
  void scale_gradient(int v) {
    const int ld = tile.lanes, shift = v * kLanes;
    const bool masked = block.masked && block.num_landmarks == 0;
    Vec total = load(dscale + shift);
    for (int64_t j = block.lo[v]; j < block.hi[v]; ++j) {
      const Vec more = load(this->ds + j * ld + shift) * load(this->raw + j * ld + shift);
      total += masked ? select_bits<Acc>(block.mask[j] >> shift, more, Vec{}) : more;
    }
    store(dscale + shift, total);
  }

  // dV += P dO and dK += dS Q for stretches of keys that the same vectors attend.
  void key_gradients(Acc* accumulators, int64_t stride) {
    const int vectors = tile.vectors, ld = tile.lanes;
    for (int64_t j = 0; j < block.count; ++j) {
      this->dk_rows[j] = accumulators + block.row[j] * stride;
      this->dv_rows[j] = this->dk_rows[j] + this->dp;
    }
    if constexpr (kTiles) {
      tile_contract(this->s, this->lane_p, this->do_rows, this->dvp, this->dv_rows);
      tile_contract(this->ds, this->lane_ds, this->q_rows, this->dp, this->dk_rows);
      return;
    }
    for (int64_t from = 0; from < block.count;) {
      int64_t to = block.count;
      int first = vectors, last = -1;
      for (int v = 0; v < vectors; ++v) {
        const int64_t lo = block.lo[v], hi = block.hi[v];
        if (lo > from) to = min64(to, lo);
        if (hi > from) to = min64(to, hi);
        if (lo <= from && from < hi) first = first < v ? first : v, last = v;
      }
      if (last >= first) {
        for (int v = first; v <= last; ++v) {
          if (block.lo[v] <= from && from < block.hi[v]) continue;
          for (int64_t j = from; j < to; ++j) {  // a vector in between that is not concerned
            store(this->s + j * ld + v * kLanes, Vec{});
            store(this->ds + j * ld + v * kLanes, Vec{});
          }
        }
        contract(this->s, this->lane_p, from, to, first, last, this->do_rows, this->dvp,
                 this->dv_rows);
        contract(this->ds, this->lane_ds, from, to, first, last, this->q_rows, this->dp,
                 this->dk_rows);
      }
      from = to;
    }
  }
  void contract(const Acc* weights, Elem* pairs, int64_t from, int64_t to, int first, int last,
                const Elem* lane_rows, int64_t dim, Acc* const* out) {
    const int ld = tile.lanes;
    const int64_t lane0 = first * kLanes, lanes = (last - first + 1) * kLanes;
    if constexpr (kPairs) {
      for (int64_t j = from; j < to; ++j) {
        for (int64_t l = lane0; l < lane0 + lanes; l += kLanes) {
          round_lanes(weights + j * ld + l, pairs + (j * ld + l) / 2);
        }
      }
      outer<Elem>(pairs + (from * ld + lane0) / 2, ld / 2, to - from, lanes / 2,
                  lane_rows + lane0 / 2 * dim, dim, out + from, dim);
    } else {
      outer<Elem>(weights + from * ld + lane0, ld, to - from, lanes, lane_rows + lane0 * dim, dim,
                  out + from, dim);
    }
  }
  // The same for all of the block in whole tiles: where a vector is not concerned, weights are 0.
  void tile_contract(const Acc* weights, Elem* pairs, const Elem* lane_rows, int64_t dim,
                     Acc* const* out) {
    if constexpr (kTiles) {
      const int64_t lanes = tiles::round_up(tile.lanes, tiles::kSpan);
      const int64_t all = tiles::round_up(block.count, tiles::kSide);
      const int64_t part = kBlock * lanes;
      bf16* const rounded = reinterpret_cast<bf16*>(pairs);
      const auto weights_of = [&](int64_t j, int v) {
        const bool inside = v < tile.vectors && block.lo[v] <= j && j < block.hi[v];
        return inside ? load(weights + j * tile.lanes + v * kLanes) : Vec{};
      };
      for (int v = 0; v < lanes / kLanes; v += 2) {
        for (int64_t j = 0; j < all; ++j) {
          const Vec first = weights_of(j, v), second = weights_of(j, v + 1);
          bf16* const to = rounded + j * lanes + v * kLanes;
          if constexpr (kParts == 1) {
            narrow_quickly(to, first);
            narrow_quickly(to + kLanes, second);
          } else {
            store_parts(first, second, to, part);
          }
        }
      }
      const int64_t row = sizeof(bf16) * lanes, size = sizeof(Elem);
      const tiles::Right right{lane_rows, size * dim, size * this->part_of_lanes() * dim};
      for (int64_t j = 0; j < block.count; j += tiles::kSide) {
        const tiles::Left left{rounded + j * lanes, row, 2 * tiles::kSpan,
                               part * static_cast<int64_t>(sizeof(bf16))};
        tiles::outer<kParts>(left, lanes, right, dim, out + j, min64(tiles::kSide, block.count - j),
                             tile_sums);
      }
    }
  }
  static ATTNEXT_INLINE void round_lanes(const Acc* src, Elem* dst) {
    if constexpr (kPairs) narrow(reinterpret_cast<bf16*>(dst), load(src));
  }

  // ---- one tile, one slab ----------------------------------------------------------------------

  // False, with the keys' share done and the query's not stored, if a key that is not finite may
  // have reached a query that does not attend it (its weight there is 0, and 0 * inf is NaN). With
  // `accumulators` null only the query's gradient is made.
  bool backward_lanes(int64_t b, int64_t h, const LocalRows& local, const Acc* bias,
                      Acc* accumulators, Acc* dbias) {
    const int64_t stride = row_size(p);
    if (resting) {
      this->take_up(resting, this->dp, this->ot);
    } else {
      memset(this->ot, 0, sizeof(Acc) * this->dp * tile.lanes);
    }
    const Walk walk(p, plan, tile, this->zeros, this->walk_mask, &local, b,
                    h / (p.heads / p.kv_heads));
    this->ready_head = h / (p.heads / p.kv_heads) - this->ready.kv_head;
    for (int lane = 0; lane < tile.lanes; ++lane) dscale[lane] = 0;
    int64_t from = 0;
    bool masked = false;
    while (this->next_block(walk, &from, tile.total, true)) {
      masked |= block.masked;
      auto keys_in_pairs = this->keys();
      if constexpr (kPairs && !kTiles) {
        this->interleave(block.key, p.head_dim, this->dp, pair_key, pair_key_rows);
        keys_in_pairs.staged = pair_key_rows;
      }
      this->query_scores();
      if (p.drow_scale.data) memcpy(this->raw, this->s, sizeof(Acc) * block.count * tile.lanes);
      this->contract_dims(this->values(), this->dot_t, this->ds);
      for (int v = 0; v < tile.vectors; ++v) {
        const bool modified = p.softcap > 0 || bias || block.num_landmarks > 0;
        if (block.num_landmarks > 0) {
          this->divide_among_blocks(v);
        } else if (modified) {
          this->modify(v, bias, true);
        }
        const Vec in_base_2 = this->logit_unit(v, modified);
        block.masked ? differentiate<true>(v, in_base_2) : differentiate<false>(v, in_base_2);
        if (block.num_landmarks > 0) gather_at_landmarks(v);
        if (p.softcap > 0 || dbias) chain(v, dbias);
        if (p.drow_scale.data) scale_gradient(v);
      }
      this->contract_keys(keys_in_pairs, this->pack_keys(this->ds), this->ot, nullptr);
      if (accumulators) key_gradients(accumulators, stride);
    }
    this->ahead.start_all();
    if (masked && (tile.live & (tile.live - 1)) && !this->output_is_finite(p.head_dim))
      return false;
    resting ? this->lay_down(this->ot, this->dp, resting) : finish_query(b, h);
    return true;
  }

  // `ot` holds sum dS k: the query's gradient is scale times it, the scale's its product with q.
  void finish_query(int64_t b, int64_t h) {
    for (uint64_t rest = p.drow_scale.data ? tile.live : 0; rest; rest &= rest - 1) {
      const int lane = __builtin_ctzll(rest);
      Acc total = dscale[lane] * this->sign[lane];
      if (this->sign[lane] == 0) {  // the scores were not those of q
        const T* q = static_cast<const T*>(p.query.data) + this->offset_of(p.query, lane, b, h);
        for (int64_t d = 0; d < p.head_dim; ++d) {
          T one[kLanes] = {q[d]};
          total += widen(one)[0] * this->ot[d * tile.lanes + lane];
        }
      }
      static_cast<Acc*>(p.drow_scale.data)[this->offset_of(p.drow_scale, lane, b, h)] =
          total * Acc(p.scale);
    }
    this->store_rows(p.dquery, p.head_dim, this->scale, b, h);
  }

  // `dsink`: of the tile's heads, may be null.
  void add_sinks(Acc* dsink) const {
    if (!dsink) return;
    double sum[kMaxLanes] = {};  // of many numbers, in which each tile's are rounded once
    int heads = 0;
    for (uint64_t rest = tile.live; rest; rest &= rest - 1) {
      const int lane = __builtin_ctzll(rest), head = tile.head[lane];
      sum[head] += dsink_of[lane];
      heads = head < heads ? heads : head + 1;
    }
    for (int head = 0; head < heads; ++head) dsink[head] += static_cast<Acc>(sum[head]);
  }

  void tile_backward(int64_t b, int64_t h, const int64_t index[3], const LocalRows& local,
                     const Acc* bias, Acc* accumulators, Acc* dbias, Acc* dsink) {
    this->start_tile(index);
    placed_backward(b, h, local, bias, accumulators, dbias, dsink);
  }
  void placed_backward(int64_t b, int64_t h, const LocalRows& local, const Acc* bias,
                       Acc* accumulators, Acc* dbias, Acc* dsink) {
    if (load_tile(b, h) || !(tile.whole & (tile.whole - 1))) {
      add_sinks(dsink);
      if (backward_lanes(b, h, local, bias, accumulators, dbias)) return;
      accumulators = nullptr;
      dbias = nullptr;
      dsink = nullptr;
    }
    // Something is not finite: one query at a time, so that 0 * NaN reaches no other row.
    for (int i = 0; i < tile.lanes; ++i) {
      tile.live = tile.whole & uint64_t(1) << i;
      if (!tile.live) continue;
      load_tile(b, h);
      add_sinks(dsink);
      backward_lanes(b, h, local, bias, accumulators, dbias);
    }
  }

  // A tile that walks a part of its queries' keys: where their gradients rest meanwhile, by lane.
  Acc* const* resting = nullptr;

 private:
  Elem* pair_key = nullptr;
  const Elem** pair_key_rows = nullptr;
  Acc* tile_sums = nullptr;
  alignas(64) Acc lse2[kMaxLanes];  // log-sum-exp in base 2, and what rounding took from it
  alignas(64) Acc lse2_rest[kMaxLanes];
  alignas(64) Acc dscale[kMaxLanes];
  alignas(64) Acc delta[kMaxLanes];
  Acc dsink_of[kMaxLanes];
};

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
