// SPDX-License-Identifier: Apache-2.0
#include "window_forward.cuh"

namespace attnext {
namespace cuda {

ATTNEXT_ROUTED_FORWARD_KERNELS_32(ATTNEXT_ROUTED_FORWARD, float, fp32)
ATTNEXT_ROUTED_MERGE(routed_merge_fp32, float)

}  // namespace cuda
}  // namespace attnext
