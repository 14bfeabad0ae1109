// SPDX-License-Identifier: Apache-2.0
// Routed attention: the tiles of window attention over the walk of lists, and the function table of
// one ISA unit.
#pragma once

#include "listwalk.inl"
#include "tile_backward.inl"
#include "window_forward.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

// What both passes need of a tile's list: the biases of its slots, a vector of equal lanes each.
template <class Acc>
struct SlotBias {
  static constexpr int kLanes = Simd<Acc>::kLanes;
  Acc *bias, *gradient = nullptr;

  void allocate(Arena& arena, const ListView& view, bool with_gradient) {
    const int64_t count = view.params->entry_bias ? view.most_slots * kLanes : 0;
    bias = arena.template take<Acc>(count);
    if (with_gradient && view.params->dentry_bias) gradient = arena.template take<Acc>(count);
  }
  // Null where there is nothing to add.
  const Acc* spread(const ListView& view, const int64_t index[3]) {
    const RoutedParams& r = *view.params;
    if (!r.entry_bias) return nullptr;
    const int64_t block = view.pieces[index[0]].block;
    const int64_t begin = first_entry(r, block, index[1], index[2]);
    const int64_t end = last_entry(r, block, index[1], index[2]);
    for (int64_t e = begin; e < end; ++e) {
      const Acc x = static_cast<const Acc*>(r.entry_bias)[e] * Acc(kLog2E);
      store(bias + (e - begin) * kLanes, broadcast(x));
    }
    if (gradient) memset(gradient, 0, sizeof(Acc) * (end - begin) * kLanes);
    return bias;
  }
  void gather(const ListView& view, const int64_t index[3], Acc* dbias) const {
    const RoutedParams& r = *view.params;
    const int64_t block = view.pieces[index[0]].block;
    const int64_t begin = first_entry(r, block, index[1], index[2]);
    const int64_t end = last_entry(r, block, index[1], index[2]);
    for (int64_t e = begin; e < end; ++e) {
      Acc sum = 0;
      for (int l = 0; l < kLanes; ++l) sum += gradient[(e - begin) * kLanes + l];
      dbias[e] += sum;
    }
  }
};

// Where the lanes of a tile have their rows of a chunk's states.
template <class Acc>
struct ChunkRows {
  const ListChunk& chunk;
  Acc* states;
  int64_t size;
  Acc* of_lane[kMaxLanes];

  void find(const ListTile& tile) {
    for (uint64_t rest = tile.whole; rest; rest &= rest - 1) {
      const int lane = __builtin_ctzll(rest);
      const int64_t query = tile.place_of[lane] - chunk.begin;
      of_lane[lane] = states + (query * chunk.heads + tile.head[lane]) * size;
    }
  }
  // Places the chunk's queries in `tile`, as many at a time as it has lanes, and calls f.
  template <class F>
  void for_queries(ListTile& tile, const ListView& view, int kLanes, F f) {
    const int room = view.vectors * kLanes / chunk.heads;
    tile.shared = nullptr;
    for (int32_t from = chunk.begin; from < chunk.end; from += room) {
      const int count = static_cast<int>(min64(room, chunk.end - from));
      tile.place(*view.params, chunk.heads, count, kLanes, [&](int i) { return from + i; });
      tile.live = tile.whole;
      find(tile);
      f();
    }
  }
  // The same with the queries of each run of shared keys.
  template <class F>
  void for_shared(ListTile& tile, const ListView& view, int64_t b, int kLanes, F f) {
    tile.sharers = chunk.sharers;
    for (int64_t i = 0; i < chunk.num_shared; ++i) {
      tile.shared = chunk.shared + i;
      tile.init_shared(view, b, chunk.heads, kLanes);
      if (tile.total == 0) continue;
      find(tile);
      f();
    }
    tile.shared = nullptr;
  }
};

template <class T>
class RoutedForward : public WindowForward<T, Lists> {
 public:
  using Base = WindowForward<T, Lists>;
  using typename Base::Acc;

  RoutedForward(const ListView& view, void* scratch) : Base(view.params->window, view, scratch) {
    slots.allocate(this->arena, view, false);
  }
  void run(const int64_t index[3], int64_t from, int64_t to, Acc* partial) {
    const Acc* bias = slots.spread(this->plan, index);
    this->start_tile(index);
    this->forward(index[1], index[2], from, to, bias, partial);
  }
  void run_chunk(const ListChunk& chunk, int64_t b, int64_t h, Acc* states) {
    auto& tile = this->tile;
    ChunkRows<Acc> rows{chunk, states, Base::state_size(this->p), {}};
    rows.for_queries(tile, this->plan, Base::kLanes, [&] {
      this->start_lanes(h, true);
      this->lay_down_states(rows.of_lane);
    });
    rows.for_shared(tile, this->plan, b, Base::kLanes, [&] {
      this->tile_is_placed();
      const auto walk = [&] {
        this->take_up_states(rows.of_lane);
        return this->walk_keys(b, h, 0, tile.total, nullptr);
      };
      if (walk()) return this->lay_down_states(rows.of_lane);
      for (uint64_t rest = tile.whole; rest; rest &= rest - 1) {
        tile.live = rest & -rest;
        walk();
        this->lay_down_states(rows.of_lane);
      }
    });
    rows.for_queries(tile, this->plan, Base::kLanes, [&] {
      this->take_up_states(rows.of_lane);
      this->finish_forward(b, h);
    });
  }
  int64_t walk_length(const int64_t index[3]) {
    this->start_tile(index);
    return this->tile.total;
  }

 private:
  SlotBias<Acc> slots;
};

template <class T>
class RoutedBackward : public TileBackward<T, Lists> {
 public:
  using Base = TileBackward<T, Lists>;
  using Base::kLanes;
  using typename Base::Acc;

  RoutedBackward(const ListView& view, void* scratch) : Base(view.params->window, view, scratch) {
    slots.allocate(this->arena, view, true);
  }
  void run(const int64_t index[3], Acc* rows, Acc* dbias, Acc* dsink) {
    LocalRows local{};
    local.dump_row = this->plan.num_keys;
    const Acc* bias = slots.spread(this->plan, index);
    this->tile_backward(index[1], index[2], index, local, bias, rows, slots.gradient, dsink);
    if (slots.gradient) slots.gather(this->plan, index, dbias);
  }

  void run_chunk(const ListChunk& chunk, int64_t b, int64_t h, Acc* accumulators, Acc* dsink,
                 Acc* states) {
    auto& tile = this->tile;
    ChunkRows<Acc> rows{chunk, states, this->dp, {}};
    LocalRows local{};
    local.dump_row = this->plan.num_keys;
    memset(states, 0, sizeof(Acc) * (chunk.end - chunk.begin) * chunk.heads * this->dp);
    this->resting = rows.of_lane;
    rows.for_shared(tile, this->plan, b, kLanes, [&] {
      this->tile_is_placed();
      this->placed_backward(b, h, local, nullptr, accumulators, nullptr, nullptr);
    });
    this->resting = nullptr;
    rows.for_queries(tile, this->plan, kLanes, [&] {
      this->load_tile(b, h);
      this->add_sinks(dsink);
      this->take_up(rows.of_lane, this->dp, this->ot);
      this->finish_query(b, h);
    });
  }

  static void finish_keys(const RoutedParams& r, int64_t b, int64_t h, const Acc* const* rows,
                          int64_t count, int64_t from, int64_t to) {
    const WindowParams& p = r.window;
    const int64_t stride = Base::row_size(p), dp = Base::padded(p.head_dim);
    const auto write = [&](int64_t u, int64_t column, int64_t dim, T* dst) {
      for (int64_t d = 0; d < dim; d += kLanes) {
        const int64_t at_row = u * stride + column + d;
        VecOf<Acc> sum = load(rows[0] + at_row);
        for (int64_t k = 1; k < count; ++k) sum += load(rows[k] + at_row);
        if (d + kLanes <= dim) {
          narrow(dst + d, sum);
        } else {
          T tail[kLanes];
          narrow(tail, sum);
          memcpy(dst + d, tail, sizeof(T) * (dim - d));
        }
      }
    };
    for (int64_t u = from; u < to; ++u) {
      const int64_t token = r.key_order ? r.key_order[u] : u;
      const int64_t n1 = p.key_extent[1], n2 = p.key_extent[2];
      const int64_t x[3] = {token / n2 / n1, token / n2 % n1, token % n2};
      write(u, 0, p.head_dim, static_cast<T*>(p.dkey.data) + at(p.dkey, b, x, h));
      write(u, dp, p.head_dim_v, static_cast<T*>(p.dvalue.data) + at(p.dvalue, b, x, h));
    }
  }

 private:
  SlotBias<Acc> slots;
};

template <class T>
struct RoutedEntry {
  using F = RoutedForward<T>;
  using B = RoutedBackward<T>;
  using Acc = typename F::Acc;

  static int64_t forward_scratch(const RoutedParams&, const ListView& v) {
    return F(v, nullptr).scratch_bytes();
  }
  static int64_t backward_scratch(const RoutedParams&, const ListView& v) {
    return B(v, nullptr).scratch_bytes();
  }
  static int64_t walk_length(const RoutedParams&, const ListView& v, const int64_t index[3],
                             void* scratch) {
    return F(v, scratch).walk_length(index);
  }
  static void fetch_queries(const WindowParams& p, const ListView& v, const int64_t index[3]) {
    F::fetch_queries(p, v, index[1], index[2], index);
  }
  static void forward(const RoutedParams&, const ListView& v, const int64_t index[3], int64_t from,
                      int64_t to, void* scratch, void* partial) {
    F(v, scratch).run(index, from, to, static_cast<Acc*>(partial));
  }
  static void merge_partials(const RoutedParams&, const ListView& v, const int64_t index[3],
                             int64_t count, void* partials, void* scratch) {
    F(v, scratch)
        .merge_partials(index[1], index[2], index, count, static_cast<const Acc*>(partials));
  }
  static void backward(const RoutedParams&, const ListView& v, const int64_t index[3], void* rows,
                       void* dbias, void* dsink, void* scratch) {
    B(v, scratch)
        .run(index, static_cast<Acc*>(rows), static_cast<Acc*>(dbias), static_cast<Acc*>(dsink));
  }
  static int64_t chunk_state(const WindowParams& p) {
    return max64(F::state_size(p), B::padded(p.head_dim));
  }
  static void forward_chunk(const RoutedParams&, const ListView& v, const ListChunk& chunk,
                            int64_t b, int64_t h, void* scratch, void* states) {
    F(v, scratch).run_chunk(chunk, b, h, static_cast<Acc*>(states));
  }
  static void backward_chunk(const RoutedParams&, const ListView& v, const ListChunk& chunk,
                             int64_t b, int64_t h, void* rows, void* dsink, void* scratch,
                             void* states) {
    B(v, scratch)
        .run_chunk(chunk, b, h, static_cast<Acc*>(rows), static_cast<Acc*>(dsink),
                   static_cast<Acc*>(states));
  }
  static void finish_keys(const RoutedParams& r, int64_t b, int64_t h, const void* const* rows,
                          int64_t count, int64_t from, int64_t to) {
    B::finish_keys(r, b, h, reinterpret_cast<const Acc* const*>(rows), count, from, to);
  }

  static constexpr RoutedKernels table() {
    return {F::kLanes,   ATTNEXT_TILE_VECTORS, forward_scratch, backward_scratch, B::row_size,
            walk_length, fetch_queries,        forward,         F::partial_size,  merge_partials,
            backward,    chunk_state,          forward_chunk,   backward_chunk,   finish_keys};
  }
};

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
