// SPDX-License-Identifier: Apache-2.0
#include "key_box.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "memory.h"
#include "window.h"

namespace attnext {
namespace cpu {
namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kPage = 4096;     // sets of a first cache times its lines; what repeats, collides
constexpr int64_t kRatio = 4;       // reads of a row that pay for its copy
constexpr int64_t kReadyRatio = 3;  // without it each tile makes its own

// Of a thread's copies. A tile walks through a part of them, so they need not all stay in a cache.
int64_t most_bytes() { return 2 * std::max<int64_t>(second_cache_bytes(), 1 << 20); }

// Whether rows that are `step` bytes apart leave most of a cache to others.
bool rows_collide(int64_t step, int64_t bytes) {
  const int64_t period = std::gcd(std::abs(step), kPage);
  return 2 * bytes < period;
}

}  // namespace

KeyBox key_box(const PlanView& plan, const int64_t tile[3]) {
  KeyBox box;
  for (int a = 0; a < 3; ++a) {
    const AxisView& axis = plan.axis[a];
    const Group& g = axis.groups[tile[a]];
    const int64_t keys = AxisTable::class_size(g.cls, axis.num_keys, axis.dilation);
    const int64_t end = std::clamp<int64_t>(g.end, 0, keys);
    box.cls[a] = g.cls;
    box.begin[a] = std::clamp<int64_t>(g.begin, 0, end);
    box.size[a] = end - box.begin[a];
  }
  return box;
}

bool join(const KeyBox& other, KeyBox* box) {
  for (int a = 0; a < 3; ++a) {
    if (box->cls[a] != other.cls[a]) return false;
  }
  if (other.rows() == 0) return true;
  if (box->rows() == 0) {
    *box = other;
    return true;
  }
  for (int a = 0; a < 3; ++a) {
    const int64_t end = std::max(box->begin[a] + box->size[a], other.begin[a] + other.size[a]);
    box->begin[a] = std::min(box->begin[a], other.begin[a]);
    box->size[a] = end - box->begin[a];
  }
  return true;
}

KeyBoxes::KeyBoxes(const WindowParams& params, const PlanView& plan, const WindowKernels& kernels,
                   bool backward)
    : p_(params),
      plan_(plan),
      kernels_(kernels),
      backward_(backward),
      element_(size_of(params.dtype)),
      copied_(kernels.widen_row ? acc_size(params.dtype) : element_),
      most_bytes_(most_bytes()),
      ready_(kernels.ready_bytes && plan.axis[0].num_keys == 1 && plan.axis[1].num_keys == 1) {
  int64_t step = 1;
  for (int a = 0; a < 3; ++a) {
    dilation_[a] = plan.axis[a].dilation;
    step = std::lcm(step, dilation_[a]);
  }
  // Coordinates step by the dilation, rows by a whole number of elements for each.
  const int64_t unit = std::lcm(step, kLine / copied_);
  key_pitch_ = (p_.head_dim + unit - 1) / unit * unit;
  value_pitch_ = (p_.head_dim_v + unit - 1) / unit * unit;
  if (key_pitch_ + value_pitch_ > 2 * (p_.head_dim + p_.head_dim_v + kLine / copied_)) return;
  const auto apart = [&](const TensorRef& t) { return dilation_[2] * t.token[2] * element_; };
  copies_ = kernels.widen_row || rows_collide(apart(p_.key), p_.head_dim * element_) ||
            rows_collide(apart(p_.value), p_.head_dim_v * element_);
}

bool KeyBoxes::worth_bringing(const KeyBox& box, int64_t heads, int64_t reads) const {
  const int64_t ratio = ready_ ? kReadyRatio : kRatio;
  return box.rows() > 0 && fit(box, heads) && reads >= ratio * heads * box.rows();
}

int64_t KeyBoxes::bytes(const KeyBox& box, int64_t heads) const {
  const int64_t of_head = ready_ ? kernels_.ready_bytes(p_, box.rows(), backward_)
                                 : box.rows() * (key_pitch_ + value_pitch_) * copied_;
  return heads * of_head;
}

NearKeys KeyBoxes::bring(const KeyBox& box, int64_t batch, int64_t kv_head, int64_t heads,
                         void* memory) const {
  if (ready_) {
    return {p_, kernels_.make_ready(p_, plan_, box, batch, kv_head, heads, backward_, memory), {}};
  }
  WideKeys wide;
  if (kernels_.widen_row) {
    wide.begin = static_cast<const char*>(memory);
    wide.end = wide.begin + bytes(box, heads);
  }
  return {copy(box, batch, kv_head, heads, memory), {}, wide};
}

WindowParams KeyBoxes::copy(const KeyBox& box, int64_t batch, int64_t kv_head, int64_t heads,
                            void* memory) const {
  WindowParams copied = p_;
  char* const keys = static_cast<char*>(memory);
  copied.sink_key = p_.key, copied.sink_value = p_.value;
  copied.key = copy(p_.key, box, p_.head_dim, key_pitch_, batch, kv_head, heads, keys);
  copied.value = copy(p_.value, box, p_.head_dim_v, value_pitch_, batch, kv_head, heads,
                      keys + heads * box.rows() * key_pitch_ * copied_);
  return copied;
}

TensorRef KeyBoxes::copy(const TensorRef& from, const KeyBox& box, int64_t dim, int64_t pitch,
                         int64_t batch, int64_t kv_head, int64_t heads, char* memory) const {
  const int64_t bytes = dim * element_;
  const auto first = [&](int a) { return box.cls[a] + dilation_[a] * box.begin[a]; };
  char* to = memory;
  for (int64_t h = kv_head; h < kv_head + heads; ++h) {
    for (int64_t y0 = 0; y0 < box.size[0]; ++y0) {
      for (int64_t y1 = 0; y1 < box.size[1]; ++y1) {
        const int64_t at = batch * from.batch + h * from.head + first(2) * from.token[2] +
                           (first(0) + dilation_[0] * y0) * from.token[0] +
                           (first(1) + dilation_[1] * y1) * from.token[1];
        const char* row = static_cast<const char*>(from.data) + at * element_;
        const int64_t step = dilation_[2] * from.token[2] * element_;
        for (int64_t y2 = 0; y2 < box.size[2]; ++y2, row += step, to += pitch * copied_) {
          constexpr int64_t kAhead = 8;
          if (y2 + kAhead < box.size[2]) {
            for (int64_t c = 0; c < bytes; c += kLine) __builtin_prefetch(row + kAhead * step + c);
          }
          if (kernels_.widen_row) {
            kernels_.widen_row(row, dim, to);
          } else {
            std::memcpy(to, row, bytes);
          }
        }
      }
    }
  }
  TensorRef copied;  // in elements of the tensor
  int64_t stride = pitch * copied_ / element_;
  copied.batch = 0;
  copied.head = box.rows() * stride;
  int64_t origin = kv_head * copied.head;
  for (int a = 2; a >= 0; --a) {
    copied.token[a] = stride / dilation_[a];
    origin += first(a) * copied.token[a];
    stride *= box.size[a];
  }
  // Where coordinate 0 would be; no reader goes there.
  copied.data = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(memory) -
                                        static_cast<uintptr_t>(origin * element_));
  return copied;
}

}  // namespace cpu
}  // namespace attnext
