# SPDX-License-Identifier: Apache-2.0
"""The softmax in two levels, against its definition one query at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnext import landmark_attention, reference_methods, sliding_window_attention
from attnext import landmark_ops as module
from attnext.testing import available_isas, isa, threads

F64 = torch.float64


def normal(*shape, dtype=F64, seed=None):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=F64, generator=generator).to(dtype)


def inputs(queries, keys=None, batch=2, heads=4, kv_heads=2, dim=4, dim_v=3, seed=0):
    keys = queries if keys is None else keys
    shapes = ((batch, queries, heads, dim), (batch, keys, kv_heads, dim),
              (batch, keys, kv_heads, dim_v))  # fmt: skip
    return [normal(*shape, seed=seed + n).requires_grad_() for n, shape in enumerate(shapes)]


def every(period, tokens):
    return torch.arange(tokens) % period == period - 1


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@given(
    queries=st.integers(0, 12), keys=st.integers(0, 16), group=st.integers(1, 2),
    density=st.sampled_from((0.0, 0.2, 0.4, 1.0)), shared=st.booleans(),
    topk=st.sampled_from((None, None, 1, 2, 9)),
    slice_size=st.sampled_from((None, None, 1, 60, 10**6)), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=120)
def test_landmark_attention_is_its_definition(
    queries, keys, group, density, shared, topk, slice_size, seed
):
    """Any landmarks, more queries than keys and fewer, values and gradients, with an lse."""
    generator = torch.Generator().manual_seed(seed)
    shape = (keys,) if shared else (2, keys)
    is_landmark = torch.rand(shape, generator=generator) < density
    leaves = inputs(queries, keys, heads=2 * group, seed=seed)
    before = module._SLICE, module._LONGEST
    if slice_size is not None:  # in plain torch, as for long blocks
        module._SLICE, module._LONGEST = slice_size, -1
    try:
        out, lse = landmark_attention(*leaves, is_landmark, topk=topk, return_lse=True)
        if queries:
            wanted = reference_methods.landmark_attention(
                *leaves, is_landmark, topk=topk, return_lse=True
            )
            close(out, wanted[0])
            close(lse, wanted[1])
            cotangents = [normal(*out.shape, seed=7), normal(*lse.shape, seed=8)]
            cotangents[1] = cotangents[1].masked_fill(lse == -math.inf, 0.0)
            grads = [
                torch.autograd.grad(results, leaves, cotangents, allow_unused=True,
                                    materialize_grads=True)
                for results in ((out, lse), wanted) if results[0].requires_grad
            ]  # fmt: skip
            if len(grads) == 2:
                for a, b in zip(*grads, strict=True):
                    close(a, b)
        assert out.shape == (2, queries, 2 * group, 3) and lse.shape == out.shape[:-1]
    finally:
        module._SLICE, module._LONGEST = before


def test_weights_sum_to_one():
    q, k, v = inputs(30)
    out = landmark_attention(q, k, torch.ones_like(v), every(5, 30))
    close(out, torch.ones_like(out))


def test_without_landmarks_it_is_causal_attention():
    q, k, v = inputs(17, 20)
    none = torch.zeros(20, dtype=torch.bool)
    whole = sliding_window_attention(q, k, v, None, return_lse=True)
    for topk in (None, 3):
        for a, b in zip(
            landmark_attention(q, k, v, none, topk=topk, return_lse=True), whole, strict=True
        ):
            close(a, b)


@pytest.mark.parametrize("topk", [None, 2])
def test_values_of_landmarks_are_never_read(topk):
    q, k, v = inputs(24)
    marks = every(6, 24)
    v = v.detach().masked_fill(marks[:, None, None], math.nan).requires_grad_()
    out = landmark_attention(q, k, v, marks, topk=topk)
    assert torch.isfinite(out).all()
    out.square().sum().backward()
    assert not v.grad[:, marks].any()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


def test_first_token_a_landmark():
    """The query at it has nothing to attend; the others never see it."""
    q, k, v = inputs(6)
    marks = torch.tensor([True, False, False, True, True, False])
    out, lse = landmark_attention(q, k, v, marks, return_lse=True)
    assert not out[:, 0].any() and (lse[:, 0] == -math.inf).all()
    close(out[:, 1:3], sliding_window_attention(q[:, 1:3], k[:, 1:3], v[:, 1:3], None))
    out[:, 0].sum().backward()
    assert not any(x.grad.any() for x in (q, k, v))


@pytest.mark.parametrize("topk", [None, 2])
def test_decoding_is_the_last_row(topk):
    q, k, v = inputs(30)
    marks = every(4, 30)
    whole = landmark_attention(q, k, v, marks, topk=topk)
    for t in (1, 4, 5, 30):
        step = landmark_attention(q[:, t - 1 : t], k[:, :t], v[:, :t], marks[:t], topk=topk)
        close(step, whole[:, t - 1 : t])


def test_retrieval_of_all_blocks_is_all():
    q, k, v = inputs(30)
    marks = every(4, 30)
    for topk in (8, 2**40):
        close(landmark_attention(q, k, v, marks, topk=topk), landmark_attention(q, k, v, marks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("topk", [None, 2])
def test_precision(dtype, topk):
    """A few roundings of the inputs' dtype from float64, values and gradients."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs(70, dim=16, dim_v=16)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    marks = every(7, 70)
    cotangent = normal(2, 70, 4, 16)
    results = []
    for x in (leaves, exact):
        out = landmark_attention(*x, marks, topk=topk)
        assert out.dtype == x[0].dtype
        results.append([out, *torch.autograd.grad(out, x, cotangent.to(out.dtype))])
    eps = torch.finfo(dtype).eps
    for a, b in zip(*results, strict=True):
        assert (a.double() - b).norm() <= 4 * eps * b.norm()


def test_large_logits_do_not_overflow():
    q, k, v = inputs(20)
    out = landmark_attention(q * 200, k * 200, v, every(5, 20))
    assert torch.isfinite(out).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.isfinite(g).all() for g in grads)


def test_memory_is_a_slice(monkeypatch):
    """No table is larger than a slice says, forward and backward."""
    monkeypatch.setattr(module, "_SLICE", 4096)
    monkeypatch.setattr(module, "_LONGEST", -1)
    leaves = inputs(96, batch=1, dim=8, dim_v=8)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            if str(func).startswith("attnext.landmark"):
                with Watch():  # what it is made of
                    run = module.forward if "forward" in str(func) else module.backward
                    return run(*args, **(kwargs or {}))
            result = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(result):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes() // x.element_size())
            return result

    with Watch():
        landmark_attention(*leaves, every(8, 96)).sum().backward()
    assert largest <= 4096  # a table of all pairs has 36,864 numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("period", [1, 2, 17, 64])
def test_long_sequences_on_every_isa(dtype, period, monkeypatch):
    """Many tiles and blocks of keys: as in float64, and the same bits for any thread count."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs(300, 333, dim=16, dim_v=9)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    marks = every(period, 333) if period > 1 else torch.rand(333) < 0.3
    cotangents = normal(2, 300, 4, 9), normal(2, 300, 4, seed=9)

    def run(x):
        out, lse = landmark_attention(*x, marks, return_lse=True)
        sent = [c.to(t.dtype) for c, t in zip(cotangents, (out, lse), strict=True)]
        return [out, lse, *torch.autograd.grad((out, lse), x, sent)]

    with monkeypatch.context() as patch:
        patch.setattr(module, "_LONGEST", -1)  # plain torch
        wanted = run(exact)
    eps = max(torch.finfo(dtype).eps, 1e-13)
    for level in available_isas():
        with isa(level):
            with threads(1):
                got = run(leaves)
            with threads(2):
                again = run(leaves)
        for name, a, b, c in zip(("out", "lse", "dq", "dk", "dv"), got, wanted, again, strict=True):
            assert torch.equal(a, c), name
            assert (a.double() - b).norm() <= 4 * eps * b.norm(), (level, name)
        assert not got[4][:, marks].any()


@pytest.mark.parametrize("period", [4, 80])  # walked; a slice at a time
@pytest.mark.parametrize("shared", [True, False])
def test_operators(period, shared):
    leaves = [x.detach().float().requires_grad_() for x in inputs(90)]
    marks = every(period, 90) if shared else torch.rand(2, 90) < 1 / period
    torch.library.opcheck(torch.ops.attnext.landmark_forward.default, (*leaves, marks, 0.5))
    with torch.no_grad():
        results = torch.ops.attnext.landmark_forward(*leaves, marks, 0.5)
        sent = [torch.randn_like(t) for t in results]
        problem = (*(x.detach() for x in leaves), marks, 0.5)
    for dlse in (sent[1], None):
        arguments = (*problem, *results, sent[0], dlse, [True] * 3)
        torch.library.opcheck(torch.ops.attnext.landmark_backward.default, arguments)


X = torch.zeros(2, 6, 2, 4)
WRONG = {
    "no bool": (lambda: landmark_attention(X, X, X, torch.zeros(6)), TypeError,
                "is_landmark must be a bool tensor"),
    "shape": (lambda: landmark_attention(X, X, X, torch.zeros(5, dtype=torch.bool)), ValueError,
              r"is_landmark must be \[6\] or \[2, 6\], got \(5,\)"),
    "topk": (lambda: landmark_attention(X, X, X, torch.zeros(6, dtype=torch.bool), topk=0),
             ValueError, "topk must be at least 1"),
    "lse": (
        lambda: landmark_attention(X, X, X, torch.zeros(6, dtype=torch.bool), return_lse=7),
        TypeError, "return_lse must be a bool, got 7"),
    "scale": (
        lambda: landmark_attention(X, X, X, torch.zeros(6, dtype=torch.bool), scale=math.nan),
        ValueError, "scale must be finite"),
    "a map": (lambda: landmark_attention(*[torch.zeros(1, 2, 3, 2, 4)] * 3, torch.zeros(6) > 0),
              ValueError, r"query must be \[B, N, H, D\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_call(name):
    call, exception, message = WRONG[name]
    with pytest.raises(exception, match=message):
        call()
