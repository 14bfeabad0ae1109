// SPDX-License-Identifier: Apache-2.0
// The walk of routed attention. Rows are a run of places of their order. Walked are, first, what
// rules let the rows attend without a list (sinks, then the union of the rows' windows), then the
// rectangles of the tile's entries. A walked token counts once for a row: as the window's or a
// sink's where it is that too, unless slots have biases, then as the list's.
#pragma once

#include "../routed_rules.h"
#include "walk.cuh"

namespace attnext {
namespace cuda {

struct ListRow {
  bool live;
  int32_t token[3];
  int32_t place;
  Interval allowed, near;
  int32_t sink_end;  // sinks are [allowed.begin, sink_end)
  int32_t self;      // not attended; -1: none
};

template <int kStep, class Walk>
struct ListSteps;

// kByKey: rows are keys and queries are walked. kBiased: slots may have biases.
template <bool kByKey, bool kBiased>
struct ListWalk {
  using Launch = RoutedLaunch;
  using Row = ListRow;
  template <int kStep>
  using Steps = ListSteps<kStep, ListWalk>;
  static constexpr int kWarpInts = kListWarpInts;
  static constexpr bool kRowsBias = false;
  static constexpr int32_t extra = 0;

  // Runs are numbered: sinks, windows, entries from 0 on.
  static constexpr int32_t kSinkRun = -2, kWindowRun = -1;
  struct Cursor {
    int32_t run = kSinkRun;
  };
  struct Run {
    int32_t at, size;  // slots before it, its own
    int32_t first;     // place
    Interval rows;
    bool listed;
    ATTNEXT_DEVICE bool holds(int32_t place) const {
      return first <= place && place < first + size;
    }
  };

  const RoutedLaunch* p;
  const ListEntry* entries;
  int32_t count;  // of entries
  int32_t batch, first_row;
  HeadPolicy policy;
  Interval sinks, near;  // walked before the entries
  int32_t total;         // slots
  bool exact;            // near tokens that are listed are left to the lists

  // ---- rows

  ATTNEXT_DEVICE bool start(const RoutedLaunch& launch, int32_t of_batch, int32_t head,
                            int32_t index) {
    p = &launch;
    batch = of_batch;
    policy = static_cast<HeadPolicy>(p->policy[head / 16] >> (head % 16 * 2) & 3);
    first_row = index * p->rows;
    count = 0;
    entries = p->entries;
    if (policy == HeadPolicy::kList) {
      const int32_t of_list = head / (static_cast<int32_t>(p->window.heads) / p->list_heads);
      const int64_t list = int64_t(p->list_batch == 1 ? 0 : batch) * p->list_heads + of_list;
      const int64_t* at = p->tile_ptr + list * p->most_tiles + index;
      entries += at[0];
      count = static_cast<int32_t>(at[1] - at[0]);
    }
    exact = kBiased && p->window.bias && count > 0;
    set_near();
    total = listed_at();
    if (count > 0) {
      const ListEntry& last = entries[count - 1];
      total += last.at + max(last.walk_end - last.walk_begin, 0);
    }
    return true;
  }
  ATTNEXT_DEVICE bool start_keys(const RoutedLaunch& launch, int32_t of_batch, int32_t head,
                                 int32_t index, bool) {
    return start(launch, of_batch, head, index);
  }

  // Documents do not decrease, so that those of a row are a run.
  ATTNEXT_DEVICE static int64_t first_not_below(const int32_t* documents, int64_t n, int64_t x) {
    int64_t lo = 0, hi = n;
    while (lo < hi) {
      const int64_t middle = (lo + hi) / 2;
      if (documents[middle] < x) {
        lo = middle + 1;
      } else {
        hi = middle;
      }
    }
    return lo;
  }
  ATTNEXT_DEVICE int64_t num_keys() const { return kByKey ? p->num_rows : p->num_walked; }
  ATTNEXT_DEVICE int64_t allowed_keys() const {
    const int64_t keys = num_keys();
    return p->rules.key_lengths ? between(p->rules.key_lengths[batch], 0, keys) : keys;
  }
  ATTNEXT_DEVICE Reach reach(int32_t token) const {
    const RoutedRules& r = p->rules;
    const int64_t rows = p->num_rows, walked = p->num_walked;
    int64_t first = 0, last = walked;
    if (r.query_documents) {
      const int32_t* mine = (kByKey ? r.key_documents : r.query_documents) + batch * rows;
      const int32_t* others = (kByKey ? r.query_documents : r.key_documents) + batch * walked;
      first = first_not_below(others, walked, mine[token]);
      last = first_not_below(others, walked, int64_t(mine[token]) + 1);
    }
    if constexpr (kByKey) {
      if (token >= allowed_keys()) last = first;
      return queries_of(r, policy, token, rows - walked, first, last);
    } else {
      last = least(last, allowed_keys());
      return keys_of(r, policy, token + walked - rows, least(first, last), last);
    }
  }

  // What the tile's rows attend without a list: ends of windows rise with the row.
  ATTNEXT_DEVICE void set_near() {
    const RoutedRules& r = p->rules;
    sinks = near = {0, 0};
    int32_t last_row = min(first_row + p->rows, p->num_rows) - 1;
    if (kByKey) last_row = min(last_row, static_cast<int32_t>(allowed_keys()) - 1);
    const bool besides = has_besides(policy);
    const bool windows = policy == HeadPolicy::kDense || (besides && r.has_window);
    if (last_row < first_row || !(windows || (besides && r.sinks > 0))) return;
    const Reach top = reach(first_row), bottom = reach(last_row);
    if (windows) near = {static_cast<int32_t>(top.near_lo), static_cast<int32_t>(bottom.near_hi)};
    if (kByKey) {
      if (besides && first_row < r.sinks) {
        const Reach sink = reach(static_cast<int32_t>(least(last_row, r.sinks - 1)));
        near = {static_cast<int32_t>(top.lo),
                static_cast<int32_t>(windows ? most(sink.hi, bottom.near_hi) : sink.hi)};
      }
    } else if (besides && r.sinks > 0) {
      sinks = {static_cast<int32_t>(top.lo), static_cast<int32_t>(least(r.sinks, bottom.hi))};
      sinks.end = max(sinks.begin, sinks.end);
      near.begin = max(near.begin, sinks.end);
    }
    near.end = max(near.begin, near.end);
  }

  ATTNEXT_DEVICE ListRow row(int r) const {
    ListRow row;
    row.place = first_row + r;
    row.live = row.place < p->num_rows;
    row.allowed = row.near = {0, 0};
    row.sink_end = 0, row.self = -1;
    row.token[0] = row.token[1] = row.token[2] = 0;
    if (!row.live) return row;
    const int32_t token = p->row_order ? p->row_order[row.place] : row.place;
    row.token[2] = token % p->row_extent[2];
    const int32_t line = token / p->row_extent[2];
    row.token[1] = line % p->row_extent[1];
    row.token[0] = line / p->row_extent[1];
    const Reach x = reach(token);
    row.allowed = {static_cast<int32_t>(x.lo), static_cast<int32_t>(x.hi)};
    row.near = {static_cast<int32_t>(x.near_lo), static_cast<int32_t>(x.near_hi)};
    row.sink_end = static_cast<int32_t>(x.sink_hi);
    row.self = static_cast<int32_t>(x.self);
    return row;
  }

  // ---- runs

  ATTNEXT_DEVICE int32_t listed_at() const {
    return sinks.end - sinks.begin + near.end - near.begin;
  }
  ATTNEXT_DEVICE int32_t at(int32_t run) const {
    if (run >= 0) return listed_at() + entries[run].at;
    return run == kWindowRun ? sinks.end - sinks.begin : 0;
  }
  ATTNEXT_DEVICE Run run(int32_t which) const {
    if (which < 0) {
      const Interval& x = which == kWindowRun ? near : sinks;
      return {at(which), x.end - x.begin, x.begin, {0, INT32_MAX}, false};
    }
    const ListEntry& x = entries[which];
    return {listed_at() + x.at,
            max(x.walk_end - x.walk_begin, 0),
            x.walk_begin,
            {x.row_begin, x.row_end},
            true};
  }
  // The last run that begins at slot s or before: from the cursor on, in steps that double.
  ATTNEXT_DEVICE void seek(int32_t s, Cursor& cursor) const {
    int32_t step = 1;
    const auto begins_by = [&](int32_t which) { return which < count && at(which) <= s; };
#pragma unroll 1
    while (begins_by(cursor.run + step)) cursor.run += step, step *= 2;
#pragma unroll 1
    while (step > 1) {
      step /= 2;
      if (begins_by(cursor.run + step)) cursor.run += step;
    }
  }

  // The same from anywhere.
  ATTNEXT_DEVICE Cursor find(int32_t s) const {
    int32_t lo = kSinkRun, hi = count;
#pragma unroll 1
    while (hi - lo > 1) {
      const int32_t middle = (lo + hi) >> 1;
      const bool by = at(middle) <= s;
      lo = by ? middle : lo, hi = by ? hi : middle;
    }
    return {lo};
  }

  // ---- slots

  struct Slot {
    enum Kind { kNone, kExtra, kToken, kPhantom } kind;
    int32_t token[3];
    int32_t place, run;
  };

  ATTNEXT_DEVICE int32_t place_of(int32_t s, Cursor cursor) const {
    const Run x = run(cursor.run);
    return s < total ? x.first + (s - x.at) : 0;
  }
  ATTNEXT_DEVICE void coordinates(int32_t place, int32_t (&c)[3]) const {
    const int32_t token = p->walk_order ? p->walk_order[place] : place;
    const int32_t line = Divider(p->walk_lines[0])(token);
    c[2] = token - line * p->walk_extent[2];
    c[0] = Divider(p->walk_lines[1])(line);
    c[1] = line - c[0] * p->walk_extent[1];
  }
  ATTNEXT_DEVICE void place(int32_t s, Cursor& cursor, int32_t (&c)[3]) const {
    seek(s, cursor);
    coordinates(place_of(s, cursor), c);
  }
  ATTNEXT_DEVICE Slot slot(int32_t s) const { return slot(s, find(s)); }
  ATTNEXT_DEVICE Slot slot(int32_t s, Cursor cursor) const {  // as place() has left it
    Slot at;
    at.kind = s < total ? Slot::kToken : Slot::kNone;
    at.place = place_of(s, cursor);
    at.run = cursor.run;
    coordinates(at.place, at.token);
    return at;
  }
  ATTNEXT_DEVICE static uint32_t dilation(int) { return 1; }
  ATTNEXT_DEVICE static uint32_t first(int) { return 0; }
  ATTNEXT_DEVICE uint32_t extent(int a) const { return static_cast<uint32_t>(p->walk_extent[a]); }
  ATTNEXT_DEVICE static bool has_phantoms() { return false; }

  ATTNEXT_DEVICE int32_t bias_entry(const WindowParams&, const Slot& at) const {
    return at.run < 0 || at.kind == Slot::kNone ? kNoBias : entries[at.run].slot;
  }
  ATTNEXT_DEVICE static int32_t bias_origin(const WindowParams&, const ListRow&) { return 0; }
  ATTNEXT_DEVICE static int32_t bias_key(const WindowParams&, const ListRow&) { return 0; }
  ATTNEXT_DEVICE static int32_t bias_of_key(int32_t, int32_t entry) { return entry; }

  // Calls add(begin, end) for the places that a row attends of runs of the list, or of others.
  template <class Add>
  ATTNEXT_DEVICE void intervals(const ListRow& row, bool listed, Add add) const {
    if (listed && exact) {
      add(row.allowed.begin, row.allowed.end);
    } else if (listed) {
      add(row.sink_end, row.near.begin);
      add(max(row.near.end, row.sink_end), row.allowed.end);
    } else {
      add(row.allowed.begin, row.sink_end);
      add(max(row.near.begin, row.sink_end), row.near.end);
    }
  }
  ATTNEXT_DEVICE bool attends(const ListRow& row, const Slot& at) const {
    if (!row.live || at.kind == Slot::kNone || at.place == row.self) return false;
    const bool listed = at.run >= 0;
    if (listed && !run(at.run).rows.contains(row.place)) return false;
    bool found = false;
    intervals(row, listed,
              [&](int32_t begin, int32_t end) { found |= begin <= at.place && at.place < end; });
    if (exact && found && !listed) {
      for (int32_t e = 0; e < count; ++e) {
        const Run x = run(e);
        if (x.rows.contains(row.place) && x.holds(at.place)) return false;
      }
    }
    return found;
  }
};

// Walks in steps of kStep slots and tells, for the rows of a warp, what a step holds.
template <int kStep, class Walk>
struct ListSteps {
  static constexpr int kWords = (kStep + 31) / 32;
  using Run = typename Walk::Run;

  // Of the warp's rows.
  struct alignas(16) Common {
    int32_t lo_min, lo_max, hi_min, hi_max;
    int32_t sink_min, sink_max, self_min, self_max;
    int32_t near_lo_min, near_lo_max, near_hi_min, near_hi_max;
    int32_t row_min, row_max, spare[2];
  };
  static_assert(sizeof(Common) == Walk::kWarpInts * 4, "where the block has them");
  const Common* common;
  typename Walk::Cursor cursor;  // the run of the step's first slot

  // `count` rows of a warp lie in its first lanes.
  ATTNEXT_DEVICE void start(const Walk& walk, const ListRow& row, bool counts, int32_t from,
                            Interval* shared) {
    const bool use = counts && row.live;
    const auto least_of = [&](int32_t x) { return __reduce_min_sync(~0u, use ? x : INT32_MAX); };
    const auto most_of = [&](int32_t x) { return __reduce_max_sync(~0u, use ? x : INT32_MIN); };
    const int32_t self = row.self < 0 ? INT32_MAX : row.self;
    const Common mine = {least_of(row.allowed.begin),
                         most_of(row.allowed.begin),
                         least_of(row.allowed.end),
                         most_of(row.allowed.end),
                         least_of(row.sink_end),
                         most_of(row.sink_end),
                         least_of(self),
                         most_of(row.self),
                         least_of(row.near.begin),
                         most_of(row.near.begin),
                         least_of(row.near.end),
                         most_of(row.near.end),
                         least_of(row.place),
                         most_of(row.place),
                         {0, 0}};
    __syncwarp();  // the last walk's is no longer read; the block's next barrier is before it is
    if (threadIdx.x % 32 == 0) *reinterpret_cast<Common*>(shared) = mine;
    common = reinterpret_cast<const Common*>(shared);
    walk.seek(from, cursor);
  }

  // What the step at `slot` holds; goes on to the next. Of an edge, `bits` tell which slots the
  // lane's row attends.
  ATTNEXT_DEVICE Step look(const Walk& walk, const ListRow& row, int32_t slot,
                           uint32_t (&bits)[kWords]) {
#ifdef ATTNEXT_ONLY_FULL
    const Step found = Step::kFull;
#elif defined(ATTNEXT_ONLY_EDGE)
    const Step found = Step::kEdge;
#else
    const Step found = kind(walk, slot);
#endif
    if (found == Step::kEdge) mask(walk, row, slot, bits);
    walk.seek(slot + kStep, cursor);
    return found;
  }

 private:
  ATTNEXT_DEVICE Step kind(const Walk& walk, int32_t slot) const {
    const Common c = *common;
    bool full = slot + kStep <= walk.total, skip = true;
    for (int32_t which = cursor.run; which < walk.count && (full || skip); ++which) {
      const Run x = walk.run(which);
      if (x.at >= slot + kStep) break;
      const int32_t from = max(x.at, slot), to = min(x.at + x.size, slot + kStep);
      if (from >= to) continue;
      const int32_t begin = x.first + (from - x.at), end = begin + (to - from);
      full &= covers(walk, c, x, begin, end);
      skip &= misses(walk, c, x, begin, end);
    }
    return skip ? Step::kSkip : full ? Step::kFull : Step::kEdge;
  }
  // Whether all rows attend places [begin, end) of a run.
  ATTNEXT_DEVICE static bool covers(const Walk& walk, const Common& c, const Run& x, int32_t begin,
                                    int32_t end) {
    if (c.self_min < end && begin <= c.self_max) return false;
    if (!x.listed) {
      if (walk.exact) return false;
      return (c.lo_max <= begin && end <= c.sink_min) ||
             (max(c.near_lo_max, c.sink_max) <= begin && end <= c.near_hi_min);
    }
    if (x.rows.begin > c.row_min || c.row_max >= x.rows.end) return false;
    if (walk.exact) return c.lo_max <= begin && end <= c.hi_min;
    return (c.sink_max <= begin && end <= c.near_lo_min) ||
           (max(c.near_hi_max, c.sink_max) <= begin && end <= c.hi_min);
  }
  // Whether no row does.
  ATTNEXT_DEVICE static bool misses(const Walk& walk, const Common& c, const Run& x, int32_t begin,
                                    int32_t end) {
    if (end <= c.lo_min || c.hi_max <= begin) return true;
    if (!x.listed) {
      return c.sink_max <= begin && (end <= c.near_lo_min || c.near_hi_max <= begin);
    }
    if (x.rows.end <= c.row_min || c.row_max < x.rows.begin) return true;
    return !walk.exact && c.near_lo_max <= begin && end <= c.near_hi_min;
  }

  ATTNEXT_DEVICE void mask(const Walk& walk, const ListRow& row, int32_t slot,
                           uint32_t (&bits)[kWords]) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) bits[w] = 0;
    if (!row.live) return;
    for (int32_t which = cursor.run; which < walk.count; ++which) {
      const Run x = walk.run(which);
      if (x.at >= slot + kStep) break;
      if (!x.rows.contains(row.place)) continue;
      const int32_t to_bit = x.at - slot - x.first;
      const int32_t from = max(x.at - slot, 0), to = min(x.at + x.size - slot, kStep);
      walk.intervals(row, x.listed, [&](int32_t begin, int32_t end) {
        begin = max(begin + to_bit, from), end = min(end + to_bit, to);
#pragma unroll
        for (int w = 0; w < kWords; ++w) bits[w] |= bit_range(begin - 32 * w, end - 32 * w);
      });
      const auto clear = [&](int32_t begin, int32_t end) {
        begin = max(begin + to_bit, from), end = min(end + to_bit, to);
#pragma unroll
        for (int w = 0; w < kWords; ++w) bits[w] &= ~bit_range(begin - 32 * w, end - 32 * w);
      };
      if (row.self >= 0) clear(row.self, row.self + 1);
      if (walk.exact && !x.listed) {
        for (int32_t e = 0; e < walk.count; ++e) {
          const Run other = walk.run(e);
          if (other.rows.contains(row.place)) clear(other.first, other.first + other.size);
        }
      }
    }
  }
};

}  // namespace cuda
}  // namespace attnext
