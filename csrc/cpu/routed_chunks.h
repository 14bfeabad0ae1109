// SPDX-License-Identifier: Apache-2.0
// Lists of few queries turned round: which queries of a chunk share a run of keys. Queries whose
// tile would be almost empty fill one together with all others, near or far, that list the same
// keys.
#pragma once

#include <cstdint>
#include <vector>

#include "routed.h"

namespace attnext {
namespace cpu {

// Blocks [first, last) of queries, for `heads` heads from `head` of the group on, that share lists.
struct BlockRange {
  int32_t first, last, head, heads;
};

// Whether lists of this problem may be turned round at all: tiles of one block leave most of their
// lanes empty, queries attend nothing besides their lists, and slots have no biases.
bool may_share(const RoutedParams& r, const ListView& view, int lanes, int64_t largest_block,
               int heads);
// Blocks of queries in a chunk: enough to fill tiles, few enough for their states to stay in cache.
int64_t chunk_blocks(const ListView& view, int64_t largest_block, int heads);

class SharePlan {
 public:
  // What the queries of some blocks share in one batch item and kv head. False if it costs less to
  // walk the lists block by block: then there is no chunk.
  bool make(const ListView& view, int lanes, const BlockRange& range, int64_t b, int64_t h);

  ListChunk chunk{};

 private:
  struct Entry {
    int32_t tile, place, past, begin, end;  // places [place, past) list keys [begin, end) of a tile
  };
  void add_list(const ListView& view, int64_t block, int64_t b, int64_t h);
  void share_tile(Entry* begin, Entry* end);
  void close();
  double cost(int64_t keys, int64_t lanes_in_use) const;

  int lanes_ = 0, most_ = 0;  // lanes of a vector; queries of a tile
  bool whole_blocks_ = false;
  int64_t tile_keys_ = 0;
  double apart_ = 0, together_ = 0;  // what the walks cost
  SharedKeys open_{};
  std::vector<Entry> entries_, sorted_;
  std::vector<int64_t> tile_at_;
  std::vector<SharedKeys> shared_;
  std::vector<Sharer> sharers_;
  std::vector<int32_t> blocks_;
  std::vector<std::pair<int32_t, int32_t>> runs_;
};

}  // namespace cpu
}  // namespace attnext
