// SPDX-License-Identifier: Apache-2.0
#include "window_forward.cuh"

namespace attnext {
namespace cuda {

ATTNEXT_FORWARD_KERNELS_16(ATTNEXT_ROUTED_FORWARD, routed, fp16, fp16)
ATTNEXT_ROUTED_MERGE(routed_merge_fp16, fp16)

}  // namespace cuda
}  // namespace attnext
