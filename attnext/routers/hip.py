# SPDX-License-Identifier: Apache-2.0
"""Key blocks found by halving (HiP attention, arXiv 2406.09827) and by cascaded pruning
(InfiniteHiP, arXiv 2502.08910)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import under_autocast
from ..plans import BlockPlan
from ..routed import routed_attention
from .inputs import (
    check_choice,
    check_flag,
    check_integer,
    check_sequences,
    exact,
    steps,
)
from .products import best_places, largest_products

_INVISIBLE = -3e38  # below any score, above the score of an empty range

Stage = tuple[int, int, int, int]
STAGES: tuple[Stage, ...] = ((64, 4, 256, 32768), (64, 4, 32, 8192), (64, 1, 8, 2048))


class _Samples(NamedTuple):
    """Queries that stand for a block: ``[B, lists, blocks, samples, D]``, and the last key each may
    see, ``[blocks, samples]``."""

    query: Tensor
    reach: Tensor


def _sample(
    query: Tensor,
    num_keys: int,
    lists: int,
    blocks: slice,
    size: int,
    stride: int,
    reduce: str,
    is_causal: bool,
) -> _Samples:
    """The last of each ``stride`` queries of a block, or their mean."""
    num_queries, device = query.shape[1], query.device
    first = torch.arange(blocks.start, blocks.stop, device=device)[:, None] * size
    # Of a block that is larger than all queries: no more samples than these have.
    stride = min(stride, size, max(num_queries, 1))
    size = min(size, -(-num_queries // stride) * stride)
    last = torch.arange(stride - 1, size, stride, device=device)
    at = (first + last).clamp(max=num_queries - 1)  # a cut block: its last query again
    if reduce == "stride":
        chosen = query[:, at]
        seen = at
    else:
        each = first[..., None] + last[:, None] + torch.arange(1 - stride, 1, device=device)
        real = (each < num_queries)[..., None, None]
        rows = exact(query[:, each.clamp(max=num_queries - 1)])
        chosen = torch.where(real, rows, 0).sum(3) / real.sum(2).clamp(min=1)
        seen = at.masked_fill(~real[:, :, 0, 0, 0], -num_keys - num_queries)
    reach = seen + num_keys - num_queries if is_causal else torch.where(seen < 0, -1, num_keys - 1)
    if lists != query.shape[2]:  # one list for the query heads of a key head
        group = query.shape[2] // lists
        chosen = chosen.unflatten(3, (lists, group)).movedim(4, 3).flatten(2, 3)
        reach = reach.repeat_interleave(group, 1)
    return _Samples(exact(chosen).permute(0, 3, 1, 2, 4), reach)


def _scores(samples: _Samples, key: Tensor, at: Tensor) -> Tensor:
    """Largest ``q . k`` over the samples for keys at ``[B, lists, blocks, n]``; NaN is lowest."""
    return largest_products(samples.query, samples.reach, key, at, _INVISIBLE)


def _keep(scores: Tensor, empty: Tensor, count: int) -> Tensor:
    """Places of the ``count`` best that are not empty, in rising order; of equals the first."""
    scores = scores.clamp(min=_INVISIBLE).masked_fill(empty, -torch.inf)
    places: Tensor = best_places(scores, min(count, scores.shape[-1]))
    return places


def _visible(
    query: Tensor, key: Tensor, blocks: slice, size: int, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Of each query block: keys up to its last query, and that query's position."""
    num_queries, num_keys = query.shape[1], key.shape[1]
    end = (torch.arange(blocks.start, blocks.stop, device=key.device) + 1) * size
    last = end.clamp(max=num_queries) - 1 + num_keys - num_queries
    seen = (last + 1).clamp(0, num_keys) if is_causal else torch.full_like(last, num_keys)
    return seen, last


def hip_plan(
    query: Tensor,
    key: Tensor,
    *,
    mask_k: int = 512,
    query_block: int = 64,
    key_block: int = 2,
    query_stride: int = 2,
    representative: str = "centre",
    is_causal: bool = True,
    share_heads: bool = False,
) -> BlockPlan:
    """For each query block the ``mask_k`` keys that halving finds, in blocks of ``key_block``.

    The visible keys are cut into ``mask_k / key_block`` spans; each round halves all of them,
    scores every half by one of its keys, and keeps the better half of the halves, until they are
    blocks. Queries that see at most ``mask_k`` keys attend all of them.

    Shapes:
        query ``[B, Nq, H, D]``, key ``[B, Nk, Hkv, D]``; query ``i`` stands at key
        ``i + Nk - Nq``. The lists are ``[B, H, blocks, mask_k / key_block]``, with ``share_heads``
        ``[B, Hkv, ...]``; every block at most once.

    Args:
        mask_k: keys to find, a multiple of ``key_block``.
        query_block: queries that share a list, which depends on all of them.
        query_stride: every so-manieth query of a block is scored, its largest score counts.
        representative: the key that speaks for a half, ``"centre"`` (HiP 1.1) or ``"first"`` (1.0).
            A key after a sampled query has no score for it if ``is_causal``.
        is_causal: the spans end at the last query of the block.
        share_heads: one list for all query heads of a key head.

    Numerics:
        Scores in float32 (float64 for float64), unscaled; of equal scores the lower key wins; NaN
        is the lowest. No gradient.

    Errors:
        ValueError, TypeError or NotImplementedError, naming the argument.

    Complexity:
        ``2 mask_k / key_block * log2(Nk / mask_k)`` scores for each sampled query: O(N log N) time.

    Source:
        HiP attention (arXiv 2406.09827).

    Example:
        >>> import torch, attnext
        >>> from attnext.routers.hip import hip_plan
        >>> q, k, v = (torch.randn(1, 300, 2, 16) for _ in range(3))
        >>> hip_plan(q, k, mask_k=64).lists.shape
        torch.Size([1, 2, 5, 32])
    """
    check_sequences(query, key, key)
    for name, size in (
        ("mask_k", mask_k),
        ("query_block", query_block),
        ("key_block", key_block),
        ("query_stride", query_stride),
    ):
        check_integer(name, size, 1)
    if mask_k % key_block:
        raise ValueError(f"mask_k must be a multiple of key_block, {key_block}, got {mask_k}")
    check_choice("representative", representative, ("centre", "first"))
    check_flag("is_causal", is_causal)
    check_flag("share_heads", share_heads)
    (batch, num_queries, heads, dim), num_keys = query.shape, key.shape[1]
    lists = key.shape[2] if share_heads else heads
    blocks, key_blocks = -(-num_queries // query_block), -(-num_keys // key_block)
    keep = max(min(mask_k // key_block, key_blocks), 1)
    rounds = max(-(-key_blocks // keep) - 1, 0).bit_length()
    found = []
    samples_each = heads // lists * max(query_block // query_stride, 1)
    entries = batch * lists * 2 * keep * (dim + samples_each)
    with torch.no_grad():
        for part in steps(blocks, entries, key.device):
            seen, _ = _visible(query, key, part, query_block, is_causal)
            samples = _sample(
                query, num_keys, lists, part, query_block, query_stride, "stride", is_causal
            )
            edges = torch.arange(keep + 1, device=key.device)
            edges = edges * (-(-seen // key_block))[:, None] // keep
            edges = edges.expand(batch, lists, -1, -1)
            lo, hi = edges[..., :-1], edges[..., 1:]
            for _ in range(rounds):
                middle = (lo + hi) // 2
                lo = torch.stack([lo, middle], -1).flatten(-2)
                hi = torch.stack([middle, hi], -1).flatten(-2)
                at = lo * key_block
                if representative == "centre":
                    at = (at + torch.minimum(hi * key_block, seen[:, None])) // 2
                best = _keep(_scores(samples, key, at), lo >= hi, keep)
                lo, hi = lo.gather(-1, best), hi.gather(-1, best)
            found.append(lo.masked_fill(lo >= hi, -1).int())
    if found:
        plan = torch.cat(found, 2)
    else:
        plan = torch.full((batch, lists, 0, keep), -1, dtype=torch.int32, device=key.device)
    return BlockPlan.of(plan, num_queries, query_block, num_keys, key_block)


def infinite_hip_plan(
    query: Tensor,
    key: Tensor,
    *,
    stages: Sequence[Stage] = STAGES,
    block_size: int = 64,
    sinks: int = 256,
    window_size: int = 1024,
    query_reduce: str = "stride",
    is_causal: bool = True,
    share_heads: bool = False,
) -> BlockPlan:
    """For each query block the key blocks that are left of all keys after pruning in stages.

    The keys between the first ``sinks`` and the window are cut into chunks. A stage walks down
    every chunk towards the half whose centre has the larger score, keeps the chunks that met the
    largest scores, and cuts them for the next stage. What is left is rounded out to blocks.

    Shapes:
        As :func:`hip_plan`. The lists hold every block at most once, in rising order, then -1.

    Args:
        stages: of ``(query_block, query_stride, chunk, keep)``: queries that share a list, how many
            of them one sample stands for, keys of a chunk, and keys that are kept. Query blocks
            and chunks are multiples of those of the next stage, ``keep`` of ``chunk``.
        block_size: keys of a block of the plan.
        sinks, window_size: keys that :func:`routed_attention` is to be given too: the first, and
            the last up to each query; they are not searched.
        query_reduce: a sample is the last of its queries, ``"stride"``, or their ``"mean"``.
        is_causal: must be True.
        share_heads: one list for all query heads of a key head.

    Numerics, Errors:
        As :func:`hip_plan`.

    Complexity:
        The first stage takes ``2 log2(chunk) N / chunk`` scores for each of its samples: O(N^2)
        with a small constant. Memory is that of the lists.

    Source:
        InfiniteHiP (arXiv 2502.08910). Keys and queries are scored as they are given: positions
        beyond those of the training are the caller's to rotate.

    Example:
        >>> import torch, attnext
        >>> q, k = torch.randn(2, 1, 3000, 2, 16)
        >>> stages = (64, 1, 64, 512), (64, 1, 16, 256)
        >>> plan = attnext.infinite_hip_plan(q, k, stages=stages, sinks=64, window_size=256)
        >>> plan.lists.shape  # each of 16 ranges lies in one block of 64 keys
        torch.Size([1, 2, 47, 16])
    """
    search = _Cascade(
        query, key, stages, block_size, sinks, window_size, query_reduce, is_causal, share_heads
    )
    return search.plan(search.prune)


class _Cascade:
    """The stages of :func:`infinite_hip_plan` on one pair of queries and keys."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        stages: Sequence[Stage],
        block_size: int,
        sinks: int,
        window_size: int,
        query_reduce: str,
        is_causal: bool,
        share_heads: bool,
    ) -> None:
        check_sequences(query, key, key)
        _check_options(stages, block_size, sinks, window_size, share_heads)
        check_choice("query_reduce", query_reduce, ("stride", "mean"))
        check_flag("is_causal", is_causal)
        if not is_causal:
            raise NotImplementedError(f"is_causal must be True, got {is_causal!r}")
        self.query, self.key, self.stages, self.block_size = query, key, stages, block_size
        self.sinks, self.window_size, self.reduce = sinks, window_size, query_reduce
        self.lists = key.shape[2] if share_heads else query.shape[2]

    def first(self, part: slice) -> tuple[Tensor, Tensor]:
        """All chunks of the first stage for a part of its query blocks."""
        size, _, chunk, _ = self.stages[0]
        seen, last = _visible(self.query, self.key, part, size, True)
        # The last query's window begins last: what leaves it is searched for all of the block.
        end = torch.minimum(seen, last - self.window_size + 1)
        reach = self.key.shape[1] - self.window_size - self.sinks
        starts = torch.arange(0, max(reach, 0), chunk, device=self.key.device) + self.sinks
        shape = (self.query.shape[0], self.lists, len(last), len(starts))
        lo = starts.expand(shape)
        return lo, torch.minimum(lo + chunk, end[:, None].expand(shape))

    def stage(self, number: int, part: slice, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """The ranges that a stage keeps; ``part`` is of its query blocks."""
        size, stride, chunk, keep = self.stages[number]
        count = keep // chunk
        if lo.shape[-1] <= count:
            return lo, hi
        samples = _sample(
            self.query, self.key.shape[1], self.lists, part, size, stride, self.reduce, True
        )
        left, right = lo, hi
        met = torch.full_like(lo, _INVISIBLE, dtype=samples.query.dtype)
        for _ in range(max((chunk - 1).bit_length(), 1)):
            middle = (left + right) // 2
            a, b = (left + middle) // 2, (middle + right) // 2
            of_a, of_b = (_scores(samples, self.key, x) for x in (a, b))
            met = torch.maximum(met, torch.maximum(of_a, of_b))
            go_left, one = of_a >= of_b, right - left <= 1
            left, right = (
                torch.where(one | go_left, left, middle),
                torch.where(~one & go_left, middle, right),
            )
        best = _keep(met, lo >= hi, count)
        return lo.gather(-1, best), hi.gather(-1, best)

    def cut(self, number: int, part: slice, lo: Tensor, hi: Tensor) -> tuple[slice, Any, Any]:
        """What a stage kept as the chunks of the next, and its query blocks."""
        (size, _, _, _), (smaller, _, chunk, _) = self.stages[number : number + 2]
        # No more than the keys and the queries fill.
        pieces = min(self.stages[number][2] // chunk, max(-(-self.key.shape[1] // chunk), 1))
        total = -(-self.query.shape[1] // smaller)
        ratio = min(size // smaller, max(total, 1))
        part = slice(part.start * ratio, min(part.stop * ratio, total))
        lo, hi = (x.repeat_interleave(ratio, 2)[:, :, : part.stop - part.start] for x in (lo, hi))
        starts = (lo[..., None] + torch.arange(pieces, device=lo.device) * chunk).flatten(-2)
        return part, starts, torch.minimum(starts + chunk, hi.repeat_interleave(pieces, -1))

    def prune(self, part: slice) -> tuple[Tensor, Tensor]:
        """The ranges left after all stages."""
        lo, hi = self.first(part)
        for number in range(len(self.stages)):
            lo, hi = self.stage(number, part, lo, hi)
            if number + 1 < len(self.stages):
                part, lo, hi = self.cut(number, part, lo, hi)
        return lo, hi

    def plan(self, prune: Any) -> BlockPlan:
        """Prunes for a bounded number of query blocks at a time, and rounds out to blocks."""
        num_queries, num_keys = self.query.shape[1], self.key.shape[1]
        ratio = self.stages[0][0] // self.stages[-1][0]
        chunks = [max(num_keys // self.stages[0][2], 1)]
        for (_, _, chunk, keep), (_, _, smaller, _) in zip(
            self.stages, self.stages[1:], strict=False
        ):
            chunks.append(min(keep, num_keys) // chunk * (chunk // smaller))
        samples = max(size // stride for size, stride, _, _ in self.stages)
        row = self.query.shape[0] * (
            self.lists * self.query.shape[3] + self.query.shape[2] * samples
        )
        coarse = -(-num_queries // self.stages[0][0])
        with torch.no_grad():
            parts = [
                self.to_blocks(*prune(part))
                for part in steps(coarse, max(chunks) * ratio * row, self.key.device)
            ]
            if not parts:
                shape = (self.query.shape[0], self.lists, 0, 1)
                parts = [torch.full(shape, -1, dtype=torch.int32, device=self.key.device)]
            found = torch.cat(parts, 2)
        return BlockPlan.of(found, num_queries, self.stages[-1][0], num_keys, self.block_size)

    def to_blocks(self, lo: Tensor, hi: Tensor) -> Tensor:
        """The blocks that hold the ranges, each once, in rising order."""
        size, chunk = self.block_size, self.stages[-1][2]
        aligned = size % chunk == 0 and self.sinks % chunk == 0
        most = 1 if aligned else (chunk - 1) // size + 2
        total = -(-self.key.shape[1] // size)
        most = min(most, max(total, 1))
        block = lo[..., None] // size + torch.arange(most, device=lo.device)
        nothing = (block * size >= hi[..., None]) | (lo >= hi)[..., None]
        block = block.masked_fill(nothing, total).flatten(-2).sort(-1).values
        again = torch.zeros_like(block, dtype=torch.bool)
        again[..., 1:] = block[..., 1:] == block[..., :-1]
        block = block.masked_fill(again, total).sort(-1).values[..., : max(total, 1)]
        return block.masked_fill(block == total, -1).int()


def _check_options(
    stages: Any, block_size: Any, sinks: Any, window_size: Any, share_heads: Any
) -> None:
    check_integer("block_size", block_size, 1)
    check_integer("sinks", sinks, 0)
    check_integer("window_size", window_size, 1)
    check_flag("share_heads", share_heads)
    if not isinstance(stages, Sequence) or not stages:
        raise TypeError(f"stages must be a sequence of at least one stage, got {stages!r}")
    for stage in stages:
        if not isinstance(stage, tuple) or len(stage) != 4:
            raise ValueError(
                f"stages must hold (query_block, query_stride, chunk, keep), got {stage!r}"
            )
        for size in stage:
            check_integer("stages", size, 1)
        if stage[3] % stage[2]:
            raise ValueError(f"stages: keep must be a multiple of chunk, got {stage!r}")
    for stage, after in itertools.pairwise(stages):
        if stage[0] % after[0] or stage[2] % after[2]:
            raise ValueError(
                "stages: query block and chunk must be multiples of those of the next stage, got "
                f"{stage!r} before {after!r}"
            )


class InfiniteHipDecoder:
    """Plans for decoding, with stages that are searched again only now and then.

    Between two searches of a stage its ranges stay as they are: a key that has left the window
    since the first stage's last search is not found before its next, which is why a window should
    be longer than the first interval.

    Args:
        intervals: steps between two searches of each stage; multiples of the next stage's.
        others: as of :func:`infinite_hip_plan`.

    Errors:
        ValueError or TypeError, naming the argument: batch and heads stay those of the first step,
        and keys only grow.

    Example:
        >>> import torch
        >>> from attnext.routers.hip import InfiniteHipDecoder
        >>> decoder = InfiniteHipDecoder(stages=((1, 1, 32, 64), (1, 1, 8, 32)), intervals=(4, 2),
        ...                              block_size=16, sinks=8, window_size=16)
        >>> keys = torch.randn(1, 400, 2, 8)
        >>> decoder.plan(torch.randn(1, 1, 2, 8), keys).lists.shape
        torch.Size([1, 2, 1, 4])
    """

    def __init__(
        self,
        *,
        stages: Sequence[Stage] = STAGES,
        intervals: Sequence[int] = (32, 16, 8),
        block_size: int = 64,
        sinks: int = 256,
        window_size: int = 1024,
        share_heads: bool = False,
    ) -> None:
        _check_options(stages, block_size, sinks, window_size, share_heads)
        if not isinstance(intervals, Sequence):
            raise TypeError(f"intervals must be a sequence of ints, got {intervals!r}")
        if len(intervals) != len(stages):
            raise ValueError(
                f"intervals must be one for each of {len(stages)} stages, got {intervals!r}"
            )
        for interval in intervals:
            check_integer("intervals", interval, 1)
        if any(a % b for a, b in itertools.pairwise(intervals)):
            raise ValueError(
                f"intervals must be multiples of the next stage's, got {tuple(intervals)}"
            )
        self.stages, self.intervals = tuple(stages), tuple(intervals)
        self.options = (block_size, sinks, window_size, "stride", True, share_heads)
        self.step = 0
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._shapes: tuple[torch.Size, torch.Size] | None = None  # of the last step

    def plan(self, query: Tensor, key: Tensor) -> BlockPlan:
        """The plan of the next step: query ``[B, 1, H, D]``, all keys ``[B, N, Hkv, D]``."""
        search = _Cascade(query, key, self.stages, *self.options)
        if query.shape[1] != 1:
            raise ValueError(f"query must be one token, [B, 1, H, D], got {tuple(query.shape)}")
        if not key.shape[1]:
            raise ValueError(f"key must have at least one token, got shape {tuple(key.shape)}")
        if self._shapes is not None:
            asked, held = self._shapes
            if query.shape != asked:
                raise ValueError(
                    f"query must keep the shape of the last step, {tuple(asked)}, got "
                    f"{tuple(query.shape)}"
                )
            if key.shape[2] != held[2] or key.shape[1] < held[1]:
                raise ValueError(
                    f"key must keep the heads of the last step and no fewer tokens, "
                    f"{tuple(held)}, got {tuple(key.shape)}"
                )
        due = (n for n, interval in enumerate(self.intervals) if self.step % interval == 0)
        first = next(due, len(self.stages)) if self._kept else 0
        plan = search.plan(lambda part: self._prune(search, part, first))
        self._shapes = query.shape, key.shape
        self.step += 1
        return plan

    def _prune(self, search: _Cascade, part: slice, first: int) -> tuple[Tensor, Tensor]:
        for number in range(first, len(self.stages)):
            if number == 0:
                ranges = search.first(part)
            else:
                _, lo, hi = search.cut(number - 1, part, *self._kept[number - 1])
                ranges = lo, hi
            self._kept[number:] = [search.stage(number, part, *ranges)]
        return self._kept[-1]


def hip_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sinks: int = 16,
    window_size: int | None = 256,
    is_causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    **search: Any,
) -> Any:
    """Attention to the keys that :func:`hip_plan` finds, the first ``sinks`` and a window.

    Shapes, Numerics, Errors: as :func:`attnext.routed_attention`; differentiable, but for the
    search. ``search`` is what :func:`hip_plan` takes besides.

    Example:
        >>> import torch
        >>> from attnext.routers.hip import hip_attention
        >>> q, k, v = (torch.randn(1, 100, 2, 16) for _ in range(3))
        >>> hip_attention(q, k, v, mask_k=32, window_size=16).shape
        torch.Size([1, 100, 2, 16])
    """
    query, key, value = under_autocast(query, key, value)
    check_sequences(query, key, value)
    plan = hip_plan(query, key, is_causal=is_causal, **search)
    return routed_attention(
        query,
        key,
        value,
        plan,
        is_causal=is_causal,
        window_size=window_size,
        sinks=sinks,
        scale=scale,
        return_lse=return_lse,
    )
