# SPDX-License-Identifier: Apache-2.0
"""Who attends which key blocks: what routers make and :func:`attnext.routed_attention` reads."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arguments import check_integer, check_tensor
from .constants import constant


@dataclass(frozen=True, eq=False)
class Blocks:
    """Tokens in blocks: block ``b`` holds the tokens at places ``offsets[b]`` to
    ``offsets[b + 1]`` of ``order``.

    Attributes:
        extent: lengths of the token axes.
        offsets: int32 ``[blocks + 1]``, rising from 0 to the number of tokens.
        order: int32 ``[tokens]``, the tokens' raster indices, block after block; None: as they are.
        grid: blocks along each axis, for blocks that are boxes.

    Example:
        >>> import attnext
        >>> attnext.Blocks.of(10, 4).offsets.tolist()
        [0, 4, 8, 10]
        >>> attnext.Blocks.of((2, 4), 2).order.tolist()
        [0, 1, 4, 5, 2, 3, 6, 7]
    """

    extent: tuple[int, ...]
    offsets: Tensor
    order: Tensor | None = None
    grid: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.extent, tuple):
            raise TypeError(f"extent must be a tuple of ints, got {self.extent!r}")
        check_tensor("offsets", self.offsets, "an int32")
        if self.offsets.dim() != 1 or not self.offsets.shape[0]:
            raise ValueError(f"offsets must be [blocks + 1], got {tuple(self.offsets.shape)}")
        if self.order is not None:
            check_tensor("order", self.order, "an int32")
            if self.order.dim() != 1:
                raise ValueError(f"order must be [tokens], got {tuple(self.order.shape)}")

    @property
    def num_blocks(self) -> int:
        return int(self.offsets.shape[0]) - 1

    @property
    def num_tokens(self) -> int:
        return math.prod(self.extent)

    @property
    def counts(self) -> Tensor:
        """int32 ``[blocks]``: tokens of each."""
        return self.offsets.diff()

    @staticmethod
    def of(
        extent: int | tuple[int, ...],
        size: int | tuple[int, ...],
        device: torch.device | str | None = None,
    ) -> Blocks:
        """Blocks of ``size`` tokens (of a map: boxes), those at the ends as large as is left.

        Args:
            extent: tokens, or the lengths of up to three token axes.
            size: per axis, or one for all.

        Errors:
            TypeError or ValueError, naming the argument.
        """
        extents = per_axis("extent", extent, None, 0)
        _check_tokens("extent", extents)
        sizes = per_axis("size", size, len(extents), 1)
        return _blocks(extents, sizes, torch.device("cpu" if device is None else device))


@constant(maxsize=256)
def _blocks(extents: tuple[int, ...], sizes: tuple[int, ...], device: torch.device) -> Blocks:
    grid = tuple(-(-n // s) for n, s in zip(extents, sizes, strict=True))
    with torch.inference_mode(False):
        if len(extents) == 1:
            edges = torch.arange(grid[0] + 1, device="cpu") * sizes[0]
            return Blocks(extents, edges.clamp(max=extents[0]).int().to(device), None, grid)
        raster = torch.arange(math.prod(extents), dtype=torch.int32, device="cpu").reshape(extents)
        boxes = [
            raster[tuple(slice(i * s, (i + 1) * s) for i, s in zip(box, sizes, strict=True))]
            for box in itertools.product(*map(range, grid))
        ]
        counts = torch.tensor([0, *(box.numel() for box in boxes)], device="cpu")
        order = torch.cat([box.flatten() for box in boxes]) if boxes else raster.flatten()
        return Blocks(extents, counts.cumsum(0).int().to(device), order.to(device), grid)


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """For each batch item, head and query block, which key blocks its queries attend.

    A query block's list is in any order; a block that is listed twice counts once, with the bias of
    its first slot. ``-1`` is an empty slot. A plan may serve all batch items or all heads.

    Attributes:
        query_blocks, key_blocks: the blocks. Of spans, ``key_blocks`` only tells the key tokens.
        lists: int32, ``[B or 1, H or Hkv or 1, query blocks, slots]``: key blocks, or the first
            tokens of spans; with ``indptr`` flat.
        ends: like ``lists``, of spans: one past the last token; a span with ``end <= start`` is
            empty.
        indptr: int64 ``[B or 1, H or Hkv or 1, query blocks + 1]``: where in ``lists`` the slots
            of each query block are (CSR). None: padded lists.
        bias: like ``lists``, floating-point, added to the logits of each listed block (natural
            units). Differentiable.

    Build plans with :meth:`of`, :meth:`of_spans`, :meth:`of_csr` or :meth:`of_mask`.

    Example:
        >>> import torch, attnext
        >>> last_two = torch.tensor([[[[0, -1], [0, 1], [1, 2]]]])
        >>> attnext.BlockPlan.of(last_two, query_extent=12, query_block=4).list_shape
        (1, 1)
    """

    query_blocks: Blocks
    key_blocks: Blocks
    lists: Tensor
    ends: Tensor | None = None
    indptr: Tensor | None = None
    bias: Tensor | None = None

    @property
    def list_shape(self) -> tuple[int, int]:
        """Batch items and heads that have lists of their own; 1: all share one."""
        shape = (self.lists if self.indptr is None else self.indptr).shape
        return int(shape[0]), int(shape[1])

    @staticmethod
    def of(
        indices: Tensor,
        query_extent: int | tuple[int, ...],
        query_block: int | tuple[int, ...] | Blocks,
        key_extent: int | tuple[int, ...] | None = None,
        key_block: int | tuple[int, ...] | Blocks | None = None,
        *,
        bias: Tensor | None = None,
    ) -> BlockPlan:
        """A plan from padded lists of key blocks.

        Args:
            indices: int32 or int64 ``[B or 1, H or Hkv or 1, query blocks, slots]``, -1: nothing.
            query_extent: query tokens, or the lengths of the axes of a map.
            query_block: tokens of a query block (1: a list per token), per axis of a map, or
                :class:`Blocks`.
            key_extent, key_block: the same of the keys; by default those of the queries.
            bias: see :class:`BlockPlan`.

        Errors:
            TypeError or ValueError, naming the argument. Indices beyond the blocks are refused by
            :func:`attnext.routed_attention`, before it reads anything.

        Example:
            >>> import torch, attnext
            >>> indices = torch.tensor([[[[0], [0], [1], [0]]]])
            >>> plan = attnext.BlockPlan.of(indices, 64, 16)
        """
        queries, keys = _both(query_extent, query_block, key_extent, key_block, indices)
        _check_lists("indices", indices, 4, queries)
        plan = BlockPlan(queries, keys, _int32(indices), bias=bias)
        _check_bias(plan)
        return plan

    @staticmethod
    def of_spans(
        starts: Tensor,
        ends: Tensor,
        query_extent: int,
        query_block: int | Blocks,
        key_extent: int | None = None,
        *,
        bias: Tensor | None = None,
    ) -> BlockPlan:
        """A plan from spans of keys ``[start, end)``, empty where ``end <= start``.

        Args:
            starts, ends: int32 or int64 ``[B or 1, H or Hkv or 1, query blocks, slots]``.
            others: as of :meth:`of`, on one token axis.
        """
        queries, keys = _both(query_extent, query_block, key_extent, 1, starts)
        for name, extent in (("query_extent", queries.extent), ("key_extent", keys.extent)):
            if len(extent) != 1:
                raise ValueError(f"{name} must be one token axis with spans, got {extent}")
        _check_lists("starts", starts, 4, queries)
        _check_lists("ends", ends, 4, queries)
        if starts.shape != ends.shape:
            raise ValueError(
                f"ends must have the shape of starts, {tuple(starts.shape)}, got "
                f"{tuple(ends.shape)}"
            )
        plan = BlockPlan(queries, keys, *_int32_spans(starts, ends), bias=bias)
        _check_bias(plan)
        return plan

    @staticmethod
    def of_csr(
        indptr: Tensor,
        indices: Tensor,
        query_extent: int | tuple[int, ...],
        query_block: int | tuple[int, ...] | Blocks,
        key_extent: int | tuple[int, ...] | None = None,
        key_block: int | tuple[int, ...] | Blocks | None = None,
        *,
        bias: Tensor | None = None,
    ) -> BlockPlan:
        """A plan from lists of any length: those of query block ``i`` are
        ``indices[indptr[b, h, i]:indptr[b, h, i + 1]]``.

        Args:
            indptr: int32 or int64 ``[B or 1, H or Hkv or 1, query blocks + 1]``.
            indices: int32 or int64 ``[entries]``.
            others: as of :meth:`of`.
        """
        queries, keys = _both(query_extent, query_block, key_extent, key_block, indices)
        _check_lists("indptr", indptr, 3, queries, more=1)
        check_tensor("indices", indices, "an int32 or int64")
        if indices.dim() != 1:
            raise ValueError(f"indices must have one dimension, got shape {tuple(indices.shape)}")
        plan = BlockPlan(queries, keys, _int32(indices), indptr=indptr.long(), bias=bias)
        _check_bias(plan)
        return plan

    @staticmethod
    def of_mask(
        mask: Tensor,
        query_extent: int | tuple[int, ...],
        query_block: int | tuple[int, ...] | Blocks,
        key_extent: int | tuple[int, ...] | None = None,
        key_block: int | tuple[int, ...] | Blocks | None = None,
    ) -> BlockPlan:
        """A plan from a bool mask ``[B or 1, H or Hkv or 1, query blocks, key blocks]``."""
        check_tensor("mask", mask, "a bool")
        if mask.dim() != 4:
            raise ValueError(f"mask must have four dimensions, got shape {tuple(mask.shape)}")
        queries, keys = _both(query_extent, query_block, key_extent, key_block, mask)
        want = (queries.num_blocks, keys.num_blocks)
        if tuple(mask.shape[2:]) != want:
            raise ValueError(
                f"mask must have {want} query and key blocks, got {tuple(mask.shape[2:])}"
            )
        counts = mask.sum(-1)
        ends = counts.flatten().cumsum(0).reshape(counts.shape)
        begins = ends - counts
        # One more entry in each row: where its last list ends, or 0 if there are no blocks at all.
        last = ends[..., -1:] if queries.num_blocks else ends.new_zeros((*ends.shape[:2], 1))
        indptr = torch.cat([begins, last], -1)
        return BlockPlan(queries, keys, mask.nonzero()[:, -1].int(), indptr=indptr)


def _both(
    query_extent: Any, query_block: Any, key_extent: Any, key_block: Any, lists: Any
) -> tuple[Blocks, Blocks]:
    device = getattr(lists, "device", None)
    queries = _blocks_of("query", query_extent, query_block, device)
    key_extent = query_extent if key_extent is None else key_extent
    keys = _blocks_of("key", key_extent, query_block if key_block is None else key_block, device)
    if len(queries.extent) != len(keys.extent):
        raise ValueError(
            f"key_extent must have as many axes as query_extent, {queries.extent}, got "
            f"{keys.extent}"
        )
    return queries, keys


def _blocks_of(name: str, extent: Any, block: Any, device: Any) -> Blocks:
    extents = per_axis(f"{name}_extent", extent, None, 0)
    _check_tokens(f"{name}_extent", extents)
    if isinstance(block, Blocks):
        if block.extent != extents:
            raise ValueError(f"{name}_block must be of {extents} tokens, got {block.extent}")
        return block
    sizes = per_axis(f"{name}_block", block, len(extents), 1)
    return _blocks(extents, sizes, torch.device("cpu") if device is None else device)


def _check_tokens(name: str, extents: tuple[int, ...]) -> None:
    if math.prod(extents) >= 2**31:
        raise ValueError(f"{name} must have less than 2**31 tokens, got {extents}")


def per_axis(name: str, x: Any, rank: int | None, minimum: int) -> tuple[int, ...]:
    """``x`` as a tuple of one to three ints (``rank``: exactly so many)."""
    if not isinstance(x, (tuple, list)):
        check_integer(name, x, minimum)
        return (x,) * (1 if rank is None else rank)
    if not 1 <= len(x) <= 3 or (rank is not None and len(x) != rank):
        raise ValueError(f"{name} must have {rank or '1 to 3'} entries, got {x!r}")
    for entry in x:
        check_integer(name, entry, minimum)
    return tuple(x)


def _check_lists(name: str, t: Any, rank: int, queries: Blocks, more: int = 0) -> None:
    check_tensor(name, t, "an int32 or int64")
    if t.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions, got shape {tuple(t.shape)}")
    if t.shape[2] != queries.num_blocks + more:
        raise ValueError(
            f"{name} must have {queries.num_blocks + more} entries on its third axis, for "
            f"{queries.num_blocks} query blocks, got {t.shape[2]}"
        )


def _check_bias(plan: BlockPlan) -> None:
    bias = plan.bias
    if bias is None:
        return
    check_tensor("bias", bias, "a floating-point")
    if bias.shape != plan.lists.shape:
        raise ValueError(
            f"bias must have the shape of the lists, {tuple(plan.lists.shape)}, got "
            f"{tuple(bias.shape)}"
        )


def _int32(t: Tensor) -> Tensor:
    """Block indices fit: there are fewer than 2^31 blocks. What does not fit stays out of range."""
    if t.dtype == torch.int32:
        return t.contiguous()
    return t.clamp(-(2**31), 2**31 - 1).int().contiguous()


def _int32_spans(starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The same of spans: those of something stay so."""
    if starts.dtype == ends.dtype == torch.int32:
        return starts.contiguous(), ends.contiguous()
    first = starts.clamp(-(2**31), 2**31 - 2)
    last = torch.where(ends > starts, ends.clamp(1 - 2**31, 2**31 - 1), first)
    return first.int().contiguous(), last.int().contiguous()
