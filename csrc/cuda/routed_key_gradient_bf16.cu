// SPDX-License-Identifier: Apache-2.0
#include "window_backward.cuh"

namespace attnext {
namespace cuda {

ATTNEXT_KEY_GRADIENT_KERNELS_16(ATTNEXT_ROUTED_KEY_GRADIENT, routed, bf16, bf16)

}  // namespace cuda
}  // namespace attnext
