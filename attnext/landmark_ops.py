# SPDX-License-Identifier: Apache-2.0
"""The registered operators of landmark attention over all blocks: in one walk of the CPU's kernels
where these take the blocks, elsewhere by torch, a slice of the queries at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arguments import without_autocast
from .autograd import LIBRARY, differentiable, one_slice_at_a_time
from .ops import accumulator_dtype, unit_stride
from .plans import Blocks
from .routed_ops import LANDMARK_POLICY, Rules
from .slices import slices

_SLICE = 2**21  # logits in flight on a CPU
_QUERIES = 64  # of a work item
_LONGEST = 64  # keys of a block, its landmark among them, that the CPU's kernels take

# query `[B, Nq, H, D]`, key `[B, Nk, Hkv, D]`, value `[B, Nk, Hkv, Dv]`, its rows at landmarks
# zeros, is_landmark bool `[Nk]` or `[B, Nk]`; results out and lse, of the outer softmax.
LIBRARY.define(
    "landmark_forward(Tensor query, Tensor key, Tensor value, Tensor is_landmark, float scale) -> "
    "(Tensor, Tensor)"
)
LIBRARY.define(
    "landmark_backward(Tensor query, Tensor key, Tensor value, Tensor is_landmark, float scale, "
    "Tensor out, Tensor lse, Tensor dout, Tensor? dlse, bool[] needs) -> (Tensor, Tensor, Tensor)"
)


@dataclass(frozen=True, eq=False)
class Sections:
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
    def of(is_landmark: Tensor, num_queries: int) -> Sections:
        marks = is_landmark if is_landmark.dim() == 2 else is_landmark[None]
        batch, num_keys = marks.shape
        before = marks.long().cumsum(1) - marks.long()
        count = num_keys if marks.is_meta else int(before.max()) + 1
        sizes = before.new_zeros(batch, count).scatter_add_(1, before, torch.ones_like(before))
        pasts = sizes.cumsum(1)
        starts = pasts - sizes
        last = (pasts - 1).clamp(min=0)
        closed = marks.gather(1, last)
        ends = pasts - (closed & (sizes > 0)).long()
        positions = torch.arange(num_queries, device=marks.device) + (num_keys - num_queries)
        own = before[:, positions.clamp(min=0)]
        return Sections(marks, before, starts, ends, pasts, own, positions)

    def longest(self) -> int:
        """Tokens of the longest block that a landmark ends, with it."""
        closed = self.ends < self.pasts
        return int(torch.where(closed, self.pasts - self.starts, 0).max())


def _forward_fake(
    query: Tensor, key: Tensor, value: Tensor, is_landmark: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:-1], dtype=accumulator_dtype(query.dtype))
    return query.new_empty((*query.shape[:-1], value.shape[-1])), lse


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in args[:3])


def forward(
    query: Tensor, key: Tensor, value: Tensor, is_landmark: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    sections = Sections.of(is_landmark, query.shape[1])
    if _is_walked(query, sections):
        return _walked(query, key, value, is_landmark, scale)
    with without_autocast(query):
        return _dense(query, key, value, sections, scale)


def backward(
    query: Tensor, key: Tensor, value: Tensor, is_landmark: Tensor, scale: float, out: Tensor,
    lse: Tensor, dout: Tensor, dlse: Tensor | None, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    sections = Sections.of(is_landmark, query.shape[1])
    if _is_walked(query, sections):
        return _walked_gradients(query, key, value, is_landmark, scale, out, lse, dout, dlse)
    with without_autocast(query):  # it may be called under one
        return _dense_gradients(query, key, value, sections, scale, dout, dlse)


def _is_walked(query: Tensor, sections: Sections) -> bool:
    return query.device.type == "cpu" and sections.longest() <= _LONGEST


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("landmark_forward", forward, _device)
    LIBRARY.impl("landmark_backward", backward, _device)
torch.library.register_fake("attnext::landmark_forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("attnext::landmark_backward", _backward_fake, lib=LIBRARY)

landmark_op = differentiable(
    "landmark",
    forward,
    backward,
    lambda apply, size, in_dims, args, more: one_slice_at_a_time(apply, size, in_dims, args),
    num_tensors=4,
    num_grads=3,
    num_results=2,
)


# ---- in one walk ---------------------------------------------------------------------------------


def _problem(
    query: Tensor, key: Tensor, value: Tensor, is_landmark: Tensor, scale: float
) -> tuple[Any, ...]:
    """That of routed attention, of landmarks that all batch items share."""
    places = is_landmark.nonzero()[:, 0].int()
    ends = places.new_tensor([0]), places + 1, places.new_tensor([key.shape[1]])
    queries = Blocks.of(query.shape[1], _QUERIES)
    return (
        *(unit_stride(t) for t in (query, key, value)), None, None,
        places.new_empty(1, 1, queries.num_blocks, 0), None, None,
        queries.offsets, None, torch.cat(ends), None, None, None, None,
        [LANDMARK_POLICY] * query.shape[2], Rules(is_causal=True).integers(), [1, 1],
        scale, 0.0,
    )  # fmt: skip


def _items(is_landmark: Tensor, *tensors: Tensor | None) -> Any:
    """The marks and tensors of the batch items, one by one where their landmarks differ."""
    if is_landmark.dim() == 1:
        return [(is_landmark, *tensors)]
    count = len(is_landmark)
    split = [[None] * count if t is None else t.split(1) for t in tensors]
    return list(zip(is_landmark, *split, strict=True))


def _walked(
    query: Tensor, key: Tensor, value: Tensor, is_landmark: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    run = torch.ops.attnext.routed_forward.default
    parts = [
        run(*_problem(q, k, v, marks, scale))
        for marks, q, k, v in _items(is_landmark, query, key, value)
    ]
    outs, lses = zip(*parts, strict=True)
    return parts[0] if len(parts) == 1 else (torch.cat(outs), torch.cat(lses))


def _walked_gradients(
    query: Tensor, key: Tensor, value: Tensor, is_landmark: Tensor, scale: float, *results: Any
) -> tuple[Tensor, ...]:
    run, needs = torch.ops.attnext.routed_backward.default, [True, True, True, False, False]
    parts = [
        run(*_problem(q, k, v, marks, scale), *given, needs)[:3]
        for marks, q, k, v, *given in _items(is_landmark, query, key, value, *results)
    ]
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))


# ---- a slice of the queries at a time ------------------------------------------------------------


def _dense(
    query: Tensor, key: Tensor, value: Tensor, sections: Sections, scale: float
) -> tuple[Tensor, Tensor]:
    acc = accumulator_dtype(query.dtype)
    out, lse = _forward_fake(query, key, value, sections.is_landmark, scale)
    keys, values = _heads_first(key, acc), _heads_first(value, acc)
    group = query.shape[2] // key.shape[2]
    for part in _slices(query, key, sections, scale, acc):
        weights, _, gates, _ = part.weights(keys)
        mixed = weights.transpose(1, 2) @ values[:, : part.seen]
        part.store(out, mixed, group)
        part.store(lse, gates.lse[..., None], group, squeeze=True)
    return out, lse


def _dense_gradients(
    query: Tensor, key: Tensor, value: Tensor, sections: Sections, scale: float, dout: Tensor,
    dlse: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    acc = accumulator_dtype(query.dtype)
    keys, values = _heads_first(key, acc), _heads_first(value, acc)
    dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
    dquery = query.new_empty(query.shape)
    group = query.shape[2] // key.shape[2]
    for part in _slices(query, key, sections, scale, acc):
        weights, shares, gates, rows = part.weights(keys)
        do = _columns(dout[:, part.low : part.high], part.kv_heads, acc)
        dvalues[:, : part.seen] += weights @ do
        products = values[:, : part.seen] @ do.transpose(1, 2)
        masses = part.sums(weights * products)  # share of each block times dO . its output
        drift = masses.sum(1, keepdim=True)
        if dlse is not None:
            dl = _columns(dlse[:, part.low : part.high, :, None], part.kv_heads, acc)
            drift = drift - dl.transpose(1, 2)
        dgates = masses - shares * drift
        ratio = torch.where(shares > 0, masses / shares.where(shares > 0, 1.0), 0.0)
        inner = torch.where(gates.is_own, drift, ratio)
        dlogits = weights * (products - part.spread(inner))
        dlogits = torch.where(rows, part.spread(dgates.masked_fill(gates.is_own, 0.0)), dlogits)
        part.store(dquery, dlogits.transpose(1, 2) @ keys[:, : part.seen] * scale, group)
        dkeys[:, : part.seen] += dlogits @ part.queries * scale
    batch, heads = key.shape[0], key.shape[2]
    dkey, dvalue = (
        t.unflatten(0, (batch, heads)).transpose(1, 2).to(query.dtype).contiguous()
        for t in (dkeys, dvalues)
    )
    return dquery, dkey, dvalue


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
    sections: Sections
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


def _slices(query: Tensor, key: Tensor, sections: Sections, scale: float, acc: torch.dtype) -> Any:
    batch, num_queries, heads, _ = query.shape
    kv_heads, offset = key.shape[2], key.shape[1] - num_queries
    for part in slices(num_queries, batch * heads * key.shape[1], _SLICE, query.device):
        low, high = part.start, part.stop
        columns = _columns(query[:, low:high], kv_heads, acc)
        seen = max(0, high + offset)
        yield _Part(low, high, seen, columns, sections, scale, batch, kv_heads)
