// SPDX-License-Identifier: Apache-2.0
// What becomes of a scan's outputs beside products: gradients on their way back through feature
// maps, and rows whose values are not finite.
#pragma once

#include "linear_scan.cuh"

namespace attnext {
namespace cuda {

ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::pull_back(int row, int half, float factor,
                                                                 float (&out)[kColumns / 8][4]) {
  const bool live = is_token(row);
  const int dim = p.out.dim - slice * kColumns;
  const T* raw = static_cast<const T*>(p.raw.rows.data) + slice * kColumns;
  if (live) raw += tokens.offset(p.raw.rows, p.raw.group, first + row);
  float dot = 0.f;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = n * 8 + 2 * t + e;
      float& x = out[n][2 * half + e];
      x *= factor;
      if (!live || column >= dim) continue;
      const float f = feature(p.raw.map, Number<T>::widen(raw[column]));
      dot = fmaf(x, Number<T>::widen(Number<T>::narrow(f)), dot);  // as the products have it
      x *= feature_slope(p.raw.map, f);
    }
  }
  dot = quad_sum(dot);
  if (p.dots && live && t == 0) {
    p.dots[slice * p.batch * p.tokens * p.heads + tokens.index(p, first + row)] = dot;
  }
}

// The warp's own rows of a chunk: each value counts only where the mask lets it.
ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::add_own_rows(
    int stage, const float (&scores)[kChunk / 8][4], float (&out)[kColumns / 8][4]) const {
  float own[2][4];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w != warp) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) own[0][e] = scores[2 * w][e], own[1][e] = scores[2 * w + 1][e];
  }
  const int last = g - (kGated && p.strict ? 1 : 0);
#pragma unroll 1
  for (int from = 0; from < 4; ++from) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = i / 2 * 8 + 2 * from + i % 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float score = __shfl_sync(~0u, own[i / 2][2 * half + i % 2], lane / 4 * 4 + from);
        const float weight = Number<T>::widen(Number<T>::narrow(score));
        if (j > last + half * 8) continue;
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = out[n][2 * half + e];
            x = fmaf(weight, Number<T>::widen(value(stage, warp * 16 + j, n * 8 + 2 * t + e)), x);
          }
        }
      }
    }
  }
}

}  // namespace cuda
}  // namespace attnext
