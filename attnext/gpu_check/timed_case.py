# SPDX-License-Identifier: Apache-2.0
"""What a case to be timed has to tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD, TRAINING = "forward", "forward + backward"

Call = Callable[[Tensor, Tensor, Tensor], Tensor]  # of query, key, value with heads last
Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of batch item, head, query, key


class Unavailable(Exception):
    """A peer cannot take part; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Attention on random numbers. ``kv_heads``: 0 for as many as heads."""

    name: str
    tokens: tuple[int, ...]
    batch: int = 1
    heads: int = 8
    kv_heads: int = 0
    head_dim: int = 64
    dtype: str = "bfloat16"

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key it attends, over batch and heads."""
        raise NotImplementedError

    def mask(self, device: torch.device) -> Mask:
        """Who attends whom, as FlexAttention asks: tokens by their index in raster order."""
        raise NotImplementedError

    @property
    def contenders(self) -> Mapping[str, Callable[[torch.device], Call]]:
        """Makers of calls, attnext first; they raise :class:`Unavailable`."""
        raise NotImplementedError

    @property
    def others(self) -> frozenset[str]:
        """Contenders that compute something else, and are not held to attnext's result."""
        return frozenset()

    def flops(self, mode: str) -> float:
        """2 D a pair for q.k and for p.v; the backward pass has five such products."""
        return self.pairs * self.head_dim * (4.0 if mode == FORWARD else 14.0)

    def inputs(self, device: torch.device) -> list[Tensor]:
        """Query, key, value and the gradient of the output."""
        generator = torch.Generator().manual_seed(0)
        heads = (self.heads, self.kv_heads or self.heads)

        def normal(heads: int) -> Tensor:
            shape = (self.batch, *self.tokens, heads, self.head_dim)
            x = torch.randn(shape, generator=generator)
            return x.to(getattr(torch, self.dtype)).to(device)

        return [normal(n) for n in (heads[0], heads[1], heads[1], heads[0])]

    def describe(self) -> str:
        """In words."""
        heads = f"H{self.heads}" + (f" on {self.kv_heads}" if self.kv_heads else "")
        return f"B{self.batch} {heads} D{self.head_dim}, {self.dtype}"

    @property
    def num_tokens(self) -> int:
        return math.prod(self.tokens)


def heads_first(x: Tensor) -> Tensor:
    """``[batch, heads, tokens, dim]``, tokens on one axis."""
    return x.flatten(1, -3).transpose(1, 2)
