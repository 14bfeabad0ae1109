// SPDX-License-Identifier: Apache-2.0
// What every ISA unit exports: plain tables of function pointers, indexed by DType.
#pragma once

#include "linear.h"
#include "routed.h"
#include "search.h"
#include "select.h"
#include "window.h"

namespace attnext {
namespace cpu {

struct IsaUnit {
  WindowKernels window[kNumDTypes];
  LinearKernels linear[kNumDTypes];
  RoutedKernels routed[kNumDTypes];
  SearchKernels search[kNumDTypes];
  SelectKernels select[kNumDTypes];
  double (*peak_loop[kNumDTypes])(int64_t iterations, double* sink);
};

const IsaUnit* unit_baseline();
#if ATTNEXT_AMX_LOOPS  // in the C++ tests
const IsaUnit* unit_amx_loops();
#endif
#if defined(__x86_64__)
const IsaUnit* unit_avx2();
const IsaUnit* unit_avx512();
const IsaUnit* unit_avx512bf16();
#if ATTNEXT_HAVE_AMX  // the compiler knows it
const IsaUnit* unit_amx();
#endif
#endif

}  // namespace cpu
}  // namespace attnext
