// SPDX-License-Identifier: Apache-2.0
// The state of a scan: what a chunk adds to it, its copy for products, and its places in tensors.
#pragma once

#include "linear_scan.cuh"

namespace attnext {
namespace cuda {

template <class T, int kDim, int kWarps, ScanKind kKind>
template <class Visit>
ATTNEXT_DEVICE void Scan<T, kDim, kWarps, kKind>::each_z(Visit visit) const {
  if (!has_sums() && !is_further()) return;
#pragma unroll 1
  for (int i = threadIdx.x; i < (has_sums() ? kDim : kColumns); i += kThreads) {
    const int at = has_sums() ? state_row(i) : state_column(slice * kColumns + i);
    if (at >= 0) visit(i, p.z_offset + at * p.z_stride);
  }
}

template <class T, int kDim, int kWarps, ScanKind kKind>
template <class Visit>
ATTNEXT_DEVICE void Scan<T, kDim, kWarps, kKind>::each_state(Visit visit) const {
  int64_t columns[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int column = state_column(slice * kColumns + warp * 16 + half * 8 + g);
    columns[half] = column < 0 ? -1 : column * p.column_stride;
  }
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (kExpanded && !kIsWide && n * 8 + e > kEntries * (kEntries + 3) / 2) continue;
      const int row = state_row(n * 8 + 2 * t + e);
      if (row < 0) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (columns[half] < 0) continue;
        visit(n, 2 * half + e, row * p.row_stride + columns[half]);
      }
    }
  }
}

ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::add_chunk(int stage) {
  float kept = 1.f, unit = p.inner_scale;
  if constexpr (kGated) kept = totals(stage).kept, unit *= totals(stage).unit;
  kept_all *= kept;
  add_products(stage, 1, kept, unit);
}

ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::add_products(int stage, int operand,
                                                                    float kept, float unit) {
  typename P::Left c[kSteps];
  float more[2] = {0.f, 0.f};
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    c[k] = TransposedLeft<T, kColumns>::load(c_tile(stage), k * kDepth,
                                             warp * 16 / Layout<T, kColumns>::kElems);
    float w[kMine], entry[kMine];
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const Weight x = weight_of(stage, k * kDepth + contraction_row<T>(i));
      w[i] = x.by, entry[i] = x.entry;
    }
    if (is_further()) {
      visit_left<true, T>(c[k], [&](int half, int i, float x) {
        const int at = sizeof(T) == 4 ? i % 2 : i / 8 * 2 + i % 2;
        more[half] = fmaf(x, w[at] * entry[at], more[half]);
      });
    }
    if constexpr (kGated) weigh<T>(c[k], w);
  }
  if constexpr (kHasFurther) further[0] = more[0], further[1] = more[1];
#pragma unroll
  for (int n = 0; n < kDim / 16; ++n) {
    float part[2][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const auto b = P::template load_right_transposed<kPanel>(
          features(stage, operand, n * 16 / kPanel) + wide.transposed, k * kDepth,
          n * 16 % kPanel / Wide::kElems);
      P::multiply(part[0], part[1], c[k], b);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& x = state[2 * n + half][e];
        x = fmaf(part[half][e], unit, kGated ? x * kept : x);
      }
    }
  }
}

// To z: of some of the features by each warp, weighted.
ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::add_sums(int stage) const {
  float kept = 1.f, unit = p.inner_scale;
  if constexpr (kGated) kept = totals(stage).kept, unit *= totals(stage).unit;
  if (is_further()) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      add_sum(warp * 16 + half * 8 + g, kept, quad_sum(further[half]) * unit);
    }
  }
  if (!has_sums()) return;
  float w[kSteps][kMine];
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const Weight x = weight_of(stage, k * kDepth + contraction_row<T>(i));
      w[k][i] = x.by * x.entry;
    }
  }
#pragma unroll
  for (int n = warp; n < kDim / 16; n += kWarps) {
    float sum[2] = {0.f, 0.f};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const auto b = P::template load_right_transposed<kPanel>(
          features(stage, 1, n * 16 / kPanel) + wide.transposed, k * kDepth,
          n * 16 % kPanel / Wide::kElems);
      visit_right<T>(b, [&](int half, int j, float x) { sum[half] = fmaf(x, w[k][j], sum[half]); });
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      add_sum(n * 16 + half * 8 + g, kept, quad_sum(sum[half]) * unit);
    }
  }
}

ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::leave(int c) const {
  float4* to = left_at(segment * (p.segment / kChunk) + c);
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
    to[n * kThreads] = make_float4(state[n][0], state[n][1], state[n][2], state[n][3]);
  }
  const int mine = warp * 16 + g;
  to[kDim / 8 * kThreads] =
      make_float4(load_shared_float(z(mine)), load_shared_float(z(mine + 8)), 0.f, 0.f);
}

ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::meet(int c, int stage) const {
  const int64_t per = p.segment / kChunk;
  const int64_t all = ((tokens().count() + p.segment - 1) / p.segment + segment) * per;
  const int64_t chunk = all - 1 - segment * per - c;
  const float4* from = left_at(chunk);
  float sum = 0.f;
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
    const float4 x = from[n * kThreads];
    sum += (x.x * state[n][0] + x.y * state[n][1]) + (x.z * state[n][2] + x.w * state[n][3]);
  }
  if (is_further() && t == 0) {
    const float4 x = from[kDim / 8 * kThreads];
    const int mine = warp * 16 + g;
    sum += x.x * load_shared_float(z(mine)) + x.y * load_shared_float(z(mine + 8));
  }
  sum = warp_sum(sum) * totals(stage).kept;
  if (lane == 0) p.meetings[boundary(chunk) * kWarps + warp] = sum;
}

// Rounded, for products with a; or what it lacks by that.
template <class T, int kDim, int kWarps, ScanKind kKind>
template <bool kRest>
ATTNEXT_DEVICE void Scan<T, kDim, kWarps, kKind>::copy_state() const {
  float unit = 1.f, inverse = 1.f;
  if constexpr (kUnits) {
    float top = 0.f;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) top = fmaxf(top, fabsf(state[n][e]));
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    unit_of(top, 14, unit, inverse);
    if (lane == 0) units()[warp] = unit;
  }
  const auto number = [&](int n, int e) {
    const float x = state[n][e] * inverse;
    return kRest ? x - Number<T>::widen(Number<T>::narrow(x)) : x;
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * 16 + half * 8 + g;
    if constexpr (sizeof(T) == 4) {
      const auto places = Wide::places(state_tile(0), row);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const uint32_t at = places(n % (kPanel / 8)) + (state_tile(n * 8 / kPanel) - state_tile(0));
        // Neighbouring rows share banks: one stores its first number while the other its second.
        const int odd = g % 2;
        const float x = number(n, 2 * half), y = number(n, 2 * half + 1);
        store_shared(at + odd * 4, __float_as_uint(odd ? y : x));
        store_shared(at + 4 - odd * 4, __float_as_uint(odd ? x : y));
      }
    } else {
#pragma unroll
      for (int n = 0; n < kDim / 8; n += kBlock / 8) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          words[i] = Number<T>::pack(number(n + i, 2 * half), number(n + i, 2 * half + 1));
        }
        uint4 whole;
        memcpy(&whole, words, 16);
        store_shared(block_of_state(n * 8, row), whole);
      }
    }
  }
}

ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::add_state_product(
    float (&out)[1][kColumns / 8][4], const Rows& rows, int panel) const {
  if constexpr (sizeof(T) == 4) {
    add_product<T, kPanel, 1, kColumns, kKept>(out, rows, wide, state_tile(panel));
  } else {
#pragma unroll
    for (int f = 0; f < kPanel; f += kBlock) {
      const auto low = rows(0, f / kDepth), high = rows(0, f / kDepth + 1);
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        const uint4 b = load_shared(block_of_state(panel * kPanel + f, n * 8 + g));
        P::multiply(out[0][n], low, b.x, b.y);
        P::multiply(out[0][n], high, b.z, b.w);
      }
    }
  }
}

ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::find_places() const {
  if constexpr (kExpanded && !kIsWide) {
    __syncthreads();
#pragma unroll 1
    for (int f = threadIdx.x; f < kDim; f += kThreads) places()[f] = place_of_feature(f, p.b.dim);
    __syncthreads();
  }
}

ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::load_state() {
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) state[n][0] = state[n][1] = state[n][2] = state[n][3] = 0.f;
#pragma unroll 1
  for (int i = threadIdx.x; i < S::kSums; i += kThreads) store_shared(z(i), 0u);
  if (!p.before) return;
  find_places();
  const float* from = p.before + state_of(p.before_segments);
  each_state([&](int n, int e, int64_t at) { state[n][e] = from[at]; });
  each_z([&](int i, int64_t at) { store_shared(z(i), __float_as_uint(from[at])); });
}

ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::store_state() const {
  if (!p.after) return;
  find_places();
  float* to = p.after + state_of(p.after_segments);
  each_state([&](int n, int e, int64_t at) { to[at] = state[n][e]; });
  __syncthreads();  // z is complete
  if (slice == 0 || is_further()) {
    each_z([&](int i, int64_t at) { to[at] = load_shared_float(z(i)); });
  }
  if (kHasSums && p.factors && slice == 0 && part == 0 && threadIdx.x == 0) {
    p.factors[(int64_t(sequence) * p.after_segments + segment) * p.heads + head] = kept_all;
  }
}

}  // namespace cuda
}  // namespace attnext
