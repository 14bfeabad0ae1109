# SPDX-License-Identifier: Apache-2.0
"""StreamingLLM (arXiv 2309.17453): the first tokens and the last, positions within the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import under_autocast
from ..functional import sliding_window_attention
from ..merging import merge_attentions
from ..plans import BlockPlan
from ..routed import routed_attention
from .inputs import Rotary, check_flag, check_integer, check_sequences, rotated


def streaming_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sinks: int = 4,
    window_size: int = 512,
    rotary: Rotary | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Causal attention to the first ``sinks`` tokens and the last ``window_size``.

    With ``rotary`` a token has the position it has in a cache of these alone: the window follows
    the sinks at once, so that no position exceeds ``sinks + window_size``.

    Shapes:
        query ``[B, Nq, H, D]``, key ``[B, Nk, Hkv, D]``, value ``[B, Nk, Hkv, Dv]``; the result is
        ``[B, Nq, H, Dv]``, and with ``return_lse`` also ``[B, Nq, H]``. Query ``i`` stands at key
        ``i + Nk - Nq``.

    Args:
        window_size: keys with the query's own.
        rotary: ``rotary(x [B, N, H, D], positions int64 [N])`` gives ``x`` rotated, such that
            scores depend on differences of positions; None: no positions.

    Numerics:
        As :func:`attnext.sliding_window_attention`; with ``rotary`` sinks and window are rounded to
        the dtype before they are joined. Differentiable.

    Errors:
        ValueError, TypeError or NotImplementedError, naming the argument.

    Complexity:
        O(N (sinks + window_size) D).

    Source:
        StreamingLLM (arXiv 2309.17453).

    Example:
        >>> import torch
        >>> from attnext.routers.streaming import streaming_attention
        >>> q, k, v = (torch.randn(1, 100, 2, 16) for _ in range(3))
        >>> streaming_attention(q, k, v, window_size=16).shape
        torch.Size([1, 100, 2, 16])
    """
    query, key, value = under_autocast(query, key, value)
    check_sequences(query, key, value)
    check_integer("sinks", sinks, 0)
    check_integer("window_size", window_size, 1)
    check_flag("return_lse", return_lse)
    if rotary is None:
        return sliding_window_attention(
            query,
            key,
            value,
            window_size,
            sinks=sinks,
            scale=scale,
            return_lse=return_lse,
        )
    at, num_sinks = _places(query, key), min(sinks, key.shape[1])
    near = rotated(rotary, query, at.clamp(min=0))
    keys = rotated(rotary, key, torch.arange(key.shape[1], device=key.device))
    window = sliding_window_attention(
        near,
        keys[:, num_sinks:],
        value[:, num_sinks:],
        window_size,
        scale=scale,
        return_lse=True,
    )
    far = rotated(rotary, query, at.clamp(0, sinks + window_size - 1))
    ends = (at + 1).clamp(0, num_sinks)[None, None, :, None]
    plan = BlockPlan.of_spans(torch.zeros_like(ends), ends, len(at), 1, num_sinks)
    first = routed_attention(
        far, keys[:, :num_sinks], value[:, :num_sinks], plan, scale=scale, return_lse=True
    )
    out, lse = merge_attentions(*zip(first, window, strict=True))
    return (out, lse) if return_lse else out


def _places(query: Tensor, key: Tensor) -> Tensor:
    return torch.arange(query.shape[1], device=key.device) + key.shape[1] - query.shape[1]
