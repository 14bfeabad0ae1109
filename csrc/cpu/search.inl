// SPDX-License-Identifier: Apache-2.0
// The search of routers: products of keys, read where they lie, with queries in the lanes, of which
// only the largest leaves the registers' neighbourhood.
#pragma once

#include "keywalk.inl"
#include "search.h"
#include "tile.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

template <class T>
class Search {
 public:
  using Acc = AccOf<typename ElemOf<T>::type>;
  using Vec = VecOf<Acc>;
  using Int = IntOf<Acc>;
  static constexpr int kLanes = Simd<Acc>::kLanes;
  static constexpr bool kInPlace = Same<T, Acc>::value;
  static constexpr int64_t kBlock = 64;     // keys whose products stay in L1; whole vectors
  static constexpr int64_t kMostAsked = 8;  // lines of a key
  static constexpr int64_t kFewSamples = kLanes >= 8 ? 2 : 1;  // most lanes would be idle

  Search(const SearchParams& params, void* scratch) : p(params), arena(scratch) {
    width = (p.samples + kLanes - 1) / kLanes * kLanes;
    columns = arena.template take<Acc>(p.dim * width);
    reach = arena.template take<Lane>(width);
    keys = arena.template take<const Acc*>(kBlock);
    products = arena.template take<Acc>(kBlock * 2 * kLanes);
    largest = arena.template take<Acc>(kBlock * kLanes);
    if (p.samples <= kFewSamples) row = arena.template take<Acc>(p.dim + kLanes);
    if (!kInPlace) staged = arena.template take<Acc>(kBlock * p.dim);
  }
  int64_t scratch_bytes() const { return arena.used(); }

  void run(int64_t b, int64_t h, int64_t row) {
    const int64_t list = (b * p.heads + h) * p.rows + row;
    take_queries(static_cast<const Acc*>(p.query) + list * p.samples * p.dim,
                 p.reach + row * p.samples);
    const T* head = static_cast<const T*>(p.key.data) + b * p.key.batch + h / p.group * p.key.head;
    const int64_t* at = p.at + list * p.places;
    Acc* out = static_cast<Acc*>(p.products) + list * p.places;
    if (row == 0) ask_for(head, at, min64(kBlock, p.places));
    for (int64_t j = 0; j < p.places; j += kBlock) {
      const int64_t count = min64(kBlock, p.places - j);
      // The keys of the next block, be it of the next list, are on their way meanwhile.
      const int64_t after = j + kBlock < p.places ? j + kBlock : p.places;
      const int64_t rest = after < p.places ? p.places - after : (row + 1 < p.rows) * p.places;
      ask_for(head, at + after, min64(kBlock, rest));
      take_keys(head, at + j, count);
      if (p.samples <= kFewSamples) {
        one_by_one(at + j, count, out + j);
        continue;
      }
      for (int64_t m = 0; m < kBlock; ++m) store(largest + m * kLanes, broadcast(Acc(p.lowest)));
      Int nan = {};
      int64_t lane = 0;
      for (; lane + kLanes < width; lane += 2 * kLanes) nan |= meet<2>(lane, at + j, count);
      if (lane < width) nan |= meet<1>(lane, at + j, count);
      reduce(count, out + j);
      bool any = false;
      for (int l = 0; l < kLanes; ++l) any |= nan[l] != 0;
      if (any) spoil(at + j, count, out + j);
    }
  }

 private:
  using Lane = typename Simd<Acc>::Lane;

  void take_queries(const Acc* query, const int64_t* seen) {
    for (int64_t i = 0; i < width; i += kLanes) {
      const int64_t real = min64(p.samples - i, kLanes);
      int64_t c = 0;
      if (real == kLanes) {
        for (; c + kLanes <= p.dim; c += kLanes) {
          transpose_block(query + i * p.dim + c, p.dim, columns + c * width + i, width);
        }
      }
      for (; c < p.dim; ++c) {
        for (int64_t l = 0; l < kLanes; ++l) {
          columns[c * width + i + l] = l < real ? query[(i + l) * p.dim + c] : Acc(0);
        }
      }
      for (int64_t l = 0; l < kLanes; ++l) {
        reach[i + l] = l < real ? static_cast<Lane>(clamp64(seen[i + l], -1, p.num_keys)) : -1;
      }
    }
  }
  int64_t place(int64_t at) const { return clamp64(at, 0, p.num_keys - 1); }

  void ask_for(const T* head, const int64_t* at, int64_t count) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    const int64_t size = min64(p.dim, kMostAsked * kLine);
    for (int64_t m = 0; m < count; ++m) {
      const T* key = head + place(at[m]) * p.key.token[2];
      for (int64_t c = 0; c < size; c += kLine) __builtin_prefetch(key + c, 0, 2);
    }
  }

  void take_keys(const T* head, const int64_t* at, int64_t count) {
    for (int64_t m = 0; m < count; ++m) {
      const T* row = head + place(at[m]) * p.key.token[2];
      if constexpr (kInPlace) {
        keys[m] = row;
      } else {
        Acc* to = staged + m * p.dim;
        int64_t c = 0;
        for (; c + kLanes <= p.dim; c += kLanes) store(to + c, widen(row + c));
        for (; c < p.dim; ++c) to[c] = widen_one(row[c]);
        keys[m] = to;
      }
    }
  }
  static Acc widen_one(T x) {
    T several[kLanes] = {x};
    return widen(several)[0];
  }

  // Products with the N vectors of queries from a lane on; lanes that have met a NaN.
  template <int N>
  Int meet(int64_t lane, const int64_t* at, int64_t count) {
    scores<Acc, N>(keys, 0, count, p.dim, columns + lane, width, products, N * kLanes);
    Int seen[N], nan = {};
    for (int n = 0; n < N; ++n) memcpy(&seen[n], reach + lane + n * kLanes, sizeof(Int));
    for (int64_t m = 0; m < count; ++m) {
      Vec best = load(largest + m * kLanes);
      const Lane key = static_cast<Lane>(place(at[m]));
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        const Vec x = load(products + (m * N + n) * kLanes);
        const Vec met = seen[n] >= key ? x : broadcast(Acc(p.lowest));
        nan |= met != met;
        best = max_or_second(met, best);
      }
      store(largest + m * kLanes, best);
    }
    return nan;
  }

  void one_by_one(const int64_t* at, int64_t count, Acc* out) {
    bool nan[kBlock] = {};
    for (int64_t m = 0; m < count; ++m) out[m] = Acc(p.lowest);
    for (int64_t s = 0; s < p.samples; ++s) {
      memset(row, 0, sizeof(Acc) * (p.dim + kLanes));
      for (int64_t c = 0; c < p.dim; ++c) row[c] = columns[c * width + s];
      row_scores<Acc>(keys, 0, count, p.dim, row, products, 1);
      for (int64_t m = 0; m < count; ++m) {
        if (reach[s] < place(at[m])) continue;
        nan[m] |= products[m] != products[m];
        out[m] = products[m] > out[m] ? products[m] : out[m];
      }
    }
    for (int64_t m = 0; m < count; ++m) out[m] = nan[m] ? Acc(p.lowest) : out[m];
  }

  void reduce(int64_t count, Acc* out) {
    for (int64_t m = 0; m < count; m += kLanes) {
      Vec r[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) r[i] = load(largest + (m + i) * kLanes);
      transpose_vectors<Acc>(r);
      Vec best = r[0];
#pragma GCC unroll 16
      for (int i = 1; i < kLanes; ++i) best = max_or_second(r[i], best);
      if (m + kLanes <= count) {
        store(out + m, best);
      } else {
        for (int64_t i = m; i < count; ++i) out[i] = best[i - m];
      }
    }
  }

  // A key with a NaN among its products is below all others.
  void spoil(const int64_t* at, int64_t count, Acc* out) const {
    for (int64_t m = 0; m < count; ++m) {
      for (int64_t i = 0; i < p.samples; ++i) {
        Acc x = 0;
        for (int64_t c = 0; c < p.dim; ++c) x += columns[c * width + i] * keys[m][c];
        if (reach[i] >= place(at[m]) && x != x) out[m] = Acc(p.lowest);
      }
    }
  }

  const SearchParams& p;
  Arena arena;
  int64_t width;
  Acc *columns, *products, *largest, *row = nullptr, *staged = nullptr;
  Lane* reach;
  const Acc** keys;
};

template <class T>
struct SearchEntry {
  static int64_t scratch(const SearchParams& p) { return Search<T>(p, nullptr).scratch_bytes(); }
  static void largest_products(const SearchParams& p, int64_t b, int64_t h, int64_t row,
                               void* scratch) {
    Search<T>(p, scratch).run(b, h, row);
  }
  static constexpr SearchKernels table() { return {scratch, largest_products}; }
};

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
