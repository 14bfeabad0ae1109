// SPDX-License-Identifier: Apache-2.0
// What is used of DLPack's C interface (https://dmlc.github.io/dlpack, major version 1): a tensor's
// address, type, shape and strides in one call, where each would be an attribute to ask for.
#pragma once

#include <cstdint>

namespace attnext {
namespace dlpack {

constexpr int32_t kCpu = 1, kCuda = 2;      // device types
constexpr uint8_t kFloat = 2, kBfloat = 4;  // type codes

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t rank;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t *shape, *strides;  // strides in elements; both belong to the tensor
  uint64_t byte_offset;
};

// What a framework offers as __dlpack_c_exchange_api__ of its tensor type.
struct ExchangeApi {
  uint32_t major, minor;
  const ExchangeApi* older;
  void *allocate, *to_managed, *from_managed;
  int (*borrow)(void* object, Tensor* out);  // 0, or a Python error is set; may be null
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};
constexpr uint32_t kMajor = 1;
constexpr const char* kCapsule = "dlpack_exchange_api";

}  // namespace dlpack
}  // namespace attnext
