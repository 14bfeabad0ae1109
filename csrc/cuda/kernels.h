// SPDX-License-Identifier: Apache-2.0
// The lists of the kernels of window and routed attention: name, element type, head-dim bucket,
// warps of a block, fragments of 16 rows that a warp holds, slots of the walk per step, whether
// score modifiers are compiled in, and how many blocks share the columns of a tile's result. The
// host chooses from it, the device instantiates it.
//
// Shapes were measured on an H100 (bench/RESULTS.md). A warp holds 32 rows where its registers
// allow: every fragment of the walked side that is read from shared memory then serves two
// products. Tiles of 128 rows (`long`) are for sequences: warps skip the steps that their own rows
// do not attend, and more rows share what is copied. Boxes of two and three axes waste less at 64,
// and where head_dim is small, twice the warps with 16 rows each hide more of what their short
// walks wait for. fp32 is one variant with everything.
#pragma once

#include "../dtype.h"

namespace attnext {
namespace cuda {

// clang-format off
#define ATTNEXT_FORWARD_KERNELS_16(X, family, T, type) \
  X(family##_forward_##type##_32, T, 32, 4, 1, 64, false, 1) \
  X(family##_forward_##type##_64, T, 64, 4, 1, 64, false, 1) \
  X(family##_forward_##type##_128, T, 128, 2, 2, 32, false, 1) \
  X(family##_forward_##type##_256, T, 256, 4, 1, 32, false, 1) \
  X(family##_forward_##type##_32_modified, T, 32, 2, 2, 64, true, 1) \
  X(family##_forward_##type##_64_modified, T, 64, 2, 2, 32, true, 1) \
  X(family##_forward_##type##_128_modified, T, 128, 4, 1, 32, true, 1) \
  X(family##_forward_##type##_256_modified, T, 256, 4, 1, 32, true, 1)
#define ATTNEXT_LONG_FORWARD_KERNELS_16(X, T, type) \
  X(window_forward_##type##_64_long, T, 64, 4, 2, 64, false, 1) \
  X(window_forward_##type##_128_long, T, 128, 4, 2, 32, false, 1)
#define ATTNEXT_FORWARD_KERNELS_32(X, family, T, type) \
  X(family##_forward_##type##_32, T, 32, 4, 1, 32, true, 1) \
  X(family##_forward_##type##_64, T, 64, 4, 1, 32, true, 1) \
  X(family##_forward_##type##_128, T, 128, 4, 1, 32, true, 1) \
  X(family##_forward_##type##_256, T, 256, 2, 1, 16, true, 1)
#define ATTNEXT_QUERY_GRADIENT_KERNELS_16(X, family, T, type) \
  X(family##_query_gradient_##type##_32, T, 32, 2, 2, 32, false, 1) \
  X(family##_query_gradient_##type##_64, T, 64, 2, 2, 32, false, 1) \
  X(family##_query_gradient_##type##_128, T, 128, 4, 1, 32, false, 1) \
  X(family##_query_gradient_##type##_256, T, 256, 4, 1, 16, false, 1) \
  X(family##_query_gradient_##type##_32_modified, T, 32, 2, 2, 32, true, 1) \
  X(family##_query_gradient_##type##_64_modified, T, 64, 2, 2, 32, true, 1) \
  X(family##_query_gradient_##type##_128_modified, T, 128, 4, 1, 32, true, 1) \
  X(family##_query_gradient_##type##_256_modified, T, 256, 4, 1, 16, true, 1)
#define ATTNEXT_LONG_QUERY_GRADIENT_KERNELS_16(X, T, type) \
  X(window_query_gradient_##type##_128_long, T, 128, 4, 2, 32, false, 1)
#define ATTNEXT_QUERY_GRADIENT_KERNELS_32(X, family, T, type) \
  X(family##_query_gradient_##type##_32, T, 32, 4, 1, 32, true, 1) \
  X(family##_query_gradient_##type##_64, T, 64, 4, 1, 32, true, 1) \
  X(family##_query_gradient_##type##_128, T, 128, 4, 1, 16, true, 1) \
  X(family##_query_gradient_##type##_256, T, 256, 1, 1, 16, true, 1)
#define ATTNEXT_BIAS_GRADIENT_KERNELS_16(X, family, T, type) \
  X(family##_bias_gradient_##type##_32, T, 32, 4, 1, 32, true, 1) \
  X(family##_bias_gradient_##type##_64, T, 64, 4, 1, 32, true, 1) \
  X(family##_bias_gradient_##type##_128, T, 128, 4, 1, 32, true, 1) \
  X(family##_bias_gradient_##type##_256, T, 256, 4, 1, 16, true, 1)
#define ATTNEXT_BIAS_GRADIENT_KERNELS_32(X, family, T, type) \
  X(family##_bias_gradient_##type##_32, T, 32, 4, 1, 32, true, 1) \
  X(family##_bias_gradient_##type##_64, T, 64, 4, 1, 32, true, 1) \
  X(family##_bias_gradient_##type##_128, T, 128, 4, 1, 16, true, 1) \
  X(family##_bias_gradient_##type##_256, T, 256, 1, 1, 16, true, 1)
#define ATTNEXT_KEY_GRADIENT_KERNELS_16(X, family, T, type) \
  X(family##_key_gradient_##type##_32, T, 32, 2, 2, 32, false, 1) \
  X(family##_key_gradient_##type##_64, T, 64, 2, 2, 32, false, 1) \
  X(family##_key_gradient_##type##_128, T, 128, 4, 1, 32, false, 1) \
  X(family##_key_gradient_##type##_256, T, 256, 4, 1, 16, false, 2) \
  X(family##_key_gradient_##type##_32_modified, T, 32, 2, 2, 32, true, 1) \
  X(family##_key_gradient_##type##_64_modified, T, 64, 2, 2, 32, true, 1) \
  X(family##_key_gradient_##type##_128_modified, T, 128, 4, 1, 32, true, 1) \
  X(family##_key_gradient_##type##_256_modified, T, 256, 4, 1, 16, true, 2)
#define ATTNEXT_KEY_GRADIENT_KERNELS_32(X, family, T, type) \
  X(family##_key_gradient_##type##_32, T, 32, 4, 1, 32, true, 1) \
  X(family##_key_gradient_##type##_64, T, 64, 4, 1, 32, true, 1) \
  X(family##_key_gradient_##type##_128, T, 128, 4, 1, 16, true, 1) \
  X(family##_key_gradient_##type##_256, T, 256, 1, 1, 16, true, 2)

// What both families have, in tiles of 64 rows at most: the lists of more are less alike.
#define ATTNEXT_FAMILY_KERNELS(X, family, bits, T, type)       \
  ATTNEXT_FORWARD_KERNELS_##bits(X, family, T, type)           \
  ATTNEXT_QUERY_GRADIENT_KERNELS_##bits(X, family, T, type)    \
  ATTNEXT_KEY_GRADIENT_KERNELS_##bits(X, family, T, type)      \
  ATTNEXT_BIAS_GRADIENT_KERNELS_##bits(X, family, T, type)     \
  X(family##_merge_##type, T)
#define ATTNEXT_LONG_KERNELS(X, T, type)                       \
  ATTNEXT_LONG_FORWARD_KERNELS_16(X, T, type)                  \
  ATTNEXT_LONG_QUERY_GRADIENT_KERNELS_16(X, T, type)
#define ATTNEXT_ALL_FAMILY_KERNELS(X, family)                  \
  ATTNEXT_FAMILY_KERNELS(X, family, 16, bf16, bf16)            \
  ATTNEXT_FAMILY_KERNELS(X, family, 16, fp16, fp16)            \
  ATTNEXT_FAMILY_KERNELS(X, family, 32, float, fp32)           \
  X(family##_merge_bias, float)
#define ATTNEXT_ALL_ROUTED_KERNELS(X) ATTNEXT_ALL_FAMILY_KERNELS(X, routed)
#define ATTNEXT_ALL_KERNELS(X)                                 \
  ATTNEXT_ALL_FAMILY_KERNELS(X, window)                        \
  ATTNEXT_LONG_KERNELS(X, bf16, bf16)                          \
  ATTNEXT_LONG_KERNELS(X, fp16, fp16)                          \
  X(window_statistics_bf16, bf16)                              \
  X(window_statistics_fp16, fp16)                              \
  X(window_statistics_fp32, float)                             \
  X(window_sink_gradient, float)
// clang-format on

// Tiles of more rows are for sequences: problems whose walks are parts of one line.
constexpr int kBoxRows = 64;

// Blocks that an SM must have room for: the compiler then keeps to as many registers. Where shared
// memory has room for no more than 12 warps, there are registers for 12.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr int kWideWarps = 12;
#else
constexpr int kWideWarps = 16;
#endif
constexpr int least_blocks(int dim, int warps, int frags, bool modified) {
  return frags > 1 || dim > 64 || modified ? 1 : (dim == 64 ? kWideWarps : 16) / warps;
}

// Numbers that a kernel keeps of each walked key, and of each walked query.
constexpr int key_numbers(bool modified) { return modified ? 1 : 0; }
constexpr int query_numbers(bool modified) { return modified ? 7 : 4; }

// Ints of shared memory that a warp has of the walk: see BoxSteps and ListSteps.
constexpr int kBoxWarpInts = 8, kListWarpInts = 16;

// Bytes of shared memory that the gradient of the bias has besides: 8 rows of dS of each warp.
constexpr int bias_scratch(int warps, int step) { return warps * 8 * step * 4; }

constexpr int kMostShared = 99 * 1024;  // of compute capabilities 8.6, 8.9 and 12.0

// Shared memory of a block: tiles of rows that stay, two stages of two operands of the walk, where
// the rows of the walk are, and numbers of walked tokens.
template <int kElem, int kDim, int kRows, int kStep, int kHeld, int kNumbers,
          int kWarpInts = kBoxWarpInts>
struct SharedPlan {
  static constexpr int kRowTile = kRows * kDim * kElem;
  static constexpr int kWalkTile = kStep * kDim * kElem;
  static constexpr int kWalkAt = kHeld * kRowTile;
  static constexpr int kPlacesAt = kWalkAt + 2 * 2 * kWalkTile;
  static constexpr int kNumbersAt = kPlacesAt + 2 * 2 * kStep * 4;  // buffers, operands
  static constexpr int kFindersAt = kNumbersAt + 3 * kNumbers * kStep * 4;
  static constexpr int kOuterAt = kFindersAt + 3 * 16 + 16;
  static constexpr int kOuter = kWarpInts;                           // of a walk's steps
  static constexpr int kBytes = kOuterAt + kRows / 16 * kOuter * 4;  // a warp has 16 rows at least
  static_assert(kRows * 8 <= 4 * kWalkTile, "addresses of rows lie where the walk will be");
  static_assert(kBytes <= kMostShared, "some GPUs have no more");
};

}  // namespace cuda
}  // namespace attnext
