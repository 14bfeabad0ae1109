// SPDX-License-Identifier: Apache-2.0
#include "linear_scan.cuh"

namespace attnext {
namespace cuda {

ATTNEXT_SCAN_KERNELS_32(ATTNEXT_SCAN, float, fp32)

}  // namespace cuda
}  // namespace attnext
