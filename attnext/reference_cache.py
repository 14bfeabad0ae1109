# SPDX-License-Identifier: Apache-2.0
"""The specification of caches and of head patterns: token by token in float64, with whole maps of
weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def weights_of(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention weights ``[B, H, Nq, Nk]``; rows without keys are 0."""
    q, k = query.double(), key.double()
    group, ahead = q.shape[2] // k.shape[2], k.shape[1] - q.shape[1]
    logits = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(group, 2))
    logits = logits * (q.shape[-1] ** -0.5 if scale is None else scale)
    i, j = torch.arange(q.shape[1])[:, None] + ahead, torch.arange(k.shape[1])
    return torch.softmax(logits.masked_fill(j > i, -torch.inf), -1).nan_to_num()


def streaming_attention(
    query: Tensor, key: Tensor, value: Tensor, sinks: int, window_size: int, rotary: Any
) -> Tensor:
    """The cache of every token is laid out, rotated by its places in there, and attended."""
    q, k, v = query.double(), key.double(), value.double()
    batch, num_queries, heads, dim = q.shape
    num_keys, group = k.shape[1], heads // k.shape[2]
    out = v.new_zeros(batch, num_queries, heads, v.shape[-1])
    for i in range(num_queries):
        at = i + num_keys - num_queries
        held = [j for j in range(at + 1) if j < sinks or j > at - window_size]
        if not held:
            continue
        places = torch.arange(len(held))
        x = rotary(q[:, i : i + 1], places[-1:])[:, 0]
        y = rotary(k[:, held], places).repeat_interleave(group, 2)
        logits = torch.einsum("bhd,bjhd->bhj", x, y) * dim**-0.5
        values = v[:, held].repeat_interleave(group, 2)
        out[:, i] = torch.einsum("bhj,bjhd->bhd", torch.softmax(logits, -1), values)
    return out


def lazy_score(last_hit: int, interval: int, step: int, variant: str) -> float:
    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x)) if x > -700 else 0.0

    again = 2 * sigmoid(-(interval - 1)) if interval else 0.0
    if variant == "code":
        return 2 * sigmoid(-(1 + (step - last_hit) / (interval + 1e-5))) + again
    if interval == 0:  # the limit of an interval that shrinks to 0
        return 1.0 if step == last_hit else 0.0
    return 2 * sigmoid(-(step - last_hit) / interval) + again


class LazyEviction:
    """One batch item and kv head with its query heads: rows ``(key, value, [(TS, MRI)])``."""

    def __init__(
        self, group: int, budget: int, window_size: int, alpha: float, variant: str
    ) -> None:
        self.group, self.budget, self.window_size = group, budget, window_size
        self.alpha, self.variant, self.steps = alpha, variant, 0
        self.rows: list[tuple[Tensor, Tensor, list[tuple[int, int]]]] = []

    def prefill(self, key: Tensor, value: Tensor) -> None:
        for k, v in zip(key.double(), value.double(), strict=True):
            self.rows.append((k, v, [(0, 0)] * self.group))

    def step(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query ``[G, D]``, key ``[D]``, value ``[Dv]``; the result is ``[G, Dv]``."""
        self.steps += 1
        t = self.steps
        self.rows.append((key.double(), value.double(), [(t - 1, 0)] * self.group))
        keys = torch.stack([k for k, _, _ in self.rows])
        values = torch.stack([v for _, v, _ in self.rows])
        weights = torch.softmax(query.double() @ keys.T * key.shape[0] ** -0.5, -1)
        for n, (k, v, states) in enumerate(self.rows):
            states = [
                (t, max(mri, t - ts)) if weights[g, n] >= self.alpha else (ts, mri)
                for g, (ts, mri) in enumerate(states)
            ]
            self.rows[n] = k, v, states
        if t % self.window_size == 0 and len(self.rows) > self.budget:
            old = len(self.rows) - self.window_size
            scores = [
                max(lazy_score(ts, mri, t, self.variant) for ts, mri in states)
                for _, _, states in self.rows
            ]
            ranked = sorted(range(old), key=lambda n: (-scores[n], n))
            kept = sorted(ranked[: self.budget - self.window_size])
            self.rows = [self.rows[n] for n in [*kept, *range(old, len(self.rows))]]
        return weights @ values


def vertical_slash_keys(
    query: Tensor, key: Tensor, columns: int, diagonals: int, last: int, query_block: int
) -> list[list[list[set[int]]]]:
    """``[b][h][block]``: the keys of MInference's vertical-slash pattern."""
    weights = weights_of(query[:, -last:], key)
    batch, heads, rows, num_keys = weights.shape
    ahead = num_keys - query.shape[1]
    result = []
    for b in range(batch):
        per_head = []
        for h in range(heads):
            w = weights[b, h]
            by_column = [float(w[:, j].sum()) if j >= 30 else math.inf for j in range(num_keys)]
            by_distance = []
            for away in range(num_keys):
                total = 0.0
                for r in range(rows):
                    at = num_keys - rows + r
                    total += float(w[r, at - away]) if at - away >= 0 else 0.0
                by_distance.append(total if away >= 100 else math.inf)

            def best(sums: list[float], count: int) -> list[int]:
                return sorted(range(len(sums)), key=lambda n: (-sums[n], n))[:count]

            per_block = []
            for first in range(0, query.shape[1], query_block):
                stop = min(first + query_block, query.shape[1])
                keys = set(best(by_column, max(columns, 30)))
                for away in best(by_distance, max(diagonals, 50)):
                    keys |= {i + ahead - away for i in range(first, stop)}
                per_block.append({j for j in keys if 0 <= j < num_keys})
            per_head.append(per_block)
        result.append(per_head)
    return result
