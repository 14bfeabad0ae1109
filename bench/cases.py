# SPDX-License-Identifier: Apache-2.0
"""What is measured: problems, and the arithmetic and traffic they cannot do without."""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attnext import BlockPlan
from attnext.geometry import AxisRule, axis_intervals
from attnext.linear_ops import num_features

FORWARD = "fwd"
TRAINING = "fwd+bwd"
MODES = (FORWARD, TRAINING)

BYTES_PER_ELEMENT = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

# Of the five products of the backward pass (scores again, dP, dV, dQ, dK) each costs what one of
# the two of the forward pass costs.
BACKWARD_TO_FORWARD = 2.5


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem. Shapes: query ``[batch, *queries, heads, head_dim]``, keys likewise.

    ``op`` names the public function: ``sliding`` (causal, ``window`` keys including the query's
    own; None: every key up to it), ``neighborhood`` (kernels shifted inward at the edges) or
    ``window`` (tiles of ``window`` tokens, displaced by ``shift``).
    """

    name: str
    group: str
    op: str
    queries: tuple[int, ...]
    window: tuple[int, ...] | None
    keys: tuple[int, ...] = ()
    batch: int = 1
    heads: int = 8
    kv_heads: int = 0
    head_dim: int = 64
    dilation: int = 1
    shift: int = 0
    softcap: float | None = None
    alibi: bool = False
    bias: bool = False
    sinks: int = 0
    dtypes: tuple[str, ...] = ("float32",)
    modes: tuple[str, ...] = MODES

    @property
    def key_extents(self) -> tuple[int, ...]:
        return self.keys or self.queries

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def value_dim(self) -> int:
        return self.head_dim

    @property
    def rank(self) -> int:
        return len(self.queries)

    @property
    def num_queries(self) -> int:
        return math.prod(self.queries)

    @property
    def num_keys(self) -> int:
        return math.prod(self.key_extents)

    @property
    def is_causal(self) -> bool:
        return self.op == "sliding"

    @cached_property
    def axes(self) -> tuple[dict[str, Any], ...]:
        """The rule of each axis, as the fields that every statement of the rule has."""
        axes = []
        for a, (num_queries, num_keys) in enumerate(
            zip(self.queries, self.key_extents, strict=True)
        ):
            size = num_keys if self.window is None else self.window[a]
            left, right = (size - 1, 0) if self.is_causal else (size // 2, size - 1 - size // 2)
            tiled = self.op == "window"
            axes.append(
                {
                    "left": left,
                    "right": right,
                    "stride": size if tiled else 1,
                    "phase": self.shift if tiled else 0,
                    "dilation": self.dilation,
                    "is_causal": self.is_causal,
                    "boundary": "inward" if self.op == "neighborhood" else "truncate",
                    "offset": num_keys - num_queries if self.is_causal else 0,
                }
            )
        return tuple(axes)

    @property
    def rules(self) -> tuple[AxisRule, ...]:
        return tuple(AxisRule(**axis) for axis in self.axes)

    @cached_property
    def intervals(self) -> tuple[list[tuple[int, int]], ...]:
        """Per axis and query coordinate the attended keys, as indices within the dilation class."""
        extents = zip(self.rules, self.queries, self.key_extents, strict=True)
        return tuple(axis_intervals(rule, n, m) for rule, n, m in extents)

    @cached_property
    def pairs(self) -> int:
        """Pairs of a query and a key it attends, over all batch items and query heads."""
        pairs = math.prod(sum(end - begin for begin, end in axis) for axis in self.intervals)
        if self.sinks:  # the sinks that a query does not see through its window already
            pairs += sum(min(begin, self.sinks) for begin, _ in self.intervals[0])
        return self.batch * self.heads * pairs

    @property
    def _keys_read(self) -> int:
        """Key tokens that some query attends: not all of them where few queries look back."""
        if self.rank > 1:
            return self.num_keys
        begin = min(begin for begin, _ in self.intervals[0])
        end = max(end for _, end in self.intervals[0])
        return end - begin + min(begin, self.sinks)

    def flops(self, mode: str) -> float:
        """Useful operations: 2 D for q·k and 2 D for p·v a pair, and the backward pass's share."""
        forward = 4.0 * self.head_dim * self.pairs
        return forward if mode == FORWARD else forward * (1 + BACKWARD_TO_FORWARD)

    def traffic(self, mode: str, dtype: str) -> int:
        """Bytes when every tensor is read or written once, and lse (fp32) with the output."""
        element = BYTES_PER_ELEMENT[dtype]
        rows = self.batch * self.num_queries * self.heads
        query = rows * self.head_dim * element
        key = self.batch * self._keys_read * self.key_heads * self.head_dim * element
        lse = rows * 4
        forward = 2 * query + 2 * key + lse
        # The backward pass reads q, k, v, out, its gradient and lse, and writes dq, dk, dv.
        return forward if mode == FORWARD else forward + 4 * query + 4 * key + lse

    @property
    def tokens(self) -> int:
        return self.batch * self.num_queries

    def describe(self) -> str:
        """One line for tables: the shape and the options that are on."""

        def times(extents: tuple[int, ...]) -> str:
            return "×".join(map(str, extents))

        words = [self.op, times(self.queries)]
        if self.keys:
            words.append(f"over {times(self.keys)} keys")
        words.append("all keys" if self.window is None else f"window {times(self.window)}")
        if self.dilation > 1:
            words.append(f"dilation {self.dilation}")
        if self.shift:
            words.append(f"shift {self.shift}")
        heads = f"H{self.heads}" + (f"/{self.kv_heads}" if self.kv_heads else "")
        words.append(f"B{self.batch} {heads} D{self.head_dim}")
        options = {"bias": self.bias, "alibi": self.alibi, "softcap": self.softcap}
        words += [word for word, on in options.items() if on]
        if self.sinks:
            words.append(f"{self.sinks} sinks")
        return ", ".join(words)


@dataclass(frozen=True, kw_only=True)
class LinearCase(Case):
    """Causal linear attention: ``window`` is None, and a pair is a token and a head."""

    op: str = "linear"
    window: tuple[int, ...] | None = None
    feature_map: str = "identity"
    normalize: bool = False
    head_dim_v: int = 64

    @property
    def value_dim(self) -> int:
        return self.head_dim_v

    @cached_property
    def pairs(self) -> int:
        return self.tokens * self.heads

    def flops(self, mode: str) -> float:
        """Useful operations: a feature and a value meet in the state's update and in its reading.
        Taylor features are counted once for each product of two entries."""
        features = num_features(self.feature_map, self.head_dim)
        forward = 4.0 * features * self.head_dim_v * self.pairs
        # Backward: the state again, its gradient, and the gradients of query, key and value.
        return forward if mode == FORWARD else forward * (1 + BACKWARD_TO_FORWARD)

    def traffic(self, mode: str, dtype: str) -> int:
        forward = 2 * (self.head_dim + self.head_dim_v) * self.pairs * BYTES_PER_ELEMENT[dtype]
        # The backward pass reads q, k, v and the gradient of out, and writes dq, dk, dv.
        extra = (4 * self.head_dim + 3 * self.head_dim_v) * self.pairs * BYTES_PER_ELEMENT[dtype]
        return forward if mode == FORWARD else forward + extra

    def describe(self) -> str:
        words = ["linear", "×".join(map(str, self.queries)), self.feature_map]
        words += ["normalized"] if self.normalize else []
        return ", ".join(
            [*words, f"B{self.batch} H{self.heads} D{self.head_dim}/{self.head_dim_v}"]
        )


@dataclass(frozen=True, kw_only=True)
class RoutedCase(Case):
    """``slots`` of the key blocks for each query block, drawn at random. On one axis causal: blocks
    up to the query's own, which is among them. On a map: boxes, one list for all heads."""

    op: str = "routed"
    window: tuple[int, ...] | None = None
    block: tuple[int, ...]
    slots: int

    @property
    def is_causal(self) -> bool:
        return self.rank == 1

    @cached_property
    def lists(self) -> Tensor:
        """int32 ``[1, H or 1, blocks, slots]``, -1 where there are fewer."""
        generator = torch.Generator().manual_seed(0)
        blocks = math.prod(-(-n // b) for n, b in zip(self.queries, self.block, strict=True))
        heads = self.heads if self.is_causal else 1
        lists = torch.full((1, heads, blocks, self.slots), -1, dtype=torch.int32)
        for head in range(heads):
            for i in range(blocks):
                if self.is_causal:
                    others = torch.randperm(i, generator=generator)[: self.slots - 1]
                    chosen = torch.cat([others, torch.tensor([i])])
                else:
                    chosen = torch.randperm(blocks, generator=generator)[: self.slots]
                lists[0, head, i, : len(chosen)] = chosen
        return lists

    @cached_property
    def plan(self) -> BlockPlan:
        return BlockPlan.of(self.lists, self.queries, self.block)

    @cached_property
    def pairs(self) -> int:
        blocks = self.plan.query_blocks
        counts = blocks.counts.long()
        listed = torch.where(self.lists >= 0, counts[self.lists.clamp(min=0).long()], 0).sum(-1)
        pairs = (listed * counts).sum()
        if self.is_causal:  # of the own block a query sees half
            pairs -= self.lists.shape[1] * (counts * (counts - 1) // 2).sum()
        shared = self.heads // self.lists.shape[1]
        return self.batch * shared * int(pairs)

    @property
    def _keys_read(self) -> int:
        return self.num_keys

    def over_all_blocks(self) -> RoutedCase:
        """Another problem: every block is listed, on one axis up to the query's own."""
        return replace(self, slots=self.plan.key_blocks.num_blocks)

    def describe(self) -> str:
        def times(x: tuple[int, ...]) -> str:
            return "×".join(map(str, x))

        causal = "causal, " if self.is_causal else ""
        return (
            f"routed, {times(self.queries)}, {causal}{self.slots} blocks of {times(self.block)}, "
            f"B{self.batch} H{self.heads} D{self.head_dim}"
        )


ROUTED_CASES: tuple[Case, ...] = (
    RoutedCase(name="routed-16384", group="routed", queries=(16384,), block=(64,), slots=16),
    RoutedCase(
        name="routed-2d-56", group="routed", queries=(56, 56), block=(8, 8), slots=4,
        batch=4, heads=4, head_dim=32,
    ),
    RoutedCase(
        name="smoke-routed", group="smoke", queries=(128,), block=(16,), slots=3,
        heads=2, head_dim=16,
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RouterCase(Case):
    """A routed method as its users call it, search included; ``options`` are those of its public
    function. Which pairs are attended depends on the numbers, so that there are times alone."""

    op: str = "router"
    window: tuple[int, ...] | None = None
    method: str
    options: tuple[tuple[str, Any], ...] = ()
    pairs: int = 0

    @property
    def is_causal(self) -> bool:
        return self.rank == 1

    def describe(self) -> str:
        words = [self.method, "×".join(map(str, self.queries))]
        words += [f"{name} {value}" for name, value in self.options]
        heads = f"H{self.heads}" + (f"/{self.kv_heads}" if self.kv_heads else "")
        return ", ".join([*words, f"B{self.batch} {heads} D{self.head_dim}"])


def _router_cases() -> list[Case]:
    cases: list[Case] = []

    def router(
        method: str, length: int | tuple[int, ...], group: str = "routers", heads: int = 4,
        kv_heads: int = 0, modes: tuple[str, ...] = (FORWARD,), head_dim: int = 64, **options: Any,
    ) -> None:  # fmt: skip
        extents = (length,) if isinstance(length, int) else length
        words = [method, "x".join(map(str, extents)), *(["h1"] if heads == 1 else [])]
        cases.append(
            RouterCase(
                name="-".join(["smoke", method] if group == "smoke" else words), group=group,
                queries=extents, method=method, options=tuple(options.items()), heads=heads,
                kv_heads=kv_heads, modes=modes, head_dim=head_dim,
            )
        )  # fmt: skip

    n = 16384
    router("moba", n, modes=MODES, block_size=512, topk=3)
    router("nsa", n, kv_heads=1, modes=MODES)
    router("superlinear", n, modes=MODES)
    router("hip", n)
    router("infinite-hip", n)
    router("longheads", n)
    router("minference", n)
    router("streaming", n, modes=MODES, sinks=4, window_size=512)
    router("landmark", 4096, modes=MODES, period=64)
    router("landmark", n, period=64, topk=4)
    router("bilevel", (56, 56), head_dim=32, modes=MODES, region_size=8, topk=4)
    for power in range(13, 18):
        for method in ("hip", "infinite-hip", "superlinear"):
            router(method, 2**power, "router-length", heads=1)
    smoke: dict[str, Any] = {"group": "smoke", "heads": 2, "head_dim": 16, "modes": MODES}
    router("moba", 150, block_size=16, topk=3, **smoke)
    router("hip", 150, mask_k=32, query_block=16, window_size=16, **smoke)
    router("longheads", 150, chunk_size=16, num_chunks=4, **smoke)
    router("streaming", 150, sinks=2, window_size=20, **smoke)
    router("minference", 400, columns=30, diagonals=50, **smoke)
    router("superlinear", 150, sw_index=5, **smoke)
    router("landmark", 150, period=16, **smoke)
    router("bilevel", (9, 10), region_size=4, topk=3, **smoke)
    nsa: dict[str, Any] = {
        "compress_size": 8,
        "compress_stride": 4,
        "block_size": 8,
        "num_blocks": 5,
    }
    router("nsa", 150, kv_heads=1, window_size=20, **nsa, **smoke)
    return cases


@dataclass(frozen=True, kw_only=True)
class LinearStepCase(LinearCase):
    """One token of each sequence of a batch against its state, which is updated."""

    op: str = "linear-step"
    queries: tuple[int, ...] = (1,)
    modes: tuple[str, ...] = (FORWARD,)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of the state with one row for each product of two entries."""
        rows = num_features(self.feature_map, self.head_dim)
        return self.batch, self.heads, rows, self.head_dim_v + int(self.normalize)

    def traffic(self, mode: str, dtype: str) -> int:
        """The state, in float32, is read and written."""
        return super().traffic(mode, dtype) + 2 * 4 * math.prod(self.state_shape)

    def describe(self) -> str:
        return super().describe().replace("linear, 1", "one token", 1)


def _linear_cases() -> list[Case]:
    both = ("float32", "bfloat16")
    based = {"feature_map": "taylor2", "head_dim": 16}
    cases: list[Case] = []

    def linear(name: str, group: str, length: int, **more: Any) -> None:
        cases.append(LinearCase(name=name, group=group, queries=(length,), **more))

    linear("linear-8192", "linear", 8192, feature_map="elu", dtypes=both)
    linear("linear-8192-normalized", "linear", 8192, feature_map="elu", normalize=True)
    linear("based-8192", "linear", 8192, dtypes=both, **based)
    linear("based-8192-normalized", "linear", 8192, normalize=True, **based)
    for power in range(12, 19, 2):
        linear(f"linear-length-{2**power}", "linear-length", 2**power, heads=1, feature_map="elu")
    linear("smoke-linear", "smoke", 128, heads=2, normalize=True, **based)

    def step(name: str, group: str, **more: Any) -> None:
        cases.append(LinearStepCase(name=name, group=group, normalize=True, **more))

    sixteen = {"batch": 16, "heads": 16}
    step("based-step-16", "linear-step", **sixteen, **based)
    step("linear-step-16", "linear-step", **sixteen, feature_map="elu")
    step("smoke-linear-step", "smoke", batch=2, heads=2, **based)
    return cases


def _cases() -> list[Case]:
    both = ("float32", "bfloat16")
    cases = []

    def sliding(name: str, group: str, length: int, window: int | None, **more: Any) -> None:
        size = None if window is None else (window,)
        cases.append(
            Case(name=name, group=group, op="sliding", queries=(length,), window=size, **more)
        )

    def image(name: str, group: str, extents: tuple[int, ...], k: Any, **more: Any) -> None:
        size = k if isinstance(k, tuple) else (k,) * len(extents)
        more.setdefault("op", "neighborhood")
        cases.append(Case(name=name, group=group, queries=extents, window=size, **more))

    for length, window in ((4096, 256), (8192, 512), (16384, 1024), (16384, 128)):
        sliding(f"swa-{length}-{window}", "swa", length, window, dtypes=both)

    image("na2d-64-k13", "na", (64, 64), 13, dtypes=both)
    image("na2d-56-k7", "na", (56, 56), 7, batch=4, heads=4, head_dim=32)
    image("na2d-56-k7-d8", "na", (56, 56), 7, batch=4, heads=4, head_dim=32, dilation=8)
    image("na3d-16x32x32-k5x7x7", "na", (16, 32, 32), (5, 7, 7), heads=4)

    image(
        "swin-56-w7", "swin", (56, 56), 7, op="window", shift=3, bias=True,
        batch=4, heads=4, head_dim=32,
    )  # fmt: skip

    gqa = {"heads": 32, "kv_heads": 8, "head_dim": 128, "modes": (FORWARD,), "dtypes": both}
    for keys in (4096, 32768):
        sliding(f"decode-{keys}", "decode", 1, None, keys=(keys,), **gqa)
    sliding("decode-32768-w4096", "decode", 1, 4096, keys=(32768,), **gqa)

    image("na2d-64-k13-bias", "options", (64, 64), 13, bias=True)
    sliding("swa-8192-512-softcap", "options", 8192, 512, softcap=30.0)
    sliding("swa-8192-512-alibi", "options", 8192, 512, alibi=True)
    sliding("swa-8192-512-sinks", "options", 8192, 512, sinks=4)

    for power in range(11, 18):
        sliding(f"length-{2**power}", "length", 2**power, 256)
    for power in range(5, 12):
        sliding(f"window-{2**power}", "window", 8192, 2**power)

    image("call-7x7", "call", (7, 7), 3, heads=1, head_dim=32, modes=(FORWARD,))
    sliding("smoke-1d", "smoke", 64, 16, heads=2, head_dim=16)
    image("smoke-2d", "smoke", (8, 8), 3, heads=2, head_dim=16, bias=True)
    return cases


CASES: dict[str, Case] = {
    case.name: case for case in (*_cases(), *_linear_cases(), *ROUTED_CASES, *_router_cases())
}
GROUPS: dict[str, str] = {
    "swa": "causal sliding windows of language models",
    "na": "neighborhood attention on images and video",
    "swin": "shifted windows",
    "decode": "one query against a cache, grouped heads",
    "options": "position bias, soft cap, sinks",
    "length": "time and memory against length, at a window of 256",
    "window": "time and memory against the window, at length 8192",
    "linear": "causal linear attention, and BASED's Taylor map",
    "routed": "lists of key blocks, in sequences and on maps",
    "routers": "routed methods, their search included",
    "router-length": "search and attention against length, one head",
    "linear-step": "decoding with linear attention: one token against a state",
    "linear-length": "time and memory of linear attention against length, one head",
    "call": "what a call costs when there is nothing to compute",
    "smoke": "tiny cases for the test suite",
}


def select(patterns: tuple[str, ...] | list[str]) -> list[Case]:
    """The cases that group names, case names or shell patterns call for, in their own order.

    Errors: ValueError for a pattern that matches nothing.
    Example:
        >>> [case.name for case in select(["swa-4096-256", "call"])]
        ['swa-4096-256', 'call-7x7']
    """
    chosen: set[str] = set()
    for pattern in patterns:
        names = [c.name for c in CASES.values() if c.group == pattern]
        names = names or fnmatch.filter(CASES, pattern)
        if not names:
            raise ValueError(
                f"no case or group is called {pattern!r}; `python -m bench list` names them"
            )
        chosen.update(names)
    return [case for name, case in CASES.items() if name in chosen]
