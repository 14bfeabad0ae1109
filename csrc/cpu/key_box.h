// SPDX-License-Identifier: Apache-2.0
// Keys and values brought together. Where the heads of a token lie side by side, the rows of one
// head are a power of two apart, and a cache keeps only an eighth of what it could (8 heads of 64):
// tiles that share most of their keys then read a copy, whose rows lie one after the other. Where
// products take wider numbers than the tensors hold, the copy is of these, and no tile widens them
// again. Kernels that multiply tiles of numbers have more made of the keys than a copy.
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

// Keys of one axis as products of tiles take them (ready_keys.inl). A kernel knows them by where
// they lie in the tensors.
struct ReadyKeys {
  struct Rows {                                   // of the first key and head
    const char* source = nullptr;                 // in the tensor
    int64_t step = 0, head = 0;                   // bytes to the next key's, the next head's
    char *lined_up = nullptr, *turned = nullptr;  // null: not made
  };
  Rows key, value;
  int64_t count = 0;  // keys; 0: nothing is ready
  int64_t kv_head = 0, head_bytes = 0;
};

// Memory that holds rows of a copy as wider numbers than the tensors'.
struct WideKeys {
  const char *begin = nullptr, *end = nullptr;

  bool has(const void* row) const { return row >= begin && row < end; }
};

// What tiles are given instead of the tensors.
struct NearKeys {
  WindowParams params;
  ReadyKeys ready;
  WideKeys wide;
};

struct WindowKernels;

class KeyBoxes {
 public:
  KeyBoxes(const WindowParams& params, const PlanView& plan, const WindowKernels& kernels,
           bool backward);

  // Whether it is of any use to bring keys together.
  bool useful() const { return copies_ || ready_; }
  // Whether there is room for the box, `heads` of it.
  bool fit(const KeyBox& box, int64_t heads) const {
    return useful() && bytes(box, heads) <= most_bytes_;
  }
  // Whether it is worth its time to tiles that read `reads` rows of it, all told.
  bool worth_bringing(const KeyBox& box, int64_t heads, int64_t reads) const;
  int64_t bytes(const KeyBox& box, int64_t heads) const;
  // Brings the box for kv heads [kv_head, kv_head + heads) of a batch item to `memory`: params
  // whose keys and values lie there, at the coordinates they had, or what is made of them.
  NearKeys bring(const KeyBox& box, int64_t batch, int64_t kv_head, int64_t heads,
                 void* memory) const;
  // All that there is without.
  NearKeys as_they_are() const { return {p_, {}, {}}; }

 private:
  WindowParams copy(const KeyBox& box, int64_t batch, int64_t kv_head, int64_t heads,
                    void* memory) const;
  TensorRef copy(const TensorRef& from, const KeyBox& box, int64_t dim, int64_t pitch,
                 int64_t batch, int64_t kv_head, int64_t heads, char* memory) const;

  const WindowParams& p_;
  const PlanView& plan_;
  const WindowKernels& kernels_;
  bool backward_;
  int64_t dilation_[3];
  int64_t element_, copied_;         // bytes of a number in the tensors, and in a copy
  int64_t key_pitch_, value_pitch_;  // numbers from row to row of a copy
  int64_t most_bytes_;
  bool copies_ = false;  // a copy is of use
  bool ready_;           // kernels have something made of them
};

}  // namespace cpu
}  // namespace attnext
