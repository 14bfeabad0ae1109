# SPDX-License-Identifier: Apache-2.0
"""The kernels of routed attention under the executor, through attnext's public function.

As for windows: every launch is checked for accesses out of bounds, reads of what was not written
and races; outputs start as NaN and must be written whole; results are held to the specification in
float64.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnext
from attnext import BlockPlan, Blocks

from .problems import normal
from .problems_routed import Problem, lists, qkv, shuffled
from .routed import on_executor

routed_attention: Any = attnext.routed_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(tensors: dict[str, Tensor], plan: BlockPlan, grads: bool = True, **options: Any) -> Any:
    """Forward and backward within the budget; gives the reports."""
    problem = Problem(tensors, plan, options, grads)
    with on_executor(metrics=False) as recorder:
        results = problem.evaluate()
    problem.compare(results)
    return recorder.reports


# ---- whatever may come ---------------------------------------------------------------------------


@st.composite
def problems(draw: Any, dtypes: Any = (torch.bfloat16,), dims: Any = (16, 32)) -> Any:
    """(tensors, plan, options)"""
    number = draw(st.integers(0, 2**32))
    choose = random.Random(number)
    batch, kv_heads = choose.choice([1, 1, 2]), choose.choice([1, 1, 2])
    heads = kv_heads * choose.choice([1, 2]) if kv_heads == 1 else kv_heads
    queries, keys = choose.choice([1, 20, 64, 70]), choose.choice([1, 33, 64, 90])
    if choose.random() < 0.5:
        keys = queries
    tensors = qkv(
        (queries,),
        (keys,),
        choose.choice(dims),
        choose.choice(dtypes),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
    )
    list_batch, list_heads = choose.choice([1, batch]), choose.choice([1, kv_heads, heads])
    block, key_block = choose.choice([1, 4, 16, 50, 64, 128]), choose.choice([1, 8, 16, 64, 100])
    slots = choose.choice([0, 1, 3, 5])
    generator = torch.Generator().manual_seed(number)
    query_blocks = Blocks.of(queries, block)
    if choose.random() < 0.3:
        order = torch.randperm(queries, generator=generator).int()
        query_blocks = Blocks(query_blocks.extent, query_blocks.offsets, order)
    shape = (list_batch, list_heads, query_blocks.num_blocks, slots)
    biased = slots > 0 and choose.random() < 0.4
    bias = torch.randn(shape, generator=generator) if biased else None
    if choose.random() < 0.4:
        starts = torch.randint(0, keys, shape, generator=generator)
        ends = starts + torch.randint(-4, 60, shape, generator=generator)
        plan = BlockPlan.of_spans(
            starts, ends.clamp(max=keys), queries, query_blocks, keys, bias=bias
        )
    else:
        indices = torch.randint(-1, -(-keys // key_block), shape, generator=generator)
        plan = BlockPlan.of(indices, queries, query_blocks, keys, key_block, bias=bias)
    options: dict[str, Any] = {}
    if choose.random() < 0.5:
        options["is_causal"] = True
    if choose.random() < 0.4:
        options["window_size"] = choose.choice([1, 9, 70, (3, 5), (None, 0)])
    if choose.random() < 0.3:
        options["sinks"] = choose.choice([1, 3, 70])
    if choose.random() < 0.2:
        options["within"] = choose.choice([(20, 20), (None, 5), (70, None)])
    if choose.random() < 0.2:
        options["exclude_self"] = True
    if choose.random() < 0.2:
        options["key_lengths"] = torch.randint(0, keys + 2, (batch,), generator=generator)
    if choose.random() < 0.3:
        in_order = choose.random() < 0.5
        for name, tokens in (("query", queries), ("key", keys)):
            documents = torch.randint(0, 3, (batch, tokens), generator=generator)
            options[f"{name}_documents"] = documents.sort(-1).values if in_order else documents
    if choose.random() < 0.3:
        policies = ("list", "dense", "streaming", "off")
        options["head_policy"] = [choose.choice(policies) for _ in range(heads)]
    if choose.random() < 0.2:
        options["softcap"] = 3.0
    if choose.random() < 0.2:
        tensors["sink_logits"] = normal(heads)
    return tensors, plan, options


@settings(max_examples=4)
@given(problems())
def test_random_problems(problem: Any) -> None:
    tensors, plan, options = problem
    check(tensors, plan, **options)


@pytest.mark.heavy
@pytest.mark.sweep
@settings(max_examples=60)
@given(problems(dtypes=DTYPES, dims=(8, 32, 64, 100)))
def test_more_random_problems(problem: Any) -> None:
    tensors, plan, options = problem
    check(tensors, plan, **options)


# ---- blocks and tiles ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "block", "key_block"), [(20, 1, 16), (70, 16, 1), (130, 128, 64), (129, 40, 100)]
)
def test_blocks_of_any_size(tokens: int, block: int, key_block: int) -> None:
    plan = lists(tokens, block, 3, keys=150, key_block=key_block)
    check(qkv((tokens,), (150,)), plan)


def test_boxes_with_ragged_edges() -> None:
    indices = torch.randint(-1, 6, (1, 2, 8, 3), generator=torch.Generator().manual_seed(0))
    plan = BlockPlan.of(indices, (9, 13), (5, 4), (7, 11), (4, 4))
    check(qkv((9, 13), (7, 11), heads=2), plan, head_policy=["list", "dense"])


def test_one_walk_for_neighbours_that_list_the_same() -> None:
    """Blocks of 16 queries that all list one block of keys: the tile walks over it once."""
    tensors, shared = qkv((64,), dim=32), torch.zeros(1, 1, 4, 1, dtype=torch.int32)
    once = BlockPlan.of(shared, 64, 16, 64, 64)
    reports = check(tensors, once, grads=False)
    flops = reports[0].instructions()["mma"]
    whole = BlockPlan.of(shared[:, :, :1], 64, 64, 64, 64)
    assert check(tensors, whole, grads=False)[0].instructions()["mma"] == flops


def test_one_query_against_many_blocks() -> None:
    """Few tiles: blocks share their walks, and a second kernel adds up what they have."""
    tensors = qkv((1,), (900,), heads=2, kv_heads=1)
    tensors["sink_logits"] = normal(2)
    indices = torch.randperm(56, generator=torch.Generator().manual_seed(0)).view(1, 1, 1, 56)
    plan = BlockPlan.of(indices[..., :40], 1, 1, 900, 16)
    reports = check(tensors, plan, grads=False, window_size=50, head_policy=["list", "streaming"])
    assert [r.kernel for r in reports] == ["routed_forward_bf16_32", "routed_merge_bf16"]


def test_nothing_is_listed() -> None:
    plan = BlockPlan.of(torch.full((1, 1, 5, 2), -1), 70, 16)
    check(qkv((70,)), plan)
    plan = BlockPlan.of(torch.zeros(1, 1, 5, 0, dtype=torch.int32), 70, 16)
    check(qkv((70,)), plan, sinks=2)


def test_lists_of_compressed_rows() -> None:
    mask = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    plan = BlockPlan.of_mask(mask, 70, 16, 80, 16)
    check(qkv((70,), (80,), batch=2), plan, is_causal=True)


def test_blocks_of_unlike_sizes() -> None:
    queries = Blocks((80,), torch.tensor([0, 3, 3, 75, 80], dtype=torch.int32))
    keys = Blocks((90,), torch.tensor([0, 1, 81, 81, 90], dtype=torch.int32))
    indices = torch.tensor([[[[0, 1], [1, 1], [3, 0], [2, 1]]]])
    check(qkv((80,), (90,)), BlockPlan.of(indices, 80, queries, 90, keys))


# ---- rules ---------------------------------------------------------------------------------------


def test_window_and_sinks_beside_lists() -> None:
    tensors = qkv((150,), heads=2)
    check(tensors, lists(150, 16, 4, heads=2), is_causal=True, window_size=40, sinks=5)


def test_policies_of_heads() -> None:
    tensors = qkv((100,), heads=4, kv_heads=2)
    policy = ["list", "dense", "streaming", "off"]
    options: Any = {"window_size": 20, "sinks": 3, "is_causal": True, "exclude_self": True}
    check(tensors, lists(100, 16, 2, heads=2), head_policy=policy, **options)


def test_documents_and_lengths() -> None:
    documents = torch.tensor([[0] * 30 + [1] * 40 + [4] * 30, [2] * 50 + [3] * 50])
    tensors = qkv((100,), batch=2)
    check(
        tensors,
        lists(100, 16, 4),
        query_documents=documents,
        key_documents=documents.flip(0).sort(-1).values,
        window_size=(5, 5),
        key_lengths=torch.tensor([100, 77]),
    )


def test_biases_of_slots() -> None:
    tensors = qkv((100,), heads=2, kv_heads=1)
    tensors["sink_logits"] = normal(2)
    plan = lists(100, 16, 4, bias=True)
    check(tensors, plan, is_causal=True, window_size=30, sinks=3, softcap=4.0)


@pytest.mark.parametrize("block", [1, 16])
def test_sinks_that_are_not_finite(block: int) -> None:
    """At -inf there is none: rows without keys stay empty. At inf a head's rows are NaN."""
    tensors = qkv((40,), (64,), heads=8, kv_heads=1)
    tensors["sink_logits"] = torch.tensor([-torch.inf] * 4 + [0.5] * 4)
    indices = torch.zeros(1, 1, -(-40 // block), 1, dtype=torch.int32)
    indices[:, :, : 16 // block] = -1
    plan = BlockPlan.of(indices, 40, block, 64, 64)
    check(tensors, plan)
    tensors["sink_logits"][7] = torch.inf
    with on_executor(metrics=False):
        out = routed_attention(**tensors, plan=plan)
    assert torch.equal(out.isnan().all(-1)[0, 16:], torch.arange(8).expand(24, 8) == 7)


def test_gradient_of_biases_that_heads_and_items_share() -> None:
    """Blocks take turns at the heads and batch items of a list, and a slot has several tiles."""
    tensors = qkv((150,), (100,), batch=3, heads=4, kv_heads=2)
    plan = lists(150, 70, 5, keys=100, key_block=16, bias=True)
    check(tensors, plan, head_policy=["list", "dense", "list", "streaming"], window_size=9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_biases_beside_logits_of_minus_infinity(dtype: torch.dtype) -> None:
    tensors = qkv((40,), (70,), 16, dtype)
    tensors["query"].abs_()
    tensors["key"][0, 20, 0, 0] = -torch.inf
    problem = Problem(tensors, lists(40, 16, 3, keys=70, bias=True))
    expected = problem.evaluate()["grad_bias"]
    with on_executor(metrics=False):
        result = problem.evaluate()["grad_bias"]
    assert expected.isfinite().all()
    torch.testing.assert_close(result, expected, rtol=0.03, atol=0.03)


def test_gradient_of_biases_in_rows_of_lists() -> None:
    """CSR: slots that no block has, blocks twice, and heads of their own."""
    indptr = torch.tensor([[[1, 3, 3, 6], [6, 7, 9, 9]]])
    indices = torch.tensor([0, 1, 1, 2, -1, 0, 3, 3, 2, 1])
    plan = BlockPlan.of_csr(indptr, indices, 48, 16, 64, 16, bias=normal(10))
    check(qkv((48,), (64,), heads=2, batch=2), plan, softcap=2.0)


def test_documents_in_any_order() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randint(0, 3, (2, n), generator=generator) for n in (90, 100))
    options: dict[str, Any] = {"query_documents": queries, "key_documents": keys}
    options["window_size"] = (9, 30)
    tensors = qkv((90,), (100,), batch=2, heads=2)
    check(tensors, lists(90, 16, 4, keys=100), head_policy=["list", "dense"], **options)
    check(tensors, lists(90, 16, 4, keys=100, bias=True), sinks=3, exclude_self=True, **options)


def test_rules_beside_queries_out_of_order() -> None:
    for bias in (False, True):
        plan = shuffled(lists(90, 16, 3, keys=100, bias=bias))
        check(
            qkv((90,), (100,), heads=2),
            plan,
            is_causal=True,
            window_size=20,
            sinks=2,
            exclude_self=True,
            head_policy=["list", "streaming"],
        )


def test_documents_beside_keys_out_of_order() -> None:
    """What a tile of keys reaches is not between what its first and its last reach."""
    plan = shuffled(lists(90, 16, 3, keys=150, key_block=16), "key_blocks")
    documents: dict[str, Any] = {"query_documents": torch.arange(90)[None] // 20}
    documents["key_documents"] = torch.arange(150)[None] // 37
    check(qkv((90,), (150,), heads=2), plan, head_policy=["list", "dense"], **documents)


@pytest.mark.parametrize("in_order", [True, False])
def test_documents_of_maps(in_order: bool) -> None:
    """Boxes, whose tokens are never in order."""
    generator = torch.Generator().manual_seed(1)
    queries, keys = (torch.randint(0, 3, (1, n), generator=generator) for n in (117, 77))
    if in_order:
        queries, keys = queries.sort(-1).values, keys.sort(-1).values
    indices = torch.randint(-1, 6, (1, 2, 8, 3), generator=generator)
    plan = BlockPlan.of(indices, (9, 13), (5, 4), (7, 11), (4, 4), bias=normal(1, 2, 8, 3))
    check(
        qkv((9, 13), (7, 11), heads=2),
        plan,
        head_policy=["list", "dense"],
        query_documents=queries,
        key_documents=keys,
    )


def test_spans_that_overlap_and_have_biases() -> None:
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, 90, (1, 2, 7, 5), generator=generator)
    ends = (starts + torch.randint(-9, 60, starts.shape, generator=generator)).clamp(max=100)
    plan = BlockPlan.of_spans(starts, ends, 100, 16, 100, bias=normal(*starts.shape))
    check(qkv((100,), heads=2), plan, window_size=7)


def test_policies_of_more_heads_than_parameters_hold() -> None:
    policy = ["off"] * 1030
    policy[3], policy[1029] = "dense", "list"
    tensors = qkv((3,), (5,), dim=8, heads=1030, kv_heads=1)
    check(tensors, lists(3, 3, 1, keys=5), head_policy=policy)


def test_heads_that_share_lists_share_a_tile() -> None:
    """Lists of tokens: eight heads of a group by eight tokens are a tile."""
    tensors = qkv((20,), (256,), heads=16, kv_heads=2, batch=2)
    tensors["sink_logits"] = normal(16)
    check(tensors, lists(20, 1, 2, keys=256, key_block=64, heads=2, batch=2))
    alike = BlockPlan.of(torch.zeros(1, 1, 20, 1, dtype=torch.int32), 20, 1, 256, 64)
    reports = check(tensors, alike, head_policy=["list"] * 16)
    assert reports[0].instructions()["mma"] == 2 * 2 * (2 * 4 + 2) * 32  # the last tile's half
    others = ["list", "dense"] * 8  # heads of a group that differ are not packed
    check(tensors, alike, grads=False, head_policy=others)


def test_biases_of_heads_that_share_a_tile() -> None:
    plan = lists(30, 2, 2, keys=70, key_block=16, bias=True)
    check(qkv((30,), (70,), heads=6, kv_heads=2), plan, window_size=9, is_causal=True)


def test_lists_of_tokens_are_walked_together() -> None:
    """A tile's queries that list the same blocks share a walk: each block is walked once."""
    tensors = qkv((64,), (256,))
    generator = torch.Generator().manual_seed(0)
    alike = torch.stack([torch.randperm(4, generator=generator)[:3] for _ in range(64)])
    plan = BlockPlan.of(alike.view(1, 1, 64, 3), 64, 1, 256, 64)
    reports = check(tensors, plan)
    assert reports[0].instructions()["mma"] == 4 * 4 * 32  # steps, warps, products of a step


# ---- every kernel --------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        pytest.param(torch.float16, marks=pytest.mark.sweep),
        pytest.param(torch.float32, marks=pytest.mark.sweep),
    ],
)
@pytest.mark.parametrize(("dim", "dim_v"), [(16, 16), (30, 53), (64, 64), (128, 80), (256, 256)])
def test_every_bucket(dim: int, dim_v: int, dtype: torch.dtype) -> None:
    tensors = qkv((90,), (90,), dim, dtype, heads=2, kv_heads=1, dim_v=dim_v)
    options: dict[str, Any] = {"is_causal": True, "window_size": 12, "sinks": 2}
    check(tensors, lists(90, 16, 3), **options)
    tensors["sink_logits"] = normal(2)
    check(tensors, lists(90, 16, 3, bias=True), **options)


def test_rows_anywhere() -> None:
    """Rows that are cut out of wider ones, and do not begin at multiples of 16 bytes."""
    tensors = {
        n: torch.cat([x, x * torch.nan], -1)[..., :30] for n, x in qkv((70,), dim=25).items()
    }
    tensors = {n: x[..., :25] for n, x in tensors.items()}
    check(tensors, lists(70, 16, 2), window_size=4)


def test_what_is_not_finite_stays_with_those_who_attend_it() -> None:
    tensors = qkv((12,))
    tensors["value"][0, 5, 0, 3] = torch.inf
    tensors["key"][0, 8, 0] = torch.nan
    plan = BlockPlan.of(torch.arange(6).view(1, 1, 6, 1), 12, 2)
    grad = normal(1, 12, 1, 32, dtype=torch.bfloat16)

    def run() -> list[Tensor]:
        leaves = {n: x.detach().requires_grad_() for n, x in tensors.items()}
        out, lse = routed_attention(**leaves, plan=plan, window_size=3, return_lse=True)
        return [out, lse, *torch.autograd.grad((out, lse), list(leaves.values()), (grad, lse * 0))]

    expected = run()
    with on_executor(metrics=False):
        results = run()
    for mine, other in zip(results, expected, strict=True):
        finite = torch.isfinite(other)
        assert torch.equal(torch.isfinite(mine), finite)
        assert 0 < finite.sum() < finite.numel()
        torch.testing.assert_close(mine[finite], other[finite], rtol=0.03, atol=0.03)
