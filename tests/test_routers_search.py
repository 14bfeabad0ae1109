# SPDX-License-Identifier: Apache-2.0
"""Routers that search a sequence: against loops in float64, and what must hold of any of them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LAYOUTS, lay_out

import attnext
from attnext import reference_search as reference
from attnext.routers.hip import (
    InfiniteHipDecoder,
    hip_attention,
    hip_plan,
    infinite_hip_plan,
)
from attnext.routers.longheads import (
    longheads_attention,
    longheads_chunk_keys,
    longheads_plan,
)
from attnext.routers.minference import AShape, BlockSparse, minference_attention
from attnext.routers.superlinear import (
    superlinear_attention,
)

F64 = torch.float64


def normal(*shape, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def whole(*shape, seed=0, most=2):
    """Small whole numbers: scores are exact in any order of summation, and often equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).double()


# ---- HiP -----------------------------------------------------------------------------------------


def heads(draw):
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    return kv_heads, kv_heads * group


def lists_of(plan):
    return [
        [[[x for x in row if x >= 0] for row in head] for head in item]
        for item in plan.lists.tolist()
    ]


@st.composite
def halvings(draw):
    kv_heads, all_heads = heads(draw)
    batch, queries, keys = (
        draw(st.integers(1, 2)),
        draw(st.integers(0, 60)),
        draw(st.integers(0, 60)),
    )
    key_block = draw(st.integers(1, 3))
    options = {
        "mask_k": key_block * draw(st.integers(1, 5)),
        "key_block": key_block,
        "query_block": draw(st.integers(1, 9)),
        "query_stride": draw(st.integers(1, 4)),
        "representative": draw(st.sampled_from(["centre", "first"])),
        "is_causal": draw(st.booleans()),
        "share_heads": draw(st.booleans()),
    }
    seed = draw(st.integers(0, 2**31))
    query = whole(batch, queries, all_heads, 2, seed=seed)
    return query, whole(batch, keys, kv_heads, 2, seed=seed + 1), options


@settings(max_examples=60)
@given(halvings())
def test_hip(problem):
    query, key, options = problem
    key[:, 5:7, :, 1] = math.nan  # the lowest of all
    plan = hip_plan(query, key, **options)
    assert lists_of(plan) == reference.hip_blocks(query, key, **options)
    for row in plan.lists.flatten(0, 2).tolist():
        blocks = [x for x in row if x >= 0]
        assert len(set(blocks)) == len(blocks)


def test_hip_finds_what_stands_out_and_short_ones_are_dense():
    """A rise towards one key is climbed from any distance; few keys are all attended."""
    place = 777
    key = -(torch.arange(1000, dtype=F64) - place).abs().view(1, -1, 1, 1) / 100
    query = torch.ones(1, 1000, 1, 1, dtype=F64)
    plan = hip_plan(query, key, mask_k=16, query_block=32)
    for i, row in enumerate(lists_of(plan)[0][0]):
        seen = min((i + 1) * 32, 1000)
        assert min(place, seen - 1) // 2 in row or seen - 1 - 32 < place < seen
    q, k, v = (normal(2, 50, 2, 4, seed=n) for n in range(3))
    dense = attnext.sliding_window_attention(q, k, v, None)
    out = hip_attention(q, k, v, mask_k=64, window_size=None, sinks=0)
    torch.testing.assert_close(out, dense)
    # Queries of any length against a cache.
    out = hip_attention(q[:, -3:], k, v, mask_k=50, window_size=None, sinks=0)
    torch.testing.assert_close(out, dense[:, -3:])


def test_hip_never_writes_scores_of_all_pairs():
    """Scores grow as N log N: counted in the products that the search asks for."""
    counts = {}

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.attnext.largest_products.default:
                counts[tokens] += out.numel() * args[0].shape[3]
            return out

    for tokens in (1024, 2048, 4096):
        counts[tokens] = 0
        x = normal(1, tokens, 1, 4, dtype=torch.float32)
        with Counter():
            hip_plan(x, x, mask_k=32)
        rounds = math.log2(tokens / 32)
        assert counts[tokens] == tokens / 2 * 2 * 16 * rounds


@st.composite
def prunings(draw):
    kv_heads, all_heads = heads(draw)
    batch, queries, keys = (
        draw(st.integers(1, 2)),
        draw(st.integers(0, 40)),
        draw(st.integers(0, 90)),
    )
    size, chunk, stages = draw(st.sampled_from([1, 4, 8])), draw(st.sampled_from([6, 8, 16])), []
    for n in range(draw(st.integers(1, 3))):
        keep = chunk * draw(st.integers(1, 4))
        stages.append((size, draw(st.integers(1, 4)), chunk, keep))
        size = size if n else max(size // 2, 1)
        chunk = chunk // 2 if chunk % 2 == 0 else chunk
    options = {
        "stages": tuple(stages),
        "block_size": draw(st.sampled_from([1, 3, 8, 16])),
        "sinks": draw(st.integers(0, 9)),
        "window_size": draw(st.integers(1, 12)),
        "query_reduce": draw(st.sampled_from(["stride", "mean"])),
        "share_heads": draw(st.booleans()),
    }
    seed = draw(st.integers(0, 2**31))
    # Multiples of 12: the mean of up to four is exact.
    query = 12 * whole(batch, queries, all_heads, 2, seed=seed)
    return query, whole(batch, keys, kv_heads, 2, seed=seed + 1), options


@settings(max_examples=60)
@given(prunings())
def test_infinite_hip(problem):
    query, key, options = problem
    key[:, 15:19, :, 1] = math.nan
    plan = infinite_hip_plan(query, key, **options)
    assert lists_of(plan) == reference.infinite_hip_blocks(query, key, **options)
    for row in plan.lists.flatten(0, 2).tolist():
        blocks = [x for x in row if x >= 0]
        assert blocks == sorted(set(blocks)) == row[: len(blocks)]


def test_infinite_hip_keeps_all_of_few():
    q, k, v = (normal(1, 70, 2, 4, seed=n) for n in range(3))
    options = {"sinks": 4, "window_size": 8}
    plan = infinite_hip_plan(q, k, stages=((16, 4, 16, 64), (16, 2, 4, 64)), **options)
    out = attnext.routed.routed_attention(q, k, v, plan, is_causal=True, **options)
    torch.testing.assert_close(out, attnext.sliding_window_attention(q, k, v, None))


def test_infinite_hip_decoder():
    """A step on which every stage is due gives a fresh plan; between, stages stay as they were."""
    stages, intervals = ((1, 1, 16, 32), (1, 1, 4, 8)), (4, 2)
    options = {"stages": stages, "block_size": 4, "sinks": 2, "window_size": 6}
    keys, queries = normal(1, 140, 2, 3, seed=1), normal(1, 40, 2, 3, seed=2)
    decoder = InfiniteHipDecoder(intervals=intervals, **options)
    plans, fresh = [], []
    for t in range(12):
        seen, query = keys[:, : 100 + t], queries[:, t : t + 1]
        plans.append(lists_of(decoder.plan(query, seen)))
        fresh.append(lists_of(infinite_hip_plan(query, seen, **options)))
    for t in range(12):
        assert plans[t] == (fresh[t] if t % 4 == 0 else plans[t] if t % 2 == 0 else plans[t - 1])
    assert plans != fresh and plans[2] != plans[1]


@pytest.mark.parametrize(
    "queries, keys, match",
    [
        ((2, 1, 2, 3), (2, 101, 2, 3), "query must keep the shape"),
        ((1, 1, 4, 3), (1, 101, 2, 3), "query must keep the shape"),
        ((1, 1, 2, 3), (1, 101, 1, 3), "key must keep the heads"),
        ((1, 1, 2, 3), (1, 99, 2, 3), "no fewer tokens"),
        ((1, 1, 2, 3), (1, 0, 2, 3), "key must have at least one token"),
        ((1, 2, 2, 3), (1, 101, 2, 3), "query must be one token"),
    ],
)
def test_infinite_hip_decoder_keeps_to_its_sequence(queries, keys, match):
    options = {"stages": ((1, 1, 16, 32), (1, 1, 4, 8)), "block_size": 4, "sinks": 2}
    decoder = InfiniteHipDecoder(intervals=(4, 2), window_size=6, **options)
    expected = InfiniteHipDecoder(intervals=(4, 2), window_size=6, **options)
    steps = [(normal(1, 1, 2, 3, seed=t), normal(1, 100 + t, 2, 3)) for t in range(3)]
    for t, step in enumerate(steps):
        if t:
            with pytest.raises(ValueError, match=match):
                decoder.plan(normal(*queries), normal(*keys))
        assert lists_of(decoder.plan(*step)) == lists_of(expected.plan(*step))


@pytest.mark.parametrize("reduce", ["stride", "mean"])
@pytest.mark.parametrize("stride", [1, 3, 2**40])
def test_hip_of_sizes_beyond_the_sequence(reduce, stride):
    """As of sizes that are just enough."""
    q, k = normal(1, 20, 2, 4, seed=1), normal(1, 60, 2, 4, seed=2)
    enough = 60 if stride > 20 else 20 * stride
    for size in (2**40 * 3, 2**41 * 3):
        plans = [
            hip_plan(q, k, mask_k=8, query_block=block, query_stride=min(stride, block))
            for block in (size, enough)
        ]
        assert plans[0].lists.tolist() == plans[1].lists.tolist()
        options = {"sinks": 1, "window_size": 2, "block_size": 1, "query_reduce": reduce}
        plans = [
            infinite_hip_plan(
                q, k, **options,
                stages=((many, min(stride, many), many, many), (4, 2, 4, 16), (4, 1, 4, 8)),
            )
            for many in (size // 12 * 12, 120)
        ]  # fmt: skip
        assert lists_of(plans[0]) == lists_of(plans[1])
    wide = infinite_hip_plan(q, k, stages=((size, 1, size, size),), sinks=0, window_size=1)
    assert wide.lists.shape[-1] == 1


@pytest.mark.parametrize(
    "call, change, match",
    [
        ("hip", {"mask_k": 5}, "mask_k"),
        ("hip", {"mask_k": 0}, "mask_k"),
        ("hip", {"representative": "last"}, "representative"),
        ("hip", {"query_stride": 0}, "query_stride"),
        ("hip", {"is_causal": 1}, "is_causal"),
        ("infinite", {"stages": ()}, "stages"),
        ("infinite", {"stages": ((4, 1, 8),)}, "stages"),
        ("infinite", {"stages": ((4, 1, 8, 12),)}, "stages.*keep"),
        ("infinite", {"stages": ((4, 1, 8, 16), (8, 1, 4, 8))}, "stages.*multiples"),
        ("infinite", {"is_causal": False}, "is_causal"),
        ("infinite", {"query_reduce": "max"}, "query_reduce"),
        ("decoder", {"intervals": (4,)}, "intervals"),
        ("decoder", {"intervals": (4, 3, 2)}, "intervals"),
        ("decoder", {"intervals": 4}, "intervals"),
        ("decoder", {"block_size": 0}, "block_size"),
        ("decoder", {"window_size": 0}, "window_size"),
        ("decoder", {"share_heads": 1}, "share_heads"),
    ],
)
def test_hip_errors(call, change, match):
    x = torch.zeros(1, 9, 2, 4)
    calls = {
        "hip": lambda: hip_plan(x, x, **change),
        "infinite": lambda: infinite_hip_plan(x, x, **change),
        "decoder": lambda: InfiniteHipDecoder(**change),
    }
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=match):
        calls[call]()


# ---- LongHeads -----------------------------------------------------------------------------------


def rope(x, positions):
    """Rotary positions of two frequencies, on four dimensions."""
    angle = positions.to(x.dtype)[:, None, None] * torch.tensor([0.9, 0.13], dtype=x.dtype)
    a, b = x[..., 0::2], x[..., 1::2]
    sin, cos = angle.sin(), angle.cos()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def unrotated(x, positions):
    return x


@settings(max_examples=15)
@given(
    tokens=st.integers(0, 40),
    queries=st.integers(0, 40),
    chunk_size=st.integers(1, 7),
    num_chunks=st.integers(3, 6),
    shape=st.sampled_from([(1, 1, 1), (2, 2, 1), (1, 4, 2)]),
    turn=st.booleans(),
    exclude_self=st.booleans(),
    complete=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_longheads(
    tokens, queries, chunk_size, num_chunks, shape, turn, exclude_self, complete, seed
):
    batch, all_heads, kv_heads = shape
    q = normal(batch, tokens, all_heads, 4, seed=seed)
    k, v = (normal(batch, tokens, kv_heads, 4, seed=seed + n) for n in (1, 2))
    rotary = rope if turn else None
    chunk_keys = longheads_chunk_keys(q, k, v, chunk_size, rotary=rotary)
    want = reference.longheads_chunk_keys(q, k, v, chunk_size, rotary or unrotated)
    torch.testing.assert_close(chunk_keys, want, rtol=1e-9, atol=1e-9)
    options = {"chunk_size": chunk_size, "num_chunks": num_chunks, "exclude_self": exclude_self}
    given_keys = chunk_keys[:, : tokens // chunk_size] if complete else chunk_keys
    late = q[:, max(tokens - queries, 0) :]
    got = longheads_attention(late, k, v, rotary=rotary, chunk_keys=given_keys, **options)
    want = reference.longheads_attention(
        late, k, v, rotary=rotary or unrotated, chunk_keys=want, **options
    )
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_longheads_of_short_contexts_is_causal_attention():
    q, k, v = (normal(1, 47, 2, 4, seed=n) for n in range(3))
    at = torch.arange(47)
    dense = attnext.sliding_window_attention(rope(q, at), rope(k, at), v, None, return_lse=True)
    got = longheads_attention(q, k, v, chunk_size=8, num_chunks=6, rotary=rope, return_lse=True)
    for x, y in zip(got, dense, strict=True):
        torch.testing.assert_close(x, y)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out = longheads_attention(*leaves, chunk_size=8, num_chunks=6, rotary=rope)
    want = attnext.sliding_window_attention(
        rope(leaves[0], at), rope(leaves[1], at), leaves[2], None
    )
    for x, y in zip(
        torch.autograd.grad(out.square().sum(), leaves),
        torch.autograd.grad(want.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


def test_longheads_of_more_chunks_than_there_are():
    q, k, v = (normal(1, 20, 2, 4, seed=n) for n in range(3))
    for rotary in (None, lambda x, positions: x):
        out = longheads_attention(q, k, v, chunk_size=4, num_chunks=2**40, rotary=rotary)
        torch.testing.assert_close(out, attnext.sliding_window_attention(q, k, v, None))


def test_longheads_forces_the_ends_against_any_score():
    """Chunk keys of 1e30 and infinity displace neither the first chunk nor the last two."""
    query = torch.ones(1, 64, 1, 1)
    keys = torch.tensor([0, 1, 1e30, math.inf, -2, -math.inf, 2, 0]).view(1, 8, 1, 1)
    plan = longheads_plan(query, keys, 64, chunk_size=8, num_chunks=5)
    lists = plan.lists[0, 0].tolist()
    assert lists[63] == [0, 2, 3, 6, 7] and lists[40] == [0, 2, 3, 4, 5]
    assert lists[0] == [0, -1, -1, -1, -1] and lists[15] == [0, 1, -1, -1, -1]
    equal = longheads_plan(query, torch.ones(1, 8, 1, 1), 64, chunk_size=8, num_chunks=4)
    assert equal.lists[0, 0, 63].tolist() == [0, 1, 6, 7]


@pytest.mark.parametrize(
    "change, match",
    [
        ({"num_chunks": 2}, "num_chunks"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"chunk_keys": torch.zeros(1, 5, 2, 4)}, "chunk_keys"),
        ({"chunk_keys": torch.zeros(1, 2, 1, 4)}, "chunk_keys"),
        ({"query": torch.zeros(1, 3, 2, 4)}, "chunk_keys"),
        ({"value": torch.zeros(1, 9, 2, 5)}, "value"),
        ({"rotary": lambda x, positions: x[..., :1]}, "rotary"),
        ({"rotary": 5}, "rotary must be callable"),
        ({"exclude_self": None}, "exclude_self"),
        ({"return_lse": 3}, "return_lse"),
    ],
)
def test_longheads_errors(change, match):
    tensors = {n: torch.zeros(1, 9, 2, 4) for n in ("query", "key", "value")}
    with pytest.raises((ValueError, TypeError), match=match):
        longheads_attention(**{**tensors, "chunk_size": 4, "num_chunks": 3, **change})


# ---- all of them ---------------------------------------------------------------------------------

ROUTED = {
    "HiP": lambda q, k, v: hip_attention(q, k, v, mask_k=16, window_size=8, sinks=2),
    "HiP shared": lambda q, k, v: hip_attention(q, k, v, mask_k=16, share_heads=True, key_block=4),
    "InfiniteHiP": lambda q, k, v: attnext.routed_attention(
        q, k, v, infinite_hip_plan(q, k, stages=SMALL, sinks=2, window_size=8, block_size=8),
        is_causal=True, window_size=8, sinks=2,
    ),
    "LongHeads": lambda q, k, v: longheads_attention(
        q, k, v, chunk_size=8, num_chunks=4, rotary=rope_of_any
    ),
    "Superlinear": lambda q, k, v: superlinear_attention(q, q, k, v, sw_index=2, backward_factor=1),
    "MInference": lambda q, k, v: minference_attention(
        q, k, v, [BlockSparse(2, 16), AShape(2, 9)] * 2, query_block=16
    ),
}  # fmt: skip
SMALL = ((16, 2, 16, 32), (16, 1, 4, 16))


def rope_of_any(x, positions):
    return rope(x.float(), positions).to(x.dtype)


@pytest.mark.parametrize("name", ROUTED)
def test_layouts_dtypes_and_empty_batches(name):
    """Where rows lie changes nothing; half precision has the same lists; no batch, no result."""
    call = ROUTED[name]
    q, k, v = (normal(2, 90, h, 4, seed=h, dtype=torch.float32) for h in (4, 2, 2))
    k, v = k[:1].expand_as(k), v[:1].expand_as(v)
    want = call(q, k, v)
    for layout in LAYOUTS:
        laid = (lay_out(x, layout) for x in (k, v))
        assert torch.equal(call(q, *laid), want), layout
    # Each item is on its own, and so is each query but for those of its block.
    assert torch.equal(call(q[1:], k[1:], v[1:]), want[1:])
    half = [x.bfloat16() for x in (q, k, v)]
    got = call(*half)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), call(*(x.float() for x in half)), rtol=0.02, atol=0.02)
    assert call(q[:0], k[:0], v[:0]).shape == (0, 90, 4, 4)
    assert call(q[:, :0], k[:, :0], v[:, :0]).shape == (2, 0, 4, 4)


@pytest.mark.parametrize("name", ["HiP", "InfiniteHiP", "LongHeads", "Superlinear"])
def test_keys_after_a_query_block_change_nothing(name):
    """Causal to the query block: what comes later is neither attended nor searched."""
    call = ROUTED[name]
    q, k, v = (normal(1, 96, h, 4, seed=h) for h in (4, 2, 2))
    before = call(q, k, v)
    for x in (q, k, v):
        x[:, 64:] = normal(*x[:, 64:].shape, seed=77) * 9
    assert torch.equal(call(q, k, v)[:, :64], before[:, :64])


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("name", ["HiP", "LongHeads", "Superlinear"])
def test_compiled_in_one_piece(name):
    call = ROUTED[name]
    q, k, v = (normal(1, 80, h, 4, seed=h) for h in (4, 2, 2))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), call(q, k, v))


def test_longheads_under_autocast():
    """A rotation by what casts keeps the dtype of what it is given."""

    def turned(x, positions):
        return x @ torch.eye(16, dtype=x.dtype).roll(1, 0)

    tensors = [torch.randn(1, 40, 2, 16) for _ in range(3)]
    expected = longheads_chunk_keys(*(t.bfloat16() for t in tensors), 8, rotary=turned)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = longheads_chunk_keys(*tensors, 8, rotary=turned)
    assert torch.equal(found, expected)
