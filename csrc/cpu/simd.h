// SPDX-License-Identifier: Apache-2.0
// Vectors of the unit's width, on GCC/Clang vector extensions. An ISA unit defines
// ATTNEXT_ISA (its namespace) and ATTNEXT_VECTOR_BYTES, then includes this file; everything lives
// in that namespace, so that no two units share an inline function.
#pragma once

#include <stdint.h>
#include <string.h>

#include <utility>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../dtype.h"

#define ATTNEXT_INLINE inline __attribute__((always_inline))

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

template <class Acc>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(ATTNEXT_VECTOR_BYTES)));
  typedef int32_t Int __attribute__((vector_size(ATTNEXT_VECTOR_BYTES)));
  typedef uint32_t Unsigned __attribute__((vector_size(ATTNEXT_VECTOR_BYTES)));
  typedef uint16_t Half __attribute__((vector_size(ATTNEXT_VECTOR_BYTES / 2)));
  typedef float Unaligned __attribute__((vector_size(ATTNEXT_VECTOR_BYTES), aligned(4), may_alias));
  typedef uint16_t UnalignedHalf
      __attribute__((vector_size(ATTNEXT_VECTOR_BYTES / 2), aligned(2), may_alias));
  using Lane = int32_t;
  static constexpr int kLanes = ATTNEXT_VECTOR_BYTES / 4;
};

template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(ATTNEXT_VECTOR_BYTES)));
  typedef int64_t Int __attribute__((vector_size(ATTNEXT_VECTOR_BYTES)));
  typedef double Unaligned
      __attribute__((vector_size(ATTNEXT_VECTOR_BYTES), aligned(8), may_alias));
  using Lane = int64_t;
  static constexpr int kLanes = ATTNEXT_VECTOR_BYTES / 8;
};

template <class Acc>
using VecOf = typename Simd<Acc>::Vec;
template <class Acc>
using IntOf = typename Simd<Acc>::Int;

template <class Acc>
ATTNEXT_INLINE VecOf<Acc> load(const Acc* p) {
  return *reinterpret_cast<const typename Simd<Acc>::Unaligned*>(p);
}
template <class Acc>
ATTNEXT_INLINE void store(Acc* p, VecOf<Acc> v) {
  *reinterpret_cast<typename Simd<Acc>::Unaligned*>(p) = v;
}
template <class Acc>
ATTNEXT_INLINE VecOf<Acc> broadcast(Acc x) {
  return x - VecOf<Acc>{};
}
// A comparison and a choice that x86 has as one instruction; b where either is NaN.
template <class V>
ATTNEXT_INLINE V max_or_second(V a, V b) {
#if defined(__AVX512F__) && ATTNEXT_VECTOR_BYTES == 64
  if constexpr (sizeof(V{}[0]) == 4) return (V)_mm512_max_ps((__m512)a, (__m512)b);
  if constexpr (sizeof(V{}[0]) == 8) return (V)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__) && ATTNEXT_VECTOR_BYTES == 32
  if constexpr (sizeof(V{}[0]) == 4) return (V)_mm256_max_ps((__m256)a, (__m256)b);
  if constexpr (sizeof(V{}[0]) == 8) return (V)_mm256_max_pd((__m256d)a, (__m256d)b);
#endif
  return a > b ? a : b;
}
template <class V>
ATTNEXT_INLINE V min_or_second(V a, V b) {
#if defined(__AVX512F__) && ATTNEXT_VECTOR_BYTES == 64
  if constexpr (sizeof(V{}[0]) == 4) return (V)_mm512_min_ps((__m512)a, (__m512)b);
  if constexpr (sizeof(V{}[0]) == 8) return (V)_mm512_min_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__) && ATTNEXT_VECTOR_BYTES == 32
  if constexpr (sizeof(V{}[0]) == 4) return (V)_mm256_min_ps((__m256)a, (__m256)b);
  if constexpr (sizeof(V{}[0]) == 8) return (V)_mm256_min_pd((__m256d)a, (__m256d)b);
#endif
  return a < b ? a : b;
}

template <class Acc, int... I>
ATTNEXT_INLINE IntOf<Acc> lane_bits(std::integer_sequence<int, I...>) {
  return IntOf<Acc>{(typename Simd<Acc>::Lane(1) << I)...};
}
// a in the lanes whose bit is set, b elsewhere.
template <class Acc>
ATTNEXT_INLINE VecOf<Acc> select_bits(uint64_t bits, VecOf<Acc> a, VecOf<Acc> b) {
#if defined(__AVX512F__) && ATTNEXT_VECTOR_BYTES == 64
  if constexpr (sizeof(Acc) == 4) {
    return (VecOf<Acc>)_mm512_mask_mov_ps((__m512)b, (__mmask16)bits, (__m512)a);
  } else {
    return (VecOf<Acc>)_mm512_mask_mov_pd((__m512d)b, (__mmask8)bits, (__m512d)a);
  }
#endif
  using Lane = typename Simd<Acc>::Lane;
  const IntOf<Acc> lanes = lane_bits<Acc>(std::make_integer_sequence<int, Simd<Acc>::kLanes>{});
  const IntOf<Acc> hit = (static_cast<Lane>(bits) - IntOf<Acc>{}) & lanes;
  return hit == lanes ? a : b;
}

// Whether |x| > limit in any lane.
template <class Acc>
ATTNEXT_INLINE bool any_beyond(VecOf<Acc> x, Acc limit) {
  const VecOf<Acc> magnitude = x < 0 ? -x : x;
#if defined(__AVX512F__) && ATTNEXT_VECTOR_BYTES == 64
  if constexpr (sizeof(Acc) == 4) {
    return _mm512_cmp_ps_mask((__m512)magnitude, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
  } else {
    return _mm512_cmp_pd_mask((__m512d)magnitude, _mm512_set1_pd(limit), _CMP_GT_OQ) != 0;
  }
#endif
  const IntOf<Acc> beyond = magnitude > limit;
  typename Simd<Acc>::Lane any = 0;
  for (int l = 0; l < Simd<Acc>::kLanes; ++l) any |= beyond[l];
  return any != 0;
}

// 2^x for x <= 127 (1023): exact 0 below -127 (-1023), NaN stays NaN. fp32: minimax polynomial on
// [-1/2, 1/2] in relative error with constant term 1 (2.0e-09, below rounding); fp64: Taylor.
ATTNEXT_INLINE VecOf<float> exp2_poly(VecOf<float> f) {
  VecOf<float> p = broadcast(0.000153533618f);
  p = p * f + 0.00133988744f;
  p = p * f + 0.00961843736f;
  p = p * f + 0.0555033247f;
  p = p * f + 0.240226479f;
  p = p * f + 0.693147203f;
  return p * f + 1.0f;
}
ATTNEXT_INLINE VecOf<float> exp2(VecOf<float> x) {
  using V = VecOf<float>;
  const V magic = broadcast(12582912.0f + 127.0f);  // 1.5 * 2^23 puts the integer in the low bits
  x = max_or_second(broadcast(-127.0f), x);
  const V shifted = x + magic;
  const V f = x - (shifted - magic);
  return exp2_poly(f) * (V)((IntOf<float>)shifted << 23);
}
ATTNEXT_INLINE VecOf<double> exp2(VecOf<double> x) {
  using V = VecOf<double>;
  const V magic = broadcast(6755399441055744.0 + 1023.0);
  x = max_or_second(broadcast(-1023.0), x);
  const V shifted = x + magic;
  const V f = x - (shifted - magic);
  V p = broadcast(0.0);
  // Taylor terms ln(2)^n / n!: at |f| <= 1/2 the first one left out is below 2^-57.
  constexpr double c[] = {1.0,
                          6.931471805599453e-1,
                          2.4022650695910072e-1,
                          5.5504108664821580e-2,
                          9.6181291076284772e-3,
                          1.3333558146428443e-3,
                          1.5403530393381610e-4,
                          1.5252733804059840e-5,
                          1.3215486790144309e-6,
                          1.0178086009239700e-7,
                          7.0549116208011233e-9,
                          4.4455382718708115e-10,
                          2.5678435993488205e-11,
                          1.3691488853904128e-12};
#pragma GCC unroll 14
  for (int n = 13; n >= 0; --n) p = p * f + c[n];
  return p * (V)((IntOf<double>)shifted << 52);
}

ATTNEXT_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
ATTNEXT_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// tanh, as Cephes has it: small arguments by their own series, the rest by 1 - 2/(1 + e^2z).
template <class Acc>
ATTNEXT_INLINE VecOf<Acc> tanh(VecOf<Acc> z) {
  using V = VecOf<Acc>;
  const V magnitude = z < 0 ? -z : z;
  const Acc cut = Acc(0.625);
  const Acc far = sizeof(Acc) == 4 ? Acc(10) : Acc(20);
  const V capped = magnitude > far ? broadcast(far) : magnitude;
  const V e = exp2(capped * Acc(2 * 1.4426950408889634));
  V big = Acc(1) - Acc(2) / (e + Acc(1));
  big = z < 0 ? -big : big;
  const V s = z * z;
  V small;
  if constexpr (sizeof(Acc) == 4) {
    small = broadcast(-5.70498872745e-3f);
    small = small * s + 2.06390887954e-2f;
    small = small * s + -5.37397155531e-2f;
    small = small * s + 1.33314422036e-1f;
    small = small * s + -3.33332819422e-1f;
  } else {
    const V above = (s * -9.64399179425052238628e-1 + -9.92877231001918586564e1) * s +
                    -1.61468768441708447952e3;
    const V below = ((s + 1.12811678491632931402e2) * s + 2.23548839060100448583e3) * s +
                    4.84406305325125486048e3;
    small = above / below;
  }
  small = small * s * z + z;
  return magnitude < cut ? small : (magnitude >= cut ? big : z);
}

// Widening loads and rounding stores, a vector at a time.
ATTNEXT_INLINE VecOf<float> widen(const float* p) { return load(p); }
ATTNEXT_INLINE VecOf<double> widen(const double* p) { return load(p); }
ATTNEXT_INLINE VecOf<float> widen(const bf16* p) {
#if defined(__AVX512F__) && ATTNEXT_VECTOR_BYTES == 64
  // One instruction, of which gcc 12 makes four by way of halves.
  return (VecOf<float>)((IntOf<float>)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p))
                        << 16);
#elif defined(__AVX2__) && ATTNEXT_VECTOR_BYTES == 32
  return (VecOf<float>)((IntOf<float>)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p))
                        << 16);
#else
  const auto h = *reinterpret_cast<const Simd<float>::UnalignedHalf*>(p);
  return (VecOf<float>)(__builtin_convertvector((Simd<float>::Half)h, IntOf<float>) << 16);
#endif
}
ATTNEXT_INLINE VecOf<float> widen(const fp16* p) {
#if defined(__AVX512F__) && ATTNEXT_VECTOR_BYTES == 64
  return (VecOf<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && ATTNEXT_VECTOR_BYTES == 32
  return (VecOf<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  using I = IntOf<float>;
  const auto half = *reinterpret_cast<const Simd<float>::UnalignedHalf*>(p);
  const I h = __builtin_convertvector((Simd<float>::Half)half, I);
  const I magnitude = (h & 0x7fff) << 13;
  // Multiplying by 2^112 moves the exponent bias and normalises subnormals.
  const I finite = (I)((VecOf<float>)magnitude * 5.192296858534828e33f);
  const I wide = (h & 0x7c00) == 0x7c00 ? (magnitude | 0x7f800000) : finite;
  return (VecOf<float>)(wide | ((h & 0x8000) << 16));
#endif
}

// The first n numbers of a vector, or none if there are none, and zeros.
template <class T, class Acc>
ATTNEXT_INLINE VecOf<Acc> widen_part(const T* p, int64_t n) {
  if (n >= Simd<Acc>::kLanes) return widen(p);
  T part[Simd<Acc>::kLanes] = {};
  if (n > 0) memcpy(part, p, sizeof(T) * n);
  return widen(part);
}

// A row as whole vectors, numbers beyond `dim` 0.
template <class T, class Acc>
ATTNEXT_INLINE void widen_row(const T* row, int64_t dim, Acc* out) {
  constexpr int64_t kLanes = Simd<Acc>::kLanes;
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(out + d, widen(row + d));
  if (d < dim) store(out + d, widen_part<T, Acc>(row + d, dim - d));
}

ATTNEXT_INLINE void narrow(float* p, VecOf<float> v) { store(p, v); }
ATTNEXT_INLINE void narrow(double* p, VecOf<double> v) { store(p, v); }
ATTNEXT_INLINE void store_half(void* p, IntOf<float> bits) {
  *reinterpret_cast<Simd<float>::UnalignedHalf*>(p) =
      __builtin_convertvector(bits, Simd<float>::Half);
}
ATTNEXT_INLINE IntOf<float> bf16_bits(VecOf<float> v) {
  typedef uint32_t U __attribute__((vector_size(ATTNEXT_VECTOR_BYTES)));
  const U u = (U)v;
  const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const U quiet = (u >> 16) | 0x40u;
  return (IntOf<float>)(v == v ? (IntOf<float>)rounded : (IntOf<float>)quiet);
}
ATTNEXT_INLINE void narrow(bf16* p, VecOf<float> v) {
#if defined(__AVX512BF16__) && ATTNEXT_VECTOR_BYTES == 64
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)v, 0x20) == 0, 1)) {
    // Rounds the same way, but for subnormal numbers, which it takes for 0.
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
    return;
  }
#endif
  store_half(p, bf16_bits(v));
}
ATTNEXT_INLINE void narrow(fp16* p, VecOf<float> v) {
#if defined(__AVX512F__) && ATTNEXT_VECTOR_BYTES == 64
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, 0));
#elif defined(__F16C__) && ATTNEXT_VECTOR_BYTES == 32
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, 0));
#else
  using I = IntOf<float>;
  const I u = (I)v;
  const I sign = (I)((u >> 16) & 0x8000);
  const I a = u & 0x7fffffff;
  // Subnormal results: adding 2^-1 aligns the mantissa so that the hardware rounds it.
  const I subnormal = (I)((VecOf<float>)a + 0.5f) - 0x3f000000;
  const I normal = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
  I h = a < 0x38800000 ? subnormal : normal;
  h = a >= 0x477ff000 ? (I{} + 0x7c00) : h;
  h = a > 0x7f800000 ? (I{} + 0x7e00) : h;
  store_half(p, h | sign);
#endif
}

// The element two products contract over: one number, or a pair of bf16 where the CPU has a dot
// instruction for them. Both are four bytes wide beside fp32 accumulators.
struct Pair {
  uint32_t bits;
};

template <class Elem>
struct Contraction;  // Acc, Vec of elements, fma

template <>
struct Contraction<float> {
  using Acc = float;
  static constexpr int kDepth = 1;
  static ATTNEXT_INLINE VecOf<float> load_elems(const float* p) { return load(p); }
  static ATTNEXT_INLINE VecOf<float> fma(VecOf<float> acc, const float* e, VecOf<float> b) {
    return acc + *e * b;
  }
};
template <>
struct Contraction<double> {
  using Acc = double;
  static constexpr int kDepth = 1;
  static ATTNEXT_INLINE VecOf<double> load_elems(const double* p) { return load(p); }
  static ATTNEXT_INLINE VecOf<double> fma(VecOf<double> acc, const double* e, VecOf<double> b) {
    return acc + *e * b;
  }
};
template <>
struct Contraction<Pair> {
  using Acc = float;
  static constexpr int kDepth = 2;
  static ATTNEXT_INLINE VecOf<float> load_elems(const Pair* p) {
    return load(reinterpret_cast<const float*>(p));
  }
  static ATTNEXT_INLINE VecOf<float> fma(VecOf<float> acc, const Pair* e, VecOf<float> b) {
    int32_t bits;
    memcpy(&bits, e, 4);
    return dot(acc, (VecOf<float>)(bits - IntOf<float>{}), b);
  }
  static ATTNEXT_INLINE VecOf<float> dot(VecOf<float> acc, VecOf<float> a, VecOf<float> b) {
#if defined(__AVX512BF16__) && ATTNEXT_VECTOR_BYTES == 64
    return (VecOf<float>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
#else
    const IntOf<float> x = (IntOf<float>)a, y = (IntOf<float>)b;
    acc += (VecOf<float>)(x & (int32_t)0xffff0000) * (VecOf<float>)(y & (int32_t)0xffff0000);
    return acc + (VecOf<float>)(x << 16) * (VecOf<float>)(y << 16);
#endif
  }
};

#if defined(__AVX512BF16__) && ATTNEXT_VECTOR_BYTES == 64
ATTNEXT_INLINE __m512i interleave_halves() {
  typedef uint16_t Halves __attribute__((vector_size(64)));
  return (__m512i)Halves{0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
}
#endif
// Two rows of numbers as one row of bf16 pairs: `even` in the low half.
ATTNEXT_INLINE VecOf<float> make_pairs(VecOf<float> even, VecOf<float> odd) {
#if defined(__AVX512BF16__) && ATTNEXT_VECTOR_BYTES == 64
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return (VecOf<float>)_mm512_permutexvar_epi16(interleave_halves(), both);
#else
  return (VecOf<float>)((bf16_bits(even) & 0xffff) | (bf16_bits(odd) << 16));
#endif
}
// narrow(), but subnormal numbers become 0, as the dot instruction takes them.
ATTNEXT_INLINE void narrow_quickly(bf16* p, VecOf<float> v) {
#if defined(__AVX512BF16__) && ATTNEXT_VECTOR_BYTES == 64
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  narrow(p, v);
#endif
}

// Numbers that are bf16 but for their type as a row of pairs.
ATTNEXT_INLINE VecOf<float> join_pairs(VecOf<float> even, VecOf<float> odd) {
  using U = Simd<float>::Unsigned;
  return (VecOf<float>)(((U)even >> 16) | ((U)odd & 0xffff0000u));
}

// Numbers as sums of two bf16: fp16 exactly, others to 16 bits. What is not finite leaves a NaN.
struct Parts {
  VecOf<float> part[2];
};
ATTNEXT_INLINE Parts split(VecOf<float> x) {
  const VecOf<float> first = (VecOf<float>)((IntOf<float>)x & (int32_t)0xffff0000);
  const IntOf<float> rest = (IntOf<float>)(x - first) + 0x8000;  // rounded
  return {{first, (VecOf<float>)(rest & (int32_t)0xffff0000)}};
}
// The high halves of two vectors as a row of bf16.
ATTNEXT_INLINE void store_high_halves(VecOf<float> a, VecOf<float> b, bf16* out) {
#if defined(__AVX512BW__) && ATTNEXT_VECTOR_BYTES == 64
  typedef uint16_t Halves __attribute__((vector_size(64)));
  const Halves odd = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                      33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  _mm512_storeu_si512(out, _mm512_permutex2var_epi16((__m512i)a, (__m512i)odd, (__m512i)b));
#else
  store_half(out, (IntOf<float>)((Simd<float>::Unsigned)a >> 16));
  store_half(out + Simd<float>::kLanes, (IntOf<float>)((Simd<float>::Unsigned)b >> 16));
#endif
}
// Two vectors as a row of each part.
ATTNEXT_INLINE void store_parts(VecOf<float> a, VecOf<float> b, bf16* out, int64_t apart) {
  const Parts x = split(a), y = split(b);
  for (int i = 0; i < 2; ++i) store_high_halves(x.part[i], y.part[i], out + i * apart);
}
// Two rows as one of pairs, of each part.
ATTNEXT_INLINE void store_pairs(VecOf<float> even, VecOf<float> odd, float* out, int64_t apart) {
  const Parts x = split(even), y = split(odd);
  for (int i = 0; i < 2; ++i) store(out + i * apart, join_pairs(x.part[i], y.part[i]));
}

// The numbers of a row of pairs.
ATTNEXT_INLINE VecOf<float> even_of(VecOf<float> pairs) {
  return (VecOf<float>)((IntOf<float>)pairs << 16);
}
ATTNEXT_INLINE VecOf<float> odd_of(VecOf<float> pairs) {
  return (VecOf<float>)((IntOf<float>)pairs & (int32_t)0xffff0000);
}

// In-register transpose of kLanes vectors: log2(kLanes) rounds of exchanging blocks.
template <int Step, int... I>
ATTNEXT_INLINE void exchange(VecOf<float>& a, VecOf<float>& b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  const VecOf<float> x = a, y = b;
  a = __builtin_shufflevector(x, y, ((I & Step) ? n + I - Step : I)...);
  b = __builtin_shufflevector(x, y, ((I & Step) ? n + I : I + Step)...);
}
template <int Step, int... I>
ATTNEXT_INLINE void exchange(VecOf<double>& a, VecOf<double>& b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  const VecOf<double> x = a, y = b;
  a = __builtin_shufflevector(x, y, ((I & Step) ? n + I - Step : I)...);
  b = __builtin_shufflevector(x, y, ((I & Step) ? n + I : I + Step)...);
}
#if defined(__AVX512F__) && ATTNEXT_VECTOR_BYTES == 64
// With shuffles that need no index register: 4x4 blocks inside 128-bit lanes, then the lanes.
ATTNEXT_INLINE void transpose_16x16(VecOf<float>* r) {
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512 a = (__m512)r[i], b = (__m512)r[i + 1], c = (__m512)r[i + 2], d = (__m512)r[i + 3];
    const __m512 ab0 = _mm512_unpacklo_ps(a, b), ab1 = _mm512_unpackhi_ps(a, b);
    const __m512 cd0 = _mm512_unpacklo_ps(c, d), cd1 = _mm512_unpackhi_ps(c, d);
    r[i] = (VecOf<float>)_mm512_shuffle_ps(ab0, cd0, 0x44);
    r[i + 1] = (VecOf<float>)_mm512_shuffle_ps(ab0, cd0, 0xee);
    r[i + 2] = (VecOf<float>)_mm512_shuffle_ps(ab1, cd1, 0x44);
    r[i + 3] = (VecOf<float>)_mm512_shuffle_ps(ab1, cd1, 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = (__m512)r[i], b = (__m512)r[i + 4], c = (__m512)r[i + 8],
                 d = (__m512)r[i + 12];
    const __m512 ab0 = _mm512_shuffle_f32x4(a, b, 0x88), ab1 = _mm512_shuffle_f32x4(a, b, 0xdd);
    const __m512 cd0 = _mm512_shuffle_f32x4(c, d, 0x88), cd1 = _mm512_shuffle_f32x4(c, d, 0xdd);
    r[i] = (VecOf<float>)_mm512_shuffle_f32x4(ab0, cd0, 0x88);
    r[i + 4] = (VecOf<float>)_mm512_shuffle_f32x4(ab1, cd1, 0x88);
    r[i + 8] = (VecOf<float>)_mm512_shuffle_f32x4(ab0, cd0, 0xdd);
    r[i + 12] = (VecOf<float>)_mm512_shuffle_f32x4(ab1, cd1, 0xdd);
  }
}
#endif
template <class Acc, int Step>
ATTNEXT_INLINE void transpose_step(VecOf<Acc>* r) {
  constexpr int n = Simd<Acc>::kLanes;
  if constexpr (Step < n) {
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if (!(i & Step)) exchange<Step>(r[i], r[i + Step], std::make_integer_sequence<int, n>{});
    }
    transpose_step<Acc, Step * 2>(r);
  }
}
// Transposes kLanes vectors in place.
template <class Acc>
ATTNEXT_INLINE void transpose_vectors(VecOf<Acc>* r) {
#if defined(__AVX512F__) && ATTNEXT_VECTOR_BYTES == 64
  if constexpr (sizeof(Acc) == 4) return transpose_16x16(r);
#endif
  transpose_step<Acc, 1>(r);
}
// dst[c * ld_dst + r] = src[r * ld_src + c], one kLanes x kLanes block.
template <class Acc>
ATTNEXT_INLINE void transpose_block(const Acc* src, int64_t ld_src, Acc* dst, int64_t ld_dst) {
  constexpr int n = Simd<Acc>::kLanes;
  VecOf<Acc> r[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) r[i] = load(src + i * ld_src);
  transpose_vectors<Acc>(r);
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) store(dst + i * ld_dst, r[i]);
}

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
