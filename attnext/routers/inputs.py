# SPDX-License-Identifier: Apache-2.0
"""What the routers that search sequences share: checks, positions, bounded steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import (
    check_choice,
    check_flag,
    check_integer,
    check_sequences,
    check_tensor,
    finite_number,
    kind_of,
)
from ..ops import accumulator_dtype
from ..slices import slices

# Entries of the largest temporary on a CPU: routers go through their queries in steps that keep
# below it.
STEP_ENTRIES = 2**22

# Rotates [B, N, H, D] to positions int64 [N]. Scores of rotated queries and keys must depend on the
# difference of their positions alone.
Rotary = Callable[[Tensor, Tensor], Tensor]


def check_number(name: str, x: Any, low: float, high: float) -> None:
    if not low <= finite_number(name, x) <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {x}")


def check_indices(name: str, t: Any, shapes: tuple[tuple[int, ...], ...]) -> None:
    """An integer tensor of one of the shapes."""
    check_tensor(name, t, "an int32 or int64")
    if tuple(t.shape) not in shapes:
        allowed = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(f"{name} must have shape {allowed}, got {tuple(t.shape)}")


def steps(
    total: int, entries: int, device: torch.device, most: int | None = None
) -> Iterator[slice]:
    """Slices of ``range(total)``, of which each item costs ``entries`` temporary entries."""
    return slices(total, entries, STEP_ENTRIES, device, most)


def exact(t: Tensor) -> Tensor:
    """In the dtype that sums are taken in."""
    return t.to(accumulator_dtype(t.dtype))


class Rows:
    """Rows of ``[B, N, heads, D]`` by batch item, place and head: whole, where an index of three
    tensors would copy entry by entry, at a twentieth of the speed. No gradient."""

    def __init__(self, t: Tensor) -> None:
        t, dim = t.detach(), t.shape[-1]
        self.tokens, self.heads = t.shape[1:3]
        if t.numel() and (t.stride(3) != 1 or any(stride % dim for stride in t.stride()[:3])):
            t = t.contiguous()
        self._strides = [stride // dim for stride in t.stride()[:3]]
        last = sum((n - 1) * stride for n, stride in zip(t.shape, self._strides, strict=False))
        self.flat = t.as_strided((last + 1 if t.numel() else 0, dim), (dim, 1))

    def __call__(self, batch: Tensor, place: Tensor, head: Tensor) -> Tensor:
        """The rows at indices that broadcast against each other, ``[..., D]``."""
        b, n, h = self._strides
        return nn.functional.embedding(batch * b + place * n + head * h, self.flat)


def by_group(query: Tensor, key: Tensor) -> Tensor:
    """``[B, N, H, D]`` as ``[B, N, Hkv, G, D]``."""
    return query.unflatten(2, (key.shape[2], -1))


def check_rotary(rotary: Any) -> None:
    if rotary is not None and not callable(rotary):
        raise TypeError(f"rotary must be callable or None, got {kind_of(rotary)}")


def rotated(rotary: Rotary | None, x: Tensor, positions: Tensor) -> Tensor:
    """``x``, rotated if there is a rotation."""
    check_rotary(rotary)
    if rotary is None:
        return x
    turned = rotary(x, positions)
    if not isinstance(turned, Tensor) or turned.shape != x.shape or turned.dtype != x.dtype:
        given = (
            f"{turned.dtype} {tuple(turned.shape)}"
            if isinstance(turned, Tensor)
            else kind_of(turned)
        )
        raise ValueError(
            f"rotary must keep shape and dtype, {x.dtype} {tuple(x.shape)}, gave {given}"
        )
    return turned


__all__ = [
    "Rotary",
    "Rows",
    "by_group",
    "check_choice",
    "check_flag",
    "check_indices",
    "check_integer",
    "check_number",
    "check_rotary",
    "check_sequences",
    "exact",
    "rotated",
    "steps",
]
