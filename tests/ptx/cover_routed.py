# SPDX-License-Identifier: Apache-2.0
"""Problems that execute nearly every instruction of the kernels that walk lists, as cover.py has
them for windows, and why the rest is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnext import BlockPlan, Blocks

from .cover import Reason, Variant
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
    """Rows that do not begin at multiples of 16 bytes; sinks that do not begin at the first key."""
    tensors = _tensors(variant, (150,), (300,), dim=7, dim_v=3)
    tensors = {n: cut_out(x, 5) if x.dim() == 4 else x for n, x in tensors.items()}
    return _problem(
        variant, tensors, lists(150, 16, 9, keys=300), window_size=5, sinks=90, within=(140, None)
    )


def _odd(variant: Variant) -> Problem:
    """Results that end within 16 bytes, of a walk that no blocks share; one sink."""
    tensors = _tensors(variant, (40,), heads=2, kv_heads=1, dim=3, dim_v=5)
    return _problem(variant, tensors, lists(40, 16, 2, seed=1), sinks=1)


def _part_of_a_row(variant: Variant) -> Problem:
    tensors = _tensors(variant, (70,), (200,), dim=8, dim_v=16)
    tensors = {n: cut_out(x, 16) if x.dim() == 4 else x for n, x in tensors.items()}
    return _problem(variant, tensors, lists(70, 1, 4, keys=200, key_block=16), window_size=70)


def _documents(variant: Variant, mixed: bool) -> Problem:
    documents = torch.randint(0, 3, (1, 90), generator=torch.Generator().manual_seed(0))
    documents = documents if mixed else documents.sort(-1).values
    return _problem(
        variant, _tensors(variant, (90,), heads=2, kv_heads=1), lists(90, 16, 3),
        window_size=(5, 20), sinks=9 if mixed else 2, is_causal=mixed, biased=mixed,
        query_documents=documents, key_documents=documents.flip(-1) if mixed else documents,
    )  # fmt: skip


def _shuffled(variant: Variant) -> Problem:
    return _problem(
        variant, _tensors(variant, (90,), (100,)), shuffled(lists(90, 16, 3, keys=100)),
        window_size=25, is_causal=True, exclude_self=True, sinks=2,
    )  # fmt: skip


def _shuffled_far(variant: Variant) -> Problem:
    """Rows copied from their addresses, in no order."""
    tensors = _tensors(variant, (150,), (140,), dim=6, dim_v=2)
    plan = shuffled(shuffled(lists(150, 16, 9, keys=140)), "key_blocks")
    return _problem(variant, tensors, plan)


def _shuffled_keys(variant: Variant) -> Problem:
    """A tile of keys in no order, that all queries of their document attend."""
    plan = shuffled(lists(90, 16, 3, keys=150, key_block=16), "key_blocks")
    tensors = _tensors(variant, (90,), (150,), heads=2, kv_heads=1)
    return _problem(
        variant, tensors, plan, head_policy=["list", "dense"],
        query_documents=torch.arange(90)[None] // 20, key_documents=torch.arange(150)[None] // 37,
    )  # fmt: skip


def _turned(tensors: dict[str, Tensor], spare: int = 0) -> dict[str, Tensor]:
    """The same maps, whose lines do not follow each other."""
    return {
        n: cut_out(x.transpose(1, 3), spare).transpose(1, 3) if x.dim() == 6 else x
        for n, x in tensors.items()
    }


def _maps(variant: Variant, spare: int, lacks: int = 0) -> Problem:
    """Two batch items, walks of three steps. `spare`: numbers between rows."""
    indices = torch.randint(-1, 16, (1, 1, 12, 3), generator=torch.Generator().manual_seed(0))
    plan = BlockPlan.of(indices, (3, 5, 9), (2, 3, 4), (4, 3, 11), (2, 2, 3))
    documents = torch.arange(135) % 2, torch.arange(132) % 2
    tensors = _tensors(variant, (3, 5, 9), (4, 3, 11), heads=2, batch=2, dim=lacks, dim_v=lacks)
    return _problem(
        variant, _turned(tensors, spare), plan, head_policy=["list", "dense"],
        query_documents=documents[0].expand(2, -1), key_documents=documents[1].expand(2, -1),
    )  # fmt: skip


def _two_lines(variant: Variant) -> Problem:
    """Maps of as few lines as make one."""
    plan = BlockPlan.of(torch.zeros(1, 1, 1, 1).int(), (1, 2, 70), (1, 2, 70), (2, 1, 70), 70)
    return _problem(variant, _turned(_tensors(variant, (1, 2, 70), (2, 1, 70))), plan)


def _one(variant: Variant, alone: bool) -> Problem:
    """No row but the first is there to be copied, nor another place in an order."""
    plan = shuffled(shuffled(lists(1, 1, 1, seed=1)), "key_blocks")
    tensors = _tensors(variant, (1,))
    if alone:
        tensors["value"][..., 3] = torch.inf
    document = torch.zeros(1, 1).int()
    return _problem(variant, tensors, plan, query_documents=document, key_documents=document)


def _many_sinks(variant: Variant) -> Problem:
    """Of several steps, as are the windows after them; some steps are skipped."""
    tensors = _tensors(variant, (150,), (400,), heads=2, kv_heads=1)
    plan = lists(150, 64, 2, keys=400, key_block=40)
    return _problem(
        variant,
        tensors,
        plan,
        sinks=150,
        window_size=70,
        is_causal=True,
        within=(230, None),
        biased=False,
    )


def _within(variant: Variant) -> Problem:
    """Rules that end far from the windows, on both sides, among entries of whole steps."""
    tensors = _tensors(variant, (200,), heads=2, kv_heads=1)
    plan = BlockPlan.of(torch.arange(4).expand(1, 1, 4, 4), 200, 64)
    return _problem(
        variant, tensors, plan, within=(80, 30), window_size=(9, 5), sinks=3, biased=False
    )


def _few_rows(variant: Variant, by_key: bool) -> Problem:
    """Entries of one row each, as long as steps: most warps have none of them."""
    rows = torch.tensor([3, 14, 20, 37, 63])
    if by_key:
        plan = BlockPlan.of(rows.view(1, 1, 5, 1), 320, 64, 64, 1)
        return _problem(variant, _tensors(variant, (320,), (64,)), plan)
    indices = torch.full((1, 1, 64, 1), -1)
    indices[0, 0, rows, 0] = torch.arange(5)
    plan = BlockPlan.of(indices, 64, 1, 320, 64)
    return _problem(variant, _tensors(variant, (64,), (320,)), plan)


def _step(variant: Variant) -> Problem:
    """One of a walk, and no row to spare."""
    plan = BlockPlan.of(torch.zeros(1, 1, 1, 1).int(), 64, 64)
    return _problem(variant, _tensors(variant, (64,)), plan)


def _late(variant: Variant, by_key: bool) -> Problem:
    """Walks that begin after what some rows attend, by the rules."""
    listed = [[-1] * 4, [0, 1, 2, 3], [0, 1, 2, 3], [3] * 4] if by_key else [[1, 2]] * 4
    plan = BlockPlan.of(torch.tensor([[listed]]), 64, 20)
    return _problem(variant, _tensors(variant, (64,)), plan, within=(12, 0))


def _words(variant: Variant) -> Problem:
    """Runs of as many tokens as a mask's word has bits; the next token is in none."""
    indices = torch.tensor([[[[0, 2], [1, 3], [0, 4], [2, 4], [1, 3]]]])
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randint(0, 3, (1, 160), generator=generator) for _ in range(2))
    plan = BlockPlan.of(indices, 160, 32, 160, 32)
    return _problem(
        variant, _tensors(variant, (160,)), plan, query_documents=queries, key_documents=keys,
        biased=False,
    )  # fmt: skip


def _many_entries(variant: Variant) -> Problem:
    """Entries shorter than a step, with gaps between them."""
    queries = Blocks.of(64, 64)
    indices = torch.arange(0, 60, 2).view(1, 1, 1, 30)
    return _problem(
        variant, _tensors(variant, (64,), (240,)), BlockPlan.of(indices, 64, queries, 240, 4)
    )


def _many_heads(variant: Variant) -> Problem:
    """Six of a group share tiles; the second key, which is the second query's, is not finite."""
    kinds = "list", "dense", "streaming", "off"
    of_group = torch.randint(0, 4, (171,), generator=torch.Generator().manual_seed(0))
    policy = [kinds[i] for i in of_group.repeat_interleave(6).tolist()]
    tensors = _tensors(variant, (2,), heads=1026, kv_heads=171, dim=16, dim_v=16)
    tensors["key"][:, 1] = torch.nan
    return _problem(
        variant, tensors, lists(2, 2, 1, seed=1), head_policy=policy, is_causal=True,
        window_size=1,
    )  # fmt: skip


def _parts_of_many_heads(variant: Variant) -> Problem:
    """Few of them attend much."""
    of_group = ["off"] * 112 + ["dense", "list"]
    policy = [kind for kind in of_group for _ in range(9)]
    tensors = _tensors(variant, (1,), (600,), heads=1026, kv_heads=114, dim=24, dim_v=24)
    plan = lists(1, 1, 2, keys=600, key_block=16)
    return _problem(variant, tensors, plan, head_policy=policy, backward=False)


def _growing(variant: Variant) -> Problem:
    tensors = _tensors(variant, (70,), (200,))
    tensors["query"] *= 400
    return _problem(variant, tensors, lists(70, 70, 3, keys=200), backward=False, softcap=None)


def _alone(variant: Variant, scattered: bool) -> Problem:
    """Rows by one warp each: something is not finite."""
    tensors = _tensors(variant, (15,), (17,), heads=2, kv_heads=1, batch=2)
    tensors["sink_logits"] = normal(2, seed=6)
    tensors["key"][:, 1] = torch.nan
    tensors["value"][:, 3] = torch.inf
    plan = lists(15, 4, 2, keys=17, seed=1)
    queries, keys = (torch.arange(n).expand(2, -1) for n in (15, 17))
    documents = (queries % 3, keys % 3) if scattered else (queries // 11, keys // 11)
    return _problem(
        variant, tensors, shuffled(plan) if scattered else plan, window_size=5, sinks=1,
        biased=not scattered, exclude_self=True, query_documents=documents[0],
        key_documents=documents[1], key_lengths=torch.tensor([17, 13]),
    )  # fmt: skip


def _alone_in_a_map(variant: Variant) -> Problem:
    """Rows of odd numbers of entries, keys in no order."""
    indices = torch.tensor([[[[0, 3], [1, -1], [2, -1], [3, 1]]]])
    plan = BlockPlan.of(indices, (2, 3, 2), (2, 2, 1), (2, 2, 3), (1, 2, 2))
    tensors = _tensors(variant, (2, 3, 2), (2, 2, 3), batch=2, heads=4, kv_heads=2, dim=3, dim_v=5)
    tensors["value"][:, 1, 0, 1] = torch.inf
    documents = torch.arange(12).expand(2, -1) % 3
    return _problem(
        variant, _turned(tensors), plan, head_policy=["list", "dense", "dense", "list"],
        query_documents=documents, key_documents=documents,
    )  # fmt: skip


def _packed(variant: Variant, heads: int) -> Problem:
    """Lists of tokens, and rows for each of the heads that share them."""
    tensors = _tensors(variant, (23,), (70,), heads=2 * heads, kv_heads=2, batch=2)
    plan = lists(23, 1, 3, keys=70, key_block=16, heads=2, seed=3)
    return _problem(variant, tensors, plan, window_size=9, exclude_self=True)


def _parts(variant: Variant, alone: bool) -> Problem:
    """A walk by several blocks, and what adds them up."""
    tensors = _tensors(variant, (1,), (900,), heads=2, kv_heads=1, dim_v=3)
    if alone:
        tensors["value"][:, 880] = torch.inf
        tensors["key"][:, 885] = torch.nan
        tensors["sink_logits"] = normal(2, seed=6)
    plan = lists(1, 1, 50, keys=900, key_block=16)
    return _problem(
        variant, tensors, plan, backward=False, window_size=40, sinks=3,
        head_policy=["list", "list" if alone else "streaming"], key_lengths=torch.tensor([890]),
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
    return _problem(variant, _tensors(variant, (1, 2, 3), (3, 20, 20)), plan)


def _nothing(variant: Variant) -> Problem:
    return _problem(variant, _tensors(variant, (20,)), lists(20, 16, 0))


PROBLEMS: dict[str, Maker] = {
    "lists": _lists,
    "whole steps": _whole,
    "far": _far,
    "odd": _odd,
    "part of a row": _part_of_a_row,
    "documents": lambda v: _documents(v, False),
    "mixed documents": lambda v: _documents(v, True),
    "shuffled": _shuffled,
    "shuffled keys": _shuffled_keys,
    "maps": lambda v: _maps(v, 0),
    "maps, far": lambda v: _maps(v, 5, 3),
    "shuffled, far": _shuffled_far,
    "two lines": _two_lines,
    "one": lambda v: _one(v, False),
    "one, alone": lambda v: _one(v, True),
    "step": _step,
    "late": lambda v: _late(v, False),
    "late, by key": lambda v: _late(v, True),
    "words": _words,
    "within": _within,
    "few rows": lambda v: _few_rows(v, False),
    "few rows, by key": lambda v: _few_rows(v, True),
    "many sinks": _many_sinks,
    "many entries": _many_entries,
    "many heads": _many_heads,
    "large logits": _growing,
    "alone": lambda v: _alone(v, False),
    "alone, scattered": lambda v: _alone(v, True),
    "alone in a map": _alone_in_a_map,
    "packed": lambda v: _packed(v, 8),
    "packed unevenly": lambda v: _packed(v, 6),
    "parts": lambda v: _parts(v, False),
    "parts, alone": lambda v: _parts(v, True),
    "parts, out of order": _parts_out_of_order,
    "parts of a map": _parts_of_a_map,
    "parts of many heads": _parts_of_many_heads,
    "no step": _nothing,
}

REASONS = (
    Reason("for numbers of more than 32 bits, which the compiler's code asks for first", "div.s64"),
    Reason(
        "rows of a walk are copied in this way only if they are unaligned, or 32 GiB apart",
        "copy_chunk_async(to, source, from ? bytes : 0);",
    ),
    Reason(
        "a cursor leaves the sinks once, where the walk begins: in other copies of the look-up a "
        "run that comes before windows is none",
        "(run - kSinkRun)",
    ),
    Reason(
        "the same of windows, of keys that have no sinks",
        "return run == kWindowRun ? near.begin : sinks.begin;",
        "key_gradient",
    ),
    Reason(
        "places of keys are asked for beside windows, which keys have only in order",
        "p->walk_places ? p->walk_places[token] : token",
    ),
    *(
        Reason("a tile without entries is left out before", what, "bias_gradient")
        for what in ("if (from < to) {", "commit_copies();  // what is held")
    ),
    Reason("a sum that is not finite, in the other rows that a lane has", "logf(sum)", "forward"),
    Reason("a row that one head of a group has all have", "if (!row.live) return row;", "gradient"),
)
