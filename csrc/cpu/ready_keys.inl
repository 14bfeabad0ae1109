// SPDX-License-Identifier: Apache-2.0
// Rows of keys and values as left factors of tiles (matrix_tiles.inl): lined up as [keys][dims], or
// turned to [dims][keys], each of their numbers in parts. A tile makes them as it goes; where many
// tiles read the same keys they are made once, for all of them.
#pragma once

#include "keywalk.inl"
#include "matrix_tiles.inl"
#include "window.h"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

template <class T>
struct KeyRows {
  using Vec = VecOf<float>;
  static constexpr int kLanes = Simd<float>::kLanes;
  static constexpr int kParts = kPartsOf<T>;
  static constexpr int64_t kSpan = tiles::kSpan, kSide = tiles::kSide, kSize = sizeof(bf16);

  static int64_t padded(int64_t dim) { return tiles::round_up(dim, kSpan); }
  static ATTNEXT_INLINE Vec numbers(const T* row, int64_t d, int64_t dim) {
    return widen_part<T, float>(row + d, dim - d);
  }

  // A row as its parts one after the other, of ld numbers each.
  static ATTNEXT_INLINE void line_up(const T* row, int64_t dim, int64_t ld, bf16* out) {
    if constexpr (kParts == 1) {
      memcpy(out, row, sizeof(T) * dim);
      memset(out + dim, 0, sizeof(T) * (ld - dim));
    } else {
      for (int64_t d = 0; d < ld; d += 2 * kLanes) {
        store_parts(numbers(row, d, dim), numbers(row, d + kLanes, dim), out + d, ld);
      }
    }
  }
  static tiles::Left lined_up(const void* rows, int64_t ld) {
    return {rows, kSize * kParts * ld, kSize * kSpan, kSize * ld};
  }
  // A span of rows as [parts][ld][kSpan].
  static void turn(const T* const* row, int64_t dim, int64_t ld, bf16* out) {
    for (int64_t d = 0; d < ld; d += kSide) {
      Vec first[kSide], second[kSide];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kSide; ++i) {
        if constexpr (kParts == 1) {
          first[i] = join_pairs(numbers(row[2 * i], d, dim), numbers(row[2 * i + 1], d, dim));
        } else {
          first[i] = numbers(row[i], d, dim), second[i] = numbers(row[kSide + i], d, dim);
        }
      }
      transpose_vectors<float>(first);
      if (kParts > 1) transpose_vectors<float>(second);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kSide; ++i) {
        bf16* const to = out + (d + i) * kSpan;
        if constexpr (kParts == 1) {
          store(reinterpret_cast<float*>(to), first[i]);
        } else {
          store_parts(first[i], second[i], to, ld * kSpan);
        }
      }
    }
  }
  static tiles::Left turned(const void* spans, int64_t ld) {
    return {spans, kSize * kSpan, kSize * kParts * ld * kSpan, kSize * ld * kSpan};
  }

  // ---- made once -------------------------------------------------------------------------------

  static int64_t lined_up_bytes(int64_t keys, int64_t dim) {
    return kSize * kParts * padded(dim) * keys;
  }
  static int64_t turned_bytes(int64_t keys, int64_t dim) {
    return lined_up_bytes(tiles::round_up(keys, kSpan), dim);
  }

  // The forward pass takes values turned, the backward pass keys both ways. A last tile may read
  // past the rows.
  static int64_t ready_bytes(const WindowParams& p, int64_t keys, bool backward) {
    return lined_up_bytes(kSide, max64(p.head_dim, p.head_dim_v)) +
           lined_up_bytes(keys, p.head_dim) +
           (backward ? turned_bytes(keys, p.head_dim) + lined_up_bytes(keys, p.head_dim_v)
                     : turned_bytes(keys, p.head_dim_v));
  }
  static ReadyKeys make_ready(const WindowParams& p, const PlanView& plan, const KeyBox& box,
                              int64_t batch, int64_t kv_head, int64_t heads, bool backward,
                              void* memory) {
    ReadyKeys ready;
    ready.count = box.size[2], ready.kv_head = kv_head;
    ready.head_bytes = ready_bytes(p, box.size[2], backward);
    char* free = static_cast<char*>(memory);
    const auto take = [&](int64_t bytes) { return std::exchange(free, free + bytes); };
    const auto source = [&](const TensorRef& t) {
      const int64_t dilation = plan.axis[2].dilation, size = sizeof(T);
      const int64_t token = box.cls[2] + dilation * box.begin[2];
      const int64_t at = batch * t.batch + kv_head * t.head + token * t.token[2];
      ReadyKeys::Rows rows;
      rows.source = static_cast<const char*>(t.data) + at * size;
      rows.step = dilation * t.token[2] * size, rows.head = t.head * size;
      return rows;
    };
    ready.key = source(p.key), ready.value = source(p.value);
    constexpr int64_t kAhead = 24;
    const auto line_up_all = [&](ReadyKeys::Rows* rows, int64_t dim) {
      rows->lined_up = take(lined_up_bytes(ready.count, dim));
      for (int64_t h = 0; h < heads; ++h) {
        char* out = rows->lined_up + h * ready.head_bytes;
        for (int64_t j = 0; j < ready.count; ++j, out += lined_up_bytes(1, dim)) {
          if (j + kAhead < ready.count) fetch(row_of(*rows, j + kAhead, h), dim);
          line_up(row_of(*rows, j, h), dim, padded(dim), reinterpret_cast<bf16*>(out));
        }
      }
    };
    const auto turn_all = [&](ReadyKeys::Rows* rows, int64_t dim) {
      rows->turned = take(turned_bytes(ready.count, dim));
      for (int64_t h = 0; h < heads; ++h) {
        char* out = rows->turned + h * ready.head_bytes;
        for (int64_t j = 0; j < ready.count; j += kSpan, out += turned_bytes(kSpan, dim)) {
          const T* row[kSpan];
          for (int64_t i = 0; i < kSpan; ++i) {
            row[i] = row_of(*rows, min64(j + i, ready.count - 1), h);
            if (j + i + kSpan < ready.count) fetch(row_of(*rows, j + i + kSpan, h), dim);
          }
          turn(row, dim, padded(dim), reinterpret_cast<bf16*>(out));
        }
      }
    };
    line_up_all(&ready.key, p.head_dim);
    if (backward) {
      turn_all(&ready.key, p.head_dim);
      line_up_all(&ready.value, p.head_dim_v);
    } else {
      turn_all(&ready.value, p.head_dim_v);
    }
    return ready;
  }

 private:
  static const T* row_of(const ReadyKeys::Rows& rows, int64_t j, int64_t head) {
    return reinterpret_cast<const T*>(rows.source + j * rows.step + head * rows.head);
  }
};

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
