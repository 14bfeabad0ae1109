// SPDX-License-Identifier: Apache-2.0
// Linear attention on every instruction set and dtype, without Python: outputs and states against
// the recurrence in float64, float64's gradients against differences of outputs, those of the other
// dtypes against float64's.
#include <algorithm>
#include <cstdio>
#include <string>

#include "cpu/linear.h"
#include "everywhere.h"
#include "tensor.h"

using namespace attnext;

namespace {

struct Problem {
  FeatureMap map;
  int64_t heads, key_heads, dim, dim_v, tokens;
  bool causal = true, reverse = false, normalize = false, decay = false, beta = false;
  bool packed = false, states = false;
  int64_t chunk = 0;
};

std::vector<double> features_of(FeatureMap map, const std::vector<double>& x, double scale) {
  std::vector<double> f;
  if (map == FeatureMap::kTaylor2) {  // whose products are 1 + s + s^2 / 2
    f.push_back(1);
    for (const double a : x) f.push_back(std::sqrt(scale) * a);
    for (const double a : x) {
      for (const double b : x) f.push_back(scale * a * b / std::sqrt(2.0));
    }
    return f;
  }
  for (const double a : x) {
    const double elu = a > 0 ? a + 1 : std::exp(a), relu = a > 0 ? a : 0;
    f.push_back(map == FeatureMap::kElu ? elu : map == FeatureMap::kRelu ? relu : a);
  }
  return f;
}

// All that a call reads and writes.
struct Call {
  const Problem& c;
  DType type, acc;
  int64_t batch = 2, extent[3];
  Tensor query, key, value, decay, beta, out, denominator, remainder, dout, ddenominator;
  Tensor dquery, dkey, dvalue, ddecay, dbeta;
  std::vector<LinearSequence> sequences;
  std::vector<char> initial, final_state, dfinal, dinitial;
  LinearParams p{};

  Call(const Problem& problem, DType t)
      : c(problem),
        type(t),
        acc(t == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32),
        extent{1, 1, c.tokens},
        query(t, batch, extent, c.heads, c.dim),
        key(t, batch, extent, c.key_heads, c.dim),
        value(t, batch, extent, c.heads, c.dim_v),
        decay(acc, batch, extent, c.heads, 1),
        beta(acc, batch, extent, c.heads, 1),
        out(t, batch, extent, c.heads, c.dim_v),
        denominator(acc, batch, extent, c.heads, 1),
        remainder(t, batch, extent, c.heads, c.dim_v),
        dout(t, batch, extent, c.heads, c.dim_v),
        ddenominator(acc, batch, extent, c.heads, 1),
        dquery(t, batch, extent, c.heads, c.dim),
        dkey(c.key_heads == c.heads ? t : acc, batch, extent, c.heads, c.dim),
        dvalue(t, batch, extent, c.heads, c.dim_v),
        ddecay(acc, batch, extent, c.heads, 1),
        dbeta(acc, batch, extent, c.heads, 1) {
    for (int64_t b = 0; b < batch; ++b) {
      if (c.packed && b > 0) {
        sequences.push_back({b, 0, c.tokens / 3});
        sequences.push_back({b, c.tokens / 3, c.tokens / 3});
        sequences.push_back({b, c.tokens / 3, c.tokens});
      } else {
        sequences.push_back({b, 0, c.tokens});
      }
    }
    p.dtype = t;
    p.feature_map = c.map;
    p.causal = c.causal, p.reverse = c.reverse, p.normalize = c.normalize;
    p.batch = batch, p.tokens = c.tokens, p.heads = c.heads;
    p.query_heads = p.value_heads = c.heads, p.key_heads = c.key_heads;
    p.head_dim = c.dim, p.head_dim_v = c.dim_v;
    p.num_sequences = static_cast<int64_t>(sequences.size());
    p.sequences = sequences.data();
    p.chunk = c.chunk;
    p.scale = 0.4, p.eps = 0.5;
    const int64_t bytes = state_numbers() * attnext::size_of(acc);
    for (auto* state : {&initial, &final_state, &dfinal, &dinitial}) state->resize(bytes);
  }
  int64_t state_numbers() const {
    return p.num_sequences * p.heads * p.features() * p.state_columns();
  }
  // What a call of another dtype reads, as this one's dtype has it.
  void take(const Call& other) {
    const Tensor* from[] = {&other.query, &other.key,  &other.value,
                            &other.decay, &other.beta, &other.dout};
    Tensor* to[] = {&query, &key, &value, &decay, &beta, &dout};
    for (int i = 0; i < 6; ++i) {
      for (int64_t r = 0; r < to[i]->rows(); ++r) {
        for (int64_t d = 0; d < to[i]->n[5]; ++d) to[i]->set(r, d, from[i]->get(r, d));
      }
    }
    for (int64_t n = 0; n < state_numbers(); ++n) {
      from_double(acc, initial.data(), n, to_double(other.acc, other.initial.data(), n));
      from_double(acc, dfinal.data(), n, to_double(other.acc, other.dfinal.data(), n));
    }
  }
  void randomise(std::mt19937& rng) {
    std::normal_distribution<double> normal;
    for (Tensor* t : {&query, &key, &value, &dout}) t->randomise(rng, 0.6);
    for (int64_t r = 0; r < decay.rows(); ++r) {
      decay.set(r, 0, -std::fabs(normal(rng)) * 0.2);
      // With longer keys a state would grow.
      beta.set(r, 0, (0.5 + 0.2 * std::tanh(normal(rng))) * std::min(1.0, 4.0 / c.dim));
    }
    // The sums behind the columns stay positive, so that nobody divides by almost nothing.
    for (int64_t n = 0; n < state_numbers(); ++n) {
      const bool sum = c.normalize && n % p.state_columns() == c.dim_v;
      from_double(acc, initial.data(), n, sum ? 1 + std::fabs(normal(rng)) : 0.3 * normal(rng));
      from_double(acc, dfinal.data(), n, 0.3 * normal(rng));
    }
  }
  void point() {
    p.query = query.ref(), p.key = key.ref(), p.value = value.ref();
    if (c.decay) p.decay = decay.ref(), p.ddecay = ddecay.ref();
    if (c.beta) p.beta = beta.ref(), p.dbeta = dbeta.ref();
    p.out = out.ref(), p.dout = dout.ref();
    p.dquery = dquery.ref(), p.dkey = dkey.ref(), p.dvalue = dvalue.ref();
    if (c.normalize) p.denominator = denominator.ref();
    if (c.normalize && attnext::size_of(type) == 2) p.remainder = remainder.ref();
    if (c.states) {
      p.initial_state = initial.data(), p.final_state = final_state.data();
      p.dfinal_state = dfinal.data(), p.dinitial_state = dinitial.data();
    }
  }
  void forward() {
    point();
    cpu::linear_forward(p);
  }
  void backward() {
    point();
    cpu::linear_backward(p);
  }
  // What the gradients are of.
  double objective() {
    forward();
    double sum = 0;
    for (int64_t r = 0; r < out.rows(); ++r) {
      for (int64_t d = 0; d < c.dim_v; ++d) sum += out.get(r, d) * dout.get(r, d);
    }
    for (int64_t n = 0; c.states && n < state_numbers(); ++n) {
      sum += to_double(acc, final_state.data(), n) * to_double(acc, dfinal.data(), n);
    }
    return sum;
  }
};

// Token by token; with the plain maps states are compared too.
void check_recurrence(Call& call, double tolerance, const std::string& name) {
  const Problem& c = call.c;
  const LinearParams& p = call.p;
  struct Worst {
    double error = 0, size = 1;
    void meet(double got, double want) {
      const double off = std::fabs(got - want);
      error = off <= error ? error : off;  // NaN stays
      size = std::max(size, std::fabs(want));
    }
  } outputs, states;
  const bool plain = c.map != FeatureMap::kTaylor2;
  const double inner = plain ? 1 : p.scale, outer = plain ? p.scale : 1;
  for (int64_t s = 0; s < p.num_sequences; ++s) {
    const LinearSequence& q = call.sequences[s];
    for (int64_t h = 0; h < c.heads; ++h) {
      const auto row_of = [&](const Tensor& t, int64_t i, int64_t head) {
        const int64_t at[3] = {0, 0, c.reverse ? q.end - 1 - i : q.begin + i};
        return t.row(q.batch, at, head);
      };
      const auto entries = [&](const Tensor& t, int64_t row) {
        std::vector<double> x;
        for (int64_t d = 0; d < t.n[5]; ++d) x.push_back(t.get(row, d));
        return x;
      };
      const int64_t columns = p.state_columns(), length = q.end - q.begin;
      const auto key_of = [&](int64_t i) {
        const int64_t row = row_of(call.key, i, h * c.key_heads / c.heads);
        return features_of(c.map, entries(call.key, row), inner);
      };
      const int64_t features =
          static_cast<int64_t>(features_of(c.map, std::vector<double>(c.dim), inner).size());
      std::vector<double> state(features * columns);
      const int64_t place = (s * c.heads + h) * features * columns;
      for (int64_t n = 0; plain && c.states && n < features * columns; ++n) {
        state[n] = to_double(call.acc, call.initial.data(), place + n);
      }
      const auto add = [&](int64_t i) {
        const std::vector<double> k = key_of(i);
        const int64_t row = row_of(call.value, i, h);
        const double kept = c.decay ? std::exp(call.decay.get(row_of(call.decay, i, h), 0)) : 1;
        for (double& x : state) x *= kept;
        for (int64_t d = 0; d < columns; ++d) {
          double v = d < c.dim_v ? call.value.get(row, d) : 1;
          if (c.beta) {
            double read = 0;
            for (int64_t f = 0; f < features; ++f) read += k[f] * state[f * columns + d];
            v = call.beta.get(row_of(call.beta, i, h), 0) * (v - read);
          }
          for (int64_t f = 0; f < features; ++f) state[f * columns + d] += k[f] * v;
        }
      };
      for (int64_t i = 0; !c.causal && i < length; ++i) add(i);
      for (int64_t i = 0; i < length; ++i) {
        if (c.causal) add(i);
        const int64_t row = row_of(call.query, i, h);
        const std::vector<double> f = features_of(c.map, entries(call.query, row), inner);
        std::vector<double> read(columns);
        for (int64_t n = 0; n < features; ++n) {
          for (int64_t d = 0; d < columns; ++d) read[d] += f[n] * state[n * columns + d];
        }
        double divisor = 1;
        if (c.normalize) {
          divisor = outer * read[c.dim_v];
          divisor += divisor < 0 ? -p.eps : p.eps;
        }
        for (int64_t d = 0; d < c.dim_v; ++d) {
          outputs.meet(call.out.get(row_of(call.out, i, h), d), outer * read[d] / divisor);
        }
      }
      for (int64_t n = 0; plain && c.states && n < features * columns; ++n) {
        states.meet(to_double(call.acc, call.final_state.data(), place + n), state[n]);
      }
    }
  }
  for (const Worst* x : {&outputs, &states}) {
    expect(x->error <= tolerance * x->size, name + (x == &states ? ": state" : ": output") +
                                                " is off by " + std::to_string(x->error));
  }
}

// float64's gradients along a direction, against a difference of the objective.
void check_slope(Call& call, std::mt19937& rng, const std::string& name) {
  const double h = 1e-6;
  std::normal_distribution<double> normal;
  struct {
    Tensor *x, *gradient;
    bool there;
    const char* what;
  } inputs[] = {{&call.query, &call.dquery, true, "query"},
                {&call.key, &call.dkey, true, "key"},
                {&call.value, &call.dvalue, true, "value"},
                {&call.decay, &call.ddecay, call.c.decay, "decay"},
                {&call.beta, &call.dbeta, call.c.beta, "beta"}};
  for (const auto& input : inputs) {
    if (!input.there) continue;
    Tensor& x = *input.x;
    const Tensor kept = x;
    const int64_t dim = x.n[5], group = input.gradient->n[4] / x.n[4];
    std::vector<double> direction(x.rows() * dim);
    double slope = 0;
    for (int64_t r = 0; r < x.rows(); ++r) {
      for (int64_t d = 0; d < dim; ++d) {
        direction[r * dim + d] = normal(rng);
        for (int64_t g = 0; g < group; ++g) {  // heads lie side by side
          slope += direction[r * dim + d] * input.gradient->get(r * group + g, d);
        }
      }
    }
    double ends[2];
    for (int side = 0; side < 2; ++side) {
      for (int64_t r = 0; r < x.rows(); ++r) {
        for (int64_t d = 0; d < dim; ++d) {
          x.set(r, d, kept.get(r, d) + (side ? h : -h) * direction[r * dim + d]);
        }
      }
      ends[side] = call.objective();
    }
    x = kept;
    const double difference = (ends[1] - ends[0]) / (2 * h);
    expect(std::fabs(slope - difference) <= 1e-5 * (1 + std::fabs(difference)),
           name + ": gradient of " + input.what + " is " + std::to_string(slope) + ", not " +
               std::to_string(difference));
  }
}

void run(const Problem& c, DType type, const std::string& name, unsigned seed) {
  std::mt19937 rng(seed);
  Call call(c, type);
  call.randomise(rng);
  call.forward();
  call.backward();
  const Tensor* results[] = {&call.out,    &call.dquery, &call.dkey,
                             &call.dvalue, &call.ddecay, &call.dbeta};
  std::vector<std::vector<char>> once;
  for (const Tensor* t : results) once.push_back(t->data);
  omp_set_num_threads(4);
  call.forward();
  call.backward();
  omp_set_num_threads(1);
  const double tolerance = type == DType::kFloat64 ? 1e-11 : type == DType::kFloat32 ? 2e-5 : 4e-2;
  Call exact(c, DType::kFloat64);
  exact.take(call);
  exact.forward();
  exact.backward();
  const Tensor* wanted[] = {&exact.out,    &exact.dquery, &exact.dkey,
                            &exact.dvalue, &exact.ddecay, &exact.dbeta};
  const bool there[] = {true, true, true, true, c.decay, c.beta};
  for (int i = 0; i < 6; ++i) {
    if (!there[i]) continue;
    const std::string which = name + ": result " + std::to_string(i);
    expect(once[i] == results[i]->data, which + " depends on threads");
    expect(results[i]->padding_is_intact(), which + " has its padding written");
    double error = 0, size = 0;
    for (int64_t r = 0; r < wanted[i]->rows(); ++r) {
      for (int64_t d = 0; d < wanted[i]->n[5]; ++d) {
        const double off = std::fabs(results[i]->get(r, d) - wanted[i]->get(r, d));
        error = off <= error ? error : off;  // NaN stays
        size = std::max(size, std::fabs(wanted[i]->get(r, d)));
      }
    }
    expect(error <= tolerance * (1 + size), which + " is off by " + std::to_string(error));
  }
  check_recurrence(call, tolerance, name);
  if (type == DType::kFloat64) check_slope(call, rng, name);
}

// A few tokens of decoding are what the whole sequence ends with.
void decode(FeatureMap map, DType type, const std::string& name) {
  std::mt19937 rng(7);
  Problem c{map, 2, 2, 9, 5, 3};
  c.states = c.decay = true;
  Call call(c, type);
  call.randomise(rng);
  call.forward();
  std::vector<char> state = call.initial;
  Tensor stepped(type, call.batch, call.extent, c.heads, c.dim_v);
  LinearStepParams step{};
  step.problem = call.p;
  step.problem.out = stepped.ref();
  step.state = state.data();
  step.feature_stride = call.p.state_columns();
  step.head_stride = call.p.features() * step.feature_stride;
  step.slot_stride = c.heads * step.head_stride;
  step.num_states = call.batch;
  cpu::linear_step(step);
  const double tolerance = type == DType::kFloat64 ? 1e-12 : type == DType::kFloat32 ? 1e-5 : 2e-2;
  double worst = 0, size = 1;
  for (int64_t r = 0; r < stepped.rows(); ++r) {
    for (int64_t d = 0; d < c.dim_v; ++d) {
      size = std::max(size, std::fabs(call.out.get(r, d)));
      const double off = std::fabs(stepped.get(r, d) - call.out.get(r, d));
      worst = off <= worst ? worst : off;
    }
  }
  for (int64_t n = 0; n < call.state_numbers(); ++n) {
    const double off = std::fabs(to_double(call.acc, state.data(), n) -
                                 to_double(call.acc, call.final_state.data(), n));
    worst = off <= worst ? worst : off;
  }
  expect(worst <= tolerance * size, name + ": decoding is off by " + std::to_string(worst));
}

}  // namespace

int main(int argc, char** argv) {
  start_threads();
  std::vector<Problem> problems;
  const auto add = [&](Problem c) -> Problem& { return problems.emplace_back(c); };
  add({FeatureMap::kElu, 2, 2, 16, 16, 70});
  Problem& gated = add({FeatureMap::kIdentity, 4, 2, 30, 7, 45});
  gated.decay = gated.states = gated.packed = true;
  Problem& divided = add({FeatureMap::kElu, 2, 1, 8, 20, 133});
  divided.normalize = divided.states = divided.reverse = true;
  Problem& delta = add({FeatureMap::kIdentity, 2, 2, 12, 9, 50});
  delta.beta = delta.decay = delta.states = true;
  Problem& long_delta =
      add({FeatureMap::kIdentity, 1, 1, 40, 48, 300});  // rows for half the threads
  long_delta.beta = long_delta.decay = long_delta.states = true;
  long_delta.chunk = 8;
  Problem& taylor = add({FeatureMap::kTaylor2, 2, 2, 5, 17, 90});
  taylor.normalize = taylor.packed = true;
  taylor.chunk = 16;
  add({FeatureMap::kTaylor2, 1, 1, 16, 8, 40}).decay = true;
  Problem& all = add({FeatureMap::kRelu, 2, 2, 17, 33, 37});
  all.causal = false;
  all.packed = true;
  add({FeatureMap::kElu, 1, 1, 4, 4, 1}).normalize = true;
  add({FeatureMap::kIdentity, 1, 1, 64, 64, 1100}).chunk = 48;
  return everywhere(argc, argv, [&](DType type, const std::string& where) {
    for (size_t i = 0; i < problems.size(); ++i) {
      run(problems[i], type, where + " problem " + std::to_string(i), static_cast<unsigned>(i));
    }
    for (const FeatureMap map : {FeatureMap::kIdentity, FeatureMap::kElu, FeatureMap::kTaylor2}) {
      decode(map, type, where);
    }
  });
}
