# SPDX-License-Identifier: Apache-2.0
"""Lists of key blocks to be timed, and their peers: FlexAttention with the same lists, and
FlashAttention-2 over all keys (causal), which attends more and is what a list has to beat."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import attnext
from attnext.plans import BlockPlan, Blocks

from .timed_case import Call, Case, Mask, Unavailable, heads_first

ALL_KEYS = "FlashAttention-2, all keys"


@dataclass(frozen=True, kw_only=True)
class ListCase(Case):
    """``slots`` of the key blocks for each query block, at random. On one axis causal: blocks up to
    the query's own, which is among them, for each key head. On a map: boxes, one list for all
    heads. ``query_block``: if it is another than ``block``."""

    block: tuple[int, ...]
    slots: int
    query_block: tuple[int, ...] = ()

    @property
    def is_causal(self) -> bool:
        return len(self.tokens) == 1

    @functools.cached_property
    def plan(self) -> BlockPlan:
        """On the CPU."""
        return BlockPlan.of(
            self._lists, self.tokens, self.query_block or self.block, self.tokens, self.block
        )

    @functools.cached_property
    def _lists(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        blocks = Blocks.of(self.tokens, self.block).num_blocks
        if not self.is_causal:
            order = torch.rand((blocks, blocks), generator=generator).argsort(-1)
            return order[None, None, :, : self.slots].int()
        block, step = self.block[0], (self.query_block or self.block)[0]
        rows = -(-self.tokens[0] // step)
        own = (torch.arange(rows) * step + step - 1).clamp(max=self.tokens[0] - 1) // block
        scores = torch.rand((self.kv_heads or self.heads, rows, blocks), generator=generator)
        scores.masked_fill_(torch.arange(blocks) > own[:, None], -1.0)
        scores.scatter_(-1, own[None, :, None].expand(*scores.shape[:2], 1), 2.0)
        best = scores.topk(min(self.slots, blocks))
        return best.indices.int().masked_fill(best.values < 0, -1)[None]

    @functools.cached_property
    def _listed(self) -> Tensor:
        """bool ``[heads or 1, query blocks, key blocks]``."""
        lists = self.plan.lists[0].long()
        blocks = self.plan.key_blocks.num_blocks
        listed = torch.zeros((*lists.shape[:2], blocks + 1), dtype=torch.bool)
        return listed.scatter_(-1, lists.where(lists >= 0, blocks), True)[..., :blocks]

    @functools.cached_property
    def _block_of(self) -> tuple[Tensor, Tensor]:
        """Of each token in raster order: its query block and its key block."""
        found = []
        for blocks in (self.plan.query_blocks, self.plan.key_blocks):
            places = torch.arange(blocks.num_blocks).repeat_interleave(blocks.counts.long())
            if blocks.order is not None:
                places = torch.empty_like(places).scatter_(0, blocks.order.long(), places)
            found.append(places)
        return found[0], found[1]

    @functools.cached_property
    def pairs(self) -> int:
        queries, keys = self._block_of
        found = 0
        for row in range(self._listed.shape[0]):
            counts = torch.bincount(keys, minlength=self._listed.shape[2])
            seen = (self._listed[row].long() * counts).sum(-1)[queries].sum()
            if self.is_causal:  # what of the own block is later than the query
                last = (keys + 1) * self.block[0]
                seen -= (last.clamp(max=self.num_tokens) - 1 - torch.arange(self.num_tokens)).sum()
            found += int(seen)
        return self.batch * self.heads // self._listed.shape[0] * found

    def mask(self, device: torch.device) -> Mask:
        listed = self._listed.to(device)
        queries, keys = (x.to(device) for x in self._block_of)
        group = self.heads // listed.shape[0]

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            inside = listed[h // group, queries[i], keys[j]]
            return inside & (j <= i) if self.is_causal else inside

        return mask

    @property
    def contenders(self) -> Mapping[str, Callable[[torch.device], Call]]:
        made = {"attnext": self._attnext, "FlexAttention": self._flex}
        return made | {ALL_KEYS: self._flash}

    @property
    def others(self) -> frozenset[str]:
        return frozenset({ALL_KEYS})

    def describe(self) -> str:
        def times(x: tuple[int, ...]) -> str:
            return "x".join(map(str, x))

        words = f"lists, {times(self.tokens)}, {self.slots} blocks of {times(self.block)}"
        words += f" for {times(self.query_block)}" if self.query_block else ""
        return f"{words}, {super().describe()}"

    # ---- contenders ------------------------------------------------------------------------------

    def _attnext(self, device: torch.device) -> Call:
        plan = BlockPlan.of(
            self._lists.to(device),
            self.tokens,
            self.query_block or self.block,
            self.tokens,
            self.block,
        )

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = attnext.routed_attention(q, k, v, plan, is_causal=self.is_causal)
            return out

        return call

    def _flex(self, device: torch.device) -> Call:
        """Compiled, with the lists as its block mask; the tokens of a map box after box, since its
        blocks are ranges."""
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        if self.query_block and self.query_block[0] < 16:
            raise Unavailable("has no lists for so few queries")
        order = self.plan.key_blocks.order
        order = None if order is None else order.long().to(device)
        counts = self.plan.key_blocks.counts
        if (counts != counts[0]).any():
            raise Unavailable("has blocks of one size")
        size = (int(self.plan.query_blocks.counts[0]), int(counts[0]))
        listed = self._listed.repeat_interleave(self.heads // self._listed.shape[0], 0)[None].to(
            device
        )

        def later(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return j <= i

        def sort(part: Tensor) -> tuple[Tensor, Tensor]:
            return part.sum(-1).int(), part.int().argsort(
                dim=-1, descending=True, stable=True
            ).int()

        if self.is_causal:
            rows, columns = (torch.arange(n, device=device) for n in listed.shape[2:])
            partial = rows[:, None] * size[0] < (columns + 1) * size[1] - 1
            lists = (*sort(listed & partial), *sort(listed & ~partial))
            blocks = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=size, mask_mod=later)
        else:
            blocks = BlockMask.from_kv_blocks(*sort(listed & False), *sort(listed), BLOCK_SIZE=size)
        compiled: Any = torch.compile(flex_attention, dynamic=False)
        # By itself it takes tiles that may not divide small blocks.
        tiles = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
        options = dict.fromkeys(tiles, 64) if min(size) < 128 else None

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (heads_first(x) for x in (q, k, v))
            if order is not None:
                q, k, v = (x[:, :, order] for x in (q, k, v))
            out: Tensor = compiled(
                q, k, v, block_mask=blocks, enable_gqa=self.kv_heads > 0, kernel_options=options
            )
            if order is not None:
                out = torch.empty_like(out).index_copy(2, order, out)
            return out.transpose(1, 2).unflatten(1, self.tokens)

        return call

    def _flash(self, device: torch.device) -> Call:
        n = self.num_tokens

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.flatten(1, -3) for x in (q, k, v))
            out: Tensor = torch.ops.aten._flash_attention_forward(
                q, k, v, None, None, n, n, 0.0, self.is_causal, False, scale=self.head_dim**-0.5
            )[0]
            return out.unflatten(1, self.tokens)

        return call


LIST_CASES = {
    case.name: case
    for case in (
        ListCase(name="lists-16384", tokens=(16384,), block=(64,), slots=16),
        ListCase(name="lists-16384-h32", tokens=(16384,), block=(64,), slots=16, heads=32),
        ListCase(name="lists-32768-d128", tokens=(32768,), block=(128,), slots=16, heads=32,
                 kv_heads=8, head_dim=128),
        ListCase(name="lists-8192-token", tokens=(8192,), block=(64,), query_block=(1,), slots=16,
                 heads=32, kv_heads=2, head_dim=128),
        ListCase(name="regions-56", tokens=(56, 56), block=(8, 8), slots=4, batch=32, heads=4,
                 head_dim=32),
    )
}  # fmt: skip
