// SPDX-License-Identifier: Apache-2.0
// Small kernels on which the executor itself is tested: one for each idea the real kernels use.
#include <cuda_bf16.h>
#include <stdint.h>

// ---- vector add with a tail: grid = ceil(n / block) --------------------------------------------

extern "C" __global__ void vector_add(const float* x, const float* y, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = x[i] + y[i];
}

// ---- block sum: one partial sum a block, shuffles inside a warp, shared memory between warps ----

extern "C" __global__ void block_sum(const float* x, float* partial, int n) {
  __shared__ float of_warp[32];
  float sum = 0.f;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    sum += x[i];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? of_warp[threadIdx.x] : 0.f;
    for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
  }
}

// ---- softmax of rows, online: one warp a row ---------------------------------------------------

extern "C" __global__ void softmax_rows(const float* x, float* out, int rows, int columns) {
  const int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  const float* from = x + static_cast<int64_t>(row) * columns;
  float top = -INFINITY, sum = 0.f;
  for (int j = lane; j < columns; j += 32) {
    const float before = top;
    top = fmaxf(top, from[j]);
    sum = sum * __expf(before - top) + __expf(from[j] - top);
  }
  for (int step = 16; step > 0; step /= 2) {
    const float other_top = __shfl_xor_sync(0xffffffffu, top, step);
    const float other_sum = __shfl_xor_sync(0xffffffffu, sum, step);
    const float best = fmaxf(top, other_top);
    const float mine = top == -INFINITY ? 0.f : sum * __expf(top - best);
    const float theirs = other_top == -INFINITY ? 0.f : other_sum * __expf(other_top - best);
    top = best;
    sum = mine + theirs;
  }
  for (int j = lane; j < columns; j += 32)
    out[static_cast<int64_t>(row) * columns + j] = __expf(from[j] - top) / sum;
}

// ---- tiled GEMM: out[m, n] = a[m, k] b[k, n], bf16 in, f32 out
// ----------------------------------- A block owns 64 x 64 of out and walks k in steps of 32, two
// stages of cp.async ahead of the products. Four warps, each 16 rows by 64 columns. Shared rows are
// swizzled in chunks of 16 bytes.

constexpr int kTile = 64, kStep = 32, kStages = 2;

__device__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The planted bugs: each drops or shifts one thing that the kernel cannot do without.
#ifdef BUG_NO_SWIZZLE
__device__ int a_at(int row, int chunk) { return row * kStep + chunk * 8; }
__device__ int b_at(int row, int chunk) { return row * kTile + chunk * 8; }
#else
__device__ int a_at(int row, int chunk) { return row * kStep + (chunk ^ (row / 2 % 4)) * 8; }
__device__ int b_at(int row, int chunk) { return row * kTile + (chunk ^ (row % 8)) * 8; }
#endif

__device__ void copy16(void* to, const void* from, bool inside) {
#ifdef BUG_LOST_PREDICATE
  inside = true;
#endif
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(inside ? 16 : 0));
}

extern "C" __global__ __launch_bounds__(128) void gemm(const __nv_bfloat16* a,
                                                       const __nv_bfloat16* b, float* out, int m,
                                                       int n, int k) {
  extern __shared__ __align__(128) __nv_bfloat16 tiles[];
  __nv_bfloat16* a_tiles = tiles;                            // [stage][64][32]
  __nv_bfloat16* b_tiles = tiles + kStages * kTile * kStep;  // [stage][32][64]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row0 = blockIdx.y * kTile, column0 = blockIdx.x * kTile;
  float sum[8][4] = {};

  auto fetch = [&](int step) {
    __nv_bfloat16* at = a_tiles + step % kStages * kTile * kStep;
    __nv_bfloat16* bt = b_tiles + step % kStages * kTile * kStep;
    for (int c = threadIdx.x; c < kTile * kStep / 8; c += 128) {
      const int row = c / 4, chunk = c % 4;
      copy16(at + a_at(row, chunk),
             a + static_cast<int64_t>(row0 + row) * k + step * kStep + chunk * 8, row0 + row < m);
    }
    for (int c = threadIdx.x; c < kTile * kStep / 8; c += 128) {
      const int row = c / 8, chunk = c % 8;
      copy16(bt + b_at(row, chunk),
             b + static_cast<int64_t>(step * kStep + row) * n + column0 + chunk * 8,
             column0 + chunk * 8 < n);
    }
  };

  const int steps = k / kStep;
  fetch(0);
  asm volatile("cp.async.commit_group;");
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) fetch(step + 1);
    asm volatile("cp.async.commit_group;");
#if defined(BUG_WAIT_TOO_FEW)
    asm volatile("cp.async.wait_group 2;");
#elif !defined(BUG_NO_WAIT)
    asm volatile("cp.async.wait_group 1;");
#endif
#ifndef BUG_NO_BARRIER_AFTER_WAIT
    __syncthreads();
#endif
#ifdef BUG_WRONG_STAGE
    const int stage = (step + 1) % kStages;
#else
    const int stage = step % kStages;
#endif
    const __nv_bfloat16* at = a_tiles + stage * kTile * kStep;
    const __nv_bfloat16* bt = b_tiles + stage * kTile * kStep;
    for (int kk = 0; kk < kStep; kk += 16) {
      uint32_t x[4];
      const int row = warp * 16 + lane % 16, chunk = kk / 8 + lane / 16;
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                   : "r"(shared_address(at + a_at(row, chunk))));
      for (int j = 0; j < 8; j += 2) {
        uint32_t y[4];
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3])
                     : "r"(shared_address(bt + b_at(kk + lane % 16, j + lane / 16))));
        for (int half = 0; half < 2; ++half) {
          float* d = sum[j + half];
#ifdef BUG_FRAGMENT_ORDER
          const uint32_t x1 = x[2], x2 = x[1];
#else
          const uint32_t x1 = x[1], x2 = x[2];
#endif
          asm volatile(
              "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
              "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
              : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
              : "r"(x[0]), "r"(x1), "r"(x2), "r"(x[3]), "r"(y[2 * half]), "r"(y[2 * half + 1]));
        }
      }
    }
#ifndef BUG_NO_BARRIER_BEFORE_COPY
    __syncthreads();
#endif
  }

  for (int j = 0; j < 8; ++j)
    for (int e = 0; e < 4; ++e) {
      const int row = row0 + warp * 16 + lane / 4 + e / 2 * 8;
      const int column = column0 + j * 8 + lane % 4 * 2 + e % 2;
#ifdef BUG_TAIL
      if (row <= m && column < n) out[static_cast<int64_t>(row) * n + column] = sum[j][e];
#else
      if (row < m && column < n) out[static_cast<int64_t>(row) * n + column] = sum[j][e];
#endif
    }
}
