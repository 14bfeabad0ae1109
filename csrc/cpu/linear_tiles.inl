// SPDX-License-Identifier: Apache-2.0
// The terms of linear attention's products, and those of bf16 pairs as products of tiles
// (matrix_tiles.inl).
#pragma once

#include "matrix_tiles.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

// How the left factor lies: a(m, l) = a[m][l] or a[l][m].
enum class By { kRows, kColumns };

template <class Acc>
ATTNEXT_INLINE constexpr int64_t whole_vectors(int64_t n) {
  return (n + Simd<Acc>::kLanes - 1) / Simd<Acc>::kLanes * Simd<Acc>::kLanes;
}

// What becomes of c: kept times what c holds, or what is at `from`, plus taken times the product.
// Nothing is read unless `reads`. The same becomes of `also`, a matrix like c, if there is one.
template <class Acc>
struct Mix {
  bool reads;
  Acc kept = 1, taken = 1;
  const Acc* from = nullptr;
  Acc* also = nullptr;
  bool also_reads = false;

  Mix at(int64_t offset) const {
    return {reads, kept, taken, moved(from, offset), moved(also, offset), also_reads};
  }
  const Acc* source(const Acc* c) const { return from ? from : c; }
  // For that other matrix.
  Mix of_also() const { return {also_reads, kept, taken}; }

 private:
  template <class P>
  static P* moved(P* p, int64_t offset) {
    return p ? p + offset : p;
  }
};

namespace tiles {

// Left factors of up to kSide rows, kSpan numbers each: where they lie, or as a copy.
struct LeftFactors {
  static constexpr int64_t kMost = 16;
  const void* at[kMost];
  int64_t stride[kMost];
  alignas(64) Pair room[kMost][kSide * kSide];

  // Of a(m, l) for m < rows and pairs l in [0, depth); what a tile has beyond them is 0, or, in
  // rows, anything.
  template <By kBy>
  void take(const Pair* a, int64_t lda, int64_t rows, int64_t depth) {
    for (int64_t l = 0; l < depth; l += kSide) {
      const int64_t k = l / kSide, there = min64(kSide, depth - l);
      if (kBy == By::kRows && rows >= kSide && there == kSide) {
        at[k] = a + l, stride[k] = 4 * lda;
        continue;
      }
      at[k] = room[k], stride[k] = 4 * kSide;
      if constexpr (kBy == By::kRows) {
        memset(room[k], 0, sizeof(room[k]));
        for (int64_t m = 0; m < min64(rows, kSide); ++m) {
          memcpy(room[k] + m * kSide, a + m * lda + l, sizeof(Pair) * there);
        }
      } else {
        VecOf<float> r[kSide];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kSide; ++i) {
          r[i] = i < there ? load_numbers(a + (l + i) * lda) : VecOf<float>{};
        }
        transpose_vectors<float>(r);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kSide; ++i) {
          cpu::ATTNEXT_ISA::store(reinterpret_cast<float*>(room[k] + i * kSide), r[i]);
        }
      }
    }
  }

 private:
  static ATTNEXT_INLINE VecOf<float> load_numbers(const Pair* p) {
    return cpu::ATTNEXT_ISA::load(reinterpret_cast<const float*>(p));
  }
};

// c[m][n] of one tile of rows, one or two of columns, and at most LeftFactors::kMost spans.
template <bool kTwo>
void product_tile(const LeftFactors& left, int64_t rows, int64_t depth, const Pair* b, int64_t ldb,
                  float* c, int64_t ldc, Mix<float> mix) {
  const bool whole = rows == kSide && mix.taken == 1 && (!mix.reads || mix.kept == 1);
  if (whole && mix.reads) {
    load<0>(mix.source(c), 4 * ldc);
    if (kTwo) load<1>(mix.source(c) + kSide, 4 * ldc);
  } else {
    zero<0>();
    if (kTwo) zero<1>();
  }
  int64_t l = 0;
  for (; l + kSide <= depth; l += kSide) {
    load<2>(left.at[l / kSide], left.stride[l / kSide]);
    load<3>(b + l * ldb, 4 * ldb);
    dot<0, 2, 3>();
    if (kTwo) {
      load<4>(b + l * ldb + kSide, 4 * ldb);
      dot<1, 2, 4>();
    }
  }
  if (l < depth) {
    constexpr int64_t kWidth = kTwo ? 2 * kSide : kSide;
    alignas(64) Pair rest[kSide * kWidth];
    for (int64_t i = 0; i < kSide; ++i) {
      if (l + i < depth) {
        memcpy(rest + i * kWidth, b + (l + i) * ldb, sizeof(Pair) * kWidth);
      } else {
        memset(rest + i * kWidth, 0, sizeof(Pair) * kWidth);
      }
    }
    load<2>(left.at[l / kSide], left.stride[l / kSide]);
    load<3>(rest, 4 * kWidth);
    dot<0, 2, 3>();
    if (kTwo) {
      load<4>(rest + kSide, 4 * kWidth);
      dot<1, 2, 4>();
    }
  }
  if (whole) {
    store<0>(c, 4 * ldc);
    if (kTwo) store<1>(c + kSide, 4 * ldc);
    return;
  }
  alignas(64) float sums[2][kSide * kSide];
  store<0>(sums[0], 4 * kSide);
  if (kTwo) store<1>(sums[1], 4 * kSide);
  for (int64_t m = 0; m < rows; ++m) {
    for (int n = 0; n < 1 + kTwo; ++n) {
      const int64_t at = m * ldc + n * kSide;
      VecOf<float> sum = cpu::ATTNEXT_ISA::load(sums[n] + m * kSide) * mix.taken;
      if (mix.reads) sum += cpu::ATTNEXT_ISA::load(mix.source(c) + at) * mix.kept;
      cpu::ATTNEXT_ISA::store(c + at, sum);
    }
  }
}

// Like the function of that name for any element; `depth` counts pairs.
template <By kBy>
void product(int64_t rows, int64_t columns, int64_t depth, const Pair* a, int64_t lda,
             const Pair* b, int64_t ldb, float* c, int64_t ldc, Mix<float> mix, Ahead* ahead) {
  LeftFactors left;
  constexpr int64_t kBand = LeftFactors::kMost * kSide;
  for (int64_t m = 0; m < rows; m += kSide) {
    const int64_t count = min64(kSide, rows - m);
    for (int64_t l = 0; l == 0 || l < depth; l += kBand) {
      const int64_t band = min64(kBand, depth - l);
      const Mix<float> now =
          (l == 0 ? mix : Mix<float>{true, 1, mix.taken, nullptr, mix.also, true}).at(m * ldc);
      const Pair* const from = kBy == By::kRows ? a + m * lda + l : a + l * lda + m;
      left.take<kBy>(from, lda, count, band);
      const auto columns_from = [&](auto two, int64_t n) {
        const Pair* const right = b + l * ldb + n;
        const Mix<float> here = now.at(n);
        product_tile<two.value>(left, count, band, right, ldb, c + m * ldc + n, ldc, here);
        if (here.also) {
          product_tile<two.value>(left, count, band, right, ldb, here.also, ldc, here.of_also());
        }
        if (ahead) ahead->start(1);
      };
      int64_t n = 0;
      for (; n + kSide < columns; n += 2 * kSide) columns_from(std::true_type{}, n);
      if (n < columns) columns_from(std::false_type{}, n);
    }
  }
}

}  // namespace tiles
}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
