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

  static LinearItem of_size(int64_t columns, int64_t chunk, bool for_gradients) {
    return {0, 0, 0, 0, 0, columns, chunk, for_gradients};
  }
  // f(pass), whose products are those of tiles where they may be.
  template <class F>
  static ATTNEXT_INLINE auto with_forward(const LinearParams& p, const LinearItem& item,
                                          void* scratch, F f) {
    if constexpr (kMayBeInTiles<T>) {
      if (Head::in_tiles(p, item.for_gradients, item.chunk)) {
        return f(LinearForward<T, true>(p, item, scratch));
      }
    }
    return f(LinearForward<T>(p, item, scratch));
  }

  static int64_t forward_scratch(const LinearParams& p, int64_t columns, int64_t chunk) {
    return with_forward(p, of_size(columns, chunk, false), nullptr,
                        [](auto pass) { return pass.scratch_bytes(); });
  }
  static int64_t backward_scratch(const LinearParams& p, int64_t columns, int64_t chunk) {
    return LinearBackward<T>(p, of_size(columns, chunk, true), nullptr).scratch_bytes();
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
    const LinearItem item = of_size(columns, 1, false);
    Head(p, item).advance(static_cast<Acc*>(carry), static_cast<const Acc*>(local));
  }
  static void sum_keys(const LinearParams& p, const LinearItem& item, void* local, bool fresh,
                       void* scratch) {
    with_forward(p, item, scratch,
                 [&](auto pass) { pass.sum_keys(static_cast<Acc*>(local), fresh); });
  }
  static void sum_queries(const LinearParams& p, const LinearItem& item, void* local, bool fresh,
                          void* scratch) {
    LinearBackward<T>(p, item, scratch).sum_queries(static_cast<Acc*>(local), fresh);
  }
  static void forward(const LinearParams& p, LinearWalk* walks, int64_t count, bool keep,
                      void* scratch) {
    with_forward(p, walks->item, scratch, [&](auto pass) { pass.forward(walks, count, keep); });
  }
  static void backward(const LinearParams& p, const LinearItem& item, const void* carry,
                       const void* dcarry, void* dlocal, bool fresh, void* scratch) {
    LinearBackward<T>(p, item, scratch)
        .backward(static_cast<const Acc*>(carry), static_cast<const Acc*>(dcarry),
                  static_cast<Acc*>(dlocal), fresh);
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
