// SPDX-License-Identifier: Apache-2.0
// Outputs of linear attention, a chunk at a time:
//   out = scores within the chunk, masked, times values + features of queries times the state.
//
// Products are of numbers or, where `Elem` says so, of pairs of bf16. Queries, keys and values that
// are bf16 are exact as such; features, scores and the state, which is kept in fp32, are rounded as
// they enter a product. What decays multiply would be rounded once more, so that sums of states are
// then of numbers.
#pragma once

#include "linear_delta.inl"
#include "linear_pairs.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

// Features of elu have more digits than the entries they are made of, and two of them are in every
// score. Tiles of matrices are too fast for that.
template <class Elem>
constexpr bool scores_of_numbers(FeatureMap map) {
  return Contraction<Elem>::kDepth == 2 && !kInTiles<Elem> && map == FeatureMap::kElu;
}

template <class T, class Elem = LinearAcc<T>>
class LinearForward : public LinearHead<T> {
 public:
  using Head = LinearHead<T>;
  using Acc = typename Head::Acc;
  using Head::chunk, Head::columns, Head::decays, Head::features, Head::item, Head::kLanes,
      Head::ld, Head::p, Head::taylor, Head::width;

  LinearForward(const LinearParams& params, const LinearItem& work, void* scratch)
      : Head(params, work),
        row_ld_(whole_vectors<Acc>(params.head_dim)),
        arena_(scratch),
        decay_(arena_, ld) {
    const int64_t dim = p.head_dim;
    // Taylor features have tokens in the lanes; all others are rows, and so are queries then. Keys
    // are in lanes as scores want them.
    q_ = arena_.take(taylor() ? dim * ld : chunk * row_ld_);
    k_ = arena_.take(dim * ld);
    qf_ = taylor() ? arena_.take(features * ld) : q_;
    kf_ = arena_.take(taylor() ? features * ld : chunk * row_ld_);
    v_ = arena_.take(chunk * width);
    out_ = arena_.take((kOwnPairs ? tiles::round_up(chunk, 2 * tiles::kSide) : chunk) * width);
    scores_ = arena_.take(chunk * ld);
    sum_ = arena_.take(ld);
    weights_ = arena_.take(ld);
    query_room_ = room(max64((dim + 1) * ld, chunk * row_ld_));
    key_room_ = room((dim + 1) * ld);
    value_room_ = room((chunk + 1) * width);
    score_room_ = room(chunk * ld);
    state_room_ = room((features + 1) * width);
    feature_room_ = room(max64((features + 1) * ld, (chunk + 1) * row_ld_));
    if (kOwnPairs) key_sums_ = arena_.take(row_ld_);
    if (constant_apart()) constants_ = arena_.take(chunk * width);
    if (p.delta()) {
      keys_ = arena_.take(chunk * ld);
      beta_ = arena_.take(ld);
      u_ = arena_.take(chunk * width);
      earlier_ = arena_.take(kRows * width);
    }
  }
  int64_t scratch_bytes() const { return arena_.bytes(); }

  void forward(LinearWalk* walks, int64_t heads, bool keep) {
    for (int64_t t = item.begin; t < item.end; t += chunk) {
      for (int64_t i = 0; i < heads; ++i) {
        const bool is_last = i + 1 == heads;
        item = walks[i].item;
        look_ahead(t, &walks[is_last ? 0 : i + 1].item, is_last ? t + chunk : t, true);
        forward_chunk(&walks[i], t, keep);
      }
    }
    for (int64_t i = 0; i < heads; ++i) {
      this->factor(static_cast<Acc*>(walks[i].local)) = power_of<Acc>(walks[i].gone);
    }
  }

  void sum_keys(Acc* local, bool fresh) {
    double gone = 0;
    for (int64_t t = item.begin; t < item.end; t += chunk) {
      const int64_t count = min64(chunk, item.end - t);
      next_state(t, count, fresh ? nullptr : local, local);
      fresh = false;
      gone += chunk_decay();
    }
    this->factor(local) = power_of<Acc>(gone);
  }

  // The state after a chunk, from the one before it, which may be null, and where that is, too.
  void next_state(int64_t t, int64_t count, const Acc* state, Acc* to) {
    pack_keys(t, count, state, false);
    look_ahead(t, &item, t + chunk, false);
    Mix<Acc> mix = kept(state != nullptr);
    mix.from = state;
    add_chunk(count, to, mix);
  }
  double chunk_decay() const { return decays() ? decay_.total : 0; }

 private:
  static constexpr int64_t kBlock = kRowBlock<Elem>;  // rows of scores at a time
  // Rows of bf16 are operands of tiles as they are, but for features that have to be whole numbers
  // first: Taylor's, which are products, and what decays multiply.
  static constexpr bool kOwnPairs = kInTiles<Elem> && Same<T, bf16>::value;
  bool in_pairs() const {
    constexpr int64_t kMost = tiles::LeftFactors::kMost * tiles::kSpan;
    return kOwnPairs && !taylor() && !decays() && p.head_dim <= kMost && chunk <= kMost;
  }

  static constexpr int64_t kDepth = Contraction<Elem>::kDepth;
  // A constant feature is most of a Taylor product of small scores. Rounded to bf16 with the
  // others, in the state and in the scores, it alone would cost as much as an output's own
  // rounding; as a sum of values, which it is, it needs no product.
  bool constant_apart() const { return kDepth == 2 && taylor(); }
  Elem* room(int64_t numbers) {
    return kDepth == 1 ? nullptr : reinterpret_cast<Elem*>(arena_.take(numbers / kDepth + 1));
  }
  const Elem* enter(const Acc* state) {
    return state ? along_rows(state, features, width, width, state_room_) : nullptr;
  }

  void forward_chunk(LinearWalk* walk, int64_t t, bool keep) {
    const Acc* const carry = static_cast<const Acc*>(walk->carry);
    Acc* const local = static_cast<Acc*>(walk->local);
    // The state goes along with the local sum, unless it is the local sum.
    Acc* const running = carry ? static_cast<Acc*>(walk->running) : local;
    const int64_t count = min64(chunk, item.end - t);
    const bool first = t == item.begin, last = t + chunk >= item.end;
    const Acc* state = running;
    if (first || !p.causal) state = carry ? carry : walk->fresh ? nullptr : local;
    if (first || p.causal) read_ = enter(state);
    pack_queries(t, count, state);
    if (p.causal) pack_keys(t, count, state, true);
    attend(t, count, state);
    if (!p.causal) return;
    if (running == local || last) {
      if (keep || !last) add_chunk(count, local, kept(!walk->fresh));
    } else {
      Mix<Acc> mix = kept(true);
      mix.from = state;
      if (keep) mix.also = local, mix.also_reads = !walk->fresh;
      add_chunk(count, running, mix);
    }
    walk->fresh = false;
    walk->gone += chunk_decay();
  }

  // Starts writing this chunk's outputs, and reading the next chunk.
  void look_ahead(int64_t t, const LinearItem* next, int64_t next_token, bool with_outputs) {
    ahead_.clear();
    if (with_outputs) {
      Head::look_ahead(&ahead_, item, p.out, t, p.heads, item.column, columns, true);
      Head::look_ahead(&ahead_, *next, p.query, next_token, p.query_heads, 0, p.head_dim, false);
    }
    if (!with_outputs || p.causal) {
      Head::look_ahead(&ahead_, *next, p.key, next_token, p.key_heads, 0, p.head_dim, false);
      Head::look_ahead(&ahead_, *next, p.value, next_token, p.value_heads, item.column, columns,
                       false);
    }
    int64_t tiles = count_tiles<Elem>(features, width);
    if (with_outputs) tiles += count_tiles<Elem>(chunk, width);
    if (with_outputs && p.causal) tiles += count_tiles<Elem>(chunk, ld);
    ahead_.pace(tiles);
  }

  void pack_queries(int64_t t, int64_t count, const Acc* state) {
    const T* query = this->template row<const T>(p.query, t, p.query_heads);
    if constexpr (kOwnPairs) {
      if (in_pairs()) return pack_query_pairs(count, query, state);
    }
    if (taylor()) {
      pack_lanes<FeatureMap::kIdentity>(query, this->step(p.query), count, p.head_dim, q_, ld);
      taylor_features(q_, this->inner_scale(), p.head_dim, ld, count, true, qf_);
    } else {
      pack_features(p.feature_map, query, this->step(p.query), count, p.head_dim, q_, row_ld_);
    }
  }

  // Also what the delta rule makes of the values, for which it needs the decays and the state.
  void pack_keys(int64_t t, int64_t count, const Acc* state, bool for_scores) {
    const T* key = this->template row<const T>(p.key, t, p.key_heads);
    if constexpr (kOwnPairs) {
      if (in_pairs()) return pack_key_pairs(t, count, key);
    }
    if (taylor()) {
      pack_lanes<FeatureMap::kIdentity>(key, this->step(p.key), count, p.head_dim, k_, ld);
    } else {
      pack_features(p.feature_map, key, this->step(p.key), count, p.head_dim, kf_, row_ld_);
      if (for_scores || p.delta()) {
        pack_lanes<FeatureMap::kIdentity>(kf_, row_ld_, count, p.head_dim, k_, ld);
      }
    }
    pack_rows<T, Acc>(this->template row<const T>(p.value, t, p.value_heads) + item.column,
                      this->step(p.value), count, columns, v_, width);
    if (decays()) {
      decay_.read(this->template row<const Acc>(p.decay, t, p.heads), this->step(p.decay), count,
                  whole_vectors<Acc>(count));
    }
    if (p.delta()) write_delta(t, count, state);
    value_ = along_rows(v_, count, width, width, value_room_);
  }

  // Sums for the normaliser are of features that are not rounded.
  void pack_query_pairs(int64_t count, const T* query, const Acc* state) {
    const int64_t step = this->step(p.query);
    const Acc* const sums = p.normalize && state ? this->sums(state) : nullptr;
    for (int64_t i = 0; p.normalize && i < count; ++i) sum_[i] = 0;
    if (are_pairs(p.feature_map, query, step, p.head_dim, row_ld_)) {
      query_ = {reinterpret_cast<const Elem*>(query), step / kDepth};
      if (sums) weigh_lanes(query, count, step, row_ld_, sums, sum_, Mix<Acc>{false});
      return;
    }
    VecOf<Acc> sum{};
    query_ = pair_features(p.feature_map, query, step, count, p.head_dim, query_room_, row_ld_,
                           [&](int64_t i, int64_t d, VecOf<Acc> x) {
                             if (!sums) return;
                             sum = x * load(sums + d) + (d > 0 ? sum : VecOf<Acc>{});
                             if (d + kLanes >= p.head_dim) sum_[i] = add_lanes<Acc>(sum);
                           });
  }
  void pack_key_pairs(int64_t t, int64_t count, const T* key) {
    const int64_t pairs = elements<Elem>(p.head_dim), step = this->step(p.key);
    if (are_pairs(p.feature_map, key, step, p.head_dim, row_ld_)) {
      key_ = {reinterpret_cast<const Elem*>(key), step / kDepth};
      if (p.normalize)
        weigh_rows<T, Acc>(key, count, step, row_ld_, nullptr, key_sums_, Mix<Acc>{false});
    } else {
      for (int64_t d = 0; d < row_ld_; ++d) key_sums_[d] = 0;
      key_ =
          pair_features(p.feature_map, key, step, count, p.head_dim, reinterpret_cast<Elem*>(kf_),
                        row_ld_, [&](int64_t, int64_t d, VecOf<Acc> x) {
                          if (p.normalize) store(key_sums_ + d, load(key_sums_ + d) + x);
                        });
    }
    turn_pairs(key_, count, pairs, key_room_, ld);
    part_pairs(key_room_, pairs, ld, count, feature_room_);
    join_rows(this->template row<const T>(p.value, t, p.value_heads) + item.column,
              this->step(p.value), count, columns, value_room_, width);
    value_ = value_room_;
  }

  void write_delta(int64_t t, int64_t count, const Acc* state) {
    const Acc* beta = this->template row<const Acc>(p.beta, t, p.heads);
    for (int64_t i = 0; i < count; ++i) beta_[i] = beta[i * this->step(p.beta)];
    const Acc* decay = decays() ? decay_.from_start : nullptr;
    if (state) subtract_read(k_, ld, features, count, decay, state, width, u_, v_);
    key_products(k_, ld, features, count, decays() ? &decay_ : nullptr, weights_, keys_);
    solve_lower(keys_, ld, count, beta_, v_, u_, earlier_, width);
    Acc* const values = v_;
    v_ = u_;
    u_ = values;
  }

  void attend(int64_t t, int64_t count, const Acc* state) {
    if constexpr (kOwnPairs) {
      if (in_pairs()) return attend_pairs(t, count, state);
    }
    if (taylor()) {
      attend<By::kColumns>(t, count, state, read_);
    } else {
      attend<By::kRows>(t, count, state, read_);
    }
  }
  // Queries and their features have tokens by columns, or by rows.
  template <By kTokens>
  void attend(int64_t t, int64_t count, const Acc* state, const Elem* read) {
    constexpr bool kInRows = kTokens == By::kRows;
    const int64_t lanes = whole_vectors<Acc>(count), dim = p.head_dim;
    const int64_t query_ld = kInRows ? row_ld_ / kDepth : ld;
    if (p.normalize) {
      for (int64_t i = 0; i < lanes; ++i) sum_[i] = 0;
      if (state && kInRows) {
        weigh_lanes(q_, count, row_ld_, row_ld_, this->sums(state), sum_, Mix<Acc>{false});
      } else if (state) {
        weigh_rows(qf_, features, ld, lanes, this->sums(state), sum_, Mix<Acc>{false});
      }
      if (state && decays()) scale_lanes(sum_, 1, 0, lanes, decay_.from_start);
    }
    if (constant_apart()) add_constants(count, state);
    const Elem *query, *feature;
    if constexpr (kInRows) {
      query = feature = along_lanes(q_, count, row_ld_, row_ld_, query_room_);
    } else {
      query = along_rows(q_, dim, ld, lanes, query_room_);
      feature = state ? along_rows(qf_, features, ld, lanes, feature_room_) : nullptr;
    }
    const bool whole = scores_of_numbers<Elem>(p.feature_map);
    const int64_t number_ld = kInRows ? row_ld_ : ld;
    const Elem* const key =
        p.causal && !whole ? along_rows(k_, dim, ld, lanes, key_room_) : nullptr;
    for (int64_t i = 0; p.causal && i < count; i += kBlock) {
      const int64_t rows = min64(kBlock, count - i), seen = whole_vectors<Acc>(i + rows);
      if (whole) {
        product<kTokens>(rows, seen, dim, tile_row<kTokens>(q_, number_ld, i), number_ld, k_, ld,
                         scores_ + i * ld, ld, false, &ahead_);
      } else {
        product<kTokens>(rows, seen, elements<Elem>(dim), tile_row<kTokens>(query, query_ld, i),
                         query_ld, key, ld, scores_ + i * ld, ld, false, &ahead_);
      }
      finish_scores(i, rows);
    }
    const Elem* const scores =
        p.causal ? along_lanes(scores_, count, ld, lanes, score_room_) : nullptr;
    const bool in_place = Same<T, Acc>::value && columns == width;
    T* const out = this->template row<T>(p.out, t, p.heads) + item.column;
    Acc* const to = in_place ? reinterpret_cast<Acc*>(out) : out_;
    const int64_t step = in_place ? this->step(p.out) : width;
    outputs<kTokens>(
        count, width,
        OutputTerms<Elem>{feature, query_ld, elements<Elem>(features), state ? read : nullptr,
                          decays() ? decay_.from_start : nullptr, scores, ld / kDepth, value_,
                          width, constants_, this->outer_scale()},
        to, step, &ahead_);
    if (p.normalize) divide(t, count, to, step);
    if (!in_place) store_outputs(t, count, out);
  }
  // The same of rows of pairs.
  void attend_pairs(int64_t t, int64_t count, const Acc* state) {
    const int64_t depth = elements<Elem>(p.head_dim);
    constexpr int64_t kRowsAtOnce = 2 * tiles::kSide;
    for (int64_t i = 0; p.causal && i < count; i += kRowsAtOnce) {
      const int64_t rows = min64(kRowsAtOnce, count - i), seen = whole_vectors<Acc>(i + rows);
      product<By::kRows>(rows, seen, depth, query_.at + i * query_.ld, query_.ld, key_room_, ld,
                         scores_ + i * ld, ld, false, &ahead_);
      finish_scores<true>(i, rows);
    }
    const Elem* const scores = p.causal ? score_room_ : nullptr;
    const Elem* const read = state ? read_ : nullptr;
    const Acc scale = this->outer_scale();
    tiles::outputs(count, width, depth, query_.at, query_.ld, read, scores, ld / kDepth, value_,
                   width, out_, width, &ahead_);
    if (all_finite(out_, count * width)) {
      if (scale != 1) scale_all(out_, 1, 0, count * width, scale);
    } else {  // a later row's number, times 0, may be in a sum
      outputs<By::kRows>(count, width,
                         OutputTerms<Elem>{query_.at, query_.ld, depth, read, nullptr, scores,
                                           ld / kDepth, value_, width, nullptr, scale},
                         out_, width, &ahead_);
    }
    if (p.normalize) divide(t, count, out_, width);
    store_outputs(t, count, this->template row<T>(p.out, t, p.heads) + item.column);
  }
  // out_, and what that loses.
  void store_outputs(int64_t t, int64_t count, T* out) {
    for (int64_t i = 0; i < count; ++i) {
      narrow_row(out_ + i * width, columns, out + i * this->step(p.out));
    }
    if (p.remainder.data) store_remainder(t, count, out);
  }
  void store_remainder(int64_t t, int64_t count, const T* out) {
    T* const remainder = this->template row<T>(p.remainder, t, p.heads) + item.column;
    for (int64_t i = 0; i < count; ++i) {
      const T* const rounded = out + i * this->step(p.out);
      Acc* const row = out_ + i * width;
      for (int64_t c = 0; c < columns; c += kLanes) {
        store(row + c, load(row + c) - widen_part<T, Acc>(rounded + c, columns - c));
      }
      narrow_row(row, columns, remainder + i * this->step(p.remainder));
    }
  }

  // constants_ = the sum of the values up to each token, decayed as the state is; of all, if it is
  // not causal. The queries' constant feature becomes 0.
  void add_constants(int64_t count, const Acc* state) {
    for (int64_t i = 0; i < ld; i += kLanes) store(qf_ + i, VecOf<Acc>{});
    const Acc* before = state;  // its first row
    for (int64_t i = 0; i < count; ++i) {
      Acc* const row = constants_ + i * width;
      const Acc left = decays() ? decay_.left_after(i) : Acc(1);
      for (int64_t c = 0; c < width; c += kLanes) {
        VecOf<Acc> sum = before ? load(before + c) * left : VecOf<Acc>{};
        if (p.causal) sum += load(v_ + i * width + c);
        store(row + c, sum);
      }
      before = row;
    }
  }

  // Scores of queries [first, first + rows) with the keys up to them: polynomial, decay, row sums.
  // Or rounded, as an operand, and then with zeros for the keys after them.
  template <bool kRounded = false>
  void finish_scores(int64_t first, int64_t rows) {
    if constexpr (kDepth == 1) {  // the product with values masks them itself
      if (!taylor() && !decays() && !p.normalize) return;
    }
    const Acc scale = this->inner_scale();
    for (int64_t i = first; i < first + rows; ++i) {
      Acc* row = scores_ + i * ld;
      const int64_t seen = whole_vectors<Acc>(i + 1);
      if (decays()) decay_.weights(i, seen, weights_);
      VecOf<Acc> total{};
      for (int64_t j = 0; j < seen; j += kLanes) {
        VecOf<Acc> s = load(row + j);
        VecOf<Acc> all = s;
        if (taylor()) {
          s *= scale;
          const VecOf<Acc> slope = s * Acc(0.5) + Acc(1);
          all = slope * s + Acc(1);
          s = constant_apart() ? slope * s : all;
        }
        if (decays()) s *= load(weights_ + j), all *= load(weights_ + j);
        if (j + kLanes > i + 1) {
          const uint64_t seen_bits = (uint64_t(2) << (i - j)) - 1;
          s = select_bits<Acc>(seen_bits, s, VecOf<Acc>{});
          all = select_bits<Acc>(seen_bits, all, VecOf<Acc>{});
        }
        if constexpr (kRounded) {
          narrow_quickly(reinterpret_cast<bf16*>(score_room_) + i * ld + j, s);
        } else {
          store(row + j, s);
        }
        total += all;
      }
      if constexpr (kRounded) {
        for (int64_t j = seen; j < whole_vectors<Acc>(first + rows); j += kLanes) {
          narrow_quickly(reinterpret_cast<bf16*>(score_room_) + i * ld + j, VecOf<Acc>{});
        }
      }
      if (p.normalize) sum_[i] += add_lanes<Acc>(total);
    }
  }

  // Outputs by their sums, away from zero by eps.
  void divide(int64_t t, int64_t count, Acc* out, int64_t step) {
    Acc* denominator = this->template row<Acc>(p.denominator, t, p.heads);
    for (int64_t i = 0; i < count; ++i) {
      const Acc sum = sum_[i] * this->outer_scale();
      const Acc moved = sum < 0 ? sum - Acc(p.eps) : sum + Acc(p.eps);
      denominator[i * this->step(p.denominator)] = moved;
      Acc* const row = out + i * step;
      const Acc inverse = 1 / moved;
      if (inverse - inverse == 0) {  // a division of vectors takes as long as eight products
        for (int64_t c = 0; c < width; c += kLanes) store(row + c, load(row + c) * inverse);
      } else {
        for (int64_t c = 0; c < width; c += kLanes) store(row + c, load(row + c) / moved);
      }
    }
  }

  // What is left of a state after the chunk.
  Mix<Acc> kept(bool reads) const {
    return {reads, decays() ? power_of<Acc>(decay_.total) : Acc(1)};
  }
  // Features of keys times values.
  void add_chunk(int64_t count, Acc* local, Mix<Acc> mix) {
    const int64_t lanes = whole_vectors<Acc>(count);
    if (taylor()) {
      taylor_features(k_, Acc(1), p.head_dim, ld, count, false, kf_);
      if (decays()) {
        scale_lanes(kf_, features, ld, lanes, decay_.to_end);
        this->template add_outer<By::kRows>(kf_, ld, kf_, v_, count, mix, local, nullptr, &ahead_);
      } else {
        const Elem* const feature = along_lanes(kf_, features, ld, lanes, feature_room_);
        this->template add_outer<By::kRows>(kf_, ld, feature, value_, count, mix, local, nullptr,
                                            &ahead_);
      }
    } else if (decays()) {
      for (int64_t i = 0; i < count; ++i) {
        scale_all(kf_ + i * row_ld_, 1, 0, row_ld_, decay_.to_end[i]);
      }
      this->template add_outer<By::kColumns>(kf_, row_ld_, kf_, v_, count, mix, local, nullptr,
                                             &ahead_);
    } else if (in_pairs()) {
      if constexpr (kOwnPairs) {
        product<By::kRows, false>(features, width, elements<Elem>(count), feature_room_,
                                  ld / kDepth, value_, width, local, width, mix, &ahead_);
        this->template add_sums<By::kColumns>(key_sums_, row_ld_, 1, mix, local, nullptr);
      }
    } else {
      const Elem* const key = along_rows(kf_, count, row_ld_, row_ld_, feature_room_);
      this->template add_outer<By::kColumns>(kf_, row_ld_, key, value_, count, mix, local, nullptr,
                                             &ahead_);
    }
  }

  const int64_t row_ld_;  // of rows of queries and keys
  [[no_unique_address]] tiles::SessionIf<kInTiles<Elem>> session_;
  Ahead ahead_;
  Scratch<Acc> arena_;
  ChunkDecay<Acc> decay_;
  Acc *q_, *k_, *qf_, *kf_, *v_, *out_, *scores_, *sum_, *weights_, *constants_ = nullptr;
  Acc *key_sums_ = nullptr, *keys_ = nullptr, *beta_ = nullptr, *u_ = nullptr, *earlier_ = nullptr;
  const Elem *value_ = nullptr, *read_ = nullptr;
  PairRows query_{}, key_{};  // of pairs
  // Room for operands as pairs; null for numbers.
  Elem *query_room_, *key_room_, *value_room_, *score_room_, *state_room_, *feature_room_;
};

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
