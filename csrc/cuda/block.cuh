// SPDX-License-Identifier: Apache-2.0
// What the kernels of windows and lists share: a block's rows, and the walk's two operands that
// pass through shared memory in steps. Copies run one step ahead of the products, addresses two; a
// step has one barrier.
#pragma once

#include "kernels.h"
#include "walk.cuh"

namespace attnext {
namespace cuda {

// Bits per slot of what a thread's accumulators hold: columns 8 n + 2 t and 8 n + 2 t + 1.
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
  ATTNEXT_DEVICE void fill() {
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
#pragma unroll
      for (int w = 0; w < (kStep + 31) / 32; ++w) bits[f][0][w] = bits[f][1][w] = ~0u;
    }
  }
  ATTNEXT_DEVICE bool operator()(int f, int half, int n, int e) const {
    return bits[f][half][n / 4] & (1u << (n % 4 * 8 + e));
  }
};

// A number of each row, in the lanes of the accumulators.
template <int kFrags, class X>
ATTNEXT_DEVICE void spread(X mine, X (&out)[kFrags][2]) {
  const int g = threadIdx.x % 32 / 4;
#pragma unroll
  for (int f = 0; f < kFrags; ++f) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      out[f][half] = __shfl_sync(~0u, mine, f * 16 + half * 8 + g);
    }
  }
}
// The way back: the number of row r in lane r. All lanes of a quad hold the same.
template <int kFrags>
ATTNEXT_DEVICE float gather(const float (&x)[kFrags][2]) {
  const int lane = threadIdx.x % 32;
  float mine = 0.f;
#pragma unroll
  for (int f = 0; f < kFrags; ++f) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float here = __shfl_sync(~0u, x[f][half], lane % 8 * 4);
      if (lane / 8 == f * 2 + half) mine = here;
    }
  }
  return mine;
}

template <int kFrags, int kColumns>
ATTNEXT_DEVICE void clear(float (&x)[kFrags][kColumns][4]) {
#pragma unroll
  for (int f = 0; f < kFrags; ++f) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) x[f][n][0] = x[f][n][1] = x[f][n][2] = x[f][n][3] = 0.f;
  }
}
template <int kFrags, int kColumns>
ATTNEXT_DEVICE bool is_finite(const float (&x)[kFrags][kColumns][4]) {
  float bad = 0.f;
#pragma unroll
  for (int f = 0; f < kFrags; ++f) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      bad += (x[f][n][0] + x[f][n][1]) * 0.f + (x[f][n][2] + x[f][n][3]) * 0.f;
    }
  }
  return bad == 0.f;
}

// What the score modifiers make of a product of a query and a key: a logit in base 2. In a kernel
// that was compiled without them, nothing.
template <bool kModified>
struct Modifiers {
  const float* bias;  // of the head, null without
  float cap;          // softcap in base 2, 0 without

  ATTNEXT_DEVICE void start(const WindowParams& w, int64_t head) {
    if constexpr (!kModified) return;
    bias = w.bias ? static_cast<const float*>(w.bias) + head * w.bias_head_stride : nullptr;
    cap = static_cast<float>(w.softcap * kLog2E);
  }
  // Of one row of scores: the product with it makes a logit in base 2, or what the cap is taken of.
  ATTNEXT_DEVICE static float unit(const WindowParams& w, float scale) {
    if constexpr (!kModified) return scale * static_cast<float>(kLog2E);
    return scale * static_cast<float>(w.softcap > 0 ? 1 / w.softcap : kLog2E);
  }
  // `slope`: the derivative of the logit by the product, less its unit.
  ATTNEXT_DEVICE float operator()(float x, int64_t entry, bool has_bias, float* slope) const {
    if constexpr (!kModified) return x;
    if (cap > 0.f) {
      const float t = tanhf(x);
      if (slope) *slope = 1.f - t * t;
      x = t * cap;
    }
    if (bias && has_bias) x += bias[entry] * static_cast<float>(kLog2E);
    return x;
  }
};

template <bool kModified>
ATTNEXT_DEVICE float scale_of(const WindowParams& w, int64_t batch, const int32_t (&token)[3],
                              int64_t head) {
  float scale = static_cast<float>(w.scale);
  if (kModified && w.row_scale.data) {
    scale *=
        static_cast<const float*>(w.row_scale.data)[offset_of(w.row_scale, batch, token, head)];
  }
  return scale;
}

// Kernel: the class that derives, which has `note(j, slot, cursor, token, numbers)` for what it
// wants to know of the walked tokens of a step besides their two rows; `token` is the token's
// number in raster order, < 0 if the slot has none or is an extra key's.
template <class Kernel, class Walk_, class Elem, int kDim_, int kWarps_, int kFrags_, int kStep_,
          int kHeld, int kNumbers_>
struct Block {
  using T = Elem;
  using Walk = Walk_;
  using Row = typename Walk::Row;
  using Steps = typename Walk::template Steps<kStep_>;
  using Cursor = typename Walk::Cursor;
  static constexpr int kDim = kDim_, kWarps = kWarps_, kFrags = kFrags_, kStep = kStep_;
  static constexpr int kWarpRows = kFrags * 16, kRows = kWarps * kWarpRows;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kColumns = kStep / 8;
  static constexpr int kMine = (kDim + 31) / 32;  // numbers of a row that a lane of a warp has
  static constexpr int kNumbers = kNumbers_;
  using S = SharedPlan<sizeof(T), kDim, kRows, kStep, kHeld, kNumbers, Walk::kWarpInts>;
  using Scores = float[kFrags][kColumns][4];
  using Mask = LaneMask<kStep, kFrags>;

  const typename Walk::Launch& p;
  const WindowParams& w;
  uint8_t* memory;
  uint32_t shared;
  Walk walk;
  WalkLanes<T, kDim> lanes;
  int32_t batch, head, kv_head;
  int lane, warp;
  // The walk's operands, and where extra keys have theirs.
  const TensorRef *first, *second, *extra_first, *extra_second;
  int32_t walk_head;
  bool walks_queries;
  bool near;                           // places serve: see copy_far
  uint64_t start_first, start_second;  // of the operands' rows for this batch item and head

  ATTNEXT_DEVICE Block(const typename Walk::Launch& launch, uint8_t* shared_memory)
      : p(launch), w(launch.window), memory(shared_memory), shared(shared_address(shared_memory)) {
    lane = threadIdx.x % 32;
    warp = threadIdx.x / 32;
    lanes.start();
  }

  // Where the rows of a step are: 16-byte units from the operand's start, in the order in which
  // threads copy them. A slot that has no row gets any: masks leave it out.
  static constexpr int kChunks = Layout<T, kDim>::kChunks;
  static constexpr int kRowBytes = Layout<T, kDim>::kRowBytes;
  static constexpr int kAtOnce = kThreads > kChunks ? kThreads / kChunks : 1;
  static constexpr int kEach = kStep / kAtOnce;  // rows that a thread copies
  static_assert(kStep % kAtOnce == 0, "threads without a row to copy");
  ATTNEXT_DEVICE uint32_t* places(int buffer, int operand) const {
    return reinterpret_cast<uint32_t*>(memory + S::kPlacesAt) + (buffer * 2 + operand) * kStep;
  }
  // A number of each slot of a step: kept until the step has been worked on, so in three buffers.
  ATTNEXT_DEVICE float* number(int buffer, int which) const {
    return reinterpret_cast<float*>(memory + S::kNumbersAt) + (buffer * kNumbers + which) * kStep;
  }
  ATTNEXT_DEVICE int32_t* integer(int buffer, int which) const {
    return reinterpret_cast<int32_t*>(number(buffer, which));
  }
  ATTNEXT_DEVICE uint32_t held_tile(int i) const { return shared + i * S::kRowTile; }
  ATTNEXT_DEVICE uint32_t walk_tile(int stage, int operand) const {
    return shared + S::kWalkAt + (stage * 2 + operand) * S::kWalkTile;
  }

  ATTNEXT_DEVICE static uint64_t row_address(const TensorRef& t, int64_t offset) {
    return reinterpret_cast<uint64_t>(static_cast<const T*>(t.data) + offset);
  }
  ATTNEXT_DEVICE uint64_t slot_address(const TensorRef* t, const TensorRef* extra,
                                       const typename Walk::Slot& at) const {
    if (at.kind == Walk::Slot::kToken) {
      return row_address(*t, offset_of(*t, batch, at.token, walk_head));
    }
    if (!Walk::kHasExtra || at.kind != Walk::Slot::kExtra) return 0;
    return row_address(
        *extra, batch * extra->batch + at.token[2] * extra->token[2] + walk_head * extra->head);
  }

  // ---- rows
  // --------------------------------------------------------------------------------------

  // Copies the rows that lie at lanes' addresses (0: none) to a held tile. All threads call it.
  ATTNEXT_DEVICE void hold(int tile, uint64_t mine, int64_t dim) {
    uint64_t* const addresses = reinterpret_cast<uint64_t*>(memory + S::kWalkAt);
    __syncthreads();
    if (lane < kWarpRows) addresses[warp * kWarpRows + lane] = mine;
    __syncthreads();
    copy_rows<T, kDim, kRows, kThreads>(held_tile(tile), addresses,
                                        static_cast<int>(dim * sizeof(T)), p.aligned);
  }

  // ---- the walk
  // ----------------------------------------------------------------------------------

  // How a walked token is found from its place in the box: where the first of the box is, and what
  // a step along each axis adds. Of the two operands in units, and of the number in raster order.
  struct Finder {
    uint32_t line0, line1, column, first;
    ATTNEXT_DEVICE uint32_t operator()(const int32_t (&c)[3]) const {
      return first + c[0] * line0 + c[1] * line1 + c[2] * column;
    }
  };
  ATTNEXT_DEVICE Finder& finder(int which) const {
    return reinterpret_cast<Finder*>(memory + S::kFindersAt)[which];
  }
  // For the kernel: where it has what it knows of the first walked token of the map.
  ATTNEXT_DEVICE uint64_t& origin() const {
    return *reinterpret_cast<uint64_t*>(memory + S::kFindersAt + 3 * sizeof(Finder));
  }
  ATTNEXT_DEVICE void set_finders() const {
    const int which = threadIdx.x;
    if (which > 2) return;
    uint32_t step[3], number = 1;
    Finder found;
    found.first = 0;
#pragma unroll
    for (int a = 2; a >= 0; --a) {
      const uint32_t between =
          which == 2 ? number : p.units[walks_queries ? 3 * which : 1 + which][a];
      number *= walk.extent(a);
      step[a] = between * walk.dilation(a);
      found.first += walk.first(a) * between;
    }
    found.line0 = step[0], found.line1 = step[1], found.column = step[2];
    finder(which) = found;
  }

  // Each thread finds a slot for all that will copy it. Extra keys are found by those who copy.
  ATTNEXT_DEVICE void find_step(int32_t slot, int buffer, int numbers, Cursor& cursor) {
    if (!near && kNumbers == 0) return;
#pragma unroll
    for (int j0 = 0; j0 < kStep; j0 += kThreads) {
      const int j = j0 + threadIdx.x;
      if (kStep % kThreads != 0 && j >= kStep) break;
      const bool real = walk.extra <= slot + j && slot + j < walk.total;
      int32_t c[3];
      walk.place(slot + j, cursor, c);
      if (near) {
        const uint32_t place = uint32_t(j) % kAtOnce * kEach + uint32_t(j) / kAtOnce;
        places(buffer, 0)[place] = real ? finder(0)(c) : 0;
        places(buffer, 1)[place] = real ? finder(1)(c) : 0;
      }
      if constexpr (kNumbers > 0) {
        const int32_t token = real ? static_cast<int32_t>(finder(2)(c)) : -1;
        static_cast<Kernel*>(this)->note(j, slot + j, cursor, token, numbers);
      }
    }
  }

  // What the walk's operands are; of the head that it is about.
  ATTNEXT_DEVICE void set_walk(bool queries, int32_t of_head) {
    walks_queries = queries;
    first = queries ? &w.query : &w.key, extra_first = &w.extra_key;
    second = queries ? &w.dout : &w.value, extra_second = &w.extra_value;
    walk_head = of_head;
    const int chunk = threadIdx.x % kChunks;
    const int32_t origin[3] = {0, 0, 0};
    const auto start = [&](const TensorRef& t) {
      return row_address(t, offset_of(t, batch, origin, walk_head)) + chunk * 16;
    };
    start_first = start(*first), start_second = start(*second);
  }

  ATTNEXT_DEVICE void copy_step(int32_t slot, int stage) {
    const int bytes_first = static_cast<int>(w.head_dim * sizeof(T));
    const int bytes_second = static_cast<int>(w.head_dim_v * sizeof(T));
    if (near && slot >= walk.extra) {
      if (bytes_first == kRowBytes && bytes_second == kRowBytes) {
        copy_near<true>(stage, 0, start_first, kRowBytes);
        copy_near<true>(stage, 1, start_second, kRowBytes);
      } else {
        copy_near<false>(stage, 0, start_first, bytes_first);
        copy_near<false>(stage, 1, start_second, bytes_second);
      }
    } else {
      copy_far(slot, stage, 0, first, extra_first, bytes_first);
      copy_far(slot, stage, 1, second, extra_second, bytes_second);
    }
    commit_copies();
  }
  template <bool kWhole>
  ATTNEXT_DEVICE void copy_near(int stage, int operand, uint64_t start, int bytes) {
    constexpr int kPieces = kThreads < kChunks ? kChunks / kThreads : 1;
    const int row0 = kPieces == 1 ? threadIdx.x / kChunks : 0;
    uint32_t place[kEach];
    const uint32_t* from = places(stage, operand) + row0 * kEach;
#pragma unroll
    for (int i = 0; i < kEach; ++i) place[i] = from[i];
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int chunk = kPieces == 1 ? threadIdx.x % kChunks : piece * kThreads + threadIdx.x;
      const int mine = min(max(bytes - chunk * 16, 0), 16);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const uint32_t to =
            walk_tile(stage, operand) + Layout<T, kDim>::at(row0 + i * kAtOnce, chunk);
        const void* source = chunks_from(start + piece * kThreads * 16, place[i], p.unit_bytes);
        if constexpr (kWhole) {
          copy_chunk_async(to, source);
        } else {
          copy_chunk_async(to, source, mine);
        }
      }
    }
  }
  // Rows that do not start at multiples of 16 bytes, are too far apart, or are those of extra keys
  // or phantoms.
  ATTNEXT_DEVICE void copy_far(int32_t slot, int stage, int operand, const TensorRef* t,
                               const TensorRef* extra, int bytes) {
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < kStep * kChunks; i += kThreads) {
      const uint32_t r = i / kChunks;
      const int chunk = i % kChunks;
      copy_chunk<T>(walk_tile(stage, operand) + Layout<T, kDim>::at(r, chunk),
                    slot_address(t, extra, walk.slot(slot + r)), chunk * 16,
                    min(max(bytes - chunk * 16, 0), 16), p.aligned);
    }
  }

  // Calls visit(is_masked, stage, numbers, mask) for the steps of slots [from, to) that concern the
  // warp; `ready` once what was held has arrived. True if any step was masked.
  template <class Ready, class Visit>
  ATTNEXT_DEVICE bool pass(const Row& row, int32_t from, int32_t to, Ready ready, Visit visit) {
    Steps steps;
    Cursor cursor;
    steps.start(walk, row, lane < kWarpRows, from,
                reinterpret_cast<Interval*>(memory + S::kOuterAt) + warp * (S::kOuter / 2));
    near = p.near && !walk.has_phantoms();
    set_finders();
    __syncthreads();
    if (from < to) {
      find_step(from, 0, 0, cursor);
      __syncthreads();
      copy_step(from, 0);
      if (from + kStep < to) find_step(from + kStep, 1, 1, cursor);
    } else {
      commit_copies();  // what is held, which no step has committed
    }
    wait_copies<0>();
    __syncthreads();
    ready();

    bool masked = false;
    int stage = 0, numbers = 0;
    for (int32_t slot = from; slot < to; slot += kStep) {
      if (slot != from) {
        wait_copies<0>();
        __syncthreads();
      }
      if (slot + kStep < to) copy_step(slot + kStep, stage ^ 1);
      if (slot + 2 * kStep < to) {
        find_step(slot + 2 * kStep, stage, numbers == 0 ? 2 : numbers - 1, cursor);
      }
      uint32_t mine[Steps::kWords];
      const Step kind = steps.look(walk, row, slot, mine);
      Mask mask;
      if (kind == Step::kFull) {
        if constexpr (Kernel::kReadsBias) {  // rows that are not live have no place in its table
          for (uint32_t& word : mine) word = row.live ? ~0u : 0;
          mask.spread(mine);
        } else {
          mask.fill();
        }
        visit(Bool<false>(), stage, numbers, mask);
      } else if (kind != Step::kSkip) {
        mask.spread(mine);
        masked = true;
        visit(Bool<true>(), stage, numbers, mask);
      }
      stage ^= 1;
      numbers = numbers == 2 ? 0 : numbers + 1;
    }
    return masked;
  }
  template <bool kValue>
  struct Bool {
    static constexpr bool value = kValue;
  };

  // ---- a row by a warp
  // ---------------------------------------------------------------------------

  // Numbers lane, lane + 32, ... of a row; zeros at address 0.
  ATTNEXT_DEVICE void load_row(uint64_t from, int64_t dim, float (&x)[kMine]) const {
    const T* row = reinterpret_cast<const T*>(from);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int d = lane + 32 * i;
      x[i] = row && d < dim ? Number<T>::widen(row[d]) : 0.f;
    }
  }
  ATTNEXT_DEVICE void store_row(uint64_t to, int64_t dim, const float (&x)[kMine],
                                int begin = 0) const {
    T* row = reinterpret_cast<T*>(to);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int d = lane + 32 * i;
      if (begin <= d && d < dim) row[d] = Number<T>::narrow(x[i]);
    }
  }
  ATTNEXT_DEVICE static float dot(const float (&x)[kMine], const float (&y)[kMine]) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kMine; ++i) sum += x[i] * y[i];
    return warp_sum(sum);
  }
};

}  // namespace cuda
}  // namespace attnext
