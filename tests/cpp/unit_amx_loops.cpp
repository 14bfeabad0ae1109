// SPDX-License-Identifier: Apache-2.0
// The unit for AMX with loops for its instructions, so that tests and sanitizers see it on any
// machine.
#define ATTNEXT_ISA amx_loops
#include "cpu/unit_amx.inl"

namespace attnext {
namespace cpu {
const IsaUnit* unit_amx_loops() {
  static const IsaUnit table = amx_loops::unit_with_tiles(*unit_baseline());
  return &table;
}
}  // namespace cpu
}  // namespace attnext
