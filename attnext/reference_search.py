# SPDX-License-Identifier: Apache-2.0
"""The specification of the routers that search a sequence: loops over one query at a time, in
float64, with nothing shared with :mod:`attnext.routers`."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor


def stripe(i: int, power: Fraction) -> int:
    """``floor(i ** (1 / power))``, by counting up from a bisection of whole numbers."""
    low, high = 0, 1
    while high**power.numerator <= i**power.denominator:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if middle**power.numerator <= i**power.denominator:
            low = middle
        else:
            high = middle
    return low


def span_length(tokens: int, power: Fraction, factor: Fraction) -> int:
    """``ceil(factor * tokens ** power)``, the first whole number that is large enough."""
    length, enough = 0, factor**power.denominator * tokens**power.numerator
    while length**power.denominator < enough:
        length += 1
    return length


def superlinear_spans(
    search_query: Tensor,
    key: Tensor,
    *,
    sw_index: int,
    num_spans: int,
    search_power: Fraction,
    span_power: Fraction,
    backward_factor: Fraction,
    forward_factor: Fraction,
    query_positions: Tensor | None = None,
    key_starts: Tensor | None = None,
) -> list[list[list[list[tuple[int, int, int]]]]]:
    """``[b][i][h]``: (anchor, start, end) of the spans found, best first."""
    q1, k = search_query.double(), key.double()
    batch, num_queries, heads, _ = q1.shape
    num_keys, group = k.shape[1], heads // k.shape[2]
    window = stripe(sw_index + 1, search_power) - 1
    result = []
    for b in range(batch):
        start = 0 if key_starts is None else int(key_starts[b])
        rows = []
        for i in range(num_queries):
            if query_positions is None:
                at = i + num_keys - num_queries
            else:
                at = int(query_positions[b % query_positions.shape[0], i])
            row = []
            for h in range(heads):
                scored = []
                number = sw_index + 1
                while at - stripe(number, search_power) + 1 >= max(start, 0):
                    anchor = at - stripe(number, search_power) + 1
                    z = float(q1[b, i, h] @ k[b, anchor, h // group])
                    if not math.isnan(z) and z > -math.inf:
                        scored.append((-z, anchor))  # of equals the lower anchor, the farther
                    number += 1
                found = []
                for _, anchor in sorted(scored)[:num_spans]:
                    seen = at + 1 - start
                    begin = max(anchor - span_length(seen, span_power, backward_factor), start, 0)
                    end = min(
                        anchor + span_length(seen, span_power, forward_factor), at, num_keys - 1
                    )
                    end = min(end, at - window) if window else end
                    found.append((anchor, begin, end + 1))
                row.append(found)
            rows.append(row)
        result.append(rows)
    return result


def superlinear_attention(
    search_query: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    query_positions: Tensor | None = None,
    key_starts: Tensor | None = None,
    **search: Any,
) -> Tensor:
    """A joint softmax over window and span for each span, mixed by the softmax of the scores."""
    q1, q2, k, v = (t.double() for t in (search_query, query, key, value))
    batch, num_queries, heads, dim = q2.shape
    num_keys, group = k.shape[1], heads // k.shape[2]
    scale = dim**-0.5 if scale is None else scale
    window = stripe(search["sw_index"] + 1, search["search_power"]) - 1
    places: Any = {"query_positions": query_positions, "key_starts": key_starts}
    spans = superlinear_spans(q1.detach(), k.detach(), **places, **search)
    rows = []
    for b in range(batch):
        start = 0 if key_starts is None else int(key_starts[b])
        for i in range(num_queries):
            if query_positions is None:
                at = i + num_keys - num_queries
            else:
                at = int(query_positions[b % query_positions.shape[0], i])
            near = set(range(max(at - window + 1, start, 0), min(at + 1, num_keys)))
            for h in range(heads):
                found = spans[b][i][h]
                outs = []
                for _, begin, end in found or [(0, 0, 0)]:
                    keys = sorted(near | set(range(begin, end)))
                    if not keys:
                        outs.append(v.new_zeros(v.shape[-1]))
                        continue
                    logits = scale * (k[b, keys, h // group] @ q2[b, i, h])
                    outs.append(torch.softmax(logits, 0) @ v[b, keys, h // group])
                if found:
                    z = torch.stack([q1[b, i, h] @ k[b, a, h // group] for a, _, _ in found])
                    gates = torch.softmax(z, 0)
                else:
                    gates = q1.new_ones(1)
                rows.append(sum(g * o for g, o in zip(gates, outs, strict=True)))
    if not rows:
        return v.new_zeros(batch, num_queries, heads, v.shape[-1])
    return torch.stack(rows).reshape(batch, num_queries, heads, -1)


# ---- halving and pruning -------------------------------------------------------------------------


def _largest(scores: Any) -> float:
    """The largest; -3e38 if one of them is no number."""
    seen = list(scores)
    return -3e38 if any(map(math.isnan, seen)) else max(seen)


def _best(scored: list[tuple[float, Any]], count: int) -> list[Any]:
    """The ``count`` of largest score in rising order, of equals the first."""
    ranked = sorted(enumerate(scored), key=lambda entry: (-entry[1][0], entry[0]))
    return sorted(item for _, (_, item) in ranked[:count])


def _block_samples(
    q: Tensor, first: int, size: int, stride: int, reduce: str, offset: int
) -> list[tuple[Tensor, int]]:
    """Sampled queries ``[H, D]`` of a block, and the positions they stand at."""
    end, stride = min(first + size, q.shape[0]), min(stride, size)
    if reduce == "mean":
        groups = [range(g, min(g + stride, end)) for g in range(first, end, stride)]
        groups = [g for g in groups if g[0] - first + stride <= size]
        return [(q[g.start : g.stop].mean(0), g[-1] + offset) for g in groups]
    places = range(first + stride - 1, first + size, stride)
    return [(q[min(p, end - 1)], min(p, end - 1) + offset) for p in places]


def hip_blocks(
    query: Tensor,
    key: Tensor,
    *,
    mask_k: int,
    query_block: int,
    key_block: int,
    query_stride: int,
    representative: str,
    is_causal: bool,
    share_heads: bool,
) -> list[list[list[list[int]]]]:
    """``[b][list][block]``: the key blocks of HiP, in rising order."""
    q, k = query.double(), key.double()
    batch, num_queries, heads, _ = q.shape
    num_keys, kv_heads = k.shape[1], k.shape[2]
    lists = kv_heads if share_heads else heads
    offset = num_keys - num_queries
    result = []
    for b in range(batch):
        per_list = []
        for n in range(lists):
            mine = range(n * heads // lists, (n + 1) * heads // lists)
            head = n * kv_heads // lists
            per_block = []
            for first in range(0, num_queries, query_block):
                samples = _block_samples(q[b], first, query_block, query_stride, "stride", offset)
                last = min(first + query_block, num_queries) - 1 + offset
                seen = min(max(last + 1, 0), num_keys) if is_causal else num_keys
                total = -(-seen // key_block)
                count = min(mask_k // key_block, -(-num_keys // key_block))
                spans = [(c * total // count, (c + 1) * total // count) for c in range(count)]
                spans = [s for s in spans if s[0] < s[1]]
                while any(hi - lo > 1 for lo, hi in spans):
                    halves = []
                    for lo, hi in spans:
                        middle = (lo + hi) // 2
                        halves += [(lo, middle), (middle, hi)]
                    scored = []
                    for lo, hi in halves:
                        if lo == hi:
                            continue
                        at = lo * key_block
                        if representative == "centre":
                            at = (at + min(hi * key_block, seen)) // 2
                        score = _largest(
                            float(s[h] @ k[b, at, head]) if at <= p or not is_causal else -3e38
                            for s, p in samples
                            for h in mine
                        )
                        scored.append((score, (lo, hi)))
                    spans = _best(scored, count)
                per_block.append([lo for lo, _ in spans])
            per_list.append(per_block)
        result.append(per_list)
    return result


def infinite_hip_blocks(
    query: Tensor,
    key: Tensor,
    *,
    stages: Any,
    block_size: int,
    sinks: int,
    window_size: int,
    query_reduce: str,
    share_heads: bool,
) -> list[list[list[list[int]]]]:
    """``[b][list][block of the last stage]``: the key blocks of InfiniteHiP, in rising order."""
    q, k = query.double(), key.double()
    batch, num_queries, heads, _ = q.shape
    num_keys, kv_heads = k.shape[1], k.shape[2]
    lists = kv_heads if share_heads else heads
    offset = num_keys - num_queries
    result: list[list[list[list[int]]]] = []
    for b in range(batch):
        result.append([])
        for n in range(lists):
            mine = range(n * heads // lists, (n + 1) * heads // lists)
            head = n * kv_heads // lists
            result[b].append([])
            for small in range(0, num_queries, stages[-1][0]):
                size = stages[0][0]
                last = min((small // size + 1) * size, num_queries) - 1 + offset
                end = min(max(last + 1, 0), last - window_size + 1)
                ranges = [
                    (lo, min(lo + stages[0][2], end)) for lo in range(sinks, end, stages[0][2])
                ]
                for size, stride, chunk, keep in stages:
                    ranges = [
                        (lo, min(lo + chunk, hi))
                        for begin, hi in ranges
                        for lo in range(begin, hi, chunk)
                    ]
                    first = small // size * size
                    samples = _block_samples(q[b], first, size, stride, query_reduce, offset)

                    def score(
                        at: int,
                        samples: Any = samples,
                        b: int = b,
                        head: int = head,
                        mine: Any = mine,
                    ) -> float:
                        return _largest(
                            float(s[h] @ k[b, at, head]) if at <= p else -3e38
                            for s, p in samples
                            for h in mine
                        )

                    scored = []
                    for lo, hi in ranges:
                        met = score(lo) if hi - lo == 1 else -3e38
                        a, z = lo, hi
                        while z - a > 1:
                            middle = (a + z) // 2
                            left, right = score((a + middle) // 2), score((middle + z) // 2)
                            met = max(met, left, right)
                            a, z = (a, middle) if left >= right else (middle, z)
                        scored.append((met, (lo, hi)))
                    ranges = _best(scored, keep // chunk)
                tokens = {j for lo, hi in ranges for j in range(lo, hi)}
                result[b][n].append(sorted({j // block_size for j in tokens}))
    return result


# ---- LongHeads -----------------------------------------------------------------------------------


def longheads_chunk_keys(
    query: Tensor, key: Tensor, value: Tensor, chunk_size: int, rotary: Any
) -> Tensor:
    q, k, v = query.double(), key.double(), value.double()
    batch, tokens, heads, dim = q.shape
    group = heads // k.shape[2]
    chunks = -(-tokens // chunk_size)
    pooled = q.new_zeros(batch, chunks, heads, dim)
    for c in range(chunks):
        own = slice(c * chunk_size, min((c + 1) * chunk_size, tokens))
        places = torch.arange(own.stop - own.start)
        for h in range(heads):
            one = slice(h // group, h // group + 1)
            qc, kc = rotary(q[:, own, h : h + 1], places), rotary(k[:, own, one], places)
            for b in range(batch):
                x, y = qc[b, :, 0], kc[b, :, 0]
                seen = torch.softmax(x @ y.T * dim**-0.5, -1) @ v[b, own, h // group]
                pooled[b, c, h] = torch.softmax(seen.mean(0) @ y.T * dim**-0.5, -1) @ y
    return pooled


def longheads_chunks(scores: Tensor, own: int, num_chunks: int) -> list[int]:
    """The chunks a token in chunk ``own`` keeps, given the score of each."""
    forced = sorted({0, max(own - 1, 0), own})
    others = [c for c in range(own) if c not in forced]
    others.sort(key=lambda c: (-float(scores[c]), c))
    return sorted(forced + others[: num_chunks - len(forced)])


def longheads_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    chunk_size: int,
    num_chunks: int,
    rotary: Any,
    chunk_keys: Tensor,
    exclude_self: bool = False,
) -> Tensor:
    """Keys are gathered chunk by chunk and rotated to their places in that row of chunks."""
    q, k, v = query.double(), key.double(), value.double()
    batch, num_queries, heads, dim = q.shape
    num_keys, group = k.shape[1], heads // k.shape[2]
    out = v.new_zeros(batch, num_queries, heads, v.shape[-1])
    for b in range(batch):
        for i in range(num_queries):
            at = i + num_keys - num_queries
            if at < 0:
                continue
            for h in range(heads):
                scores = chunk_keys[b, :, h].double() @ q[b, i, h]
                kept = longheads_chunks(scores, at // chunk_size, num_chunks)
                tokens, places = [], []
                for slot, c in enumerate(kept):
                    for r in range(chunk_size):
                        j = c * chunk_size + r
                        if j <= at - exclude_self:
                            tokens.append(j)
                            places.append(slot * chunk_size + r)
                if not tokens:
                    continue
                mine = (len(kept) - 1) * chunk_size + at % chunk_size
                x = rotary(q[b : b + 1, i : i + 1, h : h + 1], torch.tensor([mine]))[0, 0, 0]
                y = rotary(k[b : b + 1, tokens, h // group, None], torch.tensor(places))[0, :, 0]
                weights = torch.softmax(y @ x * dim**-0.5, 0)
                out[b, i, h] = weights @ v[b, tokens, h // group]
    return out
