# SPDX-License-Identifier: Apache-2.0
"""The specification of routed attention: dense masks from the lists, slot by slot, then
``reference.attention``. Nothing here is shared with the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .plans import BlockPlan
from .reference import INFINITE, attention


def tokens_of(blocks: Any, b: int) -> list[int]:
    """Raster indices of the tokens of block ``b``."""
    begin, end = int(blocks.offsets[b]), int(blocks.offsets[b + 1])
    return list(range(begin, end)) if blocks.order is None else blocks.order[begin:end].tolist()


def listed_keys(plan: BlockPlan, batch: int, heads: int) -> tuple[Tensor, Tensor, Any]:
    """``[B, H, N, M]``: which keys the lists of a query hold, and at which place of the flattened
    lists first (-1: nowhere); and the bias of those places."""
    list_batch, list_heads = plan.list_shape
    num_queries, num_keys = plan.query_blocks.num_tokens, plan.key_blocks.num_tokens
    place = torch.full((batch, heads, num_queries, num_keys), -1)
    starts = plan.lists.flatten().tolist()
    ends = None if plan.ends is None else plan.ends.flatten().tolist()
    slots = plan.lists.shape[-1]
    for b in range(batch):
        for h in range(heads):
            lb, lh = b % list_batch, h // (heads // list_heads)
            for i in range(plan.query_blocks.num_blocks):
                if plan.indptr is None:
                    row = (lb * list_heads + lh) * plan.query_blocks.num_blocks + i
                    begin, end = row * slots, (row + 1) * slots
                else:
                    begin, end = plan.indptr[lb, lh, i : i + 2].tolist()
                queries = tokens_of(plan.query_blocks, i)
                for e in reversed(range(begin, end)):  # the first slot has the last word
                    if ends is not None:
                        keys = list(range(starts[e], ends[e]))
                    else:
                        keys = tokens_of(plan.key_blocks, starts[e]) if starts[e] >= 0 else []
                    if queries and keys:
                        at = place[b, h]
                        at[torch.tensor(queries)[:, None], torch.tensor(keys)[None]] = e
    bias = None
    if plan.bias is not None:
        entries = torch.cat([plan.bias.flatten(), plan.bias.new_zeros(1)])  # -1: the last
        bias = entries[place]
    return place >= 0, place, bias


def routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    *,
    is_causal: bool = False,
    within: tuple[int | None, int | None] | None = None,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    key_lengths: Tensor | None = None,
    exclude_self: bool = False,
    window_size: Any = None,
    sinks: int = 0,
    head_policy: Any = None,
    sink_logits: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    dtype: torch.dtype = torch.float64,
    **average: Any,
) -> Any:
    """See :func:`attnext.routed_attention`."""
    batch, extent, heads = query.shape[0], query.shape[1:-2], query.shape[-2]
    q, k, v = (t.flatten(1, -3) for t in (query, key, value))
    num_queries, num_keys = q.shape[1], k.shape[1]
    listed, _, bias = listed_keys(plan, batch, heads)
    i = torch.arange(num_queries)[:, None] + (num_keys - num_queries)  # positions, bottom-right
    j = torch.arange(num_keys)[None]

    def side(x: Any) -> float:
        return INFINITE if x is None else x

    besides = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    if window_size is not None:
        left, right = (window_size - 1, 0) if isinstance(window_size, int) else window_size
        besides |= (j >= i - side(left)) & (j <= i + side(right))
    besides |= j < sinks
    mask = torch.zeros(batch, heads, num_queries, num_keys, dtype=torch.bool)
    for h in range(heads):
        policy = "list" if head_policy is None else head_policy[h]
        if policy == "list":
            mask[:, h] = listed[:, h] | besides
        elif policy == "streaming":
            mask[:, h] = besides
        elif policy == "dense":
            mask[:, h] = True
        else:
            assert policy == "off"
        if bias is not None and policy != "list":
            bias = bias * torch.tensor([float(g != h) for g in range(heads)]).view(1, -1, 1, 1)
    if is_causal:
        mask = mask & (j <= i)
    if within is not None:
        mask = mask & (j >= i - side(within[0])) & (j <= i + side(within[1]))
    if exclude_self:
        mask = mask & (j != i)
    if query_documents is not None and key_documents is not None:
        mask = mask & (query_documents[:, None, :, None] == key_documents[:, None, None, :])
    if key_lengths is not None:
        mask = mask & (j < key_lengths.view(-1, 1, 1, 1))
    result = attention(
        q,
        k,
        v,
        mask,
        scale=scale,
        softcap=softcap,
        logit_bias=bias,
        sink_logits=sink_logits,
        return_lse=True,
        dtype=dtype,
        **average,
    )
    out = result[0].reshape(batch, *extent, heads, value.shape[-1])
    lse = result[1].reshape(batch, *extent, heads)
    return (out, lse) if return_lse else out
