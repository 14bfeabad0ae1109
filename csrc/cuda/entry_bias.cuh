// SPDX-License-Identifier: Apache-2.0
// The gradient of the biases of routed attention's slots. A warp adds up dS of each entry of its
// tile, a second kernel adds up the entries of each slot: every sum has one owner and one order.
#pragma once

#include "list_walk.cuh"

namespace attnext {
namespace cuda {

// Kernel: QueryGradient that walks lists and keeps the entry of each slot in its first number.
// `partial` is [splits][warps][entries].
template <class Kernel>
ATTNEXT_DEVICE float* entry_sums(const Kernel& k) {
  const int64_t split = blockIdx.x % k.p.splits;
  return k.p.partial + (split * Kernel::kWarps + k.warp) * k.p.num_entries +
         (k.walk.entries - k.p.entries);
}

template <class Kernel, int kFrags, int kColumns>
ATTNEXT_DEVICE void add_to_entries(const Kernel& k, const float (&ds)[kFrags][kColumns][4],
                                   int numbers) {
  static_assert(kColumns <= 4, "a lane has a slot; the block's barrier is between those of steps");
  const int lane = k.lane;
  // The sum of a slot's column, in the lane of its number: 8 n + 2 t + e.
  float x = 0.f;
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = 0.f;
#pragma unroll
      for (int f = 0; f < kFrags; ++f) sum += ds[f][n][e] + ds[f][n][2 + e];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
      const float here = __shfl_sync(~0u, sum, lane % 8 / 2);
      if (lane / 8 == n && lane % 2 == e) x = here;
    }
  }
  const int32_t entry = lane < kColumns * 8 ? k.integer(numbers, 0)[lane] : kNoBias;
  // Slots of an entry follow each other: the last has the sum of all.
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const float before = __shfl_up_sync(~0u, x, step);
    const int32_t other = __shfl_up_sync(~0u, entry, step);
    if (lane >= step && other == entry) x += before;
  }
  const int32_t next = __shfl_down_sync(~0u, entry, 1);
  if (entry != kNoBias && (lane == 31 || next != entry)) entry_sums(k)[entry] += x;
}

// One block a list, tile and split: it takes every so many of the batch items and (packed) heads
// that have the list.
template <class Kernel>
ATTNEXT_DEVICE void entry_bias_gradient(Kernel& k) {
  const RoutedLaunch& p = k.p;
  uint32_t block = blockIdx.x / static_cast<uint32_t>(p.splits);
  const int32_t index = block % p.most_tiles;
  const int32_t list = block / p.most_tiles;
  const int64_t* tile = p.tile_ptr + int64_t(list) * p.most_tiles + index;
  k.walk.entries = p.entries + tile[0];
  float* const sums = entry_sums(k);
#pragma unroll 1
  for (int64_t e = k.lane; e < tile[1] - tile[0]; e += 32) sums[e] = 0.f;  // a barrier follows
  const int32_t heads = static_cast<int32_t>(p.window.heads) / p.list_heads;
  const int32_t packs = heads / p.packed;
  const int32_t batches = p.list_batch == 1 ? static_cast<int32_t>(p.window.batch) : 1;
  for (int64_t i = blockIdx.x % p.splits; i < int64_t(packs) * batches; i += p.splits) {
    k.head = list % p.list_heads * heads + static_cast<int32_t>(i % packs) * p.packed;
    k.batch = list / p.list_heads + static_cast<int32_t>(i / packs);
    k.start(index);
    if (k.walk.count == 0) continue;  // by the head's policy
    k.walk_tile_of(k.walk.row(k.warp * Kernel::kWarpRows + k.lane % Kernel::kWarpRows));
    __syncthreads();
  }
}

// One thread a slot.
ATTNEXT_DEVICE void merge_entry_bias(const RoutedLaunch& p) {
  const int64_t slot = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (slot >= p.num_slots) return;
  float sum = 0.f;
#pragma unroll 1
  for (int64_t at = p.slot_ptr[slot]; at < p.slot_ptr[slot + 1]; ++at) {
    const float* mine = p.partial + p.slot_entries[at];
#pragma unroll 1
    for (int64_t i = 0; i < int64_t(p.splits) * p.rows; ++i) sum += mine[i * p.num_entries];
  }
  static_cast<float*>(p.window.dbias)[slot] = sum;
}

}  // namespace cuda
}  // namespace attnext
