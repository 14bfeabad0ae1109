// SPDX-License-Identifier: Apache-2.0
// The best candidates of rows of queries, without a table of all scores.
#pragma once

#include <cstdint>

#include "../params.h"

namespace attnext {
namespace cpu {

// What becomes of the products of a candidate with the samples of a row.
enum class Score : int32_t { kDot, kMaxQ, kReluWsum, kGroupProb };

// Samples of a row: its query (kDot), its tokens (kMaxQ), or heads. `acc` is the accumulator type
// of the queries' dtype. Integers and what is of type acc are contiguous; null: not there.
struct SelectParams {
  DType dtype;
  Score score;
  int64_t batch, lists, rows, tokens, heads, kv_heads, dim;
  int64_t samples;         // of a row and list
  int64_t num_products;    // candidates that queries are multiplied with
  int64_t num_candidates;  // to select among: the same, or blocks that windows overlap
  TensorRef query;         // [batch, tokens, heads, dim]
  TensorRef candidate;     // acc [batch, products, kv heads, dim]
  double scale;
  const void* factor;  // acc [batch, rows, heads]: weights, or log-sum-exp
  const int64_t*
      each_end;  // of tokens (kMaxQ) or rows (kGroupProb): products from there on are none
  const int64_t *begin, *end;  // [1 or batch, rows]: candidates that are allowed
  int64_t ranges_batch;
  const int64_t* overlap;  // [candidates, slots]: windows,
  const void* share;       // and by how much of each, acc
  int64_t slots;
  const bool* exclude;  // [batch, lists, rows, candidates]
  int64_t exclude_stride[4];
  int64_t k, force_first, force_last;
  bool tie_high, by_score;
  int32_t* indices;  // [batch, lists, rows, k]
  void* values;      // acc
};

struct SelectKernels {
  int64_t rows;  // of a tile
  int64_t (*scratch)(const SelectParams&);
  // acc out[count][num_candidates] of rows from `first` on; those below `seen` are written.
  void (*scores)(const SelectParams&, int64_t batch, int64_t list, int64_t first, int64_t count,
                 int64_t seen, void* out, void* scratch);
  // Of one row, as below. Scratch: n entries of the type.
  void (*best_places)(const void* numbers, int64_t n, int64_t count, void* scratch,
                      int64_t* places);
};

void select_best(const SelectParams& params);

// Of rows of n numbers, none of which is NaN, the places of the `count` largest, rising; of equal
// ones the first.
void best_places(DType type, const void* numbers, int64_t rows, int64_t n, int64_t count,
                 int64_t* places);

}  // namespace cpu
}  // namespace attnext
