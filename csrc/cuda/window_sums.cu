// SPDX-License-Identifier: Apache-2.0
// Gradients that sum over rows of all tiles, whatever the dtype: of sinks and of the bias.
#include "window_sums.cuh"

namespace attnext {
namespace cuda {

ATTNEXT_KERNEL(window_sink_gradient, 256) { sink_gradient<256>(p); }
ATTNEXT_KERNEL(window_merge_bias, 128) { merge_bias(p); }

}  // namespace cuda
}  // namespace attnext
