// SPDX-License-Identifier: Apache-2.0
// The function table of one ISA unit.
#pragma once

#include "window_backward.inl"
#include "window_forward.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

template <class T>
struct WindowEntry {
  using F = WindowForward<T, Boxes>;
  using B = WindowBackward<T>;
  using Acc = typename F::Acc;

  static int64_t forward_scratch(const WindowParams& p, const PlanView& v) {
    return F(p, v, nullptr).scratch_bytes();
  }
  static int64_t backward_scratch(const WindowParams& p, const PlanView& v) {
    return B(p, v, nullptr).scratch_bytes();
  }
  static void widen_row(const void* row, int64_t dim, void* wide) {
    cpu::ATTNEXT_ISA::widen_row(static_cast<const T*>(row), dim, static_cast<Acc*>(wide));
  }
  static void expand_bias(const WindowParams& p, const PlanView& v, int64_t h, void* out) {
    B::expand_bias(p, v, h, static_cast<Acc*>(out));
  }
  static void forward(const NearKeys& keys, const PlanView& v, int64_t b, int64_t h, int64_t count,
                      const int64_t tile[3], bool follows, const NextTile& next,
                      const void* const* bias, void* scratch) {
    F f(keys.params, v, scratch);
    f.ready = keys.ready, f.wide = keys.wide;
    f.forward_heads(b, h, count, tile, follows, next, bias);
  }
  static void forward_part(const WindowParams& p, const PlanView& v, int64_t b, int64_t h,
                           const int64_t tile[3], int64_t from, int64_t to, const void* bias,
                           void* scratch, void* partial) {
    F f(p, v, scratch);
    f.start_tile(tile);
    f.forward(b, h, from, to, static_cast<const Acc*>(bias), static_cast<Acc*>(partial));
  }
  static void merge_partials(const WindowParams& p, const PlanView& v, int64_t b, int64_t h,
                             const int64_t tile[3], int64_t count, void* partials, void* scratch) {
    F(p, v, scratch).merge_partials(b, h, tile, count, static_cast<const Acc*>(partials));
  }
  static void backward(const NearKeys& keys, const PlanView& v, const SlabItem& item, int64_t h,
                       const void* bias, void* rows, void* dbias, void* dtable, void* scratch) {
    B pass(keys.params, v, scratch);
    pass.ready = keys.ready, pass.wide = keys.wide;
    pass.backward(item, h, static_cast<const Acc*>(bias), static_cast<Acc*>(rows),
                  static_cast<Acc*>(dbias), static_cast<Acc*>(dtable));
  }
  static void finish_slab(const WindowParams& p, const PlanView& v, const SlabItem& item,
                          const void* rows, void* halo) {
    B::finish_slab(p, v, item, static_cast<const Acc*>(rows), static_cast<Acc*>(halo));
  }

  static constexpr WindowKernels table() {
    WindowKernels all = {
        F::kLanes,    ATTNEXT_TILE_VECTORS, forward_scratch, backward_scratch, B::row_size,
        B::bias_size, expand_bias,          nullptr,         nullptr,          nullptr,
        forward,      forward_part,         F::partial_size, merge_partials,   backward,
        finish_slab,  B::merge_slabs,       B::merge_extra,  B::halo_rows};
    if constexpr (F::kTiles) {
      all.ready_bytes = KeyRows<T>::ready_bytes;
      all.make_ready = KeyRows<T>::make_ready;
    }
    if constexpr (!F::kInPlace && !F::kPairs) all.widen_row = widen_row;
    return all;
  }
};

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
