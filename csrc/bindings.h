// SPDX-License-Identifier: Apache-2.0
// From Python's objects to plain values: what the files of the bindings share. What is checked is
// that no kernel can leave its tensors; users' errors are raised in Python before.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/memory.h"
#include "cuda/launch.h"
#include "dlpack.h"
#include "params.h"

namespace py = pybind11;

namespace attnext {

constexpr int kMaxRank = 6;  // [batch, *3 tokens, heads, dim]
constexpr const char* kDTypeNames[kNumDTypes] = {"float32", "float64", "bfloat16", "float16"};
constexpr struct {
  uint8_t code, bits;
} kDLPackTypes[kNumDTypes] = {
    {dlpack::kFloat, 32}, {dlpack::kFloat, 64}, {dlpack::kBfloat, 16}, {dlpack::kFloat, 16}};

enum class Device { kCpu, kCuda };

struct Shape {
  void* data = nullptr;
  DType dtype{};
  int rank = 0;
  int64_t size[kMaxRank], stride[kMaxRank];

  int64_t last_size() const { return size[rank - 1]; }
  int64_t last_stride() const { return stride[rank - 1]; }
  bool contiguous() const {
    bool ok = true;
    int64_t step = 1;
    for (int a = rank - 1; a >= 0; step *= size[a--]) {
      ok = ok && (stride[a] == step || size[a] == 1);
    }
    return ok || step == 0;  // without entries, strides say nothing
  }
};

inline PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

inline py::object owned(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

inline std::vector<int64_t> integers(py::handle sequence) {
  const py::object list = owned(PySequence_Fast(sequence.ptr(), "expected integers"));
  std::vector<int64_t> out(PySequence_Fast_GET_SIZE(list.ptr()));
  PyObject** items = PySequence_Fast_ITEMS(list.ptr());
  for (size_t i = 0; i < out.size(); ++i) out[i] = PyLong_AsLongLong(items[i]);
  if (PyErr_Occurred()) throw py::error_already_set();
  return out;
}

inline DType dtype_of(const std::string& name) {
  for (int i = 0; i < kNumDTypes; ++i) {
    if (name == kDTypeNames[i]) return static_cast<DType>(i);
  }
  throw std::invalid_argument("dtype '" + name + "': float32, float64, bfloat16 or float16");
}

// What is known of torch: read once, at the first call.
struct Torch {
  PyTypeObject* tensor;
  PyObject* dtype[kNumDTypes];                    // torch has one object per dtype: identity tells
  const dlpack::ExchangeApi* exchange = nullptr;  // since torch 2.10

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    const py::object type = torch.attr("Tensor");
    for (int i = 0; i < kNumDTypes; ++i) {
      dtype[i] = py::object(torch.attr(kDTypeNames[i])).release().ptr();
    }
    const py::object api = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
    if (PyCapsule_IsValid(api.ptr(), dlpack::kCapsule)) {
      const auto* offered = static_cast<const dlpack::ExchangeApi*>(
          PyCapsule_GetPointer(api.ptr(), dlpack::kCapsule));
      if (offered->major == dlpack::kMajor && offered->borrow) exchange = offered;
    }
    tensor = reinterpret_cast<PyTypeObject*>(py::object(type).release().ptr());
  }
};

inline const Torch& torch() {
  static const Torch* const known = new Torch;
  return *known;
}

inline DType accumulator(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

inline void require_tensor(bool ok, py::handle t) {
  if (ok) return;
  throw py::type_error("attnext: a tensor has the wrong dtype, device or rank: " +
                       std::string(py::str(t.attr("dtype"))) + " on " +
                       std::string(py::str(t.attr("device"))) + ", " +
                       std::string(py::str(t.attr("shape"))));
}

inline Shape read_dlpack(py::handle t, Device device) {
  dlpack::Tensor given;
  if (torch().exchange->borrow(t.ptr(), &given) != 0) throw py::error_already_set();
  int dtype = 0;
  while (dtype < kNumDTypes && (given.code != kDLPackTypes[dtype].code ||
                                given.bits != kDLPackTypes[dtype].bits || given.lanes != 1)) {
    ++dtype;
  }
  const int32_t wanted = device == Device::kCpu ? dlpack::kCpu : dlpack::kCuda;
  require_tensor(dtype < kNumDTypes && given.device_type == wanted && given.rank <= kMaxRank, t);
  Shape s;
  s.data = static_cast<char*>(given.data) + given.byte_offset;
  s.dtype = static_cast<DType>(dtype);
  s.rank = given.rank;
  std::copy_n(given.shape, given.rank, s.size);
  std::copy_n(given.strides, given.rank, s.stride);
  return s;
}

// For a torch without that interface, and for whatever else has a tensor's attributes.
inline Shape read_attributes(py::handle t, Device device) {
  static PyObject* const name[] = {interned("dtype"),  interned("is_cpu"),   interned("shape"),
                                   interned("stride"), interned("data_ptr"), interned("is_cuda")};
  const py::object given = owned(PyObject_GetAttr(t.ptr(), name[0]));
  const auto* dtype = std::find(torch().dtype, torch().dtype + kNumDTypes, given.ptr());
  PyObject* const is_there = name[device == Device::kCpu ? 1 : 5];
  const bool there = owned(PyObject_GetAttr(t.ptr(), is_there)).ptr() == Py_True;
  const std::vector<int64_t> size = integers(owned(PyObject_GetAttr(t.ptr(), name[2])));
  require_tensor(dtype != torch().dtype + kNumDTypes && there && size.size() <= kMaxRank, t);
  const std::vector<int64_t> stride = integers(owned(PyObject_CallMethodNoArgs(t.ptr(), name[3])));
  require_tensor(stride.size() == size.size(), t);
  Shape s;
  s.data = PyLong_AsVoidPtr(owned(PyObject_CallMethodNoArgs(t.ptr(), name[4])).ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  s.dtype = static_cast<DType>(dtype - torch().dtype);
  s.rank = static_cast<int>(size.size());
  std::copy(size.begin(), size.end(), s.size);
  std::copy(stride.begin(), stride.end(), s.stride);
  return s;
}

inline Shape read_tensor(py::handle t, Device device) {
  const bool quick = torch().exchange && PyObject_TypeCheck(t.ptr(), torch().tensor);
  return quick ? read_dlpack(t, device) : read_attributes(t, device);
}

inline Shape read_tensor(py::handle t, DType dtype, Device device) {
  const Shape s = read_tensor(t, device);
  require_tensor(s.dtype == dtype, t);
  return s;
}

template <class T>
struct Integers {
  const T* data = nullptr;
  int64_t count = 0;
};

// A contiguous tensor of integers.
template <class T>
Integers<T> read_integers(py::handle t, Device device) {
  if (t.is_none()) return {};
  static const py::object& wanted =
      *new py::object(py::module_::import("torch").attr(sizeof(T) == 4 ? "int32" : "int64"));
  require_tensor(t.attr("dtype").ptr() == wanted.ptr() && t.attr("is_contiguous")().cast<bool>() &&
                     t.attr(device == Device::kCpu ? "is_cpu" : "is_cuda").cast<bool>(),
                 t);
  return {reinterpret_cast<const T*>(t.attr("data_ptr")().cast<uintptr_t>()),
          t.attr("numel")().cast<int64_t>()};
}

// A result that a CPU kernel is about to fill; may be None.
inline void expect_writes(py::handle t) {
  if (t.is_none()) return;
  const Shape s = read_tensor(t, Device::kCpu);
  int64_t bytes = cpu::size_of(s.dtype);
  for (int a = 0; a < s.rank; ++a) bytes *= s.size[a];
  if (s.contiguous()) cpu::expect_writes(s.data, bytes);
}

inline void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(std::string("attnext: inconsistent tensors: ") + what);
}

// What would be launched, for whoever runs the kernels elsewhere.
inline py::list describe(const std::vector<cuda::Launch>& launches) {
  py::list out;
  for (const cuda::Launch& launch : launches) {
    py::dict one;
    one["kernel"] = launch.kernel;
    one["grid"] = launch.grid;
    one["threads"] = launch.threads;
    one["shared_bytes"] = launch.shared_bytes;
    one["params"] =
        py::bytes(reinterpret_cast<const char*>(launch.params.data()), launch.params.size());
    out.append(one);
  }
  return out;
}

void bind_linear(py::module_& m);
void bind_routed(py::module_& m);
void bind_search(py::module_& m);

}  // namespace attnext
