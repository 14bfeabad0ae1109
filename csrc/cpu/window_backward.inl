// SPDX-License-Identifier: Apache-2.0
// Backward pass of window attention. A slab of queries owns private fp32 rows for the keys it
// reaches, so that five products suffice and nothing is atomic; rows that two slabs touch are
// summed afterwards in the order of slabs, whatever the number of threads.
#pragma once

#include "tile_backward.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

template <class T>
class WindowBackward : public TileBackward<T, Boxes> {
 public:
  using Base = TileBackward<T, Boxes>;
  using Base::Base;
  using Base::kLanes;
  using Base::p;
  using Base::plan;
  using Base::row_size;
  using typename Base::Acc;

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

  void backward(const SlabItem& item, int64_t h, const Acc* bias, Acc* accumulators, Acc* dbias,
                Acc* dtable) {
    const LocalRows local = local_rows(plan, p, item);
    const int64_t bias_count = dbias ? bias_size(plan) : 0;
    if (dbias) memset(dbias, 0, sizeof(Acc) * bias_count);
    const int64_t table_size = p.bias ? p.bias_head_stride : 0;
    Acc* dsink = p.dsink_logits ? dtable + table_size : nullptr;
    if (dsink) *dsink = 0;
    int64_t count[3], all = 1;
    for (int a = 0; a < 3; ++a) all *= count[a] = item.last_group[a] - item.first_group[a];
    const auto place = [&](int64_t n, int64_t index[3]) {
      for (int a = 2; a >= 0; --a) index[a] = item.first_group[a] + n % count[a], n /= count[a];
    };
    for (int64_t n = 0; n < all; ++n) {
      int64_t index[3];
      place(n, index);
      this->start_tile(index);
      this->ahead.clear();
      if (n + 1 < all) {
        typename Base::Tile next;
        place(n + 1, index);
        next.place(plan, index, kLanes);
        this->look_ahead(p.query, p.head_dim, next, item.batch, h, false);
        this->look_ahead(p.dout, p.head_dim_v, next, item.batch, h, false);
        this->look_ahead(p.out, p.head_dim_v, next, item.batch, h, false);
      }
      this->look_ahead(p.dquery, p.head_dim, this->tile, item.batch, h, true);
      this->ahead.pace(this->products(2));
      this->placed_backward(item.batch, h, local, bias, accumulators, dbias, dsink);
    }
    if (p.dbias) fold_bias(p, plan, dbias, dtable);  // without keys, from nothing
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
};

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
