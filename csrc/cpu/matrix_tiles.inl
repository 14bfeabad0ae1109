// SPDX-License-Identifier: Apache-2.0
// The products of attention where the CPU multiplies tiles (Intel AMX): 16 x 32 by 32 x 16 bf16 in
// one instruction, sixteen times what a vector unit does in the time. A tile register is 16 rows of
// 64 bytes; a row of the left factor is 32 bf16, of the right one 16 pairs that are contracted
// together, of the sum 16 fp32 (Intel SDM, volume 2, TDPBF16PS). Numbers of fp16 are sums of two
// bf16, and their products three or four of those.
//
//   scores        S[16 keys][16 lanes]  = K[keys][dims]    Q[dims][lanes]
//   accumulate    O[16 dims][16 lanes] += V[dims][keys]    P[keys][lanes]
//   outer         dV[16 keys][16 dims] += P[keys][lanes]  dO[lanes][dims]
//
// Operands are padded with zeros to whole tiles. Without AMX the same code runs on plain loops, for
// tests.
#pragma once

#include <type_traits>

#include "tile.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {
namespace tiles {

constexpr int64_t kSide = 16;                // rows of any tile, columns of a sum
constexpr int64_t kSpan = 32;                // numbers that one instruction contracts over
constexpr int64_t kNumbers = kSide * kSpan;  // bf16 in a factor

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

#if defined(__AMX_BF16__)

// Tile registers hold what they are told to while a Session lives.
class Session {
 public:
  Session() {
    // Palette 1, and for each register 64 bytes a row and 16 rows.
    alignas(64) uint8_t config[64] = {1};
    for (int t = 0; t < 8; ++t) {
      config[16 + 2 * t] = 64;
      config[48 + t] = kSide;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Session() { asm volatile("tilerelease"); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
};
template <int T>
ATTNEXT_INLINE void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
ATTNEXT_INLINE void load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
ATTNEXT_INLINE void store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int Sum, int A, int B>
ATTNEXT_INLINE void dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
}

#else

struct Session {
  alignas(64) uint32_t tile[8][kSide * kSide] = {};
  Session* outer;
  static Session*& current() {
    static thread_local Session* session = nullptr;
    return session;
  }
  Session() : outer(current()) { current() = this; }
  ~Session() { current() = outer; }
};
template <int T>
void zero() {
  memset(Session::current()->tile[T], 0, sizeof(Session::current()->tile[T]));
}
template <int T>
void load(const void* p, int64_t stride) {
  for (int64_t r = 0; r < kSide; ++r) {
    memcpy(Session::current()->tile[T] + r * kSide, static_cast<const char*>(p) + r * stride, 64);
  }
}
template <int T>
void store(void* p, int64_t stride) {
  for (int64_t r = 0; r < kSide; ++r) {
    memcpy(static_cast<char*>(p) + r * stride, Session::current()->tile[T] + r * kSide, 64);
  }
}
template <int Sum, int A, int B>
void dot() {
  auto& tile = Session::current()->tile;
  for (int64_t m = 0; m < kSide; ++m) {
    VecOf<float> even{}, odd{};
    for (int64_t k = 0; k < kSide; ++k) {
      const IntOf<float> a = static_cast<int32_t>(tile[A][m * kSide + k]) - IntOf<float>{};
      const VecOf<float> b = cpu::ATTNEXT_ISA::load(reinterpret_cast<float*>(tile[B] + k * kSide));
      even += even_of((VecOf<float>)a) * even_of(b);
      odd += odd_of((VecOf<float>)a) * odd_of(b);
    }
    float* const sum = reinterpret_cast<float*>(tile[Sum] + m * kSide);
    cpu::ATTNEXT_ISA::store(sum, cpu::ATTNEXT_ISA::load(sum) + (even + odd));
  }
}

#endif

template <bool>
struct SessionIf {};
template <>
struct SessionIf<true> : Session {};

// A left factor's tiles of rows: bytes from row to row, from one span of what is contracted to the
// next, and from one part of the numbers to the next (simd.h, split).
struct Left {
  const void* at;
  int64_t row, span, part;
};
// A right factor: rows of pairs, kSide of them a span.
struct Right {
  const void* at;
  int64_t row, part;
};

// Sums of M by N tiles are in the registers 2 m + n, or, of one tile of rows, n.
template <int M, int N>
ATTNEXT_INLINE void zero_sums() {
  zero<0>();
  if constexpr (N > 1) zero<1>();
  if constexpr (M > 1 || N > 2) zero<2>();
  if constexpr (M * N > 2) zero<3>();
}
template <int M, int N>
ATTNEXT_INLINE void load_sums(float* const (&c)[M], int64_t row) {
  load<0>(c[0], row);
  if constexpr (N > 1) load<1>(c[0] + kSide, row);
  if constexpr (N > 2) load<2>(c[0] + 2 * kSide, row), load<3>(c[0] + 3 * kSide, row);
  if constexpr (M > 1) load<2>(c[1], row);
  if constexpr (M > 1 && N > 1) load<3>(c[1] + kSide, row);
}
template <int M, int N>
ATTNEXT_INLINE void store_sums(float* const (&c)[M], int64_t row) {
  store<0>(c[0], row);
  if constexpr (N > 1) store<1>(c[0] + kSide, row);
  if constexpr (N > 2) store<2>(c[0] + 2 * kSide, row), store<3>(c[0] + 3 * kSide, row);
  if constexpr (M > 1) store<2>(c[1], row);
  if constexpr (M > 1 && N > 1) store<3>(c[1] + kSide, row);
}
// Adds up the products of numbers of kParts parts; of parts that together are below the last bits
// of the product only if `kAll`. Four sums hide how long one product takes.
template <int kParts, int M, int N, bool kAll = false>
ATTNEXT_INLINE void add_products(const Left (&a)[M], const Right& b, int64_t spans) {
  static_assert((M == 1 && (N == 1 || N == 2 || N == 4)) || (M == 2 && N <= 2), "registers");
  constexpr int64_t kTile = 4 * kSide;
  const auto left = [&](int m, int64_t s, int i) {
    return static_cast<const char*>(a[m].at) + s * a[m].span + i * a[m].part;
  };
  for (int64_t s = 0; s < spans; ++s) {
#pragma GCC unroll 2
    for (int i = 0; i < kParts; ++i) {
      load<4>(left(0, s, i), a[0].row);
      if constexpr (M > 1) load<5>(left(1, s, i), a[1].row);
#pragma GCC unroll 2
      for (int j = 0; j < (kAll ? kParts : kParts - i); ++j) {
        const char* const right = static_cast<const char*>(b.at) + s * kSide * b.row + j * b.part;
        load<6>(right, b.row);
        dot<0, 4, 6>();
        if constexpr (N > 1) {
          load<7>(right + kTile, b.row);
          dot<1, 4, 7>();
        }
        if constexpr (M > 1) dot<2, 5, 6>();
        if constexpr (M > 1 && N > 1) dot<3, 5, 7>();
        if constexpr (N > 2) {
          load<5>(right + 2 * kTile, b.row);
          dot<2, 4, 5>();
          load<6>(right + 3 * kTile, b.row);
          dot<3, 4, 6>();
        }
      }
    }
  }
}

// out[j][l] for the keys of some groups of kSide, and one or two vectors of lanes; rows of `out`
// are ld numbers apart. Scores of fp16 are exact to the last bits of fp32, as lse is.
template <int kParts, bool kTwo>
void scores(const Left* groups, int64_t count, int64_t dims, const Right& queries, float* out,
            int64_t ld) {
  constexpr int N = 1 + kTwo;
  constexpr bool kAll = kParts == 2;
  const auto sums = [&](int64_t g) { return out + g * kSide * ld; };
  int64_t g = 0;
  for (; g + 2 <= count; g += 2) {
    zero_sums<2, N>();
    add_products<kParts, 2, N, kAll>({groups[g], groups[g + 1]}, queries, dims / kSpan);
    store_sums<2, N>({sums(g), sums(g + 1)}, 4 * ld);
  }
  if (g == count) return;
  zero_sums<1, N>();
  add_products<kParts, 1, N, kAll>({groups[g]}, queries, dims / kSpan);
  store_sums<1, N>({sums(g)}, 4 * ld);
}

// out[d][l] += the products of rows, turned to [dims][keys], with pairs of keys' weights of one or
// two vectors of lanes.
template <int kParts, bool kTwo>
void accumulate(const Left& turned, const Right& weights, int64_t spans, int64_t dims, float* out,
                int64_t ld) {
  constexpr int N = 1 + kTwo;
  const auto rows = [&](int64_t d) {
    Left left = turned;
    left.at = static_cast<const char*>(turned.at) + d * turned.row;
    return left;
  };
  for (int64_t d = 0; d < dims; d += 2 * kSide) {
    float* const sums[2] = {out + d * ld, out + (d + kSide) * ld};
    load_sums<2, N>(sums, 4 * ld);
    add_products<kParts, 2, N>({rows(d), rows(d + kSide)}, weights, spans);
    store_sums<2, N>(sums, 4 * ld);
  }
}

// out[j][d] += the products of weights [kSide keys][lanes] with pairs of lanes. Rows of `out` are
// those of accumulators. `room`: kSide rows of dims; where rows of `out` are not one stride apart,
// they get their share from there.
template <int kParts>
void outer(const Left& weights, int64_t lanes, const Right& pairs, int64_t dims, float* const* out,
           int64_t count, float* room) {
  const int64_t stride = count > 1 ? out[1] - out[0] : dims;
  bool even = count == kSide;
  for (int64_t j = 1; j < count; ++j) even &= out[j] == out[0] + j * stride;
  float* const sums = even ? out[0] : room;
  const int64_t row = even ? 4 * stride : 4 * dims;
  const auto columns = [&](auto n, int64_t d) {
    constexpr int N = decltype(n)::value;
    float* const c[1] = {sums + d};
    even ? load_sums<1, N>(c, row) : zero_sums<1, N>();
    const Right b{static_cast<const Pair*>(pairs.at) + d, pairs.row, pairs.part};
    add_products<kParts, 1, N>({weights}, b, lanes / kSpan);
    store_sums<1, N>(c, row);
  };
  int64_t d = 0;
  for (; d + 4 * kSide <= dims; d += 4 * kSide) columns(std::integral_constant<int, 4>{}, d);
  if (d < dims) columns(std::integral_constant<int, 2>{}, d);
  for (int64_t j = 0; !even && j < count; ++j) {
    for (int64_t c = 0; c < dims; c += kSide) {
      using cpu::ATTNEXT_ISA::load;
      cpu::ATTNEXT_ISA::store(out[j] + c, load(out[j] + c) + load(room + j * dims + c));
    }
  }
}

}  // namespace tiles
}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
