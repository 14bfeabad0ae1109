# SPDX-License-Identifier: Apache-2.0
"""LongHeads (arXiv 2402.10685): each head attends few chunks of a long context, untrained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import check_tensor, under_autocast
from ..functional import window_attention
from ..merging import merge_attentions
from ..plans import BlockPlan
from ..pooling import Windows, block_pool
from ..routed import routed_attention
from ..selection import fitting, select_topk
from .inputs import Rotary, check_flag, check_integer, check_sequences, rotated


def longheads_chunk_keys(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunk_size: int = 256,
    *,
    rotary: Rotary | None = None,
) -> Tensor:
    """One key for each chunk and head: what the chunk's own queries would look for in it.

    Queries attend the whole of their chunk; the mean of the results then attends the chunk's keys,
    and takes of them instead of values.

    Shapes:
        query ``[B, N, H, D]``, key and value ``[B, N, Hkv, D]``, not rotated; the result is
        ``[B, chunks, H, D]``. The last chunk holds what is left.

    Args:
        rotary: rotates queries and keys to their positions within the chunk.

    Errors:
        ValueError, TypeError or NotImplementedError, naming the argument.

    Complexity:
        O(N chunk_size D). Chunks can be added as they fill up: they do not depend on each other.
    """
    query, key, value = under_autocast(query, key, value)
    check_sequences(query, key, value)
    check_integer("chunk_size", chunk_size, 1)
    if query.shape[1] != key.shape[1]:
        raise ValueError(
            f"query must have the tokens of key, {key.shape[1]}, got {query.shape[1]}: the chunks "
            "of a cache have their keys from when they were filled"
        )
    if value.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"value must have the head_dim of key, {key.shape[-1]}, for it is compared with keys, "
            f"got {value.shape[-1]}"
        )
    places = torch.arange(key.shape[1], device=key.device) % chunk_size
    query, key = rotated(rotary, query, places), rotated(rotary, key, places)
    asked = block_pool(window_attention(query, key, value, chunk_size), chunk_size)
    chunks = asked.shape[1]
    own = torch.arange(chunks, device=key.device)[None, None, :, None]
    plan = BlockPlan.of(own, chunks, 1, key.shape[1], chunk_size)
    pooled: Tensor = routed_attention(asked, key, key, plan)
    return pooled


def longheads_plan(
    query: Tensor,
    chunk_keys: Tensor,
    num_keys: int,
    *,
    chunk_size: int = 256,
    num_chunks: int = 16,
) -> BlockPlan:
    """For each token and head the first chunk, the last two up to the token, and those between
    with the largest ``query . chunk_key``.

    Shapes:
        query ``[B, Nq, H, D]``, chunk_keys ``[B, chunks, H, D]``, of the complete chunks or of all;
        query ``i`` stands at key ``i + num_keys - Nq``. The lists are ``[B, H, Nq, slots]``, at
        most ``num_chunks`` slots, in rising order, then -1. The key of an unfinished chunk is never
        asked for: whoever sees the chunk has it among the last two.

    Args:
        num_chunks: at most so many; at least the three that are always there.

    Numerics:
        Scores unscaled, of queries and chunk keys as given; of equal ones the earlier chunk wins.
        As :func:`attnext.select_topk`. No gradient.

    Errors:
        ValueError or TypeError, naming the argument.

    Complexity:
        O(Nq chunks D) time; memory of the lists.

    Example:
        >>> import torch
        >>> from attnext.routers.longheads import longheads_plan
        >>> q, chunk_keys = torch.ones(1, 1, 1, 8), torch.ones(1, 6, 1, 8)
        >>> longheads_plan(q, chunk_keys, 96, chunk_size=16, num_chunks=4).lists[0, 0].tolist()
        [[0, 1, 4, 5]]
    """
    for name, t in (("query", query), ("chunk_keys", chunk_keys)):
        check_tensor(name, t, "a floating-point", query if isinstance(query, Tensor) else None)
        if t.dim() != 4:
            raise ValueError(f"{name} must have four dimensions, got shape {tuple(t.shape)}")
    for name, x, least in (
        ("num_keys", num_keys, 0),
        ("chunk_size", chunk_size, 1),
        ("num_chunks", num_chunks, 3),
    ):
        check_integer(name, x, least)
    batch, num_queries, heads, dim = query.shape
    complete, total = num_keys // chunk_size, -(-num_keys // chunk_size)
    if chunk_keys.shape[0] != batch or tuple(chunk_keys.shape[2:]) != (heads, dim):
        raise ValueError(
            f"chunk_keys must be {(batch, 'chunks', heads, dim)}, got {tuple(chunk_keys.shape)}"
        )
    if chunk_keys.shape[1] not in (complete, total):
        raise ValueError(
            f"chunk_keys must have {complete} chunks, or {total} with the unfinished one, got "
            f"{chunk_keys.shape[1]}"
        )
    dtype = torch.promote_types(query.dtype, chunk_keys.dtype)
    missing = total - chunk_keys.shape[1]
    count, first, last = fitting(num_chunks, total, 1, 2)
    lists = select_topk(
        query.to(dtype),
        torch.nn.functional.pad(chunk_keys.to(dtype), (0, 0, 0, 0, 0, missing)),
        count,
        causal="start",
        query_blocks=Windows(num_queries, 1),
        candidate_blocks=Windows(num_keys, chunk_size),
        force_first=first,
        force_last=last,
    )
    return BlockPlan.of(lists, num_queries, 1, num_keys, chunk_size)


def longheads_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    chunk_size: int = 256,
    num_chunks: int = 16,
    rotary: Rotary | None = None,
    chunk_keys: Tensor | None = None,
    exclude_self: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Causal attention of each token and head to the chunks :func:`longheads_plan` finds for it.

    The chunks a token keeps stand one after the other: with ``rotary`` a key has the position it
    has in that row of chunks, and the token the one in the last of them. No position exceeds
    ``num_chunks * chunk_size``, however long the context. Tokens that see no more chunks than that
    have ordinary causal attention.

    Shapes:
        query ``[B, Nq, H, D]``, key ``[B, Nk, Hkv, D]``, value ``[B, Nk, Hkv, Dv]``, not rotated;
        the result is ``[B, Nq, H, Dv]``, and with ``return_lse`` also ``[B, Nq, H]``. Query ``i``
        stands at key ``i + Nk - Nq``. Without ``chunk_keys``, ``Dv`` is ``D`` and ``Nq`` is ``Nk``.

    Args:
        rotary: ``rotary(x [B, N, H, D], positions int64 [N])`` gives ``x`` rotated, such that
            scores depend on differences of positions; None: no positions.
        chunk_keys: those of :func:`longheads_chunk_keys`, needed in decoding; by default made here.
        exclude_self: a token does not attend itself, as in the prefill that was published.

    Numerics:
        As :func:`attnext.routed_attention`; with ``rotary`` each chunk's result is rounded to the
        dtype before they are joined. Differentiable, but for the search.

    Errors:
        ValueError, TypeError or NotImplementedError, naming the argument.

    Complexity:
        O(Nq (num_chunks chunk_size + Nk / chunk_size) D). With ``rotary``, memory of ``num_chunks``
        results: prefill in pieces of queries.

    Source:
        LongHeads (arXiv 2402.10685).

    Example:
        >>> import torch
        >>> from attnext.routers.longheads import longheads_attention
        >>> q, k, v = (torch.randn(1, 200, 2, 16) for _ in range(3))
        >>> longheads_attention(q, k, v, chunk_size=16, num_chunks=4).shape
        torch.Size([1, 200, 2, 16])
    """
    query, key, value = under_autocast(query, key, value)
    check_sequences(query, key, value)
    check_integer("chunk_size", chunk_size, 1)
    check_flag("exclude_self", exclude_self)
    check_flag("return_lse", return_lse)
    if chunk_keys is None:
        if query.shape[1] != key.shape[1]:
            raise ValueError(
                f"chunk_keys must be given for {query.shape[1]} queries and {key.shape[1]} keys"
            )
        chunk_keys = longheads_chunk_keys(query, key, value, chunk_size, rotary=rotary)
    num_queries, num_keys = query.shape[1], key.shape[1]
    plan = longheads_plan(query, chunk_keys, num_keys, chunk_size=chunk_size, num_chunks=num_chunks)
    options: Any = {"is_causal": True, "exclude_self": exclude_self, "scale": scale}
    if rotary is None:
        return routed_attention(query, key, value, plan, return_lse=return_lse, **options)
    # A key keeps its position within its chunk, whatever chunk it is; the query moves instead, to
    # where it stands seen from the chunk of each slot. Differences are all that scores depend on.
    key = rotated(rotary, key, torch.arange(num_keys, device=key.device) % chunk_size)
    at = torch.arange(num_queries, device=query.device) + num_keys - num_queries
    at = at.clamp(min=0)
    kept = (at // chunk_size + 1).clamp(max=num_chunks)
    parts = []
    for slot in range(min(num_chunks, max(-(-num_keys // chunk_size), 1))):
        ahead = (kept - 1 - slot).clamp(min=0) * chunk_size
        turned = rotated(rotary, query, at % chunk_size + ahead)
        one = BlockPlan.of(plan.lists[..., slot : slot + 1], num_queries, 1, num_keys, chunk_size)
        parts.append(routed_attention(turned, key, value, one, return_lse=True, **options))
    out, lse = merge_attentions(*zip(*parts, strict=True))
    return (out, lse) if return_lse else out
