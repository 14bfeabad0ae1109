// SPDX-License-Identifier: Apache-2.0
#include "window_forward.cuh"

namespace attnext {
namespace cuda {

ATTNEXT_FORWARD_KERNELS_16(ATTNEXT_FORWARD, window, bf16, bf16)
ATTNEXT_LONG_FORWARD_KERNELS_16(ATTNEXT_FORWARD, bf16, bf16)
ATTNEXT_MERGE(window_merge_bf16, bf16)

}  // namespace cuda
}  // namespace attnext
