# SPDX-License-Identifier: Apache-2.0
"""Holds rows of a run's own outputs against ``attnext.reference`` in float64.

The whole dense oracle would not fit, so rows are taken where rules differ: corners, edges, middle.
A box of queries is given to the reference with the offset at which it stands, which makes it the
same question as the box's rows of the whole problem.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnext.demo.data import Inputs
from attnext.testing import error_budget


@dataclass(frozen=True)
class Check:
    """Largest error against float64 and how much of ``attnext.testing.error_budget`` it used up."""

    error: float
    used: float
    rows: int

    @property
    def passed(self) -> bool:
        """Whether all results are within their budgets; NaN is not."""
        return self.used <= 1.0


@dataclass(frozen=True)
class Box:
    """Queries ``start .. start + size`` on each axis."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """The box's part of ``[B, *tokens, ...]``."""
        spans = [slice(a, a + n) for a, n in zip(self.start, self.size, strict=True)]
        return tensor[(slice(None), *spans)]

    @property
    def rows(self) -> int:
        """Number of queries."""
        return int(torch.Size(self.size).numel())


def boxes(extents: Sequence[int], side: int = 4) -> list[Box]:
    """First corner, last corner, middle, and the two mixed corners of first and last axis."""
    size = tuple(min(side, n) for n in extents)
    low = tuple(0 for _ in extents)
    high = tuple(n - s for n, s in zip(extents, size, strict=True))
    middle = tuple(n // 2 for n in high)
    starts = {low, high, middle, low[:1] + high[1:], high[:1] + low[1:]}
    return [Box(start, size) for start in sorted(starts)]


Oracle = Callable[[Box, Inputs, torch.dtype], Tensor]

SAMPLES = 2


def _rows(tensor: Tensor, chosen: Sequence[Box]) -> Tensor:
    """The elements of all boxes, in one line."""
    return torch.cat([box.of(tensor).flatten() for box in chosen])


def _oracle_rows(oracle: Oracle, data: Inputs, dtype: torch.dtype, chosen: Sequence[Box]) -> Tensor:
    return torch.cat([oracle(box, data, dtype).flatten() for box in chosen])


def _share(error: float, budget: float) -> float:
    """Of a budget, which is 0 where all values are, as those of a black image may be."""
    if budget == 0:
        return 0.0 if error == 0 else math.inf
    return error / budget


def compare(
    results: Sequence[tuple[Tensor, Tensor, Oracle]], data: Inputs, chosen: Sequence[Box]
) -> Check:
    """The check of one or more results, each ``(actual, torch's, oracle)``, on the chosen boxes.

    An oracle computes a box of its result from inputs like `data` at a given precision. What the
    budget is made of is the oracle's own result in float32, from `data` and from the same moved by
    a rounding, and torch's; half precision is held to float32 arithmetic alone.
    """
    compute = torch.float64 if data.query.dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(4)

    def moved(x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return (x.double() * (1 + torch.finfo(compute).eps * noise)).to(compute)

    tensors = (data.query, data.key, data.value)
    variants = [Inputs(*(t.to(compute) for t in tensors))]
    variants += [Inputs(*(moved(t) for t in tensors)) for _ in range(SAMPLES)]
    rows = sum(box.rows for box in chosen)
    worst = Check(0.0, 0.0, rows)
    for actual, other, oracle in results:
        exact = _oracle_rows(oracle, data, torch.float64, chosen)
        plain = [_oracle_rows(oracle, x, compute, chosen).to(actual.dtype) for x in variants]
        if actual.dtype == compute:
            plain.append(_rows(other, chosen))
        error = _rows(actual, chosen).double() - exact
        budget = error_budget(exact, plain, actual.dtype)
        largest = error.abs().max().item()
        used = max(
            _share(largest, budget["largest"]),
            _share(error.square().mean().sqrt().item(), budget["root-mean-square"]),
        )
        if not used <= worst.used:  # NaN is the worst
            worst = Check(largest, used, rows)
            if not used <= 1.0:
                break
    return worst
