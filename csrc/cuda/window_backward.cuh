// SPDX-License-Identifier: Apache-2.0
// Window attention backward. Weights are made again from the log-sum-exp. dQ holds queries and
// walks over keys; dK and dV hold keys and walk over the queries that attend them (the inverse
// windows), so that every sum has one owner and one order: no atomics.
//
//   P = exp(S - lse)    dS = P (dO V' - delta)    dQ = dS K    dK = dS' Q    dV = P' dO
//   delta = sum dO O - dLSE
#pragma once

#include "block.cuh"
#include "entry_bias.cuh"
#include "list_walk.cuh"
#include "window_sums.cuh"

namespace attnext {
namespace cuda {

// What both gradients do with one product of a query and a key.
template <bool kModified>
struct Chain {
  Modifiers<kModified> modifiers;

  // In: the product and dO V'. Out: the weight, the gradient of the logit, and of unit * product.
  ATTNEXT_DEVICE void operator()(float product, float unit, float slope_of_values, float lse,
                                 float rest, float delta, int64_t entry, bool has_bias,
                                 float* weight, float* of_logit, float* of_product) const {
    float slope = 1.f;
    const float x = modifiers(product * unit, entry, has_bias, &slope);
    const float relative = x - lse;
    *weight = exp2_approx(relative - rest);
    *of_logit = *weight * (slope_of_values - delta);
    *of_product = *of_logit * slope;
  }
};

enum class Wanted { kQuery, kBias };

// dQ and the gradient of the row scale; or, walking over many tiles, the gradient of the bias.
template <class Walk, class T, int kDim, int kWarps, int kFrags, int kStep, bool kModified,
          Wanted kWanted>
struct QueryGradient
    : Block<QueryGradient<Walk, T, kDim, kWarps, kFrags, kStep, kModified, kWanted>, Walk, T, kDim,
            kWarps, kFrags, kStep, 2, key_numbers(kModified)> {
  using Base =
      Block<QueryGradient, Walk, T, kDim, kWarps, kFrags, kStep, 2, key_numbers(kModified)>;
  using Base::Base;
  using Base::batch, Base::head, Base::kv_head, Base::lane, Base::p, Base::w, Base::walk,
      Base::warp;
  using Base::kColumns, Base::kMine, Base::kRows, Base::kWarpRows;
  using typename Base::Cursor, typename Base::Mask, typename Base::Row, typename Base::S;
  static constexpr bool kReadsBias = kModified, kScaled = kModified && Walk::kScalesRows;
  static constexpr bool kExact = sizeof(T) == 4;  // the rest of lse tells only in fp32
  // The gradient of biases that lists have: numbers of slots are their entries.
  static constexpr bool kByEntry = kWanted == Wanted::kBias && !Walk::kRowsBias;
  // Deltas are kept with the sign that they are added with where that takes no spill.
  static constexpr float kSign = kDim <= 64 && !kModified && Walk::kRowsBias ? 1.f : -1.f;
  using Rows = LeftRows<T, kDim, kFrags, false>;

  float dquery[kFrags][kDim / 8][4];
  float row_unit[kModified ? kFrags : 1][2], lse[kFrags][2], rest[kFrags][2], delta[kFrags][2];
  float dscale[kFrags][2];
  int32_t row_bias[kFrags][2];
  using Modifiers = cuda::Modifiers<kModified>;
  Chain<kModified> chain;

  ATTNEXT_DEVICE void note(int j, int32_t slot, Cursor cursor, int32_t, int numbers) {
    if constexpr (kByEntry) {
      this->integer(numbers, 0)[j] = Walk::entry_of(walk.slot(slot, cursor));
    } else if constexpr (kModified) {
      this->integer(numbers, 0)[j] = w.bias ? walk.bias_entry(w, walk.slot(slot, cursor)) : kNoBias;
    }
  }

  template <bool kMasked>
  ATTNEXT_DEVICE void attend(int stage, int numbers, const Rows& queries, const Rows& douts,
                             const Mask& mask) {
    const int t = lane % 4;
    float s[kFrags][kColumns][4], ds[kFrags][kColumns][4];
    product<T, kDim, kFrags, kStep, false>(s, queries, this->lanes, this->walk_tile(stage, 0));
    // dO V' - delta: the sum starts where a subtraction would end.
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        ds[f][n][0] = ds[f][n][1] = kSign * delta[f][0];
        ds[f][n][2] = ds[f][n][3] = kSign * delta[f][1];
      }
    }
    add_product<T, kDim, kFrags, kStep, false>(ds, douts, this->lanes, this->walk_tile(stage, 1));
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        int32_t key = kNoBias;
        if constexpr (kModified) key = this->integer(numbers, 0)[n * 8 + 2 * t + e];
        if constexpr (kByEntry) key = walk.bias_of_entry(key);
#pragma unroll
        for (int f = 0; f < kFrags; ++f) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float x = s[f][n][2 * half + e];
            float& g = ds[f][n][2 * half + e];
            const bool attended = !(kMasked || kModified) || mask(f, half, n, e);
            if constexpr (kModified) {
              float weight, of_logit, of_product;
              chain(x, row_unit[f][half], g, lse[f][half], rest[f][half], 0.f,
                    Walk::kRowsBias ? key - row_bias[f][half] : key, key != kNoBias && attended,
                    &weight, &of_logit, &of_product);
              g = kWanted == Wanted::kBias ? of_logit : of_product;
              if (!attended) g = 0.f;
              if (kWanted == Wanted::kQuery && kScaled && attended) dscale[f][half] += g * x;
            } else {
              float y = fmaf(x, p.unit, -lse[f][half]);
              if constexpr (kExact) y -= rest[f][half];
              float weight = exp2_approx(y);
              if constexpr (kMasked) weight = attended ? weight : 0.f;
              g *= weight;
            }
          }
        }
      }
    }
    if constexpr (kWanted == Wanted::kBias && kExact) {
      if (!is_finite(ds)) multiply_alone(ds, stage, numbers);
    }
    if constexpr (kWanted == Wanted::kQuery) {
      accumulate<T, kDim, kDim, kFrags, kStep>(dquery, ds, this->lanes, this->walk_tile(stage, 0),
                                               0);
    } else if constexpr (kByEntry) {
      add_to_entries(*this, ds, numbers);
    } else {
      add_bias(ds, numbers);
    }
  }

  // ---- the tile
  // ----------------------------------------------------------------------------------

  ATTNEXT_DEVICE bool start(int32_t index) {
    if (!walk.start(p, batch, head, index)) {
      return false;
    }
    kv_head = head / static_cast<int32_t>(w.heads / w.kv_heads);
    this->set_walk(false, kv_head);
    return true;
  }

  // Walks over one tile's keys. True if something was masked.
  ATTNEXT_DEVICE bool walk_tile_of(const Row& row) {
    const auto at = [&](const TensorRef& t) {
      return row.live ? this->row_address(t, offset_of(t, batch, row.token, head + row.head)) : 0;
    };
    this->hold(0, at(w.query), w.head_dim);
    this->hold(1, at(w.dout), w.head_dim_v);
    Statistics mine = Statistics::none();
    if (row.live) mine = Statistics::of(p)[Statistics::index(w, batch, row.token, head + row.head)];
    spread<kFrags>(mine.lse, lse);
    spread<kFrags>(mine.rest, rest);
    spread<kFrags>(-kSign * mine.delta, delta);
    if constexpr (kModified) {
      const float scale = row.live ? scale_of<kScaled>(w, batch, row.token, head + row.head) : 0.f;
      spread<kFrags>(Modifiers::unit(w, scale), row_unit);
      if constexpr (Walk::kRowsBias) spread<kFrags>(Walk::bias_origin(w, row), row_bias);
      chain.modifiers.start(w, head);
    }
    Rows queries, douts;
    return this->pass(
        row, 0, walk.total,
        [&] {
          queries.load(this->held_tile(0), warp * kWarpRows);
          douts.load(this->held_tile(1), warp * kWarpRows);
        },
        [&](auto is_masked, int stage, int numbers, const Mask& mask) {
          attend<decltype(is_masked)::value>(stage, numbers, queries, douts, mask);
        });
  }

  ATTNEXT_DEVICE void run() {
    uint32_t block = blockIdx.x;
    const int32_t index = block % p.most_tiles;
    block /= p.most_tiles;
    const uint32_t packs = static_cast<uint32_t>(w.heads) / Walk::packed(p);
    head = block % packs * Walk::packed(p);
    batch = block / packs;
    if (!start(index)) return;
    clear(dquery);
#pragma unroll
    for (int f = 0; f < kFrags; ++f) dscale[f][0] = dscale[f][1] = 0.f;
    const bool masked = walk_tile_of(walk.row(warp * kWarpRows + lane % kWarpRows));
    if ((masked || sizeof(T) == 4) && !__all_sync(~0u, is_finite(dquery))) {
      for (int r = 0; r < kWarpRows; ++r) attend_alone(warp * kWarpRows + r);
      return;
    }
    // Not kept over the walk: that would take registers.
    const Row row = walk.where(warp * kWarpRows + lane % kWarpRows);
    const bool mine = row.live && lane < kWarpRows;
    float factor[kFrags][2];
    const int32_t of_row = head + row.head;
    spread<kFrags>(row.live ? scale_of<kScaled>(w, batch, row.token, of_row) : 0.f, factor);
    const uint64_t to_row =
        mine ? this->row_address(w.dquery, offset_of(w.dquery, batch, row.token, of_row)) : 0;
    store_rows<T, kDim, kDim, kFrags>(this->held_tile(0), warp * kWarpRows, dquery, factor, to_row,
                                      static_cast<int>(w.head_dim), p.aligned_out);
    if constexpr (kScaled) {
#pragma unroll
      for (int f = 0; f < kFrags; ++f) {
        dscale[f][0] = quad_sum(dscale[f][0]);
        dscale[f][1] = quad_sum(dscale[f][1]);
      }
      const float sum = gather<kFrags>(dscale);
      if (w.drow_scale.data && mine) store_dscale(row, sum);
    }
  }
  ATTNEXT_DEVICE void store_dscale(const Row& row, float sum) const {
    const int64_t at = offset_of(w.drow_scale, batch, row.token, head + row.head);
    static_cast<float*>(w.drow_scale.data)[at] = sum * static_cast<float>(w.scale);
  }

  // One query by one warp, over the keys it attends and no other.
  ATTNEXT_DEVICE void attend_alone(int r) {
    const Row row = walk.row(r);
    if (!row.live) return;
    float query[kMine], dout[kMine], key[kMine], value[kMine], sum[kMine];
    const int32_t of_row = head + row.head;
    const auto load = [&](const TensorRef& t, int64_t dim, float (&x)[kMine]) {
      this->load_row(this->row_address(t, offset_of(t, batch, row.token, of_row)), dim, x);
    };
    load(w.query, w.head_dim, query);
    load(w.dout, w.head_dim_v, dout);
#pragma unroll
    for (int i = 0; i < kMine; ++i) sum[i] = 0.f;
    const Statistics mine = Statistics::of(p)[Statistics::index(w, batch, row.token, of_row)];
    const float scale = scale_of<kScaled>(w, batch, row.token, of_row);
    float total = 0.f;
    Chain<kModified> alone;
    alone.modifiers.start(w, head);
    for (int32_t s = 0; s < walk.total; ++s) {
      const typename Walk::Slot at = walk.slot(s);
      if (!walk.attends(row, at)) continue;
      this->load_row(this->slot_address(&w.key, &w.extra_key, at), w.head_dim, key);
      this->load_row(this->slot_address(&w.value, &w.extra_value, at), w.head_dim_v, value);
      const int32_t entry = kModified && w.bias ? walk.bias_entry(w, at) : kNoBias;
      const float x = this->dot(query, key);
      float weight, of_logit, of_product;
      alone(x, Modifiers::unit(w, scale), this->dot(dout, value), mine.lse, mine.rest, mine.delta,
            entry - Walk::bias_origin(w, row), entry != kNoBias, &weight, &of_logit, &of_product);
      total += of_product * x;
#pragma unroll
      for (int i = 0; i < kMine; ++i) sum[i] += of_product * key[i];
    }
#pragma unroll
    for (int i = 0; i < kMine; ++i) sum[i] *= scale;
    this->store_row(this->row_address(w.dquery, offset_of(w.dquery, batch, row.token, of_row)),
                    w.head_dim, sum);
    if (kScaled && w.drow_scale.data && lane == 0) store_dscale(row, total);
  }

  // ---- the bias
  // ----------------------------------------------------------------------------------

  // A warp adds one row of dS after another to a table of its own: the slots of a row have
  // different entries.
  ATTNEXT_DEVICE float* table() const {
    return p.partial + (int64_t(blockIdx.x) * kWarps + warp) * w.bias_head_stride;
  }
  static constexpr int kScratchEnd = S::kBytes + bias_scratch(kWarps, kStep);
  static_assert(kWanted == Wanted::kQuery || kScratchEnd <= kMostShared, "some GPUs have no more");
  // The lane's numbers of dS that are not finite, from the rows themselves: the halves of an
  // infinite number are not finite either, and a logit of -inf is a weight of 0.
  ATTNEXT_DEVICE void multiply_alone(float (&ds)[kFrags][kColumns][4], int stage, int numbers) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp * kWarpRows + f * 16 + half * 8 + g;
#pragma unroll 1
        for (int i = 0; i < 2 * kColumns; ++i) {
          const auto visit = [&](auto change) {
#pragma unroll
            for (int n = 0; n < kColumns; ++n) {
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                if (n * 2 + e == i) change(ds[f][n][2 * half + e]);
              }
            }
          };
          bool wanted = false;
          visit([&](float x) { wanted = !isfinite(x); });
          if (!wanted) continue;  // who does not attend has no place in the table
          const int slot = i / 2 * 8 + 2 * t + i % 2;
          const float x = dot_of_rows(0, row, stage, slot), y = dot_of_rows(1, row, stage, slot);
          int32_t key = this->integer(numbers, 0)[slot];
          if constexpr (kByEntry) key = walk.bias_of_entry(key);
          float weight, of_logit, of_product;
          chain(x, row_unit[f][half], y, lse[f][half], rest[f][half], -kSign * delta[f][half],
                Walk::kRowsBias ? key - row_bias[f][half] : key, key != kNoBias, &weight, &of_logit,
                &of_product);
          visit([&](float& mine) { mine = of_logit; });
        }
      }
    }
  }
  ATTNEXT_DEVICE float dot_of_rows(int operand, int row, int stage, int slot) const {
    using L = Layout<T, kDim>;
    float sum = 0.f;
#pragma unroll 1
    for (int chunk = 0; chunk < L::kChunks; ++chunk) {
      const uint4 a = load_shared(this->held_tile(operand) + L::at(row, chunk));
      const uint4 b = load_shared(this->walk_tile(stage, operand) + L::at(slot, chunk));
      sum = fmaf(__uint_as_float(a.x), __uint_as_float(b.x), sum);
      sum = fmaf(__uint_as_float(a.y), __uint_as_float(b.y), sum);
      sum = fmaf(__uint_as_float(a.z), __uint_as_float(b.z), sum);
      sum = fmaf(__uint_as_float(a.w), __uint_as_float(b.w), sum);
    }
    return sum;
  }
  // Eight rows of dS at a time, in chunks of eight slots that lie where stores meet no conflict.
  ATTNEXT_DEVICE uint32_t turned(uint32_t r, uint32_t n) const {
    const uint32_t row = this->shared + S::kBytes + (warp * 8 + r) * kStep * 4;
    return row + (n ^ (r / (32 / kStep) % kColumns)) * 32;
  }
  ATTNEXT_DEVICE void add_bias(const float (&ds)[kFrags][kColumns][4], int numbers) {
    static_assert(kStep <= 32, "a lane has one slot");
    const uint32_t g = lane / 4, t = lane % 4, slot = lane % kStep;
    const int32_t key = lane < kStep ? this->integer(numbers, 0)[slot] : kNoBias;
    float* const of_key = table() + key;
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          const float* const two = &ds[f][n][2 * half];
          store_shared(turned(g, n) + t * 8, __float_as_uint(two[0]), __float_as_uint(two[1]));
        }
        __syncwarp();
        float x[8];
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          x[r] = load_shared_float(turned(r, slot / 8) + slot % 8 * 4);
        }
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          const int32_t to_origin = -__shfl_sync(~0u, row_bias[f][half], r * 4);
          if (x[r] != 0.f && key != kNoBias) of_key[to_origin] += x[r];
          __syncwarp();
        }
      }
    }
  }

  // Blocks of a head share its tiles.
  ATTNEXT_DEVICE void run_bias() {
    head = blockIdx.x / p.splits;
    for (int64_t e = lane; e < w.bias_head_stride; e += 32) table()[e] = 0.f;
    __syncwarp();
    const int64_t tiles = int64_t(p.most_tiles) * w.batch;
    for (int64_t tile = blockIdx.x % p.splits; tile < tiles; tile += p.splits) {
      batch = static_cast<int32_t>(tile / p.most_tiles);
      if (!start(static_cast<int32_t>(tile % p.most_tiles))) continue;
      walk_tile_of(walk.row(warp * kWarpRows + lane % kWarpRows));
      __syncthreads();
    }
  }
};

// dK and dV of a tile of keys, of kDim / kSlices columns: those that fit in registers.
template <class Walk, class T, int kDim, int kWarps, int kFrags, int kStep, bool kModified,
          int kSlices>
struct KeyGradient : Block<KeyGradient<Walk, T, kDim, kWarps, kFrags, kStep, kModified, kSlices>,
                           Walk, T, kDim, kWarps, kFrags, kStep, 2, query_numbers(kModified)> {
  using Base =
      Block<KeyGradient, Walk, T, kDim, kWarps, kFrags, kStep, 2, query_numbers(kModified)>;
  using Base::Base;
  using Base::batch, Base::head, Base::kv_head, Base::lane, Base::p, Base::w, Base::walk,
      Base::warp;
  using Base::kColumns, Base::kMine, Base::kRows, Base::kWarpRows;
  using typename Base::Cursor, typename Base::Mask, typename Base::Row;
  static constexpr int kOut = kDim / kSlices;
  static constexpr bool kReadsBias = kModified, kScaled = kModified && Walk::kScalesRows;
  static constexpr bool kExact = sizeof(T) == 4;
  using Rows = LeftRows<T, kDim, kFrags, false>;
  // Numbers of a walked query: its statistics, and what modifiers ask for.
  enum { kStatistics = 0, kUnit = 4, kScale, kBias };

  float dkey[kFrags][kOut / 8][4], dvalue[kFrags][kOut / 8][4];
  int32_t row_bias[kFrags][2];
  int32_t slice;
  using Modifiers = cuda::Modifiers<kModified>;
  Chain<kModified> chain;

  ATTNEXT_DEVICE Statistics* statistics(int numbers) const {
    return reinterpret_cast<Statistics*>(this->number(numbers, kStatistics));
  }
  // Statistics arrive with the rows, what modifiers ask for is made.
  ATTNEXT_DEVICE void note(int j, int32_t slot, Cursor cursor, int32_t token, int numbers) {
    const bool real = token >= 0;
    copy_chunk_async(shared_address(&statistics(numbers)[j]),
                     reinterpret_cast<const Statistics*>(this->origin()) + (real ? token : 0),
                     real ? 16 : 0);
    if constexpr (kModified) {
      const typename Walk::Slot at = walk.slot(slot, cursor);
      const float scale = real ? scale_of<kScaled>(w, batch, at.token, head) : 0.f;
      this->number(numbers, kUnit)[j] = Modifiers::unit(w, scale);
      this->number(numbers, kScale)[j] = scale;
      this->integer(numbers, kBias)[j] = has_bias && real ? walk.bias_entry(w, at) : kNoBias;
    }
  }

  template <bool kMasked>
  ATTNEXT_DEVICE void attend(int stage, int numbers, const Rows& keys, const Rows& values,
                             const Mask& mask) {
    const int t = lane % 4;
    float s[kFrags][kColumns][4], ds[kFrags][kColumns][4];
    product<T, kDim, kFrags, kStep, false>(s, keys, this->lanes, this->walk_tile(stage, 0));
    product<T, kDim, kFrags, kStep, false>(ds, values, this->lanes, this->walk_tile(stage, 1));
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int slot = n * 8 + 2 * t + e;
        const Statistics& query = statistics(numbers)[slot];
        const float2 both = *reinterpret_cast<const float2*>(&query);
        const float lse = both.x, delta = both.y;
        const float rest = kExact || kModified ? query.rest : 0.f;
#pragma unroll
        for (int f = 0; f < kFrags; ++f) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& x = s[f][n][2 * half + e];
            float& g = ds[f][n][2 * half + e];
            const bool attended = !(kMasked || kModified) || mask(f, half, n, e);
            float weight;
            if constexpr (kModified) {
              const int32_t entry = this->integer(numbers, kBias)[slot];
              float of_logit, of_product;
              chain(x, this->number(numbers, kUnit)[slot], g, lse, rest, delta,
                    Walk::kRowsBias ? Walk::bias_of_key(row_bias[f][half], entry) : entry,
                    has_bias && entry != kNoBias && attended, &weight, &of_logit, &of_product);
              g = attended ? of_product * this->number(numbers, kScale)[slot] : 0.f;
              weight = attended ? weight : 0.f;
            } else {
              float y = fmaf(x, p.unit, -lse);
              if constexpr (kExact) y -= rest;
              weight = exp2_approx(y);
              if constexpr (kMasked) weight = attended ? weight : 0.f;
              g = weight * (g - delta);
            }
            x = weight;
          }
        }
      }
    }
    const int chunk = slice * (kOut / Layout<T, kDim>::kElems);
    accumulate<T, kDim, kOut, kFrags, kStep>(dvalue, s, this->lanes, this->walk_tile(stage, 1),
                                             chunk);
    accumulate<T, kDim, kOut, kFrags, kStep>(dkey, ds, this->lanes, this->walk_tile(stage, 0),
                                             chunk);
  }

  // ---- the tile
  // ----------------------------------------------------------------------------------

  bool is_extra, has_bias;
  int32_t index;

  ATTNEXT_DEVICE bool start_head(int32_t query_head) {
    head = query_head;
    this->set_walk(true, head);
    if (threadIdx.x == 0) {
      const Statistics* first = Statistics::of(p) + Statistics::index(w, batch, {0, 0, 0}, head);
      this->origin() = reinterpret_cast<uint64_t>(first);
    }
    return walk.start_keys(p, batch, head, index, is_extra);
  }
  ATTNEXT_DEVICE uint64_t row_of(const TensorRef& t, const TensorRef& extra, const Row& row) const {
    if (!row.live) return 0;
    if (!Walk::kHasExtra || !is_extra) {
      return this->row_address(t, offset_of(t, batch, row.token, kv_head));
    }
    return this->row_address(
        extra, batch * extra.batch + row.token[2] * extra.token[2] + kv_head * extra.head);
  }

  ATTNEXT_DEVICE void run() {
    uint32_t block = blockIdx.x;
    slice = block % kSlices;
    block /= kSlices;
    index = block % (p.most_tiles + p.extra_tiles);
    block /= p.most_tiles + p.extra_tiles;
    kv_head = block % static_cast<uint32_t>(w.kv_heads);
    batch = block / static_cast<uint32_t>(w.kv_heads);
    is_extra = Walk::kHasExtra && index >= p.most_tiles;
    has_bias = kModified && w.bias && !is_extra;
    if (is_extra) index -= p.most_tiles;
    const int32_t group = static_cast<int32_t>(w.heads / w.kv_heads);
    if (!start_head(kv_head * group)) return;

    Row row = walk.row(warp * kWarpRows + lane % kWarpRows);
    this->hold(0, row_of(w.key, w.extra_key, row), w.head_dim);
    this->hold(1, row_of(w.value, w.extra_value, row), w.head_dim_v);
    clear(dkey);
    clear(dvalue);
    Rows keys, values;
    bool masked = sizeof(T) == 4;
    for (int32_t g = 0; g < group; ++g) {
      if (g > 0) {
        start_head(kv_head * group + g);
        row = walk.row(warp * kWarpRows + lane % kWarpRows);
      }
      if constexpr (kModified) {
        if constexpr (Walk::kRowsBias) spread<kFrags>(Walk::bias_key(w, row), row_bias);
        chain.modifiers.start(w, head);
      }
      masked |= this->pass(
          row, 0, walk.total,
          [&] {
            keys.load(this->held_tile(0), warp * kWarpRows);
            values.load(this->held_tile(1), warp * kWarpRows);
          },
          [&](auto is_masked, int stage, int numbers, const Mask& mask) {
            attend<decltype(is_masked)::value>(stage, numbers, keys, values, mask);
          });
    }
    if (masked && !__all_sync(~0u, is_finite(dkey) && is_finite(dvalue))) {
      for (int r = 0; r < kWarpRows; ++r) attend_alone(warp * kWarpRows + r, group);
      return;
    }
    row = walk.where(warp * kWarpRows + lane % kWarpRows);  // not kept: that would take registers
    float factor_key[kFrags][2], factor_value[kFrags][2];
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
      factor_key[f][0] = factor_key[f][1] = kModified ? 1.f : static_cast<float>(w.scale);
      factor_value[f][0] = factor_value[f][1] = 1.f;
    }
    const int column = slice * kOut;
    const auto store = [&](const TensorRef& t, const TensorRef& extra, int64_t dim, const auto& x,
                           const float (&factor)[kFrags][2], int tile) {
      uint64_t to_row = lane < kWarpRows ? row_of(t, extra, row) : 0;
      if (to_row) to_row += column * sizeof(T);
      store_rows<T, kDim, kOut, kFrags>(this->held_tile(tile), warp * kWarpRows, x, factor, to_row,
                                        static_cast<int>(dim) - column, p.aligned_out);
    };
    store(w.dkey, w.dextra_key, w.head_dim, dkey, factor_key, 0);
    store(w.dvalue, w.dextra_value, w.head_dim_v, dvalue, factor_value, 1);
  }

  // One key by one warp, over the queries that attend it and no other.
  ATTNEXT_DEVICE void attend_alone(int r, int32_t group) {
    start_head(kv_head * group);
    Row row = walk.row(r);
    if (!row.live) return;
    float key[kMine], value[kMine], query[kMine], dout[kMine], dk[kMine], dv[kMine];
    this->load_row(row_of(w.key, w.extra_key, row), w.head_dim, key);
    this->load_row(row_of(w.value, w.extra_value, row), w.head_dim_v, value);
#pragma unroll
    for (int i = 0; i < kMine; ++i) dk[i] = dv[i] = 0.f;
    for (int32_t g = 0; g < group; ++g) {
      start_head(kv_head * group + g);
      row = walk.row(r);
      Chain<kModified> alone;
      alone.modifiers.start(w, head);
      for (int32_t s = 0; s < walk.total; ++s) {
        const typename Walk::Slot at = walk.slot(s);
        if (!walk.attends(row, at)) continue;
        this->load_row(this->slot_address(&w.query, nullptr, at), w.head_dim, query);
        this->load_row(this->slot_address(&w.dout, nullptr, at), w.head_dim_v, dout);
        const Statistics of = Statistics::of(p)[Statistics::index(w, batch, at.token, head)];
        const float scale = scale_of<kScaled>(w, batch, at.token, head);
        const int32_t place = has_bias ? walk.bias_entry(w, at) : 0;
        const bool biased = has_bias && (Walk::kRowsBias || place != kNoBias);
        const int32_t entry = has_bias ? Walk::bias_of_key(Walk::bias_key(w, row), place) : 0;
        float weight, of_logit, of_product;
        alone(this->dot(query, key), Modifiers::unit(w, scale), this->dot(dout, value), of.lse,
              of.rest, of.delta, entry, biased, &weight, &of_logit, &of_product);
#pragma unroll
        for (int i = 0; i < kMine; ++i) {
          dk[i] += of_product * scale * query[i];
          dv[i] += weight * dout[i];
        }
      }
    }
    const int begin = slice * kOut, end = begin + kOut;
    this->store_row(row_of(w.dkey, w.dextra_key, row), min(w.head_dim, int64_t(end)), dk, begin);
    this->store_row(row_of(w.dvalue, w.dextra_value, row), min(w.head_dim_v, int64_t(end)), dv,
                    begin);
  }
};

extern __shared__ __align__(1024) uint8_t shared_memory[];

// `blocks`: of an SM, 0 for what the compiler thinks best. It spills to make room for three where
// shared memory has room for two.
#define ATTNEXT_GRADIENT(name, threads, blocks, Launch)         \
  extern "C" __global__ void __launch_bounds__(threads, blocks) \
      name(const __grid_constant__ Launch p)
#define ATTNEXT_QUERY_GRADIENT(name, T, dim, warps, frags, step, modified, slices)      \
  ATTNEXT_GRADIENT(name, (warps) * 32, (frags) == 1 ? 2 : 0, WindowLaunch) {            \
    QueryGradient<WalkOf<(warps) * (frags) * 16>, T, dim, warps, frags, step, modified, \
                  Wanted::kQuery>(p, shared_memory)                                     \
        .run();                                                                         \
  }
#define ATTNEXT_BIAS_GRADIENT(name, T, dim, warps, frags, step, modified, slices)                 \
  ATTNEXT_GRADIENT(name, (warps) * 32, 0, WindowLaunch) {                                         \
    QueryGradient<BoxWalk, T, dim, warps, frags, step, modified, Wanted::kBias>(p, shared_memory) \
        .run_bias();                                                                              \
  }
#define ATTNEXT_KEY_GRADIENT(name, T, dim, warps, frags, step, modified, slices)                \
  ATTNEXT_GRADIENT(name, (warps) * 32, 0, WindowLaunch) {                                       \
    KeyGradient<BoxWalk, T, dim, warps, frags, step, modified, slices>(p, shared_memory).run(); \
  }
#define ATTNEXT_ROUTED_QUERY_GRADIENT(name, T, dim, warps, frags, step, modified, slices) \
  ATTNEXT_GRADIENT(name, (warps) * 32, (frags) == 1 ? 2 : 0, RoutedLaunch) {              \
    QueryGradient<ListWalk<false, modified>, T, dim, warps, frags, step, modified,        \
                  Wanted::kQuery>(p, shared_memory)                                       \
        .run();                                                                           \
  }
#define ATTNEXT_ROUTED_BIAS_GRADIENT(name, T, dim, warps, frags, step, modified, slices) \
  ATTNEXT_GRADIENT(name, (warps) * 32, 0, RoutedLaunch) {                                \
    QueryGradient<ListWalk<false, modified, true>, T, dim, warps, frags, step, modified, \
                  Wanted::kBias>                                                         \
        kernel(p, shared_memory);                                                        \
    entry_bias_gradient(kernel);                                                         \
  }
#define ATTNEXT_ROUTED_KEY_GRADIENT(name, T, dim, warps, frags, step, modified, slices)  \
  ATTNEXT_GRADIENT(name, (warps) * 32, 0, RoutedLaunch) {                                \
    KeyGradient<ListWalk<true, modified>, T, dim, warps, frags, step, modified, slices>( \
        p, shared_memory)                                                                \
        .run();                                                                          \
  }

}  // namespace cuda
}  // namespace attnext
