// SPDX-License-Identifier: Apache-2.0
// Decoding: a few tokens against one state, which is read and written once per token. Head_dim of
// the values, and the sums of a normaliser as one column more, are in the lanes.
#pragma once

#include "linear.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

template <class T>
class LinearStep {
 public:
  using Acc = LinearAcc<T>;
  static constexpr int64_t kLanes = Simd<Acc>::kLanes;

  LinearStep(const LinearStepParams& params, void* scratch)
      : s_(params), p_(params.problem), features_(p_.features()), arena_(scratch) {
    const int64_t columns = whole_vectors<Acc>(p_.state_columns());
    x_ = arena_.take(whole_vectors<Acc>(p_.head_dim) + kLanes);
    q_ = arena_.take(whole_vectors<Acc>(features_) + kLanes);
    k_ = arena_.take(whole_vectors<Acc>(features_) + kLanes);
    u_ = arena_.take(columns);
    out_ = arena_.take(columns);
  }
  int64_t scratch_bytes() const { return arena_.bytes(); }

  void run(int64_t batch, int64_t head) {
    const int64_t slot = s_.slots ? s_.slots[batch] : batch;
    Acc* state = slot < 0
                     ? nullptr
                     : static_cast<Acc*>(s_.state) + slot * s_.slot_stride + head * s_.head_stride;
    for (int64_t t = 0; t < p_.tokens; ++t) {
      if (state) {
        token(batch, head, t, state);
        store_out(batch, head, t);
      } else {
        T* const out = row<T>(p_.out, batch, head, t, p_.heads);
        for (int64_t c = 0; c < p_.head_dim_v; c += kLanes) {
          narrow_part(out + c, VecOf<Acc>{}, p_.head_dim_v - c);
        }
      }
    }
  }

 private:
  template <class U>
  U* row(const TensorRef& ref, int64_t batch, int64_t head, int64_t t, int64_t heads) const {
    return static_cast<U*>(ref.data) + batch * ref.batch + t * ref.token[2] +
           head / (p_.heads / heads) * ref.head;
  }

  template <FeatureMap kMap>
  void widen_features(const T* x, Acc factor, Acc* out) {
    for (int64_t d = 0; d < p_.head_dim; d += kLanes) {
      store(out + d, feature<kMap, Acc>(widen_part<T, Acc>(x + d, p_.head_dim - d)) * factor);
    }
  }
  void make_features(const T* x, Acc factor, bool weighted, Acc* out) {
    switch (p_.feature_map) {
      case FeatureMap::kIdentity:
        return widen_features<FeatureMap::kIdentity>(x, factor, out);
      case FeatureMap::kElu:
        return widen_features<FeatureMap::kElu>(x, factor, out);
      case FeatureMap::kRelu:
        return widen_features<FeatureMap::kRelu>(x, factor, out);
      case FeatureMap::kTaylor2:
        break;
    }
    widen_features<FeatureMap::kIdentity>(x, factor, x_);
    const int64_t dim = p_.head_dim;
    *out++ = 1;
    // Whole vectors: what a row of products writes too much, the next one writes over.
    for (int64_t b = 0; b < dim; b += kLanes) store(out + b, load(x_ + b));
    out += dim;
    for (int64_t a = 0; a < dim; out += dim - a, ++a) {
      for (int64_t b = a; b < dim; b += kLanes) store(out + b - a, load(x_ + b) * x_[a]);
      if (weighted) out[0] *= Acc(0.5);
    }
  }

  void token(int64_t batch, int64_t head, int64_t t, Acc* state) {
    make_features(row<const T>(p_.query, batch, head, t, p_.query_heads), Acc(p_.scale), true, q_);
    make_features(row<const T>(p_.key, batch, head, t, p_.key_heads), 1, false, k_);
    const T* value = row<const T>(p_.value, batch, head, t, p_.value_heads);
    const int64_t columns = p_.state_columns();
    for (int64_t c = 0; c < p_.head_dim_v; c += kLanes) {
      store(u_ + c, widen_part<T, Acc>(value + c, p_.head_dim_v - c));
    }
    if (p_.normalize) u_[p_.head_dim_v] = 1;
    Acc kept = 1, beta = 1;
    if (p_.decay.data) {
      const double g = *row<const Acc>(p_.decay, batch, head, t, p_.heads);
      kept = power_of<Acc>((g < -1000 ? -1000 : g) * kLog2E);
    }
    if (p_.delta()) beta = *row<const Acc>(p_.beta, batch, head, t, p_.heads);
    // A column of its own, the sums of a normaliser, goes with the vectors before it.
    const bool one_more = columns % kLanes == 1 && !p_.delta();
    const int64_t whole = one_more ? columns - 1 : columns;
    int64_t c = 0;
    for (; c + 4 * kLanes <= whole; c += 4 * kLanes) {
      if (one_more && c + 4 * kLanes + 1 == columns) {
        update<4, true>(state, c, columns, kept, beta);
        return;
      }
      update<4, false>(state, c, columns, kept, beta);
    }
    for (; c < columns; c += kLanes) update<1, false>(state, c, columns, kept, beta);
  }

  // Columns [c, c + N vectors), and with kOneMore the one after them.
  template <int N, bool kOneMore>
  void update(Acc* state, int64_t c, int64_t columns, Acc kept, Acc beta) {
    VecOf<Acc> u[N], out[N] = {};
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) u[n] = load(u_ + c + n * kLanes);
    const int64_t left = columns - c;
    if (p_.delta()) {
      VecOf<Acc> found[N] = {};
      const Acc* row = state + c;
      for (int64_t f = 0; f < features_; ++f, row += s_.feature_stride) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) found[n] += read<N>(row + n * kLanes, left) * k_[f];
      }
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) u[n] = (u[n] - found[n] * kept) * beta;
    }
    Acc* row = state + c;
    Acc last = 0;
    for (int64_t f = 0; f < features_; ++f, row += s_.feature_stride) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const VecOf<Acc> now = read<N>(row + n * kLanes, left) * kept + u[n] * k_[f];
        narrow_part(row + n * kLanes, now, N > 1 ? kLanes : left);
        out[n] += now * q_[f];
      }
      if constexpr (kOneMore) {
        Acc& sum = row[N * kLanes];
        sum = sum * kept + u_[c + N * kLanes] * k_[f];
        last += sum * q_[f];
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(out_ + c + n * kLanes, out[n]);
    if constexpr (kOneMore) out_[c + N * kLanes] = last;
  }
  template <int N>
  static VecOf<Acc> read(const Acc* p, int64_t left) {
    return N > 1 ? load(p) : widen_part<Acc, Acc>(p, left);
  }

  void store_out(int64_t batch, int64_t head, int64_t t) {
    T* out = row<T>(p_.out, batch, head, t, p_.heads);
    VecOf<Acc> divisor = broadcast(Acc(1));
    if (p_.normalize) {
      const Acc sum = out_[p_.head_dim_v];
      divisor = broadcast(sum < 0 ? sum - Acc(p_.eps) : sum + Acc(p_.eps));
    }
    for (int64_t c = 0; c < p_.head_dim_v; c += kLanes) {
      const VecOf<Acc> o = load(out_ + c);
      narrow_part(out + c, p_.normalize ? o / divisor : o, p_.head_dim_v - c);
    }
  }

  const LinearStepParams& s_;
  const LinearParams& p_;
  const int64_t features_;
  Scratch<Acc> arena_;
  Acc *x_, *q_, *k_, *u_, *out_;
};

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
