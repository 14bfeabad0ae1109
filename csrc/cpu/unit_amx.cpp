// SPDX-License-Identifier: Apache-2.0
// The kernels for one instruction set; its compiler flags are in CMakeLists.txt.
#define ATTNEXT_ISA amx
#define ATTNEXT_VECTOR_BYTES 64
#define ATTNEXT_TILE_ROWS 8  // rows of 2 vectors of accumulators
#define ATTNEXT_TILE_VECTORS 4
#define ATTNEXT_BF16_DOT 1
#define ATTNEXT_MATRIX_TILES 1
#include "unit_amx.inl"

namespace attnext {
namespace cpu {
const IsaUnit* unit_amx() {
  static const IsaUnit table = amx::unit_with_tiles(*unit_avx512());
  return &table;
}
}  // namespace cpu
}  // namespace attnext
