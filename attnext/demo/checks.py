# SPDX-License-Identifier: Apache-2.0
"""Holds rows of a run's own outputs against ``attnext.reference`` in float64.

The whole dense oracle would not fit, so rows are taken where rules differ: corners, edges, middle.
A box of queries is given to the reference with the offset at which it stands, which makes it the
same question as the box's rows of the whole problem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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


Oracle = Callable[[Inputs, torch.dtype], Tensor]


def compare(pairs: Iterable[tuple[Tensor, Oracle]], data: Inputs, rows: int) -> Check:
    """The check over several ``(actual, oracle)`` pairs.

    An oracle computes its rows from inputs like `data` at a given precision. The plain results that
    the budget is made of are its own in float32 (half precision is held to that, too), from `data`
    and from the same moved by a rounding.
    """
    compute = torch.float64 if data.query.dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(4)

    def moved(x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return (x.double() * (1 + torch.finfo(compute).eps * noise)).to(compute)

    wide = Inputs(*(t.to(compute) for t in (data.query, data.key, data.value)))
    variants = [wide] + [
        Inputs(*(moved(t) for t in (data.query, data.key, data.value))) for _ in range(2)
    ]
    worst = Check(0.0, 0.0, rows)
    for actual, oracle in pairs:
        exact = oracle(data, torch.float64)
        plain = [oracle(inputs, compute).to(actual.dtype) for inputs in variants]
        error = actual.double() - exact
        budget = error_budget(exact, plain, actual.dtype)
        largest = error.abs().max().item()
        used = max(
            largest / budget["largest"],
            error.square().mean().sqrt().item() / budget["root-mean-square"],
        )
        if not used <= worst.used:  # NaN is the worst
            worst = Check(largest, used, rows)
            if not used <= 1.0:
                break
    return worst
