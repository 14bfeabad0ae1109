// SPDX-License-Identifier: Apache-2.0
// The kernels for one instruction set; its compiler flags are in CMakeLists.txt.
#if defined(__aarch64__)
#define ATTNEXT_BASELINE_ROWS 8  // 32 registers
#else
#define ATTNEXT_BASELINE_ROWS 4  // 16 registers, and products need one each
#endif
#define ATTNEXT_ISA baseline
#define ATTNEXT_VECTOR_BYTES 16
#define ATTNEXT_TILE_ROWS ATTNEXT_BASELINE_ROWS  // rows of 2 vectors of accumulators
#define ATTNEXT_TILE_VECTORS 2
#define ATTNEXT_BF16_DOT 0
#define ATTNEXT_MATRIX_TILES 0
#include "unit.inl"

namespace attnext {
namespace cpu {
const IsaUnit* unit_baseline() { return baseline::unit(); }
}  // namespace cpu
}  // namespace attnext
