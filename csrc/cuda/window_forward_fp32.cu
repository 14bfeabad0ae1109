// SPDX-License-Identifier: Apache-2.0
#include "window_forward.cuh"

namespace attnext {
namespace cuda {

ATTNEXT_FORWARD_KERNELS_32(ATTNEXT_FORWARD, window, float, fp32)
ATTNEXT_MERGE(window_merge_fp32, float)

}  // namespace cuda
}  // namespace attnext
