// SPDX-License-Identifier: Apache-2.0
#include "parallel.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace attnext {
namespace cpu {
namespace {

std::atomic<bool> plain_threads{false};
const bool fork_is_watched = [] {
  // libgomp's worker threads do not survive fork, and it waits for them for ever.
  pthread_atfork(nullptr, nullptr, avoid_openmp);
  return true;
}();

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(data); }
};
thread_local Buffer buffers[kBufferSlots];

// The first exception of a parallel region, thrown again where the region was entered.
class FirstError {
 public:
  void keep() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
  }
  void rethrow() {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::mutex mutex_;
  std::exception_ptr error_;
};

}  // namespace

int max_threads() { return omp_get_max_threads(); }

void avoid_openmp() { plain_threads = true; }

void* thread_buffer(int slot, size_t bytes) {
  Buffer& b = buffers[slot];
  if (b.bytes < bytes) {
    std::free(b.data);
    b.bytes = 0;
    b.data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!b.data) throw std::bad_alloc();
    b.bytes = bytes;
  }
  return b.data;
}

void run_parallel(int64_t n, int64_t grain, bool serial,
                  void (*fn)(void* context, int64_t begin, int64_t end), void* context) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t chunks = (n + grain - 1) / grain;
  const int threads = static_cast<int>(std::min<int64_t>(max_threads(), chunks));
  if (serial || threads == 1 || (!plain_threads && omp_in_parallel())) {
    fn(context, 0, n);
    return;
  }
  FirstError error;
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    try {
      for (int64_t c = next++; c < chunks; c = next++) {
        fn(context, c * grain, std::min(n, (c + 1) * grain));
      }
    } catch (...) {
      error.keep();
    }
  };
  if (plain_threads) {
    std::vector<std::thread> pool;
    for (int t = 1; t < threads; ++t) pool.emplace_back(work);
    work();
    for (std::thread& t : pool) t.join();
  } else {
#pragma omp parallel num_threads(threads)
    work();
  }
  error.rethrow();
}

}  // namespace cpu
}  // namespace attnext
