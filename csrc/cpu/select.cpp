// SPDX-License-Identifier: Apache-2.0
#include "select.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "isa.h"
#include "memory.h"
#include "parallel.h"

namespace attnext {
namespace cpu {
namespace {

template <class Acc>
class Best {
 public:
  explicit Best(const SelectParams& params) : p(params) { some.reserve(2 * p.k + 16); }

  // Of one row, from its scores.
  void select(int64_t b, int64_t list, int64_t row, const Acc* scores) {
    const int64_t at = b * p.ranges_batch + row;
    const int64_t begin = p.begin ? std::clamp<int64_t>(p.begin[at], 0, p.num_candidates) : 0;
    const int64_t end = std::min(p.end ? p.end[at] : p.num_candidates, p.num_candidates);
    const bool* excluded = nullptr;
    if (p.exclude) {
      const int64_t* stride = p.exclude_stride;
      excluded = p.exclude + b * stride[0] + list * stride[1] + row * stride[2];
    }
    some.clear();
    is_full = false;
    for (int64_t c = begin; c < end; ++c) {
      const bool forced = c < begin + p.force_first || c >= end - p.force_last;
      const Entry entry{forced ? kInfinity : rank(scores[c]), static_cast<int32_t>(c)};
      if (is_full && !precedes(entry, worst)) continue;
      if (excluded && excluded[c * p.exclude_stride[3]]) continue;
      some.push_back(entry);
      if (static_cast<int64_t>(some.size()) == 2 * p.k + 16) keep();
    }
    if (static_cast<int64_t>(some.size()) > p.k) keep();
    if (p.by_score) {
      std::sort(some.begin(), some.end(), order());
    } else {
      std::sort(some.begin(), some.end(),
                [](const Entry& x, const Entry& y) { return x.at < y.at; });
    }
    const int64_t to = ((b * p.lists + list) * p.rows + row) * p.k;
    Acc* const values = static_cast<Acc*>(p.values) + to;
    for (int64_t i = 0; i < p.k; ++i) {
      const bool is_there = i < static_cast<int64_t>(some.size());
      p.indices[to + i] = is_there ? some[i].at : -1;
      values[i] = is_there ? scores[some[i].at] : -kInfinity;
    }
  }

 private:
  struct Entry {
    Acc rank;
    int32_t at;
  };
  static constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();

  // Infinity is above every score: they are kept within numbers.
  static Acc rank(Acc x) {
    constexpr Acc kTop = std::numeric_limits<Acc>::max();
    return x <= kTop ? std::max(x, -kTop) : kTop;
  }
  bool precedes(const Entry& x, const Entry& y) const {
    if (x.rank != y.rank) return x.rank > y.rank;
    return p.tie_high ? x.at > y.at : x.at < y.at;
  }
  auto order() const {
    return [this](const Entry& x, const Entry& y) { return precedes(x, y); };
  }
  void keep() {
    std::nth_element(some.begin(), some.begin() + (p.k - 1), some.end(), order());
    some.resize(p.k);
    worst = some.back();
    is_full = true;
  }

  const SelectParams& p;
  std::vector<Entry> some;  // the best so far, and a few more
  Entry worst;
  bool is_full;
};

template <class Acc>
void select_rows(const SelectParams& p, const SelectKernels& kernels) {
  const int64_t tiles = (p.rows + kernels.rows - 1) / kernels.rows;
  const double work =
      static_cast<double>(p.batch) * p.lists * p.rows * p.num_products * p.samples * p.dim;
  const int64_t bytes = kernels.scratch(p);
  const int64_t room = sizeof(Acc) * kernels.rows * p.num_candidates;
  parallel_for(p.batch * p.lists * tiles, 1, work < kSerialWork, [&](int64_t begin, int64_t end) {
    void* const scratch = thread_buffer(0, bytes);
    Acc* const scores = static_cast<Acc*>(thread_buffer(1, room));
    Best<Acc> best(p);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = i % tiles, list = i / tiles % p.lists, b = i / tiles / p.lists;
      const int64_t first = tile * kernels.rows, count = std::min(kernels.rows, p.rows - first);
      int64_t seen = p.end ? 0 : p.num_candidates;
      for (int64_t r = 0; p.end && r < count; ++r) {
        seen = std::max(seen, std::min(p.end[b * p.ranges_batch + first + r], p.num_candidates));
      }
      kernels.scores(p, b, list, first, count, seen, scores, scratch);
      for (int64_t r = 0; r < count; ++r) {
        best.select(b, list, first + r, scores + r * p.num_candidates);
      }
    }
  });
}

}  // namespace

void best_places(DType type, const void* numbers, int64_t rows, int64_t n, int64_t count,
                 int64_t* places) {
  const SelectKernels& kernels = select_kernels(type);
  const int64_t bytes = n * (type == DType::kFloat64 ? 8 : 4);
  const double work = static_cast<double>(rows) * n * 8;
  parallel_for(rows, 1, work < kSerialWork, [&](int64_t begin, int64_t end) {
    void* const scratch = thread_buffer(0, bytes);
    for (int64_t r = begin; r < end; ++r) {
      kernels.best_places(static_cast<const char*>(numbers) + r * bytes, n, count, scratch,
                          places + r * count);
    }
  });
}

void select_best(const SelectParams& p) {
  const SelectKernels& kernels = select_kernels(p.dtype);
  if (p.dtype == DType::kFloat64) {
    select_rows<double>(p, kernels);
  } else {
    select_rows<float>(p, kernels);
  }
}

}  // namespace cpu
}  // namespace attnext
