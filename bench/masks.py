# SPDX-License-Identifier: Apache-2.0
"""The window of a case in the forms that the peers eat: masks, additive scores, boxes of keys.

Everything here is read off the interval tables of ``attnext.geometry``; no rule is stated again.
(The gate does not use this file: it asks ``attnext.reference``.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .cases import Case
from .problem import Problem


@dataclass(frozen=True)
class Axis:
    """One axis as tables over its coordinates: a query's class and interval, a key's class and
    index in it. A query attends a key of its own class whose index lies in the interval."""

    query_class: Tensor
    begin: Tensor
    end: Tensor
    key_class: Tensor
    key_index: Tensor
    position: Tensor  # of a query, in key coordinates

    @classmethod
    def of(cls, case: Case, a: int) -> Axis:
        dilation, offset = case.axes[a]["dilation"], case.axes[a]["offset"]
        bounds = torch.tensor(case.intervals[a])
        position = torch.arange(case.queries[a]) + offset
        keys = torch.arange(case.key_extents[a])
        return cls(
            position % dilation,
            bounds[:, 0],
            bounds[:, 1],
            keys % dilation,
            keys.div(dilation, rounding_mode="floor"),
            position,
        )

    def mask(self, i: Tensor, j: Tensor) -> Tensor:
        """Who attends whom, elementwise over query coordinates ``i`` and key coordinates ``j``."""
        u = self.key_index[j]
        same = self.query_class[i] == self.key_class[j]
        return same & (self.begin[i] <= u) & (u < self.end[i])


class Masks:
    """Masks over tokens (raster indices) of a problem, any broadcastable set of pairs at a time."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.case = problem.case
        self.axes = [Axis.of(self.case, a) for a in range(self.case.rank)]

    @cached_property
    def query_coordinates(self) -> tuple[Tensor, ...]:
        return _coordinates(self.case.queries)

    @cached_property
    def key_coordinates(self) -> tuple[Tensor, ...]:
        return _coordinates(self.case.key_extents)

    def mask(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether query token ``i`` attends key token ``j``."""
        result = torch.ones((), dtype=torch.bool)
        for axis, x, y in zip(self.axes, self.query_coordinates, self.key_coordinates, strict=True):
            result = result & axis.mask(x[i], y[j])
        if self.case.sinks:
            result = result | ((j < self.case.sinks) & (j <= self.axes[0].position[i]))
        return result

    def scores(self, i: Tensor, j: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
        """What is added to the logits of the pairs, ``-inf`` where the mask forbids.

        Shapes: ``i``, ``j`` and ``mask`` broadcast to ``[*P]``; result ``[*P]``, or ``[H, *P]``
        with ALiBi or a bias table. Differentiable in ``bias``.
        """
        forbidden = torch.zeros((), dtype=self.problem.dtype).masked_fill(~mask, -float("inf"))
        if self.problem.alibi_slopes is not None:
            slopes = self.problem.alibi_slopes.view(-1, *[1] * mask.dim())
            forbidden = forbidden - (slopes * self.distance(i, j)).to(forbidden.dtype)
        if bias is not None:
            forbidden = forbidden + bias.flatten(1)[:, self.bias_index(i, j, mask)]
        return forbidden

    def distance(self, i: Tensor, j: Tensor) -> Tensor:
        """Tokens between query and key, summed over the axes."""
        result = torch.zeros((), dtype=torch.int64)
        for axis, x, y in zip(self.axes, self.query_coordinates, self.key_coordinates, strict=True):
            result = result + (y[j] - axis.position[x[i]]).abs()
        return result

    def bias_index(self, i: Tensor, j: Tensor, mask: Tensor) -> Tensor:
        """Place of the pairs in the flattened bias table; 0 where the mask forbids."""
        result = torch.zeros((), dtype=torch.int64)
        assert self.case.window is not None
        for a, size in enumerate(self.case.window):
            x, y = self.query_coordinates[a][i], self.key_coordinates[a][j]
            steps = (y - self.axes[a].position[x]).div(self.case.dilation, rounding_mode="floor")
            result = result * (2 * size - 1) + steps + size - 1
        return result.where(mask, 0)


def _coordinates(extents: tuple[int, ...]) -> tuple[Tensor, ...]:
    grid = torch.meshgrid(*(torch.arange(n) for n in extents), indexing="ij")
    return tuple(axis.flatten() for axis in grid)
