// SPDX-License-Identifier: Apache-2.0
// The keys of routed attention: what a query block lists, and beside it a window and sinks. The
// lists become disjoint runs in rising order here, so that what is listed twice, or listed and in
// the window, counts once; the rules of routed.h then say which lanes attend which key of a run.
// Or a tile walks one run of keys that its queries share, each a part of it: see ListChunk.
#pragma once

#include "../routed_rules.h"
#include "keywalk.inl"
#include "routed.h"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

// Keys at places [begin, end): those before a tile's run number `at` slots of its walk.
struct Run {
  int32_t begin, end;
  int32_t slot;  // the list's, which has the bias; -1: the window or the sinks alone
  bool listed;
  int64_t at;
  bool landmark = false;  // the last key is one; walked in one piece
};

struct ListTile : Lanes {
  const SharedKeys* shared = nullptr;  // null: the list of a piece
  const Sharer* sharers = nullptr;     // of the chunk
  int32_t place_of[kMaxLanes];         // in the order of queries
  Run* runs;
  int64_t num_runs, total;
  int32_t lo[kMaxLanes], hi[kMaxLanes];                // keys that the rules allow
  int32_t window_lo[kMaxLanes], window_hi[kMaxLanes];  // of those, the window
  int32_t sink_hi[kMaxLanes];                          // and the sinks, from 0
  const int32_t* documents;                            // of the keys; null: all are one
  int32_t document[kMaxLanes];
  int32_t self[kMaxLanes];   // the key that a query may not attend, -1: none
  int64_t full_lo, full_hi;  // keys that the rules allow to every lane
  int32_t bias_shift[kMaxVectors] = {};
  bool with_bias;
  bool landmarks;

  void allocate(Arena& arena, const ListView& view, int64_t) {
    // A run of the window or the sinks lies between runs of the list, before or after them.
    sorted = arena.template take<Run>(2 * view.most_slots + 1);  // overlaps are cut
    runs = arena.template take<Run>(4 * view.most_slots + 4);
  }

  void place(const ListView& view, const int64_t index[3], int kLanes) {
    const ListPiece& piece = view.pieces[index[0]];
    place(*view.params, piece.heads, piece.end - piece.begin, kLanes,
          [&](int i) { return piece.begin + i; });
  }
  void place_shared(const RoutedParams& r, int heads, int kLanes) {
    const Sharer* own = sharers + shared->first;
    place(r, heads, shared->count, kLanes, [&](int i) { return own[i].place; });
  }
  // `count` queries for each of the heads, a head after the other.
  template <class F>
  void place(const RoutedParams& r, int heads, int count, int kLanes, F place_at) {
    vectors = (count * heads + kLanes - 1) / kLanes;
    lanes = vectors * kLanes;
    whole = 0;
    int lane = 0;
    for (int g = 0; g < heads; ++g) {
      for (int i = 0; i < count; ++i, ++lane) {
        const int32_t at_place = place_at(i);
        const int32_t token = r.query_order ? r.query_order[at_place] : at_place;
        place_of[lane] = at_place;
        raster[lane] = token;
        const int32_t n1 = static_cast<int32_t>(r.window.query_extent[1]);
        const int32_t n2 = static_cast<int32_t>(r.window.query_extent[2]);
        query[2][lane] = token % n2;
        query[1][lane] = token / n2 % n1;
        query[0][lane] = token / n2 / n1;
        head[lane] = g;
        whole |= uint64_t(1) << lane;
      }
    }
  }

  // A run that queries share. They have lists, and neither a window nor sinks nor biases.
  void init_shared(const ListView& view, int64_t b, int heads, int kLanes) {
    const RoutedParams& r = *view.params;
    place_shared(r, heads, kLanes);
    live = whole;
    const int64_t num_keys = view.num_keys;
    const int64_t allowed = r.key_lengths ? clamp64(r.key_lengths[b], 0, num_keys) : num_keys;
    documents = r.key_documents ? r.key_documents + b * num_keys : nullptr;
    full_lo = r.exclude_self ? num_keys : 0, full_hi = num_keys;
    const Sharer* own = sharers + shared->first;
    int64_t reach_lo = shared->end, reach_hi = shared->begin;
    for (int lane = 0, i = 0; lane < shared->count * heads; ++lane) {
      const Reach x = keys_of(r, HeadPolicy::kList, raster[lane] + view.offset, 0, allowed);
      lo[lane] = static_cast<int32_t>(max64(x.lo, own[i].begin));
      hi[lane] = static_cast<int32_t>(min64(x.hi, own[i].end));
      self[lane] = static_cast<int32_t>(x.self);
      document[lane] = documents ? r.query_documents[b * view.num_queries + raster[lane]] : 0;
      reach_lo = min64(reach_lo, lo[lane]), reach_hi = max64(reach_hi, hi[lane]);
      full_lo = max64(full_lo, lo[lane]), full_hi = min64(full_hi, hi[lane]);
      if (++i == shared->count) i = 0;
    }
    with_bias = landmarks = false;
    num_runs = total = 0;
    if (reach_lo < reach_hi) push(reach_lo, reach_hi, -1, true);
  }

  void init(const ListView& view, const int64_t index[3], int kLanes, int64_t) {
    place(view, index, kLanes);
    live = whole;
    const RoutedParams& r = *view.params;
    const int64_t b = index[1], h = index[2];
    const int64_t num_keys = view.num_keys;
    const HeadPolicy policy =
        r.head_policy ? static_cast<HeadPolicy>(r.head_policy[h]) : HeadPolicy::kList;
    const int64_t allowed = r.key_lengths ? clamp64(r.key_lengths[b], 0, num_keys) : num_keys;
    documents = r.key_documents ? r.key_documents + b * num_keys : nullptr;
    landmarks = policy == HeadPolicy::kLandmark;
    full_lo = r.exclude_self ? num_keys : 0, full_hi = num_keys;
    // Of all lanes: keys that one attends, and what the window and the sinks reach.
    int64_t reach_lo = num_keys, reach_hi = 0, near_lo = num_keys, near_hi = 0, sink_reach = 0;
    for (uint64_t rest = whole; rest; rest &= rest - 1) {
      const int lane = __builtin_ctzll(rest);
      const int64_t token = raster[lane];
      const int64_t position = token + view.offset;
      const Reach x = keys_of(r, policy, position, 0, allowed);
      const bool has_sinks = x.sink_hi > x.lo;
      lo[lane] = static_cast<int32_t>(x.lo), hi[lane] = static_cast<int32_t>(x.hi);
      // A landmark is not for its own block, nor for itself.
      if (landmarks && x.hi == position + 1 && is_landmark(r, position)) --hi[lane];
      window_lo[lane] = static_cast<int32_t>(x.near_lo);
      window_hi[lane] = static_cast<int32_t>(x.near_hi);
      sink_hi[lane] = static_cast<int32_t>(has_sinks ? x.sink_hi : 0);
      self[lane] = static_cast<int32_t>(x.self);
      document[lane] = documents ? r.query_documents[b * view.num_queries + token] : 0;
      reach_lo = min64(reach_lo, x.lo), reach_hi = max64(reach_hi, x.hi);
      full_lo = max64(full_lo, x.lo), full_hi = min64(full_hi, hi[lane]);
      if (x.near_lo < x.near_hi) {
        near_lo = min64(near_lo, x.near_lo), near_hi = max64(near_hi, x.near_hi);
      }
      sink_reach = max64(sink_reach, sink_hi[lane]);
    }
    int64_t count = 0;
    with_bias = false;
    if (policy == HeadPolicy::kDense) {
      sorted[count++] = {0, static_cast<int32_t>(num_keys), -1, true, 0};
    } else if (policy == HeadPolicy::kList) {
      count = list(view, view.pieces[index[0]].block, b, h);
      with_bias = r.entry_bias != nullptr;
    } else if (landmarks) {
      for (int64_t k = 0; k < r.key_blocks && r.key_offsets[k] < reach_hi; ++k) {
        sorted[count++] = {r.key_offsets[k],    r.key_offsets[k + 1], -1, true, 0,
                           k + 1 < r.key_blocks};
      }
    } else if (policy == HeadPolicy::kOff) {
      reach_hi = 0;
    }
    // In the order of places other than the keys' own, rules do not bound what is walked.
    const bool in_order = !r.key_order;
    num_runs = 0;
    total = 0;
    int64_t done = 0;
    const auto besides_up_to = [&](int64_t end) {  // the window and the sinks, up to the next run
      const auto add = [&](int64_t from, int64_t to) {
        from = max64(from, done), to = min64(to, end);
        if (from < to) push(from, to, -1, false);
      };
      if (sink_reach >= near_lo) return add(0, max64(sink_reach, near_hi));
      add(0, sink_reach);
      add(near_lo, near_hi);
    };
    for (int64_t k = 0; k < count; ++k) {
      const Run& run = sorted[k];
      const int64_t from = in_order ? max64(run.begin, reach_lo) : run.begin;
      const int64_t to = in_order ? min64(run.end, reach_hi) : run.end;
      if (from >= to) continue;
      besides_up_to(from);
      push(from, to, run.slot, true);
      runs[num_runs - 1].landmark = run.landmark && to == run.end;
      done = to;
    }
    besides_up_to(num_keys);
  }

  // Bits of the lanes that attend keys [from, to) of a run.
  void masks(int64_t from, int64_t to, bool listed, uint64_t* out) const {
    LaneMasks masks(out, from, to, ~whole);
    for (uint64_t rest = whole; rest; rest &= rest - 1) {
      const int lane = __builtin_ctzll(rest);
      const auto add = [&](int64_t begin, int64_t end) {
        const int64_t own = self[lane];
        const uint64_t bit = uint64_t(1) << lane;
        if (own < begin || own >= end) return masks.add(begin, end, bit);
        masks.add(begin, own, bit);
        masks.add(own + 1, end, bit);
      };
      if (listed) {
        add(lo[lane], hi[lane]);
      } else if (sink_hi[lane] >= window_lo[lane]) {
        add(lo[lane], max64(sink_hi[lane], window_hi[lane]));
      } else {
        add(lo[lane], sink_hi[lane]);
        add(window_lo[lane], window_hi[lane]);
      }
    }
    masks.finish();
    for (int64_t u = from; documents && u < to; ++u) out[u - from] &= same_document(u);
  }
  // The same of one key.
  uint64_t mask(int32_t token) const {
    uint64_t out;
    masks(token, token + 1, true, &out);
    return out;
  }
  // Whether every lane attends all of keys [from, to) of a listed run.
  bool all_attend(int64_t from, int64_t to) const {
    return !documents && full_lo <= from && to <= full_hi;
  }

 private:
  Run* sorted;
  int32_t raster[kMaxLanes];

  static bool is_landmark(const RoutedParams& r, int64_t key) {
    int64_t low = 0, high = r.key_blocks - 1;  // blocks but the last end with one
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      r.key_offsets[middle + 1] <= key ? low = middle + 1 : high = middle;
    }
    return low < r.key_blocks - 1 && r.key_offsets[low + 1] - 1 == key;
  }

  uint64_t same_document(int64_t token) const {
    uint64_t bits = ~whole;
    for (int lane = 0; lane < lanes; ++lane) {
      bits |= uint64_t(documents[token] == document[lane]) << lane;
    }
    return bits;
  }

  void push(int64_t from, int64_t to, int32_t slot, bool listed) {
    runs[num_runs++] = {
        static_cast<int32_t>(from), static_cast<int32_t>(to), slot, listed, total, false};
    total += to - from;
  }

  // The list of a query block as disjoint runs in rising order, in `sorted`.
  int64_t list(const ListView& view, int64_t block, int64_t b, int64_t h) {
    const RoutedParams& r = *view.params;
    const int64_t begin = first_entry(r, block, b, h), end = last_entry(r, block, b, h);
    int64_t count = 0;
    bool ordered = true;
    for (int64_t e = begin; e < end; ++e) {
      int32_t from = r.lists[e], to;
      if (r.ends) {
        to = r.ends[e];
      } else {
        if (from < 0) continue;
        to = r.key_offsets[from + 1];
        from = r.key_offsets[from];
      }
      if (from >= to) continue;
      ordered &= count == 0 || sorted[count - 1].end <= from;
      sorted[count++] = {from, to, static_cast<int32_t>(e - begin), true, 0};
    }
    return ordered ? count : disjoint(count, r.entry_bias != nullptr);
  }

  // Sorts; of overlapping runs, the first slot keeps all of its keys (they may differ in bias).
  int64_t disjoint(int64_t count, bool distinct) {
    const auto before = [](const Run& x, const Run& y) {
      return x.begin != y.begin ? x.begin < y.begin : x.slot < y.slot;
    };
    sort(sorted, count, before);
    bool overlap = false;
    for (int64_t k = 1; k < count; ++k) overlap |= sorted[k].begin < sorted[k - 1].end;
    if (!overlap) return count;
    int64_t kept = 0;
    if (!distinct) {
      for (int64_t k = 0; k < count; ++k) {
        if (kept > 0 && sorted[k].begin <= sorted[kept - 1].end) {
          sorted[kept - 1].end =
              sorted[k].end > sorted[kept - 1].end ? sorted[k].end : sorted[kept - 1].end;
        } else {
          sorted[kept++] = sorted[k];
        }
      }
      return kept;
    }
    // With a bias: cut at every end of a run, and give each piece to the first slot that has it.
    // Pieces may be more than slots, at most twice as many: they are made in `runs`.
    Run* pieces = runs;
    for (int64_t k = 0; k < count; ++k) {
      int64_t at = sorted[k].begin;
      while (at < sorted[k].end) {
        int64_t to = sorted[k].end;
        bool mine = true;
        for (int64_t o = 0; o < count; ++o) {
          const Run& other = sorted[o];
          if (o == k || other.end <= at) continue;
          if (other.begin > at) {
            to = min64(to, other.begin);
            continue;
          }
          to = min64(to, other.end);
          mine &= sorted[k].slot < other.slot;
        }
        if (mine) {
          if (kept > 0 && pieces[kept - 1].slot == sorted[k].slot && pieces[kept - 1].end == at) {
            pieces[kept - 1].end = static_cast<int32_t>(to);
          } else {
            pieces[kept++] = {static_cast<int32_t>(at), static_cast<int32_t>(to), sorted[k].slot,
                              true, 0};
          }
        }
        at = to;
      }
    }
    sort(pieces, kept, before);
    memcpy(sorted, pieces, sizeof(Run) * kept);
    return kept;
  }

  // Heap sort: the units have no standard library, and lists may be long.
  template <class Before>
  static void sort(Run* x, int64_t n, Before before) {
    const auto sink = [&](int64_t i, int64_t size) {
      for (int64_t child; (child = 2 * i + 1) < size; i = child) {
        if (child + 1 < size && before(x[child], x[child + 1])) ++child;
        if (!before(x[i], x[child])) return;
        const Run t = x[i];
        x[i] = x[child], x[child] = t;
      }
    };
    for (int64_t i = n / 2; i-- > 0;) sink(i, n);
    for (int64_t i = n; i-- > 1;) {
      const Run t = x[0];
      x[0] = x[i], x[i] = t;
      sink(0, i);
    }
  }
};

template <class T>
struct ListWalk {
  const WindowParams& p;
  const ListView& view;
  const ListTile& tile;
  const T* zeros;
  uint64_t* scratch_mask;  // [block]
  const LocalRows* local;  // null in the forward pass
  const T *key, *value;

  ListWalk(const WindowParams& params, const ListView& list_view, const ListTile& t,
           const T* zero_row, uint64_t* masks, const LocalRows* rows, int64_t b, int64_t h_kv)
      : p(params), view(list_view), tile(t), zeros(zero_row), scratch_mask(masks), local(rows) {
    const int64_t origin[3] = {0, 0, 0};
    key = static_cast<const T*>(p.key.data) + at(p.key, b, origin, h_kv);
    value = static_cast<const T*>(p.value.data) + at(p.value, b, origin, h_kv);
  }

  int64_t fill(int64_t from, int64_t to, int64_t capacity, KeyBlock<T>* block) const {
    block->count = block->num_landmarks = 0;
    uint64_t all = ~uint64_t(0);
    int64_t pos = from;
    int64_t r = run_at(from);
    while (pos < to && block->count < capacity) {
      const Run& run = tile.runs[r];
      if (run.landmark && block->count + run.end - run.begin > capacity) break;
      const int64_t begin = block->count;
      const int64_t end = min64(run.at + run.end - run.begin, to);
      const int64_t n = min64(end - pos, capacity - block->count);
      all &= emit(run, run.begin + (pos - run.at), n, block);
      pos += n;
      if (run.landmark && block->count == begin + n) {  // somebody sees past it
        const int64_t known = block->num_landmarks++;
        block->landmark_begin[known] = begin;
        block->landmark_at[known] = block->count - 1;
      }
      if (pos == run.at + run.end - run.begin) ++r;
    }
    block->masked = all != ~uint64_t(0);
    for (int v = 0; v < tile.vectors; ++v) active_range(tile, v, block);
    return pos;
  }

 private:
  int64_t run_at(int64_t pos) const {
    int64_t lo = 0, hi = tile.num_runs;
    while (lo + 1 < hi) {
      const int64_t middle = (lo + hi) / 2;
      (tile.runs[middle].at <= pos ? lo : hi) = middle;
    }
    return lo;
  }

  uint64_t emit(const Run& run, int64_t u, int64_t n, KeyBlock<T>* block) const {
    // Shared runs are of places; where these are not the keys' own, no rule speaks of keys.
    const int32_t* order = tile.shared ? nullptr : view.params->key_order;
    const bool full = run.listed && (order ? !view.has_rules : tile.all_attend(u, u + n));
    const int64_t bias = tile.with_bias && run.slot >= 0 ? run.slot * view.bias_step : kNoBias;
    if (!full && !order) tile.masks(u, u + n, run.listed, scratch_mask);
    uint64_t all = ~uint64_t(0);
    int64_t j = block->count;
    for (int64_t k = 0; k < n; ++k) {
      const uint64_t mask = full ? ~uint64_t(0) : order ? tile.mask(order[u + k]) : scratch_mask[k];
      if (!(mask & tile.whole)) continue;
      const bool real = mask & tile.live;
      block->mask[j] = mask | ~tile.live;
      all &= block->mask[j];
      block->key[j] =
          real ? key + (view.key_at ? view.key_at[u + k] : (u + k) * view.key_step) : zeros;
      block->value[j] =
          real ? value + (view.value_at ? view.value_at[u + k] : (u + k) * view.value_step) : zeros;
      fetch(block->key[j], p.head_dim);
      fetch(block->value[j], p.head_dim_v);
      block->bias[j] = bias;
      block->fresh[j] = true;
      if (local) block->row[j] = real ? u + k : local->dump_row;
      ++j;
    }
    block->count = j;
    return all;
  }
};

// The keys of routed attention.
struct Lists {
  static constexpr bool kHeadsWalkAlike = false;
  static constexpr bool kAreCopied = false;
  using Plan = ListView;
  using Tile = ListTile;
  template <class T>
  using Walk = ListWalk<T>;
};

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
