// SPDX-License-Identifier: Apache-2.0
// The shape of an attention kernel's main loop, for the static figures: steps of keys that take one
// of two paths, full or masked, a rescale that is rarely needed, and copies one step ahead.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

constexpr int kKeys = 16, kDim = 64, kThreads = 64;

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Products and pairs, by the name that PTX has for the type.
template <typename Scalar>
struct Tensor;

#define TENSOR(Scalar, NAME)                                                              \
  template <>                                                                             \
  struct Tensor<Scalar> {                                                                 \
    static __device__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,   \
                                    uint32_t b1) {                                        \
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                 \
                   ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));       \
    }                                                                                     \
    static __device__ uint32_t pair(float low, float high) {                              \
      uint32_t packed;                                                                    \
      asm("cvt.rn." NAME "x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));      \
      return packed;                                                                      \
    }                                                                                     \
  };
TENSOR(__nv_bfloat16, "bf16")
TENSOR(__half, "f16")
#undef TENSOR

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <typename Scalar>
__global__ __launch_bounds__(kThreads) void stepped(const Scalar* queries, const Scalar* keys,
                                                    float* out, int steps, int full_begin,
                                                    int full_end, int valid) {
  extern __shared__ __align__(128) unsigned char shared[];
  Scalar* tiles = reinterpret_cast<Scalar*>(shared);  // [2][kKeys][kDim + 8]
  const int lane = threadIdx.x % 32;

  auto fetch = [&](int step) {
    Scalar* tile = tiles + step % 2 * kKeys * (kDim + 8);
#pragma unroll
    for (int n = 0; n < kKeys * kDim / 8 / kThreads; ++n) {
      const int c = threadIdx.x + n * kThreads, row = c / (kDim / 8), chunk = c % (kDim / 8);
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                       shared_address(tile + row * (kDim + 8) + chunk * 8)),
                   "l"(keys + static_cast<int64_t>(step * kKeys + row) * kDim + chunk * 8));
    }
  };

  uint32_t q[kDim / 16][4];
  for (int c = 0; c < kDim / 16; ++c)
    for (int e = 0; e < 4; ++e)
      q[c][e] = reinterpret_cast<const uint32_t*>(
          queries)[((threadIdx.x / 32 * 16 + lane / 4 + e % 2 * 8) * kDim + c * 16) / 2 + lane % 4 +
                   e / 2 * 4];
  float sum[kDim / 8][4] = {}, top = -INFINITY;

  fetch(0);
  asm volatile("cp.async.commit_group;");
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    asm volatile("cp.async.wait_group 0;");
    __syncthreads();
    if (step + 1 < steps) fetch(step + 1);
    asm volatile("cp.async.commit_group;");
    const Scalar* tile = tiles + step % 2 * kKeys * (kDim + 8);

#if defined(ATTNEXT_ONLY_FULL)
    const bool full = true;
#elif defined(ATTNEXT_ONLY_EDGE)
    const bool full = false;
#else
    const bool full = full_begin <= step && step < full_end;
#endif
    float s[2][4] = {};
    for (int c = 0; c < kDim / 16; ++c) {
      uint32_t b[4];
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                   : "r"(shared_address(tile + (lane % 8 + lane / 16 * 8) * (kDim + 8) + c * 16 +
                                        lane / 8 % 2 * 8)));
      Tensor<Scalar>::multiply(s[0], q[c], b[0], b[1]);
      Tensor<Scalar>::multiply(s[1], q[c], b[2], b[3]);
    }
    if (!full)
      for (int t = 0; t < 2; ++t)
        for (int e = 0; e < 4; ++e)
          if (step * kKeys + t * 8 + lane % 4 * 2 + e % 2 >= valid) s[t][e] = -INFINITY;

    float best = top;
    for (int t = 0; t < 2; ++t)
      for (int e = 0; e < 4; ++e) best = fmaxf(best, s[t][e]);
    if (__any_sync(0xffffffffu, best > top + 8.f)) {  // rarely needed
      const float shrink = exp2_fast(top - best);
      for (auto& d : sum)
        for (float& x : d) x *= shrink;
      top = best;
    }
    uint32_t a[4];
    for (int t = 0; t < 2; ++t)
      for (int half = 0; half < 2; ++half)
        a[t * 2 + half] = Tensor<Scalar>::pair(exp2_fast(s[t][half * 2] - top),
                                               exp2_fast(s[t][half * 2 + 1] - top));
    for (int c = 0; c < kDim / 8; c += 2) {
      uint32_t b[4];
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                   : "r"(shared_address(tile + lane % 16 * (kDim + 8) + c * 8 + lane / 16 * 8)));
      Tensor<Scalar>::multiply(sum[c], a, b[0], b[1]);
      Tensor<Scalar>::multiply(sum[c + 1], a, b[2], b[3]);
    }
  }
  for (int c = 0; c < kDim / 8; ++c)
    for (int e = 0; e < 4; ++e) out[(c * 4 + e) * kThreads + threadIdx.x] = sum[c][e];
}

template __global__ void stepped<__nv_bfloat16>(const __nv_bfloat16*, const __nv_bfloat16*, float*,
                                                int, int, int, int);
template __global__ void stepped<__half>(const __half*, const __half*, float*, int, int, int, int);
