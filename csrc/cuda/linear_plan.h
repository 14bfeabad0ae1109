// SPDX-License-Identifier: Apache-2.0
// What the kernels of linear attention are started with. Plain C++ that needs no CUDA.
//
// One kernel serves every pass: a scan over the tokens of a sequence,
//   S_t = e^g_t S_{t-1} + b_t c_t^T,   o_t = a_t^T S_t,
// with rows a, b of one width and c of another. Outputs are the scan of (q, k, v). Gradients are
// scans too, those of queries in the same order, the others from the last token to the first:
//   dq: (dO, v, k)    dv: (k, q, dO)    dk: (v, dO, q)
// with S and its gradient as states, transposed for dq and dk. The ones by which a normaliser
// extends values extend b or c here, and a number of each token, -dO.o, extends the other side.
#pragma once

#include <cstdint>
#include <vector>

#include "../params.h"
#include "launch.h"
#include "linear_kernels.h"

namespace attnext {
namespace cuda {

// Rows that are read or written; head h has those of its own head h / group.
struct ScanRows {
  TensorRef rows;
  int32_t group, dim;
  FeatureMap map;
  int32_t aligned;  // rows start at multiples of 16 bytes
  int64_t step;     // elements to the next row in the order of a scan
  // Bytes to the next row where rows are aligned and those of a chunk are within 2^31, else 0.
  int32_t stride;
};

// What a scan has beside the products of a and b with S.
enum class Extension : int32_t {
  kNone,
  kColumn,  // c has a further entry: z = sum of weights b, in the last column of S
  kFeature  // b has a further entry: z = sum of weights c, in the last row of S
};
// On which side tokens have a factor, and a further entry that is not 1.
enum class Side : int32_t { kNone, kA, kB };

struct LinearLaunch {
  // Sequences: listed, or `per_item` of each batch item, `length` tokens long (the last shorter).
  const LinearSequence* sequences;
  int64_t tokens, length, per_item;
  int64_t num_sequences;
  int64_t segment;  // tokens of a sequence that one block walks over, a multiple of its chunk
  int32_t heads, segments, slices;
  int32_t backwards;  // from the last token to the first
  int32_t exclusive;  // decays count after their token instead of before it
  int32_t outputs;    // or just the state
  int32_t sums;       // tokens enter the state; or outputs read the one at the start
  int32_t strict;     // a token's output does not read what it has itself put into the state

  ScanRows a, b, c, out;
  int32_t out_fp32;
  ScanRows raw;  // `out` is a gradient of features; of what they are features, or no data
  TensorRef decay, beta;
  // The delta rule. `written`: what tokens put into the state, or its gradient, in the elements'
  // type; `lacking`: the same before beta, written by the scan in order (which then has no other
  // outputs) and read by the one against it, whose `dots` are the gradient of beta. Or no data.
  ScanRows written, lacking;
  TensorRef ddenominator;  // its own gradient; may be null
  TensorRef denominator;   // Extension::kColumn divides by it where there are outputs
  float scale;             // on outputs
  float inner_scale;       // on what enters S
  float outer_scale;       // its inverse
  float polynomial_scale;  // of Taylor features: on products of entries
  bool exact_scale;        // and scaling entries by it rounds nothing
  float eps;
  int32_t weighted_b;  // Taylor: the weights of the polynomial are b's or c's, not a's or raw's
  // linear_fold: [slices, batch, tokens, heads, width], of which `out` is the sum over slices. A
  // fold scan makes it, of the entries: what the features of each slice make of their gradient.
  // Beside outputs, `part_sums`: the parts of the normaliser's, [slices, batch, tokens, heads].
  float* folded;
  float* part_sums;
  int32_t folds, width;
  int32_t parts;  // blocks that share features
  Extension extension;
  Side side;
  float* numbers;  // [batch, tokens, heads] of {factor, further entry}, for `side`
  // [slices, batch, tokens, heads] features of raw . gradient; may be null. Beside meetings, as
  // many slices more of what comes from the state. A fold's are that alone, and of one slice more
  // what comes from the chunk.
  float* dots;
  int64_t batch;
  // States before each chunk, as threads hold them: written by a scan in order, and met by the
  // gradients of those after it in a scan against it, whose products go to `meetings`, one number
  // for each chunk, slice and warp. May be null.
  float* boundaries;
  float* meetings;
  int64_t chunks;  // of all sequences, at most

  // S, [columns of its tensor's rows][...] or transposed; z after it.
  const float* before;                      // null: zero
  float* after;                             // may be null
  int32_t before_segments, after_segments;  // states of a sequence and head: 1, or one a segment
  int64_t state_size, row_stride, column_stride, z_offset, z_stride;
  float* factors;  // of each segment's state, by which it lets an earlier one through; may be null
  float* states;   // linear_combine: of segments alone, which become those before them

  // The kernels around the scan.
  ScanRows dout, result;  // linear_numbers: of -dO.o
  const float* dots_key;  // linear_decay_gradient: those of queries less those of keys
  int32_t num_key_dots, first_state_dot;  // slices of a set, and the first of what is the state's
  TensorRef ddecay;
  int32_t chunk, num_meetings, sets;  // tokens; numbers a chunk; how many scans have left such
  int32_t num_dots;                   // slices of a set of dots
};

// `params.sequences` is an address on the device, or null for sequences of `length` tokens; where
// there are some, `length` is that of the longest.
int64_t linear_forward_workspace(const LinearParams& params, int64_t length);
int64_t linear_backward_workspace(const LinearParams& params, int64_t length);
std::vector<Launch> linear_forward_launches(const LinearParams& params, int64_t length,
                                            void* workspace);
std::vector<Launch> linear_backward_launches(const LinearParams& params, int64_t length,
                                             void* workspace);

// A few tokens of decoding.
struct LinearStepLaunch {
  LinearStepParams step;
  int32_t features, columns;     // of a state
  int32_t tiles, width, groups;  // of its columns: how many, how wide, threads a column
};
std::vector<Launch> linear_step_launches(const LinearStepParams& params);

// Every scan kernel, for those who look at what was compiled.
struct ScanFacts {
  const char* name;
  const char* instance;  // the source line that makes it
  DType dtype;
  int32_t dim, warps;
  ScanKind kind;
  int32_t shared_bytes;
};
std::vector<ScanFacts> scan_kernels();

}  // namespace cuda
}  // namespace attnext
