# SPDX-License-Identifier: Apache-2.0
"""BASED: the hybrid against weights written down, decoding against prefill, blocks against their
formula."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_problems import BUDGET, DTYPES, F64, error, normal
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import attnext
from attnext import (
    BasedCache,
    WindowCache,
    based_attention,
    based_attention_step,
    reference,
    reference_linear,
)
from attnext.based_block import MIXERS


def inputs(tokens, batch=2, heads=4, groups=2, dim=6, dim_v=3, dtype=F64):
    return (
        normal(batch, tokens, heads, dim, dtype=dtype, seed=1),
        normal(batch, tokens, groups, dim, dtype=dtype, seed=2),
        normal(batch, tokens, groups, dim_v, dtype=dtype, seed=3),
    )


def part(tensors, begin, end):
    return (x[:, begin:end] for x in tensors)


def same_cache(one, other, budget=1e-13):
    assert one.window.length == other.window.length
    assert error(one.window.keys, other.window.keys) <= budget
    assert error(one.window.values, other.window.values) <= budget
    assert error(one.state, other.state) <= budget


# ---- the function and its decoding ---------------------------------------------------------------


@settings(max_examples=40)
@given(st.data())
def test_prefill_and_steps_are_the_formula(data):
    """A prompt of any length, empty too, then one token at a time or several."""
    window, tokens = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 40))
    prompt = data.draw(st.integers(0, tokens))
    scale = data.draw(st.sampled_from([None, 0.3]))
    heads, groups = data.draw(st.sampled_from([(1, 1), (4, 2), (3, 1)]))
    tensors = inputs(tokens, heads=heads, groups=groups, dim=data.draw(st.integers(1, 5)))
    expected = reference_linear.based_attention(*tensors, window, scale=scale)
    whole, last = based_attention(*tensors, window, scale=scale, output_final_cache=True)
    assert error(whole, expected) < 1e-12
    assert torch.equal(whole, based_attention(*tensors, window, scale=scale))
    out, cache = based_attention(
        *part(tensors, 0, prompt), window, scale=scale, output_final_cache=True
    )
    outs, size = [out], data.draw(st.integers(1, 4))
    for t in range(prompt, tokens, size):
        outs.append(based_attention_step(*part(tensors, t, t + size), cache, scale=scale))
    assert error(torch.cat(outs, dim=1), expected) < 1e-12
    same_cache(cache, last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mean", [0, 3])
def test_gradients_in_all_dtypes(mean, dtype):
    """Both parts add to them, and no rounding of either may be in the sum, even where the values'
    mean, which drops out, is most of them."""
    for tokens, window, dim, dim_v in ((300, 40, 16, 32), (60, 9, 5, 8), (410, 64, 9, 24)):
        query, key, value = inputs(tokens, 1, 4, 2, dim, dim_v)
        given = [x.to(dtype) for x in (query, key, value + mean)]
        cotangent = normal(*query.shape[:3], dim_v, dtype=dtype, seed=9)

        def gradients(function, tensors, window=window, cotangent=cotangent):
            leaves = [x.detach().requires_grad_() for x in tensors]
            out = function(*leaves, window)
            return torch.autograd.grad(out, leaves, cotangent.to(out.dtype))

        exact = gradients(reference_linear.based_attention, [x.double() for x in given])
        for got, expected in zip(gradients(based_attention, given), exact, strict=True):
            assert got.dtype == dtype and error(got, expected) <= BUDGET[dtype]


@settings(max_examples=40)
@given(st.data())
def test_packed_sequences_know_nothing_of_each_other(data):
    """Shorter than the window, as long, longer and empty ones."""
    window = data.draw(st.integers(1, 9))
    lengths = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=5))
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    leaves = [x.requires_grad_() for x in inputs(int(ends[-1]), batch=1)]
    out = based_attention(*leaves, window, cu_seqlens=ends)
    assert error(out, reference_linear.based_attention(*leaves, window, cu_seqlens=ends)) < 1e-12
    cotangent = normal(*out.shape, seed=7)
    gradients = torch.autograd.grad(out, leaves, cotangent)
    for begin, end in itertools.pairwise(ends.tolist()):
        alone = [x.detach()[:, begin:end].requires_grad_() for x in leaves]
        one = based_attention(*alone, window)
        assert error(out[:, begin:end], one) < 1e-12
        for got, want in zip(
            gradients, torch.autograd.grad(one, alone, cotangent[:, begin:end]), strict=True
        ):
            assert error(got[:, begin:end], want) < 1e-12


@pytest.mark.parametrize("which", range(3), ids=["query", "key", "value"])
def test_nan_stays_in_its_sequence(which):
    ends = torch.tensor([0, 10, 21, 24], dtype=torch.int32)
    leaves = list(inputs(24, batch=1))
    leaves[which][:, 10:21] = torch.nan
    leaves = [x.requires_grad_() for x in leaves]
    out = based_attention(*leaves, 4, cu_seqlens=ends)
    for x in (out, *torch.autograd.grad(out.sum(), leaves)):
        assert x[:, :10].isfinite().all() and x[:, 21:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_budget(dtype):
    """At the sizes of the paper, on both sides of a prompt, and far from its start."""
    tensors = inputs(300, batch=1, heads=2, dim=16, dim_v=64, dtype=dtype)
    expected = reference_linear.based_attention(*tensors, 64)
    out, cache = based_attention(*part(tensors, 0, 290), 64, output_final_cache=True)
    rest = based_attention_step(*part(tensors, 290, 300), cache)
    assert out.dtype == rest.dtype == cache.window.keys.dtype == dtype
    assert error(out, expected[:, :290]) <= BUDGET[dtype]
    assert error(rest, expected[:, 290:]) <= BUDGET[dtype]


def test_nothing_to_decode():
    q, k, v = (torch.randn(1, 10, 1, 4) for _ in range(3))
    _, cache = attnext.based_attention(q, k, v, 3, output_final_cache=True)
    state = cache.state.clone()
    empty = attnext.based_attention_step(q[:, :0], k[:, :0], v[:, :0], cache)
    assert empty.shape == (1, 0, 1, 4) and torch.equal(cache.state, state)
    layer = attnext.GatedConvolution(8)
    assert layer(torch.randn(2, 0, 8)).shape == (2, 0, 8)
    out, kept = layer.prefill(torch.randn(2, 0, 8))
    assert out.shape == (2, 0, 8) and kept.shape == (2, 2, 16) and not kept.any()
    for mixer in MIXERS:
        block, x = block_of(mixer), normal(2, 5, 24)
        _, kept = block.prefill(x)
        again = copy.deepcopy(kept)  # it hangs on no graph
        assert block.step(x[:, :0], kept).shape == (2, 0, 24)
        assert torch.equal(block.step(x[:, :1], kept), block.step(x[:, :1], again))


def test_sums_that_a_half_cannot_hold():
    """A step adds up weights of more than 65504."""
    query, key, value = inputs(400, 1, 1, 1, dim=16, dtype=torch.float16)
    query, key = 3 * query.abs(), 3 * key.abs()
    expected = reference_linear.based_attention(query, key, value, 8, scale=1.0)
    prompt = (x[:, :399] for x in (query, key, value))
    _, cache = based_attention(*prompt, 8, scale=1.0, output_final_cache=True)
    last = (x[:, 399:] for x in (query, key, value))
    out = based_attention_step(*last, cache, scale=1.0)
    scores = torch.einsum("bihd,bjhd->bij", query[:, -1:].double(), key[:, :392].double())
    assert ((1 + scores).square() / 2).sum() > 2 * 65504
    assert error(out, expected[:, 399:]) <= 2 * BUDGET[torch.float16]  # of 3 numbers


class Shapes(TorchDispatchMode):
    """What is read: the shapes that every operator is given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        shapes = [tuple(x.shape) for x in leaves if torch.is_tensor(x)]
        self.seen.append((func.name(), shapes))
        return func(*args, **(kwargs or {}))


def test_a_token_costs_the_same_after_any_context():
    traces = []
    for length in (20, 2000):
        tensors = inputs(length + 1, batch=1)
        _, cache = based_attention(*part(tensors, 0, length), 8, output_final_cache=True)
        new = [*part(tensors, length, length + 1)]
        with Shapes() as shapes:
            based_attention_step(*new, cache)
        traces.append((shapes.seen, cache.nbytes))
    assert traces[0] == traces[1] and traces[0][0]
    assert traces[0][1] == 8 * (8 * 2 * (6 + 3) + 4 * 28 * 4)  # the window, and 28 features


def test_gradients():
    leaves = [x.requires_grad_() for x in inputs(12, batch=1)]
    assert torch.autograd.gradcheck(lambda *x: based_attention(*x, 5), leaves)
    out, cache = based_attention(*leaves, 5, output_final_cache=True)
    assert out.requires_grad
    kept = (cache.state, cache.window.keys, cache.window.values)
    assert not any(x.requires_grad for x in kept)
    leaves[1].data.zero_()  # the cache has copies of its own
    assert cache.window.keys.abs().sum() > 0
    with pytest.raises(NotImplementedError, match="no gradient"):
        based_attention_step(*leaves, cache)
    with torch.no_grad():
        based_attention_step(*leaves, cache)


def test_compiled_and_autocast():
    tensors = inputs(20, batch=1, dtype=torch.float32)
    whole, cache = based_attention(*tensors, 6, output_final_cache=True)
    torch._dynamo.reset()
    compiled = torch.compile(based_attention, fullgraph=True, backend="aot_eager")
    out, other = compiled(*tensors, 6, output_final_cache=True)
    assert torch.equal(out, whole)
    same_cache(other, cache)
    new = inputs(1, batch=1, dtype=torch.float32)
    step = torch.compile(based_attention_step, fullgraph=True, backend="aot_eager")
    assert torch.equal(step(*new, other), based_attention_step(*new, cache))
    same_cache(other, cache)
    ends = torch.tensor([0, 3, 3, 15, 20], dtype=torch.int32)
    expected = based_attention(*tensors, 6, cu_seqlens=ends)
    assert torch.equal(compiled(*tensors, 6, cu_seqlens=ends), expected)
    halves = [x.bfloat16() for x in tensors]
    expected, cache = based_attention(*halves, 6, output_final_cache=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, other = based_attention(*tensors, 6, output_final_cache=True)
        same_cache(other, cache)
        after = based_attention_step(*new, other)
    assert torch.equal(out, expected) and after.dtype == torch.bfloat16


def test_a_step_under_autocast_keeps_its_sums():
    """Of 70,000 weights of 1, which a half cannot hold, and unrounded."""
    tokens = 70001
    query = torch.zeros(1, tokens, 1, 4)
    value = 1 + normal(1, tokens, 1, 2, dtype=torch.float32) / 100
    whole = [x.half() for x in (query, query, value)]
    _, cache = based_attention(*(x[:, :-1] for x in whole), 2, output_final_cache=True)
    other = copy.deepcopy(cache)
    last = [x[:, -1:] for x in whole]
    expected = based_attention_step(*last, cache)
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(based_attention_step(*(x.float() for x in last), other), expected)
    assert expected.isfinite().all()
    same_cache(cache, other, 0)


# ---- positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("extents", [(9,), (4, 3), (2, 3, 2)])
def test_rotary_embedding(extents):
    x = normal(2, *extents, 3, 12)
    for options in ({}, {"base": 50.0, "offset": 1000}):
        expected = reference_linear.rotary_embedding(x, **options)
        assert error(attnext.rotary_embedding(x, **options), expected) < 1e-14
    half = attnext.rotary_embedding(x.half())
    assert half.dtype == torch.half and error(half, reference_linear.rotary_embedding(x)) < 1e-3
    leaf = x[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(attnext.rotary_embedding, leaf)


def test_rotary_products_depend_on_the_distance():
    query, key = (normal(1, 1, 1, 8, seed=s).expand(1, 40, 1, 8) for s in (1, 2))
    turned = [attnext.rotary_embedding(x)[0, :, 0] for x in (query, key)]
    products = turned[0] @ turned[1].T
    for shift in (0, 1, 17):
        along = products.diagonal(shift)
        torch.testing.assert_close(along, along[:1].expand_as(along))
    assert products[0].std() > 0.01


# ---- layers --------------------------------------------------------------------------------------


def block_of(mixer, **more):
    torch.manual_seed(3)
    options = {"num_heads": 3, "feature_dim": 5, "window_size": 6, "kernel_size": 4, **more}
    block = attnext.BasedBlock(24, mixer, **options).double()
    for name, parameter in block.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return block


@pytest.mark.parametrize("mixer", [*MIXERS, "hybrid, turned"])
def test_block(mixer):
    """The block is its formula, decodes what it prefills, and has gradients everywhere."""
    turned, mixer = mixer.endswith("turned"), mixer.split(",")[0]
    x = 2 * normal(2, 30, 24)
    block = block_of(mixer, **({"rotary": True, "feature_dim": 4} if turned else {}))
    window = 0 if mixer == "linear" else 6
    weights = dict(block.named_parameters())
    expected = reference_linear.based_block(x, weights, mixer, 3, window, 1e-5, turned).detach()
    budget = 1e-7 if mixer == "linear" else 1e-13  # which has an eps, of 1e-6
    assert error(block(x), expected) < budget
    whole, last = block.prefill(x)
    assert torch.equal(whole, block(x))
    for prompt, size in ((20, 1), (2, 3), (3, 27)):  # less than a window or a kernel, too
        _, kept = block.prefill(x[:, :prompt])
        outs = [block.step(x[:, t : t + size], kept) for t in range(prompt, 30, size)]
        assert not any(out.requires_grad for out in outs)
        assert error(torch.cat(outs, dim=1), whole[:, prompt:]) < 1e-12
        if torch.is_tensor(kept):
            assert error(kept, last) < 1e-13
        elif isinstance(kept, BasedCache):
            same_cache(kept, last)
        else:
            assert kept.length == last.length == 30 and error(kept.keys, last.keys) < 1e-13
    block(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in block.parameters())


@pytest.mark.parametrize("mixer", [*MIXERS, "hybrid, turned"])
def test_packed_block(mixer):
    """What a sequence gives alone, with its gradients; compiled, too."""
    turned, mixer = mixer.endswith("turned"), mixer.split(",")[0]
    block = block_of(mixer, **({"rotary": True, "feature_dim": 4} if turned else {}))
    ends = torch.tensor([0, 9, 10, 10, 28, 30], dtype=torch.int32)
    x = (2 * normal(1, 30, 24)).requires_grad_()
    out = block(x, ends)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(x, ends)
    assert error(compiled, out) < 1e-13
    cotangent = normal(*out.shape, seed=7)
    (gradient,) = torch.autograd.grad(out, x, cotangent)
    for begin, end in itertools.pairwise(ends.tolist()):
        alone = x.detach()[:, begin:end].requires_grad_()
        one = block(alone)
        assert error(out[:, begin:end], one) < 1e-12
        (want,) = torch.autograd.grad(one, alone, cotangent[:, begin:end])
        assert error(gradient[:, begin:end], want) < 1e-12
    with pytest.raises(ValueError, match=r"^cu_seqlens must rise from 0 to the number of tokens"):
        block(x, ends[:-1])
    with pytest.raises(ValueError, match="batch size 1"):
        block(x.expand(2, -1, -1), ends)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        assert block(mode.from_tensor(x.detach()), mode.from_tensor(ends)).shape == x.shape


def test_layer_with_slots_and_window():
    layer = block_of("linear").mixer
    x = normal(2, 9, 24)
    _, state = layer.prefill(x)
    pool = torch.zeros(5, *state.shape[1:], dtype=F64)
    pool[[4, 1]] = state
    slots = torch.tensor([4, 1])
    assert torch.equal(layer.step(x[:, :1], pool, slots), layer.step(x[:, :1], state))
    assert torch.equal(pool[slots], state)
    hybrid = block_of("hybrid").mixer
    _, kept = hybrid.prefill(x)
    with pytest.raises(NotImplementedError, match=r"slots are for .* window_size is 6"):
        hybrid.step(x[:, :1], kept, slots)


def test_window_layer_is_sliding_window_attention():
    layer, x = block_of("window").mixer, normal(1, 20, 24)
    q, k, v = (f(x).unflatten(-1, (3, -1)) for f in (layer.query, layer.key, layer.value))
    turned = [reference_linear.rotary_embedding(t) for t in (q, k)]
    mixed = reference.sliding_window_attention(*turned, v, 6)
    assert error(layer(x), layer.out(mixed.flatten(-2))) < 1e-13


# ---- errors --------------------------------------------------------------------------------------


def wrong(index, new, **options):
    tensors = list(inputs(9))
    _, cache = based_attention(*tensors, 4, output_final_cache=True)
    before = cache.window.length, cache.window.keys.clone(), cache.state.clone()
    tensors = [x[:, :1] for x in tensors]
    if isinstance(new, torch.Tensor):
        tensors[index] = new
    else:  # another part of the cache
        options["cache"] = BasedCache(**{"window": cache.window, "state": cache.state, **new})
    try:
        based_attention_step(*tensors, **{"cache": cache, **options})
    finally:
        assert cache.window.length == before[0]
        assert torch.equal(cache.window.keys, before[1]) and torch.equal(cache.state, before[2])


def x(*shape, **options):
    return torch.zeros(shape, **{"dtype": F64, **options})


def push(key, value):
    cache = WindowCache.after(x(1, 5, 2, 3), x(1, 5, 2, 3), 4)
    try:
        cache.push(key, value)
    finally:
        assert cache.length == 5


def step(mixer, tokens, kept=None):
    """Of a block; kept: another than the prefill's."""
    block = attnext.BasedBlock(8, mixer, num_heads=2, window_size=4)
    _, of_prefill = block.prefill(torch.zeros(1, 3, 8))
    return block.step(tokens, of_prefill if kept is None else kept)


Y = torch.zeros(1, 1, 8)


WRONG = {
    "sequences that fall": (
        lambda: based_attention(
            *inputs(9, batch=1), 3, cu_seqlens=torch.tensor([0, 5, 4, 9], dtype=torch.int32)
        ), ValueError, "^cu_seqlens must rise from 0",
    ),
    "packed batch": (
        lambda: based_attention(*inputs(9), 3, cu_seqlens=torch.tensor([0, 9], dtype=torch.int32)),
        ValueError, "batch size 1 with cu_seqlens, got 2",
    ),
    "cache of packed sequences": (
        lambda: based_attention(
            *inputs(9, batch=1), 3, cu_seqlens=torch.tensor([0, 9], dtype=torch.int32),
            output_final_cache=True,
        ), ValueError, "cu_seqlens must be None with output_final_cache",
    ),
    "few queries": (
        lambda: based_attention(x(2, 2, 1, 6), *[x(2, 10, 1, 6)] * 2, 3), ValueError,
        "key must have the tokens of query, 2, got 10",
    ),
    "many queries": (
        lambda: based_attention(x(2, 10, 1, 6), *[x(2, 2, 1, 6)] * 2, 30), ValueError,
        "key must have the tokens of query, 10, got 2",
    ),
    "window": (lambda: based_attention(*inputs(3), 0), ValueError, "window_size must be at least"),
    "final": (
        lambda: based_attention(*inputs(3), 2, output_final_cache=1), TypeError,
        "output_final_cache must be a bool, got 1",
    ),
    "cache": (lambda: wrong(0, x(2, 1, 4, 6), cache=3), TypeError, "cache must be a BasedCache"),
    "window of the cache": (
        lambda: wrong(0, {"window": 1}), TypeError, "cache.window must be a WindowCache, got int",
    ),
    "state": (
        lambda: wrong(0, {"state": 2}), TypeError, "cache.state must be a torch.float64 .*got int",
    ),
    "state dtype": (
        lambda: wrong(0, {"state": x(2, 4, 28, 4).float()}), TypeError, "cache.state .*float32",
    ),
    "state shape": (
        lambda: wrong(0, {"state": x(2, 4, 3, 3)}), ValueError,
        r"cache.state must be \(2, 'heads', 28, 4\).*got \(2, 4, 3, 3\)",
    ),
    "state axes": (lambda: wrong(0, {"state": x(4)}), ValueError, "cache.state must be"),
    "state heads": (lambda: wrong(0, {"state": x(2, 3, 28, 4)}), ValueError, "cache.state must be"),
    "state gradient": (
        lambda: wrong(0, {"state": x(2, 4, 28, 4, requires_grad=True)}), NotImplementedError,
        "cache.state must not require",
    ),
    "rows of a cache": (
        lambda: based_attention(*inputs(3), 2**60, output_final_cache=True), ValueError,
        r"window_size must be below 2\*\*31",
    ),
    "window of nothing": (
        lambda: WindowCache.after(*[x(1, 3, 1, 2)] * 2, 0), ValueError, "window_size must be at",
    ),
    "window below nothing": (
        lambda: WindowCache.after(*[x(1, 3, 1, 2)] * 2, -3), ValueError, "window_size must be at",
    ),
    "window of truth": (
        lambda: WindowCache.after(*[x(1, 3, 1, 2)] * 2, True), TypeError, "window_size must be an",
    ),
    "window of no tensor": (
        lambda: WindowCache.after(5, x(1, 3, 1, 2), 2), TypeError, "key must be .*int",
    ),
    "window of few values": (
        lambda: WindowCache.after(x(1, 3, 1, 2), x(1, 2, 1, 2), 2), ValueError,
        r"value must have the batch, tokens and heads of key, \(1, 3, 1\), got \(1, 2, 1\)",
    ),
    "window of axes": (
        lambda: WindowCache.after(x(3, 1, 2), x(3, 1, 2), 2), ValueError, r"key must be \[B, N",
    ),
    "cache of numbers": (lambda: WindowCache(1, 2), TypeError, "keys must be .*int"),
    "cache without slots": (
        lambda: WindowCache(x(1, 0, 1, 2), x(1, 0, 1, 2)), ValueError, "keys must have a slot",
    ),
    "cache length": (
        lambda: WindowCache(*[x(1, 3, 1, 2)] * 2, "x"), TypeError, "length must be an int",
    ),
    "pushed tokens": (lambda: push(x(1, 2, 2, 3), x(1, 2, 2, 3)), ValueError, "of one token"),
    "pushed values": (lambda: push(x(1, 1, 2, 3), x(1, 2, 2, 3)), ValueError, "of one token"),
    "pushed shape": (
        lambda: push(x(1, 1, 1, 1), x(1, 1, 2, 3)), ValueError, r"key must be .*\(1, 2, 3\)",
    ),
    "pushed dtype": (
        lambda: push(x(1, 1, 2, 3), x(1, 1, 2, 3).float()), TypeError, "value must .*float32",
    ),
    "pushed strings": (lambda: push("a", "b"), TypeError, "key must have .*got str"),
    "key dtype": (lambda: wrong(1, x(2, 1, 2, 6).half()), TypeError, "key must .*float64.*float16"),
    "key heads": (lambda: wrong(1, x(2, 1, 4, 6)), ValueError, r"key must .*\(2, 2, 6\).*4, 6"),
    "value": (lambda: wrong(2, x(2, 1, 2, 4)), ValueError, r"value must .*\(2, 2, 3\)"),
    "value tokens": (lambda: wrong(2, x(2, 2, 2, 3)), ValueError, "value have those tokens"),
    "value device": (lambda: wrong(2, x(2, 1, 2, 3, device="meta")), ValueError, "value .*meta"),
    "query": (lambda: wrong(0, x(2, 1, 2, 6)), ValueError, r"query must .*\(2, 1, 4, 6\)"),
    "query dtype": (lambda: wrong(0, x(2, 1, 4, 6).half()), TypeError, "query must .*float16"),
    "scale": (
        lambda: wrong(0, x(2, 1, 4, 6), scale=torch.ones(2)), TypeError, "scale must be a number",
    ),
    "scale of heads": (
        lambda: attnext.based_attention(*[x(1, 3, 2, 4)] * 3, 8, scale=torch.ones(2)), TypeError,
        "scale must be a number, got",
    ),
    "mixer": (lambda: attnext.BasedBlock(8, "mamba"), ValueError, "mixer must be one of .*'mamba'"),
    "heads": (
        lambda: attnext.BasedAttention(24, num_heads=5), ValueError, "dim must be .*5, got 24",
    ),
    "rotary": (lambda: attnext.BasedAttention(8, 2, rotary=1), TypeError, "rotary must be a bool"),
    "rotary alone": (
        lambda: attnext.BasedAttention(8, 2, rotary=True), ValueError, "rotary needs a window_size",
    ),
    "odd pairs": (lambda: attnext.BasedAttention(8, 2, 3, 4, True), ValueError, "even.* 4 and 3"),
    "kept": (
        lambda: attnext.BasedAttention(8, 2, 4, 4).step(torch.zeros(1, 1, 8), 0), TypeError,
        "kept must be a BasedCache, got int",
    ),
    "odd heads": (
        lambda: attnext.SlidingWindowAttention(9, 3, 4), ValueError, "even size, got 9 for 3",
    ),
    "mixers": (
        lambda: attnext.BasedBlock(8, np.array(["linear", "window"])), ValueError,
        "mixer must be one of",
    ),
    **{
        f"{name} of another mixer": (
            lambda name=name, mixer=mixer: attnext.BasedBlock(8, mixer, **{name: "x"}), TypeError,
            f"{name} must be",
        )
        for name, mixer in (
            ("window_size", "linear"), ("rotary", "linear"), ("rotary", "window"),
            ("feature_dim", "convolution"), ("kernel_size", "window"), ("expand", "hybrid"),
        )
    },
    **{
        f"{what} into {mixer}": (
            lambda mixer=mixer, t=t: attnext.BasedBlock(8, mixer)(t), kind, "x must be",
        )
        for mixer in MIXERS
        for what, t, kind in (
            ("a string", "x", TypeError), ("integers", Y.long(), TypeError),
            ("a token", Y[0], ValueError), ("six entries", Y[..., :6], ValueError),
        )
    },
    **{
        f"{name} alone": (lambda layer=layer: layer(Y[..., :6]), ValueError, "x must be .*8.*6")
        for name, layer in (
            ("attention", attnext.BasedAttention(8, 2)),
            ("window layer", attnext.SlidingWindowAttention(8, 2, 4)),
            ("convolution", attnext.GatedConvolution(8)),
        )
    },
    "kept window": (lambda: step("window", Y, "x"), TypeError, "kept must be a WindowCache"),
    "kept in a hybrid": (
        lambda: step("hybrid", Y, BasedCache(1, 2)), TypeError, "kept.window must be a Window",
    ),
    "kept inputs": (lambda: step("convolution", Y, "x"), TypeError, "kept must be a floating"),
    "kept shape": (
        lambda: step("convolution", Y, x(1, 5, 3)), ValueError, r"kept must be \(1, 2, 16\)",
    ),
    "kept batch": (
        lambda: step("convolution", Y.expand(2, 1, 8)), ValueError, r"kept must be \(2, 2, 16\)",
    ),
    "taps": (lambda: attnext.GatedConvolution(8, 0), ValueError, "kernel_size must be at least 1"),
    "expand": (lambda: attnext.GatedConvolution(3, 3, 3), ValueError, "even, got 3"),
    "hidden": (lambda: attnext.BasedBlock(8, "linear", hidden_dim=0), ValueError, "hidden_dim"),
    "rotary type": (lambda: attnext.rotary_embedding([1.0]), TypeError, "x must be a tensor"),
    "rotary dtype": (lambda: attnext.rotary_embedding(x(1, 1, 1, 2).int()), TypeError, "int32"),
    "rotary axes": (lambda: attnext.rotary_embedding(x(3, 2)), ValueError, "x must be .batch"),
    "rotary pairs": (
        lambda: attnext.rotary_embedding(x(1, 2, 2, 1, 6)), ValueError, "multiple of 4.*got 6",
    ),
    "rotary base": (lambda: attnext.rotary_embedding(x(1, 1, 1, 2), base=0), ValueError, "base"),
    "rotary offset": (
        lambda: attnext.rotary_embedding(x(1, 1, 1, 2), offset=-1), ValueError, "offset must be",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    function, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        function()
