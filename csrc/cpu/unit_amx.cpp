// SPDX-License-Identifier: Apache-2.0
// The kernels for one instruction set; its compiler flags are in CMakeLists.txt.
#define ATTNEXT_ISA amx
#include "unit_amx.inl"

namespace attnext {
namespace cpu {
const IsaUnit* unit_amx() {
  static const IsaUnit table = amx::unit_with_tiles(*unit_avx512());
  return &table;
}
}  // namespace cpu
}  // namespace attnext
