// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <stdexcept>

#if ATTNEXT_HAVE_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "parallel.h"
#include "unit.h"

namespace attnext {
namespace cpu {
namespace {

struct Level {
  const char* name;
  const IsaUnit* unit;
};

#if ATTNEXT_HAVE_AMX
// The CPU says that it has tiles of bf16 (not every compiler's __builtin_cpu_supports knows them);
// Linux hands out the state of their registers on demand, to the whole process (x86/xstate.rst in
// its documentation).
bool may_use_tiles() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBf16) || !(d & kTile)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// Ascending. __builtin_cpu_supports asks the CPU and, through XGETBV, the operating system.
std::vector<Level> detect() {
  std::vector<Level> levels{{"baseline", unit_baseline()}};
#if ATTNEXT_AMX_LOOPS
  levels.push_back({"amx-loops", unit_amx_loops()});
#endif
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("f16c")) {
    return levels;
  }
  levels.push_back({"avx2", unit_avx2()});
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return levels;
  }
  levels.push_back({"avx512", unit_avx512()});
  if (__builtin_cpu_supports("avx512bf16")) levels.push_back({"avx512bf16", unit_avx512bf16()});
#if ATTNEXT_HAVE_AMX
  if (__builtin_cpu_supports("avx512bf16") && may_use_tiles()) {
    levels.push_back({"amx", unit_amx()});
  }
#endif
#endif
  return levels;
}

const std::vector<Level>& levels() {
  static const std::vector<Level> list = detect();
  return list;
}

// The one that is taken unless another is asked for: the last, but for that of bf16 pairs on
// Intel's cores, whose dot products run at half the rate of fp32's multiply-adds (measured on
// Granite Rapids). It is the last there on the generation before tiles, and where a system denies
// them.
const Level& preferred() {
  size_t best = levels().size() - 1;
#if defined(__x86_64__)
  if (levels()[best].unit == unit_avx512bf16() && __builtin_cpu_is("intel")) --best;
#endif
  return levels()[best];
}

const Level& find(const std::string& name) {
  std::string all;
  for (const Level& level : levels()) {
    if (name == level.name) return level;
    all += (all.empty() ? "" : ", ") + std::string(level.name);
  }
  throw std::invalid_argument("isa '" + name +
                              "' is not available on this machine (available: " + all + ")");
}

std::atomic<const Level*>& current() {
  static std::atomic<const Level*> level{[] {
    const char* forced = std::getenv("ATTNEXT_ISA");
    return forced && *forced ? &find(forced) : &preferred();
  }()};
  return level;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Level& level : levels()) names.push_back(level.name);
  return names;
}

std::string active_isa() { return current().load()->name; }
void set_isa(const std::string& name) { current() = &find(name); }

const WindowKernels& window_kernels(DType dtype) {
  return current().load()->unit->window[static_cast<int>(dtype)];
}

const LinearKernels& linear_kernels(DType dtype) {
  return current().load()->unit->linear[static_cast<int>(dtype)];
}

const RoutedKernels& routed_kernels(DType dtype) {
  return current().load()->unit->routed[static_cast<int>(dtype)];
}

const SearchKernels& search_kernels(DType dtype) {
  return current().load()->unit->search[static_cast<int>(dtype)];
}

const SelectKernels& select_kernels(DType dtype) {
  return current().load()->unit->select[static_cast<int>(dtype)];
}

double fma_peak(const std::string& isa, DType dtype, double seconds) {
  const auto loop = find(isa).unit->peak_loop[static_cast<int>(dtype)];
  const int threads = max_threads();
  std::atomic<double> total{0};
  using Clock = std::chrono::steady_clock;
  const auto run = [&](double limit) {
    total = 0;
    const auto start = Clock::now();
    parallel_for(threads, 1, false, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double done = 0, sink = 0;
        while (std::chrono::duration<double>(Clock::now() - start).count() < limit) {
          done += loop(20000, &sink);
        }
        done += sink;
        double seen = total;
        while (!total.compare_exchange_weak(seen, seen + done)) {
        }
      }
    });
    return total / std::chrono::duration<double>(Clock::now() - start).count();
  };
  run(seconds / 10);  // clocks settle
  return run(seconds);
}

}  // namespace cpu
}  // namespace attnext
