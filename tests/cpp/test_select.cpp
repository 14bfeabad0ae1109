// SPDX-License-Identifier: Apache-2.0
// Selection on every instruction set and dtype against its definition, without Python.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cpu/select.h"
#include "everywhere.h"
#include "tensor.h"

using namespace attnext;

namespace {

// Of candidates, by their exact scores, ties being improbable.
void run(DType type, cpu::Score score, int64_t rows, int64_t count, int64_t dim,
         const std::string& name) {
  std::mt19937 rng(static_cast<unsigned>(rows * 1000 + count));
  const DType acc = type == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const bool max_q = score == cpu::Score::kMaxQ, grouped = score == cpu::Score::kGroupProb;
  const int64_t heads = 4, kv_heads = 2, samples = max_q ? 3 : grouped ? 2 : 1;
  const int64_t tokens = max_q ? rows * samples - 1 : rows, lists = grouped ? 2 : 4, k = 5;
  const int64_t of_queries[3] = {1, 1, tokens}, of_keys[3] = {1, 1, count};
  Tensor query(type, 1, of_queries, heads, dim), key(acc, 1, of_keys, kv_heads, dim);
  query.randomise(rng, 1), key.randomise(rng, 1);
  const int64_t wide = attnext::size_of(acc);
  std::vector<char> factors(rows * heads * wide), share(count * wide);
  std::vector<char> values(lists * rows * k * wide);
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < rows * heads; ++i) from_double(acc, factors.data(), i, normal(rng));
  for (int64_t c = 0; c < count; ++c) from_double(acc, share.data(), c, 1);
  std::vector<int64_t> end(rows), overlap(count);
  std::vector<int32_t> indices(lists * rows * k);
  for (int64_t r = 0; r < rows; ++r) end[r] = r * count / rows + 1;
  for (int64_t c = 0; c < count; ++c) overlap[c] = c;
  cpu::SelectParams p{};
  p.dtype = type, p.score = score, p.batch = 1, p.lists = lists, p.rows = rows, p.tokens = tokens;
  p.heads = heads, p.kv_heads = kv_heads, p.dim = dim, p.samples = samples;
  p.num_products = p.num_candidates = count, p.scale = 0.5, p.k = k;
  p.query = query.ref(), p.candidate = key.ref();
  p.end = end.data(), p.indices = indices.data(), p.values = values.data();
  if (grouped) {
    p.factor = factors.data(), p.overlap = overlap.data(), p.share = share.data(), p.slots = 1;
  }
  cpu::select_best(p);
  for (int64_t list = 0; list < lists; ++list) {
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<double> exact(count);
      for (int64_t c = 0; c < count; ++c) {
        double best = -INFINITY, sum = 0;
        for (int64_t s = 0; s < samples; ++s) {
          const int64_t h = grouped ? list * samples + s : list, t = max_q ? r * samples + s : r;
          if (t >= tokens) continue;
          double x = 0;
          for (int64_t d = 0; d < dim; ++d) {
            x += 0.5 * query.get(t * heads + h, d) * key.get(c * kv_heads + h / 2, d);
          }
          best = std::max(best, x);
          if (grouped) sum += std::exp(x - to_double(acc, factors.data(), r * heads + h));
        }
        exact[c] = grouped ? sum : best;
      }
      std::vector<double> sorted(exact.begin(), exact.begin() + end[r]);
      std::sort(sorted.rbegin(), sorted.rend());
      for (int64_t i = 0; i < k; ++i) {
        const int64_t at = (list * rows + r) * k + i, c = indices[at];
        const bool is_there = i < end[r];
        const double lowest = sorted[std::min(k, end[r]) - 1],
                     tolerance = 1e-5 * (1 + std::fabs(lowest));
        bool ok = is_there == (c >= 0) && c < end[r];
        if (ok && is_there) {
          ok = exact[c] >= lowest - tolerance &&
               std::fabs(to_double(acc, values.data(), at) - exact[c]) <=
                   1e-5 * (1 + std::fabs(exact[c]));
        }
        expect(ok, name + ", row " + std::to_string(r) + ", slot " + std::to_string(i));
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  start_threads();
  omp_set_num_threads(2);
  return everywhere(argc, argv, [&](DType type, const std::string& where) {
    for (const auto score : {cpu::Score::kDot, cpu::Score::kMaxQ, cpu::Score::kGroupProb}) {
      run(type, score, 1, 200, 33, where);
      run(type, score, 70, 21, 8, where);
      run(type, score, 19, 140, 64, where);
    }
  });
}
