# SPDX-License-Identifier: Apache-2.0
"""Derivatives as torch asks for them: in torch.func, compiled, twice, forward, of odd tensors."""

import pytest
import torch
from torch.autograd import forward_ad

import attnext


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def routed(query, key, value):
    lists = torch.tensor([[[[0, -1], [1, 0], [2, 0]]]], dtype=torch.int32)
    return attnext.routed_attention(query, key, value, attnext.BlockPlan.of(lists, 9, 3))


OPS = {
    "window": lambda q, k, v: attnext.neighborhood_attention(q, k, v, 3),
    "linear": lambda q, k, v: attnext.linear_attention(q, k, v, feature_map="elu"),
    "routed": routed,
}
EVERY = pytest.mark.parametrize("op", OPS)


def problem(op):
    """A loss of the query, and the query."""
    query, key, value = (normal(1, 9, 2, 8, seed=i) for i in range(3))
    return lambda q: OPS[op](q, key, value).pow(2).sum(), query


def gradient(loss, query):
    leaf = query.clone().requires_grad_()
    loss(leaf).backward()
    return leaf.grad


@EVERY
def test_torch_func(op):
    loss, query = problem(op)
    want = gradient(loss, query)
    assert torch.equal(torch.func.grad(loss)(query), want)
    assert torch.equal(torch.func.jacrev(loss)(query), want)
    _, pull = torch.func.vjp(loss, query)  # is called when the transform is over
    assert torch.equal(pull(torch.tensor(1.0))[0], want)
    queries = torch.stack([query, 2 * query])
    mapped = torch.func.vmap(torch.func.grad(loss))(queries)
    for got, x in zip(mapped, queries, strict=True):
        torch.testing.assert_close(got, gradient(loss, x), rtol=1e-6, atol=1e-6)


@EVERY
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_func_compiled(op, backend):
    loss, query = problem(op)
    torch.compiler.reset()
    compiled = torch.compile(torch.func.grad(loss), backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(query), gradient(loss, query), rtol=1e-6, atol=1e-6)


@EVERY
def test_one_tensor_twice_in_a_compiled_call(op):
    def loss(x):
        return OPS[op](x, x, x).pow(2).sum()

    query = normal(1, 9, 2, 8)
    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        gradient(compiled, query), gradient(loss, query), rtol=1e-6, atol=1e-6
    )


def test_key_sequences_are_the_queries_in_a_compiled_call():
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)

    def loss(x):
        return attnext.sliding_window_attention(x, x, x, 3, cu_seqlens_q=ends).pow(2).sum()

    query = normal(1, 9, 2, 8)
    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        gradient(compiled, query), gradient(loss, query), rtol=1e-6, atol=1e-6
    )


REFUSED = pytest.raises(NotImplementedError, match="second derivative")


@EVERY
def test_second_derivatives_are_refused(op):
    """However they are asked for: what is silently taken for a constant trains wrong."""
    loss, query = problem(op)
    leaf = query.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    assert torch.equal(first, gradient(loss, query)) and first.requires_grad
    with REFUSED:
        first.square().sum().backward()
    linear = OPS[op](leaf, query, query).sum()  # its cotangent, of ones, depends on nothing
    (first,) = torch.autograd.grad(linear, leaf, create_graph=True)
    with REFUSED:
        first.sum().backward()
    with REFUSED:
        torch.func.grad(lambda q: torch.func.grad(loss)(q).sum())(query)
    with REFUSED:
        torch.func.jacrev(torch.func.grad(loss))(query)
    with REFUSED:
        torch.autograd.functional.hvp(loss, query, query)


@EVERY
def test_forward_mode_is_refused(op):
    loss, query = problem(op)
    refused = pytest.raises(NotImplementedError, match="forward-mode")
    with forward_ad.dual_level():
        assert torch.equal(loss(query), loss(query.clone()))  # nothing has a tangent
        with refused:
            loss(forward_ad.make_dual(query, query))
    with refused:
        torch.func.jvp(loss, (query,), (query,))


def selected(x):
    return attnext.select_topk(x, x[:, :4], 2, return_values=True)[1].square().sum()


def spikes(x):
    return attnext.lif_spikes(2 * x).sum()


def landmarks(x):
    marks = torch.zeros(9, dtype=torch.bool)
    marks[[3, 7]] = True
    return attnext.landmark_attention(x, x, x, marks).sum()


@pytest.mark.parametrize("loss", [selected, spikes, landmarks], ids=lambda f: f.__name__)
def test_second_derivatives_of_other_functions_are_refused(loss):
    leaf = normal(1, 9, 2, 8).requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    assert torch.equal(first, gradient(loss, leaf.detach()))
    with REFUSED:
        first.sum().backward()


@EVERY
@pytest.mark.parametrize("which", [0, 1, 2])
def test_negated_views(op, which):
    """A tensor may carry a minus sign that is not in its memory."""
    tensors = [normal(1, 9, 2, 8, seed=i) for i in range(3)]
    negated = [torch._neg_view(t) if i == which else t for i, t in enumerate(tensors)]
    plain = [-t if i == which else t for i, t in enumerate(tensors)]
    assert torch.equal(OPS[op](*negated), OPS[op](*plain))
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = OPS[op](*leaves)
    grads = torch.autograd.grad(out, leaves, torch._neg_view(tensors[0]), retain_graph=True)
    wants = torch.autograd.grad(out, leaves, -tensors[0])
    for got, want in zip(grads, wants, strict=True):
        assert torch.equal(got, want)


@EVERY
def test_vmap_over_nothing(op):
    _, query = problem(op)
    out = torch.func.vmap(lambda q: OPS[op](q, query, query))(query.new_empty(0, *query.shape))
    assert out.shape == (0, *query.shape)


@EVERY
def test_empty_tensors_with_strides(op):
    empty = torch.empty(0, 9, 2, 16)[..., ::2].requires_grad_()
    out = OPS[op](empty, empty, empty)
    assert out.shape == empty.shape
    (grad,) = torch.autograd.grad(out, empty, torch.empty(0, 9, 2, 16)[..., ::2])
    assert grad.shape == empty.shape
