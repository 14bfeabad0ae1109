// SPDX-License-Identifier: Apache-2.0
// Backward pass of window attention. A slab of queries owns private fp32 rows for the keys it
// reaches, so that five products suffice and nothing is atomic; rows that two slabs touch are
// summed afterwards in the order of slabs, whatever the number of threads.
#pragma once

#include "window.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

template <class T>
class WindowBackward : public Window<T> {
 public:
  using Base = Window<T>;
  using Base::block;
  using Base::kBlock;
  using Base::kLanes;
  using Base::kPairs;
  using Base::p;
  using Base::plan;
  using Base::tile;
  using typename Base::Acc;
  using typename Base::Elem;
  using typename Base::Vec;

  WindowBackward(const WindowParams& params, const PlanView& view, void* scratch)
      : Base(params, view, scratch, true) {
    if (kPairs) {
      pair_key = this->arena.template take<Elem>(kBlock / 2 * this->dp);
      pair_key_rows = this->arena.template take<const Elem*>(kBlock);
    }
  }

  // Columns of one accumulator row: dK, then dV.
  static int64_t row_size(const WindowParams& p) {
    return Base::padded(p.head_dim) + Base::padded(p.head_dim_v);
  }

  static LocalRows local_rows(const PlanView& plan, const WindowParams& p, const SlabItem& item) {
    LocalRows local;
    int64_t n = 1;
    for (int a = 0; a < 3; ++a) {
      local.begin[a] = item.begin[a];
      local.size[a] = item.size[a];
      n *= item.size[a];
    }
    local.sink_row = n;
    local.extra_row = n + plan.axis[2].sink_rows;
    local.dump_row = local.extra_row + p.extra_keys;
    return local;
  }

  // ---- queries ---------------------------------------------------------------------------------

  // Loads q, dO, O, lse for the live lanes; false if any of it is not finite.
  bool load_tile(int64_t b, int64_t h, Acc* dsink) {
    const int64_t dp = this->dp, dvp = this->dvp;
    Vec bad{};
    const auto check = [&](int64_t ld) {
      for (int64_t i = 0; i < tile.lanes * ld; i += kLanes) bad += load(this->rows + i) * Acc(0);
    };
    // delta = sum dO * O - dLSE, and the log-sum-exp in base 2.
    // The sum runs as that of dP does, so that a query with one key gets a dS of exactly 0.
    this->load_rows(p.out, p.head_dim_v, dvp, b, h);
    this->transpose(this->rows, dvp, tile.lanes, dvp, this->columns, tile.lanes);
    this->load_rows(p.dout, p.head_dim_v, dvp, b, h);
    check(dvp);
    this->transpose(this->rows, dvp, tile.lanes, dvp, this->ot, tile.lanes);
    for (int l = 0; l < tile.lanes; l += kLanes) {
      Vec dot{};
      for (int64_t d = 0; d < p.head_dim_v; ++d) {
        dot += load(this->ot + d * tile.lanes + l) * load(this->columns + d * tile.lanes + l);
      }
      store(delta + l, dot);
    }
    this->pack_columns(dvp, this->dot_t);
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
      if (dsink && lse != Acc(-INFINITY)) {
        const Acc sink = static_cast<const Acc*>(p.sink_logits)[h];
        *dsink -= this->exp2_of((sink - lse) * Acc(kLog2E)) * delta[lane];
      }
      finite &= delta[lane] * 0 == 0 && (lse * 0 == 0 || lse == Acc(-INFINITY));
    }

    if (!this->load_queries(b, h)) this->load_rows(p.query, p.head_dim, dp, b, h);
    check(dp);
    for (int l = 0; l < kLanes; ++l) finite &= bad[l] == 0;
    this->scale_rows(dp, this->scale);
    this->pack_lanes(dp, this->q_rows);  // dK takes scale * q
    return finite;
  }

  // ---- a block of keys -------------------------------------------------------------------------

  template <bool kMasked>
  void differentiate(int v, Vec in_base_2) {
    const int ld = tile.lanes, shift = v * kLanes;
    Acc *x = this->s + shift, *dx = this->ds + shift;
    const Vec level = load(lse2 + shift), rest = load(lse2_rest + shift);
    const Vec mean = load(delta + shift);
    for (int64_t j = block.lo[v]; j < block.hi[v]; ++j) {
      Vec w = exp2((load(x + j * ld) * in_base_2 - level) - rest);
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
        store(row, load(row) + load(dx + j * ld));
      }
    }
    if (p.softcap > 0) {
      for (int64_t j = block.lo[v]; j < block.hi[v]; ++j) {
        store(dx + j * ld, load(dx + j * ld) * load(this->slope + j * ld + shift));
      }
    }
  }

  // The gradient of a row's scale is sum dS (q k): before anything is rounded to bf16.
  void scale_gradient(int v) {
    const int ld = tile.lanes, shift = v * kLanes;
    Vec total = load(dscale + shift);
    for (int64_t j = block.lo[v]; j < block.hi[v]; ++j) {
      total += load(this->ds + j * ld + shift) * load(this->raw + j * ld + shift);
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
    memset(this->ot, 0, sizeof(Acc) * this->dp * tile.lanes);
    const KeyWalk<T> walk(p, tile, this->zeros, this->walk_mask, &local, b,
                          h / (p.heads / p.kv_heads));
    for (int lane = 0; lane < tile.lanes; ++lane) dscale[lane] = 0;
    int64_t from = 0;
    bool masked = false;
    while (this->next_block(walk, &from, tile.total, true)) {
      masked |= block.masked;
      const Elem* const* rows_by_key = this->key_rows;
      if constexpr (kPairs) {
        this->interleave(block.key, p.head_dim, this->dp, pair_key, pair_key_rows);
        rows_by_key = pair_key_rows;
      }
      this->query_scores();
      if (p.drow_scale.data) memcpy(this->raw, this->s, sizeof(Acc) * block.count * tile.lanes);
      this->block_scores(this->value_rows, p.head_dim_v, this->dot_t, this->ds);
      for (int v = 0; v < tile.vectors; ++v) {
        const bool modified = p.softcap > 0 || bias;
        if (modified) this->modify(v, bias, true);
        const Vec in_base_2 = this->logit_unit(v, modified);
        block.masked ? differentiate<true>(v, in_base_2) : differentiate<false>(v, in_base_2);
        if (p.softcap > 0 || dbias) chain(v, dbias);
        if (p.drow_scale.data) scale_gradient(v);
      }
      this->block_accumulate(rows_by_key, p.head_dim, this->ds, this->ot, nullptr);
      if (accumulators) key_gradients(accumulators, stride);
    }
    if (masked && (tile.live & (tile.live - 1)) && !this->output_is_finite(p.head_dim))
      return false;
    finish_query(b, h);
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

  void tile_backward(int64_t b, int64_t h, const int64_t index[3], const LocalRows& local,
                     const Acc* bias, Acc* accumulators, Acc* dbias, Acc* dsink) {
    this->start_tile(index);
    Acc sink = 0;
    if (load_tile(b, h, dsink ? &sink : nullptr) || !(tile.whole & (tile.whole - 1))) {
      if (dsink) *dsink += sink;
      if (backward_lanes(b, h, local, bias, accumulators, dbias)) return;
      accumulators = nullptr;
      dbias = nullptr;
      dsink = nullptr;
    }
    // Something is not finite: one query at a time, so that 0 * NaN reaches no other row.
    for (int i = 0; i < tile.lanes; ++i) {
      // VDPBF16PS adds the odd one of a pair first; so does this, for the same bits in dK and dV.
      tile.live = tile.whole & uint64_t(1) << (kPairs ? i ^ 1 : i);
      if (!tile.live) continue;
      load_tile(b, h, dsink);
      backward_lanes(b, h, local, bias, accumulators, dbias);
    }
  }

  void backward(const SlabItem& item, int64_t h, const Acc* bias, Acc* accumulators, Acc* dbias,
                Acc* dtable) {
    const LocalRows local = local_rows(plan, p, item);
    const int64_t bias_count = dbias ? bias_size(plan) : 0;
    if (dbias) memset(dbias, 0, sizeof(Acc) * bias_count);
    const int64_t table_size = p.bias ? p.bias_head_stride : 0;
    Acc* dsink = p.dsink_logits ? dtable + table_size : nullptr;
    if (dsink) *dsink = 0;
    for (int64_t g0 = item.first_group[0]; g0 < item.last_group[0]; ++g0) {
      for (int64_t g1 = item.first_group[1]; g1 < item.last_group[1]; ++g1) {
        for (int64_t g2 = item.first_group[2]; g2 < item.last_group[2]; ++g2) {
          const int64_t index[3] = {g0, g1, g2};
          tile_backward(item.batch, h, index, local, bias, accumulators, dbias, dsink);
        }
      }
    }
    if (dbias) fold_bias(p, plan, dbias, dtable);
  }

  // ---- bias tables -----------------------------------------------------------------------------

  static int64_t bias_size(const PlanView& plan) {
    int64_t size = kLanes;
    for (int a = 0; a < 3; ++a) size *= plan.axis[a].relative_end - plan.axis[a].relative_begin;
    return size;
  }

  // Visits every (expanded entry, table entry) pair; lanes whose offset no table entry has are left
  // out (no attended pair needs them).
  template <class F>
  static void for_bias(const WindowParams& p, const PlanView& plan, F f) {
    const AxisView* axis = plan.axis;
    int64_t at_expanded = 0;
    for (int64_t u0 = axis[0].relative_begin; u0 < axis[0].relative_end; ++u0) {
      for (int64_t u1 = axis[1].relative_begin; u1 < axis[1].relative_end; ++u1) {
        for (int64_t u2 = axis[2].relative_begin; u2 < axis[2].relative_end; ++u2) {
          int lane = 0;
          for (int32_t r0 = 0; r0 < plan.box[0]; ++r0) {
            for (int32_t r1 = 0; r1 < plan.box[1]; ++r1) {
              for (int32_t r2 = 0; r2 < plan.box[2]; ++r2, ++lane) {
                const int64_t o[3] = {u0 - r0, u1 - r1, u2 - r2};
                int64_t at_table = 0;
                bool inside = true;
                for (int a = 0; a < 3; ++a) {
                  inside &= o[a] >= -p.bias_reach[a] && o[a] <= p.bias_reach[a];
                  at_table += (o[a] + p.bias_reach[a]) * p.bias_stride[a];
                }
                if (inside) f(at_expanded + lane, at_table);
              }
            }
          }
          at_expanded += kLanes;
        }
      }
    }
  }
  static void expand_bias(const WindowParams& p, const PlanView& plan, int64_t h, Acc* expanded) {
    memset(expanded, 0, sizeof(Acc) * bias_size(plan));
    const Acc* table = static_cast<const Acc*>(p.bias) + h * p.bias_head_stride;
    for_bias(p, plan, [&](int64_t e, int64_t t) { expanded[e] = table[t] * Acc(kLog2E); });
  }
  static void fold_bias(const WindowParams& p, const PlanView& plan, const Acc* dbias,
                        Acc* dtable) {
    memset(dtable, 0, sizeof(Acc) * p.bias_head_stride);
    for_bias(p, plan, [&](int64_t e, int64_t t) { dtable[t] += dbias[e]; });
  }

  // ---- rows of key and value gradients
  // -----------------------------------------------------------

  // Calls f(local row, slab-axis coordinate, token coordinates) for every key of the item's box
  // with the slab-axis coordinate in [from, to).
  template <class F>
  static void for_rows(const PlanView& plan, const SlabItem& item, int64_t from, int64_t to, F f) {
    const int s = plan.slab_axis;
    int64_t lo[3] = {0, 0, 0}, hi[3];
    for (int a = 0; a < 3; ++a) hi[a] = item.size[a];
    lo[s] = from - item.begin[s], hi[s] = to - item.begin[s];
    for (int64_t y0 = lo[0]; y0 < hi[0]; ++y0) {
      for (int64_t y1 = lo[1]; y1 < hi[1]; ++y1) {
        for (int64_t y2 = lo[2]; y2 < hi[2]; ++y2) {
          const int64_t y[3] = {y0, y1, y2};
          int64_t x[3];
          for (int a = 0; a < 3; ++a) {
            x[a] = item.cls[a] + plan.axis[a].dilation * (item.begin[a] + y[a]);
          }
          f((y0 * item.size[1] + y1) * item.size[2] + y2, item.begin[s] + y[s], x);
        }
      }
    }
  }

  static void write_key(const WindowParams& p, const SlabItem& item, const int64_t x[3],
                        const Acc* row) {
    Base::write_row(row, static_cast<T*>(p.dkey.data) + at(p.dkey, item.batch, x, item.kv_head),
                    p.head_dim);
    Base::write_row(row + Base::padded(p.head_dim),
                    static_cast<T*>(p.dvalue.data) + at(p.dvalue, item.batch, x, item.kv_head),
                    p.head_dim_v);
  }

  static void finish_slab(const WindowParams& p, const PlanView& plan, const SlabItem& item,
                          const Acc* rows, Acc* halo) {
    const int64_t stride = row_size(p);
    const int s = plan.slab_axis;
    const int64_t begin = item.begin[s], end = begin + item.size[s];
    for_rows(plan, item, item.own_begin, item.own_end, [&](int64_t r, int64_t, const int64_t x[3]) {
      write_key(p, item, x, rows + r * stride);
    });
    const auto save = [&](int64_t r, int64_t, const int64_t*) {
      memcpy(halo, rows + r * stride, sizeof(Acc) * stride);
      halo += stride;
    };
    for_rows(plan, item, begin, item.own_begin, save);
    for_rows(plan, item, item.own_end, end, save);
    const LocalRows local = local_rows(plan, p, item);
    memcpy(halo, rows + local.sink_row * stride,
           sizeof(Acc) * stride * (local.dump_row - local.sink_row));
  }

  // Where finish_slab put the rows of slab coordinate y, or null.
  static const Acc* saved(const WindowParams& p, const PlanView& plan, const SlabItem& item,
                          const void* halo, int64_t y, int64_t within) {
    const int s = plan.slab_axis;
    int64_t inner = 1, outer_rows = 1;  // rows per coordinate below and above the slab axis
    for (int a = 0; a < s; ++a) outer_rows *= item.size[a];
    for (int a = s + 1; a < 3; ++a) inner *= item.size[a];
    const int64_t begin = item.begin[s], end = begin + item.size[s];
    if (y < begin || y >= end || (y >= item.own_begin && y < item.own_end)) return nullptr;
    int64_t first = 0, part_begin = begin, part_end = item.own_begin;
    if (y >= item.own_end) {
      first = (item.own_begin - begin) * inner * outer_rows;
      part_begin = item.own_end, part_end = end;
    }
    const int64_t o = within / inner, i = within % inner;
    const int64_t row = first + (o * (part_end - part_begin) + y - part_begin) * inner + i;
    return static_cast<const Acc*>(halo) + row * row_size(p);
  }
  static int64_t halo_rows(const PlanView& plan, const SlabItem& item) {
    int64_t n = 1;
    for (int a = 0; a < 3; ++a) n *= a == plan.slab_axis ? 1 : item.size[a];
    return n * (item.size[plan.slab_axis] - (item.own_end - item.own_begin));
  }

  // Sums what the slabs saved, in their order; keys that no window reaches get zeros.
  static void merge_slabs(const WindowParams& p, const PlanView& plan, const SlabItem& whole,
                          const SlabItem* items, int64_t count, const void* const* halos,
                          int64_t from, int64_t to) {
    const int64_t stride = row_size(p);
    const int64_t sink_rows = plan.axis[2].sink_rows;
    int64_t inner = 1;
    for (int a = plan.slab_axis + 1; a < 3; ++a) inner *= whole.size[a];
    const int64_t length = whole.size[plan.slab_axis];
    for_rows(plan, whole, from, to, [&](int64_t r, int64_t y, const int64_t x[3]) {
      const int64_t within = r / (inner * length) * inner + r % inner;
      const auto source = [&](int64_t k) -> const Acc* {
        if (k < count) return saved(p, plan, items[k], halos[k], y, within);
        if (y >= sink_rows) return nullptr;
        const int64_t row = halo_rows(plan, items[k - count]) + y;
        return static_cast<const Acc*>(halos[k - count]) + row * stride;
      };
      const int64_t sources = sink_rows > 0 ? 2 * count : count;
      sum_rows(sources, source, 0, p.head_dim,
               static_cast<T*>(p.dkey.data) + at(p.dkey, whole.batch, x, whole.kv_head));
      sum_rows(sources, source, Base::padded(p.head_dim), p.head_dim_v,
               static_cast<T*>(p.dvalue.data) + at(p.dvalue, whole.batch, x, whole.kv_head));
    });
  }

  static void merge_extra(const WindowParams& p, const PlanView& plan, const SlabItem& whole,
                          const SlabItem* items, int64_t count, const void* const* halos) {
    for (int64_t e = 0; e < p.extra_keys; ++e) {
      const int64_t x[3] = {0, 0, e};
      const auto source = [&](int64_t k) {
        const int64_t row = halo_rows(plan, items[k]) + plan.axis[2].sink_rows + e;
        return static_cast<const Acc*>(halos[k]) + row * row_size(p);
      };
      sum_rows(
          count, source, 0, p.head_dim,
          static_cast<T*>(p.dextra_key.data) + at(p.dextra_key, whole.batch, x, whole.kv_head));
      sum_rows(
          count, source, Base::padded(p.head_dim), p.head_dim_v,
          static_cast<T*>(p.dextra_value.data) + at(p.dextra_value, whole.batch, x, whole.kv_head));
    }
  }

  // dst = the sum of columns [column, column + dim) of the source rows that exist, in order.
  template <class Source>
  static void sum_rows(int64_t sources, Source source, int64_t column, int64_t dim, T* dst) {
    constexpr int64_t kChunk = 256;
    alignas(64) Acc sums[kChunk];
    for (int64_t c = 0; c < dim; c += kChunk) {
      const int64_t n = min64(kChunk, dim - c);
      memset(sums, 0, sizeof(Acc) * Base::padded(n));
      for (int64_t k = 0; k < sources; ++k) {
        const Acc* row = source(k);
        if (!row) continue;
        for (int64_t d = 0; d < n; d += kLanes) {
          store(sums + d, load(sums + d) + load(row + column + c + d));
        }
      }
      Base::write_row(sums, dst + c, n);
    }
  }

  Elem* pair_key = nullptr;
  const Elem** pair_key_rows = nullptr;
  alignas(64) Acc lse2[kMaxLanes];  // log-sum-exp in base 2, and what rounding took from it
  alignas(64) Acc lse2_rest[kMaxLanes];
  alignas(64) Acc dscale[kMaxLanes];
  alignas(64) Acc delta[kMaxLanes];
};

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
