// SPDX-License-Identifier: Apache-2.0
#include "linear_sums.cuh"

namespace attnext {
namespace cuda {

ATTNEXT_NUMBERS(linear_numbers_bf16, bf16)
ATTNEXT_NUMBERS(linear_numbers_fp16, fp16)
ATTNEXT_NUMBERS(linear_numbers_fp32, float)
ATTNEXT_AROUND(linear_combine, 256, combine_segments)
ATTNEXT_AROUND(linear_decay_gradient, kDecayThreads, find_decay_gradient)

}  // namespace cuda
}  // namespace attnext
