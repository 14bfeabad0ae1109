// SPDX-License-Identifier: Apache-2.0
// What the kernels of linear attention share: fragments seen as numbers, feature maps, and where a
// block stands.
#pragma once

#include <type_traits>
#include <utility>

#include "linear_kernels.h"
#include "linear_plan.h"
#include "rows.cuh"

namespace attnext {
namespace cuda {

// ---- fragments ---------------------------------------------------------------------------------

// The transpose of rows row0 to row0 + kDepth and of 16 columns from `chunk` on, as a left operand:
// contracted in the order of Products::load_right_transposed.
template <class T, int kDim>
struct TransposedLeft {  // bf16 and fp16
  static ATTNEXT_DEVICE typename Products<T>::Left load(uint32_t tile, int row0, int chunk) {
    typename Products<T>::Left a;
    const uint32_t at = tile + (right_lane<T, kDim>() ^ static_cast<uint32_t>(chunk * 16));
    load_matrices_transposed(a.x, at + row0 * Layout<T, kDim>::kRowBytes);
    return a;
  }
};
template <int kDim>
struct TransposedLeft<float, kDim> {
  static ATTNEXT_DEVICE Products<float>::Left load(uint32_t tile, int row0, int chunk) {
    using L = Layout<float, kDim>;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    Products<float>::Left a;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // columns g and g + 8 of row 2t, then of row 2t + 1
      const uint32_t at = tile + L::at(row0 + 2 * t + i / 2, chunk + i % 2 * 2 + g / 4);
      Products<float>::split(load_shared_float(at + g % 4 * 4), a.high[i], a.low[i]);
    }
    return a;
  }
};

template <class T>
ATTNEXT_DEVICE void unpack(uint32_t x, float& low, float& high) {
  low = Number<T>::widen(T{static_cast<uint16_t>(x)});
  high = Number<T>::widen(T{static_cast<uint16_t>(x >> 16)});
}

// visit(half, k, x) for the numbers of a left operand: row g + 8 half, contraction index k. As
// load_left gives them, or `transposed` ones in fp32.
template <bool kTransposed, class T, class Left, class Visit>
ATTNEXT_DEVICE void visit_left(const Left& a, Visit visit) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      const int k = kTransposed ? 2 * t + i / 2 : t + i / 2 * 4;
      visit(i % 2, k, __uint_as_float(a.high[i]) + __uint_as_float(a.low[i]));
    } else {
      float low, high;
      unpack<T>(a.x[i], low, high);
      visit(i % 2, i / 2 * 8 + 2 * t, low);
      visit(i % 2, i / 2 * 8 + 2 * t + 1, high);
    }
  }
}
// visit(half, i, x) of a transposed right operand: column g + 8 half, and of the lane's rows the
// i-th: see contraction_row.
template <class T, class Right, class Visit>
ATTNEXT_DEVICE void visit_right(const Right& b, Visit visit) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      visit(i / 2, i % 2, __uint_as_float(b.high[i]) + __uint_as_float(b.low[i]));
    } else {
      float low, high;
      unpack<T>(b.x[i], low, high);
      visit(i / 2, i % 2 * 2, low);
      visit(i / 2, i % 2 * 2 + 1, high);
    }
  }
}
// A transposed left operand with its contraction index weighted: w of the lane's rows.
template <class T, class Left>
ATTNEXT_DEVICE void weigh(Left& a, const float* w) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      const float x = __uint_as_float(a.high[i]) + __uint_as_float(a.low[i]);
      Products<float>::split(x * w[i / 2], a.high[i], a.low[i]);
    } else {
      float low, high;
      unpack<T>(a.x[i], low, high);
      a.x[i] = Number<T>::pack(low * w[i / 2 * 2], high * w[i / 2 * 2 + 1]);
    }
  }
}
// The lane's rows of a step of the contraction: kDepth / 4 of them.
template <class T>
ATTNEXT_DEVICE int contraction_row(int i) {
  const int t = threadIdx.x % 4;
  return sizeof(T) == 4 ? 2 * t + i : i / 2 * 8 + 2 * t + i % 2;
}

// s = rows x walk^T as far as it is walked, 16 rows of the walk after 16: one question for each.
template <class T, int kDim, int kWalk, bool kKept,
          int kSteps = LeftRows<T, kDim, 1, kKept>::kSteps>
ATTNEXT_DEVICE void walked_product(float (&s)[1][kWalk / 8][4],
                                   const LeftRows<T, kDim, 1, kKept>& rows,
                                   const WalkLanes<T, kDim>& lanes, uint32_t walk_tile,
                                   int walked) {
  if constexpr (!kKept) {  // they would be read again for each
    product<T, kDim, 1, kWalk, kKept, kSteps>(s, rows, lanes, walk_tile, walked);
  } else {
#pragma unroll
    for (int n = 0; n < kWalk / 8; ++n) s[0][n][0] = s[0][n][1] = s[0][n][2] = s[0][n][3] = 0.f;
    const uint32_t at = walk_tile + lanes.right;
#pragma unroll
    for (int n = 0; n < kWalk / 16; ++n) {
      if (n * 16 >= walked) break;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const auto b = Products<T>::load_right((at ^ static_cast<uint32_t>(k * 32)) +
                                               n * 16 * Layout<T, kDim>::kRowBytes);
        Products<T>::multiply(s[0][2 * n], s[0][2 * n + 1], rows(0, k), b);
      }
    }
  }
}

// out += weights x the columns of the walk, as accumulate; weights of 16 bits are two numbers each,
// the second of which is what the first, rounded, lacks.
template <class T, int kDim, int kWalk>
ATTNEXT_DEVICE void accumulate_finely(float (&out)[1][kDim / 8][4],
                                      const float (&weights)[1][kWalk / 8][4],
                                      const WalkLanes<T, kDim>& lanes, uint32_t walk_tile,
                                      int walked) {
  using P = Products<T>;
  if constexpr (sizeof(T) == 4) {
    accumulate<T, kDim, kDim, 1, kWalk>(out, weights, lanes, walk_tile, 0, walked);
  } else {
    const uint32_t at = walk_tile + lanes.transposed;
#pragma unroll
    for (int k = 0; k < kWalk / 16; ++k) {
      if (k * 16 >= walked) break;
      const auto high = P::round(&weights[0][2 * k]);
      float rest[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float x, y;
        unpack<T>(high.x[i], x, y);
        const float (&of)[4] = weights[0][2 * k + i / 2];
        rest[i / 2][i % 2 * 2] = of[i % 2 * 2] - x;
        rest[i / 2][i % 2 * 2 + 1] = of[i % 2 * 2 + 1] - y;
      }
      const auto low = P::round(rest);
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
        const auto b =
            P::template load_right_transposed<kDim>(at, k * 16, d * 16 / Layout<T, kDim>::kElems);
        P::multiply(out[0][2 * d], out[0][2 * d + 1], low, b);
        P::multiply(out[0][2 * d], out[0][2 * d + 1], high, b);
      }
    }
  }
}

// ---- numbers -----------------------------------------------------------------------------------

// 2^x with nothing beyond the largest power; NaN stays.
ATTNEXT_DEVICE float power(float x) { return exp2_approx(x > 127.f ? 127.f : x); }

ATTNEXT_DEVICE float feature(FeatureMap map, float x) {
  if (map == FeatureMap::kElu) {
    const float above = x > 0.f ? x : 0.f, below = x > 0.f ? 0.f : x;
    return above + exp2_approx(below * static_cast<float>(kLog2E));
  }
  if (map == FeatureMap::kRelu) return x < 0.f ? 0.f : x;
  return x;
}
// d feature / dx, from the feature.
ATTNEXT_DEVICE float feature_slope(FeatureMap map, float f) {
  if (map == FeatureMap::kElu) return f > 1.f ? 1.f : f;
  if (map == FeatureMap::kRelu) return f <= 0.f ? 0.f : 1.f;
  return 1.f;
}

// The power of two by which |x| <= top becomes at most 2^most, and its inverse.
ATTNEXT_DEVICE void unit_of(float top, int most, float& unit, float& inverse) {
  const int exponent = static_cast<int>(__float_as_uint(top) >> 23 & 255) - 126 - most;
  const int e = top > 0.f ? min(max(exponent, -100), 100) : 0;
  unit = __uint_as_float(static_cast<uint32_t>(127 + e) << 23);
  inverse = __uint_as_float(static_cast<uint32_t>(127 - e) << 23);
}

// Taylor feature f > dim is x_a x_b; beyond the last one a is dim.
struct FeaturePair {
  int a, b;
};
constexpr ATTNEXT_DEVICE FeaturePair pair_of_feature(int f, int dim) {
  int a = 0, b = f - 1 - dim;
  while (a < dim && b >= dim - a) b -= dim - a, ++a;
  return {a, a + b};
}
// visit(n) for n < kCount, each a number that is known as it is compiled. Loops that the compiler
// is asked to unroll it may leave, and then looks for their numbers in memory.
template <class Visit, int... kNumbers>
ATTNEXT_DEVICE void each_number(std::integer_sequence<int, kNumbers...>, Visit visit) {
  (visit(std::integral_constant<int, kNumbers>()), ...);
}
template <int kCount, class Visit>
ATTNEXT_DEVICE void each_number(Visit visit) {
  each_number(std::make_integer_sequence<int, kCount>(), visit);
}
// The feature that is it, of kTaylorEntries.
constexpr ATTNEXT_DEVICE int feature_of_pair(int a, int b) {
  const int least = a < b ? a : b;
  return 1 + kTaylorEntries + least * kTaylorEntries - least * (least + 1) / 2 + (a < b ? b : a);
}
// Of kTaylorEntries, a feature's place in a tensor of states, where entries may be fewer; -1: none.
ATTNEXT_DEVICE int place_of_feature(int f, int dim) {
  if (f <= kTaylorEntries) return f <= dim ? f : -1;
  const auto [a, b] = pair_of_feature(f, kTaylorEntries);
  return b < dim ? 1 + dim + a * dim - a * (a - 1) / 2 + b - a : -1;
}

// ---- tokens ------------------------------------------------------------------------------------

// The tokens of one sequence in the order in which they are walked.
struct Tokens {
  int64_t batch, begin, end;
  int32_t head;
  uint32_t first_chunk;  // for the caller to set; scratch for more than 32 bits count is nowhere
  bool backwards;

  ATTNEXT_DEVICE void start(const LinearLaunch& p, int64_t sequence, int32_t of_head) {
    head = of_head;
    backwards = p.backwards;
    if (p.sequences) {
      const LinearSequence s = p.sequences[sequence];
      batch = s.batch, begin = s.begin, end = s.end;
    } else {
      batch = sequence / p.per_item;
      begin = sequence % p.per_item * p.length;
      end = min(begin + p.length, p.tokens);
    }
  }
  // Chunks of all sequences, in order, before its own: no more than of `chunk` tokens each, and one
  // for each sequence that may end within one.
  ATTNEXT_DEVICE int64_t chunks_before(const LinearLaunch& p, int64_t sequence,
                                       int32_t chunk) const {
    return (batch * p.tokens + begin) / chunk + sequence;
  }
  // From then on positions, and how many there are, count from `first`.
  ATTNEXT_DEVICE void begin_at(int64_t first) {
    if (backwards) {
      end -= first;
    } else {
      begin += first;
    }
  }
  ATTNEXT_DEVICE int64_t count() const { return end - begin; }
  ATTNEXT_DEVICE int64_t token(int64_t position) const {
    return backwards ? end - 1 - position : begin + position;
  }
  // Elements from the start of a tensor to the row of a position.
  ATTNEXT_DEVICE int64_t offset(const TensorRef& t, int32_t group, int64_t position) const {
    const auto h = static_cast<uint32_t>(head);  // 32 bits are enough, and divided quickly
    return batch * t.batch + (group > 1 ? h / static_cast<uint32_t>(group) : h) * t.head +
           token(position) * t.token[2];
  }
  // In what has one number for each [batch, tokens, heads].
  ATTNEXT_DEVICE int64_t index(const LinearLaunch& p, int64_t position) const {
    return (batch * p.tokens + token(position)) * p.heads + head;
  }
};

}  // namespace cuda
}  // namespace attnext
