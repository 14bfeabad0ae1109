# SPDX-License-Identifier: Apache-2.0
"""Attention over lists of key blocks with what torch has."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ..cases import RoutedCase, RouterCase
from ..problem import Prepared, Problem, Unavailable, heads_first, leaves_of, permuted
from ..routers import method_of
from .contender import Contender


def _case(problem: Problem) -> RoutedCase:
    assert isinstance(problem.case, RoutedCase)
    return problem.case


def _block_order(case: RoutedCase) -> Tensor:
    order = case.plan.query_blocks.order
    return torch.arange(case.num_queries) if order is None else order.long()


class FlexLists(Contender):
    name = "flex-lists"
    about = "compiled FlexAttention with the same lists as its block mask; tokens in block order"
    ops = ("routed",)

    def prepare(self, problem: Problem, training: bool) -> Prepared:
        case = _case(problem)
        if training:
            raise Unavailable("FlexAttention has no backward pass on the CPU")
        counts = case.plan.query_blocks.counts
        size = int(counts[0])
        if not (counts == size).all():
            raise Unavailable("blocks differ in size")
        layout = permuted(heads_first(case.queries), _block_order(case), case.queries)
        leaves, layouts = leaves_of(problem, False, layout, layout)
        lists, blocks = case.lists, counts.shape[0]
        own = torch.arange(blocks).view(1, 1, -1, 1)
        full = (lists >= 0) & ((lists != own) if case.is_causal else torch.tensor(True))
        part = (lists >= 0) & ~full

        def chosen(which: Tensor) -> tuple[Tensor, Tensor]:
            index = torch.zeros(*lists.shape[:3], blocks, dtype=torch.int32)
            order = which.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
            index[..., : lists.shape[-1]] = lists.clamp(min=0).gather(-1, order)
            return which.sum(-1, dtype=torch.int32), index

        def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return i >= j

        mask = BlockMask.from_kv_blocks(
            *chosen(part),
            *chosen(full),
            BLOCK_SIZE=(size, size),
            mask_mod=causal if case.is_causal else None,
            seq_lengths=(case.num_queries, case.num_keys),
        )
        torch._dynamo.reset()
        compiled: Any = torch.compile(flex_attention, dynamic=False)
        q, k, v = leaves["query"], leaves["key"], leaves["value"]
        return Prepared(partial(compiled, q, k, v, block_mask=mask), leaves, layouts)


class GatherBlocks(Contender):
    name = "gather-blocks"
    about = "listed blocks copied by indexing, then scaled_dot_product_attention by query block"
    ops = ("routed",)

    def prepare(self, problem: Problem, training: bool) -> Prepared:
        case = _case(problem)
        blocks = case.plan.query_blocks
        size = int(blocks.counts[0])
        if not (blocks.counts == size).all():
            raise Unavailable("blocks differ in size")
        copies = case.batch * case.heads * blocks.num_blocks * case.slots * size * case.head_dim
        problem.afford("its copies of keys and values", 2 * copies * (3 if training else 1))
        layout = permuted(heads_first(case.queries), _block_order(case), case.queries)
        leaves, layouts = leaves_of(problem, training, layout, layout)
        q, k, v = leaves["query"], leaves["key"], leaves["value"]
        lists = case.lists[0].long()
        index = lists.clamp(min=0)
        mask = None
        if case.is_causal:
            rows = torch.arange(case.num_queries).view(-1, size)
            columns = rows[index].flatten(2)
            seen = (columns[:, :, None] <= rows[None, :, :, None]) & (
                (lists >= 0).repeat_interleave(size, -1)[:, :, None]
            )
            mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf")).to(problem.dtype)
        head = torch.arange(case.heads).view(-1, 1, 1)

        def call() -> Tensor:
            def gathered(t: Tensor) -> Tensor:
                whole = t.unflatten(2, (-1, size))
                return whole[:, head, index.expand(case.heads, -1, -1)].flatten(3, 4)

            out = sdpa(q.unflatten(2, (-1, size)), gathered(k), gathered(v), attn_mask=mask)
            return out.flatten(2, 3)

        return Prepared(call, leaves, layouts)


class SdpaAllBlocks(Contender):
    name = "sdpa-all-blocks"
    about = "another problem: scaled_dot_product_attention over all blocks"
    ops = ("routed", "router")
    windowed = False

    def prepare(self, problem: Problem, training: bool) -> Prepared:
        case = problem.case
        if training and isinstance(case, RoutedCase):
            raise Unavailable("what the lists save is told by the forward pass")
        layout = heads_first(case.queries)
        leaves, layouts = leaves_of(problem, training, layout, layout)
        q, k, v = leaves["query"], leaves["key"], leaves["value"]
        grouped = case.key_heads != case.heads
        call = partial(sdpa, q, k, v, is_causal=case.is_causal, enable_gqa=grouped)
        return Prepared(call, leaves, layouts)


class SdpaMasked(Contender):
    name = "sdpa-masked"
    about = "scaled_dot_product_attention with a mask of what is attended, its search not counted"
    ops = ("router",)

    def prepare(self, problem: Problem, training: bool) -> Prepared:
        case = problem.case
        assert isinstance(case, RouterCase)
        method = method_of(case)
        if method.keys is None:
            raise Unavailable("the method is more than one softmax")
        rows = torch.arange(case.num_queries)
        cells = case.heads * case.num_queries * case.num_keys
        problem.afford("its mask, and what scaled_dot_product_attention makes of it", 3 * cells)
        found = None
        if method.route is not None:
            with torch.no_grad():
                found = method.route(problem.query, problem.key, problem.value)
        mask = torch.stack([method.keys(rows, found, h, case.num_keys) for h in range(case.heads)])[
            None
        ]
        layout = heads_first(case.queries)
        leaves, layouts = leaves_of(problem, training, layout, layout)
        q, k, v = leaves["query"], leaves["key"], leaves["value"]
        grouped = case.key_heads != case.heads
        call = partial(sdpa, q, k, v, attn_mask=mask, enable_gqa=grouped)
        return Prepared(call, leaves, layouts)
