# SPDX-License-Identifier: Apache-2.0
"""Who attends whom, as plain values.

The rule of one axis is evaluated by the binary (``csrc/geometry.cpp``), the same code that the
kernels' tables come from; this module names its parameters and shows its results, for oracles,
pictures and planning. Key indices count inside a dilation class: index ``u`` of class ``c`` is the
key coordinate ``c + dilation * u``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from . import _C

BOUNDARIES = ("inward", "truncate", "zero_pad")
UNLIMITED = 2**40  # a window side that covers any axis


@dataclasses.dataclass(frozen=True)
class AxisRule:
    """The window rule of one token axis.

    Query ``i`` stands at key coordinate ``i + offset``, that is at index ``t`` of class ``c`` of
    its dilation. Queries are grouped into blocks of ``stride`` (the grid starts at ``phase``); a
    block shares one leader, and a window is ``left`` keys before the leader, the leader, and
    ``right`` after. ``is_causal`` ends the window at the query itself.

    Boundary: ``inward`` shifts a window that sticks out back into the axis, so that it keeps its
    size (neighborhood attention, arXiv 2204.07143 and 2504.16922); ``truncate`` cuts it (sliding
    windows, Swin tiles); ``zero_pad`` keeps the keys outside as phantoms with zero key and value
    (overlapping cross-attention, arXiv 2205.04437).
    """

    left: int
    right: int
    stride: int = 1
    phase: int = 0
    dilation: int = 1
    is_causal: bool = False
    boundary: str = "inward"
    offset: int = 0

    def __post_init__(self) -> None:
        if self.boundary not in BOUNDARIES:
            raise ValueError(f"boundary must be one of {BOUNDARIES}, got {self.boundary!r}")
        for name in ("stride", "dilation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.left < 0 or self.right < 0:
            raise ValueError(f"left and right must not be negative, got {self.left}, {self.right}")

    @classmethod
    def from_kernel_size(
        cls, kernel_size: int | tuple[int, int], *, is_causal: bool = False, **options: Any
    ) -> AxisRule:
        """A rule with ``kernel_size`` keys, self included, or ``(left, right)`` beside self."""
        if isinstance(kernel_size, tuple):
            left, right = kernel_size
        elif is_causal:
            left, right = kernel_size - 1, 0
        else:
            left, right = kernel_size // 2, kernel_size - 1 - kernel_size // 2
        return cls(left, right, is_causal=is_causal, **options)

    def fields(self) -> list[int]:
        """The rule as the binary takes it."""
        return [
            self.left,
            self.right,
            self.stride,
            self.phase,
            self.dilation,
            int(self.is_causal),
            BOUNDARIES.index(self.boundary),
            self.offset,
        ]


def axis_intervals(rule: AxisRule, num_queries: int, num_keys: int) -> list[tuple[int, int]]:
    """Per query the interval ``[begin, end)`` of key indices of its class that it attends."""
    return _C.axis_intervals(rule.fields(), num_queries, num_keys)


def inverse_intervals(rule: AxisRule, num_queries: int, num_keys: int) -> list[tuple[int, int]]:
    """Per key the range of positions, in its class's list of queries, that attend it.

    The query list of class ``c`` holds ``i = first, first + dilation, ...`` with
    ``(i + offset) mod dilation == c``.
    """
    return _C.inverse_intervals(rule.fields(), num_queries, num_keys)


def axis_mask(rule: AxisRule, num_queries: int, num_keys: int) -> torch.Tensor:
    """Bool ``[num_queries, num_keys]``: true where the query attends the (real) key."""
    intervals = torch.tensor(axis_intervals(rule, num_queries, num_keys)).reshape(-1, 2, 1)
    position = torch.arange(num_queries) + rule.offset
    key = torch.arange(num_keys)
    same_class = (position[:, None] - key[None]) % rule.dilation == 0
    index = key // rule.dilation
    return same_class & (index >= intervals[:, 0]) & (index < intervals[:, 1])


def dense_mask(
    rules: Sequence[AxisRule], query_extents: Sequence[int], key_extents: Sequence[int]
) -> torch.Tensor:
    """Bool ``[prod(query_extents), prod(key_extents)]`` over tokens in raster order."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    for rule, n_q, n_k in zip(rules, query_extents, key_extents, strict=True):
        axis = axis_mask(rule, n_q, n_k)
        mask = mask[:, None, :, None] & axis[None, :, None, :]
        mask = mask.reshape(mask.shape[0] * n_q, mask.shape[2] * n_k)
    return mask


def tile_plan(
    rules: Sequence[AxisRule],
    query_extents: Sequence[int],
    key_extents: Sequence[int],
    *,
    lanes: int | None = None,
    vectors: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """How the kernels would tile a problem.

    Returns ``box`` (queries of one vector, per axis), ``segments`` (per axis the runs
    ``(first query, count, first key index, end)``), ``num_tiles``, ``useful_pairs`` (pairs of a
    query and a key in its window), ``computed_pairs`` (pairs that the kernels multiply) and their
    ratio ``useful_fraction``. ``lanes`` and ``vectors`` default to the active instruction set's.
    """
    default_lanes, default_vectors = _C.lanes(str(dtype).removeprefix("torch."))
    plan = _C.tile_plan(
        [rule.fields() for rule in rules],
        list(query_extents),
        list(key_extents),
        lanes or default_lanes,
        vectors or default_vectors,
    )
    computed = plan["computed_pairs"]
    plan["useful_fraction"] = plan["useful_pairs"] / computed if computed else 1.0
    return plan
