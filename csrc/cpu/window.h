// SPDX-License-Identifier: Apache-2.0
// What an ISA unit offers for window attention: plain function pointers, chosen once per call.
#pragma once

#include <cstdint>

#include "../geometry.h"
#include "../params.h"
#include "key_box.h"

namespace attnext {
namespace cpu {

// A backward work item: all queries of one slab, for one batch item, kv head and dilation class.
// The box is that of the keys whose gradients accumulate here.
struct SlabItem : KeyBox {
  int64_t batch, kv_head;
  int64_t first_group[3], last_group[3];  // per axis, of the plan of `heads`' rule
  int64_t own_begin, own_end;             // of the slab axis: keys that no other slab touches
};

// The tile whose turn comes after another's; without a plan, none.
struct NextTile {
  const PlanView* plan;
  int64_t batch, head, index[3];
};

struct WindowKernels {
  int lanes;    // queries per vector
  int vectors;  // per tile
  int64_t (*forward_scratch)(const WindowParams&, const PlanView&);
  int64_t (*backward_scratch)(const WindowParams&, const PlanView&);
  int64_t (*accumulator_row)(const WindowParams&);  // numbers in one row of dK and dV accumulators

  // Expands a head's bias table for vectors of the plan's box: [keys relative to the
  // vector][lanes].
  int64_t (*bias_size)(const PlanView&);
  void (*expand_bias)(const WindowParams&, const PlanView&, int64_t head, void* expanded);

  // What is made of keys for all tiles that read them; null where products take them as they are.
  // Bytes a head, for keys of one axis.
  int64_t (*ready_bytes)(const WindowParams&, int64_t keys, bool backward);
  ReadyKeys (*make_ready)(const WindowParams&, const PlanView&, const KeyBox&, int64_t batch,
                          int64_t kv_head, int64_t heads, bool backward, void* memory);

  // A row as numbers that products take, of which there are whole lines of a cache; null where they
  // take rows as they are, or in pairs. Copies of keys then hold such rows.
  void (*widen_row)(const void* row, int64_t dim, void* wide);

  // One tile of `count` heads that share the plan. `follows`: after the tile before it on the last
  // axis, whose keys are in the caches. `next`: whose queries start loading meanwhile. `bias`:
  // expanded, per head; may be null.
  void (*forward)(const NearKeys&, const PlanView&, int64_t batch, int64_t head, int64_t count,
                  const int64_t tile[3], bool follows, const NextTile& next,
                  const void* const* bias, void* scratch);
  // One tile of one head, keys [from, to) of its walk. The unnormalised result goes to `partial`:
  // [head_dim_v][lanes], then maximum and sum per lane.
  void (*forward_part)(const WindowParams&, const PlanView&, int64_t batch, int64_t head,
                       const int64_t tile[3], int64_t from, int64_t to, const void* bias,
                       void* scratch, void* partial);
  int64_t (*partial_size)(const WindowParams&, const PlanView&);
  void (*merge_partials)(const WindowParams&, const PlanView&, int64_t batch, int64_t head,
                         const int64_t tile[3], int64_t count, void* partials, void* scratch);

  // Adds one query head's share of a slab: dQ is finished, dK and dV go to `rows`.
  void (*backward)(const NearKeys&, const PlanView&, const SlabItem&, int64_t head,
                   const void* bias, void* rows, void* dbias, void* dtable, void* scratch);
  // Writes the rows that this slab owns and saves the others to `halo` for merging.
  void (*finish_slab)(const WindowParams&, const PlanView&, const SlabItem&, const void* rows,
                      void* halo);
  // Adds the saved rows of `count` slabs, in order, for key coordinates [from, to) of the slab
  // axis; `whole` is the box of all keys of the class.
  void (*merge_slabs)(const WindowParams&, const PlanView&, const SlabItem& whole,
                      const SlabItem* items, int64_t count, const void* const* halos, int64_t from,
                      int64_t to);
  // Sums the extra keys' rows of `count` slabs, in order.
  void (*merge_extra)(const WindowParams&, const PlanView&, const SlabItem& whole,
                      const SlabItem* items, int64_t count, const void* const* halos);
  int64_t (*halo_rows)(const PlanView&, const SlabItem&);  // rows of finish_slab's halo, less tail
};

void window_forward(const WindowParams& params, const Geometry& geometry, const int32_t* head_rule);
void window_backward(const WindowParams& params, const Geometry& geometry,
                     const int32_t* head_rule);

}  // namespace cpu
}  // namespace attnext
