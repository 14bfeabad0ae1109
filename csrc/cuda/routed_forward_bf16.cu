// SPDX-License-Identifier: Apache-2.0
#include "window_forward.cuh"

namespace attnext {
namespace cuda {

ATTNEXT_FORWARD_KERNELS_16(ATTNEXT_ROUTED_FORWARD, routed, bf16, bf16)
ATTNEXT_ROUTED_MERGE(routed_merge_bf16, bf16)

}  // namespace cuda
}  // namespace attnext
