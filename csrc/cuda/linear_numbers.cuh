// SPDX-License-Identifier: Apache-2.0
// What a scan knows of its tokens: decays and numbers, a chunk ahead.
#pragma once

#include "linear_scan.cuh"

namespace attnext {
namespace cuda {

ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::look_at(int at, Next& next) const {
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int row = at + lane * kPer + i;
    next.decay[i] = 0.f;
    next.number[i] = make_float2(0.f, 0.f);
    if (!is_token(row) || !is_lanes(i)) continue;
    if (decays()) {
      next.decay[i] = static_cast<const float*>(p.decay.data)[tokens().offset(p.decay, 1, row)];
    }
    if constexpr (kDelta || kDeltaBack) {
      next.number[i].y = static_cast<const float*>(p.beta.data)[tokens().offset(p.beta, 1, row)];
    } else if (!is_on(Side::kNone)) {
      next.number[i] = reinterpret_cast<const float2*>(p.numbers)[tokens().index(p, row)];
    }
  }
}

// In double: a difference of two sums is exact beside fp32, whatever has gone by before.
ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::note(const Next& next, int buffer) {
  constexpr float kLeast = -1000.f;  // its exponential is 0; -inf would leave NaN
  double until[kPer], sum = 0.;
  float top = 0.f;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const double own = (next.decay[i] < kLeast ? kLeast : next.decay[i]) * kLog2E;
    sum += own;
    until[i] = p.exclusive ? sum - own : sum;
    top = fmaxf(top, fabsf(next.number[i].x));
  }
  double all = sum;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const double other = __shfl_up_sync(~0u, all, step);
    if (lane >= step) all += other;
    top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
  }
  const double before = all - sum, total = __shfl_sync(~0u, all, 31);
  float unit = 1.f, inverse = 1.f;
  if (is_on(Side::kB)) unit_of(top, 0, unit, inverse);
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    if (!is_lanes(i)) continue;
    const double decay = before + until[i];
    const float high = static_cast<float>(decay);
    numbers(buffer, lane * kPer + i) = {high, static_cast<float>(decay - high),
                                        next.number[i].x * inverse, next.number[i].y};
  }
  if (lane == 0) {
    const float high = static_cast<float>(total);
    totals(buffer) = {high, static_cast<float>(total - high), unit, power(high)};
  }
}

}  // namespace cuda
}  // namespace attnext
