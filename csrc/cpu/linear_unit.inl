// SPDX-License-Identifier: Apache-2.0
// The function table of one ISA unit, for linear attention.
#pragma once

#include "linear_backward.inl"
#include "linear_step.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

template <class T>
struct LinearEntry {
  using Head = LinearHead<T>;
  using Acc = typename Head::Acc;
  using Elem = typename ElemOf<T>::type;

  // f(pass): Pass<T, elements of its products>, made of the rest. The delta rule has products of
  // what it solved for, by numbers.
  template <template <class, class> class Pass, class F>
  static ATTNEXT_INLINE auto with(const LinearParams& p, const LinearItem& item, void* scratch,
                                  F f) {
    if constexpr (!Same<Elem, Acc>::value) {
      if (!p.delta()) return f(Pass<T, Elem>(p, item, scratch));
    }
    return f(Pass<T, Acc>(p, item, scratch));
  }

  static LinearItem of_size(int64_t columns, int64_t chunk) {
    return {0, 0, 0, 0, 0, columns, chunk};
  }

  static int64_t forward_scratch(const LinearParams& p, int64_t columns, int64_t chunk) {
    return with<LinearForward>(p, of_size(columns, chunk), nullptr,
                               [](auto pass) { return pass.scratch_bytes(); });
  }
  static int64_t backward_scratch(const LinearParams& p, int64_t columns, int64_t chunk) {
    return with<LinearBackward>(p, of_size(columns, chunk), nullptr,
                                [](auto pass) { return pass.scratch_bytes(); });
  }
  static void load_state(const LinearParams& p, const LinearItem& item, const void* source,
                         void* state) {
    Head(p, item).load_state(static_cast<const Acc*>(source), static_cast<Acc*>(state));
  }
  static void store_state(const LinearParams& p, const LinearItem& item, const void* state,
                          void* target) {
    Head(p, item).store_state(static_cast<const Acc*>(state), static_cast<Acc*>(target));
  }
  static void advance(const LinearParams& p, int64_t columns, void* carry, const void* local) {
    const LinearItem item = of_size(columns, 1);
    Head(p, item).advance(static_cast<Acc*>(carry), static_cast<const Acc*>(local));
  }
  // Of states that gradients read nothing has been rounded: a query's may be a small difference.
  static void sum_keys(const LinearParams& p, const LinearItem& item, void* local, bool fresh,
                       bool for_gradients, void* scratch) {
    const auto sum = [&](auto pass) { pass.sum_keys(static_cast<Acc*>(local), fresh); };
    if (for_gradients) return sum(LinearForward<T, Acc>(p, item, scratch));
    with<LinearForward>(p, item, scratch, sum);
  }
  static void sum_queries(const LinearParams& p, const LinearItem& item, void* local, bool fresh,
                          void* scratch) {
    const auto sum = [&](auto pass) { pass.sum_queries(static_cast<Acc*>(local), fresh); };
    // Causal ones are added up in the pass over the gradients, too, and in the same way.
    if (!p.causal) return sum(LinearBackward<T, Acc>(p, item, scratch));
    with<LinearBackward>(p, item, scratch, sum);
  }
  static void forward(const LinearParams& p, LinearWalk* walks, int64_t count, bool keep,
                      void* scratch) {
    with<LinearForward>(p, walks->item, scratch,
                        [&](auto pass) { pass.forward(walks, count, keep); });
  }
  static void backward(const LinearParams& p, const LinearItem& item, const void* carry,
                       const void* dcarry, void* dlocal, bool fresh, void* scratch) {
    with<LinearBackward>(p, item, scratch, [&](auto pass) {
      pass.backward(static_cast<const Acc*>(carry), static_cast<const Acc*>(dcarry),
                    static_cast<Acc*>(dlocal), fresh);
    });
  }
  static int64_t step_scratch(const LinearStepParams& p) {
    return LinearStep<T>(p, nullptr).scratch_bytes();
  }
  static void step(const LinearStepParams& p, int64_t batch, int64_t head, void* scratch) {
    LinearStep<T>(p, scratch).run(batch, head);
  }

  static constexpr LinearKernels table() {
    return {Head::chunk_of,  Head::segment_of, Head::size_of_state,
            forward_scratch, backward_scratch, Head::kLanes,
            load_state,      store_state,      advance,
            sum_keys,        sum_queries,      forward,
            backward,        step_scratch,     step};
  }
};

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
