// SPDX-License-Identifier: Apache-2.0
// The kernels for one instruction set; its compiler flags are in CMakeLists.txt.
#define ATTNEXT_ISA avx2
#define ATTNEXT_VECTOR_BYTES 32
#define ATTNEXT_TILE_ROWS 6  // rows of 2 vectors of accumulators
#define ATTNEXT_TILE_VECTORS 4
#define ATTNEXT_BF16_DOT 0
#define ATTNEXT_MATRIX_TILES 0
#include "unit.inl"

namespace attnext {
namespace cpu {
const IsaUnit* unit_avx2() { return avx2::unit(); }
}  // namespace cpu
}  // namespace attnext
