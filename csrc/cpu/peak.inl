// SPDX-License-Identifier: Apache-2.0
// The machine's own limit: independent multiply-adds in registers, as many as the kernels' tile
// has.
#pragma once

#include "matrix_tiles.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

// Returns the number of floating-point operations done; `sink` keeps the compiler honest.
template <class Elem>
double peak_loop(int64_t iterations, double* sink) {
  using C = Contraction<Elem>;
  using Acc = typename C::Acc;
  constexpr int kChains = 2 * kRows;
  volatile Acc half = Acc(0.5);  // unknown to the compiler, or it would hoist the product
  VecOf<Acc> acc[kChains];
  for (int k = 0; k < kChains; ++k) acc[k] = broadcast<Acc>(half + k);  // equal chains would merge
  const VecOf<Acc> b = broadcast<Acc>(half);
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 32
    for (int k = 0; k < kChains; ++k) {
      if constexpr (C::kDepth == 1) {
        acc[k] = acc[k] * b + b;
      } else {
        const Elem pair{0x3f003f00u};
        acc[k] = C::fma(acc[k], &pair, b);
      }
    }
  }
  for (int k = 0; k < kChains; ++k) *sink += static_cast<double>(acc[k][0]);
  return 2.0 * C::kDepth * kChains * Simd<Acc>::kLanes * static_cast<double>(iterations);
}

#if ATTNEXT_MATRIX_TILES
// The same of tiles: four sums, as the kernels have.
inline double peak_of_tiles(int64_t iterations, double* sink) {
  const tiles::Session session;
  alignas(64) const bf16 numbers[tiles::kNumbers] = {};
  alignas(64) float sum[tiles::kSide * tiles::kSide];
  tiles::zero<0>(), tiles::zero<1>(), tiles::zero<2>(), tiles::zero<3>();
  tiles::load<4>(numbers, 64), tiles::load<5>(numbers, 64);
  tiles::load<6>(numbers, 64), tiles::load<7>(numbers, 64);
  for (int64_t i = 0; i < iterations; ++i) {
    tiles::dot<0, 4, 6>(), tiles::dot<1, 4, 7>(), tiles::dot<2, 5, 6>(), tiles::dot<3, 5, 7>();
  }
  tiles::store<0>(sum, 64);
  *sink += sum[0];
  return 4.0 * 2 * tiles::kSide * tiles::kNumbers * static_cast<double>(iterations);
}
#endif

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
