// SPDX-License-Identifier: Apache-2.0
#include "window_backward.cuh"

namespace attnext {
namespace cuda {

ATTNEXT_KERNEL(window_statistics_fp16, 128) { find_statistics<fp16>(p); }
ATTNEXT_QUERY_GRADIENT_KERNELS_16(ATTNEXT_QUERY_GRADIENT, window, fp16, fp16)
ATTNEXT_LONG_QUERY_GRADIENT_KERNELS_16(ATTNEXT_QUERY_GRADIENT, fp16, fp16)

}  // namespace cuda
}  // namespace attnext
