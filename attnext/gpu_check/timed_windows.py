# SPDX-License-Identifier: Apache-2.0
"""Windows to be timed, and their peers: torch's SDPA with a mask, FlashAttention-2 as torch has it
(its local windows), FlexAttention, NATTEN."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import attnext
from attnext.geometry import AxisRule, axis_intervals, dense_mask

from .timed_case import Call, Case, Mask, Unavailable, heads_first

LARGEST_MASK = 2**29  # entries


@dataclass(frozen=True, kw_only=True)
class WindowCase(Case):
    """``op``: sliding (causal), neighborhood or window, as the public functions have them."""

    op: str
    window: tuple[int, ...]
    dilation: int = 1
    shift: int = 0

    @functools.cached_property
    def rules(self) -> tuple[AxisRule, ...]:
        if self.op == "sliding":
            return tuple(
                AxisRule.from_kernel_size(w, is_causal=True, boundary="truncate")
                for w in self.window
            )
        if self.op == "window":
            return tuple(
                AxisRule(w // 2, w - 1 - w // 2, w, self.shift, boundary="truncate")
                for w in self.window
            )
        return tuple(AxisRule.from_kernel_size(w, dilation=self.dilation) for w in self.window)

    @functools.cached_property
    def pairs(self) -> int:
        """Pairs of a query and a key it attends, over batch and heads."""
        counts = (
            sum(end - begin for begin, end in axis_intervals(rule, n, n))
            for rule, n in zip(self.rules, self.tokens, strict=True)
        )
        return self.batch * self.heads * math.prod(counts)

    def mask(self, device: torch.device) -> Mask:
        axes = []
        step = self.num_tokens
        for rule, n in zip(self.rules, self.tokens, strict=True):
            step //= n
            begin, end = torch.tensor(axis_intervals(rule, n, n), device=device).unbind(-1)
            axes.append((step, n, rule.dilation, begin, end))

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            inside = i >= 0
            for step, n, dilation, begin, end in axes:
                x, y = i // step % n, j // step % n
                if dilation > 1:
                    inside = inside & (x % dilation == y % dilation)
                    y = y // dilation
                inside = inside & (begin[x] <= y) & (y < end[x])
            return inside

        return mask

    @property
    def contenders(self) -> Mapping[str, Callable[[torch.device], Call]]:
        return {name: functools.partial(make, self) for name, make in CONTENDERS.items()}

    def describe(self) -> str:
        words = [self.op, "x".join(map(str, self.tokens)), "x".join(map(str, self.window))]
        words += [f"dilation {self.dilation}"] if self.dilation > 1 else []
        words += [f"shift {self.shift}"] if self.shift else []
        return ", ".join([*words, super().describe()])


# ---- contenders: functions of query, key, value with heads last ----------------------------------


def _attnext(case: WindowCase, device: torch.device) -> Call:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if case.op == "sliding":
            out: Tensor = attnext.sliding_window_attention(q, k, v, case.window[0])
        elif case.op == "window":
            out = attnext.window_attention(q, k, v, case.window, case.shift)
        else:
            out = attnext.neighborhood_attention(q, k, v, case.window, dilation=case.dilation)
        return out

    return call


def _sdpa(case: WindowCase, device: torch.device) -> Call:
    """Dense: every query against every key, the window as a mask made beforehand."""
    if case.num_tokens**2 > LARGEST_MASK:
        raise Unavailable("its mask would not fit")
    mask = dense_mask(case.rules, case.tokens, case.tokens).to(device)
    added = torch.zeros(mask.shape, dtype=getattr(torch, case.dtype), device=device)
    added.masked_fill_(~mask, -math.inf)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = map(heads_first, (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=added, enable_gqa=case.kv_heads > 0
        )
        return out.transpose(1, 2).unflatten(1, case.tokens)

    return call


def _flash(case: WindowCase, device: torch.device) -> Call:
    """FlashAttention-2 with its own local window, by the operator under torch's SDPA."""
    if case.op != "sliding":
        raise Unavailable("has windows on one axis only")
    n, window = case.tokens[0], case.window[0]
    left = window - 1 if window < n else -1

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, n, n, 0.0, True, False, scale=case.head_dim**-0.5,
            window_size_left=left, window_size_right=0,
        )[0]  # fmt: skip
        return out

    return call


def _flex(case: WindowCase, device: torch.device) -> Call:
    """Compiled, tokens in raster order."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n = case.num_tokens
    blocks = create_block_mask(
        case.mask(device), None, None, n, n, device=str(device), _compile=n**2 > LARGEST_MASK
    )
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = compiled(
            *map(heads_first, (q, k, v)), block_mask=blocks, enable_gqa=case.kv_heads > 0
        )
        return out.transpose(1, 2).unflatten(1, case.tokens)

    return call


def _natten(case: WindowCase, device: torch.device) -> Call:
    if case.op == "window":
        raise Unavailable("has no shifted windows")
    try:
        natten = importlib.import_module("natten")
    except ImportError as error:
        raise Unavailable("not installed") from error
    function = getattr(natten, f"na{len(case.tokens)}d")
    options = {"kernel_size": case.window, "dilation": case.dilation}
    if case.op == "sliding":
        options["is_causal"] = True
    return lambda q, k, v: function(q, k, v, **options)


CONTENDERS = {"attnext": _attnext, "SDPA, dense mask": _sdpa, "FlashAttention-2": _flash,
              "FlexAttention": _flex, "NATTEN": _natten}  # fmt: skip


# ---- cases ---------------------------------------------------------------------------------------


def _cases() -> list[WindowCase]:
    def causal(n: int, window: int, **more: Any) -> WindowCase:
        name = f"causal-{n}-{window}-d{more.get('head_dim', 64)}"
        return WindowCase(name=name, op="sliding", tokens=(n,), window=(window,), **more)

    def near(
        name: str, tokens: tuple[int, ...], window: tuple[int, ...], **more: Any
    ) -> WindowCase:
        return WindowCase(name=name, op="neighborhood", tokens=tokens, window=window, **more)

    small: dict[str, Any] = {"batch": 32, "heads": 4, "head_dim": 32}
    return [
        causal(4096, 256, batch=4, heads=16),
        causal(4096, 256, batch=4, heads=16, head_dim=128),
        causal(16384, 1024, heads=16),
        causal(16384, 1024, heads=16, head_dim=128),
        causal(32768, 4096, heads=16, kv_heads=4, head_dim=128),
        causal(4096, 4096, batch=4, heads=16),
        causal(4096, 4096, batch=4, heads=16, head_dim=128),
        near("na2d-64-13", (64, 64), (13, 13), batch=8),
        near("na2d-56-7", (56, 56), (7, 7), **small),
        near("na2d-56-7-d8", (56, 56), (7, 7), dilation=8, **small),
        near("na3d-5x7x7", (16, 32, 32), (5, 7, 7), batch=2),
        near("na3d-video", (30, 48, 80), (18, 24, 24), heads=4, head_dim=128),
        WindowCase(
            name="window-56-7", op="window", tokens=(56, 56), window=(7, 7), shift=3, **small
        ),
    ]


WINDOW_CASES = {case.name: case for case in _cases()}
