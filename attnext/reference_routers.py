# SPDX-License-Identifier: Apache-2.0
"""The specification of pooling and selection: loops over blocks and over queries, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def block_pool(
    x: Tensor, groups: Sequence[Sequence[int]], reduce: str = "mean", weights: Tensor | None = None
) -> Tensor:
    """``groups[b]``: raster indices of the tokens of block ``b``. Returns ``[B, blocks, H, D]``."""
    rows = x.double().flatten(1, -3)
    batch, _, heads, dim = rows.shape
    w = torch.ones(batch, rows.shape[1], heads, dtype=torch.float64)
    if weights is not None:
        w = weights.double().expand(*x.shape[:-1]).flatten(1, -2)
    pooled = []
    for group in groups:
        part, share = rows[:, list(group)], w[:, list(group), :, None]
        width = 2 * dim if reduce == "min_max" else dim
        if not group:
            pooled.append(rows.new_zeros(batch, heads, width))
        elif reduce == "mean":
            pooled.append((part * share).sum(1) / share.sum(1))
        elif reduce == "sum":
            pooled.append((part * share).sum(1))
        elif reduce == "max":
            pooled.append(part.max(1).values)
        elif reduce == "min":
            pooled.append(part.min(1).values)
        else:
            pooled.append(torch.cat([part.min(1).values, part.max(1).values], -1))
    return torch.stack(pooled, 1) if pooled else rows.new_zeros(batch, 0, heads, dim)


def scores(
    query: Tensor,
    candidates: Tensor,
    score: str,
    *,
    rows: Sequence[Sequence[int]] | None = None,
    seen: Tensor | None = None,
    weights: Tensor | None = None,
    lse: Tensor | None = None,
    share: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """``[B, heads, rows, candidates]``.

    ``rows``: of ``"max_q"``, the queries of each row; ``seen`` ``[queries, candidates]``: which
    candidates (of ``"group_prob"``: windows) a query sees; ``share`` ``[windows, blocks]``.
    """
    q, c = query.double(), candidates.double()
    group = q.shape[2] // c.shape[2]
    dots = torch.einsum("bihd,bjhd->bhij", q, c.repeat_interleave(group, 2)) * scale
    if seen is not None:
        dots = torch.where(seen, dots, -math.inf)
    if score == "dot":
        return dots
    if score == "max_q":
        assert rows is not None
        return torch.stack([dots[:, :, list(row)].amax(2) for row in rows], 2)
    if score == "relu_wsum":
        assert weights is not None
        return torch.einsum("bhij,bih->bij", torch.relu(dots), weights.double())[:, None]
    assert lse is not None and share is not None
    p = torch.exp(dots - lse.double().transpose(1, 2)[..., None])
    return (p.unflatten(1, (-1, group)).sum(2)) @ share.double()


def top_k(
    table: Tensor, k: int, allowed: Any, *, first: int = 0, last: int = 0, tie: str = "low"
) -> list[list[int]]:
    """For each row of ``table`` the selected candidates, best first; ``allowed[i]``: those that
    row ``i`` may select, rising, of which the ``first`` and ``last`` come before all others."""
    lists = []
    for row, candidates in zip(table.tolist(), allowed, strict=True):
        forced = {*candidates[:first], *(candidates[-last:] if last else [])}

        def order(c: int, row: Any = row, forced: Any = forced) -> tuple[Any, ...]:
            return c not in forced, 0.0 if c in forced else -row[c], c if tie == "low" else -c

        lists.append(sorted(candidates, key=order)[:k])
    return lists
