// SPDX-License-Identifier: Apache-2.0
#include "search.h"

#include "isa.h"
#include "memory.h"
#include "parallel.h"

namespace attnext {
namespace cpu {

void largest_products(const SearchParams& p) {
  const SearchKernels& kernels = search_kernels(p.dtype);
  const int64_t lists = p.batch * p.heads * p.rows;
  const double work = static_cast<double>(lists) * p.places * p.samples * p.dim;
  const int64_t bytes = kernels.scratch(p);
  parallel_for(lists, 1, work < kSerialWork, [&](int64_t begin, int64_t end) {
    void* scratch = thread_buffer(0, bytes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % p.rows, head = i / p.rows % p.heads, b = i / p.rows / p.heads;
      kernels.largest_products(p, b, head, row, scratch);
    }
  });
}

}  // namespace cpu
}  // namespace attnext
