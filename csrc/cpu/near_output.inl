// SPDX-License-Identifier: Apache-2.0
// The output of tiles on maps, where a lane attends half of the union of the tile's windows or
// less: added up from the keys near a few lanes, with dims in the lanes.
#pragma once

#include "window.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

template <class T, class Keys>
class NearOutput : public Window<T, Keys> {
 public:
  using Base = Window<T, Keys>;
  using Base::block;
  using Base::dvp;
  using Base::kBlock;
  using Base::kInPlace;
  using Base::kLanes;
  using Base::kPairs;
  using Base::ot;
  using Base::p;
  using Base::rows;
  using Base::sparse;
  using Base::tile;
  using Base::value_rows;
  using typename Base::Acc;
  using typename Base::Elem;
  using typename Base::Plan;
  using typename Base::Vec;

  // Lanes that lie beside each other on a map attend nearly the same keys.
  static constexpr int kNearLanes = 4;
  static constexpr bool kNear = Keys::kHeadsWalkAlike && !kPairs && kLanes >= kNearLanes;
  struct Run {
    uint8_t begin, end;
  };
  // Keys of a block that some of each kNearLanes lanes attend: runs [0, end) of kBlock.
  struct Near {
    Run* run;
    int32_t* end;
  };

  NearOutput(const WindowParams& params, const Plan& view, void* scratch)
      : Base(params, view, scratch, false) {
    const int64_t groups = this->max_lanes / kNearLanes;
    for (int64_t k = 0; k < (kNear ? this->kKeptBlocks : 0); ++k) {
      near[k].run = this->arena.template take<Run>(groups * kBlock);
      near[k].end = this->arena.template take<int32_t>(groups);
    }
  }

  void start_tile(const int64_t index[3]) {
    Base::start_tile(index);
    is_near = decide();
  }

  // Whether the tile's output comes from here. Not a matter of which lanes are live, or bits would
  // be.
  bool decide() const {
    if constexpr (kNear) {
      if (tile.rows == 1 || sparse || (kInPlace && p.head_dim_v != dvp)) return false;
      const int lane = __builtin_ctzll(tile.whole);
      int64_t window = 1;
      for (int a = 0; a < 3; ++a) {
        const int32_t i = tile.query[a][lane];
        window *= tile.axis[a].end[i] - tile.axis[a].begin[i];
      }
      return 3 * window < 2 * tile.rows * tile.width;
    }
    return false;
  }
  void find_near(Near* to) const {
    if constexpr (kNear) {
      static_assert(kBlock < 256 && kNearLanes == 4, "what fits");
      const int groups = tile.lanes / kNearLanes;
      uint8_t begin[kMaxLanes / kNearLanes];
      for (int g = 0; g < groups; ++g) to->end[g] = 0;
      uint64_t before = 0;
      const auto turn = [&](int64_t j, uint64_t now) {
        for (uint64_t rest = now ^ before; rest; rest &= rest - 1) {
          const int g = __builtin_ctzll(rest) / kNearLanes;
          if (now >> (g * kNearLanes) & 1) {
            begin[g] = static_cast<uint8_t>(j);
          } else {
            to->run[g * kBlock + to->end[g]++] = {begin[g], static_cast<uint8_t>(j)};
          }
        }
        before = now;
      };
      const uint64_t ones = (uint64_t(1) << (kLanes - 1) << 1) - 1;
      for (int64_t j = 0; j < block.count; ++j) {
        uint64_t x = block.mask[j] & tile.whole;
        for (int v = 0; v < tile.vectors; ++v) {
          if (j < block.lo[v] || j >= block.hi[v]) x &= ~(ones << (v * kLanes));
        }
        x |= x >> 1, x |= x >> 2;
        turn(j, x & 0x1111111111111111u);
      }
      turn(block.count, 0);
    }
  }

  template <int N>
  ATTNEXT_INLINE void near_tile(const Run* runs, int64_t count, const Elem* weights, int64_t d,
                                Acc* out) const {
    Vec acc[kNearLanes][N] = {};
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t j = runs[r].begin; j < runs[r].end; ++j) {
        const Acc* w = reinterpret_cast<const Acc*>(weights) + j * tile.lanes;
        Vec x[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
          x[n] = load(reinterpret_cast<const Acc*>(value_rows[j]) + d + n * kLanes);
        }
#pragma GCC unroll 4
        for (int i = 0; i < kNearLanes; ++i) {
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) acc[i][n] += w[i] * x[n];
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kNearLanes; ++i) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) store(out + i * dvp + d + n * kLanes, acc[i][n]);
    }
  }
  // rows[lane][d] = sum over the block of value[d] * weight[lane], with dims in the lanes.
  void near_products(const Near& near_keys, const Elem* weights) {
    constexpr int kWide = kLanes >= 16 ? 4 : 2;
    for (int lane = 0; lane < tile.lanes; lane += kNearLanes) {
      const int g = lane / kNearLanes;
      const Run* runs = near_keys.run + g * kBlock;
      const int64_t count = near_keys.end[g];
      int64_t d = 0;
      for (; d + kWide * kLanes <= dvp; d += kWide * kLanes) {
        near_tile<kWide>(runs, count, weights + lane, d, rows + lane * dvp);
      }
      for (; d + 2 * kLanes <= dvp; d += 2 * kLanes) {
        near_tile<2>(runs, count, weights + lane, d, rows + lane * dvp);
      }
      for (; d < dvp; d += kLanes) {
        near_tile<1>(runs, count, weights + lane, d, rows + lane * dvp);
      }
    }
  }
  // rows[lane] * factor[lane] -> the tensor's rows, rounded once.
  void store_own_rows(const TensorRef& t, int64_t dim, const Acc* factor, int64_t b, int64_t h) {
    for (uint64_t rest = tile.live; rest; rest &= rest - 1) {
      const int lane = __builtin_ctzll(rest);
      Acc* const row = rows + lane * dvp;
      for (int64_t d = 0; d < dim; d += kLanes) store(row + d, load(row + d) * factor[lane]);
      Base::write_row(row, static_cast<T*>(t.data) + this->offset_of(t, lane, b, h), dim);
    }
  }

  bool is_near = false;
  Near near[Base::kKeptBlocks];  // of each block that is kept
};

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
