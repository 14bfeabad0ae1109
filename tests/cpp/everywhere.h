// SPDX-License-Identifier: Apache-2.0
// What the C++ tests share besides tensors: failures, counted, and a visit of every instruction set
// and dtype.
#pragma once

#include <omp.h>

#include <cstdio>
#include <string>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "dtype.h"

namespace attnext {

inline int failures = 0;

inline void expect(bool ok, const std::string& what) {
  if (ok) return;
  if (++failures <= 20) std::printf("FAILED %s\n", what.c_str());
}

// One thread, fresh ones beside it under a sanitizer that does not know OpenMP's.
inline void start_threads() {
#if defined(__SANITIZE_THREAD__)
  cpu::avoid_openmp();
#endif
  omp_set_num_threads(1);
}

// run(dtype, where) on every instruction set, or the one that the command line names. Gives the
// exit status.
template <class F>
int everywhere(int argc, char** argv, F run) {
  const char* dtypes[] = {"float32", "float64", "bfloat16", "float16"};
  for (const std::string& isa : cpu::available_isas()) {
    if (argc > 1 && isa != argv[1]) continue;
    cpu::set_isa(isa);
    for (int t = 0; t < kNumDTypes; ++t) {
      const std::string where = isa + " " + dtypes[t];
      run(static_cast<DType>(t), where);
      std::printf("%s: %d failures so far\n", where.c_str(), failures);
      std::fflush(stdout);
    }
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace attnext
