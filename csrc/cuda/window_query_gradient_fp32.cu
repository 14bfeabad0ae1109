// SPDX-License-Identifier: Apache-2.0
#include "window_backward.cuh"

namespace attnext {
namespace cuda {

ATTNEXT_KERNEL(window_statistics_fp32, 128) { find_statistics<float>(p); }
ATTNEXT_QUERY_GRADIENT_KERNELS_32(ATTNEXT_QUERY_GRADIENT, window, float, fp32)

}  // namespace cuda
}  // namespace attnext
