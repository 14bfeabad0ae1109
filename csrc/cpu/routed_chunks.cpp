// SPDX-License-Identifier: Apache-2.0
#include "routed_chunks.h"

#include <algorithm>

#include "../routed_rules.h"

namespace attnext {
namespace cpu {
namespace {

constexpr int64_t kShortBlock = 32;  // keys: from here on a block is a run by itself
constexpr int64_t kSpanTile = 128, kBlockTile = 64;  // keys of a tile, of spans and of short blocks
// Measured, in keys that a full vector of queries walks: a tile takes up and lays down its queries'
// states; a tile of few queries walks with keys in its lanes.
constexpr double kStatesOfVector = 14, kRow = 0.22, kRowOfQuery = 0.18;

}  // namespace

bool may_share(const RoutedParams& r, const ListView& view, int lanes, int64_t largest_block,
               int heads) {
  const bool plain = !r.entry_bias && !r.has_window && r.sinks == 0 && !r.head_policy;
  return plain && (!r.key_order || !view.has_rules) && largest_block * heads < lanes &&
         view.num_queries * heads >= 2 * lanes;
}

int64_t chunk_blocks(const ListView& view, int64_t largest_block, int heads) {
  // The longer the context, the fewer queries of a chunk list the same keys.
  const int64_t queries = std::clamp<int64_t>(view.num_keys / 16, 1024, 8192);
  return std::max<int64_t>(1, queries / (largest_block * heads));
}

double SharePlan::cost(int64_t keys, int64_t lanes_in_use) const {
  const int64_t few = lanes_ >= 8 ? lanes_ / 4 : 1;
  if (lanes_in_use <= few) return keys * (kRow + kRowOfQuery * lanes_in_use);
  return static_cast<double>(keys * ((lanes_in_use + lanes_ - 1) / lanes_));
}

bool SharePlan::make(const ListView& view, int lanes, const BlockRange& range, int64_t b,
                     int64_t h) {
  const RoutedParams& r = *view.params;
  lanes_ = lanes;
  most_ = lanes * view.vectors / range.heads;
  whole_blocks_ = !r.ends && view.num_keys >= kShortBlock * r.key_blocks;
  tile_keys_ = r.ends ? kSpanTile : kBlockTile;
  chunk = {
      r.query_offsets[range.first], r.query_offsets[range.last], range.heads, 0, nullptr, nullptr};
  entries_.clear(), shared_.clear(), sharers_.clear();
  apart_ = together_ = 0;
  for (int64_t block = range.first; block < range.last; ++block) add_list(view, block, b, h);

  // By tile of keys, then by query.
  const int64_t tiles =
      whole_blocks_ ? r.key_blocks : (view.num_keys + tile_keys_ - 1) / tile_keys_;
  tile_at_.assign(tiles + 1, 0);
  for (const Entry& e : entries_) ++tile_at_[e.tile + 1];
  for (int64_t t = 0; t < tiles; ++t) tile_at_[t + 1] += tile_at_[t];
  sorted_.resize(entries_.size());
  for (const Entry& e : entries_) sorted_[tile_at_[e.tile]++] = e;
  int64_t begin = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    share_tile(sorted_.data() + begin, sorted_.data() + tile_at_[t]);
    begin = tile_at_[t];
  }
  chunk.num_shared = static_cast<int64_t>(shared_.size());
  chunk.shared = shared_.data();
  chunk.sharers = sharers_.data();
  return together_ < apart_;
}

void SharePlan::add_list(const ListView& view, int64_t block, int64_t b, int64_t h) {
  const RoutedParams& r = *view.params;
  const int32_t place = r.query_offsets[block], past = r.query_offsets[block + 1];
  if (place == past) return;
  int64_t lo = 0, hi = view.num_keys;
  if (!r.query_order && !r.key_order) {
    const int64_t allowed = r.key_lengths ? between(r.key_lengths[b], 0, hi) : hi;
    lo = keys_of(r, HeadPolicy::kList, place + view.offset, 0, allowed).lo;
    hi = keys_of(r, HeadPolicy::kList, past - 1 + view.offset, 0, allowed).hi;
  }
  int64_t walked = 0;
  const auto add = [&](int64_t tile, int64_t from, int64_t to) {
    from = std::max(from, lo), to = std::min(to, hi);
    if (from >= to) return;
    walked += to - from;
    entries_.push_back({static_cast<int32_t>(tile), place, past, static_cast<int32_t>(from),
                        static_cast<int32_t>(to)});
  };
  const int64_t first = first_entry(r, block, b, h), last = last_entry(r, block, b, h);
  if (whole_blocks_) {
    blocks_.assign(r.lists + first, r.lists + last);
    std::sort(blocks_.begin(), blocks_.end());
    blocks_.erase(std::unique(blocks_.begin(), blocks_.end()), blocks_.end());
    for (const int32_t k : blocks_) {
      if (k >= 0) add(k, r.key_offsets[k], r.key_offsets[k + 1]);
    }
  } else {
    runs_.clear();
    for (int64_t e = first; e < last; ++e) {
      const int32_t k = r.lists[e];
      if (r.ends) {
        if (k < r.ends[e]) runs_.emplace_back(k, r.ends[e]);
      } else if (k >= 0 && r.key_offsets[k] < r.key_offsets[k + 1]) {
        runs_.emplace_back(r.key_offsets[k], r.key_offsets[k + 1]);
      }
    }
    std::sort(runs_.begin(), runs_.end());
    for (size_t i = 0; i < runs_.size();) {
      int64_t from = runs_[i].first, to = runs_[i].second;
      while (++i < runs_.size() && runs_[i].first <= to)
        to = std::max<int64_t>(to, runs_[i].second);
      for (int64_t t = from / tile_keys_; t * tile_keys_ < to; ++t) {
        add(t, std::max(from, t * tile_keys_), std::min(to, (t + 1) * tile_keys_));
      }
    }
  }
  apart_ += cost(walked, (past - place) * chunk.heads);
}

// A query may list several runs of a tile: one each time round, as it has one state.
void SharePlan::share_tile(Entry* begin, Entry* end) {
  while (begin < end) {
    Entry* later = begin;
    int32_t before = -1;
    for (Entry* e = begin; e < end; ++e) {
      if (e->place == before) {
        *later++ = *e;
        continue;
      }
      before = e->place;
      for (int32_t place = e->place; place < e->past; ++place) {
        if (open_.count == most_) close();
        if (open_.count == 0) {
          open_ = {e->begin, e->end, static_cast<int32_t>(sharers_.size()), 0};
        }
        open_.begin = std::min(open_.begin, e->begin);
        open_.end = std::max(open_.end, e->end);
        ++open_.count;
        sharers_.push_back({place, e->begin, e->end});
      }
    }
    close();
    end = later;
  }
}

void SharePlan::close() {
  if (open_.count == 0) return;
  const int64_t lanes = int64_t(open_.count) * chunk.heads;
  const double states = kStatesOfVector * ((lanes + lanes_ - 1) / lanes_);
  together_ += states + cost(open_.end - open_.begin, lanes);
  shared_.push_back(open_);
  open_.count = 0;
}

}  // namespace cpu
}  // namespace attnext
