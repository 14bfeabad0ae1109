// SPDX-License-Identifier: Apache-2.0
#include "linear_scan.cuh"

namespace attnext {
namespace cuda {

ATTNEXT_SCAN_KERNELS_16(ATTNEXT_SCAN, fp16, fp16)

}  // namespace cuda
}  // namespace attnext
