// SPDX-License-Identifier: Apache-2.0
// Outputs of linear attention, a chunk at a time:
//   out = scores within the chunk, masked, times values + features of queries times the state.
//
// Products are of numbers or, where `kTiles` says so (LinearHead::in_tiles), of tiles of bf16,
// whose operands are rows of queries, keys and values as they lie; features, scores and the state,
// which is kept in fp32, are rounded as they enter one.
#pragma once

#include "linear_delta.inl"
#include "linear_pairs.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

template <class T, bool kTiles = false>
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
    v_ = arena_.take(chunk * width);
    out_ = arena_.take((kTiles ? tiles::round_up(chunk, 2 * tiles::kSide) : chunk) * width);
    // Taylor features have tokens in the lanes; all others are rows, and so are queries then. Keys
    // are in lanes as scores want them.
    q_ = arena_.take(taylor() ? dim * ld : chunk * row_ld_);
    k_ = arena_.take(dim * ld);
    qf_ = taylor() ? arena_.take(features * ld) : q_;
    kf_ = arena_.take(taylor() ? features * ld : chunk * row_ld_);
    scores_ = arena_.take(chunk * ld);
    sum_ = arena_.take(ld);
    weights_ = arena_.take(ld);
    if constexpr (kTiles) {
      query_room_ = pairs(chunk * row_ld_);
      key_room_ = pairs(chunk * row_ld_);
      key_lanes_ = pairs((dim + 1) * ld);
      feature_rows_ = pairs((dim + 1) * ld);
      value_rows_ = pairs((chunk + 1) * width);
      score_rows_ = pairs(chunk * ld);
      state_rows_ = pairs((features + 1) * width);
      rounded_state_ = arena_.take((features + 1) * width);
    }
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
  Pair* pairs(int64_t numbers) { return reinterpret_cast<Pair*>(arena_.take(numbers / 2 + 1)); }

  void forward_chunk(LinearWalk* walk, int64_t t, bool keep) {
    const Acc* const carry = static_cast<const Acc*>(walk->carry);
    Acc* const local = static_cast<Acc*>(walk->local);
    // The state goes along with the local sum, unless it is the local sum.
    Acc* const running = carry ? static_cast<Acc*>(walk->running) : local;
    const int64_t count = min64(chunk, item.end - t);
    const bool first = t == item.begin, last = t + chunk >= item.end;
    const Acc* state = running;
    if (first || !p.causal) state = carry ? carry : walk->fresh ? nullptr : local;
    if constexpr (kTiles) {
      if (state && (first || p.causal)) join_rows_of_state(state, features, width, state_rows_);
    }
    pack_queries(t, count);
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
    constexpr int64_t kBlock = kTiles ? tiles::kSide : kRows;
    int64_t tiles = count_tiles<Acc, kBlock>(features, width);
    if (with_outputs) tiles += count_tiles<Acc, kBlock>(chunk, width);
    if (with_outputs && p.causal) tiles += count_tiles<Acc, kBlock>(chunk, ld);
    ahead_.pace(tiles);
  }

  void pack_queries(int64_t t, int64_t count) {
    const T* query = this->template row<const T>(p.query, t, p.query_heads);
    if constexpr (kTiles) {
      pack_query_pairs(count, query);
    } else if (taylor()) {
      pack_lanes<FeatureMap::kIdentity>(query, this->step(p.query), count, p.head_dim, q_, ld);
      taylor_features(q_, this->inner_scale(), p.head_dim, ld, count, true, qf_);
    } else {
      pack_features(p.feature_map, query, this->step(p.query), count, p.head_dim, q_, row_ld_);
    }
  }

  // Also what the delta rule makes of the values, for which it needs the decays and the state.
  void pack_keys(int64_t t, int64_t count, const Acc* state, bool for_scores) {
    const T* key = this->template row<const T>(p.key, t, p.key_heads);
    if constexpr (kTiles) return pack_key_pairs(t, count, key);
    if (taylor()) {
      pack_lanes<FeatureMap::kIdentity>(key, this->step(p.key), count, p.head_dim, k_, ld);
    } else {
      pack_features(p.feature_map, key, this->step(p.key), count, p.head_dim, kf_, row_ld_);
      if (for_scores || p.delta()) {
        pack_lanes<FeatureMap::kIdentity>(kf_, row_ld_, count, p.head_dim, k_, ld);
      }
    }
    pack_values(t, count);
    if (decays()) {
      decay_.read(this->template row<const Acc>(p.decay, t, p.heads), this->step(p.decay), count,
                  whole_vectors<Acc>(count));
    }
    if (p.delta()) write_delta(t, count, state);
  }
  void pack_values(int64_t t, int64_t count) {
    pack_rows<T, Acc>(this->template row<const T>(p.value, t, p.value_heads) + item.column,
                      this->step(p.value), count, columns, v_, width);
  }

  void pack_query_pairs(int64_t count, const T* query) {
    query_ = {reinterpret_cast<const Pair*>(query), this->step(p.query) / 2};
    if (are_pairs(p.feature_map, query, this->step(p.query), p.head_dim, row_ld_)) return;
    query_ = pair_features(p.feature_map, query, this->step(p.query), count, p.head_dim,
                           query_room_, row_ld_);
  }
  void pack_key_pairs(int64_t t, int64_t count, const T* key) {
    const int64_t dim_pairs = (p.head_dim + 1) / 2, step = this->step(p.key);
    PairRows rows{reinterpret_cast<const Pair*>(key), step / 2};
    if (!are_pairs(p.feature_map, key, step, p.head_dim, row_ld_)) {
      rows = pair_features(p.feature_map, key, step, count, p.head_dim, key_room_, row_ld_);
    }
    turn_pairs(rows, count, dim_pairs, key_lanes_, ld);
    part_pairs(key_lanes_, dim_pairs, ld, count, feature_rows_);
    join_rows(this->template row<const T>(p.value, t, p.value_heads) + item.column,
              this->step(p.value), count, columns, value_rows_, width);
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
    if constexpr (kTiles) {
      attend_tiles(t, count, state);
    } else if (taylor()) {
      attend<By::kColumns>(t, count, state);
    } else {
      attend<By::kRows>(t, count, state);
    }
  }
  // Queries and their features have tokens by columns, or by rows.
  template <By kTokens>
  void attend(int64_t t, int64_t count, const Acc* state) {
    constexpr bool kInRows = kTokens == By::kRows;
    const int64_t lanes = whole_vectors<Acc>(count), query_ld = kInRows ? row_ld_ : ld;
    if (p.normalize) {
      for (int64_t i = 0; i < lanes; ++i) sum_[i] = 0;
      if (state && kInRows) {
        weigh_lanes(q_, count, row_ld_, row_ld_, this->sums(state), sum_, Mix<Acc>{false});
      } else if (state) {
        weigh_rows(qf_, features, ld, lanes, this->sums(state), sum_, Mix<Acc>{false});
      }
      if (state && decays()) scale_lanes(sum_, 1, 0, lanes, decay_.from_start);
    }
    for (int64_t i = 0; p.causal && i < count; i += kRows) {
      const int64_t rows = min64(kRows, count - i), seen = whole_vectors<Acc>(i + rows);
      product<kTokens>(rows, seen, p.head_dim, tile_row<kTokens>(q_, query_ld, i), query_ld, k_, ld,
                       scores_ + i * ld, ld, false, &ahead_);
      finish_scores(i, rows);
    }
    const bool in_place = Same<T, Acc>::value && columns == width;
    T* const out = this->template row<T>(p.out, t, p.heads) + item.column;
    Acc* const to = in_place ? reinterpret_cast<Acc*>(out) : out_;
    const int64_t step = in_place ? this->step(p.out) : width;
    outputs<kTokens>(count, width, terms(qf_, query_ld, state), to, step, &ahead_);
    if (p.normalize) divide(t, count, to, step);
    if (!in_place) store_outputs(t, count, out);
  }
  OutputTerms<Acc> terms(const Acc* feature, int64_t feature_ld, const Acc* state) const {
    return {feature,
            feature_ld,
            features,
            state,
            decays() ? decay_.from_start : nullptr,
            p.causal ? scores_ : nullptr,
            ld,
            v_,
            width,
            this->outer_scale()};
  }
  // The same in tiles.
  void attend_tiles(int64_t t, int64_t count, const Acc* state) {
    const int64_t depth = (p.head_dim + 1) / 2;
    constexpr int64_t kRowsAtOnce = 2 * tiles::kSide;
    for (int64_t i = 0; p.causal && i < count; i += kRowsAtOnce) {
      const int64_t rows = min64(kRowsAtOnce, count - i), seen = whole_vectors<Acc>(i + rows);
      tiles::product(rows, seen, depth, query_.at + i * query_.ld, query_.ld, key_lanes_, ld,
                     scores_ + i * ld, ld, Mix<Acc>{false}, &ahead_);
      finish_scores(i, rows);
    }
    const Acc scale = this->outer_scale();
    tiles::outputs(count, width, depth, query_.at, query_.ld, state ? state_rows_ : nullptr,
                   p.causal ? score_rows_ : nullptr, ld / 2, value_rows_, width, out_, width,
                   &ahead_);
    if (!all_finite(out_, count * width)) {
      // A later row's number, times 0, may be in a sum: once more, of the same numbers.
      pack_rows<bf16>(reinterpret_cast<const bf16*>(query_.at), 2 * query_.ld, count, p.head_dim,
                      q_, row_ld_);
      if (p.causal) {
        pack_rows<bf16>(reinterpret_cast<const bf16*>(score_rows_), ld, count, ld, scores_, ld);
        pack_values(t, count);
      }
      if (state) part_rows_of_state(state_rows_, features, width, rounded_state_);
      outputs<By::kRows>(count, width, terms(q_, row_ld_, state ? rounded_state_ : nullptr), out_,
                         width, &ahead_);
    } else if (scale != 1) {
      scale_all(out_, 1, 0, count * width, scale);
    }
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

  // Scores of queries [first, first + rows) with the keys up to them: polynomial, decay, row sums.
  // In tiles rounded, as an operand, and then with zeros for the keys after them.
  void finish_scores(int64_t first, int64_t rows) {
    if constexpr (!kTiles) {  // the product with values masks them itself
      if (!taylor() && !decays() && !p.normalize) return;
    }
    const Acc scale = this->inner_scale();
    const auto put = [&](int64_t i, int64_t j, VecOf<Acc> s) {
      if constexpr (kTiles) {
        narrow_quickly(reinterpret_cast<bf16*>(score_rows_) + i * ld + j, s);
      } else {
        store(scores_ + i * ld + j, s);
      }
    };
    for (int64_t i = first; i < first + rows; ++i) {
      const Acc* const row = scores_ + i * ld;
      const int64_t seen = whole_vectors<Acc>(i + 1);
      if (decays()) decay_.weights(i, seen, weights_);
      VecOf<Acc> total{};
      for (int64_t j = 0; j < seen; j += kLanes) {
        VecOf<Acc> s = load(row + j);
        if (taylor()) {
          s *= scale;
          s = (s * Acc(0.5) + Acc(1)) * s + Acc(1);
        }
        if (decays()) s *= load(weights_ + j);
        if (j + kLanes > i + 1) {
          s = select_bits<Acc>((uint64_t(2) << (i - j)) - 1, s, VecOf<Acc>{});
        }
        put(i, j, s);
        total += s;
      }
      for (int64_t j = seen; kTiles && j < whole_vectors<Acc>(first + rows); j += kLanes) {
        put(i, j, VecOf<Acc>{});
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
    if constexpr (kTiles) {
      tiles::product(features, width, (count + 1) / 2, feature_rows_, ld / 2, value_rows_, width,
                     local, width, mix, &ahead_);
      const Acc* const none = nullptr;  // there are no sums: they only become 0
      this->template add_sums<By::kColumns>(none, row_ld_, 0, mix, local, none);
    } else if (taylor()) {
      taylor_features(k_, Acc(1), p.head_dim, ld, count, false, kf_);
      if (decays()) scale_lanes(kf_, features, ld, whole_vectors<Acc>(count), decay_.to_end);
      this->template add_outer<By::kRows>(kf_, ld, v_, count, mix, local, nullptr, &ahead_);
    } else {
      for (int64_t i = 0; decays() && i < count; ++i) {
        scale_all(kf_ + i * row_ld_, 1, 0, row_ld_, decay_.to_end[i]);
      }
      this->template add_outer<By::kColumns>(kf_, row_ld_, v_, count, mix, local, nullptr, &ahead_);
    }
  }

  const int64_t row_ld_;  // of rows of queries and keys
  [[no_unique_address]] tiles::SessionIf<kTiles> session_;
  Ahead ahead_;
  Scratch<Acc> arena_;
  ChunkDecay<Acc> decay_;
  Acc *q_, *k_, *qf_, *kf_, *v_, *out_, *scores_, *sum_, *weights_;
  Acc *keys_ = nullptr, *beta_ = nullptr, *u_ = nullptr, *earlier_ = nullptr;
  // Of tiles: operands, and the room for those that do not lie as such.
  PairRows query_{};
  Pair *query_room_, *key_room_, *key_lanes_, *feature_rows_, *value_rows_, *score_rows_,
      *state_rows_;
  Acc* rounded_state_;
};

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
