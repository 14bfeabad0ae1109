// SPDX-License-Identifier: Apache-2.0
// Window attention for Python, and the module: tensors in, parameter structs out. No file besides
// bindings*.cpp knows Python.
#include "bindings.h"

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/window.h"
#include "cuda/launch.h"
#include "cuda/plan.h"
#include "geometry.h"

#ifndef ATTNEXT_VERSION
#define ATTNEXT_VERSION "0.0.0"
#endif

namespace attnext {
namespace {

constexpr int kRuleFields = 8;

AxisRule read_rule(const int64_t* f) {
  AxisRule rule;
  rule.left = f[0];
  rule.right = f[1];
  rule.stride = f[2];
  rule.phase = f[3];
  rule.dilation = f[4];
  rule.causal = f[5] != 0;
  rule.boundary = static_cast<Boundary>(f[6]);
  rule.offset = f[7];
  if (rule.stride < 1 || rule.dilation < 1 || f[6] < 0 || f[6] > 2) {
    throw std::invalid_argument("rule: stride and dilation must be positive, boundary 0, 1 or 2");
  }
  constexpr int64_t kFar = int64_t(1) << 29;  // phantom keys have 32-bit indices too
  const int64_t widest = std::max({std::abs(rule.left), std::abs(rule.right), rule.stride,
                                   std::abs(rule.phase), std::abs(rule.offset)});
  if (rule.left < 0 || rule.right < 0 || (rule.boundary == Boundary::kZeroPad && widest > kFar)) {
    throw std::invalid_argument("rule: negative or too wide");
  }
  return rule;
}

// Everything of one call: parameters, the tables they go with, and the order of the axes. Axes of
// length 1 go to the front, so that the last axes are those worth tiling.
struct Call {
  WindowParams params{};
  std::shared_ptr<const Geometry> geometry;
  std::vector<int32_t> head_rule;
  Device device = Device::kCpu;
  int rank = 0;
  int source[3] = {-1, -1, -1};  // which given axis stands at 0, 1, 2

  // [batch, *tokens, heads(, dim)]
  TensorRef token_tensor(const Shape& s, int64_t batch, const int64_t extent[3], int64_t heads,
                         int64_t dim) const {
    require(s.rank == rank + 2 + (dim > 0), "rank");
    TensorRef ref{s.data, s.stride[0], {0, 0, 0}, s.stride[rank + 1]};
    bool ok = s.size[0] == batch && s.size[rank + 1] == heads;
    for (int a = 0; a < 3; ++a) {
      if (source[a] < 0) continue;
      ref.token[a] = s.stride[1 + source[a]];
      ok = ok && s.size[1 + source[a]] == extent[a];
    }
    if (dim > 0) {
      ok = ok && s.last_size() == dim;
      require(s.last_stride() == 1 || dim == 1, "head_dim must have unit stride");
    }
    require(ok, "shape");
    return ref;
  }
  TensorRef extra_tensor(const Shape& s, int64_t dim) const {
    require(s.rank == 4 && s.size[0] == params.batch && s.size[1] == params.extra_keys &&
                s.size[2] == params.kv_heads && s.size[3] == dim,
            "additional keys or values");
    require(s.stride[3] == 1 || dim == 1, "head_dim must have unit stride");
    return {s.data, s.stride[0], {0, 0, s.stride[1]}, s.stride[2]};
  }
};

// The problem of an operator, in the order of its schema in attnext/ops.py; cu_seqlens as integers.
enum Argument {
  kQuery,
  kKey,
  kValue,
  kRowScale,
  kBias,
  kExtraKey,
  kExtraValue,
  kSinkLogits,
  kCuQueries,
  kCuKeys,
  kRules,
  kHeadRule,
  kScale,
  kSoftcap,
  kSinks,
  kNumArguments
};

// Where packed sequences end; nothing if they are not packed.
std::vector<int64_t> sequence_ends(py::handle ends, int64_t tokens) {
  if (ends.is_none()) return {};
  std::vector<int64_t> out = integers(ends);
  require(!out.empty() && out.front() == 0 && out.back() == tokens &&
              std::is_sorted(out.begin(), out.end()),
          "packed sequences");
  return out;
}

Call make_call(const py::tuple& problem, Device device) {
  require(problem.size() == kNumArguments, "arguments");
  const auto argument = [&](Argument which) -> py::handle {
    return PyTuple_GET_ITEM(problem.ptr(), which);
  };
  const bool packed = !argument(kCuQueries).is_none();
  const auto sinks = argument(kSinks).cast<int64_t>();
  const std::vector<int64_t> rules = integers(argument(kRules));
  Call call;
  call.device = device;
  WindowParams& p = call.params;
  const Shape q = read_tensor(argument(kQuery), device);
  p.dtype = q.dtype;
  const DType acc = accumulator(p.dtype);
  const Shape k = read_tensor(argument(kKey), p.dtype, device);
  const Shape v = read_tensor(argument(kValue), p.dtype, device);
  const int rank = call.rank = q.rank - 3;
  require(rank >= 1 && rank <= 3 && k.rank == q.rank && v.rank == q.rank,
          "rank of query, key, value");
  p.batch = q.size[0];
  p.heads = q.size[rank + 1];
  p.kv_heads = k.size[rank + 1];
  p.head_dim = q.size[rank + 2];
  p.head_dim_v = v.size[rank + 2];
  require(p.heads > 0 && p.kv_heads > 0 && p.heads % p.kv_heads == 0 && p.head_dim > 0 &&
              p.head_dim_v > 0,
          "heads");

  int order[3], n = 0;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass == 0) {
      for (int a = rank; a < 3; ++a) order[n++] = -1;
    }
    for (int a = 0; a < rank; ++a) {
      const bool trivial = q.size[1 + a] == 1 && k.size[1 + a] == 1;
      if (trivial == (pass == 0)) order[n++] = a;
    }
  }
  if (sinks > 0 || packed) {
    require(rank == 1, "sinks and packed sequences are for one token axis");
  }
  for (int a = 0; a < 3; ++a) {
    call.source[a] = order[a];
    p.query_extent[a] = order[a] < 0 ? 1 : q.size[1 + order[a]];
    p.key_extent[a] = order[a] < 0 ? 1 : k.size[1 + order[a]];
    require(p.query_extent[a] < INT32_MAX / 2 && p.key_extent[a] < INT32_MAX / 2,
            "an axis longer than 2^30");
  }
  p.query = call.token_tensor(q, p.batch, p.query_extent, p.heads, p.head_dim);
  p.key = call.token_tensor(k, p.batch, p.key_extent, p.kv_heads, p.head_dim);
  p.value = call.token_tensor(v, p.batch, p.key_extent, p.kv_heads, p.head_dim_v);

  const int64_t per_rule = int64_t(rank) * kRuleFields;
  require(!rules.empty() && rules.size() % per_rule == 0, "rules");
  const int64_t num_rules = static_cast<int64_t>(rules.size()) / per_rule;
  const auto cu_queries = sequence_ends(argument(kCuQueries), p.query_extent[2]);
  const auto cu_keys = sequence_ends(argument(kCuKeys), p.key_extent[2]);
  require(cu_queries.size() == cu_keys.size() && (!packed || p.batch == 1), "packed sequences");
  const auto build = [&] {
    std::vector<AxisTable> tables;
    for (int64_t r = 0; r < num_rules; ++r) {
      for (int a = 0; a < 3; ++a) {
        if (call.source[a] < 0) {
          tables.push_back(evaluate(AxisRule{}, 1, 1));
          continue;
        }
        const AxisRule rule = read_rule(&rules[r * per_rule + call.source[a] * kRuleFields]);
        if (packed) {
          require(rule.dilation == 1, "packed sequences have no dilation");
          tables.push_back(evaluate_packed(rule, cu_queries, cu_keys, sinks));
        } else {
          const int64_t n_q = p.query_extent[a], n_k = p.key_extent[a];
          tables.push_back(evaluate(rule, n_q, n_k, a == 2 ? sinks : 0));
        }
      }
    }
    return tables;
  };
  // Kept for the next call where the tables are not too large: a GPU has them uploaded once.
  constexpr int64_t kKeptTokens = 1 << 22;
  std::vector<int64_t> signature;
  int64_t tokens = 0;
  for (int a = 0; a < 3; ++a) tokens += p.query_extent[a] + p.key_extent[a];
  if (tokens * num_rules <= kKeptTokens) {
    signature = {static_cast<int64_t>(rules.size()), static_cast<int64_t>(cu_queries.size())};
    for (const std::vector<int64_t>* part : {&rules, &cu_queries, &cu_keys}) {
      signature.insert(signature.end(), part->begin(), part->end());
    }
    signature.insert(signature.end(), p.query_extent, p.query_extent + 3);
    signature.insert(signature.end(), p.key_extent, p.key_extent + 3);
    signature.insert(signature.end(), {rank, order[0], order[1], order[2], sinks});
  }
  call.geometry = shared_geometry(signature, tokens * num_rules, build);
  p.one_line = call.geometry->one_line();
  const std::vector<int64_t> head_rule = integers(argument(kHeadRule));
  call.head_rule.assign(p.heads, 0);
  if (!head_rule.empty()) {
    require(static_cast<int64_t>(head_rule.size()) == p.heads, "one rule per head");
    for (int64_t h = 0; h < p.heads; ++h) {
      require(head_rule[h] >= 0 && head_rule[h] < num_rules, "rule index");
      call.head_rule[h] = static_cast<int32_t>(head_rule[h]);
    }
  }

  p.scale = argument(kScale).cast<double>();
  p.softcap = argument(kSoftcap).cast<double>();
  if (const py::handle row_scale = argument(kRowScale); !row_scale.is_none()) {
    p.row_scale =
        call.token_tensor(read_tensor(row_scale, acc, device), p.batch, p.query_extent, p.heads, 0);
  }
  if (const py::handle sink_logits = argument(kSinkLogits); !sink_logits.is_none()) {
    const Shape s = read_tensor(sink_logits, acc, device);
    require(s.rank == 1 && s.size[0] == p.heads && s.contiguous(), "sink_logits");
    p.sink_logits = s.data;
  }
  if (const py::handle extra_key = argument(kExtraKey); !extra_key.is_none()) {
    const Shape ek = read_tensor(extra_key, p.dtype, device);
    const Shape ev = read_tensor(argument(kExtraValue), p.dtype, device);
    require(ek.rank == 4, "additional keys");
    p.extra_keys = ek.size[1];
    p.extra_key = call.extra_tensor(ek, p.head_dim);
    p.extra_value = call.extra_tensor(ev, p.head_dim_v);
  }
  if (const py::handle bias = argument(kBias); !bias.is_none()) {
    const Shape s = read_tensor(bias, acc, device);
    require(s.rank == rank + 1 && s.size[0] == p.heads, "bias");
    p.bias = s.data;
    p.bias_head_stride = 1;
    int64_t stride[3] = {0, 0, 0};
    for (int a = rank - 1; a >= 0; --a) {
      require(
          s.size[1 + a] % 2 == 1 && (s.stride[1 + a] == p.bias_head_stride || s.size[1 + a] == 1),
          "bias must be contiguous with odd extents");
      stride[a] = p.bias_head_stride;
      p.bias_head_stride *= s.size[1 + a];
    }
    for (int a = 0; a < 3; ++a) {
      const int g = call.source[a];
      p.bias_stride[a] = g < 0 ? 0 : stride[g];
      p.bias_reach[a] = g < 0 ? 0 : (s.size[1 + g] - 1) / 2;
      for (int64_t r = 0; r < num_rules; ++r) {
        const int64_t worst = max_offset(call.geometry->tables()[3 * r + a]);
        if (worst > p.bias_reach[a]) {
          throw std::invalid_argument("bias: its axis " + std::to_string(g < 0 ? 0 : g) + " has " +
                                      std::to_string(2 * p.bias_reach[a] + 1) +
                                      " entries, but offsets up to " + std::to_string(worst) +
                                      " are attended, which needs " +
                                      std::to_string(2 * worst + 1));
        }
      }
    }
  }
  return call;
}

// Where the results of the forward pass are, to be written or to be read.
void set_results(Call* call, py::handle out, py::handle lse) {
  WindowParams& p = call->params;
  p.out = call->token_tensor(read_tensor(out, p.dtype, call->device), p.batch, p.query_extent,
                             p.heads, p.head_dim_v);
  if (!lse.is_none()) {
    p.lse = call->token_tensor(read_tensor(lse, accumulator(p.dtype), call->device), p.batch,
                               p.query_extent, p.heads, 0);
  }
}

// `grads`: where the gradients of the first eight arguments go, None where there is none.
void set_gradients(Call* call, py::handle dout, py::handle dlse, const py::tuple& grads) {
  require(grads.size() == kSinkLogits + 1, "gradients");
  const auto gradient = [&](Argument of) -> py::handle {
    return PyTuple_GET_ITEM(grads.ptr(), of);
  };
  WindowParams& p = call->params;
  const DType acc = accumulator(p.dtype);
  const auto queries = [&](py::handle t, int64_t dim) {
    const DType dtype = dim > 0 ? p.dtype : acc;
    return call->token_tensor(read_tensor(t, dtype, call->device), p.batch, p.query_extent, p.heads,
                              dim);
  };
  const auto keys = [&](py::handle t, int64_t dim) {
    return call->token_tensor(read_tensor(t, p.dtype, call->device), p.batch, p.key_extent,
                              p.kv_heads, dim);
  };
  p.dout = queries(dout, p.head_dim_v);
  if (!dlse.is_none()) p.dlse = queries(dlse, 0);
  p.dquery = queries(gradient(kQuery), p.head_dim);
  p.dkey = keys(gradient(kKey), p.head_dim);
  p.dvalue = keys(gradient(kValue), p.head_dim_v);
  if (!gradient(kRowScale).is_none()) p.drow_scale = queries(gradient(kRowScale), 0);
  if (p.extra_keys > 0) {
    p.dextra_key =
        call->extra_tensor(read_tensor(gradient(kExtraKey), p.dtype, call->device), p.head_dim);
    p.dextra_value =
        call->extra_tensor(read_tensor(gradient(kExtraValue), p.dtype, call->device), p.head_dim_v);
  }
  if (!gradient(kBias).is_none()) {
    const Shape s = read_tensor(gradient(kBias), acc, call->device);
    int64_t n = 1;
    for (int a = 0; a < s.rank; ++a) n *= s.size[a];
    require(p.bias && s.contiguous() && n == p.heads * p.bias_head_stride, "bias gradient");
    p.dbias = s.data;
  }
  if (!gradient(kSinkLogits).is_none()) {
    const Shape s = read_tensor(gradient(kSinkLogits), acc, call->device);
    require(p.sink_logits && s.rank == 1 && s.size[0] == p.heads && s.contiguous(),
            "sink gradient");
    p.dsink_logits = s.data;
  }
}

void window_forward(const py::tuple& problem, py::handle out, py::handle lse) {
  Call call = make_call(problem, Device::kCpu);
  set_results(&call, out, lse);
  expect_writes(out);
  const py::gil_scoped_release release;
  cpu::window_forward(call.params, *call.geometry, call.head_rule.data());
}

void window_backward(const py::tuple& problem, py::handle out, py::handle lse, py::handle dout,
                     py::handle dlse, const py::tuple& grads) {
  Call call = make_call(problem, Device::kCpu);
  set_results(&call, out, lse);
  set_gradients(&call, dout, dlse, grads);
  for (const py::handle t : grads) expect_writes(t);
  const py::gil_scoped_release release;
  cpu::window_backward(call.params, *call.geometry, call.head_rule.data());
}

// ---- CUDA: what would be launched ---------------------------------------------------------------

// A problem as a GPU takes it, worked out: which tables its kernels read, how much scratch they
// need, what is launched.
struct CudaCall {
  Call call;

  explicit CudaCall(const py::tuple& problem) : call(make_call(problem, Device::kCuda)) {}

  std::shared_ptr<const cuda::Tables> tables(cuda::Pass pass) const {
    return cuda::shared_tables(call.geometry, call.head_rule, pass == cuda::Pass::kKeyGradient,
                               cuda::kernel_shape(call.params, pass).rows(),
                               call.params.extra_keys);
  }
};

struct CudaForward : CudaCall {
  std::shared_ptr<const cuda::Tables> queries;

  explicit CudaForward(const py::tuple& problem)
      : CudaCall(problem), queries(tables(cuda::Pass::kForward)) {}
  int64_t workspace_bytes() const { return cuda::forward_workspace(call.params, *queries); }
  std::vector<cuda::Launch> prepare(py::handle out, py::handle lse, uintptr_t device_queries,
                                    uintptr_t workspace) {
    set_results(&call, out, lse);
    return cuda::forward_launches(call.params, *queries,
                                  reinterpret_cast<const int32_t*>(device_queries),
                                  reinterpret_cast<void*>(workspace));
  }
};

struct CudaBackward : CudaCall {
  std::shared_ptr<const cuda::Tables> queries, keys;

  explicit CudaBackward(const py::tuple& problem)
      : CudaCall(problem),
        queries(tables(cuda::Pass::kQueryGradient)),
        keys(tables(cuda::Pass::kKeyGradient)) {}
  int64_t workspace_bytes() const { return cuda::backward_workspace(call.params, *queries); }
  std::vector<cuda::Launch> prepare(const py::args& t, uintptr_t device_queries,
                                    uintptr_t device_keys, uintptr_t workspace) {
    set_results(&call, t[0], t[1]);
    set_gradients(&call, t[2], t[3], t[4]);
    return cuda::backward_launches(
        call.params, *queries, reinterpret_cast<const int32_t*>(device_queries), *keys,
        reinterpret_cast<const int32_t*>(device_keys), reinterpret_cast<void*>(workspace));
  }
};

// ---- geometry as plain values ------------------------------------------------------------------

AxisTable table_of(const std::vector<int64_t>& rule, int64_t num_queries, int64_t num_keys) {
  require(rule.size() == kRuleFields, "a rule has 8 fields");
  require(num_queries >= 0 && num_keys >= 0, "extents");
  return evaluate(read_rule(rule.data()), num_queries, num_keys);
}

std::vector<std::pair<int32_t, int32_t>> axis_intervals(const std::vector<int64_t>& rule,
                                                        int64_t num_queries, int64_t num_keys) {
  const AxisTable t = table_of(rule, num_queries, num_keys);
  std::vector<std::pair<int32_t, int32_t>> out;
  for (size_t i = 0; i < t.begin.size(); ++i) out.emplace_back(t.begin[i], t.end[i]);
  return out;
}

py::dict tile_plan(const std::vector<std::vector<int64_t>>& rules,
                   const std::vector<int64_t>& query_extent, const std::vector<int64_t>& key_extent,
                   int lanes, int vectors) {
  require(!rules.empty() && rules.size() <= 3 && rules.size() == query_extent.size() &&
              rules.size() == key_extent.size(),
          "one rule and one extent per axis");
  require(lanes >= 1 && vectors >= 1 && int64_t(lanes) * vectors <= 64, "lanes");
  AxisTable tables[3];
  const size_t pad = 3 - rules.size();
  for (size_t a = 0; a < 3; ++a) {
    tables[a] = a < pad ? evaluate(AxisRule{}, 1, 1)
                        : table_of(rules[a - pad], query_extent[a - pad], key_extent[a - pad]);
  }
  PlanOptions options;
  options.lanes = lanes;
  options.vectors = vectors;
  const WindowPlan plan = make_plan(tables, options);
  py::dict out;
  py::list box, segments;
  int64_t tiles = 1;
  for (size_t a = 0; a < 3; ++a) {
    tiles *= static_cast<int64_t>(plan.axis[a].groups.size());
    if (a < pad) continue;
    box.append(plan.box[a]);
    py::list axis;
    for (const Segment& s : plan.axis[a].segments) {
      axis.append(py::make_tuple(s.query, s.count, s.begin, s.end));
    }
    segments.append(axis);
  }
  out["box"] = box;
  out["stack_axis"] = plan.stack_axis - static_cast<int>(pad);
  out["num_tiles"] = tiles;
  out["segments"] = segments;
  out["useful_pairs"] = plan.useful_pairs;
  out["computed_pairs"] = plan.computed_pairs;
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("__version__") = ATTNEXT_VERSION;
  m.def("window_forward", &window_forward);
  m.def("window_backward", &window_backward);
  py::class_<cuda::Tables, std::shared_ptr<cuda::Tables>>(m, "CudaTables")
      .def_readonly("useful_pairs", &cuda::Tables::useful_pairs)
      .def_readonly("computed_pairs", &cuda::Tables::computed_pairs)
      .def("data", [](const cuda::Tables& t) {
        return py::bytes(reinterpret_cast<const char*>(t.data.data()),
                         t.data.size() * sizeof(int32_t));
      });
  const auto shared = [](const std::shared_ptr<const cuda::Tables>& t) {
    return std::const_pointer_cast<cuda::Tables>(t);
  };
  py::class_<CudaForward>(m, "CudaForward")
      .def(py::init<const py::tuple&>())
      .def_property_readonly("queries",
                             [shared](const CudaForward& f) { return shared(f.queries); })
      .def_property_readonly("workspace_bytes", &CudaForward::workspace_bytes)
      .def("launches",
           [](CudaForward& f, py::handle out, py::handle lse, uintptr_t queries,
              uintptr_t workspace) { return describe(f.prepare(out, lse, queries, workspace)); })
      .def("run", [](CudaForward& f, py::handle out, py::handle lse, uintptr_t queries,
                     uintptr_t workspace, int device, uintptr_t stream) {
        const auto launches = f.prepare(out, lse, queries, workspace);
        const py::gil_scoped_release release;
        cuda::launch(launches, device, stream, "window_forward");
      });
  py::class_<CudaBackward>(m, "CudaBackward")
      .def(py::init<const py::tuple&>())
      .def_property_readonly("queries",
                             [shared](const CudaBackward& b) { return shared(b.queries); })
      .def_property_readonly("keys", [shared](const CudaBackward& b) { return shared(b.keys); })
      .def_property_readonly("workspace_bytes", &CudaBackward::workspace_bytes)
      .def("launches",
           [](CudaBackward& b, uintptr_t queries, uintptr_t keys, uintptr_t workspace,
              const py::args& tensors) {
             return describe(b.prepare(tensors, queries, keys, workspace));
           })
      .def("run", [](CudaBackward& b, uintptr_t queries, uintptr_t keys, uintptr_t workspace,
                     int device, uintptr_t stream, const py::args& tensors) {
        const auto launches = b.prepare(tensors, queries, keys, workspace);
        const py::gil_scoped_release release;
        cuda::launch(launches, device, stream, "window_backward");
      });
  m.def("cuda_kernels", [] {
    py::list out;
    for (const cuda::KernelFacts& k : cuda::all_kernels()) {
      py::dict facts;
      const char* const passes[] = {"forward", "query_gradient", "key_gradient", "bias_gradient"};
      const char* const types[] = {"float", "double", "bf16", "fp16"};
      facts["name"] = k.name;
      facts["routed"] = k.routed;
      facts["pass"] = passes[static_cast<int>(k.pass)];
      facts["type"] = types[static_cast<int>(k.dtype)];
      facts["dim"] = k.shape.dim;
      facts["warps"] = k.shape.warps;
      facts["frags"] = k.shape.frags;
      facts["step"] = k.shape.step;
      facts["modified"] = k.modified;
      facts["slices"] = k.shape.slices;
      facts["shared_bytes"] = k.shared_bytes;
      out.append(facts);
    }
    return out;
  });
  m.attr("cuda_architectures") = cuda::built_architectures();
  m.def("axis_intervals", &axis_intervals, py::arg("rule"), py::arg("num_queries"),
        py::arg("num_keys"));
  m.def(
      "inverse_intervals",
      [](const std::vector<int64_t>& rule, int64_t num_queries, int64_t num_keys) {
        return inverse(table_of(rule, num_queries, num_keys));
      },
      py::arg("rule"), py::arg("num_queries"), py::arg("num_keys"));
  m.def("tile_plan", &tile_plan, py::arg("rules"), py::arg("query_extent"), py::arg("key_extent"),
        py::arg("lanes"), py::arg("vectors"));
  bind_linear(m);
  bind_routed(m);
  bind_search(m);
  m.def("isa", &cpu::active_isa);
  m.def("set_isa", &cpu::set_isa, py::arg("name"));
  m.def("available_isas", &cpu::available_isas);
  m.def("num_threads", &cpu::max_threads);
  m.def("lanes", [](const std::string& dtype) {
    const cpu::WindowKernels& k = cpu::window_kernels(dtype_of(dtype));
    return std::make_pair(k.lanes, k.vectors);
  });
  m.def(
      "fma_peak",
      [](const std::string& isa, const std::string& dtype, double seconds) {
        const py::gil_scoped_release release;
        return cpu::fma_peak(isa, dtype_of(dtype), seconds);
      },
      py::arg("isa"), py::arg("dtype"), py::arg("seconds"));
}

}  // namespace attnext
