# SPDX-License-Identifier: Apache-2.0
"""Tiles of queries, each against the box of keys that its windows cover (1-D: bands).

Written with stock operators only: one gather brings the keys of all tiles together, one batched
attention does the rest. Queries and outputs stay in tile order outside the timing. The tile shape
is chosen among a few by running them; where every band is alike (causal windows in 1-D) a view with
overlapping blocks takes part in that trial beside the gather.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ..cases import Case
from ..masks import Masks
from ..problem import Layout, Prepared, Problem, Unavailable, heads_first, leaves_of
from .contender import Contender, fastest

#: Attention of ``[B H, tiles, rows, D]`` over ``[B H, tiles, keys, D]`` under additive scores.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

SIDES = {1: (64, 128, 256, 512), 2: (4, 7, 8, 14, 16), 3: (2, 4, 8)}
TILE_TOKENS = (16, 512)  # smaller tiles drown in calls, larger ones in unused keys
VARIANTS = 5


@dataclass(frozen=True)
class Tiling:
    """Token tables of a tiling: ``rows [T, R]`` the queries, ``keys [T, S]`` their boxes."""

    shape: tuple[int, ...]
    rows: Tensor
    keys: Tensor

    @classmethod
    def of(cls, masks: Masks, shape: tuple[int, ...]) -> Tiling:
        """Tiles within dilation classes. The box is as large as the largest tile needs it."""
        case = masks.case
        rows, keys = [], []
        for a, side in enumerate(shape):
            axis, d = masks.axes[a], case.dilation
            size = case.key_extents[a] // d  # keys of a class
            queries = (
                torch.arange(case.queries[a]).view(-1, d).T.reshape(-1, side)
            )  # class by class
            begin, end = axis.begin[queries].amin(1), axis.end[queries].amax(1)
            length = int((end - begin).amax())
            first = begin.clamp(max=size - length)
            index = first[:, None] + torch.arange(length)
            rows.append(queries)
            keys.append(index * d + axis.query_class[queries[:, :1]])
        keys_of = _boxes(keys, case.key_extents)
        if case.sinks:
            extra = torch.arange(case.sinks).expand(len(keys_of), -1)
            keys_of = torch.cat([extra, keys_of], dim=1)
        return cls(shape, _boxes(rows, case.queries), keys_of)

    def mask(self, masks: Masks) -> Tensor:
        """``[T, R, S]``; a sink that a box brings a second time is masked there."""
        mask = masks.mask(self.rows[:, :, None], self.keys[:, None, :])
        sinks = masks.case.sinks
        if sinks:
            again = self.keys[:, sinks:] < sinks
            mask[:, :, sinks:] &= ~again[:, None, :]
        return mask


def shapes(case: Case) -> list[tuple[int, ...]]:
    """Tile shapes that divide the extents, the likeliest first."""
    extents = [n // case.dilation for n in case.queries]
    sides = [
        [s for s in sorted({*SIDES[case.rank], n}) if n % s == 0 and s <= TILE_TOKENS[1]]
        for n in extents
    ]
    low, high = min(TILE_TOKENS[0], math.prod(extents)), TILE_TOKENS[1]
    fitting = [s for s in itertools.product(*sides) if low <= math.prod(s) <= high]

    def waste(shape: tuple[int, ...]) -> float:
        """Keys computed per query, and what a call of that size costs beside them."""
        box = math.prod(
            min(n, s + axis["left"] + axis["right"])
            for n, s, axis in zip(extents, shape, case.axes, strict=True)
        )
        return box * (1 + 24 / math.prod(shape))

    return sorted(fitting, key=waste)[:VARIANTS]


class SdpaTiles(Contender):
    name = "sdpa-tiles"
    about = "scaled_dot_product_attention over gathered tiles (1-D: bands); tile chosen by trial"

    def is_meant_for(self, case: Case) -> bool:
        return case.op != "window" and case.num_queries > 1

    def prepare(self, problem: Problem, training: bool) -> Prepared:
        problem.refuse_options("softcap")
        return fastest(_variants(problem, training, _sdpa), problem, training)


class CompiledTiles(Contender):
    name = "compiled-tiles"
    about = "the same tiles, attention in plain operators through torch.compile"

    def is_meant_for(self, case: Case) -> bool:
        return case.op != "window" and case.num_queries > 1 and case.group != "call"

    def prepare(self, problem: Problem, training: bool) -> Prepared:
        torch._dynamo.reset()
        attend = torch.compile(partial(_plain, problem.case.softcap), dynamic=False)
        variants = itertools.islice(_variants(problem, training, attend), 2)  # each is compiled
        return fastest(variants, problem, training)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scores: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=scores)


def _plain(softcap: float | None, q: Tensor, k: Tensor, v: Tensor, scores: Tensor) -> Tensor:
    logits = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return torch.matmul(torch.softmax(logits + scores, dim=-1), v)


def _variants(
    problem: Problem, training: bool, attend: Attend
) -> Iterator[tuple[str, Callable[[], Prepared]]]:
    case = problem.case
    problem.refuse_grouped_heads()
    if any(n % case.dilation for n in case.queries):
        raise Unavailable("needs extents that the dilation divides")
    masks = Masks(problem)
    candidates = shapes(case)
    if not candidates:
        raise Unavailable("no tile divides the extents")
    for shape in candidates:
        name = "tile " + "×".join(map(str, shape))
        yield name + ", gather", partial(_gathered, problem, training, masks, shape, attend)
        if case.rank == 1 and case.is_causal and not (case.bias or case.alibi or case.sinks):
            yield name + ", view", partial(_banded, problem, training, masks, shape[0], attend)


def _gathered(
    problem: Problem, training: bool, masks: Masks, shape: tuple[int, ...], attend: Attend
) -> Prepared:
    case = problem.case
    tiling = Tiling.of(masks, shape)
    (count, size), reach = tiling.rows.shape, tiling.keys.shape[1]
    per_head = case.bias or case.alibi
    problem.afford("the scores of its tiles", count * size * reach * (case.heads * per_head + 4))
    copies = 2 + 4 * training
    problem.afford(
        "its gathered keys", case.batch * case.heads * count * reach * case.head_dim * copies
    )

    # [B, *X, H, D] <-> [B H, T, R, D], and keys [B H, N, D].
    order = tiling.rows.flatten()
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    first = heads_first(case.queries)
    query = Layout(
        lambda t: first.arrange(t).flatten(0, 1)[:, order].unflatten(1, (count, size)),
        lambda t: first.restore(t.flatten(1, 2)[:, inverse].unflatten(0, (case.batch, -1))),
    )
    keys_first = heads_first(case.key_extents)
    key = Layout(
        lambda t: keys_first.arrange(t).flatten(0, 1),
        lambda t: keys_first.restore(t.unflatten(0, (case.batch, -1))),
    )
    leaves, layouts = leaves_of(problem, training, query, key)
    q, k, v = leaves["query"], leaves["key"], leaves["value"]
    index = tiling.keys.flatten()

    mask = tiling.mask(masks)
    i, j = tiling.rows[:, :, None], tiling.keys[:, None, :]
    learned = case.bias and training
    scores = masks.scores(i, j, mask, None if learned else problem.bias)
    scores = scores.repeat(case.batch, 1, 1, 1) if per_head and not learned else scores.unsqueeze(0)
    spread = masks.bias_index(i, j, mask) if learned else None

    def call() -> Tensor:
        added = scores
        if spread is not None:
            added = scores + leaves["bias"].flatten(1)[:, spread].repeat(case.batch, 1, 1, 1)
        box_k = k.index_select(1, index).unflatten(1, (count, reach))
        box_v = v.index_select(1, index).unflatten(1, (count, reach))
        return attend(q, box_k, box_v, added)

    useful = int(mask.sum()) / mask.numel()
    return Prepared(call, leaves, layouts, f"{useful:.0%} of its pairs useful")


def _banded(problem: Problem, training: bool, masks: Masks, block: int, attend: Attend) -> Prepared:
    """Causal bands of equal shape: keys padded in front, then a view with overlapping blocks."""
    case = problem.case
    assert case.window is not None
    count = case.num_queries // block
    front = case.window[0] - 1
    layout = heads_first(case.queries)

    def blocks(t: Tensor) -> Tensor:
        return layout.arrange(t).flatten(0, 1).unflatten(1, (count, block))

    def back(t: Tensor) -> Tensor:
        return layout.restore(t.flatten(1, 2).unflatten(0, (case.batch, -1)))

    query = Layout(blocks, back)
    key = Layout(
        lambda t: layout.arrange(t).flatten(0, 1),
        lambda t: layout.restore(t.unflatten(0, (case.batch, -1))),
    )
    leaves, layouts = leaves_of(problem, training, query, key)
    q, k, v = leaves["query"], leaves["key"], leaves["value"]

    # Slot s of a band is the key s - front after the band's first query, and row r sees the
    # window that ends at slot r + front. The bands that reach before the first key (into the
    # padding) get scores of their own, the others share one [R, S].
    slots = torch.arange(front + block)
    row = torch.arange(block)[:, None]
    band = (slots >= row) & (slots <= row + front)
    edge = min(-(-front // block), count)
    exists = slots >= front - torch.arange(edge)[:, None, None] * block
    zero = torch.zeros((), dtype=problem.dtype)
    inner = zero.masked_fill(~band, -float("inf"))
    outer = zero.masked_fill(~(band & exists), -float("inf")).unsqueeze(0)

    def view(t: Tensor) -> Tensor:
        return pad(t, (0, 0, front, 0)).unfold(1, front + block, block).transpose(-1, -2)

    def call() -> Tensor:
        box_k, box_v = view(k), view(v)
        parts = []
        if edge:
            parts.append(attend(q[:, :edge], box_k[:, :edge], box_v[:, :edge], outer))
        if edge < count:
            parts.append(attend(q[:, edge:], box_k[:, edge:], box_v[:, edge:], inner))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    return Prepared(call, leaves, layouts)


def _boxes(axes: list[Tensor], extents: tuple[int, ...]) -> Tensor:
    """Raster indices of all boxes: per axis ``[t, s]`` coordinates, result ``[T, S]``."""
    result = axes[0]
    for more, extent in zip(axes[1:], extents[1:], strict=True):
        result = result[:, None, :, None] * extent + more[None, :, None, :]
        result = result.flatten(2, 3).flatten(0, 1)
    return result
