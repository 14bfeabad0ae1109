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
