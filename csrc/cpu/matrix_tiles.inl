// SPDX-License-Identifier: Apache-2.0
// The products of attention on bf16 pairs where the CPU multiplies tiles (Intel AMX): 16 x 32 by
// 32 x 16 numbers in one instruction, sixteen times what a vector unit does in the time. A tile
// register is 16 rows of 64 bytes; a row of the left factor is 32 bf16, of the right one 16 pairs
// that are contracted together, of the sum 16 fp32 (Intel SDM, volume 2, TDPBF16PS).
//
//   scores        S[16 keys][16 lanes]  = K[keys][dims]     Q[dims][lanes]
//   accumulate    O[16 lanes][16 dims] += P[lanes][keys]    V[keys][dims]
//   outer         dV[16 keys][16 dims] += P[keys][lanes]   dO[lanes][dims]
//
// Operands are padded with zeros to whole tiles. Without AMX the same code runs on plain loops, for
// tests.
#pragma once

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

// Rows of kSide keys, `stride` bytes apart.
struct RowGroup {
  const char* rows;
  int64_t stride;
};

// out[j][l] for the keys of groups [begin, end) and one or two vectors of lanes: rows of `columns`
// and `out` are ld numbers apart.
template <bool kTwo>
void scores(const RowGroup* groups, int64_t begin, int64_t end, int64_t dims, const Pair* columns,
            float* out, int64_t ld) {
  const int64_t row = 4 * ld;
  const auto sum = [&](int64_t g) { return out + g * kSide * ld; };
  int64_t g = begin;
  if (dims <= 2 * kSpan) {  // the queries stay in registers
    const bool more = dims > kSpan;
    load<4>(columns, row);
    if (kTwo) load<5>(columns + kSide, row);
    if (more) load<6>(columns + kSpan / 2 * ld, row);
    if (kTwo && more) load<7>(columns + kSpan / 2 * ld + kSide, row);
    for (; g < end; ++g) {
      const RowGroup& keys = groups[g];
      zero<0>();
      if (kTwo) zero<1>();
      load<2>(keys.rows, keys.stride);
      dot<0, 2, 4>();
      if (kTwo) dot<1, 2, 5>();
      if (more) {
        load<3>(keys.rows + 2 * kSpan, keys.stride);
        dot<0, 3, 6>();
        if (kTwo) dot<1, 3, 7>();
      }
      store<0>(sum(g), row);
      if (kTwo) store<1>(sum(g) + kSide, row);
    }
    return;
  }
  for (; g + 2 <= end; g += 2) {
    const RowGroup &keys = groups[g], &next = groups[g + 1];
    zero<0>(), zero<1>();
    if (kTwo) zero<2>(), zero<3>();
    for (int64_t c = 0; c < dims; c += kSpan) {
      load<4>(keys.rows + 2 * c, keys.stride);
      load<5>(next.rows + 2 * c, next.stride);
      load<6>(columns + c / 2 * ld, row);
      dot<0, 4, 6>(), dot<1, 5, 6>();
      if (kTwo) {
        load<7>(columns + c / 2 * ld + kSide, row);
        dot<2, 4, 7>(), dot<3, 5, 7>();
      }
    }
    store<0>(sum(g), row), store<1>(sum(g + 1), row);
    if (kTwo) store<2>(sum(g) + kSide, row), store<3>(sum(g + 1) + kSide, row);
  }
  if (g == end) return;
  zero<0>();
  if (kTwo) zero<2>();
  for (int64_t c = 0; c < dims; c += kSpan) {
    load<4>(groups[g].rows + 2 * c, groups[g].stride);
    load<6>(columns + c / 2 * ld, row);
    dot<0, 4, 6>();
    if (kTwo) {
      load<7>(columns + c / 2 * ld + kSide, row);
      dot<2, 4, 7>();
    }
  }
  store<0>(sum(g), row);
  if (kTwo) store<2>(sum(g) + kSide, row);
}

// A vector's weights [pairs of keys][lanes] as left factors [lanes][keys], kSpan keys each; those
// outside [lo, hi), both even, are 0.
inline void turn_weights(const Pair* weights, int64_t ld, int64_t begin, int64_t end, int64_t lo,
                         int64_t hi, bf16* out) {
  for (int64_t j = begin; j < end; j += kSpan, out += kNumbers) {
    VecOf<float> r[kSide];
    if (lo <= j && j + kSpan <= hi) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < kSide; ++i) {
        r[i] = cpu::ATTNEXT_ISA::load(reinterpret_cast<const float*>(weights + (j / 2 + i) * ld));
      }
    } else {
      for (int64_t i = 0; i < kSide; ++i) {
        const bool inside = lo <= j + 2 * i && j + 2 * i < hi;
        r[i] =
            inside
                ? cpu::ATTNEXT_ISA::load(reinterpret_cast<const float*>(weights + (j / 2 + i) * ld))
                : VecOf<float>{};
      }
    }
    transpose_vectors<float>(r);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kSide; ++i) {
      cpu::ATTNEXT_ISA::store(reinterpret_cast<float*>(out + i * kSpan), r[i]);
    }
  }
}

// rows[lane][d] += the products of `count` left factors per vector of lanes with the pairs of keys
// below, [count * kSpan / 2][ld]; `two`: of a second vector, whose factors follow the first's.
template <bool kTwo>
void accumulate(const bf16* weights, int64_t count, const Pair* pairs, int64_t dims, float* rows,
                int64_t ld) {
  const int64_t row = 4 * ld;
  float* const second = rows + kSide * ld;
  for (int64_t d = 0; d < dims; d += 2 * kSide) {
    load<0>(rows + d, row), load<1>(rows + d + kSide, row);
    if (kTwo) load<2>(second + d, row), load<3>(second + d + kSide, row);
    for (int64_t k = 0; k < count; ++k) {
      const Pair* const b = pairs + k * kSide * ld + d;
      load<4>(weights + k * kNumbers, 2 * kSpan);
      load<6>(b, row), load<7>(b + kSide, row);
      dot<0, 4, 6>(), dot<1, 4, 7>();
      if (kTwo) {
        load<5>(weights + (count + k) * kNumbers, 2 * kSpan);
        dot<2, 5, 6>(), dot<3, 5, 7>();
      }
    }
    store<0>(rows + d, row), store<1>(rows + d + kSide, row);
    if (kTwo) store<2>(second + d, row), store<3>(second + d + kSide, row);
  }
}

// out[j][d] += the products of weights [kSide keys][lanes] with pairs of lanes [lanes / 2][ld];
// rows of `weights` are `lanes` numbers apart, a multiple of kSpan, those of `out` `stride`.
// `room`: kSide rows of dims; where rows of `out` are not one stride apart, they get their share
// from there.
inline void outer(const bf16* weights, int64_t lanes, const Pair* pairs, int64_t ld, int64_t dims,
                  float* const* out, int64_t count, float* room) {
  const int64_t stride = count > 1 ? out[1] - out[0] : dims;
  bool even = count == kSide;
  for (int64_t j = 1; j < count; ++j) even &= out[j] == out[0] + j * stride;
  float* const sums = even ? out[0] : room;
  const int64_t row = even ? 4 * stride : 4 * dims;
  for (int64_t d = 0; d < dims; d += 2 * kSide) {
    if (even) {
      load<0>(sums + d, row), load<1>(sums + d + kSide, row);
    } else {
      zero<0>(), zero<1>();
    }
    for (int64_t l = 0; l < lanes; l += kSpan) {
      const Pair* const b = pairs + l / 2 * ld + d;
      load<4>(weights + l, 2 * lanes);
      load<6>(b, 4 * ld), load<7>(b + kSide, 4 * ld);
      dot<0, 4, 6>(), dot<1, 4, 7>();
    }
    store<0>(sums + d, row), store<1>(sums + d + kSide, row);
  }
  for (int64_t j = 0; !even && j < count; ++j) {
    for (int64_t d = 0; d < dims; d += kSide) {
      using cpu::ATTNEXT_ISA::load;
      cpu::ATTNEXT_ISA::store(out[j] + d, load(out[j] + d) + load(room + j * dims + d));
    }
  }
}

}  // namespace tiles
}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
