# SPDX-License-Identifier: Apache-2.0
"""How much of the window kernels the problems of cover.py execute, and that they come out right.

The figures are printed (pytest -s). What is not executed must have a reason in cover.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnext import _C

from . import problems
from .cover import Variant, problems_of, unexplained
from .executor import Report
from .memory import Buffer, Memory
from .metrics import Execution
from .source import lone
from .window import DeviceTensor, put

LEAST = 0.98
BF16, FP32 = torch.bfloat16, torch.float32


SWEEP = [pytest.mark.heavy, pytest.mark.sweep]


def count(executions: dict[str, Execution], report: Report) -> None:
    """Adds a launch to those of its kernel."""
    ran = report.execution
    known = executions.setdefault(report.kernel, Execution.of(ran.function))
    known.lanes += ran.lanes
    known.issued += ran.issued


def executions_of(
    run: Callable[..., Any], makers: Mapping[str, Callable[[Any], Any]], variant: Any
) -> dict[str, Execution]:
    """By kernel, of all problems of a variant, which come out right."""
    executions: dict[str, Execution] = {}
    for name, make in makers.items():
        wrong, reports = run(make(variant), metrics=False)
        assert not wrong, (name, wrong)
        for report in reports:
            count(executions, report)
    return executions


def too_low(executions: Mapping[str, Execution], least: float) -> dict[str, float]:
    """Prints the shares; those below the least."""
    for kernel, execution in executions.items():
        print(f"{kernel:40} {len(execution.lanes):6} {execution.coverage():8.2%}")
    return {k: e.coverage() for k, e in executions.items() if e.coverage() < least}


each_variant = pytest.mark.parametrize(
    "variant",
    [
        Variant(BF16, False),
        Variant(BF16, True),
        pytest.param(Variant(FP32, True), marks=SWEEP),
        *(
            pytest.param(Variant(dtype, modified, bucket), marks=SWEEP)
            for dtype, modified in ((BF16, False), (BF16, True), (FP32, True))
            for bucket in (64, 128, 256)
        ),
    ],
    ids=lambda v: f"{str(v.dtype)[6:]}_{v.bucket}{'_modified' if v.modified else ''}",
)


@each_variant
def test_nearly_every_instruction_is_executed(variant: Variant) -> None:
    executions = executions_of(problems.run, problems_of(variant), variant)
    for block in (0, -1):
        count(executions, statistics_of_many_rows(variant.dtype, block)[0])
    if variant.modified:
        count(executions, sum_of_tables(FP32, 5)[0])
    low = too_low(executions, LEAST)
    left = {k: unexplained(k, e) for k, e in executions.items()}
    assert not any(left.values()), "\n".join(f"{k}: {x}" for k, some in left.items() for x in some)
    assert not low


# ---- launches that no small problem has ----------------------------------------------------------


def for_all(memory: Memory, name: str, x: Tensor, batch: int) -> DeviceTensor:
    """[tokens, ...] as [batch, tokens, 1, ...]: one item stands for all."""
    shown = put(memory, name, x)
    assert shown
    strides = (0, shown.strides[0], 0, *shown.strides[1:])
    shape = (batch, x.shape[0], 1, *x.shape[1:])
    return DeviceTensor(shown.address, x.dtype, shape, strides)


def launches(
    x: DeviceTensor, bias: DeviceTensor | None, workspace: int, *given: DeviceTensor
) -> list[dict[str, Any]]:
    """The backward pass of self attention in which every query attends itself."""
    rules = [0, 0, 1, 0, 1, 0, 0, 0]
    problem: Any = (x, x, x, None, bias, *(None,) * 5, rules, [], 0.25, 0.0, 0)
    grads = (x, x, x, None, bias, None, None, None)
    call: Any = _C.CudaBackward(problem)
    made: list[dict[str, Any]] = call.launches(1 << 51, 1 << 51, workspace, *given, grads)
    return made


def statistics_of_many_rows(dtype: torch.dtype, block: int) -> tuple[Report, Buffer, Tensor]:
    """One block of 2^33 rows: (report, what it wrote, lse and delta as they should be)."""
    generator, memory = torch.Generator().manual_seed(0), Memory()
    out, dout = (torch.randn(64, 16, generator=generator).to(dtype) for _ in range(2))
    lse, dlse = (torch.randn(64, generator=generator) for _ in range(2))
    given = [
        for_all(memory, name, x, 1 << 27)
        for name, x in (("out", out), ("lse", lse), ("dout", dout), ("dlse", dlse))
    ]
    rows = 128 // (16 * dtype.itemsize // 16)
    block %= (1 << 33) // rows
    wrote = memory.allocate("statistics", 16 * rows)
    workspace = (wrote.address - 16 * rows * block) % (1 << 64)
    launch = launches(given[0], None, workspace, *given)[0]
    report = lone(launch["kernel"]).launch(
        launch["kernel"], launch["grid"], launch["threads"], launch["params"], memory=memory,
        only=range(block, block + 1), metrics=False,
    )  # fmt: skip
    wanted = torch.stack([lse * np.log2(np.e), (out.double() * dout.double()).sum(1) - dlse], 1)
    return report, wrote, wanted[torch.arange(block * rows, (block + 1) * rows) % 64]


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("block", [0, 12345678, -1])
def test_rows_may_be_more_than_32_bits_count(dtype: torch.dtype, block: int) -> None:
    report, wrote, wanted = statistics_of_many_rows(dtype, block)
    report.check()
    got = torch.from_numpy(wrote.array(np.float32, (-1, 4)))[:, :2]
    torch.testing.assert_close(got.double(), wanted.double(), atol=2e-6, rtol=2e-6)


def sum_of_tables(dtype: torch.dtype, tiles: int) -> tuple[Report, Buffer, Buffer]:
    """(report, tables of a head's warps, their sum)"""
    memory, dim = Memory(), 200  # in fp32 a block is one warp
    x = DeviceTensor(1 << 40, dtype, (tiles, 1, 1, dim), (dim, dim, dim, 1))
    rows = DeviceTensor(1 << 40, FP32, (tiles, 1, 1), (1, 1, 1))
    total = memory.allocate("dbias", 4 * 131)
    bias = DeviceTensor(total.address, FP32, (1, 131), (131, 1))
    tables = np.random.default_rng(0).standard_normal(
        (tiles * (1 if dtype == FP32 else 4), 131), np.float32
    )
    partial = memory.buffer("tables", tables)
    launch = launches(x, bias, partial.address - 16 * tiles, x, rows, x, rows)[-1]
    report = lone(launch["kernel"]).launch(
        launch["kernel"], launch["grid"], launch["threads"], launch["params"], memory=memory,
        metrics=False,
    )  # fmt: skip
    return report, partial, total


@pytest.mark.parametrize(("dtype", "tiles"), [(FP32, 1), (FP32, 7), (BF16, 3)], ids=str)
def test_tables_of_the_bias_are_summed(dtype: torch.dtype, tiles: int) -> None:
    report, tables, total = sum_of_tables(dtype, tiles)
    report.check()
    wanted = tables.array(np.float32, (-1, 131)).astype(np.float64).sum(axis=0)
    np.testing.assert_allclose(total.array(np.float32), wanted, atol=1e-5)
