// SPDX-License-Identifier: Apache-2.0
// Who attends whom. A rule on one axis is a function window(i) -> [begin, end) whose ends never
// move left; everything else here (inverse, bounds, tile plans) is derived from the tables it
// fills. Kernels see only the plain PlanView at the bottom.
//
// Units: dilation d splits a key axis into d classes (coordinate mod d) that never mix. Inside
// class c, key index u stands for coordinate c + d*u; all intervals are in such indices.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace attnext {

enum class Boundary : int32_t { kInward = 0, kTruncate = 1, kZeroPad = 2 };

struct AxisRule {
  int64_t left = 0;    // keys before the leader
  int64_t right = 0;   // keys after the leader
  int64_t stride = 1;  // queries that share one leader
  int64_t phase = 0;   // first coordinate of the stride grid
  int64_t dilation = 1;
  bool causal = false;
  Boundary boundary = Boundary::kInward;
  int64_t offset = 0;  // query i stands at key coordinate i + offset
};

// One axis, evaluated: begin/end per query coordinate, and the keys at the front of a (packed)
// sequence that every query sees besides its window.
struct AxisTable {
  int64_t num_queries = 0;
  int64_t num_keys = 0;
  int64_t dilation = 1;
  int64_t offset = 0;
  std::vector<int32_t> begin, end;
  std::vector<int32_t> position;              // of packed queries, as key coordinates; else empty
  std::vector<int32_t> sink_begin, sink_end;  // empty when there are no sinks
  bool monotone = true;                       // no end of a window lies left of the one before
  int64_t sink_rows = 0;  // keys [0, sink_rows) are everybody's sinks (not so in packed sequences)

  int64_t query_class(int64_t i) const;
  int64_t query_index(int64_t i) const;  // index of query i's own position inside its class
  int64_t class_size(int64_t c) const { return class_size(c, num_keys, dilation); }
  static int64_t class_size(int64_t c, int64_t n, int64_t d) {
    return c < n ? (n - c + d - 1) / d : 0;
  }
};

AxisTable evaluate(const AxisRule& rule, int64_t num_queries, int64_t num_keys, int64_t sinks = 0);

// 1-D packed sequences: cumulative lengths of N sequences, the rule applied to each on its own.
// `rule.offset` is ignored: the last query of a sequence stands at its last key.
AxisTable evaluate_packed(const AxisRule& rule, const std::vector<int64_t>& cu_queries,
                          const std::vector<int64_t>& cu_keys, int64_t sinks);

// Walk index u of class c stands for coordinate first_of_class + dilation * u.
int64_t first_query_of_class(const AxisTable& table, int64_t c);

// The same pairs with the sides exchanged: rows are keys, their windows the queries that attend
// them, sinks included, as indices in the class's list of queries. No sinks, no offset of its own.
AxisTable transposed(const AxisTable& table);

// For every key coordinate the queries of its class that attend it, as a range of positions in the
// class's query list (a query list holds i = first, first + d, ...). Sinks are not included.
std::vector<std::pair<int32_t, int32_t>> inverse(const AxisTable& table);

// A run of queries of one class that share a vector: i = query + d*r for r < count.
struct Segment {
  int32_t query;
  int32_t count;
  int32_t position;    // index of `query` inside its class (may be negative)
  int32_t begin, end;  // union of the windows
};

// Segments that a query tile takes together (several only on the stack axis).
struct Group {
  int32_t first_segment;
  int32_t num_segments;
  int32_t cls;
  int32_t begin, end;            // union over the segments
  int32_t sink_begin, sink_end;  // keys to visit before `begin` (1-D with sinks)
  int32_t slab;                  // which slab of the backward pass the group lies in
};

struct AxisPlan {
  std::vector<Segment> segments;
  std::vector<Group> groups;
  std::vector<int32_t> class_first_group;  // dilation + 1 entries
  int32_t relative_begin = 0;              // range of (key index - position of a segment), for bias
  int32_t relative_end = 0;
  int32_t most_keys = 0;  // of a group's union
};

// A slab is a range of query positions on one axis and the keys its windows reach: the unit of work
// of the backward pass, whose halo is merged in the order of slabs.
struct Slab {
  int32_t cls;
  int32_t first_group, last_group;
  int32_t begin, end;  // real keys only
};

struct WindowPlan {
  AxisTable table[3];
  AxisPlan axis[3];
  int32_t box[3] = {1, 1, 1};  // queries of one vector
  int32_t stack_axis = 2;      // the axis along which a tile stacks its vectors
  int32_t vectors = 1;         // at most so many per tile
  int32_t slab_axis = 2;
  std::vector<Slab> slabs;
  double computed_pairs = 0;  // query-key products a kernel computes, unmasked lanes or not
  double useful_pairs = 0;    // those inside a window
};

struct PlanOptions {
  int32_t lanes = 8;    // queries per vector
  int32_t vectors = 2;  // vectors per tile
  int32_t slab_axis = -1;
  int64_t slab_length = 0;  // query positions per slab; 0 = one slab per class
};

WindowPlan make_plan(AxisTable tables[3], const PlanOptions& options);

// Largest |key index - position| over all attended pairs of an axis (sinks included), -1 if none.
int64_t max_offset(const AxisTable& table);

// The tables of a problem, three per rule (heads may differ in their rule), and the plans made of
// them so far. Shared between calls and threads.
class Geometry {
 public:
  explicit Geometry(std::vector<AxisTable> tables) : tables_(std::move(tables)) {}
  const std::vector<AxisTable>& tables() const { return tables_; }
  // Whether tokens lie along the last axis: on the others one query attends one key.
  bool one_line() const;

  struct Plans {
    PlanOptions options;
    std::vector<WindowPlan> plans;  // one per rule
  };
  // For the forward pass, or (`kv_heads` > 0) with slabs.
  std::shared_ptr<const Plans> plans(int32_t lanes, int32_t vectors, int64_t kv_heads) const;

 private:
  struct Made {
    int64_t lanes, vectors, kv_heads;
    std::shared_ptr<const Plans> plans;
  };
  std::vector<AxisTable> tables_;
  mutable std::mutex mutex_;
  mutable std::vector<Made> made_;
};

// The geometry that `key` stands for, from the last few or built now; an empty key is not kept.
// `tokens`: entries of its tables, of which a limited number is kept.
std::shared_ptr<const Geometry> shared_geometry(
    const std::vector<int64_t>& key, int64_t tokens,
    const std::function<std::vector<AxisTable>()>& build);

// What a kernel reads.
struct AxisView {
  const int32_t *begin, *end;
  const int32_t *sink_begin, *sink_end;  // null without sinks
  const Segment* segments;
  const Group* groups;
  int64_t num_groups;
  int64_t num_keys;
  int64_t dilation;
  int64_t sink_rows;
  int32_t relative_begin, relative_end;
  int32_t most_keys;
};

struct PlanView {
  AxisView axis[3];
  int32_t box[3];
  int32_t stack_axis;
  int32_t vectors;
  int32_t slab_axis;
  int32_t heads_in_lanes = 1;  // of one key head: with few queries a tile has lanes for them
};

PlanView view(const WindowPlan& plan);

}  // namespace attnext
