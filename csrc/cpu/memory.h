// SPDX-License-Identifier: Apache-2.0
// Memory of a call, shared by its threads and aligned to a cache line.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "../dtype.h"

namespace attnext {
namespace cpu {

struct Free {
  void operator()(char* p) const { std::free(p); }
};
using Memory = std::unique_ptr<char, Free>;

inline Memory allocate(int64_t bytes) {
  Memory m(static_cast<char*>(
      std::aligned_alloc(64, static_cast<size_t>(std::max<int64_t>(bytes, 1) + 63) / 64 * 64)));
  if (!m) throw std::bad_alloc();
  return m;
}

inline int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}
inline int64_t acc_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

constexpr double kSerialWork = 5e5;  // multiply-adds below which waking a thread costs more

}  // namespace cpu
}  // namespace attnext
