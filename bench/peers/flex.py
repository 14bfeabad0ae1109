# SPDX-License-Identifier: Apache-2.0
"""torch's FlexAttention, compiled. On the CPU it has a forward pass only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ..cases import Case
from ..masks import Masks
from ..problem import Prepared, Problem, Unavailable, heads_first, leaves_of, permuted
from .contender import Contender, fastest

BLOCKS = (128, 64)
SIDES = {2: (4, 7, 8, 14, 16), 3: (2, 4, 8)}


class Flex(Contender):
    name = "flex"
    about = "compiled FlexAttention, tokens in raster order, block mask made beforehand"

    def is_meant_for(self, case: Case) -> bool:
        return case.group != "call"

    def prepare(self, problem: Problem, training: bool) -> Prepared:
        orders = [("", torch.arange(problem.case.num_keys))]
        return _prepare(problem, training, orders, BLOCKS)


class FlexTiles(Contender):
    name = "flex-tiles"
    about = "compiled FlexAttention, tokens reordered (outside the timing) so that blocks are tiles"

    def is_meant_for(self, case: Case) -> bool:
        return case.rank > 1 and case.group != "call"

    def prepare(self, problem: Problem, training: bool) -> Prepared:
        case = problem.case
        if case.dilation > 1:
            return _prepare(problem, training, [("by dilation class", _class_order(case))], BLOCKS)
        orders = []
        for block in BLOCKS:
            shape = _tile(case, block)
            if shape is not None:
                name = "tile " + "×".join(map(str, shape))
                orders.append((name, _tile_order(case, shape)))
        if not orders:
            raise Unavailable("no tile of its blocks' size divides the extents")
        sizes = [math.prod(map(int, name[5:].split("×"))) for name, _ in orders]
        return _prepare(problem, training, orders, tuple(sizes))


def _prepare(
    problem: Problem,
    training: bool,
    orders: list[tuple[str, Tensor]],
    blocks: tuple[int, ...],
) -> Prepared:
    if training:
        raise Unavailable("FlexAttention has no backward pass on the CPU")
    torch._dynamo.reset()
    pairs = zip(itertools.cycle(orders), blocks) if len(orders) == 1 else zip(orders, blocks)  # noqa: B905
    variants = [
        (
            ", ".join(filter(None, (name, f"blocks of {block}"))),
            partial(_one, problem, order, block),
        )
        for (name, order), block in pairs
    ]
    return fastest(variants, problem, training)


def _one(problem: Problem, order: Tensor, block: int) -> Prepared:
    case = problem.case
    masks = Masks(problem)
    query, key = heads_first(case.queries), heads_first(case.key_extents)
    query_order = torch.arange(case.num_queries)
    if case.rank > 1:
        query_order = order
        query, key = (permuted(x, order, case.queries) for x in (query, key))
    leaves, layouts = leaves_of(problem, False, query, key)
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    call = partial(
        compiled,
        leaves["query"],
        leaves["key"],
        leaves["value"],
        block_mask=_block_mask(masks, query_order, order, block),
        score_mod=_score_mod(problem, masks, query_order, order),
        enable_gqa=case.key_heads != case.heads,
    )
    return Prepared(call, leaves, layouts)


def _block_mask(masks: Masks, query_order: Tensor, key_order: Tensor, block: int) -> BlockMask:
    """Lists of partial and full blocks, found a row of blocks at a time."""
    n, m = len(query_order), len(key_order)
    columns = -(-m // block)
    some, every = [], []
    for rows in query_order.split(block):
        mask = masks.mask(rows[:, None], key_order[None, :])
        mask = torch.nn.functional.pad(mask, (0, columns * block - m))
        tiles = mask.unflatten(1, (columns, block))
        some.append(tiles.any(2).any(0))
        every.append(tiles.all(2).all(0) if len(rows) == block else torch.zeros_like(some[-1]))
    full = torch.stack(every)
    partial_ = torch.stack(some) & ~full

    def lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
        count = blocks.sum(dim=1, dtype=torch.int32)
        index = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        return count[None, None], index.to(torch.int32)[None, None].contiguous()

    return BlockMask.from_kv_blocks(
        *lists(partial_),
        *lists(full),
        BLOCK_SIZE=(block, block),
        mask_mod=_mask_mod(masks, query_order, key_order),
        seq_lengths=(n, m),
    )


def _mask_mod(masks: Masks, query_order: Tensor, key_order: Tensor) -> Callable[..., Tensor]:
    """The mask as the kernel evaluates it on partial blocks.

    In 1-D, comparisons of the indices themselves. Otherwise the interval tables, gathered to token
    order beforehand and kept as fp32: that form vectorises best of those tried (integer
    coordinates, division of the index, one table of all pairs).
    """
    case = masks.case
    if case.rank == 1:
        offset, sinks = case.axes[0]["offset"], case.sinks
        reach = case.axes[0]["left"]

        def band(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            ahead = i + offset - j
            near = ahead <= reach
            if sinks:
                near = near | (j < sinks)
            return (ahead >= 0) & near

        return band

    tables = []
    for axis, x, y in zip(masks.axes, masks.query_coordinates, masks.key_coordinates, strict=True):
        x, y = x[query_order], y[key_order]
        low, high = axis.begin[x].float(), axis.end[x].float()
        group = (axis.query_class[x].float(), axis.key_class[y].float())
        tables.append((low, high, axis.key_index[y].float(), group))
    dilated = case.dilation > 1

    def inside(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        result = None
        for low, high, index, (query_class, key_class) in tables:
            near = (low[i] <= index[j]) & (index[j] < high[i])
            if dilated:
                near = near & (query_class[i] == key_class[j])
            result = near if result is None else result & near
        assert result is not None
        return result

    return inside


def _score_mod(
    problem: Problem, masks: Masks, query_order: Tensor, key_order: Tensor
) -> Callable[..., Tensor] | None:
    case = problem.case
    softcap, slopes, bias = case.softcap, problem.alibi_slopes, problem.bias
    if softcap is None and slopes is None and bias is None:
        return None
    offset = case.axes[0]["offset"]
    reach = list(case.window or ())
    query_at = [x[query_order] for x in masks.query_coordinates]
    key_at = [y[key_order] for y in masks.key_coordinates]

    def modify(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap is not None:
            score = torch.tanh(score / softcap) * softcap
        if bias is not None:
            # Pairs outside the window are masked afterwards; the clamp keeps them in the table.
            place = [
                torch.clamp(y[j] - x[i] + size - 1, 0, 2 * size - 2)
                for x, y, size in zip(query_at, key_at, reach, strict=True)
            ]
            score = score + bias[(h, *place)]
        if slopes is not None:
            score = score - slopes[h] * (i + offset - j)
        return score

    return modify


def _tile(case: Case, tokens: int) -> tuple[int, ...] | None:
    """The most cubic tile of ``tokens`` tokens (or a little fewer) that divides the extents."""
    sides = [[s for s in SIDES[case.rank] if n % s == 0] for n in case.queries]
    fitting = [s for s in itertools.product(*sides) if 0.5 * tokens < math.prod(s) <= tokens]
    return max(fitting, key=lambda s: (math.prod(s), -max(s)), default=None)


def _tile_order(case: Case, shape: tuple[int, ...]) -> Tensor:
    """Raster indices, tile by tile."""
    t = torch.arange(case.num_queries).view(case.queries)
    for a, side in enumerate(shape):  # every axis becomes (tile, place in it), in turn
        t = t.unflatten(2 * a, (-1, side))
    tiles = [2 * a for a in range(case.rank)]
    return t.permute(*tiles, *(a + 1 for a in tiles)).flatten()


def _class_order(case: Case) -> Tensor:
    """Raster indices, dilation class by dilation class: only tokens of one class meet."""
    place = torch.zeros((), dtype=torch.int64)
    for n in case.queries:
        place = place.unsqueeze(-1) * case.dilation + torch.arange(n) % case.dilation
    return place.flatten().argsort(stable=True)
