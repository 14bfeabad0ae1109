// SPDX-License-Identifier: Apache-2.0
// Entry points of routed attention: cut the query blocks into tiles, hand them to threads. Work is
// a tile, or the tiles of a chunk of blocks that may share keys.
#include "routed.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "isa.h"
#include "memory.h"
#include "parallel.h"
#include "routed_chunks.h"

namespace attnext {
namespace cpu {
namespace {

struct Tiles {
  const RoutedParams& params;
  const WindowParams& window;
  const RoutedKernels& kernels;
  ListView view{};
  std::vector<ListPiece> pieces;  // of one kv head
  struct Work {
    BlockRange range;
    int64_t first_piece, last_piece;
  };
  std::vector<Work> work;  // of one kv head
  bool shares = false;     // keys: whether it pays is seen chunk by chunk
  std::vector<int64_t> key_at, value_at;
  bool serial, landmarks = false;

  explicit Tiles(const RoutedParams& r)
      : params(r), window(r.window), kernels(routed_kernels(r.window.dtype)) {
    view.params = &r;
    view.num_queries = product(window.query_extent);
    view.num_keys = product(window.key_extent);
    view.offset = view.num_keys - view.num_queries;
    view.most_slots = r.slots;
    for (int64_t list = 0; r.indptr && list < r.list_batch * r.list_heads; ++list) {
      const int64_t* at = r.indptr + list * (r.query_blocks + 1);
      for (int64_t i = 0; i < r.query_blocks; ++i) {
        view.most_slots = std::max(view.most_slots, at[i + 1] - at[i]);
      }
    }
    for (int64_t h = 0; r.head_policy && h < window.heads; ++h) {
      landmarks |= static_cast<HeadPolicy>(r.head_policy[h]) == HeadPolicy::kLandmark;
    }
    if (landmarks) view.most_slots = std::max(view.most_slots, r.key_blocks);
    view.bias_step = kernels.lanes;
    view.vectors = kernels.vectors;
    view.has_rules = r.causal || r.exclude_self || r.key_documents || r.key_lengths ||
                     r.within[0] < view.num_keys || r.within[1] < view.num_keys;
    view.key_step = window.key.token[2];
    view.value_step = window.value.token[2];
    cut();
    view.pieces = pieces.data();
    if (r.key_order || window.key_extent[0] * window.key_extent[1] > 1) {
      locate(window.key, &key_at);
      locate(window.value, &value_at);
      view.key_at = key_at.data();
      view.value_at = value_at.data();
    }
    double pieces_of_work = double(r.entries) * r.batch_copies() * window.heads / r.list_heads;
    if (r.head_policy || r.has_window) {  // keys besides those of lists: more than one a query
      pieces_of_work += double(view.num_queries) * window.batch * window.heads;
    }
    serial = pieces_of_work * (window.head_dim + window.head_dim_v) < kSerialWork / 64;
  }

  int64_t per_kv_head() const { return static_cast<int64_t>(work.size()); }
  int64_t items() const { return window.batch * window.kv_heads * per_kv_head(); }
  // Item = (batch, kv head, work). The index of the first of its tiles.
  void index(int64_t item, int64_t out[3]) const {
    const Work& w = work[item % per_kv_head()];
    item /= per_kv_head();
    out[0] = w.first_piece;
    out[1] = item / window.kv_heads;
    out[2] = item % window.kv_heads * (window.heads / window.kv_heads) + w.range.head;
  }
  // Calls `tile(index)` for the tiles of an item, or `chunk(batch, head, chunk)` once.
  template <class F, class G>
  void run(int64_t item, F tile, G chunk) const {
    const Work& w = work[item % per_kv_head()];
    int64_t at[3];
    index(item, at);
    if (shares) {
      thread_local SharePlan plan;
      if (plan.make(view, kernels.lanes, w.range, at[1], at[2])) {
        return chunk(at[1], at[2], plan.chunk);
      }
    }
    for (; at[0] < w.last_piece; ++at[0]) tile(at);
  }
  int64_t states() const {  // bytes for a chunk
    if (!shares) return 0;
    int64_t most = 0;
    for (const Work& w : work) {
      const int64_t queries =
          params.query_offsets[w.range.last] - params.query_offsets[w.range.first];
      most = std::max(most, queries * w.range.heads);
    }
    return most * kernels.chunk_state(window) * acc_size(window.dtype);
  }

 private:
  static int64_t product(const int64_t n[3]) { return n[0] * n[1] * n[2]; }

  // A block of few queries takes as many heads of its group into a tile as have room, if they share
  // its list.
  void cut() {
    const RoutedParams& r = params;
    const int32_t group = static_cast<int32_t>(window.heads / window.kv_heads);
    bool shared = r.list_heads != window.heads || group == 1;
    for (int64_t h = 0; r.head_policy && h < window.heads; ++h) {
      shared &= r.head_policy[h] == r.head_policy[h / group * group];
    }
    const int32_t room = kernels.lanes * kernels.vectors;
    const auto begin_of = [&](int32_t block) { return r.query_offsets[block]; };
    int32_t largest = 0;
    for (int32_t block = 0; block < r.query_blocks; ++block) {
      largest = std::max(largest, begin_of(block + 1) - begin_of(block));
    }
    const int32_t together = shared ? group : 1;
    shares = may_share(r, view, kernels.lanes, largest, together);
    const int32_t blocks = shares ? chunk_blocks(view, largest, together) : 1;
    for (int32_t first = 0; first < r.query_blocks; first += blocks) {
      const int32_t last = std::min<int64_t>(first + blocks, r.query_blocks);
      const int32_t size = shares ? largest : begin_of(last) - begin_of(first);
      if (size == 0) continue;
      const int32_t most = shared ? std::clamp(room / size, 1, group) : 1;
      for (int32_t head = 0; head < group; head += most) {
        const int32_t heads = std::min(most, group - head);
        const int64_t first_piece = static_cast<int64_t>(pieces.size());
        for (int32_t block = first; block < last; ++block) {
          // Parts are whole vectors but for the last.
          for (int32_t from = begin_of(block); from < begin_of(block + 1); from += room) {
            pieces.push_back({block, from, std::min(begin_of(block + 1), from + room), heads});
            if (!shares)
              add_work({first, last, head, heads}, static_cast<int64_t>(pieces.size()) - 1);
          }
        }
        if (shares) add_work({first, last, head, heads}, first_piece);
      }
    }
  }
  void add_work(const BlockRange& range, int64_t first_piece) {
    if (first_piece == static_cast<int64_t>(pieces.size())) return;  // no query
    work.push_back({range, first_piece, static_cast<int64_t>(pieces.size())});
  }

  void locate(const TensorRef& t, std::vector<int64_t>* out) const {
    const int64_t n1 = window.key_extent[1], n2 = window.key_extent[2];
    out->resize(view.num_keys);
    for (int64_t u = 0; u < view.num_keys; ++u) {
      const int64_t token = params.key_order ? params.key_order[u] : u;
      (*out)[u] =
          token / n2 / n1 * t.token[0] + token / n2 % n1 * t.token[1] + token % n2 * t.token[2];
    }
  }
};

}  // namespace

void routed_forward(const RoutedParams& r) {
  const Tiles tiles(r);
  const RoutedKernels& kernels = tiles.kernels;
  const ListView& view = tiles.view;
  const int64_t scratch = kernels.forward_scratch(r, view), items = tiles.items();
  // Few tiles with long walks (decoding): their keys are shared out.
  constexpr int64_t kManyItems = 16;
  const int64_t of_batch = std::max<int64_t>(1, r.window.kv_heads * tiles.per_kv_head());
  const int64_t most_parts =
      tiles.shares || tiles.landmarks ? 1 : std::max<int64_t>(1, kManyItems / of_batch);
  std::vector<int64_t> length(most_parts > 1 ? items : 0);
  const auto splits_of = [&](int64_t i) { return parts_of_walk(length[i], most_parts); };
  parallel_for(static_cast<int64_t>(length.size()), 16, tiles.serial, [&](int64_t i, int64_t end) {
    for (; i < end; ++i) {
      int64_t index[3];
      tiles.index(i, index);
      length[i] = kernels.walk_length(r, view, index, thread_buffer(0, scratch));
    }
  });
  int64_t most_splits = 1;
  for (size_t i = 0; i < length.size(); ++i) most_splits = std::max(most_splits, splits_of(i));
  if (most_splits == 1) {
    const int64_t grain = std::clamp<int64_t>(items / (8 * max_threads()), 1, 16);
    const int64_t states = tiles.states();
    parallel_for(items, grain, tiles.serial, [&](int64_t begin, int64_t end) {
      void* memory = thread_buffer(0, scratch);
      void* resting = thread_buffer(1, states);
      for (int64_t i = begin; i < end; ++i) {
        if (i + 1 < end) {
          int64_t next[3];
          tiles.index(i + 1, next);
          kernels.fetch_queries(r.window, view, next);
        }
        tiles.run(
            i,
            [&](const int64_t index[3]) {
              kernels.forward(r, view, index, 0, INT64_MAX, memory, nullptr);
            },
            [&](int64_t b, int64_t h, const ListChunk& chunk) {
              kernels.forward_chunk(r, view, chunk, b, h, memory, resting);
            });
      }
    });
    return;
  }
  const int64_t partial_bytes = kernels.partial_size(r.window, view) * acc_size(r.window.dtype);
  const Memory partials = allocate(items * most_splits * partial_bytes);
  parallel_for(items * most_splits, 1, tiles.serial, [&](int64_t begin, int64_t end) {
    void* memory = thread_buffer(0, scratch);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t i = n / most_splits, k = n % most_splits, count = splits_of(i);
      if (k >= count) continue;
      int64_t index[3];
      tiles.index(i, index);
      kernels.forward(r, view, index, length[i] * k / count, length[i] * (k + 1) / count, memory,
                      partials.get() + n * partial_bytes);
    }
  });
  parallel_for(items, 1, tiles.serial, [&](int64_t begin, int64_t end) {
    void* memory = thread_buffer(0, scratch);
    for (int64_t i = begin; i < end; ++i) {
      int64_t index[3];
      tiles.index(i, index);
      kernels.merge_partials(r, view, index, splits_of(i),
                             partials.get() + i * most_splits * partial_bytes, memory);
    }
  });
}

// A unit of work is a run of the tiles of one batch item and kv head, with rows of its own for all
// keys' gradients. How many runs a head is cut into depends on one item's shape alone, so that
// results do not depend on threads or the rest of the batch; so many units at a time bound the
// memory.
void routed_backward(const RoutedParams& r) {
  const Tiles tiles(r);
  const WindowParams& p = r.window;
  const RoutedKernels& kernels = tiles.kernels;
  const ListView& view = tiles.view;
  constexpr int64_t kUnits = 8, kMostBytes = int64_t(1) << 28;
  const int64_t acc = acc_size(p.dtype), group = p.heads / p.kv_heads;
  const int64_t row_bytes = kernels.accumulator_row(p) * acc;
  const int64_t rows_bytes = (view.num_keys + 1) * row_bytes;
  const int64_t scratch = kernels.backward_scratch(r, view), per_head = tiles.per_kv_head();
  const int64_t states = tiles.states();
  const int64_t wanted =
      std::min(kUnits / std::max<int64_t>(p.kv_heads, 1), tiles.shares ? per_head : per_head / 4);
  const int64_t parts = std::clamp<int64_t>(
      wanted, 1, std::max<int64_t>(2, kMostBytes / std::max<int64_t>(rows_bytes, 1)));
  const int64_t heads = p.batch * p.kv_heads;
  if (r.dentry_bias) {
    const int64_t copies = r.batch_copies() * r.head_copies();
    std::fill_n(static_cast<char*>(r.dentry_bias), copies * r.entries * acc, 0);
  }
  // [batch, kv head, part, head of the group]
  const Memory sinks = allocate(p.dsink_logits ? heads * parts * group * acc : 0);
  if (p.dsink_logits) std::fill_n(sinks.get(), heads * parts * group * acc, 0);

  // Where a part begins: tiles that add to the biases of one list are in the same.
  const auto begin_of = [&](int64_t part) {
    int64_t t = per_head * part / parts;
    if (!r.dentry_bias || t == 0) return t;
    while (t < per_head && tiles.work[t].range.first == tiles.work[t - 1].range.first) ++t;
    return t;
  };
  const auto run_part = [&](int64_t head, int64_t part, char* rows) {
    std::fill_n(rows, rows_bytes, 0);
    const int64_t b = head / p.kv_heads, kv = head % p.kv_heads;
    char* dbias = static_cast<char*>(r.dentry_bias);
    if (dbias) {
      const int64_t cb = r.batch_copies() > 1 ? b : 0, ch = r.head_copies() > 1 ? kv : 0;
      dbias += (cb * r.head_copies() + ch) * r.entries * acc;
    }
    void* memory = thread_buffer(0, scratch);
    void* resting = thread_buffer(1, states);
    for (int64_t t = begin_of(part); t < begin_of(part + 1); ++t) {
      char* dsink = nullptr;
      if (p.dsink_logits) {
        dsink = sinks.get() + ((head * parts + part) * group + tiles.work[t].range.head) * acc;
      }
      tiles.run(
          head * per_head + t,
          [&](const int64_t index[3]) {
            kernels.backward(r, view, index, rows, dbias, dsink, memory);
          },
          [&](int64_t batch, int64_t h, const ListChunk& chunk) {
            kernels.backward_chunk(r, view, chunk, batch, h, rows, dsink, memory, resting);
          });
    }
  };
  if (parts == 1) {
    parallel_for(heads, 1, tiles.serial, [&](int64_t begin, int64_t end) {
      const Memory rows = allocate(rows_bytes);  // too large to be kept
      for (int64_t head = begin; head < end; ++head) {
        run_part(head, 0, rows.get());
        const void* const all = rows.get();
        kernels.finish_keys(r, head / p.kv_heads, head % p.kv_heads, &all, 1, 0, view.num_keys);
      }
    });
  } else {
    const int64_t together = std::max<int64_t>(1, std::min(heads, kUnits / parts));
    const Memory rows = allocate(together * parts * rows_bytes);
    for (int64_t first = 0; first < heads; first += together) {
      const int64_t count = std::min(together, heads - first);
      parallel_for(count * parts, 1, tiles.serial, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
          run_part(first + n / parts, n % parts, rows.get() + n * rows_bytes);
        }
      });
      constexpr int64_t kKeys = 256;  // of a work item
      const int64_t pieces = (view.num_keys + kKeys - 1) / kKeys;
      parallel_for(count * pieces, 1, tiles.serial, [&](int64_t begin, int64_t end) {
        std::vector<const void*> all(parts);
        for (int64_t n = begin; n < end; ++n) {
          const int64_t head = n / pieces, from = n % pieces * kKeys;
          for (int64_t k = 0; k < parts; ++k) {
            all[k] = rows.get() + (head * parts + k) * rows_bytes;
          }
          kernels.finish_keys(r, (first + head) / p.kv_heads, (first + head) % p.kv_heads,
                              all.data(), parts, from, std::min(from + kKeys, view.num_keys));
        }
      });
    }
  }
  if (!p.dsink_logits) return;
  const auto sum_sinks = [&](auto zero) {
    using Acc = decltype(zero);
    const Acc* part = reinterpret_cast<const Acc*>(sinks.get());
    Acc* out = static_cast<Acc*>(p.dsink_logits);
    std::fill_n(out, p.heads, zero);
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t k = 0; k < parts; ++k) {
        for (int64_t g = 0; g < group; ++g) out[head % p.kv_heads * group + g] += *part++;
      }
    }
  };
  acc == 8 ? sum_sinks(double(0)) : sum_sinks(float(0));
}

}  // namespace cpu
}  // namespace attnext
