// SPDX-License-Identifier: Apache-2.0
#include "window_backward.cuh"

namespace attnext {
namespace cuda {

ATTNEXT_KERNEL(window_statistics_bf16, 128) { find_statistics<bf16>(p); }
ATTNEXT_QUERY_GRADIENT_KERNELS_16(ATTNEXT_QUERY_GRADIENT, window, bf16, bf16)
ATTNEXT_LONG_QUERY_GRADIENT_KERNELS_16(ATTNEXT_QUERY_GRADIENT, bf16, bf16)

}  // namespace cuda
}  // namespace attnext
