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

// ---- attention of one head: q [n, 32], k and v [m, 32] in bf16, out [n, 32] in f32
// --------------- A warp owns 16 queries and walks the keys in steps of 16 with an online softmax
// in base 2. The probabilities never leave registers: an accumulator of the first product is,
// rounded to bf16, the left operand of the second. Keys past m are masked with -inf and read as
// zeros.

constexpr int kDim = 32;

struct AttentionParams {
  const __nv_bfloat16 *q, *k, *v;
  float* out;
  int n, m;
  float scale_log2;
};

__device__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ uint32_t pair(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

extern "C" __global__ __launch_bounds__(32) void attention(
    const __grid_constant__ AttentionParams p) {
  __shared__ __align__(16) __nv_bfloat16 keys[16][kDim + 8], values[16][kDim + 8];
  const int lane = threadIdx.x, row0 = blockIdx.x * 16;
  uint32_t q[kDim / 16][4];
  for (int c = 0; c < kDim / 16; ++c)
    for (int e = 0; e < 4; ++e) {
      const int row = row0 + lane / 4 + e % 2 * 8, column = c * 16 + lane % 4 * 2 + e / 2 * 8;
      q[c][e] = row < p.n ? *reinterpret_cast<const uint32_t*>(p.q + row * kDim + column) : 0;
    }
  float out[kDim / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  for (int j0 = 0; j0 < p.m; j0 += 16) {
    __syncwarp();
    for (int c = lane; c < 16 * kDim / 8; c += 32) {
      const int row = c / (kDim / 8), column = c % (kDim / 8) * 8;
      const bool inside = j0 + row < p.m;
      const int64_t at = static_cast<int64_t>(inside ? j0 + row : 0) * kDim + column;
      copy16(&keys[row][column], p.k + at, inside);
      copy16(&values[row][column], p.v + at, inside);
    }
    asm volatile("cp.async.wait_all;");
    __syncwarp();
    float s[2][4] = {};
    for (int c = 0; c < kDim / 16; ++c) {
      uint32_t b[4];
      asm volatile(
          "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
          : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
          : "r"(shared_address(&keys[lane % 8 + lane / 16 * 8][c * 16 + lane / 8 % 2 * 8])));
      multiply(s[0], q[c], b[0], b[1]);
      multiply(s[1], q[c], b[2], b[3]);
    }
    for (int half = 0; half < 2; ++half) {
      float best = top[half];
      for (int t = 0; t < 2; ++t)
        for (int e = 0; e < 2; ++e) {
          float& x = s[t][half * 2 + e];
          x = j0 + t * 8 + lane % 4 * 2 + e < p.m ? x * p.scale_log2 : -INFINITY;
          best = fmaxf(best, x);
        }
      best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 1));
      best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 2));
      const float shrink = exp2f(top[half] - best);
      top[half] = best;
      sum[half] *= shrink;
      for (auto& d : out) d[half * 2] *= shrink, d[half * 2 + 1] *= shrink;
      for (int t = 0; t < 2; ++t)
        for (int e = 0; e < 2; ++e)
          sum[half] += s[t][half * 2 + e] = exp2f(s[t][half * 2 + e] - best);
    }
    const uint32_t a[4] = {pair(s[0][0], s[0][1]), pair(s[0][2], s[0][3]), pair(s[1][0], s[1][1]),
                           pair(s[1][2], s[1][3])};
    for (int c = 0; c < kDim / 8; c += 2) {
      uint32_t b[4];
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                   : "r"(shared_address(&values[lane % 16][c * 8 + lane / 16 * 8])));
      multiply(out[c], a, b[0], b[1]);
      multiply(out[c + 1], a, b[2], b[3]);
    }
  }
  for (int half = 0; half < 2; ++half) {
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
    const int row = row0 + lane / 4 + half * 8;
    if (row < p.n)
      for (int c = 0; c < kDim / 8; ++c)
        *reinterpret_cast<float2*>(p.out + row * kDim + c * 8 + lane % 4 * 2) =
            make_float2(out[c][half * 2] / sum[half], out[c][half * 2 + 1] / sum[half]);
  }
}
