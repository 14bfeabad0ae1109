// SPDX-License-Identifier: Apache-2.0
// The walk of routed attention. Rows are a run of places of their order, each for one head or for
// several that share lists (`packed`). Walked are, first, what
// rules let the rows attend without a list (sinks, then the union of the rows' windows) token by
// token, then the places of the tile's entries. A walked token counts once for a row: as the
// window's or a sink's where it is that too, unless slots have biases, then as the list's.
//
// Rules are intervals of tokens. Of a step they make bits at once, unless its places are not the
// tokens (`scattered`) or documents are no runs (`mixed`): then bits are looked at one by one.
#pragma once

#include "../routed_rules.h"
#include "walk.cuh"

namespace attnext {
namespace cuda {

struct ListRow {
  bool live;
  int32_t token[3];
  int32_t head;   // of the block's
  int32_t index;  // of its place in the tile
  Interval allowed, near;
  int32_t sink_end;  // sinks are [allowed.begin, sink_end)
  int32_t self;      // not attended; -1: none
};

template <int kStep, class Walk>
struct ListSteps;

// kByKey: rows are keys and queries are walked. kBiased: slots may have biases. kOnlyLists: they
// have, and nothing else is walked.
template <bool kByKey, bool kBiased, bool kOnlyLists = false>
struct ListWalk {
  using Launch = RoutedLaunch;
  using Row = ListRow;
  template <int kStep>
  using Steps = ListSteps<kStep, ListWalk>;
  static constexpr int kWarpInts = kListWarpInts;
  static constexpr bool kRowsBias = false;
  static constexpr bool kPacks = !kByKey;
  static constexpr bool kHasExtra = false;
  static constexpr bool kScalesRows = false;
  static constexpr int32_t extra = 0;

  // Runs are numbered: sinks, windows, entries from 0 on. Slots up to `until` are the run's, which
  // are at places slot + shift.
  static constexpr int32_t kSinkRun = -2, kWindowRun = -1;
  struct Cursor {
    int32_t run = kSinkRun, until = INT32_MIN, shift = 0;
  };

  const RoutedLaunch* p;
  const ListEntry* entries;
  int32_t count;                     // of entries
  int32_t batch, first_row, places;  // of rows
  HeadPolicy policy;
  Interval sinks, near;  // walked before the entries
  int32_t total;         // slots
  bool exact;            // near tokens that are listed are left to the lists
  ATTNEXT_DEVICE static bool is_listed(int32_t run) { return kOnlyLists || run >= 0; }

  // ---- rows

  ATTNEXT_DEVICE static uint32_t packed(const RoutedLaunch& p) {
    return kByKey ? 1 : static_cast<uint32_t>(p.packed);
  }
  ATTNEXT_DEVICE static HeadPolicy policy_of(const RoutedLaunch& p, int32_t head) {
    if (p.policies) return static_cast<HeadPolicy>(p.policies[head]);
    return static_cast<HeadPolicy>(p.policy[head / 16] >> (head % 16 * 2) & 3);
  }
  ATTNEXT_DEVICE bool start(const RoutedLaunch& launch, int32_t of_batch, int32_t head,
                            int32_t index) {
    p = &launch;
    batch = of_batch;
    policy = policy_of(launch, head);
    places = p->rows / static_cast<int32_t>(packed(launch));
    first_row = index * places;
    count = 0;
    entries = p->entries;
    if (policy == HeadPolicy::kList) {
      const int32_t of_list = head / (static_cast<int32_t>(p->window.heads) / p->list_heads);
      const int64_t list = int64_t(p->list_batch == 1 ? 0 : batch) * p->list_heads + of_list;
      const int64_t* at = p->tile_ptr + list * p->most_tiles + index;
      entries += at[0];
      count = static_cast<int32_t>(at[1] - at[0]);
    }
    exact = kOnlyLists || (kBiased && p->window.bias && count > 0);
    set_near();
    total = listed_at();
    if (count > 0) {
      const ListEntry& last = entries[count - 1];
      total += last.at + last.walk_end - last.walk_begin;
    }
    return true;
  }
  ATTNEXT_DEVICE bool start_keys(const RoutedLaunch& launch, int32_t of_batch, int32_t head,
                                 int32_t index, bool) {
    return start(launch, of_batch, head, index);
  }

  // Where documents do not decrease, those of a row are a run.
  ATTNEXT_DEVICE static int64_t first_not_below(const int32_t* documents, int64_t n, int64_t x) {
    int64_t lo = 0, hi = n;
#pragma unroll 1
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
  ATTNEXT_DEVICE const int32_t* row_documents() const {
    const RoutedRules& r = p->rules;
    return (kByKey ? r.key_documents : r.query_documents) + int64_t(batch) * p->num_rows;
  }
  ATTNEXT_DEVICE const int32_t* walk_documents() const {
    const RoutedRules& r = p->rules;
    return (kByKey ? r.query_documents : r.key_documents) + int64_t(batch) * p->num_walked;
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
    if (r.query_documents && !p->mixed) {
      const int64_t mine = row_documents()[token];
#pragma unroll 1
      for (int past = 0; past < 2; ++past) {
        first = last;
        last = first_not_below(walk_documents(), walked, mine + past);
      }
    }
    if constexpr (kByKey) {
      if (token >= allowed_keys()) last = first;
      return queries_of(r, policy, token, rows - walked, first, last);
    } else {
      last = least(last, allowed_keys());
      return keys_of(r, policy, token + walked - rows, least(first, last), last);
    }
  }
  ATTNEXT_DEVICE int32_t token_of_row(int32_t place) const {
    return p->row_order ? p->row_order[place] : place;
  }

  // What the tile's rows attend without a list. Keys that rules number lie in order. All lanes of a
  // warp call it.
  ATTNEXT_DEVICE void set_near() {
    const RoutedRules& r = p->rules;
    sinks = near = {0, 0};
    if (kOnlyLists) return;
    int32_t last_row = min(first_row + places, p->num_rows) - 1;
    if (kByKey && !p->row_order) {
      last_row = min(last_row, static_cast<int32_t>(allowed_keys()) - 1);
    }
    const bool besides = has_besides(policy);
    const bool windows = policy == HeadPolicy::kDense || (besides && r.has_window);
    if (last_row < first_row || !(windows || (besides && r.sinks > 0))) return;
    const int32_t last_sink = besides ? static_cast<int32_t>(least(last_row, r.sinks - 1)) : -1;
    // Rows out of order are all asked; else what they reach rises with the row.
    const bool scattered = p->row_order;
    const int32_t last_asked = scattered ? last_row - first_row : kByKey ? 2 : 1;
    int32_t lo = INT32_MAX, hi = 0, near_lo = INT32_MAX, near_hi = 0, sink_hi = 0;
#pragma unroll 1
    for (int32_t i = scattered ? threadIdx.x % 32 : 0; i <= last_asked; i += scattered ? 32 : 1) {
      const int32_t place = scattered           ? first_row + i
                            : i == 0            ? first_row
                            : !kByKey || i == 1 ? last_row
                                                : max(first_row, last_sink);
      const Reach x = reach(token_of_row(place));
      lo = min(lo, static_cast<int32_t>(x.lo));
      near_lo = min(near_lo, static_cast<int32_t>(x.near_lo));
      near_hi = max(near_hi, static_cast<int32_t>(x.near_hi));
      sink_hi = max(sink_hi, static_cast<int32_t>(x.sink_hi));
      if (place <= last_sink) hi = max(hi, static_cast<int32_t>(x.hi));
    }
    if (scattered) {
      lo = __reduce_min_sync(~0u, lo), near_lo = __reduce_min_sync(~0u, near_lo);
      near_hi = __reduce_max_sync(~0u, near_hi), sink_hi = __reduce_max_sync(~0u, sink_hi);
    }
    if (windows) near = {near_lo, near_hi};
    if (kByKey) {
      if (first_row <= last_sink) near = {lo, windows ? max(hi, near_hi) : hi};
    } else if (besides && r.sinks > 0) {
      sinks = {lo, max(lo, sink_hi)};
      near.begin = max(near.begin, sinks.end);
    }
    near.end = max(near.begin, near.end);
  }

  // Which token row r is; what it attends is another matter.
  ATTNEXT_DEVICE ListRow where(int r) const {
    ListRow row;
    row.head = 0, row.index = r;
    if (!kByKey && p->packed > 1) row.index = r / p->packed, row.head = r - row.index * p->packed;
    const int32_t place = first_row + row.index;
    row.live = row.index < places && place < p->num_rows;
    row.allowed = row.near = {0, 0};
    row.sink_end = 0, row.self = -1;
    row.token[0] = row.token[1] = row.token[2] = 0;
    if (!row.live) return row;
    const int32_t token = token_of_row(place);
    row.token[2] = token % p->row_extent[2];
    const int32_t line = token / p->row_extent[2];
    row.token[1] = line % p->row_extent[1];
    row.token[0] = line / p->row_extent[1];
    return row;
  }
  ATTNEXT_DEVICE ListRow row(int r) const {
    ListRow row = where(r);
    if (!row.live) return row;
    const Reach x = reach(token_of_row(first_row + row.index));
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
    if (is_listed(run)) return listed_at() + entries[run].at;
    return (run - kSinkRun) * (sinks.end - sinks.begin);
  }
  ATTNEXT_DEVICE int32_t first_place(int32_t run) const {
    if (is_listed(run)) return entries[run].walk_begin;
    return run == kWindowRun ? near.begin : sinks.begin;
  }
  // Rows of the tile that a run is of: 32 from `index` / 32 * 32 on.
  ATTNEXT_DEVICE uint32_t rows_of(int32_t run, int32_t index) const {
    return is_listed(run) ? entries[run].rows[index / 32] : ~0u;
  }
  ATTNEXT_DEVICE bool has_row(int32_t run, const ListRow& row) const {
    return rows_of(run, row.index) >> (row.index % 32) & 1;
  }
  ATTNEXT_DEVICE void set(Cursor& cursor) const {
    cursor.until = cursor.run + 1 < count ? at(cursor.run + 1) : INT32_MAX;
    cursor.shift = first_place(cursor.run) - at(cursor.run);
  }
  // The last run that begins at slot s or before: from the cursor on, in steps that double.
  ATTNEXT_DEVICE void seek(int32_t s, Cursor& cursor) const {
    if (s < cursor.until) return;
    if (s >= sinks.end - sinks.begin) {
      cursor.run = max(cursor.run, kWindowRun);
      const int32_t listed = s - listed_at();
      const auto begins_by = [&](int32_t e) { return e < count && entries[e].at <= listed; };
      int32_t step = 1;
#pragma unroll 1
      while (begins_by(cursor.run + step)) cursor.run += step, step *= 2;
#pragma unroll 1
      while (step > 1) {
        step /= 2;
        if (begins_by(cursor.run + step)) cursor.run += step;
      }
    }
    set(cursor);
  }
  // The same from anywhere.
  ATTNEXT_DEVICE Cursor find(int32_t s) const {
    const int32_t listed = s - listed_at();
    int32_t lo = kWindowRun, hi = count;
#pragma unroll 1
    while (hi - lo > 1) {
      const int32_t middle = (lo + hi) >> 1;
      const bool by = entries[middle].at <= listed;
      lo = by ? middle : lo, hi = by ? hi : middle;
    }
    Cursor cursor{s < sinks.end - sinks.begin ? kSinkRun : lo};
    set(cursor);
    return cursor;
  }

  // ---- slots

  struct Slot {
    enum Kind { kNone, kExtra, kToken, kPhantom } kind;
    int32_t token[3];
    int32_t place, run;
  };

  // Of the lists; windows and sinks are walked token by token.
  ATTNEXT_DEVICE int32_t token_at(int32_t run, int32_t place) const {
    return is_listed(run) && p->walk_order ? p->walk_order[place] : place;
  }
  ATTNEXT_DEVICE int32_t place_of(int32_t s, const Cursor& cursor) const {
    return s < total ? s + cursor.shift : 0;
  }
  ATTNEXT_DEVICE void coordinates(int32_t token, int32_t (&c)[3]) const {
    c[0] = c[1] = 0, c[2] = token;
    if (p->walk_extent[0] * p->walk_extent[1] == 1) return;
    const int32_t line = Divider(p->walk_lines[0])(token);
    c[2] = token - line * p->walk_extent[2];
    c[0] = Divider(p->walk_lines[1])(line);
    c[1] = line - c[0] * p->walk_extent[1];
  }
  ATTNEXT_DEVICE void place(int32_t s, Cursor& cursor, int32_t (&c)[3]) const {
    seek(s, cursor);
    coordinates(token_at(cursor.run, place_of(s, cursor)), c);
  }
  ATTNEXT_DEVICE Slot slot(int32_t s) const { return slot(s, find(s)); }
  ATTNEXT_DEVICE Slot slot(int32_t s, const Cursor& cursor) const {  // as place() has left it
    Slot at;
    at.kind = s < total ? Slot::kToken : Slot::kNone;
    at.place = place_of(s, cursor);
    at.run = cursor.run;
    coordinates(token_at(at.run, at.place), at.token);
    return at;
  }
  ATTNEXT_DEVICE static uint32_t dilation(int) { return 1; }
  ATTNEXT_DEVICE static uint32_t first(int) { return 0; }
  ATTNEXT_DEVICE uint32_t extent(int a) const { return static_cast<uint32_t>(p->walk_extent[a]); }
  ATTNEXT_DEVICE static bool has_phantoms() { return false; }

  // The entry that a slot is of, kNoBias if none.
  ATTNEXT_DEVICE static int32_t entry_of(const Slot& at) {
    return at.run < 0 || at.kind == Slot::kNone ? kNoBias : at.run;
  }
  ATTNEXT_DEVICE int32_t bias_of_entry(int32_t entry) const {
    return entry == kNoBias ? kNoBias : entries[entry].slot;
  }
  ATTNEXT_DEVICE int32_t bias_entry(const WindowParams&, const Slot& at) const {
    return bias_of_entry(entry_of(at));
  }
  ATTNEXT_DEVICE static int32_t bias_origin(const WindowParams&, const ListRow&) { return 0; }
  ATTNEXT_DEVICE static int32_t bias_key(const WindowParams&, const ListRow&) { return 0; }
  ATTNEXT_DEVICE static int32_t bias_of_key(int32_t, int32_t entry) { return entry; }

  // ---- pairs

  // Calls add(begin, end) for the tokens that a row attends of runs of the list, or of others.
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
  // Whether bits of intervals say all of a run.
  ATTNEXT_DEVICE bool in_bits(bool listed) const {
    return !p->mixed && !(p->scattered && (listed || exact));
  }
  // Whether a row that a run is of attends the token at one of its places.
  ATTNEXT_DEVICE bool attends(const ListRow& row, int32_t run, int32_t place) const {
    const bool listed = is_listed(run);
    const int32_t token = token_at(run, place);
    bool found = false;
    intervals(row, listed,
              [&](int32_t begin, int32_t end) { found |= begin <= token && token < end; });
    found &= token != row.self;
    if (found && p->mixed) {
      const int32_t mine = row_documents()[token_of_row(first_row + row.index)];
      found = walk_documents()[token] == mine;
    }
    if (found && exact && !listed) {
      const int32_t at = p->walk_places ? p->walk_places[token] : token;
#pragma unroll 1
      for (int32_t e = 0; e < count; ++e) {
        found &= !(has_row(e, row) && entries[e].walk_begin <= at && at < entries[e].walk_end);
      }
    }
    return found;
  }
  ATTNEXT_DEVICE bool attends(const ListRow& row, const Slot& at) const {
    return row.live && at.kind != Slot::kNone && has_row(at.run, row) &&
           attends(row, at.run, at.place);
  }
};

// Walks in steps of kStep slots and tells, for the rows of a warp, what a step holds.
template <int kStep, class Walk>
struct ListSteps {
  static constexpr int kWords = (kStep + 31) / 32;

  // Of the warp's rows. Their places have bits in one word of a run's.
  struct alignas(16) Common {
    int32_t lo_min, lo_max, hi_min, hi_max;
    int32_t sink_min, sink_max, self_min, self_max;
    int32_t near_lo_min, near_lo_max, near_hi_min, near_hi_max;
    uint32_t rows;
    int32_t first_row, spare[2];
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
    const int32_t first_row = __shfl_sync(~0u, row.index, 0);
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
                         __reduce_or_sync(~0u, use ? 1u << row.index % 32 : 0),
                         first_row,
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
    const int32_t end = slot + kStep;
    bool full = end <= walk.total, skip = true;
    int32_t which = cursor.run, from = slot, until = cursor.until, shift = cursor.shift;
    while (true) {
      const int32_t to = min(min(until, walk.total), end);
      if (from < to) {
        const uint32_t rows = walk.rows_of(which, c.first_row);
        full &= covers(walk, c, walk.is_listed(which), rows, from + shift, to + shift);
        skip &= misses(walk, c, walk.is_listed(which), rows, from + shift, to + shift);
      }
      if (until >= end || ++which >= walk.count || !(full || skip)) break;
      typename Walk::Cursor next;
      next.run = which;
      walk.set(next);
      from = until, until = next.until, shift = next.shift;
    }
    return skip ? Step::kSkip : full ? Step::kFull : Step::kEdge;
  }
  // Whether all rows attend places [begin, end) of a run.
  ATTNEXT_DEVICE static bool covers(const Walk& walk, const Common& c, bool listed, uint32_t rows,
                                    int32_t begin, int32_t end) {
    if (!walk.in_bits(listed) || (c.self_min < end && begin <= c.self_max)) return false;
    if (!listed) {
      if (walk.exact) return false;
      return (c.lo_max <= begin && end <= c.sink_min) ||
             (max(c.near_lo_max, c.sink_max) <= begin && end <= c.near_hi_min);
    }
    if (c.rows & ~rows) return false;
    if (walk.exact) return c.lo_max <= begin && end <= c.hi_min;
    return (c.sink_max <= begin && end <= c.near_lo_min) ||
           (max(c.near_hi_max, c.sink_max) <= begin && end <= c.hi_min);
  }
  // Whether no row does.
  ATTNEXT_DEVICE static bool misses(const Walk& walk, const Common& c, bool listed, uint32_t rows,
                                    int32_t begin, int32_t end) {
    if (!(c.rows & rows)) return true;
    if (listed && walk.p->scattered) return false;
    if (end <= c.lo_min || c.hi_max <= begin) return true;
    if (!listed) {
      return c.sink_max <= begin && (end <= c.near_lo_min || c.near_hi_max <= begin);
    }
    return !walk.exact && c.near_lo_max <= begin && end <= c.near_hi_min;
  }

  ATTNEXT_DEVICE void mask(const Walk& walk, const ListRow& row, int32_t slot,
                           uint32_t (&bits)[kWords]) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) bits[w] = 0;
    if (!row.live) return;
    int32_t which = cursor.run, at = slot, until = cursor.until, shift = cursor.shift;
    while (true) {
      const int32_t from = at - slot, to = min(min(until, walk.total) - slot, kStep);
      if (walk.has_row(which, row)) add_run(walk, row, which, slot + shift, from, to, bits);
      if (until >= slot + kStep || ++which >= walk.count) break;
      typename Walk::Cursor next;
      next.run = which;
      walk.set(next);
      at = until, until = next.until, shift = next.shift;
    }
  }
  // Of slots [from, to) of the step, which are at places `first` + slot of a run.
  ATTNEXT_DEVICE static void add_run(const Walk& walk, const ListRow& row, int32_t which,
                                     int32_t first, int32_t from, int32_t to,
                                     uint32_t (&bits)[kWords]) {
    const bool listed = walk.is_listed(which);
    const auto part = [&](int32_t begin, int32_t end, int w) {
      return bit_range(max(begin - first, from) - 32 * w, min(end - first, to) - 32 * w);
    };
    if (!walk.in_bits(listed)) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        uint32_t mine = 0;
#pragma unroll 1
        for (int32_t s = max(from, 32 * w); s < min(to, 32 * w + 32); ++s) {
          mine |= uint32_t(walk.attends(row, which, first + s)) << (s - 32 * w);
        }
        bits[w] |= mine;
      }
      return;
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      uint32_t mine = 0;
      walk.intervals(row, listed, [&](int32_t begin, int32_t end) { mine |= part(begin, end, w); });
      if (row.self >= 0) mine &= ~part(row.self, row.self + 1, w);
      if (walk.exact && !listed) {
#pragma unroll 1
        for (int32_t e = 0; e < walk.count; ++e) {
          const ListEntry& x = walk.entries[e];
          if (walk.has_row(e, row)) mine &= ~part(x.walk_begin, x.walk_end, w);
        }
      }
      bits[w] |= mine;
    }
  }
};

}  // namespace cuda
}  // namespace attnext
