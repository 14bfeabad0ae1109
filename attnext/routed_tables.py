# SPDX-License-Identifier: Apache-2.0
"""A plan's lists as the rectangles that the CUDA kernels walk, made by torch where the lists are.

A block of a kernel holds a tile of rows (places of the order of queries, or of keys) and walks over
places of the other side. Each query block and each run of keys that it lists are a rectangle; it is
cut at the edges of tiles and counted with the tile. What is listed twice is cut away before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_UNEVEN = 4  # largest block over the mean, from which on rectangles are counted


class Lists(NamedTuple):
    """A plan as the operators take it; see :class:`attnext.BlockPlan`."""

    lists: Tensor
    ends: Tensor | None
    indptr: Tensor | None
    query_offsets: Tensor
    query_order: Tensor | None
    key_offsets: Tensor
    key_order: Tensor | None
    shape: tuple[int, int]  # batch items and heads that have lists
    num_queries: int
    num_keys: int

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(self[:7])


class Facts(NamedTuple):
    """What the host knows of lists that lie on a device."""

    pairs: int  # slots of all query blocks: a slot may be in the lists of several heads
    query_block: int  # tokens of the largest block
    key_block: int
    slots: int  # of the longest list
    run: int  # keys of the largest slot


@dataclass(frozen=True)
class ListTables:
    """Rectangles of all tiles, for one direction.

    Attributes:
        tile_ptr: int64 ``[lists * tiles + 1]``: where in `entries` those of a tile begin.
        entries: int32 ``[n, 8]``, ListEntry of plan.h. Of a tile in rising order of their walk; of
            one row, what two of them walk is disjoint. A rectangle may be empty.
    """

    tile_ptr: Tensor
    entries: Tensor

    @property
    def addresses(self) -> tuple[int, int]:
        return self.tile_ptr.data_ptr(), self.entries.data_ptr()


def facts(plan: Lists) -> Facts:
    """Checks what kernels would read with, and learns what tables need. Waits for the device once.

    Errors: ValueError, in the words of the CPU's checks: an index of the plan leaves its blocks or
        tokens, offsets do not rise or an order does not name each token once.
    """
    found: dict[str, Tensor] = {}

    def low_high(name: str, x: Tensor) -> None:
        if x.numel():
            low, high = torch.aminmax(x)
            found[f"{name} low"], found[f"{name} high"] = low, high

    for name, offsets, order, tokens in (
        ("query_blocks", plan.query_offsets, plan.query_order, plan.num_queries),
        ("key_blocks", plan.key_offsets, plan.key_order, plan.num_keys),
    ):
        found[f"{name} first"], found[f"{name} last"] = offsets[0], offsets[-1]
        low_high(f"{name} size", offsets.diff())
        if order is not None and tokens:
            inside = (order >= 0) & (order < tokens)
            named = torch.zeros(tokens, dtype=torch.int32, device=order.device)
            named.index_fill_(0, torch.where(inside, order, 0).long(), 1)
            found[f"{name} named"] = named.sum() - (~inside).sum()
    lists = plan.lists.flatten()
    if plan.ends is None:
        low_high("indices", lists)
    else:
        ends = plan.ends.flatten()
        real = lists < ends
        low_high("starts", torch.where(real, lists, 0))
        low_high("ends", torch.where(real, ends, 0))
        low_high("spans", ends - lists)
    if plan.indptr is not None:
        low_high("indptr", plan.indptr)
        low_high("counts", plan.indptr.diff(dim=-1))
        found["pairs"] = plan.indptr.diff(dim=-1).sum()
    values = torch.stack([x.long() for x in found.values()]).tolist()
    at = dict(zip(found, values, strict=True))

    for name, order, tokens in (
        ("query_blocks", plan.query_order, plan.num_queries),
        ("key_blocks", plan.key_order, plan.num_keys),
    ):
        rises = at[f"{name} first"] == 0 and at[f"{name} last"] == tokens
        rises = rises and at.get(f"{name} size low", 0) >= 0
        if not rises or (order is not None and at.get(f"{name} named", 0) != tokens):
            raise ValueError(
                f"{name}: offsets must rise from 0 to the number of tokens, {tokens}, and order "
                "must name each token once"
            )
    num_blocks = plan.key_offsets.shape[0] - 1
    for name, lowest, highest in (
        ("indptr", 0, lists.numel()),
        ("indices", -1, num_blocks - 1),
        ("starts", 0, plan.num_keys),
        ("ends", 0, plan.num_keys),
    ):
        for got in (at.get(f"{name} low", lowest), at.get(f"{name} high", highest)):
            if not lowest <= got <= highest:
                raise ValueError(f"plan: {name} must be between {lowest} and {highest}, got {got}")
    if at.get("counts low", 0) < 0:
        raise ValueError("plan: indptr must not fall")
    key_block = at.get("key_blocks size high", 0)
    return Facts(
        at.get("pairs", lists.numel()),
        at.get("query_blocks size high", 0),
        key_block,
        at.get("counts high", plan.lists.shape[-1]),
        key_block if plan.ends is None else max(0, at.get("spans high", 0)),
    )


class Remembered:
    """What was made of tensors: for as long as the first of them lives and none is written to.

    Tensors of inference mode do not tell when they are written to, so nothing is kept of them; nor
    while a CUDA graph is captured, which makes tables of its own at each replay.
    """

    def __init__(self) -> None:
        self._kept: Any = WeakTensorKeyDictionary()

    def get(self, tensors: tuple[Tensor | None, ...], key: Any, make: Callable[[], Any]) -> Any:
        owner = tensors[0]
        assert owner is not None
        if any(t is not None and t.is_inference() for t in tensors) or (
            owner.is_cuda and torch.cuda.is_current_stream_capturing()
        ):
            return make()
        state = tuple(
            None if t is None else (t.data_ptr(), t._version, tuple(t.shape)) for t in tensors
        )
        before, made = self._kept.get(owner, (None, None))
        if made is None or before != state:
            made = {}
            self._kept[owner] = (state, made)
        if key not in made:
            made[key] = make()
        return made[key]


class _Runs(NamedTuple):
    """Disjoint runs of keys that lists hold, by rising list, query block and first key: int64 [n].
    ``begin >= end``: none."""

    list_of: Tensor
    block: Tensor
    begin: Tensor
    end: Tensor
    slot: Tensor


def _runs(plan: Lists, pairs: int, biased: bool) -> _Runs:
    device = plan.lists.device
    num_blocks = plan.query_offsets.shape[0] - 1
    num_rows = plan.shape[0] * plan.shape[1] * num_blocks
    if plan.indptr is None:
        slot = torch.arange(pairs, device=device)
        row = slot // max(1, pairs // max(1, num_rows))
    else:
        begins = plan.indptr[..., :-1].flatten()
        counts = plan.indptr.diff(dim=-1).flatten()
        row = torch.arange(num_rows, device=device).repeat_interleave(counts, output_size=pairs)
        slot = begins[row] + torch.arange(pairs, device=device) - (counts.cumsum(0) - counts)[row]
    first = plan.lists.flatten()[slot].long()
    if plan.ends is None:
        offsets = torch.cat([plan.key_offsets, plan.key_offsets[-1:]]).long()
        real = first >= 0
        at = first.clamp(min=0)  # there may be no block at all
        begin, end = offsets[at], offsets[at + 1]
        begin, end = torch.where(real, begin, 0), torch.where(real, end, 0)
    else:
        begin, end = first, plan.ends.flatten()[slot].long()
        begin, end = torch.where(begin < end, begin, 0), torch.where(begin < end, end, 0)
    # Rows, then where a run begins, then its slot. A row's numbers all lie below the next row's.
    key, order = torch.sort(row * (plan.num_keys + 1) + begin, stable=True)
    row, begin, end, slot = row[order], begin[order], end[order], slot[order]
    reach = torch.cummax(row * (plan.num_keys + 1) + end, 0).values if pairs else key
    before = torch.cat([key[:1], reach[:-1]])
    if biased and plan.ends is not None and bool(((before > key) & (begin < end)).any()):
        raise NotImplementedError("plan: spans that overlap and have a bias, on CUDA")
    begin = torch.maximum(begin, before - row * (plan.num_keys + 1))
    blocks = max(1, num_blocks)
    return _Runs(row // blocks, row % blocks, begin, end, slot)


def list_tables(plan: Lists, known: Facts, rows: int, by_key: bool, biased: bool) -> ListTables:
    """Tables for tiles of `rows` places.

    Numerics: of two blocks that are the same, the first slot's counts.
    Errors: NotImplementedError for spans that overlap while slots have biases.
    Complexity: sorts all slots; waits for the device only for spans, and for blocks some of which
        are far larger than others.
    """
    device = plan.lists.device
    runs = _runs(plan, known.pairs, biased)
    offsets = plan.query_offsets.long()
    queries = offsets[runs.block], offsets[runs.block + 1]
    keys = runs.begin, runs.end
    (row_begin, row_end), (walk_begin, walk_end) = (keys, queries) if by_key else (queries, keys)
    num_rows, num_walked = plan.num_queries, plan.num_keys
    if by_key:
        num_rows, num_walked = num_walked, num_rows
    tiles = -(-num_rows // rows)
    lists = plan.shape[0] * plan.shape[1]
    # Each rectangle as often as it may meet a tile, one after another.
    first_tile = row_begin // rows
    met = torch.where(
        (row_begin < row_end) & (walk_begin < walk_end), (row_end - 1) // rows - first_tile + 1, 0
    )
    largest = known.key_block if by_key else known.query_block
    blocks = (plan.key_offsets if by_key else plan.query_offsets).shape[0] - 1
    spans = by_key and plan.ends is not None
    if spans or largest * max(1, blocks) > _UNEVEN * max(num_rows, rows):
        copies = int(met.sum())
        source = torch.arange(known.pairs, device=device).repeat_interleave(met, output_size=copies)
        index = torch.arange(copies, device=device) - (met.cumsum(0) - met)[source]
    else:
        most = (largest + rows - 2) // rows + 1
        source = torch.arange(known.pairs, device=device).repeat_interleave(
            most, output_size=most * known.pairs
        )
        index = torch.arange(most, device=device).repeat(known.pairs)
    real = index < met[source]
    tile = first_tile[source] + index
    row_begin = torch.maximum(row_begin[source], tile * rows)
    row_end = torch.minimum(row_end[source], (tile + 1) * rows)
    tile = torch.where(real, runs.list_of[source] * tiles + tile, lists * tiles)
    # By tile, then walk, then rows, which rise already within a list.
    order = torch.sort(walk_begin[source], stable=True).indices
    order = order[torch.sort(tile[order], stable=True).indices]
    tile, source = tile[order], source[order]
    row_begin, row_end = row_begin[order], row_end[order]
    walk_begin, walk_end, slot = walk_begin[source], walk_end[source], runs.slot[source]
    if not biased:
        row_end, walk_end = _join(tile, row_begin, row_end, walk_begin, walk_end)
    size = torch.where(tile < lists * tiles, walk_end - walk_begin, 0)
    tile_ptr = torch.searchsorted(tile, torch.arange(lists * tiles + 1, device=device))
    before = torch.cat([size.new_zeros(1), size.cumsum(0)])
    at = before[:-1] - before[tile_ptr][tile] if lists * tiles else before[:-1]
    entries = torch.stack(
        [walk_begin, walk_end, row_begin, row_end, at, slot, slot * 0, slot * 0], 1
    )
    return ListTables(tile_ptr, entries.int().contiguous())


def _join(
    tile: Tensor, row_begin: Tensor, row_end: Tensor, walk_begin: Tensor, walk_end: Tensor
) -> tuple[Tensor, Tensor]:
    """Rectangles of one walk whose rows follow each other become the first one of them, the others
    are emptied."""
    if tile.numel() == 0:
        return row_end, walk_end

    def same(x: Tensor) -> Tensor:
        return x[1:] == x[:-1]

    follows = same(tile) & same(walk_begin) & same(walk_end) & (row_begin[1:] == row_end[:-1])
    starts = torch.cat([follows.new_ones(1), ~follows])
    group = starts.cumsum(0) - 1
    last = torch.zeros_like(row_end).scatter_reduce_(0, group, row_end, "amax")
    return last[group], torch.where(starts, walk_end, walk_begin)
