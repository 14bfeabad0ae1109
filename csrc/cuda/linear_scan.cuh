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

template <class T, int kDim, int kWarps, ScanKind kKind>
struct Scan {
  using S = ScanShared<sizeof(T), kDim, kWarps, kKind>;
  static constexpr bool kGated = is_gated(kKind), kDelta = kKind == ScanKind::kDelta;
  static constexpr bool kDeltaBack = kKind == ScanKind::kDeltaBack;
  static constexpr bool kFolded = S::kFolded;
  // Gradients that go back through features, or to decays; those of Taylor features are a fold's.
  static constexpr bool kPullsBack = kKind == ScanKind::kGated;
  static constexpr bool kHasFurther = kPullsBack || kFolded;
  // What keys get from the state's gradient is summed over the tokens before another, where it may
  // be small beside its parts: the gradient's copy and what that lacks take part.
  static constexpr bool kFinerState = kPullsBack && sizeof(T) == 2;
  static constexpr bool kHasSums = !kFolded && !kDelta && !kDeltaBack;
  static constexpr bool kIsWide = is_wide(kKind);
  static constexpr int kEntries = kTaylorEntries, kEntryWidth = S::kEntryWidth;
  using P = Products<T>;
  static constexpr bool kExpanded = S::kExpanded;
  static constexpr int kRaw = S::kRaw, kPanel = S::kPanel;
  using Wide = Layout<T, kPanel>;
  // Of a row of a or b: entries whose features are wanted may be half a tile's.
  static constexpr int kRawChunks =
      kExpanded && !kIsWide ? kEntries * int(sizeof(T)) / 16 : Layout<T, kRaw>::kChunks;
  static constexpr int kChunk = S::kChunk, kColumns = S::kColumns, kThreads = kWarps * 32;
  static constexpr int kDepth = P::kDepth, kSteps = kChunk / kDepth;
  static constexpr int kMine = kDepth / 4;         // rows of a step that a lane has
  static constexpr int kPer = (kChunk + 31) / 32;  // tokens of a lane when one warp looks at all
  static constexpr bool kKept = sizeof(T) == 2 && kDim <= 64;  // rows of a
  using Rows = LeftRows<T, kPanel, 1, kKept>;
  // fp16 has too few exponents for a sum over a sequence: its copy is in a unit of each warp's.
  static constexpr bool kUnits = std::is_same<T, fp16>::value;
  // Then, too, scores are scaled before they are rounded instead of with the output.
  static constexpr bool kScaledLate = !kGated && !kUnits;
  // Taylor features have the scale in them.
  static constexpr bool kUnscaled = kExpanded && !kGated && !kUnits;

  // Branches around what a launch may do without; in fp32 they cost registers, of which it has
  // none.
  static constexpr bool kSpares = sizeof(T) == 2;
  // Whether outputs go by way of a tile, and so many columns at once.
  static constexpr bool kStoresRows = !kFolded && !kIsWide;
  static constexpr int kOut = kExpanded && kPanel < kColumns ? kPanel : kColumns;

  // What is known of a token: its decay in two parts, factor, further entry of a or b.
  struct Numbers {
    float decay, rest, factor, entry;  // the entry is beta under the delta rule
  };
  struct Totals {
    float decay, rest, unit, kept;  // unit: of the factors
  };

  const LinearLaunch& p;
  uint8_t* memory;
  uint32_t shared;
  int lane, warp, g, t;
  WalkLanes<T, kPanel> wide;
  WalkLanes<T, kColumns> of_columns;          // unless they are `wide` over again
  WalkLanes<T, kEntryWidth> entries;          // fold: of raw and c
  uint64_t next_a, next_b, next_c, next_raw;  // the thread's places in what is copied next
  uint64_t next_out;                          // the lane's in its warp's outputs
  int32_t sequence, head, segment, slice, part = 0;
  // Of the segment's rows those from `low` to `count` are tokens, after `skipped` chunks without.
  int32_t low, count, skipped;
  bool even_wide, even_narrow;
  float state[kDim / 8][4];  // transposed: rows are columns of S
  float kept_all = 1.f;
  float further[2];  // what the lane's tokens of a chunk add to z of its columns

  ATTNEXT_DEVICE Scan(const LinearLaunch& launch, uint8_t* shared_memory)
      : p(launch), memory(shared_memory), shared(shared_address(shared_memory)) {
    lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    g = lane / 4, t = lane % 4;
    wide.start();
    if constexpr (kColumns != kPanel) of_columns.start();
    if constexpr (kFolded) entries.start();
  }

  ATTNEXT_DEVICE const WalkLanes<T, kColumns>& narrow() const {
    if constexpr (kColumns == kPanel) {
      return wide;
    } else {
      return of_columns;
    }
  }
  ATTNEXT_DEVICE uint32_t tile(int stage, int operand) const {
    // Opaque, or what lanes add to it is added to `shared` once and kept, address by address.
    return opaque(shared + stage * S::kStage) + operand * S::kWide;
  }
  ATTNEXT_DEVICE uint32_t c_tile(int stage) const {
    return kFolded ? shared + S::kFeaturesAt : tile(stage, 2);
  }
  ATTNEXT_DEVICE uint32_t entries_tile(int stage, int operand) const {  // raw (0), c (1)
    return tile(stage, 2) + operand * S::kEntriesTile;
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
  ATTNEXT_DEVICE uint32_t z(int i) const { return shared + S::kZAt + i * 4; }
  // Of Taylor features in a tensor of states, while no copy of the state is there.
  ATTNEXT_DEVICE int* places() const { return reinterpret_cast<int*>(memory + S::kStateAt); }
  // The segment's, in shared memory: rarely asked for.
  static_assert(sizeof(Tokens) <= S::kZAt - S::kTokensAt, "room");
  ATTNEXT_DEVICE const Tokens& tokens() const {
    return *reinterpret_cast<const Tokens*>(memory + S::kTokensAt);
  }
  ATTNEXT_DEVICE float* units() const { return reinterpret_cast<float*>(memory + S::kUnitsAt); }

  ATTNEXT_DEVICE void run() {
    locate();
    load_state();
    // The round before the first chunk only fetches it.
    int c = skipped - 1;
    bool there = false;
#pragma unroll 1
    do {
      const int stage = c & 1;
      const bool more = is_more(c);
      if (there) {
        wait_copies<0>();
        map_chunk(c * kChunk, stage);
      }
      __syncthreads();  // rows, numbers and the copy of the state are there
      Next next;
      if (more) {
        copy_chunk_rows((c + 1) * kChunk, stage ^ 1);
        if (notes()) look_at((c + 1) * kChunk, next);
      }
      if (there) walk_over(c, stage, more);
      if (more && gives() && (sums() || !there)) copy_state();
      if (more && notes()) note(next, stage ^ 1);
      there = true;
    } while (++c * kChunk < count);
    find_block_again();
    store_state();
  }

  ATTNEXT_DEVICE void walk_over(int c, int stage, bool more) {
    if constexpr (kExpanded) {
      expand(c * kChunk, stage);
      __syncthreads();
    }
    if constexpr (kDelta) replace_values(c * kChunk, stage);
    if constexpr (kFolded) {
      expand_slice(c * kChunk, stage);
      __syncthreads();
    }
    if (gives() && !solves()) attend(c * kChunk, stage);
    const bool adds = sums() && (more || p.after);
    if (leaves() && p.meetings) meet(c, stage);
    if (leaves() && !p.meetings) leave(c);
    if (adds && !kDeltaBack) add_chunk(stage);
    if (adds && gives()) __syncthreads();  // the copy of the state has been read, and z
    if (adds) add_sums(stage);
  }

  // Where the block stands, found again instead of kept during the walk.
  ATTNEXT_DEVICE void find_block_again() {
    uint32_t block = blockIdx.x;
    asm volatile("" : "+r"(block), "+r"(lane));
    g = lane / 4, t = lane % 4;
    find_block(block);
  }
  ATTNEXT_DEVICE void find_block(uint32_t block) {
    slice = block % static_cast<uint32_t>(p.slices), block /= static_cast<uint32_t>(p.slices);
    if constexpr (kIsWide && kExpanded) {
      part = block % static_cast<uint32_t>(p.parts), block /= static_cast<uint32_t>(p.parts);
    }
    segment = block % static_cast<uint32_t>(p.segments), block /= static_cast<uint32_t>(p.segments);
    head = block % static_cast<uint32_t>(p.heads);
    sequence = static_cast<int32_t>(block / static_cast<uint32_t>(p.heads));
  }
  ATTNEXT_DEVICE void locate() {
    find_block(blockIdx.x);
    Tokens tokens;
    tokens.start(p, sequence, head);
    const int64_t whole = (tokens.count() + p.segment - 1) / p.segment * p.segment;
    const int64_t from = segment * p.segment - (p.exclusive ? whole - tokens.count() : 0);
    low = static_cast<int32_t>(max(-from, int64_t(0)));
    count = static_cast<int32_t>(max(min(from + p.segment, tokens.count()) - from, int64_t(0)));
    skipped = low / kChunk;
    tokens.first_chunk = static_cast<uint32_t>(tokens.chunks_before(p, sequence, kChunk));
    tokens.begin_at(from);
    if (threadIdx.x == 0) *reinterpret_cast<Tokens*>(memory + S::kTokensAt) = tokens;
    next_a = place_in<kRawChunks>(tokens, p.a, 0);
    next_b = place_in<kRawChunks>(tokens, p.b, 0);
    if constexpr (kFolded) {
      next_c = place_in<Layout<T, kEntryWidth>::kChunks>(tokens, p.c, 0);
      next_raw = place_in<Layout<T, kEntryWidth>::kChunks>(tokens, p.raw, 0);
    } else {
      next_c = place_in<Layout<T, kColumns>::kChunks>(tokens, p.c, slice * kColumns);
    }
    if constexpr (kStoresRows) {
      constexpr int kElems = Layout<T, kOut>::kElems, kChunks = kOut / kElems;
      const int row = skipped * kChunk + warp * 16 + lane / kChunks;
      next_out = reinterpret_cast<uint64_t>(static_cast<T*>(p.out.rows.data) +
                                            tokens.offset(p.out.rows, 1, row) + slice * kColumns +
                                            lane % kChunks * kElems);
    }
    even_wide = (!gives() || solves() || is_even<kRawChunks>(p.a, 0)) &&
                (!sums() || is_even<kRawChunks>(p.b, 0));
    even_narrow = is_even<Layout<T, kColumns>::kChunks>(p.c, slice * kColumns);
  }

  // Outputs are wanted; tokens enter the state; another chunk follows; a warp's products within the
  // chunk go so far. What counts instructions wants all of a chunk's.
#ifdef ATTNEXT_WHOLE_SCAN
  ATTNEXT_DEVICE bool gives() const { return true; }
  ATTNEXT_DEVICE bool sums() const { return true; }
  ATTNEXT_DEVICE bool is_more(int) const { return true; }
  ATTNEXT_DEVICE int walks() const { return kChunk; }
#else
  ATTNEXT_DEVICE bool gives() const { return p.outputs; }
  ATTNEXT_DEVICE bool sums() const { return p.sums; }
  ATTNEXT_DEVICE bool is_more(int c) const { return (c + 1) * kChunk < count; }
  ATTNEXT_DEVICE int walks() const { return warp * 16 + 16; }
#endif
  ATTNEXT_DEVICE bool decays() const { return kGated && p.decay.data; }
  ATTNEXT_DEVICE bool is_further() const {
    return kHasFurther && p.extension == Extension::kFeature;
  }
  ATTNEXT_DEVICE bool has_sums() const { return kHasSums && p.extension == Extension::kColumn; }
  ATTNEXT_DEVICE bool is_on(Side side) const {
    return kGated && !kDelta && !kDeltaBack && p.side == side;
  }
  ATTNEXT_DEVICE bool leaves() const { return kHasFurther && p.boundaries; }
  // The delta rule's values are all that is wanted.
  ATTNEXT_DEVICE bool solves() const { return kDelta && p.written.rows.data; }
  ATTNEXT_DEVICE bool is_token(int row) const { return row < count && row >= low; }
  ATTNEXT_DEVICE bool is_whole(int at) const { return at >= low && at + kChunk <= count; }

  // ---- rows ------------------------------------------------------------------------------------

  // Of rows of so many chunks: how many the block's threads have at once, or else, where a row has
  // more chunks than there are threads, in how many goes they have one.
  template <int kChunks>
  static constexpr int kRowsAtOnce = kThreads < kChunks ? 1 : kThreads / kChunks;
  template <int kChunks>
  static constexpr int kGoes = kChunks < kThreads ? 1 : kChunks / kThreads;

  // visit(row, chunk, place in the tile) for a thread's chunks of a tile.
  template <int kD, bool kUnrolled, int kChunks = Layout<T, kD>::kChunks, class Visit>
  ATTNEXT_DEVICE void each_chunk(Visit visit) const {
    using L = Layout<T, kD>;
    constexpr int kAtOnce = kRowsAtOnce<kChunks>;
    static_assert(kThreads * kGoes<kChunks> == kAtOnce * kChunks && kChunk % kAtOnce == 0,
                  "uneven");
    const int row0 = threadIdx.x / kChunks, first = threadIdx.x % kChunks;
#pragma unroll(kUnrolled ? kChunk / kAtOnce : 1)
    for (int i = 0; i < kChunk / kAtOnce; ++i) {
      const int row = row0 + i * kAtOnce;
#pragma unroll
      for (int go = 0; go < kGoes<kChunks>; ++go) {
        const int chunk = first + go * kThreads;
        visit(row, chunk, L::at(row, chunk));
      }
    }
  }
  // What the thread copies first of the first chunk, from a column on.
  template <int kChunks>
  ATTNEXT_DEVICE uint64_t place_in(const Tokens& tokens, const ScanRows& x, int column) const {
    const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    const int64_t offset = tokens.offset(x.rows, x.group, skipped * kChunk + row) + column;
    return reinterpret_cast<uint64_t>(static_cast<const T*>(x.rows.data) + offset) + chunk * 16;
  }
  // Whether all of what is copied of rows that are tokens' is theirs, and aligned.
  template <int kChunks>
  ATTNEXT_DEVICE static bool is_even(const ScanRows& x, int column) {
    return x.stride != 0 && (x.dim - column) * static_cast<int>(sizeof(T)) >= kChunks * 16;
  }
  // Copies it, and goes on to the next one.
  template <int kD, int kChunks = Layout<T, kD>::kChunks>
  ATTNEXT_DEVICE void copy_rows_of(const ScanRows& x, uint64_t& start, int at, bool even,
                                   int column, uint32_t to) const {
    // From a thread's chunk to its next one, in the same row or in the next one that it has.
    constexpr int kAlong = kThreads * 16, kLast = (kGoes<kChunks> - 1) * kThreads;
    const auto go_on = [&](int chunk, int64_t step) {
      start += chunk < kLast ? kAlong : step - kLast * 16;
    };
    if (even) {
      each_chunk<kD, true, kChunks>([&](int, int chunk, uint32_t place) {
        copy_chunk_async(to + place, reinterpret_cast<const void*>(start));
        go_on(chunk, int64_t(x.stride) * kRowsAtOnce<kChunks>);
      });
    } else {
      constexpr int kBytes = sizeof(T);
      const int row_bytes = (x.dim - column) * kBytes;
      const int64_t step = x.step * (kRowsAtOnce<kChunks> * kBytes);
      each_chunk<kD, false, kChunks>([&](int row, int chunk, uint32_t place) {
        const int bytes = is_token(at + row) ? min(max(row_bytes - chunk * 16, 0), 16) : 0;
        copy_chunk<T>(to + place, bytes > 0 ? start : 0, 0, bytes, x.aligned);
        go_on(chunk, step);
      });
    }
  }
  ATTNEXT_DEVICE void copy_chunk_rows(int at, int stage) {
    const bool whole = is_whole(at), even = whole && even_wide;
    constexpr int kEntryChunks = Layout<T, kEntryWidth>::kChunks;
    if (gives() && !solves())
      copy_rows_of<kRaw, kRawChunks>(p.a, next_a, at, even, 0, tile(stage, 0));
    if constexpr (kFolded) {
      copy_rows_of<kEntryWidth>(p.raw, next_raw, at,
                                kIsWide && whole && is_even<kEntryChunks>(p.raw, 0), 0,
                                entries_tile(stage, 0));
    }
    if (sums()) {
      copy_rows_of<kRaw, kRawChunks>(p.b, next_b, at, even, 0, tile(stage, 1));
      if constexpr (kFolded) {
        copy_rows_of<kEntryWidth>(p.c, next_c, at,
                                  kIsWide && whole && is_even<kEntryChunks>(p.c, 0), 0,
                                  entries_tile(stage, 1));
      } else {
        copy_rows_of<kColumns>(p.c, next_c, at, whole && even_narrow, slice * kColumns,
                               tile(stage, 2));
      }
    }
    commit_copies();
  }

  // Each thread maps what it has copied: no barrier is due in between.
  template <int kD>
  ATTNEXT_DEVICE void map_rows(const ScanRows& x, int at, int column, uint32_t tile_at) const {
    if (x.map == FeatureMap::kIdentity) return;
    constexpr int kElems = Layout<T, kD>::kElems;
    each_chunk<kD, false>([&](int row, int chunk, uint32_t place) {
      if (!is_token(at + row)) return;  // rows of zeros stay
      const uint32_t where = tile_at + place;
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
    if constexpr (kExpanded || kFolded) return;
    if (gives() && !solves()) map_rows<kRaw>(p.a, at, 0, tile(stage, 0));
    if (sums()) {
      map_rows<kRaw>(p.b, at, 0, tile(stage, 1));
      if constexpr (kPullsBack) {  // only gradients have features there
        map_rows<kColumns>(p.c, at, slice * kColumns, tile(stage, 2));
      }
    }
  }

  ATTNEXT_DEVICE void expand(int at, int stage) const {
    if constexpr (kIsWide) {
      expand_part(at, stage);
    } else {
      expand_whole(at, stage);
    }
  }
  ATTNEXT_DEVICE void expand_whole(int at, int stage) const;
  ATTNEXT_DEVICE void expand_pairs(int at, int stage) const;
  ATTNEXT_DEVICE void expand_numbers(int at, int stage) const;
  ATTNEXT_DEVICE void expand_part(int at, int stage) const;
  template <class Store>
  ATTNEXT_DEVICE void make_features(uint32_t tile_at, int row, bool token, int f, int pieces,
                                    int dim, bool weighted, Store store) const;
  ATTNEXT_DEVICE static int wide_place(int f, int dim) {
    return f < 1 + dim * (dim + 3) / 2 ? f : -1;
  }
  ATTNEXT_DEVICE int state_row(int f) const {
    if constexpr (kExpanded && kIsWide) {
      return wide_place(part * kDim + f, p.b.dim);
    } else if constexpr (kExpanded) {
      return places()[f];
    } else {
      return f < p.b.dim ? f : -1;
    }
  }
  ATTNEXT_DEVICE int state_column(int f) const {
    if constexpr (kFolded && kIsWide) {
      return wide_place(f, p.c.dim);
    } else if constexpr (kFolded) {
      return place_of_feature(f, p.c.dim);
    } else {
      return f < p.c.dim ? f : -1;
    }
  }

  // ---- what is known of tokens -----------------------------------------------------------------

  struct Next {
    float decay[kPer];
    float2 number[kPer];
  };
  // The first warp reads them for all, a chunk ahead.
  ATTNEXT_DEVICE bool notes() const { return kGated && warp == 0; }
  // Whether the lane's i-th token is of the chunk: one may be shorter than a warp has lanes.
  ATTNEXT_DEVICE bool is_lanes(int i) const { return kChunk % 32 == 0 || lane * kPer + i < kChunk; }
  ATTNEXT_DEVICE void look_at(int at, Next& next) const;
  ATTNEXT_DEVICE void note(const Next& next, int buffer);

  // ---- the delta rule --------------------------------------------------------------------------

  ATTNEXT_DEVICE void replace_values(int at, int stage);
  ATTNEXT_DEVICE void replace_gradients(int at, int stage, const Rows& rows,
                                        float (&out)[1][kColumns / 8][4]);
  ATTNEXT_DEVICE void find_key_products(int stage, int operand, const Rows& rows,
                                        float (&by_key)[1][kChunk / 8][4]) const;
  ATTNEXT_DEVICE void solve(int stage, const float (&by_key)[1][kChunk / 8][4],
                            float (&u)[1][kColumns / 8][4]) const;
  ATTNEXT_DEVICE void substitute(const float (&low)[4], const float (&high)[4],
                                 float (&u)[kColumns / 8][4]) const;
  ATTNEXT_DEVICE float beta_of(int stage, int half) const {
    return numbers(stage, warp * 16 + half * 8 + g).entry;
  }
  ATTNEXT_DEVICE T& value(int stage, int row, int column) const {
    using Narrow = Layout<T, kColumns>;
    uint8_t* const from = memory + stage * S::kStage + 2 * S::kWide;
    return reinterpret_cast<T*>(from +
                                Narrow::at(row, column / Narrow::kElems))[column % Narrow::kElems];
  }

  // ---- outputs ---------------------------------------------------------------------------------

  // Whether products within the chunk are the block's.
  ATTNEXT_DEVICE bool is_within() const { return sums() && part == 0 && (!kFolded || slice == 0); }
  // A product with a masked score of 0 takes over a value that is not finite. Where there are such
  // values in a warp's own rows, it adds these up one by one.
  ATTNEXT_DEVICE bool are_own_rows_finite(int stage) const;
  ATTNEXT_DEVICE void find_own(const float (&scores)[kChunk / 8][4], float (&own)[2][4]) const;
  ATTNEXT_DEVICE void add_own_rows(int stage, const float (&scores)[kChunk / 8][4],
                                   float (&out)[kColumns / 8][4]) const;

  ATTNEXT_DEVICE void attend(int at, int stage);

  ATTNEXT_DEVICE void finish_scores(float (&scores)[kChunk / 8][4], int buffer,
                                    const Numbers (&mine)[2], int walked, float (&sum)[2]) const;

  ATTNEXT_DEVICE void expand_slice(int at, int stage) const;
  ATTNEXT_DEVICE float entry(uint32_t tile_at, int row, int i) const {
    using Raw = Layout<T, kEntryWidth>;
    const uint8_t* from = memory + (tile_at - shared);
    return Number<T>::widen(
        reinterpret_cast<const T*>(from + Raw::at(row, i / Raw::kElems))[i % Raw::kElems]);
  }

  ATTNEXT_DEVICE void times_slope(float (&scores)[1][kChunk / 8][4], int at, int stage, int walked,
                                  const Numbers (&mine)[2], float unit) const;

  ATTNEXT_DEVICE void fold(int at, int stage, const float (&out)[kColumns / 8][4],
                           const float (&scores)[1][kChunk / 8][4], const float (&factor)[2],
                           int walked);
  ATTNEXT_DEVICE void fold_wide(int at, int stage, const float (&out)[kColumns / 8][4],
                                const float (&scores)[1][kChunk / 8][4], const float (&factor)[2],
                                int walked);
  ATTNEXT_DEVICE void store_dot(int set, int row, float dot) const {
    if (is_token(row)) {
      p.dots[set * p.batch * p.tokens * p.heads + tokens().index(p, row)] = dot;
    }
  }
  // What of a row's features with their gradient is of the state: two lanes a row have a part each.
  ATTNEXT_DEVICE void of_state(int row, float dot) {
    dot += __shfl_xor_sync(~0u, dot, 16);
    if (lane < 16) store_dot(slice, row, dot);
  }
  ATTNEXT_DEVICE void add_within(int stage, const float (&scores)[1][kChunk / 8][4],
                                 const float (&factor)[2], int walked, float* room,
                                 float (&sum)[kEntryWidth / 2]) const;

  ATTNEXT_DEVICE void add_products_with_z(const Rows& rows, int first_feature,
                                          float (&by_z)[2]) const;
  ATTNEXT_DEVICE static void scale(float (&out)[kColumns / 8][4], const float (&factor)[2]) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[n][e] *= factor[e / 2];
    }
  }
  ATTNEXT_DEVICE float divide_by(float total, int row) const {
    const float moved = total < 0.f ? total - p.eps : total + p.eps;
    if (slice == 0 && t == 0 && is_token(row)) {
      static_cast<float*>(p.denominator.data)[tokens().offset(p.denominator, 1, row)] = moved;
    }
    return 1.f / moved;
  }

  // Of several blocks' sum: nothing is divided yet.
  ATTNEXT_DEVICE float store_part(float total, int row) const {
    if (t == 0 && slice == 0 && is_token(row)) {
      p.part_sums[part * p.batch * p.tokens * p.heads + tokens().index(p, row)] = total;
    }
    return 1.f;
  }

  ATTNEXT_DEVICE void finish(int at, int stage, float (&out)[1][kColumns / 8][4],
                             float (&factor)[1][2], const float (&self)[2]);

  // As they lie in the accumulators.
  template <class Out>
  ATTNEXT_DEVICE void store_numbers(const ScanRows& rows, int at,
                                    const float (&out)[kColumns / 8][4],
                                    const float (&factor)[2]) const;

  // visit(gradient, feature, column) for what the lane has of a row of features' gradients.
  template <class Visit>
  ATTNEXT_DEVICE void visit_raw(int row, int half, float (&out)[kColumns / 8][4],
                                Visit visit) const;
  // As the products have a feature.
  ATTNEXT_DEVICE static float round(float f) { return Number<T>::widen(Number<T>::narrow(f)); }
  // What a row's token gets from itself, which no decay has a part in, and may be large beside all
  // else: taken out of the scores.
  ATTNEXT_DEVICE void take_self(float (&scores)[kChunk / 8][4], float (&self)[2]) const;
  // From a row's gradient of features to that of what they are features of.
  ATTNEXT_DEVICE void pull_back(int at, int stage, int half, float factor, float self,
                                float (&out)[kColumns / 8][4]);
  // Of the rows' features with their gradient, which so far comes from the state: as pull_back
  // finds the dots, which are the same to the last bit where nothing comes from the chunk.
  ATTNEXT_DEVICE void note_state_dots(int at, float (&out)[kColumns / 8][4],
                                      const float (&factor)[2]) const;

  // ---- the state -------------------------------------------------------------------------------

  ATTNEXT_DEVICE void add_chunk(int stage);
  // What a token's row of c counts in the state, and its further entry.
  struct Weight {
    float by, entry;
  };
  ATTNEXT_DEVICE Weight weight_of(int stage, int row) const {
    Weight w = {1.f, 1.f};
    if constexpr (kGated) {
      const Numbers known = numbers(stage, row);
      const Totals all = totals(stage);
      if (decays()) w.by = power((all.decay - known.decay) + (all.rest - known.rest));
      if (is_on(Side::kB)) w.by *= known.factor, w.entry = known.entry;
    }
    return w;
  }
  // To z. All lanes of a quad know what is added.
  ATTNEXT_DEVICE void add_sum(int i, float kept, float more) const {
    if (t == 0) store_shared(z(i), __float_as_uint(fmaf(load_shared_float(z(i)), kept, more)));
  }
  // Of the features of an operand, times `unit`, to what is `kept`.
  ATTNEXT_DEVICE void add_products(int stage, int operand, float kept, float unit);
  ATTNEXT_DEVICE void add_sums(int stage) const;

  // The decays of a chunk's tokens scale, besides what passes between the tokens, what reaches them
  // from the state before, what they leave to the one after it, and what passes by them: the state
  // before, decayed, with the gradient of the one after. In the order of tokens states are left for
  // the scan against it. Each is a sum by itself: no difference of large ones. What tokens leave is
  // the sum of their keys' dots with the state's gradient, of which dots of all that keys get are
  // taken off token by token: where they are alike, no rounding must be left.
  static constexpr int kLeft = kDim / 8 + 1;  // float4 of a thread, the last for z
  ATTNEXT_DEVICE int64_t boundary(int64_t chunk) const {
    return (int64_t(head) * p.slices + slice) * p.chunks + tokens().first_chunk + chunk;
  }
  ATTNEXT_DEVICE float4* left_at(int64_t chunk) const {
    return reinterpret_cast<float4*>(p.boundaries) + boundary(chunk) * kLeft * kThreads +
           threadIdx.x;
  }
  ATTNEXT_DEVICE void leave(int c) const;
  ATTNEXT_DEVICE void meet(int c, int stage) const;

  // Of 16 bits it has a column's numbers of 32 features as right operands of two products have them
  // in lanes: those of lane t are 16 bytes. fp32 is in tiles as a and b are.
  static constexpr int kBlock = 32, kBlockBytes = kColumns * kBlock * 2;
  ATTNEXT_DEVICE uint32_t block_of_state(int feature, int column) const {
    return shared + S::kStateAt + feature / kBlock * kBlockBytes + column * (kBlock * 2) + t * 16;
  }
  template <bool kRest = false>
  ATTNEXT_DEVICE void copy_state() const;
  // out += rows x the copy, of a panel's features
  ATTNEXT_DEVICE void add_state_product(float (&out)[1][kColumns / 8][4], const Rows& rows,
                                        int panel) const;

  // visit(i, offset of the number in a tensor of states) for the thread's real numbers of z.
  template <class Visit>
  ATTNEXT_DEVICE void each_z(Visit visit) const;
  // visit(n, e, offset of the number in a tensor of states) for the lane's real numbers of S.
  template <class Visit>
  ATTNEXT_DEVICE void each_state(Visit visit) const;
  ATTNEXT_DEVICE int64_t state_of(int32_t segments) const {
    const int64_t which = segments > 1 ? int64_t(sequence) * segments + segment : sequence;
    return (which * p.heads + head) * p.state_size;
  }

  ATTNEXT_DEVICE void find_places() const;
  ATTNEXT_DEVICE void load_state();
  ATTNEXT_DEVICE void store_state() const;
};

#define ATTNEXT_SCAN_MEMBER                                \
  template <class T, int kDim, int kWarps, ScanKind kKind> \
  ATTNEXT_DEVICE

}  // namespace cuda
}  // namespace attnext
