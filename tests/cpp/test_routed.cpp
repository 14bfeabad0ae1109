// SPDX-License-Identifier: Apache-2.0
// Routed attention on every instruction set and dtype against a naive float64 restatement, without
// Python: for sanitizer builds and for machines that have no torch.
#include <algorithm>
#include <cstdio>
#include <limits>
#include <string>

#include "cpu/routed.h"
#include "cpu/routed_chunks.h"
#include "everywhere.h"
#include "tensor.h"

using namespace attnext;

namespace {

constexpr int64_t kFar = int64_t(1) << 40;

// Lists of spans, or of blocks, drawn at random; one list for each kv head.
struct Problem {
  int64_t heads, kv_heads, dim, dim_v, queries, keys, query_block, key_block, slots;
  bool spans = false, bias = false, causal = false, permuted = false, sink_logits = false;
  int64_t window = 0, sinks = 0, within = kFar;
};

std::vector<int32_t> offsets_of(int64_t tokens, int64_t block) {
  std::vector<int32_t> out{0};
  while (out.back() < tokens) {
    out.push_back(static_cast<int32_t>(std::min(tokens, out.back() + block)));
  }
  return out;
}

double largest_difference(const Tensor& got, const std::vector<double>& want) {
  double worst = 0;
  for (int64_t r = 0; r < got.rows(); ++r) {
    for (int64_t d = 0; d < got.n[5]; ++d) {
      const double x = got.get(r, d), y = want[r * got.n[5] + d];
      const double error = x == y ? 0 : std::fabs(x - y);
      worst = error <= worst ? worst : error;  // NaN stays
    }
  }
  return worst;
}

void run(const Problem& c, DType type, const std::string& name, unsigned seed) {
  std::mt19937 rng(seed);
  const DType acc = type == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const int64_t q[3] = {1, 1, c.queries}, k[3] = {1, 1, c.keys};
  const int64_t group = c.heads / c.kv_heads, batch = 2;
  Tensor query(type, batch, q, c.heads, c.dim), key(type, batch, k, c.kv_heads, c.dim);
  Tensor value(type, batch, k, c.kv_heads, c.dim_v), out(type, batch, q, c.heads, c.dim_v);
  Tensor dout(type, batch, q, c.heads, c.dim_v), lse(acc, batch, q, c.heads, 1);
  Tensor dquery(type, batch, q, c.heads, c.dim), dkey(type, batch, k, c.kv_heads, c.dim);
  Tensor dvalue(type, batch, k, c.kv_heads, c.dim_v);
  for (Tensor* t : {&query, &key, &value, &dout}) t->randomise(rng, 0.7);

  const auto query_offsets = offsets_of(c.queries, c.query_block);
  const auto key_offsets = offsets_of(c.keys, c.key_block);
  std::vector<int32_t> order(c.keys);
  for (int64_t i = 0; i < c.keys; ++i) order[i] = static_cast<int32_t>(c.keys - 1 - i);
  RoutedParams r{};
  r.query_blocks = static_cast<int64_t>(query_offsets.size()) - 1;
  r.key_blocks = static_cast<int64_t>(key_offsets.size()) - 1;
  r.list_batch = 1;
  r.list_heads = c.kv_heads;
  r.slots = c.slots;
  r.entries = c.kv_heads * r.query_blocks * c.slots;
  std::vector<int32_t> lists, ends;
  for (int64_t e = 0; e < r.entries; ++e) {
    const auto below = [&](int64_t n) { return static_cast<int32_t>(rng() % n); };
    lists.push_back(c.spans ? below(c.keys) : below(r.key_blocks + 1) - 1);
    ends.push_back(std::min<int32_t>(static_cast<int32_t>(c.keys), lists.back() + below(30) - 3));
  }
  const int64_t wide = size_of(acc);
  std::vector<char> bias(r.entries * wide), dbias(2 * r.entries * wide), sinks(c.heads * wide);
  std::vector<char> dsinks(c.heads * wide);
  std::normal_distribution<double> normal;
  for (int64_t e = 0; e < r.entries; ++e) from_double(acc, bias.data(), e, normal(rng));
  for (int64_t h = 0; h < c.heads; ++h) from_double(acc, sinks.data(), h, normal(rng));

  WindowParams& p = r.window;
  p.dtype = type;
  p.batch = batch, p.heads = c.heads, p.kv_heads = c.kv_heads;
  p.head_dim = c.dim, p.head_dim_v = c.dim_v;
  for (int a = 0; a < 3; ++a) p.query_extent[a] = q[a], p.key_extent[a] = k[a];
  p.query = query.ref(), p.key = key.ref(), p.value = value.ref();
  p.out = out.ref(), p.lse = lse.ref(), p.dout = dout.ref();
  p.dquery = dquery.ref(), p.dkey = dkey.ref(), p.dvalue = dvalue.ref();
  p.scale = 0.4;
  if (c.sink_logits) p.sink_logits = sinks.data(), p.dsink_logits = dsinks.data();
  r.query_offsets = query_offsets.data(), r.key_offsets = key_offsets.data();
  if (c.permuted) r.key_order = order.data();
  r.lists = lists.data();
  if (c.spans) r.ends = ends.data();
  if (c.bias) r.entry_bias = bias.data(), r.dentry_bias = dbias.data();
  r.has_window = c.window > 0;
  r.around[0] = c.window - 1;
  r.sinks = c.sinks;
  r.causal = c.causal;
  r.within[0] = r.within[1] = c.within;

  cpu::routed_forward(r);
  cpu::routed_backward(r);
  const std::vector<char> once[] = {out.data, lse.data, dquery.data, dkey.data, dvalue.data};
  const std::vector<char> dbias_once = dbias;
  omp_set_num_threads(3);
  cpu::routed_forward(r);
  cpu::routed_backward(r);
  omp_set_num_threads(1);
  const Tensor* results[] = {&out, &lse, &dquery, &dkey, &dvalue};
  for (int i = 0; i < 5; ++i) {
    expect(once[i] == results[i]->data, name + ": threads change result " + std::to_string(i));
    expect(results[i]->padding_is_intact(), name + ": padding of result " + std::to_string(i));
  }
  expect(dbias == dbias_once, name + ": threads change the gradient of the biases");

  std::vector<double> o(out.rows() * c.dim_v), l(lse.rows()), dq(dquery.rows() * c.dim);
  std::vector<double> dk(dkey.rows() * c.dim), dv(dvalue.rows() * c.dim_v), dbias_want(r.entries);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < c.heads; ++h) {
      for (int64_t i = 0; i < c.queries; ++i) {
        const int64_t x[3] = {0, 0, i}, row = query.row(b, x, h), kv = h / group;
        const int64_t list = (kv * r.query_blocks + i / c.query_block) * c.slots;
        const int64_t position = i + c.keys - c.queries;
        std::vector<double> weight(c.keys);
        std::vector<int64_t> entry(c.keys, -1);
        double sum = c.sink_logits ? std::exp(to_double(acc, sinks.data(), h)) : 0;
        for (int64_t place = 0; place < c.keys; ++place) {
          const int64_t j = c.permuted ? order[place] : place;
          for (int64_t e = list + c.slots - 1; e >= list; --e) {
            const bool listed =
                c.spans ? lists[e] <= place && place < ends[e] : lists[e] == place / c.key_block;
            if (listed) entry[j] = e;
          }
          const bool near = c.window > 0 && position - c.window < j && j <= position;
          const bool allowed = (!c.causal || j <= position) && std::abs(j - position) <= c.within;
          if (!allowed || !(entry[j] >= 0 || near || j < c.sinks)) continue;
          const int64_t y[3] = {0, 0, j}, key_row = key.row(b, y, kv);
          double s = 0;
          for (int64_t d = 0; d < c.dim; ++d) s += query.get(row, d) * key.get(key_row, d);
          s *= p.scale;
          if (c.bias && entry[j] >= 0) s += to_double(acc, bias.data(), entry[j]);
          sum += weight[j] = std::exp(s);
        }
        l[row] = sum > 0 ? std::log(sum) : -std::numeric_limits<double>::infinity();
        double delta = 0;
        for (int64_t j = 0; j < c.keys; ++j) {
          if (weight[j] == 0) continue;
          weight[j] /= sum;
          const int64_t y[3] = {0, 0, j}, key_row = key.row(b, y, kv);
          for (int64_t d = 0; d < c.dim_v; ++d) {
            o[row * c.dim_v + d] += weight[j] * value.get(key_row, d);
          }
        }
        for (int64_t d = 0; d < c.dim_v; ++d) delta += o[row * c.dim_v + d] * dout.get(row, d);
        for (int64_t j = 0; j < c.keys; ++j) {
          if (weight[j] == 0) continue;
          const int64_t y[3] = {0, 0, j}, key_row = key.row(b, y, kv);
          double dp = 0;
          for (int64_t d = 0; d < c.dim_v; ++d) {
            dp += dout.get(row, d) * value.get(key_row, d);
            dv[key_row * c.dim_v + d] += weight[j] * dout.get(row, d);
          }
          const double ds = weight[j] * (dp - delta);
          if (entry[j] >= 0) dbias_want[entry[j]] += ds;
          for (int64_t d = 0; d < c.dim; ++d) {
            dq[row * c.dim + d] += ds * p.scale * key.get(key_row, d);
            dk[key_row * c.dim + d] += ds * p.scale * query.get(row, d);
          }
        }
      }
    }
  }
  const double tolerance = type == DType::kFloat64 ? 1e-12 : type == DType::kFloat32 ? 2e-5 : 6e-2;
  const std::vector<double>* wanted[] = {&o, &l, &dq, &dk, &dv};
  for (int i = 0; i < 5; ++i) {
    const double error = largest_difference(*results[i], *wanted[i]);
    expect(error <= tolerance,
           name + ": result " + std::to_string(i) + " is off by " + std::to_string(error));
  }
  for (int64_t e = 0; c.bias && e < r.entries; ++e) {
    double got = 0;
    for (int64_t copy = 0; copy < r.batch_copies() * r.head_copies(); ++copy) {
      got += to_double(acc, dbias.data(), copy * r.entries + e);
    }
    expect(std::fabs(got - dbias_want[e]) <= tolerance, name + ": bias " + std::to_string(e));
  }
}

// Lists turned round name each query and key that is listed once, and no tile holds a query twice
// or more of them than it has lanes.
void share(int64_t block, int64_t key_block, bool spans, int heads, unsigned seed) {
  const int64_t queries = 200, keys = 500, slots = 4;
  const int lanes = 16;
  std::mt19937 rng(seed);
  const auto query_offsets = offsets_of(queries, block), key_offsets = offsets_of(keys, key_block);
  RoutedParams r{};
  r.query_blocks = static_cast<int64_t>(query_offsets.size()) - 1;
  r.key_blocks = static_cast<int64_t>(key_offsets.size()) - 1;
  r.list_batch = r.list_heads = 1;
  r.slots = slots;
  r.window.heads = r.window.kv_heads = heads;
  r.query_offsets = query_offsets.data(), r.key_offsets = key_offsets.data();
  r.within[0] = r.within[1] = kFar;
  std::vector<int32_t> lists, ends;
  for (int64_t e = 0; e < r.query_blocks * slots; ++e) {
    lists.push_back(static_cast<int32_t>(rng() % (spans ? keys : r.key_blocks + 1)) - 1);
    if (spans && lists.back() < 0) lists.back() = 0;
    const int32_t past = lists.back() + static_cast<int32_t>(rng() % 150) - 5;
    ends.push_back(std::min<int32_t>(past, keys));
  }
  r.lists = lists.data();
  if (spans) r.ends = ends.data();
  cpu::ListView view{};
  view.params = &r;
  view.num_queries = queries, view.num_keys = keys, view.offset = keys - queries;
  view.vectors = 2;
  const auto last = static_cast<int32_t>(r.query_blocks);
  cpu::SharePlan plan;
  plan.make(view, lanes, {1, last - 1, 0, heads}, 0, 0);
  const cpu::ListChunk& chunk = plan.chunk;
  std::vector<int> found(queries * keys), wanted(queries * keys);
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t own = i / block;
    if (own == 0 || own >= last - 1) continue;
    for (int64_t e = own * slots; e < (own + 1) * slots; ++e) {
      for (int64_t j = 0; j < keys; ++j) {
        const bool listed = spans ? lists[e] <= j && j < ends[e] : lists[e] == j / key_block;
        if (listed) wanted[i * keys + j] = 1;
      }
    }
  }
  const std::string name = "sharing " + std::to_string(seed);
  for (int64_t n = 0; n < chunk.num_shared; ++n) {
    const cpu::SharedKeys& s = chunk.shared[n];
    expect(s.count > 0 && s.count * heads <= lanes * view.vectors, name + ": too many queries");
    for (int32_t k = s.first; k < s.first + s.count; ++k) {
      const cpu::Sharer& x = chunk.sharers[k];
      const bool rises = k == s.first || chunk.sharers[k - 1].place < x.place;
      expect(rises, name + ": a query is there twice");
      expect(s.begin <= x.begin && x.end <= s.end, name + ": keys beyond the tile's");
      for (int32_t j = x.begin; j < x.end; ++j) ++found[int64_t(x.place) * keys + j];
    }
  }
  expect(found == wanted, name + ": not each listed key once");
}

}  // namespace

int main(int argc, char** argv) {
  start_threads();
  std::vector<Problem> problems;
  const auto add = [&](Problem c) -> Problem& { return problems.emplace_back(c); };
  add({2, 2, 16, 16, 70, 70, 16, 16, 3}).causal = true;
  add({4, 2, 8, 12, 33, 61, 1, 5, 4}).bias = true;
  Problem& near = add({6, 2, 30, 7, 130, 130, 64, 3, 2});
  near.causal = near.sink_logits = true;
  near.window = 20, near.sinks = 5;
  Problem& spans = add({2, 1, 5, 3, 40, 55, 7, 1, 6});
  spans.spans = spans.bias = true;
  spans.within = 30;
  add({2, 2, 17, 9, 24, 24, 6, 4, 3}).permuted = true;
  add({1, 1, 4, 4, 9, 9, 4, 4, 0});
  add({2, 1, 8, 8, 1, 1500, 1, 64, 20});
  add({4, 2, 16, 9, 300, 310, 1, 40, 3}).causal = true;
  add({2, 2, 8, 8, 200, 260, 2, 3, 9}).sink_logits = true;
  // Several tiles, and heads, add to the biases of a list.
  add({2, 2, 8, 8, 700, 63, 300, 1, 21}).bias = true;
  add({3, 1, 8, 8, 250, 63, 50, 1, 21}).bias = true;
  Problem& few = add({3, 1, 12, 5, 150, 333, 1, 1, 4});
  few.spans = true;
  few.within = 200;
  unsigned seed = 0;
  for (const bool spans : {false, true}) {
    for (const int64_t key_block : {3, 40}) {
      for (const int heads : {1, 3}) {
        share(1, key_block, spans, heads, seed++);
        share(3, key_block, spans, heads, seed++);
      }
    }
  }
  return everywhere(argc, argv, [&](DType type, const std::string& where) {
    for (size_t i = 0; i < problems.size(); ++i) {
      run(problems[i], type, where + " problem " + std::to_string(i), static_cast<unsigned>(i));
    }
  });
}
