# SPDX-License-Identifier: Apache-2.0
"""A plan's lists as the entries that the CUDA kernels walk, made by torch where the lists are.

A block of a kernel holds a tile of rows (places of the order of queries, or of keys) and walks over
places of the other side. Each query block and each run of keys that it lists are a rectangle; it is
cut at the edges of tiles and counted with the tile. What is listed twice is cut away before. Rows
of a tile that list the same then share one walk, unless slots have biases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
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


@dataclass
class ListTables:
    """Entries of all tiles, for one direction.

    Attributes:
        tile_ptr: int64 ``[lists * tiles + 1]``: where in `entries` those of a tile begin.
        entries: int32 ``[n, 6]``, ListEntry of plan.h. Of a tile in rising order of their walk; of
            one row, what two of them walk is disjoint. Those after the last tile's are of none.
        walk_places: int32 ``[walked]``, places by tokens, where slots have biases and what is
            walked has an order.
        slot_ptr, slot_entries: of biases, by query: int64 ``[slots + 1]`` and int32 ``[n]``, the
            entries of each slot.
    """

    tile_ptr: Tensor
    entries: Tensor
    walk_places: Tensor | None = None
    slot_ptr: Tensor | None = None
    slot_entries: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def addresses(
        self, address: Callable[[str, Tensor], int] = lambda name, x: x.data_ptr()
    ) -> tuple[int, int, int, int, int, int]:
        """What the binary takes; `address` says where a tensor is on the device."""
        tile_ptr, entries, places, slot_ptr, slot_entries = (
            0 if x is None else address(n, x) for n, x in self.tensors.items()
        )
        return tile_ptr, entries, self.entries.shape[0], places, slot_ptr, slot_entries


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

    Tensors of inference mode do not tell when they are written to, and those that a transform of
    ``torch.func`` wraps have no memory to know them by, so nothing is kept of them; nor while a
    CUDA graph is captured, which makes tables of its own at each replay.
    """

    def __init__(self) -> None:
        self._kept: Any = WeakTensorKeyDictionary()

    def get(self, tensors: tuple[Tensor | None, ...], key: Any, make: Callable[[], Any]) -> Any:
        owner = tensors[0]
        assert owner is not None
        if any(
            t is not None and (t.is_inference() or not torch._C._has_storage(t)) for t in tensors
        ) or (owner.is_cuda and torch.cuda.is_current_stream_capturing()):
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
    stride = plan.num_keys + 1
    key, order = torch.sort(row * stride + begin, stable=True)
    row, begin, end, slot = row[order], begin[order], end[order], slot[order]
    reach = torch.cummax(row * stride + end, 0).values if pairs else key
    before = torch.cat([key[:1], reach[:-1]])
    blocks = max(1, num_blocks)
    if biased and plan.ends is not None and bool(((before > key) & (begin < end)).any()):
        row, begin, end, slot = _pieces(row, begin, end, slot, stride)
    else:
        begin = torch.maximum(begin, before - row * stride)
    return _Runs(row // blocks, row % blocks, begin, end, slot)


def _pieces(
    row: Tensor, begin: Tensor, end: Tensor, slot: Tensor, stride: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs that overlap, cut wherever one of their row begins or ends; a piece is that of the first
    slot which has it. Memory is O(runs), time O(runs * the longest list)."""
    edges = torch.sort(torch.cat([row * stride + begin, row * stride + end])).values
    # Slots of a row, the last first: who comes later takes over. Empty pieces stay.
    order = torch.sort(slot, descending=True, stable=True).indices
    order = order[torch.sort(row[order], stable=True).indices]
    row_of, slot_of = row[order], slot[order]
    low = torch.searchsorted(edges, (row * stride + begin)[order])
    high = torch.searchsorted(edges, (row * stride + end)[order])
    number = torch.arange(row.numel(), device=row.device)
    starts = torch.searchsorted(row_of, row_of)  # where the row's begin
    place = number - starts
    owner = torch.full_like(edges, -1)
    at = torch.arange(edges.numel(), device=row.device)
    row_of_edge = edges // stride
    first, last = torch.searchsorted(row_of, torch.stack([row_of_edge, row_of_edge + 1]))
    for k in range(int(place.max()) + 1):
        mine = (first + k).clamp(max=row.numel() - 1)
        held = (first + k < last) & (low[mine] <= at) & (at < high[mine])
        owner = torch.where(held, mine, owner)
    real = owner >= 0
    piece_end = torch.cat([edges[1:], edges[-1:]])
    piece_begin = edges - row_of_edge * stride
    piece_end = torch.where(real, piece_end - row_of_edge * stride, piece_begin)
    return row_of_edge, piece_begin, piece_end, slot_of[owner.clamp(min=0)]


def list_tables(plan: Lists, known: Facts, rows: int, by_key: bool, biased: bool) -> ListTables:
    """Tables for tiles of `rows` places.

    Numerics: of two blocks that are the same, or of spans that share keys, the first slot's counts.
    Complexity: sorts all slots; waits for the device only for spans, and for blocks some of which
        are far larger than others.
    """
    device = plan.lists.device
    runs = _runs(plan, known.pairs, biased)
    pairs = runs.slot.numel()
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
        source = torch.arange(pairs, device=device).repeat_interleave(met, output_size=copies)
        index = torch.arange(copies, device=device) - (met.cumsum(0) - met)[source]
    else:
        most = (largest + rows - 2) // rows + 1
        source = torch.arange(pairs, device=device).repeat_interleave(
            most, output_size=most * pairs
        )
        index = torch.arange(most, device=device).repeat(pairs)
    real = index < met[source]
    tile = first_tile[source] + index
    bits = _bits_below(row_end[source] - tile * rows, rows)
    bits -= _bits_below(row_begin[source] - tile * rows, rows)
    tile = torch.where(real, runs.list_of[source] * tiles + tile, lists * tiles)
    # By tile, then walk, then rows, which rise already within a list.
    order = torch.sort((walk_begin * (num_walked + 1) + walk_end)[source], stable=True).indices
    order = order[torch.sort(tile[order], stable=True).indices]
    found = _Entries(
        tile[order], walk_begin[source][order], walk_end[source][order], bits[order],
        runs.slot[source][order],
    )  # fmt: skip
    if not biased:
        found = _join(found, lists * tiles)
    tile = found.tile
    size = torch.where(tile < lists * tiles, found.walk_end - found.walk_begin, 0)
    tile_ptr = torch.searchsorted(tile, torch.arange(lists * tiles + 1, device=device))
    before = torch.cat([size.new_zeros(1), size.cumsum(0)])
    at = before[:-1] - before[tile_ptr][tile] if lists * tiles else before[:-1]
    head = torch.stack([found.walk_begin, found.walk_end, at, found.slot], 1)
    entries = torch.cat([head.int(), found.rows.contiguous().view(torch.int32).view(-1, 2)], 1)
    tables = ListTables(tile_ptr, entries.contiguous())
    if not biased:
        return tables
    if not by_key:
        slot = torch.where(tile < lists * tiles, found.slot, plan.lists.numel())
        of_slot = torch.sort(slot, stable=True)
        slots = torch.arange(plan.lists.numel() + 1, device=device)
        tables.slot_ptr = torch.searchsorted(of_slot.values, slots)
        tables.slot_entries = of_slot.indices.int()
    walk_order = plan.query_order if by_key else plan.key_order
    if walk_order is not None:
        places = torch.arange(num_walked, dtype=torch.int32, device=device)
        tables.walk_places = torch.empty_like(places).index_copy_(0, walk_order.long(), places)
    return tables


class _Entries(NamedTuple):
    """ListEntry of plan.h, but for `at`, by rising tile: int64 [n]; bit i of `rows` is the tile's
    row i."""

    tile: Tensor
    walk_begin: Tensor
    walk_end: Tensor
    rows: Tensor
    slot: Tensor


def _bits_below(n: Tensor, rows: int) -> Tensor:
    """int64 with the bits below n of `rows` <= 64; arithmetic is modulo 2^64."""
    n = n.clamp(0, rows)
    return torch.where(n == 64, -1, (torch.ones_like(n) << n.clamp(max=63)) - 1)


def _join(found: _Entries, no_tile: int) -> _Entries:
    """Entries of the same walk become one of all their rows; then those whose rows are the same and
    whose walks follow each other become one walk. What is left over belongs to no tile."""
    if found.tile.numel() == 0:
        return found

    def same(x: Tensor) -> Tensor:
        return x[1:] == x[:-1]

    def joined(with_last: Tensor, rows_add_up: bool) -> _Entries:
        starts = torch.cat([with_last.new_ones(1), ~with_last])
        ends = torch.cat([starts[1:], starts.new_ones(1)])
        # Where each group begins and ends, in the first places; the rest stays as it is, unused.
        number = torch.arange(starts.numel(), device=starts.device)
        group = starts.cumsum(0) - 1
        spare = starts.numel()
        first = number.new_zeros(spare + 1)
        first = first.index_copy(0, torch.where(starts, group, spare), number)[:-1]
        last = number.new_zeros(spare + 1)
        last = last.index_copy(0, torch.where(ends, group, spare), number)[:-1]
        rows = found.rows[first]
        if rows_add_up:  # disjoint bits; sums are modulo 2^64
            sums = found.rows.cumsum(0)
            rows = sums[last] - sums[first] + rows
        tile = torch.where(number <= group[-1], found.tile[first], no_tile)
        return _Entries(
            tile, found.walk_begin[first], found.walk_end[last], rows, found.slot[first]
        )

    found = joined(same(found.tile) & same(found.walk_begin) & same(found.walk_end), True)
    follows = found.walk_end[:-1] == found.walk_begin[1:]
    return joined(same(found.tile) & same(found.rows) & follows, False)
