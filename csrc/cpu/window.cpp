// SPDX-License-Identifier: Apache-2.0
// Entry points: plan the problem, cut it into work items, hand them to threads.
#include "window.h"

#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

#include "isa.h"
#include "memory.h"
#include "parallel.h"

namespace attnext {
namespace cpu {
namespace {

int64_t num_tiles(const PlanView& v) {
  return v.axis[0].num_groups * v.axis[1].num_groups * v.axis[2].num_groups;
}

// The plans of all rules and what the heads share.
struct Problem {
  const WindowParams& params;
  const WindowKernels& kernels;
  const int32_t* head_rule;
  std::shared_ptr<const Geometry::Plans> shared;
  const std::vector<WindowPlan>& plans;
  std::vector<PlanView> views;
  Memory bias_memory;
  std::vector<void*> bias;  // per head, expanded
  bool serial;

  Problem(const WindowParams& p, const Geometry& geometry, const int32_t* rule_of_head,
          bool backward)
      : params(p),
        kernels(window_kernels(p.dtype)),
        head_rule(rule_of_head),
        shared(geometry.plans(kernels.lanes, kernels.vectors,
                              backward ? std::max<int64_t>(1, p.kv_heads) : 0)),
        plans(shared->plans) {
    double pairs = 0;
    for (const WindowPlan& plan : plans) {
      views.push_back(view(plan));
      pairs = std::max(pairs, plan.computed_pairs);
    }
    serial = (pairs + p.extra_keys) * p.batch * p.heads * (p.head_dim + p.head_dim_v) < kSerialWork;
    if (p.bias) expand_bias();
  }

  // Lets a single tile hold the queries of all heads that share a key head, if it has lanes for
  // them: each key is then read once, and not once per head.
  bool put_heads_in_lanes() {
    const int64_t count = params.heads / params.kv_heads;
    const int64_t queries =
        params.query_extent[0] * params.query_extent[1] * params.query_extent[2];
    if (count == 1 || views.size() > 1 || params.bias || num_tiles(views[0]) != 1) return false;
    if (queries * count > kernels.lanes * kernels.vectors) return false;
    views[0].heads_in_lanes = static_cast<int32_t>(count);
    return true;
  }
  const PlanView& view_of(int64_t head) const { return views[head_rule[head]]; }
  const void* bias_of(int64_t head) const { return params.bias ? bias[head] : nullptr; }
  // How many heads take a tile together, so that its walk is worked out once: those whose keys stay
  // in the second cache until the next tile wants them, and fewer where items would be.
  int64_t heads_together(int64_t least_items) const {
    constexpr int64_t kBytes = 256 << 10;
    if (plans.size() > 1) return 1;
    const PlanView& v = views[0];
    int64_t keys = 1;
    for (const AxisView& axis : v.axis) keys *= std::max(axis.most_keys, 1);
    const int64_t row = (params.head_dim + params.head_dim_v) * size_of(params.dtype);
    const int64_t fit = kBytes * (params.heads / params.kv_heads) / (keys * row);
    const int64_t most = num_tiles(v) * params.batch * params.heads / least_items;
    const int64_t together = std::clamp<int64_t>(std::min(fit, most), 1, params.heads);
    const int64_t runs = (params.heads - 1) / together + 1;
    return (params.heads - 1) / runs + 1;
  }

 private:
  void expand_bias() {
    int64_t bytes = 0;
    std::vector<int64_t> offset;
    for (int64_t h = 0; h < params.heads; ++h) {
      offset.push_back(bytes);
      bytes += kernels.bias_size(view_of(h)) * acc_size(params.dtype);
    }
    bias_memory = allocate(bytes);
    for (int64_t at : offset) bias.push_back(bias_memory.get() + at);
    parallel_for(params.heads, 1, serial, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h) {
        kernels.expand_bias(params, view_of(h), h, bias[h]);
      }
    });
  }
};

void tile_index(const PlanView& v, int64_t t, int64_t out[3]) {
  out[2] = t % v.axis[2].num_groups;
  t /= v.axis[2].num_groups;
  out[1] = t % v.axis[1].num_groups;
  out[0] = t / v.axis[1].num_groups;
}

bool has_sinks(const PlanView& v, const int64_t tile[3]) {
  const Group& g = v.axis[2].groups[tile[2]];
  return g.sink_begin < g.sink_end;
}

// Keys on a tile's walk.
int64_t walk_length(const WindowParams& p, const PlanView& v, const int64_t tile[3]) {
  int64_t box = 1;
  for (int a = 0; a < 3; ++a) {
    const Group& g = v.axis[a].groups[tile[a]];
    box *= g.end - g.begin;
  }
  const Group& last = v.axis[2].groups[tile[2]];
  return p.extra_keys + (last.sink_end - last.sink_begin) + box;
}

}  // namespace

void window_forward(const WindowParams& p, const Geometry& geometry, const int32_t* head_rule) {
  Problem problem(p, geometry, head_rule, false);
  const WindowKernels& kernels = problem.kernels;
  const bool heads_in_lanes = problem.put_heads_in_lanes();

  // Item = (batch, turn, heads, tile). A head's tiles are neighbours, so that its keys stay in the
  // caches. Where the heads of a token lie side by side they take turns, so that its pages do too:
  // each would come from memory once per head. Heads whose walks are short take a tile together.
  constexpr int64_t kTurnBytes = 2 << 20;  // of keys and values, all heads
  constexpr int64_t kManyItems = 32;
  int64_t most_tiles = 1, scratch = 0, longest = 0;
  for (const PlanView& v : problem.views) {
    most_tiles = std::max(most_tiles, num_tiles(v));
    scratch = std::max(scratch, kernels.forward_scratch(p, v));
  }
  const int64_t tile_bytes = int64_t(kernels.lanes) * kernels.vectors * p.kv_heads *
                             (p.head_dim + p.head_dim_v) * size_of(p.dtype);
  const bool side_by_side = std::abs(p.key.head) < std::abs(p.key.token[2]);
  const int64_t turns =
      side_by_side ? (most_tiles - 1) / std::max<int64_t>(1, kTurnBytes / tile_bytes) + 1 : 1;
  const auto first_tile = [&](int64_t turn, int64_t h) {
    return num_tiles(problem.view_of(h)) * turn / turns;
  };
  const int64_t together =
      heads_in_lanes ? p.heads / p.kv_heads : problem.heads_together(kManyItems * max_threads());
  const int64_t runs = (p.heads - 1) / together + 1;
  std::vector<int64_t> first(1, 0);  // item, per turn and run of heads
  for (int64_t turn = 0; turn < turns; ++turn) {
    for (int64_t h = 0; h < p.heads; h += together) {
      first.push_back(first.back() + first_tile(turn + 1, h) - first_tile(turn, h));
    }
  }
  const int64_t items = p.batch * first.back();
  struct Item {
    int64_t b, h, heads, tile[3];
  };
  // Neighbours on the last axis, of the same heads and dilation class.
  const auto follow = [](const PlanView& v, const Item& last, const Item& item) {
    const Group* groups = v.axis[2].groups;
    return item.b == last.b && item.h == last.h && item.tile[0] == last.tile[0] &&
           item.tile[1] == last.tile[1] && item.tile[2] == last.tile[2] + 1 &&
           groups[item.tile[2]].cls == groups[last.tile[2]].cls;
  };
  const auto item_at = [&](int64_t i) {
    Item item;
    item.b = i / first.back();
    i %= first.back();
    const int64_t k = std::upper_bound(first.begin(), first.end(), i) - first.begin() - 1;
    item.h = k % runs * together;
    item.heads = heads_in_lanes ? 1 : std::min(together, p.heads - item.h);
    tile_index(problem.view_of(item.h), first_tile(k / runs, item.h) + i - first[k], item.tile);
    return item;
  };

  // With few tiles (decoding) the keys are split as well, and the partial results merged: into how
  // many, the number of batch items must not decide, or bits would depend on it.
  constexpr int64_t kMinKeys = 512;
  int64_t most_splits = 1;
  const int64_t items_of_batch = first.back();
  if (items > 0 && items_of_batch < kManyItems) {
    for (int64_t i = 0; i < items_of_batch; ++i) {
      const Item item = item_at(i);
      longest = std::max(longest, walk_length(p, problem.view_of(item.h), item.tile));
    }
    most_splits = std::clamp<int64_t>(longest / kMinKeys, 1, kManyItems / items_of_batch);
  }
  if (most_splits == 1) {
    const int64_t grain = std::clamp<int64_t>(items / (8 * max_threads()), 1, 16);
    const int64_t group_heads = p.heads / p.kv_heads;
    const KeyBoxes boxes(p, problem.views[0], kernels, false);
    // Keys for the tiles from `i` on, which may have been brought together; `shared_to`: where
    // those end that they are for.
    const auto near_keys = [&](int64_t i, int64_t end, int64_t* shared_to) {
      *shared_to = end;
      if (!boxes.useful()) return boxes.as_they_are();
      const Item item = item_at(i);
      const int64_t first_head = item.h / group_heads;
      const int64_t heads = (item.h + item.heads - 1) / group_heads - first_head + 1;
      KeyBox box{};
      int64_t reads = 0, k = i;
      for (; k < end; ++k) {
        const Item other = item_at(k);
        const PlanView& v = problem.view_of(other.h);
        if (other.b != item.b || other.h != item.h) break;
        if (item.heads > 1 && has_sinks(v, other.tile)) break;  // heads step alike from key to key
        const KeyBox own = key_box(v, other.tile);
        KeyBox both = k == i ? own : box;
        if (!join(own, &both) || !boxes.fit(both, heads)) break;
        box = both;
        reads += own.rows() * item.heads;
      }
      *shared_to = std::max(k, i + 1);
      return boxes.worth_bringing(box, heads, reads)
                 ? boxes.bring(box, item.b, first_head, heads,
                               thread_buffer(3, boxes.bytes(box, heads)))
                 : boxes.as_they_are();
    };
    parallel_for(items, grain, problem.serial, [&](int64_t begin, int64_t end) {
      void* memory = thread_buffer(0, scratch);
      Item next = item_at(begin), last{};
      NearKeys near = boxes.as_they_are();
      int64_t shared_to = begin;
      for (int64_t i = begin; i < end; ++i) {
        const Item item = next;
        const PlanView& v = problem.view_of(item.h);
        const bool follows = i > begin && follow(v, last, item);
        last = item;
        if (i == shared_to) near = near_keys(i, end, &shared_to);
        NextTile coming{};
        if (i + 1 < end) {
          next = item_at(i + 1);
          coming = {&problem.view_of(next.h), next.b, next.h, {}};
          std::copy(next.tile, next.tile + 3, coming.index);
        }
        kernels.forward(near, v, item.b, item.h, item.heads, item.tile, follows, coming,
                        p.bias ? problem.bias.data() : nullptr, memory);
      }
    });
    return;
  }
  int64_t partial_bytes = 0;
  for (const PlanView& v : problem.views) {
    partial_bytes = std::max(partial_bytes, kernels.partial_size(p, v) * acc_size(p.dtype));
  }
  const Memory partials = allocate(items * most_splits * partial_bytes);
  // Heads that share keys read the same part of them one after the other.
  const int64_t group = p.heads / p.kv_heads;
  std::vector<int64_t> order(items * most_splits);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) {
    const auto place = [&](int64_t i) {
      const Item item = item_at(i / most_splits);
      return std::make_tuple(item.b, item.h / group, i % most_splits);
    };
    return place(x) < place(y);
  });
  const auto splits_of = [&](const Item& item) {
    const int64_t keys = walk_length(p, problem.view_of(item.h), item.tile);
    return std::clamp<int64_t>(keys / kMinKeys, 1, most_splits);
  };
  parallel_for(items * most_splits, 1, problem.serial, [&](int64_t begin, int64_t end) {
    void* memory = thread_buffer(0, scratch);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t i = order[n];
      const Item item = item_at(i / most_splits);
      const int64_t k = i % most_splits, count = splits_of(item);
      if (k >= count) continue;
      const int64_t keys = walk_length(p, problem.view_of(item.h), item.tile);
      kernels.forward_part(p, problem.view_of(item.h), item.b, item.h, item.tile, keys * k / count,
                           keys * (k + 1) / count, problem.bias_of(item.h), memory,
                           partials.get() + i * partial_bytes);
    }
  });
  for (const PlanView& v : problem.views) {  // kernels step by the plan's own partial size
    if (kernels.partial_size(p, v) * acc_size(p.dtype) != partial_bytes) throw std::bad_alloc();
  }
  parallel_for(items, 1, problem.serial, [&](int64_t begin, int64_t end) {
    void* memory = thread_buffer(0, scratch);
    for (int64_t i = begin; i < end; ++i) {
      const Item item = item_at(i);
      kernels.merge_partials(p, problem.view_of(item.h), item.b, item.h, item.tile, splits_of(item),
                             partials.get() + i * most_splits * partial_bytes, memory);
    }
  });
}

namespace {

// The slabs of one class of the slab axis, common to all rules.
struct ClassSlabs {
  int64_t first = 0, count = 0;                     // in the plans' slab lists
  std::vector<std::pair<int64_t, int64_t>> shared;  // key coordinates that are not one slab's own
};

// Keys on the walks of a slab's tiles, but for sinks and extra keys.
int64_t walk_lengths(const PlanView& v, const SlabItem& item) {
  int64_t all = 1;
  for (int a = 0; a < 3; ++a) {
    int64_t keys = 0;
    for (int64_t g = item.first_group[a]; g < item.last_group[a]; ++g) {
      keys += v.axis[a].groups[g].end - v.axis[a].groups[g].begin;
    }
    all *= keys;
  }
  return all;
}

}  // namespace

void window_backward(const WindowParams& p, const Geometry& geometry, const int32_t* head_rule) {
  const Problem problem(p, geometry, head_rule, true);
  const WindowKernels& kernels = problem.kernels;
  const int64_t acc = acc_size(p.dtype);
  const int64_t group_heads = p.heads / p.kv_heads;
  const int s = problem.shared->options.slab_axis;
  const AxisTable* table = problem.plans[0].table;
  const int64_t sink_rows = table[2].sink_rows;

  // Boxes of keys and the part of each that no other slab touches.
  std::vector<SlabItem> slabs(problem.plans[0].slabs.size());
  for (size_t k = 0; k < slabs.size(); ++k) {
    SlabItem& item = slabs[k];
    item = SlabItem{};
    int64_t begin = INT64_MAX, end = 0;
    for (const WindowPlan& plan : problem.plans) {
      if (plan.slabs[k].begin < plan.slabs[k].end) {
        begin = std::min<int64_t>(begin, plan.slabs[k].begin);
        end = std::max<int64_t>(end, plan.slabs[k].end);
      }
    }
    item.cls[s] = problem.plans[0].slabs[k].cls;
    item.begin[s] = std::min(begin, end);
    item.size[s] = end - item.begin[s];
  }
  std::vector<ClassSlabs> classes(table[s].dilation);
  for (size_t k = 0; k < slabs.size(); ++k) {
    ClassSlabs& c = classes[slabs[k].cls[s]];
    if (c.count == 0) c.first = static_cast<int64_t>(k);
    ++c.count;
  }
  for (int64_t cls = 0; cls < table[s].dilation; ++cls) {
    ClassSlabs& c = classes[cls];
    int64_t done = 0;  // coordinates below have been given to a slab or to `shared`
    const auto share = [&](int64_t to) {
      if (done < to) c.shared.push_back({done, to});
      done = std::max(done, to);
    };
    int64_t reached = 0;
    for (int64_t k = c.first; k < c.first + c.count; ++k) {
      SlabItem& item = slabs[k];
      const int64_t begin = item.begin[s], end = begin + item.size[s];
      int64_t next = end;
      for (int64_t q = k + 1; q < c.first + c.count; ++q) {
        if (slabs[q].size[s] > 0) next = std::min(next, slabs[q].begin[s]);
      }
      item.own_begin = std::clamp(std::max(reached, s == 2 ? sink_rows : 0), begin, end);
      item.own_end = std::max(item.own_begin, std::min(next, end));
      reached = std::max(reached, end);
      if (item.own_begin < item.own_end) {
        share(item.own_begin);
        done = item.own_end;
      }
    }
    share(table[s].class_size(cls));
  }

  // Item = (batch, kv head, classes of the other axes, slab).
  int other[2], n_other = 0;
  for (int a = 0; a < 3; ++a) {
    if (a != s) other[n_other++] = a;
  }
  const int64_t d0 = table[other[0]].dilation, d1 = table[other[1]].dilation;
  const int64_t num_slabs = static_cast<int64_t>(slabs.size());
  const int64_t items_per_head = d0 * d1 * num_slabs;
  const int64_t items = p.batch * p.kv_heads * items_per_head;
  const auto place = [&](SlabItem* item, int64_t head_class) {  // (batch, kv head, classes)
    const int64_t c1 = head_class % d1, c0 = head_class / d1 % d0, bh = head_class / (d0 * d1);
    const int64_t cls[2] = {c0, c1};
    for (int k = 0; k < 2; ++k) {
      item->cls[other[k]] = cls[k];
      item->begin[other[k]] = 0;
      item->size[other[k]] = table[other[k]].class_size(cls[k]);
    }
    item->batch = bh / p.kv_heads;
    item->kv_head = bh % p.kv_heads;
  };
  std::vector<SlabItem> work(items);
  std::vector<int64_t> halo_at(items + 1, 0);
  const int64_t row_bytes = kernels.accumulator_row(p) * acc;
  int64_t most_rows = 0;
  for (int64_t i = 0; i < items; ++i) {
    SlabItem& item = work[i];
    item = slabs[i % num_slabs];
    place(&item, i / num_slabs);
    const int64_t tail = sink_rows + p.extra_keys;
    halo_at[i + 1] = halo_at[i] + (kernels.halo_rows(problem.views[0], item) + tail) * row_bytes;
    most_rows = std::max(most_rows, item.rows() + tail + 1);
  }
  const Memory halo = allocate(halo_at[items]);
  const int64_t table_size = p.bias ? p.bias_head_stride : 0;
  const int64_t table_bytes = (table_size + 1) * acc;
  const bool want_table = p.dbias || p.dsink_logits;
  const Memory partial_tables = allocate(want_table ? items * group_heads * table_bytes : 0);

  int64_t scratch = 0, bias_bytes = 0;
  for (const PlanView& v : problem.views) {
    scratch = std::max(scratch, kernels.backward_scratch(p, v));
    if (p.dbias) bias_bytes = std::max(bias_bytes, kernels.bias_size(v) * acc);
  }
  const auto halo_of = [&](int64_t i) -> void* { return halo.get() + halo_at[i]; };
  const auto table_of = [&](int64_t i, int64_t g) {
    return partial_tables.get() + (i * group_heads + g) * table_bytes;
  };
  // Heads and classes take turns slab by slab, for the sake of the pages that they share.
  const int64_t sharing = p.kv_heads * d0 * d1;
  const auto nth = [&](int64_t n) {
    const int64_t b = n / (sharing * num_slabs), slab = n / sharing % num_slabs;
    const int64_t cls = n % sharing / p.kv_heads, head = n % p.kv_heads;
    return ((b * p.kv_heads + head) * d0 * d1 + cls) * num_slabs + slab;
  };
  const KeyBoxes boxes(p, problem.views[0], kernels, true);
  parallel_for(items, 1, problem.serial, [&](int64_t begin, int64_t end) {
    void* memory = thread_buffer(0, scratch);
    void* rows = thread_buffer(1, most_rows * row_bytes);
    void* dbias = p.dbias ? thread_buffer(2, bias_bytes) : nullptr;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t i = nth(n);
      SlabItem item = work[i];
      const int64_t used = item.rows() + sink_rows + p.extra_keys + 1;
      std::fill_n(static_cast<char*>(rows), used * row_bytes, 0);
      const auto place_groups = [&](int64_t h) {
        const WindowPlan& plan = problem.plans[head_rule[h]];
        for (int a = 0; a < 3; ++a) {
          const std::vector<int32_t>& first = plan.axis[a].class_first_group;
          item.first_group[a] = a == s ? plan.slabs[i % num_slabs].first_group : first[item.cls[a]];
          item.last_group[a] =
              a == s ? plan.slabs[i % num_slabs].last_group : first[item.cls[a] + 1];
        }
      };
      const int64_t first_head = item.kv_head * group_heads;
      place_groups(first_head);
      const int64_t reads = group_heads * walk_lengths(problem.view_of(first_head), item);
      const NearKeys near = boxes.worth_bringing(item, 1, reads)
                                ? boxes.bring(item, item.batch, item.kv_head, 1,
                                              thread_buffer(3, boxes.bytes(item, 1)))
                                : boxes.as_they_are();
      for (int64_t h = first_head; h < first_head + group_heads; ++h) {
        place_groups(h);
        kernels.backward(near, problem.view_of(h), item, h, problem.bias_of(h), rows, dbias,
                         want_table ? table_of(i, h - first_head) : nullptr, memory);
      }
      kernels.finish_slab(p, problem.views[0], item, rows, halo_of(i));
    }
  });

  // Rows that several slabs, or none, have touched.
  struct Merge {
    int64_t cls, from, to;
  };
  std::vector<Merge> merges;
  constexpr int64_t kRowsPerMerge = 32;
  for (int64_t cls = 0; cls < table[s].dilation; ++cls) {
    for (const auto& range : classes[cls].shared) {
      for (int64_t y = range.first; y < range.second; y += kRowsPerMerge) {
        merges.push_back({cls, y, std::min(range.second, y + kRowsPerMerge)});
      }
    }
  }
  const int64_t head_classes = p.batch * p.kv_heads * d0 * d1;
  const int64_t num_merges = static_cast<int64_t>(merges.size());
  parallel_for(head_classes * num_merges, 1, problem.serial, [&](int64_t begin, int64_t end) {
    std::vector<const void*> halos;
    for (int64_t i = begin; i < end; ++i) {
      const Merge& m = merges[i % num_merges];
      const int64_t head_class = i / num_merges;
      const ClassSlabs& c = classes[m.cls];
      SlabItem whole{};
      place(&whole, head_class);
      whole.cls[s] = m.cls;
      whole.size[s] = table[s].class_size(m.cls);
      const int64_t first = head_class * num_slabs + c.first;
      halos.clear();
      for (int64_t k = 0; k < c.count; ++k) halos.push_back(halo_of(first + k));
      kernels.merge_slabs(p, problem.views[0], whole, work.data() + first, c.count, halos.data(),
                          m.from, m.to);
    }
  });
  if (p.extra_keys > 0) {
    parallel_for(p.batch * p.kv_heads, 1, problem.serial, [&](int64_t begin, int64_t end) {
      std::vector<const void*> halos(items_per_head);
      for (int64_t bh = begin; bh < end; ++bh) {
        SlabItem whole{};
        place(&whole, bh * d0 * d1);
        const int64_t first = bh * items_per_head;
        for (int64_t k = 0; k < items_per_head; ++k) halos[k] = halo_of(first + k);
        kernels.merge_extra(p, problem.views[0], whole, work.data() + first, items_per_head,
                            halos.data());
      }
    });
  }
  if (!want_table) return;
  const auto sum_tables = [&](auto zero) {
    using Acc = decltype(zero);
    parallel_for(p.heads, 1, problem.serial, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h) {
        const auto add = [&](int64_t from, int64_t to, Acc* out) {
          std::fill_n(out, to - from, Acc(0));
          for (int64_t b = 0; b < p.batch; ++b) {
            const int64_t i0 = (b * p.kv_heads + h / group_heads) * items_per_head;
            for (int64_t i = i0; i < i0 + items_per_head; ++i) {
              const Acc* part = reinterpret_cast<const Acc*>(table_of(i, h % group_heads));
              for (int64_t t = from; t < to; ++t) out[t - from] += part[t];
            }
          }
        };
        if (p.dbias) add(0, table_size, static_cast<Acc*>(p.dbias) + h * table_size);
        if (p.dsink_logits) add(table_size, table_size + 1, static_cast<Acc*>(p.dsink_logits) + h);
      }
    });
  };
  acc == 8 ? sum_tables(double(0)) : sum_tables(float(0));
}

}  // namespace cpu
}  // namespace attnext
