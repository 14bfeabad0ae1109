// SPDX-License-Identifier: Apache-2.0
// Tiles in shared memory and the products of tensor cores: the only file with inline PTX.
//
// A tile is rows of `kRowBytes` in chunks of 16 bytes; chunk c of row r lies at c ^ swizzle(r), so
// that eight rows of one chunk, which is what ldmatrix reads at a time, are in distinct banks.
// Two chunks are one step of a product's contraction: 16 numbers of 16 bits, or 8 of fp32.
//
// Fragments (PTX ISA, mma.m16n8k16 and .m16n8k8), g = lane / 4, t = lane % 4: an accumulator holds
// rows g, g + 8 and columns 2t, 2t + 1. An accumulator of a first product, rounded, is the left
// operand of a second one without any exchange between lanes.
#pragma once

#include <stdint.h>

#include "../dtype.h"

namespace attnext {
namespace cuda {

#define ATTNEXT_DEVICE __device__ __forceinline__

// ---- shared memory -----------------------------------------------------------------------------

ATTNEXT_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

template <class T, int kDim>
struct Layout {
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(T));
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kElems = 16 / static_cast<int>(sizeof(T));  // of a chunk
  static_assert(kChunks >= 4, "a row is shorter than 64 bytes");

  static ATTNEXT_DEVICE uint32_t swizzle(uint32_t row) {
    return kChunks >= 8 ? row % 8 : row / 2 % 4;
  }
  static ATTNEXT_DEVICE uint32_t at(uint32_t row, uint32_t chunk) {
    return row * kRowBytes + (chunk ^ swizzle(row)) * 16;
  }
  // Where a lane has its part of columns 8 n on of accumulators' row `row` in a tile, the first of
  // its two numbers, as places(n). Rows eight apart lie alike.
  struct Places {
    uint32_t first;
    ATTNEXT_DEVICE uint32_t operator()(int n) const { return first ^ (n * 8 / kElems * 16); }
  };
  static ATTNEXT_DEVICE Places places(uint32_t tile, uint32_t row) {
    const uint32_t byte = threadIdx.x % 4 * 2 * static_cast<uint32_t>(sizeof(T));
    return {tile + at(row, byte / 16) + byte % 16};
  }
};

// Copies `bytes` (0 to 16) and fills the rest of the chunk with zeros; reads nothing for 0.
ATTNEXT_DEVICE void copy_chunk_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
// All 16 bytes: three instructions less.
ATTNEXT_DEVICE void copy_chunk_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// address + bytes * units: one instruction, but only if `bytes` is not a literal, for which a shift
// and two additions are made.
ATTNEXT_DEVICE const void* chunks_from(uint64_t address, uint32_t units, uint32_t bytes) {
  uint64_t at;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(at) : "r"(units), "r"(bytes), "l"(address));
  return reinterpret_cast<const void*>(at);
}
ATTNEXT_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
ATTNEXT_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

ATTNEXT_DEVICE void store_shared(uint32_t at, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}
ATTNEXT_DEVICE void store_shared(uint32_t at, uint32_t x, uint32_t y) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at), "r"(x), "r"(y) : "memory");
}
ATTNEXT_DEVICE void store_shared(uint32_t at, const uint4& x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}
ATTNEXT_DEVICE uint4 load_shared(uint32_t at) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(at)
               : "memory");
  return x;
}
ATTNEXT_DEVICE float load_shared_float(uint32_t at) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(at) : "memory");
  return x;
}

ATTNEXT_DEVICE void load_matrices(uint32_t (&x)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at)
               : "memory");
}
ATTNEXT_DEVICE void load_matrices_transposed(uint32_t (&x)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at)
               : "memory");
}

// ---- numbers -----------------------------------------------------------------------------------

ATTNEXT_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The same, in a register: the compiler would look for the right one of an array in memory.
ATTNEXT_DEVICE float in_register(float x) {
  asm("" : "+f"(x));
  return x;
}

// The same, and the compiler does not know how it came about: sums with it stay as they are
// written.
ATTNEXT_DEVICE uint32_t opaque(uint32_t x) {
  asm("" : "+r"(x));
  return x;
}

template <class T>
struct Number;
template <>
struct Number<float> {
  static ATTNEXT_DEVICE float widen(float x) { return x; }
  static ATTNEXT_DEVICE float narrow(float x) { return x; }
};
template <>
struct Number<bf16> {
  static ATTNEXT_DEVICE uint32_t pack(float low, float high) {
    uint32_t x;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
  }
  // Of two pairs, each rounded once. PTX has mul for bf16 from sm_90 on only.
  static ATTNEXT_DEVICE uint32_t multiply_pair(uint32_t a, uint32_t b) {
    uint32_t x;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(0x80008000u));  // -0
    return x;
  }
  static ATTNEXT_DEVICE float widen(bf16 x) {
    return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
  }
  static ATTNEXT_DEVICE bf16 narrow(float x) { return {static_cast<uint16_t>(pack(x, 0.f))}; }
};
template <>
struct Number<fp16> {
  static ATTNEXT_DEVICE uint32_t pack(float low, float high) {
    uint32_t x;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
  }
  // Of two pairs, each rounded once. PTX has mul for bf16 from sm_90 on only.
  static ATTNEXT_DEVICE uint32_t multiply_pair(uint32_t a, uint32_t b) {
    uint32_t x;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(0x80008000u));  // -0
    return x;
  }
  static ATTNEXT_DEVICE float widen(fp16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
  }
  static ATTNEXT_DEVICE fp16 narrow(float x) { return {static_cast<uint16_t>(pack(x, 0.f))}; }
};

// ---- products ----------------------------------------------------------------------------------

template <class T>
struct Products {  // bf16 and fp16
  static constexpr int kDepth = 16;
  struct Left {
    uint32_t x[4];
  };
  struct Right {  // two neighbouring groups of eight columns
    uint32_t x[4];
  };

  static ATTNEXT_DEVICE Left load_left(uint32_t at) {
    Left a;
    load_matrices(a.x, at);
    return a;
  }
  static ATTNEXT_DEVICE Right load_right(uint32_t at) {
    Right b;
    load_matrices(b.x, at);
    return b;
  }
  // Rows row0 to row0 + kDepth of a tile are contracted; columns are those of two chunks. `at` is
  // the tile and the lane's place in it.
  template <int kDim>
  static ATTNEXT_DEVICE uint32_t transposed_lane() {
    const int lane = threadIdx.x % 32;
    return Layout<T, kDim>::at(lane % 16, lane / 16);
  }
  template <int kDim>
  static ATTNEXT_DEVICE Right load_right_transposed(uint32_t at, int row0, int chunk) {
    Right b;
    load_matrices_transposed(
        b.x, (at ^ static_cast<uint32_t>(chunk * 16)) + row0 * Layout<T, kDim>::kRowBytes);
    return b;
  }
  // From accumulators [..][2] of 16 columns.
  static ATTNEXT_DEVICE Left round(const float (*c)[4]) {
    return {{Number<T>::pack(c[0][0], c[0][1]), Number<T>::pack(c[0][2], c[0][3]),
             Number<T>::pack(c[1][0], c[1][1]), Number<T>::pack(c[1][2], c[1][3])}};
  }

  static ATTNEXT_DEVICE void multiply(float (&d)[4], const Left& a, uint32_t b0, uint32_t b1);
  static ATTNEXT_DEVICE void multiply(float (&d0)[4], float (&d1)[4], const Left& a,
                                      const Right& b) {
    multiply(d0, a, b.x[0], b.x[1]);
    multiply(d1, a, b.x[2], b.x[3]);
  }
};

#define ATTNEXT_MMA(T, shape, types, a, b)                                            \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." types                        \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"((a)[0]), "r"((a)[1]), "r"((a)[2]), "r"((a)[3]), "r"((b)[0]), "r"((b)[1]))

template <>
ATTNEXT_DEVICE void Products<bf16>::multiply(float (&d)[4], const Left& a, uint32_t b0,
                                             uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  ATTNEXT_MMA(bf16, "m16n8k16", "bf16.bf16", a.x, b);
}
template <>
ATTNEXT_DEVICE void Products<fp16>::multiply(float (&d)[4], const Left& a, uint32_t b0,
                                             uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  ATTNEXT_MMA(fp16, "m16n8k16", "f16.f16", a.x, b);
}

// fp32 as the sum of two tf32: three products of four, the fourth is below fp32's rounding.
template <>
struct Products<float> {
  static constexpr int kDepth = 8;
  struct Left {
    uint32_t high[4], low[4];
  };
  struct Right {
    uint32_t high[4], low[4];
  };

  static ATTNEXT_DEVICE uint32_t to_tf32(float x) {
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
  }
  static ATTNEXT_DEVICE void split(float x, uint32_t& high, uint32_t& low) {
    high = to_tf32(x);
    const float rest = x - __uint_as_float(high);
    low = to_tf32(rest);
  }
  template <class Fragment>
  static ATTNEXT_DEVICE Fragment split(const uint32_t (&x)[4]) {
    Fragment f;
#pragma unroll
    for (int i = 0; i < 4; ++i) split(__uint_as_float(x[i]), f.high[i], f.low[i]);
    return f;
  }
  static ATTNEXT_DEVICE Left load_left(uint32_t at) {
    uint32_t x[4];
    load_matrices(x, at);
    return split<Left>(x);
  }
  static ATTNEXT_DEVICE Right load_right(uint32_t at) {
    uint32_t x[4];
    load_matrices(x, at);
    return split<Right>(x);
  }
  // ldmatrix moves pairs of bytes: it cannot transpose words. Lanes read them one by one, and take
  // rows 2t and 2t + 1, where accumulators have their columns, for t and t + 4 of the contraction.
  template <int kDim>
  static ATTNEXT_DEVICE uint32_t transposed_lane() {
    return 0;
  }
  template <int kDim>
  static ATTNEXT_DEVICE Right load_right_transposed(uint32_t tile, int row0, int chunk) {
    using L = Layout<float, kDim>;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    Right b;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // (row, row + 1) of columns g, then of columns 8 + g
      const uint32_t column = static_cast<uint32_t>((chunk + i / 2 * 2) * 16);
      const uint32_t at = tile + row0 * L::kRowBytes + (L::at(2 * t + i % 2, g / 4) ^ column);
      split(load_shared_float(at + g % 4 * 4), b.high[i], b.low[i]);
    }
    return b;
  }
  // From accumulators of 8 columns, in the order load_right_transposed contracts.
  static ATTNEXT_DEVICE Left round(const float (*c)[4]) {
    Left a;
    split(c[0][0], a.high[0], a.low[0]);
    split(c[0][2], a.high[1], a.low[1]);
    split(c[0][1], a.high[2], a.low[2]);
    split(c[0][3], a.high[3], a.low[3]);
    return a;
  }

  static ATTNEXT_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
    ATTNEXT_MMA(float, "m16n8k8", "tf32.tf32", a, b);
  }
  // Tensor cores cut off what does not fit the larger of the addends instead of rounding it: over a
  // long sum that is a drift many times fp32's error. So they add up only eight products, from
  // zero, and the long sum is an ordinary addition (Ootomo and Yokota, arXiv 2203.03341).
  static ATTNEXT_DEVICE void multiply(float (&d0)[4], float (&d1)[4], const Left& a,
                                      const Right& b) {
    float part[2][4] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      multiply(part[i], a.low, b.high + 2 * i);
      multiply(part[i], a.high, b.low + 2 * i);
      multiply(part[i], a.high, b.high + 2 * i);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) d0[e] += part[0][e], d1[e] += part[1][e];
  }
};

#undef ATTNEXT_MMA

// s[f][columns / 8] += left rows x right rows, contracted over kDim. `left_at` is the lane's place
// in the left tile (see left_lane), `right_at` that in the right one.
template <class T, int kDim>
ATTNEXT_DEVICE uint32_t left_lane(int row0) {
  const int lane = threadIdx.x % 32;
  return Layout<T, kDim>::at(row0 + lane % 16, lane / 16);
}
template <class T, int kDim>
ATTNEXT_DEVICE uint32_t right_lane() {
  const int lane = threadIdx.x % 32;
  return Layout<T, kDim>::at(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

// A lane's places in walked tiles: worked out once. Left alone, the compiler would do it again in
// every step to save a register.
template <class T, int kDim>
struct WalkLanes {
  uint32_t right, transposed;

  ATTNEXT_DEVICE void start() {
    right = right_lane<T, kDim>();
    transposed = Products<T>::template transposed_lane<kDim>();
    asm volatile("" : "+r"(right), "+r"(transposed));
  }
};

// The rows of a warp as left operands: kept in registers, or read again for every product.
template <class T, int kDim, int kFrags, bool kKept>
struct LeftRows {
  static constexpr int kSteps = Layout<T, kDim>::kChunks / 2;
  typename Products<T>::Left kept[kKept ? kFrags : 1][kKept ? kSteps : 1];
  uint32_t at, below = 0;  // below: from the loaded tile to another one like it

  ATTNEXT_DEVICE void load(uint32_t tile, int row0) {
    at = tile + left_lane<T, kDim>(row0);
    if constexpr (kKept) {
#pragma unroll
      for (int f = 0; f < kFrags; ++f) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) kept[f][k] = fetch(f, k);
      }
    }
  }
  ATTNEXT_DEVICE typename Products<T>::Left fetch(int f, int k) const {
    return Products<T>::load_left((at ^ static_cast<uint32_t>(k * 32)) + below +
                                  f * 16 * Layout<T, kDim>::kRowBytes);
  }
  ATTNEXT_DEVICE typename Products<T>::Left operator()(int f, int k) const {
    if constexpr (kKept) {
      return kept[f][k];
    } else {
      return fetch(f, k);
    }
  }
};

// s += rows x walk^T. `walked`: no more rows of the walk than these count, in fragments of 16.
// kSteps: of the contraction, fewer where rows end before the tile's.
template <class T, int kDim, int kFrags, int kWalk, bool kKept,
          int kSteps = LeftRows<T, kDim, kFrags, kKept>::kSteps>
ATTNEXT_DEVICE void add_product(float (&s)[kFrags][kWalk / 8][4],
                                const LeftRows<T, kDim, kFrags, kKept>& rows,
                                const WalkLanes<T, kDim>& lanes, uint32_t walk_tile,
                                int walked = kWalk) {
  const uint32_t at = walk_tile + lanes.right;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    typename Products<T>::Left a[kFrags];
#pragma unroll
    for (int f = 0; f < kFrags; ++f) a[f] = rows(f, k);
#pragma unroll
    for (int n = 0; n < kWalk / 16; ++n) {
      if (n * 16 >= walked) break;
      const auto b = Products<T>::load_right((at ^ static_cast<uint32_t>(k * 32)) +
                                             n * 16 * Layout<T, kDim>::kRowBytes);
#pragma unroll
      for (int f = 0; f < kFrags; ++f) {
        Products<T>::multiply(s[f][2 * n], s[f][2 * n + 1], a[f], b);
      }
    }
  }
}

// s = rows x walk^T
template <class T, int kDim, int kFrags, int kWalk, bool kKept,
          int kSteps = LeftRows<T, kDim, kFrags, kKept>::kSteps>
ATTNEXT_DEVICE void product(float (&s)[kFrags][kWalk / 8][4],
                            const LeftRows<T, kDim, kFrags, kKept>& rows,
                            const WalkLanes<T, kDim>& lanes, uint32_t walk_tile,
                            int walked = kWalk) {
#pragma unroll
  for (int f = 0; f < kFrags; ++f) {
#pragma unroll
    for (int n = 0; n < kWalk / 8; ++n) s[f][n][0] = s[f][n][1] = s[f][n][2] = s[f][n][3] = 0.f;
  }
  add_product<T, kDim, kFrags, kWalk, kKept, kSteps>(s, rows, lanes, walk_tile, walked);
}

// out += weights x kOut columns of the walk from `chunk0` on
template <class T, int kDim, int kOut, int kFrags, int kWalk>
ATTNEXT_DEVICE void accumulate(float (&out)[kFrags][kOut / 8][4],
                               const float (&weights)[kFrags][kWalk / 8][4],
                               const WalkLanes<T, kDim>& lanes, uint32_t walk_tile, int chunk0,
                               int walked = kWalk) {
  constexpr int kDepth = Products<T>::kDepth;
  const uint32_t at = walk_tile + lanes.transposed;
#pragma unroll
  for (int k = 0; k < kWalk / kDepth; ++k) {
    if (k * kDepth >= walked) break;
    typename Products<T>::Left a[kFrags];
#pragma unroll
    for (int f = 0; f < kFrags; ++f) a[f] = Products<T>::round(&weights[f][k * kDepth / 8]);
#pragma unroll
    for (int d = 0; d < kOut / 16; ++d) {
      const auto b = Products<T>::template load_right_transposed<kDim>(
          at, k * kDepth, chunk0 + d * 16 / Layout<T, kDim>::kElems);
#pragma unroll
      for (int f = 0; f < kFrags; ++f) {
        Products<T>::multiply(out[f][2 * d], out[f][2 * d + 1], a[f], b);
      }
    }
  }
}

}  // namespace cuda
}  // namespace attnext
