// SPDX-License-Identifier: Apache-2.0
// What routers ask of keys that they name one by one: the largest product of each with some
// queries.
#pragma once

#include <cstdint>

#include "../params.h"

namespace attnext {
namespace cpu {

// Lists of keys, one for each batch item, head of lists and row; `acc` is the accumulator type of
// the keys' dtype. `places`, `at` and `products` are contiguous.
struct SearchParams {
  DType dtype;
  int64_t batch, heads, rows;    // of the lists
  int64_t places, samples, dim;  // keys of a list; queries that speak for it
  int64_t num_keys, group;       // heads of lists per kv head
  TensorRef key;                 // [batch, keys, kv heads, dim], keys along token[2]
  const void* query;             // acc [batch, heads, rows, samples, dim]
  const int64_t* reach;          // [rows, samples]: the last key that the query sees
  const int64_t* at;             // [batch, heads, rows, places], taken into the keys there are
  void* products;                // acc, as `at`
  double lowest;                 // of keys that no query sees, and of NaN
};

struct SearchKernels {
  int64_t (*scratch)(const SearchParams&);
  void (*largest_products)(const SearchParams&, int64_t batch, int64_t head, int64_t row,
                           void* scratch);
};

void largest_products(const SearchParams& params);

}  // namespace cpu
}  // namespace attnext
