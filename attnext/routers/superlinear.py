# SPDX-License-Identifier: Apache-2.0
"""Superlinear attention (arXiv 2601.18401): spans around anchors that lie on stripes of powers."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..arguments import check_tensor, has_numbers, under_autocast, without_autocast
from ..constants import constant
from ..functional import sliding_window_attention
from ..merging import merge, merge_attentions
from ..plans import BlockPlan
from ..routed import routed_attention
from ..selection import largest
from .inputs import Rows, by_group, check_indices, check_integer, check_sequences, exact, steps

Power = float | Fraction

_MOST_SPANS = 16
_MOST_DENOMINATOR = 1000
_ALL = 2**62  # keys of a window that no sequence has
_FEW = 64  # queries whose anchors are gathered; more share shifted slices of the keys


class Spans(NamedTuple):
    """What the search found, ``[B, N, H, spans]`` each, int64, best span first.

    ``anchors`` are key indices, -1 where there is none; the span is ``[starts, ends)``, empty where
    there is none.
    """

    anchors: Tensor
    starts: Tensor
    ends: Tensor


def stripe_table(power: Power, limit: int, factor: Power = 1, most: int | None = None) -> list[int]:
    """``floor((i / factor) ** (1 / power))`` for i = 0, 1, ... while it is at most ``limit``, and i
    at most ``most``.

    In integers: single precision is off by 27 positions within the first 8000 stripes of power
    0.55, and double precision has no guarantee where the root is a whole number.
    """
    p, c = _fraction("power", power), _fraction("factor", factor)
    below, above = p.numerator, p.denominator
    table, root = [0], 0
    if c == 0:  # lengths of nothing: no number of tokens makes one
        return table
    i = 0
    while most is None or i < most:
        i += 1
        # root^below <= (i / factor)^above, multiplied out
        want, unit = (i * c.denominator) ** above, c.numerator**above

        def fits(n: int, want: int = want, unit: int = unit) -> bool:
            return n**below * unit <= want

        if fits(limit + 1):
            return table
        guess = min(float(i / c) ** (above / below), float(limit + 1))
        root = max(root, int(guess))
        while not fits(root):
            root -= 1
        while fits(root + 1):
            root += 1
        table.append(root)
    return table


@constant(maxsize=64)
def _table(
    power: Fraction, limit: int, factor: Fraction, device: torch.device
) -> tuple[list[int], Tensor]:
    # Limits are powers of two: few tables serve a cache that grows.
    table = stripe_table(power, limit, factor, limit)
    with torch.inference_mode(False):
        return table, torch.tensor(table, device=device)


def span_length(tokens: Tensor, power: Power, factor: Power, limit: int) -> Tensor:
    """``ceil(factor * tokens ** power)``, exact, of int64 tensors of any shape, up to ``limit``.

    It is the least L with ``tokens <= floor((L / factor) ** (1 / power))``.
    """
    p, c = _power("power", power), _fraction("factor", factor)
    if c == 0:
        return torch.zeros_like(tokens)
    roots = _table(p, 1 << limit.bit_length(), c, tokens.device)[1]
    return torch.searchsorted(roots, tokens.contiguous())


def _fraction(name: str, x: Any) -> Fraction:
    """A decimal number as it reads: 0.55 is 11/20, not the nearest binary number."""
    if isinstance(x, bool) or not isinstance(x, (int, float, Fraction)):
        raise TypeError(f"{name} must be a number or a Fraction, got {x!r}")
    if not 0 <= x < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {x}")
    fraction = Fraction(str(x)) if isinstance(x, float) else Fraction(x)
    if fraction.denominator > _MOST_DENOMINATOR:
        raise ValueError(
            f"{name} must have a denominator of at most {_MOST_DENOMINATOR}, got {fraction}: give "
            "a fractions.Fraction such as Fraction(2, 3)"
        )
    return fraction


def _power(name: str, x: Any) -> Fraction:
    fraction = _fraction(name, x)
    if not 0 < fraction <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {x}")
    return fraction


def window_of(sw_index: int, search_power: Power) -> int:
    """Keys of the window: the stripes up to ``sw_index`` lie in it, the next just before it."""
    check_integer("sw_index", sw_index, 0)
    power = _power("search_power", search_power)
    root = (sw_index + 1) ** power.denominator
    low, high = 0, 1 << (root.bit_length() // power.numerator + 1)
    while high - low > 1:  # low^numerator <= root < high^numerator
        middle = (low + high) // 2
        if middle**power.numerator <= root:
            low = middle
        else:
            high = middle
    return low - 1


def _window(sw_index: int, search_power: Power) -> int:
    """As kernels take it."""
    return min(window_of(sw_index, search_power), _ALL)


def superlinear_search(
    search_query: Tensor,
    key: Tensor,
    *,
    sw_index: int = 65,
    num_spans: int = 3,
    search_power: Power = 0.55,
    span_power: Power = 0.55,
    backward_factor: Power = 3,
    forward_factor: Power = 1,
    query_positions: Tensor | None = None,
    key_starts: Tensor | None = None,
    chunk_size: int | None = None,
) -> Spans:
    """For each query the anchors with the largest ``search_query . key``, and spans around them.

    Anchors of a query at ``q`` are the keys ``q - floor(i ** (1 / search_power)) + 1`` for
    ``i = sw_index + 1, ...``, all older than the window of :func:`superlinear_attention`. Of equal
    scores the farther anchor wins; a NaN never does. Scores are not scaled.

    Shapes:
        search_query ``[B, Nq, H, D]``, key ``[B, Nk, Hkv, D]``; the result is :class:`Spans` of
        ``[B, Nq, H, num_spans]``.

    Args:
        sw_index, num_spans, ..., key_starts: see :func:`superlinear_attention`.
        chunk_size: queries that are scored at a time; by default as many as keep the scores small.

    Numerics:
        Scores in float32 (float64 for float64); positions and lengths in exact integers.

    Errors:
        ValueError or TypeError, naming the argument.

    Complexity:
        O(Nq Nk^search_power D) time; memory of one chunk's scores. No gradient.

    Example:
        >>> import torch
        >>> from attnext.routers.superlinear import superlinear_search
        >>> s, k = torch.randn(1, 100, 2, 16), torch.randn(1, 100, 2, 16)
        >>> superlinear_search(s, k, sw_index=3, num_spans=2, search_power=0.5).anchors.shape
        torch.Size([1, 100, 2, 2])
    """
    check_sequences(search_query, key, key)
    check_integer("num_spans", num_spans, 1)
    if num_spans > _MOST_SPANS:
        raise ValueError(f"num_spans must be at most {_MOST_SPANS}, got {num_spans}")
    if chunk_size is not None:
        check_integer("chunk_size", chunk_size, 1)
    window = _window(sw_index, search_power)
    span = (_power("span_power", span_power), _fraction("backward_factor", backward_factor))
    ahead = _fraction("forward_factor", forward_factor)
    batch, num_queries, heads, _ = search_query.shape
    num_keys, device = key.shape[1], key.device
    positions, starts = _places(search_query, key, query_positions, key_starts)
    table, offsets = _table(
        _power("search_power", search_power), 1 << num_keys.bit_length(), Fraction(1), device
    )
    stripes = slice(sw_index + 1, sum(root <= num_keys for root in table))
    # Far to near: the first of equals is the farthest.
    roots, offsets = table[stripes][::-1], offsets[stripes].flip(0)
    shifted = query_positions is None and num_queries > _FEW

    parts = []
    count = min(num_spans, offsets.numel())
    with torch.no_grad():
        q, k = by_group(search_query.detach(), key), key.detach()
        row = heads if shifted else heads + k.shape[2] * k.shape[3]
        per_query = offsets.numel() * batch * row
        for part in steps(num_queries if count else 0, per_query, device, chunk_size):
            at = positions[:, part, None] - offsets + 1  # [B or 1, n, anchors]
            valid = (at >= starts[:, None, None]) & (at < num_keys)
            if shifted:
                begin = part.start + num_keys - num_queries + 1
                scores = _shifted_scores(q[:, part], k, [begin - root for root in roots])
            else:
                scores = _gathered_scores(q[:, part], k, at)  # [B, H, n, anchors]
            scores = scores.masked_fill(~valid[:, None] | scores.isnan(), -math.inf)
            best, place = largest(scores, count, tie="low", ordered=True)
            chosen = at[:, None].expand(batch, heads, -1, -1).gather(-1, place)
            parts.append(torch.where(best > -math.inf, chosen, -1).transpose(1, 2))
        if parts:
            anchors = nn.functional.pad(torch.cat(parts, 1), (0, num_spans - count), value=-1)
        else:
            anchors = torch.full((batch, num_queries, heads, num_spans), -1, device=device)

        ago = (positions + 1 - starts[:, None]).clamp(min=0)
        back, forth = (
            span_length(ago, span[0], f, num_keys)[..., None, None] for f in (span[1], ahead)
        )
        here, first = positions[..., None, None], starts[:, None, None, None]
        left = torch.maximum(anchors - back, first)
        right = torch.minimum(anchors + forth, here - window if window else here)
        right = right.clamp(max=num_keys - 1) + 1
        nothing = anchors < 0
    return Spans(anchors, left.masked_fill(nothing, 0), right.masked_fill(nothing, 0))


def _places(
    query: Tensor, key: Tensor, query_positions: Tensor | None, key_starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Positions of the queries ``[B or 1, Nq]`` and first keys ``[B or 1]``, int64."""
    batch, num_queries = query.shape[:2]
    if query_positions is None:
        positions = torch.arange(num_queries, device=key.device)[None] + key.shape[1] - num_queries
    else:
        check_indices("query_positions", query_positions, ((batch, num_queries), (1, num_queries)))
        positions = query_positions.to(key.device, torch.int64)
        looked_at = key.device.type == "cpu" and has_numbers(positions)
        if looked_at and bool((positions >= key.shape[1]).any()):
            raise ValueError(
                f"query_positions must be below the number of keys, {key.shape[1]}, "
                f"got {int(positions.max())}"
            )
    if key_starts is None:
        return positions, torch.zeros(1, dtype=torch.int64, device=key.device)
    check_indices("key_starts", key_starts, ((batch,),))
    return positions, key_starts.to(key.device, torch.int64).clamp(min=0)


def _shifted_scores(q: Tensor, k: Tensor, first: list[int]) -> Tensor:
    """Queries that follow one another: the keys of one stripe follow one another too. ``first``
    are those of the first query."""
    q = exact(q)
    batch, count, kv_heads, group, _ = q.shape
    scores = q.new_full((len(first), batch, count, kv_heads, group), -math.inf)
    for i, begin in enumerate(first):
        skip, end = max(0, -begin), min(begin + count, k.shape[1])
        if begin + skip < end:
            keys = exact(k[:, begin + skip : end, :, None])
            to = slice(skip, end - begin)
            with without_autocast(q):
                scores[i, :, to] = torch.linalg.vecdot(q[:, to], keys)
    return scores.permute(1, 3, 4, 2, 0).flatten(1, 2)


def _gathered_scores(q: Tensor, k: Tensor, at: Tensor) -> Tensor:
    item = torch.arange(k.shape[0], device=k.device)[:, None, None, None]
    head = torch.arange(k.shape[2], device=k.device)[:, None]
    keys = exact(Rows(k)(item, at.clamp(0, k.shape[1] - 1)[:, :, None], head))
    with without_autocast(q):
        scores = exact(q) @ keys.transpose(-1, -2)  # [B, n, Hkv, G, anchors]
    return scores.permute(0, 2, 3, 1, 4).flatten(1, 2)


def superlinear_attention(
    search_query: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sw_index: int = 65,
    num_spans: int = 3,
    search_power: Power = 0.55,
    span_power: Power = 0.55,
    backward_factor: Power = 3,
    forward_factor: Power = 1,
    query_positions: Tensor | None = None,
    key_starts: Tensor | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Causal attention to a window and to spans found by search, in prefill and decoding.

    Each span shares a softmax with the window; the results are mixed by the softmax of the search
    scores ``z`` of their anchors, which is what trains the search. A query without anchor attends
    its window alone.

    Shapes:
        search_query and query ``[B, Nq, H, D]``, key ``[B, Nk, Hkv, D]``, value
        ``[B, Nk, Hkv, Dv]``; the result is ``[B, Nq, H, Dv]``. Query ``i`` stands at key
        ``i + Nk - Nq``: one query against a cache is a decoding step.

    Args:
        sw_index: stripes inside the window, which holds the last
            ``floor((sw_index + 1) ** (1 / search_power)) - 1`` keys with the query's own; 0: none.
        num_spans: anchors that are kept.
        search_power: about ``Nk ** search_power`` anchors a query. Powers and factors are exact: a
            decimal number as it reads, or a ``fractions.Fraction``.
        span_power, backward_factor, forward_factor: a span holds ``ceil(factor * n ** span_power)``
            keys before and after its anchor, ``n`` the keys up to the query. Spans reach every key
            if the two powers sum to 1 or more.
        query_positions: int ``[B or 1, Nq]``, key indices at which the queries stand, for caches
            with room behind the last key. Checked against their number on the CPU, where nobody has
            to wait for that.
        key_starts: int ``[B]``, the first key of each batch item: keys before it are padding.
        scale: of the attention, by default ``D ** -0.5``; the search has none.
        chunk_size: see :func:`superlinear_search`.

    Numerics:
        Window and spans are each rounded to the dtype once, and joined in float32 (float64 for
        float64). Gates that are not a number count as equal. A query without keys gives 0.
        Differentiable: of the search, through the gates, to search_query and key.

    Errors:
        ValueError, TypeError or NotImplementedError, naming the argument.

    Complexity:
        O(N^(1 + search_power)) for the search and O(num_spans N^(1 + span_power)) for the spans.

    Source:
        Superlinear multi-step attention (arXiv 2601.18401), with N = 2 steps.

    Example:
        >>> import torch
        >>> from attnext.routers.superlinear import superlinear_attention
        >>> s, q, k, v = (torch.randn(1, 100, 2, 16) for _ in range(4))
        >>> superlinear_attention(s, q, k, v, sw_index=3, search_power=0.5).shape
        torch.Size([1, 100, 2, 16])
    """
    search_query, query, key, value = under_autocast(search_query, query, key, value)
    check_sequences(query, key, value)
    check_tensor("search_query", search_query, "a floating-point", query)
    if search_query.shape != query.shape or search_query.dtype != query.dtype:
        raise ValueError(
            f"search_query must have shape and dtype of query, {tuple(query.shape)} and "
            f"{query.dtype}, got {tuple(search_query.shape)} and {search_query.dtype}"
        )
    spans = superlinear_search(
        search_query,
        key,
        sw_index=sw_index,
        num_spans=num_spans,
        search_power=search_power,
        span_power=span_power,
        backward_factor=backward_factor,
        forward_factor=forward_factor,
        query_positions=query_positions,
        key_starts=key_starts,
        chunk_size=chunk_size,
    )
    num_queries, num_keys = query.shape[1], key.shape[1]
    window = _window(sw_index, search_power)

    def listed(begin: Tensor, end: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        starts, ends = (x.transpose(1, 2)[..., None] for x in (begin, end))
        plan = BlockPlan.of_spans(starts, ends, num_queries, 1, num_keys)
        found: tuple[Tensor, Tensor] = routed_attention(
            q, key, value, plan, scale=scale, return_lse=True
        )
        return found

    # Every span is a head of its own.
    repeated = query[..., None, :].expand(-1, -1, -1, num_spans, -1).flatten(2, 3)
    outs, lses = listed(spans.starts.flatten(2), spans.ends.flatten(2), repeated)
    outs, lses = (x.unflatten(2, (query.shape[2], num_spans)) for x in (outs, lses))
    if window:
        if query_positions is None and key_starts is None:
            near = sliding_window_attention(query, key, value, window, scale=scale, return_lse=True)
        else:
            at, first = _places(query, key, query_positions, key_starts)
            begin = torch.maximum(at - window + 1, first[:, None])[..., None]
            end = (at[..., None] + 1).clamp(max=num_keys)
            near = listed(begin, end.expand_as(begin), query)
        joined = [
            merge_attentions((near[0], outs[..., s, :]), (near[1], lses[..., s]))[0]
            for s in range(num_spans)
        ]
        outs = torch.stack(joined, -2)
    gates = _gates(search_query, key, spans.anchors)
    mixed: Tensor = merge(outs.unbind(-2), gates=gates, mode="raw")
    return mixed


def _gates(search_query: Tensor, key: Tensor, anchors: Tensor) -> Tensor:
    """Softmax of the scores of the anchors found, ``[B, N, H, spans]``; of none: the first is 1."""
    heads, group = search_query.shape[2], search_query.shape[2] // key.shape[2]
    item = torch.arange(key.shape[0], device=key.device)[:, None, None, None]
    head = (torch.arange(heads, device=key.device) // group)[:, None]
    if key.shape[1] == 0:
        z = exact(search_query.new_zeros(anchors.shape))
    else:
        at = (item * key.shape[1] + anchors.clamp(min=0)) * key.shape[2] + head
        chosen = nn.functional.embedding(at, key.flatten(0, 2))  # [B, N, H, spans, D]
        z = (exact(search_query)[..., None, :] * exact(chosen)).sum(-1)
    missing = anchors < 0
    missing = torch.cat([missing[..., :1] & False, missing[..., 1:]], -1)
    z = torch.where(anchors < 0, 0.0, z).masked_fill(missing, -math.inf)
    gates = torch.softmax(z, -1)
    return torch.where(gates.isnan(), 1.0 / anchors.shape[-1], gates)
