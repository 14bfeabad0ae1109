// SPDX-License-Identifier: Apache-2.0
// The list of linear attention's kernels: name, element type, bucket of the state's rows, warps,
// kind. A block has 16 tokens of a chunk and 16 columns of the state for each of its warps.
#pragma once

#include "../dtype.h"

namespace attnext {
namespace cuda {

// What is compiled in. Plain: products, and the normaliser of outputs. Gated: decays and other
// numbers of tokens too, further entries of b, features' slopes. Taylor: as plain or as gated, of
// features that are all products of two of 16 entries, with them and 1. Delta: as gated, with
// values that the state has not told yet. DeltaBack: as gated, and outputs are gradients of such
// values, of which some come from those of the tokens before (in the order of the scan). Fold: as
// gated, c has Taylor features, from whose gradient that of the entries comes. Wide: as gated, of
// up to 64 entries, whose features blocks share; each has a part of an output.
enum class ScanKind {
  kPlain,
  kGated,
  kTaylor,
  kTaylorGated,
  kDelta,
  kDeltaBack,
  kFold,
  kTaylorWide,
  kFoldWide
};
constexpr bool is_gated(ScanKind kind) {
  return kind != ScanKind::kPlain && kind != ScanKind::kTaylor;
}
constexpr bool is_expanded(ScanKind kind) {
  return kind == ScanKind::kTaylor || kind == ScanKind::kTaylorGated ||
         kind == ScanKind::kTaylorWide;
}
constexpr bool is_folded(ScanKind kind) {
  return kind == ScanKind::kFold || kind == ScanKind::kFoldWide;
}
constexpr bool is_wide(ScanKind kind) {
  return kind == ScanKind::kTaylorWide || kind == ScanKind::kFoldWide;
}
constexpr int kTaylorEntries = 16, kWideEntries = 64;

// clang-format off
#define ATTNEXT_SCAN_KERNELS_16(X, T, type) \
  X(linear_scan_##type##_32, T, 32, 4, kPlain) \
  X(linear_scan_##type##_32_gated, T, 32, 4, kGated) \
  X(linear_scan_##type##_32_delta, T, 32, 4, kDelta) \
  X(linear_scan_##type##_32_delta_back, T, 32, 4, kDeltaBack) \
  X(linear_scan_##type##_64, T, 64, 4, kPlain) \
  X(linear_scan_##type##_64_gated, T, 64, 4, kGated) \
  X(linear_scan_##type##_64_delta, T, 64, 4, kDelta) \
  X(linear_scan_##type##_64_delta_back, T, 64, 4, kDeltaBack) \
  X(linear_scan_##type##_128, T, 128, 4, kPlain) \
  X(linear_scan_##type##_128_gated, T, 128, 4, kGated) \
  X(linear_scan_##type##_128_delta, T, 128, 4, kDelta) \
  X(linear_scan_##type##_128_delta_back, T, 128, 4, kDeltaBack) \
  X(linear_scan_##type##_256_gated, T, 256, 2, kGated) \
  X(linear_scan_##type##_256_delta, T, 256, 2, kDelta) \
  X(linear_scan_##type##_256_delta_back, T, 256, 2, kDeltaBack) \
  X(linear_scan_##type##_taylor, T, 160, 4, kTaylor) \
  X(linear_scan_##type##_taylor_gated, T, 160, 4, kTaylorGated) \
  X(linear_scan_##type##_fold, T, 64, 4, kFold) \
  X(linear_scan_##type##_taylor_wide, T, 128, 4, kTaylorWide) \
  X(linear_scan_##type##_fold_wide, T, 64, 4, kFoldWide)
#define ATTNEXT_SCAN_KERNELS_32(X, T, type) \
  X(linear_scan_##type##_32, T, 32, 2, kPlain) \
  X(linear_scan_##type##_32_gated, T, 32, 2, kGated) \
  X(linear_scan_##type##_32_delta, T, 32, 2, kDelta) \
  X(linear_scan_##type##_32_delta_back, T, 32, 2, kDeltaBack) \
  X(linear_scan_##type##_64, T, 64, 2, kPlain) \
  X(linear_scan_##type##_64_gated, T, 64, 2, kGated) \
  X(linear_scan_##type##_64_delta, T, 64, 2, kDelta) \
  X(linear_scan_##type##_64_delta_back, T, 64, 2, kDeltaBack) \
  X(linear_scan_##type##_128, T, 128, 2, kPlain) \
  X(linear_scan_##type##_128_gated, T, 128, 2, kGated) \
  X(linear_scan_##type##_128_delta, T, 128, 2, kDelta) \
  X(linear_scan_##type##_128_delta_back, T, 128, 2, kDeltaBack) \
  X(linear_scan_##type##_256_gated, T, 256, 1, kGated) \
  X(linear_scan_##type##_256_delta, T, 256, 1, kDelta) \
  X(linear_scan_##type##_256_delta_back, T, 256, 1, kDeltaBack) \
  X(linear_scan_##type##_taylor, T, 160, 2, kTaylor) \
  X(linear_scan_##type##_taylor_gated, T, 160, 2, kTaylorGated) \
  X(linear_scan_##type##_fold, T, 64, 2, kFold) \
  X(linear_scan_##type##_taylor_wide, T, 128, 2, kTaylorWide) \
  X(linear_scan_##type##_fold_wide, T, 64, 2, kFoldWide)
#define ATTNEXT_ALL_LINEAR_KERNELS(X)         \
  ATTNEXT_SCAN_KERNELS_16(X, bf16, bf16)      \
  ATTNEXT_SCAN_KERNELS_16(X, fp16, fp16)      \
  ATTNEXT_SCAN_KERNELS_32(X, float, fp32)     \
  X(linear_numbers_bf16, bf16)                \
  X(linear_numbers_fp16, fp16)                \
  X(linear_numbers_fp32, float)               \
  X(linear_fold_bf16, bf16)                   \
  X(linear_fold_fp16, fp16)                   \
  X(linear_fold_fp32, float)                  \
  X(linear_combine, float)                    \
  X(linear_decay_gradient, float)
#define ATTNEXT_STEP_KERNELS(X) \
  X(linear_step_bf16, bf16)     \
  X(linear_step_fp16, fp16)     \
  X(linear_step_fp32, float)
// clang-format on

// A step's block: its threads; of each, the numbers of the state that it has at once; how many
// threads share a column, at most; columns, and tokens, that it has at once.
constexpr int kStepThreads = 256, kStepHeld = 32, kStepGroups = 8;
constexpr int kStepColumns = 96, kStepTokens = 8;

// Shared memory of a scan: two stages of a, b and c, the features of a and b where they are more
// than their entries, the state as operand of a product, the outputs on their way, what is known of
// each token of two chunks, where the segment's tokens are, z, and what a warp has scaled its part
// of the state by. Wide tiles lie in panels, whose rows have a power of two of bytes.
template <int kElem, int kDim, int kWarps, ScanKind kKind>
struct ScanShared {
  static constexpr bool kExpanded = is_expanded(kKind), kFolded = is_folded(kKind);
  static constexpr int kEntryWidth = is_wide(kKind) ? kWideEntries : 32;  // of a tile of entries
  static constexpr int kChunk = 16 * kWarps, kColumns = 16 * kWarps;
  static constexpr int kRaw = kExpanded ? kEntryWidth : kDim, kPanel = kRaw;
  static constexpr int kPanels = kDim / kPanel, kPanelTile = kChunk * kPanel * kElem;
  static constexpr int kWide = kChunk * kRaw * kElem, kNarrow = kChunk * kColumns * kElem;
  static constexpr int kEntriesTile = kChunk * kEntryWidth * kElem;
  static constexpr int kStage = 2 * kWide + (kFolded ? 2 * kEntriesTile : kNarrow);
  static constexpr int kFeaturesAt = 2 * kStage;
  static constexpr int kStateAt = kFeaturesAt + (kExpanded ? 2 * kPanels * kPanelTile
                                                 : kFolded ? kNarrow
                                                           : 0);
  // A warp's own rows of a, once read, are room enough for its outputs unless they are too short.
  static constexpr bool kOutApart = kRaw < kColumns && !kExpanded;
  static constexpr int kOutAt = kStateAt + kPanels * kColumns * kPanel * kElem;
  static constexpr int kRoom = kColumns + 1;  // fold: of a row in fp32, which begin in other banks
  static constexpr int kOutBytes = kFolded ? kChunk * kRoom * 4 : kOutApart ? kNarrow : 0;
  static constexpr int kNumbersAt = kOutAt + kOutBytes;
  static constexpr int kTotalsAt = kNumbersAt + 2 * kChunk * 16;
  static constexpr int kTokensAt = kTotalsAt + 2 * 16;
  static constexpr int kZAt = kTokensAt + 48;
  static constexpr int kSums = kDim > kColumns ? kDim : kColumns;
  static constexpr int kUnitsAt = kZAt + kSums * 4;
  static constexpr int kBytes = kUnitsAt + kWarps * 4;
  static_assert(kBytes <= 99 * 1024, "some GPUs have no more");
};

// Blocks that an SM must have registers for: the compiler then keeps to as many. No more than its
// shared memory has room for, of which a block takes 1 KiB more than it asks for.
#if defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kSharedOfSM = 100 * 1024;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
constexpr int kSharedOfSM = 164 * 1024;
#else
constexpr int kSharedOfSM = 228 * 1024;
#endif
template <int kElem, int kDim, int kWarps, ScanKind kKind>
constexpr int least_scan_blocks() {
  constexpr int kWanted = kElem == 4 || kDim > 64 || is_wide(kKind) ? 1
                          : kKind == ScanKind::kPlain               ? 3
                                                                    : 2;
  constexpr int kRoom = kSharedOfSM / (ScanShared<kElem, kDim, kWarps, kKind>::kBytes + 1024);
  return kWanted < kRoom ? kWanted : kRoom;
}

}  // namespace cuda
}  // namespace attnext
