// SPDX-License-Identifier: Apache-2.0
// Which rows a block holds, and the walk over what they attend: extra keys, then sinks, then the
// box that is the union of the rows' windows, token by token in raster order. The only code on the
// device that turns the tables of plan.h into work. list_walk.cuh has the other walk, which kernels
// take in its place.
#pragma once

#include "kernels.h"
#include "plan.h"
#include "rows.cuh"

namespace attnext {
namespace cuda {

constexpr int32_t kNoBias = INT32_MIN;

ATTNEXT_DEVICE int64_t offset_of(const TensorRef& t, int64_t batch, const int32_t (&x)[3],
                                 int64_t head) {
  return batch * t.batch + x[0] * t.token[0] + x[1] * t.token[1] + x[2] * t.token[2] +
         head * t.head;
}

// Bits [begin, end) of a word; both may lie outside of it.
ATTNEXT_DEVICE uint32_t bits_below(int n) { return ~__funnelshift_lc(0u, ~0u, max(n, 0)); }
ATTNEXT_DEVICE uint32_t bit_range(int begin, int end) {
  return bits_below(end) & ~bits_below(begin);
}

struct Interval {
  int32_t begin, end;
  ATTNEXT_DEVICE bool contains(int32_t u) const { return begin <= u && u < end; }
};

// Division by the extent of a tile's walk on one axis.
struct Divider {
  uint32_t multiplier;
  int32_t shift;
  ATTNEXT_DEVICE explicit Divider(const Division& d) : multiplier(d.multiplier), shift(d.shift) {}
  ATTNEXT_DEVICE explicit Divider(const AxisTile& tile)
      : multiplier(static_cast<uint32_t>(tile.multiplier)), shift(tile.shift) {}
  ATTNEXT_DEVICE int32_t operator()(int32_t n) const {
    return static_cast<int32_t>(uint64_t(static_cast<uint32_t>(n)) * multiplier >> shift);
  }
};

// One row of the tile: where it stands and what it attends.
struct BoxRow {
  static constexpr int32_t head = 0;  // of the block's
  bool live;
  int32_t token[3], position[3];
  Interval window[3], sinks;
};

template <class Walk, int kStep>
struct BoxSteps;

// kOneLine: for problems in which every box is a part of one line, and in which the other axes have
// one token that all attend. What lines ask for is then no part of the kernel.
template <bool kOneLine>
struct BoxWalkOf {
  static constexpr int kFirstAxis = kOneLine ? 2 : 0;
  using Launch = WindowLaunch;
  using Row = BoxRow;
  template <int kStep>
  using Steps = BoxSteps<BoxWalkOf, kStep>;
  struct Cursor {};  // what a thread keeps from one look-up to the next
  static constexpr int kWarpInts = kBoxWarpInts;
  static constexpr bool kRowsBias = true;    // where the bias of a key lies depends on the row
  static constexpr bool kPacks = false;      // whether rows may be of several heads
  static constexpr bool kHasExtra = true;    // keys besides those of the map
  static constexpr bool kScalesRows = true;  // whether queries may have scales of their own
  ATTNEXT_DEVICE static uint32_t packed(const WindowLaunch&) { return 1; }

  const int32_t* tables;
  int32_t rule_at, tile_at[3];   // in the tables: a pointer each would take twice the registers
  int32_t extra, lead;           // extra keys; they and the sinks, which come before the box
  int32_t width, lines, lines1;  // of the box; lines = lines0 * lines1
  int32_t total;                 // slots
  // A walk over queries has neither extra keys nor sinks: a key's window holds all queries that see
  // it. What asks for them is then no part of the kernel.
  bool over_keys;

  ATTNEXT_DEVICE const RuleTiles& rule() const {
    return *reinterpret_cast<const RuleTiles*>(tables + rule_at);
  }
  ATTNEXT_DEVICE const AxisTile& tile(int a) const {
    return *reinterpret_cast<const AxisTile*>(tables + tile_at[a]);
  }

  ATTNEXT_DEVICE static int32_t rule_of(const WindowLaunch& p, int32_t head) {
    return p.tables[p.head_rule + head];
  }

  ATTNEXT_DEVICE bool has_sinks() const { return over_keys && rule().axis[2].sink_begin >= 0; }

  // False if there is no such tile.
  ATTNEXT_DEVICE bool start(const WindowLaunch& p, int32_t, int32_t head, int32_t index) {
    return start_rule<true>(p, rule_of(p, head), index);
  }
  // Rows are keys, or extra keys.
  ATTNEXT_DEVICE bool start_keys(const WindowLaunch& p, int32_t, int32_t head, int32_t index,
                                 bool is_extra) {
    return start_rule<false>(p, is_extra ? p.num_rules : rule_of(p, head), index);
  }
  template <bool kOverKeys>
  ATTNEXT_DEVICE bool start_rule(const WindowLaunch& p, int32_t which, int32_t index) {
    over_keys = kOverKeys;
    tables = p.tables;
    rule_at = which * static_cast<int32_t>(sizeof(RuleTiles) / 4);
    if (index >= rule().num_tiles) return false;
#pragma unroll
    for (int a = 2; a >= kFirstAxis; --a) {
      const AxisTiles& axis = rule().axis[a];
      const int32_t mine = a > kFirstAxis ? index % axis.num_tiles : index;
      tile_at[a] = axis.tiles + mine * kTileInts;
      if (a > kFirstAxis) index /= axis.num_tiles;
    }
    extra = kOverKeys ? static_cast<int32_t>(p.window.extra_keys) : 0;
    lead = kOverKeys ? extra + tile(2).sink_end - tile(2).sink_begin : 0;
    width = tile(2).end - tile(2).begin;
    lines = lines1 = 1;
    if constexpr (!kOneLine) {
      lines1 = tile(1).end - tile(1).begin;
      lines = lines1 * (tile(0).end - tile(0).begin);
    }
    if (width <= 0 || lines <= 0) width = 0, lines = lines1 = 1;
    total = lead + width * lines;
    return true;
  }

  // Of a walked token's place in the box: coordinate first + dilation * place of extent.
  ATTNEXT_DEVICE uint32_t dilation(int a) const {
    return a < kFirstAxis ? 1 : static_cast<uint32_t>(rule().axis[a].dilation);
  }
  ATTNEXT_DEVICE uint32_t first(int a) const {
    return a < kFirstAxis ? 0 : tile(a).first + dilation(a) * tile(a).begin;
  }
  ATTNEXT_DEVICE uint32_t extent(int a) const {
    return a < kFirstAxis ? 1 : static_cast<uint32_t>(rule().axis[a].num_walked);
  }

  // Whether the box of the walk sticks out of the map: keys of zeros that take part (zero_pad).
  ATTNEXT_DEVICE bool has_phantoms() const {
    bool outside = false;
#pragma unroll
    for (int a = kFirstAxis; a < 3; ++a) {
      const AxisTiles& axis = rule().axis[a];
      outside |= tile(a).first + axis.dilation * tile(a).begin < 0 ||
                 tile(a).first + axis.dilation * (tile(a).end - 1) >= axis.num_walked;
    }
    return over_keys && outside && total > lead;
  }

  ATTNEXT_DEVICE BoxRow row(int r) const {
    BoxRow row;
    row.live = true;
#pragma unroll
    for (int a = 0; a < kFirstAxis; ++a) {
      row.token[a] = row.position[a] = 0;
      row.window[a] = {0, 1};
    }
#pragma unroll
    for (int a = 2; a >= kFirstAxis; --a) {
      const AxisTiles& axis = rule().axis[a];
      const int32_t mine = a > kFirstAxis ? r % rule().box[a] : r;
      if (a > kFirstAxis) r /= rule().box[a];
      row.live &= mine < tile(a).count;
      row.token[a] = tile(a).row + mine * axis.dilation;
      row.position[a] = tile(a).position + mine;
    }
    row.sinks = {0, 0};
#pragma unroll
    for (int a = kFirstAxis; a < 3; ++a) {
      const AxisTiles& axis = rule().axis[a];
      row.window[a] = {0, 0};
      if (!row.live) continue;
      row.window[a] = {tables[axis.begin + row.token[a]], tables[axis.end + row.token[a]]};
      if (a == 2 && has_sinks()) {
        row.sinks = {tables[axis.sink_begin + row.token[a]], tables[axis.sink_end + row.token[a]]};
      }
    }
    return row;
  }

  // The same; walks of lists look up less.
  ATTNEXT_DEVICE BoxRow where(int r) const { return row(r); }

  // ---- slots -----------------------------------------------------------------------------------

  struct Slot {
    enum Kind { kNone, kExtra, kToken, kPhantom } kind;
    int32_t token[3];  // or, of an extra key, its index at [2]
    int32_t index[3];  // in the class, as windows count
  };

  // Where a slot that is no extra key lies, counted from the first of the box: sinks may lie
  // before.
  ATTNEXT_DEVICE void place(int32_t s, int32_t (&c)[3]) const {
    c[0] = c[1] = 0;
    c[2] = s - lead;
    if (over_keys && c[2] < 0) {
      c[2] += tile(2).sink_end - tile(2).begin;
    } else if (lines > 1) {
      const int32_t line = Divider(tile(2))(c[2]);
      c[2] -= line * width;
      c[0] = Divider(tile(1))(line);
      c[1] = line - c[0] * lines1;
    }
  }
  ATTNEXT_DEVICE void place(int32_t s, Cursor&, int32_t (&c)[3]) const { place(s, c); }
  ATTNEXT_DEVICE Slot slot(int32_t s, Cursor) const { return slot(s); }
  ATTNEXT_DEVICE Slot slot(int32_t s) const {
    Slot at;
    at.kind = s < total ? Slot::kToken : Slot::kNone;
    if (over_keys && s < extra) at.kind = Slot::kExtra;
    place(s, at.index);
#pragma unroll
    for (int a = 0; a < kFirstAxis; ++a) at.token[a] = 0;
#pragma unroll
    for (int a = kFirstAxis; a < 3; ++a) {
      const AxisTiles& axis = rule().axis[a];
      at.index[a] += tile(a).begin;
      at.token[a] = tile(a).first + axis.dilation * at.index[a];
      const bool real = 0 <= at.token[a] && at.token[a] < axis.num_walked;
      if (at.kind == Slot::kToken && !real) at.kind = Slot::kPhantom;
    }
    if (at.kind == Slot::kExtra) at.token[2] = s;
    return at;
  }

  // Entry of a head's bias table for a walked key and a query: bias_entry - bias_origin. Where keys
  // are rows and queries are walked, signs are the other way round.
  ATTNEXT_DEVICE int32_t bias_entry(const WindowParams& w, const Slot& at) const {
    if (at.kind == Slot::kExtra) return kNoBias;
    int32_t entry = 0;
#pragma unroll
    for (int a = 0; a < 3; ++a) {
      const AxisTiles& axis = rule().axis[a];
      // Only sequences have a table of it.
      const int32_t position = a == 2 && !over_keys && axis.walk_position >= 0
                                   ? tables[axis.walk_position + at.token[a]]
                                   : tile(a).base + at.index[a];
      entry += position * static_cast<int32_t>(w.bias_stride[a]);
    }
    return entry;
  }
  ATTNEXT_DEVICE static int32_t bias_position(const WindowParams& w, const BoxRow& row) {
    int32_t entry = 0;
#pragma unroll
    for (int a = 0; a < 3; ++a) entry += row.position[a] * static_cast<int32_t>(w.bias_stride[a]);
    return entry;
  }
  ATTNEXT_DEVICE static int32_t bias_center(const WindowParams& w) {
    int32_t entry = 0;
#pragma unroll
    for (int a = 0; a < 3; ++a) entry += static_cast<int32_t>(w.bias_reach[a] * w.bias_stride[a]);
    return entry;
  }
  ATTNEXT_DEVICE static int32_t bias_origin(const WindowParams& w, const BoxRow& row) {
    return bias_position(w, row) - bias_center(w);
  }
  // The same of a row that is a key: bias_of_key(bias_key(row), bias_entry(query)).
  ATTNEXT_DEVICE static int32_t bias_key(const WindowParams& w, const BoxRow& row) {
    return bias_position(w, row) + bias_center(w);
  }
  ATTNEXT_DEVICE static int32_t bias_of_key(int32_t key, int32_t entry) { return key - entry; }

  ATTNEXT_DEVICE bool attends(const BoxRow& row, const Slot& at) const {
    if (!row.live || at.kind == Slot::kNone) return false;
    return at.kind == Slot::kExtra ||
           (row.window[0].contains(at.index[0]) && row.window[1].contains(at.index[1]) &&
            (row.window[2].contains(at.index[2]) || row.sinks.contains(at.index[2])));
  }
};

using BoxWalk = BoxWalkOf<false>;
using LineWalk = BoxWalkOf<true>;
// Of tiles of so many rows: larger ones are for sequences.
template <int kRows>
using WalkOf = BoxWalkOf<(kRows > kBoxRows)>;

// Walks in steps of kStep slots and tells, for the rows of a warp, what a step holds.
enum class Step { kSkip, kFull, kEdge };

template <class Walk, int kStep>
struct BoxSteps {
  static constexpr int kWords = (kStep + 31) / 32;

  int32_t line0, line1, column;  // where the step begins, from the box's first; before it: < 0
  // Union and intersection of the windows of the warp's rows, counted in the same way: on the last
  // axis here, on the others in shared memory, since only walks of several lines ask for them.
  Interval reach, common;
  Interval* outer;  // reach and common of axis 0, of axis 1
  bool one_line;    // what a walk of one line asks of them: it lies in all rows' windows
  bool any_row;     // rows that are not live may hold anything

  // `count` rows of a warp lie in its first lanes.
  ATTNEXT_DEVICE void start(const Walk& walk, const BoxRow& row, bool counts, int32_t from,
                            Interval* shared) {
    const bool use = counts && row.live;
    any_row = __any_sync(~0u, use);
    const auto over = [&](int a, Interval& all, Interval& each) {
      const int32_t begin = row.window[a].begin - walk.tile(a).begin;
      const int32_t end = row.window[a].end - walk.tile(a).begin;
      all.begin = __reduce_min_sync(~0u, use ? begin : INT32_MAX);
      all.end = __reduce_max_sync(~0u, use ? end : INT32_MIN);
      each.begin = __reduce_max_sync(~0u, use ? begin : INT32_MIN);
      each.end = __reduce_min_sync(~0u, use ? end : INT32_MAX);
    };
    over(2, reach, common);
    outer = shared;
    one_line = true;
    __syncwarp();
#pragma unroll
    for (int a = Walk::kFirstAxis; a < 2; ++a) {
      Interval all, each;
      over(a, all, each);
      one_line &= each.contains(0);
      if (threadIdx.x % 32 == 0) outer[2 * a] = all, outer[2 * a + 1] = each;
    }
    __syncwarp();
    column = from - walk.lead;
    line0 = line1 = 0;
    if (from > 0 && column > 0 && walk.lines > 1) {  // `from` is a constant 0 in most kernels
      const int32_t line = Divider(walk.tile(2))(column);
      column -= line * walk.width;
      line0 = Divider(walk.tile(1))(line);
      line1 = line - line0 * walk.lines1;
    }
  }

  // What the step at `slot` holds; goes on to the next. Of an edge, `bits` tell which slots the
  // lane's row attends. Extra keys and sinks are left to them.
  ATTNEXT_DEVICE Step look(const Walk& walk, const BoxRow& row, int32_t slot,
                           uint32_t (&bits)[kWords]) {
    BoxSteps next = *this;
    next.column += kStep;
    while (walk.lines > 1 && next.column >= walk.width) {
      next.column -= walk.width;
      if (++next.line1 == walk.lines1) next.line1 = 0, ++next.line0;
    }
#ifdef ATTNEXT_ONLY_FULL
    const Step found = Step::kFull;
#elif defined(ATTNEXT_ONLY_EDGE)
    const Step found = Step::kEdge;
#else
    const Step found = kind(walk, slot, next);
#endif
    if (found == Step::kEdge) mask(walk, row, slot, bits);
    line0 = next.line0, line1 = next.line1, column = next.column;
    return found;
  }

 private:
  ATTNEXT_DEVICE Step kind(const Walk& walk, int32_t slot, const BoxSteps& next) const {
    if (walk.over_keys && column < 0) return Step::kEdge;
    if (!any_row) return Step::kSkip;
    if (walk.lines == 1) {
      const bool outside = column >= reach.end || next.column <= reach.begin;
      if (outside && !walk.has_sinks()) return Step::kSkip;
      const bool full = one_line && common.begin <= column && next.column <= common.end;
      return full ? Step::kFull : Step::kEdge;
    }
    const Interval reach0 = outer[0], common0 = outer[1], reach1 = outer[2], common1 = outer[3];
    // The line of the step's last slot.
    int32_t last0 = next.line0, last1 = next.line1;
    if (next.column == 0 && --last1 < 0) last1 = walk.lines1 - 1, --last0;
    const bool wraps = last0 != line0;
    if (line0 >= reach0.end) return Step::kSkip;
    if (!wraps && (line0 < reach0.begin || line1 >= reach1.end || last1 < reach1.begin)) {
      return Step::kSkip;
    }
    const bool whole_lines = common.begin <= 0 && common.end >= walk.width;
    const bool full = whole_lines && !wraps && slot + kStep <= walk.total &&
                      common0.contains(line0) && common1.begin <= line1 && last1 < common1.end;
    return full ? Step::kFull : Step::kEdge;
  }

  ATTNEXT_DEVICE void mask(const Walk& walk, const BoxRow& row, int32_t slot,
                           uint32_t (&bits)[kWords]) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) bits[w] = 0;
    if (!row.live) return;
    const auto add = [&](int32_t begin, int32_t end) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) bits[w] |= bit_range(begin - 32 * w, end - 32 * w);
    };
    if (walk.over_keys && column < 0) {
      add(0, walk.extra - slot);
      const int32_t to_sinks = walk.extra - slot - walk.tile(2).sink_begin;  // index to bit
      const int32_t last = walk.lead - slot;
      const auto add_sinks = [&](const Interval& i) {
        add(max(i.begin + to_sinks, walk.extra - slot), min(i.end + to_sinks, last));
      };
      add_sinks(row.window[2]);
      add_sinks(row.sinks);
    }
    const bool lines = Walk::kFirstAxis == 0;
    const int32_t begin0 = lines ? walk.tile(0).begin : 0, begin1 = lines ? walk.tile(1).begin : 0;
    const int32_t begin2 = walk.tile(2).begin;
    const bool has_sinks = walk.has_sinks();
    int32_t c = column, l1 = line1, l0 = line0;
    int32_t at = 0;  // bit of the first slot of the current line
    if (c < 0) at = -c, c = 0;
    int32_t line = l0 * walk.lines1 + l1;
    while (at < kStep && line < walk.lines) {
      const int32_t here = min(walk.width - c, kStep - at);
      if (here > 0 && row.window[0].contains(begin0 + l0) && row.window[1].contains(begin1 + l1)) {
        const int32_t to_bit = at - (begin2 + c);
        const auto add_window = [&](const Interval& i) {
          add(max(i.begin + to_bit, at), min(i.end + to_bit, at + here));
        };
        add_window(row.window[2]);
        if (has_sinks) add_window(row.sinks);
      }
      at += here;
      c = 0;
      ++line;
      if (++l1 == walk.lines1) l1 = 0, ++l0;
    }
  }
};

}  // namespace cuda
}  // namespace attnext
