// SPDX-License-Identifier: Apache-2.0
// Entry points: cut the problem into rows (one sequence and head) and these into segments, and hand
// them to threads. With rows enough, a thread walks a row's segments one after the other; else it
// takes single segments, after the sums that carry a row's state from one to the next. Both give
// the same bits.
#include "linear.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "isa.h"
#include "memory.h"
#include "parallel.h"

namespace attnext {
namespace cpu {
namespace {

// A state that may still be zero, in which case its memory has not been written.
struct State {
  void* data = nullptr;
  bool empty = true;

  const void* get() const { return empty ? nullptr : data; }
};

class Problem {
 public:
  const LinearParams& p;
  const bool for_gradients;
  const LinearKernels& kernels;

  Problem(const LinearParams& params, bool of_gradients)
      : p(params),
        for_gradients(of_gradients),
        kernels(linear_kernels(params.dtype)),
        rows(p.num_sequences * p.heads),
        state_bytes(kernels.state_size(p, p.head_dim_v) * acc_size(p.dtype)) {
    double tokens = 0;
    for (int64_t n = 0; n < p.num_sequences; ++n) {
      tokens += static_cast<double>(length(n));
      most_segments = std::max(most_segments, segments(n));
      most_chunk = std::max(most_chunk, chunk(n));
    }
    serial = tokens * p.heads * p.features() * p.head_dim_v < kSerialWork;
    const int64_t threads = serial ? 1 : max_threads();
    // Under the delta rule both states are then made twice.
    const bool few = p.delta() ? 2 * rows <= threads : rows < 2 * threads;
    split = threads > 1 && most_segments > 1 && few;
    // Here and not where parts are taken: a thread of a team may have a limit of its own.
    part_columns = p.head_dim_v;
    if (rows > 0 && rows < threads) {
      const int64_t wanted = (threads + rows - 1) / rows;
      const int64_t columns = (p.head_dim_v + wanted - 1) / wanted;
      part_columns = (columns + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
    }
  }

  int64_t length(int64_t n) const { return p.sequences[n].end - p.sequences[n].begin; }
  int64_t chunk(int64_t n) const { return kernels.chunk(p, length(n), for_gradients); }
  int64_t segment_length(int64_t n) const { return kernels.segment(p, chunk(n)); }
  int64_t segments(int64_t n) const {
    const int64_t each = segment_length(n);
    return (length(n) + each - 1) / each;
  }
  LinearItem row(int64_t r) const {
    const int64_t n = r / p.heads;
    return {n, r % p.heads, 0, length(n), 0, p.head_dim_v, chunk(n), for_gradients};
  }
  LinearItem segment(int64_t r, int64_t s) const {
    LinearItem item = row(r);
    const int64_t each = segment_length(item.sequence);
    item.begin = s * each;
    item.end = std::min(item.end, item.begin + each);
    return item;
  }

  // Under the delta rule chunks do not add up, but columns of the values know nothing of each
  // other: in how many parts a row is worked on, and one of these.
  int64_t parts() const { return (p.head_dim_v + part_columns - 1) / part_columns; }
  LinearItem part(int64_t r, int64_t i) const {
    LinearItem item = row(r);
    item.column = i * part_columns;
    item.columns = std::min(part_columns, p.head_dim_v - item.column);
    return item;
  }

  // f(first row, count) for groups of heads of one sequence, which take turns segment by segment:
  // rows of a token lie side by side, and a page of them comes from memory once.
  template <class F>
  void for_each_turn(F f) const {
    const int64_t wanted = max_threads() > 1 ? 2 * max_threads() : 1;  // items, for balance
    const int64_t groups =
        std::min(p.heads, (wanted + p.num_sequences - 1) / std::max<int64_t>(p.num_sequences, 1));
    const int64_t each = (p.heads + groups - 1) / std::max<int64_t>(groups, 1);
    const int64_t of_sequence = (p.heads + each - 1) / std::max<int64_t>(each, 1);
    parallel_for(p.num_sequences * of_sequence, 1, serial, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i % of_sequence * each;
        f(i / of_sequence * p.heads + head, std::min(each, p.heads - head));
      }
    });
  }

  // A row's place in a tensor of states.
  char* state_of(const void* states, int64_t r) const {
    if (!states) return nullptr;
    const int64_t row_bytes = p.features() * p.state_columns() * acc_size(p.dtype);
    return const_cast<char*>(static_cast<const char*>(states)) + r * row_bytes;
  }
  State load(const LinearItem& item, const void* states, int64_t r, void* room) const {
    if (!states) return {room, true};
    kernels.load_state(p, item, state_of(states, r), room);
    return {room, false};
  }
  void store(const LinearItem& item, const State& state, void* states, int64_t r) const {
    if (!states) return;
    if (state.empty) kernels.load_state(p, item, nullptr, state.data);
    kernels.store_state(p, item, state.data, state_of(states, r));
  }
  void advance(State* carry, const void* local) const {
    if (carry->empty) {
      std::memcpy(carry->data, local, state_bytes);
      carry->empty = false;
    } else {
      kernels.advance(p, p.head_dim_v, carry->data, local);
    }
  }

  const int64_t rows, state_bytes;
  int64_t most_segments = 0, most_chunk = 1, part_columns;
  bool serial, split;
};

// The sums of all segments of all rows, and what becomes of them: the state that each starts from.
class Carries {
 public:
  explicit Carries(const Problem& problem)
      : problem_(problem),
        memory_(allocate(problem.rows * (problem.most_segments + 2) * problem.state_bytes)) {}

  char* at(int64_t row, int64_t segment) const {
    return memory_.get() + (row * (problem_.most_segments + 2) + segment) * problem_.state_bytes;
  }
  // What each segment of a row starts from, in the place of its sum; returns the last state.
  State scan(int64_t row, const void* initial, bool reverse) {
    const LinearItem item = problem_.row(row);
    State carry = problem_.load(item, initial, row, at(row, problem_.most_segments));
    char* const next = at(row, problem_.most_segments + 1);
    const int64_t count = problem_.segments(item.sequence);
    for (int64_t n = 0; n < count; ++n) {
      char* const sum = at(row, reverse ? count - 1 - n : n);
      if (carry.empty) {
        std::memcpy(carry.data, sum, problem_.state_bytes);
        carry.empty = false;
        continue;
      }
      std::memcpy(next, carry.data, problem_.state_bytes);
      problem_.advance(&carry, sum);
      std::memcpy(sum, next, problem_.state_bytes);
    }
    return carry;
  }

 private:
  const Problem& problem_;
  Memory memory_;
};

struct Work {
  int64_t row, segment;
};
std::vector<Work> all_segments(const Problem& problem) {
  std::vector<Work> work;
  for (int64_t r = 0; r < problem.rows; ++r) {
    for (int64_t s = 0; s < problem.segments(r / problem.p.heads); ++s) work.push_back({r, s});
  }
  return work;
}

template <class F>
void for_each(int64_t n, bool serial, F f) {
  parallel_for(n, 1, serial, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// ---- forward -----------------------------------------------------------------------------------

class Forward : public Problem {
 public:
  explicit Forward(const LinearParams& params)
      : Problem(params, false),
        scratch_bytes_(kernels.forward_scratch(p, p.head_dim_v, most_chunk)) {}

  void run() {
    if (p.delta()) {
      run_delta();
    } else if (split) {
      run_split();
    } else if (!p.causal) {
      for_each(rows, serial, [&](int64_t r) { sum_and_read(r); });
    } else {
      for_each_turn([&](int64_t r, int64_t n) { walk(r, n); });
    }
  }

 private:
  void* scratch() const { return thread_buffer(0, scratch_bytes_); }
  char* room(int64_t count) const {
    return static_cast<char*>(thread_buffer(1, count * state_bytes));
  }

  // Heads side by side, a segment each in turns; and a chunk each, for as many as have their states
  // in a second-level cache.
  void walk(int64_t first, int64_t n) {
    constexpr int64_t kNearBytes = 256 << 10;
    const int64_t together = std::max<int64_t>(1, kNearBytes / (3 * state_bytes));
    char* memory = room(3 * n);
    const auto next = [&] { return std::exchange(memory, memory + state_bytes); };
    std::vector<State> carries;
    std::vector<LinearWalk> walks;
    for (int64_t r = first; r < first + n; ++r) {
      carries.push_back(load(row(r), p.initial_state, r, next()));
      walks.push_back({{}, nullptr, next(), next(), true});
    }
    const int64_t count = segments(first / p.heads);
    for (int64_t s = 0; s < count; ++s) {
      const bool keep = s + 1 < count || p.final_state;
      for (int64_t i = 0; i < n; ++i) {
        walks[i] = {segment(first + i, s), carries[i].get(), walks[i].local, walks[i].running,
                    true};
      }
      for (int64_t i = 0; i < n; i += together) {
        kernels.forward(p, &walks[i], std::min(together, n - i), keep, scratch());
      }
      for (int64_t i = 0; keep && i < n; ++i) advance(&carries[i], walks[i].local);
    }
    for (int64_t i = 0; i < n; ++i) store(row(first + i), carries[i], p.final_state, first + i);
  }

  // One head over one segment.
  void forward(const LinearItem& item, const void* carry, void* local, void* running, bool fresh,
               bool keep) {
    LinearWalk walk{item, carry, local, running, fresh};
    kernels.forward(p, &walk, 1, keep, scratch());
  }

  void sum_and_read(int64_t r) {
    char* const memory = room(2);
    void* const local = memory + state_bytes;
    const LinearItem item = row(r);
    State total = load(item, p.initial_state, r, memory);
    const int64_t count = segments(item.sequence);
    for (int64_t s = 0; s < count; ++s) {
      kernels.sum_keys(p, segment(r, s), local, true, scratch());
      advance(&total, local);
    }
    for (int64_t s = 0; s < count; ++s) {
      forward(segment(r, s), total.get(), local, nullptr, true, false);
    }
    store(item, total, p.final_state, r);
  }

  void run_split() {
    Carries carries(*this);
    const std::vector<Work> work = all_segments(*this);
    const int64_t items = static_cast<int64_t>(work.size());
    for_each(items, serial, [&](int64_t i) {
      const auto [r, s] = work[i];
      kernels.sum_keys(p, segment(r, s), carries.at(r, s), true, scratch());
    });
    std::vector<State> last(rows);
    for_each(rows, serial, [&](int64_t r) {
      last[r] = carries.scan(r, p.initial_state, false);
      store(row(r), last[r], p.final_state, r);
    });
    for_each(items, serial, [&](int64_t i) {
      const auto [r, s] = work[i];
      const void* carry = !p.causal                  ? last[r].get()
                          : s > 0 || p.initial_state ? carries.at(r, s)
                                                     : nullptr;
      char* const memory = room(2);
      forward(segment(r, s), carry, memory, memory + state_bytes, true, false);
    });
  }

  void run_delta() {
    const int64_t parts = this->parts();
    for_each(rows * parts, serial, [&](int64_t i) {
      const LinearItem item = part(i / parts, i % parts);
      State state = load(item, p.initial_state, i / parts, room(1));
      if (item.end > 0) {
        forward(item, nullptr, state.data, nullptr, state.empty, p.final_state != nullptr);
        state.empty = false;
      }
      store(item, state, p.final_state, i / parts);
    });
  }

  const int64_t scratch_bytes_;
};

// ---- backward ----------------------------------------------------------------------------------

class Backward : public Problem {
 public:
  explicit Backward(const LinearParams& params)
      : Problem(params, true),
        scratch_bytes_(kernels.backward_scratch(p, p.head_dim_v, most_chunk)) {}

  void run() {
    if (split && p.delta()) {
      run_split_delta();
    } else if (split) {
      run_split();
    } else if (!p.causal) {
      for_each(rows, serial, [&](int64_t r) { sum_and_read(r); });
    } else {
      for_each_turn([&](int64_t r, int64_t n) { walk(r, n); });
    }
  }

 private:
  void* scratch() const { return thread_buffer(0, scratch_bytes_); }
  char* room(int64_t count) const {
    return static_cast<char*>(thread_buffer(1, count * state_bytes));
  }

  // States at the start of every segment, then the segments from the last to the first.
  void walk(int64_t first, int64_t n) {
    const int64_t count = segments(first / p.heads);
    // Grows with the sequence, so it is not kept.
    const Memory held = allocate(n * (count + 2) * state_bytes);
    char* const memory = held.get();
    std::vector<State> carries(n * std::max<int64_t>(count, 1)), dcarries;
    for (int64_t i = 0; i < n; ++i) {
      char* const own = memory + i * (count + 2) * state_bytes;
      if (count > 0) carries[i * count] = load(row(first + i), p.initial_state, first + i, own);
      for (int64_t s = 1; s < count; ++s) carries[i * count + s].data = own + s * state_bytes;
      void* const last = own + (count + 1) * state_bytes;
      dcarries.push_back(load(row(first + i), p.dfinal_state, first + i, last));
    }
    const auto local = [&](int64_t i) { return memory + (i * (count + 2) + count) * state_bytes; };
    for (int64_t s = 0; s + 1 < count; ++s) {
      for (int64_t i = 0; i < n; ++i) {
        State *carry = &carries[i * count + s], *next = carry + 1;
        if (!carry->empty) std::memcpy(next->data, carry->data, state_bytes);
        if (p.delta()) {  // the next one is this one, further on
          kernels.sum_keys(p, segment(first + i, s), next->data, carry->empty, scratch());
          next->empty = false;
        } else {
          next->empty = carry->empty;
          kernels.sum_keys(p, segment(first + i, s), local(i), true, scratch());
          advance(next, local(i));
        }
      }
    }
    for (int64_t s = count - 1; s >= 0; --s) {
      for (int64_t i = 0; i < n; ++i) {
        const void* carry = carries[i * count + s].get();
        State& dcarry = dcarries[i];
        if (p.delta()) {
          kernels.backward(p, segment(first + i, s), carry, nullptr, dcarry.data, dcarry.empty,
                           scratch());
          dcarry.empty = false;
        } else {
          kernels.backward(p, segment(first + i, s), carry, dcarry.get(), local(i), true,
                           scratch());
          advance(&dcarry, local(i));
        }
      }
    }
    for (int64_t i = 0; i < n; ++i) store(row(first + i), dcarries[i], p.dinitial_state, first + i);
  }

  void sum_and_read(int64_t r) {
    const LinearItem item = row(r);
    const int64_t count = segments(item.sequence);
    char* const memory = room(3);
    void* const local = memory + 2 * state_bytes;
    State total = load(item, p.initial_state, r, memory);
    State dtotal = load(item, p.dfinal_state, r, memory + state_bytes);
    for (int64_t s = 0; s < count; ++s) {
      kernels.sum_keys(p, segment(r, s), local, true, scratch());
      advance(&total, local);
    }
    for (int64_t s = count - 1; s >= 0; --s) {
      kernels.sum_queries(p, segment(r, s), local, true, scratch());
      advance(&dtotal, local);
    }
    for (int64_t s = 0; s < count; ++s) {
      kernels.backward(p, segment(r, s), total.get(), dtotal.get(), local, true, scratch());
    }
    store(item, dtotal, p.dinitial_state, r);
  }

  void run_split() {
    Carries carries(*this), dcarries(*this);
    const std::vector<Work> work = all_segments(*this);
    const int64_t items = static_cast<int64_t>(work.size());
    for_each(2 * items, serial, [&](int64_t i) {
      const auto [r, s] = work[i / 2];
      if (i % 2 == 0) {
        kernels.sum_keys(p, segment(r, s), carries.at(r, s), true, scratch());
      } else {
        kernels.sum_queries(p, segment(r, s), dcarries.at(r, s), true, scratch());
      }
    });
    std::vector<State> last(rows), first(rows);
    for_each(rows, serial, [&](int64_t r) {
      last[r] = carries.scan(r, p.initial_state, false);
      first[r] = dcarries.scan(r, p.dfinal_state, true);
      store(row(r), first[r], p.dinitial_state, r);
    });
    for_each(items, serial, [&](int64_t i) {
      const auto [r, s] = work[i];
      const void *carry = last[r].get(), *dcarry = first[r].get();
      if (p.causal) {
        carry = s > 0 || p.initial_state ? carries.at(r, s) : nullptr;
        const bool is_last = s + 1 == segments(r / p.heads);
        dcarry = !is_last || p.dfinal_state ? dcarries.at(r, s) : nullptr;
      }
      kernels.backward(p, segment(r, s), carry, dcarry, room(1), true, scratch());
    });
  }

  // The states that segments start from and the gradients of those they end with, each in one walk
  // of a row's columns; then all segments at once.
  void run_split_delta() {
    const int64_t bytes = p.features() * p.state_columns() * acc_size(p.dtype);
    const Memory before = allocate(rows * most_segments * bytes);
    const Memory after = allocate(rows * most_segments * bytes);
    const auto place = [&](const Memory& states, int64_t r, int64_t s) {
      return states.get() + (r * most_segments + s) * bytes;
    };
    const int64_t parts = this->parts();
    for_each(2 * rows * parts, serial, [&](int64_t i) {
      const bool back = i < rows * parts;  // the longer walks first
      const int64_t r = i / parts % rows, count = segments(r / p.heads);
      const LinearItem own = part(r, i % parts);
      State state = load(own, back ? p.dfinal_state : p.initial_state, r, room(1));
      for (int64_t n = 0; n < count; ++n) {
        const int64_t s = back ? count - 1 - n : n;
        if (!state.empty)
          kernels.store_state(p, own, state.data, place(back ? after : before, r, s));
        LinearItem item = segment(r, s);
        item.column = own.column, item.columns = own.columns;
        if (back) {
          kernels.sum_queries(p, item, state.data, state.empty, scratch());
        } else if (n + 1 < count) {
          kernels.sum_keys(p, item, state.data, state.empty, scratch());
        }
        state.empty = false;
      }
      if (back) store(own, state, p.dinitial_state, r);
    });
    const std::vector<Work> work = all_segments(*this);
    for_each(static_cast<int64_t>(work.size()), serial, [&](int64_t i) {
      const auto [r, s] = work[i];
      const LinearItem item = segment(r, s);
      char *const carry = room(2), *const dcarry = carry + state_bytes;
      const bool is_first = s == 0 && !p.initial_state;
      const bool is_last = s + 1 == segments(r / p.heads) && !p.dfinal_state;
      if (!is_first) kernels.load_state(p, item, place(before, r, s), carry);
      if (!is_last) kernels.load_state(p, item, place(after, r, s), dcarry);
      kernels.backward(p, item, is_first ? nullptr : carry, nullptr, dcarry, is_last, scratch());
    });
  }

  const int64_t scratch_bytes_;
};

}  // namespace

void linear_forward(const LinearParams& p) { Forward(p).run(); }

void linear_backward(const LinearParams& p) { Backward(p).run(); }

void linear_step(const LinearStepParams& params) {
  const LinearParams& p = params.problem;
  const LinearKernels& kernels = linear_kernels(p.dtype);
  const int64_t scratch = kernels.step_scratch(params);
  const double work = double(p.batch) * p.heads * p.tokens * p.features() * p.head_dim_v;
  for_each(p.batch * p.heads, work < kSerialWork, [&](int64_t i) {
    kernels.step(params, i / p.heads, i % p.heads, thread_buffer(0, scratch));
  });
}

}  // namespace cpu
}  // namespace attnext
