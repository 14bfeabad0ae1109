// SPDX-License-Identifier: Apache-2.0
#include "geometry.h"

#include <algorithm>
#include <limits>

namespace attnext {
namespace {

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a % b < 0) != (b < 0)); }
int64_t floor_mod(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }

struct Interval {
  int64_t begin, end;
};

// The rule. `t` is the query's position in its class, `n` the number of keys of the class.
// NATTEN / GNA for `inward`; bands, sliding windows and Swin tiles for `truncate`.
Interval window(const AxisRule& rule, int64_t t, int64_t n) {
  const int64_t block = floor_div(t - rule.phase, rule.stride) * rule.stride + rule.phase;
  int64_t leader = block + (rule.causal ? rule.stride - 1 : rule.stride / 2);
  if (rule.boundary == Boundary::kInward) leader = std::min(leader, n - 1);
  Interval w{leader - rule.left, leader + rule.right + 1};
  if (rule.causal) w.end = t + 1;
  if (rule.boundary == Boundary::kInward && !rule.causal) {
    const int64_t size = rule.left + rule.right + 1;
    w.begin = std::clamp<int64_t>(w.begin, 0, std::max<int64_t>(n - size, 0));
    w.end = std::min(w.begin + size, n);
  } else if (rule.boundary != Boundary::kZeroPad) {
    w.begin = std::max<int64_t>(w.begin, 0);
    w.end = std::min(w.end, n);
  }
  w.end = std::max(w.begin, w.end);
  return w;
}

// Evaluates one sequence of `n_q` queries whose tables start at `query0`, keys at `key0`.
void evaluate_into(AxisTable* table, const AxisRule& rule, int64_t query0, int64_t n_q,
                   int64_t key0, int64_t n_k, int64_t offset, int64_t sinks) {
  for (int64_t i = 0; i < n_q; ++i) {
    const int64_t position = i + offset;
    const int64_t c = floor_mod(position, rule.dilation);
    const int64_t t = floor_div(position, rule.dilation);
    const Interval w = window(rule, t, AxisTable::class_size(c, n_k, rule.dilation));
    table->begin[query0 + i] = static_cast<int32_t>(key0 + w.begin);
    table->end[query0 + i] = static_cast<int32_t>(key0 + w.end);
    if (sinks > 0) {
      const int64_t last = std::min(sinks, rule.causal ? std::clamp<int64_t>(t + 1, 0, n_k) : n_k);
      table->sink_begin[query0 + i] = static_cast<int32_t>(key0);
      table->sink_end[query0 + i] = static_cast<int32_t>(key0 + last);
    }
  }
}

AxisTable make_table(const AxisRule& rule, int64_t n_q, int64_t n_k, int64_t sinks) {
  AxisTable table;
  table.num_queries = n_q;
  table.num_keys = n_k;
  table.dilation = rule.dilation;
  table.offset = rule.offset;
  table.begin.resize(n_q);
  table.end.resize(n_q);
  if (sinks > 0) {
    table.sink_begin.resize(n_q);
    table.sink_end.resize(n_q);
  }
  return table;
}

}  // namespace

int64_t first_query_of_class(const AxisTable& table, int64_t c) {
  return floor_mod(c - table.offset, table.dilation);
}

namespace {

int64_t queries_of_class(const AxisTable& table, int64_t c) {
  return AxisTable::class_size(first_query_of_class(table, c), table.num_queries, table.dilation);
}

// Cuts every class into segments of at most `length` queries. Where windows jump (stride blocks,
// packed sequences) a segment that straddles the jump drags in both unions: `at_jumps` cuts there.
void cut_segments(const AxisTable& table, int64_t length, bool at_jumps, int64_t slab_length,
                  std::vector<Segment>* segments, std::vector<int32_t>* class_first) {
  const int64_t d = table.dilation;
  segments->clear();
  class_first->assign(1, 0);
  for (int64_t c = 0; c < d; ++c) {
    const int64_t first = first_query_of_class(table, c);
    const int64_t count = queries_of_class(table, c);
    for (int64_t r = 0; r < count;) {
      int64_t last = std::min(r + length, count);
      if (slab_length > 0) last = std::min(last, (r / slab_length + 1) * slab_length);
      int64_t stop = r + 1;
      if (!at_jumps && table.position.empty()) stop = last;
      for (; stop < last; ++stop) {
        const int64_t i = first + stop * d;
        const bool jump =
            table.begin[i] > table.begin[i - d] + 1 && table.end[i] > table.end[i - d] + 1;
        if (at_jumps && jump) break;
        // Lanes of a vector are neighbours, also in their distance to a key.
        if (table.query_index(i) != table.query_index(i - d) + 1) break;
      }
      const int64_t i0 = first + r * d, i1 = first + (stop - 1) * d;
      int32_t begin = table.begin[i0], end = table.end[i1];
      if (!table.monotone) {
        for (int64_t i = i0; i <= i1; i += d) {
          begin = std::min(begin, table.begin[i]);
          end = std::max(end, table.end[i]);
        }
      }
      segments->push_back({static_cast<int32_t>(i0), static_cast<int32_t>(stop - r),
                           static_cast<int32_t>(table.query_index(i0)), begin,
                           std::max(begin, end)});
      r = stop;
    }
    class_first->push_back(static_cast<int32_t>(segments->size()));
  }
}

double union_sum(const std::vector<Segment>& segments) {
  double sum = 0;
  for (const Segment& s : segments) sum += s.end - s.begin;
  return sum;
}

}  // namespace

int64_t AxisTable::query_class(int64_t i) const { return floor_mod(i + offset, dilation); }
int64_t AxisTable::query_index(int64_t i) const {
  return position.empty() ? floor_div(i + offset, dilation) : position[i];
}

AxisTable evaluate(const AxisRule& rule, int64_t num_queries, int64_t num_keys, int64_t sinks) {
  AxisTable table = make_table(rule, num_queries, num_keys, sinks);
  evaluate_into(&table, rule, 0, num_queries, 0, num_keys, rule.offset, sinks);
  table.sink_rows = std::min(std::max<int64_t>(sinks, 0), num_keys);
  return table;
}

AxisTable evaluate_packed(const AxisRule& rule, const std::vector<int64_t>& cu_queries,
                          const std::vector<int64_t>& cu_keys, int64_t sinks) {
  AxisTable table = make_table(rule, cu_queries.back(), cu_keys.back(), sinks);
  table.offset = 0;
  table.position.resize(table.num_queries);
  for (size_t s = 0; s + 1 < cu_queries.size(); ++s) {
    const int64_t n_q = cu_queries[s + 1] - cu_queries[s], n_k = cu_keys[s + 1] - cu_keys[s];
    evaluate_into(&table, rule, cu_queries[s], n_q, cu_keys[s], n_k, n_k - n_q, sinks);
    for (int64_t i = 0; i < n_q; ++i) {
      table.position[cu_queries[s] + i] = static_cast<int32_t>(cu_keys[s] + n_k - n_q + i);
    }
  }
  return table;
}

std::vector<std::pair<int32_t, int32_t>> inverse(const AxisTable& table) {
  const int64_t d = table.dilation;
  std::vector<std::pair<int32_t, int32_t>> out(table.num_keys);
  for (int64_t c = 0; c < d; ++c) {
    const int64_t first = first_query_of_class(table, c), count = queries_of_class(table, c);
    int64_t lo = 0, hi = 0;  // both ends are monotone: one sweep serves all keys of the class
    for (int64_t u = 0; u < table.class_size(c); ++u) {
      while (hi < count && table.begin[first + hi * d] <= u) ++hi;
      while (lo < hi && table.end[first + lo * d] <= u) ++lo;
      out[c + u * d] = {static_cast<int32_t>(lo), static_cast<int32_t>(hi)};
    }
  }
  return out;
}

AxisTable transposed(const AxisTable& table) {
  AxisTable out = make_table(AxisRule{}, table.num_keys, table.num_queries, 0);
  out.dilation = table.dilation;
  const auto windows = inverse(table);
  for (int64_t j = 0; j < table.num_keys; ++j) {
    out.begin[j] = windows[j].first;
    out.end[j] = std::max(windows[j].first, windows[j].second);
  }
  if (table.sink_begin.empty()) return out;
  // The queries that see a sink are all that may see the key at all: its window is among them.
  AxisTable sinks = table;
  sinks.begin = table.sink_begin, sinks.end = table.sink_end;
  const auto seen = inverse(sinks);
  out.monotone = false;
  for (int64_t j = 0; j < table.num_keys; ++j) {
    if (seen[j].first < seen[j].second) out.begin[j] = seen[j].first, out.end[j] = seen[j].second;
  }
  return out;
}

int64_t max_offset(const AxisTable& table) {
  int64_t worst = -1;
  for (int64_t i = 0; i < table.num_queries; ++i) {
    const int64_t t = table.query_index(i);
    const auto visit = [&](int64_t begin, int64_t end) {
      if (begin < end) worst = std::max({worst, std::abs(begin - t), std::abs(end - 1 - t)});
    };
    visit(table.begin[i], table.end[i]);
    if (!table.sink_begin.empty()) visit(table.sink_begin[i], table.sink_end[i]);
  }
  return worst;
}

WindowPlan make_plan(AxisTable tables[3], const PlanOptions& options) {
  WindowPlan plan;
  for (int a = 0; a < 3; ++a) plan.table[a] = std::move(tables[a]);
  plan.slab_axis = options.slab_axis >= 0 ? options.slab_axis : 2;
  const auto slab_length = [&](int a) { return a == plan.slab_axis ? options.slab_length : 0; };

  // The box of queries in one vector: the one whose windows' unions hold the fewest keys in all.
  // Axis sums are independent, so the candidates cost three look-ups each.
  struct Choice {
    double cost;
    bool at_jumps;
  };
  std::vector<Choice> choices[3];
  std::vector<Segment> segments;
  std::vector<int32_t> first;
  for (int a = 0; a < 3; ++a) {
    const AxisTable& t = plan.table[a];
    const int64_t longest = std::min<int64_t>(
        options.lanes, std::max<int64_t>(1, (t.num_queries + t.dilation - 1) / t.dilation));
    for (int64_t length = 1; length <= longest; ++length) {
      // Long boxes: every length would be tried in vain. 48 is 3/4 of a tile.
      const bool round = length <= 16 || length % 16 == 0 || length == longest;
      if (!round) {
        choices[a].push_back({std::numeric_limits<double>::infinity(), false});
        continue;
      }
      cut_segments(t, length, false, slab_length(a), &segments, &first);
      Choice c{union_sum(segments), false};
      if (length > 1) {
        cut_segments(t, length, true, slab_length(a), &segments, &first);
        const double cost = union_sum(segments);
        if (cost < c.cost) c = {cost, true};
      }
      choices[a].push_back(c);
    }
  }
  double best = std::numeric_limits<double>::infinity();
  for (size_t l0 = 1; l0 <= choices[0].size(); ++l0) {
    for (size_t l1 = 1; l0 * l1 <= static_cast<size_t>(options.lanes) && l1 <= choices[1].size();
         ++l1) {
      for (size_t l2 = 1;
           l0 * l1 * l2 <= static_cast<size_t>(options.lanes) && l2 <= choices[2].size(); ++l2) {
        const double cost =
            choices[0][l0 - 1].cost * choices[1][l1 - 1].cost * choices[2][l2 - 1].cost;
        if (cost <= best) {  // ties go to the later candidate: longer runs on the last axis come
          if (cost == best && static_cast<int32_t>(l2) < plan.box[2]) continue;
          best = cost;
          plan.box[0] = static_cast<int32_t>(l0);
          plan.box[1] = static_cast<int32_t>(l1);
          plan.box[2] = static_cast<int32_t>(l2);
        }
      }
    }
  }
  plan.computed_pairs = best * options.lanes;
  plan.useful_pairs = 1;

  plan.vectors = options.vectors;
  plan.stack_axis = plan.table[0].num_queries > 1 ? 0 : plan.table[1].num_queries > 1 ? 1 : 2;
  for (int a = 0; a < 3; ++a) {
    const AxisTable& t = plan.table[a];
    AxisPlan& axis = plan.axis[a];
    double useful = 0;
    for (int64_t i = 0; i < t.num_queries; ++i) useful += t.end[i] - t.begin[i];
    plan.useful_pairs *= useful;
    const bool jumps = choices[a][plan.box[a] - 1].at_jumps;
    cut_segments(t, plan.box[a], jumps, slab_length(a), &axis.segments, &first);
    const int32_t most = a == plan.stack_axis ? options.vectors : 1;
    axis.class_first_group.assign(1, 0);
    for (int64_t c = 0; c < t.dilation; ++c) {
      const int64_t q0 = first_query_of_class(t, c);
      for (int32_t s = first[c]; s < first[c + 1];) {
        const auto slab_of = [&](int32_t k) -> int32_t {
          if (slab_length(a) <= 0) return 0;
          const int64_t r = (axis.segments[k].query - q0) / t.dilation;
          return static_cast<int32_t>(r / slab_length(a));
        };
        Group g{
            s, 1,         static_cast<int32_t>(c), axis.segments[s].begin, axis.segments[s].end, 0,
            0, slab_of(s)};
        while (g.num_segments < most && s + g.num_segments < first[c + 1] &&
               slab_of(s + g.num_segments) == g.slab) {
          g.end = std::max(g.end, axis.segments[s + g.num_segments].end);
          ++g.num_segments;
        }
        if (!t.sink_begin.empty()) {
          const Segment& tail = axis.segments[s + g.num_segments - 1];
          g.sink_begin = t.sink_begin[axis.segments[s].query];
          g.sink_end = t.sink_end[tail.query + (tail.count - 1) * t.dilation];
          if (g.sink_end > g.begin) {  // the walk visits each key once: overlap joins the window
            g.end = std::max(g.end, g.sink_end);
            g.sink_end = g.begin;
          }
          g.sink_end = std::max(g.sink_begin, g.sink_end);
        }
        for (int32_t k = s; k < s + g.num_segments; ++k) {
          const int32_t p = axis.segments[k].position;
          if (g.begin < g.end) {
            axis.relative_begin = std::min(axis.relative_begin, g.begin - p);
            axis.relative_end = std::max(axis.relative_end, g.end - p);
          }
          if (g.sink_begin < g.sink_end) {
            axis.relative_begin = std::min(axis.relative_begin, g.sink_begin - p);
            axis.relative_end = std::max(axis.relative_end, g.sink_end - p);
          }
        }
        axis.most_keys = std::max(axis.most_keys, g.end - g.begin);
        axis.groups.push_back(g);
        s += g.num_segments;
      }
      axis.class_first_group.push_back(static_cast<int32_t>(axis.groups.size()));
    }
  }

  const AxisPlan& axis = plan.axis[plan.slab_axis];
  const AxisTable& t = plan.table[plan.slab_axis];
  for (size_t g = 0; g < axis.groups.size(); ++g) {
    const Group& group = axis.groups[g];
    const int32_t n = static_cast<int32_t>(t.class_size(group.cls));
    const bool fresh = plan.slabs.empty() || plan.slabs.back().cls != group.cls ||
                       axis.groups[g - 1].slab != group.slab;
    if (fresh) {
      plan.slabs.push_back({group.cls, static_cast<int32_t>(g), static_cast<int32_t>(g), n, 0});
    }
    Slab& slab = plan.slabs.back();
    slab.last_group = static_cast<int32_t>(g) + 1;
    const auto reach = [&](int32_t begin, int32_t end) {
      begin = std::clamp(begin, 0, n), end = std::clamp(end, 0, n);
      if (begin < end) slab.begin = std::min(slab.begin, begin), slab.end = std::max(slab.end, end);
    };
    reach(group.begin, group.end);
    if (t.sink_rows == 0) reach(group.sink_begin, group.sink_end);  // else they have their own rows
  }
  for (Slab& slab : plan.slabs) slab.begin = std::min(slab.begin, slab.end);
  return plan;
}

namespace {

// Tables whose windows hold those of every rule: slabs are cut once for all heads.
std::vector<AxisTable> hull(const std::vector<AxisTable>& tables) {
  std::vector<AxisTable> all(tables.begin(), tables.begin() + 3);
  for (size_t k = 3; k < tables.size(); ++k) {
    for (size_t i = 0; i < tables[k].begin.size(); ++i) {
      all[k % 3].begin[i] = std::min(all[k % 3].begin[i], tables[k].begin[i]);
      all[k % 3].end[i] = std::max(all[k % 3].end[i], tables[k].end[i]);
    }
  }
  return all;
}

// How to cut the backward pass: never by the number of threads or of batch items, or bits would
// depend on it.
void choose_slabs(const std::vector<AxisTable>& tables, int64_t kv_heads, PlanOptions* options) {
  constexpr int64_t kTargetItems = 64;  // enough for the cores of one socket, few enough to merge
  constexpr int64_t kFewItems = 8;      // below this, a large halo is better than idle cores
  constexpr int64_t kMaxRows = 16384;   // private accumulators stay near the caches
  constexpr int64_t kGrain = 64;        // a multiple of every tile
  int64_t classes = 1;
  int best = 2;
  double best_ratio = std::numeric_limits<double>::infinity();
  int64_t reach[3] = {1, 1, 1};
  for (int a = 0; a < 3; ++a) {
    const AxisTable& t = tables[a];
    classes *= t.dilation;
    for (size_t i = 0; i < t.begin.size(); ++i) {
      reach[a] = std::max<int64_t>(reach[a], t.end[i] - t.begin[i]);
    }
    const double n = std::max<int64_t>(1, t.num_queries / t.dilation);
    const double ratio = n > 1 ? reach[a] / n : std::numeric_limits<double>::infinity();
    if (ratio < best_ratio) best_ratio = ratio, best = a;
  }
  const AxisTable& t = tables[best];
  options->slab_axis = best;
  const int64_t n = (t.num_queries + t.dilation - 1) / t.dilation;
  const int64_t items = std::max<int64_t>(1, kv_heads * classes);
  int64_t rows = 1;  // keys of a slab per key of the slab axis
  for (int a = 0; a < 3; ++a) {
    if (a != best) rows *= std::max<int64_t>(1, tables[a].num_keys / tables[a].dilation);
  }
  // Wanted for parallelism, allowed by the halo, and forced by the size of the accumulators.
  const int64_t wanted = (kTargetItems + items - 1) / items;
  int64_t length = std::max((n + wanted - 1) / wanted, 2 * reach[best]);
  if (items * ((n + length - 1) / length) < kFewItems) {
    const int64_t few = (kFewItems + items - 1) / items;
    length = std::max<int64_t>((n + few - 1) / few, 1);
  }
  length = std::min(length, std::max<int64_t>({4 * reach[best], kMaxRows / rows, 1}));
  // A boundary inside a tile would cost lanes: long slabs are cut on a grid of tiles.
  if (length >= kGrain / 2) length = (length + kGrain - 1) / kGrain * kGrain;
  options->slab_length = length >= n ? 0 : length;
}

}  // namespace

bool Geometry::one_line() const {
  for (size_t k = 0; k < tables_.size(); ++k) {
    const AxisTable& t = tables_[k];
    const bool one = t.num_queries == 1 && t.num_keys == 1 && t.begin[0] == 0 && t.end[0] == 1;
    if (k % 3 != 2 && !one) return false;
  }
  return true;
}

std::shared_ptr<const Geometry::Plans> Geometry::plans(int32_t lanes, int32_t vectors,
                                                       int64_t kv_heads) const {
  constexpr size_t kKept = 8;  // a few instruction sets, dtypes and numbers of heads
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const Made& m : made_) {
    if (m.lanes == lanes && m.vectors == vectors && m.kv_heads == kv_heads) return m.plans;
  }
  auto fresh = std::make_shared<Plans>();
  fresh->options.lanes = lanes;
  fresh->options.vectors = vectors;
  if (kv_heads > 0) choose_slabs(hull(tables_), kv_heads, &fresh->options);
  for (size_t r = 0; r < tables_.size(); r += 3) {
    AxisTable copy[3] = {tables_[r], tables_[r + 1], tables_[r + 2]};
    fresh->plans.push_back(make_plan(copy, fresh->options));
  }
  if (made_.size() == kKept) made_.erase(made_.begin());
  made_.push_back({lanes, vectors, kv_heads, fresh});
  return fresh;
}

std::shared_ptr<const Geometry> shared_geometry(
    const std::vector<int64_t>& key, int64_t tokens,
    const std::function<std::vector<AxisTable>()>& build) {
  constexpr size_t kKept = 32;  // the layers of a model share a few
  constexpr int64_t kKeptTokens = 1 << 23;
  struct Entry {
    std::vector<int64_t> key;
    int64_t tokens;
    std::shared_ptr<const Geometry> geometry;
  };
  static std::mutex mutex;
  static std::vector<Entry> entries;
  if (!key.empty()) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (const Entry& e : entries) {
      if (e.key == key) return e.geometry;
    }
  }
  auto geometry = std::make_shared<const Geometry>(build());
  if (!key.empty()) {
    const std::lock_guard<std::mutex> lock(mutex);
    entries.push_back({key, tokens, geometry});
    int64_t kept = 0;
    for (const Entry& e : entries) kept += e.tokens;
    while (entries.size() > kKept || (kept > kKeptTokens && entries.size() > 1)) {
      kept -= entries.front().tokens;
      entries.erase(entries.begin());
    }
  }
  return geometry;
}

PlanView view(const WindowPlan& plan) {
  PlanView v{};
  for (int a = 0; a < 3; ++a) {
    const AxisTable& t = plan.table[a];
    const AxisPlan& p = plan.axis[a];
    v.axis[a] = {t.begin.data(),
                 t.end.data(),
                 t.sink_begin.empty() ? nullptr : t.sink_begin.data(),
                 t.sink_begin.empty() ? nullptr : t.sink_end.data(),
                 p.segments.data(),
                 p.groups.data(),
                 static_cast<int64_t>(p.groups.size()),
                 t.num_keys,
                 t.dilation,
                 t.sink_rows,
                 p.relative_begin,
                 p.relative_end,
                 p.most_keys};
    v.box[a] = plan.box[a];
  }
  v.stack_axis = plan.stack_axis;
  v.vectors = plan.vectors;
  v.slab_axis = plan.slab_axis;
  return v;
}

}  // namespace attnext
