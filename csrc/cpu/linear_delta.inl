// SPDX-License-Identifier: Apache-2.0
// The delta rule within a chunk (arXiv 2406.06484; gated: 2412.06464). What a token writes is what
// its value lacks of what its key already finds:
//   u_i = beta_i e_i,  e_i = v_i - c_i k_i^T S - sum_{j<i} A_ij u_j,  A_ij = w_ij k_i . k_j,
// S being the state before the chunk, c and w decays: a triangular system for all columns at once.
// With u in the place of v, the rest is linear attention.
#pragma once

#include "linear_decay.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

// a[i][j] = w_ij k_i . k_j for j < i, else 0.
template <class Acc>
void key_products(const Acc* k, int64_t ld, int64_t dim, int64_t count,
                  const ChunkDecay<Acc>* decay, Acc* weights, Acc* a) {
  const int64_t lanes = whole_vectors<Acc>(count);
  product<By::kColumns>(count, lanes, dim, k, ld, k, ld, a, ld, false);
  for (int64_t i = 0; i < count; ++i) {
    Acc* row = a + i * ld;
    if (decay) {
      decay->weights(i, lanes, weights);
      for (int64_t j = 0; j < i; ++j) row[j] *= weights[j];
    }
    for (int64_t j = i; j < lanes; ++j) row[j] = 0;
  }
}

// v_i -= c_i k_i^T S, by way of `read`; c may be null.
template <class Acc>
void subtract_read(const Acc* k, int64_t ld, int64_t dim, int64_t count, const Acc* decay,
                   const Acc* state, int64_t width, Acc* read, Acc* v) {
  constexpr int64_t kLanes = Simd<Acc>::kLanes;
  product<By::kColumns>(count, width, dim, k, ld, state, width, read, width, false);
  for (int64_t i = 0; i < count; ++i) {
    const Acc kept = decay ? decay[i] : Acc(1);
    for (int64_t c = i * width; c < (i + 1) * width; c += kLanes) {
      store(v + c, load(v + c) - load(read + c) * kept);
    }
  }
}

// Forward substitution, a tile of rows at a time. `e` holds v - c k^T S, and then what is lacking.
template <class Acc>
void solve_lower(const Acc* a, int64_t ld, int64_t count, const Acc* beta, Acc* e, Acc* u,
                 Acc* earlier, int64_t width) {
  constexpr int64_t kLanes = Simd<Acc>::kLanes;
  for (int64_t from = 0; from < count; from += kRows) {
    const int64_t to = min64(from + kRows, count);
    product<By::kRows>(to - from, width, from, a + from * ld, ld, u, width, earlier, width, false);
    for (int64_t i = from; i < to; ++i) {
      for (int64_t c = 0; c < width; c += kLanes) {
        VecOf<Acc> x = load(e + i * width + c) - load(earlier + (i - from) * width + c);
        for (int64_t j = from; j < i; ++j) x -= a[i * ld + j] * load(u + j * width + c);
        store(e + i * width + c, x);
        store(u + i * width + c, x * beta[i]);
      }
    }
  }
}

// The transposed system: y_j = du_j - sum_{i>j} beta_i A_ij y_i. `h` becomes -beta y.
template <class Acc>
void solve_upper(const Acc* a, int64_t ld, int64_t count, const Acc* beta, const Acc* du, Acc* y,
                 Acc* h, Acc* later, int64_t width) {
  constexpr int64_t kLanes = Simd<Acc>::kLanes;
  for (int64_t to = count; to > 0;) {
    const int64_t from = max64(to - kRows, 0);
    product<By::kColumns>(to - from, width, count - to, a + to * ld + from, ld, h + to * width,
                          width, later, width, false);
    for (int64_t j = to - 1; j >= from; --j) {
      for (int64_t c = 0; c < width; c += kLanes) {
        VecOf<Acc> x = load(du + j * width + c) + load(later + (j - from) * width + c);
        for (int64_t i = j + 1; i < to; ++i) x += a[i * ld + j] * load(h + i * width + c);
        store(y + j * width + c, x);
        store(h + j * width + c, x * -beta[j]);
      }
    }
    to = from;
  }
}

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
