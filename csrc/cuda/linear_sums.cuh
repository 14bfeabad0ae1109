// SPDX-License-Identifier: Apache-2.0
// Around the scans of linear attention: states of segments, and what gradients need of each token.
#pragma once

#include "linear.cuh"

namespace attnext {
namespace cuda {

// States of segments alone become those before them; the last one goes to `after`. One thread for
// a number of a sequence's and head's state.
ATTNEXT_DEVICE void combine_segments(const LinearLaunch& p) {
  const uint32_t parts = static_cast<uint32_t>((p.state_size + blockDim.x - 1) / blockDim.x);
  const int64_t number = int64_t(blockIdx.x % parts) * blockDim.x + threadIdx.x;
  const int64_t which = blockIdx.x / parts;  // sequence and head
  if (number >= p.state_size) return;
  const int64_t sequence = which / p.heads, head = which % p.heads;
  float carry = p.before ? p.before[which * p.state_size + number] : 0.f;
  for (int32_t s = 0; s < p.segments; ++s) {
    const int64_t at = (sequence * p.segments + s) * p.heads + head;
    float& here = p.states[at * p.state_size + number];
    const float alone = here;
    here = carry;
    carry = fmaf(carry, p.factors[at], alone);
  }
  if (p.after) p.after[which * p.state_size + number] = carry;
}

// {scale / denominator, -dO.o} of each token and head: kLanes threads a row.
template <class T>
ATTNEXT_DEVICE void find_numbers(const LinearLaunch& p) {
  constexpr int kLanes = 8;
  const int64_t index = int64_t(blockIdx.x) * (blockDim.x / kLanes) + threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  const bool live = index < p.batch * p.tokens * p.heads;
  const int64_t head = index % p.heads, token = index / p.heads % p.tokens;
  const int64_t batch = index / p.heads / p.tokens;
  const auto offset = [&](const TensorRef& t) {
    return batch * t.batch + token * t.token[2] + head * t.head;
  };
  float dot = 0.f;
  if (live) {
    const T* o = static_cast<const T*>(p.result.rows.data) + offset(p.result.rows);
    const T* dout = static_cast<const T*>(p.dout.rows.data) + offset(p.dout.rows);
    for (int d = lane; d < p.dout.dim; d += kLanes) {
      dot = fmaf(Number<T>::widen(o[d]), Number<T>::widen(dout[d]), dot);
    }
  }
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) dot += __shfl_xor_sync(~0u, dot, step);
  if (!live || lane > 0) return;
  const float by = static_cast<const float*>(p.denominator.data)[offset(p.denominator)];
  reinterpret_cast<float2*>(p.numbers)[index] = make_float2(p.scale / by, -dot);
}

// One block for a sequence and head, from its last token to its first. A decay scales all that
// goes from the tokens before it to its own and those after: the sum of q.dq less that of k.dk,
// features and their gradients, over these, and what leaves with the final state.
constexpr int kDecayThreads = 256;

ATTNEXT_DEVICE double block_sum_before(double x, double* sums, double& all) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const double other = __shfl_up_sync(~0u, x, step);
    if (lane >= step) x += other;
  }
  __syncthreads();  // sums of the last call have been read
  if (lane == 31) sums[warp] = x;
  __syncthreads();
  double before = 0.;
  all = 0.;
  for (int w = 0; w < kDecayThreads / 32; ++w) {
    if (w < warp) before += sums[w];
    all += sums[w];
  }
  return before + x;
}

ATTNEXT_DEVICE void find_decay_gradient(const LinearLaunch& p) {
  __shared__ double sums[kDecayThreads / 32];
  const int64_t which = blockIdx.x;
  const int64_t rows = p.batch * p.tokens * p.heads;
  Tokens tokens;
  tokens.start(p, which / p.heads, which % p.heads);
  double carry = 0., mine = 0.;
  if (p.state_gradient) {
    for (int64_t i = threadIdx.x; i < p.state_size; i += kDecayThreads) {
      const int64_t at = which * p.state_size + i;
      mine += double(p.before[at]) * p.state_gradient[at];
    }
    block_sum_before(mine, sums, carry);
  }
  for (int64_t at = 0; at < tokens.count(); at += kDecayThreads) {
    const int64_t position = tokens.count() - 1 - at - threadIdx.x;
    const bool live = position >= 0;
    mine = 0.;
    if (live) {
      const int64_t index = tokens.index(p, position);
      for (int32_t s = 0; s < p.dots_slices; ++s) mine += p.dots[s * rows + index];
      for (int32_t s = 0; s < p.dots_key_slices; ++s) mine -= p.dots_key[s * rows + index];
    }
    double all;
    const double sum = block_sum_before(mine, sums, all) + carry;
    carry += all;
    if (live) {
      static_cast<float*>(p.ddecay.data)[tokens.offset(p.ddecay, 1, position)] =
          static_cast<float>(sum);
    }
  }
}

#define ATTNEXT_NUMBERS(name, T)                                                                   \
  extern "C" __global__ void __launch_bounds__(128) name(const __grid_constant__ LinearLaunch p) { \
    find_numbers<T>(p);                                                                            \
  }
#define ATTNEXT_AROUND(name, threads, body)                              \
  extern "C" __global__ void __launch_bounds__(threads)                  \
      name(const __grid_constant__ LinearLaunch p) {                     \
    body(p);                                                             \
  }

}  // namespace cuda
}  // namespace attnext
