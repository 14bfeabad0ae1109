// SPDX-License-Identifier: Apache-2.0
// Decays within a chunk, and their gradients.
#pragma once

#include "linear.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

// Cumulative decays of a chunk, in powers of two and in double: a difference of two is exact
// beside a number of the accumulator's precision, whatever has gone by before.
template <class Acc>
struct ChunkDecay {
  double* until;    // [tokens], its own included
  Acc* from_start;  // [tokens] 2^until
  Acc* to_end;      // [tokens] 2^(total - until)
  double total = 0;

  ChunkDecay(Scratch<Acc>& arena, int64_t chunk)
      : until(reinterpret_cast<double*>(arena.take(2 * chunk))),
        from_start(arena.take(chunk)),
        to_end(arena.take(chunk)) {}

  void read(const Acc* log, int64_t step, int64_t count, int64_t width) {
    constexpr int64_t kLanes = Simd<Acc>::kLanes;
    constexpr double kLeast = -1000;  // its exponential is 0 in double; -inf would leave NaN
    total = 0;
    for (int64_t t = 0; t < count; ++t) {
      const double g = log[t * step];
      total += (g < kLeast ? kLeast : g) * kLog2E;
      until[t] = total;
    }
    for (int64_t t = 0; t < width; ++t) {
      from_start[t] = Acc(until[min64(t, count - 1)]);
      to_end[t] = Acc(total - until[min64(t, count - 1)]);
    }
    for (int64_t t = 0; t < width; t += kLanes) {
      store(from_start + t, power<Acc>(load(from_start + t)));
      store(to_end + t, power<Acc>(load(to_end + t)));
    }
  }
  // How much of token j is left at token i, for a row of lanes j; nothing where j > i.
  void weights(int64_t i, int64_t width, Acc* out) const {
    constexpr int64_t kLanes = Simd<Acc>::kLanes;
    for (int64_t j = 0; j <= i; ++j) out[j] = Acc(until[i] - until[j]);
    for (int64_t j = i + 1; j < width; ++j) out[j] = 0;
    for (int64_t j = 0; j < width; j += kLanes) store(out + j, power<Acc>(load(out + j)));
  }
};

// The decay of token t scales every pair around it: keys before it (in the chunk or in the state)
// with queries from it on (in the chunk or behind it). Sums in double, since pairs come and go.
template <class Acc>
struct DecayGradient {
  Acc* queries = nullptr;  // [tokens]: what a query's pairs with the state before the chunk say
  Acc* keys = nullptr;     // and a key's with the queries behind it

  DecayGradient(Scratch<Acc>& arena, int64_t chunk, bool there) : chunk_(chunk) {
    if (!there) return;
    queries = arena.take(2 * chunk);
    keys = queries + chunk;
    pairs_ = reinterpret_cast<double*>(arena.take(6 * chunk));
  }

  void begin() {
    for (int64_t i = 0; i < 2 * chunk_; ++i) queries[i] = 0, pairs_[i] = 0;
  }
  // Pairs of query i with keys [j, j + n): all decays after the key, up to the query, scale them.
  void count(int64_t i, int64_t j, int64_t n, const Acc* row) {
    for (int64_t l = j; l < j + n; ++l) {
      pairs_[i] += row[l];
      pairs_[chunk_ + l] += row[l];
    }
  }
  // `through`: what pairs of keys before the chunk and queries behind it say, of every token. Of
  // pairs within, sums from both ends: where only one is finite, the other has met pairs that the
  // decay does not scale.
  void store(double through, int64_t count, Acc* out, int64_t step) {
    double* const read = pairs_ + 2 * chunk_;
    double earlier = 0, of_keys = 0, later = 0, of_queries = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double more = pairs_[chunk_ + i] - pairs_[i];
      pairs_[chunk_ + i] = more;
      pairs_[i] = earlier;
      read[i] = of_keys;
      earlier += more;
      of_keys += keys[i];
    }
    for (int64_t i = count - 1; i >= 0; --i) {
      of_queries += queries[i];
      later -= pairs_[chunk_ + i];
      const bool is_finite = pairs_[i] - pairs_[i] == 0;
      out[i * step] = Acc(through + (is_finite ? pairs_[i] : later) + of_queries + read[i]);
    }
  }

 private:
  int64_t chunk_;
  double* pairs_ = nullptr;  // [3][tokens]: sums over the pairs of a query, of a key; a room
};

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
