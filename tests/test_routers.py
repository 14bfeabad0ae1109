# SPDX-License-Identifier: Apache-2.0
"""Routed methods against their definitions, one query at a time, and where they become dense."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import attnext
from attnext import (
    BiLevelRoutingAttention,
    NativeSparseAttention,
    bilevel_routing_attention,
    moba_attention,
    native_sparse_attention,
    pooled_topk_plan,
    reference_methods,
    routed_attention,
    sliding_window_attention,
)
from attnext.routers import moba

F64 = torch.float64


def normal(*shape, dtype=F64, seed=None):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=F64, generator=generator).to(dtype)


def inputs(queries, keys=None, batch=2, heads=4, kv_heads=2, dim=4, dim_v=3, seed=0):
    keys = queries if keys is None else keys
    shapes = ((batch, *queries, heads, dim), (batch, *keys, kv_heads, dim),
              (batch, *keys, kv_heads, dim_v))  # fmt: skip
    return [normal(*shape, seed=seed + n).requires_grad_() for n, shape in enumerate(shapes)]


def assert_agree(function, reference, leaves, **options):
    """Values and gradients of all inputs."""
    out, expected = function(*leaves, **options), reference(*leaves, **options)
    torch.testing.assert_close(out, expected)
    cotangent = normal(*out.shape, seed=99)
    found, wanted = (
        torch.autograd.grad(x, leaves, cotangent, allow_unused=True, materialize_grads=True)
        for x in (out, expected)
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def causal(q, k, v):
    return sliding_window_attention(q, k, v, None)


# ---- BiFormer ------------------------------------------------------------------------------------


@st.composite
def maps(draw):
    extents = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    size = st.tuples(st.integers(1, 4), st.integers(1, 4))
    options = {"region_size": draw(size)}
    keys, key_size = extents, options["region_size"]
    if draw(st.booleans()):
        keys = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
        key_size = options["key_region_size"] = draw(size)
    regions = 1
    for n, s in zip(keys, key_size, strict=True):
        regions *= -(-n // s)
    options["topk"] = draw(st.integers(1, min(regions, 4)))
    options["padding"] = draw(st.sampled_from(("mask", "zero")))
    options["soft"] = draw(st.sampled_from((None, "scale", "bias", "mix")))
    if options["soft"] in ("bias", "mix"):
        options["padding"] = "mask"
    options["differentiable_routing"] = draw(st.booleans())
    options["scale"] = draw(st.sampled_from((None, 0.3)))
    return extents, keys, options, draw(st.integers(0, 99))


@given(maps())
@settings(max_examples=40)
def test_bilevel_routing_is_its_definition(problem):
    extents, keys, options, seed = problem
    leaves = inputs(extents, keys, batch=1, heads=2, kv_heads=1 + seed % 2, seed=seed)
    assert_agree(
        bilevel_routing_attention, reference_methods.bilevel_routing_attention, leaves, **options
    )


def test_all_regions_are_dense_attention():
    q, k, v = inputs((7, 5), heads=2)
    dense = attnext.neighborhood_attention(q, k, v, (7, 5))
    torch.testing.assert_close(bilevel_routing_attention(q, k, v, (3, 2), 9), dense)
    torch.testing.assert_close(bilevel_routing_attention(q, k, v, (7, 5), 1), dense)
    every = bilevel_routing_attention(q, k, v, (3, 2), 9, padding="zero")
    assert (every - dense).abs().max() > 1e-3  # the zeros at the border take part


def test_regions_on_other_numbers_of_axes():
    for extents in ((11,), (3, 4, 5)):
        q, k, v = inputs(extents, heads=2)
        size = (3,) * len(extents)
        regions = bilevel_routing_attention(q, k, v, size, 1, return_plan=True)[1]
        count = regions.key_blocks.num_blocks
        out = bilevel_routing_attention(q, k, v, size, count)
        torch.testing.assert_close(out, attnext.neighborhood_attention(q, k, v, extents))


def test_the_layer_is_projections_attention_and_a_convolution():
    layer = BiLevelRoutingAttention(12, num_heads=3, n_win=3, topk=2, side_dwconv=5).double()
    x = normal(2, 12, 10, 7)
    q, k, v = layer.qkv(x).chunk(3, 1)
    heads = [t.unflatten(1, (3, 4)).permute(0, 3, 4, 1, 2) for t in (q, k, v)]
    mixed = reference_methods.bilevel_routing_attention(*heads, (3, 2), 2)
    expected = layer.out(mixed.flatten(-2).permute(0, 3, 1, 2) + layer.lepe(v))
    torch.testing.assert_close(layer(x), expected)

    last = BiLevelRoutingAttention(
        12, num_heads=3, n_win=3, topk=2, side_dwconv=5, channels_last=True
    ).double()
    last.load_state_dict(layer.state_dict())
    torch.testing.assert_close(last(x.permute(0, 2, 3, 1)), expected.permute(0, 2, 3, 1))
    layer(x).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())


# ---- MoBA ----------------------------------------------------------------------------------------


@given(
    queries=st.integers(1, 14), more=st.integers(-3, 12), block_size=st.integers(1, 6),
    topk=st.integers(1, 4), group=st.integers(1, 2), tile=st.sampled_from((1, 3, 64)),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60)
def test_moba_is_its_definition(queries, more, block_size, topk, group, tile, seed):
    """By lists (fewer queries than a tile) and by sorting."""
    leaves = inputs(
        (queries,), (max(1, queries + more),), batch=1, heads=2 * group, kv_heads=2, seed=seed
    )
    options = {"block_size": block_size, "topk": topk}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moba, "_TILE", tile)
        patch.setattr(moba, "_SORTED_ON", ("cpu",))
        assert_agree(moba_attention, reference_methods.moba_attention, leaves, **options)


@pytest.fixture(params=[4, 64], ids=["by sorting", "by lists"])
def tile(request, monkeypatch):
    monkeypatch.setattr(moba, "_TILE", request.param)
    monkeypatch.setattr(moba, "_SORTED_ON", ("cpu",))


def test_moba_of_all_blocks_is_dense_attention(tile):
    q, k, v = inputs((23,))
    for block_size in (1, 4, 23, 40):
        torch.testing.assert_close(moba_attention(q, k, v, block_size, 23), causal(q, k, v))
    own = moba_attention(q, k, v, 5, 1)
    lengths = torch.tensor([0, 5, 10, 15, 20, 23], dtype=torch.int32)
    for b in range(2):  # its own block alone: causal attention within blocks
        parts = [t[b : b + 1] for t in (q, k, v)]
        packed = sliding_window_attention(*parts, None, cu_seqlens_q=lengths)
        torch.testing.assert_close(own[b : b + 1], packed)


def test_moba_of_packed_sequences_is_moba_of_each(tile):
    q, k, v = inputs((25,), batch=1)
    cu = torch.tensor([0, 9, 9, 10, 25], dtype=torch.int32)
    pieces = [
        moba_attention(*(t[:, a:b] for t in (q, k, v)), 4, 2)
        for a, b in itertools.pairwise(cu.tolist()) if b > a
    ]  # fmt: skip
    out = moba_attention(q, k, v, 4, 2, cu_seqlens=cu)
    torch.testing.assert_close(out, torch.cat(pieces, 1))


@pytest.mark.parametrize("method", ["moba", "nsa"])
def test_no_query_knows_later_tokens(method, tile):
    q, k, v = (x.detach() for x in inputs((40,)))
    gates = normal(2, 40, 4, 3)

    def run(k, v):
        if method == "moba":
            return moba_attention(q, k, v, 8, 3)
        return native_sparse_attention(q, k, v, gates, **SMALL)

    out = run(k, v)
    for t in (0, 7, 8, 21, 38):
        later_k, later_v = k.clone(), v.clone()
        later_k[:, t + 1 :] = 50.0
        later_v[:, t + 1 :] = -50.0
        torch.testing.assert_close(run(later_k, later_v)[:, : t + 1], out[:, : t + 1])


def test_moba_finds_the_block_that_matters():
    """One block far back points along the query: with two blocks the query gets it and no other."""
    q, k = normal(2, 1, 64, 1, 16)
    k = 0.01 * k
    k[:, 16:24] += q[:, -1:] / q[:, -1:].norm()
    plan = attnext.moba_plan(q, k, 8, 2)
    assert plan.lists[0, 0, -1].tolist() == [2, 7]


# ---- NSA -----------------------------------------------------------------------------------------

SMALL = {"compress_size": 4, "compress_stride": 2, "block_size": 6, "num_blocks": 3,
         "initial_blocks": 1, "local_blocks": 1, "window_size": 5}  # fmt: skip


@given(
    queries=st.integers(1, 12), more=st.integers(-3, 14), size=st.integers(1, 6),
    stride=st.integers(1, 5), block_size=st.integers(1, 7), first=st.integers(0, 2),
    last=st.integers(0, 2), others=st.integers(0, 2), window_size=st.integers(1, 9),
    group=st.sampled_from((1, 2, 3)), share=st.booleans(), given_compressed=st.booleans(),
    own_window=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40)
def test_nsa_is_its_definition(
    queries, more, size, stride, block_size, first, last, others, window_size, group, share,
    given_compressed, own_window, seed,
):  # fmt: skip
    keys = max(1, queries + more)
    leaves = inputs((queries,), (keys,), batch=1, heads=2 * group, kv_heads=2, seed=seed)
    leaves.append(normal(1, queries, 2 * group, 3, seed=seed).requires_grad_())
    options = {
        "compress_size": size, "compress_stride": stride, "block_size": block_size,
        "num_blocks": max(1, first + last) + others, "initial_blocks": first, "local_blocks": last,
        "window_size": window_size, "share_selection": share,
    }  # fmt: skip
    if given_compressed:
        count = max(0, (keys - size) // stride + 1)
        leaves += [normal(1, count, 2, d, seed=seed + d).requires_grad_() for d in (4, 3)]

    if own_window:
        leaves += [normal(1, keys, 2, d, seed=seed + 9 + d).requires_grad_() for d in (4, 3)]

    def with_options(function):
        def call(q, k, v, gates, *pairs):
            more = {"window_kv": pairs[-2:]} if own_window else {}
            more |= {"compressed": pairs[:2]} if given_compressed else {}
            return function(q, k, v, gates, **options, **more)

        return call

    assert_agree(
        with_options(native_sparse_attention),
        with_options(reference_methods.native_sparse_attention),
        leaves,
    )


def test_nsa_branches_one_at_a_time():
    q, k, v = inputs((33,))
    on, off = 40.0, -40.0

    def run(*gates, **options):
        gates = torch.tensor(gates, dtype=F64).expand(2, 33, 4, 3)
        return native_sparse_attention(q, k, v, gates, **{**SMALL, **options})

    torch.testing.assert_close(run(off, off, on), sliding_window_attention(q, k, v, 5))
    torch.testing.assert_close(run(off, on, off, num_blocks=6), causal(q, k, v))
    single = {"compress_size": 1, "compress_stride": 1}
    torch.testing.assert_close(run(on, off, off, **single), causal(q, k, v))
    assert not run(on, off, off)[:, :3].abs().gt(1e-12).any()  # no window has ended yet


def test_nsa_decodes_what_it_prefills():
    q, k, v = inputs((40,))
    gates = normal(2, 40, 4, 3)
    whole = native_sparse_attention(q, k, v, gates, **SMALL)
    for t in (1, 2, 17, 40):
        step = native_sparse_attention(
            q[:, t - 1 : t], k[:, :t], v[:, :t], gates[:, t - 1 : t], **SMALL
        )
        torch.testing.assert_close(step, whole[:, t - 1 : t])


@pytest.mark.parametrize("compress", ["mean", "mlp"])
def test_nsa_layer_learns_everything_it_has(compress):
    layer = NativeSparseAttention(
        24, 4, kv_heads=2, compress=compress, window_kv=compress == "mlp", **SMALL
    ).double()
    x = normal(2, 30, 24)
    out = layer(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    assert layer(x[:, :3]).shape == (2, 3, 24)  # shorter than a window


# ---- block-sparse --------------------------------------------------------------------------------


@given(
    queries=st.integers(1, 30), more=st.integers(0, 20), query_block=st.integers(1, 9),
    key_block=st.integers(1, 9), topk=st.integers(1, 4), is_causal=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_pooled_blocks(queries, more, query_block, key_block, topk, is_causal, seed):
    q, k, v = (x.detach() for x in inputs((queries,), (queries + more,), seed=seed))
    plan = pooled_topk_plan(q, k, query_block, key_block, topk, is_causal=is_causal)
    for h, i in itertools.product(range(4), range(-(-queries // query_block))):
        rows = slice(i * query_block, min(queries, (i + 1) * query_block))
        mean = q[0, rows, h].mean(0)
        seen = range(0, rows.stop + more if is_causal else queries + more, key_block)
        products = [float(mean @ k[0, a : a + key_block, h // 2].mean(0)) for a in seen]
        best = sorted(range(len(products)), key=lambda c: -products[c])[:topk]
        slots = min(topk, -(-(queries + more) // key_block))
        assert plan.lists[0, h, i].tolist() == sorted(best) + [-1] * (slots - len(best))
    everything = pooled_topk_plan(q, k, query_block, key_block, 2**40, is_causal=is_causal)
    torch.testing.assert_close(
        routed_attention(q, k, v, everything, is_causal=is_causal),
        sliding_window_attention(q, k, v, None, is_causal=is_causal),
    )


def test_more_blocks_than_there_are():
    """All of them, in lists that are no longer."""
    q, k, v = (x.detach() for x in inputs((30,)))
    dense, packs = causal(q, k, v), torch.tensor([0, 11, 30], dtype=torch.int32)
    torch.testing.assert_close(moba_attention(q, k, v, 4, 2**40), dense)
    assert moba.moba_plan(q, k, 4, 2**40).lists.shape[-1] == 8
    few = (x[:1] for x in (q, k, v))
    out = moba_attention(*few, 4, 2**40, cu_seqlens=packs)
    torch.testing.assert_close(out[:, :11], dense[:1, :11])
    gates = torch.full((2, 30, 4, 3), -torch.inf)
    gates[..., 1] = torch.inf
    for forced in ({}, {"initial_blocks": 2**39, "local_blocks": 2**39}):
        out, plan = native_sparse_attention(
            q, k, v, gates, num_blocks=2**40, block_size=4, return_plan=True, **forced
        )
        torch.testing.assert_close(out, dense)
        assert plan.lists.shape[-1] <= 16


def test_nothing_in_nothing_out():
    for method, shape in itertools.product(("moba", "nsa"), ((1, 0), (0, 90))):
        q, k, v = (torch.zeros(*shape, heads, 4) for heads in (4, 2, 2))
        if method == "moba":
            out = moba_attention(q, k, v, 8, 3)
        else:
            out = native_sparse_attention(q, k, v, q[..., :3], **SMALL)
        assert out.shape == q.shape
    q = torch.zeros(0, 6, 6, 2, 4)
    assert bilevel_routing_attention(q, q, q, 3, 2).shape == q.shape


# ---- as torch sees it ----------------------------------------------------------------------------

COMPILED = {
    "bilevel": lambda q, k, v: bilevel_routing_attention(
        *(x.unflatten(1, (6, 7)) for x in (q, k, v)), (4, 3), 2, padding="zero"
    ),
    "nsa": lambda q, k, v: native_sparse_attention(q, k, v, q[..., :3], **SMALL),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compile_whole_graph(name):
    function = COMPILED[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = inputs((42,))
    for a, b in zip(
        *((out, *torch.autograd.grad(out.square().sum(), leaves))
          for out in (compiled(*leaves), function(*leaves))), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, atol=0.0, rtol=0.0)


# ---- half precision, wrong calls -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_chooses_and_sums_in_float32(dtype):
    """The same choice as in float64 from the same inputs, and outputs a few roundings away."""
    q, k, v = (x.detach().to(dtype) for x in inputs((50,), dim=16, dim_v=16))
    gates = normal(2, 50, 4, 3).to(dtype)
    size = 4 * torch.finfo(dtype).eps
    for half, exact in (
        (moba_attention(q, k, v, 8, 3), moba_attention(q.double(), k.double(), v.double(), 8, 3)),
        (native_sparse_attention(q, k, v, gates, compress_size=1, compress_stride=1, num_blocks=4,
                                 block_size=8, window_size=9),
         native_sparse_attention(*(x.double() for x in (q, k, v, gates)), compress_size=1,
                                 compress_stride=1, num_blocks=4, block_size=8, window_size=9)),
    ):  # fmt: skip
        assert half.dtype == dtype
        torch.testing.assert_close(half.double(), exact, atol=size, rtol=size)


X, G = torch.zeros(1, 9, 2, 4), torch.zeros(1, 9, 2, 3)
M = torch.zeros(1, 6, 6, 2, 4)
WRONG = {
    "topk": (lambda: bilevel_routing_attention(M, M, M, 3, 5), ValueError,
             "topk must be at most the key regions, 4, got 5"),
    "no topk": (lambda: bilevel_routing_attention(M, M, M, 3, 0), ValueError, "topk must be at"),
    "region": (lambda: bilevel_routing_attention(M, M, M, (0, 1), 1), ValueError,
               "region_size must be at least 1"),
    "padding": (lambda: bilevel_routing_attention(M, M, M, 3, 1, padding="same"), ValueError,
                "padding must be one of"),
    "soft": (lambda: bilevel_routing_attention(M, M, M, 3, 1, soft="hard"), ValueError,
             "soft must be one of"),
    "zeros without a weight": (
        lambda: bilevel_routing_attention(M, M, M, 3, 1, soft="bias", padding="zero"), ValueError,
        "padding must be 'mask' with soft='bias'"),
    "query": (lambda: bilevel_routing_attention(3, M, M, 3, 1), TypeError, "query must be"),
    "few tokens": (lambda: BiLevelRoutingAttention(8, 2)(torch.zeros(1, 8, 6, 9)), ValueError,
                   "x must have at least n_win, 7"),
    "even convolution": (lambda: BiLevelRoutingAttention(8, 2, side_dwconv=4), ValueError,
                         "side_dwconv must be odd"),
    "heads of a layer": (lambda: BiLevelRoutingAttention(9, 2), ValueError, "dim must be a mult"),
    "moba topk": (lambda: moba_attention(X, X, X, 4, 0), ValueError, "topk must be at least 1"),
    "moba query": (lambda: moba_attention(X[0], X, X, 4, 1), ValueError, "query must be"),
    "moba packing": (
        lambda: moba_attention(X, X, X, 4, 1, cu_seqlens=torch.tensor([0, 8], dtype=torch.int32)),
        ValueError, "cu_seqlens must end at the number of tokens, 9, got 8"),
    "nsa gates": (lambda: native_sparse_attention(X, X, X, X), ValueError,
                  r"gates must have shape \(1, 9, 2, 3\)"),
    "nsa compressed": (
        lambda: native_sparse_attention(X, X, X, G, compressed=(X, X), compress_size=3,
                                        compress_stride=3),
        ValueError, r"compressed keys must have shape \(1, 3, 2, 4\)"),
    "nsa window": (
        lambda: native_sparse_attention(X, X, X, G, window_kv=(X, X[:, :8])), ValueError,
        r"window_kv values must have shape \(1, 9, 2, 4\)"),
    "nsa pair": (lambda: native_sparse_attention(X, X, X, G, window_kv=X), TypeError,
                 "window_kv must be a pair"),
    "nsa pair of compressed": (
        lambda: native_sparse_attention(X, X, X, G, compressed=(X,)), TypeError,
        "compressed must be a pair"),
    "nsa pair of nothing": (
        lambda: native_sparse_attention(X, X, X, G, compressed=()), TypeError,
        "compressed must be a pair"),
    "nsa plan": (lambda: native_sparse_attention(X, X, X, G, return_plan=2), TypeError,
                 "return_plan must be a bool, got 2"),
    "moba lse": (lambda: moba_attention(X, X, X, 4, 1, return_lse=2), TypeError,
                 "return_lse must be a bool, got 2"),
    "pooled forced": (
        lambda: pooled_topk_plan(X, X, 4, 4, 2, initial_blocks=3), ValueError,
        "topk must be at least initial_blocks"),
    "nsa compress of arrays": (
        lambda: NativeSparseAttention(8, 2, compress=np.array(["mean", "mlp"])), ValueError,
        "compress must be one of"),
    "nsa forced": (lambda: native_sparse_attention(X, X, X, G, num_blocks=2), ValueError,
                   "num_blocks must be at least initial_blocks"),
    "nsa layer's sizes": (lambda: NativeSparseAttention(8, 2, block_size=0), ValueError,
                          "block_size must be at least 1"),
    "nsa layer's options": (lambda: NativeSparseAttention(8, 2, windows=4), TypeError,
                            "options must be among .*'window_size'.* got 'windows'"),
    "nsa layer's forced": (lambda: NativeSparseAttention(8, 2, num_blocks=2), ValueError,
                           "num_blocks must be at least initial_blocks"),
    "nsa layer's input": (
        lambda: NativeSparseAttention(8, 2)(torch.zeros(1, 5, 6)), ValueError,
        r"x must be \[batch, tokens, 8\], got shape \(1, 5, 6\)"),
    "nsa layer's string": (lambda: NativeSparseAttention(8, 2)("x"), TypeError, "x must be"),
    "bilevel layer's channels": (
        lambda: BiLevelRoutingAttention(8, 2, 2, 1)(torch.zeros(1, 6, 4, 4)), ValueError,
        "x must have 8 channels, got 6"),
    "nsa layer's dim": (lambda: NativeSparseAttention("8", 2), TypeError, "dim must be an int"),
    "bilevel layer's padding": (lambda: BiLevelRoutingAttention(8, 2, padding="no"), ValueError,
                                "padding must be one of"),
    "bilevel layer's soft": (lambda: BiLevelRoutingAttention(8, 2, soft="no"), ValueError,
                             "soft must be one of"),
    "bilevel layer's regions": (lambda: BiLevelRoutingAttention(8, 2, region_size=(3, 0)),
                                ValueError, "region_size must be at least 1"),
    "nsa compress": (lambda: NativeSparseAttention(8, 2, compress="max"), ValueError,
                     "compress must be one of"),
    "pooled": (lambda: pooled_topk_plan(X, X, 0, 4, 1), ValueError,
               "query_block must be at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_call(name):
    call, exception, message = WRONG[name]
    with pytest.raises(exception, match=message):
        call()


def test_image_layer_is_an_image_layer():
    """What surrounds it expects: strides of either memory format, the same numbers."""
    layer = BiLevelRoutingAttention(16, num_heads=2, n_win=2, topk=2)
    x = torch.randn(1, 16, 9, 8)
    out = layer(x)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), out)
    assert F.conv2d(out, torch.zeros(1, 16, 1, 1)).shape == (1, 1, 9, 8)
