// SPDX-License-Identifier: Apache-2.0
// Window attention forward: a block holds a tile of queries and walks over its keys with an online
// softmax (FlashAttention-2, arXiv 2307.08691). Copies run one step ahead of the products; a step
// has one barrier.
#pragma once

#include "kernels.h"
#include "walk.cuh"

namespace attnext {
namespace cuda {

// Bits per key of what a thread's accumulators hold: columns 8 n + 2 t and 8 n + 2 t + 1.
template <int kStep, int kFrags>
struct LaneMask {
  uint32_t bits[kFrags][2][(kStep + 31) / 32];

  // `mine`: the mask of the row that lies in this lane.
  ATTNEXT_DEVICE void spread(const uint32_t (&mine)[(kStep + 31) / 32]) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int w = 0; w < (kStep + 31) / 32; ++w) {
          bits[f][half][w] = __shfl_sync(~0u, mine[w], f * 16 + half * 8 + g) >> (2 * t);
        }
      }
    }
  }
  ATTNEXT_DEVICE bool operator()(int f, int half, int n, int e) const {
    return bits[f][half][n / 4] & (1u << (n % 4 * 8 + e));
  }
};

// What the score modifiers need of rows and columns.
struct Modifiers {
  const float* bias;   // of the head
  float bias_unit;     // log2(e)
  float cap;           // softcap in base 2, 0 = none
};

template <class T, int kDim, int kWarps, int kFrags, int kStep, bool kModified>
struct Forward {
  static constexpr int kRows = kWarps * kFrags * 16, kThreads = kWarps * 32;
  static constexpr int kTiles = kStep / 8;
  static constexpr bool kKept = sizeof(T) == 2 && kDim <= 64;
  using S = SharedPlan<sizeof(T), kDim, kRows, kStep, 1, kModified ? 1 : 0>;

  const WindowLaunch& p;
  Walk walk;
  int32_t batch, head, kv_head;
  uint64_t* address;    // [buffer][operand][kAddresses]
  int32_t* key_bias;    // [step % 3][kStep]: read a step later than addresses are
  uint32_t shared;

  float out[kFrags][kDim / 8][4];
  float top[kFrags][2], sum[kFrags][2];  // maximum in base 2 that weights are relative to
  float unit[kFrags][2];                 // makes scores logits in base 2
  int32_t row_bias[kFrags][2];
  Modifiers modifiers;

  // ---- the walk's rows ---------------------------------------------------------------------------

  ATTNEXT_DEVICE static uint64_t address_of(const TensorRef& t, const TensorRef& extra,
                                            const Walk::Slot& at, int64_t batch, int64_t head) {
    if (at.kind == Walk::Slot::kExtra) {
      const int64_t o = batch * extra.batch + at.token[2] * extra.token[2] + head * extra.head;
      return reinterpret_cast<uint64_t>(static_cast<const T*>(extra.data) + o);
    }
    if (at.kind != Walk::Slot::kToken) return 0;
    return reinterpret_cast<uint64_t>(static_cast<const T*>(t.data) +
                                      offset_of(t, batch, at.token, head));
  }

  ATTNEXT_DEVICE void find_step(int32_t slot, int buffer, int numbers) {
    const WindowParams& w = p.window;
#pragma unroll
    for (int i0 = 0; i0 < 2 * kStep; i0 += kThreads) {
      const int i = i0 + threadIdx.x, operand = i / kStep, j = i % kStep;
      if (2 * kStep % kThreads != 0 && i >= 2 * kStep) break;
      const Walk::Slot at = walk.slot(slot + j);
      address[(buffer * 2 + operand) * S::kAddresses + j] =
          operand == 0 ? address_of(w.key, w.extra_key, at, batch, kv_head)
                       : address_of(w.value, w.extra_value, at, batch, kv_head);
      if (kModified && operand == 0) {
        int32_t b = kNoBias;
        if (w.bias && at.kind != Walk::Slot::kExtra) {
          b = 0;
#pragma unroll
          for (int a = 0; a < 3; ++a) {
            b += walk.position(at, a) * static_cast<int32_t>(w.bias_stride[a]);
          }
        }
        key_bias[numbers * kStep + j] = b;
      }
    }
  }

  ATTNEXT_DEVICE uint32_t walk_tile(int stage, int operand) const {
    return shared + S::kWalkAt + (stage * 2 + operand) * S::kWalkTile;
  }

  ATTNEXT_DEVICE void copy_step(int stage) {
    const uint64_t* from = address + stage * 2 * S::kAddresses;
    const bool aligned = p.aligned;
    copy_rows<T, kDim, kStep, kThreads>(walk_tile(stage, 0), from,
                                        static_cast<int>(p.window.head_dim * sizeof(T)), aligned);
    copy_rows<T, kDim, kStep, kThreads>(walk_tile(stage, 1), from + S::kAddresses,
                                        static_cast<int>(p.window.head_dim_v * sizeof(T)), aligned);
    commit_copies();
  }

  // ---- a step ------------------------------------------------------------------------------------

  ATTNEXT_DEVICE void modify(float (&s)[kFrags][kTiles][4], const LaneMask<kStep, kFrags>& mask,
                             int numbers) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int32_t key = key_bias[numbers * kStep + n * 8 + 2 * t + e];
#pragma unroll
        for (int f = 0; f < kFrags; ++f) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& x = s[f][n][2 * half + e];
            x *= unit[f][half];
            if (modifiers.cap > 0.f) x = tanhf(x) * modifiers.cap;
            if (modifiers.bias && key != kNoBias && mask(f, half, n, e)) {
              x += modifiers.bias[key - row_bias[f][half]] * modifiers.bias_unit;
            }
          }
        }
      }
    }
  }

  template <bool kMasked>
  ATTNEXT_DEVICE void attend(int stage, int numbers, const LeftRows<T, kDim, kFrags, kKept>& rows,
                             const LaneMask<kStep, kFrags>& mask) {
    float s[kFrags][kTiles][4];
    product<T, kDim, kFrags, kStep, kKept>(s, rows, walk_tile(stage, 0));
    if constexpr (kModified) modify(s, mask, numbers);
    float most[kFrags][2];
    bool grows = false;
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& m = most[f][half];
        m = -INFINITY;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = s[f][n][2 * half + e];
            if constexpr (kMasked) x = mask(f, half, n, e) ? x : -INFINITY;
            m = fmaxf(m, x);
          }
        }
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
        if constexpr (!kModified) m *= unit[f][half];
        grows |= m > top[f][half] + kSlack;
      }
    }
    if (__any_sync(~0u, grows)) rescale(most);
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float base = top[f][half] == -INFINITY ? 0.f : top[f][half];
        float part[2] = {0.f, 0.f};
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = s[f][n][2 * half + e];
            x = exp2_approx(kModified ? x - base : fmaf(x, unit[f][half], -base));
            part[e] += x;
          }
        }
        sum[f][half] += part[0] + part[1];
      }
    }
    accumulate<T, kDim, kFrags, kStep>(out, s, walk_tile(stage, 1));
  }

  // Weights may grow to 2^8 before everything is brought down: most steps never do it.
  static constexpr float kSlack = 8.f;
  ATTNEXT_DEVICE void rescale(const float (&most)[kFrags][2]) {
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float now = fmaxf(top[f][half], most[f][half]);
        const float factor = now == -INFINITY ? 1.f : exp2_approx(top[f][half] - now);
        top[f][half] = now;
        sum[f][half] *= factor;
#pragma unroll
        for (int d = 0; d < kDim / 8; ++d) {
          out[f][d][2 * half] *= factor;
          out[f][d][2 * half + 1] *= factor;
        }
      }
    }
  }

  // ---- the tile ----------------------------------------------------------------------------------

  ATTNEXT_DEVICE void run(uint8_t* memory) {
    const WindowParams& w = p.window;
    shared = shared_address(memory);
    address = reinterpret_cast<uint64_t*>(memory + S::kAddressAt);
    key_bias = reinterpret_cast<int32_t*>(memory + S::kNumbersAt);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;

    uint32_t block = blockIdx.x;
    const int32_t index = block % p.most_tiles;
    block /= p.most_tiles;
    const int32_t part = block % p.splits;
    block /= p.splits;
    head = block % static_cast<uint32_t>(w.heads);
    batch = block / static_cast<uint32_t>(w.heads);
    kv_head = head / static_cast<int32_t>(w.heads / w.kv_heads);
    if (!walk.start(p, head, index, static_cast<int32_t>(w.extra_keys))) return;

    const int32_t from = part * p.split_step;
    if (part > 0 && from >= walk.total) return;
    const int32_t to = min(walk.total, from + p.split_step);

    // The rows: lane r of a warp has row r of the warp's.
    constexpr int kWarpRows = kFrags * 16;
    const Row row = walk.row(warp * kWarpRows + lane % kWarpRows);
    const int64_t query_at = offset_of(w.query, batch, row.token, head);
    if (lane < kWarpRows) {
      address[warp * kWarpRows + lane] =
          row.live ? reinterpret_cast<uint64_t>(static_cast<const T*>(w.query.data) + query_at) : 0;
    }
    Steps<kStep> steps;
    steps.start(walk, row, lane < kWarpRows, from);
    __syncthreads();
    copy_rows<T, kDim, kRows, kThreads>(shared, address,
                                        static_cast<int>(w.head_dim * sizeof(T)), p.aligned);
    __syncthreads();
    find_step(from, 0, 0);
    __syncthreads();
    copy_step(0);
    if (from + kStep < to) find_step(from + kStep, 1, 1);

    start_rows(row, part == 0);
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
        out[f][d][0] = out[f][d][1] = out[f][d][2] = out[f][d][3] = 0.f;
      }
    }
    wait_copies<0>();
    __syncthreads();
    LeftRows<T, kDim, kFrags, kKept> rows;
    rows.load(shared, warp * kWarpRows);

    bool masked = sizeof(T) == 4;  // halves of an infinite number are not finite either
    int stage = 0, numbers = 0;
    for (int32_t slot = from; slot < to; slot += kStep) {
      if (slot != from) {
        wait_copies<0>();
        __syncthreads();
      }
      if (slot + kStep < to) copy_step(stage ^ 1);
      if (slot + 2 * kStep < to) find_step(slot + 2 * kStep, stage, numbers == 0 ? 2 : numbers - 1);
#ifdef ATTNEXT_ONLY_FULL
      const Step kind = Step::kFull;
#elif defined(ATTNEXT_ONLY_EDGE)
      const Step kind = Step::kEdge;
#else
      const Step kind = steps.kind(walk, slot);
#endif
      LaneMask<kStep, kFrags> mask;
      if (kind == Step::kFull && !kModified) {
        attend<false>(stage, numbers, rows, mask);
      } else if (kind != Step::kSkip) {
        uint32_t mine[Steps<kStep>::kWords];
        steps.mask(walk, row, slot, mine);
        mask.spread(mine);
        masked = true;
        attend<true>(stage, numbers, rows, mask);
      }
      steps.advance(walk);
      stage ^= 1;
      numbers = numbers == 2 ? 0 : numbers + 1;
    }
    finish(row, from, to, part, masked);
  }

  ATTNEXT_DEVICE void start_rows(const Row& row, bool with_sink) {
    const WindowParams& w = p.window;
    const int lane = threadIdx.x % 32, g = lane / 4;
    float mine = static_cast<float>(w.scale);
    if (w.row_scale.data && row.live) {
      mine *= static_cast<const float*>(w.row_scale.data)[offset_of(w.row_scale, batch, row.token, head)];
    }
    const bool capped = w.softcap > 0;
    mine *= capped ? static_cast<float>(1 / w.softcap) : static_cast<float>(kLog2E);
    int32_t bias_row = 0;
    if constexpr (kModified) {
#pragma unroll
      for (int a = 0; a < 3; ++a) {
        bias_row += static_cast<int32_t>((row.position[a] - w.bias_reach[a]) * w.bias_stride[a]);
      }
      modifiers.bias = w.bias ? static_cast<const float*>(w.bias) + head * w.bias_head_stride : nullptr;
      modifiers.bias_unit = static_cast<float>(kLog2E);
      modifiers.cap = static_cast<float>(w.softcap * kLog2E);
    }
    const bool sink = w.sink_logits && with_sink;
    const float level =
        sink ? static_cast<const float*>(w.sink_logits)[head] * static_cast<float>(kLog2E) : -INFINITY;
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        unit[f][half] = __shfl_sync(~0u, mine, f * 16 + half * 8 + g);
        if constexpr (kModified) row_bias[f][half] = __shfl_sync(~0u, bias_row, f * 16 + half * 8 + g);
        top[f][half] = level;
        sum[f][half] = sink && lane % 4 == 0 ? 1.f : 0.f;  // lanes of a quad are added up at the end
      }
    }
  }

  // ---- results -----------------------------------------------------------------------------------

  ATTNEXT_DEVICE static float lse_of(float top, float sum) {
    constexpr float kLn2 = 0.693147182464599609375f, kRest = -1.904654323148236e-9f;
    return sum == 0.f ? -INFINITY : fmaf(top, kLn2, fmaf(top, kRest, logf(sum)));
  }

  // This block's share of a row's result: the row itself, or what `merge` adds up.
  ATTNEXT_DEVICE float* partial_row(int row) const {
    const int64_t block = blockIdx.x;  // tile, then part: see run()
    return p.partial + (block * kRows + row) * (p.window.head_dim_v + 2);
  }

  ATTNEXT_DEVICE void finish(const Row& row, int32_t from, int32_t to, int32_t part, bool masked) {
    constexpr int kWarpRows = kFrags * 16;
    const WindowParams& w = p.window;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    float factor[kFrags][2], lse[kFrags][2];
    float bad = 0.f;
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& total = sum[f][half];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        factor[f][half] = total == 0.f ? 0.f : 1.f / total;
        lse[f][half] = lse_of(top[f][half], total);
#pragma unroll
        for (int d = 0; d < kDim / 8; ++d) {
          bad += out[f][d][2 * half] * 0.f + out[f][d][2 * half + 1] * 0.f;
        }
      }
    }
    if (masked && __any_sync(~0u, bad != 0.f)) {
      for (int r = 0; r < kWarpRows; ++r) attend_alone(warp * kWarpRows + r, from, to, part);
      return;
    }

    if (p.splits > 1) {
#pragma unroll
      for (int f = 0; f < kFrags; ++f) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* to_row = partial_row(warp * kWarpRows + f * 16 + half * 8 + g);
#pragma unroll
          for (int d = 0; d < kDim / 8; ++d) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int column = d * 8 + 2 * t + e;
              if (column < w.head_dim_v) to_row[column] = out[f][d][2 * half + e];
            }
          }
          if (t == 0) to_row[w.head_dim_v] = top[f][half], to_row[w.head_dim_v + 1] = sum[f][half];
        }
      }
      return;
    }
    uint64_t address_out = 0;
    if (row.live && lane < kWarpRows) {
      address_out = reinterpret_cast<uint64_t>(static_cast<T*>(w.out.data) +
                                               offset_of(w.out, batch, row.token, head));
    }
    store_rows<T, kDim, kFrags>(shared, warp * kWarpRows, out, factor, address_out,
                                static_cast<int>(w.head_dim_v), p.aligned_out);
    float mine = 0.f;
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float x = __shfl_sync(~0u, lse[f][half], lane % 8 * 4);
        if (lane / 8 == f * 2 + half) mine = x;
      }
    }
    if (w.lse.data && row.live && lane < kWarpRows) {
      static_cast<float*>(w.lse.data)[offset_of(w.lse, batch, row.token, head)] = mine;
    }
  }

  // One row by one warp, over what the row attends and nothing else: where something is not finite,
  // a weight of 0 in a product of tiles would carry it to rows that do not attend it.
  ATTNEXT_DEVICE void attend_alone(int r, int32_t from, int32_t to, int32_t part) {
    const WindowParams& w = p.window;
    const int lane = threadIdx.x % 32;
    const Row row = walk.row(r);
    if (!row.live) return;
    constexpr int kMine = (kDim + 31) / 32;
    float query[kMine], o[kMine];
    const T* q = static_cast<const T*>(w.query.data) + offset_of(w.query, batch, row.token, head);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int d = lane + 32 * i;
      query[i] = d < w.head_dim ? Number<T>::widen(q[d]) : 0.f;
      o[i] = 0.f;
    }
    float factor = static_cast<float>(w.scale);
    if (w.row_scale.data) {
      factor *= static_cast<const float*>(
          w.row_scale.data)[offset_of(w.row_scale, batch, row.token, head)];
    }
    factor *= w.softcap > 0 ? static_cast<float>(1 / w.softcap) : static_cast<float>(kLog2E);
    const bool sink = w.sink_logits && part == 0;
    float high = sink ? static_cast<const float*>(w.sink_logits)[head] * static_cast<float>(kLog2E)
                      : -INFINITY;
    float total = sink ? 1.f : 0.f;
    for (int32_t s = from; s < to; ++s) {
      const Walk::Slot at = walk.slot(s);
      if (!Walk::attends(row, at)) continue;
      const T* k = reinterpret_cast<const T*>(address_of(w.key, w.extra_key, at, batch, kv_head));
      const T* v =
          reinterpret_cast<const T*>(address_of(w.value, w.extra_value, at, batch, kv_head));
      float x = 0.f;
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        const int d = lane + 32 * i;
        if (k && d < w.head_dim) x += query[i] * Number<T>::widen(k[d]);
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
      x *= factor;
      if constexpr (kModified) {
        if (modifiers.cap > 0.f) x = tanhf(x) * modifiers.cap;
        if (modifiers.bias && at.kind != Walk::Slot::kExtra) {
          int64_t b = 0;
#pragma unroll
          for (int a = 0; a < 3; ++a) {
            b += (walk.position(at, a) - row.position[a] + w.bias_reach[a]) * w.bias_stride[a];
          }
          x += modifiers.bias[b] * modifiers.bias_unit;
        }
      }
      const float now = fmaxf(high, x);
      const float base = now == -INFINITY ? 0.f : now;
      const float shrink = exp2_approx(high - base), weight = exp2_approx(x - base);
      high = now;
      total = total * shrink + weight;
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        const int d = lane + 32 * i;
        const float value = v && d < w.head_dim_v ? Number<T>::widen(v[d]) : 0.f;
        o[i] = o[i] * shrink + weight * value;
      }
    }
    if (p.splits > 1) {
      float* to_row = partial_row(r);
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        if (lane + 32 * i < w.head_dim_v) to_row[lane + 32 * i] = o[i];
      }
      if (lane == 0) to_row[w.head_dim_v] = high, to_row[w.head_dim_v + 1] = total;
      return;
    }
    T* out_row = static_cast<T*>(w.out.data) + offset_of(w.out, batch, row.token, head);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int d = lane + 32 * i;
      if (d < w.head_dim_v) out_row[d] = Number<T>::narrow(total == 0.f ? 0.f : o[i] / total);
    }
    if (w.lse.data && lane == 0) {
      static_cast<float*>(w.lse.data)[offset_of(w.lse, batch, row.token, head)] =
          lse_of(high, total);
    }
  }
};

// Adds up what the parts of a walk gave for a tile's rows: one warp a row.
template <class T>
ATTNEXT_DEVICE void merge_parts(const WindowLaunch& p, int rows) {
  const WindowParams& w = p.window;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  uint32_t block = blockIdx.x;
  const int32_t index = block % p.most_tiles;
  block /= p.most_tiles;
  const int32_t head = block % static_cast<uint32_t>(w.heads);
  const int32_t batch = block / static_cast<uint32_t>(w.heads);
  Walk walk;
  if (!walk.start(p, head, index, static_cast<int32_t>(w.extra_keys))) return;
  const int64_t size = w.head_dim_v + 2;
  const int32_t parts = max(1, (walk.total + p.split_step - 1) / p.split_step);
  for (int r = warp; r < rows; r += warps) {
    const Row row = walk.row(r);
    if (!row.live) continue;
    const auto part = [&](int i) {
      const int64_t at = (int64_t(block) * p.splits + i) * p.most_tiles + index;
      return p.partial + (at * rows + r) * size;
    };
    float top = -INFINITY, sum = 0.f;
    for (int i = 0; i < parts; ++i) top = fmaxf(top, part(i)[w.head_dim_v]);
    const float base = top == -INFINITY ? 0.f : top;
    for (int i = 0; i < parts; ++i) {
      sum += exp2_approx(part(i)[w.head_dim_v] - base) * part(i)[w.head_dim_v + 1];
    }
    T* out = static_cast<T*>(w.out.data) + offset_of(w.out, batch, row.token, head);
    for (int d = lane; d < w.head_dim_v; d += 32) {
      float x = 0.f;
      for (int i = 0; i < parts; ++i) x += exp2_approx(part(i)[w.head_dim_v] - base) * part(i)[d];
      out[d] = Number<T>::narrow(sum == 0.f ? 0.f : x / sum);
    }
    if (w.lse.data && lane == 0) {
      static_cast<float*>(w.lse.data)[offset_of(w.lse, batch, row.token, head)] =
          Forward<T, 64, 1, 1, 16, false>::lse_of(top, sum);
    }
  }
}

extern __shared__ __align__(1024) uint8_t shared_memory[];

#define ATTNEXT_FORWARD(name, T, dim, warps, frags, step, modified)                              \
  extern "C" __global__ void __launch_bounds__((warps) * 32)                                     \
      name(const __grid_constant__ WindowLaunch p) {                                             \
    Forward<T, dim, warps, frags, step, modified> body{p};                                       \
    body.run(shared_memory);                                                                     \
  }
#define ATTNEXT_MERGE(name, T)                                                                   \
  extern "C" __global__ void __launch_bounds__(128) name(const __grid_constant__ WindowLaunch p) { \
    merge_parts<T>(p, p.rows);                                                                   \
  }

}  // namespace cuda
}  // namespace attnext
