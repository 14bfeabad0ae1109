// SPDX-License-Identifier: Apache-2.0
#include "plan.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <tuple>
#include <type_traits>

#include "kernels.h"

namespace attnext {
namespace cuda {
namespace {

// ---- kernels ------------------------------------------------------------------------------------

using Kernel = KernelFacts;

template <class T>
constexpr DType dtype_of() {
  return sizeof(T) == 4                 ? DType::kFloat32
         : std::is_same<T, bf16>::value ? DType::kBFloat16
                                        : DType::kFloat16;
}

constexpr bool is_routed(const char* name) { return name[0] == 'r'; }
constexpr int warp_ints(const char* name) { return is_routed(name) ? kListWarpInts : kBoxWarpInts; }

#define ATTNEXT_DESCRIBE(pass, held, numbers, more, name, T, dim, warps, frags, step, modified, \
                         slices)                                                                \
  Kernel{#name,                                                                                 \
         pass,                                                                                  \
         dtype_of<T>(),                                                                         \
         {dim, warps, frags, step, slices},                                                     \
         modified,                                                                              \
         SharedPlan<sizeof(T), dim, (warps) * (frags) * 16, step, held, numbers,                \
                    warp_ints(#name)>::kBytes +                                                 \
             (more),                                                                            \
         is_routed(#name)},
#define ATTNEXT_DESCRIBE_FORWARD(name, T, dim, warps, frags, step, modified, slices)              \
  ATTNEXT_DESCRIBE(Pass::kForward, 1, key_numbers(modified), 0, name, T, dim, warps, frags, step, \
                   modified, slices)
#define ATTNEXT_DESCRIBE_QUERY(name, T, dim, warps, frags, step, modified, slices)                \
  ATTNEXT_DESCRIBE(Pass::kQueryGradient, 2, key_numbers(modified), 0, name, T, dim, warps, frags, \
                   step, modified, slices)
#define ATTNEXT_DESCRIBE_KEY(name, T, dim, warps, frags, step, modified, slices)                  \
  ATTNEXT_DESCRIBE(Pass::kKeyGradient, 2, query_numbers(modified), 0, name, T, dim, warps, frags, \
                   step, modified, slices)
#define ATTNEXT_DESCRIBE_BIAS(name, T, dim, warps, frags, step, modified, slices)                \
  ATTNEXT_DESCRIBE(Pass::kBiasGradient, 2, key_numbers(modified),                                \
                   is_routed(#name) ? 0 : bias_scratch(warps, step), name, T, dim, warps, frags, \
                   step, modified, slices)
#define ATTNEXT_DESCRIBE_DTYPE(family, bits, T, type)                                \
  ATTNEXT_FORWARD_KERNELS_##bits(ATTNEXT_DESCRIBE_FORWARD, family, T, type)          \
      ATTNEXT_QUERY_GRADIENT_KERNELS_##bits(ATTNEXT_DESCRIBE_QUERY, family, T, type) \
          ATTNEXT_KEY_GRADIENT_KERNELS_##bits(ATTNEXT_DESCRIBE_KEY, family, T, type) \
              ATTNEXT_BIAS_GRADIENT_KERNELS_##bits(ATTNEXT_DESCRIBE_BIAS, family, T, type)
#define ATTNEXT_DESCRIBE_ALL(family)             \
  ATTNEXT_DESCRIBE_DTYPE(family, 16, bf16, bf16) \
  ATTNEXT_DESCRIBE_DTYPE(family, 16, fp16, fp16) \
  ATTNEXT_DESCRIBE_DTYPE(family, 32, float, fp32)
#define ATTNEXT_DESCRIBE_LONG(T)                                  \
  ATTNEXT_LONG_FORWARD_KERNELS_16(ATTNEXT_DESCRIBE_FORWARD, T, T) \
  ATTNEXT_LONG_QUERY_GRADIENT_KERNELS_16(ATTNEXT_DESCRIBE_QUERY, T, T)

const Kernel kKernels[] = {ATTNEXT_DESCRIBE_ALL(window) ATTNEXT_DESCRIBE_LONG(bf16)
                               ATTNEXT_DESCRIBE_LONG(fp16) ATTNEXT_DESCRIBE_ALL(routed)};

// Whether scores are more than a positive number times q k.
bool is_modified(const WindowParams& p) {
  return p.row_scale.data || p.bias || p.softcap > 0 || !(p.scale > 0);
}

// The smallest bucket that holds both dims; kernels with modifiers serve any problem; large tiles
// where there is a sequence to fill them.
const Kernel& choose(const WindowParams& p, Pass pass, bool routed = false) {
  const int64_t dim = std::max(p.head_dim, p.head_dim_v);
  const bool is_long = p.one_line && p.query_extent[2] > kBoxRows;
  const Kernel* best = nullptr;
  for (const Kernel& k : kKernels) {
    if (k.routed != routed || k.pass != pass || k.dtype != p.dtype || k.shape.dim < dim) continue;
    if (is_modified(p) && !k.modified) continue;
    if (k.shape.rows() > kBoxRows && !is_long) continue;
    const auto rank = [](const Kernel& x) {
      return std::make_tuple(x.shape.dim, x.modified, -x.shape.rows());
    };
    if (!best || rank(k) < rank(*best)) best = &k;
  }
  if (!best) throw std::invalid_argument("no CUDA kernel for this dtype and head_dim");
  return *best;
}

int32_t narrow(int64_t x, const char* what) {
  if (x > INT32_MAX) {
    throw std::invalid_argument(std::string("too large for a CUDA kernel: ") + what);
  }
  return static_cast<int32_t>(x);
}

// ---- tables -------------------------------------------------------------------------------------

constexpr int32_t kRuleInts = sizeof(RuleTiles) / 4;

class TableWriter {
 public:
  TableWriter(int32_t num_rules, const std::vector<int32_t>& head_rule, Tables* out) : out_(out) {
    out->data.assign(int64_t(num_rules) * kRuleInts, 0);
    out->head_rule = append(head_rule);
  }
  int32_t append(const std::vector<int32_t>& values) {
    const int32_t at = narrow(static_cast<int64_t>(out_->data.size()), "tables");
    out_->data.insert(out_->data.end(), values.begin(), values.end());
    return values.empty() ? -1 : at;
  }
  int32_t append(std::vector<AxisTile> tiles) {
    for (AxisTile& tile : tiles) {
      const Division by = division_by(std::max(1, tile.end - tile.begin));
      tile.multiplier = static_cast<int32_t>(by.multiplier), tile.shift = by.shift;
    }
    std::vector<int32_t> ints(tiles.size() * kTileInts);
    if (!tiles.empty()) std::memcpy(ints.data(), tiles.data(), ints.size() * 4);
    return append(ints);
  }
  void set_rule(int32_t index, const RuleTiles& rule) {
    std::memcpy(&out_->data[int64_t(index) * kRuleInts], &rule, sizeof rule);
  }

 private:
  Tables* out_;
};

// Tables whose windows hold those of every rule, axis by axis.
void hull(const std::vector<AxisTable>& tables, AxisTable (&all)[3]) {
  for (size_t k = 0; k < tables.size(); ++k) {
    AxisTable& out = all[k % 3];
    if (k < 3) {
      out = tables[k];
      continue;
    }
    out.monotone &= tables[k].monotone;
    for (size_t i = 0; i < out.begin.size(); ++i) {
      out.begin[i] = std::min(out.begin[i], tables[k].begin[i]);
      out.end[i] = std::max(out.end[i], tables[k].end[i]);
    }
  }
}

std::vector<AxisTile> tiles_of(const AxisPlan& plan) {
  std::vector<AxisTile> tiles;
  for (const Group& g : plan.groups) {
    const Segment& s = plan.segments[g.first_segment];
    tiles.push_back(
        {s.query, s.count, s.position, g.cls, 0, g.begin, g.end, g.sink_begin, g.sink_end, 0, 0});
  }
  return tiles;
}

// Rows by key, of a rule: what the tile's own windows reach, and where walked queries stand.
void walk_queries(const AxisTable& keys, const AxisTable& original, std::vector<AxisTile>* tiles) {
  for (AxisTile& tile : *tiles) {
    const int64_t cls = tile.first, first = first_query_of_class(original, cls);
    tile.first = static_cast<int32_t>(first);
    tile.base = original.position.empty() ? static_cast<int32_t>(original.query_index(first)) : 0;
    tile.begin = INT32_MAX, tile.end = 0;
    for (int32_t r = 0; r < tile.count; ++r) {
      const int64_t row = tile.row + r * keys.dilation;
      if (keys.begin[row] >= keys.end[row]) continue;
      tile.begin = std::min(tile.begin, keys.begin[row]);
      tile.end = std::max(tile.end, keys.end[row]);
    }
    tile.begin = std::min(tile.begin, tile.end);
  }
}

RuleTiles extra_rule(int64_t extra_keys, const std::vector<AxisTable>& given, int32_t rows,
                     TableWriter* writer) {
  RuleTiles rule{};
  for (int a = 0; a < 3; ++a) {
    const int64_t count = a == 2 ? extra_keys : 1, box = a == 2 ? rows : 1;
    const int32_t walked = static_cast<int32_t>(given[a].num_queries);
    AxisTiles& axis = rule.axis[a];
    axis.begin = writer->append(std::vector<int32_t>(count, 0));
    axis.end = writer->append(std::vector<int32_t>(count, walked));
    axis.sink_begin = axis.sink_end = axis.walk_position = -1;
    axis.dilation = 1;
    axis.num_walked = walked;
    std::vector<AxisTile> tiles;
    for (int64_t row = 0; row < count; row += box) {
      const int64_t here = std::min(box, count - row);
      tiles.push_back(
          {static_cast<int32_t>(row), static_cast<int32_t>(here), 0, 0, 0, 0, walked, 0, 0, 0, 0});
    }
    axis.num_tiles = static_cast<int32_t>(tiles.size());
    axis.tiles = writer->append(tiles);
    rule.box[a] = static_cast<int32_t>(box);
  }
  rule.num_tiles = rule.axis[2].num_tiles;
  return rule;
}

}  // namespace

Division division_by(int64_t divisor) {
  int32_t bits = 0;
  while ((int64_t(1) << bits) < divisor) ++bits;
  const int32_t shift = 31 + bits;
  const uint64_t by = static_cast<uint64_t>(divisor);
  return {static_cast<uint32_t>(((uint64_t(1) << shift) + by - 1) / by), shift};
}

Tables make_tables(const Geometry& geometry, const std::vector<int32_t>& head_rule, bool by_key,
                   int32_t rows, int64_t extra_keys) {
  const std::vector<AxisTable>& given = geometry.tables();
  Tables out;
  out.num_rules = static_cast<int32_t>(given.size() / 3);
  TableWriter writer(out.num_rules + (by_key && extra_keys > 0 ? 1 : 0), head_rule, &out);
  std::vector<AxisTable> tables;
  for (const AxisTable& t : given) tables.push_back(by_key ? transposed(t) : t);
  PlanOptions options;
  options.lanes = rows;
  options.vectors = 1;
  WindowPlan common;
  if (by_key) {
    AxisTable all[3];
    hull(tables, all);
    common = make_plan(all, options);
  }
  for (int32_t r = 0; r < out.num_rules; ++r) {
    WindowPlan own;
    if (!by_key) {
      AxisTable copy[3] = {tables[3 * r], tables[3 * r + 1], tables[3 * r + 2]};
      own = make_plan(copy, options);
    }
    const WindowPlan& plan = by_key ? common : own;
    out.useful_pairs += plan.useful_pairs;
    out.computed_pairs += plan.computed_pairs;
    RuleTiles rule{};
    int64_t tiles = 1, walk = 1, sinks = 0;
    for (int a = 0; a < 3; ++a) {
      const AxisTable& t = tables[3 * r + a];
      AxisTiles& axis = rule.axis[a];
      axis.begin = writer.append(t.begin);
      axis.end = writer.append(t.end);
      axis.sink_begin = writer.append(t.sink_begin);
      axis.sink_end = writer.append(t.sink_end);
      axis.walk_position = by_key ? writer.append(given[3 * r + a].position) : -1;
      axis.dilation = static_cast<int32_t>(t.dilation);
      axis.num_walked = static_cast<int32_t>(t.num_keys);
      std::vector<AxisTile> list = tiles_of(plan.axis[a]);
      if (by_key) walk_queries(t, given[3 * r + a], &list);
      int64_t widest = 0;
      for (const AxisTile& tile : list) {
        widest = std::max<int64_t>(widest, tile.end - tile.begin);
        sinks = std::max<int64_t>(sinks, tile.sink_end - tile.sink_begin);
      }
      axis.num_tiles = static_cast<int32_t>(list.size());
      axis.tiles = writer.append(list);
      rule.box[a] = plan.box[a];
      tiles *= axis.num_tiles;
      walk *= widest;
    }
    rule.num_tiles = narrow(tiles, "number of tiles");
    out.most_tiles = std::max(out.most_tiles, rule.num_tiles);
    out.longest_walk = std::max(out.longest_walk, walk + sinks);
    writer.set_rule(r, rule);
  }
  if (by_key && extra_keys > 0) {
    const RuleTiles rule = extra_rule(extra_keys, given, rows, &writer);
    out.extra_tiles = rule.num_tiles;
    writer.set_rule(out.num_rules, rule);
  }
  narrow(out.longest_walk, "walk of a tile");
  return out;
}

std::shared_ptr<const Tables> shared_tables(const std::shared_ptr<const Geometry>& geometry,
                                            const std::vector<int32_t>& head_rule, bool by_key,
                                            int32_t rows, int64_t extra_keys) {
  constexpr size_t kKept = 64, kKeptInts = size_t(1) << 26;
  struct Entry {
    std::shared_ptr<const Geometry> geometry;  // kept alive, so that its address stays its own
    std::vector<int32_t> head_rule;
    bool by_key;
    int32_t rows;
    int64_t extra_keys;
    std::shared_ptr<const Tables> tables;
  };
  static std::mutex mutex;
  static std::vector<Entry> entries;
  if (!by_key) extra_keys = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Entry& e : entries) {
    if (e.geometry == geometry && e.head_rule == head_rule && e.by_key == by_key &&
        e.rows == rows && e.extra_keys == extra_keys) {
      return e.tables;
    }
  }
  auto tables =
      std::make_shared<const Tables>(make_tables(*geometry, head_rule, by_key, rows, extra_keys));
  entries.push_back({geometry, head_rule, by_key, rows, extra_keys, tables});
  size_t kept = 0;
  for (const Entry& e : entries) kept += e.tables->data.size();
  while (entries.size() > kKept || (kept > kKeptInts && entries.size() > 1)) {
    kept -= entries.front().tables->data.size();
    entries.erase(entries.begin());
  }
  return tables;
}

// ---- launches -----------------------------------------------------------------------------------

std::vector<KernelFacts> all_kernels() { return {std::begin(kKernels), std::end(kKernels)}; }

KernelShape kernel_shape(const WindowParams& p, Pass pass) { return choose(p, pass).shape; }

namespace {

constexpr int64_t kEnoughBlocks = 2 * 132;  // of the largest GPU, twice over

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t queries_of(const WindowParams& p) {
  return p.query_extent[0] * p.query_extent[1] * p.query_extent[2];
}
int64_t rows_of(const WindowParams& p) { return p.batch * p.heads * queries_of(p); }

const char* suffix(DType dtype) {
  return dtype == DType::kFloat32 ? "_fp32" : dtype == DType::kBFloat16 ? "_bf16" : "_fp16";
}

int64_t elem_bytes(const WindowParams& p) { return p.dtype == DType::kFloat32 ? 4 : 2; }

bool starts_at_16(const WindowParams& p, const TensorRef& t) {
  const int64_t elem = elem_bytes(p);
  const auto whole = [&](int64_t n) { return n * elem % 16 == 0; };
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && whole(t.batch) && whole(t.token[0]) &&
         whole(t.token[1]) && whole(t.token[2]) && whole(t.head);
}

WindowLaunch start_params(const WindowParams& p) {
  WindowLaunch launch{};
  launch.window = p;
  launch.splits = 1;
  launch.split_step = INT32_MAX / 2;
  launch.aligned = starts_at_16(p, p.query) && starts_at_16(p, p.key) && starts_at_16(p, p.value) &&
                   starts_at_16(p, p.dout) && starts_at_16(p, p.extra_key) &&
                   starts_at_16(p, p.extra_value);
  const TensorRef* tensors[4] = {&p.query, &p.key, &p.value, &p.dout};
  launch.near = launch.aligned;
  launch.unit_bytes = 16;
  launch.unit = static_cast<float>(p.scale * kLog2E);
  for (int t = 0; t < 4; ++t) {
    int64_t reach = 0;
    for (int a = 0; a < 3; ++a) {
      const int64_t units = tensors[t]->token[a] * elem_bytes(p) / 16;
      const bool by_query = t == 0 || t == 3;
      reach += units * (by_query ? p.query_extent[a] : p.key_extent[a]);
      launch.units[t][a] = static_cast<uint32_t>(units);
      launch.near &= 0 <= units && reach < (int64_t(1) << 31);
    }
  }
  launch.aligned_out = starts_at_16(p, p.out) && starts_at_16(p, p.dquery) &&
                       starts_at_16(p, p.dkey) && starts_at_16(p, p.dvalue) &&
                       starts_at_16(p, p.dextra_key) && starts_at_16(p, p.dextra_value);
  return launch;
}
WindowLaunch start_params(const WindowParams& p, const Tables& tables,
                          const int32_t* device_tables) {
  WindowLaunch launch = start_params(p);
  launch.tables = device_tables;
  launch.num_rules = tables.num_rules;
  launch.most_tiles = tables.most_tiles;
  launch.extra_tiles = tables.extra_tiles;
  launch.head_rule = tables.head_rule;
  return launch;
}

template <class Params>
Launch launch_of(const Kernel& kernel, int64_t blocks, Params params) {
  params.rows = kernel.shape.rows();
  return {kernel.name, narrow(blocks * kernel.shape.slices, "grid"), kernel.shape.threads(),
          kernel.shared_bytes, params};
}

// Few tiles leave most of a GPU idle: the walk of each is then shared by several blocks.
void split(int64_t blocks, int64_t longest_walk, const KernelShape& shape, WindowLaunch* launch) {
  constexpr int64_t kLeastSteps = 4, kMostSplits = 128;
  const int64_t steps = std::max<int64_t>(1, ceil_div(longest_walk, shape.step));
  blocks = std::max<int64_t>(1, blocks);
  const int64_t splits =
      std::max<int64_t>(1, std::min({kEnoughBlocks / blocks, steps / kLeastSteps, kMostSplits}));
  if (splits == 1) return;
  const int64_t share = ceil_div(steps, splits);
  launch->splits = static_cast<int32_t>(ceil_div(steps, share));
  launch->split_step = narrow(share * shape.step, "walk of a tile");
}

void split(const WindowParams& p, const Tables& tables, const KernelShape& shape,
           WindowLaunch* launch) {
  split(p.batch * p.heads * tables.most_tiles, tables.longest_walk + p.extra_keys, shape, launch);
}

int64_t statistics_size(const WindowParams& p) { return 4 * rows_of(p); }

// As many threads a row as it has 16 bytes, up to a warp.
Launch statistics_launch(const WindowParams& p, WindowLaunch params) {
  constexpr int32_t kThreads = 128;
  narrow(queries_of(p), "queries of a batch item");
  narrow(p.batch * p.heads, "batch times heads");
  int32_t lanes = 1;
  while (lanes < 32 && lanes * 16 < p.head_dim_v * elem_bytes(p)) lanes *= 2;
  const int32_t rows = kThreads / lanes;
  params.rows = rows;
  return {std::string("window_statistics") + suffix(p.dtype),
          narrow(ceil_div(rows_of(p), rows), "grid"), kThreads, 0, params};
}

int64_t bias_blocks(const WindowParams& p, const Tables& queries) {
  const int64_t tiles = std::max<int64_t>(1, p.batch * queries.most_tiles);
  return std::max<int64_t>(1, std::min(tiles, kEnoughBlocks / p.heads));
}

}  // namespace

int64_t forward_workspace(const WindowParams& p, const Tables& tables) {
  const KernelShape shape = kernel_shape(p, Pass::kForward);
  WindowLaunch launch{};
  launch.splits = 1;
  split(p, tables, shape, &launch);
  if (launch.splits == 1) return 0;
  return p.batch * p.heads * tables.most_tiles * launch.splits * shape.rows() * (p.head_dim_v + 2) *
         int64_t(sizeof(float));
}

std::vector<Launch> forward_launches(const WindowParams& p, const Tables& tables,
                                     const int32_t* device_tables, void* workspace) {
  const Kernel& kernel = choose(p, Pass::kForward);
  const int64_t tiles = p.batch * p.heads * tables.most_tiles;
  if (tiles == 0) return {};
  WindowLaunch params = start_params(p, tables, device_tables);
  params.partial = static_cast<float*>(workspace);
  split(p, tables, kernel.shape, &params);
  std::vector<Launch> out{launch_of(kernel, tiles * params.splits, params)};
  if (params.splits > 1) {
    params.rows = kernel.shape.rows();
    out.push_back({std::string("window_merge") + suffix(p.dtype), tiles, 128, 0, params});
  }
  return out;
}

int64_t backward_workspace(const WindowParams& p, const Tables& queries) {
  int64_t floats = statistics_size(p);
  if (p.bias) {
    const KernelShape shape = kernel_shape(p, Pass::kBiasGradient);
    floats += p.heads * bias_blocks(p, queries) * shape.warps * p.bias_head_stride;
  }
  return floats * int64_t(sizeof(float));
}

std::vector<Launch> backward_launches(const WindowParams& p, const Tables& queries,
                                      const int32_t* device_queries, const Tables& keys,
                                      const int32_t* device_keys, void* workspace) {
  std::vector<Launch> out;
  const int64_t rows = rows_of(p);
  WindowLaunch by_query = start_params(p, queries, device_queries);
  WindowLaunch by_key = start_params(p, keys, device_keys);
  by_query.statistics = by_key.statistics = static_cast<float*>(workspace);
  if (rows > 0) {
    out.push_back(statistics_launch(p, by_query));
    out.push_back(launch_of(choose(p, Pass::kQueryGradient), p.batch * p.heads * queries.most_tiles,
                            by_query));
  }
  if (p.dsink_logits) out.push_back({"window_sink_gradient", p.heads, 256, 0, by_query});
  const int64_t key_blocks = p.batch * p.kv_heads * (keys.most_tiles + keys.extra_tiles);
  if (key_blocks > 0) out.push_back(launch_of(choose(p, Pass::kKeyGradient), key_blocks, by_key));
  if (p.dbias) {
    const Kernel& kernel = choose(p, Pass::kBiasGradient);
    WindowLaunch params = by_query;
    params.partial = static_cast<float*>(workspace) + statistics_size(p);
    params.splits = static_cast<int32_t>(bias_blocks(p, queries));
    out.push_back(launch_of(kernel, p.heads * params.splits, params));
    params.rows = kernel.shape.warps;
    out.push_back({"window_merge_bias", narrow(p.heads * ceil_div(p.bias_head_stride, 128), "grid"),
                   128, 0, params});
  }
  return out;
}

// ---- routed attention

namespace {

// Sides without a limit as ints of the device's arithmetic: beyond any token.
constexpr int64_t kFar = int64_t(1) << 31;

// As window attention reads them.
WindowParams with_bias(const RoutedParams& r) {
  WindowParams p = r.window;
  p.bias = r.entry_bias;
  return p;
}

// Heads of a group whose rows share a tile: those of small blocks, if they share lists and policy.
int32_t packed_heads(const RoutedParams& r, const RoutedFacts& facts, const Kernel& kernel) {
  const int64_t group = r.window.heads / r.window.kv_heads;
  if (group == 1 || r.list_heads == r.window.heads) return 1;
  for (int64_t h = 0; r.head_policy && h < r.window.heads; ++h) {
    if (r.head_policy[h] != r.head_policy[h / group * group]) return 1;
  }
  int64_t packed =
      std::min<int64_t>(group, kernel.shape.rows() / std::max<int64_t>(1, facts.query_block));
  while (packed > 1 && group % packed != 0) --packed;
  return static_cast<int32_t>(std::max<int64_t>(1, packed));
}

// Whether a query's own place says what it attends.
bool has_rules(const RoutedParams& r, int64_t num_keys) {
  return r.causal || r.exclude_self || r.has_window || r.sinks > 0 || r.query_documents ||
         r.key_lengths || std::min(r.within[0], r.within[1]) < num_keys;
}

RoutedLaunch routed_params(const RoutedParams& r, const RoutedFacts& facts, const Kernel& kernel,
                           const ListTables& tables, bool by_key) {
  const WindowParams& p = r.window;
  RoutedLaunch launch{};
  static_cast<WindowLaunch&>(launch) = start_params(p);
  launch.rules = r;
  for (int side = 0; side < 2; ++side) {
    launch.rules.within[side] = std::min(r.within[side], kFar);
    launch.rules.around[side] = std::min(r.around[side], kFar);
  }
  launch.rules.sinks = std::min(r.sinks, kFar);
  launch.tile_ptr = tables.tile_ptr;
  launch.entries = tables.entries;
  launch.row_order = by_key ? r.key_order : r.query_order;
  launch.walk_order = by_key ? r.query_order : r.key_order;
  launch.walk_places = tables.walk_places;
  launch.num_entries = tables.num_entries;
  launch.slot_ptr = tables.slot_ptr;
  launch.slot_entries = tables.slot_entries;
  launch.num_slots = r.entries;
  launch.list_batch = static_cast<int32_t>(r.list_batch);
  launch.list_heads = static_cast<int32_t>(r.list_heads);
  const int64_t* rows = by_key ? p.key_extent : p.query_extent;
  const int64_t* walked = by_key ? p.query_extent : p.key_extent;
  launch.num_rows = narrow(rows[0] * rows[1] * rows[2], "tokens");
  launch.num_walked = narrow(walked[0] * walked[1] * walked[2], "tokens");
  for (int a = 0; a < 3; ++a) {
    launch.row_extent[a] = static_cast<int32_t>(rows[a]);
    launch.walk_extent[a] = static_cast<int32_t>(walked[a]);
  }
  launch.walk_lines[0] = division_by(std::max<int64_t>(1, walked[2]));
  launch.walk_lines[1] = division_by(std::max<int64_t>(1, walked[1]));
  launch.scattered =
      launch.walk_order && has_rules(r, by_key ? launch.num_rows : launch.num_walked);
  launch.mixed = r.query_documents && facts.mixed_documents;
  if (r.head_policy && p.heads > kMostPackedHeads) launch.policies = facts.policies;
  for (int64_t h = 0; r.head_policy && !launch.policies && h < p.heads; ++h) {
    launch.policy[h / 16] |= static_cast<uint32_t>(r.head_policy[h]) << (h % 16 * 2);
  }
  if (kernel.shape.rows() > kMostListRows) throw std::logic_error("a tile of too many rows");
  // Slots of a walk are counted in 31 bits: at worst, the lists of a tile's rows have nothing in
  // common.
  narrow(int64_t(kernel.shape.rows() + 2) * launch.num_walked, "walk of a tile");
  launch.packed = by_key ? 1 : packed_heads(r, facts, kernel);
  launch.most_tiles =
      narrow(ceil_div(launch.num_rows, kernel.shape.rows() / launch.packed), "number of tiles");
  return launch;
}

}  // namespace

namespace {

int64_t num_queries(const RoutedParams& r) {
  return r.window.query_extent[0] * r.window.query_extent[1] * r.window.query_extent[2];
}

// Blocks that share the batch items and heads of a list.
int32_t entry_splits(const RoutedParams& r, const RoutedFacts& facts, const Kernel& kernel) {
  const WindowParams& p = r.window;
  const int64_t lists = std::max<int64_t>(1, r.list_batch * r.list_heads);
  const int32_t packed = packed_heads(r, facts, kernel);
  const int64_t tiles =
      std::max<int64_t>(1, lists * ceil_div(num_queries(r), kernel.shape.rows() / packed));
  const int64_t sharing = p.batch * p.heads / lists / packed;
  return static_cast<int32_t>(std::max<int64_t>(1, std::min(sharing, kEnoughBlocks / tiles)));
}

}  // namespace

int64_t routed_rows(const RoutedParams& r, const RoutedFacts& facts, Pass pass) {
  const Kernel& kernel = choose(with_bias(r), pass, true);
  const int32_t packed = pass == Pass::kKeyGradient ? 1 : packed_heads(r, facts, kernel);
  return kernel.shape.rows() / packed;
}

int64_t routed_backward_workspace(const RoutedParams& r, const RoutedFacts& facts, bool of_bias,
                                  int64_t num_entries) {
  int64_t floats = statistics_size(r.window);
  if (of_bias) {
    const Kernel& kernel = choose(with_bias(r), Pass::kBiasGradient, true);
    floats += entry_splits(r, facts, kernel) * kernel.shape.warps * num_entries;
  }
  return floats * int64_t(sizeof(float));
}

int64_t routed_forward_workspace(const RoutedParams& r, const RoutedFacts& facts,
                                 int64_t longest_walk) {
  const WindowParams p = with_bias(r);
  const Kernel& kernel = choose(p, Pass::kForward, true);
  const int32_t packed = packed_heads(r, facts, kernel);
  const int64_t blocks =
      p.batch * p.heads / packed * ceil_div(num_queries(r), kernel.shape.rows() / packed);
  WindowLaunch launch{};
  launch.splits = 1;
  split(blocks, longest_walk, kernel.shape, &launch);
  if (launch.splits == 1) return 0;
  return blocks * launch.splits * kernel.shape.rows() * (p.head_dim_v + 2) * int64_t(sizeof(float));
}

std::vector<Launch> routed_forward_launches(const RoutedParams& given, const RoutedFacts& facts,
                                            const ListTables& queries, int64_t longest_walk,
                                            void* workspace) {
  RoutedParams r = given;
  r.window = with_bias(given);
  const WindowParams& p = r.window;
  const Kernel& kernel = choose(p, Pass::kForward, true);
  RoutedLaunch params = routed_params(r, facts, kernel, queries, false);
  const int64_t blocks = p.batch * p.heads / params.packed * params.most_tiles;
  if (blocks == 0) return {};
  params.partial = static_cast<float*>(workspace);
  split(blocks, longest_walk, kernel.shape, &params);
  std::vector<Launch> out{launch_of(kernel, blocks * params.splits, params)};
  if (params.splits > 1) {
    params.rows = kernel.shape.rows();
    out.push_back({std::string("routed_merge") + suffix(p.dtype), blocks, 128, 0, params});
  }
  return out;
}

std::vector<Launch> routed_backward_launches(const RoutedParams& given, const RoutedFacts& facts,
                                             const ListTables& queries, const ListTables& keys,
                                             void* workspace) {
  RoutedParams r = given;
  r.window = with_bias(given);
  const WindowParams& p = r.window;
  const Kernel& of_query = choose(p, Pass::kQueryGradient, true);
  const Kernel& of_key = choose(p, Pass::kKeyGradient, true);
  RoutedLaunch by_query = routed_params(r, facts, of_query, queries, false);
  RoutedLaunch by_key = routed_params(r, facts, of_key, keys, true);
  by_query.statistics = by_key.statistics = static_cast<float*>(workspace);
  const WindowLaunch& plain = by_query;
  std::vector<Launch> out;
  const int64_t query_blocks = p.batch * p.heads / by_query.packed * by_query.most_tiles;
  const int64_t key_blocks = p.batch * p.kv_heads * by_key.most_tiles;
  if (query_blocks > 0) {
    out.push_back(statistics_launch(p, plain));
    out.push_back(launch_of(of_query, query_blocks, by_query));
  }
  if (p.dsink_logits) out.push_back({"window_sink_gradient", p.heads, 256, 0, plain});
  if (key_blocks > 0) out.push_back(launch_of(of_key, key_blocks, by_key));
  if (r.dentry_bias && r.entries > 0) {
    const Kernel& of_bias = choose(p, Pass::kBiasGradient, true);
    if (of_bias.shape.rows() != of_query.shape.rows()) throw std::logic_error("tiles differ");
    RoutedLaunch params = by_query;
    params.window.dbias = r.dentry_bias;
    params.partial = static_cast<float*>(workspace) + statistics_size(p);
    params.splits = entry_splits(r, facts, of_bias);
    const int64_t tiles = r.list_batch * r.list_heads * params.most_tiles;
    if (tiles > 0) out.push_back(launch_of(of_bias, tiles * params.splits, params));
    params.rows = of_bias.shape.warps;
    out.push_back({"routed_merge_bias", narrow(ceil_div(r.entries, 128), "grid"), 128, 0, params});
  }
  return out;
}

}  // namespace cuda
}  // namespace attnext
