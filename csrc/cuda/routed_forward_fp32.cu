// SPDX-License-Identifier: Apache-2.0
#include "window_forward.cuh"

namespace attnext {
namespace cuda {

ATTNEXT_FORWARD_KERNELS_32(ATTNEXT_ROUTED_FORWARD, routed, float, fp32)
ATTNEXT_ROUTED_MERGE(routed_merge_fp32, float)

}  // namespace cuda
}  // namespace attnext
