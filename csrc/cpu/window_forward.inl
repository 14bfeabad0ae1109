// SPDX-License-Identifier: Apache-2.0
// Forward pass of window attention: online softmax over a tile's walk, or over a part of it whose
// result is merged with those of the others.
#pragma once

#include "near_output.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

template <class T, class Keys>
class WindowForward : public NearOutput<T, Keys> {
 public:
  using Base = NearOutput<T, Keys>;
  using Base::block;
  using Base::dvp;
  using Base::kDepth;
  using Base::kept;
  using Base::kLanes;
  using Base::kPairs;
  using Base::kRounds;
  using Base::kTiles;
  using Base::max_lanes;
  using Base::ot;
  using Base::p;
  using Base::plan;
  using Base::s;
  using Base::sparse;
  using Base::tile;
  using Base::value_rows;
  using typename Base::Acc;
  using typename Base::Elem;
  using typename Base::Plan;
  using typename Base::Vec;
  using typename Base::Walk;

  static constexpr bool kShared = Keys::kHeadsWalkAlike;

  WindowForward(const WindowParams& params, const Plan& view, void* scratch)
      : Base(params, view, scratch) {}

  template <bool kMasked>
  void softmax(int v, Vec in_base_2, Vec* factor) {
    const int ld = tile.lanes, shift = v * kLanes;
    const Acc* const x = s + shift;
    const Vec lowest = broadcast(Acc(-INFINITY));
    // Four maxima, and not one that waits for the one before.
    Vec tops[4] = {lowest, lowest, lowest, lowest};
    const auto raise = [&](int64_t j, int r) {
      Vec y = load(x + j * ld);
      if constexpr (kMasked) y = select_bits<Acc>(block.mask[j] >> shift, y, lowest);
      tops[r] = max_or_second(y, tops[r]);
    };
    int64_t k = block.lo[v];
    for (; k + 4 <= block.hi[v]; k += 4) {
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) raise(k + r, r);
    }
    for (; k < block.hi[v]; ++k) raise(k, 0);
    const Vec highest =
        max_or_second(max_or_second(tops[0], tops[1]), max_or_second(tops[2], tops[3]));
    const Vec before = load(maximum + shift);
    const Vec top = max_or_second(highest * in_base_2, before);
    const Vec base = top == lowest ? Vec{} : top;  // a row that saw nothing yet
    *factor = exp2(before - base);
    store(maximum + shift, top);
    if (any_beyond(base, Base::kFarLogit)) {
      // Rounded by more than weights span: the highest one has its weight all the same.
      const auto far = (base < 0 ? -base : base) > Base::kFarLogit;
      const Vec origin = highest == lowest ? Vec{} : highest;
      const Vec apart = origin * in_base_2 - base;
      const Vec below = highest * in_base_2 == top && !(apart * apart < 64) ? Vec{} : apart;
      weigh<kMasked>(v, *factor, [&](Vec y) {
        return exp2(far ? (y - origin) * in_base_2 + below : y * in_base_2 - base);
      });
    } else {
      weigh<kMasked>(v, *factor, [&](Vec y) { return exp2(y * in_base_2 - base); });
    }
  }
  // The block's weights, from power(score), and their sums.
  template <bool kMasked, class Power>
  ATTNEXT_INLINE void weigh(int v, Vec factor, Power power) {
    const int ld = tile.lanes, shift = v * kLanes;
    Acc* const x = s + shift;
    // Four sums, by the key's place in the block: many equal weights added to one would all be
    // rounded the same way.
    Vec part[4] = {}, applied[2] = {};  // of the weights, and of what pairs make of them
    const auto weight = [&](int64_t j) {
      const Vec w = power(load(x + j * ld));
      return kMasked ? select_bits<Acc>(block.mask[j] >> shift, w, Vec{}) : w;
    };
    const auto add = [&](int64_t j, int r) {  // kDepth keys
      const Vec w = weight(j);
      part[r] += w;
      if constexpr (kPairs) {
        const Vec other = weight(j + 1);
        part[r + 1] += other;
        Acc* const pairs = this->pair_weights(v, j);
        this->pair_up(w, other, pairs, this->part_of_weights());
        if constexpr (kRounds) {
          const Vec pair = load(pairs);
          applied[0] += even_of(pair);
          applied[1] += odd_of(pair);
        }
      } else {
        store(x + j * ld, w);
      }
    };
    int64_t j = block.lo[v];
    for (; j < block.hi[v] && j % 4; j += kDepth) add(j, static_cast<int>(j % 4));
    for (; j + 4 <= block.hi[v]; j += 4) {
#pragma GCC unroll 4
      for (int r = 0; r < 4; r += kDepth) add(j + r, r);
    }
    for (; j < block.hi[v]; j += kDepth) add(j, static_cast<int>(j % 4));
    store(sum + shift, load(sum + shift) * factor + ((part[0] + part[1]) + (part[2] + part[3])));
    if constexpr (kRounds) {
      store(norm + shift, load(norm + shift) * factor + (applied[0] + applied[1]));
    }
  }

  // What the softmax made of the scores.
  const Elem* weights() const {
    if constexpr (kPairs) {
      return this->pair_s;
    } else {
      return s;
    }
  }

  void sparse_accumulate(const Vec* factor) {
    for (uint64_t rest = tile.live; rest; rest &= rest - 1) {
      const int lane = __builtin_ctzll(rest), v = lane / kLanes;
      row_accumulate<Elem>(value_rows, block.lo[v] / kDepth, block.hi[v] / kDepth, p.head_dim_v,
                           weights() + lane, tile.lanes, this->row_out);
      const Acc scale_old = factor[v][lane % kLanes];
      for (int64_t d = 0; d < p.head_dim_v; ++d) {
        Acc* o = ot + d * tile.lanes + lane;
        *o = *o * scale_old + this->row_out[d];
      }
    }
  }

  // Blocks of a walk that other heads have before them.
  void remember(const Walk& walk) {
    if constexpr (kShared) {
      this->blocks[kept++] = block;
      kept_key = walk.key_base, kept_value = walk.value_base;
    }
  }
  bool recall(const Walk& walk, int64_t k) {
    if constexpr (kShared) {
      if (k == kept) {
        kept_key = walk.key_base, kept_value = walk.value_base;
        return false;
      }
      block = this->blocks[k];
      block.move(walk.key_base - kept_key, walk.value_base - kept_value, this->zeros, p.head_dim,
                 p.head_dim_v);
      this->stage_block(false);
    }
    return kShared;
  }

  void start_lanes(int64_t h, bool with_sink) {
    const bool sink = p.sink_logits && with_sink;
    for (int l = 0; l < tile.lanes; l += kLanes) {
      store(maximum + l, broadcast(Acc(-INFINITY)));
      store(sum + l, broadcast(Acc(sink)));
      store(norm + l, broadcast(Acc(sink)));
    }
    for (int lane = 0; sink && lane < tile.lanes; ++lane) {
      maximum[lane] = static_cast<const Acc*>(p.sink_logits)[h + tile.head[lane]] * Acc(kLog2E);
    }
    memset(in_rows ? this->rows : ot, 0, sizeof(Acc) * dvp * tile.lanes);
  }
  // Runs the live lanes of the current tile; false if something non-finite met a mask, in which
  // case 0 * NaN may have reached a row that does not attend it.
  bool forward_lanes(int64_t b, int64_t h, int64_t from, int64_t to, const Acc* bias,
                     bool with_sink) {
    start_lanes(h, with_sink);
    return walk_keys(b, h, from, to, bias);
  }
  bool walk_keys(int64_t b, int64_t h, int64_t from, int64_t to, const Acc* bias) {
    this->load_queries(b, h);
    const Walk walk(p, plan, tile, this->zeros, this->walk_mask, nullptr, b,
                    h / (p.heads / p.kv_heads));
    this->ready_head = h / (p.heads / p.kv_heads) - this->ready.kv_head;
    const bool again = keep && kept > 0;
    bool masked = false;
    for (int64_t k = 0; again ? recall(walk, k) : this->next_block(walk, &from, to, false); ++k) {
      if (keep && !again) remember(walk);
      masked |= block.masked;
      this->query_scores();
      Vec factor[kMaxVectors];
      for (int v = 0; v < tile.vectors; ++v) {
        const bool modified = p.softcap > 0 || bias || block.num_landmarks > 0;
        if (block.num_landmarks > 0) {
          this->divide_among_blocks(v);
        } else if (modified) {
          this->modify(v, bias, false);
        }
        if (block.masked) {
          softmax<true>(v, this->logit_unit(v, modified), factor + v);
        } else {
          softmax<false>(v, this->logit_unit(v, modified), factor + v);
        }
      }
      if (sparse) {
        sparse_accumulate(factor);
      } else if (this->is_near) {
        auto& keys = this->near[again ? k : keep ? kept - 1 : 0];
        if (!again) this->find_near(&keys);
        this->near_products(keys, weights());
        if (!in_rows) this->add_rows(dvp, factor);
      } else {
        this->contract_keys(this->values(), weights(), ot, factor);
      }
    }
    this->ahead.start_all();
    if (!masked || !(tile.live & (tile.live - 1))) return true;
    return in_rows ? this->is_finite(this->rows, dvp) : this->output_is_finite(p.head_dim_v);
  }

  void finish_forward(int64_t b, int64_t h) {
    Acc inverse[kMaxLanes];
    for (int l = 0; l < tile.lanes; l += kLanes) {
      const Vec weights = load((kRounds ? norm : sum) + l);
      store(inverse + l, weights == 0 ? Vec{} : Acc(1) / weights);
    }
    for (uint64_t rest = p.lse.data ? tile.live : 0; rest; rest &= rest - 1) {
      const int lane = __builtin_ctzll(rest);
      // In fp64: what lse loses here, the backward pass would lose once more per weight.
      static_cast<Acc*>(p.lse.data)[this->offset_of(p.lse, lane, b, h)] =
          sum[lane] == 0 ? Acc(-INFINITY)
                         : static_cast<Acc>(maximum[lane] / kLog2E + ::log(double(sum[lane])));
    }
    if (in_rows) {
      this->store_own_rows(p.out, p.head_dim_v, inverse, b, h);
    } else {
      this->store_rows(p.out, p.head_dim_v, inverse, b, h);
    }
  }
  // One head of the tile that was started.
  void forward(int64_t b, int64_t h, int64_t from, int64_t to, const Acc* bias, Acc* partial) {
    to = min64(to, tile.total);
    const bool with_sink = from == 0;
    // The output of one block alone needs not be turned round to meet others.
    in_rows = this->is_near && !partial && to - from <= this->kMost;
    if (forward_lanes(b, h, from, to, bias, with_sink)) {
      partial ? save_partial(partial) : finish_forward(b, h);
      return;
    }
    const bool others_follow = keep;
    keep = false, kept = 0;  // the blocks of one lane are its own
    for (uint64_t rest = tile.whole; rest; rest &= rest - 1) {
      tile.live = rest & -rest;
      forward_lanes(b, h, from, to, bias, with_sink);
      partial ? save_partial(partial) : finish_forward(b, h);
    }
    tile.live = tile.whole;
    keep = others_follow;
  }
  // The whole walk for some heads of a batch item, which share it. `bias`: per head, or null.
  // `follows`: the caller's last tile was their one before on the last axis. `next`: what follows.
  void forward_heads(int64_t b, int64_t h, int64_t count, const int64_t index[3], bool follows,
                     const NextTile& next, const void* const* bias) {
    this->start_tile(index);
    typename Base::Tile next_tile;
    next_tile.whole = 0;
    if (next.plan) next_tile.place(*next.plan, next.index, kLanes);
    if (follows) tile.fresh = plan.axis[2].groups[index[2] - 1].end;
    if (this->ready.count > 0) tile.fresh = INT64_MAX;
    keep = count > 1 && tile.total <= this->kKeptBlocks * this->kMost && !p.extra_keys;
    for (int64_t end = h + count; h < end; ++h) {
      this->ahead.clear();
      this->look_ahead(p.out, p.head_dim_v, tile, b, h, true);
      if (h + 1 < end) {
        this->look_ahead(p.query, p.head_dim, tile, b, h + 1, false);
      } else {
        this->look_ahead(p.query, p.head_dim, next_tile, next.batch, next.head, false);
      }
      this->ahead.pace(this->products(1));
      forward(b, h, 0, tile.total, bias ? static_cast<const Acc*>(bias[h]) : nullptr, nullptr);
    }
  }

  // partial: [dvp][lanes], maximum[lanes], sum[lanes], norm[lanes], with lanes of a full tile.
  void save_partial(Acc* partial) const {
    for (uint64_t rest = tile.live; rest; rest &= rest - 1) {
      const int lane = __builtin_ctzll(rest);
      for (int64_t d = 0; d < dvp; ++d) {
        partial[d * max_lanes + lane] =
            in_rows ? this->rows[lane * dvp + d] : ot[d * tile.lanes + lane];
      }
      partial[dvp * max_lanes + lane] = maximum[lane];
      partial[(dvp + 1) * max_lanes + lane] = sum[lane];
      partial[(dvp + 2) * max_lanes + lane] = norm[lane];
    }
  }

  // A running result at rest: [dvp] as a row, then maximum, sum and norm.
  static int64_t state_size(const WindowParams& p) {
    return Base::padded(p.head_dim_v) + Base::padded(3);
  }
  void take_up_states(Acc* const* rows) {
    if (in_rows) {
      for (int lane = 0; lane < tile.lanes; ++lane) {
        Acc* const own = this->rows + lane * dvp;
        if (tile.live >> lane & 1) {
          memcpy(own, rows[lane], sizeof(Acc) * dvp);
        } else {
          memset(own, 0, sizeof(Acc) * dvp);
        }
      }
    } else {
      this->take_up(rows, dvp, ot);
    }
    for (int lane = 0; lane < tile.lanes; ++lane) {
      const bool live = tile.live >> lane & 1;
      maximum[lane] = live ? rows[lane][dvp] : Acc(-INFINITY);
      sum[lane] = live ? rows[lane][dvp + 1] : 0;
      norm[lane] = live ? rows[lane][dvp + 2] : 0;
    }
  }
  void lay_down_states(Acc* const* rows) const {
    if (!in_rows) this->lay_down(ot, dvp, rows);
    for (uint64_t rest = tile.live; rest; rest &= rest - 1) {
      const int lane = __builtin_ctzll(rest);
      if (in_rows) memcpy(rows[lane], this->rows + lane * dvp, sizeof(Acc) * dvp);
      rows[lane][dvp] = maximum[lane];
      rows[lane][dvp + 1] = sum[lane];
      rows[lane][dvp + 2] = norm[lane];
    }
  }
  static int64_t partial_size(const WindowParams& p, const Plan& plan) {
    return (Base::padded(p.head_dim_v) + 3) * plan.vectors * kLanes;
  }
  void merge_partials(int64_t b, int64_t h, const int64_t index[3], int64_t count,
                      const Acc* partials) {
    this->start_tile(index);
    in_rows = false;
    const int64_t size = partial_size(p, plan);
    memset(ot, 0, sizeof(Acc) * dvp * tile.lanes);
    for (uint64_t rest = tile.live; rest; rest &= rest - 1) {
      const int lane = __builtin_ctzll(rest);
      Acc top = -INFINITY;
      for (int64_t k = 0; k < count; ++k) {
        const Acc m = partials[k * size + dvp * max_lanes + lane];
        top = m > top ? m : top;
      }
      Acc total = 0, applied = 0;
      for (int64_t k = 0; k < count; ++k) {
        const Acc* part = partials + k * size + lane;
        const Acc m = part[dvp * max_lanes], l = part[(dvp + 1) * max_lanes];
        if (l == 0) continue;
        const Acc w = Base::exp2_of(m - top);
        total += w * l;
        applied += w * part[(dvp + 2) * max_lanes];
        for (int64_t d = 0; d < p.head_dim_v; ++d) {
          ot[d * tile.lanes + lane] += w * part[d * max_lanes];
        }
      }
      maximum[lane] = top;
      sum[lane] = total;
      norm[lane] = applied;
    }
    finish_forward(b, h);
  }

 private:
  alignas(64) Acc maximum[kMaxLanes];
  alignas(64) Acc sum[kMaxLanes];
  // Sum of the weights as the output took them, if they were rounded.
  alignas(64) Acc norm[kMaxLanes];
  bool in_rows = false;  // lies the output, and not in `ot`
  bool keep = false;     // the blocks of the walk, which belong to the head at these offsets
  int64_t kept_key = 0, kept_value = 0;
};

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
