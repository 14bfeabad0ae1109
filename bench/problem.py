# SPDX-License-Identifier: Apache-2.0
"""A case made flesh: its tensors, and what a contender turns them into."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from attnext import linear_attention

from .cases import Case, LinearStepCase

#: Share of the free memory that a contender may ask for before it is told to stay out.
MEMORY_SHARE = 0.6


class Unavailable(Exception):
    """A contender cannot take part; the text says why."""


def free_bytes() -> int:
    """Memory that can still be had, in bytes."""
    try:
        psutil = importlib.import_module("psutil")
    except ImportError:  # counts no cache that could be dropped: too careful rather than too bold
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(psutil.virtual_memory().available)


@dataclass(frozen=True)
class Problem:
    """Tensors of a case, heads last. The same seed gives every contender the same numbers."""

    case: Case
    dtype: torch.dtype
    seed: int = 0

    def _random(self, salt: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + salt)
        return torch.randn(*shape, generator=generator).to(self.dtype)

    @cached_property
    def query(self) -> Tensor:
        c = self.case
        return self._random(1, c.batch, *c.queries, c.heads, c.head_dim)

    @cached_property
    def key(self) -> Tensor:
        c = self.case
        return self._random(2, c.batch, *c.key_extents, c.key_heads, c.head_dim)

    @cached_property
    def value(self) -> Tensor:
        c = self.case
        return self._random(3, c.batch, *c.key_extents, c.key_heads, c.value_dim)

    @cached_property
    def output_grad(self) -> Tensor:
        return self._random(4, *self.query.shape[:-1], self.case.value_dim)

    @property
    def state(self) -> Tensor:
        """What 64 tokens have left for a step; anew each time, since steps write into it."""
        c = self.case
        assert isinstance(c, LinearStepCase)
        key = self._random(6, c.batch, 64, c.heads, c.head_dim).float()
        value = self._random(7, c.batch, 64, c.heads, c.head_dim_v).float()
        state: Tensor
        _, state = linear_attention(
            key, key, value, feature_map=c.feature_map, normalize=c.normalize,
            output_final_state=True,
        )  # fmt: skip
        return state

    @cached_property
    def bias(self) -> Tensor | None:
        """Relative table ``[H, 2 e - 1, ...]``, ``e`` the largest reach of a window plus one."""
        if not self.case.bias or self.case.window is None:
            return None
        return self._random(5, self.case.heads, *(2 * size - 1 for size in self.case.window))

    @cached_property
    def alibi_slopes(self) -> Tensor | None:
        if not self.case.alibi:
            return None
        heads = self.case.heads
        return 2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=torch.float32) / heads)

    def afford(self, what: str, elements: float) -> None:
        """Raise Unavailable if ``elements`` numbers of the problem's dtype would not fit."""
        need = elements * self.dtype.itemsize
        free = free_bytes()
        if need > MEMORY_SHARE * free:
            raise Unavailable(
                f"{what} would take {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            )

    def refuse_grouped_heads(self) -> None:
        if self.case.key_heads != self.case.heads:
            raise Unavailable("has no form for fewer key heads than query heads")

    def refuse_options(self, *names: str) -> None:
        """Raise Unavailable if the case asks for an option that a contender lacks."""
        options = {
            "bias": self.case.bias,
            "alibi": self.case.alibi,
            "softcap": self.case.softcap is not None,
            "sinks": self.case.sinks > 0,
        }
        lacking = [name for name in names if options[name]]
        if lacking:
            raise Unavailable(f"has no {' or '.join(lacking)}")


@dataclass(frozen=True)
class Layout:
    """How a contender wants a tensor, and the way back to heads last.

    The conversion is a gift: it is not timed, since a model built around the contender would keep
    its tensors that way.
    """

    arrange: Callable[[Tensor], Tensor]
    restore: Callable[[Tensor], Tensor]


AS_IS = Layout(lambda t: t, lambda t: t)


def heads_first(extents: tuple[int, ...]) -> Layout:
    """``[B, *extents, H, D]`` as ``[B, H, N, D]``, contiguous."""
    return Layout(
        lambda t: t.flatten(1, -3).transpose(1, 2).contiguous(),
        lambda t: t.transpose(1, 2).unflatten(1, extents),
    )


def permuted(layout: Layout, order: Tensor, extents: tuple[int, ...]) -> Layout:
    """``layout`` over tokens taken in ``order`` (raster indices)."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))

    def arrange(t: Tensor) -> Tensor:
        return layout.arrange(t.flatten(1, -3)[:, order].unflatten(1, extents))

    def restore(t: Tensor) -> Tensor:
        return layout.restore(t).flatten(1, -3)[:, inverse].unflatten(1, extents)

    return Layout(arrange, restore)


@dataclass(frozen=True)
class Prepared:
    """A contender ready to run: everything that one computes once is done."""

    call: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    layouts: dict[str, Layout]
    detail: str = ""
    searching: float = 0.0  # seconds of a routed method's search alone
    output_grad: Tensor | None = field(default=None)

    def arm(self, output_grad: Tensor) -> Prepared:
        """The same, for training, with the gradient of the output given heads last."""
        return replace(self, output_grad=self.layouts["out"].arrange(output_grad))

    def step(self) -> tuple[Tensor, ...]:
        """One call; if armed, followed by its backward pass. Own layouts, ``out`` first."""
        if self.output_grad is None:
            with torch.no_grad():
                return (self.call(),)
        out = self.call()
        return (out, *torch.autograd.grad(out, list(self.leaves.values()), self.output_grad))

    def results(self) -> dict[str, Tensor]:
        """What ``step`` returns, heads last and by name."""
        names = ["out", *self.leaves]
        step = [t.detach() for t in self.step()]
        return {
            name: self.layouts[name].restore(t)
            for name, t in zip(names[: len(step)], step, strict=True)
        }


def leaves_of(
    problem: Problem, training: bool, query: Layout, key: Layout, bias: Layout = AS_IS
) -> tuple[dict[str, Tensor], dict[str, Layout]]:
    """The tensors that gradients are asked of, arranged; and their layouts, with the output's."""
    layouts = {"query": query, "key": key, "value": key}
    tensors = {"query": problem.query, "key": problem.key, "value": problem.value}
    if problem.bias is not None:
        tensors["bias"], layouts["bias"] = problem.bias, bias
    leaves = {
        name: layouts[name].arrange(tensor).detach().requires_grad_(training)
        for name, tensor in tensors.items()
    }
    return leaves, {**layouts, "out": query}
