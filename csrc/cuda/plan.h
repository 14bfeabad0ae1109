// SPDX-License-Identifier: Apache-2.0
// What a CUDA kernel is started with: tables of the geometry as 32-bit integers, parameters, grid.
// Plain C++ that needs no CUDA: the library launches what `forward_launches` and
// `backward_launches` describe, and so does whoever runs the kernels elsewhere.
//
// Rows are the side a block holds still, the walk is the side it passes over: queries and keys in
// the forward pass and for dQ, keys and queries for dK and dV.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../geometry.h"
#include "../params.h"
#include "launch.h"

namespace attnext {
namespace cuda {

// A segment of rows on one axis and the walk that its windows cover. Walk index u of the tile's
// dilation class stands for coordinate first + dilation * u, and for position base + u.
struct AxisTile {
  int32_t row, count;
  int32_t position;  // of `row`, in steps of the dilation
  int32_t first, base;
  int32_t begin, end;
  int32_t sink_begin, sink_end;  // walked before `begin`
  // n / (end - begin) = n * multiplier >> shift for every n of 31 bits (Granlund and Montgomery,
  // Division by invariant integers using multiplication, 1994).
  int32_t multiplier, shift;  // the multiplier is unsigned
};

// One axis of one rule. Offsets count from the start of the tables; -1: not there.
struct AxisTiles {
  int32_t begin, end, sink_begin, sink_end;  // [rows], walk indices that a row attends
  int32_t walk_position;                     // [walked], of packed sequences
  int32_t tiles, num_tiles;                  // AxisTile[num_tiles]
  int32_t dilation, num_walked;
};

struct RuleTiles {
  AxisTiles axis[3];
  int32_t box[3];  // rows of a tile per axis
  int32_t num_tiles;
};

constexpr int32_t kTileInts = sizeof(AxisTile) / 4;

// All rules of a problem for one direction: RuleTiles[num_rules], the rule of each head, the rest.
struct Tables {
  std::vector<int32_t> data;
  int32_t num_rules = 0;
  int32_t extra_tiles = 0;   // tiles of extra keys, by key
  int32_t head_rule = 0;     // where the rule of each head stands
  int32_t most_tiles = 0;    // of any rule
  int64_t longest_walk = 0;  // of any tile, extra keys not counted
  double useful_pairs = 0, computed_pairs = 0;
};

// By query (for the forward pass and dQ) or by key; `rows` is what a tile holds at most. By key,
// the rows of all rules are cut alike, and extra keys are a rule of their own after the last: a
// block holds its keys while it walks over the queries of one head after another.
Tables make_tables(const Geometry& geometry, const std::vector<int32_t>& head_rule, bool by_key,
                   int32_t rows, int64_t extra_keys);

// The same, from the last few or made now.
std::shared_ptr<const Tables> shared_tables(const std::shared_ptr<const Geometry>& geometry,
                                            const std::vector<int32_t>& head_rule, bool by_key,
                                            int32_t rows, int64_t extra_keys);

enum class Pass { kForward, kQueryGradient, kKeyGradient, kBiasGradient };

// How a kernel is built: rows and walk of one block.
struct KernelShape {
  int32_t dim;  // head_dim and head_dim_v are at most this
  int32_t warps, frags, step, slices;
  int32_t rows() const { return warps * frags * 16; }
  int32_t threads() const { return warps * 32; }
};
KernelShape kernel_shape(const WindowParams& params, Pass pass);

// Every kernel with tensor-core products, for those who look at what was compiled.
struct KernelFacts {
  const char* name;
  Pass pass;
  DType dtype;
  KernelShape shape;
  bool modified;
  int shared_bytes;
  bool routed;
};
std::vector<KernelFacts> all_kernels();

// n / divisor = n * multiplier >> shift for every n of 31 bits; see AxisTile.
struct Division {
  uint32_t multiplier;
  int32_t shift;
};
Division division_by(int64_t divisor);

// What every window kernel takes.
struct WindowLaunch {
  WindowParams window;
  const int32_t* tables;
  int32_t num_rules, most_tiles;
  int32_t head_rule;     // where the tables have the rule of each head
  int32_t extra_tiles;   // of the rule after the last, whose rows are extra keys
  int32_t splits;        // blocks that share one tile's walk, or (bias gradient) one head's tiles
  int32_t split_step;    // walk slots of each, a multiple of the kernel's step
  float unit;            // makes a product a logit in base 2, where no modifier has a say
  int32_t near;          // units reach every walked row from the start of its batch item and head
  uint32_t unit_bytes;   // 16
  uint32_t units[4][3];  // between tokens of query, key, value, dout
  int32_t aligned;       // all rows that are copied start at multiples of 16 bytes
  int32_t aligned_out;
  int32_t rows;       // of a tile, for kernels that have no tiles of their own
  float* partial;     // [tile block][split][rows][dim + 2]: unnormalised output, maximum, sum
  float* statistics;  // backward: four numbers of each [batch, heads, tokens], see Statistics
};

// Walked places [walk_begin, walk_end) of routed attention, and rows of a tile that list them: bit
// i of `rows` is the tile's place i. attnext/routed_tables.py makes them: of a tile, `at` are
// walked before it, and what two entries of a row walk is disjoint.
struct alignas(8) ListEntry {
  int32_t walk_begin, walk_end;
  int32_t at;
  int32_t slot;  // of the lists, which has the bias
  uint32_t rows[2];
};
constexpr int32_t kMostListRows = 64;  // of a tile

// What every kernel of routed attention takes; `window.bias` are the biases of slots, `most_tiles`
// those that the order of rows is cut into.
constexpr int32_t kMostPackedHeads = 1024;
struct RoutedLaunch : WindowLaunch {
  RoutedRules rules;
  const int64_t* tile_ptr;   // [list_batch, list_heads, most_tiles], one more: where entries begin
  const ListEntry* entries;  // of a tile by rising walk_begin
  const int32_t *row_order, *walk_order;  // tokens by places; null: as they are
  const int32_t* walk_places;             // places by tokens, where biases ask for them
  int32_t scattered;                      // rules meet walked tokens that are out of order
  int32_t mixed;                          // documents are no runs
  int32_t packed;                         // heads that rows of a place are of; divides a group
  int32_t list_batch, list_heads;
  int32_t num_rows, num_walked;
  int32_t row_extent[3], walk_extent[3];
  Division walk_lines[2];  // by the last axis' extent, by that of the one before
  // Gradients of biases: the entries of each slot, and how many numbers a warp has in `partial`.
  const int64_t* slot_ptr;
  const int32_t* slot_entries;
  int64_t num_slots, num_entries;
  const int8_t* policies;                  // HeadPolicy of each head; null: in `policy`
  uint32_t policy[kMostPackedHeads / 16];  // two bits each
};

// A problem's tables for one direction, where a kernel reads them. By query, biases have the
// entries of each slot: [slots + 1], [entries].
struct ListTables {
  const int64_t* tile_ptr;
  const ListEntry* entries;
  int64_t num_entries;
  const int32_t* walk_places;
  const int64_t* slot_ptr;
  const int32_t* slot_entries;
};

// What the host knows of numbers on the device.
struct RoutedFacts {
  bool mixed_documents;    // they decrease somewhere
  int64_t query_block;     // tokens of the largest
  const int8_t* policies;  // of more than kMostPackedHeads heads
};

// Bytes of scratch in global memory.
int64_t forward_workspace(const WindowParams& params, const Tables& tables);
int64_t backward_workspace(const WindowParams& params, const Tables& queries);

std::vector<Launch> forward_launches(const WindowParams& params, const Tables& tables,
                                     const int32_t* device_tables, void* workspace);
std::vector<Launch> backward_launches(const WindowParams& params, const Tables& queries,
                                      const int32_t* device_queries, const Tables& keys,
                                      const int32_t* device_keys, void* workspace);

// Places of the order of rows that a tile has.
int64_t routed_rows(const RoutedParams& params, const RoutedFacts& facts, Pass pass);
// No tile walks over more slots than `longest_walk`.
int64_t routed_forward_workspace(const RoutedParams& params, const RoutedFacts& facts,
                                 int64_t longest_walk);
// `num_entries`: of the tables by query.
int64_t routed_backward_workspace(const RoutedParams& params, const RoutedFacts& facts,
                                  bool of_bias, int64_t num_entries);
std::vector<Launch> routed_forward_launches(const RoutedParams& params, const RoutedFacts& facts,
                                            const ListTables& queries, int64_t longest_walk,
                                            void* workspace);
std::vector<Launch> routed_backward_launches(const RoutedParams& params, const RoutedFacts& facts,
                                             const ListTables& queries, const ListTables& keys,
                                             void* workspace);

}  // namespace cuda
}  // namespace attnext
