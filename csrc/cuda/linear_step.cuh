// SPDX-License-Identifier: Apache-2.0
// Decoding: a few tokens against a state in fp32, which is read and written once for all of them
// (up to kTokens). One block for a batch item, head and tile of the state's columns; a normalised
// one walks over all tiles, that of the sums first.
//
// A thread has a column and every `groups`-th row of it, kHeld at a time in registers, so that a
// warp's rows lie side by side as they do in the state. For each part of the rows
//   1. its numbers are on their way while the features of all tokens are made in shared memory;
//   2. token by token S = decay S + k u^T, and what q finds in it is added to the thread's sums;
//   3. it is stored.
// At last the sums of a column's threads are added up, in their order. The delta rule has to add up
// what the key finds before it writes; all its rows are one part.
#pragma once

#include "linear.cuh"

namespace attnext {
namespace cuda {

template <class T>
struct Step {
  static constexpr int kThreads = kStepThreads, kRows = kStepHeld * kStepGroups;
  static constexpr int kTokens = kStepTokens, kHeld = kStepHeld;

  struct Shared {
    float query[kTokens][kRows], key[kTokens][kRows];
    float value[kTokens][kStepColumns];
    float sums[kTokens][kThreads], found[kTokens][kThreads];
    float kept[kTokens], beta[kTokens], denominator[kTokens];
  };

  const LinearStepLaunch& launch;
  const LinearParams& p;
  Shared& shared;
  uint32_t batch, head;
  // Of the block's item and head, at its first token.
  const T *query, *key, *value;
  const float *decay, *beta;
  T* out;
  float* state;
  int features, width, groups, column, group;

  ATTNEXT_DEVICE Step(const LinearStepLaunch& given, Shared& room)
      : launch(given), p(given.step.problem), shared(room) {
    features = launch.features, width = launch.width, groups = launch.groups;
    group = threadIdx.x / width, column = threadIdx.x % width;
  }

  ATTNEXT_DEVICE void run() {
    uint32_t block = blockIdx.x;
    const uint32_t tiles = launch.tiles, in_grid = p.normalize ? 1 : tiles;
    const int tile = block % in_grid;
    block /= in_grid;
    head = block % static_cast<uint32_t>(p.heads);
    batch = block / static_cast<uint32_t>(p.heads);
    query = place_of<const T>(p.query, p.query_heads);
    key = place_of<const T>(p.key, p.key_heads);
    value = place_of<const T>(p.value, p.value_heads);
    decay = place_of<const float>(p.decay, p.heads);
    beta = place_of<const float>(p.beta, p.heads);
    out = place_of<T>(p.out, p.heads);
    const int64_t slot = launch.step.slots ? launch.step.slots[batch] : batch;
    const bool there = slot >= 0 && slot < launch.step.num_states;
    state = static_cast<float*>(launch.step.state) + (there ? slot : 0) * launch.step.slot_stride +
            head * launch.step.head_stride;
#pragma unroll 1
    for (int64_t first = 0; first < p.tokens; first += kTokens) {
      const int count = static_cast<int>(min(p.tokens - first, int64_t(kTokens)));
      if (!there) {
        store_nothing(first, count, tile * width, slot == -1 ? 0.f : __uint_as_float(0x7fffffff));
        continue;
      }
#pragma unroll 1
      for (int c = p.normalize ? launch.tiles - 1 : tile; c >= (p.normalize ? 0 : tile); --c) {
        step(first, count, c * width);
      }
    }
  }

 private:
  template <class U>
  ATTNEXT_DEVICE U* place_of(const TensorRef& t, int64_t heads) const {
    const uint32_t group_size = static_cast<uint32_t>(p.heads) / static_cast<uint32_t>(heads);
    return static_cast<U*>(t.data) + batch * t.batch + head / group_size * t.head;
  }
  ATTNEXT_DEVICE bool is_there(int column0) const {
    return group < groups && column0 + column < launch.columns;
  }
  ATTNEXT_DEVICE float* place(int column0, int f) const {
    return state + f * launch.step.feature_stride + column0 + column;
  }

  // No state: 0; one that there cannot be: NaN.
  ATTNEXT_DEVICE void store_nothing(int64_t first, int count, int column0, float x) const {
    const int64_t end = p.normalize ? p.head_dim_v : min(p.head_dim_v, int64_t(column0 + width));
#pragma unroll 1
    for (int t = 0; t < count; ++t) {
#pragma unroll 1
      for (int64_t c = column0 + threadIdx.x; c < end; c += blockDim.x) {
        out[(first + t) * p.out.token[2] + c] = Number<T>::narrow(x);
      }
    }
  }

  ATTNEXT_DEVICE void step(int64_t first, int count, int column0) {
    __syncthreads();  // the tile before has been stored
    read_tokens(first, count, column0);
    const bool live = is_there(column0);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) shared.sums[t][threadIdx.x] = 0.f;
    const int rows = kHeld * groups;
#pragma unroll 1
    for (int row0 = 0; row0 < features; row0 += rows) {
      float s[kHeld];
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int f = row0 + i * groups + group;
        s[i] = live && f < features ? *place(column0, f) : 0.f;
      }
      if (row0 > 0) __syncthreads();  // the features before have been read
      make_features(first, count, row0, rows);
      __syncthreads();
#pragma unroll 1
      for (int t = 0; t < count; ++t) update(t, s);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int f = row0 + i * groups + group;
        if (live && f < features) *place(column0, f) = s[i];
      }
    }
    __syncthreads();  // the sums are there
    store_outputs(first, count, column0);
  }

  ATTNEXT_DEVICE void read_tokens(int64_t first, int count, int column0) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < count * width; i += blockDim.x) {
      const int t = i / width, c = column0 + i % width;
      const T* from = value + (first + t) * p.value.token[2];
      shared.value[t][i % width] = c < p.head_dim_v ? Number<T>::widen(from[c]) : 1.f;
    }
    const int t = threadIdx.x;
    if (t >= count) return;
    constexpr float kLeast = -1000.f;  // its exponential is 0; -inf would leave NaN
    float kept = 1.f;
    if (p.decay.data) {
      const float x = decay[(first + t) * p.decay.token[2]];
      kept = power((x < kLeast ? kLeast : x) * static_cast<float>(kLog2E));
    }
    shared.kept[t] = kept;
    if (p.beta.data) shared.beta[t] = beta[(first + t) * p.beta.token[2]];
  }

  // Of rows row0 to row0 + rows; zeros where there are none. The scale is in those of queries.
  ATTNEXT_DEVICE void make_features(int64_t first, int count, int row0, int rows) const {
    const int dim = static_cast<int>(p.head_dim);
    const float scale = static_cast<float>(p.scale);
#pragma unroll 1
    for (int r = threadIdx.x; r < rows; r += blockDim.x) {
      const int f = row0 + r;
      int a = f, b = -1;  // x_a, or x_a x_b; a < 0: 1
      if (p.feature_map == FeatureMap::kTaylor2) {
        a = f - 1;
        if (f > dim && f < features) {
          a = 0, b = f - 1 - dim;
#pragma unroll 1
          while (b >= dim - a) b -= dim - a, ++a;
          b += a;
        }
      }
#pragma unroll 1
      for (int t = 0; t < count; ++t) {
        const T* of_query = query + (first + t) * p.query.token[2];
        const T* of_key = key + (first + t) * p.key.token[2];
        float q = 0.f, k = 0.f;
        if (f < features && a < 0) {
          q = k = 1.f;
        } else if (f < features) {
          q = feature(p.feature_map, Number<T>::widen(of_query[a])) * scale;
          k = feature(p.feature_map, Number<T>::widen(of_key[a]));
          if (b >= 0) {
            q *= Number<T>::widen(of_query[b]) * scale * (a == b ? 0.5f : 1.f);
            k *= Number<T>::widen(of_key[b]);
          }
        }
        shared.query[t][r] = q, shared.key[t][r] = k;
      }
    }
  }

  ATTNEXT_DEVICE void update(int t, float (&s)[kHeld]) const {
    const float kept = shared.kept[t];
    const float* q = shared.query[t] + group;
    const float* k = shared.key[t] + group;
    float u = group < groups ? shared.value[t][column] : 0.f, sum = 0.f;
    if (p.beta.data) {
      float found = 0.f;
      if (group < groups) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i) found = fmaf(k[i * groups], s[i], found);
      }
      shared.found[t][threadIdx.x] = found;
      __syncthreads();
      found = 0.f;
#pragma unroll 1
      for (int g = 0; g < groups; ++g) found += shared.found[t][g * width + column];
      u = shared.beta[t] * (u - kept * found);
    }
    if (group >= groups) return;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      s[i] = fmaf(u, k[i * groups], s[i] * kept);
      sum = fmaf(s[i], q[i * groups], sum);
    }
    shared.sums[t][threadIdx.x] += sum;
  }

  ATTNEXT_DEVICE float total(int t, int c) const {
    float sum = 0.f;
#pragma unroll 1
    for (int g = 0; g < groups; ++g) sum += shared.sums[t][g * width + c];
    return sum;
  }
  ATTNEXT_DEVICE void store_outputs(int64_t first, int count, int column0) const {
    const int dim = static_cast<int>(p.head_dim_v), of_sums = dim - column0;
    if (p.normalize && of_sums < width) {  // the first tile
      const int t = threadIdx.x;
      if (t < count) {
        const float sum = total(t, of_sums), eps = static_cast<float>(p.eps);
        shared.denominator[t] = sum < 0.f ? sum - eps : sum + eps;
      }
      __syncthreads();
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < count * width; i += blockDim.x) {
      const int t = i / width, c = i % width;
      if (column0 + c >= dim) continue;
      float x = total(t, c);
      if (p.normalize) x /= shared.denominator[t];
      out[(first + t) * p.out.token[2] + column0 + c] = Number<T>::narrow(x);
    }
  }
};

#define ATTNEXT_STEP(name, T)                                \
  extern "C" __global__ void __launch_bounds__(kStepThreads) \
      name(const __grid_constant__ LinearStepLaunch p) {     \
    __shared__ typename Step<T>::Shared shared;              \
    Step<T>(p, shared).run();                                \
  }

}  // namespace cuda
}  // namespace attnext
