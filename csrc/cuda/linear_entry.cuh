// SPDX-License-Identifier: Apache-2.0
// The entries of scan kernels.
#pragma once

#include "linear_delta.cuh"
#include "linear_numbers.cuh"
#include "linear_outputs.cuh"
#include "linear_state.cuh"
#include "linear_taylor.cuh"

namespace attnext {
namespace cuda {

extern __shared__ __align__(1024) uint8_t shared_memory[];

#define ATTNEXT_SCAN(name, T, dim, warps, kind)                                   \
  extern "C" __global__ void __launch_bounds__(                                   \
      (warps) * 32, (least_scan_blocks<sizeof(T), dim, warps, ScanKind::kind>())) \
      name(const __grid_constant__ LinearLaunch p) {                              \
    Scan<T, dim, warps, ScanKind::kind>(p, shared_memory).run();                  \
  }

}  // namespace cuda
}  // namespace attnext
