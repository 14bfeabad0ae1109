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

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

template <class T, class Elem = LinearAcc<T>>
class LinearForward : public LinearHead<T> {
 public:
  using Head = LinearHead<T>;
  using Acc = typename Head::Acc;
  using Head::chunk, Head::columns, Head::decays, Head::features, Head::item, Head::kLanes,
      Head::ld, Head::p, Head::taylor, Head::width;

  LinearForward(const LinearParams& params, const LinearItem& work, void* scratch)
      : Head(params, work), arena_(scratch), decay_(arena_, ld) {
    const int64_t dim = p.head_dim;
    q_ = arena_.take(dim * ld);
    k_ = arena_.take(dim * ld);
    qf_ = taylor() ? arena_.take(features * ld) : q_;
    kf_ = taylor() ? arena_.take(features * ld) : k_;
    v_ = arena_.take(chunk * width);
    out_ = arena_.take(chunk * width);
    scores_ = arena_.take(kBlock * ld);
    sum_ = arena_.take(ld);
    weights_ = arena_.take(ld);
    before_ = arena_.take(this->state_size());
    query_room_ = room((dim + 1) * ld);
    key_room_ = room((dim + 1) * ld);
    value_room_ = room((chunk + 1) * width);
    score_room_ = room(kBlock * ld);
    state_room_ = room((features + 1) * width);
    feature_room_ = room((features + 1) * ld);
    if (p.delta()) {
      keys_ = arena_.take(chunk * ld);
      beta_ = arena_.take(ld);
      u_ = arena_.take(chunk * width);
      earlier_ = arena_.take(kRows * width);
    }
  }
  int64_t scratch_bytes() const { return arena_.bytes(); }

  void forward(const Acc* carry, Acc* local, bool fresh, bool keep) {
    double gone = 0;  // decay since the item began, as a power of two
    const Elem* read = p.causal ? nullptr : enter(carry);
    for (int64_t t = item.begin; t < item.end; t += chunk) {
      const int64_t count = min64(chunk, item.end - t);
      const Acc* state = p.causal ? state_before(carry, local, fresh, gone, before_) : carry;
      if (p.causal) read = enter(state);
      pack_queries(t, count);
      if (p.causal) pack_keys(t, count, state);
      attend(t, count, state, read);
      if (p.causal && (keep || t + chunk < item.end)) {
        add_chunk(count, local, fresh);
        fresh = false;
      }
      gone += chunk_decay();
    }
    this->factor(local) = power_of<Acc>(gone);
  }

  void sum_keys(Acc* local, bool fresh) {
    double gone = 0;
    for (int64_t t = item.begin; t < item.end; t += chunk) {
      const int64_t count = min64(chunk, item.end - t);
      sum_chunk(t, count, local, fresh);
      fresh = false;
      gone += chunk_decay();
    }
    this->factor(local) = power_of<Acc>(gone);
  }

  // local: one chunk further.
  void sum_chunk(int64_t t, int64_t count, Acc* local, bool fresh) {
    pack_keys(t, count, fresh ? nullptr : local);
    for (int64_t i = 0; i < count; i += kRows) {
      this->template fetch_next<kRows>(p.key, t, i, p.key_heads, p.head_dim);
      this->template fetch_next<kRows>(p.value, t, i, p.value_heads, columns);
    }
    add_chunk(count, local, fresh);
  }

  // The state before a chunk; null where it is zero. `before` is room for it.
  const Acc* state_before(const Acc* carry, const Acc* local, bool fresh, double gone,
                          Acc* before) const {
    if (!carry) return fresh ? nullptr : local;
    if (fresh && gone == 0) return carry;
    this->combine(power_of<Acc>(gone), carry, local, fresh, before);
    return before;
  }
  double chunk_decay() const { return decays() ? decay_.total : 0; }

 private:
  static constexpr int64_t kBlock = kRowBlock<Elem>;  // rows of scores at a time

  static constexpr int64_t kDepth = Contraction<Elem>::kDepth;
  Elem* room(int64_t numbers) {
    return kDepth == 1 ? nullptr : reinterpret_cast<Elem*>(arena_.take(numbers / kDepth + 1));
  }
  const Elem* enter(const Acc* state) {
    return state ? along_rows(state, features, width, width, state_room_) : nullptr;
  }

  void pack_queries(int64_t t, int64_t count) {
    pack_lanes<T, Acc>(p.feature_map, this->template row<const T>(p.query, t, p.query_heads),
                       this->step(p.query), count, p.head_dim, q_, ld);
    if (taylor()) taylor_features(q_, this->inner_scale(), p.head_dim, ld, count, true, qf_);
  }

  // Also what the delta rule makes of the values, for which it needs the decays and the state.
  void pack_keys(int64_t t, int64_t count, const Acc* state) {
    pack_lanes<T, Acc>(p.feature_map, this->template row<const T>(p.key, t, p.key_heads),
                       this->step(p.key), count, p.head_dim, k_, ld);
    pack_rows<T, Acc>(this->template row<const T>(p.value, t, p.value_heads) + item.column,
                      this->step(p.value), count, columns, v_, width);
    if (decays()) {
      decay_.read(this->template row<const Acc>(p.decay, t, p.heads), this->step(p.decay), count,
                  whole_vectors<Acc>(count));
    }
    if (p.delta()) write_delta(t, count, state);
    value_ = along_rows(v_, count, width, width, value_room_);
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

  void attend(int64_t t, int64_t count, const Acc* state, const Elem* read) {
    const int64_t lanes = whole_vectors<Acc>(count), dim = p.head_dim;
    const Elem* const query = along_rows(q_, dim, ld, lanes, query_room_);
    const Elem* const feature =
        taylor() && state ? along_rows(qf_, features, ld, lanes, feature_room_) : query;
    const Elem* const key = p.causal ? along_rows(k_, dim, ld, lanes, key_room_) : nullptr;
    if (p.normalize) {
      for (int64_t i = 0; i < lanes; ++i) sum_[i] = 0;
      if (state) weigh_rows(qf_, features, ld, lanes, this->sums(state), sum_);
      if (state && decays()) scale_lanes(sum_, 1, 0, lanes, decay_.from_start);
    }
    for (int64_t i = 0; i < count; i += kBlock) {
      const int64_t rows = min64(kBlock, count - i);
      Acc* const out = out_ + i * width;
      this->template fetch_next<kBlock>(p.query, t, i, p.query_heads, dim);
      if (state) {
        product<By::kColumns>(rows, width, elements<Elem>(features), feature + i, ld, read, width,
                              out, width, false);
        for (int64_t r = 0; decays() && r < rows; ++r) {
          scale_all(out + r * width, 1, 0, width, decay_.from_start[i + r]);
        }
      }
      this->template fetch_out<kBlock>(p.out, t, i, p.heads, columns);
      if (!p.causal) continue;
      this->template fetch_next<kBlock>(p.key, t, i, p.key_heads, dim);
      product<By::kColumns>(rows, whole_vectors<Acc>(i + rows), elements<Elem>(dim), query + i, ld,
                            key, ld, scores_, ld, false);
      const Elem* const scores = finish_scores(i, rows);
      this->template fetch_next<kBlock>(p.value, t, i, p.value_heads, columns);
      product_lower(i, rows, width, scores, ld / kDepth, value_, width, out, width,
                    state != nullptr);
    }
    store_out(t, count, state || p.causal);
  }

  // Scores of queries [first, first + rows) with the keys up to them: polynomial, decay, row sums.
  const Elem* finish_scores(int64_t first, int64_t rows) {
    if constexpr (kDepth == 1) {  // the product with values masks them itself
      if (!taylor() && !decays() && !p.normalize) return scores_;
    }
    const Acc scale = this->inner_scale();
    for (int64_t i = first; i < first + rows; ++i) {
      Acc* row = scores_ + (i - first) * ld;
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
        store(row + j, s);
        total += s;
      }
      if (p.normalize) sum_[i] += add_lanes<Acc>(total);
    }
    return along_lanes(scores_, rows, ld, whole_vectors<Acc>(first + rows), score_room_);
  }

  void store_out(int64_t t, int64_t count, bool any) {
    T* out = this->template row<T>(p.out, t, p.heads) + item.column;
    const int64_t step = this->step(p.out);
    const Acc scale = this->outer_scale();
    Acc* denominator = p.normalize ? this->template row<Acc>(p.denominator, t, p.heads) : nullptr;
    for (int64_t i = 0; i < count; ++i) {
      Acc* row = out_ + i * width;
      if (!any) {
        for (int64_t c = 0; c < width; c += kLanes) store(row + c, VecOf<Acc>{});
      } else if (scale != 1) {
        scale_all(row, 1, 0, width, scale);
      }
      if (p.normalize) {
        const Acc sum = sum_[i] * scale;
        const Acc moved = sum < 0 ? sum - Acc(p.eps) : sum + Acc(p.eps);
        denominator[i * this->step(p.denominator)] = moved;
        for (int64_t c = 0; c < width; c += kLanes) store(row + c, load(row + c) / moved);
      }
      narrow_row(row, columns, out + i * step);
    }
  }

  // local = factor * local + features of keys times values, the earlier ones decayed.
  void add_chunk(int64_t count, Acc* local, bool fresh) {
    const int64_t lanes = whole_vectors<Acc>(count);
    if (taylor()) taylor_features(k_, Acc(1), p.head_dim, ld, count, false, kf_);
    if (decays()) {
      scale_lanes(kf_, features, ld, lanes, decay_.to_end);
      const Acc kept = power_of<Acc>(decay_.total);
      this->add_outer(kf_, kf_, v_, count, Mix<Acc>{!fresh, kept}, local, nullptr);
    } else {
      this->add_outer(kf_, along_lanes(kf_, features, ld, lanes, feature_room_), value_, count,
                      Mix<Acc>{!fresh}, local, nullptr);
    }
  }

  [[no_unique_address]] tiles::SessionIf<kInTiles<Elem>> session_;
  Scratch<Acc> arena_;
  ChunkDecay<Acc> decay_;
  Acc *q_, *k_, *qf_, *kf_, *v_, *out_, *scores_, *sum_, *weights_, *before_;
  Acc *keys_ = nullptr, *beta_ = nullptr, *u_ = nullptr, *earlier_ = nullptr;
  const Elem* value_ = nullptr;
  // Room for operands as pairs; null for numbers.
  Elem *query_room_, *key_room_, *value_room_, *score_room_, *state_room_, *feature_room_;
};

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
