// SPDX-License-Identifier: Apache-2.0
#include "linear_scan.cuh"

namespace attnext {
namespace cuda {

ATTNEXT_SCAN_KERNELS_16(ATTNEXT_SCAN, bf16, bf16)

}  // namespace cuda
}  // namespace attnext
