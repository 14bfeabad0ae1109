# SPDX-License-Identifier: Apache-2.0
"""The specification of routed methods: every query by itself, in float64, as the papers define it.

Nothing here is shared with the routers: no plans, no blocks, no pooling.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def _softmax_average(logits: Tensor, values: Tensor) -> Tensor:
    """``[M]`` and ``[M, Dv]``; without keys 0."""
    if not logits.numel():
        return values.new_zeros(values.shape[-1])
    return torch.softmax(logits, 0) @ values


def _best(scores: list[float], count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda c: (-scores[c], c))[:count]


def bilevel_routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_size: tuple[int, int],
    topk: int,
    *,
    key_region_size: tuple[int, int] | None = None,
    scale: float | None = None,
    padding: str = "mask",
    soft: str | None = None,
    differentiable_routing: bool = False,
) -> Tensor:
    """BiFormer on a map ``[B, Y, X, H, D]``; zero padding is made of zeros."""
    q, k, v = (t.double() for t in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads = q.shape[-2]
    k, v = (t.repeat_interleave(heads // t.shape[-2], -2) for t in (k, v))
    key_region_size = region_size if key_region_size is None else key_region_size

    def regions(t: Tensor, size: tuple[int, int]) -> list[list[tuple[int, int]]]:
        lists = []
        for top in range(0, t.shape[1], size[0]):
            for left in range(0, t.shape[2], size[1]):
                lists.append([
                    (y, x) for y in range(top, min(top + size[0], t.shape[1]))
                    for x in range(left, min(left + size[1], t.shape[2]))
                ])  # fmt: skip
        return lists

    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    own, other = regions(q, region_size), regions(k, key_region_size)
    full = key_region_size[0] * key_region_size[1]
    rows: list[Any] = []
    for b in range(q.shape[0]):
        for tokens in own:
            mean = torch.stack([q[b, y, x].flatten() for y, x in tokens]).mean(0)
            means = [torch.stack([k[b, y, x].flatten() for y, x in r]).mean(0) for r in other]
            products = torch.stack([mean @ m for m in means])
            if not (soft and differentiable_routing):
                products = products.detach()
            chosen = _best(products.tolist(), topk)
            weights = torch.softmax(products[chosen] * scale, 0)
            for y, x in tokens:
                for h in range(heads):
                    logits, values = [], []
                    for r, w in zip(chosen, weights, strict=True):
                        ks = torch.stack([k[b, i, j, h] for i, j in other[r]])
                        vs = torch.stack([v[b, i, j, h] for i, j in other[r]])
                        if padding == "zero":
                            missing = full - len(ks)
                            ks = torch.cat([ks, ks.new_zeros(missing, ks.shape[1])])
                            vs = torch.cat([vs, vs.new_zeros(missing, vs.shape[1])])
                        if soft == "scale":
                            ks, vs = ks * w, vs * w
                        s = ks @ q[b, y, x, h] * scale
                        logits.append(s + w.log() if soft == "bias" else s)
                        values.append(vs)
                    if soft == "mix":
                        parts = map(_softmax_average, logits, values)
                        row: Any = sum(w * p for w, p in zip(weights, parts, strict=True))
                    else:
                        row = _softmax_average(torch.cat(logits), torch.cat(values))
                    rows.append(((b, y, x, h), row))
    places, results = zip(*rows, strict=True)
    return out.index_put(tuple(torch.tensor(places).T), torch.stack(results))


def moba_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    topk: int,
    *,
    scale: float | None = None,
) -> Tensor:
    """MoBA on one sequence per batch item."""
    q, k, v = (t.double() for t in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[2] // k.shape[2]
    offset = k.shape[1] - q.shape[1]
    rows = []
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            t = i + offset
            for h in range(q.shape[2]):
                keys, values = k[b, :, h // group], v[b, :, h // group]
                gates = []
                for first in range(0, t + 1, block_size):
                    own = first <= t < first + block_size
                    mean = keys[first : first + block_size].mean(0)
                    gates.append(math.inf if own else float((q[b, i, h] @ mean).detach()))
                seen = [
                    j for c in _best(gates, topk)
                    for j in range(c * block_size, min((c + 1) * block_size, t + 1))
                ]  # fmt: skip
                rows.append(_softmax_average(keys[seen] @ q[b, i, h] * scale, values[seen]))
    return torch.stack(rows).reshape(*q.shape[:-1], v.shape[-1])


def native_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor,
    *,
    compressed: tuple[Tensor, Tensor] | None = None,
    compress_size: int = 32,
    compress_stride: int = 16,
    block_size: int = 64,
    num_blocks: int = 16,
    initial_blocks: int = 1,
    local_blocks: int = 2,
    window_size: int = 512,
    share_selection: bool = True,
    scale: float | None = None,
) -> Tensor:
    q, k, v, g = (t.double() for t in (query, key, value, gates))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    batch, num_queries, heads, _ = q.shape
    group = heads // k.shape[2]
    offset = k.shape[1] - num_queries
    starts = [a for a in range(0, k.shape[1], compress_stride) if a + compress_size <= k.shape[1]]
    if compressed is None:
        shorts = [[t[:, a : a + compress_size].mean(1) for a in starts] for t in (k, v)]
        short_k, short_v = (
            torch.stack(s, 1) if s else t[:, :0] for s, t in zip(shorts, (k, v), strict=True)
        )
    else:
        short_k, short_v = (t.double() for t in compressed)
    rows = []
    for b in range(batch):
        for i in range(num_queries):
            t = i + offset
            whole = [c for c, a in enumerate(starts) if a + compress_size - 1 <= t]
            count = t // block_size + 1 if t >= 0 else 0
            coarse, weights = [], []
            for h in range(heads):
                logits = short_k[b, whole, h // group] @ q[b, i, h] * scale
                coarse.append(_softmax_average(logits, short_v[b, whole, h // group]))
                weights.append(torch.softmax(logits, 0).tolist() if whole else [])
            for h in range(heads):
                mine = [h]
                if share_selection:
                    mine = list(range(h // group * group, (h // group + 1) * group))
                importance = [0.0] * count
                for block in range(count):
                    for c, w in enumerate(whole):
                        low = max(starts[w], block * block_size)
                        high = min(starts[w] + compress_size, (block + 1) * block_size)
                        share = max(0, high - low) / compress_stride
                        importance[block] += share * sum(weights[m][c] for m in mine)
                for block in (*range(initial_blocks), *range(count - local_blocks, count)):
                    if 0 <= block < count:
                        importance[block] = math.inf
                keys, values = k[b, :, h // group], v[b, :, h // group]
                listed = [
                    j for c in _best(importance, num_blocks)
                    for j in range(c * block_size, min((c + 1) * block_size, t + 1))
                ]  # fmt: skip
                near = list(range(max(0, t - window_size + 1), t + 1))
                fine, local = (
                    _softmax_average(keys[js] @ q[b, i, h] * scale, values[js])
                    for js in (listed, near)
                )
                parts = (coarse[h], fine, local)
                gate = torch.sigmoid(g[b, i, h])
                rows.append(sum(gate[n] * parts[n] for n in range(3)))
    return torch.stack(rows).reshape(*q.shape[:-1], v.shape[-1])  # type: ignore[arg-type]


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
    q, k, v = (t.double() for t in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    batch, num_queries, heads, _ = q.shape
    group, num_keys = heads // k.shape[2], k.shape[1]
    rows, lses = [], []
    for b in range(batch):
        marks = is_landmark.expand(batch, num_keys)[b].tolist()
        blocks: list[list[int]] = [[]]  # tokens; a closed block is followed by another
        landmarks = []
        for j, mark in enumerate(marks):
            if mark:
                landmarks.append(j)
                blocks.append([])
            else:
                blocks[-1].append(j)
        for i in range(num_queries):
            t = i + num_keys - num_queries
            current = sum(marks[: max(t, 0)])
            for h in range(heads):
                s = k[b, :, h // group] @ q[b, i, h] * scale
                values = v[b, :, h // group]
                near = [j for j in blocks[current] if j <= t]
                earlier = [c for c in range(current) if blocks[c]] if t >= 0 else []
                if topk is not None:
                    order = _best([float(s[landmarks[c]].detach()) for c in earlier], topk)
                    earlier = [earlier[n] for n in order]
                final = near + [landmarks[c] for c in earlier]
                if not final:
                    rows.append(values.new_zeros(values.shape[-1]))
                    lses.append(values.new_tensor(-math.inf))
                    continue
                shares = torch.softmax(s[final], 0)
                lses.append(torch.logsumexp(s[final], 0))
                row: Any = shares[: len(near)] @ values[near]
                for c, share in zip(earlier, shares[len(near) :], strict=True):
                    row = row + share * _softmax_average(s[blocks[c]], values[blocks[c]])
                rows.append(row)
    out = torch.stack(rows).reshape(*q.shape[:-1], v.shape[-1])
    return (out, torch.stack(lses).reshape(q.shape[:-1])) if return_lse else out
