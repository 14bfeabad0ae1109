// SPDX-License-Identifier: Apache-2.0
// Forward pass of window attention: in which order tiles are taken, what keys are brought together
// for them, and when the keys of one are split.
#include <cstdlib>
#include <tuple>

#include "window_problem.h"

namespace attnext {
namespace cpu {
namespace {

constexpr int64_t kManyItems = 32;  // enough to keep threads busy

// One tile of `heads` heads, the first of which is h.
struct Item {
  int64_t b, h, heads, tile[3];
};

// Items in their order: (batch, turn, heads, tile). A head's tiles are neighbours, so that its keys
// stay in the caches. Where the heads of a token lie side by side they take turns, so that its
// pages do too: each would come from memory once per head. Heads whose walks are short take a tile
// together.
class Items {
 public:
  Items(const WindowProblem& problem, bool heads_in_lanes)
      : problem_(problem), p_(problem.params), heads_in_lanes_(heads_in_lanes) {
    constexpr int64_t kTurnBytes = 2 << 20;  // of keys and values, all heads
    // On one axis twice as much: each turn brings the keys of a window before it, too.
    const AxisView* axis = problem.views[0].axis;
    one_axis_ = axis[0].num_keys == 1 && axis[1].num_keys == 1;
    const int64_t turn_bytes = one_axis_ ? 2 * kTurnBytes : kTurnBytes;
    const WindowKernels& kernels = problem.kernels;
    int64_t most_tiles = 1;
    for (const PlanView& v : problem.views) most_tiles = std::max(most_tiles, num_tiles(v));
    const int64_t tile_bytes = int64_t(kernels.lanes) * kernels.vectors * p_.kv_heads *
                               (p_.head_dim + p_.head_dim_v) * size_of(p_.dtype);
    const bool side_by_side = std::abs(p_.key.head) < std::abs(p_.key.token[2]);
    if (side_by_side) turns_ += (most_tiles - 1) / std::max<int64_t>(1, turn_bytes / tile_bytes);
    together_ =
        heads_in_lanes ? p_.heads / p_.kv_heads : heads_together(kManyItems * max_threads());
    runs_ = (p_.heads - 1) / together_ + 1;
    for (int64_t turn = 0; turn < turns_; ++turn) {
      for (int64_t h = 0; h < p_.heads; h += together_) {
        first_.push_back(first_.back() + first_tile(turn + 1, h) - first_tile(turn, h));
      }
    }
  }

  // How many a thread takes at once, at most: about what a head has of a turn.
  int64_t most_at_once() const { return one_axis_ ? 32 : 16; }
  int64_t of_batch() const { return first_.back(); }
  int64_t count() const { return p_.batch * of_batch(); }
  const PlanView& plan_of(const Item& item) const { return problem_.view_of(item.h); }

  Item at(int64_t i) const {
    Item item;
    item.b = i / of_batch();
    i %= of_batch();
    const int64_t k = std::upper_bound(first_.begin(), first_.end(), i) - first_.begin() - 1;
    item.h = k % runs_ * together_;
    item.heads = heads_in_lanes_ ? 1 : std::min(together_, p_.heads - item.h);
    int64_t t = first_tile(k / runs_, item.h) + i - first_[k];
    const PlanView& v = plan_of(item);
    item.tile[2] = t % v.axis[2].num_groups;
    t /= v.axis[2].num_groups;
    item.tile[1] = t % v.axis[1].num_groups;
    item.tile[0] = t / v.axis[1].num_groups;
    return item;
  }
  // Whether they are neighbours on the last axis, of the same heads and dilation class.
  bool follows(const Item& last, const Item& item) const {
    const Group* groups = plan_of(last).axis[2].groups;
    return item.b == last.b && item.h == last.h && item.tile[0] == last.tile[0] &&
           item.tile[1] == last.tile[1] && item.tile[2] == last.tile[2] + 1 &&
           groups[item.tile[2]].cls == groups[last.tile[2]].cls;
  }
  bool has_sinks(const Item& item) const {
    const Group& g = plan_of(item).axis[2].groups[item.tile[2]];
    return g.sink_begin < g.sink_end;
  }
  // Keys on a tile's walk.
  int64_t walk_length(const Item& item) const {
    int64_t box = 1;
    for (int a = 0; a < 3; ++a) {
      const Group& g = plan_of(item).axis[a].groups[item.tile[a]];
      box *= g.end - g.begin;
    }
    const Group& last = plan_of(item).axis[2].groups[item.tile[2]];
    return p_.extra_keys + (last.sink_end - last.sink_begin) + box;
  }

 private:
  // How many heads take a tile together, so that its walk is worked out once: those whose keys stay
  // in the second cache until the next tile wants them, and fewer where that left too few items.
  int64_t heads_together(int64_t least_items) const {
    if (problem_.plans.size() > 1) return 1;
    const PlanView& v = problem_.views[0];
    int64_t keys = 1;
    for (const AxisView& axis : v.axis) keys *= std::max(axis.most_keys, 1);
    const int64_t row = (p_.head_dim + p_.head_dim_v) * size_of(p_.dtype);
    const int64_t fit = second_cache_bytes() / 2 * (p_.heads / p_.kv_heads) / (keys * row);
    const int64_t most = num_tiles(v) * p_.batch * p_.heads / least_items;
    const int64_t together = std::clamp<int64_t>(std::min(fit, most), 1, p_.heads);
    const int64_t runs = (p_.heads - 1) / together + 1;
    return (p_.heads - 1) / runs + 1;
  }
  int64_t first_tile(int64_t turn, int64_t h) const {
    return num_tiles(problem_.view_of(h)) * turn / turns_;
  }

  const WindowProblem& problem_;
  const WindowParams& p_;
  bool heads_in_lanes_, one_axis_;
  int64_t turns_ = 1, together_, runs_;
  std::vector<int64_t> first_ = {0};  // item of a batch item, per turn and run of heads
};

class WindowForwardPass {
 public:
  WindowForwardPass(const WindowParams& params, const Geometry& geometry, const int32_t* head_rule)
      : p_(params),
        problem_(params, geometry, head_rule, false),
        kernels_(problem_.kernels),
        items_(problem_, put_heads_in_lanes()) {
    for (const PlanView& v : problem_.views) {
      scratch_ = std::max(scratch_, kernels_.forward_scratch(p_, v));
    }
  }

  void run() const {
    const int64_t splits = most_splits();
    splits == 1 ? take_tiles() : take_parts(splits);
  }

 private:
  // Lets a single tile hold the queries of all heads that share a key head, if it has lanes for
  // them: each key is then read once, and not once per head.
  bool put_heads_in_lanes() {
    std::vector<PlanView>& views = problem_.views;
    const int64_t count = p_.heads / p_.kv_heads;
    const int64_t queries = p_.query_extent[0] * p_.query_extent[1] * p_.query_extent[2];
    if (count == 1 || views.size() > 1 || p_.bias || num_tiles(views[0]) != 1) return false;
    if (queries * count > kernels_.lanes * kernels_.vectors) return false;
    views[0].heads_in_lanes = static_cast<int32_t>(count);
    return true;
  }

  // With few tiles (decoding) the keys are split as well, and the partial results merged.
  int64_t most_splits() const {
    if (items_.count() == 0 || items_.of_batch() >= kManyItems) return 1;
    int64_t longest = 0;
    for (int64_t i = 0; i < items_.of_batch(); ++i) {
      longest = std::max(longest, items_.walk_length(items_.at(i)));
    }
    return parts_of_walk(longest, kManyItems / items_.of_batch());
  }

  void take_tiles() const {
    const KeyBoxes boxes(p_, problem_.views[0], kernels_, false);
    const int64_t grain =
        std::clamp<int64_t>(items_.count() / (8 * max_threads()), 1, items_.most_at_once());
    const void* const* bias = p_.bias ? problem_.bias.data() : nullptr;
    parallel_for(items_.count(), grain, problem_.serial, [&](int64_t begin, int64_t end) {
      void* memory = thread_buffer(0, scratch_);
      Item item = items_.at(begin), next = item;
      bool follows = false;
      NearKeys near = boxes.as_they_are();
      for (int64_t i = begin, shared_to = begin; i < end; ++i, item = next) {
        if (i == shared_to) near = bring_keys(boxes, i, end, &shared_to);
        NextTile coming{};
        if (i + 1 < end) {
          next = items_.at(i + 1);
          coming = {&items_.plan_of(next), next.b, next.h, {}};
          std::copy(next.tile, next.tile + 3, coming.index);
        }
        kernels_.forward(near, items_.plan_of(item), item.b, item.h, item.heads, item.tile, follows,
                         coming, bias, memory);
        follows = items_.follows(item, next);
      }
    });
  }
  // Keys for the tiles from `i` on, which may have been brought together; `shared_to`: where those
  // end that they are for.
  NearKeys bring_keys(const KeyBoxes& boxes, int64_t i, int64_t end, int64_t* shared_to) const {
    *shared_to = end;
    if (!boxes.useful()) return boxes.as_they_are();
    const Item item = items_.at(i);
    const int64_t group = p_.heads / p_.kv_heads;
    const int64_t first_head = item.h / group;
    const int64_t heads = (item.h + item.heads - 1) / group - first_head + 1;
    KeyBox box{};
    int64_t reads = 0, k = i;
    for (; k < end; ++k) {
      const Item other = items_.at(k);
      if (other.b != item.b || other.h != item.h) break;
      if (item.heads > 1 && items_.has_sinks(other)) break;  // heads step alike from key to key
      const KeyBox own = key_box(items_.plan_of(other), other.tile);
      KeyBox both = k == i ? own : box;
      if (!join(own, &both) || !boxes.fit(both, heads)) break;
      box = both;
      reads += own.rows() * item.heads;
    }
    *shared_to = std::max(k, i + 1);
    if (!boxes.worth_bringing(box, heads, reads)) return boxes.as_they_are();
    return boxes.bring(box, item.b, first_head, heads, thread_buffer(3, boxes.bytes(box, heads)));
  }

  void take_parts(int64_t most) const {
    const int64_t partial_size = kernels_.partial_size(p_, problem_.views[0]);
    for (const PlanView& v : problem_.views) {  // kernels step by the plan's own
      if (kernels_.partial_size(p_, v) != partial_size) throw std::bad_alloc();
    }
    const int64_t partial_bytes = partial_size * acc_size(p_.dtype);
    const Memory partials = allocate(items_.count() * most * partial_bytes);
    const auto partial = [&](int64_t i, int64_t k) {
      return partials.get() + (i * most + k) * partial_bytes;
    };
    const std::vector<int64_t> order = order_of_parts(most);
    parallel_for(items_.count() * most, 1, problem_.serial, [&](int64_t begin, int64_t end) {
      void* memory = thread_buffer(0, scratch_);
      for (int64_t n = begin; n < end; ++n) {
        const int64_t i = order[n] / most, k = order[n] % most;
        const Item item = items_.at(i);
        const int64_t keys = items_.walk_length(item), count = parts_of_walk(keys, most);
        if (k >= count) continue;
        kernels_.forward_part(p_, items_.plan_of(item), item.b, item.h, item.tile, keys * k / count,
                              keys * (k + 1) / count, problem_.bias_of(item.h), memory,
                              partial(i, k));
      }
    });
    parallel_for(items_.count(), 1, problem_.serial, [&](int64_t begin, int64_t end) {
      void* memory = thread_buffer(0, scratch_);
      for (int64_t i = begin; i < end; ++i) {
        const Item item = items_.at(i);
        const int64_t count = parts_of_walk(items_.walk_length(item), most);
        kernels_.merge_partials(p_, items_.plan_of(item), item.b, item.h, item.tile, count,
                                partial(i, 0), memory);
      }
    });
  }
  // Heads that share keys read the same part of them one after the other.
  std::vector<int64_t> order_of_parts(int64_t most) const {
    std::vector<int64_t> order(items_.count() * most);
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
    const int64_t group = p_.heads / p_.kv_heads;
    const auto place = [&](int64_t i) {
      const Item item = items_.at(i / most);
      return std::make_tuple(item.b, item.h / group, i % most);
    };
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t x, int64_t y) { return place(x) < place(y); });
    return order;
  }

  const WindowParams& p_;
  WindowProblem problem_;
  const WindowKernels& kernels_;
  Items items_;
  int64_t scratch_ = 0;
};

}  // namespace

void window_forward(const WindowParams& p, const Geometry& geometry, const int32_t* head_rule) {
  WindowForwardPass(p, geometry, head_rule).run();
}

}  // namespace cpu
}  // namespace attnext
