# SPDX-License-Identifier: Apache-2.0
"""Patterns of each head's prefill (MInference, arXiv 2407.02490), from its last queries or from
means of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_scale, under_autocast, without_autocast
from ..plans import BlockPlan
from ..routed import routed_attention
from .block_sparse import pooled_topk_plan
from .inputs import check_integer, check_sequences, exact

_SURE_COLUMNS, _SURE_DIAGONALS = 30, 100  # first keys and last distances that always come first
_LEAST_COLUMNS, _LEAST_DIAGONALS = 30, 50


@dataclass(frozen=True)
class VerticalSlash:
    """The ``columns`` keys and the ``diagonals`` distances that the last ``last`` queries attend
    most. The first 30 keys and the last 100 distances come before all others; at least 30 columns
    and 50 diagonals are taken. A diagonal is as wide as a query block."""

    columns: int = 1000
    diagonals: int = 200
    last: int = 64

    def __post_init__(self) -> None:
        for name in ("columns", "diagonals", "last"):
            check_integer(name, getattr(self, name), 1)


@dataclass(frozen=True)
class BlockSparse:
    """The ``blocks`` blocks of ``size`` keys whose mean is nearest to the mean of a query block."""

    blocks: int = 100
    size: int = 64

    def __post_init__(self) -> None:
        for name in ("blocks", "size"):
            check_integer(name, getattr(self, name), 1)


@dataclass(frozen=True)
class AShape:
    """The first ``sinks`` keys and the last ``window_size``, rounded out to the query block."""

    sinks: int = 128
    window_size: int = 1024

    def __post_init__(self) -> None:
        check_integer("sinks", self.sinks, 0)
        check_integer("window_size", self.window_size, 1)


Pattern = VerticalSlash | BlockSparse | AShape
Spans = tuple[Tensor, Tensor]


def minference_plan(
    query: Tensor,
    key: Tensor,
    patterns: Pattern | Sequence[Pattern] = VerticalSlash(),
    *,
    query_block: int = 64,
    scale: float | None = None,
) -> BlockPlan:
    """Spans of keys for each head and query block, after the head's pattern.

    Shapes:
        query ``[B, Nq, H, D]``, key ``[B, Nk, Hkv, D]``; query ``i`` stands at key
        ``i + Nk - Nq``. The spans are ``[B, H, blocks, slots]``; slots a head does not use are
        empty. Spans may overlap, and reach behind the query: attend with ``is_causal``.

    Args:
        patterns: :class:`VerticalSlash`, :class:`BlockSparse` or :class:`AShape` for all heads, or
            one for each, as found offline.
        query_block: queries that share their spans, which depend on all of the block's queries.
        scale: of the softmax of the last queries, by default ``D ** -0.5``.

    Numerics:
        Sums in float32 (float64 for float64); of equals the first key, or the nearest, comes
        first. No gradient.

    Errors:
        ValueError, TypeError or NotImplementedError, naming the argument.

    Complexity:
        O(last * Nk D) for columns and diagonals, O(Nq Nk D / (query_block * size)) for blocks.

    Source:
        MInference 1.0 (arXiv 2407.02490).

    Example:
        >>> import torch
        >>> from attnext.routers.minference import AShape, VerticalSlash, minference_plan
        >>> q, k = torch.randn(2, 1, 200, 2, 16)
        >>> minference_plan(q, k, [VerticalSlash(40, 50), AShape(8, 64)]).lists.shape
        torch.Size([1, 2, 4, 90])
    """
    check_sequences(query, key, key)
    check_integer("query_block", query_block, 1)
    scale = check_scale(scale, query.shape[-1] ** -0.5)
    heads = query.shape[2]
    if isinstance(patterns, Pattern):
        patterns = (patterns,) * heads
    if not isinstance(patterns, Sequence) or not all(isinstance(p, Pattern) for p in patterns):
        raise TypeError(f"patterns must be a pattern or a sequence of patterns, got {patterns!r}")
    if len(patterns) != heads:
        raise ValueError(f"patterns must be one for each head, {heads}, got {len(patterns)}")
    group, found = heads // key.shape[2], []
    with torch.no_grad():
        for h, pattern in enumerate(patterns):
            q, k = query[:, :, h : h + 1], key[:, :, h // group : h // group + 1]
            if isinstance(pattern, VerticalSlash):
                found.append(_vertical_slash(q, k, pattern, query_block, scale))
            elif isinstance(pattern, BlockSparse):
                found.append(_block_sparse(q, k, pattern, query_block))
            else:
                found.append(_a_shape(q, k, pattern, query_block))
        slots = max(starts.shape[-1] for starts, _ in found)
        starts, ends = (
            torch.cat([torch.nn.functional.pad(x, (0, slots - x.shape[-1])) for x in side], 1)
            for side in zip(*found, strict=True)
        )
    return BlockPlan.of_spans(starts, ends, query.shape[1], query_block, key.shape[1])


def _rows(query: Tensor, key: Tensor, query_block: int) -> Spans:
    """Position of each query block's first query, and one past its last."""
    first = torch.arange(0, query.shape[1], query_block, device=query.device)
    ahead = key.shape[1] - query.shape[1]
    return first + ahead, (first + query_block).clamp(max=query.shape[1]) + ahead


def _vertical_slash(
    query: Tensor, key: Tensor, pattern: VerticalSlash, query_block: int, scale: float
) -> Spans:
    batch, num_keys = query.shape[0], key.shape[1]
    last = exact(query[:, -pattern.last :, 0])
    with without_autocast(query):
        logits = last @ exact(key[:, :, 0]).transpose(1, 2)
    logits = logits * scale
    at = torch.arange(-last.shape[1], 0, device=key.device)[:, None] + num_keys
    places = torch.arange(num_keys, device=key.device)
    weights = torch.softmax(logits.masked_fill(places > at, -torch.inf), -1).nan_to_num()
    columns = weights.sum(1)
    distance = (at - places).clamp(min=0)  # from a key to its place on the axis of distances
    diagonals = weights.gather(2, distance.expand(weights.shape)).masked_fill(places > at, 0).sum(1)
    columns[:, :_SURE_COLUMNS] = torch.inf
    diagonals[:, :_SURE_DIAGONALS] = torch.inf

    def best(sums: Tensor, count: int) -> Tensor:
        return sums.sort(dim=-1, descending=True, stable=True).indices[:, None, :count]

    column = best(columns, max(pattern.columns, _LEAST_COLUMNS))
    away = best(diagonals, max(pattern.diagonals, _LEAST_DIAGONALS))
    begin, end = _rows(query, key, query_block)
    column = column.expand(batch, len(begin), -1)
    starts = torch.cat([column, (begin[:, None] - away).clamp(min=0)], -1)
    ends = torch.cat([column + 1, (end[:, None] - away).clamp(min=0)], -1)
    return starts[:, None], ends[:, None]


def _block_sparse(query: Tensor, key: Tensor, pattern: BlockSparse, query_block: int) -> Spans:
    plan = pooled_topk_plan(query, key, query_block, pattern.size, pattern.blocks, is_causal=True)
    blocks = plan.lists.long()
    ends = ((blocks + 1) * pattern.size).clamp(max=key.shape[1])
    return (blocks * pattern.size).clamp(min=0), ends.masked_fill(blocks < 0, 0)


def _a_shape(query: Tensor, key: Tensor, pattern: AShape, query_block: int) -> Spans:
    begin, end = _rows(query, key, query_block)
    starts = torch.stack([torch.zeros_like(begin), begin - pattern.window_size + 1], -1)
    ends = torch.stack([torch.full_like(end, min(pattern.sinks, key.shape[1])), end], -1)
    shape = (query.shape[0], 1, *starts.shape)
    return starts.clamp(min=0).expand(shape), ends.clamp(min=0).expand(shape)


def minference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    patterns: Pattern | Sequence[Pattern] = VerticalSlash(),
    *,
    query_block: int = 64,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Causal attention to what :func:`minference_plan` finds.

    Shapes, Numerics, Errors: as :func:`attnext.routed_attention`; differentiable, but for the
    patterns.

    Example:
        >>> import torch
        >>> from attnext.routers.minference import minference_attention
        >>> q, k, v = (torch.randn(1, 200, 2, 16) for _ in range(3))
        >>> minference_attention(q, k, v).shape
        torch.Size([1, 200, 2, 16])
    """
    query, key, value = under_autocast(query, key, value)
    check_sequences(query, key, value)
    plan = minference_plan(query, key, patterns, query_block=query_block, scale=scale)
    return routed_attention(
        query, key, value, plan, is_causal=True, scale=scale, return_lse=return_lse
    )
