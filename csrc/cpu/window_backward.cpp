// SPDX-License-Identifier: Apache-2.0
// Backward pass of window attention: slabs of keys, each with private accumulators, and how rows
// that several slabs touch are merged.
#include <utility>

#include "window_problem.h"

namespace attnext {
namespace cpu {
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

// Item = (batch, kv head, classes of the axes that are not cut, slab).
class WindowBackwardPass {
 public:
  WindowBackwardPass(const WindowParams& params, const Geometry& geometry, const int32_t* head_rule)
      : p_(params),
        problem_(params, geometry, head_rule, true),
        kernels_(problem_.kernels),
        plan_(problem_.views[0]),
        table_(problem_.plans[0].table),
        acc_(acc_size(params.dtype)),
        group_heads_(params.heads / params.kv_heads),
        sink_rows_(table_[2].sink_rows),
        row_bytes_(kernels_.accumulator_row(params) * acc_),
        s_(problem_.shared->options.slab_axis),
        want_table_(params.dbias || params.dsink_logits) {
    find_slabs();
    share_keys();
    make_items();
  }

  void run() {
    halo_ = allocate(halo_at_.back());
    if (want_table_) tables_ = allocate(num_items() * group_heads_ * table_bytes());
    take_slabs();
    merge_shared();
    if (p_.extra_keys > 0) merge_extra();
    if (want_table_) acc_ == 8 ? sum_tables<double>() : sum_tables<float>();
  }

 private:
  int64_t num_slabs() const { return static_cast<int64_t>(slabs_.size()); }
  int64_t num_items() const { return static_cast<int64_t>(items_.size()); }
  int64_t items_per_head() const { return d0_ * d1_ * num_slabs(); }
  int64_t table_size() const { return p_.bias ? p_.bias_head_stride : 0; }
  int64_t table_bytes() const { return (table_size() + 1) * acc_; }
  void* halo_of(int64_t i) const { return halo_.get() + halo_at_[i]; }
  void* table_of(int64_t i, int64_t g) const {
    return tables_.get() + (i * group_heads_ + g) * table_bytes();
  }

  // Boxes of keys, over all rules.
  void find_slabs() {
    slabs_.assign(problem_.plans[0].slabs.size(), SlabItem{});
    classes_.resize(table_[s_].dilation);
    for (int64_t k = 0; k < num_slabs(); ++k) {
      SlabItem& item = slabs_[k];
      int64_t begin = INT64_MAX, end = 0;
      for (const WindowPlan& plan : problem_.plans) {
        if (plan.slabs[k].begin < plan.slabs[k].end) {
          begin = std::min<int64_t>(begin, plan.slabs[k].begin);
          end = std::max<int64_t>(end, plan.slabs[k].end);
        }
      }
      item.cls[s_] = problem_.plans[0].slabs[k].cls;
      item.begin[s_] = std::min(begin, end);
      item.size[s_] = end - item.begin[s_];
      ClassSlabs& c = classes_[item.cls[s_]];
      if (c.count++ == 0) c.first = k;
    }
  }
  // The part of each slab that no other touches, and what is left.
  void share_keys() {
    for (int64_t cls = 0; cls < table_[s_].dilation; ++cls) {
      ClassSlabs& c = classes_[cls];
      int64_t done = 0;  // coordinates below have been given to a slab or to `shared`
      const auto share = [&](int64_t to) {
        if (done < to) c.shared.push_back({done, to});
        done = std::max(done, to);
      };
      int64_t reached = 0;
      for (int64_t k = c.first; k < c.first + c.count; ++k) {
        SlabItem& item = slabs_[k];
        const int64_t begin = item.begin[s_], end = begin + item.size[s_];
        int64_t next = end;
        for (int64_t q = k + 1; q < c.first + c.count; ++q) {
          if (slabs_[q].size[s_] > 0) next = std::min(next, slabs_[q].begin[s_]);
        }
        item.own_begin = std::clamp(std::max(reached, s_ == 2 ? sink_rows_ : 0), begin, end);
        item.own_end = std::max(item.own_begin, std::min(next, end));
        reached = std::max(reached, end);
        if (item.own_begin < item.own_end) {
          share(item.own_begin);
          done = item.own_end;
        }
      }
      share(table_[s_].class_size(cls));
    }
  }
  void make_items() {
    int n = 0;
    for (int a = 0; a < 3; ++a) {
      if (a != s_) other_[n++] = a;
    }
    d0_ = table_[other_[0]].dilation, d1_ = table_[other_[1]].dilation;
    items_.resize(p_.batch * p_.kv_heads * items_per_head());
    halo_at_.assign(1, 0);
    const int64_t tail = sink_rows_ + p_.extra_keys;
    for (int64_t i = 0; i < num_items(); ++i) {
      SlabItem& item = items_[i];
      item = slabs_[i % num_slabs()];
      place(&item, i / num_slabs());
      halo_at_.push_back(halo_at_.back() + (kernels_.halo_rows(plan_, item) + tail) * row_bytes_);
      most_rows_ = std::max(most_rows_, item.rows() + tail + 1);
    }
  }
  void place(SlabItem* item, int64_t head_class) const {  // (batch, kv head, classes)
    const int64_t c1 = head_class % d1_, c0 = head_class / d1_ % d0_, bh = head_class / (d0_ * d1_);
    const int64_t cls[2] = {c0, c1};
    for (int k = 0; k < 2; ++k) {
      item->cls[other_[k]] = cls[k];
      item->begin[other_[k]] = 0;
      item->size[other_[k]] = table_[other_[k]].class_size(cls[k]);
    }
    item->batch = bh / p_.kv_heads;
    item->kv_head = bh % p_.kv_heads;
  }

  // Heads and classes take turns slab by slab, for the sake of the pages that they share.
  int64_t nth(int64_t n) const {
    const int64_t sharing = p_.kv_heads * d0_ * d1_;
    const int64_t b = n / (sharing * num_slabs()), slab = n / sharing % num_slabs();
    const int64_t cls = n % sharing / p_.kv_heads, head = n % p_.kv_heads;
    return ((b * p_.kv_heads + head) * d0_ * d1_ + cls) * num_slabs() + slab;
  }
  void place_groups(SlabItem* item, int64_t slab, int64_t head) const {
    const WindowPlan& plan = problem_.plans[problem_.head_rule[head]];
    for (int a = 0; a < 3; ++a) {
      const std::vector<int32_t>& first = plan.axis[a].class_first_group;
      item->first_group[a] = a == s_ ? plan.slabs[slab].first_group : first[item->cls[a]];
      item->last_group[a] = a == s_ ? plan.slabs[slab].last_group : first[item->cls[a] + 1];
    }
  }
  void take_slabs() const {
    int64_t scratch = 0, bias_bytes = 0;
    for (const PlanView& v : problem_.views) {
      scratch = std::max(scratch, kernels_.backward_scratch(p_, v));
      if (p_.dbias) bias_bytes = std::max(bias_bytes, kernels_.bias_size(v) * acc_);
    }
    const KeyBoxes boxes(p_, plan_, kernels_, true);
    parallel_for(num_items(), 1, problem_.serial, [&](int64_t begin, int64_t end) {
      void* memory = thread_buffer(0, scratch);
      void* rows = thread_buffer(1, most_rows_ * row_bytes_);
      void* dbias = p_.dbias ? thread_buffer(2, bias_bytes) : nullptr;
      for (int64_t n = begin; n < end; ++n) {
        const int64_t i = nth(n), slab = i % num_slabs();
        SlabItem item = items_[i];
        const int64_t used = item.rows() + sink_rows_ + p_.extra_keys + 1;
        std::fill_n(static_cast<char*>(rows), used * row_bytes_, 0);
        const int64_t first_head = item.kv_head * group_heads_;
        place_groups(&item, slab, first_head);
        const int64_t reads = group_heads_ * walk_lengths(problem_.view_of(first_head), item);
        const NearKeys near = boxes.worth_bringing(item, 1, reads)
                                  ? boxes.bring(item, item.batch, item.kv_head, 1,
                                                thread_buffer(3, boxes.bytes(item, 1)))
                                  : boxes.as_they_are();
        for (int64_t h = first_head; h < first_head + group_heads_; ++h) {
          place_groups(&item, slab, h);
          kernels_.backward(near, problem_.view_of(h), item, h, problem_.bias_of(h), rows, dbias,
                            want_table_ ? table_of(i, h - first_head) : nullptr, memory);
        }
        kernels_.finish_slab(p_, plan_, item, rows, halo_of(i));
      }
    });
  }

  // Rows that several slabs, or none, have touched.
  void merge_shared() const {
    struct Merge {
      int64_t cls, from, to;
    };
    std::vector<Merge> merges;
    constexpr int64_t kRowsPerMerge = 32;
    for (int64_t cls = 0; cls < table_[s_].dilation; ++cls) {
      for (const auto& range : classes_[cls].shared) {
        for (int64_t y = range.first; y < range.second; y += kRowsPerMerge) {
          merges.push_back({cls, y, std::min(range.second, y + kRowsPerMerge)});
        }
      }
    }
    const int64_t head_classes = p_.batch * p_.kv_heads * d0_ * d1_;
    const int64_t num_merges = static_cast<int64_t>(merges.size());
    parallel_for(head_classes * num_merges, 1, problem_.serial, [&](int64_t begin, int64_t end) {
      std::vector<const void*> halos;
      for (int64_t i = begin; i < end; ++i) {
        const Merge& m = merges[i % num_merges];
        const int64_t head_class = i / num_merges;
        const ClassSlabs& c = classes_[m.cls];
        SlabItem whole{};
        place(&whole, head_class);
        whole.cls[s_] = m.cls;
        whole.size[s_] = table_[s_].class_size(m.cls);
        const int64_t first = head_class * num_slabs() + c.first;
        halos.clear();
        for (int64_t k = 0; k < c.count; ++k) halos.push_back(halo_of(first + k));
        kernels_.merge_slabs(p_, plan_, whole, items_.data() + first, c.count, halos.data(), m.from,
                             m.to);
      }
    });
  }
  void merge_extra() const {
    parallel_for(p_.batch * p_.kv_heads, 1, problem_.serial, [&](int64_t begin, int64_t end) {
      std::vector<const void*> halos(items_per_head());
      for (int64_t bh = begin; bh < end; ++bh) {
        SlabItem whole{};
        place(&whole, bh * d0_ * d1_);
        const int64_t first = bh * items_per_head();
        for (int64_t k = 0; k < items_per_head(); ++k) halos[k] = halo_of(first + k);
        kernels_.merge_extra(p_, plan_, whole, items_.data() + first, items_per_head(),
                             halos.data());
      }
    });
  }
  template <class Acc>
  void sum_tables() const {
    parallel_for(p_.heads, 1, problem_.serial, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h) {
        const auto add = [&](int64_t from, int64_t to, Acc* out) {
          std::fill_n(out, to - from, Acc(0));
          for (int64_t b = 0; b < p_.batch; ++b) {
            const int64_t i0 = (b * p_.kv_heads + h / group_heads_) * items_per_head();
            for (int64_t i = i0; i < i0 + items_per_head(); ++i) {
              const Acc* part = static_cast<const Acc*>(table_of(i, h % group_heads_));
              for (int64_t t = from; t < to; ++t) out[t - from] += part[t];
            }
          }
        };
        const int64_t size = table_size();
        if (p_.dbias) add(0, size, static_cast<Acc*>(p_.dbias) + h * size);
        if (p_.dsink_logits) add(size, size + 1, static_cast<Acc*>(p_.dsink_logits) + h);
      }
    });
  }

  const WindowParams& p_;
  const WindowProblem problem_;
  const WindowKernels& kernels_;
  const PlanView& plan_;    // of the first rule, and what is alike in all
  const AxisTable* table_;  // the same
  int64_t acc_, group_heads_, sink_rows_, row_bytes_;
  int s_;  // the axis that is cut
  bool want_table_;
  int other_[2];  // axes, and their dilations
  int64_t d0_, d1_;
  std::vector<SlabItem> slabs_, items_;
  std::vector<ClassSlabs> classes_;
  std::vector<int64_t> halo_at_;
  int64_t most_rows_ = 0;
  Memory halo_, tables_;
};

}  // namespace

void window_backward(const WindowParams& p, const Geometry& geometry, const int32_t* head_rule) {
  WindowBackwardPass(p, geometry, head_rule).run();
}

}  // namespace cpu
}  // namespace attnext
