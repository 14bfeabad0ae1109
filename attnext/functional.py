# SPDX-License-Identifier: Apache-2.0
"""The public functions. Every user error is raised here, before any memory is touched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .geometry import BOUNDARIES, UNLIMITED
from .ops import DTYPES, accumulator_dtype, window_op

Window = int | tuple[int, int] | None
PerAxis = Any  # a value, or a tuple with one per token axis

_MAX_PHANTOMS = 2**20  # keys beyond the border, each of which costs as much as a real one
_DTYPE_NAMES = "float32, float64, bfloat16, float16"


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: PerAxis = False,
    *,
    boundary: str = "inward",
    phase: PerAxis = 0,
    offset: PerAxis = None,
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    sink_logits: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of every token to a window around it, on 1, 2 or 3 token axes.

    Shapes:
        query ``[B, *X, H, D]``, key ``[B, *Y, Hkv, D]``, value ``[B, *Y, Hkv, Dv]``; the result is
        ``[B, *X, H, Dv]``, and with ``return_lse`` also the log-sum-exp ``[B, *X, H]``. The number
        of token axes is read from the input. ``H`` is a multiple of ``Hkv`` (query head ``h`` uses
        kv head ``h // (H // Hkv)``). Any strides; no copies as long as the last axis has stride 1.

    Args:
        kernel_size: keys per axis, self included, or ``(left, right)`` beside self for an axis. A
            *list* gives each query head its own.
        stride: queries per axis that share one window position (1: every query its own).
        dilation: step between the keys of a window; tokens of different residues never mix.
        is_causal: per axis, no key after the query.
        boundary: where a window sticks out: ``"inward"`` shifts it back (NATTEN), ``"truncate"``
            cuts it, ``"zero_pad"`` lets zero keys with zero values take part in the softmax.
        phase: first coordinate of the stride grid.
        offset: key coordinate at which query 0 stands; by default 0, and on causal axes
            ``n_k - n_q`` (the last query stands at the last key).
        scale: factor on ``q . k``: a number (default ``D ** -0.5``), a tensor ``[H]``, or one that
            broadcasts to ``[B, *X, H]`` (per query, e.g. LogN scaling). Differentiable.
        softcap: logits become ``softcap * tanh(logit / softcap)``.
        alibi_slopes: ``[H]``; adds ``-slope * distance``, the sum over axes of the distance in tokens.
            Differentiable.
        bias: ``[H, 2 e_0 - 1, ...]``, added to the logit of each pair: entry
            ``key - query + e - 1`` per axis, in units of the dilation. Differentiable.
        additional_keys, additional_values: ``[B, E, Hkv, D]`` and ``[B, E, Hkv, Dv]``, seen by every
            query in the same softmax, without bias.
        sink_logits: ``[H]``, one further logit per head in the denominator, without a value.

    Numerics:
        float32, float64, bfloat16, float16 in and out; sums and statistics in float32 (float64 for
        float64), one rounding at the store. A query without keys gives 0 and lse -inf.

    Errors:
        ValueError, TypeError or NotImplementedError, naming the argument.

    Complexity:
        O(tokens * window) time, O(tokens) memory.

    Source:
        Neighborhood Attention (arXiv 2204.07143), dilated (2209.15001), generalized (2504.16922).

    Example:
        >>> import torch, attnext
        >>> q = k = v = torch.randn(1, 14, 14, 2, 32)
        >>> attnext.neighborhood_attention(q, k, v, kernel_size=7, dilation=2).shape
        torch.Size([1, 14, 14, 2, 32])
    """
    prepared = _prepared(
        _neighborhood_rules, query, key, value, kernel_size, stride, dilation, is_causal, boundary,
        phase, offset)
    return _attend(query, key, value, prepared, scale, softcap, alibi_slopes, bias,
                   additional_keys, additional_values, sink_logits, return_lse)


def na1d(query: Tensor, key: Tensor, value: Tensor, kernel_size: PerAxis, stride: PerAxis = 1,
         dilation: PerAxis = 1, is_causal: PerAxis = False, scale: float | Tensor | None = None,
         additional_keys: Tensor | None = None, additional_values: Tensor | None = None,
         return_lse: bool = False) -> Any:
    """:func:`neighborhood_attention` on ``[B, X, H, D]``, with NATTEN's name and argument order."""
    return _natten(1, query, key, value, kernel_size, stride, dilation, is_causal, scale,
                   additional_keys, additional_values, return_lse)


def na2d(query: Tensor, key: Tensor, value: Tensor, kernel_size: PerAxis, stride: PerAxis = 1,
         dilation: PerAxis = 1, is_causal: PerAxis = False, scale: float | Tensor | None = None,
         additional_keys: Tensor | None = None, additional_values: Tensor | None = None,
         return_lse: bool = False) -> Any:
    """:func:`neighborhood_attention` on ``[B, X, Y, H, D]``, with NATTEN's name and argument order."""
    return _natten(2, query, key, value, kernel_size, stride, dilation, is_causal, scale,
                   additional_keys, additional_values, return_lse)


def na3d(query: Tensor, key: Tensor, value: Tensor, kernel_size: PerAxis, stride: PerAxis = 1,
         dilation: PerAxis = 1, is_causal: PerAxis = False, scale: float | Tensor | None = None,
         additional_keys: Tensor | None = None, additional_values: Tensor | None = None,
         return_lse: bool = False) -> Any:
    """:func:`neighborhood_attention` on ``[B, X, Y, Z, H, D]``, with NATTEN's name and argument
    order."""
    return _natten(3, query, key, value, kernel_size, stride, dilation, is_causal, scale,
                   additional_keys, additional_values, return_lse)


def _natten(rank: int, query: Tensor, key: Tensor, value: Tensor, kernel_size: PerAxis,
            stride: PerAxis, dilation: PerAxis, is_causal: PerAxis, scale: float | Tensor | None,
            additional_keys: Tensor | None, additional_values: Tensor | None,
            return_lse: bool) -> Any:
    if isinstance(query, Tensor) and query.dim() != rank + 3:
        raise ValueError(
            f"query must have {rank + 3} dimensions for na{rank}d, got shape {tuple(query.shape)}"
        )
    return neighborhood_attention(
        query, key, value, kernel_size, stride, dilation, is_causal, scale=scale,
        additional_keys=additional_keys, additional_values=additional_values,
        return_lse=return_lse)


def sliding_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: Any,
    *,
    is_causal: bool = True,
    sinks: int = 0,
    sink_logits: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Sliding-window attention over sequences, packed or padded, in prefill and decoding.

    Shapes:
        query ``[B, Nq, H, D]``, key ``[B, Nk, Hkv, D]``, value ``[B, Nk, Hkv, Dv]``; the result is
        ``[B, Nq, H, Dv]``, and with ``return_lse`` also ``[B, Nq, H]``. Query ``i`` stands at key
        ``i + Nk - Nq``: the last query at the last key, so one query against a cache is a decoding
        step.

    Args:
        window_size: ``W`` keys, self included (not causal: ``W // 2`` of them before self);
            ``(left, right)`` beside self, -1 for no limit; ``None`` for every key, which is dense
            attention. A *list* gives each query head its own.
        is_causal: no key after the query; ``right`` must then be 0 or -1.
        sinks: the first keys of a sequence that every query sees besides its window (arXiv
            2309.17453), counted once; with ``is_causal`` only if they are not after the query.
        cu_seqlens_q, cu_seqlens_k: int32 ``[N + 1]``, where each of N sequences packed along the
            token axis ends; ``B`` must be 1. ``cu_seqlens_k`` defaults to ``cu_seqlens_q``.
        sink_logits, softcap, alibi_slopes, bias, additional_keys, additional_values, scale: see
            :func:`neighborhood_attention`.

    Numerics, Errors, Complexity:
        As :func:`neighborhood_attention`.

    Source:
        Longformer (arXiv 2004.05150), Mistral (2310.06825), StreamingLLM (2309.17453), ALiBi
        (2108.12409); learned sink logits as in gpt-oss.

    Example:
        >>> import torch, attnext
        >>> q, k, v = (torch.randn(1, 100, 4, 64) for _ in range(3))
        >>> attnext.sliding_window_attention(q[:, -1:], k, v, 16, sinks=4).shape
        torch.Size([1, 1, 4, 64])
    """
    prepared = _prepared(
        _sliding_rules, query, key, value, window_size, is_causal, sinks, cu_seqlens_q is not None)
    if cu_seqlens_q is None and cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_k needs cu_seqlens_q")
    if cu_seqlens_q is not None:
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query)
        _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, query)
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ValueError(
                f"cu_seqlens_k must list as many sequences as cu_seqlens_q, got "
                f"{cu_seqlens_k.shape[0]} and {cu_seqlens_q.shape[0]} entries"
            )
    return _attend(query, key, value, prepared, scale, softcap, alibi_slopes, bias,
                   additional_keys, additional_values, sink_logits, return_lse, sinks,
                   cu_seqlens_q, cu_seqlens_k)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: PerAxis,
    shift: PerAxis = 0,
    *,
    key_window_size: PerAxis = None,
    boundary: str | None = None,
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    sink_logits: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention within the windows of a partition of the map: Swin's W-MSA, and SW-MSA when shifted.

    Nothing is rolled, padded or masked by tensors: the partition starts at ``shift``, its first and
    last windows are cut by the border, as Swin's masked shifted windows are. Maps need not divide.

    Shapes:
        query ``[B, *X, H, D]``, key ``[B, *X, Hkv, D]``, value ``[B, *X, Hkv, Dv]`` with 1 to 3
        token axes; the result is ``[B, *X, H, Dv]``, and with ``return_lse`` also ``[B, *X, H]``.

    Args:
        window_size: side of a window per axis.
        shift: coordinate of the first window border per axis (Swin: ``window_size // 2`` in every
            second block).
        key_window_size: side of the window of keys, centred on the window of queries, when larger
            (HAT's overlapping cross-attention). Keys outside the map are then zeros that take part
            in the softmax (``boundary="zero_pad"``) unless another boundary is given.
        boundary: ``"truncate"`` (default) or ``"zero_pad"``; ``"inward"`` is NATTEN's.
        bias: relative position bias ``[H, 2 e_0 - 1, ...]`` by ``key - query``;
            ``attnext.compat.bias`` converts Swin's and HAT's tables.
        scale, softcap, alibi_slopes, additional_keys, additional_values, sink_logits: see
            :func:`neighborhood_attention`.

    Numerics, Errors, Complexity:
        As :func:`neighborhood_attention`.

    Source:
        Swin Transformer (arXiv 2103.14030), HAT (2205.04437).

    Example:
        >>> import torch, attnext
        >>> q, k, v = (torch.randn(1, 20, 30, 3, 32) for _ in range(3))
        >>> attnext.window_attention(q, k, v, window_size=7, shift=3).shape
        torch.Size([1, 20, 30, 3, 32])
    """
    prepared = _prepared(
        _partition_rules, query, key, value, window_size, shift, key_window_size, boundary)
    return _attend(query, key, value, prepared, scale, softcap, alibi_slopes, bias,
                   additional_keys, additional_values, sink_logits, return_lse)


def merge_attentions(
    outputs: Sequence[Tensor], lses: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Attention over a union of disjoint key sets from the results over each.

    Shapes:
        outputs: equal shapes ``[..., D]``; lses: ``[...]``. Returns the merged pair in these shapes.

    Numerics:
        Weights in float32 (float64 for float64), the output in the dtype of the first. Where every
        lse is -inf, the output is 0 and the lse -inf, with zero gradients. Differentiable in all
        outputs and lses, out of place.

    Errors:
        ValueError or TypeError, naming the argument.

    Complexity:
        O(number of parts * elements).

    Source:
        The combination step of FlashDecoding and ring attention (arXiv 2310.01889).

    Example:
        >>> import torch, attnext
        >>> q, k, v = (torch.randn(1, 8, 2, 16) for _ in range(3))
        >>> parts = [attnext.sliding_window_attention(q, k[:, s], v[:, s], None, is_causal=False,
        ...                                           return_lse=True)
        ...          for s in (slice(0, 3), slice(3, 8))]
        >>> out, lse = attnext.merge_attentions(*zip(*parts))
    """
    if not outputs or len(outputs) != len(lses):
        raise ValueError(
            f"outputs and lses must be equally many and not empty, got {len(outputs)} and {len(lses)}"
        )
    for name, tensors, shape in (
        ("outputs", outputs, outputs[0].shape),
        ("lses", lses, outputs[0].shape[:-1]),
    ):
        for t in tensors:
            if not isinstance(t, Tensor) or not t.is_floating_point():
                raise TypeError(f"{name} must be floating-point tensors, got {_kind(t)}")
            if t.shape != shape:
                raise ValueError(
                    f"{name} must all have shape {tuple(shape)}, got {tuple(t.shape)}"
                )
    acc = accumulator_dtype(outputs[0].dtype)
    stacked = torch.stack([lse.to(acc) for lse in lses])
    top = stacked.detach().amax(0)
    top = torch.where(top == -math.inf, 0.0, top)
    weights = torch.exp(stacked - top)
    total = weights.sum(0)
    empty = total == 0
    safe = torch.where(empty, 1.0, total)
    merged: Any = 0
    for out, weight in zip(outputs, weights, strict=True):
        share = (weight / safe)[..., None]
        merged = merged + torch.where(share == 0, 0.0, share * out.to(acc))
    lse = torch.where(empty, -math.inf, top + torch.log(safe))
    return merged.to(outputs[0].dtype), lse


# ---- rules ----------------------------------------------------------------------------------------

# (left, right, stride, phase, dilation, is_causal, boundary, offset) per rule and axis, and the rule of
# each head (empty: all have the first).
Rules = tuple[list[tuple[Any, ...]], list[int]]
# The same, and the rules as the operator takes them.
Prepared = tuple[list[tuple[Any, ...]], list[int], list[int]]

_CACHE: dict[Any, Prepared] = {}
_CACHE_SIZE = 256


def _prepared(build: Any, query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Prepared:
    """``build(query, key, value, *options)``, which checks all it is given, remembered by everything
    that the checks look at: a small call costs more in checks than in arithmetic."""
    if torch.compiler.is_compiling():
        return _with_fields(build(query, key, value, *options))
    try:
        signature = (
            build, query.shape, key.shape, value.shape, query.dtype, key.dtype, value.dtype,
            query.device, key.device, value.device, options, *map(type, options))
        found = _CACHE.get(signature)
    except (TypeError, AttributeError):  # not tensors, or options that are lists
        return _with_fields(build(query, key, value, *options))
    if found is None:
        found = _with_fields(build(query, key, value, *options))
        if len(_CACHE) >= _CACHE_SIZE:
            _CACHE.clear()
        _CACHE[signature] = found
    return found


def _with_fields(prepared: Rules) -> Prepared:
    rules, head_rule = prepared
    fields = [
        field
        for left, right, stride, phase, dilation, causal, boundary, offset in rules
        for field in (left, right, stride, phase, dilation, int(causal),
                      BOUNDARIES.index(boundary), offset)
    ]
    return rules, head_rule, fields


def _neighborhood_rules(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: PerAxis, stride: PerAxis,
    dilation: PerAxis, is_causal: PerAxis, boundary: str, phase: PerAxis, offset: PerAxis,
) -> Rules:
    rank = _check_qkv(query, key, value)
    if boundary not in BOUNDARIES:
        raise ValueError(f"boundary must be one of {BOUNDARIES}, got {boundary!r}")
    strides = _per_axis("stride", stride, rank, minimum=1)
    dilations = _per_axis("dilation", dilation, rank, minimum=1)
    phases = _per_axis("phase", phase, rank)
    causal = _flags("is_causal", is_causal, rank)
    if offset is None:
        offsets = [key.shape[1 + a] - query.shape[1 + a] if causal[a] else 0 for a in range(rank)]
    else:
        offsets = _per_axis("offset", offset, rank)
    windows, head_rule = _per_head("kernel_size", kernel_size, query)
    rules = []
    for entry in windows:
        for a, size in enumerate(_per_axis_windows(entry, rank)):
            left, right = _kernel_sides(size, causal[a])
            if boundary == "zero_pad" and max(left, right, strides[a]) > _MAX_PHANTOMS:
                raise ValueError(
                    f"kernel_size and stride must not exceed {_MAX_PHANTOMS} with "
                    f"boundary='zero_pad', got {size!r} and {strides[a]}"
                )
            if boundary == "inward" and not causal[a] and strides[a] > left + right + 1:
                raise ValueError(
                    f"stride must not exceed kernel_size, got {strides[a]} > {left + right + 1} "
                    f"on axis {a}"
                )
            rules.append((left, right, strides[a], phases[a], dilations[a], causal[a], boundary,
                          offsets[a]))
    return rules, head_rule


def _sliding_rules(
    query: Tensor, key: Tensor, value: Tensor, window_size: Any, is_causal: bool, sinks: int,
    packed: bool,
) -> Rules:
    rank = _check_qkv(query, key, value)
    if rank != 1:
        raise ValueError(f"query must be [B, N, H, D], got shape {tuple(query.shape)}")
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be a bool, got {is_causal!r}")
    _integer("sinks", sinks, minimum=0)
    offset = 0 if packed else key.shape[1] - query.shape[1]
    windows, head_rule = _per_head("window_size", window_size, query)
    rules = []
    for window in windows:
        left, right = _window_sides(window, is_causal)
        rules.append((left, right, 1, 0, 1, is_causal, "truncate", offset))
    return rules, head_rule


def _partition_rules(
    query: Tensor, key: Tensor, value: Tensor, window_size: PerAxis, shift: PerAxis,
    key_window_size: PerAxis, boundary: str | None,
) -> Rules:
    rank = _check_qkv(query, key, value)
    sizes = _per_axis("window_size", window_size, rank, minimum=1)
    shifts = _per_axis("shift", shift, rank)
    key_sizes = sizes
    if key_window_size is not None:
        key_sizes = _per_axis("key_window_size", key_window_size, rank, minimum=1)
        for size, key_size in zip(sizes, key_sizes, strict=True):
            if key_size < size or key_size > _MAX_PHANTOMS:
                raise ValueError(
                    f"key_window_size must be between window_size, {size}, and {_MAX_PHANTOMS}, got "
                    f"{key_size}"
                )
    if boundary is None:
        boundary = "truncate" if key_window_size is None else "zero_pad"
    elif boundary not in BOUNDARIES:
        raise ValueError(f"boundary must be one of {BOUNDARIES}, got {boundary!r}")
    if key.shape[1:-2] != query.shape[1:-2]:
        raise ValueError(
            f"key must have the token axes of query, {tuple(query.shape[1:-2])}, got "
            f"{tuple(key.shape[1:-2])}"
        )
    rules = []
    for size, key_size, start in zip(sizes, key_sizes, shifts, strict=True):
        left = size // 2 + (key_size - size) // 2
        rules.append((left, key_size - 1 - left, size, start, 1, False, boundary, 0))
    return rules, []


# ---- normalising and checking ---------------------------------------------------------------------


def _kind(x: Any) -> str:
    return f"a {x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__


def _check_qkv(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Checks the three inputs against each other; returns the number of token axes."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    dtype, rank = query.dtype, query.dim() - 3
    if dtype not in DTYPES:
        raise TypeError(f"query must be one of {_DTYPE_NAMES}, got {dtype}")
    if not 1 <= rank <= 3:
        raise ValueError(
            "query must be [batch, *tokens, heads, head_dim] with 1 to 3 token axes, got shape "
            f"{tuple(query.shape)}"
        )
    q, k, v = query.shape, key.shape, value.shape
    for name, t in (("key", key), ("value", value)):
        if t.dtype != dtype:
            raise TypeError(f"{name} must have the dtype of query, {dtype}, got {t.dtype}")
        if t.device != query.device:
            raise ValueError(
                f"{name} must be on the device of query, {query.device}, got {t.device}"
            )
        if t.dim() != rank + 3:
            raise ValueError(
                f"{name} must have as many dimensions as query, {rank + 3}, got {t.dim()}"
            )
        if t.shape[0] != q[0]:
            raise ValueError(f"{name} must have the batch size of query, {q[0]}, got {t.shape[0]}")
    if query.device.type not in ("cpu", "meta"):
        raise NotImplementedError(
            f"query is on {query.device}: the kernels run on CPU tensors (and meta, for shapes)"
        )
    if k[:-1] != v[:-1]:
        raise ValueError(
            f"value must have the token axes and heads of key, {tuple(k[1:-1])}, got "
            f"{tuple(v[1:-1])}"
        )
    if q[-1] != k[-1]:
        raise ValueError(f"key must have the head_dim of query, {q[-1]}, got {k[-1]}")
    if q[-1] < 1 or v[-1] < 1:
        raise ValueError(f"value and query must have head_dim at least 1, got {v[-1]} and {q[-1]}")
    if k[-2] < 1 or q[-2] < 1 or q[-2] % k[-2]:
        raise ValueError(
            f"query must have a multiple of the heads of key, got {q[-2]} and {k[-2]} heads"
        )
    return rank


def _is_int(x: Any) -> bool:
    return isinstance(x, int | torch.SymInt) and not isinstance(x, bool)


def _integer(name: str, x: Any, minimum: int | None = None) -> None:
    if not _is_int(x):
        raise TypeError(f"{name} must be an int, got {x!r}")
    if minimum is not None and x < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {x}")


def _per_axis(name: str, x: Any, rank: int, minimum: int | None = None) -> Sequence[int]:
    if _is_int(x):
        _integer(name, x, minimum)
        return (x,) * rank
    if not isinstance(x, tuple | list):
        raise TypeError(f"{name} must be an int or a tuple of {rank}, got {x!r}")
    if len(x) != rank:
        raise ValueError(f"{name} must have one entry per token axis, {rank}, got {x!r}")
    for entry in x:
        _integer(name, entry, minimum)
    return x


def _flags(name: str, x: Any, rank: int) -> Sequence[bool]:
    if isinstance(x, bool):
        return (x,) * rank
    if not isinstance(x, tuple | list) or not all(isinstance(f, bool) for f in x):
        raise TypeError(f"{name} must be a bool or a tuple of bools, got {x!r}")
    if len(x) != rank:
        raise ValueError(f"{name} must have one entry per token axis, {rank}, got {x!r}")
    return x


def _per_head(name: str, x: Any, query: Tensor) -> tuple[list[Any], list[int]]:
    """Distinct windows, and which of them each head has (empty: all have the first)."""
    if not isinstance(x, list):
        return [x], []
    if len(x) != query.shape[-2]:
        raise ValueError(
            f"{name} as a list must have one entry per query head, {query.shape[-2]}, got {len(x)}"
        )
    distinct: list[Any] = []
    for entry in x:
        if entry not in distinct:
            distinct.append(entry)
    return distinct, [distinct.index(entry) for entry in x]


def _per_axis_windows(x: Any, rank: int) -> Sequence[Any]:
    if _is_int(x):
        return (x,) * rank
    if not isinstance(x, tuple):
        raise TypeError(
            f"kernel_size must be an int, a tuple of {rank}, or a list with one of these per head, "
            f"got {x!r}"
        )
    if len(x) != rank:
        raise ValueError(f"kernel_size must have one entry per token axis, {rank}, got {x!r}")
    return x


def _kernel_sides(size: Any, causal: bool) -> tuple[int, int]:
    if isinstance(size, tuple):
        return _sides("kernel_size", size, causal)
    _integer("kernel_size", size, 1)
    return (size - 1, 0) if causal else (size // 2, size - 1 - size // 2)


def _window_sides(window: Any, causal: bool) -> tuple[int, int]:
    if window is None:
        return UNLIMITED, 0 if causal else UNLIMITED
    if isinstance(window, tuple):
        return _sides("window_size", window, causal)
    _integer("window_size", window, 1)
    return (window - 1, 0) if causal else (window // 2, window - 1 - window // 2)


def _sides(name: str, sides: tuple[Any, ...], causal: bool) -> tuple[int, int]:
    if len(sides) != 2:
        raise ValueError(f"{name} must be an int or (left, right), got {sides!r}")
    for side in sides:
        _integer(name, side, -1)
    left, right = (UNLIMITED if side == -1 else side for side in sides)
    if causal:
        if sides[1] not in (0, -1):
            raise ValueError(f"{name}: right must be 0 or -1 when causal, got {sides!r}")
        right = 0
    return left, right


def _check_cu_seqlens(name: str, cu_seqlens: Any, query: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be an int32 tensor, got {_kind(cu_seqlens)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{name} must be [N + 1] with N >= 1, got {tuple(cu_seqlens.shape)}")
    if query.shape[0] != 1:
        raise ValueError(f"query must have batch size 1 with {name}, got {query.shape[0]}")


def _check_modifier(name: str, t: Any, shape: tuple[Any, ...], query: Tensor) -> None:
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {_kind(t)}")
    if t.device != query.device:
        raise ValueError(f"{name} must be on the device of query, {query.device}, got {t.device}")
    if t.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}")


def _check_bias(bias: Any, query: Tensor) -> None:
    rank = query.dim() - 3
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        raise TypeError(f"bias must be a floating-point tensor, got {_kind(bias)}")
    if bias.device != query.device:
        raise ValueError(f"bias must be on the device of query, {query.device}, got {bias.device}")
    if bias.dim() != rank + 1 or bias.shape[0] != query.shape[-2]:
        raise ValueError(
            f"bias must be [heads, {', '.join(['2e - 1'] * rank)}] with {query.shape[-2]} heads, got "
            f"{tuple(bias.shape)}"
        )
    if any(n % 2 == 0 for n in bias.shape[1:]):
        raise ValueError(f"bias must have odd extents (2e - 1), got {tuple(bias.shape[1:])}")


def _row_scale(scale: Any, query: Tensor, acc: torch.dtype) -> tuple[float, Tensor | None]:
    """``scale`` as a number for all and, if it is a tensor, a factor per query and head."""
    if scale is None:
        return query.shape[-1] ** -0.5, None
    if isinstance(scale, Tensor):
        if not scale.is_floating_point():
            raise TypeError(f"scale must be a floating-point tensor or a number, got {_kind(scale)}")
        if scale.device != query.device:
            raise ValueError(
                f"scale must be on the device of query, {query.device}, got {scale.device}"
            )
        rows = query.shape[:-1]
        fits = scale.dim() <= len(rows) and all(
            n in (1, m) for n, m in zip(reversed(scale.shape), reversed(rows))  # noqa: B905
        )
        if not fits:
            raise ValueError(
                f"scale must be a number, [heads] or broadcast to {tuple(rows)}, got "
                f"{tuple(scale.shape)}"
            )
        return 1.0, scale.to(acc).expand(rows)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a number or a tensor, got {scale!r}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return float(scale), None


def _reach(rules: Sequence[Any], axis: int, rank: int, query: Tensor, key: Tensor) -> int:
    """A bound on |key - query| over the attended pairs of an axis, in units of the dilation."""
    worst = 0
    n_q, n_k = query.shape[1 + axis], key.shape[1 + axis]
    for left, right, stride, _, dilation, _, boundary, offset in rules[axis::rank]:
        window = left + right + stride - 1
        if boundary != "zero_pad":
            extent = max(n_k, n_q + offset, n_k - offset)
            window = min(window, (extent + dilation - 1) // dilation)
        worst = max(worst, window)
    return worst


def _alibi_table(
    slopes: Tensor, bias: Tensor | None, rules: Sequence[Any], sinks: int, packed: bool,
    query: Tensor, key: Tensor, acc: torch.dtype,
) -> Tensor:
    """ALiBi as a relative bias table, on top of ``bias`` if there is one: its gradient follows."""
    rank = query.dim() - 3
    table: Any = 0
    for a in range(rank):
        if bias is not None:
            reach = (bias.shape[1 + a] - 1) // 2
        elif sinks > 0 or packed:
            reach = max(query.shape[1], key.shape[1])
        else:
            reach = _reach(rules, a, rank, query, key)
        distance = torch.arange(-reach, reach + 1, device=query.device).abs() * rules[a][4]
        shape = [1] * rank
        shape[a] = -1
        table = table + distance.to(acc).reshape(shape)
    table = -slopes.to(acc).reshape(-1, *[1] * rank) * table
    return table if bias is None else table + bias.to(acc)


def _unit_stride(t: Tensor) -> Tensor:
    """The kernels read rows; only a tensor whose last axis is strided is copied."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _attend(
    query: Tensor, key: Tensor, value: Tensor, prepared: Prepared, scale: Any,
    softcap: Any, alibi_slopes: Any, bias: Any, additional_keys: Any, additional_values: Any,
    sink_logits: Any, return_lse: bool, sinks: int = 0, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Any:
    """Checks the modifiers, which are the same for all functions, and calls the operator."""
    rules, head_rule, fields = prepared
    heads, device = query.shape[-2], query.device.type
    if (additional_keys is None) != (additional_values is None):
        raise ValueError("additional_keys and additional_values must be given together")
    if additional_keys is not None:
        for name, t, dim in (
            ("additional_keys", additional_keys, key.shape[-1]),
            ("additional_values", additional_values, value.shape[-1]),
        ):
            if not isinstance(t, Tensor) or t.dtype != query.dtype:
                raise TypeError(f"{name} must be a {query.dtype} tensor like query, got {_kind(t)}")
            if t.dim() != 4:
                raise ValueError(f"{name} must be [B, E, heads, dim], got {tuple(t.shape)}")
            want = (query.shape[0], additional_keys.shape[1], key.shape[-2], dim)
            _check_modifier(name, t, want, query)
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        cast = torch.get_autocast_dtype(device)
        query, key, value = query.to(cast), key.to(cast), value.to(cast)
        if additional_keys is not None:
            additional_keys, additional_values = additional_keys.to(cast), additional_values.to(cast)
    acc = accumulator_dtype(query.dtype)
    number, row_scale = _row_scale(scale, query, acc)
    if softcap is not None:
        if isinstance(softcap, bool) or not isinstance(softcap, int | float):
            raise TypeError(f"softcap must be a number, got {softcap!r}")
        if not (softcap > 0 and math.isfinite(softcap)):
            raise ValueError(f"softcap must be positive and finite, got {softcap}")
    if bias is not None:
        _check_bias(bias, query)
    if alibi_slopes is not None:
        _check_modifier("alibi_slopes", alibi_slopes, (heads,), query)
        bias = _alibi_table(alibi_slopes, bias, rules, sinks, cu_seqlens_q is not None, query, key,
                            acc)
    if bias is not None:
        bias = bias.to(acc).contiguous()
    if sink_logits is not None:
        _check_modifier("sink_logits", sink_logits, (heads,), query)
        sink_logits = sink_logits.to(acc).contiguous()
    if additional_keys is not None:
        additional_keys = _unit_stride(additional_keys)
        additional_values = _unit_stride(additional_values)
    out, lse = window_op(
        _unit_stride(query), _unit_stride(key), _unit_stride(value), row_scale, bias,
        additional_keys, additional_values, sink_logits, cu_seqlens_q, cu_seqlens_k, fields,
        head_rule, number, float(softcap or 0.0), sinks)
    return (out, lse) if return_lse else out
