// SPDX-License-Identifier: Apache-2.0
// What an ISA unit offers for linear attention: plain function pointers, chosen once per call.
//
// A sequence is cut into chunks, and these are gathered into segments, by the problem alone. Within
// a segment the state grows chunk by chunk from `carry`, the state at its start, and so does
// `local`, the sum of the segment's own chunks, from zero; the next segment starts from `factor *
// carry + local`. Segments can therefore be walked one after the other, or their sums made first
// and all walked at once: the bits are the same. Under the delta rule chunks do not add up; `local`
// is then the state itself, and there is no carry.
#pragma once

#include <cstdint>

#include "../params.h"

namespace attnext {
namespace cpu {

// A stretch of one sequence for one head, as tokens counted in the order of processing, and the
// columns of the values in question.
struct LinearItem {
  int64_t sequence, head;
  int64_t begin, end;
  int64_t column, columns;
  int64_t chunk;       // tokens worked on together
  bool for_gradients;  // as part of a backward pass
};

// A head's way through a segment. `carry` may be null: zero. `running` is room for the state before
// a chunk, and not used without a carry.
struct LinearWalk {
  LinearItem item;
  const void* carry;
  void *local, *running;
  bool fresh;       // local is zero and is not read
  double gone = 0;  // decay since the segment began, as a power of two
};

// A state as kernels hold it: [features][columns padded to vectors], the normaliser's sums, and in
// the last place the factor by which it lets an earlier state through.
struct LinearKernels {
  int64_t (*chunk)(const LinearParams&, int64_t length, bool for_gradients);  // tokens
  int64_t (*segment)(const LinearParams&, int64_t chunk);       // tokens, a multiple of the chunk
  int64_t (*state_size)(const LinearParams&, int64_t columns);  // numbers
  int64_t (*forward_scratch)(const LinearParams&, int64_t columns, int64_t chunk);  // bytes
  int64_t (*backward_scratch)(const LinearParams&, int64_t columns, int64_t chunk);
  int lanes;

  // Between a state and its place in a tensor; without a source it becomes zero.
  void (*load_state)(const LinearParams&, const LinearItem&, const void* source, void* state);
  void (*store_state)(const LinearParams&, const LinearItem&, const void* state, void* target);
  // carry = factor of local * carry + local.
  void (*advance)(const LinearParams&, int64_t columns, void* carry, const void* local);

  // local += the chunks of an item: keys and values, or queries and gradients of outputs from the
  // last to the first. A `fresh` local is zero and is not read.
  void (*sum_keys)(const LinearParams&, const LinearItem&, void* local, bool fresh, void* scratch);
  void (*sum_queries)(const LinearParams&, const LinearItem&, void* local, bool fresh,
                      void* scratch);
  // Outputs of heads over one segment: a chunk each in turns, since their rows lie side by side; if
  // they are not causal, of one head. `local` is updated where `keep`.
  void (*forward)(const LinearParams&, LinearWalk* walks, int64_t count, bool keep, void* scratch);
  // Gradients of an item: `carry` is the state before it, dcarry the gradient of the state after
  // it, dlocal as `local`, from the last chunk to the first. Null: zero.
  void (*backward)(const LinearParams&, const LinearItem&, const void* carry, const void* dcarry,
                   void* dlocal, bool fresh, void* scratch);

  int64_t (*step_scratch)(const LinearStepParams&);
  void (*step)(const LinearStepParams&, int64_t batch, int64_t head, void* scratch);
};

void linear_forward(const LinearParams& params);
void linear_backward(const LinearParams& params);
void linear_step(const LinearStepParams& params);

}  // namespace cpu
}  // namespace attnext
