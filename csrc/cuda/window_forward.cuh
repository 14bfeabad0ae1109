// SPDX-License-Identifier: Apache-2.0
// Window attention forward: a block holds a tile of queries and walks over its keys with an online
// softmax (FlashAttention-2, arXiv 2307.08691).
#pragma once

#include "block.cuh"
#include "list_walk.cuh"

namespace attnext {
namespace cuda {

// Natural logarithm of sum * 2^top; -inf for no keys. ln 2 in two parts keeps the last bit.
ATTNEXT_DEVICE float natural_lse(float top, float sum) {
  constexpr float kLn2 = 0.693147182464599609375f, kRest = -1.904654323148236e-9f;
  return sum == 0.f ? -INFINITY : fmaf(top, kLn2, fmaf(top, kRest, logf(sum)));
}

template <class Walk, class T, int kDim, int kWarps, int kFrags, int kStep, bool kModified>
struct Forward : Block<Forward<Walk, T, kDim, kWarps, kFrags, kStep, kModified>, Walk, T, kDim,
                       kWarps, kFrags, kStep, 1, key_numbers(kModified)> {
  using Base = Block<Forward, Walk, T, kDim, kWarps, kFrags, kStep, 1, key_numbers(kModified)>;
  using Base::Base;
  using Base::batch, Base::head, Base::kv_head, Base::lane, Base::p, Base::w, Base::walk,
      Base::warp;
  using Base::kColumns, Base::kMine, Base::kRows, Base::kWarpRows;
  using typename Base::Cursor, typename Base::Mask, typename Base::Row;
  static constexpr bool kReadsBias = kModified, kScaled = kModified && Walk::kScalesRows;
  static constexpr bool kKept = sizeof(T) == 2 && kDim <= 32;
  using Rows = LeftRows<T, kDim, kFrags, kKept>;

  float out[kFrags][kDim / 8][4];
  // Weights are relative to 2^base; they are brought down once a logit (in a plain kernel, a
  // product) exceeds the limit. -inf: no key seen yet.
  float base[kFrags][2], limit[kFrags][2], sum[kFrags][2];
  float row_unit[kModified ? kFrags : 1][2];
  int32_t row_bias[kFrags][2];
  using Modifiers = cuda::Modifiers<kModified>;
  Modifiers modifiers;

  // Where in the bias table a key would be for a query at the origin.
  ATTNEXT_DEVICE void note(int j, int32_t slot, Cursor cursor, int32_t, int numbers) {
    if constexpr (kModified) {
      this->integer(numbers, 0)[j] = w.bias ? walk.bias_entry(w, walk.slot(slot, cursor)) : kNoBias;
    }
  }

  // ---- a step
  // ------------------------------------------------------------------------------------

  ATTNEXT_DEVICE void modify(float (&s)[kFrags][kColumns][4], const Mask& mask, int numbers) {
    const int t = lane % 4;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int32_t key = this->integer(numbers, 0)[n * 8 + 2 * t + e];
#pragma unroll
        for (int f = 0; f < kFrags; ++f) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& x = s[f][n][2 * half + e];
            x = modifiers(x * unit(f, half), Walk::kRowsBias ? key - row_bias[f][half] : key,
                          key != kNoBias && mask(f, half, n, e), nullptr);
          }
        }
      }
    }
  }

  template <bool kMasked>
  ATTNEXT_DEVICE void attend(int stage, int numbers, const Rows& rows, const Mask& mask) {
    float s[kFrags][kColumns][4];
    product<T, kDim, kFrags, kStep, kKept>(s, rows, this->lanes, this->walk_tile(stage, 0));
    if constexpr (kModified) modify(s, mask, numbers);
    // Each lane looks at its own columns: what a row's maximum is matters only once it grows.
    float most[kFrags][2];
    bool grows = false;
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& m = most[f][half];
        m = -INFINITY;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = s[f][n][2 * half + e];
            if constexpr (kMasked) x = mask(f, half, n, e) ? x : -INFINITY;
            m = fmaxf(m, x);
          }
        }
        grows |= m > limit[f][half];
      }
    }
    if (__any_sync(~0u, grows)) rescale(most);
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float shift = -base[f][half];
        float part = 0.f;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = s[f][n][2 * half + e];
            x = exp2_approx(kModified ? x + shift : fmaf(x, unit(f, half), shift));
            part = n + e == 0 ? x : part + x;
          }
        }
        sum[f][half] += part;
      }
    }
    accumulate<T, kDim, kDim, kFrags, kStep>(out, s, this->lanes, this->walk_tile(stage, 1), 0);
  }

  // Weights may grow to 2^8 before everything is brought down: most steps never do it.
  static constexpr float kSlack = 8.f;
  ATTNEXT_DEVICE void rescale(const float (&most)[kFrags][2]) {
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float now = most[f][half];
        now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
        now = fmaxf(now, __shfl_xor_sync(~0u, now, 2));
        if constexpr (!kModified) now *= unit(f, half);
        const float before = top_of(f, half);
        now = fmaxf(now, before);
        const float factor = now == -INFINITY ? 1.f : exp2_approx(before - now);
        set_top(f, half, now);
        sum[f][half] *= factor;
#pragma unroll
        for (int d = 0; d < kDim / 8; ++d) {
          out[f][d][2 * half] *= factor;
          out[f][d][2 * half + 1] *= factor;
        }
      }
    }
  }
  ATTNEXT_DEVICE float unit(int f, int half) const {
    if constexpr (kModified) return row_unit[f][half];
    return p.unit;
  }
  ATTNEXT_DEVICE float top_of(int f, int half) const {
    return limit[f][half] == -INFINITY ? -INFINITY : base[f][half];
  }
  ATTNEXT_DEVICE void set_top(int f, int half, float top) {
    base[f][half] = top == -INFINITY ? 0.f : top;
    limit[f][half] = top + kSlack;
    if constexpr (!kModified) limit[f][half] /= unit(f, half);
  }

  // ---- the tile
  // ----------------------------------------------------------------------------------

  ATTNEXT_DEVICE void run() {
    uint32_t block = blockIdx.x;
    const int32_t index = block % p.most_tiles;
    block /= p.most_tiles;
    const int32_t part = block % p.splits;
    block /= p.splits;
    const uint32_t packs = static_cast<uint32_t>(w.heads) / Walk::packed(p);
    head = block % packs * Walk::packed(p);
    batch = block / packs;
    kv_head = head / static_cast<int32_t>(w.heads / w.kv_heads);
    if (!walk.start(p, batch, head, index)) return;
    const int32_t from = part * p.split_step;
    if (part > 0 && from >= walk.total) return;
    const int32_t to = min(walk.total, from + p.split_step);
    this->set_walk(false, kv_head);

    const Row row = walk.row(warp * kWarpRows + lane % kWarpRows);
    this->hold(
        0,
        row.live ? this->row_address(w.query, offset_of(w.query, batch, row.token, head + row.head))
                 : 0,
        w.head_dim);
    start_rows(row, part == 0);
    clear(out);
    Rows rows;
    const bool masked = this->pass(
        row, from, to, [&] { rows.load(this->held_tile(0), warp * kWarpRows); },
        [&](auto is_masked, int stage, int numbers, const Mask& mask) {
          attend<decltype(is_masked)::value>(stage, numbers, rows, mask);
        });
    // Not kept over the walk: that would take registers.
    finish(walk.where(warp * kWarpRows + lane % kWarpRows), from, to, part, masked);
  }

  ATTNEXT_DEVICE void start_rows(const Row& row, bool with_sink) {
    if constexpr (kModified) {
      const float scale = row.live ? scale_of<kScaled>(w, batch, row.token, head + row.head) : 1.f;
      spread<kFrags>(Modifiers::unit(w, scale), row_unit);
      if constexpr (Walk::kRowsBias) spread<kFrags>(Walk::bias_origin(w, row), row_bias);
      modifiers.start(w, head);
    }
    const bool sink = w.sink_logits && with_sink;
    const float level = sink_level(sink, row);
    float levels[kFrags][2];
    if constexpr (Walk::kPacks) spread<kFrags>(level, levels);
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        set_top(f, half, Walk::kPacks ? levels[f][half] : level);
        sum[f][half] = sink && lane % 4 == 0 ? 1.f : 0.f;  // lanes of a quad are added at the end
      }
    }
  }
  ATTNEXT_DEVICE float sink_level(bool sink, const Row& row) const {
    if (!sink) return -INFINITY;
    return static_cast<const float*>(w.sink_logits)[head + row.head] * static_cast<float>(kLog2E);
  }

  // ---- results
  // -----------------------------------------------------------------------------------

  // A row of this block's share, for `merge_parts` to add up.
  ATTNEXT_DEVICE float* partial_row(int row) const {
    return p.partial + (int64_t(blockIdx.x) * kRows + row) * (w.head_dim_v + 2);
  }

  // A sink counts 1 beside its own level: nothing if that, and all logits, are -inf, and NaN at
  // inf, as a logit does. A maximum passes over NaN, which is in the sum then.
  ATTNEXT_DEVICE static float total_of(float top, float sum) {
    return top == -INFINITY ? sum - sum : sum + (top - top);
  }

  ATTNEXT_DEVICE void finish(const Row& row, int32_t from, int32_t to, int32_t part, bool masked) {
    const int g = lane / 4, t = lane % 4;
    float factor[kFrags][2], lse[kFrags][2];
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& total = sum[f][half];
        total = total_of(top_of(f, half), quad_sum(total));
        factor[f][half] = total == 0.f ? 0.f : 1.f / total;
        lse[f][half] = natural_lse(top_of(f, half), total);
      }
    }
    // In fp32 the halves of an infinite number are not finite either.
    if ((masked || sizeof(T) == 4) && !__all_sync(~0u, is_finite(out))) {
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
          if (t == 0)
            to_row[w.head_dim_v] = top_of(f, half), to_row[w.head_dim_v + 1] = sum[f][half];
        }
      }
      return;
    }
    const bool mine = row.live && lane < kWarpRows;
    const uint64_t to_row =
        mine ? this->row_address(w.out, offset_of(w.out, batch, row.token, head + row.head)) : 0;
    store_rows<T, kDim, kDim, kFrags>(this->held_tile(0), warp * kWarpRows, out, factor, to_row,
                                      static_cast<int>(w.head_dim_v), p.aligned_out);
    const float lse_row = gather<kFrags>(lse);
    if (w.lse.data && mine) store_lse(row, lse_row);
  }
  ATTNEXT_DEVICE void store_lse(const Row& row, float lse) const {
    static_cast<float*>(w.lse.data)[offset_of(w.lse, batch, row.token, head + row.head)] = lse;
  }

  // One row by one warp, over what the row attends and nothing else: where something is not finite,
  // a weight of 0 in a product of tiles would carry it to rows that do not attend it.
  ATTNEXT_DEVICE void attend_alone(int r, int32_t from, int32_t to, int32_t part) {
    const Row row = walk.row(r);
    if (!row.live) return;
    float query[kMine], key[kMine], value[kMine], o[kMine];
    const int32_t mine = head + row.head;
    this->load_row(this->row_address(w.query, offset_of(w.query, batch, row.token, mine)),
                   w.head_dim, query);
#pragma unroll
    for (int i = 0; i < kMine; ++i) o[i] = 0.f;
    const float factor = Modifiers::unit(w, scale_of<kScaled>(w, batch, row.token, mine));
    const bool sink = w.sink_logits && part == 0;
    float high = sink_level(sink, row), total = sink ? 1.f : 0.f;
    for (int32_t s = from; s < to; ++s) {
      const typename Walk::Slot at = walk.slot(s);
      if (!walk.attends(row, at)) continue;
      this->load_row(this->slot_address(&w.key, &w.extra_key, at), w.head_dim, key);
      this->load_row(this->slot_address(&w.value, &w.extra_value, at), w.head_dim_v, value);
      float x = this->dot(query, key) * factor;
      if constexpr (kModified) {
        const int32_t entry = w.bias ? walk.bias_entry(w, at) : kNoBias;
        x = modifiers(x, entry - Walk::bias_origin(w, row), entry != kNoBias, nullptr);
      }
      const float now = fmaxf(high, x);
      const float base = now == -INFINITY ? 0.f : now;
      const float shrink = exp2_approx(high - base), weight = exp2_approx(x - base);
      high = now;
      total = total * shrink + weight;
#pragma unroll
      for (int i = 0; i < kMine; ++i) o[i] = o[i] * shrink + weight * value[i];
    }
    total = total_of(high, total);
    if (p.splits > 1) {
      float* to_row = partial_row(r);
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        if (lane + 32 * i < w.head_dim_v) to_row[lane + 32 * i] = o[i];
      }
      if (lane == 0) to_row[w.head_dim_v] = high, to_row[w.head_dim_v + 1] = total;
      return;
    }
#pragma unroll
    for (int i = 0; i < kMine; ++i) o[i] = total == 0.f ? 0.f : o[i] / total;
    this->store_row(this->row_address(w.out, offset_of(w.out, batch, row.token, mine)),
                    w.head_dim_v, o);
    if (w.lse.data && lane == 0) store_lse(row, natural_lse(high, total));
  }
};

// Adds up what the parts of a walk gave for a tile's rows: one warp a row.
template <class T, class Walk>
ATTNEXT_DEVICE void merge_parts(const typename Walk::Launch& p, int rows) {
  const WindowParams& w = p.window;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  uint32_t block = blockIdx.x;
  const int32_t index = block % p.most_tiles;
  block /= p.most_tiles;
  const uint32_t packs = static_cast<uint32_t>(w.heads) / Walk::packed(p);
  const int32_t first_head = block % packs * Walk::packed(p);
  const int32_t batch = block / packs;
  Walk walk;
  if (!walk.start(p, batch, first_head, index)) return;
  const int64_t size = w.head_dim_v + 2;
  const int32_t parts = max(1, (walk.total + p.split_step - 1) / p.split_step);
  for (int r = warp; r < rows; r += warps) {
    const typename Walk::Row row = walk.where(r);
    if (!row.live) continue;
    const int32_t head = first_head + row.head;
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
          natural_lse(top, sum);
    }
  }
}

extern __shared__ __align__(1024) uint8_t shared_memory[];

#define ATTNEXT_FORWARD(name, T, dim, warps, frags, step, modified, slices)                      \
  extern "C" __global__ void __launch_bounds__(                                                  \
      (warps) * 32, least_blocks(dim, warps, frags, (modified) || sizeof(T) == 4))               \
      name(const __grid_constant__ WindowLaunch p) {                                             \
    Forward<WalkOf<(warps) * (frags) * 16>, T, dim, warps, frags, step, modified>(p,             \
                                                                                  shared_memory) \
        .run();                                                                                  \
  }
#define ATTNEXT_ROUTED_FORWARD(name, T, dim, warps, frags, step, modified, slices)             \
  extern "C" __global__ void __launch_bounds__(                                                \
      (warps) * 32, least_blocks(dim, warps, frags, (modified) || sizeof(T) == 4))             \
      name(const __grid_constant__ RoutedLaunch p) {                                           \
    Forward<ListWalk<false, modified>, T, dim, warps, frags, step, modified>(p, shared_memory) \
        .run();                                                                                \
  }
#define ATTNEXT_MERGE(name, T)                                                                     \
  extern "C" __global__ void __launch_bounds__(128) name(const __grid_constant__ WindowLaunch p) { \
    merge_parts<T, BoxWalk>(p, p.rows);                                                            \
  }
#define ATTNEXT_ROUTED_MERGE(name, T)                                                              \
  extern "C" __global__ void __launch_bounds__(128) name(const __grid_constant__ RoutedLaunch p) { \
    merge_parts<T, ListWalk<false, false>>(p, p.rows);                                             \
  }

}  // namespace cuda
}  // namespace attnext
