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
  bool one_line;  // see Geometry::one_line
  TensorRef query, key, value;
  TensorRef sink_key, sink_value;    // of sinks, where `key` is a copy of a box of keys; or null
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

// Landmark: causal attention whose softmax has two levels. The last key of each key block but the
// last is a landmark: to queries of later blocks its score is that of the block, whose other keys
// share by a softmax among themselves what it gets. Blocks but the last hold at most
// kMostLandmarkKeys. Not on CUDA.
enum class HeadPolicy : int8_t { kList = 0, kDense = 1, kStreaming = 2, kOff = 3, kLandmark = 4 };
constexpr int64_t kMostLandmarkKeys = 64;

// Which keys may be attended, and which are without being listed. See routed_rules.h.
struct RoutedRules {
  bool has_window;
  int64_t around[2];  // keys before and after the query's own that its window holds
  int64_t sinks;
  bool causal, exclude_self;
  int64_t within[2];                               // at most so many keys before and after
  const int32_t *query_documents, *key_documents;  // [batch, tokens], null: all are one
  const int32_t* key_lengths;                      // [batch], null: all keys
};

// Attention over lists of key blocks. The tokens of block b lie at places [offsets[b],
// offsets[b + 1]) of an order, that of the tokens themselves where it is null. A list holds blocks
// (-1: none) or, with `ends`, spans of places.
//
// A query attends a key if it is listed, or in the window around the query, or one of the sinks,
// and all rules allow it. Query i stands at key i + (keys - queries).
struct RoutedParams : RoutedRules {
  WindowParams window;  // tensors, scale, softcap and sinks' logits
  int64_t query_blocks, key_blocks;
  const int32_t *query_offsets, *query_order, *key_offsets, *key_order;
  const int32_t *lists, *ends;
  const int64_t* indptr;  // [list_batch, list_heads, query_blocks + 1]; null: `slots` of each
  int64_t list_batch, list_heads, slots, entries;
  const void* entry_bias;     // like `lists`, accumulator type, natural units; may be null
  const int8_t* head_policy;  // HeadPolicy of each head; null: lists

  // Backward only. [copies of batch][copies of heads][entries], a copy for each that shares
  // a list; may be null.
  void* dentry_bias;

  int64_t batch_copies() const { return list_batch == 1 ? window.batch : 1; }
  int64_t head_copies() const { return list_heads == 1 ? window.kv_heads : 1; }
};
static_assert(std::is_trivially_copyable<RoutedParams>::value, "crosses to kernels by memcpy");

// phi: what linear attention makes of the entries of queries and keys. Taylor2 is exp to second
// order, 1 + s + s^2/2; its features are 1, k_a, and k_a k_b for a <= b (order of a, then b), the
// weights 1/2 of the squares on the query's side.
enum class FeatureMap : int32_t {
  kIdentity = 0,
  kElu = 1,
  kRelu = 2,
  kTaylor2 = 3
};  // elu: plus 1
constexpr int kNumFeatureMaps = 4;

constexpr int64_t num_features(FeatureMap map, int64_t head_dim) {
  return map == FeatureMap::kTaylor2 ? 1 + head_dim + head_dim * (head_dim + 1) / 2 : head_dim;
}

// Tokens [begin, end) of one batch item that attend each other: a whole item, one of several packed
// sequences, or a block of one. In reverse, `end - 1` comes first.
struct LinearSequence {
  int64_t batch, begin, end;
};

// One problem of linear attention, per head and in the accumulator type:
//   S_t = exp(decay_t) S_{t-1} + phi(k_t) u_t^T,  o_t = scale phi(q_t)^T S_t,
// where u is v, or under the delta rule beta_t (v_t - phi(k_t)^T exp(decay_t) S_{t-1}). With
// `normalize`, values have a further column of ones: the state has its sums in column head_dim_v,
// and o is divided by its entry there, moved away from zero by eps. Not causal: S is the last one
// for all. Head h reads query head h / (heads / query_heads), and so on.
struct LinearParams {
  DType dtype;
  FeatureMap feature_map;
  bool causal, reverse, normalize;
  int64_t batch, tokens, heads, query_heads, key_heads, value_heads, head_dim, head_dim_v;
  int64_t num_sequences;
  const LinearSequence* sequences;  // where the kernel runs
  int64_t chunk;                    // tokens; 0: the kernel's choice
  double scale;                     // inside the polynomial of Taylor2
  double eps;

  // Tokens on axis 2. Of decay (natural log) and beta, accumulator type, data may be null.
  TensorRef query, key, value, decay, beta;
  TensorRef out;
  TensorRef denominator;  // [batch, tokens, heads], accumulator type; with `normalize` only
  // Contiguous [sequences, heads, features, head_dim_v + normalize], accumulator type; may be null.
  const void* initial_state;
  void* final_state;

  // Backward only.
  TensorRef dout, ddenominator;  // data of the second may be null
  const void* dfinal_state;      // may be null
  // Gradients have a row per head; where heads share a tensor its gradient is in the accumulator
  // type, for the caller to sum.
  TensorRef dquery, dkey, dvalue;
  TensorRef ddecay, dbeta;  // [batch, tokens, heads], accumulator type; data may be null
  void* dinitial_state;     // may be null

  // What outputs lost as they were rounded, from the forward pass for the backward pass: beside a
  // normaliser a key's gradient takes the outputs from the values. Data may be null; CPU only.
  TensorRef remainder;

  int64_t features() const { return num_features(feature_map, head_dim); }
  int64_t state_columns() const { return head_dim_v + (normalize ? 1 : 0); }
  bool delta() const { return beta.data != nullptr; }
};
static_assert(std::is_trivially_copyable<LinearParams>::value, "crosses to kernels by memcpy");

// A few tokens of decoding, each batch item against a state of its own, which is updated in place.
struct LinearStepParams {
  LinearParams problem;  // of the tensors; sequences, chunk and states are not read
  void* state;           // accumulator type; columns have unit stride
  int64_t slot_stride, head_stride, feature_stride;
  const int64_t* slots;  // [batch], which state; null: the batch item's own; -1: none, out is 0
  int64_t num_states;
};
static_assert(std::is_trivially_copyable<LinearStepParams>::value, "crosses to kernels by memcpy");

}  // namespace attnext
