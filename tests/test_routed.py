# SPDX-License-Identifier: Apache-2.0
"""Routed attention against its specification, and what must hold of it whatever the numbers."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routed_problems import Problem, attend, problems, specification
from test_window import assert_same_bits

import attnext
from attnext import BlockPlan, Blocks, routed_attention, sliding_window_attention
from attnext.testing import assert_within_budget, available_isas, evaluate, isa, threads

ISAS = available_isas()
F64 = torch.float64


def run(problem: Problem) -> dict[str, torch.Tensor]:
    return evaluate(attend(problem), problem.tensors, problem.options, problem.cotangents)


def check(problem: Problem) -> None:
    """Within the budget on every ISA level, and the same to the last bit for any thread count."""
    results = []
    for name in ISAS:
        with isa(name):
            with threads(1):
                results.append(run(problem))
            with threads(2):
                assert_same_bits(results[-1], run(problem))
    with threads(1):
        assert_within_budget(
            results,
            specification(problem),
            problem.tensors,
            problem.options,
            problem.cotangents,
        )


@given(problems())
def test_random_problems(problem):
    check(problem)


@pytest.mark.heavy
@settings(settings.get_profile("heavy"))
@given(problems())
def test_many_problems(problem):
    check(problem)


def normal(*shape, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def qkv(tokens, heads=2, kv_heads=None, dim=16, batch=1, dtype=F64, keys=None):
    kv_heads, keys = kv_heads or heads, keys or tokens
    tokens, keys = ((n,) if isinstance(n, int) else n for n in (tokens, keys))
    return (
        normal(batch, *tokens, heads, dim, dtype=dtype, seed=1),
        normal(batch, *keys, kv_heads, dim, dtype=dtype, seed=2),
        normal(batch, *keys, kv_heads, dim, dtype=dtype, seed=3),
    )


def every_block(nq, nk):
    return torch.arange(nk).expand(1, 1, nq, nk)


def results(plan, *tensors, **options):
    """Outputs, lse and the gradients of all tensors."""
    names = ("query", "key", "value")

    def call(**given):
        return routed_attention(**given, plan=plan, **options)

    out = (*tensors[0].shape[:-1], tensors[2].shape[-1])
    cotangents = normal(*out, seed=7), normal(*out[:-1], seed=8)
    return evaluate(call, dict(zip(names, tensors, strict=True)), None, cotangents)


def assert_close(one, other, tolerance=1e-11):
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance)


# ---- identities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [(1, 1), (7, 16), (64, 5), (128, 128)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_all_blocks_are_dense_attention(blocks, is_causal):
    tensors = qkv(131, heads=4, kv_heads=2)
    nq, nk = (-(-131 // size) for size in blocks)
    plan = BlockPlan.of(every_block(nq, nk), 131, blocks[0], 131, blocks[1])

    def dense(**given):
        return sliding_window_attention(**given, window_size=None, is_causal=is_causal)

    out = tensors[0].shape
    cotangents = normal(*out, seed=7), normal(*out[:-1], seed=8)
    names = ("query", "key", "value")
    expected = evaluate(dense, dict(zip(names, tensors, strict=True)), None, cotangents)
    assert_close(results(plan, *tensors, is_causal=is_causal), expected)


def test_one_block_is_attention_over_that_block():
    q, k, v = qkv(40, keys=64)
    plan = BlockPlan.of(torch.full((1, 1, 5, 1), 2), 40, 8, 64, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k[:, 32:48], v[:, 32:48]))
    ).transpose(1, 2)
    torch.testing.assert_close(routed_attention(q, k, v, plan), expected)


def test_own_block_is_block_local_attention():
    q, k, v = qkv(96)
    plan = BlockPlan.of(torch.arange(6).view(1, 1, 6, 1), 96, 16)
    expected = attnext.window_attention(q, k, v, 16)
    torch.testing.assert_close(routed_attention(q, k, v, plan), expected)


def test_regions_of_a_map_are_windows_of_it():
    q, k, v = qkv((9, 10))
    regions = Blocks.of((9, 10), 4)
    assert regions.grid == (3, 3) and regions.counts.tolist() == [16, 16, 8, 16, 16, 8, 4, 4, 2]
    plan = BlockPlan.of(torch.arange(9).view(1, 1, 9, 1), (9, 10), 4)
    expected = attnext.window_attention(q, k, v, 4)
    torch.testing.assert_close(routed_attention(q, k, v, plan), expected)


def test_window_and_sinks_alone_are_a_sliding_window():
    tensors = qkv(150, heads=4, kv_heads=2)
    nothing = torch.full((1, 1, 150, 0), -1)
    plan = BlockPlan.of(nothing, 150, 1)
    expected = sliding_window_attention(*tensors, 20, sinks=3)
    out = routed_attention(*tensors, plan, is_causal=True, window_size=20, sinks=3)
    torch.testing.assert_close(out, expected)
    policy = ["streaming", "dense", "off", "streaming"]
    every = BlockPlan.of(every_block(10, 10), 150, 16)
    mixed = routed_attention(
        *tensors, every, is_causal=True, window_size=20, sinks=3, head_policy=policy
    )
    torch.testing.assert_close(mixed[:, :, [0, 3]], expected[:, :, [0, 3]])
    dense = sliding_window_attention(*tensors, None)
    torch.testing.assert_close(mixed[:, :, 1], dense[:, :, 1])
    assert not mixed[:, :, 2].any()


def test_within_is_a_limit_and_not_a_window():
    tensors = qkv(100)
    plan = BlockPlan.of(every_block(100, 7), 100, 1, 100, 16)
    expected = sliding_window_attention(*tensors, (9, 4), is_causal=False)
    torch.testing.assert_close(routed_attention(*tensors, plan, within=(9, 4)), expected)


@pytest.mark.parametrize("block", [16, 1])  # walked list by list, and keys first
def test_order_of_a_list_and_duplicates_do_not_matter(block):
    tensors = qkv(200, heads=4, kv_heads=2, dtype=torch.float32)
    rows = -(-200 // block)
    lists = torch.stack([torch.randperm(13)[:6] for _ in range(4 * rows)]).view(1, 4, rows, 6)

    def of(lists):
        return results(BlockPlan.of(lists, 200, block, 200, 16), *tensors, is_causal=True)

    one = of(lists)
    shuffled = lists[..., torch.randperm(6)]
    again = torch.cat([lists.flip(-1), shuffled, torch.full((1, 4, rows, 2), -1)], -1)
    for other in (shuffled, again):
        assert_same_bits(one, of(other))
    spans = lists * 16
    ends = (spans + 16).clamp(max=200)
    overlapping = BlockPlan.of_spans(
        torch.cat([spans, spans], -1), torch.cat([ends, (spans + 5).clamp(max=200)], -1), 200,
        block,
    )  # fmt: skip
    found = results(overlapping, *tensors, is_causal=True)
    if block > 1:
        return assert_same_bits(one, found)
    for name in one:  # spans share keys in tiles of their own
        torch.testing.assert_close(one[name], found[name], rtol=1e-5, atol=1e-5)


def test_listed_and_in_the_window_counts_once():
    q, k, v = qkv(64)
    plan = BlockPlan.of(every_block(4, 4), 64, 16)
    alone = routed_attention(q, k, v, plan, is_causal=True)
    both = routed_attention(q, k, v, plan, is_causal=True, window_size=40, sinks=9)
    torch.testing.assert_close(both, alone, rtol=1e-13, atol=1e-13)


def test_split_lists_merge_to_the_whole():
    tensors = tuple(t.requires_grad_() for t in qkv(96))
    lists = torch.stack([torch.randperm(6)[:4] for _ in range(6)]).view(1, 1, 6, 4)
    whole = routed_attention(*tensors, BlockPlan.of(lists, 96, 16))
    parts = [
        routed_attention(*tensors, BlockPlan.of(part, 96, 16), return_lse=True)
        for part in (lists[..., :1], lists[..., 1:])
    ]
    merged, _ = attnext.merge_attentions(*zip(*parts, strict=True))
    torch.testing.assert_close(merged, whole)
    cotangent = normal(*whole.shape, seed=9)
    expected = torch.autograd.grad(whole, tensors, cotangent)
    for one, other in zip(torch.autograd.grad(merged, tensors, cotangent), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_lists_may_be_shared_by_batch_and_heads():
    tensors = qkv(80, heads=6, kv_heads=2, batch=2)
    lists = torch.stack([torch.randperm(5)[:2] for _ in range(5)]).view(1, 1, 5, 2)
    expected = results(BlockPlan.of(lists, 80, 16), *tensors)
    for shape in ((2, 6), (1, 6), (2, 1), (1, 2), (2, 2)):
        plan = BlockPlan.of(lists.expand(*shape, 5, 2), 80, 16)
        assert_close(results(plan, *tensors), expected)


def test_biases_weigh_blocks():
    """A bias of ln w on a block is a weight of w; -inf leaves it out."""
    q, k, v = qkv(64)
    lists = torch.tensor([0, 1, 2]).expand(1, 2, 4, 3)
    bias = torch.tensor([0.0, -torch.inf, 1.0], dtype=F64).expand(1, 2, 4, 3)
    plan = dataclasses.replace(BlockPlan.of(lists, 64, 16), bias=bias)
    parts = [
        routed_attention(q, k, v, BlockPlan.of(lists[..., i : i + 1], 64, 16), return_lse=True)
        for i in (0, 2)
    ]
    (first, first_lse), (last, last_lse) = parts
    expected, lse = attnext.merge_attentions((first, last), (first_lse, last_lse + 1.0))
    out, got = routed_attention(q, k, v, plan, return_lse=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(got, lse)


# ---- rows, long lists, memory --------------------------------------------------------------------


def test_no_keys_give_zero_and_minus_infinity():
    plan = BlockPlan.of(torch.full((1, 1, 4, 3), -1), 64, 16)
    got = results(plan, *qkv(64))
    assert (got["lse"] == -torch.inf).all()
    for name in ("out", "grad_query", "grad_key", "grad_value"):
        assert not got[name].any()


@pytest.mark.parametrize("tokens, keys", [(0, 16), (16, 0), (1, 1)])
def test_lengths_of_nothing_and_one(tokens, keys):
    q, k, v = (normal(2, n, 2, 8) for n in (tokens, keys, keys))
    lists = torch.zeros(1, 1, -(-tokens // 16), int(keys > 0), dtype=torch.int64)
    plan = BlockPlan.of(lists, tokens, 16, keys, 16)
    got = results(plan, q, k, v)
    assert got["out"].shape == q.shape and got["grad_key"].shape == k.shape
    if tokens == keys == 1:
        torch.testing.assert_close(got["out"], v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_stays_where_it_is_attended(dtype):
    q, k, v = qkv(96, dtype=dtype)
    lists = torch.arange(6).view(1, 1, 6, 1)
    plan = BlockPlan.of(torch.cat([lists, lists * 0 + 5], -1), 96, 16)
    expected = results(plan, q, k, v)
    k[0, 20, 0, 3] = torch.nan
    v[0, 37, 1, 0] = torch.inf
    got = results(plan, q, k, v)
    touched = torch.zeros(96, 2, dtype=torch.bool)
    touched[16:32, 0] = True
    touched[32:48, 1] = True
    for name in ("out", "grad_query"):
        bad = ~got[name][0].isfinite().all(-1)
        assert torch.equal(bad, touched), name
        clean = ~touched[None, :, :, None]
        torch.testing.assert_close(
            torch.where(clean, got[name], 0), torch.where(clean, expected[name], 0),
            rtol=0.0, atol=0.0,
        )  # fmt: skip


def test_one_query_over_many_blocks_is_shared_out():
    """Decoding: so long a walk is split, and the parts give what the whole gives."""
    q, k, v = qkv(1, heads=2, kv_heads=1, keys=20000, dtype=torch.float32)
    lists = torch.randperm(313)[:200].view(1, 1, 1, 200)
    plan = BlockPlan.of(lists, 1, 1, 20000, 64)
    out, lse = routed_attention(q, k, v, plan, return_lse=True)
    rows = torch.cat([torch.arange(64 * b, min(64 * b + 64, 20000)) for b in lists.flatten()])
    s = torch.einsum("hd,kd->hk", q[0, 0].double(), k[0, rows, 0].double()) / 4
    torch.testing.assert_close(lse[0, 0], s.logsumexp(-1).float())
    torch.testing.assert_close(out[0, 0], (s.softmax(-1) @ v[0, rows, 0].double()).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("queries", "block", "keys", "size", "slots"),
    [(1, 1, 9000, 64, 40), (4, 1, 3000, 30, 60), (300, 100, 700, 50, 6), (200, 1, 200, 1, 30)],
)
def test_other_batch_items_change_no_bit(queries, block, keys, size, slots, dtype):
    """Neither what they hold nor how many there are."""
    q, k, v = qkv(queries, heads=4, kv_heads=2, batch=4, keys=keys, dtype=dtype)
    rows = 4, 1, -(-queries // block)
    scores = normal(*rows, -(-keys // size), seed=6)
    lists = scores.argsort(-1)[..., :slots].contiguous()
    lists[1:, ..., slots // 3 :] = -1  # shorter walks
    cotangents = normal(*q.shape, seed=7), normal(*q.shape[:-1], seed=8)

    def first_of(count):
        plan = BlockPlan.of(lists[:count], queries, block, keys, size)
        given = {"query": q[:count], "key": k[:count], "value": v[:count]}
        grads = cotangents[0][:count], cotangents[1][:count]
        found = evaluate(routed_attention, given, {"plan": plan}, grads)
        return {name: x[:1] for name, x in found.items()}

    for name in available_isas():
        with isa(name):
            alone = first_of(1)
            for count in (2, 4):
                assert_same_bits(alone, first_of(count))


# ---- lists of few queries ------------------------------------------------------------------------


@st.composite
def shared_problems(draw):
    """Many queries with lists of their own, far more than a tile holds: keys are walked first."""
    dtype = draw(st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16)))
    kv_heads, group = draw(st.sampled_from(((1, 1), (2, 1), (1, 3), (2, 2))))
    per_head = draw(st.booleans())
    queries, keys = draw(st.sampled_from(((300, 300), (200, 333), (260, 150))))
    block = draw(st.sampled_from((1, 1, 2)))
    heads, list_heads = kv_heads * group, kv_heads * group if per_head else kv_heads
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def integers(high, *size, low=0):
        return torch.randint(low, high, size, generator=generator)

    rows = (1, list_heads, -(-queries // block))
    form = draw(st.sampled_from(("blocks", "short blocks", "spans")))
    if form == "spans":
        starts = integers(keys, *rows, 3)
        ends = (starts + integers(60, *rows, 3, low=-4)).clamp(max=keys)
        plan = BlockPlan.of_spans(starts, ends, queries, block, keys)
    else:
        size = 40 if form == "blocks" else 5
        slots = 3 if form == "blocks" else 9
        lists = integers(-(-keys // size), *rows, slots, low=-1)
        plan = BlockPlan.of(lists, queries, block, keys, size)
    acc = F64 if dtype == F64 else torch.float32
    tensors = {
        "query": normal(1, queries, heads, 16, dtype=dtype, seed=1),
        "key": normal(1, keys, kv_heads, 16, dtype=dtype, seed=2),
        "value": normal(1, keys, kv_heads, 9, dtype=dtype, seed=3),
    }
    options = {"softcap": draw(st.sampled_from((None, 3.0)))}
    if draw(st.booleans()):
        tensors["sink_logits"] = normal(heads, dtype=acc, seed=4)
    if draw(st.booleans()):
        options |= {
            "is_causal": draw(st.booleans()),
            "exclude_self": draw(st.booleans()),
            "within": draw(st.sampled_from((None, (70, None)))),
            "key_lengths": torch.tensor([keys - 20]),
            "query_documents": integers(2, 1, queries),
            "key_documents": integers(2, 1, keys),
        }
        if draw(st.booleans()):
            del options["query_documents"], options["key_documents"]
    cotangents = normal(1, queries, heads, 9, seed=5), normal(1, queries, heads, seed=6)
    return Problem(tensors, plan, options, cotangents)


@settings(max_examples=8)
@given(shared_problems())
def test_lists_of_few_queries(problem):
    check(problem)


@pytest.mark.heavy
@settings(settings.get_profile("heavy"))
@given(shared_problems())
def test_many_lists_of_few_queries(problem):
    check(problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_stays_where_it_is_attended_by_few(dtype):
    """Queries that share keys with others keep to their own."""
    q, k, v = qkv(256, dtype=dtype)
    lists = torch.stack([torch.arange(256) % 7, torch.arange(256) % 5 + 1], -1)[None, None]
    plan = BlockPlan.of(lists, 256, 1, 256, 32)
    expected = results(plan, q, k, v, is_causal=True)
    k[0, 40, 0, 3] = torch.nan  # in block 1
    v[0, 70, 1, 0] = torch.inf  # in block 2
    q[0, 250, 0, 1] = torch.inf
    got = results(plan, q, k, v, is_causal=True)
    rows = torch.arange(256)
    touched = torch.zeros(256, 2, dtype=torch.bool)
    touched[:, 0] = ((lists[0, 0] == 1).any(-1) & (rows >= 40)) | (rows == 250)
    touched[:, 1] = (lists[0, 0] == 2).any(-1) & (rows >= 70)
    for name in ("out", "grad_query"):
        assert torch.equal(~got[name][0].isfinite().all(-1), touched), name
        clean = ~touched[None, :, :, None]
        torch.testing.assert_close(
            torch.where(clean, got[name], 0), torch.where(clean, expected[name], 0),
            rtol=0.0, atol=0.0,
        )  # fmt: skip

    q, k, v = qkv(256, dtype=dtype)
    q[0, 250, 0, 1] = torch.inf  # it lists blocks 5 and 1: no other key hears of it
    got = results(plan, q, k, v, is_causal=True)
    hears = torch.zeros(256, 2, dtype=torch.bool)
    hears[:, 0] = (rows // 32 == 5) | (rows // 32 == 1)
    for name in ("grad_key", "grad_value"):
        assert torch.equal(~got[name][0].isfinite().all(-1), hears), name
        assert torch.equal(got[name][0][~hears], expected[name][0][~hears]), name


def test_sums_over_many_queries_do_not_drift():
    """A key that 16384 queries attend; added one at a time, its gradients were off by 2.5e-7."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, n, 1, 16, generator=generator) for n in (16384, 64, 64))
    cotangent = 1 + torch.rand(1, 16384, 1, 16, generator=generator)
    plan = BlockPlan.of(torch.zeros(1, 1, 256, 1, dtype=torch.int32), 16384, 64, 64, 64)

    def grads(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (query / 10, key, value)]
        out = attnext.routed_attention(*leaves, plan)
        return torch.autograd.grad(out, leaves[1:], cotangent.to(dtype))

    for name, got, exact in zip("kv", grads(torch.float32), grads(torch.float64), strict=True):
        error = (got - exact).norm() / exact.norm()
        assert error < 2e-7, f"gradient of {name}: {error:.1e}"


@pytest.mark.parametrize("compiled", [False, True])
def test_documents_of_64_bits(compiled):
    """Ids that are equal in their lower half are not the same document."""
    attend = attnext.routed_attention
    if compiled:
        attend = torch.compile(attend, fullgraph=True, backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 1, 4, generator=generator) for _ in range(3))
    plan = attnext.BlockPlan.of(torch.zeros(1, 1, 1, 1, dtype=torch.int32), 4, 4)
    documents = torch.tensor([[0, 2**32, 2**32, -(2**40)]])
    small = torch.tensor([[1, 2, 2, 0]])
    for of_keys, known in ((documents, small), (documents.clone(), small.clone())):
        got = attend(q, k, v, plan, query_documents=documents, key_documents=of_keys)
        want = attnext.routed_attention(q, k, v, plan, query_documents=small, key_documents=known)
        assert torch.equal(got, want)
    torch.testing.assert_close(got[:, [0, 3]], v[:, [0, 3]])
