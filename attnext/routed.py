# SPDX-License-Identifier: Apache-2.0
"""Attention over lists of key blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .arguments import (
    check_device,
    check_flag,
    check_integer,
    check_modifier,
    check_qkv,
    check_scale,
    check_softcap,
    check_tensor,
    under_autocast,
)
from .geometry import UNLIMITED
from .ops import accumulator_dtype, unit_stride
from .plans import BlockPlan, Blocks
from .routed_ops import HEAD_POLICIES, Rules, routed_op


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
    window_size: int | tuple[int | None, int | None] | None = None,
    sinks: int = 0,
    head_policy: Sequence[str] | None = None,
    sink_logits: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Softmax attention of each query block over the key blocks that a plan lists for it.

    A query attends a key that is listed, or in the window around the query, or one of the first
    ``sinks``, if every rule allows it; a key counts once however often it is named. Nothing is
    gathered: keys and values are read where they lie.

    Shapes:
        query ``[B, *tokens, H, D]``, key ``[B, *key tokens, Hkv, D]``, value
        ``[B, *key tokens, Hkv, Dv]`` with one to three token axes, as the plan has them; ``H`` is a
        multiple of ``Hkv``. Returns ``[B, *tokens, H, Dv]``, and lse ``[B, *tokens, H]`` in float32
        (float64 for float64) if asked.

    Args:
        plan: who attends which blocks; differentiable in its bias.
        is_causal: only keys up to the query's own position. On every rule the last query stands at
            the last key (bottom-right).
        within: only so many keys before and after the query's own (None: any).
        query_documents, key_documents: integers ``[B, tokens]``: only keys of the same document.
        key_lengths: integers ``[B]``: only so many keys of each batch item.
        exclude_self: not the key at the query's own position.
        window_size: keys that are attended without being listed: the last ``window_size`` with the
            query's own, or ``(left, right)`` of it (None: all).
        sinks: so many first keys are attended without being listed.
        head_policy: per query head ``"list"`` (the default), ``"dense"`` (every key),
            ``"streaming"`` (window and sinks alone) or ``"off"`` (no key).
        sink_logits: ``[H]``, a logit per head that takes part in the denominator alone.
        scale: by default ``D ** -0.5``.
        softcap: logits become ``softcap * tanh(logits / softcap)``, before the bias.

    Rules of positions (``is_causal``, ``within``, ``exclude_self``, ``window_size``, ``sinks``,
    ``"streaming"``, ``key_lengths``) are for one token axis whose key blocks are in order.

    Numerics:
        As :func:`attnext.sliding_window_attention`: fp32 accumulation (fp64 for float64), one
        rounding. A query without keys gives 0 and lse -inf, and no gradient. Deterministic, equal
        for any number of threads and any order of a list. Differentiable in query, key, value, the
        plan's bias and sink_logits, through both results.

    Errors:
        ValueError, TypeError or NotImplementedError, naming the argument; what is beyond the blocks
        or the keys in a plan is refused before anything is read.

    CUDA:
        The host waits for the device when it first meets a plan or documents, and for each set of
        tables of spans or of blocks of very unlike sizes; tables are kept with the plan. Neighbours
        in the order of queries that list the same share its walk, unless the plan has a bias; so do
        the heads of a group that share lists and policy, where query blocks are small.
        Documents that decrease somewhere, and rules beside blocks that are out of order, are looked
        at pair by pair.

    Complexity:
        O(keys listed * block * D) time; O(tokens + entries of the lists) memory.

    Source:
        Block lists of NSA (arXiv 2502.11089), MoBA (2502.13189) and BiFormer (2303.08810) in one.

    Example:
        >>> import torch, attnext
        >>> q, k, v = (torch.randn(1, 64, 2, 16) for _ in range(3))
        >>> lists = torch.tensor([[0, -1], [0, 1], [0, 2], [2, 3]]).expand(1, 1, 4, 2)
        >>> plan = attnext.BlockPlan.of(lists, 64, 16)
        >>> attnext.routed_attention(q, k, v, plan, is_causal=True).shape
        torch.Size([1, 64, 2, 16])
    """
    query, key, value = under_autocast(query, key, value)
    rank = check_qkv(query, key, value)
    if not isinstance(plan, BlockPlan):
        raise TypeError(f"plan must be a BlockPlan, got {type(plan).__name__}")
    _check_plan(plan, query, key)
    for name, flag in (
        ("is_causal", is_causal), ("exclude_self", exclude_self), ("return_lse", return_lse),
    ):  # fmt: skip
        check_flag(name, flag)
    check_integer("sinks", sinks, 0)
    left, right = _sides("within", within)
    if isinstance(window_size, int) and not isinstance(window_size, bool):
        check_integer("window_size", window_size, 1)
        before, after = window_size - 1, 0
    else:
        before, after = _sides("window_size", window_size)
    policy = _policy(head_policy, query.shape[-2])
    positional = {
        "is_causal": is_causal,
        "within": within is not None,
        "exclude_self": exclude_self,
        "window_size": window_size is not None,
        "sinks": sinks > 0,
        "head_policy 'streaming'": HEAD_POLICIES.index("streaming") in policy,
        "key_lengths": key_lengths is not None,
    }
    for name, used in positional.items():
        if used and rank > 1:
            raise ValueError(f"{name} needs one token axis, got {rank}")
        if used and plan.key_blocks.order is not None:
            raise ValueError(f"{name} needs key blocks that are in order")
    documents = _check_documents(query_documents, key_documents, query, key)
    if key_lengths is not None:
        _check_integers("key_lengths", key_lengths, (query.shape[0],), query)
        key_lengths = key_lengths.clamp(0, key.shape[1]).int().contiguous()
    acc = accumulator_dtype(query.dtype)
    if sink_logits is not None:
        check_modifier("sink_logits", sink_logits, (query.shape[-2],), query)
        sink_logits = sink_logits.to(acc).contiguous()
    rules = Rules(
        is_causal, exclude_self, left, right, window_size is not None, before, after, sinks
    )
    out, lse = routed_op(
        unit_stride(query),
        unit_stride(key),
        unit_stride(value),
        None if plan.bias is None else plan.bias.to(acc).contiguous(),
        sink_logits,
        plan.lists,
        plan.ends,
        plan.indptr,
        *_blocks_of(plan),
        *documents,
        key_lengths,
        policy,
        rules.integers(),
        list(plan.list_shape),
        check_scale(scale, query.shape[-1] ** -0.5),
        check_softcap(softcap),
    )
    return (out, lse) if return_lse else out


def _blocks_of(plan: BlockPlan) -> tuple[Tensor | None, ...]:
    """Offsets and order of queries and keys; of keys None, where they are the queries' own."""
    queries, keys = plan.query_blocks, plan.key_blocks
    if keys.offsets is queries.offsets:
        if keys.order is queries.order:
            return queries.offsets, queries.order, None, None
        return queries.offsets, queries.order, keys.offsets.clone(), keys.order
    order = keys.order
    if order is not None and order is queries.order:
        order = order.clone()
    return queries.offsets, queries.order, keys.offsets, order


def _check_plan(plan: BlockPlan, query: Tensor, key: Tensor) -> None:
    for name, blocks, t in (
        ("query", plan.query_blocks, query),
        ("key", plan.key_blocks, key),
    ):
        if blocks.extent != tuple(t.shape[1:-2]):
            raise ValueError(
                f"plan must be of the {name} tokens, {tuple(t.shape[1:-2])}, got {blocks.extent}"
            )
        _check_blocks(f"plan.{name}_blocks", blocks, t)
    check_device("plan", plan.lists, query)
    for name, part in (("ends", plan.ends), ("indptr", plan.indptr), ("bias", plan.bias)):
        if part is not None:
            check_device(f"plan.{name}", part, query)
    batch, heads = plan.list_shape
    if batch not in (1, query.shape[0]):
        raise ValueError(f"plan must have lists for 1 or {query.shape[0]} batch items, got {batch}")
    if heads not in (1, key.shape[-2], query.shape[-2]):
        raise ValueError(
            f"plan must have lists for 1, {key.shape[-2]} or {query.shape[-2]} heads, got {heads}"
        )


def _check_blocks(name: str, blocks: Blocks, t: Tensor) -> None:
    for what, x in (("offsets", blocks.offsets), ("order", blocks.order)):
        if x is None:
            continue
        if x.device != t.device:
            raise ValueError(f"{name}.{what} must be on {t.device}, got {x.device}")
    if blocks.order is not None and blocks.order.shape[0] != blocks.num_tokens:
        raise ValueError(
            f"{name}.order must name {blocks.num_tokens} tokens, got {blocks.order.shape[0]}"
        )


def _sides(name: str, sides: Any) -> tuple[int, int]:
    if sides is None:
        return UNLIMITED, UNLIMITED
    if not isinstance(sides, (tuple, list)) or len(sides) != 2:
        raise TypeError(f"{name} must be a pair (left, right), got {sides!r}")
    for side in sides:
        if side is not None:
            check_integer(name, side, 0)
    left, right = (UNLIMITED if side is None else min(side, UNLIMITED) for side in sides)
    return left, right


def _policy(head_policy: Any, heads: int) -> list[int]:
    """The index of each head's policy; empty if all have lists."""
    if head_policy is None:
        return []
    if isinstance(head_policy, str) or not isinstance(head_policy, Sequence):
        raise TypeError(f"head_policy must be a sequence of str, got {head_policy!r}")
    for policy in head_policy:
        if policy not in HEAD_POLICIES:
            raise ValueError(f"head_policy must hold {HEAD_POLICIES}, got {policy!r}")
    if len(head_policy) != heads:
        raise ValueError(f"head_policy must have {heads} entries, got {len(head_policy)}")
    return [HEAD_POLICIES.index(policy) for policy in head_policy]


def _check_integers(name: str, t: Any, shape: tuple[int, ...], query: Tensor) -> None:
    check_tensor(name, t, "an int32 or int64", query)
    if tuple(t.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")


def _as_int32(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of documents; where 32 bits may not hold them, their ranks."""

    def fits(t: Tensor) -> bool:
        if t.dtype != torch.int64:
            return True
        unknown = t.is_meta or is_compiling()
        return not unknown and bool((t.int() == t).all())

    same = queries is keys
    if not (fits(queries) and fits(keys)):
        both = [queries.flatten()] if same else [queries.flatten().long(), keys.flatten().long()]
        all_of = torch.cat(both)
        ranks = torch.searchsorted(all_of.sort().values, all_of).split([t.numel() for t in both])
        queries, keys = ranks[0].reshape(queries.shape), ranks[-1].reshape(keys.shape)
    small = queries.int().contiguous()
    return small, small if same else keys.int().contiguous()


def _check_documents(
    query_documents: Any, key_documents: Any, query: Tensor, key: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    if query_documents is None and key_documents is None:
        return None, None
    if query_documents is None or key_documents is None:
        raise ValueError("query_documents and key_documents must be given together")
    results = []
    for name, t, tokens in (
        ("query_documents", query_documents, query),
        ("key_documents", key_documents, key),
    ):
        shape = (tokens.shape[0], math.prod(tokens.shape[1:-2]))
        _check_integers(name, t, shape, query)
        results.append(t)
    queries, keys = _as_int32(*results)
    return queries, None if keys is queries else keys
