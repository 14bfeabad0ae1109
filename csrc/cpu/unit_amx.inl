// SPDX-License-Identifier: Apache-2.0
// A unit whose products of bf16 are those of tiles, by AMX or, in tests, by loops. All else is what
// `others` has. ATTNEXT_ISA is its namespace.
#pragma once

#define ATTNEXT_VECTOR_BYTES 64
#define ATTNEXT_TILE_ROWS 8  // rows of 2 vectors of accumulators
#define ATTNEXT_TILE_VECTORS 4
#define ATTNEXT_BF16_DOT 1
#define ATTNEXT_MATRIX_TILES 1

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
  constexpr int kFp16 = static_cast<int>(DType::kFloat16);
  IsaUnit unit = others;
  unit.window[kFp16] = WindowEntry<fp16>::table();
  unit.window[kBf16] = WindowEntry<bf16>::table();
  unit.linear[kBf16] = LinearEntry<bf16>::table();
  unit.routed[kFp16] = RoutedEntry<fp16>::table();
  unit.routed[kBf16] = RoutedEntry<bf16>::table();
  unit.peak_loop[kBf16] = peak_of_tiles;
  return unit;
}

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
