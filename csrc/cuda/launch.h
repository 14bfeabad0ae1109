// SPDX-License-Identifier: Apache-2.0
// A kernel's launch as data, and who carries it out. Errors of the CUDA runtime become
// std::runtime_error.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace attnext {
namespace cuda {

struct Launch {
  std::string kernel;
  int64_t grid;
  int32_t threads;
  int32_t shared_bytes;
  std::vector<unsigned char> params;  // the kernel's only argument, byte for byte

  template <class Params>
  Launch(std::string name, int64_t blocks, int32_t block_threads, int32_t shared, const Params& p)
      : kernel(std::move(name)),
        grid(blocks),
        threads(block_threads),
        shared_bytes(shared),
        params(sizeof p) {
    static_assert(std::is_trivially_copyable<Params>::value, "crosses to kernels by memcpy");
    std::memcpy(params.data(), &p, sizeof p);
  }
};

// Whether this build has kernels, and for which architectures: "80 90 100 120", empty without.
const char* built_architectures();

// Launches on a stream of a device, which must be the caller's current one; returns at once. `op`
// names the caller in errors.
void launch(const std::vector<Launch>& launches, int device, uintptr_t stream, const char* op);

}  // namespace cuda
}  // namespace attnext
