// SPDX-License-Identifier: Apache-2.0
#include "window_backward.cuh"

namespace attnext {
namespace cuda {

ATTNEXT_GRADIENT(routed_merge_bias, 128, 0, RoutedLaunch) { merge_entry_bias(p); }

}  // namespace cuda
}  // namespace attnext
