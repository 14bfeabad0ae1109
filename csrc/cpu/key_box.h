// SPDX-License-Identifier: Apache-2.0
// Keys and values brought together. Where the heads of a token lie side by side, the rows of one
// head are a power of two apart, and a cache keeps only an eighth of what it could (8 heads of 64):
// tiles that share most of their keys then read a copy, whose rows lie one after the other.
#pragma once

#include <cstdint>

#include "../geometry.h"
#include "../params.h"

namespace attnext {
namespace cpu {

// Key indices [begin, begin + size) of one dilation class per axis.
struct KeyBox {
  int64_t cls[3], begin[3], size[3];
  int64_t rows() const { return size[0] * size[1] * size[2]; }
};

// That of a tile's keys, as far as they are real. Sinks lie elsewhere.
KeyBox key_box(const PlanView& plan, const int64_t tile[3]);
// Makes `box` the least that holds both; false if they are of different classes.
bool join(const KeyBox& other, KeyBox* box);

class KeyBoxes {
 public:
  KeyBoxes(const WindowParams& params, const PlanView& plan);

  // Whether the tensors' rows lie so that copies are of any use.
  bool collide() const { return collide_; }
  // Whether there is room for a copy of the box, `heads` of it.
  bool fit(const KeyBox& box, int64_t heads) const {
    return collide_ && bytes(box, heads) <= most_bytes_;
  }
  // Whether it is worth its time to tiles that read `reads` rows of it, all told.
  bool worth_copying(const KeyBox& box, int64_t heads, int64_t reads) const;
  int64_t bytes(const KeyBox& box, int64_t heads) const {
    return heads * box.rows() * (key_pitch_ + value_pitch_) * element_;
  }
  // Copies the box for kv heads [kv_head, kv_head + heads) of a batch item to `memory`, and returns
  // params whose keys and values lie there, at the coordinates they had.
  WindowParams copy(const KeyBox& box, int64_t batch, int64_t kv_head, int64_t heads,
                    void* memory) const;

 private:
  TensorRef copy(const TensorRef& from, const KeyBox& box, int64_t dim, int64_t pitch,
                 int64_t batch, int64_t kv_head, int64_t heads, char* memory) const;

  const WindowParams& p_;
  int64_t dilation_[3];
  int64_t element_;
  int64_t key_pitch_, value_pitch_;  // elements from row to row of a copy
  int64_t most_bytes_;
  bool collide_ = false;
};

}  // namespace cpu
}  // namespace attnext
