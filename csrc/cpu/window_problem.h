// SPDX-License-Identifier: Apache-2.0
// What both passes of window attention begin with: the plans of all rules and what heads share.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "isa.h"
#include "memory.h"
#include "parallel.h"
#include "window.h"

namespace attnext {
namespace cpu {

inline int64_t num_tiles(const PlanView& v) {
  return v.axis[0].num_groups * v.axis[1].num_groups * v.axis[2].num_groups;
}

// The plans of all rules and what the heads share.
struct WindowProblem {
  const WindowParams& params;
  const WindowKernels& kernels;
  const int32_t* head_rule;
  std::shared_ptr<const Geometry::Plans> shared;
  const std::vector<WindowPlan>& plans;
  std::vector<PlanView> views;
  Memory bias_memory;
  std::vector<void*> bias;  // per head, expanded
  bool serial;

  WindowProblem(const WindowParams& p, const Geometry& geometry, const int32_t* rule_of_head,
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

  const PlanView& view_of(int64_t head) const { return views[head_rule[head]]; }
  const void* bias_of(int64_t head) const { return params.bias ? bias[head] : nullptr; }

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

}  // namespace cpu
}  // namespace attnext
