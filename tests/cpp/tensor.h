// SPDX-License-Identifier: Apache-2.0
// Tensors of the C++ tests: every dtype read and written as float64, rows padded with poison.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "dtype.h"
#include "params.h"

namespace attnext {

inline double to_double(DType t, const void* p, int64_t i) {
  if (t == DType::kFloat32) return static_cast<const float*>(p)[i];
  if (t == DType::kFloat64) return static_cast<const double*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  if (t == DType::kBFloat16) {
    const uint32_t bits = uint32_t(h) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
  const int e = h >> 10 & 31, m = h & 1023;
  const double sign = h >> 15 ? -1 : 1;
  if (e == 31) return m ? NAN : sign * INFINITY;
  return sign * (e ? std::ldexp(1024 + m, e - 25) : std::ldexp(m, -24));
}

inline void from_double(DType t, void* p, int64_t i, double x) {
  if (t == DType::kFloat32) {
    static_cast<float*>(p)[i] = static_cast<float>(x);
  } else if (t == DType::kFloat64) {
    static_cast<double*>(p)[i] = x;
  } else if (t == DType::kBFloat16) {
    const float f = static_cast<float>(x);
    uint32_t bits;
    memcpy(&bits, &f, 4);
    static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  } else {  // test inputs stay in the normal range of fp16
    if (std::fabs(x) < std::ldexp(1.0, -14)) x = 0;
    int e = 0;
    const double m = std::frexp(std::fabs(x), &e);
    uint32_t bits = 0;
    if (x != 0) {
      const auto r = static_cast<uint32_t>(std::nearbyint(m * 2048));
      bits = static_cast<uint32_t>(e + 13) * 1024 + r;
    }
    static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(bits | (x < 0 ? 0x8000 : 0));
  }
}

inline int64_t size_of(DType t) { return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2; }

// [batch, x0, x1, x2, heads, dim], with two spare columns of poison after each row.
struct Tensor {
  DType type;
  int64_t n[6], ld;
  std::vector<char> data;
  Tensor(DType t, int64_t b, const int64_t x[3], int64_t h, int64_t d)
      : type(t), n{b, x[0], x[1], x[2], h, d}, ld(d + 2) {
    data.resize(static_cast<size_t>(rows() * ld * size_of(t)));
    for (int64_t i = 0; i < rows() * ld; ++i) poison(i);
  }
  void poison(int64_t i) {
    if (size_of(type) == 2) {
      reinterpret_cast<uint16_t*>(data.data())[i] = 0x7fff;
    } else {
      from_double(type, data.data(), i, NAN);
    }
  }
  int64_t rows() const { return n[0] * n[1] * n[2] * n[3] * n[4]; }
  int64_t row(int64_t b, const int64_t x[3], int64_t h) const {
    return (((b * n[1] + x[0]) * n[2] + x[1]) * n[3] + x[2]) * n[4] + h;
  }
  double get(int64_t row, int64_t d) const { return to_double(type, data.data(), row * ld + d); }
  void set(int64_t row, int64_t d, double v) { from_double(type, data.data(), row * ld + d, v); }
  TensorRef ref() {
    const int64_t h = ld, x2 = n[4] * h, x1 = n[3] * x2, x0 = n[2] * x1, b = n[1] * x0;
    return {data.data(), b, {x0, x1, x2}, h};
  }
  template <class Rng>
  void randomise(Rng& rng, double spread) {
    std::normal_distribution<double> normal(0, spread);
    for (int64_t r = 0; r < rows(); ++r) {
      for (int64_t d = 0; d < n[5]; ++d) set(r, d, normal(rng));
    }
  }
  bool padding_is_intact() const {
    for (int64_t r = 0; r < rows(); ++r) {
      for (int64_t d = n[5]; d < ld; ++d) {
        if (!std::isnan(get(r, d))) return false;
      }
    }
    return true;
  }
};

}  // namespace attnext
