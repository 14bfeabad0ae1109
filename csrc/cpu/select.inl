// SPDX-License-Identifier: Apache-2.0
// Scores of candidates, with rows of queries in the lanes, one sample of each after the other.
#pragma once

#include "keywalk.inl"
#include "linear.inl"
#include "select.h"
#include "tile.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

template <class T>
class Select {
 public:
  using Acc = AccOf<typename ElemOf<T>::type>;
  using Vec = VecOf<Acc>;
  using Int = IntOf<Acc>;
  using Lane = typename Simd<Acc>::Lane;
  static constexpr int kLanes = Simd<Acc>::kLanes;
  static constexpr int64_t kRowsOfTile = 2 * kLanes;
  static constexpr int64_t kBlock = 128;  // candidates whose products stay in L1
  static constexpr int64_t kFewRows = kLanes >= 8 ? kLanes / 4 : 1;

  Select(const SelectParams& params, void* scratch) : p(params), arena(scratch) {
    columns = arena.template take<Acc>(p.dim * kRowsOfTile);
    row = arena.template take<Acc>(p.dim + kLanes);
    keys = arena.template take<const Acc*>(kBlock);
    products = arena.template take<Acc>(kBlock * kRowsOfTile);
    table = arena.template take<Acc>(whole(p.num_products) * kRowsOfTile);
    if (grouped()) sums = arena.template take<Acc>(whole(p.num_candidates) * kRowsOfTile);
  }
  int64_t scratch_bytes() const { return arena.used(); }

  void run(int64_t b, int64_t list, int64_t first_row, int64_t num_rows, int64_t seen, Acc* out) {
    first = first_row, count = num_rows;
    lanes = count > kLanes ? 2 * kLanes : kLanes;
    int64_t met = grouped() ? 0 : seen;
    for (int64_t r = 0; grouped() && r < count; ++r) {
      const int64_t end = p.each_end ? p.each_end[first + r] : p.num_products;
      met = max64(met, min64(end, p.num_products));
    }
    if (p.score != Score::kDot) {
      const Vec none = broadcast(p.score == Score::kMaxQ ? Acc(-INFINITY) : Acc(0));
      for (int64_t i = 0; i < met * lanes; i += kLanes) store(table + i, none);
    }
    for (int64_t s = 0; s < p.samples; ++s) {
      const int64_t h = head_of(list, s);
      const int64_t real = take_queries(b, h, s);
      take_factors(b, h, s, real);
      const Acc* key = static_cast<const Acc*>(p.candidate.data) + b * p.candidate.batch +
                       h / (p.heads / p.kv_heads) * p.candidate.head;
      for (int64_t j = 0; j < met; j += kBlock) {
        const int64_t n = min64(kBlock, met - j);
        for (int64_t m = 0; m < n; ++m) keys[m] = key + (j + m) * p.candidate.token[2];
        if (p.score == Score::kDot) {
          multiply(n, table + j * lanes);
        } else {
          multiply(n, products);
          add(j, n);
        }
      }
    }
    if (grouped()) share_out(seen, met);
    lay_down(grouped() ? sums : table, seen, out);
  }

 private:
  static int64_t whole(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
  bool grouped() const { return p.score == Score::kGroupProb; }
  int64_t head_of(int64_t list, int64_t s) const {
    switch (p.score) {
      case Score::kReluWsum:
        return s;
      case Score::kGroupProb:
        return list * p.samples + s;
      default:
        return list;
    }
  }

  // columns[dim][lanes] = scale * sample s of each row; how many rows have one.
  int64_t take_queries(int64_t b, int64_t h, int64_t s) {
    const bool of_tokens = p.score == Score::kMaxQ;
    const int64_t step = of_tokens ? p.samples : 1, token = first * step + (of_tokens ? s : 0);
    int64_t real = count;
    while (real > 0 && token + (real - 1) * step >= p.tokens) --real;
    const T* from = static_cast<const T*>(p.query.data) + b * p.query.batch + h * p.query.head +
                    token * p.query.token[2];
    if (real < lanes) memset(columns, 0, sizeof(Acc) * p.dim * lanes);
    pack_lanes<FeatureMap::kIdentity, T, Acc>(from, step * p.query.token[2], real, p.dim, columns,
                                              lanes);
    if (p.scale != 1) {
      const Acc by = Acc(p.scale);
      for (int64_t i = 0; i < p.dim * lanes; i += kLanes)
        store(columns + i, load(columns + i) * by);
    }
    return real;
  }

  void take_factors(int64_t b, int64_t h, int64_t s, int64_t real) {
    for (int64_t r = 0; r < lanes; ++r) {
      ends[r] = 0;
      factors[r] = 0;
      if (r >= real) continue;
      const int64_t at = p.score == Score::kMaxQ ? (first + r) * p.samples + s : first + r;
      ends[r] = static_cast<Lane>(p.each_end ? p.each_end[at] : p.num_products);
      if (!p.factor) continue;
      factors[r] = static_cast<const Acc*>(p.factor)[(b * p.rows + first + r) * p.heads + h];
      // Who attends nothing gives no weight.
      if (p.score == Score::kGroupProb && factors[r] == Acc(-INFINITY)) factors[r] = Acc(INFINITY);
    }
  }

  void multiply(int64_t n, Acc* out) {
    if (count <= kFewRows) {
      memset(row, 0, sizeof(Acc) * (p.dim + kLanes));
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t c = 0; c < p.dim; ++c) row[c] = columns[c * lanes + r];
        row_scores<Acc>(keys, 0, n, p.dim, row, out + r, lanes);
      }
    } else if (lanes == kLanes) {
      scores<Acc, 1>(keys, 0, n, p.dim, columns, lanes, out, lanes);
    } else {
      scores<Acc, 2>(keys, 0, n, p.dim, columns, lanes, out, lanes);
    }
  }

  // Products with one sample, to the table.
  void add(int64_t j, int64_t n) {
    for (int64_t l = 0; l < lanes; l += kLanes) {
      const Vec factor = load(factors + l);
      Int end;
      memcpy(&end, ends + l, sizeof(Int));
      for (int64_t m = 0; m < n; ++m) {
        const Vec x = load(products + m * lanes + l);
        Acc* const to = table + (j + m) * lanes + l;
        const Vec before = load(to);
        Vec after;
        if (p.score == Score::kMaxQ) {
          const Vec met = end > static_cast<Lane>(j + m) ? x : broadcast(Acc(-INFINITY));
          const Vec more = max_or_second(before, met);  // met, if either is NaN
          after = before != before ? before : more;
        } else if (p.score == Score::kReluWsum) {
          after = before + factor * (x < 0 ? Vec{} : x);
        } else {
          const Vec level = (x - factor) * Acc(kLog2E);
          const Vec weight = level > Acc(127) ? broadcast(Acc(INFINITY)) : exp2(level);
          after = before + (end > static_cast<Lane>(j + m) ? weight : Vec{});
        }
        store(to, after);
      }
    }
  }

  // Of windows to the blocks that they overlap.
  void share_out(int64_t seen, int64_t met) {
    const Acc* share = static_cast<const Acc*>(p.share);
    for (int64_t c = 0; c < seen; ++c) {
      for (int64_t l = 0; l < lanes; l += kLanes) {
        Vec sum{};
        for (int64_t s = c * p.slots; s < (c + 1) * p.slots; ++s) {
          if (p.overlap[s] >= 0 && p.overlap[s] < met)
            sum += load(table + p.overlap[s] * lanes + l) * share[s];
        }
        store(sums + c * lanes + l, sum);
      }
    }
  }

  void lay_down(const Acc* from, int64_t seen, Acc* out) {
    for (int64_t l = 0; l < lanes; l += kLanes) {
      const int64_t real = min64(kLanes, count - l);
      for (int64_t c = 0; c < seen; c += kLanes) {
        Vec r[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) r[i] = load(from + (c + i) * lanes + l);
        transpose_vectors<Acc>(r);
        Acc* const to = out + l * p.num_candidates + c;
        if (c + kLanes <= p.num_candidates) {
          for (int64_t i = 0; i < real; ++i) store(to + i * p.num_candidates, r[i]);
        } else {
          for (int64_t i = 0; i < real; ++i) {
            memcpy(to + i * p.num_candidates, &r[i], sizeof(Acc) * (p.num_candidates - c));
          }
        }
      }
    }
  }

  const SelectParams& p;
  Arena arena;
  int64_t first, count, lanes;
  Acc *columns, *row, *products, *table, *sums = nullptr;
  const Acc** keys;
  alignas(64) Acc factors[kRowsOfTile];
  alignas(64) Lane ends[kRowsOfTile];
};

inline uint32_t count_of(int32_t x) { return static_cast<uint32_t>(x); }
inline uint64_t count_of(int64_t x) { return static_cast<uint64_t>(x); }

// Halves the range of the last number that is kept: counting takes no branches, as sorting would.
template <class Acc>
struct BestPlaces {
  using Key = typename Simd<Acc>::Lane;
  using Count = decltype(count_of(Key()));

  static void run(const Acc* numbers, int64_t n, int64_t count, Key* keys, int64_t* places) {
    constexpr Key kMagnitude = static_cast<Key>(~Count(0) >> 1);
    for (int64_t i = 0; i < n; ++i) {
      const Acc x = numbers[i] + Acc(0);  // -0 is 0
      Key bits;
      memcpy(&bits, &x, sizeof(bits));
      keys[i] = bits ^ ((bits >> (sizeof(Key) * 8 - 1)) & kMagnitude);  // in the order of numbers
    }
    Key low = keys[0], high = keys[0];
    for (int64_t i = 1; i < n; ++i) {
      low = keys[i] < low ? keys[i] : low;
      high = keys[i] > high ? keys[i] : high;
    }
    // The largest key that `count` or more reach.
    Key least = low;
    Count reach = static_cast<Count>(n), width = static_cast<Count>(high) - static_cast<Count>(low);
    while (width > 0 && reach != static_cast<Count>(count)) {
      const Count step = width - width / 2;
      const Key middle = static_cast<Key>(static_cast<Count>(least) + step);
      Count found = 0;
      for (int64_t i = 0; i < n; ++i) found += keys[i] >= middle;
      if (found >= static_cast<Count>(count)) {
        least = middle;
        reach = found;
        width -= step;
      } else {
        width = step - 1;
      }
    }
    Count above = 0;
    for (int64_t i = 0; i < n; ++i) above += keys[i] > least;
    int64_t equal = count - static_cast<int64_t>(above), last = 0;
    for (int64_t i = 0; i < n && last < count; ++i) {
      const bool same = keys[i] == least;
      places[last] = i;
      last += (keys[i] > least) | (same & (equal > 0));
      equal -= same;
    }
  }
};

template <class T>
struct SelectEntry {
  using Acc = typename Select<T>::Acc;
  static int64_t scratch(const SelectParams& p) { return Select<T>(p, nullptr).scratch_bytes(); }
  static void scores(const SelectParams& p, int64_t b, int64_t list, int64_t first, int64_t count,
                     int64_t seen, void* out, void* scratch) {
    Select<T>(p, scratch).run(b, list, first, count, seen, static_cast<Acc*>(out));
  }
  static void best_places(const void* numbers, int64_t n, int64_t count, void* scratch,
                          int64_t* places) {
    using Best = BestPlaces<Acc>;
    Best::run(static_cast<const Acc*>(numbers), n, count, static_cast<typename Best::Key*>(scratch),
              places);
  }
  static constexpr SelectKernels table() {
    return {Select<T>::kRowsOfTile, scratch, scores, best_places};
  }
};

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
