// SPDX-License-Identifier: Apache-2.0
// Carries out what plan.h describes. Errors of the CUDA runtime become std::runtime_error.
#pragma once

#include <cstdint>
#include <vector>

#include "plan.h"

namespace attnext {
namespace cuda {

// Whether this build has kernels, and for which architectures: "80 90 100 120", empty without.
const char* built_architectures();

// Launches on a stream of a device, which must be the caller's current one; returns at once. `op`
// names the caller in errors.
void launch(const std::vector<Launch>& launches, int device, uintptr_t stream, const char* op);

}  // namespace cuda
}  // namespace attnext
