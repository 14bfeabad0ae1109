// SPDX-License-Identifier: Apache-2.0
#include "window_backward.cuh"

namespace attnext {
namespace cuda {

ATTNEXT_KEY_GRADIENT_KERNELS_32(ATTNEXT_KEY_GRADIENT, window, float, fp32)

}  // namespace cuda
}  // namespace attnext
