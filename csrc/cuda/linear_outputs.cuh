// SPDX-License-Identifier: Apache-2.0
// A scan's outputs: what tokens get from the state and from each other, gradients on their way back
// through feature maps, and rows whose values are not finite.
#pragma once

#include "linear_scan.cuh"

namespace attnext {
namespace cuda {

ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::attend(int at, int stage) {
  const int buffer = stage, walked = walks();
  Rows rows;
  rows.load(features(stage, 0, 0), warp * 16);
  Numbers mine[2] = {{0.f, 0.f, 1.f, 1.f}, {0.f, 0.f, 1.f, 1.f}};
  float unit = 1.f;
  if constexpr (kGated) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Numbers known = numbers(buffer, warp * 16 + half * 8 + g);
      mine[half].decay = known.decay, mine[half].rest = known.rest;
      if (is_on(Side::kA)) mine[half].factor = known.factor, mine[half].entry = known.entry;
    }
    unit = totals(buffer).unit;
  }

  float out[1][kColumns / 8][4], factor[1][2];
  float by_z[2] = {0.f, 0.f};
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
    out[0][n][0] = out[0][n][1] = out[0][n][2] = out[0][n][3] = 0.f;
  }
#pragma unroll
  for (int panel = 0; panel < S::kPanels; ++panel) {
    rows.below = panel * S::kPanelTile;
    add_state_product(out, rows, panel);
    if (has_sums()) add_products_with_z(rows, panel * kPanel, by_z);
  }
  if constexpr (kFinerState) {
    if (p.meetings) {
      __syncthreads();  // all have read the copy
      copy_state<true>();
      __syncthreads();
      add_state_product(out, rows, 0);
    }
  }
  float scores[1][kChunk / 8][4], sum[2] = {0.f, 0.f};
  if (is_within()) {
    if constexpr (kExpanded) rows.load(tile(stage, 0), warp * 16), rows.below = 0;
    walked_product<T, kRaw, kChunk, kKept, kRawChunks / 2>(scores, rows, wide, tile(stage, 1),
                                                           walked);
    finish_scores(scores[0], buffer, mine, walked, sum);
    if constexpr (kFolded) times_slope(scores, at, stage, walked, mine, unit);
  } else {  // never read; but undefined on one way, they would be kept during all of the loop
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
      scores[0][n][0] = scores[0][n][1] = scores[0][n][2] = scores[0][n][3] = 0.f;
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float by = kScaledLate ? p.outer_scale : p.scale;
    if (decays()) by *= power(mine[half].decay);
    factor[0][half] = kUnscaled     ? 1.f
                      : kScaledLate ? p.scale * p.inner_scale
                                    : mine[half].factor * unit;
    if (has_sums()) {
      const float total = quad_sum(fmaf(by, by_z[half], sum[half]));
      const float late = kScaledLate ? factor[0][half] : 1.f;
      const int row = at + warp * 16 + half * 8 + g;
      factor[0][half] = late * (kIsWide ? store_part(total, row) : divide_by(total * late, row));
    }
    if constexpr (kGated) by /= unit;
    if (kUnscaled || (kScaledLate && kSpares && by == 1.f)) continue;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      const float of_state = kUnits ? by * units()[n / 2] : by;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = out[0][n][2 * half + e];
        x *= of_state;
        if (is_further()) {
          x += by * mine[half].entry * load_shared_float(z(n * 8 + 2 * t + e));
        }
      }
    }
  }
  if constexpr (kFolded) {
    if constexpr (kIsWide) {
      fold_wide(at, stage, out[0], scores, factor[0], walked);
    } else {
      fold(at, stage, out[0], scores, factor[0], walked);
    }
    return;
  }
  if (kPullsBack && p.meetings) note_state_dots(at, out[0], factor[0]);
  float self[2] = {0.f, 0.f};
  if (is_within()) {
    if (kPullsBack && p.dots) take_self(scores[0], self);
    const bool apart = !are_own_rows_finite(stage);
    accumulate_finely<T, kColumns, kChunk>(out, scores, narrow(), tile(stage, 2),
                                           apart ? warp * 16 : walked);
    if (apart) add_own_rows(stage, scores[0], out[0]);
  }
  if constexpr (kUnscaled) {
    if (has_sums()) scale(out[0], factor[0]);
    factor[0][0] = factor[0][1] = 1.f;
  }
  if constexpr (kDeltaBack) {
    replace_gradients(at, stage, rows, out);
  } else {
    finish(at, stage, out, factor, self);
  }
}

ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::add_products_with_z(const Rows& rows,
                                                                           int first_feature,
                                                                           float (&by_z)[2]) const {
#pragma unroll
  for (int k = 0; k < Rows::kSteps; ++k) {
    visit_left<false, T>(rows(0, k), [&](int half, int i, float x) {
      by_z[half] = fmaf(x, load_shared_float(z(first_feature + k * kDepth + i)), by_z[half]);
    });
  }
}

ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::finish(int at, int stage,
                                                              float (&out)[1][kColumns / 8][4],
                                                              float (&factor)[1][2],
                                                              const float (&self)[2]) {
  if (kPullsBack && p.raw.rows.data) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      pull_back(at, stage, half, factor[0][half], self[half], out[0]);
      factor[0][half] = 1.f;
    }
  }
  const int dim = p.out.dim - slice * kColumns;
  if constexpr (kIsWide) {
    ScanRows to = p.out;
    to.rows.data = static_cast<float*>(to.rows.data) +
                   part * p.batch * p.tokens * p.heads * static_cast<int64_t>(p.out.dim);
    store_numbers<float>(to, at, out[0], factor[0]);
    return;
  }
  if (sizeof(T) == 2 && kGated && (kPullsBack || kExpanded) && p.out_fp32) {
    store_numbers<float>(p.out, at, out[0], factor[0]);
    return;
  }
  constexpr int kRowBytes = S::kOutApart ? Layout<T, kColumns>::kRowBytes : Wide::kRowBytes;
  const uint32_t room =
      (S::kOutApart ? shared + S::kOutAt : features(stage, 0, 0)) + warp * 16 * kRowBytes;
  const uint64_t start = next_out;
  next_out += int64_t(p.out.stride) * kChunk;
  uint64_t address = 0;
  const bool even = is_whole(at) && p.out.stride != 0 && dim >= kColumns;
  if (!even) {
    const int row = at + warp * 16 + lane;
    if (lane < 16 && is_token(row)) {
      address = reinterpret_cast<uint64_t>(static_cast<T*>(p.out.rows.data) + slice * kColumns +
                                           tokens().offset(p.out.rows, 1, row));
    }
  }
#pragma unroll
  for (int column = 0; column < kColumns; column += kOut) {
    float part[1][kOut / 8][4];
    memcpy(part, out[0][column / 8], sizeof(part));
    if (even) {
      store_even_rows<T, kOut, kOut>(room, 0, part, factor, start + column * sizeof(T),
                                     p.out.stride);
    } else {
      store_rows<T, kOut, kOut, 1>(room, 0, part, factor,
                                   address ? address + column * sizeof(T) : 0, dim - column,
                                   p.out.aligned);
    }
  }
}

template <class T, int kDim, int kWarps, ScanKind kKind>
template <class Out>
ATTNEXT_DEVICE void Scan<T, kDim, kWarps, kKind>::store_numbers(const ScanRows& rows, int at,
                                                                const float (&out)[kColumns / 8][4],
                                                                const float (&factor)[2]) const {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = at + warp * 16 + half * 8 + g;
    if (!is_token(row)) continue;
    Out* to =
        static_cast<Out*>(rows.rows.data) + tokens().offset(rows.rows, 1, row) + slice * kColumns;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = n * 8 + 2 * t + e;
        if (slice * kColumns + column < rows.dim) {
          to[column] = Number<Out>::narrow(out[n][2 * half + e] * factor[half]);
        }
      }
    }
  }
}

// Scaled, decayed and masked.
ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::finish_scores(float (&scores)[kChunk / 8][4],
                                                                     int buffer,
                                                                     const Numbers (&mine)[2],
                                                                     int walked,
                                                                     float (&sum)[2]) const {
  const float scale = p.scale * p.inner_scale;
  const float linear = p.polynomial_scale, square = 0.5f * linear * linear;
  const int own = warp * 16 + g - (kPullsBack && p.strict ? 1 : 0);
  const auto finish = [&](int n, auto masked) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int j = n * 8 + 2 * t + e;
      Numbers other = {0.f, 0.f, 1.f, 1.f};
      if constexpr (kGated) {
        const Numbers known = numbers(buffer, j);
        other.decay = known.decay, other.rest = known.rest;
        if (is_on(Side::kB)) other.factor = known.factor, other.entry = known.entry;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& score = scores[n][2 * half + e];
        float x = score;
        if (is_further()) x += mine[half].entry * other.entry;
        if constexpr (kExpanded) x = fmaf(fmaf(x, square, linear), x, 1.f);
        if (decays()) {
          x *= power((mine[half].decay - other.decay) + (mine[half].rest - other.rest));
        }
        if constexpr (!kScaledLate) x *= scale * other.factor;
        const bool seen = !decltype(masked)::value || j <= own + half * 8;
        score = seen ? x : 0.f;
        if (!kSpares) sum[half] += score;
      }
    }
  };
#pragma unroll
  for (int n = 0; n < kChunk / 8; n += 2) {
    if (n * 8 >= walked) break;
    // Only the last rows of the walk are a warp's own. Code for both where it is short.
    if (!kGated && n + 2 < kChunk / 8 && n * 8 + 16 < walked) {
      finish(n, std::false_type());
      finish(n + 1, std::false_type());
    } else {
      finish(n, std::true_type());
      finish(n + 1, std::true_type());
    }
  }
  if (!kSpares || !has_sums()) return;  // by itself, or it becomes part of every call
#pragma unroll
  for (int n = 0; n < kChunk / 8; ++n) {
    if (n * 8 >= walked) break;
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e / 2] += scores[n][e];
  }
}

template <class T, int kDim, int kWarps, ScanKind kKind>
template <class Visit>
ATTNEXT_DEVICE void Scan<T, kDim, kWarps, kKind>::visit_raw(int row, int half,
                                                            float (&out)[kColumns / 8][4],
                                                            Visit visit) const {
  if (!is_token(row)) return;
  const int dim = p.out.dim - slice * kColumns;
  const T* raw = static_cast<const T*>(p.raw.rows.data) + slice * kColumns +
                 tokens().offset(p.raw.rows, p.raw.group, row);
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = n * 8 + 2 * t + e;
      if (column >= dim) continue;
      visit(out[n][2 * half + e], feature(p.raw.map, Number<T>::widen(raw[column])), column);
    }
  }
}

ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::take_self(float (&scores)[kChunk / 8][4],
                                                                 float (&self)[2]) const {
#pragma unroll
  for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (n * 8 + 2 * t + e % 2 != warp * 16 + e / 2 * 8 + g) continue;
      self[e / 2] = scores[n][e];
      scores[n][e] = 0.f;
    }
  }
  self[0] = quad_sum(self[0]), self[1] = quad_sum(self[1]);
}

ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::pull_back(int at, int stage, int half,
                                                                 float factor, float self,
                                                                 float (&out)[kColumns / 8][4]) {
  const int row = warp * 16 + half * 8 + g;
  float dot = 0.f;
  visit_raw(at + row, half, out, [&](float& x, float f, int column) {
    x *= factor;
    dot = fmaf(x, round(f), dot);
    if (p.dots) x = fmaf(self * factor, Number<T>::widen(value(stage, row, column)), x);
    x *= feature_slope(p.raw.map, f);
  });
  if (!p.dots) return;
  dot = quad_sum(dot);
  if (t == 0) store_dot(slice, at + row, dot);
}

ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::note_state_dots(
    int at, float (&out)[kColumns / 8][4], const float (&factor)[2]) const {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = at + warp * 16 + half * 8 + g;
    float dot = 0.f;
    visit_raw(row, half, out,
              [&](float x, float f, int) { dot = fmaf(x * factor[half], round(f), dot); });
    dot = quad_sum(dot);
    if (t == 0) store_dot(p.slices + slice, row, dot);
  }
}

ATTNEXT_SCAN_MEMBER bool Scan<T, kDim, kWarps, kKind>::are_own_rows_finite(int stage) const {
  float x[2][4] = {};  // sums of values times 0
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      x[0][0] = fmaf(value(stage, warp * 16 + i, lane % kColumns), 0.f, x[0][0]);
    }
  } else {
    const typename P::Left zeros = {{0, 0, 0, 0}};
#pragma unroll
    for (int d = 0; d < kColumns / 16; ++d) {
      const auto b = P::template load_right_transposed<kColumns>(
          tile(stage, 2) + narrow().transposed, warp * 16, d * 16 / Layout<T, kColumns>::kElems);
      P::multiply(x[0], x[1], zeros, b);
    }
  }
  const float sum = (x[0][0] + x[0][1]) + (x[1][0] + x[1][1]);  // all rows are the same
  return !__any_sync(~0u, sum != 0.f);
}

// Scores of the warp's own rows with each other.
ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::find_own(
    const float (&scores)[kChunk / 8][4], float (&own)[2][4]) const {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float x = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float score = in_register(scores[2 * w + half][e]);
        x = w == warp ? score : x;
      }
      own[half][e] = x;
    }
  }
}

// The warp's own rows of a chunk: each value counts only where the mask lets it.
ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::add_own_rows(
    int stage, const float (&scores)[kChunk / 8][4], float (&out)[kColumns / 8][4]) const {
  float own[2][4];
  find_own(scores, own);
  const int last = g - (kPullsBack && p.strict ? 1 : 0);
#pragma unroll 1
  for (int j = 0; j < 16; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float low = j < 8 ? own[0][2 * half] : own[1][2 * half];
      const float high = j < 8 ? own[0][2 * half + 1] : own[1][2 * half + 1];
      const float score = __shfl_sync(~0u, j % 2 ? high : low, lane / 4 * 4 + j % 8 / 2);
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

}  // namespace cuda
}  // namespace attnext
