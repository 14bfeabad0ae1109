// SPDX-License-Identifier: Apache-2.0
// Memory of a call, shared by its threads and aligned to a cache line.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "../dtype.h"

namespace attnext {
namespace cpu {

struct Free {
  void operator()(char* p) const { std::free(p); }
};
using Memory = std::unique_ptr<char, Free>;

// Asks for huge pages under memory that is about to be written. An allocator takes what is this
// large from the system at every call (glibc: from 32 MiB), and faulting it in by 4 KiB took up to
// a third of a kernel's time.
inline void expect_writes(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kLarge = 32 << 20;
  constexpr uintptr_t kPage = 4096;
  if (bytes < kLarge) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a refusal costs only time
#else
  (void)data, (void)bytes;
#endif
}

inline Memory allocate(int64_t bytes) {
  Memory m(static_cast<char*>(
      std::aligned_alloc(64, static_cast<size_t>(std::max<int64_t>(bytes, 1) + 63) / 64 * 64)));
  if (!m) throw std::bad_alloc();
  expect_writes(m.get(), bytes);
  return m;
}

// Of a core's second cache, where the system knows it and it is not a strange one.
inline int64_t second_cache_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  constexpr int64_t size = 0;
#endif
  return std::clamp<int64_t>(size, 512 << 10, 4 << 20);
}

inline int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}
inline int64_t acc_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

constexpr double kSerialWork = 5e5;  // multiply-adds below which waking a thread costs more

}  // namespace cpu
}  // namespace attnext
