# SPDX-License-Identifier: Apache-2.0
"""The window kernels under the executor, through attnext's public functions.

Every launch is checked for accesses out of bounds, reads of what was not written and races; outputs
start as NaN and must be written whole; results are held to the float64 specification.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from strategies import Problem, lay_out, problems
from torch import Tensor

import attnext
from attnext import _C, reference
from attnext.testing import assert_within_budget, evaluate

from .window import DeviceTensor, on_executor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(op: str, tensors: dict[str, Tensor], options: dict[str, Any], grads: bool = True) -> Any:
    """Forward and backward within the budget; gives the reports."""
    generator = torch.Generator().manual_seed(1)
    query, value = tensors["query"], tensors["value"]
    shape = (*query.shape[:-1], value.shape[-1])
    cotangents = (
        torch.randn(shape, generator=generator).to(query.dtype),
        torch.randn(shape[:-1], generator=generator),
    )
    given_cotangents = cotangents if grads else None
    with on_executor(metrics=False) as recorder:
        results = evaluate(getattr(attnext, op), tensors, options, given_cotangents)
    assert_within_budget(results, getattr(reference, op), tensors, options, given_cotangents)
    return recorder.reports


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def qkv(
    extents: tuple[int, ...],
    dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    *,
    heads: int = 1,
    kv_heads: int | None = None,
    keys: tuple[int, ...] | None = None,
    dim_v: int | None = None,
) -> dict[str, Tensor]:
    kv = kv_heads or heads
    return {
        "query": normal(1, *extents, heads, dim, dtype=dtype, seed=1),
        "key": normal(1, *(keys or extents), kv, dim, dtype=dtype, seed=2),
        "value": normal(1, *(keys or extents), kv, dim_v or dim, dtype=dtype, seed=3),
    }


# ---- whatever may come ---------------------------------------------------------------------------


def check_problem(problem: Problem) -> None:
    with on_executor(metrics=False):
        results = evaluate(
            getattr(attnext, problem.op), problem.tensors, problem.options, problem.cotangents
        )
    assert_within_budget(
        results,
        getattr(reference, problem.op),
        problem.tensors,
        problem.options,
        problem.cotangents,
    )


@settings(max_examples=12)
@given(problems(dtypes=DTYPES))
def test_random_problems(problem: Problem) -> None:
    check_problem(problem)


@pytest.mark.heavy
@pytest.mark.sweep
@settings(max_examples=20)
@given(problems(dtypes=DTYPES, most=3))
def test_larger_random_problems(problem: Problem) -> None:
    check_problem(problem)


# ---- awkward sizes, every bucket -----------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 15, 63, 64, 65, 127, 128, 129])
def test_sequences_around_a_tile(tokens: int) -> None:
    check("sliding_window_attention", qkv((tokens,)), {"window_size": 33})


def test_bias_of_a_tile_with_rows_to_spare() -> None:
    """Rows that a tile lacks have no place in the table, in steps that all others attend too."""
    for dtype in (torch.float32, torch.bfloat16):
        tensors = qkv((10, 19), 8, dtype)
        tensors["bias"] = normal(1, 9, 19)
        check("window_attention", tensors, {"window_size": (12, 10), "shift": (17, 0)})


@pytest.mark.parametrize("extents", [(9, 7), (8, 8), (3, 17, 2), (17, 23)])
def test_boxes(extents: tuple[int, ...]) -> None:
    kernel = tuple(min(n, 5) for n in extents)
    check("neighborhood_attention", qkv(extents, 32), {"kernel_size": kernel})


@pytest.mark.parametrize(("kernel", "is_line"), [((1, 5), True), ((3, 5), False)])
def test_sequences_with_an_axis_to_spare(kernel: tuple[int, int], is_line: bool) -> None:
    """Of one token; keys of zeros beside it make several lines of the walk."""
    options = {"kernel_size": kernel, "boundary": "zero_pad"}
    reports = check("neighborhood_attention", qkv((1, 70)), options)
    assert reports[0].kernel == "window_forward_bf16_64" + ("_long" if is_line else "")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "dim_v"), [(16, 16), (30, 53), (64, 64), (128, 80), (256, 256)])
def test_every_bucket(dim: int, dim_v: int, dtype: torch.dtype) -> None:
    tensors = qkv((37,), dim, dtype, heads=2, kv_heads=1, dim_v=dim_v)
    check("sliding_window_attention", tensors, {"window_size": 12})
    tensors["sink_logits"] = normal(2)
    bias = normal(2, 2 * 12 - 1)
    check("sliding_window_attention", {**tensors, "bias": bias}, {"window_size": 12})


# ---- what options do -----------------------------------------------------------------------------


@pytest.mark.parametrize("boundary", ["inward", "truncate", "zero_pad"])
def test_boundaries_with_stride_dilation_and_causality(boundary: str) -> None:
    options = {
        "kernel_size": (4, 3),
        "stride": (2, 1),
        "dilation": (1, 3),
        "is_causal": (False, True),
        "boundary": boundary,
    }
    check("neighborhood_attention", qkv((10, 12), 16), options)


def test_every_modifier_at_once() -> None:
    tensors = qkv((40,), 32, heads=4, kv_heads=2)
    tensors |= {
        "additional_keys": normal(1, 3, 2, 32, dtype=torch.bfloat16),
        "additional_values": normal(1, 3, 2, 32, dtype=torch.bfloat16, seed=5),
        "sink_logits": normal(4),
        "alibi_slopes": normal(4).abs(),
        "bias": normal(4, 79),
        "scale": normal(1, 40, 4).abs(),
    }
    options = {"window_size": 9, "sinks": 2, "softcap": 5.0}
    check("sliding_window_attention", tensors, options)


def test_packed_sequences() -> None:
    tensors = qkv((70,), 32)
    tensors["cu_seqlens_q"] = torch.tensor([0, 5, 5, 48, 70], dtype=torch.int32)
    tensors["bias"] = normal(1, 139)
    check("sliding_window_attention", tensors, {"window_size": 20, "sinks": 1})


def test_heads_with_windows_of_their_own() -> None:
    tensors = qkv((50,), 32, heads=4, kv_heads=2)
    check("sliding_window_attention", tensors, {"window_size": [3, 50, (7, 0), 20]})


@pytest.mark.parametrize("layout", ["heads first", "cut out", "one for all"])
def test_strided_tensors(layout: str) -> None:
    tensors = {n: lay_out(x, layout) for n, x in qkv((45,), 40, heads=2).items()}
    check("sliding_window_attention", tensors, {"window_size": 11})


def test_large_logits() -> None:
    tensors = qkv((60,))
    tensors["query"] = tensors["query"] * 40
    check("sliding_window_attention", tensors, {"window_size": 50})


def test_swin_windows_are_full_steps() -> None:
    """Where a window is the whole of a tile's walk, nothing is masked but the last step."""
    check("window_attention", qkv((16, 16)), {"window_size": 8})


# ---- what a launch costs -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128])
def test_memory_is_moved_in_whole_sectors_without_conflicts(dtype: torch.dtype, dim: int) -> None:
    tensors = {n: x.requires_grad_() for n, x in qkv((192,), dim, dtype).items()}
    op: Any = attnext.sliding_window_attention
    with on_executor(metrics=True) as recorder:
        op(**tensors, window_size=64).sum().backward()
    for report in recorder.reports:
        assert report.conflicts_over_ideal() <= 1.02, report.kernel
        assert report.sectors_over_ideal() <= 1.05, report.kernel


def test_a_grid_has_one_dimension() -> None:
    """The others end at 65,535."""
    tensor = DeviceTensor(1 << 40, torch.bfloat16, (700, 1, 100, 64), (6400, 6400, 64, 1))
    lse = DeviceTensor(1 << 50, torch.float32, (700, 1, 100), (100, 100, 1))
    rules = [0, 0, 1, 0, 1, 0, 0, 0]
    problem: Any = (tensor, tensor, tensor, *(None,) * 7, rules, [], 0.125, 0.0, 0)
    (launch,) = _C.CudaForward(problem).launches(tensor, lse, 1 << 51, 0)
    assert launch["grid"] == 70_000


# ---- keys shared by blocks -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.125, -0.3])
def test_one_query_against_many_keys(dtype: torch.dtype, scale: float) -> None:
    tensors = qkv((1,), 64, dtype, heads=2, keys=(1500,))
    options = {"window_size": 1300, "sinks": 4, "scale": scale}
    reports = check("sliding_window_attention", tensors, options, grads=False)
    assert [r.kernel.split("_")[1] for r in reports] == ["forward", "merge"]


# ---- what is not finite --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_with_those_who_attend_it(dtype: torch.dtype) -> None:
    tensors = qkv((100,), 64, dtype)
    tensors["value"][0, 20, 0, 3] = torch.inf
    tensors["key"][0, 50, 0] = torch.nan
    tensors["value"][0, 80, 0] = torch.nan
    grad = normal(1, 100, 1, 64, dtype=dtype)

    def run() -> list[Tensor]:
        leaves = {n: x.detach().requires_grad_() for n, x in tensors.items()}
        op: Any = attnext.sliding_window_attention
        out, lse = op(**leaves, window_size=9, return_lse=True)
        return [out, lse, *torch.autograd.grad((out, lse), list(leaves.values()), (grad, lse * 0))]

    expected = run()
    with on_executor(metrics=False):
        results = run()
    for mine, other in zip(results, expected, strict=True):
        finite = torch.isfinite(other)
        assert torch.equal(torch.isfinite(mine), finite)
        assert 0 < finite.sum() < finite.numel()
        torch.testing.assert_close(mine[finite], other[finite], rtol=0.03, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_logits_of_minus_infinity_weigh_nothing(softcap: float | None, dtype: torch.dtype) -> None:
    """An infinite key: the gradient of the bias stays finite too."""
    tensors = qkv((40,), 16, dtype)
    tensors["query"].abs_()
    tensors["key"][0, 20, 0, 0] = -torch.inf
    tensors["bias"] = normal(1, 9)
    cotangents = normal(1, 40, 1, 16, dtype=dtype), normal(1, 40, 1)

    def run() -> dict[str, Tensor]:
        options = {"window_size": 5, "softcap": softcap}
        return evaluate(attnext.sliding_window_attention, tensors, options, cotangents)

    expected = run()
    with on_executor(metrics=False):
        results = run()
    assert expected["grad_bias"].isfinite().all()
    for name in ("out", "lse", "grad_bias"):
        torch.testing.assert_close(results[name], expected[name], rtol=0.03, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_sinks_that_are_not_finite(biased: bool, dtype: torch.dtype) -> None:
    """At -inf there is none: rows without keys stay empty. At inf a head's rows are NaN."""
    tensors = qkv((40,), 32, dtype, heads=3, keys=(30,))
    tensors["cu_seqlens_q"] = torch.tensor([0, 20, 40], dtype=torch.int32)
    tensors["cu_seqlens_k"] = torch.tensor([0, 0, 30], dtype=torch.int32)
    tensors["sink_logits"] = torch.tensor([-torch.inf, 0.5, torch.inf])
    if biased:
        tensors["bias"] = normal(3, 17)
        tensors["bias"][0] = -torch.inf
    cotangents = normal(1, 40, 3, 32, dtype=dtype), normal(1, 40, 3)

    def run() -> dict[str, Tensor]:
        return evaluate(attnext.sliding_window_attention, tensors, {"window_size": 9}, cotangents)

    expected = run()
    with on_executor(metrics=False):
        results = run()
    empty = slice(0, 40 if biased else 20)
    for name, value in {"out": 0, "lse": -torch.inf, "grad_query": 0}.items():
        assert (results[name][0, empty, 0] == value).all(), name
    assert results["out"][0, 20:, 2].isnan().all()

    def finite(x: Tensor) -> Tensor:  # of the other heads
        return x.movedim(2 if x.dim() > 2 else 0, 0)[:2]

    for name, x in results.items():
        torch.testing.assert_close(finite(x), finite(expected[name]), rtol=0.03, atol=0.03)


# ---- what the host plans -------------------------------------------------------------------------


def planned(extents: tuple[int, ...], kernel: Any) -> Any:
    """The tables of a forward pass."""
    shape = (1, *extents, 1, 64)
    strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    tensor = DeviceTensor(1 << 40, torch.bfloat16, shape, strides)
    rules = [field for k in kernel for field in (k // 2, k // 2 + k % 2 - 1, 1, 0, 1, 0, 0, 0)]
    modifiers, cu_seqlens = (None,) * 5, (None,) * 2
    problem: Any = (tensor, tensor, tensor, *modifiers, *cu_seqlens, rules, [], 0.125, 0.0, 0)
    return _C.CudaForward(problem).queries


@pytest.mark.parametrize(
    ("extents", "kernel", "share"),
    [
        ((64, 64), (13, 13), 0.45),
        ((56, 56), (7, 7), 0.25),
        ((30, 48, 80), (18, 24, 24), 0.75),
        ((21, 68, 120), (21, 31, 53), 0.95),
    ],
)
def test_boxes_drag_in_little(extents: tuple[int, ...], kernel: Any, share: float) -> None:
    """Of the products that tiles drag in, those wanted; whole steps take away a little more."""
    tables = planned(extents, kernel)
    assert tables.useful_pairs / tables.computed_pairs >= share


@pytest.mark.parametrize(
    ("op", "extents", "options", "share"),
    [
        ("sliding_window_attention", (1024,), {"window_size": 256}, 0.80),
        ("neighborhood_attention", (56, 56), {"kernel_size": 7}, 0.22),
        ("neighborhood_attention", (40, 40), {"kernel_size": 13}, 0.45),
    ],
)
def test_products_that_were_computed(
    op: str, extents: tuple[int, ...], options: dict[str, Any], share: float
) -> None:
    tensors = qkv(extents, 32)
    with on_executor(metrics=False, races=False) as recorder:
        getattr(attnext, op)(**tensors, **options)
    useful = attended_pairs(op, extents, options)
    flops = sum(r.instructions().get("mma", 0) for r in recorder.reports) * 2 * 16 * 8 * 16
    assert useful / (flops / (2 * 2 * 32)) >= share


def attended_pairs(op: str, extents: tuple[int, ...], options: dict[str, Any]) -> float:
    """exp(lse) of equal logits counts keys."""
    zeros = {n: torch.zeros(1, *extents, 1, 1) for n in ("query", "key", "value")}
    _, lse = getattr(attnext, op)(**zeros, **options, return_lse=True)
    return float(lse.double().exp().sum())
