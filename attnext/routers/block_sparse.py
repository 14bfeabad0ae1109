# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention by pooled scores: for each block of queries the blocks of keys whose mean
is most like its own."""

from __future__ import annotations

from torch import Tensor

from ..arguments import check_flag, check_integer, check_sequences
from ..ops import accumulator_dtype
from ..plans import BlockPlan
from ..pooling import Windows, block_pool
from ..selection import fitting, select_topk


def pooled_topk_plan(
    query: Tensor,
    key: Tensor,
    query_block: int,
    key_block: int,
    topk: int,
    *,
    is_causal: bool = False,
    initial_blocks: int = 0,
    local_blocks: int = 0,
) -> BlockPlan:
    """For each block of queries and each query head, the ``topk`` blocks of keys of largest product
    of means.

    Shapes:
        query ``[B, Nq, H, D]``, key ``[B, Nk, Hkv, D]``. The plan is for
        :func:`routed_attention`, with the same ``is_causal``.

    Args:
        query_block, key_block: tokens of a block.
        topk: blocks of keys; with fewer, all there are.
        is_causal: only blocks that some query of the block sees a key of.
        initial_blocks, local_blocks: so many of the first and of the last blocks that are allowed
            are always among the ``topk``.

    Numerics:
        Means and products in float32 (float64 for float64). Passes no gradient.

    Errors:
        ValueError or TypeError, naming the argument.

    Complexity:
        O(N D + Nq Nk D / (query_block key_block)) time, O(N) memory.

    Source:
        The block-sparse pattern of MInference (arXiv 2407.02490).

    Example:
        >>> import torch, attnext
        >>> q, k, v = (torch.randn(1, 500, 4, 32) for _ in range(3))
        >>> plan = attnext.pooled_topk_plan(q, k, 64, 32, topk=4, is_causal=True, local_blocks=2)
        >>> attnext.routed_attention(q, k, v, plan, is_causal=True).shape
        torch.Size([1, 500, 4, 32])
    """
    check_sequences(query, key, key)
    for name, number, least in (
        ("query_block", query_block, 1), ("key_block", key_block, 1), ("topk", topk, 1),
        ("initial_blocks", initial_blocks, 0), ("local_blocks", local_blocks, 0),
    ):  # fmt: skip
        check_integer(name, number, least)
    if initial_blocks + local_blocks > topk:
        raise ValueError(
            f"topk must be at least initial_blocks + local_blocks, {initial_blocks} + "
            f"{local_blocks}, got {topk}"
        )
    check_flag("is_causal", is_causal)
    queries, keys = Windows(query.shape[1], query_block), Windows(key.shape[1], key_block)
    acc = accumulator_dtype(query.dtype)
    topk, first, last = fitting(topk, keys.num_blocks, initial_blocks, local_blocks)
    lists = select_topk(
        block_pool(query.detach(), queries, dtype=acc), block_pool(key.detach(), keys, dtype=acc),
        topk, causal="start" if is_causal else "none", query_blocks=queries, candidate_blocks=keys,
        force_first=first, force_last=last,
    )  # fmt: skip
    return BlockPlan.of(lists, query.shape[1], query_block, key.shape[1], key_block)
