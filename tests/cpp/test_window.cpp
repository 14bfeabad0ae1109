// SPDX-License-Identifier: Apache-2.0
// Every instruction set and dtype against a naive float64 restatement, without Python: for
// sanitizer builds and for machines (or emulators) that have no torch. Also: the result must not
// depend on the number of threads, and nothing outside a tensor may be read (the sanitizer tells)
// or written.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/window.h"
#include "everywhere.h"
#include "tensor.h"

using namespace attnext;

namespace {

struct Problem {
  int64_t batch, heads, kv_heads, dim, dim_v, extra;
  int64_t q[3], k[3];
  AxisRule rule[3];
  int64_t sinks = 0;
  bool bias = false, row_scale = false, sink_logits = false, dlse = true;
  double softcap = 0;
};

void expect_close(const char* what, const std::string& where, double got, double want,
                  double tolerance) {
  if (got == want || std::fabs(got - want) <= tolerance * (1 + std::fabs(want))) return;
  if (++failures <= 20) {
    std::printf("%s: %s is %.9g, should be %.9g\n", where.c_str(), what, got, want);
  }
}

void run(const Problem& c, DType type, const std::string& where, unsigned seed) {
  std::mt19937 rng(seed);
  const DType acc = type == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const double tolerance = type == DType::kFloat64    ? 1e-12
                           : type == DType::kFloat32  ? 2e-5
                           : type == DType::kBFloat16 ? 5e-2
                                                      : 6e-3;
  const int64_t extras[3] = {1, 1, c.extra};
  Tensor q(type, c.batch, c.q, c.heads, c.dim), k(type, c.batch, c.k, c.kv_heads, c.dim),
      v(type, c.batch, c.k, c.kv_heads, c.dim_v), ek(type, c.batch, extras, c.kv_heads, c.dim),
      ev(type, c.batch, extras, c.kv_heads, c.dim_v), out(type, c.batch, c.q, c.heads, c.dim_v),
      lse(acc, c.batch, c.q, c.heads, 1), scale(acc, c.batch, c.q, c.heads, 1),
      dout(type, c.batch, c.q, c.heads, c.dim_v), dlse(acc, c.batch, c.q, c.heads, 1);
  for (Tensor* t : {&q, &k, &v, &ek, &ev, &dout, &dlse, &scale}) t->randomise(rng, 0.7);
  std::normal_distribution<double> normal(0, 1);

  std::vector<AxisTable> tables;
  int64_t reach[3], table_size = 1;
  for (int a = 0; a < 3; ++a) {
    tables.push_back(evaluate(c.rule[a], c.q[a], c.k[a], a == 2 ? c.sinks : 0));
    reach[a] = std::max<int64_t>(0, max_offset(tables[a]));
    table_size *= 2 * reach[a] + 1;
  }
  const Geometry geometry(tables);
  std::vector<double> bias(static_cast<size_t>(c.heads * table_size)), sink(c.heads);
  for (double& x : bias) x = normal(rng);
  for (double& x : sink) x = normal(rng);
  const auto in_acc = [&](const std::vector<double>& x) {
    std::vector<char> bytes(x.size() * size_of(acc));
    for (size_t i = 0; i < x.size(); ++i) from_double(acc, bytes.data(), i, x[i]);
    return bytes;
  };
  std::vector<char> bias_acc = in_acc(bias), sink_acc = in_acc(sink);
  std::vector<char> dbias(bias_acc.size()), dsink(sink_acc.size());

  WindowParams p{};
  p.dtype = type;
  p.batch = c.batch, p.heads = c.heads, p.kv_heads = c.kv_heads;
  p.head_dim = c.dim, p.head_dim_v = c.dim_v, p.extra_keys = c.extra;
  for (int a = 0; a < 3; ++a) p.query_extent[a] = c.q[a], p.key_extent[a] = c.k[a];
  p.query = q.ref(), p.key = k.ref(), p.value = v.ref();
  p.extra_key = ek.ref(), p.extra_value = ev.ref();
  p.out = out.ref(), p.lse = lse.ref();
  p.scale = c.row_scale ? 1 : 0.3;
  if (c.row_scale) p.row_scale = scale.ref();
  p.softcap = c.softcap;
  if (c.sink_logits) p.sink_logits = sink_acc.data();
  if (c.bias) {
    p.bias = bias_acc.data();
    p.bias_head_stride = 1;
    for (int a = 2; a >= 0; --a) {
      p.bias_stride[a] = p.bias_head_stride;
      p.bias_reach[a] = reach[a];
      p.bias_head_stride *= 2 * reach[a] + 1;
    }
  }
  const std::vector<int32_t> head_rule(static_cast<size_t>(c.heads), 0);
  cpu::window_forward(p, geometry, head_rule.data());

  Tensor dq(type, c.batch, c.q, c.heads, c.dim), dk(type, c.batch, c.k, c.kv_heads, c.dim),
      dv(type, c.batch, c.k, c.kv_heads, c.dim_v), dek(type, c.batch, extras, c.kv_heads, c.dim),
      dev(type, c.batch, extras, c.kv_heads, c.dim_v), dscale(acc, c.batch, c.q, c.heads, 1);
  p.dout = dout.ref();
  if (c.dlse) p.dlse = dlse.ref();
  p.dquery = dq.ref(), p.dkey = dk.ref(), p.dvalue = dv.ref();
  p.dextra_key = dek.ref(), p.dextra_value = dev.ref();
  if (c.row_scale) p.drow_scale = dscale.ref();
  if (c.bias) p.dbias = dbias.data();
  if (c.sink_logits) p.dsink_logits = dsink.data();
  cpu::window_backward(p, geometry, head_rule.data());

  // The naive restatement, from the interval tables (whose rule is tested elsewhere).
  std::vector<double> rdk(k.rows() * c.dim), rdv(v.rows() * c.dim_v), rdek(ek.rows() * c.dim),
      rdev(ev.rows() * c.dim_v), rdbias(bias.size()), rdsink(sink.size());
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t h = 0; h < c.heads; ++h) {
      const int64_t hk = h / (c.heads / c.kv_heads);
      int64_t x[3];
      for (x[0] = 0; x[0] < c.q[0]; ++x[0]) {
        for (x[1] = 0; x[1] < c.q[1]; ++x[1]) {
          for (x[2] = 0; x[2] < c.q[2]; ++x[2]) {
            struct Key {
              int64_t row, extra, table;
              double logit, slope, dot;
            };
            std::vector<Key> keys;
            const int64_t i = q.row(b, x, h);
            const double factor = c.row_scale ? scale.get(i, 0) : 0.3;
            const auto add = [&](const Tensor* source, int64_t row, int64_t extra, int64_t table) {
              double dot = 0;
              for (int64_t d = 0; source && d < c.dim; ++d)
                dot += q.get(i, d) * source->get(row, d);
              double logit = factor * dot, slope = 1;
              if (c.softcap > 0) {
                const double t = std::tanh(logit / c.softcap);
                logit = c.softcap * t;
                slope = 1 - t * t;
              }
              if (table >= 0 && c.bias) logit += bias[h * table_size + table];
              keys.push_back({source == &k ? row : -1, extra, table, logit, slope, dot});
            };
            for (int64_t e = 0; e < c.extra; ++e) {
              const int64_t at[3] = {0, 0, e};
              add(&ek, ek.row(b, at, hk), ek.row(b, at, hk), -1);
            }
            const auto range = [&](int a, int64_t* lo, int64_t* hi) {
              *lo = tables[a].begin[x[a]], *hi = tables[a].end[x[a]];
            };
            int64_t lo[3], hi[3];
            for (int a = 0; a < 3; ++a) range(a, &lo[a], &hi[a]);
            const int64_t sink_hi = c.sinks > 0 ? tables[2].sink_end[x[2]] : 0;
            for (int64_t u0 = lo[0]; u0 < hi[0]; ++u0) {
              for (int64_t u1 = lo[1]; u1 < hi[1]; ++u1) {
                for (int64_t u2 = std::min<int64_t>(lo[2], 0); u2 < std::max(hi[2], sink_hi);
                     ++u2) {
                  const bool in = (u2 >= lo[2] && u2 < hi[2]) || (u2 >= 0 && u2 < sink_hi);
                  if (!in) continue;
                  const int64_t u[3] = {u0, u1, u2};
                  int64_t y[3], table = 0;
                  bool real = true;
                  for (int a = 0; a < 3; ++a) {
                    const int64_t cls = tables[a].query_class(x[a]);
                    y[a] = cls + tables[a].dilation * u[a];
                    real = real && u[a] >= 0 && y[a] < c.k[a];
                    table =
                        table * (2 * reach[a] + 1) + u[a] - tables[a].query_index(x[a]) + reach[a];
                  }
                  add(real ? &k : nullptr, real ? k.row(b, y, hk) : -1, -1, table);
                }
              }
            }
            double top = c.sink_logits ? sink[h] : -INFINITY, sum = 0;
            for (const Key& key : keys) top = std::max(top, key.logit);
            for (const Key& key : keys) sum += std::exp(key.logit - top);
            if (c.sink_logits) sum += std::exp(sink[h] - top);
            const double want_lse = sum > 0 ? top + std::log(sum) : -INFINITY;
            expect_close("lse", where, lse.get(i, 0), want_lse,
                         type == DType::kFloat64 ? 1e-12 : 1e-5 + tolerance / 10);
            double delta = c.dlse && sum > 0 ? -dlse.get(i, 0) : 0;
            std::vector<double> weights;
            for (int64_t d = 0; d < c.dim_v; ++d) {
              double o = 0;
              for (const Key& key : keys) {
                const double w = std::exp(key.logit - want_lse);
                const double value = key.extra >= 0 ? ev.get(key.extra, d)
                                     : key.row >= 0 ? v.get(key.row, d)
                                                    : 0;
                o += w * value;
              }
              expect_close("out", where, out.get(i, d), o, tolerance);
              delta += dout.get(i, d) * o;
            }
            if (c.sink_logits) rdsink[h] -= std::exp(sink[h] - want_lse) * delta;
            std::vector<double> rdq(c.dim);
            double rdscale = 0;
            for (const Key& key : keys) {
              const double w = std::exp(key.logit - want_lse);
              double dp = 0;
              for (int64_t d = 0; d < c.dim_v; ++d) {
                const double g = dout.get(i, d);
                if (key.extra >= 0) {
                  dp += g * ev.get(key.extra, d);
                  rdev[key.extra * c.dim_v + d] += w * g;
                } else if (key.row >= 0) {
                  dp += g * v.get(key.row, d);
                  rdv[key.row * c.dim_v + d] += w * g;
                }
              }
              double ds = w * (dp - delta);
              if (key.table >= 0 && c.bias) rdbias[h * table_size + key.table] += ds;
              ds *= key.slope;
              rdscale += ds * key.dot;
              for (int64_t d = 0; d < c.dim; ++d) {
                if (key.extra >= 0) {
                  rdq[d] += factor * ds * ek.get(key.extra, d);
                  rdek[key.extra * c.dim + d] += factor * ds * q.get(i, d);
                } else if (key.row >= 0) {
                  rdq[d] += factor * ds * k.get(key.row, d);
                  rdk[key.row * c.dim + d] += factor * ds * q.get(i, d);
                }
              }
            }
            for (int64_t d = 0; d < c.dim; ++d) {
              expect_close("dquery", where, dq.get(i, d), rdq[d], tolerance);
            }
            if (c.row_scale)
              expect_close("dscale", where, dscale.get(i, 0), rdscale, 4 * tolerance);
          }
        }
      }
    }
  }
  const auto compare = [&](const char* what, const Tensor& t, const std::vector<double>& want) {
    for (int64_t r = 0; r < t.rows(); ++r) {
      for (int64_t d = 0; d < t.n[5]; ++d) {
        expect_close(what, where, t.get(r, d), want[r * t.n[5] + d], 2 * tolerance);
      }
    }
    if (!t.padding_is_intact()) expect_close("padding", where, 1, 0, 0);
  };
  compare("dkey", dk, rdk);
  compare("dvalue", dv, rdv);
  compare("dextra_key", dek, rdek);
  compare("dextra_value", dev, rdev);
  for (size_t t = 0; c.bias && t < bias.size(); ++t) {
    expect_close("dbias", where, to_double(acc, dbias.data(), t), rdbias[t], 8 * tolerance);
  }
  for (int64_t h = 0; c.sink_logits && h < c.heads; ++h) {
    expect_close("dsink", where, to_double(acc, dsink.data(), h), rdsink[h], 8 * tolerance);
  }
  if (!out.padding_is_intact() || !dq.padding_is_intact()) expect_close("padding", where, 1, 0, 0);

  // Bit for bit the same with three threads as with one.
  Tensor out2(type, c.batch, c.q, c.heads, c.dim_v), dk2(type, c.batch, c.k, c.kv_heads, c.dim),
      dv2(type, c.batch, c.k, c.kv_heads, c.dim_v);
  omp_set_num_threads(3);
  p.out = out2.ref();
  cpu::window_forward(p, geometry, head_rule.data());
  p.dkey = dk2.ref(), p.dvalue = dv2.ref();
  cpu::window_backward(p, geometry, head_rule.data());
  omp_set_num_threads(1);
  const bool same = out.data == out2.data && dk.data == dk2.data && dv.data == dv2.data;
  if (!same) expect_close("bits with three threads", where, 1, 0, 0);
}

AxisRule axis(int64_t left, int64_t right, Boundary boundary, int64_t stride = 1,
              int64_t dilation = 1, bool causal = false, int64_t phase = 0, int64_t offset = 0) {
  AxisRule r;
  r.left = left, r.right = right, r.boundary = boundary, r.stride = stride;
  r.dilation = dilation, r.causal = causal, r.phase = phase, r.offset = offset;
  return r;
}

}  // namespace

int main(int argc, char** argv) {
  start_threads();
  const Boundary in = Boundary::kInward, cut = Boundary::kTruncate, pad = Boundary::kZeroPad;
  const AxisRule self;
  std::vector<Problem> problems;
  const auto line = [&](int64_t n, int64_t m, int64_t dim, int64_t dim_v, AxisRule r) {
    Problem c{1, 2, 1, dim, dim_v, 0, {1, 1, n}, {1, 1, m}, {self, self, r}};
    return c;
  };
  problems.push_back(line(150, 150, 16, 16, axis(40, 0, cut, 1, 1, true)));
  problems.push_back(line(33, 61, 30, 53, axis(200, 0, cut, 1, 1, true, 0, 28)));
  problems.back().sinks = 5;
  problems.back().sink_logits = true;
  problems.push_back(line(1, 1300, 8, 8, axis(1300, 0, cut, 1, 1, true, 0, 1299)));
  problems.back().sink_logits = problems.back().row_scale = true;
  problems.push_back(line(64, 64, 5, 3, axis(3, 4, pad, 4, 2, false, 1)));
  problems.back().bias = true;
  problems.back().softcap = 3;
  problems.push_back(line(7, 0, 4, 4, axis(1, 1, cut)));
  // Tiles that share most of their keys.
  problems.push_back(line(700, 700, 40, 24, axis(299, 0, cut, 1, 1, true)));
  {
    Problem c{2, 4, 2, 32, 32, 3, {1, 11, 13}, {1, 11, 13}, {self, axis(2, 2, in), axis(3, 3, in)}};
    c.bias = c.row_scale = c.sink_logits = true;
    c.softcap = 2;
    problems.push_back(c);
    c.rule[1] = axis(3, 3, cut, 7, 1, false, 3);
    c.rule[2] = axis(3, 3, cut, 7, 1, false, 3);
    c.extra = 0;
    problems.push_back(c);
    c.rule[1] = axis(1, 1, in, 1, 3);
    c.rule[2] = axis(2, 0, in, 1, 2, true);
    c.dim = 17, c.dim_v = 9;
    problems.push_back(c);
  }
  problems.push_back({1,
                      2,
                      2,
                      12,
                      20,
                      1,
                      {4, 6, 7},
                      {4, 6, 7},
                      {axis(1, 1, in), axis(2, 1, pad, 2), axis(2, 2, cut)}});
  problems.back().bias = true;

  return everywhere(argc, argv, [&](DType type, const std::string& where) {
    for (size_t i = 0; i < problems.size(); ++i) {
      run(problems[i], type, where + " problem " + std::to_string(i), static_cast<unsigned>(i));
    }
  });
}
