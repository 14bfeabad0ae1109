// SPDX-License-Identifier: Apache-2.0
// The element types of every op, by one name on host and device.
#pragma once

#include <cstdint>

namespace attnext {

enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
constexpr int kNumDTypes = 4;

// Storage only: kernels widen on load and round once on store.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

}  // namespace attnext
