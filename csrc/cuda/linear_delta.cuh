// SPDX-License-Identifier: Apache-2.0
// The delta rule in a scan (arXiv 2406.06484): the triangular system of a chunk.
#pragma once

#include "linear_scan.cuh"

namespace attnext {
namespace cuda {

// What is written, u_i = beta_i (v_i - decay k_i S - sum over j < i of decay (k_i k_j) u_j),
// takes the place of the values: 16 tokens after 16, those within by substitution, in fp32.
ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::replace_values(int stage) {
  const int buffer = stage;
  Rows rows;
  rows.load(tile(stage, 1), warp * 16);
  float by_key[1][kChunk / 8][4], u[1][kColumns / 8][4];
  product<T, kRaw, 1, kChunk, kKept>(by_key, rows, wide, tile(stage, 1), warp * 16 + 16);
  product<T, kPanel, 1, kColumns, kKept>(u, rows, wide, state_tile(0));
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * 16 + half * 8 + g;
    const Numbers mine = numbers(buffer, row);
    const float beta = mine.entry, kept = decays() ? power(mine.decay) : 1.f;
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = by_key[0][n][2 * half + e];
        const int j = n * 8 + 2 * t + e;
        if (decays()) {
          const Numbers other = numbers(buffer, j);
          x *= power((mine.decay - other.decay) + (mine.rest - other.rest));
        }
        x = j < row ? -beta * x : 0.f;
      }
    }
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      const float of_state = kUnits ? kept * units()[n / 2] : kept;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = u[0][n][2 * half + e];
        x = beta * (Number<T>::widen(value(stage, row, n * 8 + 2 * t + e)) - of_state * x);
      }
    }
  }
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (warp == w) {
      accumulate<T, kColumns, kColumns, 1, kChunk>(u, by_key, narrow, tile(stage, 2), 0, w * 16);
      substitute(by_key[0][2 * w], by_key[0][2 * w + 1], u[0]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            value(stage, w * 16 + half * 8 + g, n * 8 + 2 * t + e) =
                Number<T>::narrow(u[0][n][2 * half + e]);
          }
        }
      }
    }
    __syncthreads();  // the next warp reads them
  }
}

// u_i += sum over j < i of weights_ij u_j, for 16 rows from the first to the last.
ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::substitute(
    const float (&low)[4], const float (&high)[4], float (&u)[kColumns / 8][4]) const {
#pragma unroll
  for (int j = 0; j < 15; ++j) {
    const int from = lane / 4 * 4 + j % 8 / 2, row = j % 8 * 4 + t;
    const float above = __shfl_sync(~0u, j < 8 ? low[j % 2] : high[j % 2], from);
    const float below = __shfl_sync(~0u, j < 8 ? low[2 + j % 2] : high[2 + j % 2], from);
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float x = __shfl_sync(~0u, u[n][j / 8 * 2 + e], row);
        u[n][e] = fmaf(above, x, u[n][e]);
        u[n][2 + e] = fmaf(below, x, u[n][2 + e]);
      }
    }
  }
}

}  // namespace cuda
}  // namespace attnext
