# SPDX-License-Identifier: Apache-2.0
"""The specification: every op in plain torch, dense, slow and meant to be read.

Nothing here is shared with the kernels or with ``attnext.geometry``: the rule that says who attends
whom is restated in ``attended_keys`` in its naive form, phantom keys are padding that is really
there, and gradients are autograd's. The public functions of ``attnext`` mean what these functions
return. Everything is computed, and returned, in ``dtype``: float64 unless a caller wants to know
what the same formula costs at another precision.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

INFINITE = float("inf")


class Axis(NamedTuple):
    """The rule of one head on one axis; ``left`` and ``right`` exclude the leader itself."""

    left: int
    right: int
    stride: int = 1
    phase: int = 0
    dilation: int = 1
    is_causal: bool = False
    boundary: str = "inward"
    offset: int = 0


@functools.lru_cache(maxsize=1 << 16)
def attended_keys(axis: Axis, i: int, num_keys: int) -> list[int]:
    """Key coordinates that query ``i`` attends; those outside ``[0, num_keys)`` are phantoms."""
    position = i + axis.offset
    residue = position % axis.dilation  # the dilation class: positions that are equal modulo d
    t = position // axis.dilation  # the query's index in its class
    n = len(range(residue, num_keys, axis.dilation))  # keys in the class

    block = (t - axis.phase) // axis.stride * axis.stride + axis.phase
    leader = block + (axis.stride - 1 if axis.is_causal else axis.stride // 2)
    if axis.boundary == "inward":
        leader = min(leader, n - 1)
    begin, end = leader - axis.left, leader + axis.right + 1
    if axis.is_causal:
        end = t + 1
    elif axis.boundary == "inward":  # slide the window, whole, until it lies inside the axis
        size = end - begin
        begin = max(min(begin, n - size), 0)
        end = begin + size
    if axis.boundary != "zero_pad":  # which alone has phantom keys
        begin, end = max(begin, 0), min(end, n)
    return [residue + axis.dilation * u for u in range(begin, end)]


def axis_mask(axis: Axis, num_queries: int, num_keys: int) -> Tensor:
    """Who attends whom on one axis, ``[num_queries, num_keys]``, without the phantoms."""
    mask = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    for i in range(num_queries):
        for j in attended_keys(axis, i, num_keys):
            if 0 <= j < num_keys:
                mask[i, j] = True
    return mask


def dense_mask(axes: Sequence[Axis], queries: Sequence[int], keys: Sequence[int]) -> Tensor:
    """Who attends whom, tokens in raster order, ``[prod(queries), prod(keys)]``."""
    return _product([axis_mask(a, n, m) for a, n, m in zip(axes, queries, keys, strict=True)])


def softmax_average(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Values weighted by ``exp(logits - lse)``, and lse, the logarithm of ``sum(exp(logits))``.

    Shapes: logits ``[B, H, N, M]``, values ``[B, M, H, Dv]``; out ``[B, N, H, Dv]``,
    lse ``[B, N, H]``. A row without keys gives out 0 and lse -inf, and passes no gradient.
    """
    top = logits.detach().amax(dim=-1, keepdim=True)
    top = torch.where(top == -INFINITE, 0.0, top)
    total = torch.exp(logits - top).sum(dim=-1, keepdim=True)
    has_keys = total != 0
    lse = top + torch.log(torch.where(has_keys, total, 1.0))
    out = torch.einsum("bhij,bjhd->bihd", torch.exp(logits - lse), values)
    return out, torch.where(has_keys, lse, -INFINITE).squeeze(-1).transpose(1, 2)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: Any = None,
    softcap: float | None = None,
    logit_bias: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    sink_logits: Tensor | None = None,
    return_lse: bool = False,
    dtype: torch.dtype = torch.float64,
    average: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = softmax_average,
) -> Any:
    """Softmax attention under a mask.

    Shapes: query ``[B, N, H, D]``, key ``[B, M, Hkv, D]``, value ``[B, M, Hkv, Dv]``; mask and
    logit_bias broadcast to ``[B, H, N, M]``; scale broadcasts to ``[B, N, H]``.
    """
    batch, num_queries, heads, head_dim = query.shape
    group = heads // key.shape[2]
    if scale is None:
        scale = head_dim**-0.5
    if isinstance(scale, Tensor):
        scale = scale.to(dtype).expand(batch, num_queries, heads).transpose(1, 2).unsqueeze(-1)

    def scores(k: Tensor) -> Tensor:
        k = k.to(dtype).repeat_interleave(group, dim=2)
        s = torch.einsum("bihd,bjhd->bhij", query.to(dtype), k) * scale
        return s if softcap is None else softcap * torch.tanh(s / softcap)

    logits = scores(key)
    values = value.to(dtype)
    if logit_bias is not None:
        logits = logits + logit_bias.to(dtype)
    if mask is not None:
        logits = torch.where(mask, logits, -INFINITE)
    if additional_keys is not None and additional_values is not None:
        logits = torch.cat([logits, scores(additional_keys)], dim=-1)
        values = torch.cat([values, additional_values.to(dtype)], dim=1)

    # The sink is one more logit whose value is zero; without a sink it is a key nobody attends.
    sink = logits.new_full((heads,), -INFINITE) if sink_logits is None else sink_logits.to(dtype)
    logits = torch.cat([logits, sink.view(1, -1, 1, 1).expand(batch, -1, num_queries, 1)], dim=-1)
    values = torch.cat([values, values.new_zeros(batch, 1, *values.shape[2:])], dim=1)

    out, lse = average(logits, values.repeat_interleave(group, dim=2))
    return (out, lse) if return_lse else out


def windowed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rules: Sequence[Sequence[Axis]],
    *,
    sinks: int = 0,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Any = None,
    **options: Any,
) -> Any:
    """Attention under one product of axis rules for each query head (``rules[head][axis]``).

    The key axes are first padded with zeros so far that every phantom key has a coordinate.
    """
    heads = query.shape[-2]
    queries, keys = query.shape[1:-2], key.shape[1:-2]
    masks, offsets, padding = [], [], []
    for a, (n, m) in enumerate(zip(queries, keys, strict=True)):
        attended = {r[a]: [attended_keys(r[a], i, m) for i in range(n)] for r in rules}
        everyone = [j for rows in attended.values() for row in rows for j in row]
        low, high = min([0, *everyone]), max([m - 1, *everyone]) + 1
        mask = torch.zeros(heads, n, high - low, dtype=torch.bool)
        for head, i in itertools.product(range(heads), range(n)):
            mask[head, i, [j - low for j in attended[rules[head][a]][i]]] = True
        if sinks:
            for i, j in itertools.product(range(n), range(min(sinks, m))):
                if not rules[0][a].is_causal or j <= i + rules[0][a].offset:
                    mask[:, i, j - low] = True
        masks.append(mask)
        position = torch.arange(n) + rules[0][a].offset
        offsets.append(torch.arange(low, high)[None, :] - position[:, None])  # key - query
        padding.append((-low, high - m))

    def spread(table: Tensor, a: int) -> Tensor:  # [n_a, m_a] among [*queries, *keys]
        shape = [1] * (2 * len(offsets))
        shape[a], shape[len(offsets) + a] = table.shape
        return table.view(shape)

    counts = math.prod(queries), math.prod(mask.shape[-1] for mask in masks)
    logit_bias = None
    if alibi_slopes is not None:
        distance = torch.zeros((), dtype=torch.float64)
        for a, delta in enumerate(offsets):
            distance = distance + spread(delta.abs(), a)
        logit_bias = -alibi_slopes.view(-1, 1, 1) * distance.reshape(counts)
    if bias is not None:
        index = []
        for a, delta in enumerate(offsets):
            extent = (bias.shape[a + 1] + 1) // 2
            steps = delta.div(rules[0][a].dilation, rounding_mode="floor") + extent - 1
            index.append(spread(steps.clamp(0, 2 * extent - 2), a))
        table = bias[(slice(None), *torch.broadcast_tensors(*index))].reshape(heads, *counts)
        logit_bias = table if logit_bias is None else logit_bias + table
    if isinstance(scale, Tensor):
        scale = scale.expand(query.shape[:-1]).flatten(1, -2)

    pads = [0, 0, 0, 0] + [side for axis in reversed(padding) for side in axis]
    result = attention(
        query.flatten(1, -3),
        torch.nn.functional.pad(key, pads).flatten(1, -3),
        torch.nn.functional.pad(value, pads).flatten(1, -3),
        torch.stack([_product([mask[head] for mask in masks]) for head in range(heads)]),
        scale=scale,
        logit_bias=logit_bias,
        **options,
    )
    if isinstance(result, tuple):
        out, lse = result
        return out.unflatten(1, queries), lse.unflatten(1, queries)
    return result.unflatten(1, queries)


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Any,
    stride: Any = 1,
    dilation: Any = 1,
    is_causal: Any = False,
    *,
    boundary: str = "inward",
    phase: Any = 0,
    offset: Any = None,
    **options: Any,
) -> Any:
    """Each query attends ``kernel_size`` keys around it on every axis."""
    rank = query.dim() - 3
    extents = list(zip(query.shape[1:-2], key.shape[1:-2], strict=True))
    per_axis = [_per_axis(x, rank) for x in (stride, dilation, is_causal, phase, offset)]

    def rule(kernel: Any) -> list[Axis]:
        axes = []
        for a, size in enumerate(_per_axis(kernel, rank)):
            s, d, causal, p, o = (values[a] for values in per_axis)
            if isinstance(size, tuple):
                left, right = size
            else:
                left, right = (size - 1, 0) if causal else (size // 2, size - 1 - size // 2)
            if o is None:
                o = extents[a][1] - extents[a][0] if causal else 0
            axes.append(Axis(left, right, s, p, d, bool(causal), boundary, o))
        return axes

    kernels = kernel_size if isinstance(kernel_size, list) else [kernel_size] * query.shape[-2]
    return windowed_attention(query, key, value, [rule(kernel) for kernel in kernels], **options)


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Any,
    stride: Any = 1,
    dilation: Any = 1,
    is_causal: Any = False,
    scale: Any = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """``neighborhood_attention`` with NATTEN's arguments."""
    return neighborhood_attention(
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal,
        scale=scale,
        additional_keys=additional_keys,
        additional_values=additional_values,
        return_lse=return_lse,
    )


na2d = na3d = na1d  # the reference reads the rank off the query


def sliding_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: Any,
    *,
    is_causal: bool = True,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: Any = None,
    **options: Any,
) -> Any:
    """Each query attends the keys around its own position, the last query being the last key.

    Packed sequences are so many calls.
    """
    num_queries, num_keys, heads = query.shape[1], key.shape[1], query.shape[2]
    if cu_seqlens_q is not None:
        q_bounds = cu_seqlens_q.tolist()
        k_bounds = q_bounds if cu_seqlens_k is None else cu_seqlens_k.tolist()
        per_row = scale.expand(query.shape[:-1]) if isinstance(scale, Tensor) else None
        results = []
        for (q0, q1), (k0, k1) in zip(
            itertools.pairwise(q_bounds), itertools.pairwise(k_bounds), strict=True
        ):
            results.append(
                sliding_window_attention(
                    query[:, q0:q1],
                    key[:, k0:k1],
                    value[:, k0:k1],
                    window_size,
                    is_causal=is_causal,
                    scale=scale if per_row is None else per_row[:, q0:q1],
                    **options,
                )
            )
        if options.get("return_lse"):
            outs, lses = zip(*results, strict=True)
            return torch.cat(outs, dim=1), torch.cat(lses, dim=1)
        return torch.cat(results, dim=1)

    unlimited = num_queries + num_keys

    def rule(window: Any) -> list[Axis]:
        if window is None:
            window = (-1, -1)
        if not isinstance(window, tuple):
            right = 0 if is_causal else window - 1 - window // 2
            window = (window - 1 - right, right)
        left, right = (unlimited if side == -1 else side for side in window)
        offset = num_keys - num_queries
        return [Axis(left, right, is_causal=is_causal, boundary="truncate", offset=offset)]

    windows = window_size if isinstance(window_size, list) else [window_size] * heads
    rules = [rule(window) for window in windows]
    return windowed_attention(query, key, value, rules, scale=scale, **options)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: Any,
    shift: Any = 0,
    *,
    key_window_size: Any = None,
    boundary: str | None = None,
    **options: Any,
) -> Any:
    """Queries in tiles of ``window_size``; a tile attends itself, or a larger box around itself.

    The tile of token ``i`` is ``(i - shift) // window_size``.
    """
    rank, heads = query.dim() - 3, query.shape[-2]
    tiles, shifts = _per_axis(window_size, rank), _per_axis(shift, rank)
    boxes = tiles if key_window_size is None else _per_axis(key_window_size, rank)
    if boundary is None:
        boundary = "truncate" if key_window_size is None else "zero_pad"
    rule = []
    for tile, box, phase in zip(tiles, boxes, shifts, strict=True):
        left = tile // 2 + (box - tile) // 2
        rule.append(Axis(left, box - 1 - left, stride=tile, phase=phase, boundary=boundary))
    return windowed_attention(query, key, value, [rule] * heads, **options)


def merge_attentions(
    outputs: Sequence[Tensor], lses: Sequence[Tensor], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys, from the result on each set."""
    lse = torch.stack([part.to(dtype) for part in lses])
    top = lse.detach().amax(dim=0)
    top = torch.where(top == -INFINITE, 0.0, top)
    weights = torch.exp(lse - top)
    total = weights.sum(dim=0)
    has_keys = total != 0
    total = torch.where(has_keys, total, 1.0)
    parts = torch.stack([part.to(dtype) for part in outputs])
    merged = (parts * (weights / total).unsqueeze(-1)).sum(dim=0)
    return merged, torch.where(has_keys, top + torch.log(total), -INFINITE)


def _per_axis(value: Any, rank: int) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,) * rank


def _product(masks: Sequence[Tensor]) -> Tensor:
    """The mask of a box of tokens from the masks of its axes, both in raster order."""
    result = torch.ones(1, 1, dtype=torch.bool)
    for mask in masks:
        rows, columns = result.shape[0] * mask.shape[0], result.shape[1] * mask.shape[1]
        result = (result[:, None, :, None] & mask[None, :, None, :]).reshape(rows, columns)
    return result


def linear_features(x: Tensor, feature_map: str, weighted: bool = False) -> Tensor:
    """phi of linear attention, ``[..., D] -> [..., F]``. ``weighted``: of queries, which carry the
    weights of the polynomial, so that ``phi(q) . phi(k)`` is ``1 + s + s^2 / 2`` for ``taylor2``.
    """
    if feature_map == "taylor2":
        ones = torch.ones_like(x[..., :1])
        dim = x.shape[-1]
        pairs = [
            x[..., a] * x[..., b] * (0.5 if weighted and a == b else 1.0)
            for a in range(dim)
            for b in range(a, dim)
        ]
        return torch.cat([ones, x, torch.stack(pairs, dim=-1)], dim=-1)
    maps: dict[str, Callable[[Tensor], Tensor]] = {
        "identity": lambda x: x,
        "elu": lambda x: torch.where(x > 0, x + 1, torch.exp(torch.where(x > 0, 0.0, x))),
        "relu": torch.relu,
    }
    return maps[feature_map](x)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: str = "identity",
    is_causal: bool = True,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    window_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    return_denominator: bool = False,
    normalizer_query: Tensor | None = None,
    normalizer_key: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Any:
    """``attnext.linear_attention`` as its recurrence, a token at a time.

    ``chunk_size`` is a matter of speed, and ignored.
    """
    if scale is None:
        scale = query.shape[-1] ** -0.5 if feature_map in ("identity", "taylor2") else 1.0
    heads = max(query.shape[2], key.shape[2], value.shape[2])

    def of_heads(x: Tensor) -> Tensor:
        return x.to(dtype).repeat_interleave(heads // x.shape[2], dim=2)

    def query_features(x: Tensor) -> Tensor:
        if feature_map == "taylor2":
            return linear_features(of_heads(x) * scale, feature_map, weighted=True)
        return linear_features(of_heads(x), feature_map) * scale

    q, k, v = query_features(query), linear_features(of_heads(key), feature_map), of_heads(value)
    sum_q = q if normalizer_query is None else query_features(normalizer_query)
    sum_k = k if normalizer_key is None else linear_features(of_heads(normalizer_key), feature_map)
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    tokens = q.shape[1]

    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        sequences = [(slice(0, 1), *bounds) for bounds in itertools.pairwise(ends)]
    elif window_size is not None:
        starts = range(0, tokens, window_size)
        sequences = [(slice(None), t, min(t + window_size, tokens)) for t in starts]
    else:
        sequences = [(slice(None), 0, tokens)]

    outs, states = [], []
    for n, (items, begin, end) in enumerate(sequences):
        if initial_state is None:
            state = q.new_zeros(len(q[items]), heads, q.shape[-1], v.shape[-1])
        elif cu_seqlens is not None:
            state = initial_state[n : n + 1].to(dtype)
        else:
            state = initial_state.to(dtype)

        def tokens_of(x: Tensor | None, part: Any = (items, slice(begin, end))) -> Any:
            """Of one sequence, as a list; of a constant decay, the same for all."""
            if x is None or x.dim() == 1:
                return [x] * len(range(tokens)[part[1]])
            return x[part].unbind(1)

        queries, keys, values = tokens_of(q), tokens_of(k), tokens_of(v)
        sum_queries, sum_keys = tokens_of(sum_q), tokens_of(sum_k)
        decays, betas = tokens_of(decay), tokens_of(beta)
        found = {}  # what each query reads

        def read(t: int, state: Tensor, of: Any = (queries, sum_queries)) -> Tensor:
            row, total = ((x[t][..., None, :] @ state).squeeze(-2) for x in of)
            return torch.cat([row[..., :-1], total[..., -1:]], -1) if normalize else row

        for t in range(end - begin)[:: -1 if reverse else 1]:
            if decay is not None:
                state = state * torch.exp(decays[t].to(dtype))[..., None, None]
            written = values[t]
            if beta is not None:
                lacking = written - (keys[t][..., None, :] @ state).squeeze(-2)
                written = betas[t].to(dtype)[..., None] * lacking
            update = keys[t][..., :, None] * written[..., None, :]
            if normalize:
                update = torch.cat([update[..., :-1], sum_keys[t][..., :, None]], -1)
            state = state + update
            if is_causal:
                found[t] = read(t, state)
        rows = [found[t] if is_causal else read(t, state) for t in range(end - begin)]
        outs.append(torch.stack(rows, dim=1) if rows else v[items, :0])
        states.append(state)
    out = torch.cat(outs, dim=1)
    denominator = torch.ones_like(out[..., :1])
    if normalize:
        denominator = out[..., -1:] + torch.where(out[..., -1:] < 0, -1.0, 1.0).to(out) * eps
        out = out[..., :-1] / denominator
    results = [out]
    if return_denominator:
        results.append(denominator.squeeze(-1))
    if output_final_state:
        results.append(torch.cat(states))
    return out if len(results) == 1 else tuple(results)
