// SPDX-License-Identifier: Apache-2.0
// A tile of queries and the walk over its keys: extra keys, then sinks, then the box that is the
// union of the windows, row by row. The walk emits blocks of key addresses with one bit per lane
// that attends; it is the only code that turns interval tables into work.
#pragma once

#include "../geometry.h"
#include "../params.h"
#include "simd.h"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

// Hands out pieces of one allocation; with a null base it only adds up their sizes.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    char* p = base_ + used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(base_ ? p : nullptr);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

constexpr int kMaxVectors = 4;
constexpr int kMaxLanes = 64;  // one bit each in a mask

ATTNEXT_INLINE int64_t clamp64(int64_t x, int64_t lo, int64_t hi) {
  return min64(max64(x, lo), hi);
}
ATTNEXT_INLINE int64_t at(const TensorRef& t, int64_t b, const int64_t x[3], int64_t h) {
  return b * t.batch + x[0] * t.token[0] + x[1] * t.token[1] + x[2] * t.token[2] + h * t.head;
}

// Where the gradients of a work item's keys accumulate: rows of a private box, then sinks, extras
// and one row that phantom keys may spoil.
struct LocalRows {
  int64_t begin[3], size[3];
  int64_t sink_row, extra_row, dump_row;
};

// The queries of a tile, a lane each.
struct Lanes {
  int vectors;     // in use
  int lanes;       // vectors * kLanes
  uint64_t whole;  // lanes that hold a query; no mask needs to clear the others
  uint64_t live;   // those at work
  int32_t query[3][kMaxLanes];
  int32_t head[kMaxLanes] = {};  // counted from the tile's first
};

// Of each key in [from, to) the bits of the lanes that attend it: a lane toggles its bit where an
// interval begins and ends, and a running xor does the rest. A lane's intervals are disjoint.
struct LaneMasks {
  uint64_t* out;
  int64_t from, to;
  uint64_t state;

  LaneMasks(uint64_t* masks, int64_t begin, int64_t end, uint64_t always)
      : out(masks), from(begin), to(end), state(always) {
    for (int64_t u = 0; u < to - from; ++u) out[u] = 0;
  }
  void add(int64_t begin, int64_t end, uint64_t bit) {
    begin = max64(begin, from), end = min64(end, to);
    if (begin >= end) return;
    if (begin == from) {
      state ^= bit;
    } else {
      out[begin - from] ^= bit;
    }
    if (end < to) out[end - from] ^= bit;
  }
  void finish() {
    for (int64_t u = 0; u < to - from; ++u) out[u] = state ^= out[u];
  }
};

struct Tile : Lanes {
  const AxisView* axis;
  const Group* group[3];
  int stack;
  int64_t bias_shift[kMaxVectors];
  int64_t bias_origin[3];
  int64_t bias_stride[3];
  uint64_t* row_mask[3];  // per key index of the union on axes 0 and 1; on axis 2 when rows repeat
  int64_t rows, width, sinks, total;
  int64_t class_keys[3];      // key indices of the tile's dilation class, on each axis
  int64_t fresh = INT64_MIN;  // key indices of axis 2 below are in the caches already

  void allocate(Arena& arena, const PlanView& plan, int64_t block) {
    for (int a = 0; a < 3; ++a) {
      const int64_t least = a == 2 ? block : 1;
      row_mask[a] = arena.template take<uint64_t>(max64(least, plan.axis[a].most_keys));
    }
  }

  // Bits of the lanes whose interval on `a` holds key index u, for u in [from, to).
  void axis_masks(int a, int64_t from, int64_t to, uint64_t* out) const {
    const AxisView& v = axis[a];
    LaneMasks masks(out, from, to, ~whole);
    for (uint64_t rest = whole; rest; rest &= rest - 1) {
      const int lane = __builtin_ctzll(rest);
      const int32_t i = query[a][lane];
      const uint64_t bit = uint64_t(1) << lane;
      masks.add(v.begin[i], v.end[i], bit);
      if (v.sink_begin) {  // the parts of the sinks that the window does not hold
        masks.add(v.sink_begin[i], min64(v.sink_end[i], v.begin[i]), bit);
        masks.add(max64(v.sink_begin[i], v.end[i]), v.sink_end[i], bit);
      }
    }
    masks.finish();
  }

  // Which queries the lanes hold.
  void place(const PlanView& plan, const int64_t index[3], int kLanes) {
    axis = plan.axis;
    stack = plan.stack_axis;
    for (int a = 0; a < 3; ++a) group[a] = axis[a].groups + index[a];
    vectors = group[stack]->num_segments;
    lanes = vectors * kLanes;
    whole = 0;
    const int32_t b0 = plan.box[0], b1 = plan.box[1], b2 = plan.box[2];
    for (int v = 0; v < vectors; ++v) {
      const Segment* s[3];
      for (int a = 0; a < 3; ++a) {
        s[a] = axis[a].segments + group[a]->first_segment + (a == stack ? v : 0);
      }
      int lane = v * kLanes;
      for (int32_t r0 = 0; r0 < b0; ++r0) {
        for (int32_t r1 = 0; r1 < b1; ++r1) {
          const bool outside = r0 >= s[0]->count || r1 >= s[1]->count;
          for (int32_t r2 = 0; r2 < b2; ++r2, ++lane) {
            if (outside || r2 >= s[2]->count) continue;
            query[0][lane] = s[0]->query + static_cast<int32_t>(axis[0].dilation) * r0;
            query[1][lane] = s[1]->query + static_cast<int32_t>(axis[1].dilation) * r1;
            query[2][lane] = s[2]->query + static_cast<int32_t>(axis[2].dilation) * r2;
            whole |= uint64_t(1) << lane;
          }
        }
      }
    }
    if (plan.heads_in_lanes > 1) add_heads(plan.heads_in_lanes, kLanes);
  }
  // The queries of one head, then those of the next.
  void add_heads(int count, int kLanes) {
    const Lanes placed = *this;
    int lane = 0;
    for (int h = 0; h < count; ++h) {
      for (uint64_t rest = placed.whole; rest; rest &= rest - 1, ++lane) {
        for (int a = 0; a < 3; ++a) query[a][lane] = placed.query[a][__builtin_ctzll(rest)];
        head[lane] = h;
      }
    }
    whole = (uint64_t(2) << (lane - 1)) - 1;
    vectors = (lane + kLanes - 1) / kLanes;
    lanes = vectors * kLanes;
  }

  void init(const PlanView& plan, const int64_t index[3], int kLanes, int64_t extra_keys) {
    place(plan, index, kLanes);
    const int64_t n0 = group[0]->end - group[0]->begin, n1 = group[1]->end - group[1]->begin;
    rows = n0 * n1;
    width = group[2]->end - group[2]->begin;
    sinks = group[2]->sink_end - group[2]->sink_begin;
    total = extra_keys + sinks + rows * width;
    for (int a = 0; a < 3; ++a) {
      const int64_t c = group[a]->cls;
      class_keys[a] = c < axis[a].num_keys ? (axis[a].num_keys - c - 1) / axis[a].dilation + 1 : 0;
    }

    // Bias rows are [key index - position of the vector's first query][lanes of one vector].
    int64_t stride = kLanes;
    for (int a = 2; a >= 0; --a) {
      bias_stride[a] = stride;
      bias_origin[a] = axis[a].segments[group[a]->first_segment].position + axis[a].relative_begin;
      stride *= axis[a].relative_end - axis[a].relative_begin;
    }
    const Segment* first = axis[stack].segments + group[stack]->first_segment;
    for (int v = 0; v < vectors; ++v) {
      bias_shift[v] = (first[v].position - first[0].position) * bias_stride[stack];
    }
    live = whole;
    axis_masks(0, group[0]->begin, group[0]->end, row_mask[0]);
    axis_masks(1, group[1]->begin, group[1]->end, row_mask[1]);
    if (rows > 1) axis_masks(2, group[2]->begin, group[2]->end, row_mask[2]);
  }
};

constexpr int64_t kNoBias = -1;

// Rows of one head lie far apart: the hardware does not see the next one coming.
template <class T>
ATTNEXT_INLINE void fetch(const T* row, int64_t dim) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t d = 0; d < dim; d += kLine) __builtin_prefetch(row + d);
}

// Up to `capacity` keys that a query of the tile attends. Where only some lanes are live the keys
// come in the same blocks, or sums would take other bits; those that no live lane attends are
// phantoms.
template <class T>
struct KeyBlock {
  int64_t count;
  bool masked;    // some live lane does not attend some key
  const T** key;  // addresses of rows; phantom keys point at zeros
  const T** value;
  uint64_t* mask;
  int64_t* bias;                             // offset of the bias row for vector 0, or kNoBias
  int64_t* row;                              // accumulator row
  bool* fresh;                               // worth a prefetch
  int64_t lo[kMaxVectors], hi[kMaxVectors];  // keys outside do not concern the vector
  // Where blocks with landmarks begin, and their landmarks, which the mask's lanes see past.
  int64_t num_landmarks = 0;
  int64_t *landmark_begin, *landmark_at;

  void fetch_rows(int64_t j, int64_t dim, int64_t dim_v) const {
    fetch(key[j], dim);
    fetch(value[j], dim_v);
  }
  // The same keys of another head.
  void move(int64_t key_step, int64_t value_step, const T* zeros, int64_t dim, int64_t dim_v) {
    for (int64_t j = 0; j < count; ++j) {
      key[j] = key[j] == zeros ? zeros : key[j] + key_step;
      value[j] = value[j] == zeros ? zeros : value[j] + value_step;
      if (fresh[j]) fetch_rows(j, dim, dim_v);
    }
  }
};

template <class T>
void active_range(const Lanes& tile, int v, KeyBlock<T>* block) {
  const int lanes = tile.lanes / tile.vectors;
  const uint64_t ones = lanes == 64 ? ~uint64_t(0) : (uint64_t(1) << lanes) - 1;
  const uint64_t bits = (ones << (v * lanes)) & tile.live;
  int64_t lo = 0, hi = block->count;
  while (lo < hi && !(block->mask[lo] & bits)) ++lo;
  while (hi > lo && !(block->mask[hi - 1] & bits)) --hi;
  block->lo[v] = lo;
  block->hi[v] = hi;
}

template <class T>
struct KeyWalk {
  const WindowParams& p;
  const Tile& tile;
  const T* zeros;
  uint64_t* scratch_mask;  // [block]
  const LocalRows* local;  // null in the forward pass
  bool with_bias;
  int64_t b, h_kv;
  int64_t key_base, value_base;

  KeyWalk(const WindowParams& params, const PlanView&, const Tile& t, const T* zero_row,
          uint64_t* masks, const LocalRows* rows, int64_t batch, int64_t head_kv)
      : p(params),
        tile(t),
        zeros(zero_row),
        scratch_mask(masks),
        local(rows),
        with_bias(params.bias != nullptr),
        b(batch),
        h_kv(head_kv) {
    const int64_t origin[3] = {0, 0, 0};
    key_base = at(p.key, b, origin, h_kv);
    value_base = at(p.value, b, origin, h_kv);
  }

  // Fills `block` from linear position `from`, at most up to `to`; returns where it stopped.
  int64_t fill(int64_t from, int64_t to, int64_t capacity, KeyBlock<T>* block) const {
    block->count = 0;
    uint64_t all = ~uint64_t(0);
    int64_t pos = from;
    const int64_t extra_end = p.extra_keys, sink_end = extra_end + tile.sinks;
    for (; pos < min64(to, extra_end) && block->count < capacity; ++pos) emit_extra(pos, block);
    while (pos < min64(to, sink_end) && block->count < capacity) {
      const int64_t u = tile.group[2]->sink_begin + (pos - extra_end);
      const int64_t n = min64(min64(sink_end, to) - pos, capacity - block->count);
      all &= emit_run(0, 0, u, n, true, block);
      pos += n;
    }
    if (pos < to && block->count < capacity) {
      const int64_t n1 = tile.group[1]->end - tile.group[1]->begin;
      const int64_t row = (pos - sink_end) / tile.width;
      int64_t u0 = row / n1, u1 = row % n1, column = (pos - sink_end) % tile.width;
      while (pos < to && block->count < capacity) {
        int64_t n = min64(tile.width - column, to - pos);
        if (tile.row_mask[0][u0] & tile.row_mask[1][u1] & tile.whole) {
          n = min64(n, capacity - block->count);
          all &= emit_run(u0, u1, tile.group[2]->begin + column, n, false, block);
        }
        pos += n, column += n;
        if (column < tile.width) continue;
        column = 0;
        if (++u1 == n1) u1 = 0, ++u0;
      }
    }
    block->masked = all != ~uint64_t(0);
    for (int v = 0; v < tile.vectors; ++v) active_range(tile, v, block);
    return pos;
  }

 private:
  // The first run of keys in [begin, end) that all live lanes attend, which in a long window most
  // keys are of. Left as it is where the run is too short to be worth a way of its own.
  static constexpr int64_t kLeastCommon = 32;
  void find_common(uint64_t others, const uint64_t* mask, int64_t begin, int64_t end, int64_t* from,
                   int64_t* to) const {
    const auto is_common = [&](int64_t k) { return !~((others & mask[k]) | ~tile.live); };
    int64_t k = begin;
    while (k < end && !is_common(k)) ++k;
    const int64_t first = k;
    while (k < end && is_common(k)) ++k;
    if (k - first >= kLeastCommon) *from = first, *to = k;
  }
  static void step_through(const T* at, int64_t step, int64_t count, const T** out) {
    for (int64_t k = 0; k < count; ++k, at += step) out[k] = at;
  }

  void emit_extra(int64_t e, KeyBlock<T>* block) const {
    const int64_t j = block->count++;
    block->key[j] = static_cast<const T*>(p.extra_key.data) + b * p.extra_key.batch +
                    e * p.extra_key.token[2] + h_kv * p.extra_key.head;
    block->value[j] = static_cast<const T*>(p.extra_value.data) + b * p.extra_value.batch +
                      e * p.extra_value.token[2] + h_kv * p.extra_value.head;
    block->mask[j] = ~uint64_t(0);
    block->bias[j] = kNoBias;
    block->fresh[j] = true;
    if (local) block->row[j] = local->extra_row + e;
  }

  // Keys [u, u + n) of row (u0, u1) of the union; returns the conjunction of their masks.
  uint64_t emit_run(int64_t u0, int64_t u1, int64_t u, int64_t n, bool sink,
                    KeyBlock<T>* block) const {
    const AxisView* axis = tile.axis;
    const uint64_t* mask2 = scratch_mask;
    if (tile.rows > 1 && !sink) {
      mask2 = tile.row_mask[2] + (u - tile.group[2]->begin);
    } else {
      tile.axis_masks(2, u, u + n, scratch_mask);
    }
    const uint64_t mask01 = tile.row_mask[0][u0] & tile.row_mask[1][u1];
    int64_t index[3] = {tile.group[0]->begin + u0, tile.group[1]->begin + u1, u};
    int64_t x[3];
    bool phantom = false;
    for (int a = 0; a < 3; ++a) {
      if (a < 2 && (index[a] < 0 || index[a] >= tile.class_keys[a])) phantom = true;
      x[a] = tile.group[a]->cls + axis[a].dilation * index[a];
    }
    const int64_t real_begin = phantom ? n : clamp64(-u, 0, n);
    const int64_t real_end = phantom ? n : clamp64(tile.class_keys[2] - u, real_begin, n);
    const bool elsewhere = sink && p.sink_key.data;
    const TensorRef& keys = elsewhere ? p.sink_key : p.key;
    const TensorRef& values = elsewhere ? p.sink_value : p.value;
    const T* key = static_cast<const T*>(keys.data) + at(keys, b, x, h_kv);
    const T* value = static_cast<const T*>(values.data) + at(values, b, x, h_kv);
    const int64_t key_step = axis[2].dilation * keys.token[2];
    const int64_t value_step = axis[2].dilation * values.token[2];
    int64_t bias_at = 0;
    for (int a = 0; a < 3; ++a) bias_at += (index[a] - tile.bias_origin[a]) * tile.bias_stride[a];
    int64_t row_at = 0;
    if (local) {
      row_at = sink && axis[2].sink_rows > 0
                   ? local->sink_row + u
                   : ((index[0] - local->begin[0]) * local->size[1] + index[1] - local->begin[1]) *
                             local->size[2] +
                         u - local->begin[2];
    }
    uint64_t all = ~uint64_t(0);
    int64_t j = block->count;
    int64_t common = n, common_end = n;
    if (real_end - real_begin >= kLeastCommon) {
      find_common(mask01, mask2, real_begin, real_end, &common, &common_end);
    }
    for (int64_t k = 0; k < n; ++k) {
      if (k == common) {
        const int64_t count = common_end - k, first = u + k;
        const int64_t old = tile.fresh > first ? min64(tile.fresh - first, count) : 0;
        for (int64_t i = 0; i < count; ++i) block->mask[j + i] = ~uint64_t(0);
        step_through(key + k * key_step, key_step, count, block->key + j);
        step_through(value + k * value_step, value_step, count, block->value + j);
        memset(block->fresh + j, false, old);
        memset(block->fresh + j + old, true, count - old);
        for (int64_t i = old; i < count; ++i) block->fetch_rows(j + i, p.head_dim, p.head_dim_v);
        for (int64_t i = 0; with_bias && i < count; ++i) {
          block->bias[j + i] = bias_at + (k + i) * tile.bias_stride[2];
        }
        for (int64_t i = 0; local && i < count; ++i) block->row[j + i] = row_at + k + i;
        j += count, k = common_end;
        if (k == n) break;
      }
      const uint64_t mask = mask01 & mask2[k];
      if (!(mask & tile.whole)) continue;
      const bool real = k >= real_begin && k < real_end && (mask & tile.live);
      block->mask[j] = mask | ~tile.live;
      all &= block->mask[j];
      block->key[j] = real ? key + k * key_step : zeros;
      block->value[j] = real ? value + k * value_step : zeros;
      block->fresh[j] = u + k >= tile.fresh;
      if (block->fresh[j]) block->fetch_rows(j, p.head_dim, p.head_dim_v);
      if (with_bias) block->bias[j] = bias_at + k * tile.bias_stride[2];
      if (local) block->row[j] = real ? row_at + k : local->dump_row;
      ++j;
    }
    block->count = j;
    return all;
  }
};

// The keys of window attention. Heads of one rule walk alike; where tiles share most of their keys,
// these are copies (key_box.h).
struct Boxes {
  static constexpr bool kHeadsWalkAlike = true;
  static constexpr bool kAreCopied = true;
  using Plan = PlanView;
  using Tile = ATTNEXT_ISA::Tile;
  template <class T>
  using Walk = KeyWalk<T>;
};

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
