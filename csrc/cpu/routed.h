// SPDX-License-Identifier: Apache-2.0
// What an ISA unit offers for routed attention: plain function pointers, chosen once per call.
#pragma once

#include <cstdint>

#include "../params.h"

namespace attnext {
namespace cpu {

// Queries of one block, at places [begin, end), that a tile holds for `heads` heads.
struct ListPiece {
  int32_t block, begin, end, heads;
};

// A query, by its place, and the places of keys that it lists among those that it shares.
struct Sharer {
  int32_t place, begin, end;
};
// Places [begin, end) of keys, and the queries that list some of them: sharers [first, first +
// count) of a chunk, with all heads no more than a tile has lanes. None is there twice.
struct SharedKeys {
  int32_t begin, end, first, count;
};
// Queries at places [begin, end) for `heads` heads, as what they share: keys in rising order.
struct ListChunk {
  int32_t begin, end, heads;
  int64_t num_shared;
  const SharedKeys* shared;
  const Sharer* sharers;
};

// A problem as the walk of a tile reads it. A tile's index is its piece, batch item and first head.
struct ListView {
  const RoutedParams* params;
  const ListPiece* pieces;
  // Per place: elements from the rows of the first token; null: tokens lie in order, steps apart.
  const int64_t *key_at, *value_at;
  int64_t key_step, value_step;
  int64_t num_queries, num_keys;
  int64_t offset;      // query i stands at key i + offset
  int64_t most_slots;  // of a list
  int64_t bias_step;   // numbers of a slot's row of biases
  int32_t vectors;     // of a tile
  bool has_rules;
};

struct RoutedKernels {
  int lanes, vectors;
  int64_t (*forward_scratch)(const RoutedParams&, const ListView&);
  int64_t (*backward_scratch)(const RoutedParams&, const ListView&);
  int64_t (*accumulator_row)(const WindowParams&);  // numbers in one row of dK and dV accumulators

  int64_t (*walk_length)(const RoutedParams&, const ListView&, const int64_t index[3],
                         void* scratch);
  void (*fetch_queries)(const WindowParams&, const ListView&, const int64_t index[3]);
  // Slots [from, to) of the walk. With `partial` the unnormalised result goes there.
  void (*forward)(const RoutedParams&, const ListView&, const int64_t index[3], int64_t from,
                  int64_t to, void* scratch, void* partial);
  int64_t (*partial_size)(const WindowParams&, const ListView&);
  void (*merge_partials)(const RoutedParams&, const ListView&, const int64_t index[3],
                         int64_t count, void* partials, void* scratch);

  // dQ of the tile is finished; dK and dV are added to `rows`, one per place and one that phantom
  // keys may spoil, biases' gradients to `dbias` (as the lists) and those of the heads to `dsink`.
  void (*backward)(const RoutedParams&, const ListView&, const int64_t index[3], void* rows,
                   void* dbias, void* dsink, void* scratch);
  // A chunk of queries, keys first: a tile for each SharedKeys takes up its queries' running
  // results and lays them down again. `states`: so many numbers for each query and head of the
  // chunk.
  int64_t (*chunk_state)(const WindowParams&);
  void (*forward_chunk)(const RoutedParams&, const ListView&, const ListChunk&, int64_t batch,
                        int64_t head, void* scratch, void* states);
  void (*backward_chunk)(const RoutedParams&, const ListView&, const ListChunk&, int64_t batch,
                         int64_t head, void* rows, void* dsink, void* scratch, void* states);
  // Writes the sum of `count` sets of rows for places [from, to) of one batch item and kv head.
  void (*finish_keys)(const RoutedParams&, int64_t batch, int64_t kv_head, const void* const* rows,
                      int64_t count, int64_t from, int64_t to);
};

void routed_forward(const RoutedParams& params);
void routed_backward(const RoutedParams& params);

}  // namespace cpu
}  // namespace attnext
