# SPDX-License-Identifier: Apache-2.0
"""Problems that execute nearly every instruction of the window kernels, and why the rest is not.

A problem is tiny and awkward in several ways at once. Each is made for a variant of the kernels:
plain or with score modifiers, and of a dtype and a bucket of head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .problems import Problem, make


class Variant(NamedTuple):
    """Which kernels: those of a dtype, with or without score modifiers, of a bucket."""

    dtype: torch.dtype
    modified: bool
    bucket: int = 32

    def make(self, op: str, queries: list[int], keys: list[int] | None = None, **more: Any) -> Problem:
        """`dim` and `dim_v` are what a row lacks to the bucket."""
        dim, dim_v = self.bucket - more.pop("dim", 0), self.bucket - more.pop("dim_v", 0)
        reach = more.pop("reach", [max(q, k) for q, k in zip(queries, keys or queries, strict=True)])
        if self.modified:
            more = {"bias": reach, "row_scale": True, "softcap": 2.0, **more}
        return make(op, queries, keys, dim=dim, dim_v=dim_v, dtype=self.dtype, **more)


def not_finite(tensors: dict[str, Tensor]) -> None:
    """A key and a value of those that some queries attend, and an additional one."""
    tensors["key"].flatten(1, -3)[:, 1] = torch.nan
    tensors["value"].flatten(1, -3)[:, 3] = torch.inf
    if "additional_values" in tensors:
        tensors["additional_values"][:, -1, :1] = -torch.inf


def nobody(tensors: dict[str, Tensor]) -> None:
    """64 queries without keys, and as many keys without queries: tiles that have nothing to do."""
    tensors["cu_seqlens_q"] = torch.tensor([0, 64, 64, 70], dtype=torch.int32)
    tensors["cu_seqlens_k"] = torch.tensor([0, 0, 64, 70], dtype=torch.int32)


Maker = Callable[[Variant], Problem]


def _sliding(*shape: list[int], **options: Any) -> Maker:
    return lambda variant: variant.make("sliding_window_attention", *shape, **options)


def _neighborhood(*shape: list[int], **options: Any) -> Maker:
    return lambda variant: variant.make("neighborhood_attention", *shape, **options)


PROBLEMS: dict[str, Maker] = {
    # several steps, of which some are full and some are skipped
    "sequence": _sliding([140], window_size=70, heads=2, kv_heads=1, sinks=3, extra=2),
    "part of a row": _sliding([140], window_size=120, dim=8, dim_v=16, sinks=3, extra=140,
                              sink_logits=True),
    "boxes": _neighborhood([4, 14, 5], kernel_size=3, dim=8, dim_v=16),
    "no step": _sliding([70], [70], window_size=30, edit=nobody),
    # rows that are copied from their addresses
    "far": _neighborhood([9, 10], kernel_size=5, boundary="zero_pad", dim=8, extra=140),
    "far, unaligned": _sliding([40], window_size=6, dim=2, dim_v=3, extra=140, sinks=2),
    # a row by a warp
    "alone": _sliding([12], window_size=6, sinks=2, sink_logits=True, heads=2, kv_heads=1, extra=1,
                      edit=not_finite),
    "alone, boxes": _neighborhood([3, 4], kernel_size=3, boundary="zero_pad", dim=2, extra=1,
                                  edit=not_finite),
    # a walk by several blocks
    "parts": _sliding([1], [1100], window_size=None, backward=False),
    "parts, alone": _sliding([1], [900], window_size=None, sink_logits=True, extra=2, edit=not_finite,
                             backward=False),
    "parts of boxes": _neighborhood([24, 24], kernel_size=24, backward=False),
}  # fmt: skip
