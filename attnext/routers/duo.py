# SPDX-License-Identifier: Apache-2.0
"""Heads that see everything beside heads that see sinks and a window: DuoAttention (arXiv
2410.10819), and the retrieval heads it looks for (2404.15574)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_count, check_device, check_modifier, check_tensor, under_autocast
from ..functional import sliding_window_attention
from ..kv_cache import KVCache, StreamingCache, check_step
from ..merging import merge
from ..plans import BlockPlan
from ..pooling import Windows
from ..routed import routed_attention
from ..selection import select_topk
from .inputs import check_integer, check_number, check_sequences

_QUERY_BLOCK = 64  # the heads have no lists: nothing but a tile of queries


def duo_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    full_heads: Sequence[bool],
    *,
    sinks: int = 64,
    window_size: int = 256,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Causal attention, full in some kv heads, and to sinks and a window in the others.

    Shapes:
        query ``[B, Nq, H, D]``, key ``[B, Nk, Hkv, D]``, value ``[B, Nk, Hkv, Dv]``; the result is
        ``[B, Nq, H, Dv]``, and with ``return_lse`` also ``[B, Nq, H]``.

    Args:
        full_heads: a bool per kv head.
        sinks, window_size: of the other heads: the first keys, and the last with the query's own.

    Numerics, Errors:
        As :func:`attnext.routed_attention`. Differentiable.

    Source:
        DuoAttention (arXiv 2410.10819).

    Example:
        >>> import torch
        >>> from attnext.routers.duo import duo_attention
        >>> q, k, v = (torch.randn(1, 100, heads, 16) for heads in (4, 2, 2))
        >>> duo_attention(q, k, v, [True, False], sinks=4, window_size=16).shape
        torch.Size([1, 100, 4, 16])
    """
    query, key, value = under_autocast(query, key, value)
    check_sequences(query, key, value)
    _check_heads(full_heads, key.shape[2])
    check_integer("window_size", window_size, 1)
    group = query.shape[2] // key.shape[2]
    policy = [p for f in full_heads for p in ["dense" if f else "streaming"] * group]
    blocks = -(-query.shape[1] // _QUERY_BLOCK)
    nothing = torch.full((1, 1, blocks, 1), -1, dtype=torch.int32, device=query.device)
    plan = BlockPlan.of(nothing, query.shape[1], _QUERY_BLOCK, key.shape[1], _QUERY_BLOCK)
    return routed_attention(
        query,
        key,
        value,
        plan,
        is_causal=True,
        window_size=window_size,
        sinks=sinks,
        head_policy=policy,
        scale=scale,
        return_lse=return_lse,
    )


def duo_mix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    *,
    sinks: int = 128,
    window_size: int = 256,
    teacher: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """What DuoAttention trains: ``gate * full + (1 - gate) * streaming`` in every kv head.

    Shapes:
        As :func:`duo_attention`; gate ``[Hkv]``, clamped to [0, 1].

    Args:
        teacher: ``[B, Nq, H, Dv]``, the full output of a pass that has no gradient. Taken instead
            of this pass's own, which is then not computed: only the streaming branch has a
            backward pass.

    Numerics:
        Branches are rounded to the dtype, and mixed in float32 (float64 for float64).
        Differentiable; the gate's gradient is that of the clamp: none outside [0, 1], and all of
        it at 1, where it starts.

    Errors:
        ValueError, TypeError or NotImplementedError, naming the argument.
    """
    query, key, value = under_autocast(query, key, value)
    check_sequences(query, key, value)
    check_modifier("gate", gate, (key.shape[2],), query)
    streaming = sliding_window_attention(query, key, value, window_size, sinks=sinks, scale=scale)
    if teacher is None:
        full = sliding_window_attention(query, key, value, None, scale=scale)
    else:
        check_modifier("teacher", teacher, tuple(streaming.shape), query)
        full = teacher.detach().to(streaming.dtype)
    gates = gate.clamp(0, 1).repeat_interleave(query.shape[2] // key.shape[2])
    mixed: Tensor = merge([full, streaming], gates=gates, mode="lerp")
    return mixed


def choose_full_heads(gate: Tensor, sparsity: float = 0.5) -> Tensor:
    """Which heads stay full: bool of the gates' shape, all layers' together.

    The share ``sparsity`` of smallest gates streams, rounded to whole heads; of equal gates, as
    many are at 0 and 1, the first stay full. A threshold at a quantile would take all or none.
    """
    check_tensor("gate", gate, "a floating-point")
    check_number("sparsity", sparsity, 0, 1)
    flat = gate.detach().flatten().clamp(0, 1)
    order = flat.sort(descending=True, stable=True).indices
    full = torch.zeros_like(flat, dtype=torch.bool)
    full[order[: flat.numel() - round(sparsity * flat.numel())]] = True
    return full.reshape(gate.shape)


def top_keys(query: Tensor, key: Tensor) -> Tensor:
    """Which key each query and head attends most: int32 ``[B, Nq, H]``, of those up to its own (-1:
    there is none). Of equals the first.

    Shapes: query ``[B, Nq, H, D]``, key ``[B, Nk, Hkv, D]``; query ``i`` at key ``i + Nk - Nq``.
    Complexity: O(Nq Nk D) time, no map in memory: for decoding steps and last chunks.
    """
    check_sequences(query, key, key)
    best: Tensor = select_topk(
        query,
        key,
        1,
        causal="start",
        query_blocks=Windows(query.shape[1], 1),
        candidate_blocks=Windows(key.shape[1], 1),
    )
    return best[..., 0].transpose(1, 2)


def retrieval_scores(
    attended: Tensor, output: Tensor, prompt: Tensor, needle: tuple[int, int]
) -> Tensor:
    """How much of a needle each head copies while the model says it.

    A step hits where a head's most attended token lies in the needle and is the token that is put
    out. The score is the share of the needle's tokens that were hit, each counted once.

    Shapes:
        attended int ``[steps, heads]``, of :func:`top_keys`; output int ``[steps]``, the tokens put
        out; prompt int ``[N]``; the result is float32 ``[heads]``.

    Args:
        needle: its first token in the prompt, and one past its last.

    Source:
        Retrieval heads (arXiv 2404.15574), where it is averaged over tests that were answered.

    Example:
        >>> import torch
        >>> from attnext.routers.duo import retrieval_scores
        >>> prompt = torch.tensor([5, 6, 7, 8, 9])
        >>> attended = torch.tensor([[1, 1], [2, 1]])
        >>> retrieval_scores(attended, torch.tensor([6, 7]), prompt, (1, 3))
        tensor([1.0000, 0.5000])
    """
    for name, t, rank in (("attended", attended, 2), ("output", output, 1), ("prompt", prompt, 1)):
        check_tensor(name, t, "an int32 or int64")
        check_device(name, t, attended, "attended")
        if t.dim() != rank:
            raise ValueError(f"{name} must have {rank} dimensions, got shape {tuple(t.shape)}")
    if output.shape[0] != attended.shape[0]:
        raise ValueError(
            f"output must have the steps of attended, {attended.shape[0]}, got {output.shape[0]}"
        )
    if not isinstance(needle, tuple) or len(needle) != 2:
        raise TypeError(f"needle must be (begin, end), got {needle!r}")
    for end in needle:
        check_integer("needle", end)
    begin, end = needle
    if not 0 <= begin < end <= prompt.shape[0]:
        raise ValueError(
            f"needle must be within the {prompt.shape[0]} tokens of prompt, got {needle!r}"
        )
    tokens = torch.arange(begin, end, device=prompt.device)
    said = prompt[begin:end] == output[:, None]  # [steps, tokens]
    hits = (attended[..., None] == tokens) & said[:, None]
    return hits.any(0).float().mean(-1)


class DuoCache:
    """Two caches for one layer: all tokens for the full kv heads, sinks and a ring for the others.

    Args:
        capacity: tokens of the full heads.
        full_heads: a bool per kv head.
        others: as of :class:`attnext.kv_cache.StreamingCache`.

    Example:
        >>> import torch
        >>> from attnext.routers.duo import DuoCache
        >>> cache = DuoCache(1, 1000, [True, False], 16, sinks=4, window_size=16)
        >>> for n in (100, 1):
        ...     q, k, v = (torch.randn(1, n, heads, 16) for heads in (4, 2, 2))
        ...     out = cache.step(q, k, v)
        >>> out.shape
        torch.Size([1, 1, 4, 16])
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        full_heads: Sequence[bool],
        head_dim: int,
        head_dim_v: int | None = None,
        *,
        sinks: int = 64,
        window_size: int = 256,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        _check_heads(full_heads, None)
        # Whatever heads there are: one of the two caches may not be made.
        check_count("capacity", capacity)
        check_integer("sinks", sinks, 0)
        check_integer("window_size", window_size, 1)
        self.full_heads = tuple(full_heads)
        heads = range(len(full_heads))
        self._heads = (
            [h for h in heads if full_heads[h]],
            [h for h in heads if not full_heads[h]],
        )
        places: Any = {"dtype": dtype, "device": device}
        full, streaming = map(len, self._heads)
        self.full = KVCache(batch, capacity, full, head_dim, head_dim_v, **places) if full else None
        self.streaming = (
            StreamingCache(
                batch,
                streaming,
                head_dim,
                head_dim_v,
                sinks=sinks,
                window_size=window_size,
                **places,
            )
            if streaming
            else None
        )

    def step(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None
    ) -> Tensor:
        """Appends tokens and returns their attention: :func:`duo_attention` of all tokens so far.

        Shapes:
            query ``[B, n, H, D]``, key ``[B, n, Hkv, D]``, value ``[B, n, Hkv, Dv]``; returns
            ``[B, n, H, Dv]``.
        """
        check_step(query, key, value, scale)
        if key.shape[2] != len(self.full_heads):
            raise ValueError(f"key must have {len(self.full_heads)} heads, got {key.shape[2]}")
        group = query.shape[2] // key.shape[2]
        outs = []
        for cache, heads in zip((self.full, self.streaming), self._heads, strict=True):
            if cache is None:
                continue
            mine = query.unflatten(2, (-1, group))[:, :, heads].flatten(2, 3)
            k, v = key[:, :, heads], value[:, :, heads]
            if isinstance(cache, KVCache):
                cache.append(k, v)
                outs.append(cache.attend(mine, scale=scale))
            else:
                outs.append(cache.step(mine, k, v, scale=scale))
        order = list(itertools.chain(*self._heads))
        back = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat(outs, 2).unflatten(2, (-1, group))[:, :, back].flatten(2, 3)


def _check_heads(full_heads: Any, kv_heads: int | None) -> None:
    if not isinstance(full_heads, Sequence) or not all(isinstance(f, bool) for f in full_heads):
        raise TypeError(f"full_heads must be a sequence of bools, got {full_heads!r}")
    if len(full_heads) != (kv_heads or len(full_heads)) or not full_heads:
        raise ValueError(
            f"full_heads must have an entry per kv head, {kv_heads or 'at least 1'}, got "
            f"{len(full_heads)}"
        )
