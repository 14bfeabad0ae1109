// SPDX-License-Identifier: Apache-2.0
#include "linear_step.cuh"

namespace attnext {
namespace cuda {

ATTNEXT_STEP(linear_step_bf16, bf16)
ATTNEXT_STEP(linear_step_fp16, fp16)
ATTNEXT_STEP(linear_step_fp32, float)

}  // namespace cuda
}  // namespace attnext
