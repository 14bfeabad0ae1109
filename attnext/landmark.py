# SPDX-License-Identifier: Apache-2.0
"""Landmark attention (arXiv 2305.16300): a softmax over landmarks and the tokens at hand, whose
share of each landmark a softmax over its block divides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arguments import (
    check_flag,
    check_integer,
    check_scale,
    check_sequences,
    check_tensor,
    under_autocast,
)
from .functional import sliding_window_attention
from .landmark_ops import Sections, landmark_op
from .merging import merge_attentions
from .plans import BlockPlan
from .routed import routed_attention
from .selection import fitting, select_topk


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
    """Causal attention with a softmax in two levels.

    A block is the tokens up to a landmark; the landmark ends it. A query's softmax runs over the
    tokens of its own block up to itself and over the landmarks of all earlier blocks. What falls to
    a landmark is divided among the tokens of its block by a softmax over these. The landmarks'
    values are never read.

    Shapes:
        query ``[B, Nq, H, D]``, key ``[B, Nk, Hkv, D]``, value ``[B, Nk, Hkv, Dv]``, is_landmark
        bool ``[Nk]`` or ``[B, Nk]``, anywhere; the result is ``[B, Nq, H, Dv]``, with
        ``return_lse`` also ``[B, Nq, H]``, of the outer softmax. The last query stands at the last
        key.

    Args:
        topk: only that many earlier blocks, those whose landmarks score highest, per query and
            head (with fewer, all there are): what inference retrieves. None: all.
        scale: by default ``D ** -0.5``.

    Numerics:
        Softmax and sums in float32 (float64 for float64), one rounding at the store (with
        ``topk`` one more: parts are merged). A landmark without tokens before it in its block has
        no weight; a query with nothing to attend gives 0, lse -inf and no gradient. Differentiable
        in query, key and value; deterministic. Without ``topk``, a value that is not finite may
        reach queries a little before it.

    Errors:
        ValueError, TypeError or NotImplementedError, naming the argument.

    Complexity:
        O(Nq Nk D) time; memory of the results on the CPU, where blocks hold at most 64 tokens with
        their landmark, elsewhere a part of the queries' tables too. With ``topk``
        O(Nq (topk block + landmarks) D) time. How many landmarks there are is read on the
        host, once.

    Source:
        Landmark Attention (arXiv 2305.16300).

    Example:
        >>> import torch, attnext
        >>> q, k, v = (torch.randn(1, 40, 2, 16) for _ in range(3))
        >>> is_landmark = torch.arange(40) % 8 == 7
        >>> attnext.landmark_attention(q, k, v, is_landmark).shape
        torch.Size([1, 40, 2, 16])
        >>> attnext.landmark_attention(q[:, -1:], k, v, is_landmark, topk=2).shape
        torch.Size([1, 1, 2, 16])
    """
    query, key, value = under_autocast(query, key, value)
    check_sequences(query, key, value)
    _check(is_landmark, query, key)
    check_flag("return_lse", return_lse)
    if topk is not None:
        check_integer("topk", topk, 1)
    scale = check_scale(scale, query.shape[-1] ** -0.5)
    if not key.shape[1] or not query.numel():
        return sliding_window_attention(query, key, value, None, return_lse=return_lse)
    if topk is None:
        value = value.masked_fill(is_landmark[..., None, None], 0.0)
        out, lse = landmark_op(query, key, value, is_landmark, scale)
    else:
        sections = Sections.of(is_landmark, query.shape[1])
        out, lse = _retrieved(query, key, value, sections, topk, scale)
    return (out, lse) if return_lse else out


def _retrieved(
    query: Tensor, key: Tensor, value: Tensor, sections: Sections, topk: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Each selected block attended alone, its weight its landmark's score: a merge by lse."""
    batch, num_queries = query.shape[:2]
    num_keys = key.shape[1]
    starts, ends, pasts = (
        t.expand(batch, -1) for t in (sections.starts, sections.ends, sections.pasts)
    )
    own = sections.own.expand(batch, -1)
    places = (pasts - 1).clamp(min=0)[:, :, None, None].expand(-1, -1, *key.shape[2:])
    landmarks = key.gather(1, places)
    topk, _, _ = fitting(topk, landmarks.shape[1])
    lists, scores = select_topk(
        query, landmarks, topk, ranges=(torch.zeros_like(own), own), scale=scale,
        exclude=(ends <= starts)[:, None, None], return_values=True,
    )  # fmt: skip

    def attend(first: Tensor, past: Tensor) -> Any:
        plan = BlockPlan.of_spans(first[..., None], past[..., None], num_queries, 1, num_keys)
        return routed_attention(query, key, value, plan, scale=scale, return_lse=True)

    blocks = lists.long().clamp(min=0).flatten(1)  # [B, H Nq topk]
    firsts, pasts_of = (t.gather(1, blocks).unflatten(1, lists.shape[1:]) for t in (starts, ends))
    pasts_of = torch.where(lists < 0, firsts, pasts_of)
    outputs, lses = [], []
    for slot in range(topk):
        outputs.append(attend(firsts[..., slot], pasts_of[..., slot])[0])
        lses.append(scores[..., slot].transpose(1, 2))
    at = sections.positions + 1
    begin = torch.minimum(starts.gather(1, own), at.clamp(min=0))
    end = torch.minimum(ends.gather(1, own), at)
    out, lse = attend(begin[:, None], torch.where(at > 0, end, 0)[:, None])
    return merge_attentions([*outputs, out], [*lses, lse])


def _check(is_landmark: Any, query: Tensor, key: Tensor) -> None:
    check_tensor("is_landmark", is_landmark, "a bool", query)
    batch, tokens = key.shape[:2]
    if tuple(is_landmark.shape) not in ((tokens,), (batch, tokens)):
        raise ValueError(
            f"is_landmark must be [{tokens}] or [{batch}, {tokens}], got {tuple(is_landmark.shape)}"
        )
