// SPDX-License-Identifier: Apache-2.0
#include "plan.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "kernels.h"

namespace attnext {
namespace cuda {
namespace {

enum class Pass { kForward, kQueryGradient, kKeyGradient };

struct Kernel {
  const char* name;
  DType dtype;
  KernelShape shape;
  bool modified;
  int shared_bytes;
};

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kFloat32;
};
template <>
struct DTypeOf<bf16> {
  static constexpr DType value = DType::kBFloat16;
};
template <>
struct DTypeOf<fp16> {
  static constexpr DType value = DType::kFloat16;
};

#define ATTNEXT_DESCRIBE(name, T, dim, warps, frags, step, modified)                   \
  Kernel{#name,                                                                        \
         DTypeOf<T>::value,                                                            \
         {dim, warps, frags, step},                                                    \
         modified,                                                                     \
         SharedPlan<sizeof(T), dim, (warps) * (frags) * 16, step, 1, (modified) ? 1 : 0>::kBytes},

const Kernel kForwardKernels[] = {ATTNEXT_FORWARD_KERNELS_16(ATTNEXT_DESCRIBE, bf16, bf16)
                                      ATTNEXT_FORWARD_KERNELS_16(ATTNEXT_DESCRIBE, fp16, fp16)
                                          ATTNEXT_FORWARD_KERNELS_32(ATTNEXT_DESCRIBE, float, fp32)};

// The smallest bucket that holds both; kernels with modifiers serve any problem.
const Kernel& choose(const WindowParams& p, bool modified) {
  const int64_t dim = std::max(p.head_dim, p.head_dim_v);
  const Kernel* best = nullptr;
  for (const Kernel& k : kForwardKernels) {
    if (k.dtype != p.dtype || k.shape.dim < dim || (modified && !k.modified)) continue;
    if (!best || k.shape.dim < best->shape.dim ||
        (k.shape.dim == best->shape.dim && k.modified < best->modified)) {
      best = &k;
    }
  }
  if (!best) throw std::invalid_argument("no CUDA kernel for this dtype and head_dim");
  return *best;
}

// Whether scores are more than a positive number times q k.
bool is_modified(const WindowParams& p) {
  return p.row_scale.data || p.bias || p.softcap > 0 || !(p.scale > 0);
}

int32_t narrow(int64_t x, const char* what) {
  if (x > INT32_MAX) throw std::invalid_argument(std::string("too large for a CUDA kernel: ") + what);
  return static_cast<int32_t>(x);
}

bool starts_at_16(const TensorRef& t, int64_t elem) {
  const auto whole = [&](int64_t n) { return n * elem % 16 == 0; };
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && whole(t.batch) && whole(t.token[0]) &&
         whole(t.token[1]) && whole(t.token[2]) && whole(t.head);
}

constexpr int32_t kRuleInts = sizeof(RuleTiles) / 4;

}  // namespace

Tables make_tables(const Geometry& geometry, const std::vector<int32_t>& head_rule,
                   bool by_key, int32_t rows) {
  const std::vector<AxisTable>& given = geometry.tables();
  Tables out;
  out.num_rules = static_cast<int32_t>(given.size() / 3);
  out.data.assign(int64_t(out.num_rules) * kRuleInts, 0);
  out.data.insert(out.data.end(), head_rule.begin(), head_rule.end());
  const auto append = [&](const std::vector<int32_t>& values) {
    const int32_t at = narrow(static_cast<int64_t>(out.data.size()), "tables");
    out.data.insert(out.data.end(), values.begin(), values.end());
    return values.empty() ? -1 : at;
  };
  for (int32_t r = 0; r < out.num_rules; ++r) {
    RuleTiles rule{};
    AxisTable tables[3];
    for (int a = 0; a < 3; ++a) {
      tables[a] = by_key ? transposed(given[3 * r + a]) : given[3 * r + a];
    }
    PlanOptions options;
    options.lanes = rows;
    options.vectors = 1;
    const WindowPlan plan = make_plan(tables, options);
    out.useful_pairs += plan.useful_pairs;
    out.computed_pairs += plan.computed_pairs;
    int64_t tiles = 1, walk = 1, sinks = 0;
    for (int a = 0; a < 3; ++a) {
      const AxisTable& t = plan.table[a];
      const AxisTable& original = given[3 * r + a];
      AxisTiles& axis = rule.axis[a];
      rule.box[a] = plan.box[a];
      axis.begin = append(t.begin);
      axis.end = append(t.end);
      axis.sink_begin = append(t.sink_begin);
      axis.sink_end = append(t.sink_end);
      axis.walk_position = by_key ? append(original.position) : -1;
      axis.dilation = static_cast<int32_t>(t.dilation);
      axis.num_walked = static_cast<int32_t>(t.num_keys);
      axis.num_tiles = static_cast<int32_t>(plan.axis[a].groups.size());
      std::vector<int32_t> ints;
      int64_t widest = 0;
      for (const Group& g : plan.axis[a].groups) {
        const Segment& s = plan.axis[a].segments[g.first_segment];
        AxisTile tile{s.query, s.count, s.position, g.cls, 0,
                      g.begin, g.end,   g.sink_begin, g.sink_end};
        if (by_key) {
          const int64_t first = first_query_of_class(original, g.cls);
          tile.first = static_cast<int32_t>(first);
          if (original.position.empty()) {
            tile.base = static_cast<int32_t>(original.query_index(first));
          }
        }
        widest = std::max<int64_t>(widest, g.end - g.begin);
        sinks = std::max<int64_t>(sinks, g.sink_end - g.sink_begin);
        const size_t at = ints.size();
        ints.resize(at + kTileInts);
        std::memcpy(&ints[at], &tile, sizeof tile);
      }
      axis.tiles = append(ints);
      tiles *= axis.num_tiles;
      walk *= widest;
    }
    rule.num_tiles = narrow(tiles, "number of tiles");
    out.most_tiles = std::max(out.most_tiles, rule.num_tiles);
    out.longest_walk = std::max(out.longest_walk, walk + sinks);
    std::memcpy(&out.data[int64_t(r) * kRuleInts], &rule, sizeof rule);
  }
  narrow(out.longest_walk, "walk of a tile");
  return out;
}

std::shared_ptr<const Tables> shared_tables(const std::shared_ptr<const Geometry>& geometry,
                                            const std::vector<int32_t>& head_rule, bool by_key,
                                            int32_t rows) {
  constexpr size_t kKept = 64;
  struct Entry {
    std::shared_ptr<const Geometry> geometry;  // kept alive, so that its address stays its own
    std::vector<int32_t> head_rule;
    bool by_key;
    int32_t rows;
    std::shared_ptr<const Tables> tables;
  };
  static std::mutex mutex;
  static std::vector<Entry> entries;
  static int64_t made = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Entry& e : entries) {
    if (e.geometry == geometry && e.head_rule == head_rule && e.by_key == by_key && e.rows == rows) {
      return e.tables;
    }
  }
  auto tables = std::make_shared<Tables>(make_tables(*geometry, head_rule, by_key, rows));
  tables->id = ++made;
  if (entries.size() == kKept) entries.erase(entries.begin());
  entries.push_back({geometry, head_rule, by_key, rows, tables});
  return tables;
}

KernelShape forward_shape(const WindowParams& p) { return choose(p, is_modified(p)).shape; }

namespace {

// Few tiles leave most of a GPU idle: the walk of each is then shared by several blocks.
void split(const WindowParams& p, const Tables& tables, const KernelShape& shape,
           WindowLaunch* launch) {
  constexpr int64_t kEnoughBlocks = 2 * 132, kLeastSteps = 4, kMostSplits = 128;
  const int64_t walk = tables.longest_walk + p.extra_keys;
  const int64_t steps = std::max<int64_t>(1, (walk + shape.step - 1) / shape.step);
  const int64_t blocks = std::max<int64_t>(1, p.batch * p.heads * tables.most_tiles);
  int64_t splits = std::min({kEnoughBlocks / blocks, steps / kLeastSteps, kMostSplits});
  splits = std::max<int64_t>(1, splits);
  const int64_t share = (steps + splits - 1) / splits;
  launch->splits = static_cast<int32_t>((steps + share - 1) / share);
  launch->split_step = narrow(share * shape.step, "walk of a tile");
}

WindowLaunch forward_params(const WindowParams& p, const Tables& tables,
                            const int32_t* device_tables, void* workspace,
                            const KernelShape& shape) {
  const int64_t elem = p.dtype == DType::kFloat32 ? 4 : 2;
  WindowLaunch launch{};
  launch.window = p;
  launch.tables = device_tables;
  launch.num_rules = tables.num_rules;
  launch.most_tiles = tables.most_tiles;
  launch.aligned = starts_at_16(p.query, elem) && starts_at_16(p.key, elem) &&
                   starts_at_16(p.value, elem) &&
                   (p.extra_keys == 0 ||
                    (starts_at_16(p.extra_key, elem) && starts_at_16(p.extra_value, elem)));
  launch.aligned_out = starts_at_16(p.out, elem);
  launch.partial = static_cast<float*>(workspace);
  split(p, tables, shape, &launch);
  return launch;
}

}  // namespace

int64_t forward_workspace(const WindowParams& p, const Tables& tables) {
  const KernelShape shape = forward_shape(p);
  const WindowLaunch launch = forward_params(p, tables, nullptr, nullptr, shape);
  if (launch.splits == 1) return 0;
  return p.batch * p.heads * tables.most_tiles * launch.splits * shape.rows() *
         (p.head_dim_v + 2) * int64_t(sizeof(float));
}

std::vector<Launch> forward_launches(const WindowParams& p, const Tables& tables,
                                     const int32_t* device_tables, void* workspace) {
  const Kernel& kernel = choose(p, is_modified(p));
  const WindowLaunch params = forward_params(p, tables, device_tables, workspace, kernel.shape);
  const int64_t tiles = p.batch * p.heads * tables.most_tiles;
  if (tiles == 0) return {};
  std::vector<Launch> out;
  out.push_back({kernel.name, narrow(tiles * params.splits, "grid"), kernel.shape.threads(),
                 kernel.shared_bytes, params});
  if (params.splits > 1) {
    static const char* const kMerge[] = {"window_merge_fp32", "", "window_merge_bf16",
                                         "window_merge_fp16"};
    out.push_back({kMerge[static_cast<int>(p.dtype)], narrow(tiles, "grid"), 128, 0, params});
    out.back().params.rows = kernel.shape.rows();
  }
  return out;
}

}  // namespace cuda
}  // namespace attnext
