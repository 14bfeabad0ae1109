# SPDX-License-Identifier: Apache-2.0
"""Spiking attention: neurons a time step at a time, weights written down, and the layer's parts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_problems import BUDGET, DTYPES, F64, error, normal

import attnext
from attnext import lif_spikes, reference_linear, spiking_attention


def spikes(*shape, dtype=F64, seed=0):
    return (normal(*shape, seed=seed) > 0).to(dtype)


# ---- neurons -------------------------------------------------------------------------------------


def neuron(function, x, membrane, **options):
    """Spikes, the membrane left, and the gradients of both."""
    leaves = [x.clone().requires_grad_(), membrane.clone().requires_grad_()]
    out = function(leaves[0], membrane=leaves[1], **options)
    sent = [normal(*t.shape, seed=9 + i) for i, t in enumerate(out)]
    return [t.detach() for t in out], torch.autograd.grad(out, leaves, sent)


@settings(max_examples=30)
@given(
    st.integers(1, 9),
    st.sampled_from([1.0, 1.5, 2.0, 10.0]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([1.0, 4.0]),
    st.integers(0, 1000),
)
def test_neurons(time, tau, threshold, slope, seed):
    x, membrane = 3 * normal(2, time, 7, seed=seed), normal(2, 7, seed=seed + 1)
    options = {"tau": tau, "threshold": threshold, "surrogate_slope": slope}
    got, grads = neuron(lif_spikes, x, membrane, **options, output_membrane=True)
    expected, wanted = neuron(reference_linear.lif_spikes, x, membrane, **options)
    assert torch.equal(got[0], expected[0].round())
    for a, b in zip((*got, *grads), (*expected, *wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    # A sequence cut in two, the membrane carried over, is the same.
    cut = seed % time
    if cut:
        first, between = lif_spikes(x[:, :cut], membrane=membrane, **options, output_membrane=True)
        second, last = lif_spikes(x[:, cut:], membrane=between, **options, output_membrane=True)
        assert torch.equal(torch.cat([first, second], dim=1), got[0])
        assert torch.equal(last, got[1])


def test_gradient_of_the_membrane_is_the_derivative():
    """Between two thresholds nothing is a surrogate."""
    x, membrane = 2 * normal(1, 4, 5), normal(1, 5, seed=1)
    assert 0 < lif_spikes(x, membrane=membrane).sum() < x.numel()

    def membrane_of(*leaves):
        return lif_spikes(leaves[0], membrane=leaves[1], output_membrane=True)[1]

    assert torch.autograd.gradcheck(membrane_of, (x.requires_grad_(), membrane.requires_grad_()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neurons_at_every_precision(dtype):
    """The membrane does not lose what a half would: many small inputs reach the threshold."""
    x = torch.full((1, 4000, 1), 0.5 + 1 / 256, dtype=dtype)
    options = {"tau": 1000.0, "threshold": 0.48}
    got, left = lif_spikes(x, **options, output_membrane=True)
    expected, membrane = reference_linear.lif_spikes(x, **options)
    assert got.dtype == dtype and left.dtype == torch.float32
    assert torch.equal(got, expected.to(dtype)) and got.sum() == 1
    assert error(left, membrane) < 1e-4


def test_neurons_under_torch():
    """Compiled whole, under autocast, and without a second derivative."""
    x = 2 * normal(2, 4, 5, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lif_spikes, fullgraph=True, backend="aot_eager")
    results = []
    for function in (lif_spikes, compiled):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        out.square().sum().backward()
        results.append((out.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][1].abs().sum() > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lif_spikes(x).dtype == torch.bfloat16
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(lif_spikes(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


# ---- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("extents", [(13,), (3, 4), (2, 3, 2)])
def test_attention(extents):
    query, key = (spikes(2, *extents, 3, 4, seed=s) for s in (1, 2))
    value = normal(2, *extents, 3, 5)
    for options in ({}, {"base": 100.0, "eps": 0.5}):
        expected = reference_linear.spiking_attention(query, key, value, **options)
        assert error(spiking_attention(query, key, value, **options), expected) < 1e-13
    for dtype in DTYPES:
        rounded = [x.to(dtype) for x in (query, key, value)]
        expected = reference_linear.spiking_attention(*rounded)
        out = spiking_attention(*rounded)
        assert out.dtype == dtype and error(out, expected) <= BUDGET[dtype]
    leaves = [x[:1].clone().requires_grad_() for x in (query, key, value)]
    shifted = [x + 0.3 for x in leaves[:2]]  # elu has a corner at 0
    leaves = [x.detach().requires_grad_() for x in (*shifted, leaves[2])]
    assert torch.autograd.gradcheck(spiking_attention, leaves, fast_mode=True)


def test_attention_under_autocast():
    """As with inputs of that precision, and what lies between them is no half: sums of 64 times
    1000 would not fit."""
    ones, large = torch.ones(1, 64, 1, 64), torch.full((1, 64, 1, 4), 1000.0)
    query, key = (spikes(1, 3, 4, 2, 4, seed=s).float() for s in (1, 2))
    value = normal(1, 3, 4, 2, 5, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(spiking_attention, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float16, torch.bfloat16):
        for tensors in ((ones, ones, large), (query, key, value)):
            expected = spiking_attention(*(x.to(dtype) for x in tensors))
            assert expected.isfinite().all()
            with torch.autocast("cpu", dtype=dtype):
                assert torch.equal(spiking_attention(*tensors), expected)
                assert torch.equal(compiled(*tensors), expected)


def test_vmap_of_neurons():
    x = torch.randn(3, 2, 4, 5)
    for f in (attnext.lif_spikes, torch.func.grad(lambda y: attnext.lif_spikes(y).sum())):
        mapped = torch.func.vmap(f, in_dims=1)(x.transpose(0, 1))
        assert torch.equal(mapped, torch.stack([f(y) for y in x]))


def test_no_tokens():
    empty = torch.randn(2, 0, 2, 4)
    assert attnext.spiking_attention(empty, empty, empty).shape == empty.shape


def test_sums_are_integers_and_not_turned():
    """Without positions it is a mean with weights of 1 to 4 a channel; values of 1 show what was
    divided by."""
    query, key = (spikes(1, 6, 5, 2, 4, seed=s) for s in (1, 2))
    ones = torch.ones(1, 6, 5, 2, 1, dtype=F64)
    overlap = torch.einsum("brchd,bRChd->brch", query + 1, key + 1)
    assert torch.equal(overlap, overlap.round())
    turned = [
        reference_linear.rotary_embedding((x + 1).flatten(-2)[..., None, :]).view(1, 30, 2, 4)
        for x in (query, key)
    ]
    weight = torch.einsum("bihd,bjhd->bih", *turned).view(1, 6, 5, 2)
    out = spiking_attention(query, key, ones, eps=0.0)[..., 0]
    assert error(out, weight / overlap) < 1e-13
    assert (out - 1).abs().max() > 0.1  # which turned sums would have given


def test_gradient_reaches_what_drives_the_neurons():
    drives = [2 * normal(2, 3, 2, 2, 2, 4, seed=s) for s in (1, 2)]
    value = normal(6, 2, 2, 2, 4, seed=3)
    sent = normal(6, 2, 2, 2, 4, seed=4)
    results = []
    for fire, attend in (
        (lif_spikes, spiking_attention),
        (lambda x: reference_linear.lif_spikes(x)[0], reference_linear.spiking_attention),
    ):
        leaves = [x.clone().requires_grad_() for x in (*drives, value)]
        q, k = (fire(x).flatten(0, 1) for x in leaves[:2])
        results.append(torch.autograd.grad(attend(q, k, leaves[2]), leaves, sent))
    for got, expected in zip(*results, strict=True):
        assert expected.abs().sum() > 0 and error(got, expected) < 1e-12


def test_windows_stand_in_the_batch():
    q, k, v = (spikes(1, 4, 8, 2, 4, seed=s) for s in (1, 2, 3))
    out = spiking_attention(
        *(x.unflatten(2, (2, 4)).movedim(2, 1).flatten(0, 1) for x in (q, k, v))
    )
    for window, begin in enumerate((0, 4)):
        one = spiking_attention(*(x[:, :, begin : begin + 4] for x in (q, k, v)))
        assert torch.equal(out[window], one[0])


# ---- the layer -----------------------------------------------------------------------------------


def test_layer():
    """The layer is its parts; frames know of earlier ones by their membranes alone."""
    torch.manual_seed(1)
    layer = attnext.SpikingAttention(8, num_heads=2, grid=(3, 4)).double()
    x = normal(2, 5, 3, 4, 8)
    trained = layer(x)
    driven = layer.enter(x).view(10, 12, 16)
    mean, spread = driven.mean((0, 2), keepdim=True), driven.var((0, 2), keepdim=True, correction=0)
    driven = ((driven - mean) / torch.sqrt(spread + layer.norm.eps)).view(2, 5, 3, 4, 16)
    fired = reference_linear.lif_spikes(driven)[0].flatten(0, 1)
    q, k = (t.unflatten(-1, (2, 4)) for t in fired.chunk(2, dim=-1))
    frames = x.flatten(0, 1)
    mixed = reference_linear.spiking_attention(q, k, frames.unflatten(-1, (2, 4))).flatten(-2)
    nearby = torch.zeros_like(frames)
    for r in range(3):
        for c in range(3):
            tap = layer.position.weight[:, 0, r, c]
            moved = torch.nn.functional.pad(frames, (0, 0, 1, 1, 1, 1))[:, r : r + 3, c : c + 4]
            nearby = nearby + tap * moved
    expected = (mixed + nearby + layer.position.bias).view_as(x)
    assert error(trained, expected) < 1e-12
    trained.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())

    layer.eval()
    whole = layer(x)
    start, membrane = layer(x[:, :2], output_membrane=True)
    assert error(torch.cat([start, layer(x[:, 2:], membrane)], dim=1), whole) < 1e-14
    later = x.clone()
    later[:, 3:] += 1
    assert torch.equal(layer(later)[:, :3], whole[:, :3])
    assert torch.equal(layer(x[1:]), whole[1:])


# ---- errors --------------------------------------------------------------------------------------


def x(*shape, **options):
    return torch.zeros(shape, **options)


def attend(q=None, k=None, v=None, **options):
    given_tensors = (x(1, 6, 2, 4) if t is None else t for t in (q, k, v))
    return spiking_attention(*given_tensors, **options)


WRONG = {
    "no tensor": (lambda: lif_spikes([1.0]), TypeError, "x must be a tensor, got list"),
    "integers": (lambda: lif_spikes(x(1, 2).long()), TypeError, "x must be one of .*int64"),
    "no time": (lambda: lif_spikes(x(3)), ValueError, r"x must be \[batch, time.*\(3,\)"),
    "tau": (lambda: lif_spikes(x(1, 2), tau=0.5), ValueError, "tau must be at least 1, got 0.5"),
    "threshold": (lambda: lif_spikes(x(1, 2), threshold="1"), TypeError, "threshold must be a num"),
    "slope": (
        lambda: lif_spikes(x(1, 2), surrogate_slope=float("inf")), ValueError, "surrogate_slope",
    ),
    "membrane": (lambda: lif_spikes(x(1, 2), membrane=1), TypeError, "membrane must be a float"),
    "membrane shape": (
        lambda: lif_spikes(x(1, 2, 3), membrane=x(1, 2)), ValueError, r"\(1, 3\).*\(1, 2\)",
    ),
    "output": (lambda: lif_spikes(x(1, 2), output_membrane=1), TypeError, "output_membrane"),
    "key dtype": (lambda: attend(k=x(1, 6, 2, 4).half()), TypeError, "key must .*float16"),
    "value device": (lambda: attend(v=x(1, 6, 2, 4, device="meta")), ValueError, "value .*meta"),
    "key shape": (lambda: attend(k=x(1, 5, 2, 4)), ValueError, "key must be .*1, 5, 2, 4"),
    "axes": (lambda: attend(*(x(6, 2, 4),) * 3), ValueError, "1 to 3 token axes"),
    "pairs": (
        lambda: attend(*(x(1, 2, 2, 1, 6),) * 3), ValueError, "multiple of 4 channels.*got 6",
    ),
    "eps": (lambda: attend(eps=-1), ValueError, "eps must not be negative, got -1"),
    "eps size": (lambda: attend(eps=10**400), ValueError, "eps must be finite"),
    "tau size": (lambda: lif_spikes(x(1, 2), tau=10**400), ValueError, "tau must be finite"),
    "no heads": (
        lambda: attend(*(x(1, 2, 0, 2),) * 3), ValueError, "query must have a multiple of 2 .* 0",
    ),
    "no channels": (
        lambda: attend(x(1, 2, 2, 0), x(1, 2, 2, 0), x(1, 2, 2, 3)), ValueError,
        "query must have a multiple of 2 .* 0",
    ),
    "sparse": (lambda: attend(x(1, 6, 2, 4).to_sparse()), TypeError, "query must be a dense"),
    "sparse x": (lambda: lif_spikes(x(1, 2).to_sparse()), TypeError, "x must be a dense tensor"),
    "eps type": (lambda: attend(eps=None), TypeError, "eps must be a number"),
    "layer dim": (lambda: attnext.SpikingAttention(6, 2, (2, 2)), ValueError, "multiple of 4"),
    "layer grid": (lambda: attnext.SpikingAttention(8, 2, 4), TypeError, "grid must be a tuple"),
    **{
        f"layer {name}": (
            lambda name=name, value=value: attnext.SpikingAttention(8, 2, (2, 2), **{name: value}),
            (ValueError, TypeError), f"{name} must be",
        )
        for name, value in (
            ("tau", 0), ("tau", "a"), ("threshold", -1), ("surrogate_slope", float("nan")),
        )
    },
    "layer strings": (
        lambda: attnext.SpikingAttention(8, 2, (2, 2))("x"), TypeError, "x must be .*str",
    ),
    "layer integers": (
        lambda: attnext.SpikingAttention(8, 2, (2, 2))(x(1, 2, 2, 2, 8).long()), TypeError,
        "x must be .*int64",
    ),
    "layer output": (
        lambda: attnext.SpikingAttention(8, 2, (2, 2))(x(1, 2, 2, 2, 8), output_membrane=5),
        TypeError, "output_membrane must be a bool",
    ),
    "layer input": (
        lambda: attnext.SpikingAttention(8, 2, (2, 2))(x(1, 2, 3, 2, 8)), ValueError, "x must be",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    function, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        function()
