# SPDX-License-Identifier: Apache-2.0
"""Mixture of block attention (MoBA, arXiv 2502.13189): every query its own block, and the earlier
blocks whose mean key it likes best."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import check_cu_seqlens, check_integer, check_sequences
from ..ops import accumulator_dtype
from ..plans import BlockPlan
from ..pooling import Windows, block_pool, packed_blocks
from ..routed import routed_attention
from ..selection import select_topk


def moba_plan(
    query: Tensor,
    key: Tensor,
    block_size: int,
    topk: int,
    *,
    cu_seqlens: Tensor | None = None,
) -> BlockPlan:
    """The lists of :func:`moba_attention`: for each query and head the block it stands in and the
    ``topk - 1`` earlier ones of largest ``q . mean(keys)``."""
    check_sequences(query, key, key)
    check_integer("block_size", block_size, 1)
    check_integer("topk", topk, 1)
    acc = accumulator_dtype(key.dtype)
    num_queries, num_keys = query.shape[1], key.shape[1]
    if cu_seqlens is None:
        blocks: Any = Windows(num_keys, block_size)
        means = block_pool(key.detach(), blocks, dtype=acc)
        lists = select_topk(
            query.detach(), means, topk, causal="start", query_blocks=Windows(num_queries, 1),
            candidate_blocks=blocks, force_last=1,
        )  # fmt: skip
        return BlockPlan.of(lists, num_queries, 1, num_keys, block_size)
    check_cu_seqlens("cu_seqlens", cu_seqlens, query)
    if num_queries != num_keys:
        raise ValueError(
            f"key must have the tokens of query, {num_queries}, with cu_seqlens, got {num_keys}"
        )
    blocks, first = packed_blocks(cu_seqlens, block_size)
    if blocks.num_tokens != num_keys:
        raise ValueError(
            f"cu_seqlens must end at the number of tokens, {num_keys}, got {blocks.num_tokens}"
        )
    blocks = type(blocks)(blocks.extent, blocks.offsets.to(key.device))
    means = block_pool(key.detach(), blocks, dtype=acc)
    places = torch.arange(num_keys, device=key.device)
    own = torch.searchsorted(blocks.offsets[1:], places.int(), right=True)
    sequence = torch.searchsorted(cu_seqlens[1:].to(key.device), places.int(), right=True)
    begin = first.to(key.device)[sequence]
    lists = select_topk(query.detach(), means, topk, ranges=(begin, own + 1), force_last=1)
    return BlockPlan.of(lists, num_queries, 1, num_keys, blocks)


def moba_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    topk: int,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Causal attention of every query, in each head, to ``topk`` blocks of keys: the block it
    stands in, up to itself, and the earlier blocks of largest ``q . mean(keys of the block)``.

    Shapes:
        query ``[B, Nq, H, D]``, key ``[B, Nk, Hkv, D]``, value ``[B, Nk, Hkv, Dv]``; the result is
        ``[B, Nq, H, Dv]``, with ``return_lse`` also ``[B, Nq, H]``. The last query stands at the
        last key, so one query against a cache is a decoding step.

    Args:
        block_size: keys of a block; the last holds what is left.
        topk: blocks per query, its own among them; with fewer, all there are.
        cu_seqlens: int32 ``[N + 1]``, where each of N packed sequences ends; ``B`` must be 1.
            Blocks start anew in each. Best on the CPU, where it is read.
        scale: by default ``D ** -0.5``. Blocks are chosen by unscaled products.

    Numerics:
        As :func:`routed_attention`; means and their products in float32 (float64 for float64).
        The choice passes no gradient.

    Errors:
        ValueError, TypeError or NotImplementedError, naming the argument.

    Complexity:
        O(Nq (topk block_size + Nk / block_size) D) time, O(N + Nq topk) memory.

    Source:
        MoBA (arXiv 2502.13189).

    Example:
        >>> import torch, attnext
        >>> q, k, v = (torch.randn(1, 100, 4, 32) for _ in range(3))
        >>> attnext.moba_attention(q, k, v, block_size=16, topk=3).shape
        torch.Size([1, 100, 4, 32])
    """
    plan = moba_plan(query, key, block_size, topk, cu_seqlens=cu_seqlens)
    return routed_attention(
        query, key, value, plan, is_causal=True, scale=scale, return_lse=return_lse
    )
