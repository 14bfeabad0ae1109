// SPDX-License-Identifier: Apache-2.0
// Taylor features in a scan: made of entries in shared memory, and the gradients' way back.
#pragma once

#include "linear_scan.cuh"

namespace attnext {
namespace cuda {

// Taylor features are 1, x_a, and x_a x_b for a <= b. Each is a product of two of a row's numbers:
// its entries, these as the squares have them, with the polynomial's half, and a few constants.
struct FeatureFactors {
  int left, right;
};
template <int kEntries>
struct RowNumbers {
  static constexpr int kHalves = kEntries, kToken = 2 * kEntries, kOne = kToken + 1,
                       kZero = kToken + 2, kWords = kEntries + 2;
  uint32_t x[kWords];  // two numbers each

  static constexpr ATTNEXT_DEVICE FeatureFactors factors(int f) {
    if (f == 0) return {kToken, kOne};
    if (f <= kEntries) return {f - 1, kOne};
    const FeaturePair pair = pair_of_feature(f, kEntries);
    if (pair.a == kEntries) return {kZero, kZero};
    return {pair.a == pair.b ? kHalves + pair.a : pair.a, pair.b};
  }
  // Two of the numbers as one word.
  template <int kLow, int kHigh>
  ATTNEXT_DEVICE uint32_t pair() const {
    if constexpr (kLow % 2 == 0 && kHigh == kLow + 1) return x[kLow / 2];
    constexpr uint32_t kBytes = (kLow % 2 ? 0x32 : 0x10) | (kHigh % 2 ? 0x7600 : 0x5400);
    return __byte_perm(x[kLow / 2], x[kHigh / 2], kBytes);
  }
  template <class T, int kFeature>
  ATTNEXT_DEVICE uint32_t features() const {
    constexpr FeatureFactors low = factors(kFeature), high = factors(kFeature + 1);
    if constexpr (low.right == kZero && high.right == kZero) return 0;
    const uint32_t left = pair<low.left, high.left>();
    if constexpr (low.right == kOne && high.right == kOne) return left;
    return Number<T>::multiply_pair(left, pair<low.right, high.right>());
  }
};

// Those of a carry the polynomial's weights. Half of the threads have a row of a each, half one of
// b. Numbers of 16 bits are multiplied two at a time where no scale rounds them before.
ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::expand_whole(int at, int stage) const {
  const int operand = threadIdx.x / kChunk;
  if (operand == 0 ? !gives() : !sums()) return;
  if constexpr (sizeof(T) == 2) {
    if (p.exact_scale) {
      expand_pairs(at, stage);
      return;
    }
  }
  expand_numbers(at, stage);
}

ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::expand_pairs(int at, int stage) const {
  using Raw = Layout<T, kRaw>;
  using Row = RowNumbers<kEntries>;
  const int operand = threadIdx.x / kChunk, row = threadIdx.x % kChunk;
  const bool weighted = operand == p.weighted_b;
  const auto both = [](float x) { return Number<T>::pack(x, x); };
  const uint32_t by = both(weighted ? p.polynomial_scale : 1.f), half = both(weighted ? 0.5f : 1.f);
  Row numbers;
#pragma unroll
  for (int chunk = 0; chunk < kEntries / 8; ++chunk) {
    const uint4 whole = load_shared(tile(stage, operand) + Raw::at(row, chunk));
    memcpy(numbers.x + chunk * 4, &whole, 16);
  }
#pragma unroll
  for (int i = 0; i < kEntries / 2; ++i) {
    numbers.x[i] = Number<T>::multiply_pair(numbers.x[i], by);
    numbers.x[kEntries / 2 + i] = Number<T>::multiply_pair(numbers.x[i], half);
  }
  numbers.x[Row::kToken / 2] = Number<T>::pack(is_token(at + row) ? 1.f : 0.f, 1.f);
  numbers.x[Row::kZero / 2] = 0;
  // Opaque, or the compiler makes the places of each panel from the beginning.
  uint32_t places[Wide::kChunks];
#pragma unroll
  for (int chunk = 0; chunk < Wide::kChunks; ++chunk) {
    places[chunk] = opaque(features(stage, operand, 0) + Wide::at(row, chunk));
  }
  each_number<kDim / 8>([&](auto nth) {
    constexpr int chunk = decltype(nth)::value, f = chunk * 8;
    const uint4 whole = {numbers.template features<T, f>(), numbers.template features<T, f + 2>(),
                         numbers.template features<T, f + 4>(),
                         numbers.template features<T, f + 6>()};
    store_shared(places[chunk % Wide::kChunks] + chunk / Wide::kChunks * S::kPanelTile, whole);
  });
}

ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::expand_numbers(int at, int stage) const {
  using Raw = Layout<T, kRaw>;
  static_assert(kThreads == 2 * kChunk && 1 + kEntries * (kEntries + 3) / 2 <= kDim, "features");
  constexpr int kElems = Raw::kElems;
  const int operand = threadIdx.x / kChunk, row = threadIdx.x % kChunk;
  float x[kEntries];
  const bool weighted = operand == p.weighted_b;
  const float by = weighted ? p.polynomial_scale : 1.f, square = weighted ? 0.5f : 1.f;
#pragma unroll
  for (int chunk = 0; chunk < kEntries / kElems; ++chunk) {
    const uint4 whole = load_shared(tile(stage, operand) + Raw::at(row, chunk));
    T elems[kElems];
    memcpy(elems, &whole, 16);
#pragma unroll
    for (int e = 0; e < kElems; ++e) x[chunk * kElems + e] = Number<T>::widen(elems[e]) * by;
  }
  const float one = is_token(at + row) ? 1.f : 0.f;
  each_number<kDim / kElems>([&](auto nth) {
    constexpr int chunk = decltype(nth)::value;
    float part[kElems];
    each_number<kElems>([&](auto number) {
      constexpr int e = decltype(number)::value, f = chunk * kElems + e, first = 1 + kEntries;
      constexpr FeaturePair pair = pair_of_feature(f, kEntries);
      if constexpr (f == 0) {
        part[e] = one;
      } else if constexpr (f < first) {
        part[e] = x[f - 1];
      } else if constexpr (pair.a == kEntries) {
        part[e] = 0.f;
      } else if constexpr (pair.a == pair.b) {
        part[e] = x[pair.a] * x[pair.a] * square;
      } else {
        part[e] = x[pair.a] * x[pair.b];
      }
    });
    uint4 whole;
    if constexpr (sizeof(T) == 4) {
      memcpy(&whole, part, 16);
    } else {
      whole = {Number<T>::pack(part[0], part[1]), Number<T>::pack(part[2], part[3]),
               Number<T>::pack(part[4], part[5]), Number<T>::pack(part[6], part[7])};
    }
    store_shared(
        features(stage, operand, chunk / Wide::kChunks) + Wide::at(row, chunk % Wide::kChunks),
        whole);
  });
}

// Features from f on of `dim` entries in a tile's row, 16 bytes after 16: store(piece, elements).
template <class T, int kDim, int kWarps, ScanKind kKind>
template <class Store>
ATTNEXT_DEVICE void Scan<T, kDim, kWarps, kKind>::make_features(uint32_t tile_at, int row,
                                                                bool token, int f, int pieces,
                                                                int dim, bool weighted,
                                                                Store store) const {
  constexpr int kElems = 16 / static_cast<int>(sizeof(T));
  const float by = weighted ? p.polynomial_scale : 1.f, square = weighted ? 0.5f : 1.f;
  auto [a, b] = pair_of_feature(max(f, 1 + dim), dim);
#pragma unroll 1
  for (int piece = 0; piece < pieces; ++piece) {
    T elems[kElems];
#pragma unroll
    for (int e = 0; e < kElems; ++e, ++f) {
      float x = f == 0 && token ? 1.f : 0.f;
      if (f > 0 && f <= dim) {
        x = by * entry(tile_at, row, f - 1);
      } else if (f > 0 && a < dim) {
        x = by * entry(tile_at, row, a) * (by * entry(tile_at, row, b));
        if (a == b) x *= square;
        if (++b == dim) b = ++a;
      }
      elems[e] = Number<T>::narrow(x);
    }
    uint4 whole;
    memcpy(&whole, elems, 16);
    store(piece, whole);
  }
}

// The features of c that are the slice's columns.
ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::expand_slice(int at, int stage) const {
  if (!sums()) return;
  using Narrow = Layout<T, kColumns>;
  constexpr int kPieces = Narrow::kChunks / 2;  // two threads a row
  const int row = threadIdx.x % kChunk, piece0 = threadIdx.x / kChunk * kPieces;
  make_features(entries_tile(stage, 1), row, is_token(at + row),
                slice * kColumns + piece0 * Narrow::kElems, kPieces, kIsWide ? p.c.dim : kEntries,
                p.weighted_b, [&](int piece, const uint4& whole) {
                  store_shared(c_tile(stage) + Narrow::at(row, piece0 + piece), whole);
                });
}

// The block's features, of many. Half of the threads have a row of a each, half one of b.
ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::expand_part(int at, int stage) const {
  const int operand = threadIdx.x / kChunk, row = threadIdx.x % kChunk;
  if (operand == 0 ? !gives() : !sums()) return;
  make_features(tile(stage, operand), row, is_token(at + row), part * kDim,
                S::kPanels * Wide::kChunks, p.b.dim, operand == p.weighted_b,
                [&](int piece, const uint4& whole) {
                  const uint32_t to = features(stage, operand, piece / Wide::kChunks);
                  store_shared(to + Wide::at(row, piece % Wide::kChunks), whole);
                });
}

// The polynomial's slope by the entries of raw, less those of c. What of a row's features with
// their gradient is of the chunk's other tokens, the scores with the polynomial itself, are dots
// after those of the slices: what a token gets from itself, no decay has a part in.
ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::times_slope(
    float (&scores)[1][kChunk / 8][4], int at, int stage, int walked, const Numbers (&mine)[2],
    float unit) const {
  LeftRows<T, kEntryWidth, 1, false> raw;
  raw.load(entries_tile(stage, 0), warp * 16);
  float s[1][kChunk / 8][4];
  product<T, kEntryWidth, 1, kChunk, false>(s, raw, entries, entries_tile(stage, 1), walked);
  float dot[2] = {0.f, 0.f};
#pragma unroll
  for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float x = s[0][n][e] * p.polynomial_scale;
      const bool own = n * 8 + 2 * t + e % 2 == warp * 16 + e / 2 * 8 + g;
      const float score = own ? 0.f : scores[0][n][e];
      dot[e / 2] = fmaf(score, fmaf(fmaf(x, 0.5f, 1.f), x, 1.f), dot[e / 2]);
      scores[0][n][e] *= p.polynomial_scale * (x + 1.f);
    }
  }
  if (!p.dots) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float of_row = quad_sum(dot[half]) * (mine[half].factor * unit);
    if (t == 0) store_dot(p.slices, at + warp * 16 + half * 8 + g, of_row);
  }
}

// From the gradient of features, by way of shared memory, and from the products within the chunk.
// Features with their gradient are 1 with its own, and entries with that of theirs: once of what
// comes from them as they are, half of what comes from products of two.
ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::fold(int at, int stage,
                                                            const float (&out)[kColumns / 8][4],
                                                            const float (&scores)[1][kChunk / 8][4],
                                                            const float (&factor)[2], int walked) {
  float* const room = reinterpret_cast<float*>(memory + S::kOutAt) + warp * 16 * S::kRoom;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      room[(e / 2 * 8 + g) * S::kRoom + n * 8 + 2 * t + e % 2] = out[n][e] * factor[e / 2];
    }
  }
  __syncwarp();
  // Two lanes a row, of two entries one each: where the one's feature is, the other's is not far.
  // Which features are the slice's is known as it is compiled.
  constexpr int kHalf = kEntries / 2, kFeatures = 1 + kEntries * (kEntries + 3) / 2;
  constexpr int kLast = (kFeatures - 1) / kColumns;
  const int row = lane % 16, odd = lane / 16;
  const float* const mine = room + row * S::kRoom;
  const float by = p.weighted_b ? 1.f : p.polynomial_scale, square = p.weighted_b ? 2.f : 1.f;
  float x[kEntries], sum[kHalf], dot = 0.f;
#pragma unroll
  for (int i = 0; i < kEntries; ++i) x[i] = by * entry(entries_tile(stage, 0), warp * 16 + row, i);
  const auto sum_slice = [&](auto known) {
    constexpr int kLow = decltype(known)::value * kColumns;
    const auto of_feature = [&](int f, int further) {  // or of the odd lane's, so much further
      f -= kLow;
      const bool in = 0 <= f && f < kColumns, odd_in = -further <= f && f < kColumns - further;
      return (odd ? odd_in : in) ? (mine + odd * further)[f] : 0.f;
    };
    if (kLow == 0 && !odd) dot = mine[0];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const int a = 2 * i, run = kEntries - 1 - a;  // from a pair of a to the next entry's
      const float own = sum[i] = of_feature(1 + a, 1);
#pragma unroll
      for (int b = 0; b < kEntries; ++b) {
        const float weight = b / 2 != i ? x[b] : x[b] * (odd == b % 2 ? square : 1.f);
        sum[i] = fmaf(of_feature(feature_of_pair(a, b), b <= a ? 1 : run), weight, sum[i]);
      }
      dot = fmaf(0.5f * (odd ? x[a + 1] : x[a]), own + sum[i], dot);
    }
  };
  static_assert(kLast == 2 || kLast == 4, "slices");
  if (slice == 0) sum_slice(std::integral_constant<int, 0>());
  if (slice == 1) sum_slice(std::integral_constant<int, 1>());
  if (slice == 2) sum_slice(std::integral_constant<int, 2>());
  if constexpr (kLast == 4) {
    if (slice == 3) sum_slice(std::integral_constant<int, 3>());
    if (slice == 4) sum_slice(std::integral_constant<int, 4>());
  }
  if (p.dots) of_state(at + warp * 16 + row, dot);
  float inner[1][4][4] = {};
  if (is_within()) {
    accumulate<T, 32, 32, 1, kChunk>(inner, scores, entries, entries_tile(stage, 1), 0, walked);
  }
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kEntries / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      room[(e / 2 * 8 + g) * S::kRoom + n * 8 + 2 * t + e % 2] = inner[0][n][e] * factor[e / 2];
    }
  }
  __syncwarp();
  const int token = at + warp * 16 + row;
  if (is_token(token)) {
    float* to =
        p.folded + (slice * p.batch * p.tokens * p.heads + tokens().index(p, token)) * kEntries;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) to[2 * i + odd] = fmaf(sum[i], by, mine[2 * i + odd]);
  }
}

// As fold. A slice's features are the products of few entries with later ones, run after run.
ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::fold_wide(
    int at, int stage, const float (&out)[kColumns / 8][4], const float (&scores)[1][kChunk / 8][4],
    const float (&factor)[2], int walked) {
  constexpr int kHalf = kEntryWidth / 2;  // entries of a lane, two lanes a row
  float* const room = reinterpret_cast<float*>(memory + S::kOutAt) + warp * 16 * S::kRoom;
  const uint32_t raw = entries_tile(stage, 0);
  const int row = lane % 16, first_entry = lane / 16 * kHalf, low = slice * kColumns;
  const int dim = p.c.dim;
  const float by = p.weighted_b ? 1.f : p.polynomial_scale, square = p.weighted_b ? 2.f : 1.f;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      room[(e / 2 * 8 + g) * S::kRoom + n * 8 + 2 * t + e % 2] = out[n][e] * factor[e / 2];
    }
  }
  __syncwarp();
  const float* const mine = room + row * S::kRoom;
  float x[kHalf], sum[kHalf], twice = low == 0 && lane < 16 ? 2.f * mine[0] : 0.f;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const int f = 1 + first_entry + i - low;
    x[i] = by * entry(raw, warp * 16 + row, first_entry + i);
    sum[i] = first_entry + i < dim && 0 <= f && f < kColumns ? mine[f] : 0.f;
    twice = fmaf(x[i], sum[i], twice);
  }
  int a = pair_of_feature(max(low, 1 + dim), dim).a;
  // Feature low + start is x_a x_a.
  int start = 1 + dim + a * dim - a * (a - 1) / 2 - low;
#pragma unroll 1
  for (; a < dim && start < kColumns; start += dim - a, ++a) {
    const float other = by * entry(raw, warp * 16 + row, a);
    float own = 0.f;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const int c = first_entry + i, f = start + c - a;
      if (c < a || c >= dim || f < 0 || f >= kColumns) continue;
      sum[i] = fmaf(mine[f], c == a ? other * square : other, sum[i]);
      if (c > a) own = fmaf(mine[f], x[i], own);
    }
    own += __shfl_xor_sync(~0u, own, 16);
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      if (first_entry + i == a) sum[i] += own;
    }
  }
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    twice = fmaf(x[i], sum[i], twice);
    sum[i] *= by;
  }
  if (p.dots) of_state(at + warp * 16 + row, 0.5f * twice);
  if (is_within()) add_within(stage, scores, factor, walked, room, sum);
  const int token = at + warp * 16 + row;
  if (!is_token(token)) return;
  float* to = p.folded +
              (slice * p.batch * p.tokens * p.heads + tokens().index(p, token)) * p.width +
              first_entry;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    if (first_entry + i < p.width) to[i] = sum[i];
  }
}

// The products within the chunk, by way of shared memory.
ATTNEXT_SCAN_MEMBER void Scan<T, kDim, kWarps, kKind>::add_within(
    int stage, const float (&scores)[1][kChunk / 8][4], const float (&factor)[2], int walked,
    float* room, float (&sum)[kEntryWidth / 2]) const {
  constexpr int kHalf = kEntryWidth / 2, kAtOnce = kColumns < kEntryWidth ? kColumns : kEntryWidth;
  float inner[1][kEntryWidth / 8][4] = {};
  accumulate<T, kEntryWidth, kEntryWidth, 1, kChunk>(inner, scores, entries, entries_tile(stage, 1),
                                                     0, walked);
#pragma unroll
  for (int from = 0; from < kEntryWidth; from += kAtOnce) {
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kAtOnce / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        room[(e / 2 * 8 + g) * S::kRoom + n * 8 + 2 * t + e % 2] =
            inner[0][from / 8 + n][e] * factor[e / 2];
      }
    }
    __syncwarp();
    const int first_entry = lane / 16 * kHalf - from;
    if (first_entry < 0 || first_entry >= kAtOnce) continue;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) sum[i] += room[lane % 16 * S::kRoom + first_entry + i];
  }
}

}  // namespace cuda
}  // namespace attnext
