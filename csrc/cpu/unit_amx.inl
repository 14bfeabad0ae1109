// SPDX-License-Identifier: Apache-2.0
// The tables of a unit whose products of bf16 are those of tiles. All else is what `others` has.
#pragma once

#include "linear_unit.inl"
#include "peak.inl"
#include "routed.inl"
#include "unit.h"
#include "window_unit.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

inline IsaUnit unit_with_tiles(const IsaUnit& others) {
  constexpr int kBf16 = static_cast<int>(DType::kBFloat16);
  IsaUnit unit = others;
  unit.window[kBf16] = WindowEntry<bf16>::table();
  unit.linear[kBf16] = LinearEntry<bf16>::table();
  unit.routed[kBf16] = RoutedEntry<bf16>::table();
  unit.peak_loop[kBf16] = peak_of_tiles;
  return unit;
}

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
