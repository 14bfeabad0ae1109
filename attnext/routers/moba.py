# SPDX-License-Identifier: Apache-2.0
"""Mixture of block attention (MoBA, arXiv 2502.13189): every query its own block, and the earlier
blocks whose mean key it likes best."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..arguments import check_cu_seqlens, check_flag, check_integer, check_sequences, under_autocast
from ..merging import merge_attentions
from ..ops import accumulator_dtype
from ..plans import BlockPlan, Blocks
from ..pooling import block_pool, packed_blocks
from ..routed import routed_attention
from ..selection import fitting, select_topk

_TILE = 64  # queries that are attended at a time
# Where queries are brought together by the block they attend; the CPU's walk over lists does that
# itself.
_SORTED_ON = ("cuda",)


def moba_plan(
    query: Tensor,
    key: Tensor,
    block_size: int,
    topk: int,
    *,
    cu_seqlens: Tensor | None = None,
) -> BlockPlan:
    """The lists of :func:`moba_attention`: for each query and head the block it stands in and the
    ``topk - 1`` earlier ones of largest ``q . mean(keys)``.

    Example:
        >>> import torch
        >>> from attnext.routers.moba import moba_plan
        >>> q, k = torch.ones(1, 6, 1, 8), torch.ones(1, 6, 1, 8)
        >>> moba_plan(q, k, block_size=2, topk=2).lists[0, 0].tolist()
        [[0, -1], [0, -1], [0, 1], [0, 1], [0, 2], [0, 2]]
    """
    blocks, first, own, topk = _blocks(query, key, block_size, topk, cu_seqlens)
    lists = _select(query, key, blocks, topk, first, own + 1, force_last=1)
    return BlockPlan.of(lists, query.shape[1], 1, key.shape[1], blocks)


def _blocks(
    query: Tensor, key: Tensor, block_size: int, topk: int, cu_seqlens: Tensor | None
) -> tuple[Blocks, Tensor, Tensor, int]:
    """The blocks of keys; for each query the first of its sequence, and its own; ``topk``, or all
    that there are."""
    check_sequences(query, key, key)
    check_integer("block_size", block_size, 1)
    check_integer("topk", topk, 1)
    num_queries, num_keys = query.shape[1], key.shape[1]
    topk, _, _ = fitting(topk, -(-num_keys // block_size))  # of one sequence there are no more
    places = torch.arange(num_queries, device=key.device) + (num_keys - num_queries)
    if cu_seqlens is None:
        own = torch.div(places, block_size, rounding_mode="floor").clamp(min=-1)
        return Blocks.of(num_keys, block_size, key.device), torch.zeros_like(own), own, topk
    check_cu_seqlens("cu_seqlens", cu_seqlens, query)
    if num_queries != num_keys:
        raise ValueError(
            f"key must have the tokens of query, {num_queries}, with cu_seqlens, got {num_keys}"
        )
    # A compiler must not be asked how many blocks there are.
    known = num_keys if is_compiling() or cu_seqlens.is_meta else None
    blocks, first = packed_blocks(cu_seqlens, block_size, num_tokens=known)
    if blocks.num_tokens != num_keys:
        raise ValueError(
            f"cu_seqlens must end at the number of tokens, {num_keys}, got {blocks.num_tokens}"
        )
    blocks = Blocks(blocks.extent, blocks.offsets.to(key.device))
    own = torch.searchsorted(blocks.offsets[1:], places.int(), right=True)
    sequence = torch.searchsorted(cu_seqlens[1:].to(key.device), places.int(), right=True)
    return blocks, first.to(key.device).long()[sequence], own, topk


def _select(
    query: Tensor,
    key: Tensor,
    blocks: Blocks,
    count: int,
    begin: Tensor,
    end: Tensor,
    force_last: int = 0,
) -> Tensor:
    means = block_pool(key.detach(), blocks, dtype=accumulator_dtype(key.dtype))
    return select_topk(query.detach(), means, count, ranges=(begin, end), force_last=force_last)


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
        Means and their products in float32 (float64 for float64); the choice passes no gradient.
        Attention as :func:`routed_attention`; on a GPU each block is a part that is rounded to the
        dtype, and the parts are merged as by :func:`merge`.

    Errors:
        ValueError, TypeError or NotImplementedError, naming the argument.

    Complexity:
        O(Nq (topk block_size + Nk / block_size) D) time; memory of the lists, on a GPU O(N topk D).

    Source:
        MoBA (arXiv 2502.13189).

    Example:
        >>> import torch, attnext
        >>> q, k, v = (torch.randn(1, 100, 4, 32) for _ in range(3))
        >>> attnext.moba_attention(q, k, v, block_size=16, topk=3).shape
        torch.Size([1, 100, 4, 32])
    """
    query, key, value = under_autocast(query, key, value)
    check_sequences(query, key, value)
    check_flag("return_lse", return_lse)
    num_queries, num_keys = query.shape[1], key.shape[1]
    apart = num_queries < _TILE or num_queries > num_keys  # a few queries: lists are as good
    if apart or query.device.type not in _SORTED_ON:
        plan = moba_plan(query, key, block_size, topk, cu_seqlens=cu_seqlens)
        return routed_attention(
            query, key, value, plan, is_causal=True, scale=scale, return_lse=return_lse
        )
    blocks, first, own, topk = _blocks(query, key, block_size, topk, cu_seqlens)
    edges = (blocks.offsets - (num_keys - num_queries)).clamp(min=0)
    each = torch.arange(blocks.num_blocks, device=key.device)[None, None, :, None]
    plan = BlockPlan.of(each, num_queries, Blocks((num_queries,), edges), num_keys, blocks)
    parts = [
        routed_attention(query, key, value, plan, is_causal=True, scale=scale, return_lse=True)
    ]
    if topk > 1:
        lists = _select(query, key, blocks, topk - 1, first, own)
        parts += _by_block(query, key, value, lists, blocks, scale)
    outputs, lses = zip(*parts, strict=True)
    out, lse = merge_attentions(outputs, lses)
    return (out, lse) if return_lse else out


def _by_block(
    query: Tensor, key: Tensor, value: Tensor, lists: Tensor, blocks: Blocks, scale: float | None
) -> list[tuple[Tensor, Tensor]]:
    """Attention of each query to each of its listed blocks, whole.

    Queries that attend one block are brought together, so that a tile of them reads it once: the
    pairs of queries and slots are sorted by block, for each kv head, and a tile attends the span of
    blocks that it names, each query the keys of its own pair.
    """
    batch, num_queries, heads, _ = query.shape
    kv_heads, slots = key.shape[2], lists.shape[-1]
    pairs = lists.unflatten(1, (kv_heads, -1)).flatten(2).flatten(0, 1)  # [B Hkv, G Nq slots]
    block, order = pairs.sort(dim=-1, stable=True)
    count = order.shape[1]
    inverse = torch.empty_like(order).scatter_(
        1, order, torch.arange(count, device=order.device).expand_as(order)
    )

    def heads_apart(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)[:, :, None]

    def by_query(x: Tensor) -> Tensor:
        x = _Permuted.apply(x, inverse, order, 1)
        x = x.unflatten(0, (batch, kv_heads)).unflatten(2, (heads // kv_heads, num_queries, slots))
        return x.flatten(1, 2).transpose(1, 2)

    rows = query.transpose(1, 2).unflatten(1, (kv_heads, -1)).flatten(2, 3).flatten(0, 1)
    rows = _Permuted.apply(rows, order, inverse, slots)[:, :, None]
    low = block[:, ::_TILE].clamp(min=0)
    high = block[
        :, torch.arange(_TILE, count + _TILE, _TILE, device=order.device).clamp(max=count) - 1
    ]
    offsets = blocks.offsets
    starts, ends = offsets[low.long()], offsets[(high + 1).long()]
    plan = BlockPlan.of_spans(
        starts[:, None, :, None], ends[:, None, :, None], count, _TILE, key.shape[1]
    )
    of_keys = torch.arange(blocks.num_blocks, device=key.device).repeat_interleave(
        blocks.counts.long(), output_size=key.shape[1]
    )
    out, lse = routed_attention(
        rows, heads_apart(key), heads_apart(value), plan, query_documents=block,
        key_documents=of_keys.int().expand(len(block), -1).contiguous(), scale=scale,
        return_lse=True,
    )  # fmt: skip
    out, lse = by_query(out[:, :, 0]), by_query(lse)[..., 0]
    return list(zip(out.unbind(3), lse.unbind(3), strict=True))


class _Permuted(torch.autograd.Function):
    """Rows ``order // copies`` of ``[N, rows, D]``; the gradient of a row is the sum over its
    copies, which ``inverse`` finds, so that none is scattered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return _rows(x, torch.div(order, copies, rounding_mode="floor"))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (inverse,) = ctx.saved_tensors
        rows = _rows(grad, inverse)
        if ctx.copies > 1:
            rows = rows.unflatten(1, (-1, ctx.copies)).sum(2)
        return rows, None, None, None


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
