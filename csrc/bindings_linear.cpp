// SPDX-License-Identifier: Apache-2.0
// Linear attention for Python.
#include "bindings.h"
#include "cpu/linear.h"
#include "cuda/linear_plan.h"

namespace attnext {
namespace {

// The problem of an operator, in the order of its schema in attnext/linear_ops.py; cu_seqlens as
// integers.
enum Argument {
  kQuery,
  kKey,
  kValue,
  kDecay,
  kBeta,
  kInitialState,
  kCuSeqlens,
  kFeatureMap,
  kCausal,
  kReverse,
  kNormalize,
  kOutputState,
  kScale,
  kEps,
  kWindow,
  kChunk,
  kNumArguments
};
constexpr int kNumGrads = kCuSeqlens;

struct LinearCall {
  LinearParams params{};
  std::vector<LinearSequence> sequences;
  int64_t length = 0;  // of sequences; if they are packed, of the longest
  bool packed = false;
  bool blocks = false;  // of a window: none has a state
  Device device = Device::kCpu;

  // [batch, tokens, heads(, dim)]
  TensorRef tokens(py::handle t, DType dtype, int64_t heads, int64_t dim) const {
    const Shape s = read_tensor(t, dtype, device);
    const LinearParams& p = params;
    require(s.rank == (dim > 0 ? 4 : 3), "rank");
    require(s.size[0] == p.batch && s.size[1] == p.tokens && s.size[2] == heads, "shape");
    if (dim > 0) {
      require(s.size[3] == dim, "shape");
      require(s.stride[3] == 1 || dim == 1, "head_dim must have unit stride");
    }
    return {s.data, s.stride[0], {0, 0, s.stride[1]}, s.stride[2]};
  }
  TensorRef per_head(py::handle t) const {
    return t.is_none() ? TensorRef{} : tokens(t, accumulator(params.dtype), params.heads, 0);
  }
  // [sequences, heads, features, columns]
  void* states(py::handle t) const {
    if (t.is_none()) return nullptr;
    const Shape s = read_tensor(t, accumulator(params.dtype), device);
    require(!blocks, "blocks of a window have no states");
    require(s.rank == 4 && s.contiguous() && s.size[0] == params.num_sequences &&
                s.size[1] == params.heads && s.size[2] == params.features() &&
                s.size[3] == params.state_columns(),
            "state");
    return s.data;
  }
};

void set_sizes(LinearParams* p, const Shape& q, const Shape& k, const Shape& v) {
  require(q.rank == 4 && k.rank == 4 && v.rank == 4, "rank of query, key, value");
  p->batch = q.size[0];
  p->tokens = q.size[1];
  p->query_heads = q.size[2];
  p->key_heads = k.size[2];
  p->value_heads = v.size[2];
  p->heads = std::max({p->query_heads, p->key_heads, p->value_heads});
  p->head_dim = q.size[3];
  p->head_dim_v = v.size[3];
  for (const int64_t heads : {p->query_heads, p->key_heads, p->value_heads}) {
    require(heads > 0 && p->heads % heads == 0, "heads");
  }
  require(p->head_dim > 0 && p->head_dim_v > 0, "head_dim");
}

FeatureMap feature_map(py::handle which) {
  const auto map = which.cast<int64_t>();
  require(map >= 0 && map < kNumFeatureMaps, "feature map");
  return static_cast<FeatureMap>(map);
}

LinearCall make_call(const py::tuple& problem, Device device) {
  require(problem.size() == kNumArguments, "arguments");
  const auto argument = [&](Argument which) -> py::handle {
    return PyTuple_GET_ITEM(problem.ptr(), which);
  };
  LinearCall call;
  call.device = device;
  LinearParams& p = call.params;
  const Shape q = read_tensor(argument(kQuery), device);
  p.dtype = q.dtype;
  set_sizes(&p, q, read_tensor(argument(kKey), p.dtype, device),
            read_tensor(argument(kValue), p.dtype, device));
  p.query = call.tokens(argument(kQuery), p.dtype, p.query_heads, p.head_dim);
  p.key = call.tokens(argument(kKey), p.dtype, p.key_heads, p.head_dim);
  p.value = call.tokens(argument(kValue), p.dtype, p.value_heads, p.head_dim_v);
  p.decay = call.per_head(argument(kDecay));
  p.beta = call.per_head(argument(kBeta));
  p.feature_map = feature_map(argument(kFeatureMap));
  p.causal = argument(kCausal).cast<bool>();
  p.reverse = argument(kReverse).cast<bool>();
  p.normalize = argument(kNormalize).cast<bool>();
  p.scale = argument(kScale).cast<double>();
  p.eps = argument(kEps).cast<double>();
  require(p.causal || (!p.decay.data && !p.beta.data), "decay or beta without order");
  require(!p.delta() || (!p.normalize && p.feature_map != FeatureMap::kTaylor2), "delta rule");
  p.chunk = argument(kChunk).cast<int64_t>();
  constexpr int64_t kMostChunk = 1024;  // its scores are all held
  require(p.chunk >= 0 && p.chunk <= kMostChunk, "chunk_size");

  const auto window = argument(kWindow).cast<int64_t>();
  require(window >= 0, "window_size");
  call.blocks = window > 0;
  if (const py::handle ends = argument(kCuSeqlens); !ends.is_none()) {
    const std::vector<int64_t> bounds = integers(ends);
    require(!bounds.empty() && bounds.front() == 0 && bounds.back() == p.tokens &&
                std::is_sorted(bounds.begin(), bounds.end()) && p.batch == 1 && window == 0,
            "packed sequences");
    call.packed = true;
    for (size_t n = 0; n + 1 < bounds.size(); ++n) {
      call.sequences.push_back({0, bounds[n], bounds[n + 1]});
      call.length = std::max(call.length, bounds[n + 1] - bounds[n]);
    }
  } else {
    const int64_t all = std::max<int64_t>(p.tokens, 1);
    const int64_t length = window > 0 ? std::min(window, all) : all;
    call.length = length;
    for (int64_t b = 0; b < p.batch; ++b) {
      int64_t begin = 0;
      do {  // an item without tokens is a sequence too
        call.sequences.push_back({b, begin, std::min(begin + length, p.tokens)});
        begin += length;
      } while (begin < p.tokens);
    }
  }
  p.num_sequences = static_cast<int64_t>(call.sequences.size());
  p.sequences = call.sequences.data();  // stays where it is when the call is moved
  p.initial_state = call.states(argument(kInitialState));
  return call;
}

void set_results(LinearCall* call, py::handle out, py::handle denominator,
                 py::handle remainder = py::none()) {
  LinearParams& p = call->params;
  p.out = call->tokens(out, p.dtype, p.heads, p.head_dim_v);
  require(p.normalize == !denominator.is_none(), "denominator");
  p.denominator = call->per_head(denominator);
  if (!remainder.is_none()) p.remainder = call->tokens(remainder, p.dtype, p.heads, p.head_dim_v);
}

void linear_forward(const py::tuple& problem, py::handle out, py::handle denominator,
                    py::handle remainder, py::handle final_state) {
  LinearCall call = make_call(problem, Device::kCpu);
  set_results(&call, out, denominator, remainder);
  call.params.final_state = call.states(final_state);
  expect_writes(out);
  const py::gil_scoped_release release;
  cpu::linear_forward(call.params);
}

// `grads`: where the gradients of the first six arguments go; decay's, beta's and the state's may
// be None.
void set_gradients(LinearCall* given, py::handle dout, py::handle ddenominator,
                   py::handle dfinal_state, const py::tuple& grads) {
  require(grads.size() == kNumGrads, "gradients");
  LinearCall& call = *given;
  LinearParams& p = call.params;
  const DType acc = accumulator(p.dtype);
  const auto gradient = [&](Argument of, int64_t heads, int64_t dim) {
    const DType dtype = heads == p.heads ? p.dtype : acc;
    return call.tokens(PyTuple_GET_ITEM(grads.ptr(), of), dtype, p.heads, dim);
  };
  p.dout = call.tokens(dout, p.dtype, p.heads, p.head_dim_v);
  p.ddenominator = call.per_head(ddenominator);
  p.dfinal_state = call.states(dfinal_state);
  p.dquery = gradient(kQuery, p.query_heads, p.head_dim);
  p.dkey = gradient(kKey, p.key_heads, p.head_dim);
  p.dvalue = gradient(kValue, p.value_heads, p.head_dim_v);
  p.ddecay = call.per_head(PyTuple_GET_ITEM(grads.ptr(), kDecay));
  p.dbeta = call.per_head(PyTuple_GET_ITEM(grads.ptr(), kBeta));
  require((p.decay.data || !p.ddecay.data) && (p.beta.data || !p.dbeta.data), "gradients");
  p.dinitial_state = call.states(PyTuple_GET_ITEM(grads.ptr(), kInitialState));
}

void linear_backward(const py::tuple& problem, py::handle out, py::handle denominator,
                     py::handle remainder, py::handle dout, py::handle ddenominator,
                     py::handle dfinal_state, const py::tuple& grads) {
  LinearCall call = make_call(problem, Device::kCpu);
  set_results(&call, out, denominator, remainder);
  set_gradients(&call, dout, ddenominator, dfinal_state, grads);
  for (const py::handle t : grads) expect_writes(t);
  const py::gil_scoped_release release;
  cpu::linear_backward(call.params);
}

// A step's tensors; slots, if any, are for the caller to set.
LinearStepParams make_step(Device device, py::handle query, py::handle key, py::handle value,
                           py::handle state, bool has_slots, py::handle decay, py::handle beta,
                           int64_t map, bool normalize, double scale, double eps, py::handle out) {
  LinearCall call;
  call.device = device;
  LinearParams& p = call.params;
  const Shape q = read_tensor(query, device);
  p.dtype = q.dtype;
  set_sizes(&p, q, read_tensor(key, p.dtype, device), read_tensor(value, p.dtype, device));
  p.query = call.tokens(query, p.dtype, p.query_heads, p.head_dim);
  p.key = call.tokens(key, p.dtype, p.key_heads, p.head_dim);
  p.value = call.tokens(value, p.dtype, p.value_heads, p.head_dim_v);
  p.decay = call.per_head(decay);
  p.beta = call.per_head(beta);
  p.feature_map = feature_map(py::int_(map));
  p.causal = true;
  p.normalize = normalize;
  p.scale = scale;
  p.eps = eps;
  require(!p.delta() || (!p.normalize && p.feature_map != FeatureMap::kTaylor2), "delta rule");
  p.out = call.tokens(out, p.dtype, p.heads, p.head_dim_v);

  const Shape s = read_tensor(state, accumulator(p.dtype), device);
  require(s.rank == 4 && s.size[1] == p.heads && s.size[2] == p.features() &&
              s.size[3] == p.state_columns() && (s.stride[3] == 1 || s.size[3] == 1),
          "state");
  require(has_slots || s.size[0] == p.batch, "a state per batch item");
  LinearStepParams params{};
  params.problem = p;
  params.state = s.data;
  params.num_states = s.size[0];
  params.slot_stride = s.stride[0];
  params.head_stride = s.stride[1];
  params.feature_stride = s.stride[2];
  return params;
}

void linear_step(py::handle query, py::handle key, py::handle value, py::handle state,
                 py::handle slots, py::handle decay, py::handle beta, int64_t map, bool normalize,
                 double scale, double eps, py::handle out) {
  LinearStepParams params = make_step(Device::kCpu, query, key, value, state, !slots.is_none(),
                                      decay, beta, map, normalize, scale, eps, out);
  std::vector<int64_t> slot_list;
  if (!slots.is_none()) {
    slot_list = integers(slots);
    require(static_cast<int64_t>(slot_list.size()) == params.problem.batch,
            "a slot per batch item");
    for (const int64_t slot : slot_list) require(slot >= -1 && slot < params.num_states, "slot");
    params.slots = slot_list.data();
  }
  const py::gil_scoped_release release;
  cpu::linear_step(params);
}

// ---- CUDA: what would be launched ---------------------------------------------------------------

struct CudaLinear {
  LinearCall call;

  explicit CudaLinear(const py::tuple& problem) : call(make_call(problem, Device::kCuda)) {
    call.params.sequences = nullptr;
  }
  // Of packed sequences, for the caller to upload; else empty.
  py::bytes sequences() const {
    const auto& list = call.sequences;
    return {reinterpret_cast<const char*>(list.data()),
            call.packed ? list.size() * sizeof(LinearSequence) : 0};
  }
  void set_sequences(uintptr_t address) {
    if (call.packed) call.params.sequences = reinterpret_cast<const LinearSequence*>(address);
  }
};

// `slots`: the address of an int64 for each batch item, or 0.
std::vector<cuda::Launch> prepare_step(uintptr_t slots, py::handle query, py::handle key,
                                       py::handle value, py::handle state, py::handle decay,
                                       py::handle beta, int64_t map, bool normalize, double scale,
                                       double eps, py::handle out) {
  LinearStepParams params = make_step(Device::kCuda, query, key, value, state, slots != 0, decay,
                                      beta, map, normalize, scale, eps, out);
  params.slots = reinterpret_cast<const int64_t*>(slots);
  return cuda::linear_step_launches(params);
}

struct CudaLinearForward : CudaLinear {
  using CudaLinear::CudaLinear;
  int64_t workspace_bytes() const {
    return cuda::linear_forward_workspace(call.params, call.length);
  }
  std::vector<cuda::Launch> prepare(uintptr_t sequences, uintptr_t workspace, py::handle out,
                                    py::handle denominator, py::handle final_state) {
    set_sequences(sequences);
    set_results(&call, out, denominator);
    call.params.final_state = call.states(final_state);
    return cuda::linear_forward_launches(call.params, call.length,
                                         reinterpret_cast<void*>(workspace));
  }
};

struct CudaLinearBackward : CudaLinear {
  bool of_decay;

  CudaLinearBackward(const py::tuple& problem, bool decay) : CudaLinear(problem), of_decay(decay) {}
  int64_t workspace_bytes() const {
    LinearParams p = call.params;
    static char anything;  // only whether it is there counts
    if (of_decay) p.ddecay.data = &anything;
    return cuda::linear_backward_workspace(p, call.length);
  }
  std::vector<cuda::Launch> prepare(uintptr_t sequences, uintptr_t workspace, py::handle out,
                                    py::handle denominator, py::handle dout,
                                    py::handle ddenominator, py::handle dfinal_state,
                                    const py::tuple& grads) {
    set_sequences(sequences);
    set_results(&call, out, denominator);
    set_gradients(&call, dout, ddenominator, dfinal_state, grads);
    require(of_decay == (call.params.ddecay.data != nullptr), "gradients");
    return cuda::linear_backward_launches(call.params, call.length,
                                          reinterpret_cast<void*>(workspace));
  }
};

}  // namespace

void bind_linear(py::module_& m) {
  m.def("linear_forward", &linear_forward);
  m.def("linear_backward", &linear_backward);
  m.def("linear_step", &linear_step);
  m.def("cuda_linear_step_launches",
        [](uintptr_t slots, py::handle query, py::handle key, py::handle value, py::handle state,
           py::handle decay, py::handle beta, int64_t map, bool normalize, double scale, double eps,
           py::handle out) {
          return describe(prepare_step(slots, query, key, value, state, decay, beta, map, normalize,
                                       scale, eps, out));
        });
  m.def("cuda_linear_step", [](int device, uintptr_t stream, uintptr_t slots, py::handle query,
                               py::handle key, py::handle value, py::handle state, py::handle decay,
                               py::handle beta, int64_t map, bool normalize, double scale,
                               double eps, py::handle out) {
    const auto launches =
        prepare_step(slots, query, key, value, state, decay, beta, map, normalize, scale, eps, out);
    const py::gil_scoped_release release;
    cuda::launch(launches, device, stream, "linear_step");
  });
  py::class_<CudaLinearForward>(m, "CudaLinearForward")
      .def(py::init<const py::tuple&>())
      .def_property_readonly("sequences", &CudaLinearForward::sequences)
      .def_property_readonly("workspace_bytes", &CudaLinearForward::workspace_bytes)
      .def("launches",
           [](CudaLinearForward& f, uintptr_t sequences, uintptr_t workspace, py::handle out,
              py::handle denominator, py::handle final_state) {
             return describe(f.prepare(sequences, workspace, out, denominator, final_state));
           })
      .def("run",
           [](CudaLinearForward& f, uintptr_t sequences, uintptr_t workspace, int device,
              uintptr_t stream, py::handle out, py::handle denominator, py::handle final_state) {
             const auto launches = f.prepare(sequences, workspace, out, denominator, final_state);
             const py::gil_scoped_release release;
             cuda::launch(launches, device, stream, "linear_forward");
           });
  py::class_<CudaLinearBackward>(m, "CudaLinearBackward")
      .def(py::init<const py::tuple&, bool>())
      .def_property_readonly("sequences", &CudaLinearBackward::sequences)
      .def_property_readonly("workspace_bytes", &CudaLinearBackward::workspace_bytes)
      .def("launches",
           [](CudaLinearBackward& b, uintptr_t sequences, uintptr_t workspace, py::handle out,
              py::handle denominator, py::handle dout, py::handle ddenominator,
              py::handle dfinal_state, const py::tuple& grads) {
             return describe(b.prepare(sequences, workspace, out, denominator, dout, ddenominator,
                                       dfinal_state, grads));
           })
      .def("run", [](CudaLinearBackward& b, uintptr_t sequences, uintptr_t workspace, int device,
                     uintptr_t stream, py::handle out, py::handle denominator, py::handle dout,
                     py::handle ddenominator, py::handle dfinal_state, const py::tuple& grads) {
        const auto launches = b.prepare(sequences, workspace, out, denominator, dout, ddenominator,
                                        dfinal_state, grads);
        const py::gil_scoped_release release;
        cuda::launch(launches, device, stream, "linear_backward");
      });
  m.def("cuda_linear_kernels", [] {
    py::list out;
    for (const cuda::ScanFacts& k : cuda::scan_kernels()) {
      py::dict facts;
      facts["name"] = k.name;
      facts["instance"] = k.instance;
      facts["threads"] = 32 * k.warps;
      facts["shared_bytes"] = k.shared_bytes;
      out.append(facts);
    }
    return out;
  });
}

}  // namespace attnext
