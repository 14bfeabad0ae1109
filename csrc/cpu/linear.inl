// SPDX-License-Identifier: Apache-2.0
// What forward and backward share: a chunk in packed form, as rows, [tokens][numbers], or with
// tokens in the lanes, [numbers][tokens]. Taylor features are made in lanes, where each is a
// product of vectors.
#pragma once

#include <type_traits>

#include "linear.h"
#include "linear_product.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

template <class T>
using LinearAcc = AccOf<typename ElemOf<T>::type>;
// Products are of numbers, but on a CPU with tiles for some of bf16 (LinearHead::in_tiles).
template <class T>
constexpr bool kMayBeInTiles = ATTNEXT_MATRIX_TILES && Same<T, bf16>::value;

// Numbers one after the other in a thread's scratch; without memory it only counts.
template <class Acc>
class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(static_cast<Acc*>(memory)) {}
  Acc* take(int64_t count) {
    Acc* at = memory_ ? memory_ + used_ : nullptr;
    used_ += (count + 63) / 64 * 64 + 16;  // rows of 2^k bytes would share cache sets
    return at;
  }
  int64_t bytes() const { return used_ * static_cast<int64_t>(sizeof(Acc)); }

 private:
  Acc* memory_;
  int64_t used_ = 0;
};

template <class T, class V>
ATTNEXT_INLINE void narrow_part(T* p, V v, int64_t n) {
  constexpr int64_t kLanes = sizeof(V) / sizeof(V{}[0]);
  if (n >= kLanes) return narrow(p, v);
  T part[kLanes];
  narrow(part, v);
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

// 2^x with nothing beyond the largest power; NaN stays.
template <class Acc>
ATTNEXT_INLINE VecOf<Acc> power(VecOf<Acc> x) {
  constexpr Acc kMost = sizeof(Acc) == 4 ? 127 : 1023;
  return exp2(x > kMost ? broadcast(kMost) : x);
}

template <FeatureMap kMap, class Acc>
ATTNEXT_INLINE VecOf<Acc> feature(VecOf<Acc> x) {
  if constexpr (kMap == FeatureMap::kElu) {
    return exp2(min_or_second(VecOf<Acc>{}, x) * Acc(kLog2E)) + max_or_second(x, VecOf<Acc>{});
  } else if constexpr (kMap == FeatureMap::kRelu) {
    return x < 0 ? VecOf<Acc>{} : x;
  } else {
    return x;
  }
}

// dx of a feature f of x, from that of f.
template <FeatureMap kMap, class Acc>
ATTNEXT_INLINE VecOf<Acc> feature_chain(VecOf<Acc> f, VecOf<Acc> df) {
  if constexpr (kMap == FeatureMap::kElu) {
    return f > 1 ? df : f * df;
  } else if constexpr (kMap == FeatureMap::kRelu) {
    return f <= 0 ? VecOf<Acc>{} : df;
  } else {
    return df;
  }
}

// f(map) with a map that is known. Taylor's, not made entry by entry, is as the identity here.
template <class F>
ATTNEXT_INLINE void with_map(FeatureMap map, F f) {
  if (map == FeatureMap::kElu) {
    f(std::integral_constant<FeatureMap, FeatureMap::kElu>{});
  } else if (map == FeatureMap::kRelu) {
    f(std::integral_constant<FeatureMap, FeatureMap::kRelu>{});
  } else {
    f(std::integral_constant<FeatureMap, FeatureMap::kIdentity>{});
  }
}

// At most kLanes x kLanes entries as a whole block, the rest 0.
template <class T, class Acc>
__attribute__((noinline)) void load_part(const T* rows, int64_t step, int64_t count, int64_t dim,
                                         VecOf<Acc>* block) {
  for (int64_t i = 0; i < Simd<Acc>::kLanes; ++i) {
    block[i] = i < count ? widen_part<T, Acc>(rows + i * step, dim) : VecOf<Acc>{};
  }
}
template <class T, class Acc>
__attribute__((noinline)) void store_part(T* rows, int64_t step, int64_t count, int64_t dim,
                                          const VecOf<Acc>* block) {
  for (int64_t i = 0; i < min64(count, Simd<Acc>::kLanes); ++i) {
    narrow_part(rows + i * step, block[i], dim);
  }
}

// Token rows `step` apart, `count` of them, as [dim][ld]; lanes beyond them are 0.
template <FeatureMap kMap, class T, class Acc>
void pack_lanes(const T* rows, int64_t step, int64_t count, int64_t dim, Acc* out, int64_t ld) {
  constexpr int kLanes = Simd<Acc>::kLanes;
  for (int64_t t = 0; t < count; t += kLanes) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      const T* from = rows + t * step + d;
      Acc* to = out + d * ld + t;
      VecOf<Acc> block[kLanes];
      if (t + kLanes <= count && d + kLanes <= dim) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = widen(from + i * step);
        transpose_vectors<Acc>(block);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(to + i * ld, feature<kMap, Acc>(block[i]));
        continue;
      }
      load_part<T, Acc>(from, step, count - t, dim - d, block);
      transpose_vectors<Acc>(block);
      const int64_t tokens = min64(kLanes, count - t);
      const uint64_t valid = (uint64_t(2) << (tokens - 1)) - 1;
      for (int64_t i = 0; i < min64(kLanes, dim - d); ++i) {
        store(to + i * ld, select_bits<Acc>(valid, feature<kMap, Acc>(block[i]), VecOf<Acc>{}));
      }
    }
  }
}
template <class T, class Acc>
void pack_lanes(FeatureMap map, const T* rows, int64_t step, int64_t count, int64_t dim, Acc* out,
                int64_t ld) {
  with_map(map, [&](auto m) { pack_lanes<m.value>(rows, step, count, dim, out, ld); });
}

// The way back to token rows, of vectors lane(d, t): number d of the tokens from t on.
template <class T, class F>
void unpack_lanes(int64_t count, int64_t dim, T* rows, int64_t step, F lane) {
  using Vec = decltype(lane(0, 0));
  using Acc = std::remove_reference_t<decltype(Vec{}[0])>;
  constexpr int kLanes = Simd<Acc>::kLanes;
  for (int64_t t = 0; t < count; t += kLanes) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      T* to = rows + t * step + d;
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = lane(min64(d + i, dim - 1), t);
      transpose_vectors<Acc>(block);
      if (t + kLanes <= count && d + kLanes <= dim) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) narrow(to + i * step, block[i]);
      } else {
        store_part<T, Acc>(to, step, count - t, dim - d, block);
      }
    }
  }
}

// The way back from widen_row.
template <class T, class Acc>
ATTNEXT_INLINE void narrow_row(const Acc* in, int64_t dim, T* row) {
  constexpr int64_t kLanes = Simd<Acc>::kLanes;
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) narrow(row + d, load(in + d));
  if (d < dim) narrow_part(row + d, load(in + d), dim - d);
}
template <class T, class Acc>
void pack_rows(const T* rows, int64_t step, int64_t count, int64_t dim, Acc* out, int64_t ld) {
  for (int64_t t = 0; t < count; ++t) widen_row(rows + t * step, dim, out + t * ld);
}

// Features of token rows as rows.
template <FeatureMap kMap, class T, class Acc>
void pack_features(const T* rows, int64_t step, int64_t count, int64_t dim, Acc* out, int64_t ld) {
  constexpr int64_t kLanes = Simd<Acc>::kLanes;
  for (int64_t t = 0; t < count; ++t, rows += step, out += ld) {
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) {
      store(out + d, feature<kMap, Acc>(widen(rows + d)));
    }
    if (d < dim) {
      const VecOf<Acc> last = feature<kMap, Acc>(widen_part<T, Acc>(rows + d, dim - d));
      store(out + d, select_bits<Acc>((uint64_t(1) << (dim - d)) - 1, last, VecOf<Acc>{}));
    }
  }
}
template <class T, class Acc>
void pack_features(FeatureMap map, const T* rows, int64_t step, int64_t count, int64_t dim,
                   Acc* out, int64_t ld) {
  with_map(map, [&](auto m) { pack_features<m.value>(rows, step, count, dim, out, ld); });
}

// [rows][ld] times a factor per lane.
template <class Acc>
void scale_lanes(Acc* x, int64_t rows, int64_t ld, int64_t width, const Acc* factor) {
  constexpr int64_t kLanes = Simd<Acc>::kLanes;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t t = 0; t < width; t += kLanes) {
      store(x + r * ld + t, load(x + r * ld + t) * load(factor + t));
    }
  }
}
template <class Acc>
void scale_all(Acc* x, int64_t rows, int64_t ld, int64_t width, Acc factor) {
  constexpr int64_t kLanes = Simd<Acc>::kLanes;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t t = 0; t < width; t += kLanes) {
      store(x + r * ld + t, load(x + r * ld + t) * factor);
    }
  }
}

// In halves: one after the other, sums would wait for each other.
template <class Acc, class V = VecOf<Acc>>
ATTNEXT_INLINE Acc add_lanes(V v) {
  if constexpr (sizeof(V) == 2 * sizeof(Acc)) {
    return v[0] + v[1];
  } else {
    typedef Acc Half __attribute__((vector_size(sizeof(V) / 2)));
    Half half[2];
    memcpy(half, &v, sizeof(V));
    return add_lanes<Acc, Half>(half[0] + half[1]);
  }
}

// out[lanes] = kept out[lanes] + taken sum_r x[r][lanes] * weight[r]; no weight: 1.
template <class T, class Acc>
void weigh_rows(const T* x, int64_t rows, int64_t ld, int64_t width, const Acc* weight, Acc* out,
                Mix<Acc> mix) {
  constexpr int64_t kLanes = Simd<Acc>::kLanes;
  for (int64_t t = 0; t < width; t += kLanes) {
    VecOf<Acc> sum[4] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const VecOf<Acc> v = widen(x + r * ld + t);
      sum[r % 4] += weight ? v * weight[r] : v;
    }
    const VecOf<Acc> all = ((sum[0] + sum[1]) + (sum[2] + sum[3])) * mix.taken;
    store(out + t, mix.reads ? load(mix.source(out) + t) * mix.kept + all : all);
  }
}
// out[r] = kept out[r] + taken sum over lanes of x[r][lanes] * weight[lanes]; no weight: 1.
template <class T, class Acc>
void weigh_lanes(const T* x, int64_t rows, int64_t ld, int64_t width, const Acc* weight, Acc* out,
                 Mix<Acc> mix) {
  constexpr int64_t kLanes = Simd<Acc>::kLanes;
  for (int64_t r = 0; r < rows; ++r) {
    VecOf<Acc> sum{};
    for (int64_t t = 0; t < width; t += kLanes) {
      const VecOf<Acc> v = widen(x + r * ld + t);
      sum += weight ? v * load(weight + t) : v;
    }
    const Acc all = add_lanes<Acc>(sum) * mix.taken;
    out[r] = mix.reads ? mix.source(out)[r] * mix.kept + all : all;
  }
}

// phi of Taylor2 from packed entries times `scale`, [features][ld]: 1, x_a, x_a x_b for a <= b.
// `weighted`: the squares times 1/2.
template <class Acc>
void taylor_features(const Acc* x, Acc scale, int64_t dim, int64_t ld, int64_t count, bool weighted,
                     Acc* out) {
  constexpr int64_t kLanes = Simd<Acc>::kLanes;
  const Acc square = weighted ? Acc(0.5) : Acc(1);
  for (int64_t t = 0; t < count; t += kLanes) {
    Acc* to = out + t;
    for (int64_t i = 0; i < kLanes; ++i) to[i] = t + i < count ? Acc(1) : Acc(0);
    const Acc* const scaled = to + ld;
    for (int64_t a = 0; a < dim; ++a) store(to += ld, load(x + a * ld + t) * scale);
    for (int64_t a = 0; a < dim; ++a) {
      const VecOf<Acc> xa = load(scaled + a * ld);
      store(to += ld, xa * xa * square);
      for (int64_t b = a + 1; b < dim; ++b) store(to += ld, xa * load(scaled + b * ld));
    }
  }
}
// dx += what the gradient of the features means for the entries times `scale`.
template <class Acc>
void taylor_chain(const Acc* x, Acc scale, const Acc* dfeatures, int64_t dim, int64_t ld,
                  int64_t width, bool weighted, Acc* dx) {
  constexpr int64_t kLanes = Simd<Acc>::kLanes;
  const Acc square = weighted ? Acc(1) : Acc(2);
  for (int64_t t = 0; t < width; t += kLanes) {
    const Acc* from = dfeatures + ld + t;  // the constant has no slope
    const Acc* pair = from + dim * ld;
    for (int64_t a = 0; a < dim; ++a, from += ld) {
      const VecOf<Acc> xa = load(x + a * ld + t) * scale;
      VecOf<Acc> sum = load(dx + a * ld + t) + load(from);
      sum += xa * load(pair) * square;
      pair += ld;
      VecOf<Acc> more{};
      for (int64_t b = a + 1; b < dim; ++b, pair += ld) {
        const VecOf<Acc> d = load(pair);
        more += load(x + b * ld + t) * d;
        store(dx + b * ld + t, load(dx + b * ld + t) + xa * d);
      }
      store(dx + a * ld + t, sum + more * scale);
    }
  }
}

template <class Acc>
ATTNEXT_INLINE Acc power_of(double x) {
  return power<Acc>(broadcast(Acc(x)))[0];
}

// A head's share of a problem: where its rows are, and its sizes.
template <class T>
struct LinearHead {
  using Acc = LinearAcc<T>;
  static constexpr int64_t kLanes = Simd<Acc>::kLanes;

  const LinearParams& p;
  LinearItem item;
  const int64_t chunk, ld, features, columns, width;  // width: columns in whole vectors

  LinearHead(const LinearParams& params, const LinearItem& work)
      : p(params),
        item(work),
        chunk(work.chunk),
        ld(whole_vectors<Acc>(chunk)),
        features(params.features()),
        columns(work.columns),
        width(whole_vectors<Acc>(work.columns)) {}

  bool taylor() const { return p.feature_map == FeatureMap::kTaylor2; }
  bool decays() const { return p.decay.data != nullptr; }
  // The scale is inside the polynomial of Taylor2; of all other maps outputs are linear in it.
  Acc inner_scale() const { return taylor() ? Acc(p.scale) : Acc(1); }
  Acc outer_scale() const { return taylor() ? Acc(1) : Acc(p.scale); }

  // Row of token t, counted in the order of processing; the next one is step(ref) further.
  template <class U>
  U* row(const TensorRef& ref, int64_t t, int64_t heads) const {
    return row_of<U>(item, ref, t, heads);
  }
  template <class U>
  U* row_of(const LinearItem& of, const TensorRef& ref, int64_t t, int64_t heads) const {
    const LinearSequence& s = p.sequences[of.sequence];
    const int64_t token = p.reverse ? s.end - 1 - t : s.begin + t;
    const int64_t head = of.head / (p.heads / heads);
    return static_cast<U*>(ref.data) + s.batch * ref.batch + token * ref.token[2] + head * ref.head;
  }
  // Numbers [column, column + dim) in rows of up to a chunk of an item, from token t on, which will
  // soon be read or written.
  void look_ahead(Ahead* ahead, const LinearItem& of, const TensorRef& ref, int64_t t,
                  int64_t heads, int64_t column, int64_t dim, bool write) const {
    constexpr int64_t kSize = static_cast<int64_t>(sizeof(T));
    if (t >= of.end) return;
    const T* const first = row_of<T>(of, ref, t, heads) + column;
    const int64_t count = min64(chunk, of.end - t);
    ahead->add(first, dim * kSize, write, step(ref) * kSize, count);
  }
  int64_t step(const TensorRef& ref) const { return p.reverse ? -ref.token[2] : ref.token[2]; }

  // ---- states: [features][width], sums of features, factor

  static int64_t size_of_state(const LinearParams& params, int64_t columns) {
    const int64_t features = params.features();
    return features * whole_vectors<Acc>(columns) + whole_vectors<Acc>(features) + 16;
  }
  int64_t state_size() const { return size_of_state(p, columns); }
  Acc* sums(Acc* state) const { return state + features * width; }
  const Acc* sums(const Acc* state) const { return state + features * width; }
  Acc& factor(Acc* state) const { return state[state_size() - 1]; }
  Acc factor(const Acc* state) const { return state[state_size() - 1]; }

  // Whether products are those of tiles of bf16. Rows of bf16 are their operands; features, scores
  // and states are rounded to it once more, which shows in what is a difference of larger numbers:
  // in gradients, in those of a normaliser's quotient most of all, and in Taylor features. Decays
  // would round once more still.
  static bool in_tiles(const LinearParams& params, bool for_gradients, int64_t chunk) {
    constexpr int64_t kMost = tiles::LeftFactors::kMost * tiles::kSpan;
    if (!kMayBeInTiles<T> || for_gradients || params.normalize) return false;
    if (params.decay.data || params.delta()) return false;
    if (params.feature_map == FeatureMap::kTaylor2) return false;
    return params.head_dim <= kMost && chunk <= kMost;
  }
  static int64_t chunk_of(const LinearParams& params, int64_t length, bool for_gradients) {
    if (params.chunk > 0) return params.chunk;
    // Up to here, as measured, the products of all pairs cost less than features and states.
    constexpr int64_t kShortTaylor = 256;
    const bool is_taylor = params.feature_map == FeatureMap::kTaylor2;
    if (is_taylor && length <= kShortTaylor) return max64(length, 1);
    // Work inside chunks grows with them, traffic of states shrinks. In tiles that work is next to
    // none: longer ones pay.
    constexpr int64_t kShort = 32, kLong = 64;
    if (in_tiles(params, for_gradients, kLong)) return kLong;
    return params.features() * params.head_dim_v <= 64 * 64 ? kShort : kLong;
  }
  static int64_t segment_of(const LinearParams& params, int64_t chunk) {
    // The backward pass holds a segment's states, which should stay in a second-level cache.
    constexpr int64_t kHeldBytes = 512 << 10;
    const int64_t bytes =
        size_of_state(params, params.head_dim_v) * static_cast<int64_t>(sizeof(Acc));
    return chunk * max64(4, min64(16, kHeldBytes / bytes));
  }

  void load_state(const Acc* source, Acc* state) const {
    for (int64_t i = 0; i < state_size(); ++i) state[i] = 0;
    factor(state) = 1;
    if (!source) return;
    const int64_t given = p.state_columns();
    for (int64_t f = 0; f < features; ++f) {
      for (int64_t c = 0; c < columns; ++c) {
        state[f * width + c] = source[f * given + item.column + c];
      }
      if (p.normalize) sums(state)[f] = source[f * given + p.head_dim_v];
    }
  }
  void store_state(const Acc* state, Acc* target) const {
    const int64_t given = p.state_columns();
    for (int64_t f = 0; f < features; ++f) {
      for (int64_t c = 0; c < columns; ++c) {
        target[f * given + item.column + c] = state[f * width + c];
      }
      if (p.normalize) target[f * given + p.head_dim_v] = sums(state)[f];
    }
  }
  // carry = factor of local * carry + local.
  void advance(Acc* carry, const Acc* local) const {
    const Acc by = factor(local);
    for (int64_t i = 0; i < state_size() - 16; i += kLanes) {
      store(carry + i, load(carry + i) * by + load(local + i));
    }
  }

  // local = mix.kept * local + mix.taken * features of the chunk times its rows; row_weight: what
  // the sums are of, beside the features. Features lie in rows of `ldx` numbers, [features][tokens]
  // or, by columns, [tokens][features].
  template <By kBy>
  void add_outer(const Acc* x, int64_t ldx, const Acc* rows, int64_t count, Mix<Acc> mix,
                 Acc* local, const Acc* row_weight, Ahead* ahead = nullptr) const {
    product<kBy>(features, width, count, x, ldx, rows, width, local, width, mix, ahead);
    add_sums<kBy>(x, ldx, count, mix, local, row_weight);
  }
  // What becomes of the sums of features then.
  template <By kBy>
  void add_sums(const Acc* x, int64_t ldx, int64_t count, Mix<Acc> mix, Acc* local,
                const Acc* row_weight) const {
    const auto add = [&](Acc* to, Mix<Acc> of_sums) {
      if (!p.normalize) {
        for (int64_t f = 0; !of_sums.reads && f < whole_vectors<Acc>(features); ++f) to[f] = 0;
      } else if (kBy == By::kRows) {
        weigh_lanes(x, features, ldx, whole_vectors<Acc>(count), row_weight, to, of_sums);
      } else {
        weigh_rows(x, count, ldx, whole_vectors<Acc>(features), row_weight, to, of_sums);
      }
    };
    add(sums(local), Mix<Acc>{mix.reads, mix.kept, mix.taken, mix.from ? sums(mix.from) : nullptr});
    if (mix.also) add(sums(mix.also), mix.of_also());
  }
};

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
