# SPDX-License-Identifier: Apache-2.0
"""Problems of linear attention, what the recurrence makes of them, and how far off one may be."""

import torch
from hypothesis import strategies as st

from attnext import linear_attention, reference
from attnext.testing import threads

F64 = torch.float64
BUDGET = {F64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2.5e-3, torch.float16: 4e-4}
MAPS = ("identity", "elu", "relu", "taylor2")


def normal(*shape, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def uniform(*shape, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=F64).to(dtype)


def accumulator(dtype):
    return F64 if dtype == F64 else torch.float32


def features(feature_map, dim):
    return 1 + dim + dim * (dim + 1) // 2 if feature_map == "taylor2" else dim


def problem(
    tokens=9, batch=1, heads=(2, 2, 2), dim=4, dim_v=3, dtype=F64, decay=None, beta=False,
    state=False, states=None, **options,
):  # fmt: skip
    """Tensors and options of a call. ``decay``: None, "head" or "token"."""
    most, acc = max(heads), accumulator(dtype)
    tensors = {
        "query": normal(batch, tokens, heads[0], dim, dtype=dtype, seed=1),
        "key": normal(batch, tokens, heads[1], dim, dtype=dtype, seed=2),
        "value": normal(batch, tokens, heads[2], dim_v, dtype=dtype, seed=3),
    }
    if decay is not None:
        shape = (most,) if decay == "head" else (batch, tokens, most)
        tensors["decay"] = -uniform(*shape, dtype=acc, seed=4) / 2
    if beta:
        tensors["key"] = torch.nn.functional.normalize(tensors["key"].double(), dim=-1).to(dtype)
        tensors["beta"] = uniform(batch, tokens, most, dtype=acc, seed=5)
    if state:
        rows = features(options.get("feature_map", "identity"), dim)
        columns = dim_v + options.get("normalize", False)
        shape = (states or batch, most, rows, columns)
        tensors["initial_state"] = uniform(*shape, dtype=acc, seed=6)
    return tensors, options


def evaluate(function, tensors, options, gradients=True, seed=11):
    """Every result that these options allow, and gradients of everything."""
    leaves = {n: x.detach().requires_grad_(gradients) for n, x in tensors.items()}
    names, more = ["out"], {}
    if options.get("normalize"):
        names, more["return_denominator"] = [*names, "denominator"], True
    if options.get("window_size") is None:
        names, more["output_final_state"] = [*names, "final_state"], True
    results = function(**leaves, **options, **more)
    named = dict(zip(names, [results] if torch.is_tensor(results) else results, strict=True))
    if gradients:
        cotangents = [
            normal(*x.shape, seed=seed + i).to(x.dtype) for i, x in enumerate(named.values())
        ]
        grads = torch.autograd.grad(list(named.values()), list(leaves.values()), cotangents)
        named |= {f"grad_{n}": g for n, g in zip(leaves, grads, strict=True)}
    return {n: x.detach() for n, x in named.items()}


def error(got, expected):
    """Relative, root mean square."""
    if not expected.numel():
        return 0.0
    size = expected.double().square().mean().sqrt().item()
    return (got.double() - expected.double()).square().mean().sqrt().item() / (size or 1.0)


def assert_close(got, expected, budget, slack=None):
    assert got.keys() == expected.keys()
    for name in expected:
        assert got[name].shape == expected[name].shape, name
        assert torch.isfinite(got[name]).all() or not torch.isfinite(expected[name]).all(), name
        off = error(got[name], expected[name])
        allowed = budget * (slack or {}).get(name, 1)
        assert off <= allowed, f"{name}: error {off:.2e} exceeds {allowed:.2e}"


def slack(tensors, options):
    """Where a gradient is a difference of larger numbers. That of a decay is one number out of all
    that crosses a token, and a head's is the sum of its tokens', of either sign."""
    of_heads = "decay" in tensors and tensors["decay"].dim() == 1
    return {"grad_decay": 30 if of_heads else 3}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=0, rtol=0, equal_nan=True)


class Cotangent(torch.autograd.Function):
    """x, for which the cotangent is rounded as it is for the kernels."""

    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = dtype
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype).to(grad.dtype), None


def expect(tensors, options, gradients=True):
    """What the recurrence gives in double, from the same cotangents."""
    dtype = tensors["query"].dtype

    def exact(**inputs):
        result = reference.linear_attention(**inputs)
        if torch.is_tensor(result):
            return Cotangent.apply(result, dtype)
        others = (Cotangent.apply(x, accumulator(dtype)) for x in result[1:])
        return (Cotangent.apply(result[0], dtype), *others)

    wide = {n: x.double() for n, x in tensors.items()}
    with threads(1):  # a loop over tiny operators
        return evaluate(exact, wide, options, gradients)


def check(tensors, options, budget=None, gradients=True):
    """The kernels against the recurrence."""
    dtype = tensors["query"].dtype
    got = evaluate(linear_attention, tensors, options, gradients)
    assert got["out"].dtype == dtype
    expected = expect(tensors, options, gradients)
    assert_close(got, expected, budget or BUDGET[dtype], slack(tensors, options))
    return got


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = {
    "identity": {},
    "elu, normalized": {"feature_map": "elu", "normalize": True},
    "relu, decayed": {"feature_map": "relu", "decay": "token"},
    "taylor2, normalized": {"feature_map": "taylor2", "normalize": True, "dim": 16},
    "taylor2, decayed, normalized": {
        "feature_map": "taylor2", "normalize": True, "dim": 16, "decay": "head",
    },
    "delta": {"beta": True},
    "delta, decayed": {"beta": True, "decay": "token"},
    "not causal": {"feature_map": "elu", "normalize": True, "is_causal": False},
    "reverse": {"reverse": True, "decay": "head"},
}  # fmt: skip


def form(name, **more):
    return problem(**{"tokens": 100, "dim": 32, "dim_v": 24, "state": True, **FORMS[name], **more})


@st.composite
def problems(draw):
    """Anything: small chunks make many of them, and several segments."""
    heads = draw(st.sampled_from([(1, 1, 1), (2, 2, 2), (1, 1, 3), (4, 2, 1), (2, 1, 4)]))
    feature_map = draw(st.sampled_from(MAPS))
    dim = draw(st.integers(1, 6 if feature_map == "taylor2" else 20))
    options = {
        "feature_map": feature_map,
        "is_causal": draw(st.sampled_from([True, True, True, False])),
        "reverse": draw(st.booleans()),
        "normalize": draw(st.booleans()),
        "chunk_size": draw(st.sampled_from([None, 1, 2, 5, 16, 17])),
    }
    if options["normalize"]:
        options["eps"] = 1.0  # sums near 0 would be a matter of luck, and so would be a mean of one
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.25, 1.0, -0.5]))
    if options["normalize"] and options.get("scale", 1) < 0:
        options["scale"] = 0.5
    tokens, batch, states = draw(st.integers(1, 80)), draw(st.integers(1, 2)), None
    division = draw(st.sampled_from(["whole", "whole", "packed", "blocks"]))
    if division == "packed":
        batch = 1
        inner = draw(st.lists(st.integers(0, tokens), max_size=3))
        bounds = [0, *sorted(inner), tokens]
        options["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
        states = len(bounds) - 1
    elif division == "blocks":
        options["window_size"] = draw(st.integers(1, 40))
    gates = {}
    if options["is_causal"]:
        gates["decay"] = draw(st.sampled_from([None, "head", "token"]))
        if feature_map != "taylor2" and draw(st.booleans()):
            options["normalize"] = False
            gates["beta"] = True
    if gates.get("beta") and feature_map == "elu":
        feature_map = options["feature_map"] = "identity"  # keys of no unit length would grow
    return problem(
        tokens, batch, heads, dim, draw(st.integers(1, 20)),
        state=division != "blocks" and draw(st.booleans()), states=states, **gates, **options,
    )  # fmt: skip
