// SPDX-License-Identifier: Apache-2.0
// Rows of bf16 as operands of tiles (matrix_tiles.inl) without a way by way of fp32: where they
// lie, or with one rounding as features.
#pragma once

#include "linear.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

// Token rows of pairs, as left factors are.
struct PairRows {
  const Pair* at;
  int64_t ld;
};

// Whether token rows may be operands where they are.
inline bool are_pairs(FeatureMap map, const bf16* rows, int64_t step, int64_t dim, int64_t ld) {
  const bool aligned = reinterpret_cast<uintptr_t>(rows) % sizeof(Pair) == 0 && step % 2 == 0;
  return map == FeatureMap::kIdentity && aligned && dim == ld;
}
// Features of token rows, in `room`, where rows are `ld` numbers long and end in zeros.
inline PairRows pair_features(FeatureMap map, const bf16* rows, int64_t step, int64_t count,
                              int64_t dim, Pair* room, int64_t ld) {
  constexpr int64_t kLanes = Simd<float>::kLanes;
  with_map(map, [&](auto m) {
    for (int64_t t = 0; t < count; ++t) {
      const bf16* const from = rows + t * step;
      bf16* const to = reinterpret_cast<bf16*>(room) + t * ld;
      for (int64_t d = 0; d < dim; d += kLanes) {
        const int64_t left = dim - d;
        VecOf<float> x = feature<m.value, float>(widen_part<bf16, float>(from + d, left));
        if (left < kLanes) x = select_bits<float>((uint64_t(1) << left) - 1, x, VecOf<float>{});
        narrow_quickly(to + d, x);
      }
    }
  });
  return {room, ld / 2};
}

// [tokens][pairs] as [pairs][ld]: tokens beyond `count` are 0.
inline void turn_pairs(PairRows rows, int64_t count, int64_t pairs, Pair* out, int64_t ld) {
  constexpr int64_t kLanes = Simd<float>::kLanes;
  const auto number = [](const Pair* p) { return reinterpret_cast<const float*>(p); };
  for (int64_t t = 0; t < whole_vectors<float>(count); t += kLanes) {
    for (int64_t d = 0; d < pairs; d += kLanes) {
      const Pair* const from = rows.at + t * rows.ld + d;
      const int64_t tokens = count - t, there = min64(kLanes, pairs - d);
      VecOf<float> block[kLanes];
      if (tokens >= kLanes && there == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = load(number(from + i * rows.ld));
      } else {
        load_part<float, float>(number(from), rows.ld, tokens, there, block);
      }
      transpose_vectors<float>(block);
      for (int64_t i = 0; i < there; ++i) {
        store(reinterpret_cast<float*>(out + (d + i) * ld + t), block[i]);
      }
    }
  }
}

// Of [pairs][ld], tokens with two numbers each, [2 pairs][ld / 2]: numbers, of two tokens each.
inline void part_pairs(const Pair* turned, int64_t pairs, int64_t ld, int64_t tokens, Pair* out) {
  bf16* const to = reinterpret_cast<bf16*>(out);
  const bf16* const from = reinterpret_cast<const bf16*>(turned);
#if defined(__AVX512BW__) && ATTNEXT_VECTOR_BYTES == 64
  typedef uint16_t Halves __attribute__((vector_size(64)));
  Halves even;
  for (int i = 0; i < 32; ++i) even[i] = static_cast<uint16_t>(2 * i);
  const __m512i evens = (__m512i)even, odds = (__m512i)(even + 1);
  for (int64_t d = 0; d < pairs; ++d) {
    for (int64_t t = 0; t < tokens; t += 16) {
      const __m512i low = _mm512_loadu_si512(from + 2 * (d * ld + t));
      const __m512i first = _mm512_permutexvar_epi16(evens, low);
      const __m512i second = _mm512_permutexvar_epi16(odds, low);
      _mm256_storeu_si256((__m256i*)(to + 2 * d * ld + t), _mm512_castsi512_si256(first));
      _mm256_storeu_si256((__m256i*)(to + (2 * d + 1) * ld + t), _mm512_castsi512_si256(second));
    }
  }
#else
  for (int64_t d = 0; d < pairs; ++d) {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t i = 0; i < 2; ++i) to[(2 * d + i) * ld + t] = from[2 * (d * ld + t) + i];
    }
  }
#endif
}

// Rows as pairs along the tokens, [elements(count)][width].
inline void join_rows(const bf16* rows, int64_t step, int64_t count, int64_t columns, Pair* out,
                      int64_t width) {
  constexpr int64_t kLanes = Simd<float>::kLanes;
  for (int64_t t = 0; t < count; t += 2, out += width) {
    const bf16 *const even = rows + t * step, *const odd = even + step;
    for (int64_t c = 0; c < columns; c += kLanes) {
      const auto at = [&](const bf16* row) {
        return widen_part<bf16, float>(row + c, columns - c);
      };
      const VecOf<float> second = t + 1 < count ? at(odd) : VecOf<float>{};
      store(reinterpret_cast<float*>(out + c), join_pairs(at(even), second));
    }
  }
}

// The same of a state.
inline void join_rows_of_state(const float* state, int64_t features, int64_t width, Pair* out) {
  constexpr int64_t kLanes = Simd<float>::kLanes;
  for (int64_t f = 0; f < features; f += 2, state += 2 * width, out += width) {
    for (int64_t c = 0; c < width; c += kLanes) {
      const VecOf<float> second = f + 1 < features ? load(state + width + c) : VecOf<float>{};
      store(reinterpret_cast<float*>(out + c), make_pairs(load(state + c), second));
    }
  }
}

// And back.
inline void part_rows_of_state(const Pair* pairs, int64_t features, int64_t width, float* state) {
  constexpr int64_t kLanes = Simd<float>::kLanes;
  for (int64_t f = 0; f < features; f += 2, state += 2 * width, pairs += width) {
    for (int64_t c = 0; c < width; c += kLanes) {
      const VecOf<float> both = load(reinterpret_cast<const float*>(pairs + c));
      store(state + c, even_of(both));
      store(state + width + c, odd_of(both));
    }
  }
}

inline bool all_finite(const float* x, int64_t count) {
  constexpr int64_t kLanes = Simd<float>::kLanes;
  VecOf<float> bad[4] = {};
  for (int64_t i = 0; i < count; i += kLanes) bad[i / kLanes % 4] += load(x + i) * 0.0f;
  return add_lanes<float>((bad[0] + bad[1]) + (bad[2] + bad[3])) == 0;
}

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
