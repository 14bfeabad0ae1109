// SPDX-License-Identifier: Apache-2.0
// The scan of linear_plan.h, in chunks (arXiv 2006.16236, 2405.21060): one block for a sequence,
// head, segment of the sequence and slice of the columns of S.
//
// S stays in the accumulators, transposed: a warp has 16 of its columns. For each chunk
//   1. the next one's rows are on their way while this one's are mapped to features in place;
//   2. o = decay (a S) + (masked, decayed a b^T) c, where S is read from a rounded copy in shared
//      memory; divided and rounded once;
//   3. S = decay S + (decayed c)^T b, summed within the chunk by the tensor cores, to S in fp32;
//   4. the copy is made again.
// Against the order of the tokens, the first chunk is the one that is short, so that chunks are the
// same in both directions.
//
// A token's decays are known as logarithms in base 2, cumulative since the chunk began; only
// differences of them, of which none is positive, become factors.
#pragma once

#include <type_traits>

#include "linear.cuh"

namespace attnext {
namespace cuda {

template <class T, int kDim, int kWarps, bool kGated, int kEntries>
struct Scan {
  using S = ScanShared<sizeof(T), kDim, kWarps, kEntries>;
  using P = Products<T>;
  static constexpr bool kExpanded = S::kExpanded;
  static constexpr int kRaw = S::kRaw, kPanel = S::kPanel;
  using Wide = Layout<T, kPanel>;
  static constexpr int kChunk = S::kChunk, kColumns = S::kColumns, kThreads = kWarps * 32;
  static constexpr int kDepth = P::kDepth, kSteps = kChunk / kDepth;
  static constexpr int kMine = kDepth / 4;  // rows of a step that a lane has
  static constexpr int kPer = kChunk / 32;  // tokens of a lane when one warp looks at all
  static constexpr int kOwn = (kDim / 16 + kWarps - 1) / kWarps;  // z: fragments of a warp
  static constexpr bool kKept = sizeof(T) == 2 && kDim <= 64;     // rows of a
  using Rows = LeftRows<T, kPanel, 1, kKept>;
  // fp16 has too few exponents for a sum over a sequence: its copy is in a unit of each warp's.
  static constexpr bool kUnits = std::is_same<T, fp16>::value;
  // Then, too, scores are scaled before they are rounded instead of with the output.
  static constexpr bool kScaledLate = !kGated && !kUnits;

  // What is known of a token: its decay in two parts, factor, further entry of a or b.
  struct Numbers {
    float decay, rest, factor, entry;
  };
  struct Totals {
    float decay, rest, unit, kept;  // unit: of the factors
  };

  const LinearLaunch& p;
  uint8_t* memory;
  uint32_t shared;
  int lane, warp, g, t;
  WalkLanes<T, kPanel> wide;
  WalkLanes<T, kColumns> narrow;
  Tokens tokens;
  int64_t sequence;
  int32_t head, segment, slice;
  int32_t first, count;      // of the segment's tokens, the first perhaps before the sequence
  int32_t skipped, chunks;   // chunks without tokens at its start; its chunks, with these
  float state[kDim / 8][4];  // transposed: rows are columns of S
  float z[kOwn][2];
  float kept_all = 1.f;

  ATTNEXT_DEVICE Scan(const LinearLaunch& launch, uint8_t* shared_memory)
      : p(launch), memory(shared_memory), shared(shared_address(shared_memory)) {
    lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    g = lane / 4, t = lane % 4;
    wide.start();
    narrow.start();
  }

  ATTNEXT_DEVICE uint32_t tile(int stage, int operand) const {
    return shared + stage * S::kStage + operand * S::kWide;
  }
  // Features of a (0) or b (1), and the copy of the state, of which features are a panel's columns.
  ATTNEXT_DEVICE uint32_t features(int stage, int operand, int panel) const {
    if constexpr (!kExpanded) return tile(stage, operand);
    return shared + S::kFeaturesAt + (operand * S::kPanels + panel) * S::kPanelTile;
  }
  ATTNEXT_DEVICE uint32_t state_tile(int panel) const {
    return shared + S::kStateAt + panel * S::kPanelTile;
  }
  ATTNEXT_DEVICE Numbers& numbers(int buffer, int i) const {
    return reinterpret_cast<Numbers*>(memory + S::kNumbersAt)[buffer * kChunk + i];
  }
  ATTNEXT_DEVICE Totals& totals(int buffer) const {
    return reinterpret_cast<Totals*>(memory + S::kTotalsAt)[buffer];
  }
  ATTNEXT_DEVICE float* shared_z() const { return reinterpret_cast<float*>(memory + S::kZAt); }
  ATTNEXT_DEVICE float* units() const { return reinterpret_cast<float*>(memory + S::kUnitsAt); }

  ATTNEXT_DEVICE void run() {
    locate();
    load_state();
    if (skipped < chunks) {
      copy_chunk_rows(skipped * kChunk, skipped % 2);
      Next next;
      look_at(skipped * kChunk, next);
      note(next, skipped % 2);
      if (p.outputs) copy_state();
    }
#pragma unroll 1
    for (int c = skipped; c < chunks; ++c) {
      const int stage = c % 2;
      const bool more = c + 1 < chunks;
      wait_copies<0>();
      map_chunk(c * kChunk, stage);
      __syncthreads();  // rows, numbers and the copy of the state are there
      Next next;
      if (more) {
        copy_chunk_rows((c + 1) * kChunk, stage ^ 1);
        look_at((c + 1) * kChunk, next);
      }
      if constexpr (kExpanded) {
        expand(c * kChunk, stage);
        __syncthreads();
      }
      if (p.outputs) attend(c * kChunk, stage);
      const bool sums = p.sums && (more || p.after || (kGated && p.boundaries));
      if (kGated && p.meetings) meet(c);
      if (sums) add_chunk(stage);
      if (kGated && p.boundaries && !p.meetings) leave(c);
      if (sums && p.outputs) {
        __syncthreads();  // the copy of the state has been read
        if (more) copy_state();
      }
      if (more) note(next, stage ^ 1);
    }
    store_state();
  }

  ATTNEXT_DEVICE void locate() {
    uint32_t block = blockIdx.x;
    slice = block % static_cast<uint32_t>(p.slices), block /= static_cast<uint32_t>(p.slices);
    segment = block % static_cast<uint32_t>(p.segments), block /= static_cast<uint32_t>(p.segments);
    head = block % static_cast<uint32_t>(p.heads);
    sequence = block / static_cast<uint32_t>(p.heads);
    tokens.start(p, sequence, head);
    const int64_t whole = (tokens.count() + p.segment - 1) / p.segment * p.segment;
    const int64_t from = segment * p.segment - (p.exclusive ? whole - tokens.count() : 0);
    first = static_cast<int32_t>(from);
    count = static_cast<int32_t>(max(min(from + p.segment, tokens.count()) - from, int64_t(0)));
    skipped = max(-first, 0) / kChunk;
    chunks = (count + kChunk - 1) / kChunk;
  }

  ATTNEXT_DEVICE bool decays() const { return kGated && p.decay.data; }
  ATTNEXT_DEVICE bool is_further() const { return kGated && p.extension == Extension::kFeature; }
  ATTNEXT_DEVICE bool is_token(int row) const { return row < count && first + row >= 0; }

  // ---- rows
  // --------------------------------------------------------------------------------------

  template <int kD, class Visit>
  ATTNEXT_DEVICE void each_chunk(Visit visit) const {
    constexpr int kChunks = Layout<T, kD>::kChunks, kAtOnce = kThreads / kChunks;
    static_assert(kThreads % kChunks == 0 && kChunk % kAtOnce == 0, "uneven");
    const int row0 = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
#pragma unroll
    for (int i = 0; i < kChunk / kAtOnce; ++i) visit(row0 + i * kAtOnce, chunk);
  }
  template <int kD>
  ATTNEXT_DEVICE void copy_rows_of(const ScanRows& x, int at, int column, uint32_t to) const {
    constexpr int kBytes = sizeof(T);
    const uint64_t start = reinterpret_cast<uint64_t>(
        static_cast<const T*>(x.rows.data) + tokens.offset(x.rows, x.group, first + at) + column);
    const int64_t step = tokens.step(x.rows) * kBytes;
    const int row_bytes = (x.dim - column) * kBytes;
    if (x.aligned && row_bytes >= Layout<T, kD>::kRowBytes && is_token(at) &&
        is_token(at + kChunk - 1)) {
      const char* from = reinterpret_cast<const char*>(start) +
                         threadIdx.x / Layout<T, kD>::kChunks * step +
                         threadIdx.x % Layout<T, kD>::kChunks * 16;
      each_chunk<kD>([&](int row, int chunk) {
        copy_chunk_async(to + Layout<T, kD>::at(row, chunk), from);
        from += kThreads / Layout<T, kD>::kChunks * step;
      });
      return;
    }
    each_chunk<kD>([&](int row, int chunk) {
      const int bytes = is_token(at + row) ? min(max(row_bytes - chunk * 16, 0), 16) : 0;
      copy_chunk<T>(to + Layout<T, kD>::at(row, chunk), bytes > 0 ? start + row * step : 0,
                    chunk * 16, bytes, x.aligned);
    });
  }
  ATTNEXT_DEVICE void copy_chunk_rows(int at, int stage) const {
    if (p.outputs) copy_rows_of<kRaw>(p.a, at, 0, tile(stage, 0));
    if (p.sums) {
      copy_rows_of<kRaw>(p.b, at, 0, tile(stage, 1));
      copy_rows_of<kColumns>(p.c, at, slice * kColumns, tile(stage, 2));
    }
    commit_copies();
  }

  // Each thread maps what it has copied: no barrier is due in between.
  template <int kD>
  ATTNEXT_DEVICE void map_rows(const ScanRows& x, int at, int column, uint32_t tile_at) const {
    if (x.map == FeatureMap::kIdentity) return;
    constexpr int kElems = Layout<T, kD>::kElems;
    each_chunk<kD>([&](int row, int chunk) {
      if (!is_token(at + row)) return;  // rows of zeros stay
      const uint32_t where = tile_at + Layout<T, kD>::at(row, chunk);
      const uint4 whole = load_shared(where);
      T elems[kElems];
      memcpy(elems, &whole, 16);
      const int real = x.dim - column - chunk * kElems;
#pragma unroll
      for (int e = 0; e < kElems; ++e) {
        const float f = feature(x.map, Number<T>::widen(elems[e]));
        elems[e] = Number<T>::narrow(e < real ? f : 0.f);
      }
      uint4 mapped;
      memcpy(&mapped, elems, 16);
      store_shared(where, mapped);
    });
  }
  ATTNEXT_DEVICE void map_chunk(int at, int stage) const {
    if constexpr (kExpanded) return;
    if (p.outputs) map_rows<kRaw>(p.a, at, 0, tile(stage, 0));
    if (p.sums) {
      map_rows<kRaw>(p.b, at, 0, tile(stage, 1));
      map_rows<kColumns>(p.c, at, slice * kColumns, tile(stage, 2));
    }
  }

  // Taylor features: 1, x_a, and x_a x_b for a <= b; those of a carry the polynomial's weights.
  // Half of the threads have a row of a each, half one of b.
  ATTNEXT_DEVICE void expand(int at, int stage) const {
    using Raw = Layout<T, kRaw>;
    static_assert(kThreads == 2 * kChunk && 1 + kEntries * (kEntries + 3) / 2 <= kDim, "features");
    constexpr int kElems = Raw::kElems;
    const int operand = threadIdx.x / kChunk, row = threadIdx.x % kChunk;
    if (operand == 0 ? !p.outputs : !p.sums) return;
    float x[kEntries], part[kElems];
    const float by = operand == 0 ? p.polynomial_scale : 1.f, square = operand == 0 ? 0.5f : 1.f;
#pragma unroll
    for (int chunk = 0; chunk < kEntries / kElems; ++chunk) {
      const uint4 whole = load_shared(tile(stage, operand) + Raw::at(row, chunk));
      T elems[kElems];
      memcpy(elems, &whole, 16);
#pragma unroll
      for (int e = 0; e < kElems; ++e) x[chunk * kElems + e] = Number<T>::widen(elems[e]) * by;
    }
    int f = 0;
    const auto put = [&](float value) {
      part[f % kElems] = value;
      if (++f % kElems > 0) return;
      uint4 whole;
      if constexpr (sizeof(T) == 4) {
        memcpy(&whole, part, 16);
      } else {
        whole = {Number<T>::pack(part[0], part[1]), Number<T>::pack(part[2], part[3]),
                 Number<T>::pack(part[4], part[5]), Number<T>::pack(part[6], part[7])};
      }
      const int chunk = f / kElems - 1;
      store_shared(
          features(stage, operand, chunk / Wide::kChunks) + Wide::at(row, chunk % Wide::kChunks),
          whole);
    };
    put(is_token(at + row) ? 1.f : 0.f);
#pragma unroll
    for (int a = 0; a < kEntries; ++a) put(x[a]);
#pragma unroll
    for (int a = 0; a < kEntries; ++a) {
      put(x[a] * x[a] * square);
#pragma unroll
      for (int b = a + 1; b < kEntries; ++b) put(x[a] * x[b]);
    }
#pragma unroll
    for (int i = 1 + kEntries * (kEntries + 3) / 2; i < kDim; ++i) put(0.f);
  }
  // The row of a state's tensor that a feature has there, where entries may be fewer; -1: none.
  ATTNEXT_DEVICE int state_row(int f) const {
    const int dim = p.b.dim;
    if constexpr (!kExpanded) return f < dim ? f : -1;
    if (f <= kEntries) return f <= dim ? f : -1;
    int a = 0, b = f - 1 - kEntries;
    while (a < kEntries && b >= kEntries - a) b -= kEntries - a, ++a;
    b += a;
    return b < dim ? 1 + dim + a * dim - a * (a - 1) / 2 + b - a : -1;
  }

  // ---- what is known of tokens
  // -------------------------------------------------------------------

  struct Next {
    float decay[kPer];
    float2 number[kPer];
  };
  // The first warp reads them for all, a chunk ahead.
  ATTNEXT_DEVICE void look_at(int at, Next& next) const {
    if (!kGated || warp > 0) return;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int row = at + lane * kPer + i;
      next.decay[i] = 0.f;
      next.number[i] = make_float2(0.f, 0.f);
      if (!is_token(row)) continue;
      if (decays()) {
        next.decay[i] =
            static_cast<const float*>(p.decay.data)[tokens.offset(p.decay, 1, first + row)];
      }
      if (p.side != Side::kNone) {
        next.number[i] = reinterpret_cast<const float2*>(p.numbers)[tokens.index(p, first + row)];
      }
    }
  }
  // In double: a difference of two sums is exact beside fp32, whatever has gone by before.
  ATTNEXT_DEVICE void note(const Next& next, int buffer) {
    if (!kGated || warp > 0) return;
    constexpr float kLeast = -1000.f;  // its exponential is 0; -inf would leave NaN
    double until[kPer], sum = 0.;
    float top = 0.f;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const double own = (next.decay[i] < kLeast ? kLeast : next.decay[i]) * kLog2E;
      sum += own;
      until[i] = p.exclusive ? sum - own : sum;
      top = fmaxf(top, fabsf(next.number[i].x));
    }
    double all = sum;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const double other = __shfl_up_sync(~0u, all, step);
      if (lane >= step) all += other;
      top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    }
    const double before = all - sum, total = __shfl_sync(~0u, all, 31);
    float unit = 1.f, inverse = 1.f;
    if (p.side == Side::kB) unit_of(top, 0, unit, inverse);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const double decay = before + until[i];
      const float high = static_cast<float>(decay);
      numbers(buffer, lane * kPer + i) = {high, static_cast<float>(decay - high),
                                          next.number[i].x * inverse, next.number[i].y};
    }
    if (lane == 0) {
      const float high = static_cast<float>(total);
      totals(buffer) = {high, static_cast<float>(total - high), unit, power(high)};
    }
  }

  // ---- outputs
  // -----------------------------------------------------------------------------------

  ATTNEXT_DEVICE void attend(int at, int stage) {
    const int buffer = stage, walked = warp * 16 + 16;
    Rows rows;
    rows.load(tile(stage, 0), warp * 16);
    Numbers mine[2] = {{0.f, 0.f, 1.f, 1.f}, {0.f, 0.f, 1.f, 1.f}};
    float unit = 1.f;
    if constexpr (kGated) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Numbers known = numbers(buffer, warp * 16 + half * 8 + g);
        mine[half].decay = known.decay, mine[half].rest = known.rest;
        if (p.side == Side::kA) mine[half].factor = known.factor, mine[half].entry = known.entry;
      }
      unit = totals(buffer).unit;
    }

    float scores[1][kChunk / 8][4], sum[2] = {0.f, 0.f};
    if (p.sums) {
      product<T, kRaw, 1, kChunk, kKept>(scores, rows, wide, tile(stage, 1), walked);
      finish_scores(scores[0], buffer, mine, walked, sum);
    }

    float out[1][kColumns / 8][4], factor[1][2];
    float by_z[2] = {0.f, 0.f};
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      out[0][n][0] = out[0][n][1] = out[0][n][2] = out[0][n][3] = 0.f;
    }
#pragma unroll
    for (int panel = 0; panel < S::kPanels; ++panel) {
      if constexpr (kExpanded) rows.load(features(stage, 0, panel), warp * 16);
      add_product<T, kPanel, 1, kColumns, kKept>(out, rows, wide, state_tile(panel));
      if (p.extension == Extension::kColumn) add_products_with_z(rows, panel * kPanel, by_z);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float by = kScaledLate ? 1.f / p.inner_scale : p.scale;
      if (decays()) by *= power(mine[half].decay);
      factor[0][half] = kScaledLate ? p.scale * p.inner_scale : mine[half].factor * unit;
      if (p.extension == Extension::kColumn) {
        const float total = quad_sum(fmaf(by, by_z[half], sum[half]));
        const float late = kScaledLate ? factor[0][half] : 1.f;
        factor[0][half] = late * divide_by(total * late, at + warp * 16 + half * 8 + g);
      }
      if constexpr (kGated) by /= unit;
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        const float of_state = kUnits ? by * units()[n / 2] : by;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = out[0][n][2 * half + e];
          x *= of_state;
          if (is_further()) {
            x += by * mine[half].entry * shared_z()[n * 8 + 2 * t + e];
          }
        }
      }
    }
    if (p.sums) {
      accumulate<T, kColumns, kColumns, 1, kChunk>(out, scores, narrow, tile(stage, 2), 0, walked);
    }
    finish(at, stage, out, factor);
  }

  ATTNEXT_DEVICE void finish_scores(float (&scores)[kChunk / 8][4], int buffer,
                                    const Numbers (&mine)[2], int walked, float (&sum)[2]) const {
    const float scale = p.scale * p.inner_scale;
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
      if (n * 8 >= walked) break;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int j = n * 8 + 2 * t + e;
        Numbers other = {0.f, 0.f, 1.f, 1.f};
        if constexpr (kGated) {
          const Numbers known = numbers(buffer, j);
          other.decay = known.decay, other.rest = known.rest;
          if (p.side == Side::kB) other.factor = known.factor, other.entry = known.entry;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& score = scores[n][2 * half + e];
          float x = score;
          if (is_further()) x += mine[half].entry * other.entry;
          if constexpr (kExpanded) {
            x *= p.polynomial_scale;
            x = fmaf(fmaf(x, 0.5f, 1.f), x, 1.f);
          }
          if (decays()) {
            x *= power((mine[half].decay - other.decay) + (mine[half].rest - other.rest));
          }
          if constexpr (!kScaledLate) x *= scale * other.factor;
          score = j <= warp * 16 + half * 8 + g ? x : 0.f;
          sum[half] += score;
        }
      }
    }
  }

  ATTNEXT_DEVICE void add_products_with_z(const Rows& rows, int first_feature,
                                          float (&by_z)[2]) const {
#pragma unroll
    for (int k = 0; k < Rows::kSteps; ++k) {
      visit_left<false, T>(rows(0, k), [&](int half, int i, float x) {
        by_z[half] = fmaf(x, shared_z()[first_feature + k * kDepth + i], by_z[half]);
      });
    }
  }
  ATTNEXT_DEVICE float divide_by(float total, int row) const {
    const float moved = total < 0.f ? total - p.eps : total + p.eps;
    if (slice == 0 && t == 0 && is_token(row)) {
      static_cast<float*>(p.denominator.data)[tokens.offset(p.denominator, 1, first + row)] = moved;
    }
    return 1.f / moved;
  }

  ATTNEXT_DEVICE void finish(int at, int stage, float (&out)[1][kColumns / 8][4],
                             float (&factor)[1][2]) {
    if (kGated && p.raw.rows.data) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        pull_back(at + warp * 16 + half * 8 + g, half, factor[0][half], out[0]);
        factor[0][half] = 1.f;
      }
    }
    const int dim = p.out.dim - slice * kColumns;
    if (kGated && p.out_fp32) {
      store_numbers<float>(at, out[0], factor[0]);
      return;
    }
    if constexpr (kExpanded) {
      store_numbers<T>(at, out[0], factor[0]);
      return;
    }
    const int row = at + warp * 16 + lane;
    uint64_t address = 0;
    if (lane < 16 && is_token(row)) {
      address =
          reinterpret_cast<uint64_t>(static_cast<T*>(p.out.rows.data) +
                                     tokens.offset(p.out.rows, 1, first + row) + slice * kColumns);
    }
    constexpr int kRowBytes = S::kOutApart ? Layout<T, kColumns>::kRowBytes : Wide::kRowBytes;
    const uint32_t room = (S::kOutApart ? shared + S::kOutAt : tile(stage, 0));
    store_rows<T, kColumns, kColumns, 1>(room + warp * 16 * kRowBytes, 0, out, factor, address, dim,
                                         p.out.aligned);
  }

  // As they lie in the accumulators.
  template <class Out>
  ATTNEXT_DEVICE void store_numbers(int at, const float (&out)[kColumns / 8][4],
                                    const float (&factor)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = at + warp * 16 + half * 8 + g;
      if (!is_token(row)) continue;
      Out* to = static_cast<Out*>(p.out.rows.data) + tokens.offset(p.out.rows, 1, first + row) +
                slice * kColumns;
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = n * 8 + 2 * t + e;
          if (slice * kColumns + column < p.out.dim) {
            to[column] = Number<Out>::narrow(out[n][2 * half + e] * factor[half]);
          }
        }
      }
    }
  }

  // From a row's gradient of features to that of what they are features of.
  ATTNEXT_DEVICE void pull_back(int row, int half, float factor, float (&out)[kColumns / 8][4]) {
    const bool live = is_token(row);
    const int dim = p.out.dim - slice * kColumns;
    const T* raw = static_cast<const T*>(p.raw.rows.data) + slice * kColumns;
    if (live) raw += tokens.offset(p.raw.rows, p.raw.group, first + row);
    float dot = 0.f;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = n * 8 + 2 * t + e;
        float& x = out[n][2 * half + e];
        x *= factor;
        if (!live || column >= dim) continue;
        const float f = feature(p.raw.map, Number<T>::widen(raw[column]));
        dot = fmaf(x, Number<T>::widen(Number<T>::narrow(f)), dot);  // as the products have it
        x *= feature_slope(p.raw.map, f);
      }
    }
    dot = quad_sum(dot);
    if (p.dots && live && t == 0) {
      p.dots[slice * p.batch * p.tokens * p.heads + tokens.index(p, first + row)] = dot;
    }
  }

  // ---- the state
  // ---------------------------------------------------------------------------------

  ATTNEXT_DEVICE void add_chunk(int stage) {
    const int buffer = stage;
    typename P::Left c[kSteps];
    float w[kSteps][kMine], more[2] = {0.f, 0.f}, kept = 1.f, unit = p.inner_scale;
    if constexpr (kGated) kept = totals(buffer).kept, unit *= totals(buffer).unit;
    kept_all *= kept;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      c[k] = TransposedLeft<T, kColumns>::load(tile(stage, 2), k * kDepth,
                                               warp * 16 / Layout<T, kColumns>::kElems);
      float entry[kMine];
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        w[k][i] = entry[i] = 1.f;
        if constexpr (!kGated) continue;
        const Numbers known = numbers(buffer, k * kDepth + contraction_row<T>(i));
        const Totals all = totals(buffer);
        if (decays()) w[k][i] = power((all.decay - known.decay) + (all.rest - known.rest));
        if (p.side == Side::kB) w[k][i] *= known.factor, entry[i] = known.entry;
      }
      if (is_further()) {
        visit_left<true, T>(c[k], [&](int half, int i, float x) {
          const int at = sizeof(T) == 4 ? i % 2 : i / 8 * 2 + i % 2;
          more[half] = fmaf(x, w[k][at] * entry[at], more[half]);
        });
      }
      if constexpr (kGated) weigh<T>(c[k], w[k]);
      if (p.extension == Extension::kColumn) {
#pragma unroll
        for (int i = 0; i < kMine; ++i) w[k][i] *= entry[i];
      }
    }
    if (is_further()) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        z[0][half] = fmaf(z[0][half], kept, quad_sum(more[half]) * unit);
      }
    }
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
      const bool mine = p.extension == Extension::kColumn && n % kWarps == warp;
      float part[2][4] = {}, sum[2] = {0.f, 0.f};
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const auto b = P::template load_right_transposed<kPanel>(
            features(stage, 1, n * 16 / kPanel) + wide.transposed, k * kDepth,
            n * 16 % kPanel / Wide::kElems);
        P::multiply(part[0], part[1], c[k], b);
        if (mine) {
          visit_right<T>(
              b, [&](int half, int i, float x) { sum[half] = fmaf(x, w[k][i], sum[half]); });
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& x = state[2 * n + half][e];
          x = fmaf(part[half][e], unit, kGated ? x * kept : x);
        }
        if (mine) {
          float& x = z[n / kWarps][half];
          x = fmaf(x, kept, quad_sum(sum[half]) * unit);
        }
      }
    }
  }

  // The decays of a chunk's tokens scale, besides what passes between the tokens, all that the
  // state after it means for later ones: its product with its gradient. In the order of tokens
  // states are left for the scan against it.
  static constexpr int kLeft = kDim / 8 + 1;  // float4 of a thread, the last for z
  ATTNEXT_DEVICE int64_t boundary(int64_t chunk) const {
    return ((sequence * p.heads + head) * p.slices + slice) * p.chunks + chunk;
  }
  ATTNEXT_DEVICE float4* left_at(int64_t chunk) const {
    return reinterpret_cast<float4*>(p.boundaries) + boundary(chunk) * kLeft * kThreads +
           threadIdx.x;
  }
  ATTNEXT_DEVICE void leave(int c) const {
    float4* to = left_at(segment * (p.segment / kChunk) + c);
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      to[n * kThreads] = make_float4(state[n][0], state[n][1], state[n][2], state[n][3]);
    }
    to[kDim / 8 * kThreads] = make_float4(z[0][0], z[0][1], 0.f, 0.f);
  }
  ATTNEXT_DEVICE void meet(int c) const {
    const int64_t per = p.segment / kChunk;
    const int64_t all = (tokens.count() + p.segment - 1) / p.segment * per;
    const int64_t chunk = all - 1 - segment * per - c;
    const float4* from = left_at(chunk);
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const float4 x = from[n * kThreads];
      sum += (x.x * state[n][0] + x.y * state[n][1]) + (x.z * state[n][2] + x.w * state[n][3]);
    }
    if (is_further() && t == 0) {
      const float4 x = from[kDim / 8 * kThreads];
      sum += x.x * z[0][0] + x.y * z[0][1];
    }
    sum = warp_sum(sum);
    if (lane == 0) p.meetings[boundary(chunk) * kWarps + warp] = sum;
  }

  // Rounded, for products with a.
  ATTNEXT_DEVICE void copy_state() const {
    float unit = 1.f, inverse = 1.f;
    if constexpr (kUnits) {
      float top = 0.f;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) top = fmaxf(top, fabsf(state[n][e]));
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
      unit_of(top, 14, unit, inverse);
      if (lane == 0) units()[warp] = unit;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 16 + half * 8 + g;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const float x = state[n][2 * half] * inverse, y = state[n][2 * half + 1] * inverse;
        const uint32_t to = state_tile(n * 8 / kPanel);
        const int chunk = n * 8 % kPanel / Wide::kElems;
        if constexpr (sizeof(T) == 4) {
          // Neighbouring rows share banks: one stores its first number while the other its second.
          const int odd = g % 2;
          const uint32_t at = to + Wide::at(row, chunk + t / 2) + t % 2 * 8;
          store_shared(at + odd * 4, __float_as_uint(odd ? y : x));
          store_shared(at + 4 - odd * 4, __float_as_uint(odd ? x : y));
        } else {
          store_shared(to + Wide::at(row, chunk) + t * 4, Number<T>::pack(x, y));
        }
      }
      if (is_further() && t == 0) shared_z()[row] = z[0][half];
    }
    if (p.extension == Extension::kColumn) {
      each_z([&](int i, int half, int f) {
        if (t == 0) shared_z()[f] = z[i][half];
      });
    }
  }

  // visit(i, half, feature) for the numbers of z that the warp has.
  template <class Visit>
  ATTNEXT_DEVICE void each_z(Visit visit) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int n = i * kWarps + warp;
      if (n * 16 >= kDim) continue;
      visit(i, 0, n * 16 + g);
      visit(i, 1, n * 16 + 8 + g);
    }
  }
  // visit(n, e, offset of the number in a tensor of states) for the lane's real numbers of S.
  template <class Visit>
  ATTNEXT_DEVICE void each_state(Visit visit) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = slice * kColumns + warp * 16 + half * 8 + g;
      if (column >= p.c.dim) continue;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = state_row(n * 8 + 2 * t + e);
          if (row >= 0) {
            visit(n, 2 * half + e, row * p.row_stride + column * p.column_stride);
          }
        }
      }
    }
  }
  ATTNEXT_DEVICE int64_t state_of(int32_t segments) const {
    const int64_t which = segments > 1 ? sequence * segments + segment : sequence;
    return (which * p.heads + head) * p.state_size;
  }

  ATTNEXT_DEVICE void load_state() {
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) state[n][0] = state[n][1] = state[n][2] = state[n][3] = 0.f;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) z[i][0] = z[i][1] = 0.f;
    if (!p.before) return;
    const float* from = p.before + state_of(p.before_segments);
    each_state([&](int n, int e, int64_t at) { state[n][e] = from[at]; });
    from += p.z_offset;
    if (p.extension == Extension::kColumn) {
      each_z([&](int i, int half, int f) {
        const int row = state_row(f);
        if (row >= 0) z[i][half] = from[row * p.z_stride];
      });
    } else if (is_further()) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = slice * kColumns + warp * 16 + half * 8 + g;
        if (column < p.c.dim) z[0][half] = from[column * p.z_stride];
      }
    }
  }
  ATTNEXT_DEVICE void store_state() const {
    if (!p.after) return;
    float* to = p.after + state_of(p.after_segments);
    each_state([&](int n, int e, int64_t at) { to[at] = state[n][e]; });
    to += p.z_offset;
    if (p.extension == Extension::kColumn && slice == 0) {
      each_z([&](int i, int half, int f) {
        const int row = state_row(f);
        if (t == 0 && row >= 0) to[row * p.z_stride] = z[i][half];
      });
    } else if (is_further() && t == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = slice * kColumns + warp * 16 + half * 8 + g;
        if (column < p.c.dim) to[column * p.z_stride] = z[0][half];
      }
    }
    if (p.factors && slice == 0 && threadIdx.x == 0) {
      p.factors[(sequence * p.segments + segment) * p.heads + head] = kept_all;
    }
  }
};

extern __shared__ __align__(1024) uint8_t shared_memory[];

#define ATTNEXT_SCAN(name, T, dim, warps, gated, entries)                                       \
  extern "C" __global__ void __launch_bounds__((warps) * 32, least_scan_blocks(sizeof(T), dim)) \
      name(const __grid_constant__ LinearLaunch p) {                                            \
    Scan<T, dim, warps, gated, entries>(p, shared_memory).run();                                \
  }

}  // namespace cuda
}  // namespace attnext
