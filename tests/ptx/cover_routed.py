# SPDX-License-Identifier: Apache-2.0
"""Problems that execute most instructions of the kernels that walk lists, as cover.py has them for
windows.

What is left is, for the most part, the look-up of runs and of tokens of a map: the compiler has a
copy of it wherever a walk begins or goes on, and no problem takes each way (from sinks, from
windows, over several runs) in each copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnext import BlockPlan, Blocks

from .cover import Variant
from .problems import cut_out, normal
from .problems_routed import Problem, lists, qkv, shuffled

Maker = Callable[[Variant], Problem]


def _tensors(variant: Variant, queries: Any, keys: Any = None, **more: Any) -> dict[str, Tensor]:
    """`dim` and `dim_v` are what a row lacks to the bucket."""
    dim, dim_v = variant.bucket - more.pop("dim", 0), variant.bucket - more.pop("dim_v", 0)
    tensors = qkv(queries, keys, dim, variant.dtype, dim_v=dim_v, **more)
    if variant.modified:
        tensors["sink_logits"] = normal(tensors["query"].shape[-2], seed=6)
    return tensors


def _problem(
    variant: Variant, tensors: dict[str, Tensor], plan: BlockPlan, *, backward: bool = True,
    biased: bool = True, **options: Any,
) -> Problem:  # fmt: skip
    if variant.modified:
        options = {"softcap": 2.0, **options}
        if biased:
            plan = dataclasses.replace(plan, bias=normal(*plan.lists.shape, seed=7))
    return Problem(tensors, plan, options, backward)


def _lists(variant: Variant) -> Problem:
    """Two tiles, rows that end within one, blocks within steps."""
    tensors = _tensors(variant, (100,), (130,), batch=2, heads=4, kv_heads=2)
    tensors["sink_logits"] = normal(4, seed=6)
    return _problem(
        variant, tensors, lists(100, 16, 4, keys=130), is_causal=True, window_size=30, sinks=3,
        exclude_self=True, head_policy=["list", "dense", "streaming", "off"],
        key_lengths=torch.tensor([130, 90]),
    )  # fmt: skip


def _whole(variant: Variant) -> Problem:
    """Steps that all rows attend, others that none does."""
    indices = torch.tensor([[[[0, 2], [1, 2]]]])
    plan = BlockPlan.of(indices, 128, 64, 400, 128)
    return _problem(variant, _tensors(variant, (128,), (400,)), plan, within=(300, None))


def _far(variant: Variant) -> Problem:
    """Rows that do not begin at multiples of 16 bytes."""
    tensors = _tensors(variant, (150,), (200,), dim=7, dim_v=3)
    tensors = {n: cut_out(x, 5) if x.dim() == 4 else x for n, x in tensors.items()}
    return _problem(variant, tensors, lists(150, 16, 9, keys=200), window_size=5, sinks=2)


def _part_of_a_row(variant: Variant) -> Problem:
    tensors = _tensors(variant, (70,), (200,), dim=8, dim_v=16)
    tensors = {n: cut_out(x, 16) if x.dim() == 4 else x for n, x in tensors.items()}
    return _problem(variant, tensors, lists(70, 1, 4, keys=200, key_block=16), window_size=70)


def _documents(variant: Variant, mixed: bool) -> Problem:
    documents = torch.randint(0, 3, (1, 90), generator=torch.Generator().manual_seed(0))
    documents = documents if mixed else documents.sort(-1).values
    return _problem(
        variant, _tensors(variant, (90,), heads=2, kv_heads=1), lists(90, 16, 3),
        window_size=(5, 20), sinks=2,
        query_documents=documents, key_documents=documents.flip(-1) if mixed else documents,
    )  # fmt: skip


def _shuffled(variant: Variant) -> Problem:
    return _problem(
        variant, _tensors(variant, (90,), (100,)), shuffled(lists(90, 16, 3, keys=100)),
        window_size=25, is_causal=True, exclude_self=True, sinks=2,
    )  # fmt: skip


def _shuffled_keys(variant: Variant) -> Problem:
    """A tile of keys in no order, that all queries of their document attend."""
    plan = shuffled(lists(90, 16, 3, keys=150, key_block=16), "key_blocks")
    return _problem(
        variant, _tensors(variant, (90,), (150,), heads=2), plan, head_policy=["list", "dense"],
        query_documents=torch.arange(90)[None] // 20, key_documents=torch.arange(150)[None] // 37,
    )  # fmt: skip


def _maps(variant: Variant, step: int, lacks: int = 0) -> Problem:
    """`step`: rows begin at multiples of so many numbers, if it is not 0."""
    indices = torch.randint(-1, 8, (1, 1, 8, 3), generator=torch.Generator().manual_seed(0))
    plan = BlockPlan.of(indices, (3, 5, 7), (2, 3, 4), (4, 3, 5), (2, 2, 3))
    documents = torch.arange(105)[None] % 2, torch.arange(60)[None] % 2
    tensors = _tensors(variant, (3, 5, 7), (4, 3, 5), heads=2, dim=lacks, dim_v=lacks)
    if step:
        tensors = {n: cut_out(x, step) if x.dim() > 1 else x for n, x in tensors.items()}
    return _problem(
        variant, tensors, plan,
        head_policy=["list", "dense"], query_documents=documents[0], key_documents=documents[1],
    )  # fmt: skip


def _many_entries(variant: Variant) -> Problem:
    """Entries shorter than a step, with gaps between them."""
    queries = Blocks.of(64, 64)
    indices = torch.arange(0, 60, 2).view(1, 1, 1, 30)
    return _problem(
        variant, _tensors(variant, (64,), (240,)), BlockPlan.of(indices, 64, queries, 240, 4)
    )


def _many_heads(variant: Variant) -> Problem:
    policy = ["list", "dense"] * 513
    tensors = _tensors(variant, (2,), heads=1026, kv_heads=1)
    return _problem(variant, tensors, lists(2, 2, 1), head_policy=policy, backward=False)


def _growing(variant: Variant) -> Problem:
    tensors = _tensors(variant, (70,), (200,))
    tensors["query"] *= 60
    return _problem(variant, tensors, lists(70, 70, 3, keys=200), backward=False, softcap=None)


def _alone(variant: Variant, scattered: bool) -> Problem:
    """Rows by one warp each: something is not finite."""
    tensors = _tensors(variant, (20,), heads=2, kv_heads=1)
    tensors["key"][:, 1] = torch.nan
    tensors["value"][:, 3] = torch.inf
    plan = lists(20, 4, 2, seed=1)
    documents = torch.arange(20)[None]
    documents = documents % 3 if scattered else documents // 12
    return _problem(
        variant, tensors, shuffled(plan) if scattered else plan, window_size=5, sinks=1,
        exclude_self=True, query_documents=documents, key_documents=documents,
    )  # fmt: skip


def _packed(variant: Variant, heads: int) -> Problem:
    """Lists of tokens, and rows for each of the heads that share them."""
    tensors = _tensors(variant, (23,), (70,), heads=2 * heads, kv_heads=2, batch=2)
    plan = lists(23, 1, 3, keys=70, key_block=16, heads=2, seed=3)
    return _problem(variant, tensors, plan, window_size=9, exclude_self=True)


def _parts(variant: Variant, alone: bool) -> Problem:
    """A walk by several blocks, and what adds them up."""
    tensors = _tensors(variant, (1,), (900,), heads=2, kv_heads=1)
    if alone:
        tensors["value"][:, 5] = torch.inf
    plan = lists(1, 1, 50, keys=900, key_block=16)
    return _problem(
        variant, tensors, plan, backward=False, window_size=40, sinks=3,
        head_policy=["list", "streaming"], key_lengths=torch.tensor([890]),
    )  # fmt: skip


def _parts_out_of_order(variant: Variant) -> Problem:
    """The same of shuffled queries in documents; some attend nothing, some heads no key."""
    documents = torch.arange(900)[None] // 300
    tensors = _tensors(variant, (3,), (900,), heads=4, kv_heads=2)
    tensors["value"][:, :400] *= 9
    return _problem(
        variant, tensors, shuffled(lists(3, 1, 30, keys=900, key_block=16)), backward=False,
        window_size=(500, 0), sinks=3, head_policy=["list", "list", "dense", "off"],
        query_documents=torch.tensor([[0, 2, 5]]), key_documents=documents,
    )  # fmt: skip


def _parts_of_a_map(variant: Variant) -> Problem:
    plan = BlockPlan.of(torch.arange(16).view(1, 1, 1, 16), (1, 2, 3), 3, (3, 20, 20), (3, 5, 5))
    return _problem(variant, _tensors(variant, (1, 2, 3), (3, 20, 20)), plan, backward=False)


def _nothing(variant: Variant) -> Problem:
    return _problem(variant, _tensors(variant, (20,)), lists(20, 16, 0))


PROBLEMS: dict[str, Maker] = {
    "lists": _lists,
    "whole steps": _whole,
    "far": _far,
    "part of a row": _part_of_a_row,
    "documents": lambda v: _documents(v, False),
    "mixed documents": lambda v: _documents(v, True),
    "shuffled": _shuffled,
    "shuffled keys": _shuffled_keys,
    "maps": lambda v: _maps(v, 0),
    "maps, far": lambda v: _maps(v, 5, 3),
    "many entries": _many_entries,
    "many heads": _many_heads,
    "large logits": _growing,
    "alone": lambda v: _alone(v, False),
    "alone, scattered": lambda v: _alone(v, True),
    "packed": lambda v: _packed(v, 8),
    "packed unevenly": lambda v: _packed(v, 6),
    "parts": lambda v: _parts(v, False),
    "parts, alone": lambda v: _parts(v, True),
    "parts, out of order": _parts_out_of_order,
    "parts of a map": _parts_of_a_map,
    "no step": _nothing,
}
