// SPDX-License-Identifier: Apache-2.0
#include "window_backward.cuh"

namespace attnext {
namespace cuda {

ATTNEXT_BIAS_GRADIENT_KERNELS_16(ATTNEXT_BIAS_GRADIENT, window, fp16, fp16)

}  // namespace cuda
}  // namespace attnext
