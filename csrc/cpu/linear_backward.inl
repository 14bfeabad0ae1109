// SPDX-License-Identifier: Apache-2.0
// Gradients of linear attention over one item. First its chunks' states are made again, from the
// state before it; then it is walked from the last chunk to the first with the gradient of the
// state, G. With P = dO V^T and S the scores, all masked and decayed, in a chunk:
//   dV = S^T dO + phi(K) G,  dQ = P K + R dO,  dK = P^T Q + G V,  G += phi(Q)^T dO.
// Gradients of queries and keys have tokens in the lanes like what they belong to.
#pragma once

#include "linear_forward.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

template <class T>
class LinearBackward : public LinearHead<T> {
 public:
  using Head = LinearHead<T>;
  using Acc = typename Head::Acc;
  using Head::chunk, Head::columns, Head::decays, Head::features, Head::item, Head::kLanes,
      Head::ld, Head::p, Head::taylor, Head::width;

  // Without memory it only counts; `item` then need not be a real one.
  LinearBackward(const LinearParams& params, const LinearItem& work, void* scratch)
      : Head(params, work),
        again_(params, work, scratch),
        arena_(past(scratch)),
        decay_(arena_, ld),
        slopes_(arena_, ld, decays()) {
    const int64_t dim = p.head_dim;
    q_ = arena_.take(dim * ld);
    k_ = arena_.take(dim * ld);
    const bool apart = taylor() || decays();  // decays scale the features in place
    qf_ = apart ? arena_.take(features * ld) : q_;
    kf_ = apart ? arena_.take(features * ld) : k_;
    dq_ = arena_.take(dim * ld);
    dk_ = arena_.take(dim * ld);
    df_ = arena_.take(features * ld);
    v_ = arena_.take(chunk * width);
    dout_ = arena_.take(chunk * width);
    dv_ = arena_.take(chunk * width);
    v_lanes_ = arena_.take(columns * ld);
    dout_lanes_ = arena_.take(columns * ld);
    s_ = arena_.take(chunk * ld);
    dp_ = arena_.take(chunk * ld);
    dp_lanes_ = arena_.take(chunk * ld);
    dsum_ = arena_.take(ld);
    inverse_ = arena_.take(ld);
    dmean_ = arena_.take(ld);
    far_ = arena_.take(ld);
    weights_ = arena_.take(ld);
    after_ = arena_.take(this->state_size());
    if (p.delta()) {
      keys_ = arena_.take(chunk * ld);
      beta_ = arena_.take(ld);
      dbeta_ = arena_.take(ld);
      e_ = arena_.take(chunk * width);
      y_ = arena_.take(chunk * width);
      h_ = arena_.take(chunk * width);
      h_lanes_ = arena_.take(columns * ld);
      later_ = arena_.take(kRows * width);
    }
    states_ = arena_.take(this->state_size() * (segment() / chunk));
  }
  int64_t scratch_bytes() const { return again_.scratch_bytes() + arena_.bytes(); }

  void backward(const Acc* carry, const Acc* dcarry, Acc* dlocal, bool fresh) {
    const int64_t chunks = (item.end - item.begin + chunk - 1) / chunk;
    if (p.causal) make_states(chunks, carry);
    double gone = 0;
    // Like the state in the forward walk, its gradient goes along with the local sum.
    Acc* const running = dcarry ? after_ : dlocal;
    const Acc* after = dcarry ? dcarry : fresh ? nullptr : dlocal;
    for (int64_t n = chunks - 1; n >= 0; --n) {
      const int64_t t = item.begin + n * chunk;
      const int64_t count = min64(chunk, item.end - t);
      const Acc* before = p.causal ? before_[n] : carry;
      look_ahead(t);
      pack(t, count, before);
      if (p.normalize) read_state(count, before);
      within(t, count);
      across(t, count, before, after);
      gone += decays() ? decay_.total : 0;
      if (!p.causal) continue;
      if (running == dlocal || n == 0) {
        add_chunk(count, dlocal, kept(!fresh));
      } else {
        Mix<Acc> mix = kept(true);
        mix.from = after;
        mix.also = dlocal, mix.also_reads = !fresh;
        add_chunk(count, running, mix);
      }
      after = running;
      fresh = false;
    }
    this->factor(dlocal) = power_of<Acc>(gone);
  }

  void sum_queries(Acc* dlocal, bool fresh) {
    const int64_t chunks = (item.end - item.begin + chunk - 1) / chunk;
    double gone = 0;
    for (int64_t n = chunks - 1; n >= 0; --n) {
      const int64_t t = item.begin + n * chunk;
      const int64_t count = min64(chunk, item.end - t);
      pack_queries(t, count);
      pack_gradients(t, count);
      read_decay(t, count);
      if (p.delta()) pull_back(t, count, fresh ? nullptr : dlocal);
      make_features(q_, qf_, count, true);
      if (decays()) {
        scale_lanes(qf_, features, ld, whole_vectors<Acc>(count), decay_.from_start);
      }
      add_chunk(count, dlocal, kept(!fresh));
      fresh = false;
      gone += decays() ? decay_.total : 0;
    }
    this->factor(dlocal) = power_of<Acc>(gone);
  }

 private:
  static constexpr int64_t kMostChunks = 16;

  void* past(void* scratch) const {
    return scratch ? static_cast<char*>(scratch) + again_.scratch_bytes() : nullptr;
  }
  int64_t segment() const { return Head::segment_of(p, chunk); }

  void make_states(int64_t chunks, const Acc* carry) {
    before_[0] = carry;
    for (int64_t n = 1; n < chunks; ++n) {
      Acc* const state = states_ + n * this->state_size();
      again_.next_state(item.begin + (n - 1) * chunk, chunk, before_[n - 1], state);
      before_[n] = state;
    }
  }

  // Starts writing this chunk's gradients, and reading the chunk before it.
  void look_ahead(int64_t t) {
    ahead_.clear();
    const auto rows = [&](const TensorRef& ref, int64_t from, int64_t heads, int64_t dim,
                          bool write) {
      if (from >= item.begin) Head::look_ahead(&ahead_, item, ref, from, heads, 0, dim, write);
    };
    const int64_t dim = p.head_dim, earlier = t - chunk;
    if (p.query_heads == p.heads) rows(p.dquery, t, p.heads, dim, true);
    if (p.key_heads == p.heads) rows(p.dkey, t, p.heads, dim, true);
    if (p.value_heads == p.heads) rows(p.dvalue, t, p.heads, columns, true);
    rows(p.query, earlier, p.query_heads, dim, false);
    rows(p.key, earlier, p.key_heads, dim, false);
    rows(p.value, earlier, p.value_heads, columns, false);
    rows(p.dout, earlier, p.heads, columns, false);
    // Scores and their gradients; what they mean for entries and values; the two states' parts.
    ahead_.pace(2 * (count_tiles<Acc>(chunk, ld) + count_tiles<Acc>(dim, ld) +
                     count_tiles<Acc>(features, ld) + count_tiles<Acc>(chunk, width)) +
                count_tiles<Acc>(features, width));
  }

  void pack_queries(int64_t t, int64_t count) {
    pack_lanes<T, Acc>(p.feature_map, this->template row<const T>(p.query, t, p.query_heads),
                       this->step(p.query), count, p.head_dim, q_, ld);
  }

  void pack_keys(int64_t t, int64_t count) {
    pack_lanes<T, Acc>(p.feature_map, this->template row<const T>(p.key, t, p.key_heads),
                       this->step(p.key), count, p.head_dim, k_, ld);
  }

  // dO as rows and lanes; the numbers by which outputs were divided, inverted, which take part
  // where rounding does not add to that of bf16; and what the gradients of the sums of features are
  // for the state: dmean_ inverse_.
  void pack_gradients(int64_t t, int64_t count) {
    const T* dout = this->template row<const T>(p.dout, t, p.heads) + item.column;
    pack_rows<T, Acc>(dout, this->step(p.dout), count, columns, dout_, width);
    if (p.normalize) {
      const T* out = this->template row<const T>(p.out, t, p.heads) + item.column;
      const T* remainder = nullptr;
      if (p.remainder.data) {
        remainder = this->template row<const T>(p.remainder, t, p.heads) + item.column;
      }
      const Acc* denominator = this->template row<const Acc>(p.denominator, t, p.heads);
      for (int64_t i = 0; i < ld; ++i) dsum_[i] = inverse_[i] = dmean_[i] = 0;
      for (int64_t i = 0; i < count; ++i) {
        const Acc divisor = denominator[i * this->step(p.denominator)];
        VecOf<Acc> sum{};
        for (int64_t c = 0; c < columns; c += kLanes) {
          VecOf<Acc> o = widen_part<T, Acc>(out + i * this->step(p.out) + c, columns - c);
          if (remainder) {
            o += widen_part<T, Acc>(remainder + i * this->step(p.remainder) + c, columns - c);
          }
          sum += load(dout_ + i * width + c) * o;
        }
        inverse_[i] = 1 / divisor;
        dmean_[i] = of_denominator(t, i) * divisor - add_lanes<Acc>(sum);
      }
    }
    pack_lanes<FeatureMap::kIdentity, Acc, Acc>(dout_, width, count, columns, dout_lanes_, ld);
  }
  Acc of_denominator(int64_t t, int64_t i) const {
    if (!p.ddenominator.data) return 0;
    return *this->template row<const Acc>(p.ddenominator, t + i, p.heads);
  }
  // The same for the query itself, from dO . its numerators.
  void set_sum(int64_t t, int64_t i, Acc product) {
    dsum_[i] = of_denominator(t, i) - product * this->outer_scale() * inverse_[i] * inverse_[i];
  }

  void read_decay(int64_t t, int64_t count) {
    if (!decays()) return;
    decay_.read(this->template row<const Acc>(p.decay, t, p.heads), this->step(p.decay), count,
                whole_vectors<Acc>(count));
  }

  void make_features(const Acc* x, Acc* f, int64_t count, bool weighted) {
    const Acc scale = weighted ? this->inner_scale() : Acc(1);
    if (taylor()) return taylor_features(x, scale, p.head_dim, ld, count, weighted, f);
    if (f == x) return;
    for (int64_t i = 0; i < features * ld; i += kLanes) store(f + i, load(x + i));
  }

  void pack(int64_t t, int64_t count, const Acc* before) {
    pack_queries(t, count);
    pack_keys(t, count);
    pack_rows<T, Acc>(this->template row<const T>(p.value, t, p.value_heads) + item.column,
                      this->step(p.value), count, columns, v_, width);
    pack_gradients(t, count);
    read_decay(t, count);
    if (p.delta()) solve(t, count, before);
    pack_lanes<FeatureMap::kIdentity, Acc, Acc>(v_, width, count, columns, v_lanes_, ld);
  }

  // The delta rule: the system of a chunk, keys_ and beta_.
  void make_system(int64_t t, int64_t count) {
    const Acc* beta = this->template row<const Acc>(p.beta, t, p.heads);
    for (int64_t i = 0; i < count; ++i) beta_[i] = beta[i * this->step(p.beta)];
    key_products(k_, ld, features, count, decays() ? &decay_ : nullptr, weights_, keys_);
  }
  // v_ becomes what is written, e_ what it was before beta.
  void solve(int64_t t, int64_t count, const Acc* before) {
    const Acc* decay = decays() ? decay_.from_start : nullptr;
    if (before) subtract_read(k_, ld, features, count, decay, before, width, y_, v_);
    make_system(t, count);
    solve_lower(keys_, ld, count, beta_, v_, e_, later_, width);
    Acc* const lacking = v_;
    v_ = e_;
    e_ = lacking;
  }

  // Of the delta rule only what the state's gradient takes from a chunk: h_, and in kf_ the keys
  // that read. The same products as in a whole pass, whose columns need no others.
  void pull_back(int64_t t, int64_t count, const Acc* after) {
    pack_keys(t, count);
    make_system(t, count);
    const int64_t lanes = whole_vectors<Acc>(count);
    for (int64_t i = 0; i < count; i += kRows) {
      const int64_t rows = min64(kRows, count - i);
      product<By::kColumns>(rows, whole_vectors<Acc>(i + rows), p.head_dim, q_ + i, ld, k_, ld,
                            s_ + i * ld, ld, false);
    }
    for (int64_t i = 0; i < count; ++i) {
      if (decays()) decay_.weights(i, lanes, weights_);
      for (int64_t j = 0; j <= i && decays(); ++j) s_[i * ld + j] *= weights_[j];
      for (int64_t j = i + 1; j < lanes; ++j) s_[i * ld + j] = 0;
    }
    value_gradients(count, is_finite(t, count));
    if (after) {
      make_features(k_, kf_, count, false);
      if (decays()) scale_lanes(kf_, features, ld, lanes, decay_.to_end);
      product<By::kColumns>(count, width, features, kf_, ld, after, width, dv_, width, true);
    }
    solve_upper(keys_, ld, count, beta_, dv_, y_, h_, later_, width);
    find_readers(count);
  }

  void query_features(int64_t count) {
    make_features(q_, qf_, count, true);
    if (decays()) {
      scale_lanes(qf_, features, ld, whole_vectors<Acc>(count), decay_.from_start);
    }
  }
  // What the state before the chunk means for features of its queries, and far_, its share of
  // dO . numerators.
  void read_state(int64_t count, const Acc* before) {
    const int64_t lanes = whole_vectors<Acc>(count);
    query_features(count);
    if (before) {
      product<By::kRows>(features, lanes, columns, before, width, dout_lanes_, ld, df_, ld, false,
                         &ahead_);
      dot_lanes(qf_, df_, features, lanes, far_, false);
    } else {
      for (int64_t i = 0; i < lanes; ++i) far_[i] = 0;
    }
  }
  // Of query i, from its products with the chunk's keys: the very ones that cancel against it in
  // the gradient. Outputs have been rounded, and beside that a gradient may be small.
  void sum_of_pairs(int64_t t, int64_t i) {
    const Acc *const s_row = s_ + i * ld, *const p_row = dp_ + i * ld;
    VecOf<Acc> sum{};
    for (int64_t j = 0; j <= i; j += kLanes) {
      VecOf<Acc> more = score(load(s_row + j)) * load(p_row + j);
      if (decays()) more *= load(weights_ + j);
      sum += select_bits<Acc>(up_to(i, j), more, VecOf<Acc>{});
    }
    set_sum(t, i, add_lanes<Acc>(sum) + far_[i]);
  }
  // Lanes of the keys from j on that query i sees.
  static uint64_t up_to(int64_t i, int64_t j) {
    return j + kLanes > i + 1 ? (uint64_t(2) << (i - j)) - 1 : ~uint64_t(0);
  }
  VecOf<Acc> score(VecOf<Acc> s) const {
    if (!taylor()) return s;
    s *= this->inner_scale();
    return (s * Acc(0.5) + Acc(1)) * s + Acc(1);
  }

  // Products within the chunk: dq_, dk_, dv_, and what each pair says of the decays between.
  void within(int64_t t, int64_t count) {
    const int64_t lanes = whole_vectors<Acc>(count), dim = p.head_dim;
    if (!p.causal) {
      for (int64_t i = 0; i < dim * ld; ++i) dq_[i] = dk_[i] = 0;
      for (int64_t i = 0; i < count && p.normalize; ++i) set_sum(t, i, far_[i]);
      return;
    }
    for (int64_t i = 0; i < count; i += kRows) {
      const int64_t rows = min64(kRows, count - i), seen = whole_vectors<Acc>(i + rows);
      product<By::kColumns>(rows, seen, dim, q_ + i, ld, k_, ld, s_ + i * ld, ld, false, &ahead_);
      product<By::kColumns>(rows, seen, columns, dout_lanes_ + i, ld, v_lanes_, ld, dp_ + i * ld,
                            ld, false, &ahead_);
    }
    if (decays()) slopes_.begin();
    for (int64_t i = 0; i < count; ++i) {
      Acc *s_row = s_ + i * ld, *p_row = dp_ + i * ld;
      const int64_t seen = whole_vectors<Acc>(i + 1);
      if (decays()) decay_.weights(i, seen, weights_);
      if (p.normalize) sum_of_pairs(t, i);
      for (int64_t j = 0; j < seen; j += kLanes) {
        const uint64_t bits = up_to(i, j);
        VecOf<Acc> s = load(s_row + j), dp = load(p_row + j);
        if (p.normalize) dp = dp * inverse_[i] + dsum_[i];
        if (decays()) dp *= load(weights_ + j);
        VecOf<Acc> ds = dp;
        if (taylor()) ds *= s * this->inner_scale() + Acc(1);
        s = score(s);
        if (decays()) {
          store(p_row + j, s * dp * this->outer_scale());
          slopes_.count(i, j, min64(kLanes, i - j), p_row);
          s *= load(weights_ + j);
        }
        if (p.normalize) s *= inverse_[i];
        store(s_row + j, select_bits<Acc>(bits, s, VecOf<Acc>{}));
        store(p_row + j, select_bits<Acc>(bits, ds, VecOf<Acc>{}));
      }
      for (int64_t j = seen; j < lanes; ++j) s_row[j] = p_row[j] = 0;
    }
    turn_pairs(count, lanes);
    const bool finite = is_finite(t, count);
    finite ? entry_gradients(count) : entries_pair_by_pair(count);
    value_gradients(count, finite);
  }
  // Of a chunk's queries, keys and gradients of outputs; of these all columns, lest a bit depend on
  // how they are shared out.
  bool is_finite(int64_t t, int64_t count) const {
    VecOf<Acc> zero{};
    const auto add = [&](const Acc* x, int64_t rows, int64_t step, int64_t numbers) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < numbers; i += kLanes) zero += load(x + r * step + i) * Acc(0);
      }
    };
    add(q_, p.head_dim, ld, count);
    add(k_, p.head_dim, ld, count);
    if (columns == p.head_dim_v) {
      add(dout_, count, width, columns);
      return add_lanes<Acc>(zero) == 0;
    }
    const T* row = this->template row<const T>(p.dout, t, p.heads);
    for (int64_t i = 0; i < count; ++i, row += this->step(p.dout)) {
      for (int64_t c = 0; c < p.head_dim_v; c += kLanes) {
        zero += widen_part<T, Acc>(row + c, p.head_dim_v - c) * Acc(0);
      }
    }
    return add_lanes<Acc>(zero) == 0;
  }
  // dv_, of queries from the key on. 0 times what is not finite has no place in it: pair by pair
  // then, as in `entries_pair_by_pair`.
  void value_gradients(int64_t count, bool finite) {
    if (finite) {
      for (int64_t j = 0; j < count; j += kRows) {
        product<By::kColumns>(min64(kRows, count - j), width, count - j, s_ + j * ld + j, ld,
                              dout_ + j * width, width, dv_ + j * width, width,
                              Mix<Acc>{false, 1, this->outer_scale()}, &ahead_);
      }
      return;
    }
    for (int64_t i = 0; i < count * width; ++i) dv_[i] = 0;
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t i = j; i < count; ++i) {
        const Acc by = s_[i * ld + j] * this->outer_scale();
        for (int64_t c = 0; c < width; c += kLanes) {
          store(dv_ + j * width + c, load(dv_ + j * width + c) + by * load(dout_ + i * width + c));
        }
      }
    }
  }
  void entries_pair_by_pair(int64_t count) {
    const int64_t dim = p.head_dim;
    for (int64_t i = 0; i < dim * ld; ++i) dq_[i] = dk_[i] = 0;
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t i = j / kLanes * kLanes; i < count; i += kLanes) {
        const uint64_t from_key_on = j > i ? ~uint64_t(0) << (j - i) : ~uint64_t(0);
        for (int64_t d = 0; d < dim; ++d) {
          const VecOf<Acc> more = k_[d * ld + j] * load(dp_lanes_ + j * ld + i);
          store(dq_ + d * ld + i,
                load(dq_ + d * ld + i) + select_bits<Acc>(from_key_on, more, VecOf<Acc>{}));
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j <= i; j += kLanes) {
        const uint64_t up_to_query =
            j + kLanes > i + 1 ? (uint64_t(2) << (i - j)) - 1 : ~uint64_t(0);
        for (int64_t d = 0; d < dim; ++d) {
          const VecOf<Acc> more = q_[d * ld + i] * Acc(p.scale) * load(dp_ + i * ld + j);
          store(dk_ + d * ld + j,
                load(dk_ + d * ld + j) + select_bits<Acc>(up_to_query, more, VecOf<Acc>{}));
        }
      }
    }
  }
  // dq_ and dk_. A vector of queries has the keys up to its last, one of keys the queries from its
  // first on.
  void entry_gradients(int64_t count) {
    // Narrow strips leave out more; a short vector alone has too few sums to hide their latency.
    constexpr int64_t kStrip = kLanes < 16 ? 2 * kLanes : kLanes;
    const int64_t lanes = whole_vectors<Acc>(count), dim = p.head_dim;
    for (int64_t i = 0; i < lanes; i += kStrip) {
      const int64_t more = min64(kStrip, lanes - i), to = min64(i + more, count);
      product<By::kRows>(dim, more, to, k_, ld, dp_lanes_ + i, ld, dq_ + i, ld, false, &ahead_);
      product<By::kRows>(dim, more, count - i, q_ + i, ld, dp_ + i * ld + i, ld, dk_ + i, ld,
                         Mix<Acc>{false, 1, Acc(p.scale)}, &ahead_);
    }
  }
  // dp_lanes_ = dp_ turned, with zeros in the lanes beyond `count`.
  void turn_pairs(int64_t count, int64_t lanes) {
    unpack_lanes(count, count, dp_lanes_, ld,
                 [&](int64_t j, int64_t i) { return load(dp_ + j * ld + i); });
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t t = count; t < lanes; ++t) dp_lanes_[r * ld + t] = 0;
    }
  }

  // Products with the states, and what is left to store.
  void across(int64_t t, int64_t count, const Acc* before, const Acc* after) {
    const int64_t lanes = whole_vectors<Acc>(count);
    if (!p.normalize) query_features(count);
    make_features(k_, kf_, count, false);
    if (decays()) scale_lanes(kf_, features, ld, lanes, decay_.to_end);
    // What states mean for entries that are their own features is added up in place.
    const bool plain = !taylor() && !decays();
    if (before) {
      const bool in_place = plain && !p.normalize;
      if (p.normalize) {
        scale_lanes(df_, features, ld, lanes, inverse_);
        add_sums(this->sums(before), dsum_, lanes, df_);
      } else {
        product<By::kRows>(features, lanes, columns, before, width, dout_lanes_, ld,
                           in_place ? dq_ : df_, ld, in_place, &ahead_);
      }
      if (decays()) dot_lanes(qf_, df_, features, lanes, slopes_.queries, false);
      if (decays()) scale_all(slopes_.queries, 1, 0, ld, this->outer_scale());
      if (decays()) scale_lanes(df_, features, ld, lanes, decay_.from_start);
      if (!in_place) chain(q_, true, lanes, dq_);
    }
    if (after) {
      Acc* const to = plain ? dk_ : df_;
      product<By::kRows>(features, lanes, columns, after, width, v_lanes_, ld, to, ld, plain,
                         &ahead_);
      if (p.normalize) add_sums(this->sums(after), nullptr, lanes, to);
      if (decays()) dot_lanes(kf_, df_, features, lanes, slopes_.keys, false);
      if (decays()) scale_lanes(df_, features, ld, lanes, decay_.to_end);
      if (!plain) chain(k_, false, lanes, dk_);
      product<By::kColumns>(count, width, features, kf_, ld, after, width, dv_, width, p.causal,
                            &ahead_);
    } else if (!p.causal) {
      for (int64_t i = 0; i < count * width; ++i) dv_[i] = 0;
    }
    if (p.delta()) unsolve(t, count, before);
    if (p.ddecay.data) store_decay(t, count, before, after);
    store_lanes(p.dquery, p.query_heads, t, count, q_, dq_, Acc(p.scale));
    store_lanes(p.dkey, p.key_heads, t, count, k_, dk_, Acc(1));
    if (p.value_heads == p.heads) {
      store_rows(this->template row<T>(p.dvalue, t, p.heads), this->step(p.dvalue), count);
    } else {
      store_rows(this->template row<Acc>(p.dvalue, t, p.heads), this->step(p.dvalue), count);
    }
  }

  void add_sums(const Acc* sums, const Acc* per_lane, int64_t lanes, Acc* df) {
    for (int64_t f = 0; f < features; ++f) {
      for (int64_t i = 0; i < lanes; i += kLanes) {
        const VecOf<Acc> more = per_lane ? load(per_lane + i) * sums[f] : broadcast(sums[f]);
        store(df + f * ld + i, load(df + f * ld + i) + more);
      }
    }
  }
  // out[lanes] = sum over features of a * b.
  void dot_lanes(const Acc* a, const Acc* b, int64_t rows, int64_t lanes, Acc* out, bool add) {
    for (int64_t i = 0; i < lanes; i += kLanes) {
      VecOf<Acc> sum{};
      if (add) sum = load(out + i);
      for (int64_t f = 0; f < rows; ++f) sum += load(a + f * ld + i) * load(b + f * ld + i);
      store(out + i, sum);
    }
  }
  void chain(const Acc* x, bool weighted, int64_t lanes, Acc* dx) {
    const Acc scale = weighted ? this->inner_scale() : Acc(1);
    if (taylor()) return taylor_chain(x, scale, df_, p.head_dim, ld, lanes, weighted, dx);
    for (int64_t f = 0; f < features; ++f) {
      for (int64_t i = 0; i < lanes; i += kLanes) {
        store(dx + f * ld + i, load(dx + f * ld + i) + load(df_ + f * ld + i));
      }
    }
  }

  // Through the triangular system of the delta rule: dv_ holds the gradient of what was written,
  // and becomes that of the values. h_ = -beta y is the gradient of what keys read of the state.
  void unsolve(int64_t t, int64_t count, const Acc* before) {
    const int64_t lanes = whole_vectors<Acc>(count);
    solve_upper(keys_, ld, count, beta_, dv_, y_, h_, later_, width);
    for (int64_t i = 0; i < count; ++i) {
      VecOf<Acc> sum{};
      for (int64_t c = i * width; c < (i + 1) * width; c += kLanes) {
        sum += load(y_ + c) * load(e_ + c);
        store(dv_ + c, -load(h_ + c));
      }
      dbeta_[i] = add_lanes<Acc>(sum);
    }
    if (p.dbeta.data) {
      Acc* dbeta = this->template row<Acc>(p.dbeta, t, p.heads);
      for (int64_t i = 0; i < count; ++i) dbeta[i * this->step(p.dbeta)] = dbeta_[i];
    }
    pack_lanes<FeatureMap::kIdentity, Acc, Acc>(h_, width, count, columns, h_lanes_, ld);
    product<By::kColumns>(count, lanes, columns, h_lanes_, ld, v_lanes_, ld, dp_, ld, false);
    for (int64_t i = 0; i < count; ++i) {
      Acc* row = dp_ + i * ld;
      if (decays()) {
        decay_.weights(i, lanes, weights_);
        for (int64_t j = 0; j < i; ++j) s_[j] = row[j] * keys_[i * ld + j];
        slopes_.count(i, 0, i, s_);
        for (int64_t j = 0; j < i; ++j) row[j] *= weights_[j];
      }
      for (int64_t j = i; j < lanes; ++j) row[j] = 0;
    }
    turn_pairs(count, lanes);
    product<By::kRows>(features, lanes, count, k_, ld, dp_lanes_, ld, dk_, ld, true);
    product<By::kRows>(features, lanes, count, k_, ld, dp_, ld, dk_, ld, true);
    find_readers(count);
    if (!before) return;
    product<By::kRows>(features, lanes, columns, before, width, h_lanes_, ld, df_, ld, false);
    if (decays()) dot_lanes(kf_, df_, features, lanes, slopes_.queries, true);
    if (decays()) scale_lanes(df_, features, ld, lanes, decay_.from_start);
    chain(k_, false, lanes, dk_);
  }

  // kf_ becomes the keys that read, each as decayed as the state it saw.
  void find_readers(int64_t count) {
    make_features(k_, kf_, count, false);
    if (decays()) {
      scale_lanes(kf_, features, ld, whole_vectors<Acc>(count), decay_.from_start);
    }
  }

  // What the decays scale of the state that goes through the chunk is told apart from its pairs.
  void store_decay(int64_t t, int64_t count, const Acc* before, const Acc* after) {
    double through = 0;
    if (before && after) {
      for (int64_t f = 0; f < features; ++f) {
        VecOf<Acc> sum{};
        for (int64_t c = 0; c < width; c += kLanes) {
          sum += load(before + f * width + c) * load(after + f * width + c);
        }
        through += add_lanes<Acc>(sum);
        if (p.normalize) through += double(this->sums(before)[f]) * this->sums(after)[f];
      }
      through *= power_of<Acc>(decay_.total);
    }
    slopes_.store(through, count, this->template row<Acc>(p.ddecay, t, p.heads),
                  this->step(p.ddecay));
  }

  // Of entries, from those of features, `f`, times `scale`.
  void store_lanes(const TensorRef& ref, int64_t heads, int64_t t, int64_t count, const Acc* f,
                   const Acc* dx, Acc scale) {
    const int64_t dim = p.head_dim;
    const auto to_rows = [&](auto* rows) {
      with_map(p.feature_map, [&](auto map) {
        unpack_lanes(count, dim, rows, this->step(ref), [&](int64_t d, int64_t i) {
          return feature_chain<map.value, Acc>(load(f + d * ld + i), load(dx + d * ld + i) * scale);
        });
      });
    };
    if (heads == p.heads) {
      to_rows(this->template row<T>(ref, t, p.heads));
    } else {
      to_rows(this->template row<Acc>(ref, t, p.heads));
    }
  }
  template <class U>
  void store_rows(U* rows, int64_t step, int64_t count) {
    for (int64_t i = 0; i < count; ++i) narrow_row(dv_ + i * width, columns, rows + i * step);
  }

  // What is left of a state's gradient before the chunk.
  Mix<Acc> kept(bool reads) const {
    return {reads, decays() ? power_of<Acc>(decay_.total) : Acc(1), this->outer_scale()};
  }
  void add_chunk(int64_t count, Acc* dlocal, Mix<Acc> mix) {
    const int64_t lanes = whole_vectors<Acc>(count);
    if (p.normalize) scale_lanes(qf_, features, ld, lanes, inverse_);
    this->template add_outer<By::kRows>(qf_, ld, dout_, count, mix, dlocal, dmean_, &ahead_);
    if (p.delta()) {
      this->template add_outer<By::kRows>(kf_, ld, h_, count, Mix<Acc>{true}, dlocal, nullptr);
    }
  }

  LinearForward<T> again_;  // makes states once more
  Ahead ahead_;
  Scratch<Acc> arena_;
  ChunkDecay<Acc> decay_;
  DecayGradient<Acc> slopes_;
  Acc *q_, *k_, *qf_, *kf_, *dq_, *dk_, *df_, *v_, *dout_, *dv_, *v_lanes_, *dout_lanes_, *s_, *dp_,
      *dp_lanes_, *dsum_, *inverse_, *dmean_, *far_, *weights_, *after_, *states_;
  Acc *keys_ = nullptr, *beta_ = nullptr, *dbeta_ = nullptr, *e_ = nullptr, *y_ = nullptr,
      *h_ = nullptr, *h_lanes_ = nullptr, *later_ = nullptr;
  const Acc* before_[kMostChunks];
};

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
