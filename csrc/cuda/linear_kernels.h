// SPDX-License-Identifier: Apache-2.0
// The list of linear attention's kernels: name, element type, bucket of the state's rows, warps,
// and whether everything is compiled in: decays and other numbers of tokens, further entries of b,
// features' slopes; and the number of entries of which all products of two are features, with them
// and 1, or 0. A block has 16 tokens of a chunk and 16 columns of the state for each of its warps.
#pragma once

#include "../dtype.h"

namespace attnext {
namespace cuda {

// clang-format off
#define ATTNEXT_SCAN_KERNELS_16(X, T, type) \
  X(linear_scan_##type##_32, T, 32, 4, false, 0) \
  X(linear_scan_##type##_32_gated, T, 32, 4, true, 0) \
  X(linear_scan_##type##_64, T, 64, 4, false, 0) \
  X(linear_scan_##type##_64_gated, T, 64, 4, true, 0) \
  X(linear_scan_##type##_128, T, 128, 4, false, 0) \
  X(linear_scan_##type##_128_gated, T, 128, 4, true, 0) \
  X(linear_scan_##type##_taylor, T, 160, 4, true, 16)
#define ATTNEXT_SCAN_KERNELS_32(X, T, type) \
  X(linear_scan_##type##_32, T, 32, 2, false, 0) \
  X(linear_scan_##type##_32_gated, T, 32, 2, true, 0) \
  X(linear_scan_##type##_64, T, 64, 2, false, 0) \
  X(linear_scan_##type##_64_gated, T, 64, 2, true, 0) \
  X(linear_scan_##type##_128, T, 128, 2, false, 0) \
  X(linear_scan_##type##_128_gated, T, 128, 2, true, 0) \
  X(linear_scan_##type##_taylor, T, 160, 2, true, 16)
#define ATTNEXT_ALL_LINEAR_KERNELS(X)         \
  ATTNEXT_SCAN_KERNELS_16(X, bf16, bf16)      \
  ATTNEXT_SCAN_KERNELS_16(X, fp16, fp16)      \
  ATTNEXT_SCAN_KERNELS_32(X, float, fp32)     \
  X(linear_numbers_bf16, bf16)                \
  X(linear_numbers_fp16, fp16)                \
  X(linear_numbers_fp32, float)               \
  X(linear_combine, float)                    \
  X(linear_decay_gradient, float)
// clang-format on

// Blocks that an SM must have room for: the compiler then keeps to as many registers.
constexpr int least_scan_blocks(int elem, int dim) { return elem == 2 && dim <= 64 ? 3 : 1; }

// Shared memory of a scan: two stages of a, b and c, the features of a and b where they are more
// than their entries, the state as operand of a product, the outputs on their way, what is known of
// each token of two chunks, z, and what a warp has scaled its part of the state by. Wide tiles lie
// in panels, whose rows have a power of two of bytes.
template <int kElem, int kDim, int kWarps, int kEntries>
struct ScanShared {
  static constexpr bool kExpanded = kEntries > 0;
  static constexpr int kChunk = 16 * kWarps, kColumns = 16 * kWarps;
  static constexpr int kRaw = kExpanded ? 32 : kDim, kPanel = kRaw;
  static constexpr int kPanels = kDim / kPanel, kPanelTile = kChunk * kPanel * kElem;
  static constexpr int kWide = kChunk * kRaw * kElem, kNarrow = kChunk * kColumns * kElem;
  static constexpr int kStage = 2 * kWide + kNarrow;
  static constexpr int kFeaturesAt = 2 * kStage;
  static constexpr int kStateAt = kFeaturesAt + (kExpanded ? 2 * kPanels * kPanelTile : 0);
  // A warp's own rows of a, once read, are room enough for its outputs unless they are too short.
  static constexpr bool kOutApart = kRaw < kColumns && !kExpanded;
  static constexpr int kOutAt = kStateAt + kPanels * kPanelTile;
  static constexpr int kNumbersAt = kOutAt + (kOutApart ? kNarrow : 0);
  static constexpr int kTotalsAt = kNumbersAt + 2 * kChunk * 16;
  static constexpr int kZAt = kTotalsAt + 2 * 16;
  static constexpr int kUnitsAt = kZAt + (kDim > kColumns ? kDim : kColumns) * 4;
  static constexpr int kBytes = kUnitsAt + kWarps * 4;
  static_assert(kBytes <= 99 * 1024, "some GPUs have no more");
};

}  // namespace cuda
}  // namespace attnext
