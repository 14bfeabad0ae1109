# SPDX-License-Identifier: Apache-2.0
"""The bugs that test_planted.py plants in attnext's CUDA kernels, and the problems that show them.

Some mistakes are not here because they change nothing: a slot past the walk's end holds a row that
every mask leaves out, and the copy of a step reads any row for it; numbers of a slot without a token
are masked too. Barriers that a later one makes redundant are not here either. Nor is `rest`, what the
conversion of lse to base 2 loses: that is no more than the rounding of lse, which the budget allows.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .problems import Problem, growing, infinite_value, make
from .source import Edit

WRONG = "wrong result"
CONFLICTS = "bank conflicts"
BLOCK, TILE, WALK, ROWS = "block.cuh", "tile.cuh", "walk.cuh", "rows.cuh"
FORWARD, BACKWARD = "window_forward.cuh", "window_backward.cuh"
SUMS = "window_sums.cuh"


@functools.cache
def problem(name: str) -> Problem:
    """Tiny problems by name, heads of 32 where nothing else is said."""
    sliding = functools.partial(make, "sliding_window_attention")
    neighborhood = functools.partial(make, "neighborhood_attention")
    made = {
        # 64 rows a tile, steps of 64 (backward: 32) slots; rows and slots end within a step
        "sliding": lambda: sliding([150], window_size=120),
        "sliding forward": lambda: sliding([150], window_size=120, backward=False),
        "narrow": lambda: sliding([128], window_size=20),  # the second warp skips a step
        "short": lambda: sliding([40], [100], window_size=70),
        "growing": lambda: sliding([150], window_size=120, backward=False, edit=growing),
        "wide rows": lambda: sliding([60], [130], window_size=None, dim=64, backward=False),
        "one slot more": lambda: sliding([20], [129], window_size=None, is_causal=False,
                                         backward=False),
        "gqa": lambda: sliding([70], window_size=40, heads=4, kv_heads=2),
        "packed": lambda: sliding([100], window_size=30, backward=False, edit=packed),
        "one query": lambda: sliding([1], [700], window_size=None, sink_logits=True,
                                     backward=False),
        "sinks": lambda: sliding([90], window_size=20, sinks=3, sink_logits=True),
        "bias": lambda: neighborhood([9, 10], heads=2, kernel_size=5, bias=(4, 4), extra=2),
        "spare rows": lambda: make("window_attention", [10, 19], window_size=(12, 10),
                                   shift=(17, 0), bias=(4, 9)),
        "dense": lambda: sliding([129], window_size=None, is_causal=False, dim=64,
                                 dtype=torch.float32, backward=False),
        "long bias": lambda: sliding([150], window_size=100, bias=(149,)),
        "softcap": lambda: sliding([90], window_size=40, softcap=0.7),
        "row scale": lambda: sliding([90], window_size=40, row_scale=True),
        "two axes": lambda: neighborhood([9, 10], kernel_size=5),
        "three axes": lambda: neighborhood([4, 14, 5], kernel_size=3, backward=False),
        "zero pad": lambda: neighborhood([9, 10], kernel_size=5, boundary="zero_pad"),
        "unaligned": lambda: sliding([70], window_size=20, dim=30, backward=False),
        "part of a row": lambda: sliding([70], window_size=20, dim=24, spare=8, backward=False),
        "infinite": lambda: sliding([20], window_size=4, edit=infinite_value),
        "exact": lambda: sliding([70], window_size=40, dtype=torch.float32),
    }  # fmt: skip
    return made[name]()


def packed(tensors: dict[str, torch.Tensor]) -> None:
    """Three sequences in one."""
    tensors["cu_seqlens_q"] = torch.tensor([0, 37, 70, 100], dtype=torch.int32)


class Bug(NamedTuple):
    """What was done to which kernel, on which problem it shows, and what then is said."""

    name: str
    kernel: str
    problem: str
    symptom: str
    edits: tuple[Edit, ...]


def planted_bug(
    family: str, name: str, kernel: str, shown_by: str, symptom: str, *edits: tuple[str, str, str]
) -> Bug:
    """Of the kernel of a family ("window", "linear"): edits are (file, old, new)."""
    return Bug(name, f"{family}_{kernel}", shown_by, symptom, tuple(Edit(*e) for e in edits))


_bug = functools.partial(planted_bug, "window")

_STEP = """      if (slot != from) {
        wait_copies<0>();
        __syncthreads();
      }
"""
_HELD = """    wait_copies<0>();
    __syncthreads();
    ready();
"""
EARLY = "cp.async read before its wait"
_UNWRITTEN = "read of unwritten shared memory"

BUGS = [
    # ---- the pipeline ----
    _bug("no barrier before a step", "forward_bf16_32", "sliding forward", "read-write race",
         (BLOCK, _STEP, _STEP.replace("        __syncthreads();\n", ""))),
    _bug("no barrier before a step, dK", "key_gradient_bf16_32", "sliding", "write-read race",
         (BLOCK, _STEP, _STEP.replace("        __syncthreads();\n", ""))),
    _bug("no wait before a step", "forward_bf16_32", "sliding forward", EARLY,
         (BLOCK, _STEP, _STEP.replace("        wait_copies<0>();\n", ""))),
    _bug("waits for one group too few", "query_gradient_bf16_32", "sliding", EARLY,
         (BLOCK, _STEP, _STEP.replace("<0>", "<1>"))),
    _bug("waits after the barrier", "forward_bf16_32", "sliding forward", "read-write race",
         (BLOCK, _STEP, _STEP.replace("        wait_copies<0>();\n        __syncthreads();\n",
                                      "        __syncthreads();\n        wait_copies<0>();\n"))),
    _bug("no wait for the held rows", "forward_bf16_32", "sliding forward", EARLY,
         (BLOCK, _HELD, _HELD.replace("    wait_copies<0>();\n", ""))),
    _bug("no barrier after the first copies", "query_gradient_bf16_32", "sliding",
         "read-write race", (BLOCK, _HELD, _HELD.replace("    __syncthreads();\n", ""))),
    _bug("copies into the stage that is read", "forward_bf16_32", "sliding forward",
         "write-read race",
         (BLOCK, "copy_step(slot + kStep, stage ^ 1)", "copy_step(slot + kStep, stage)")),
    _bug("reads the other stage", "forward_bf16_32", "short", EARLY,
         (FORWARD, "this->lanes, this->walk_tile(stage, 0));",
          "this->lanes, this->walk_tile(stage ^ 1, 0));")),
    _bug("places in the wrong buffer", "forward_bf16_32", "sliding forward", "write-read race",
         (BLOCK, "find_step(slot + 2 * kStep, stage,", "find_step(slot + 2 * kStep, stage ^ 1,")),
    _bug("no barrier after the first places", "forward_bf16_32", "sliding forward",
         "read-write race",
         (BLOCK, "find_step(from, 0, 0, cursor);\n      __syncthreads();\n", "find_step(from, 0, 0, cursor);\n")),
    _bug("two buffers of numbers", "key_gradient_bf16_32", "sliding", EARLY,
         (BLOCK, "numbers == 0 ? 2 : numbers - 1, cursor)", "numbers, cursor)"),
         (BLOCK, "numbers = numbers == 2 ? 0 : numbers + 1", "numbers ^= 1")),
    _bug("no barrier between held tiles", "query_gradient_bf16_32", "sliding", "write-read race",
         (BLOCK, "    __syncthreads();\n    if (lane < kWarpRows) addresses",
          "    if (lane < kWarpRows) addresses")),
    _bug("no barrier after addresses", "forward_bf16_32", "sliding forward", "read-write race",
         (BLOCK, "+ lane] = mine;\n    __syncthreads();\n", "+ lane] = mine;\n")),
    _bug("no barrier after the finders", "key_gradient_bf16_32", "gqa", "read-write race",
         (BLOCK, "    set_finders();\n    __syncthreads();\n", "    set_finders();\n")),
    # ---- tiles ----
    _bug("fragment of the right operand turned", "forward_bf16_32", "sliding forward", WRONG,
         (TILE, "multiply(d0, a, b.x[0], b.x[1]);", "multiply(d0, a, b.x[1], b.x[0]);")),
    _bug("fragment of the left operand turned", "forward_bf16_32", "sliding forward", WRONG,
         (TILE, "Number<T>::pack(c[0][2], c[0][3]),\n             Number<T>::pack(c[1][0], c[1][1])",
          "Number<T>::pack(c[1][0], c[1][1]),\n             Number<T>::pack(c[0][2], c[0][3])")),
    _bug("matrices of the right operand in another order", "forward_bf16_32", "sliding forward",
         WRONG, (TILE, "at(lane % 8 + lane / 16 * 8, lane / 8 % 2)", "at(lane % 16, lane / 16)")),
    _bug("no swizzle where a step is copied", "forward_bf16_32", "sliding forward", WRONG,
         (BLOCK, "Layout<T, kDim>::at(row0 + i * kAtOnce, chunk);",
          "(row0 + i * kAtOnce) * kRowBytes + chunk * 16;")),
    _bug("no swizzle at all", "forward_bf16_64", "wide rows", CONFLICTS,
         (TILE, "return kChunks >= 8 ? row % 8 : row / 2 % 4;", "return 0;")),
    _bug("a held row is not copied", "forward_bf16_32", "short", _UNWRITTEN,
         (ROWS, "i < (kRows + kRowsAtOnce - 1) / kRowsAtOnce;", "i < kRows / kRowsAtOnce - 1;")),
    _bug("a row of a step is not copied", "key_gradient_bf16_32", "short", _UNWRITTEN,
         (BLOCK, "for (int i = 0; i < kEach; ++i) {", "for (int i = 0; i < kEach - 1; ++i) {")),
    _bug("no order between rows' stores and loads", "forward_bf16_32", "sliding forward",
         "read-write race",
         (ROWS, "  __syncwarp();\n}", "}")),
    _bug("low parts of fp32 forgotten", "forward_fp32_32", "exact", WRONG,
         (TILE, "      multiply(part[i], a.high, b.low + 2 * i);\n", "")),
    _bug("long sums of fp32 left to the tensor cores", "forward_fp32_64", "dense", WRONG,
         (TILE, "    float part[2][4] = {};\n", "    float(&part0)[4] = d0, (&part1)[4] = d1;\n"),
         (TILE, "      multiply(part[i], a.low, b.high + 2 * i);\n"
          "      multiply(part[i], a.high, b.low + 2 * i);\n"
          "      multiply(part[i], a.high, b.high + 2 * i);\n",
          "      multiply(i ? part1 : part0, a.low, b.high + 2 * i);\n"
          "      multiply(i ? part1 : part0, a.high, b.low + 2 * i);\n"
          "      multiply(i ? part1 : part0, a.high, b.high + 2 * i);\n"),
         (TILE, "    for (int e = 0; e < 4; ++e) d0[e] += part[0][e], d1[e] += part[1][e];\n",
          "    for (int e = 0; e < 4; ++e) d0[e] += 0.f;\n")),
    # ---- rows and slots ----
    _bug("predicate of dead rows lost at a load", "forward_bf16_32", "sliding forward",
         "global read out of bounds",
         (FORWARD, "row.live ? this->row_address(w.query,", "true ? this->row_address(w.query,")),
    _bug("dead row stored", "forward_bf16_32", "sliding forward", "global write out of bounds",
         (FORWARD, "const bool mine = row.live && lane < kWarpRows;",
          "const bool mine = lane < kWarpRows;")),
    _bug("dead row stored, dQ", "query_gradient_bf16_32", "sliding", "global write out of bounds",
         (BACKWARD, "const bool mine = row.live && lane < kWarpRows;",
          "const bool mine = lane < kWarpRows;")),
    _bug("dead key stored", "key_gradient_bf16_32", "sliding", "global write out of bounds",
         (BACKWARD, "    if (!row.live) return 0;\n", "")),
    _bug("walk ends a slot early", "forward_bf16_32", "one slot more", WRONG,
         (FORWARD, "const int32_t to = min(walk.total,", "const int32_t to = min(walk.total - 1,")),
    _bug("window a key too long", "forward_bf16_32", "packed", WRONG,
         (WALK, "tables[axis.end + row.token[a]]};\n      if (a == 2",
          "tables[axis.end + row.token[a]] + 1};\n      if (a == 2")),
    _bug("stale mask after a skipped step", "query_gradient_bf16_32", "narrow", WRONG,
         (WALK, "    line0 = next.line0, line1 = next.line1, column = next.column;\n",
          "    if (found != Step::kSkip) line0 = next.line0, line1 = next.line1, column = next.column;\n")),
    _bug("a step full too early", "forward_bf16_32", "sliding forward", WRONG,
         (WALK, "common.begin <= column && next.column <= common.end;",
          "common.begin <= column && column < common.end;")),
    _bug("lines of a box mixed up", "forward_bf16_32", "three axes", WRONG,
         (WALK, "if (++l1 == walk.lines1) l1 = 0, ++l0;\n    }\n  }\n};",
          "if (++l1 == walk.lines1 + 1) l1 = 0, ++l0;\n    }\n  }\n};")),
    _bug("planes of a box taken for lines", "forward_bf16_32", "three axes", WRONG,
         (WALK, "c[1] = line - c[0] * lines1;", "c[1] = line, c[0] = 0;")),
    _bug("phantom one past the map is a token", "forward_bf16_32", "zero pad",
         "global read out of bounds",
         (WALK, "at.token[a] < axis.num_walked;", "at.token[a] <= axis.num_walked;")),
    _bug("phantoms near the map", "forward_bf16_32", "zero pad", "global read out of bounds",
         (BLOCK, "near = p.near && !walk.has_phantoms();", "near = p.near;")),
    _bug("extra keys are copied as tokens", "forward_bf16_32_modified", "bias", WRONG,
         (BLOCK, "if (near && slot >= walk.extra) {", "if (near) {")),
    _bug("aligned copies of unaligned rows", "forward_bf16_32", "unaligned",
         "misaligned global access", (ROWS, "  if (aligned) {\n", "  if (true) {\n")),
    _bug("reads past the end of a row", "forward_bf16_32", "part of a row",
         "read of unwritten global memory",
         (BLOCK, "const int mine = min(max(bytes - chunk * 16, 0), 16);", "const int mine = 16;")),
    # ---- softmax ----
    _bug("lse without the change of base", "forward_bf16_32", "sliding forward", WRONG,
         (FORWARD, "fmaf(top, kLn2, fmaf(top, kRest, logf(sum)))", "top + logf(sum)")),
    _bug("sum not brought down", "forward_bf16_32", "growing", WRONG,
         (FORWARD, "        sum[f][half] *= factor;\n", "")),
    _bug("output not brought down", "forward_bf16_32", "growing", WRONG,
         (FORWARD, "          out[f][d][2 * half] *= factor;\n", "")),
    _bug("maximum of half a row", "forward_bf16_32", "growing", WRONG,
         (FORWARD, "        now = fmaxf(now, __shfl_xor_sync(~0u, now, 2));\n", "")),
    _bug("brought down by some lanes", "forward_bf16_32", "growing",
         "sync mask names lanes that never arrive",
         (FORWARD, "if (__any_sync(~0u, grows)) rescale", "if (grows) rescale")),
    _bug("sink in every lane", "forward_bf16_32", "sinks", WRONG,
         (FORWARD, "sum[f][half] = sink && lane % 4 == 0 ?", "sum[f][half] = sink ?")),
    _bug("sink in every part", "forward_bf16_32", "one query", WRONG,
         (FORWARD, "start_rows(row, part == 0);", "start_rows(row, true);")),
    _bug("lse of another row", "forward_bf16_32", "sliding forward", WRONG,
         (BLOCK, "__shfl_sync(~0u, x[f][half], lane % 8 * 4);",
          "__shfl_sync(~0u, x[f][half], lane % 8);")),
    _bug("mask not looked at where a row is alone", "forward_bf16_32", "infinite", WRONG,
         (FORWARD, "if (!walk.attends(row, at)) continue;", "if (!row.live) continue;")),
    # ---- heads and parts ----
    _bug("head of keys wrong", "forward_bf16_32", "gqa", WRONG,
         (FORWARD, "kv_head = head / static_cast<int32_t>(w.heads / w.kv_heads);",
          "kv_head = head % static_cast<int32_t>(w.kv_heads);")),
    _bug("two heads store the same rows", "forward_bf16_32", "gqa", "global write-write race",
         (FORWARD, "mine ? this->row_address(w.out, offset_of(w.out, batch, row.token, head + row.head))",
          "mine ? this->row_address(w.out, offset_of(w.out, batch, row.token, kv_head))")),
    _bug("only a group's first head", "key_gradient_bf16_32", "gqa", WRONG,
         (BACKWARD, "for (int32_t g = 0; g < group; ++g) {\n      if (g > 0) {",
          "for (int32_t g = 0; g < 1; ++g) {\n      if (g > 0) {")),
    _bug("two blocks share a partial row", "forward_bf16_32", "one query",
         "global write-write race",
         (FORWARD, "(int64_t(blockIdx.x) * kRows + row)", "(int64_t(blockIdx.x / 2) * kRows + row)")),
    _bug("part added without its weight", "merge_bf16", "one query", WRONG,
         (FORWARD, "sum += exp2_approx(part(i)[w.head_dim_v] - base) * part", "sum += part")),
    _bug("output merged without its weight", "merge_bf16", "one query", WRONG,
         (FORWARD, "x += exp2_approx(part(i)[w.head_dim_v] - base) * part(i)[d]",
          "x += part(i)[d]")),
    _bug("one part too few", "merge_bf16", "one query", WRONG,
         (FORWARD, "(walk.total + p.split_step - 1) / p.split_step)", "walk.total / p.split_step)")),
    # ---- modifiers ----
    _bug("extra key with a bias", "forward_bf16_32_modified", "bias", "global read out of bounds",
         (FORWARD, "key != kNoBias && mask(f, half, n, e), nullptr", "mask(f, half, n, e), nullptr")),
    _bug("bias of keys that are not attended", "forward_bf16_32_modified", "bias",
         "global read out of bounds",
         (FORWARD, "key != kNoBias && mask(f, half, n, e), nullptr", "key != kNoBias, nullptr")),
    _bug("rows that a tile lacks look up their bias", "query_gradient_bf16_32_modified",
         "spare rows", "global read out of bounds",
         (BLOCK, "word = row.live ? ~0u : 0;", "word = ~0u;")),
    _bug("bias subtracted", "forward_bf16_32_modified", "bias", WRONG,
         (BLOCK, "x += bias[entry] * static_cast", "x -= bias[entry] * static_cast")),
    _bug("bias the other way round, dK", "key_gradient_bf16_32_modified", "bias",
         "global read out of bounds",
         (WALK, "return key - entry; }", "return entry - key; }")),
    _bug("cap without its slope", "query_gradient_bf16_32_modified", "softcap", WRONG,
         (BACKWARD, "*of_product = *of_logit * slope;", "*of_product = *of_logit;")),
    _bug("gradient of the row scale without the product", "query_gradient_bf16_32_modified",
         "row scale", WRONG, (BACKWARD, "dscale[f][half] += g * x;", "dscale[f][half] += g;")),
    # ---- gradients ----
    _bug("delta missing, dQ", "query_gradient_bf16_32", "sliding", WRONG,
         (BACKWARD, "ds[f][n][0] = ds[f][n][1] = kSign * delta[f][0];", "ds[f][n][0] = ds[f][n][1] = 0.f;")),
    _bug("delta missing, dK", "key_gradient_bf16_32", "sliding", WRONG,
         (BACKWARD, "g = weight * (g - delta);", "g = weight * g;")),
    _bug("statistics of the group's first head", "key_gradient_bf16_32", "gqa", WRONG,
         (BACKWARD, "Statistics::of(p) + Statistics::index(w, batch, {0, 0, 0}, head);",
          "Statistics::of(p) + Statistics::index(w, batch, {0, 0, 0}, kv_head * (w.heads / w.kv_heads));")),
    _bug("gradient of lse missing", "statistics_bf16", "sliding", WRONG,
         (SUMS, "delta -= static_cast<const float*>(w.dlse.data)", "(void)static_cast<const float*>(w.dlse.data)")),
    _bug("mask missing, dQ", "query_gradient_bf16_32", "sliding", WRONG,
         (BACKWARD, "g *= weight;\n", "g *= exp2_approx(y);\n")),
    _bug("dK without the scale", "key_gradient_bf16_32", "sliding", WRONG,
         (BACKWARD, "kModified ? 1.f : static_cast<float>(w.scale);", "1.f;")),
    _bug("warps share a table", "bias_gradient_bf16_32", "bias", "global write-write race",
         (BACKWARD, "(int64_t(blockIdx.x) * kWarps + warp) * w.bias", "(int64_t(blockIdx.x) * kWarps) * w.bias")),
    _bug("no order between rows of a table", "bias_gradient_bf16_32", "long bias",
         "global read-write race",
         (BACKWARD, "of_key[to_origin] += x[r];\n          __syncwarp();\n", "of_key[to_origin] += x[r];\n")),
    _bug("rows of dS read before they are stored", "bias_gradient_bf16_32", "bias", "read-write race",
         (BACKWARD, "__syncwarp();\n        float x[8];", "float x[8];")),
    _bug("rows of dS in another order than they were stored", "bias_gradient_bf16_32", "bias",
         "global write-write race",
         (BACKWARD, "load_shared_float(turned(r, slot / 8) +", "load_shared_float(turned(r ^ 1, slot / 8) +")),
    _bug("tables of one warp only", "merge_bias", "bias", WRONG,
         (SUMS, "const int64_t tables = int64_t(p.splits) * p.rows;", "const int64_t tables = p.splits;")),
    _bug("sums of warps read too early", "sink_gradient", "sinks", "read-write race",
         (SUMS, "= sum;\n  __syncthreads();\n", "= sum;\n")),
    _bug("rows without keys in the sink's gradient", "sink_gradient", "sinks", WRONG,
         (SUMS, "sum -= exp2_approx(sink - s.lse - s.rest) * s.delta;",
          "sum += exp2_approx(sink - s.lse - s.rest) * s.delta;")),
]  # fmt: skip
