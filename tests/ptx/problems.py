# SPDX-License-Identifier: Apache-2.0
"""Small problems that together reach every part of attnext's CUDA kernels, and what a run of one on
the executor says: findings, and results outside attnext.testing's budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import attnext
from attnext import reference
from attnext.testing import assert_within_budget, evaluate

from .executor import Program, Report, WrongRun
from .parser import PtxError
from .source import lone
from .window import on_executor

Edit = Callable[[dict[str, Tensor]], None]
WRONG = "wrong result"


@dataclass(frozen=True)
class Problem:
    """A call of a public function, and cotangents of out and lse; without them forward only."""

    op: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    cotangents: tuple[Tensor, Tensor] | None


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def cut_out(x: Tensor, spare: int) -> Tensor:
    """The same values in rows with unwritten numbers behind them."""
    whole = torch.full((*x.shape[:-1], x.shape[-1] + spare), torch.nan, dtype=x.dtype)
    whole[..., : x.shape[-1]] = x
    return whole[..., : x.shape[-1]]


def make(
    op: str,
    queries: Sequence[int],
    keys: Sequence[int] | None = None,
    *,
    heads: int = 1,
    kv_heads: int | None = None,
    batch: int = 1,
    dim: int = 32,
    dim_v: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    extra: int = 0,
    sink_logits: bool = False,
    bias: Sequence[int] = (),
    row_scale: bool = False,
    spare: int = 0,
    backward: bool = True,
    edit: Edit = lambda tensors: None,
    **options: Any,
) -> Problem:
    """`bias`: reach of the table on each axis. `edit` changes the tensors in place."""
    keys, kv_heads, dim_v = keys or queries, kv_heads or heads, dim_v or dim
    tensors = {
        "query": normal(batch, *queries, heads, dim, dtype=dtype, seed=1),
        "key": normal(batch, *keys, kv_heads, dim, dtype=dtype, seed=2),
        "value": normal(batch, *keys, kv_heads, dim_v, dtype=dtype, seed=3),
    }
    if extra:
        tensors["additional_keys"] = normal(batch, extra, kv_heads, dim, dtype=dtype, seed=4)
        tensors["additional_values"] = normal(batch, extra, kv_heads, dim_v, dtype=dtype, seed=5)
    if sink_logits:
        tensors["sink_logits"] = normal(heads, seed=6)
    if bias:
        tensors["bias"] = normal(heads, *(2 * e + 1 for e in bias), seed=7)
    if row_scale:
        tensors["scale"] = normal(batch, *queries, heads, seed=8).abs() * dim**-0.5
    edit(tensors)
    if spare:
        for name in ("query", "key", "value"):
            tensors[name] = cut_out(tensors[name], spare)
    dout = normal(batch, *queries, heads, dim_v, dtype=dtype, seed=9)
    if spare:
        dout = cut_out(dout, 2 * spare)
    cotangents = dout, normal(batch, *queries, heads, seed=10)
    return Problem(op, tensors, options, cotangents if backward else None)


def growing(tensors: dict[str, Tensor]) -> None:
    """Keys whose logits grow along the walk: what was summed has to be brought down."""
    count = tensors["key"].shape[1]
    tensors["key"] *= torch.linspace(0.3, 12, count).view(1, -1, 1, 1).to(tensors["key"].dtype)


def infinite_value(tensors: dict[str, Tensor]) -> None:
    """One row of values is infinite: only the queries that attend it may become so."""
    tensors["value"].flatten(1, -3)[:, 3] = torch.inf


def run(
    problem: Problem, find: Callable[[str], Program] = lone, **options: Any
) -> tuple[set[str], list[Report]]:
    """(what is wrong: kinds of findings, WRONG; the reports of the launches, up to a wrong one)."""
    function = getattr(attnext, problem.op)
    return findings(
        on_executor(find=find, **options),
        lambda: evaluate(function, problem.tensors, problem.options, problem.cotangents),
        lambda results: within_budget(problem, results),
    )


def findings(
    executor: AbstractContextManager[Any],
    call: Callable[[], dict[str, Tensor]],
    is_right: Callable[[dict[str, Tensor]], bool],
) -> tuple[set[str], list[Report]]:
    """What a call on the executor, whose recorder it enters with, says: as :func:`run`."""
    wrong: set[str] = set()
    results = None
    with executor as recorder:
        try:
            results = call()
        except WrongRun:
            pass  # the last report says it
        except AssertionError as error:
            if "not all was written" not in str(error):
                raise
            wrong.add(WRONG)
        except PtxError:
            wrong.add("does not end")
    for report in recorder.reports:
        wrong |= report.kinds()
    if results is not None and not is_right(results):
        wrong.add(WRONG)
    reports: list[Report] = recorder.reports
    return wrong, reports


def within_budget(problem: Problem, results: dict[str, Tensor]) -> bool:
    if not all(x.isfinite().all() for x in problem.tensors.values()):
        return like_the_cpu(problem, results)
    try:
        assert_within_budget(
            results,
            getattr(reference, problem.op),
            problem.tensors,
            problem.options,
            problem.cotangents,
        )
    except AssertionError:
        return False
    return True


def like_the_cpu(problem: Problem, results: dict[str, Tensor]) -> bool:
    """Where something is not finite: the dense reference would carry it to all rows by a weight of
    0, the kernels for the CPU do not."""
    wanted = evaluate(
        getattr(attnext, problem.op), problem.tensors, problem.options, problem.cotangents
    )

    return close_to(wanted, results)


def close_to(wanted: dict[str, Tensor], results: dict[str, Tensor]) -> bool:
    def close(name: str, x: Tensor) -> bool:
        mine = results[name].float()
        return torch.allclose(mine, x.float(), atol=3e-2, rtol=3e-2, equal_nan=True)

    return all(close(name, x) for name, x in wanted.items())
