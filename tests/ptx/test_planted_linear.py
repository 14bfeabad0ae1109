# SPDX-License-Identifier: Apache-2.0
"""Bugs planted in the kernels of linear attention: each must be caught by what it should be."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import attnext
from attnext.gpu_check.linear import BUDGET, slack

from .executor import Program, WrongRun
from .linear import on_executor
from .planted import EARLY, WRONG, Bug, planted_bug
from .source import header_with, lone
from .test_linear import assert_close, evaluate, expect, form

linear_attention: Any = attnext.linear_attention
SCAN, STATE, SUMS = "linear_scan.cuh", "linear_state.cuh", "linear_sums.cuh"
OUTPUTS = "linear_outputs.cuh"
DELTA, TAYLOR, NUMBERS = "linear_delta.cuh", "linear_taylor.cuh", "linear_numbers.cuh"
LEAVE = "    if (leaves() && !p.meetings) leave(c);\n"
ADD = "    if (adds && !kDeltaBack) add_chunk(stage);\n"
SYNC = "    if (adds && gives()) __syncthreads();  // the copy of the state has been read, and z\n"
ADD_SUMS = "    if (adds) add_sums(stage);\n"
# After the last chunk of all, too.
LATE_LEAVE = ((SCAN, LEAVE + ADD, ADD + LEAVE), (SCAN, "(more || p.after);", "true;"))

_bug = functools.partial(planted_bug, "linear")

# Of one head with 32 entries; forward only where no gradients are asked for.
PROBLEMS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "plain": ("identity", False, {"tokens": 150}),
    "narrow": ("elu, normalized, decayed", False, {"tokens": 70, "dim": 30, "decay": None}),
    "wide": ("elu, normalized, decayed", False, {"tokens": 20, "dim_v": 70, "decay": None}),
    "gated": ("elu, normalized, decayed", False, {"tokens": 150}),
    "gradients": ("elu, normalized, decayed", True, {"tokens": 80}),
    "strong decays": ("elu, normalized, decayed", True, {"tokens": 20}),
    "weak decays": ("elu, normalized, decayed", True, {"tokens": 80}),
    "exact": ("elu, normalized, decayed", True, {"tokens": 50, "dtype": torch.float32}),
    "large": ("identity", False, {"tokens": 70, "dtype": torch.float16}),
    "not finite": ("identity", False, {"tokens": 40}),
    "segments": ("reverse", False, {"tokens": 260, "dtype": torch.float32}),
    "segments' gradients": (
        "identity", True, {"tokens": 260, "state": False, "dtype": torch.float32}
    ),
    "delta": ("reverse", False, {"tokens": 100, "beta": True}),
    "delta gradients": ("reverse", True, {"tokens": 100, "beta": True}),
    "fold": (
        "identity", True, {"tokens": 70, "feature_map": "taylor2", "dim": 16, "normalize": True}
    ),
    "entries": (
        "identity", False, {"tokens": 70, "feature_map": "taylor2", "dim": 20, "normalize": True}
    ),
    "fold decays": (
        "identity", True, {"tokens": 70, "feature_map": "taylor2", "dim": 16, "decay": "token"}
    ),
    "entries fold": (
        "identity", True, {"tokens": 70, "feature_map": "taylor2", "dim": 36, "decay": "token"}
    ),
    "taylor": (
        "identity", False, {"tokens": 70, "feature_map": "taylor2", "dim": 16, "dim_v": 40}
    ),
    "even": ("identity", False, {"tokens": 150, "feature_map": "taylor2", "dim": 16, "dim_v": 64}),
    "rounding scale": (
        "identity", False, {"tokens": 70, "feature_map": "taylor2", "dim": 12, "dim_v": 40}
    ),
}  # fmt: skip

BUGS = [
    # ---- the pipeline ----
    _bug("no wait for a chunk", "scan_bf16_32", "plain", EARLY,
         (SCAN, "      wait_copies<0>();\n", "")),
    _bug("no barrier before a chunk", "scan_bf16_32", "plain", "read-write race",
         (SCAN, "__syncthreads();  // rows, numbers and the copy of the state are there\n", "")),
    _bug("state copied while it is read", "scan_bf16_32", "plain", "write-read race",
         (SCAN, "__syncthreads();  // the copy of the state has been read, and z\n", ";\n")),
    _bug("sums added to while they are read", "scan_bf16_32_gated", "gated", "write-read race",
         (SCAN, SYNC + ADD_SUMS, ADD_SUMS + SYNC)),
    _bug("copies into the stage that is read", "scan_bf16_32", "plain", EARLY,
         (SCAN, "copy_chunk_rows((c + 1) * kChunk, stage ^ 1);",
          "copy_chunk_rows((c + 1) * kChunk, stage);")),
    _bug("numbers of the next chunk too early", "scan_bf16_32_gated", "gated",
         "read of unwritten shared memory",
         (SCAN, "notes()) note(next, stage ^ 1);", "notes()) note(next, stage);")),
    _bug("features read while they are made", "scan_bf16_taylor", "taylor", "read-write race",
         (SCAN, "      expand(c * kChunk, stage);\n      __syncthreads();\n",
          "      expand(c * kChunk, stage);\n")),
    _bug("no order between the warps of the delta rule", "scan_bf16_32_delta", "delta",
         "read-write race", (DELTA, "    __syncthreads();  // the next warp reads them\n", "")),
    # ---- tokens ----
    _bug("mask lost", "scan_bf16_32", "plain", WRONG,
         (OUTPUTS, "score = seen ? x : 0.f;", "score = x;")),
    _bug("a token is not its own past", "scan_bf16_32", "plain", WRONG,
         (OUTPUTS, "value || j <= own", "value || j < own")),
    _bug("tail is read", "scan_bf16_32", "plain", "global read out of bounds",
         (SCAN, "const int bytes = is_token(at + row) ? min", "const int bytes = true ? min")),
    _bug("tail is stored", "scan_bf16_32", "plain", "global write out of bounds",
         (OUTPUTS, "if (lane < 16 && is_token(row)) {", "if (lane < 16) {")),
    _bug("a short chunk taken for a whole one", "scan_bf16_32", "plain",
         "global read out of bounds",
         (SCAN, "return at >= low && at + kChunk <= count;", "return at >= low;")),
    _bug("outputs' halves the other way round", "scan_bf16_taylor", "even", WRONG,
         (OUTPUTS, "start + column * sizeof(T)", "start + (column ^ kOut) * sizeof(T)")),
    _bug("tail has features", "scan_bf16_32", "narrow", WRONG,
         (SCAN, "      if (!is_token(at + row)) return;  // rows of zeros stay\n", "")),
    _bug("entries that are not there have features", "scan_bf16_32", "narrow", WRONG,
         (SCAN, "Number<T>::narrow(e < real ? f : 0.f);", "Number<T>::narrow(f);")),
    _bug("short chunk at the other end", "scan_fp32_32_gated", "exact", WRONG,
         (SCAN, "(p.exclusive ? whole - tokens.count() : 0)", "0")),
    _bug("a value counts before its token", "scan_bf16_32", "not finite", WRONG,
         (OUTPUTS, "      if (j > last + half * 8) continue;\n", "")),
    _bug("values that are not finite are not looked for", "scan_bf16_32", "not finite", WRONG,
         (OUTPUTS, "apart = !are_own_rows_finite(stage);", "apart = false;")),
    # ---- decays ----
    _bug("decay of the token before", "scan_bf16_32_gated", "gated", WRONG,
         (NUMBERS, "p.exclusive ? sum - own : sum;", "sum - own;")),
    _bug("decay before its token in the way back", "scan_bf16_32_gated", "gradients", WRONG,
         (NUMBERS, "p.exclusive ? sum - own : sum;", "sum;")),
    _bug("state not decayed", "scan_bf16_32_gated", "gated", WRONG,
         (STATE, "kGated ? x * kept : x);", "x);")),
    _bug("sums not decayed", "scan_bf16_32_gated", "gated", WRONG,
         (SCAN, "fmaf(load_shared_float(z(i)), kept, more)", "load_shared_float(z(i)) + more")),
    _bug("a state that nobody has made", "combine", "segments' gradients",
         "read of unwritten global memory",
         (SUMS, "if (!p.after && s + 1 == p.segments) {", "if (false) {")),
    _bug("a segment's decay forgotten", "combine", "segments", WRONG,
         (SUMS, "carry = fmaf(carry, p.factors[at], alone);", "carry += alone;")),
    _bug("gradient of decays ends with a lane's tokens", "decay_gradient", "gradients", WRONG,
         (SUMS, "    sum += __shfl_sync(~0u, mine, 0);\n", "")),
    _bug("gradient of decays without the state", "decay_gradient", "weak decays", WRONG,
         (SUMS, "sum += meetings[i];", "sum += 0. * meetings[i];")),
    _bug("states left after their chunk, of entries", "scan_bf16_32_gated", "gradients", WRONG,
         *LATE_LEAVE),
    _bug("what tokens leave to the state after them left out", "decay_gradient", "gradients", WRONG,
         (SUMS, "  sum += left;\n", "")),
    _bug("what a token gets from itself is lost", "scan_bf16_32_gated", "gradients", WRONG,
         (OUTPUTS, "if (p.dots) x = fmaf(self * factor,", "if (p.dots) x = fmaf(0.f,")),
    _bug("what a token gets from itself has a part in its decay", "scan_bf16_32_gated",
         "strong decays", WRONG,
         (OUTPUTS, "    if (kPullsBack && p.dots) take_self(scores[0], self);\n", "")),
    _bug("what the copy lacks before it has been read", "scan_bf16_32_gated", "gradients",
         "write-read race",
         (OUTPUTS, "      __syncthreads();  // all have read the copy\n      copy",
          "      copy")),
    _bug("what the copy lacks read while it is written", "scan_bf16_32_gated", "gradients",
         "read-write race",
         (OUTPUTS, "      copy_state<true>();\n      __syncthreads();\n",
          "      copy_state<true>();\n")),
    _bug("not decayed where the state is read", "scan_bf16_32_delta", "delta", WRONG,
         (DELTA, "2 * t + i)) - of_state * x;", "2 * t + i)) - x;")),
    _bug("beta left out within a warp", "scan_bf16_32_delta", "delta", WRONG,
         (DELTA, "        if (n / 2 == warp) x *= other.entry;\n", "")),
    _bug("tokens left out in the substitution", "scan_bf16_32_delta", "delta", WRONG,
         (DELTA, "pair < 4; ++pair", "pair < 3; ++pair")),
    _bug("slices of features overlap", "scan_bf16_fold", "fold", WRONG,
         (TAYLOR, "(odd ? odd_in : in) ? (mine + odd * further)[f] : 0.f;",
          "mine[(f + odd * further) & (kColumns - 1)];")),
    _bug("products within the chunk in every slice", "scan_bf16_fold", "fold", WRONG,
         (SCAN, " && (!kFolded || slice == 0);", ";")),
    _bug("slope of the polynomial without its one", "scan_bf16_fold", "fold", WRONG,
         (TAYLOR, "p.polynomial_scale * (x + 1.f);", "p.polynomial_scale * x;")),
    _bug("the other entry's place taken for a neighbour", "scan_bf16_fold", "fold", WRONG,
         (TAYLOR, "b <= a ? 1 : run)", "1)")),
    # ---- decays beside Taylor features ----
    _bug("products of two entries counted twice", "scan_bf16_fold", "fold decays", WRONG,
         (TAYLOR, "own + sum[i], dot);", "2.f * sum[i], dot);")),
    _bug("the feature that is 1 left out", "scan_bf16_fold", "fold decays", WRONG,
         (TAYLOR, "    if (kLow == 0 && !odd) dot = mine[0];\n", "")),
    _bug("the polynomial without its square", "scan_bf16_fold", "fold decays", WRONG,
         (TAYLOR, "fmaf(fmaf(x, 0.5f, 1.f), x, 1.f), dot[e / 2]);", "x + 1.f, dot[e / 2]);")),
    _bug("every slice has what comes from the chunk", "scan_bf16_fold", "fold decays",
         "global write-write race", (SCAN, " && (!kFolded || slice == 0);", ";")),
    _bug("what features leave to the state after them left out", "decay_gradient", "fold decays",
         WRONG, (SUMS, "  sum += left;\n", "")),
    _bug("what meets is not decayed", "scan_bf16_fold", "fold decays", WRONG,
         (STATE, "sum = warp_sum(sum) * totals(stage).kept;", "sum = warp_sum(sum);")),
    _bug("states left after their chunk", "scan_bf16_fold", "fold decays", WRONG,
         *LATE_LEAVE),
    _bug("what comes from the chunk left out", "decay_gradient", "fold decays", WRONG,
         (SUMS, "s < p.num_dots; ++s)", "s < p.slices; ++s)")),
    _bug("features of c read while they are made", "scan_bf16_fold", "fold", "read-write race",
         (SCAN, "      expand_slice(c * kChunk, stage);\n      __syncthreads();\n",
          "      expand_slice(c * kChunk, stage);\n")),
    _bug("no order between the rows that fold", "scan_bf16_fold", "fold", "read-write race",
         (TAYLOR, "  __syncwarp();\n  // Two lanes a row", "  // Two lanes a row")),
    # ---- gradients of the delta rule ----
    _bug("outputs' gradients overwritten too early", "scan_bf16_32_delta_back", "delta gradients",
         "write-read race",
         (DELTA, "  __syncthreads();  // outputs' gradients have been read\n", "")),
    _bug("tokens read themselves", "scan_bf16_32_gated", "delta gradients", WRONG,
         (OUTPUTS, "warp * 16 + g - (kPullsBack && p.strict ? 1 : 0)", "warp * 16 + g")),
    # ---- values ----
    _bug("unit of the state's copy forgotten", "scan_fp16_32", "large", WRONG,
         (OUTPUTS, "kUnits ? by * units()[n / 2] : by;", "by;")),
    _bug("every slice stores the denominator", "scan_bf16_32", "wide", "global write-write race",
         (SCAN, "if (slice == 0 && t == 0 && is_token(row)) {", "if (t == 0 && is_token(row)) {")),
    _bug("gradient of features taken for that of entries", "scan_bf16_32_gated", "gradients", WRONG,
         (OUTPUTS, "p.raw.map, f);", "FeatureMap::kIdentity, f);")),
    _bug("columns of outputs that there are not", "scan_bf16_taylor", "taylor",
         "global write-write race", (OUTPUTS, " : 0, dim - column,", " : 0, dim,")),
    _bug("squares counted twice", "scan_bf16_taylor", "taylor", WRONG,
         (TAYLOR, "pair.a == pair.b ? kHalves + pair.a : pair.a", "pair.a")),
    _bug("squares counted twice where a scale rounds", "scan_bf16_taylor", "rounding scale", WRONG,
         (TAYLOR, "x[pair.a] * x[pair.a] * square;", "x[pair.a] * x[pair.a];")),
    _bug("a scale that rounds taken for one that does not", "scan_bf16_taylor", "rounding scale",
         WRONG, (TAYLOR, "if (p.exact_scale) {", "if (true) {"),
         (TAYLOR, "both(weighted ? p.polynomial_scale", "both(weighted ? 0.25f")),
    _bug("two numbers of a row the other way round", "scan_bf16_taylor", "taylor", WRONG,
         (TAYLOR, "__byte_perm(x[kLow / 2], x[kHigh / 2], kBytes);",
          "__byte_perm(x[kLow / 2], x[kHigh / 2], kBytes << 8 | kBytes >> 8);")),
    _bug("a lane's numbers of the state beside their place", "scan_bf16_32", "plain", WRONG,
         (STATE, "store_shared(block_of_state(n * 8, row), whole);",
          "store_shared(block_of_state(n * 8, row) ^ 16, whole);")),
    _bug("no mask on a warp's own rows", "scan_bf16_32", "plain", WRONG,
         (OUTPUTS, "n * 8 + 16 < walked) {", "n * 8 + 16 <= walked) {")),
]  # fmt: skip

# Of kernels that take long to compile.
SLOW_BUGS = [
    _bug("what comes from outputs with the wrong sign", "scan_bf16_32_delta_back",
         "delta gradients", WRONG, (DELTA, "= -out[0][n][e];", "= out[0][n][e];")),
    _bug("keys as readers have no part in the state", "scan_bf16_32_delta_back", "delta gradients",
         WRONG, (DELTA, "  add_products(stage, 0, 1.f, 1.f);\n", "")),
    _bug("queries in the place of keys", "scan_bf16_32_delta_back", "delta gradients", WRONG,
         (DELTA, "add_products(stage, 0, 1.f, 1.f);", "add_products(stage, 1, 1.f, 1.f);")),
    _bug("beta's gradient of the columns of one lane", "scan_bf16_32_delta_back",
         "delta gradients", WRONG, (DELTA, "    dot = quad_sum(dot);\n", "")),
    _bug("what is lacking already times beta", "scan_bf16_32_delta", "delta gradients", WRONG,
         (DELTA, "store_numbers<T>(p.lacking, at, e[0], one);",
          "store_numbers<T>(p.lacking, at, e[0], beta);")),
    _bug("a part of the keys' gradients too few", "fold_bf16", "delta gradients", WRONG,
         (SUMS, "s < p.slices; ++s) sum +=", "s < p.slices - 1; ++s) sum +=")),
    # ---- Taylor features of many entries ----
    _bug("parts read while they are made", "scan_bf16_taylor_wide", "entries", "read-write race",
         (SCAN, "      expand(c * kChunk, stage);\n      __syncthreads();\n",
          "      expand(c * kChunk, stage);\n")),
    _bug("products within the chunk in every part", "scan_bf16_taylor_wide", "entries", WRONG,
         (SCAN, "return sums() && part == 0", "return sums()")),
    _bug("every part has the first features", "scan_bf16_taylor_wide", "entries", WRONG,
         (TAYLOR, "is_token(at + row), part * kDim,", "is_token(at + row), 0,")),
    _bug("parts written to one place", "scan_bf16_taylor_wide", "entries",
         "global write-write race",
         (OUTPUTS, "part * p.batch * p.tokens * p.heads * static_cast<int64_t>(p.out.dim);", "0;")),
    _bug("sums written to one place", "scan_bf16_taylor_wide", "entries",
         "global write-write race",
         (SCAN, "p.part_sums[part * p.batch * p.tokens * p.heads + tokens", "p.part_sums[tokens")),
    _bug("more features than there are", "scan_bf16_taylor_wide", "entries",
         "global write out of bounds",
         (SCAN, "return f < 1 + dim * (dim + 3) / 2 ? f : -1;", "return f;")),
    _bug("squares of many counted twice", "scan_bf16_taylor_wide", "entries", WRONG,
         (TAYLOR, "        if (a == b) x *= square;\n", "")),
    _bug("a part too few in the denominator", "fold_bf16", "entries", WRONG,
         (SUMS, "s < p.slices; ++s) total +=", "s < p.slices - 1; ++s) total +=")),
    _bug("slice after slice in every slice", "scan_bf16_fold_wide", "entries fold",
         "global write-write race",
         (SCAN, " && (!kFolded || slice == 0);", ";")),
    _bug("many entries counted by half", "scan_bf16_fold_wide", "entries fold",
         WRONG, (TAYLOR, "    twice = fmaf(x[i], sum[i], twice);\n  }\n  int a",
                 "    twice = fmaf(x[i], 0.f, twice);\n  }\n  int a")),
    _bug("later entries of one lane", "scan_bf16_fold_wide", "entries fold", WRONG,
         (TAYLOR, "    own += __shfl_xor_sync(~0u, own, 16);\n", "")),
    _bug("no order before entries fold", "scan_bf16_fold_wide", "entries fold", "read-write race",
         (TAYLOR, "  __syncwarp();\n  const float* const mine", "  const float* const mine")),
    _bug("room overwritten while it is read", "scan_bf16_fold_wide", "entries fold",
         "write-read race",
         (TAYLOR, "from += kAtOnce) {\n    __syncwarp();\n", "from += kAtOnce) {\n")),
    _bug("slopes of squares halved", "scan_bf16_fold_wide", "entries fold", WRONG,
         (TAYLOR, "c == a ? other * square : other", "other")),
    _bug("runs of features too short", "scan_bf16_fold_wide", "entries fold", WRONG,
         (TAYLOR, "start += dim - a, ++a", "start += dim - a - 1, ++a")),
    _bug("features of the next slice", "scan_bf16_fold_wide", "entries fold",
         "read of unwritten shared memory",
         (TAYLOR, "0 <= f && f < kColumns ? mine[f] : 0.f;", "f < kColumns ? mine[abs(f)] : 0.f;")),
]  # fmt: skip
_LONG = ("entries", "entries fold")


def make(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    kind, _, more = PROBLEMS[name]
    tensors, options = form(kind, **more)
    if name == "not finite":
        tensors["value"][:, 21, :, 3] = torch.nan
    if name == "weak decays":
        tensors["decay"] *= 0.01
    if name == "strong decays":
        tensors["decay"].fill_(-8.0)
        tensors["query"] *= 4
        tensors["key"] = tensors["query"].clone()
    return tensors, options


def symptoms(name: str, bug: Bug | None = None) -> set[str]:
    """What is said of a problem with a bug in one kernel."""

    def find(kernel: str) -> Program:
        return lone(kernel, *bug.edits) if bug and kernel == bug.kernel else lone(kernel)

    grads = PROBLEMS[name][1]
    tensors, options = make(name)
    said, got = set(), None
    with on_executor(find=find) as recorder:
        try:
            got = evaluate(linear_attention, tensors, options, grads)
        except WrongRun:
            pass  # the last report says it
    for report in recorder.reports:
        said |= report.kinds()
    if bug:
        assert any(r.kernel == bug.kernel for r in recorder.reports)
    if got is not None:
        dtype = tensors["query"].dtype
        more_budget = slack(dtype, bool(options.get("normalize")), "beta" in tensors)
        right = {n: x.masked_fill(~x.isfinite(), 0.0) for n, x in expected(name).items()}
        for n, x in expected(name).items():
            got[n] = got[n].masked_fill(~x.isfinite() & ~got[n].isfinite(), 0.0)
        try:
            assert_close(got, right, BUDGET[dtype], more_budget)
        except AssertionError:
            said.add(WRONG)
    return said


@functools.cache
def expected(name: str) -> dict[str, Any]:
    found: dict[str, Any] = expect(*make(name), PROBLEMS[name][1])
    return found


def test_the_list_fits_the_sources() -> None:
    every = [*BUGS, *SLOW_BUGS]
    assert len({bug.name for bug in every}) == len(every)
    for bug in every:
        for edit in bug.edits:
            header_with(edit)


def _slow(items: list[Any], wide: Any) -> list[Any]:
    return [*items, *(pytest.param(x, marks=pytest.mark.heavy) for x in wide)]


@pytest.mark.parametrize("name", _slow([n for n in PROBLEMS if n not in _LONG], _LONG))
def test_nothing_is_said_without_a_bug(name: str) -> None:
    assert not symptoms(name)


@pytest.mark.parametrize("bug", _slow(BUGS, SLOW_BUGS), ids=lambda bug: bug.name)
def test_planted_bug_is_caught(bug: Bug) -> None:
    assert bug.symptom in symptoms(bug.problem, bug)
