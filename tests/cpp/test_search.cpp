// SPDX-License-Identifier: Apache-2.0
// The search of routers on every instruction set and dtype against its definition, without Python.
#include <algorithm>
#include <cstdio>
#include <string>

#include "cpu/search.h"
#include "everywhere.h"
#include "tensor.h"

using namespace attnext;

namespace {

void run(DType type, int64_t samples, int64_t dim, int64_t places, const std::string& name) {
  std::mt19937 rng(static_cast<unsigned>(samples * 1000 + dim));
  const DType acc = type == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const int64_t batch = 2, heads = 4, kv_heads = 2, rows = 3, extent[3] = {1, 1, 21};
  Tensor key(type, batch, extent, kv_heads, dim);
  key.randomise(rng, 1);
  const int64_t lists = batch * heads * rows, wide = attnext::size_of(acc);
  std::vector<char> query(lists * samples * dim * wide), products(lists * places * wide);
  std::vector<int64_t> reach(rows * samples), at(lists * places);
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < lists * samples * dim; ++i) {
    from_double(acc, query.data(), i, normal(rng));
  }
  for (int64_t& x : reach) x = static_cast<int64_t>(rng() % 40) - 8;
  for (int64_t& x : at) x = static_cast<int64_t>(rng() % 30) - 4;
  cpu::SearchParams p{};
  p.dtype = type;
  p.batch = batch, p.heads = heads, p.rows = rows;
  p.places = places, p.samples = samples, p.dim = dim;
  p.num_keys = extent[2], p.group = heads / kv_heads;
  p.key = key.ref();
  p.query = query.data(), p.reach = reach.data(), p.at = at.data();
  p.products = products.data();
  p.lowest = -1e30;
  cpu::largest_products(p);
  double worst = 0;
  for (int64_t n = 0; n < lists * places; ++n) {
    const int64_t list = n / places, row = list % rows, h = list / rows % heads;
    const int64_t j[3] = {0, 0, std::clamp<int64_t>(at[n], 0, extent[2] - 1)};
    const int64_t key_row = key.row(list / rows / heads, j, h / p.group);
    double want = p.lowest;
    for (int64_t i = 0; i < samples; ++i) {
      double sum = 0;
      for (int64_t d = 0; d < dim; ++d) {
        sum += to_double(acc, query.data(), (list * samples + i) * dim + d) * key.get(key_row, d);
      }
      if (j[2] <= reach[row * samples + i]) want = std::max(want, sum);
    }
    const double got = to_double(acc, products.data(), n);
    const double error = want == p.lowest ? std::fabs(got / want - 1) : std::fabs(got - want);
    worst = error <= worst ? worst : error;  // NaN stays
  }
  expect(worst <= (type == DType::kFloat64 ? 1e-12 : 1e-4),
         name + ", " + std::to_string(samples) + " samples: off by " + std::to_string(worst));
}

}  // namespace

int main(int argc, char** argv) {
  start_threads();
  omp_set_num_threads(2);
  return everywhere(argc, argv, [&](DType type, const std::string& where) {
    for (const int64_t samples : {1, 5, 16, 33, 64}) {
      run(type, samples, samples == 16 ? 64 : 7 + samples, 3 * samples + 1, where);
    }
  });
}
