// SPDX-License-Identifier: Apache-2.0
// The rules of routed attention as intervals, for every backend: of a query the keys that it
// attends, of a key the queries that attend it. Query i stands at key i + offset; all ends rise
// with i, so the inverse of an interval is an interval.
#pragma once

#include "params.h"

namespace attnext {

#if defined(__CUDACC__)
#define ATTNEXT_RULE __host__ __device__ __forceinline__
#else
#define ATTNEXT_RULE inline __attribute__((always_inline))
#endif

// What a row's rules allow, [lo, hi), but for `self` (-1: none), and what of that is attended
// without being listed: [near_lo, near_hi) and [lo, sink_hi).
struct Reach {
  int64_t lo, hi, near_lo, near_hi, sink_hi, self;
};

ATTNEXT_RULE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
ATTNEXT_RULE int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }
ATTNEXT_RULE int64_t between(int64_t x, int64_t lo, int64_t hi) { return least(most(x, lo), hi); }

ATTNEXT_RULE bool has_besides(HeadPolicy policy) {
  return policy == HeadPolicy::kList || policy == HeadPolicy::kStreaming;
}

// Keys of the query at `position`. Keys from `first` to `last` are there and of its document.
ATTNEXT_RULE Reach keys_of(const RoutedRules& r, HeadPolicy policy, int64_t position, int64_t first,
                           int64_t last) {
  Reach x;
  int64_t hi = last;
  if (r.causal) hi = least(hi, position + 1);
  x.lo = most(first, position - r.within[0]);
  x.hi = most(least(hi, position + r.within[1] + 1), x.lo);
  if (policy == HeadPolicy::kOff) x.hi = x.lo;
  x.near_lo = x.near_hi = x.hi;
  if (policy == HeadPolicy::kDense) {
    x.near_lo = x.lo;
  } else if (has_besides(policy) && r.has_window) {
    x.near_lo = between(position - r.around[0], x.lo, x.hi);
    x.near_hi = between(position + r.around[1] + 1, x.near_lo, x.hi);
  }
  x.sink_hi = has_besides(policy) ? between(r.sinks, x.lo, x.hi) : x.lo;
  x.self = r.exclude_self && position >= 0 ? position : -1;
  return x;
}

// Queries of key `key`, of those from `first` to `last`. A sink is near to all of them.
ATTNEXT_RULE Reach queries_of(const RoutedRules& r, HeadPolicy policy, int64_t key, int64_t offset,
                              int64_t first, int64_t last) {
  Reach x;
  const int64_t own = key - offset;
  x.lo = most(first, own - r.within[1]);
  if (r.causal) x.lo = most(x.lo, own);
  x.hi = most(least(last, own + r.within[0] + 1), x.lo);
  if (policy == HeadPolicy::kOff) x.hi = x.lo;
  x.near_lo = x.near_hi = x.hi;
  if (policy == HeadPolicy::kDense || (has_besides(policy) && key < r.sinks)) {
    x.near_lo = x.lo;
  } else if (has_besides(policy) && r.has_window) {
    x.near_lo = between(own - r.around[1], x.lo, x.hi);
    x.near_hi = between(own + r.around[0] + 1, x.near_lo, x.hi);
  }
  x.sink_hi = x.lo;
  x.self = r.exclude_self && own >= 0 ? own : -1;
  return x;
}

// Where the slots of a query block are in the lists.
ATTNEXT_RULE int64_t list_row(const RoutedParams& r, int64_t block, int64_t b, int64_t h) {
  const int64_t lb = r.list_batch == 1 ? 0 : b, lh = h / (r.window.heads / r.list_heads);
  const int64_t list = lb * r.list_heads + lh;
  return list * (r.query_blocks + (r.indptr ? 1 : 0)) + block;
}
ATTNEXT_RULE int64_t first_entry(const RoutedParams& r, int64_t block, int64_t b, int64_t h) {
  const int64_t row = list_row(r, block, b, h);
  return r.indptr ? r.indptr[row] : row * r.slots;
}
ATTNEXT_RULE int64_t last_entry(const RoutedParams& r, int64_t block, int64_t b, int64_t h) {
  const int64_t row = list_row(r, block, b, h);
  return r.indptr ? r.indptr[row + 1] : (row + 1) * r.slots;
}

}  // namespace attnext
