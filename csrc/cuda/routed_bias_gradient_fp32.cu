// SPDX-License-Identifier: Apache-2.0
#include "window_backward.cuh"

namespace attnext {
namespace cuda {

ATTNEXT_BIAS_GRADIENT_KERNELS_32(ATTNEXT_ROUTED_BIAS_GRADIENT, routed, float, fp32)

}  // namespace cuda
}  // namespace attnext
