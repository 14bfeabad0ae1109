// SPDX-License-Identifier: Apache-2.0
// The delta rule in a scan (arXiv 2406.06484): the triangular system of a chunk.
#pragma once

#include "linear_scan.cuh"

namespace attnext {
namespace cuda {

// What is written, u_i = beta_i e_i, takes the place of the values, where
// e_i = v_i - decay k_i S - sum over j < i of decay (k_i k_j) u_j.
ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::replace_values(int at, int stage) {
  Rows rows;
  rows.load(tile(stage, 1), warp * 16);
  float by_key[1][kChunk / 8][4], e[1][kColumns / 8][4] = {};
  find_key_products(stage, 1, rows, by_key);
  add_state_product(e, rows, 0);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * 16 + half * 8 + g;
    const float kept = decays() ? power(numbers(stage, row).decay) : 1.f;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      const float of_state = kUnits ? kept * units()[n / 2] : kept;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = e[0][n][2 * half + i];
        x = Number<T>::widen(value(stage, row, n * 8 + 2 * t + i)) - of_state * x;
      }
    }
  }
  solve(stage, by_key, e);
  if (!solves()) return;
  const float beta[2] = {beta_of(stage, 0), beta_of(stage, 1)}, one[2] = {1.f, 1.f};
  store_numbers<T>(p.written, at, e[0], beta);
  if (p.lacking.rows.data) store_numbers<T>(p.lacking, at, e[0], one);
}

// Against the order of tokens, `out` is the gradient of what a token has written as far as it comes
// from outputs. Less what e_i takes off for those after it, it is y; h_i = -beta_i y_i, the
// gradient of all that e_i takes off, goes back to them like another output's, with keys for
// queries:
//   y_j = out_j + sum over i > j of decay (k_i k_j) h_i.
ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::replace_gradients(
    int at, int stage, const Rows& rows, float (&out)[1][kColumns / 8][4]) {
  float by_key[1][kChunk / 8][4];
  find_key_products(stage, 0, rows, by_key);
  add_chunk(stage);
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) out[0][n][e] = -out[0][n][e];  // -y: h without its beta
  }
  __syncthreads();  // outputs' gradients have been read
  solve(stage, by_key, out);
  add_products(stage, 0, 1.f, 1.f);
  const float beta[2] = {beta_of(stage, 0), beta_of(stage, 1)}, less[2] = {-beta[0], -beta[1]};
  store_numbers<T>(p.written, at, out[0], beta);
  if (sizeof(T) == 2 && p.out_fp32) {
    store_numbers<float>(p.out, at, out[0], less);
  } else {
    store_numbers<T>(p.out, at, out[0], less);
  }
  if (!p.dots) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = at + warp * 16 + half * 8 + g;
    const bool live = is_token(row);
    const T* lacking = static_cast<const T*>(p.lacking.rows.data) + slice * kColumns;
    if (live) lacking += tokens().offset(p.lacking.rows, 1, row);
    float dot = 0.f;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = n * 8 + 2 * t + e;
        if (!live || slice * kColumns + column >= p.lacking.dim) continue;
        dot = fmaf(out[0][n][2 * half + e], Number<T>::widen(lacking[column]), dot);
      }
    }
    dot = quad_sum(dot);
    if (live && t == 0) {
      p.dots[slice * p.batch * p.tokens * p.heads + tokens().index(p, row)] = -dot;
    }
  }
}

// Of a row with those before it, decayed and negative; times beta where the row's own warp has
// them, which knows of them what is not multiplied by it yet.
ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::find_key_products(
    int stage, int operand, const Rows& rows, float (&by_key)[1][kChunk / 8][4]) const {
  walked_product<T, kRaw, kChunk, kKept>(by_key, rows, wide, tile(stage, operand), warp * 16 + 16);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * 16 + half * 8 + g;
    const Numbers mine = numbers(stage, row);
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = by_key[0][n][2 * half + e];
        const int j = n * 8 + 2 * t + e;
        const Numbers other = numbers(stage, j);
        if (decays()) x *= power((mine.decay - other.decay) + (mine.rest - other.rest));
        if (n / 2 == warp) x *= other.entry;
        x = j < row ? -x : 0.f;
      }
    }
  }
}

// u += by_key times what earlier rows have made of theirs, 16 rows after 16, those within by
// substitution, in fp32. Times beta, it takes its place in the tile of c.
ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::solve(
    int stage, const float (&by_key)[1][kChunk / 8][4], float (&u)[1][kColumns / 8][4]) const {
  float own[2][4];
  find_own(by_key[0], own);
#pragma unroll 1
  for (int w = 0; w < kWarps; ++w) {
    if (warp == w) {
      accumulate_finely<T, kColumns, kChunk>(u, by_key, narrow(), tile(stage, 2), w * 16);
      substitute(own[0], own[1], u[0]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float beta = beta_of(stage, half);
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            value(stage, w * 16 + half * 8 + g, n * 8 + 2 * t + e) =
                Number<T>::narrow(beta * u[0][n][2 * half + e]);
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
  for (int half = 0; half < 2; ++half) {
    const float (&weights)[4] = half ? high : low;
#pragma unroll 1
    for (int pair = 0; pair < 4; ++pair) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int j = 2 * pair + odd;  // of the half
        const float above = __shfl_sync(~0u, weights[odd], lane / 4 * 4 + pair);
        const float below = __shfl_sync(~0u, weights[2 + odd], lane / 4 * 4 + pair);
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float x = __shfl_sync(~0u, u[n][half * 2 + e], j * 4 + t);
            // Also where x is not finite.
            if (half == 0 && j < g) u[n][e] = fmaf(above, x, u[n][e]);
            if (half == 0 || j < g) u[n][2 + e] = fmaf(below, x, u[n][2 + e]);
          }
        }
      }
    }
  }
}

}  // namespace cuda
}  // namespace attnext
