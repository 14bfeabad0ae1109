// SPDX-License-Identifier: Apache-2.0
// The searches of routers for Python.
#include "bindings.h"
#include "cpu/search.h"
#include "cpu/select.h"

namespace attnext {
namespace {

// query [batch, heads, rows, samples, dim], reach [rows, samples], at [batch, heads, rows, places]
void largest_products(py::handle query, py::handle reach, py::handle key, py::handle at,
                      double lowest, py::handle out) {
  const Shape k = read_tensor(key, Device::kCpu);
  const DType acc = accumulator(k.dtype);
  const Shape q = read_tensor(query, acc, Device::kCpu);
  const Shape o = read_tensor(out, acc, Device::kCpu);
  const auto seen = read_integers<int64_t>(reach, Device::kCpu);
  const auto places = read_integers<int64_t>(at, Device::kCpu);
  require(k.rank == 4 && q.rank == 5 && o.rank == 4, "rank");
  require(q.contiguous() && o.contiguous(), "query and out must be contiguous");
  const int64_t kv_heads = k.size[2], heads = q.size[1], dim = q.size[4];
  require(k.size[0] == q.size[0] && k.last_size() == dim && kv_heads > 0 && heads % kv_heads == 0,
          "key");
  require(k.last_stride() == 1 || dim == 1, "head_dim must have unit stride");
  const int64_t lists = q.size[0] * heads * q.size[2];
  require(std::equal(o.size, o.size + 3, q.size) && places.count == lists * o.size[3] &&
              seen.count == q.size[2] * q.size[3],
          "shape");
  require(k.size[1] < INT32_MAX / 2, "more than 2^30 tokens");
  if (places.count == 0) return;
  require(k.size[1] > 0, "no keys");
  const cpu::SearchParams p{k.dtype,
                            q.size[0],
                            heads,
                            q.size[2],
                            o.size[3],
                            q.size[3],
                            dim,
                            k.size[1],
                            heads / kv_heads,
                            {k.data, k.stride[0], {0, 0, k.stride[1]}, k.stride[2]},
                            q.data,
                            seen.data,
                            places.data,
                            o.data,
                            lowest};
  const py::gil_scoped_release release;
  cpu::largest_products(p);
}

// score, k, samples, scale, force_first, force_last, tie_high, by_score
using Choice = std::tuple<int, int64_t, int64_t, double, int64_t, int64_t, bool, bool>;

// query [batch, tokens, heads, dim], candidates [batch, products, kv heads, dim]; factors [batch,
// rows, heads]; begin and end [1 or batch, rows]; overlap and share [candidates, slots]; exclude
// [batch, lists, rows, candidates]; indices and values [batch, lists, rows, k]
void select_topk(py::handle query, py::handle candidates, py::handle factors, py::handle each_end,
                 py::handle begin, py::handle end, py::handle overlap, py::handle share,
                 py::handle exclude, const Choice& choice, py::handle indices, py::handle values) {
  const Shape q = read_tensor(query, Device::kCpu);
  const DType acc = accumulator(q.dtype);
  const Shape c = read_tensor(candidates, acc, Device::kCpu);
  const Shape v = read_tensor(values, acc, Device::kCpu);
  const auto at = read_integers<int32_t>(indices, Device::kCpu);
  cpu::SelectParams p{};
  p.dtype = q.dtype;
  int score;
  std::tie(score, p.k, p.samples, p.scale, p.force_first, p.force_last, p.tie_high, p.by_score) =
      choice;
  p.score = static_cast<cpu::Score>(score);
  require(q.rank == 4 && c.rank == 4 && v.rank == 4 && v.contiguous(), "rank");
  require(score >= 0 && score <= 3 && p.k > 0 && p.samples > 0, "choice");
  p.batch = q.size[0], p.tokens = q.size[1], p.heads = q.size[2], p.dim = q.size[3];
  p.num_products = p.num_candidates = c.size[1], p.kv_heads = c.size[2];
  p.lists = v.size[1], p.rows = v.size[2];
  require(c.size[0] == p.batch && c.size[3] == p.dim && p.kv_heads > 0 &&
              p.heads % p.kv_heads == 0 && p.num_products < INT32_MAX / 2,
          "candidates");
  const bool max_q = p.score == cpu::Score::kMaxQ, grouped = p.score == cpu::Score::kGroupProb;
  require(p.lists * (p.score == cpu::Score::kReluWsum || grouped ? p.samples : 1) == p.heads,
          "lists");
  require(max_q ? p.rows == (p.tokens + p.samples - 1) / p.samples : p.rows == p.tokens, "rows");
  require((q.last_stride() == 1 && c.last_stride() == 1) || p.dim == 1,
          "head_dim must have unit stride");
  require(v.size[0] == p.batch && v.size[3] == p.k && at.count == p.batch * p.lists * p.rows * p.k,
          "results");
  p.query = {q.data, q.stride[0], {0, 0, q.stride[1]}, q.stride[2]};
  p.candidate = {c.data, c.stride[0], {0, 0, c.stride[1]}, c.stride[2]};
  if (!factors.is_none()) {
    const Shape f = read_tensor(factors, acc, Device::kCpu);
    require(f.rank == 3 && f.contiguous() && f.size[0] == p.batch && f.size[1] == p.rows &&
                f.size[2] == p.heads,
            "factors");
    p.factor = f.data;
  }
  const auto each = read_integers<int64_t>(each_end, Device::kCpu);
  require(!each.data || each.count == (max_q ? p.tokens : p.rows), "each_end");
  p.each_end = each.data;
  const auto first = read_integers<int64_t>(begin, Device::kCpu);
  const auto past = read_integers<int64_t>(end, Device::kCpu);
  for (const auto& range : {first, past}) {
    require(!range.data || range.count == p.rows || range.count == p.batch * p.rows, "ranges");
    if (range.data && range.count != p.rows) p.ranges_batch = p.rows;
  }
  require(!first.data || first.count == past.count, "ranges");
  p.begin = first.data, p.end = past.data;
  if (grouped) {
    const auto slots = read_integers<int64_t>(overlap, Device::kCpu);
    const Shape s = read_tensor(share, acc, Device::kCpu);
    require(s.rank == 2 && s.contiguous() && slots.count == s.size[0] * s.size[1], "overlap");
    p.overlap = slots.data, p.share = s.data;
    p.num_candidates = s.size[0], p.slots = s.size[1];
  }
  if (!exclude.is_none()) {
    const py::object shape = exclude.attr("shape"), stride = exclude.attr("stride")();
    require_tensor(exclude.attr("is_cpu").cast<bool>() && py::len(shape) == 4 &&
                       exclude.attr("element_size")().cast<int>() == 1,
                   exclude);
    const int64_t want[] = {p.batch, p.lists, p.rows, p.num_candidates};
    for (int a = 0; a < 4; ++a) {
      require(shape[py::int_(a)].cast<int64_t>() == want[a], "exclude");
      p.exclude_stride[a] = stride[py::int_(a)].cast<int64_t>();
    }
    p.exclude = reinterpret_cast<const bool*>(exclude.attr("data_ptr")().cast<uintptr_t>());
  }
  p.indices = const_cast<int32_t*>(at.data), p.values = v.data;
  if (at.count == 0) return;
  const py::gil_scoped_release release;
  cpu::select_best(p);
}

// numbers [..., n], float32 or float64, places int64 [..., count]
void best_places(py::handle numbers, int64_t count, py::handle places) {
  const Shape x = read_tensor(numbers, Device::kCpu);
  const auto at = read_integers<int64_t>(places, Device::kCpu);
  require(x.rank > 0 && x.contiguous() && accumulator(x.dtype) == x.dtype, "numbers");
  int64_t rows = 1;
  for (int a = 0; a + 1 < x.rank; ++a) rows *= x.size[a];
  require(count > 0 && count <= x.last_size() && at.count == rows * count, "places");
  const py::gil_scoped_release release;
  cpu::best_places(x.dtype, x.data, rows, x.last_size(), count, const_cast<int64_t*>(at.data));
}

}  // namespace

void bind_search(py::module_& m) {
  m.def("largest_products", &largest_products);
  m.def("select_topk", &select_topk);
  m.def("best_places", &best_places);
}

}  // namespace attnext
