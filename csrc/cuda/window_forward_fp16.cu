// SPDX-License-Identifier: Apache-2.0
#include "window_forward.cuh"

namespace attnext {
namespace cuda {

ATTNEXT_FORWARD_KERNELS_16(ATTNEXT_FORWARD, window, fp16, fp16)
ATTNEXT_LONG_FORWARD_KERNELS_16(ATTNEXT_FORWARD, fp16, fp16)
ATTNEXT_MERGE(window_merge_fp16, fp16)

}  // namespace cuda
}  // namespace attnext
