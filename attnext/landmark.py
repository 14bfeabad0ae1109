# SPDX-License-Identifier: Apache-2.0
"""Landmark attention (arXiv 2305.16300): a softmax over landmarks and the tokens at hand, whose
share of each landmark a softmax over its block divides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arguments import (
    check_integer,
    check_scale,
    check_sequences,
    kind_of,
    under_autocast,
    without_autocast,
)
from .autograd import differentiable_once
from .functional import sliding_window_attention
from .merging import merge_attentions
from .ops import accumulator_dtype, unit_stride
from .plans import BlockPlan, Blocks
from .routed import routed_attention
from .routed_ops import LANDMARK_POLICY, Rules, routed_op
from .selection import select_topk
from .slices import slices

_SLICE = 2**21  # logits in flight on a CPU
_QUERIES = 64  # of a work item
_LONGEST = 64  # keys of a block, its landmark among them, that the CPU's kernels take


def landmark_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_landmark: Tensor,
    *,
    topk: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Causal attention with a softmax in two levels.

    A block is the tokens up to a landmark; the landmark ends it. A query's softmax runs over the
    tokens of its own block up to itself and over the landmarks of all earlier blocks. What falls to
    a landmark is divided among the tokens of its block by a softmax over these. The landmarks'
    values are never read.

    Shapes:
        query ``[B, Nq, H, D]``, key ``[B, Nk, Hkv, D]``, value ``[B, Nk, Hkv, Dv]``, is_landmark
        bool ``[Nk]`` or ``[B, Nk]``, anywhere; the result is ``[B, Nq, H, Dv]``, with
        ``return_lse`` also ``[B, Nq, H]``, of the outer softmax. The last query stands at the last
        key.

    Args:
        topk: only that many earlier blocks, those whose landmarks score highest, per query and
            head: what inference retrieves. None: all.
        scale: by default ``D ** -0.5``.

    Numerics:
        Softmax and sums in float32 (float64 for float64), one rounding at the store (with
        ``topk`` one more: parts are merged). A landmark without tokens before it in its block has
        no weight; a query with nothing to attend gives 0, lse -inf and no gradient. Differentiable
        in query, key and value; deterministic. Without ``topk``, a value that is not finite may
        reach queries a little before it.

    Errors:
        ValueError, TypeError or NotImplementedError, naming the argument.

    Complexity:
        O(Nq Nk D) time; memory of the results on the CPU, where blocks hold at most 64 tokens with
        their landmark, elsewhere a part of the queries' tables too. With ``topk``
        O(Nq (topk block + landmarks) D) time. How many landmarks there are is read on the
        host, once; with ``topk`` a graph that is compiled breaks there.

    Source:
        Landmark Attention (arXiv 2305.16300).

    Example:
        >>> import torch, attnext
        >>> q, k, v = (torch.randn(1, 40, 2, 16) for _ in range(3))
        >>> is_landmark = torch.arange(40) % 8 == 7
        >>> attnext.landmark_attention(q, k, v, is_landmark).shape
        torch.Size([1, 40, 2, 16])
        >>> attnext.landmark_attention(q[:, -1:], k, v, is_landmark, topk=2).shape
        torch.Size([1, 1, 2, 16])
    """
    query, key, value = under_autocast(query, key, value)
    check_sequences(query, key, value)
    _check(is_landmark, query, key)
    if topk is not None:
        check_integer("topk", topk, 1)
    scale = check_scale(scale, query.shape[-1] ** -0.5)
    if not key.shape[1] or not query.numel():
        return sliding_window_attention(query, key, value, None, return_lse=return_lse)
    sections = _Sections.of(is_landmark, query.shape[1])
    if topk is None:
        acc = accumulator_dtype(query.dtype)
        value = value.masked_fill(sections.is_landmark[..., None, None], 0.0)
        if query.device.type == "cpu" and sections.longest() <= _LONGEST:
            out, lse = _walked(query, key, value, is_landmark, scale)
        else:
            with without_autocast(query):
                out, lse = _Dense.apply(query, key, value, sections, scale, acc)
    else:
        out, lse = _retrieved(query, key, value, sections, topk, scale)
    return (out, lse) if return_lse else out


@dataclass(frozen=True, eq=False)
class _Sections:
    """Blocks of each batch item, or of all (``B`` 1): the tokens up to a landmark, with it.

    Attributes:
        block: int64 ``[B, Nk]``, of each token.
        starts, ends: int64 ``[B, blocks]``, first token and one past the last that is no landmark.
        pasts: one past the last with the landmark. Blocks that are not there are empty.
        own: int64 ``[B, Nq]``, block in which each query stands.
        positions: int64 ``[Nq]``, of the queries among the keys.
    """

    is_landmark: Tensor
    block: Tensor
    starts: Tensor
    ends: Tensor
    pasts: Tensor
    own: Tensor
    positions: Tensor

    @staticmethod
    def of(is_landmark: Tensor, num_queries: int) -> _Sections:
        marks = is_landmark if is_landmark.dim() == 2 else is_landmark[None]
        batch, num_keys = marks.shape
        before = marks.long().cumsum(1) - marks.long()
        count = int(before.max()) + 1
        sizes = before.new_zeros(batch, count).scatter_add_(1, before, torch.ones_like(before))
        pasts = sizes.cumsum(1)
        starts = pasts - sizes
        last = (pasts - 1).clamp(min=0)
        closed = marks.gather(1, last)
        ends = pasts - (closed & (sizes > 0)).long()
        positions = torch.arange(num_queries, device=marks.device) + (num_keys - num_queries)
        own = before[:, positions.clamp(min=0)]
        return _Sections(marks, before, starts, ends, pasts, own, positions)

    def longest(self) -> int:
        """Tokens of the longest block that a landmark ends, with it."""
        closed = self.ends < self.pasts
        return int(torch.where(closed, self.pasts - self.starts, 0).max())


# ---- all blocks, in one walk ---------------------------------------------------------------------


def _walked(
    query: Tensor, key: Tensor, value: Tensor, is_landmark: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    if is_landmark.dim() == 2:
        items = [t.split(1) for t in (query, key, value)]
        parts = [
            _walked(q, k, v, marks, scale)
            for q, k, v, marks in zip(*items, is_landmark, strict=True)
        ]
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs), torch.cat(lses)
    places = is_landmark.nonzero()[:, 0].int()
    ends = places.new_tensor([0]), places + 1, places.new_tensor([key.shape[1]])
    queries = Blocks.of(query.shape[1], _QUERIES)
    return routed_op(
        *(unit_stride(t) for t in (query, key, value)), None, None,
        places.new_empty(1, 1, queries.num_blocks, 0), None, None,
        queries.offsets, None, torch.cat(ends), None, None, None, None,
        [LANDMARK_POLICY] * query.shape[2], Rules(is_causal=True).integers(), [1, 1],
        scale, 0.0,
    )  # fmt: skip


# ---- all blocks: a slice of the queries at a time ------------------------------------------------


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sections: _Sections, scale: float,
        acc: torch.dtype,
    ) -> Any:  # fmt: skip
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        lse = query.new_empty(query.shape[:-1], dtype=acc)
        keys, values = _heads_first(key, acc), _heads_first(value, acc)
        group = query.shape[2] // key.shape[2]
        for part in _slices(query, key, sections, scale, acc):
            weights, _, gates, _ = part.weights(keys)
            mixed = weights.transpose(1, 2) @ values[:, : part.seen]
            part.store(out, mixed, group)
            part.store(lse, gates.lse[..., None], group, squeeze=True)
        ctx.save_for_backward(query, key, value)
        ctx.problem = sections, scale, acc
        return out, lse

    @staticmethod
    @differentiable_once("landmark_attention")
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> Any:
        with without_autocast(dout):  # it may be called under one
            return _Dense._gradients(ctx, dout, dlse)

    @staticmethod
    def _gradients(ctx: Any, dout: Tensor, dlse: Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        sections, scale, acc = ctx.problem
        keys, values = _heads_first(key, acc), _heads_first(value, acc)
        dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
        dquery = torch.empty_like(query, memory_format=torch.contiguous_format)
        group = query.shape[2] // key.shape[2]
        for part in _slices(query, key, sections, scale, acc):
            weights, shares, gates, rows = part.weights(keys)
            do, dl = (
                _columns(t[:, part.low : part.high], part.kv_heads, acc)
                for t in (dout, dlse[..., None])
            )
            dvalues[:, : part.seen] += weights @ do
            products = values[:, : part.seen] @ do.transpose(1, 2)
            masses = part.sums(weights * products)  # share of each block times dO . its output
            drift = masses.sum(1, keepdim=True) - dl.transpose(1, 2)
            dgates = masses - shares * drift
            ratio = torch.where(shares > 0, masses / shares.where(shares > 0, 1.0), 0.0)
            inner = torch.where(gates.is_own, drift, ratio)
            dlogits = weights * (products - part.spread(inner))
            dlogits = torch.where(rows, part.spread(dgates.masked_fill(gates.is_own, 0.0)), dlogits)
            part.store(dquery, dlogits.transpose(1, 2) @ keys[:, : part.seen] * scale, group)
            dkeys[:, : part.seen] += dlogits @ part.queries * scale
        batch, heads = key.shape[0], key.shape[2]
        grads = (
            t.unflatten(0, (batch, heads)).transpose(1, 2).to(query.dtype) for t in (dkeys, dvalues)
        )
        return (dquery, *grads, None, None, None)


def _heads_first(x: Tensor, acc: torch.dtype) -> Tensor:
    """``[B, N, H, D]`` as ``[B H, N, D]``."""
    return x.to(acc).transpose(1, 2).flatten(0, 1)


def _columns(x: Tensor, kv_heads: int, acc: torch.dtype) -> Tensor:
    """``[B, queries, H, D]`` as ``[N, columns, D]``."""
    rows = x.to(acc).unflatten(2, (kv_heads, -1))
    return rows.permute(0, 2, 3, 1, 4).flatten(0, 1).flatten(1, 2)


@dataclass(frozen=True, eq=False)
class _Gates:
    lse: Tensor  # of the outer softmax, [N, columns]
    is_own: Tensor  # [N, blocks, columns]: the block that a query stands in


@dataclass(frozen=True, eq=False)
class _Part:
    """Queries ``low`` to ``high`` against the keys up to the last of them. Tables are ``[N, keys,
    columns]``: N a batch item and kv head, a column a query of one of its query heads."""

    low: int
    high: int
    seen: int
    queries: Tensor  # [N, columns, D], scaled nowhere
    sections: _Sections
    scale: float
    batch: int
    kv_heads: int

    def weights(self, keys: Tensor) -> tuple[Tensor, Tensor, _Gates, Tensor]:
        """Weights of the keys; shares of the blocks ``[N, blocks, columns]``; landmarks' rows."""
        sections, group = self.sections, self.queries.shape[1] // (self.high - self.low)
        marks = self._each_head(sections.is_landmark[:, : self.seen])[:, :, None]
        logits = keys[:, : self.seen] @ self.queries.transpose(1, 2) * self.scale
        at = sections.positions[self.low : self.high].repeat(group)
        j = torch.arange(self.seen, device=logits.device)[:, None]
        inner = logits.masked_fill(marks | (j > at), -math.inf)
        top = self.reduce(inner, "max")
        top = torch.where(top == -math.inf, 0.0, top)
        masses = torch.exp(inner - self.spread(top))
        totals = self.sums(masses)
        empty = totals == 0
        safe = totals.where(~empty, 1.0)

        own = self._each_head(sections.own[:, self.low : self.high]).repeat(1, group)[:, None]
        block = torch.arange(totals.shape[1], device=logits.device)[:, None]
        is_own = (block == own) & (at >= 0)
        last = (self._each_head(sections.pasts) - 1).clamp(0, max(self.seen - 1, 0))
        of_landmarks = self._rows(logits, last) if self.seen else totals
        gates = torch.where(is_own, top + torch.log(safe), of_landmarks)
        gates = gates.masked_fill(empty | (block > own) | (at < 0), -math.inf)
        peak = gates.amax(1, keepdim=True)
        peak = torch.where(peak == -math.inf, 0.0, peak)
        shares = torch.exp(gates - peak)
        total = shares.sum(1, keepdim=True)
        none = total == 0
        shares = shares / total.where(~none, 1.0)
        lse = torch.where(none, -math.inf, peak + torch.log(total.where(~none, 1.0)))[:, 0]
        return masses * self.spread(shares / safe), shares, _Gates(lse, is_own), marks

    def sums(self, table: Tensor) -> Tensor:
        return self.reduce(table, "sum")

    def reduce(self, table: Tensor, op: str) -> Tensor:
        """``[N, keys, columns]`` to ``[N, blocks, columns]``."""
        lengths = self.sections.pasts.clamp(max=self.seen) - self.sections.starts.clamp(
            max=self.seen
        )
        if lengths.shape[0] == 1:  # one batch: columns of all heads side by side
            wide = table.transpose(0, 1).flatten(1)
            result = torch.segment_reduce(wide, op, lengths=lengths[0], axis=0, unsafe=True)
            return result.unflatten(1, (table.shape[0], -1)).transpose(0, 1)
        return torch.segment_reduce(
            table, op, lengths=self._each_head(lengths).contiguous(), axis=1, unsafe=True
        )

    def spread(self, blocks: Tensor) -> Tensor:
        """``[N, blocks, columns]`` to ``[N, keys, columns]``."""
        if self.sections.block.shape[0] == 1:
            return blocks.index_select(1, self.sections.block[0, : self.seen])
        return self._rows(blocks, self._each_head(self.sections.block[:, : self.seen]))

    def store(self, to: Tensor, x: Tensor, group: int, squeeze: bool = False) -> None:
        rows = x.unflatten(0, (self.batch, self.kv_heads)).unflatten(2, (group, -1))
        rows = rows.permute(0, 3, 1, 2, 4).flatten(2, 3)
        to[:, self.low : self.high] = rows[..., 0] if squeeze else rows

    def _each_head(self, t: Tensor) -> Tensor:
        """``[B or 1, ...]`` as ``[N or 1, ...]``."""
        return t if t.shape[0] == 1 else t.repeat_interleave(self.kv_heads, 0)

    @staticmethod
    def _rows(table: Tensor, index: Tensor) -> Tensor:
        if index.shape[0] == 1:
            return table.index_select(1, index[0])
        return table[torch.arange(table.shape[0], device=table.device)[:, None], index]


def _slices(query: Tensor, key: Tensor, sections: _Sections, scale: float, acc: torch.dtype) -> Any:
    batch, num_queries, heads, _ = query.shape
    kv_heads, offset = key.shape[2], key.shape[1] - num_queries
    for part in slices(num_queries, batch * heads * key.shape[1], _SLICE, query.device):
        low, high = part.start, part.stop
        columns = _columns(query[:, low:high], kv_heads, acc)
        seen = max(0, high + offset)
        yield _Part(low, high, seen, columns, sections, scale, batch, kv_heads)


# ---- the best blocks: retrieval ------------------------------------------------------------------


def _retrieved(
    query: Tensor, key: Tensor, value: Tensor, sections: _Sections, topk: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Each selected block attended alone, its weight its landmark's score: a merge by lse."""
    batch, num_queries = query.shape[:2]
    num_keys = key.shape[1]
    starts, ends, pasts = (
        t.expand(batch, -1) for t in (sections.starts, sections.ends, sections.pasts)
    )
    own = sections.own.expand(batch, -1)
    places = (pasts - 1).clamp(min=0)[:, :, None, None].expand(-1, -1, *key.shape[2:])
    landmarks = key.gather(1, places)
    lists, scores = select_topk(
        query, landmarks, topk, ranges=(torch.zeros_like(own), own), scale=scale,
        exclude=(ends <= starts)[:, None, None], return_values=True,
    )  # fmt: skip

    def attend(first: Tensor, past: Tensor) -> Any:
        plan = BlockPlan.of_spans(first[..., None], past[..., None], num_queries, 1, num_keys)
        return routed_attention(query, key, value, plan, scale=scale, return_lse=True)

    blocks = lists.long().clamp(min=0).flatten(1)  # [B, H Nq topk]
    firsts, pasts_of = (t.gather(1, blocks).unflatten(1, lists.shape[1:]) for t in (starts, ends))
    pasts_of = torch.where(lists < 0, firsts, pasts_of)
    outputs, lses = [], []
    for slot in range(topk):
        outputs.append(attend(firsts[..., slot], pasts_of[..., slot])[0])
        lses.append(scores[..., slot].transpose(1, 2))
    at = sections.positions + 1
    begin = torch.minimum(starts.gather(1, own), at.clamp(min=0))
    end = torch.minimum(ends.gather(1, own), at)
    out, lse = attend(begin[:, None], torch.where(at > 0, end, 0)[:, None])
    return merge_attentions([*outputs, out], [*lses, lse])


def _check(is_landmark: Any, query: Tensor, key: Tensor) -> None:
    if not isinstance(is_landmark, Tensor) or is_landmark.dtype != torch.bool:
        raise TypeError(f"is_landmark must be a bool tensor, got {kind_of(is_landmark)}")
    batch, tokens = key.shape[:2]
    if tuple(is_landmark.shape) not in ((tokens,), (batch, tokens)):
        raise ValueError(
            f"is_landmark must be [{tokens}] or [{batch}, {tokens}], got {tuple(is_landmark.shape)}"
        )
    if is_landmark.device != query.device:
        raise ValueError(
            f"is_landmark must be on the device of query, {query.device}, got {is_landmark.device}"
        )
