// SPDX-License-Identifier: Apache-2.0
#include "launch.h"

#include <stdexcept>
#include <string>

#if ATTNEXT_WITH_CUDA
#include <cuda_runtime_api.h>

#include <mutex>
#include <unordered_map>

#include "kernels.h"
#include "linear_kernels.h"
#include "linear_plan.h"
#include "plan.h"

namespace attnext {
namespace cuda {

// The kernels, by the names under which plan.cpp asks for them.
#define ATTNEXT_DECLARE(name, ...) extern "C" void name(WindowLaunch);
ATTNEXT_ALL_KERNELS(ATTNEXT_DECLARE)
#define ATTNEXT_DECLARE_ROUTED(name, ...) extern "C" void name(RoutedLaunch);
ATTNEXT_ALL_ROUTED_KERNELS(ATTNEXT_DECLARE_ROUTED)
#define ATTNEXT_DECLARE_LINEAR(name, ...) extern "C" void name(LinearLaunch);
ATTNEXT_ALL_LINEAR_KERNELS(ATTNEXT_DECLARE_LINEAR)
#define ATTNEXT_DECLARE_STEP(name, ...) extern "C" void name(LinearStepLaunch);
ATTNEXT_STEP_KERNELS(ATTNEXT_DECLARE_STEP)

namespace {

const void* find(const std::string& name) {
  static const std::unordered_map<std::string, const void*> known = {
#define ATTNEXT_ENTRY(name, ...) {#name, reinterpret_cast<const void*>(&name)},
      ATTNEXT_ALL_KERNELS(ATTNEXT_ENTRY) ATTNEXT_ALL_ROUTED_KERNELS(ATTNEXT_ENTRY)
          ATTNEXT_ALL_LINEAR_KERNELS(ATTNEXT_ENTRY) ATTNEXT_STEP_KERNELS(ATTNEXT_ENTRY)};
  return known.at(name);
}

void check(cudaError_t status, const char* op, const std::string& kernel) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error that stays would meet the next caller
  throw std::runtime_error(std::string("attnext ") + op + ": " + kernel + ": " +
                           cudaGetErrorString(status));
}

// More than 48 KB of shared memory must be asked for, once for each kernel and device.
void allow_shared_memory(const void* kernel, const Launch& launch, int device, const char* op) {
  constexpr int kFree = 48 * 1024;
  if (launch.shared_bytes <= kFree) return;
  static std::mutex mutex;
  static std::unordered_map<const void*, uint64_t> allowed;  // one bit a device
  const std::lock_guard<std::mutex> lock(mutex);
  uint64_t& devices = allowed[kernel];
  const uint64_t bit = uint64_t(1) << (device & 63);
  if (devices & bit) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             launch.shared_bytes),
        op, launch.kernel);
  devices |= bit;
}

}  // namespace

const char* built_architectures() { return ATTNEXT_CUDA_ARCHITECTURES; }

void launch(const std::vector<Launch>& launches, int device, uintptr_t stream, const char* op) {
  // The caller has made the device the current one, but in its own copy of the CUDA runtime, of
  // which this one may not know. There is nothing to go back to.
  check(cudaSetDevice(device), op, "cudaSetDevice");
  for (const Launch& each : launches) {
    const void* kernel = find(each.kernel);
    allow_shared_memory(kernel, each, device, op);
    void* args[] = {const_cast<unsigned char*>(each.params.data())};
    check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(each.grid)),
                           dim3(static_cast<unsigned>(each.threads)), args,
                           static_cast<size_t>(each.shared_bytes),
                           reinterpret_cast<cudaStream_t>(stream)),
          op, each.kernel);
  }
}

}  // namespace cuda
}  // namespace attnext

#else

namespace attnext {
namespace cuda {

const char* built_architectures() { return ""; }

void launch(const std::vector<Launch>&, int, uintptr_t, const char* op) {
  throw std::runtime_error(std::string("attnext ") + op +
                           ": this build has no CUDA kernels; install it where nvcc is found, or "
                           "with ATTNEXT_CUDA=on to be told why it is not");
}

}  // namespace cuda
}  // namespace attnext

#endif
