// SPDX-License-Identifier: Apache-2.0
// Outputs of linear attention, a chunk at a time:
//   out = scores within the chunk, masked, times values + features of queries times the state.
#pragma once

#include "linear_delta.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

template <class T>
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
    for (int64_t t = item.begin; t < item.end; t += chunk) {
      const int64_t count = min64(chunk, item.end - t);
      const Acc* state = p.causal ? state_before(carry, local, fresh, gone, before_) : carry;
      pack_queries(t, count);
      if (p.causal) pack_keys(t, count, state);
      attend(t, count, state);
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
  static constexpr int64_t kBlock = kRows;  // rows of scores at a time

  void pack_queries(int64_t t, int64_t count) {
    pack_lanes<T, Acc>(p.feature_map, this->template row<const T>(p.query, t, p.query_heads),
                       this->step(p.query), count, p.head_dim, q_, ld);
    if (p.scale != 1) scale_all(q_, p.head_dim, ld, whole_vectors<Acc>(count), Acc(p.scale));
    if (taylor()) taylor_features(q_, p.head_dim, ld, count, true, qf_);
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
    if (!p.delta()) return;
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
    const int64_t lanes = whole_vectors<Acc>(count);
    if (decays() && state) scale_lanes(qf_, features, ld, lanes, decay_.from_start);
    for (int64_t i = 0; i < count; i += kBlock) {
      const int64_t rows = min64(kBlock, count - i);
      this->fetch_next(p.query, t, i, p.query_heads, p.head_dim);
      if (p.causal) {
        const int64_t seen = whole_vectors<Acc>(i + rows);
        product<By::kColumns>(rows, seen, p.head_dim, q_ + i, ld, k_, ld, scores_, ld, false);
        this->fetch_next(p.key, t, i, p.key_heads, p.head_dim);
        finish_scores(i, rows);
        product_lower(i, rows, width, scores_, ld, v_, width, out_ + i * width, width, false);
        this->fetch_next(p.value, t, i, p.value_heads, p.head_dim_v);
      }
      if (state) {
        product<By::kColumns>(rows, width, features, qf_ + i, ld, state, width, out_ + i * width,
                              width, p.causal);
      }
      this->fetch_out(p.out, t, i, p.heads, p.head_dim_v);
    }
    if (state && p.normalize) {
      weigh_rows(qf_, features, ld, lanes, this->sums(state), sum_, p.causal);
    }
    store_out(t, count, state || p.causal);
  }

  // Scores of queries [first, first + rows) with the keys up to them: polynomial, decay, row sums.
  void finish_scores(int64_t first, int64_t rows) {
    if (!taylor() && !decays() && !p.normalize) return;
    for (int64_t i = first; i < first + rows; ++i) {
      Acc* row = scores_ + (i - first) * ld;
      const int64_t seen = whole_vectors<Acc>(i + 1);
      if (decays()) decay_.weights(i, seen, weights_);
      VecOf<Acc> total{};
      for (int64_t j = 0; j < seen; j += kLanes) {
        VecOf<Acc> s = load(row + j);
        if (taylor()) s = (s * Acc(0.5) + Acc(1)) * s + Acc(1);
        if (decays()) s *= load(weights_ + j);
        if (j + kLanes > i + 1) {
          s = select_bits<Acc>((uint64_t(2) << (i - j)) - 1, s, VecOf<Acc>{});
        }
        store(row + j, s);
        total += s;
      }
      sum_[i] = add_lanes<Acc>(total);
    }
  }

  void store_out(int64_t t, int64_t count, bool any) {
    T* out = this->template row<T>(p.out, t, p.heads) + item.column;
    const int64_t step = this->step(p.out);
    Acc* denominator = p.normalize ? this->template row<Acc>(p.denominator, t, p.heads) : nullptr;
    for (int64_t i = 0; i < count; ++i) {
      Acc* row = out_ + i * width;
      if (!any) {
        for (int64_t c = 0; c < width; c += kLanes) store(row + c, VecOf<Acc>{});
      }
      if (p.normalize) {
        const Acc sum = any ? sum_[i] : Acc(0);
        const Acc moved = sum < 0 ? sum - Acc(p.eps) : sum + Acc(p.eps);
        denominator[i * this->step(p.denominator)] = moved;
        for (int64_t c = 0; c < width; c += kLanes) store(row + c, load(row + c) / moved);
      }
      narrow_row(row, columns, out + i * step);
    }
  }

  // local = factor * local + features of keys times values, the earlier ones decayed.
  void add_chunk(int64_t count, Acc* local, bool fresh) {
    if (taylor()) taylor_features(k_, p.head_dim, ld, count, false, kf_);
    if (decays()) scale_lanes(kf_, features, ld, whole_vectors<Acc>(count), decay_.to_end);
    const Acc kept = decays() ? power_of<Acc>(decay_.total) : Acc(1);
    this->add_outer(kf_, v_, count, kept, local, fresh, nullptr);
  }

  Scratch<Acc> arena_;
  ChunkDecay<Acc> decay_;
  Acc *q_, *k_, *qf_, *kf_, *v_, *out_, *scores_, *sum_, *weights_, *before_;
  Acc *keys_ = nullptr, *beta_ = nullptr, *u_ = nullptr, *earlier_ = nullptr;
};

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
