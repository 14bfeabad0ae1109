// SPDX-License-Identifier: Apache-2.0
#include "linear_plan.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "linear_kernels.h"

namespace attnext {
namespace cuda {
namespace {

template <class T>
constexpr DType dtype_of() {
  return sizeof(T) == 4                 ? DType::kFloat32
         : std::is_same<T, bf16>::value ? DType::kBFloat16
                                        : DType::kFloat16;
}

#define ATTNEXT_DESCRIBE(name, T, dim, warps, kind)                             \
  ScanFacts{#name,                                                              \
            "ATTNEXT_SCAN(" #name ", " #T ", " #dim ", " #warps ", " #kind ")", \
            dtype_of<T>(),                                                      \
            dim,                                                                \
            warps,                                                              \
            ScanKind::kind,                                                     \
            ScanShared<sizeof(T), dim, warps, ScanKind::kind>::kBytes},
const ScanFacts kScans[] = {ATTNEXT_SCAN_KERNELS_16(ATTNEXT_DESCRIBE, bf16, bf16)
                                ATTNEXT_SCAN_KERNELS_16(ATTNEXT_DESCRIBE, fp16, fp16)
                                    ATTNEXT_SCAN_KERNELS_32(ATTNEXT_DESCRIBE, float, fp32)};

constexpr int64_t kEnoughBlocks = 2 * 132;  // of the largest GPU, twice over
constexpr int64_t kLeastChunks = 4;         // of a segment
// Rows of more entries have kernels with shorter chunks.
constexpr int64_t kUsualDim = 128;
// The gradient of Taylor features is a sum over the columns of values, of which a scan has so many.
constexpr int64_t kFoldColumns = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const ScanFacts& scan_of(DType dtype, int64_t dim, ScanKind kind) {
  for (const ScanFacts& k : kScans) {
    const int64_t most = kind == ScanKind::kTaylorWide ? kWideEntries
                         : is_expanded(kind)           ? kTaylorEntries
                                                       : k.dim;
    if (k.dtype == dtype && most >= dim && k.kind == kind) return k;
  }
  if (kind == ScanKind::kPlain) return scan_of(dtype, dim, ScanKind::kGated);  // it can do as much
  throw std::invalid_argument(
      "attnext: linear attention on CUDA has head_dim up to 256, Taylor "
      "features up to 64, in float32, bfloat16 or float16");
}

std::string suffix(DType dtype) {
  return dtype == DType::kFloat32 ? "_fp32" : dtype == DType::kBFloat16 ? "_bf16" : "_fp16";
}

// A problem with its states and its scratch, which is counted as it is taken.
class Plan {
 public:
  Plan(const LinearParams& params, int64_t length, void* workspace)
      : p(params), length_(length), workspace_(static_cast<char*>(workspace)) {
    if (p.tokens >= INT32_MAX / 2) throw std::invalid_argument("attnext: more than 2^30 tokens");
    const int64_t widest = std::max(p.head_dim, p.head_dim_v);
    if (!taylor() && widest > kUsualDim) least_dim_ = widest;
    const ScanFacts& one =
        taylor() ? scan(kFoldColumns, ScanKind::kFold) : scan(widest, ScanKind::kGated);
    chunk_ = 16 * one.warps;
    const int64_t longest = std::max<int64_t>(1, length_), chunks = ceil_div(longest, chunk_);
    const int64_t blocks = std::max<int64_t>(1, p.num_sequences * p.heads);
    segments_ = std::max<int64_t>(1, std::min(kEnoughBlocks / blocks, chunks / kLeastChunks));
    if (p.delta()) segments_ = 1;  // what a chunk writes depends on the state before it
    segment_ = ceil_div(chunks, segments_) * chunk_;
    segments_ = ceil_div(longest, segment_);
    state_size_ = p.features() * p.state_columns();
  }

  int64_t bytes() const { return used_; }
  std::vector<Launch> launches;

  float* take(int64_t numbers) {
    char* at = workspace_ ? workspace_ + used_ : nullptr;
    used_ += ceil_div(numbers * int64_t(sizeof(float)), 256) * 256;
    return reinterpret_cast<float*>(at);
  }
  // Rows of the elements' type for each token and head.
  TensorRef take_rows(int64_t dim) {
    float* const data = take(ceil_div(rows() * dim * elem(), int64_t(sizeof(float))));
    return rows_at(data, dim);
  }
  // Laid out as a tensor of its own.
  TensorRef rows_at(void* data, int64_t dim) const {
    return {data, p.tokens * p.heads * dim, {0, 0, p.heads * dim}, dim};
  }
  float* take_states() { return take(p.num_sequences * p.heads * state_size_); }
  // Of all sequences, at most: each may end within one.
  int64_t chunks() const { return p.batch * p.tokens / chunk_ + p.num_sequences; }
  bool taylor() const { return p.feature_map == FeatureMap::kTaylor2; }
  bool wide() const { return taylor() && p.head_dim > kTaylorEntries; }
  int64_t rows() const { return p.batch * p.tokens * p.heads; }
  int64_t elem() const { return p.dtype == DType::kFloat32 ? 4 : 2; }

  ScanRows rows_of(const TensorRef& t, int64_t heads, int64_t dim,
                   FeatureMap map = FeatureMap::kIdentity) const {
    return {t, static_cast<int32_t>(p.heads / heads), static_cast<int32_t>(dim), map, aligned(t), 0,
            0};
  }
  ScanRows query() const { return rows_of(p.query, p.query_heads, p.head_dim, p.feature_map); }
  ScanRows key() const { return rows_of(p.key, p.key_heads, p.head_dim, p.feature_map); }
  ScanRows value() const { return rows_of(p.value, p.value_heads, p.head_dim_v); }
  ScanRows dout() const { return rows_of(p.dout, p.heads, p.head_dim_v); }

  // Leaves `count` columns from `first` on, a multiple of 16 bytes.
  void cut(ScanRows* x, int64_t first, int64_t count) const {
    x->rows.data = static_cast<char*>(x->rows.data) + first * elem();
    x->dim = static_cast<int32_t>(std::min(count, x->dim - first));
  }

  // What all launches share; `order`: that of processing, or its reverse.
  LinearLaunch start(bool against) const {
    LinearLaunch l{};
    l.sequences = p.sequences;
    l.tokens = p.tokens;
    l.length = length_;
    l.batch = p.batch;
    l.num_sequences = p.num_sequences;
    l.per_item = p.batch > 0 ? p.num_sequences / p.batch : 1;
    l.heads = static_cast<int32_t>(p.heads);
    l.segments = static_cast<int32_t>(segments_);
    l.segment = segment_;
    l.slices = 1;
    l.chunks = chunks();
    l.backwards = p.reverse != against;
    l.exclusive = against;
    l.scale = against ? 1.f : static_cast<float>(p.scale);
    l.inner_scale = against ? static_cast<float>(p.scale) : 1.f;
    if (taylor()) {
      l.polynomial_scale = static_cast<float>(p.scale);
      int exponent = 0;
      l.exact_scale = std::frexp(l.polynomial_scale, &exponent) == 0.5f && std::abs(exponent) < 8;
      l.scale = l.inner_scale = 1;
      l.weighted_b = against;
    }
    l.eps = static_cast<float>(p.eps);
    l.decay = p.decay;
    l.beta = p.beta;
    l.denominator = p.denominator;
    l.ddenominator = p.ddenominator;
    l.before_segments = l.after_segments = 1;
    l.state_size = state_size_;
    set_layout(&l, false);
    return l;
  }
  // S as it is, [features][columns], or transposed.
  void set_layout(LinearLaunch* l, bool transposed) const {
    l->row_stride = transposed ? 1 : p.state_columns();
    l->column_stride = transposed ? p.state_columns() : 1;
    l->z_offset = p.head_dim_v;
    l->z_stride = p.state_columns();
  }

  void add_scan(LinearLaunch l) {
    const bool gated = l.decay.data || l.side != Side::kNone || l.raw.rows.data ||
                       l.extension == Extension::kFeature || l.out_fp32 || l.inner_scale == 0;
    const ScanKind kind = l.folds     ? wide() ? ScanKind::kFoldWide : ScanKind::kFold
                          : wide()    ? ScanKind::kTaylorWide
                          : taylor()  ? gated ? ScanKind::kTaylorGated : ScanKind::kTaylor
                          : p.delta() ? ScanKind::kDelta
                          : gated     ? ScanKind::kGated
                                      : ScanKind::kPlain;
    add_scan(kind, l);
  }
  void add_scan(ScanKind kind, LinearLaunch l) {
    const ScanFacts& scan = this->scan(l.b.dim, kind);
    l.slices = static_cast<int32_t>(l.folds ? fold_slices() : slices(l.c.dim));
    l.outer_scale = 1 / l.inner_scale;
    for (ScanRows* x : {&l.a, &l.b, &l.c, &l.raw, &l.out}) {
      x->step = l.backwards ? -x->rows.token[2] : x->rows.token[2];
      const int64_t bytes = x->step * elem(), most = INT32_MAX / chunk_;
      x->stride = x->aligned && std::abs(bytes) <= most ? static_cast<int32_t>(bytes) : 0;
    }
    l.parts = kind == ScanKind::kTaylorWide ? static_cast<int32_t>(parts()) : 1;
    const int64_t blocks = p.num_sequences * p.heads * l.segments * l.slices * l.parts;
    add(scan.name, blocks, 32 * scan.warps, scan.shared_bytes, l);
  }
  int64_t slices(int64_t dim) const { return ceil_div(dim, chunk_); }  // a block is as wide as long
  int64_t fold_slices() const {
    return slices(
        num_features(FeatureMap::kTaylor2, std::max<int64_t>(p.head_dim, kTaylorEntries)));
  }
  int64_t fold_width() const { return wide() ? p.head_dim : kTaylorEntries; }
  int64_t parts() const {
    return ceil_div(p.features(), scan(p.head_dim, ScanKind::kTaylorWide).dim);
  }
  void add(const std::string& name, int64_t blocks, int32_t threads, int32_t shared,
           const LinearLaunch& l) {
    if (blocks > INT32_MAX) throw std::invalid_argument("attnext: grid: more than 2^31 blocks");
    if (blocks > 0) launches.emplace_back(name, blocks, threads, shared, l);
  }

  // Whether a scan can start at once: otherwise states are made first.
  bool at_once() const { return p.causal && segments_ == 1; }
  // States for a scan that reads them: `l` says of what b and c. They start from `before`, and end
  // in `after`, if not null.
  struct States {
    const float* before;
    int32_t segments;
    bool ends;  // after is written
  };
  States add_states(LinearLaunch l, const float* before, float* after) {
    if (at_once()) return {before, 1, false};
    float* const states =
        segments_ > 1 ? take(segments_ * p.num_sequences * p.heads * state_size_) : nullptr;
    float* const factors = segments_ > 1 ? take(segments_ * p.num_sequences * p.heads) : nullptr;
    if (!p.causal && !after) after = take_states();
    l.outputs = 0;
    l.sums = 1;
    if (segments_ == 1) {
      l.before = before;
      l.after = after;
      add_scan(l);
      return {after, 1, true};
    }
    LinearLaunch combine = l;
    l.after = states;
    l.factors = factors;
    l.after_segments = static_cast<int32_t>(segments_);
    // What the last segment adds is of the state after it alone.
    if (!after) l.segments = static_cast<int32_t>(segments_ - 1);
    add_scan(l);
    combine.factors = factors;
    combine.before = before;
    combine.after = after;
    combine.states = states;
    constexpr int kThreads = 256;
    add("linear_combine", p.num_sequences * p.heads * ceil_div(state_size_, kThreads), kThreads, 0,
        combine);
    return {p.causal ? states : after, p.causal ? static_cast<int32_t>(segments_) : 1, true};
  }
  // Outputs from such states; where nothing was made, the scan also writes the last one.
  void add_outputs(LinearLaunch l, const States& from, float* after) {
    l.outputs = 1;
    l.sums = p.causal;
    l.before = from.before;
    l.before_segments = from.segments;
    if (!from.ends) l.after = after;
    if (!wide() || l.folds) return add_scan(l);
    // In parts, which are added up.
    LinearLaunch sum = l;
    l.out = {rows_at(take(parts() * rows() * l.out.dim), l.out.dim),
             1,
             l.out.dim,
             FeatureMap::kIdentity,
             0,
             0,
             0};
    l.out_fp32 = 1;
    if (l.extension == Extension::kColumn) l.part_sums = take(parts() * rows());
    add_scan(l);
    sum.part_sums = l.part_sums;
    add_fold(sum, static_cast<float*>(l.out.rows.data), parts(), l.out.dim);
  }
  // The sum of `parts` that lie one after the other, of rows `dim` wide.
  void add_fold(LinearLaunch l, float* folded, int64_t parts, int64_t dim) {
    l.folded = folded;
    l.slices = static_cast<int32_t>(parts);
    l.width = static_cast<int32_t>(dim);
    constexpr int kThreads = 256;
    add("linear_fold" + suffix(p.dtype), ceil_div(rows() * dim, kThreads), kThreads, 0, l);
  }

  // The kernel for rows of so many entries.
  const ScanFacts& scan(int64_t dim, ScanKind kind) const {
    return scan_of(p.dtype, std::max(dim, least_dim_), kind);
  }

  const LinearParams& p;

 private:
  int32_t aligned(const TensorRef& t) const {
    const auto whole = [&](int64_t n) { return n * elem() % 16 == 0; };
    return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && whole(t.batch) && whole(t.token[2]) &&
           whole(t.head);
  }

  // All scans of a problem have chunks of the same length, which is shorter for wide rows: then the
  // kernel for these has short ones, too.
  int64_t least_dim_ = 0;
  int64_t length_, chunk_, segments_, segment_, state_size_;
  char* workspace_;
  int64_t used_ = 0;
};

// With the normaliser's ones behind values: b and c as in the forward pass.
LinearLaunch keys_and_values(const Plan& plan) {
  LinearLaunch l = plan.start(false);
  l.b = plan.key();
  l.c = plan.value();
  l.extension = plan.p.normalize ? Extension::kColumn : Extension::kNone;
  return l;
}

void plan_forward(Plan* plan) {
  const LinearParams& p = plan->p;
  LinearLaunch l = keys_and_values(*plan);
  auto* const last = static_cast<float*>(p.final_state);
  const auto states = plan->add_states(l, static_cast<const float*>(p.initial_state), last);
  l.a = plan->query();
  l.out = plan->rows_of(p.out, p.heads, p.head_dim_v);
  plan->add_outputs(l, states, last);
}

float* further(float* numbers, int64_t by) { return numbers ? numbers + by : nullptr; }

int64_t folds_of(const Plan& plan) {
  return plan.taylor() ? ceil_div(plan.p.head_dim_v, kFoldColumns) : 0;
}

// What gradients of decays need: products of the gradients with what they belong to, and states to
// meet their gradients; of either so many sets.
struct OfDecay {
  float *dots = nullptr, *dots_key = nullptr, *boundaries = nullptr, *meetings = nullptr;
  int64_t slices;
  int64_t of_dots = 0, of_dots_key = 0, of_meetings = 0, of_boundaries = 0;  // numbers of a set
  int32_t num_dots, num_key_dots, first_state_dot, num_meetings, chunk, sets;

  // Under the delta rule two gradients meet the same states; folds have columns of their own.
  explicit OfDecay(Plan* plan) {
    const LinearParams& p = plan->p;
    const int64_t folds = folds_of(*plan);
    const ScanFacts& scan =  // of dq and dk
        folds > 0 ? plan->scan(kFoldColumns, ScanKind::kFold)
                  : plan->scan(p.head_dim_v, ScanKind::kGated);
    slices = folds > 0 ? plan->fold_slices() : plan->slices(p.head_dim);
    sets = p.delta() ? 2 : static_cast<int32_t>(std::max<int64_t>(folds, 1));
    num_dots = static_cast<int32_t>(slices + (folds > 0));
    first_state_dot = folds > 0 ? 0 : num_dots;
    num_key_dots = first_state_dot + num_dots;
    num_meetings = scan.warps;
    chunk = 16 * scan.warps;
    if (!p.ddecay.data) return;
    const int64_t states = p.heads * slices * plan->chunks();
    of_dots = num_dots * plan->rows();
    of_dots_key = num_key_dots * plan->rows();
    of_meetings = states * num_meetings;
    of_boundaries = states * (scan.dim / 8 + 1) * 4 * 32 * scan.warps;
    dots = plan->take(sets * of_dots);
    dots_key = plan->take(sets * of_dots_key);
    boundaries = plan->take(std::max<int64_t>(folds, 1) * of_boundaries);
    meetings = plan->take(sets * of_meetings);
  }
  // From a launch's first set to that of a fold.
  void move(LinearLaunch* l, int64_t fold) const {
    l->dots = further(l->dots, fold * of_dots);
    l->boundaries = further(l->boundaries, fold * of_boundaries);
    l->meetings = further(l->meetings, fold * of_meetings);
  }
  void add(Plan* plan) const {
    const LinearParams& p = plan->p;
    if (!p.ddecay.data) return;
    LinearLaunch d = plan->start(false);
    d.dots = dots;
    d.dots_key = dots_key;
    d.slices = static_cast<int32_t>(slices);
    d.num_dots = num_dots;
    d.num_key_dots = num_key_dots;
    d.first_state_dot = first_state_dot;
    d.meetings = meetings;
    d.num_meetings = num_meetings;
    d.sets = sets;
    d.chunk = chunk;
    d.ddecay = p.ddecay;
    constexpr int kThreads = 128;
    plan->add("linear_decay_gradient", ceil_div(p.heads * plan->chunks(), kThreads / 32), kThreads,
              0, d);
  }
};

// Where a gradient goes.
void set_result(const Plan& plan, LinearLaunch* l, const TensorRef& t, int64_t heads, int64_t dim) {
  l->out = plan.rows_of(t, plan.p.heads, dim);
  l->out_fp32 = heads != plan.p.heads && plan.p.dtype != DType::kFloat32;
}

// The delta rule: what tokens write is linear attention's value, once it is known. So u is found in
// order, and against it h, which keys get for what they have read; see linear_delta.cuh. Then
//   dq: (dO, u, k)   dk: (u, dO, q), and of what keys have read (h, u, k) and (u, h, k),
// where no token meets itself.
void plan_delta_backward(Plan* plan) {
  const LinearParams& p = plan->p;
  const auto rows_of = [&](const TensorRef& t) { return plan->rows_of(t, p.heads, p.head_dim_v); };
  const ScanRows u = rows_of(plan->take_rows(p.head_dim_v));
  const ScanRows e = rows_of(plan->take_rows(p.head_dim_v));
  const ScanRows h = rows_of(plan->take_rows(p.head_dim_v));
  float* const dbeta = plan->take(plan->slices(p.head_dim_v) * plan->rows());
  const int64_t part = plan->rows() * p.head_dim;
  float* const dkeys = plan->take(3 * part);
  const OfDecay of_decay(plan);
  const auto* const initial = static_cast<const float*>(p.initial_state);
  const auto* const dfinal = static_cast<const float*>(p.dfinal_state);
  const bool curved = p.feature_map != FeatureMap::kIdentity || p.ddecay.data;
  const auto start = [&](bool against, const ScanRows& b, const ScanRows& c, const float* before) {
    LinearLaunch l = plan->start(against);
    l.outputs = l.sums = 1;
    l.b = b;
    l.c = c;
    l.before = before;
    return l;
  };

  LinearLaunch l = start(false, plan->key(), plan->value(), initial);
  l.written = u;
  l.lacking = e;
  plan->add_scan(ScanKind::kDelta, l);

  l = start(false, u, plan->key(), initial);
  l.a = plan->dout();
  plan->set_layout(&l, true);
  set_result(*plan, &l, p.dquery, p.query_heads, p.head_dim);
  if (curved) l.raw = plan->query();
  l.dots = of_decay.dots;
  l.boundaries = of_decay.boundaries;
  plan->add_scan(ScanKind::kGated, l);

  l = start(true, plan->query(), plan->dout(), dfinal);
  l.a = plan->key();
  set_result(*plan, &l, p.dvalue, p.value_heads, p.head_dim_v);
  l.written = h;
  l.lacking = e;
  if (p.dbeta.data) l.dots = dbeta;
  l.after = static_cast<float*>(p.dinitial_state);
  plan->add_scan(ScanKind::kDeltaBack, l);

  const auto add_part = [&](int64_t number, LinearLaunch of, const ScanRows& a, const ScanRows& raw,
                            float* dots) {
    of.a = a;
    plan->set_layout(&of, true);
    of.out = plan->rows_of(plan->rows_at(dkeys + number * part, p.head_dim), p.heads, p.head_dim);
    of.out_fp32 = 1;
    if (curved) of.raw = raw;
    of.dots = dots;
    plan->add_scan(ScanKind::kGated, of);
  };
  l = start(false, u, plan->key(), initial);
  l.scale = 1;
  l.strict = 1;
  add_part(0, l, h, plan->key(), further(of_decay.dots, of_decay.of_dots));
  l = start(true, plan->dout(), plan->query(), dfinal);
  l.boundaries = of_decay.boundaries;
  l.meetings = of_decay.meetings;
  add_part(1, l, u, plan->key(), of_decay.dots_key);
  l = start(true, h, plan->key(), nullptr);
  l.inner_scale = 1;
  l.strict = 1;
  l.boundaries = of_decay.boundaries;
  l.meetings = further(of_decay.meetings, of_decay.of_meetings);
  add_part(2, l, u, plan->key(), further(of_decay.dots_key, of_decay.of_dots_key));

  l = plan->start(false);
  set_result(*plan, &l, p.dkey, p.key_heads, p.head_dim);
  plan->add_fold(l, dkeys, 3, p.head_dim);
  if (p.dbeta.data) {
    l.out = plan->rows_of(p.dbeta, p.heads, 1);
    l.out_fp32 = 1;
    plan->add_fold(l, dbeta, plan->slices(p.head_dim_v), 1);
  }
  of_decay.add(plan);
}

void plan_backward(Plan* plan) {
  const LinearParams& p = plan->p;
  if (p.delta()) return plan_delta_backward(plan);
  float* numbers = nullptr;
  if (p.normalize) {
    numbers = plan->take(2 * plan->rows());
    LinearLaunch l = plan->start(false);
    l.numbers = numbers;
    l.dout = plan->dout();
    l.result = plan->rows_of(p.out, p.heads, p.head_dim_v);
    constexpr int kThreads = 128, kRows = kThreads / 8;
    plan->add("linear_numbers" + suffix(p.dtype), ceil_div(plan->rows(), kRows), kThreads, 0, l);
  }
  const auto use_numbers = [&](LinearLaunch* l, Side side, Extension extension) {
    l->extension = p.normalize ? extension : Extension::kNone;
    if (!p.normalize) return;
    l->side = side;
    l->numbers = numbers;
    l->scale = l->inner_scale = 1;  // in the factors
  };
  const int64_t folds = folds_of(*plan);
  const int64_t of_fold = plan->fold_slices() * plan->rows() * plan->fold_width();
  float* const folded = folds > 0 ? plan->take(folds * of_fold) : nullptr;
  const OfDecay of_decay(plan);
  // Outputs with columns of values in a and b, and states by these columns.
  const auto add_by_columns = [&](const LinearLaunch& l, const Plan::States& from, float* after) {
    if (folds == 0) return plan->add_outputs(l, from, after);
    for (int64_t k = 0; k < folds; ++k) {
      const int64_t first = k * kFoldColumns;
      LinearLaunch part = l;
      part.folds = true;
      part.folded = folded + k * of_fold;
      part.width = static_cast<int32_t>(plan->fold_width());
      plan->cut(&part.a, first, kFoldColumns);
      plan->cut(&part.b, first, kFoldColumns);
      part.z_offset -= first;
      if (k > 0) part.extension = Extension::kNone;  // it is a column by itself
      of_decay.move(&part, k);
      Plan::States states = from;
      if (states.before) states.before += first * l.row_stride;
      plan->add_outputs(part, states, after ? after + first * l.row_stride : nullptr);
    }
    plan->add_fold(l, folded, folds * plan->fold_slices(), plan->fold_width());
  };
  const bool curved = p.feature_map != FeatureMap::kIdentity || p.ddecay.data;

  const auto* const initial = static_cast<const float*>(p.initial_state);
  const auto* const dfinal = static_cast<const float*>(p.dfinal_state);
  {
    const auto states = plan->add_states(keys_and_values(*plan), initial, nullptr);
    LinearLaunch l = plan->start(false);
    l.a = plan->dout();
    l.b = plan->value();
    l.c = plan->key();
    use_numbers(&l, Side::kA, Extension::kFeature);
    plan->set_layout(&l, true);
    set_result(*plan, &l, p.dquery, p.query_heads, p.head_dim);
    if (curved) l.raw = plan->query();
    l.dots = of_decay.dots;
    l.boundaries = of_decay.boundaries;
    add_by_columns(l, states, nullptr);
  }
  auto* const dinitial = static_cast<float*>(p.dinitial_state);
  LinearLaunch l = plan->start(true);
  l.b = plan->query();
  l.c = plan->dout();
  use_numbers(&l, Side::kB, Extension::kColumn);
  const auto states = plan->add_states(l, dfinal, dinitial);
  use_numbers(&l, Side::kB, Extension::kNone);
  l.a = plan->key();
  set_result(*plan, &l, p.dvalue, p.value_heads, p.head_dim_v);
  plan->add_outputs(l, states, nullptr);

  l.a = plan->value();
  l.b = plan->dout();
  l.c = plan->query();
  use_numbers(&l, Side::kB, Extension::kFeature);
  plan->set_layout(&l, true);
  set_result(*plan, &l, p.dkey, p.key_heads, p.head_dim);
  if (curved) l.raw = plan->key();
  l.dots = of_decay.dots_key;
  l.boundaries = of_decay.boundaries;
  l.meetings = of_decay.meetings;
  add_by_columns(l, states, dinitial);

  of_decay.add(plan);
}

}  // namespace

std::vector<ScanFacts> scan_kernels() { return {std::begin(kScans), std::end(kScans)}; }

int64_t linear_forward_workspace(const LinearParams& params, int64_t length) {
  Plan plan(params, length, nullptr);
  plan_forward(&plan);
  return plan.bytes();
}
int64_t linear_backward_workspace(const LinearParams& params, int64_t length) {
  Plan plan(params, length, nullptr);
  plan_backward(&plan);
  return plan.bytes();
}

std::vector<Launch> linear_forward_launches(const LinearParams& params, int64_t length,
                                            void* workspace) {
  Plan plan(params, length, workspace);
  plan_forward(&plan);
  return plan.launches;
}
std::vector<Launch> linear_backward_launches(const LinearParams& params, int64_t length,
                                             void* workspace) {
  Plan plan(params, length, workspace);
  plan_backward(&plan);
  return plan.launches;
}

std::vector<Launch> linear_step_launches(const LinearStepParams& params) {
  const LinearParams& p = params.problem;
  LinearStepLaunch l{};
  l.step = params;
  const int64_t features = p.features(), columns = p.state_columns();
  // The rows of the delta rule are held at once.
  const int64_t groups = features > kStepHeld * kStepGroups / 2 ? kStepGroups : kStepGroups / 2;
  const int64_t most = p.delta() ? kStepThreads / groups : kStepColumns;
  if (p.delta() && features > kStepHeld * groups) {
    throw std::invalid_argument("attnext: a step of the delta rule on CUDA has head_dim up to 256");
  }
  if (p.dtype == DType::kFloat64 || features > INT32_MAX / 2 || columns > INT32_MAX / 2) {
    throw std::invalid_argument("attnext: a step on CUDA has float32, bfloat16 or float16");
  }
  l.features = static_cast<int32_t>(features);
  l.columns = static_cast<int32_t>(columns);
  // By the columns alone: one item's result does not depend on others.
  l.tiles = static_cast<int32_t>(ceil_div(columns, most));
  l.width = static_cast<int32_t>(ceil_div(columns, l.tiles));
  l.groups = std::min(kStepGroups, kStepThreads / l.width);
  const int64_t blocks = p.batch * p.heads * (p.normalize ? 1 : l.tiles);
  if (blocks > INT32_MAX) throw std::invalid_argument("attnext: grid: more than 2^31 blocks");
  std::vector<Launch> launches;
  if (blocks > 0 && p.tokens > 0) {
    const auto threads = static_cast<int32_t>(ceil_div(l.width * l.groups, 32) * 32);
    launches.emplace_back("linear_step" + suffix(p.dtype), blocks, threads, 0, l);
  }
  return launches;
}

}  // namespace cuda
}  // namespace attnext
