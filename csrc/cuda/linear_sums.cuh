// SPDX-License-Identifier: Apache-2.0
// Around the scans of linear attention: states of segments, and what gradients need of each token.
#pragma once

#include "linear.cuh"

namespace attnext {
namespace cuda {

// States of segments alone become those before them; the last one goes to `after`, without which
// nobody has made that of the last segment. One thread for a number of a sequence's and head's
// state.
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
    if (!p.after && s + 1 == p.segments) {
      here = carry;
      return;
    }
    const float alone = here;
    here = carry;
    carry = fmaf(carry, p.factors[at], alone);
  }
  if (p.after) p.after[which * p.state_size + number] = carry;
}

// {scale / denominator, -dO.o} of each token and head: kLanes threads a row. The second over the
// denominator is the denominator's gradient: one that it has of its own joins.
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
  if (p.ddenominator.data) {
    dot -= static_cast<const float*>(p.ddenominator.data)[offset(p.ddenominator)] * by;
  }
  reinterpret_cast<float2*>(p.numbers)[index] = make_float2(p.scale / by, -dot);
}

// Parts of gradients, summed in their order.
template <class T>
ATTNEXT_DEVICE void fold_slices(const LinearLaunch& p) {
  const int64_t number = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t index = number / p.width, entry = number % p.width;
  const int64_t rows = p.batch * p.tokens * p.heads;
  if (index >= rows || entry >= p.out.dim) return;
  float sum = 0.f;
  for (int64_t s = 0; s < p.slices; ++s) sum += p.folded[s * rows * p.width + number];
  if (p.part_sums) {
    float total = 0.f;
    for (int64_t s = 0; s < p.slices; ++s) total += p.part_sums[s * rows + index];
    const float moved = total < 0.f ? total - p.eps : total + p.eps;
    sum /= moved;
    const TensorRef& d = p.denominator;
    if (entry == 0) {
      static_cast<float*>(
          d.data)[index / p.heads / p.tokens * d.batch + index / p.heads % p.tokens * d.token[2] +
                  index % p.heads * d.head] = moved;
    }
  }
  const TensorRef& out = p.out.rows;
  const int64_t at = index / p.heads / p.tokens * out.batch +
                     index / p.heads % p.tokens * out.token[2] + index % p.heads * out.head + entry;
  if (p.out_fp32) {
    static_cast<float*>(out.data)[at] = sum;
  } else {
    static_cast<T*>(out.data)[at] = Number<T>::narrow(sum);
  }
}

// A warp for each chunk. A decay scales all that goes from the tokens before it to its own and
// those after: the sum of q.dq less that of k.dk, features and their gradients, over these tokens.
// Within the chunk it is taken so; what goes beyond is what its keys, and the state before them,
// mean for the state after it.
constexpr int kDecayThreads = 128;

ATTNEXT_DEVICE void find_decay_gradient(const LinearLaunch& p) {
  const int64_t which = int64_t(blockIdx.x) * (kDecayThreads / 32) + threadIdx.x / 32;
  const int64_t place = which % p.chunks;
  const int32_t head = static_cast<int32_t>(which / p.chunks);
  if (head >= p.heads) return;
  // Its sequence: the last one that has no more chunks before it.
  Tokens tokens;
  int64_t sequence = 0;
  for (int64_t end = p.num_sequences; end - sequence > 1;) {
    const int64_t middle = (sequence + end) / 2;
    tokens.start(p, middle, head);
    (tokens.chunks_before(p, middle, p.chunk) <= place ? sequence : end) = middle;
  }
  tokens.start(p, sequence, head);
  const int64_t chunk = place - tokens.chunks_before(p, sequence, p.chunk);
  if (chunk * p.chunk >= tokens.count()) return;
  const int lane = threadIdx.x % 32, per = (p.chunk + 31) / 32;
  const int64_t rows = p.batch * p.tokens * p.heads;
  double sum = 0., left = 0.;  // left: by the lane's tokens
  for (int64_t set = 0; set < p.sets; ++set) {
    for (int64_t s = 0; s < p.slices; ++s) {
      const float* meetings =
          p.meetings +
          (((set * p.heads + head) * p.slices + s) * p.chunks + place) * p.num_meetings;
      for (int i = 0; i < p.num_meetings; ++i) sum += meetings[i];
      const float* of_state = p.dots_key + (set * p.num_key_dots + p.first_state_dot + s) * rows;
#pragma unroll 1
      for (int64_t at = chunk * p.chunk + lane; at < (chunk + 1) * p.chunk; at += 32) {
        if (at < tokens.count()) left += of_state[tokens.index(p, at)];
      }
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) left += __shfl_xor_sync(~0u, left, step);
  sum += left;
  for (int i = per - 1; i >= 0; --i) {  // lanes have neighbouring tokens
    const int64_t position = chunk * p.chunk + i * 32 + lane;
    const bool live = i * 32 + lane < p.chunk && position < tokens.count();
    double mine = 0.;
    if (live) {
      const int64_t index = tokens.index(p, position);
      for (int64_t set = 0; set < p.sets; ++set) {
        const float* of_query = p.dots + set * p.num_dots * rows + index;
        const float* of_key = p.dots_key + set * p.num_key_dots * rows + index;
        for (int64_t s = 0; s < p.num_dots; ++s) {
          mine += double(of_query[s * rows]) - of_key[s * rows];
        }
      }
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const double other = __shfl_down_sync(~0u, mine, step);
      if (lane + step < 32) mine += other;
    }
    if (live) {
      static_cast<float*>(p.ddecay.data)[tokens.offset(p.ddecay, 1, position)] =
          static_cast<float>(sum + mine);
    }
    sum += __shfl_sync(~0u, mine, 0);
  }
}

#define ATTNEXT_NUMBERS(name, T)                                                                   \
  extern "C" __global__ void __launch_bounds__(128) name(const __grid_constant__ LinearLaunch p) { \
    find_numbers<T>(p);                                                                            \
  }
#define ATTNEXT_FOLD(name, T)                                                                      \
  extern "C" __global__ void __launch_bounds__(256) name(const __grid_constant__ LinearLaunch p) { \
    fold_slices<T>(p);                                                                             \
  }
#define ATTNEXT_AROUND(name, threads, body)             \
  extern "C" __global__ void __launch_bounds__(threads) \
      name(const __grid_constant__ LinearLaunch p) {    \
    body(p);                                            \
  }

}  // namespace cuda
}  // namespace attnext
