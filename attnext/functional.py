# SPDX-License-Identifier: Apache-2.0
"""The public functions. Every user error is raised here, before any memory is touched."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .window_call import attend
from .window_rules import PerAxis, neighborhood_rules, partition_rules, sliding_rules


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
    offset: PerAxis | None = None,
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
        kernel_size: keys per axis, self included, or ``(left, right)`` beside self for an axis
            (``((2, 1), 7)``; on one axis ``(2, 1)``). A *list* gives each query head its own.
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
        softcap: logits become ``softcap * tanh(logit / softcap)``, before anything is added.
        alibi_slopes: ``[H]``; adds ``-slope * distance``, the sum over axes of the distance in
            tokens. Differentiable.
        bias: ``[H, 2 e_0 - 1, ...]``, added to the logit of each pair: entry
            ``key - query + e - 1`` per axis, in units of the dilation. ``e - 1`` is the largest
            distance that the table has; it must have all that are attended, those of sinks and of
            keys beyond the border among them. Differentiable.
        additional_keys, additional_values: ``[B, E, Hkv, D]`` and ``[B, E, Hkv, Dv]``, seen by
            every query in the same softmax, without bias.
        sink_logits: ``[H]``, one further logit per head in the denominator, without a value.

    Numerics:
        float32, float64, bfloat16, float16 in and out; sums and statistics in float32 (float64 for
        float64), one rounding at the store. lse is the natural logarithm, in float32 (float64 for
        float64). A query without keys gives 0 and lse -inf. Deterministic, forward and backward,
        and on the CPU the same bits for any number of threads.

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
    return attend(
        neighborhood_rules,
        (kernel_size, stride, dilation, is_causal, boundary, phase, offset),
        query,
        key,
        value,
        scale,
        softcap,
        alibi_slopes,
        bias,
        additional_keys,
        additional_values,
        sink_logits,
        return_lse,
    )


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: PerAxis = False,
    scale: float | Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    *,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    sink_logits: Tensor | None = None,
) -> Any:
    """:func:`neighborhood_attention` on ``[B, X, H, D]``, with NATTEN's name and argument
    order; what NATTEN has no name for comes by name.

    Example:
        >>> import torch, attnext
        >>> q, k, v = torch.randn(3, 1, 50, 2, 16)
        >>> attnext.na1d(q, k, v, 7).shape
        torch.Size([1, 50, 2, 16])
    """
    return _natten(
        1,
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal,
        scale,
        additional_keys,
        additional_values,
        return_lse,
        softcap,
        alibi_slopes,
        bias,
        sink_logits,
    )


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: PerAxis = False,
    scale: float | Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    *,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    sink_logits: Tensor | None = None,
) -> Any:
    """:func:`neighborhood_attention` on ``[B, X, Y, H, D]``, with NATTEN's name and argument
    order; what NATTEN has no name for comes by name.

    Example:
        >>> import torch, attnext
        >>> q, k, v = torch.randn(3, 1, 14, 9, 2, 16)
        >>> attnext.na2d(q, k, v, 3, dilation=2).shape
        torch.Size([1, 14, 9, 2, 16])
    """
    return _natten(
        2,
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal,
        scale,
        additional_keys,
        additional_values,
        return_lse,
        softcap,
        alibi_slopes,
        bias,
        sink_logits,
    )


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: PerAxis = False,
    scale: float | Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    *,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    sink_logits: Tensor | None = None,
) -> Any:
    """:func:`neighborhood_attention` on ``[B, X, Y, Z, H, D]``, with NATTEN's name and argument
    order; what NATTEN has no name for comes by name.

    Example:
        >>> import torch, attnext
        >>> q, k, v = torch.randn(3, 1, 4, 8, 8, 2, 16)
        >>> attnext.na3d(q, k, v, (3, 5, 5), is_causal=(True, False, False)).shape
        torch.Size([1, 4, 8, 8, 2, 16])
    """
    return _natten(
        3,
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal,
        scale,
        additional_keys,
        additional_values,
        return_lse,
        softcap,
        alibi_slopes,
        bias,
        sink_logits,
    )


def _natten(
    rank: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis,
    dilation: PerAxis,
    is_causal: PerAxis,
    scale: float | Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    return_lse: bool,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    sink_logits: Tensor | None,
) -> Any:
    if isinstance(query, Tensor) and query.dim() != rank + 3:
        raise ValueError(
            f"query must have {rank + 3} dimensions for na{rank}d, got shape {tuple(query.shape)}"
        )
    return neighborhood_attention(
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        bias=bias,
        additional_keys=additional_keys,
        additional_values=additional_values,
        sink_logits=sink_logits,
        return_lse=return_lse,
    )


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
            They may lie on the CPU beside CUDA tensors, and had better: from a GPU they are
            fetched, which waits for it, and which no CUDA graph can record.
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
    return attend(
        sliding_rules,
        (window_size, is_causal, sinks, cu_seqlens_q is not None),
        query,
        key,
        value,
        scale,
        softcap,
        alibi_slopes,
        bias,
        additional_keys,
        additional_values,
        sink_logits,
        return_lse,
        sinks,
        cu_seqlens_q,
        cu_seqlens_k,
    )


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: PerAxis,
    shift: PerAxis = 0,
    *,
    key_window_size: PerAxis | None = None,
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
    """Attention within the windows of a partition of the map: Swin's W-MSA, shifted: SW-MSA.

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
    return attend(
        partition_rules,
        (window_size, shift, key_window_size, boundary),
        query,
        key,
        value,
        scale,
        softcap,
        alibi_slopes,
        bias,
        additional_keys,
        additional_values,
        sink_logits,
        return_lse,
    )
