// SPDX-License-Identifier: Apache-2.0
// What a window-attention problem is, for every backend: addresses, strides, extents, modifiers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "dtype.h"

namespace attnext {

// A token tensor [batch, x0, x1, x2, heads, dim]; strides in elements, dim has unit stride.
struct TensorRef {
  void* data;
  int64_t batch, token[3], head;
};

constexpr double kLog2E = 1.4426950408889634;

struct WindowParams {
  DType dtype;
  int64_t batch, heads, kv_heads, head_dim, head_dim_v, extra_keys;
  int64_t query_extent[3], key_extent[3];
  TensorRef query, key, value;
  TensorRef extra_key, extra_value;  // [batch, extra_keys, kv_heads, dim], seen by every query
  TensorRef out, lse;                // lse in the accumulator type; its data may be null
  TensorRef row_scale;               // accumulator type, may be null: logits are scale * row_scale
  double scale;
  double softcap;           // 0 = none
  const void* sink_logits;  // accumulator type, [heads], may be null
  // Relative bias, natural units, accumulator type: [heads, table...]; may be null. An offset
  // beyond `bias_reach` on an axis reads as 0 (no attended pair has one).
  const void* bias;
  int64_t bias_stride[3], bias_head_stride, bias_reach[3];

  // Backward only.
  TensorRef dout, dlse;  // dlse may be null
  TensorRef dquery, dkey, dvalue, dextra_key, dextra_value;
  TensorRef drow_scale;  // accumulator type, may be null
  void* dbias;           // accumulator type, contiguous like `bias`, may be null
  void* dsink_logits;    // accumulator type, may be null
};
static_assert(std::is_trivially_copyable<WindowParams>::value, "crosses to kernels by memcpy");

}  // namespace attnext
