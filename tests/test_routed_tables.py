# SPDX-License-Identifier: Apache-2.0
"""The rectangles that CUDA kernels walk, painted one by one: they must be what the lists name."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnext import BlockPlan, Blocks
from attnext.reference_routed import listed_keys
from attnext.routed_tables import Lists, ListTables, Remembered, facts, list_tables


def lists_of(plan: BlockPlan) -> Lists:
    queries, keys = plan.query_blocks, plan.key_blocks
    return Lists(
        plan.lists,
        plan.ends,
        plan.indptr,
        queries.offsets,
        queries.order,
        keys.offsets,
        keys.order,
        plan.list_shape,
        queries.num_tokens,
        keys.num_tokens,
    )


def painted(lists: Lists, tables: ListTables, rows: int, by_key: bool) -> tuple[Tensor, Tensor]:
    """How often each pair is walked, and whose slot it is; on the way, what kernels rely on."""
    shape = (*lists.shape, lists.num_queries, lists.num_keys)
    times, slots = torch.zeros(shape, dtype=torch.int), torch.full(shape, -1)
    num_rows = lists.num_keys if by_key else lists.num_queries
    tiles = -(-num_rows // rows)
    assert tables.tile_ptr.shape == (lists.shape[0] * lists.shape[1] * tiles + 1,)
    assert tables.tile_ptr.dtype == torch.int64 and tables.entries.dtype == torch.int32
    for n in range(tables.tile_ptr.shape[0] - 1):
        own, tile = divmod(n, tiles)
        before, last = 0, 0
        for entry in tables.entries[tables.tile_ptr[n] : tables.tile_ptr[n + 1]].tolist():
            walk_begin, walk_end, at, slot, *words = entry
            assert at == before and last <= walk_begin < walk_end
            before, last = before + walk_end - walk_begin, walk_begin
            bits = (words[0] & 0xFFFFFFFF) | (words[1] & 0xFFFFFFFF) << 32
            held = torch.tensor([tile * rows + i for i in range(64) if bits >> i & 1])
            assert bits and bits >> rows == 0 and held.max() < num_rows
            walked = torch.arange(walk_begin, walk_end)
            i, j = (walked, held) if by_key else (held, walked)
            i = i if lists.query_order is None else lists.query_order[i].long()
            j = j if lists.key_order is None else lists.key_order[j].long()
            times.flatten(0, 1)[own][i[:, None], j[None]] += 1
            slots.flatten(0, 1)[own][i[:, None], j[None]] = slot
    return times, slots


def some_blocks(choose: random.Random) -> Blocks:
    if choose.random() < 0.3:
        return Blocks.of((choose.randint(1, 9), choose.randint(0, 9)), (3, 4))
    tokens = choose.randint(0, 90)
    if choose.random() < 0.6:
        return Blocks.of(tokens, choose.choice([1, 3, 16, 40, 100]))
    edges = sorted(choose.randint(0, tokens) for _ in range(3))
    return Blocks((tokens,), torch.tensor([0, *edges, tokens], dtype=torch.int32))


def some_plan(number: int) -> BlockPlan:
    choose, generator = random.Random(number), torch.Generator().manual_seed(number)
    queries, keys = some_blocks(choose), some_blocks(choose)
    while len(keys.extent) != len(queries.extent):
        keys = some_blocks(choose)
    of = (queries.extent, queries, keys.extent, keys)
    shape = (choose.choice([1, 2]), choose.choice([1, 2]), queries.num_blocks)
    kind = choose.choice(["lists", "spans", "rows", "mask"])
    if kind == "spans" and len(keys.extent) == 1:
        starts = torch.randint(0, keys.num_tokens + 1, (*shape, 4), generator=generator)
        ends = starts + torch.randint(-3, 30, starts.shape, generator=generator)
        ends = ends.clamp(max=keys.num_tokens)
        return BlockPlan.of_spans(starts, ends, *queries.extent, queries, *keys.extent)
    if kind == "mask":
        mask = torch.rand(*shape, keys.num_blocks, generator=generator) < 0.3
        return BlockPlan.of_mask(mask, *of)
    if kind == "rows":  # heads share slots
        counts = torch.randint(0, 4, shape, generator=generator)
        indptr = torch.cat([torch.zeros(*shape[:2], 1), counts.cumsum(-1)], -1).long()
        size = (int(indptr.max()) if indptr.numel() else 0,)
        return BlockPlan.of_csr(
            indptr, torch.randint(-1, keys.num_blocks, size, generator=generator), *of
        )
    size = (*shape, choose.randint(0, 6))
    return BlockPlan.of(torch.randint(-1, keys.num_blocks, size, generator=generator), *of)


@given(st.integers(0, 2**32), st.booleans(), st.booleans(), st.sampled_from([16, 64]))
def test_each_listed_pair_is_walked_once(
    number: int, by_key: bool, biased: bool, rows: int
) -> None:
    plan = some_plan(number)
    lists = lists_of(plan)
    _, place, _ = listed_keys(plan, *plan.list_shape)
    tables = list_tables(lists, facts(lists), rows, by_key, biased)
    times, slots = painted(lists, tables, rows, by_key)
    assert torch.equal(times, (place >= 0).int())
    if biased:
        assert torch.equal(slots, place)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([[[[0, 4]]]], "plan: indices must be between -1 and 3, got 4"),
        ([[[[-2, 0]]]], "plan: indices must be between -1 and 3, got -2"),
    ],
)
def test_what_leaves_the_blocks_is_refused(indices: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        facts(lists_of(BlockPlan.of(torch.tensor(indices), 16, 16, 64, 16)))


def test_other_plans_that_are_refused() -> None:
    def refused(plan: BlockPlan, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            facts(lists_of(plan))

    ends = torch.tensor([[[[65]]]])
    refused(BlockPlan.of_spans(ends - 5, ends, 16, 16, 64), "ends must be between 0 and 64, got 65")
    refused(BlockPlan.of_spans(ends - 99, ends - 9, 16, 16, 64), "starts must be .* got -34")
    one = torch.zeros(1, dtype=torch.int32)
    for ptr, word in (([1, 0], "indptr must not fall"), ([0, 2], "indptr must be .* got 2")):
        refused(BlockPlan.of_csr(torch.tensor([[ptr]]), one, 16, 16), word)
    lists = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    for offsets, order in (([0, 15], None), ([0, 16], [0, 0, *range(2, 16)]), ([0, 16], [16] * 16)):
        named = None if order is None else torch.tensor(order, dtype=torch.int32)
        blocks = Blocks((16,), torch.tensor(offsets, dtype=torch.int32), named)
        refused(BlockPlan.of(lists, 16, blocks, 16, 16), "query_blocks: offsets must rise")
        refused(BlockPlan.of(lists, 16, 16, 16, blocks), "key_blocks: offsets must rise")


def test_what_is_remembered() -> None:
    remembered, x, y = Remembered(), torch.zeros(3), torch.zeros(2)
    made: list[int] = []

    def make() -> int:
        made.append(0)
        return len(made)

    assert [remembered.get((x, y), "a", make) for _ in range(3)] == [1, 1, 1]
    assert remembered.get((x, y), "b", make) == 2
    y.add_(1)  # all are made again
    assert remembered.get((x, y), "a", make) == 3
    assert remembered.get((x, None), "a", make) == 4
    with torch.inference_mode():
        z = torch.zeros(3)
    assert [remembered.get((z,), "a", make) for _ in range(2)] == [5, 6]
    del x
    assert len(remembered._kept) == 0

    def transformed(x: torch.Tensor) -> torch.Tensor:
        assert [remembered.get((x,), "a", make) for _ in range(2)] == [7, 8]
        return x.sum()

    torch.func.grad(transformed)(torch.zeros(3))
    assert len(remembered._kept) == 0
