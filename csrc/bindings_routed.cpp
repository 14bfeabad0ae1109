// SPDX-License-Identifier: Apache-2.0
// Routed attention for Python.
#include <tuple>

#include "bindings.h"
#include "cpu/routed.h"
#include "cuda/plan.h"

namespace attnext {
namespace {

// The problem of an operator, in the order of its schema in attnext/routed_ops.py.
enum Argument {
  kQuery,
  kKey,
  kValue,
  kEntryBias,
  kSinkLogits,
  kLists,
  kEnds,
  kIndptr,
  kQueryOffsets,
  kQueryOrder,
  kKeyOffsets,
  kKeyOrder,
  kQueryDocuments,
  kKeyDocuments,
  kKeyLengths,
  kHeadPolicy,
  kRules,
  kListShape,
  kScale,
  kSoftcap,
  kNumArguments
};
constexpr int kNumGrads = kSinkLogits + 1;

enum Rule { kCausal, kExcludeSelf, kLeft, kRight, kHasWindow, kBefore, kAfter, kSinks, kNumRules };

struct RoutedCall {
  RoutedParams params{};
  std::vector<int8_t> policy;
  int rank = 0;
  Device device = Device::kCpu;

  // [batch, *tokens, heads(, dim)]
  TensorRef tokens(py::handle t, DType dtype, const int64_t extent[3], int64_t heads,
                   int64_t dim) const {
    const Shape s = read_tensor(t, dtype, device);
    require(s.rank == rank + 2 + (dim > 0), "rank");
    TensorRef ref{s.data, s.stride[0], {0, 0, 0}, s.stride[rank + 1]};
    bool ok = s.size[0] == params.window.batch && s.size[rank + 1] == heads;
    for (int a = 0; a < rank; ++a) {
      ref.token[3 - rank + a] = s.stride[1 + a];
      ok = ok && s.size[1 + a] == extent[3 - rank + a];
    }
    if (dim > 0) {
      ok = ok && s.last_size() == dim;
      require(s.last_stride() == 1 || dim == 1, "head_dim must have unit stride");
    }
    require(ok, "shape");
    return ref;
  }
  TensorRef queries(py::handle t, DType dtype, int64_t dim) const {
    return tokens(t, dtype, params.window.query_extent, params.window.heads, dim);
  }
  TensorRef keys(py::handle t, DType dtype, int64_t dim) const {
    return tokens(t, dtype, params.window.key_extent, params.window.kv_heads, dim);
  }
};

int64_t product(const int64_t n[3]) { return n[0] * n[1] * n[2]; }

// Blocks that a host can read: offsets that rise to the number of tokens, and an order that has
// each token once.
void check_blocks(const Integers<int32_t>& offsets, const int32_t* order, int64_t tokens,
                  const char* name) {
  bool ok = offsets.data[0] == 0 && offsets.data[offsets.count - 1] == tokens;
  for (int64_t b = 0; b + 1 < offsets.count; ++b) ok &= offsets.data[b] <= offsets.data[b + 1];
  if (order) {
    std::vector<bool> seen(tokens);
    for (int64_t u = 0; ok && u < tokens; ++u) {
      ok = order[u] >= 0 && order[u] < tokens && !seen[order[u]];
      if (ok) seen[order[u]] = true;
    }
  }
  if (ok) return;
  throw std::invalid_argument(std::string(name) +
                              ": offsets must rise from 0 to the number of tokens, " +
                              std::to_string(tokens) + ", and order must name each token once");
}

void check_lists(const RoutedParams& r, int64_t num_keys) {
  const auto refuse = [](const char* name, int64_t lowest, int64_t highest, int64_t got) {
    throw std::invalid_argument(std::string("plan: ") + name + " must be between " +
                                std::to_string(lowest) + " and " + std::to_string(highest) +
                                ", got " + std::to_string(got));
  };
  if (r.indptr) {
    for (int64_t l = 0; l < r.list_batch * r.list_heads; ++l) {
      const int64_t* at = r.indptr + l * (r.query_blocks + 1);
      for (int64_t i = 0; i <= r.query_blocks; ++i) {
        if (at[i] < 0 || at[i] > r.entries) refuse("indptr", 0, r.entries, at[i]);
        if (i > 0 && at[i] < at[i - 1]) refuse("indptr", at[i - 1], r.entries, at[i]);
      }
    }
  }
  for (int64_t e = 0; e < r.entries; ++e) {
    const int64_t first = r.lists[e];
    if (!r.ends) {
      if (first < -1 || first >= r.key_blocks) refuse("indices", -1, r.key_blocks - 1, first);
    } else if (first < r.ends[e]) {
      if (first < 0) refuse("starts", 0, num_keys, first);
      if (r.ends[e] > num_keys) refuse("ends", 0, num_keys, r.ends[e]);
    }
  }
}

RoutedCall make_call(const py::tuple& problem, Device device) {
  require(problem.size() == kNumArguments, "arguments");
  const auto argument = [&](Argument which) -> py::handle {
    return PyTuple_GET_ITEM(problem.ptr(), which);
  };
  RoutedCall call;
  call.device = device;
  RoutedParams& r = call.params;
  WindowParams& p = r.window;
  const Shape q = read_tensor(argument(kQuery), device);
  p.dtype = q.dtype;
  const DType acc = accumulator(p.dtype);
  const Shape k = read_tensor(argument(kKey), p.dtype, device);
  const Shape v = read_tensor(argument(kValue), p.dtype, device);
  const int rank = call.rank = q.rank - 3;
  require(rank >= 1 && rank <= 3 && k.rank == q.rank && v.rank == q.rank, "rank");
  p.batch = q.size[0];
  p.heads = q.size[rank + 1];
  p.kv_heads = k.size[rank + 1];
  p.head_dim = q.size[rank + 2];
  p.head_dim_v = v.size[rank + 2];
  require(p.heads > 0 && p.kv_heads > 0 && p.heads % p.kv_heads == 0 && p.head_dim > 0 &&
              p.head_dim_v > 0,
          "heads");
  for (int a = 0; a < 3; ++a) {
    const int given = a - (3 - rank);
    p.query_extent[a] = given < 0 ? 1 : q.size[1 + given];
    p.key_extent[a] = given < 0 ? 1 : k.size[1 + given];
  }
  const int64_t num_queries = product(p.query_extent), num_keys = product(p.key_extent);
  require(num_queries < INT32_MAX / 2 && num_keys < INT32_MAX / 2, "more than 2^30 tokens");
  p.query = call.queries(argument(kQuery), p.dtype, p.head_dim);
  p.key = call.keys(argument(kKey), p.dtype, p.head_dim);
  p.value = call.keys(argument(kValue), p.dtype, p.head_dim_v);
  p.scale = argument(kScale).cast<double>();
  p.softcap = argument(kSoftcap).cast<double>();
  if (const py::handle sink_logits = argument(kSinkLogits); !sink_logits.is_none()) {
    const Shape s = read_tensor(sink_logits, acc, device);
    require(s.rank == 1 && s.size[0] == p.heads && s.contiguous(), "sink_logits");
    p.sink_logits = s.data;
  }

  const auto query_offsets = read_integers<int32_t>(argument(kQueryOffsets), device);
  const auto query_order = read_integers<int32_t>(argument(kQueryOrder), device);
  const bool same = argument(kKeyOffsets).is_none();
  const auto key_offsets =
      same ? query_offsets : read_integers<int32_t>(argument(kKeyOffsets), device);
  const auto key_order = same ? query_order : read_integers<int32_t>(argument(kKeyOrder), device);
  require(query_offsets.count > 0 && key_offsets.count > 0 &&
              (!query_order.data || query_order.count == num_queries) &&
              (!key_order.data || key_order.count == num_keys),
          "blocks");
  r.query_blocks = query_offsets.count - 1;
  r.key_blocks = key_offsets.count - 1;
  r.query_offsets = query_offsets.data;
  r.key_offsets = key_offsets.data;
  r.query_order = query_order.data;
  r.key_order = key_order.data;

  const std::vector<int64_t> shape = integers(argument(kListShape));
  require(shape.size() == 2 && (shape[0] == 1 || shape[0] == p.batch) &&
              (shape[1] == 1 || shape[1] == p.kv_heads || shape[1] == p.heads),
          "batch and heads of the lists");
  r.list_batch = shape[0];
  r.list_heads = shape[1];
  const auto lists = read_integers<int32_t>(argument(kLists), device);
  const auto ends = read_integers<int32_t>(argument(kEnds), device);
  const auto indptr = read_integers<int64_t>(argument(kIndptr), device);
  const int64_t num_lists = r.list_batch * r.list_heads;
  r.lists = lists.data;
  r.ends = ends.data;
  r.indptr = indptr.data;
  r.entries = lists.count;
  require(!ends.data || ends.count == lists.count, "ends");
  if (argument(kIndptr).is_none()) {
    const int64_t rows = num_lists * r.query_blocks;
    require(rows == 0 ? r.entries == 0 : r.entries % rows == 0, "lists");
    r.slots = rows == 0 ? 0 : r.entries / rows;
  } else {
    require(indptr.count == num_lists * (r.query_blocks + 1), "indptr");
  }
  if (const py::handle bias = argument(kEntryBias); !bias.is_none()) {
    const Shape s = read_tensor(bias, acc, device);
    int64_t n = 1;
    for (int a = 0; a < s.rank; ++a) n *= s.size[a];
    require((s.contiguous() || n == 0) && n == r.entries, "bias");
    r.entry_bias = s.data;
  }

  const std::vector<int64_t> rules = integers(argument(kRules));
  require(rules.size() == kNumRules, "rules");
  for (const Rule side : {kLeft, kRight, kBefore, kAfter, kSinks}) {
    require(rules[side] >= 0, "a negative window");
  }
  r.causal = rules[kCausal] != 0;
  r.exclude_self = rules[kExcludeSelf] != 0;
  r.within[0] = rules[kLeft], r.within[1] = rules[kRight];
  r.has_window = rules[kHasWindow] != 0;
  r.around[0] = rules[kBefore], r.around[1] = rules[kAfter];
  r.sinks = rules[kSinks];
  const auto query_documents = read_integers<int32_t>(argument(kQueryDocuments), device);
  const auto key_documents = argument(kKeyDocuments).is_none()
                                 ? query_documents
                                 : read_integers<int32_t>(argument(kKeyDocuments), device);
  const auto key_lengths = read_integers<int32_t>(argument(kKeyLengths), device);
  const bool documents = !argument(kQueryDocuments).is_none();
  require((documents || argument(kKeyDocuments).is_none()) &&
              (!documents || (query_documents.count == p.batch * num_queries &&
                              key_documents.count == p.batch * num_keys)) &&
              (argument(kKeyLengths).is_none() || key_lengths.count == p.batch),
          "documents or lengths");
  r.query_documents = query_documents.data;
  r.key_documents = key_documents.data;
  r.key_lengths = key_lengths.data;
  if (const std::vector<int64_t> policy = integers(argument(kHeadPolicy)); !policy.empty()) {
    require(static_cast<int64_t>(policy.size()) == p.heads, "a policy per head");
    bool landmarks = false;
    for (const int64_t which : policy) {
      const HeadPolicy last = device == Device::kCpu ? HeadPolicy::kLandmark : HeadPolicy::kOff;
      require(which >= 0 && which <= static_cast<int64_t>(last), "policy");
      landmarks |= static_cast<HeadPolicy>(which) == HeadPolicy::kLandmark;
      call.policy.push_back(static_cast<int8_t>(which));
    }
    for (int64_t k = 0; landmarks && k + 2 < key_offsets.count; ++k) {
      const int64_t size = key_offsets.data[k + 1] - key_offsets.data[k];
      require(size > 0 && size <= kMostLandmarkKeys, "a block with a landmark");
    }
    require(!landmarks || (r.causal && !r.key_order && !r.has_window && r.sinks == 0 &&
                           p.softcap == 0 && !r.exclude_self && !r.entry_bias),
            "landmarks beside other rules");
    r.head_policy = call.policy.data();  // stays where it is when the call is moved
  }
  if (device == Device::kCpu) {
    check_blocks(query_offsets, r.query_order, num_queries, "query_blocks");
    check_blocks(key_offsets, r.key_order, num_keys, "key_blocks");
    check_lists(r, num_keys);
  }
  return call;
}

void set_results(RoutedCall* call, py::handle out, py::handle lse) {
  WindowParams& p = call->params.window;
  p.out = call->queries(out, p.dtype, p.head_dim_v);
  p.lse = call->queries(lse, accumulator(p.dtype), 0);
}

void routed_forward(const py::tuple& problem, py::handle out, py::handle lse) {
  RoutedCall call = make_call(problem, Device::kCpu);
  set_results(&call, out, lse);
  expect_writes(out);
  const py::gil_scoped_release release;
  cpu::routed_forward(call.params);
}

// `grads`: where the gradients of the first five arguments go; on the CPU the biases' has a copy
// for each batch item or kv head that shares a list; it and the sinks' may be None.
void set_gradients(RoutedCall* given, py::handle dout, py::handle dlse, const py::tuple& grads) {
  RoutedCall& call = *given;
  require(grads.size() == kNumGrads, "gradients");
  const auto gradient = [&](Argument of) -> py::handle {
    return PyTuple_GET_ITEM(grads.ptr(), of);
  };
  RoutedParams& r = call.params;
  WindowParams& p = r.window;
  const DType acc = accumulator(p.dtype);
  p.dout = call.queries(dout, p.dtype, p.head_dim_v);
  if (!dlse.is_none()) p.dlse = call.queries(dlse, acc, 0);
  p.dquery = call.queries(gradient(kQuery), p.dtype, p.head_dim);
  p.dkey = call.keys(gradient(kKey), p.dtype, p.head_dim);
  p.dvalue = call.keys(gradient(kValue), p.dtype, p.head_dim_v);
  if (!gradient(kEntryBias).is_none()) {
    const Shape s = read_tensor(gradient(kEntryBias), acc, call.device);
    int64_t n = 1;
    for (int a = 0; a < s.rank; ++a) n *= s.size[a];
    require((n == 0 || (r.entry_bias && s.contiguous())) &&
                n == (call.device == Device::kCuda ? 1 : r.batch_copies() * r.head_copies()) *
                         r.entries,
            "bias gradient");
    r.dentry_bias = s.data;
  }
  if (!gradient(kSinkLogits).is_none()) {
    const Shape s = read_tensor(gradient(kSinkLogits), acc, call.device);
    require(p.sink_logits && s.rank == 1 && s.size[0] == p.heads && s.contiguous(),
            "sink gradient");
    p.dsink_logits = s.data;
  }
}

void routed_backward(const py::tuple& problem, py::handle out, py::handle lse, py::handle dout,
                     py::handle dlse, const py::tuple& grads) {
  RoutedCall call = make_call(problem, Device::kCpu);
  set_results(&call, out, lse);
  set_gradients(&call, dout, dlse, grads);
  for (const py::handle t : grads) expect_writes(t);
  const py::gil_scoped_release release;
  cpu::routed_backward(call.params);
}

// ---- CUDA: what would be launched. Tables are addresses for one direction, in the order of
// cuda::ListTables.

using Addresses = std::tuple<uintptr_t, uintptr_t, int64_t, uintptr_t, uintptr_t, uintptr_t>;

struct CudaRouted {
  RoutedCall call;
  cuda::RoutedFacts facts;

  CudaRouted(const py::tuple& problem, bool mixed_documents, int64_t query_block,
             uintptr_t policies)
      : call(make_call(problem, Device::kCuda)),
        facts{mixed_documents, query_block, reinterpret_cast<const int8_t*>(policies)} {
    require(call.policy.empty() || policies || call.params.window.heads <= cuda::kMostPackedHeads,
            "policies on the device");
  }
  int64_t rows(cuda::Pass pass) const { return cuda::routed_rows(call.params, facts, pass); }
  static cuda::ListTables tables(const Addresses& at) {
    const auto& [tile_ptr, entries, num_entries, walk_places, slot_ptr, slot_entries] = at;
    return {reinterpret_cast<const int64_t*>(tile_ptr),
            reinterpret_cast<const cuda::ListEntry*>(entries),
            num_entries,
            reinterpret_cast<const int32_t*>(walk_places),
            reinterpret_cast<const int64_t*>(slot_ptr),
            reinterpret_cast<const int32_t*>(slot_entries)};
  }
};

struct CudaRoutedForward : CudaRouted {
  using CudaRouted::CudaRouted;
  int64_t workspace_bytes(int64_t longest_walk) const {
    return cuda::routed_forward_workspace(call.params, facts, longest_walk);
  }
  std::vector<cuda::Launch> prepare(py::handle out, py::handle lse, const Addresses& queries,
                                    int64_t longest_walk, uintptr_t workspace) {
    set_results(&call, out, lse);
    return cuda::routed_forward_launches(call.params, facts, tables(queries), longest_walk,
                                         reinterpret_cast<void*>(workspace));
  }
};

struct CudaRoutedBackward : CudaRouted {
  using CudaRouted::CudaRouted;
  int64_t workspace_bytes(bool of_bias, int64_t num_entries) const {
    return cuda::routed_backward_workspace(call.params, facts, of_bias, num_entries);
  }
  std::vector<cuda::Launch> prepare(const py::args& t, const Addresses& queries,
                                    const Addresses& keys, uintptr_t workspace) {
    set_results(&call, t[0], t[1]);
    set_gradients(&call, t[2], t[3], t[4]);
    return cuda::routed_backward_launches(call.params, facts, tables(queries), tables(keys),
                                          reinterpret_cast<void*>(workspace));
  }
};

}  // namespace

void bind_routed(py::module_& m) {
  py::class_<CudaRoutedForward>(m, "CudaRoutedForward")
      .def(py::init<const py::tuple&, bool, int64_t, uintptr_t>())
      .def_property_readonly(
          "query_rows", [](const CudaRoutedForward& f) { return f.rows(cuda::Pass::kForward); })
      .def("workspace_bytes", &CudaRoutedForward::workspace_bytes)
      .def("launches",
           [](CudaRoutedForward& f, py::handle out, py::handle lse, const Addresses& queries,
              int64_t longest_walk, uintptr_t workspace) {
             return describe(f.prepare(out, lse, queries, longest_walk, workspace));
           })
      .def("run", [](CudaRoutedForward& f, py::handle out, py::handle lse, const Addresses& queries,
                     int64_t longest_walk, uintptr_t workspace, int device, uintptr_t stream) {
        const auto launches = f.prepare(out, lse, queries, longest_walk, workspace);
        const py::gil_scoped_release release;
        cuda::launch(launches, device, stream, "routed_forward");
      });
  py::class_<CudaRoutedBackward>(m, "CudaRoutedBackward")
      .def(py::init<const py::tuple&, bool, int64_t, uintptr_t>())
      .def_property_readonly(
          "query_rows",
          [](const CudaRoutedBackward& b) { return b.rows(cuda::Pass::kQueryGradient); })
      .def_property_readonly(
          "key_rows", [](const CudaRoutedBackward& b) { return b.rows(cuda::Pass::kKeyGradient); })
      .def("workspace_bytes", &CudaRoutedBackward::workspace_bytes)
      .def("launches",
           [](CudaRoutedBackward& b, const Addresses& queries, const Addresses& keys,
              uintptr_t workspace, const py::args& tensors) {
             return describe(b.prepare(tensors, queries, keys, workspace));
           })
      .def("run", [](CudaRoutedBackward& b, const Addresses& queries, const Addresses& keys,
                     uintptr_t workspace, int device, uintptr_t stream, const py::args& tensors) {
        const auto launches = b.prepare(tensors, queries, keys, workspace);
        const py::gil_scoped_release release;
        cuda::launch(launches, device, stream, "routed_backward");
      });
  m.def("routed_forward", &routed_forward);
  m.def("routed_backward", &routed_backward);
}

}  // namespace attnext
