// SPDX-License-Identifier: Apache-2.0
// The kernels for one instruction set; its compiler flags are in CMakeLists.txt.
#define ATTNEXT_ISA avx512bf16
#define ATTNEXT_VECTOR_BYTES 64
#define ATTNEXT_TILE_ROWS 8  // rows of 2 vectors of accumulators
#define ATTNEXT_TILE_VECTORS 2
#define ATTNEXT_BF16_DOT 1
#define ATTNEXT_MATRIX_TILES 0
#include "unit.inl"

namespace attnext {
namespace cpu {
const IsaUnit* unit_avx512bf16() { return avx512bf16::unit(); }
}  // namespace cpu
}  // namespace attnext
