// SPDX-License-Identifier: Apache-2.0
// Sums of the backward pass over rows, by themselves: what it knows of a query row, and gradients
// that add up what all tiles have, of sinks and of the bias.
#pragma once

#include "walk.cuh"

namespace attnext {
namespace cuda {

// What the backward pass knows of a query row; rows in the order [batch, heads, tokens].
struct alignas(16) Statistics {
  float lse;  // log-sum-exp in base 2
  float delta;
  float rest;  // of lse
  float spare;

  ATTNEXT_DEVICE static int64_t tokens(const WindowParams& w) {
    return w.query_extent[0] * w.query_extent[1] * w.query_extent[2];
  }
  ATTNEXT_DEVICE static Statistics* of(const WindowLaunch& p) {
    return reinterpret_cast<Statistics*>(p.statistics);
  }
  ATTNEXT_DEVICE static int64_t index(const WindowParams& w, int32_t batch, const int32_t (&x)[3],
                                      int32_t head) {
    const int64_t line = (batch * w.heads + head) * w.query_extent[0] + x[0];
    return (line * w.query_extent[1] + x[1]) * w.query_extent[2] + x[2];
  }
  ATTNEXT_DEVICE static Statistics none() { return {INFINITY, 0.f, 0.f, 0.f}; }  // weights of 0
};

// As many lanes a row as it has chunks of 16 bytes, up to a warp: a block has p.rows rows.
template <class T>
ATTNEXT_DEVICE void find_statistics(const WindowLaunch& p) {
  const WindowParams& w = p.window;
  constexpr int kElems = 16 / static_cast<int>(sizeof(T));
  const int lanes = static_cast<int>(blockDim.x) / p.rows, lane = threadIdx.x % lanes;
  const uint64_t tokens = Statistics::tokens(w);
  const int64_t index = int64_t(blockIdx.x) * p.rows + threadIdx.x / lanes;
  const bool live = index < w.batch * w.heads * static_cast<int64_t>(tokens);
  int32_t x[3] = {0, 0, 0}, head = 0, batch = 0;
  if (live) {
    // Of the divisions only this one is of 64 bits, which are slow: the host sees to the others.
    const uint32_t line = static_cast<uint32_t>(static_cast<uint64_t>(index) / tokens);
    uint32_t at = static_cast<uint32_t>(index - line * tokens);
#pragma unroll
    for (int a = 2; a > 0; --a) {
      const uint32_t extent = static_cast<uint32_t>(w.query_extent[a]);
      x[a] = static_cast<int32_t>(at % extent);
      at /= extent;
    }
    x[0] = static_cast<int32_t>(at);
    head = static_cast<int32_t>(line % static_cast<uint32_t>(w.heads));
    batch = static_cast<int32_t>(line / static_cast<uint32_t>(w.heads));
  }
  const T* out = static_cast<const T*>(w.out.data) + offset_of(w.out, batch, x, head);
  const T* dout = static_cast<const T*>(w.dout.data) + offset_of(w.dout, batch, x, head);
  const bool aligned = p.aligned && p.aligned_out;
  float delta = 0.f;
  for (int64_t d = lane * kElems; live && d < w.head_dim_v; d += lanes * kElems) {
    T a[kElems], b[kElems];
    if (aligned && d + kElems <= w.head_dim_v) {
      *reinterpret_cast<uint4*>(a) = *reinterpret_cast<const uint4*>(out + d);
      *reinterpret_cast<uint4*>(b) = *reinterpret_cast<const uint4*>(dout + d);
    } else {
#pragma unroll
      for (int e = 0; e < kElems; ++e) {
        const bool real = d + e < w.head_dim_v;
        a[e] = real ? out[d + e] : T{}, b[e] = real ? dout[d + e] : T{};
      }
    }
#pragma unroll
    for (int e = 0; e < kElems; ++e) {
      delta = fmaf(Number<T>::widen(a[e]), Number<T>::widen(b[e]), delta);
    }
  }
  for (int step = lanes / 2; step > 0; step /= 2) delta += __shfl_xor_sync(~0u, delta, step);
  if (!live || lane != 0) return;
  const float lse = static_cast<const float*>(w.lse.data)[offset_of(w.lse, batch, x, head)];
  Statistics s = Statistics::none();
  if (lse != -INFINITY) {
    if (w.dlse.data) {
      delta -= static_cast<const float*>(w.dlse.data)[offset_of(w.dlse, batch, x, head)];
    }
    constexpr float kHigh = static_cast<float>(kLog2E);
    constexpr float kLow = static_cast<float>(kLog2E - kHigh);
    s.lse = lse * kHigh;
    s.rest = isfinite(lse) ? fmaf(lse, kLow, fmaf(lse, kHigh, -s.lse)) : 0.f;
  }
  s.delta = delta;
  Statistics::of(p)[index] = s;
}

// The gradient of a head's sink: one block a head, sums in one order.
template <int kThreads>
ATTNEXT_DEVICE void sink_gradient(const WindowLaunch& p) {
  const WindowParams& w = p.window;
  const int32_t head = static_cast<int32_t>(blockIdx.x);
  const int64_t tokens = Statistics::tokens(w);
  const float sink = static_cast<const float*>(w.sink_logits)[head] * static_cast<float>(kLog2E);
  float sum = 0.f;
  for (int64_t batch = 0; batch < w.batch; ++batch) {
    const int64_t first = (batch * w.heads + head) * tokens;
    for (int64_t token = threadIdx.x; token < tokens; token += blockDim.x) {
      const Statistics s = Statistics::of(p)[first + token];
      if (s.lse != INFINITY) sum -= exp2_approx(sink - s.lse - s.rest) * s.delta;
    }
  }
  __shared__ float of_warp[kThreads / 32];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) total += of_warp[i];
  static_cast<float*>(w.dsink_logits)[head] = total;
}

// Adds up the tables of a head's blocks, always in the same order. Heads have blocks of their own.
ATTNEXT_DEVICE void merge_bias(const WindowLaunch& p) {
  const WindowParams& w = p.window;
  const uint32_t blocks = gridDim.x / static_cast<uint32_t>(w.heads);
  const int64_t head = blockIdx.x / blocks;
  const int64_t entry = int64_t(blockIdx.x % blocks) * blockDim.x + threadIdx.x;
  if (entry >= w.bias_head_stride) return;
  const int64_t tables = int64_t(p.splits) * p.rows;  // warps of a block
  float sum = 0.f;
  for (int64_t i = 0; i < tables; ++i) {
    sum += p.partial[(head * tables + i) * w.bias_head_stride + entry];
  }
  static_cast<float*>(w.dbias)[head * w.bias_head_stride + entry] = sum;
}

#define ATTNEXT_KERNEL(name, threads) \
  extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ WindowLaunch p)

}  // namespace cuda
}  // namespace attnext
