// SPDX-License-Identifier: Apache-2.0
// Threads for entry functions: OpenMP's pool (torch's own runtime, so torch.set_num_threads holds),
// or fresh threads in a forked child, where that pool is gone.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace attnext {
namespace cpu {

int max_threads();

// From now on threads are started afresh for every call: what a forked child does, and what a
// thread sanitizer needs, which does not know OpenMP's barriers.
void avoid_openmp();

// Calls fn(context, begin, end) over [0, n) in chunks of `grain`, handed out as threads get free.
void run_parallel(int64_t n, int64_t grain, bool serial,
                  void (*fn)(void* context, int64_t begin, int64_t end), void* context);

template <class F>
void parallel_for(int64_t n, int64_t grain, bool serial, F f) {
  run_parallel(
      n, grain, serial,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<F*>(context))(begin, end); },
      &f);
}

// Into how many parts, at most `most`, a walk over keys is cut for threads to share. A matter of
// one batch item alone, or bits would depend on how many there are: so must `most` be.
inline int64_t parts_of_walk(int64_t keys, int64_t most) {
  constexpr int64_t kMinKeys = 512;  // that pay for merging a part
  return std::clamp<int64_t>(keys / kMinKeys, 1, most);
}

// This thread's buffer number `slot`, at least `bytes` long, aligned to a cache line, kept between
// calls. Throws std::bad_alloc.
constexpr int kBufferSlots = 4;
void* thread_buffer(int slot, size_t bytes);

}  // namespace cpu
}  // namespace attnext
