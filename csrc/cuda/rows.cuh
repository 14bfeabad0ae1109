// SPDX-License-Identifier: Apache-2.0
// Rows of tensors on their way into tiles and, from accumulators, back.
#pragma once

#include <string.h>

#include "tile.cuh"

namespace attnext {
namespace cuda {

ATTNEXT_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
ATTNEXT_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// `bytes` (0 to 16) of a row at `from` (0: none) plus `offset`, zeros after them.
template <class T>
ATTNEXT_DEVICE void copy_chunk(uint32_t to, uint64_t from, int offset, int bytes, bool aligned) {
  const char* source = reinterpret_cast<const char*>(from) + offset;
  if (aligned) {
    copy_chunk_async(to, source, from ? bytes : 0);
    return;
  }
  constexpr int kElems = 16 / static_cast<int>(sizeof(T));
  T elems[kElems];
#pragma unroll
  for (int e = 0; e < kElems; ++e) {
    elems[e] = T{};
    if (from && e * static_cast<int>(sizeof(T)) < bytes) {
      elems[e] = reinterpret_cast<const T*>(source)[e];
    }
  }
  uint4 whole;
  memcpy(&whole, elems, 16);
  store_shared(to, whole);
}

// kRows rows, whose addresses (0: a row of zeros) lie in shared memory. `bytes` of each are real.
template <class T, int kDim, int kRows, int kThreads>
ATTNEXT_DEVICE void copy_rows(uint32_t tile, const uint64_t* address, int bytes, bool aligned) {
  using L = Layout<T, kDim>;
  constexpr int kTogether = kThreads / L::kChunks;  // rows that the threads copy at once
  static_assert(kTogether == 0 ? L::kChunks % kThreads == 0 : kThreads % L::kChunks == 0, "uneven");
  constexpr int kPieces = kTogether == 0 ? L::kChunks / kThreads : 1;  // chunks of a row a thread
  constexpr int kRowsAtOnce = kTogether == 0 ? 1 : kTogether;
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const int chunk = kPieces == 1 ? threadIdx.x % L::kChunks : piece * kThreads + threadIdx.x;
    const int row0 = kPieces == 1 ? threadIdx.x / L::kChunks : 0;
    const int mine = min(max(bytes - chunk * 16, 0), 16);
#pragma unroll
    for (int i = 0; i < (kRows + kRowsAtOnce - 1) / kRowsAtOnce; ++i) {
      const int r = row0 + i * kRowsAtOnce;
      if (kRows % kRowsAtOnce != 0 && r >= kRows) break;
      copy_chunk<T>(tile + L::at(r, chunk), address[r], chunk * 16, mine, aligned);
    }
  }
}

// Rows of accumulators, times `factor` of each (of rows g and g + 8 of a fragment), rounded, to the
// warp's part of a tile, from where they go to global memory. Columns are the first kOut of the
// tile's.
template <class T, int kDim, int kOut, int kFrags>
ATTNEXT_DEVICE void round_rows(uint32_t tile, int row0, const float (&x)[kFrags][kOut / 8][4],
                               const float (&factor)[kFrags][2]) {
  using L = Layout<T, kDim>;
  const int lane = threadIdx.x % 32, g = lane / 4;
  const auto places = L::places(tile, row0 + g);
  __syncwarp();
#pragma unroll
  for (int f = 0; f < kFrags; ++f) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t below = (f * 16 + half * 8) * L::kRowBytes;
      const float scale = factor[f][half];
#pragma unroll
      for (int n = 0; n < kOut / 8; ++n) {
        const float a = x[f][n][2 * half] * scale, b = x[f][n][2 * half + 1] * scale;
        if constexpr (sizeof(T) == 4) {
          // Neighbouring rows share banks: one stores its even columns while the other its odd
          // ones.
          const int odd = g % 2;
          const uint32_t at = places(n) + below;
          store_shared(at + odd * 4, __float_as_uint(odd ? b : a));
          store_shared(at + 4 - odd * 4, __float_as_uint(odd ? a : b));
        } else {
          store_shared(places(n) + below, Number<T>::pack(a, b));
        }
      }
    }
  }
  __syncwarp();
}

// To global memory: lane r has the address of row r, 0 for none.
template <class T, int kDim, int kOut, int kFrags>
ATTNEXT_DEVICE void store_rows(uint32_t tile, int row0, const float (&x)[kFrags][kOut / 8][4],
                               const float (&factor)[kFrags][2], uint64_t address, int dim,
                               bool aligned) {
  using L = Layout<T, kDim>;
  const int lane = threadIdx.x % 32;
  round_rows<T, kDim, kOut, kFrags>(tile, row0, x, factor);
  constexpr int kChunks = kOut / L::kElems;
#pragma unroll
  for (int i = 0; i < kFrags * 16 * kChunks / 32; ++i) {
    const int item = i * 32 + lane;
    const int r = item / kChunks, chunk = item % kChunks;
    const uint64_t row = __shfl_sync(~0u, address, r);
    const uint4 whole = load_shared(tile + L::at(row0 + r, chunk));
    T* to = reinterpret_cast<T*>(row) + chunk * L::kElems;
    const int left = dim - chunk * L::kElems;
    if (row == 0 || left <= 0) continue;
    if (aligned && left >= L::kElems) {
      *reinterpret_cast<uint4*>(to) = whole;
    } else {
      T elems[L::kElems];
      memcpy(elems, &whole, 16);
#pragma unroll
      for (int e = 0; e < L::kElems; ++e) {
        if (e < left) to[e] = elems[e];
      }
    }
  }
}

// The same of whole, aligned rows that lie `stride` bytes apart: `start` is the lane's place in the
// first ones, of which a lane has 16 bytes.
template <class T, int kDim, int kOut>
ATTNEXT_DEVICE void store_even_rows(uint32_t tile, int row0, const float (&x)[1][kOut / 8][4],
                                    const float (&factor)[1][2], uint64_t start, int32_t stride) {
  using L = Layout<T, kDim>;
  constexpr int kChunks = kOut / L::kElems, kAtOnce = 32 / kChunks;
  const int lane = threadIdx.x % 32;
  round_rows<T, kDim, kOut, 1>(tile, row0, x, factor);
#pragma unroll
  for (int r = 0; r < 16; r += kAtOnce) {
    *reinterpret_cast<uint4*>(start + int64_t(stride) * r) =
        load_shared(tile + L::at(row0 + r + lane / kChunks, lane % kChunks));
  }
}

}  // namespace cuda
}  // namespace attnext
