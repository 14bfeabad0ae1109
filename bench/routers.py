# SPDX-License-Identifier: Apache-2.0
"""Routed methods as their users call them, router and attention; what of the time is the router's;
and what a row of the result is, in float64, one query and head at a time.

A row is held against the blocks and spans that the router chose: that these are the right ones is
held against naive searches in the test suite.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import attnext
from attnext import BlockPlan, Windows, block_pool, select_topk
from attnext.routers import hip, longheads, minference, moba, nsa, streaming, superlinear

from .cases import RouterCase


@dataclass(frozen=True)
class Method:
    """One routed method.

    ``whole(q, k, v)`` is the call; ``route(q, k, v)`` its search alone, None if it has none, and
    what it finds is handed to ``row(q [D], k, v [Nk, D], i, found, h)``: the output of query ``i``
    and head ``h``. ``keys(i [rows], found, h, Nk)``, of methods with one softmax: bool
    ``[rows, Nk]``, who is attended.
    """

    whole: Callable[..., Tensor]
    route: Callable[..., Any] | None = None
    row: Callable[..., Tensor] | None = None
    keys: Callable[..., Tensor] | None = None

    def expected(self, q: Tensor, k: Tensor, v: Tensor, i: int, found: Any, h: int) -> Tensor:
        if self.row is not None:
            return self.row(q, k, v, i, found, h)
        assert self.keys is not None
        return _attended(q, k, v, self.keys(torch.tensor([i]), found, h, k.shape[0])[0])

    def seconds_of_routing(self, *tensors: Tensor) -> float:
        if self.route is None:
            return 0.0
        seconds = []
        with torch.no_grad():
            for _ in range(3):
                start = time.perf_counter()
                self.route(*tensors)
                seconds.append(time.perf_counter() - start)
        return min(seconds)


def method_of(case: RouterCase) -> Method:
    return METHODS[case.method](case.heads, **dict(case.options))


# ---- rows ----------------------------------------------------------------------------------------


def _softmax(q: Tensor, k: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and lse."""
    logits = (k @ q * q.shape[0] ** -0.5).masked_fill(~mask, -torch.inf)
    return torch.softmax(logits, 0).nan_to_num(), torch.logsumexp(logits, 0)


def _attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return _softmax(q, k, mask)[0] @ v


def _listed(plan: BlockPlan, heads: int, i: Tensor, h: int, num_keys: int) -> Tensor:
    """bool ``[rows, num_keys]``: what padded lists of item 0 hold for tokens ``i``, query head
    ``h``."""
    queries, keys, lists = plan.query_blocks, plan.key_blocks, plan.lists
    places = i if queries.order is None else torch.argsort(queries.order)[i]
    blocks = torch.searchsorted(queries.offsets, places, right=True) - 1
    at = 0, h * lists.shape[1] // heads, blocks
    if plan.ends is not None:
        first, past = lists[at].long(), plan.ends[at].long()
        past = torch.maximum(first, past)
        steps = torch.zeros(len(i), num_keys + 1, dtype=torch.int32)
        steps.scatter_add_(1, first, torch.ones_like(first, dtype=torch.int32))
        steps.scatter_add_(1, past, -torch.ones_like(past, dtype=torch.int32))
        return steps.cumsum(1)[:, :-1] > 0
    chosen = torch.zeros(len(i), keys.num_blocks + 1, dtype=torch.bool)
    chosen.scatter_(1, torch.where(lists[at] < 0, keys.num_blocks, lists[at].long()), True)
    listed = chosen[:, :-1].repeat_interleave(keys.counts.long(), 1)
    return listed if keys.order is None else listed[:, torch.argsort(keys.order)]


def _by_plan(heads: int, is_causal: bool = True, sinks: int = 0, window: int = 0) -> Any:
    def keys(i: Tensor, plan: BlockPlan, h: int, num_keys: int) -> Tensor:
        j, i_ = torch.arange(num_keys), i[:, None]
        mask = _listed(plan, heads, i, h, num_keys)
        mask |= (j < sinks) | (j > i_ - window) & (j <= i_)
        return mask & (j <= i_) if is_causal else mask

    return keys


# ---- methods: options are those of the public functions ------------------------------------------


def _moba(heads: int, block_size: int, topk: int) -> Method:
    def route(q: Tensor, k: Tensor, v: Tensor) -> BlockPlan:
        return moba.moba_plan(q, k, block_size, topk)

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attnext.moba_attention(q, k, v, block_size, topk)
        return out

    return Method(whole, route, keys=_by_plan(heads))


def _hip(heads: int, sinks: int = 16, window_size: int = 256, **options: Any) -> Method:
    def route(q: Tensor, k: Tensor, v: Tensor) -> BlockPlan:
        return hip.hip_plan(q, k, **options)

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = hip.hip_attention(q, k, v, sinks=sinks, window_size=window_size, **options)
        return out

    return Method(whole, route, keys=_by_plan(heads, sinks=sinks, window=window_size))


def _infinite_hip(heads: int, sinks: int = 256, window_size: int = 1024, **options: Any) -> Method:
    near: dict[str, Any] = {"sinks": sinks, "window_size": window_size}

    def route(q: Tensor, k: Tensor, v: Tensor) -> BlockPlan:
        return hip.infinite_hip_plan(q, k, **near, **options)

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attnext.routed_attention(
            q, k, v, route(q, k, v), is_causal=True, sinks=sinks, window_size=window_size
        )
        return out

    return Method(whole, route, keys=_by_plan(heads, sinks=sinks, window=window_size))


def _longheads(heads: int, **options: Any) -> Method:
    def route(q: Tensor, k: Tensor, v: Tensor) -> BlockPlan:
        pooled = longheads.longheads_chunk_keys(q, k, v, options.get("chunk_size", 256))
        return longheads.longheads_plan(q, pooled, k.shape[1], **options)

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = longheads.longheads_attention(q, k, v, **options)
        return out

    return Method(whole, route, keys=_by_plan(heads))


def _minference(heads: int, **options: Any) -> Method:
    pattern = minference.VerticalSlash(**options)

    def route(q: Tensor, k: Tensor, v: Tensor) -> BlockPlan:
        return minference.minference_plan(q, k, pattern)

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = minference.minference_attention(q, k, v, pattern)
        return out

    return Method(whole, route, keys=_by_plan(heads))


def _streaming(heads: int, sinks: int, window_size: int) -> Method:
    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = streaming.streaming_attention(q, k, v, sinks=sinks, window_size=window_size)
        return out

    def keys(i: Tensor, found: None, h: int, num_keys: int) -> Tensor:
        j, i = torch.arange(num_keys), i[:, None]
        return ((j < sinks) | (j > i - window_size)) & (j <= i)

    return Method(whole, keys=keys)


def _bilevel(heads: int, region_size: int, topk: int) -> Method:
    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attnext.bilevel_routing_attention(q, k, v, region_size, topk)
        return out

    def route(q: Tensor, k: Tensor, v: Tensor) -> BlockPlan:
        means = [block_pool(x, region_size).flatten(1, -3).flatten(-2)[:, :, None] for x in (q, k)]
        blocks = attnext.Blocks.of(tuple(q.shape[1:-2]), region_size)
        lists = select_topk(means[0], means[1], topk)
        return BlockPlan.of(lists, blocks.extent, blocks)

    return Method(whole, route, keys=_by_plan(heads, is_causal=False))


def _nsa(
    heads: int, compress_size: int = 32, compress_stride: int = 16, window_size: int = 512,
    **options: Any,
) -> Method:  # fmt: skip
    """With gates of one half."""
    size, stride = compress_size, compress_stride
    sizes: dict[str, Any] = {
        "compress_size": size,
        "compress_stride": stride,
        "window_size": window_size,
    }

    def call(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
        gates = q.new_zeros(*q.shape[:-1], 3)
        return nsa.native_sparse_attention(q, k, v, gates, **sizes, **options, **more)

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = call(q, k, v)
        return out

    def found(q: Tensor, k: Tensor, v: Tensor) -> BlockPlan:
        plan: BlockPlan = call(q, k, v, return_plan=True)[1]
        return plan

    def row(q: Tensor, k: Tensor, v: Tensor, i: int, plan: BlockPlan, h: int) -> Tensor:
        j, num_keys = torch.arange(k.shape[0]), k.shape[0]
        coarse = torch.zeros_like(v[0])
        if i + 1 >= size:
            short = (x[: i + 1].unfold(0, size, stride).mean(-1) for x in (k, v))
            short_key, short_value = short
            seen = torch.ones(len(short_key), dtype=torch.bool)
            coarse = _attended(q, short_key, short_value, seen)
        listed = _listed(plan, heads, torch.tensor([i]), h, num_keys)[0] & (j <= i)
        near = (j > i - window_size) & (j <= i)
        return 0.5 * (coarse + _attended(q, k, v, listed) + _attended(q, k, v, near))

    def search(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the choice of blocks costs beside the three branches: pooling and selection."""
        windows, num_keys = Windows(k.shape[1], size, stride, ragged=False), k.shape[1]
        short = block_pool(k, windows)
        lists: Tensor = select_topk(
            q, short, options.get("num_blocks", 16), score="group_prob", windows=windows,
            lse=q.new_zeros(q.shape[:-1]), causal="start", query_blocks=Windows(q.shape[1], 1),
            candidate_blocks=Windows(num_keys, options.get("block_size", 64)),
            force_first=1, force_last=2,
        )  # fmt: skip
        return lists

    return _Searching(whole, found, row, search=search)


@dataclass(frozen=True)
class _Searching(Method):
    """What it finds is told by the whole call; the search is timed by itself."""

    search: Callable[..., Any] | None = None

    def seconds_of_routing(self, *tensors: Tensor) -> float:
        return Method(self.whole, self.search).seconds_of_routing(*tensors)


def _superlinear(heads: int, sw_index: int = 65, **options: Any) -> Method:
    """The query searches too."""

    def route(q: Tensor, k: Tensor, v: Tensor) -> superlinear.Spans:
        return superlinear.superlinear_search(q, k, sw_index=sw_index, **options)

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = superlinear.superlinear_attention(q, q, k, v, sw_index=sw_index, **options)
        return out

    window = superlinear.window_of(sw_index, options.get("search_power", 0.55))

    def row(q: Tensor, k: Tensor, v: Tensor, i: int, spans: Any, h: int) -> Tensor:
        j = torch.arange(k.shape[0])
        near = (j > i - window) & (j <= i)
        anchors, starts, ends = (x[0, i, h] for x in spans)
        if not (anchors >= 0).any():
            return _attended(q, k, v, near)
        gates = torch.softmax((k[anchors.clamp(min=0)] @ q).masked_fill(anchors < 0, -torch.inf), 0)
        parts = [
            _attended(q, k, v, near | (j >= a) & (j < b)) for a, b in zip(starts, ends, strict=True)
        ]
        return gates @ torch.stack(parts)

    return Method(whole, route, row)


def _landmark(heads: int, period: int, topk: int | None = None) -> Method:
    """The last token of every ``period`` is a landmark."""

    def marks(num_keys: int, device: torch.device | None = None) -> Tensor:
        return torch.arange(num_keys, device=device) % period == period - 1

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attnext.landmark_attention(q, k, v, marks(k.shape[1], k.device), topk=topk)
        return out

    def row(q: Tensor, k: Tensor, v: Tensor, i: int, found: None, h: int) -> Tensor:
        logits = k @ q * q.shape[0] ** -0.5
        j, own = torch.arange(k.shape[0]), i // period
        earlier = list(range(own))
        if topk is not None and own > topk:
            best = logits[period - 1 :: period][:own].topk(topk).indices
            earlier = sorted(best.tolist())
        local = (j // period == own) & (j <= i) & ~marks(k.shape[0])
        parts, levels = [], []
        for block in earlier:
            mask = (j // period == block) & ~marks(k.shape[0])
            parts.append(_attended(q, k, v, mask))
            levels.append(logits[(block + 1) * period - 1])
        if local.any():
            parts.append(_attended(q, k, v, local))
            levels.append(_softmax(q, k, local)[1])
        return torch.softmax(torch.stack(levels), 0) @ torch.stack(parts)

    return Method(whole, row=row)


METHODS: dict[str, Callable[..., Method]] = {
    "moba": _moba,
    "hip": _hip,
    "infinite-hip": _infinite_hip,
    "longheads": _longheads,
    "minference": _minference,
    "streaming": _streaming,
    "bilevel": _bilevel,
    "nsa": _nsa,
    "superlinear": _superlinear,
    "landmark": _landmark,
}
