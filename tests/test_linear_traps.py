# SPDX-License-Identifier: Apache-2.0
"""Linear attention where others went wrong: extremes, signs, strides, normalisers of their own."""

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from linear_problems import (
    BUDGET,
    DTYPES,
    F64,
    accumulator,
    assert_same,
    check,
    error,
    evaluate,
    form,
    normal,
    problem,
    problems,
    uniform,
)

import attnext
from attnext import linear_attention, linear_attention_step, reference
from attnext.testing import available_isas, isa

# ---- traps ---------------------------------------------------------------------------------------


def test_reference_keeps_the_digits_of_eps():
    one = torch.ones(1, 1, 1, 1, dtype=F64)
    options = {"scale": 1.0, "normalize": True, "eps": 0.1, "return_denominator": True}
    assert reference.linear_attention(one, one, one, **options)[1].item() == 1.1
    assert reference.linear_attention(-one, one, one, **options)[1].item() == -1.1


@pytest.mark.parametrize("kind", ["zero", "steep", "mixed", "never", "slow"])
@pytest.mark.parametrize("name", ["identity", "taylor2, decayed, normalized", "delta"])
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_extreme_decays(name, kind, dtype):
    """No NaN, and gradients as exact as any: also beside decays that forget everything."""
    tensors, options = form(name, tokens=90, dim=6, dtype=dtype, chunk_size=32)
    decay = torch.zeros(1, 90, 2)
    if kind == "steep":
        decay -= 50
    elif kind == "mixed":
        decay -= uniform(1, 90, 2, dtype=torch.float32, seed=8) / 10
        decay[:, ::9] = -50
    elif kind == "never":
        decay -= uniform(1, 90, 2, dtype=torch.float32, seed=8) / 10
        decay[:, ::11] = -torch.inf
    elif kind == "slow":  # underflows over a chunk
        decay -= 8
    tensors["decay"] = decay.to(accumulator(dtype))
    budget = 1e-11 if dtype == F64 else 4e-6
    if "normalize" in options:  # what sees itself alone has a gradient of nothing but rounding
        results = evaluate(linear_attention, tensors, options)
        assert all(torch.isfinite(x).all() for x in results.values())
        check(tensors, options, budget, gradients=False)
        options["normalize"] = False
        tensors["initial_state"] = tensors["initial_state"][..., :-1]
    got = check(tensors, options, budget)
    if kind == "zero":
        plain = {n: x for n, x in tensors.items() if n != "decay"}
        expected = evaluate(linear_attention, plain, options)
        assert error(got["out"], expected["out"]) <= budget


def test_normaliser_with_signs():
    """Sums that cancel, exactly and nearly, and that are negative: never a division by 0."""
    query, value = torch.ones(1, 4, 1, 2), normal(1, 4, 1, 3, dtype=torch.float32)
    key = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-2.0, 0.0], [1e-7, 0.0]])[None, :, None]
    options = {"normalize": True, "eps": 1e-3, "scale": 1.0}
    out = linear_attention(query, key, value, **options)
    assert torch.isfinite(out).all()
    sums = key.sum(-1).cumsum(1).double()
    moved = sums + torch.where(sums < 0, -1e-3, 1e-3)
    plain = linear_attention(query.double(), key.double(), value.double(), scale=1.0)
    torch.testing.assert_close(out.double(), plain / moved[..., None], rtol=1e-5, atol=0)
    assert sums[0, 1] == 0 and sums[0, 2] < 0


def test_sums_that_a_half_cannot_hold():
    """The normaliser of 4096 tokens at scale 1 is beyond the largest float16."""
    tensors, _ = problem(4096, heads=(1, 1, 1), dim=16, dim_v=16, dtype=torch.float16)
    options = {"feature_map": "taylor2", "normalize": True, "scale": 1.0}
    out, state = linear_attention(**tensors, **options, output_final_state=True)
    expected, exact = reference.linear_attention(**tensors, **options, output_final_state=True)
    assert error(out, expected) <= BUDGET[torch.float16]
    wide = tensors["query"].double(), tensors["key"].double()
    sums = 1 + torch.einsum("bnhd,bmhd->bnm", *wide)
    assert ((sums.square() + 1) / 2).sum(-1).max() > 65504
    assert error(state, exact) <= BUDGET[torch.float32]
    assert state[..., 0, -1].item() == 4096  # a stored half would have stalled at 2048


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16], ids=str)
def test_nan_reaches_only_what_attends_it(dtype):
    for name in ("identity", "taylor2, normalized", "relu, decayed", "delta"):
        tensors, options = form(name, tokens=50, dtype=dtype)
        clean = linear_attention(**tensors, **options)
        for which in ("key", "value"):
            spoilt = {**tensors, which: tensors[which].clone()}
            spoilt[which][:, 21, 1] = torch.nan
            out = linear_attention(**spoilt, **options)
            assert torch.equal(out[:, :21], clean[:, :21])
            assert torch.equal(out[:, :, 0], clean[:, :, 0])
            assert out[:, 21:, 1].isnan().all(dim=-1).all()


@pytest.mark.parametrize("isa_name", available_isas())
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_what_is_not_finite(dtype, isa_name):
    """They are not finite where the recurrence's are not, and nowhere else."""
    names = ("identity", "taylor2, normalized", "relu, decayed", "delta")
    for name, which in itertools.product(names, ("query", "key", "dout")):
        tensors, options = form(name, tokens=75, dtype=dtype)
        if which != "dout":
            tensors[which][:, 37, 1, 3] = torch.nan
        results = []
        for call in (linear_attention, reference.linear_attention):
            given = {n: x.detach().clone() for n, x in tensors.items()}
            if call is not linear_attention:
                given = {n: x.double() for n, x in given.items()}
            given = {n: x.requires_grad_() for n, x in given.items()}
            out = call(**given, **options)
            out = out[0] if isinstance(out, tuple) else out
            dout = torch.ones_like(out)
            if which == "dout":
                dout[:, 37, 1, 3] = torch.inf
            with isa(isa_name):
                out.backward(dout)
            results.append({n: x.grad for n, x in given.items()})
        for n, grad in results[0].items():
            want, where = results[1][n], (name, which, n)
            rows = [x.view(*tensors[n].shape, -1).isfinite().all(-1) for x in (grad, want)]
            if grad.dim() == 4:
                rows = [x.all(-1) for x in rows]
            assert torch.equal(*rows), where
            finite = grad.isfinite() & want.isfinite()
            assert error(grad[finite], want[finite]) <= 4 * BUDGET[dtype], where


def test_strides():
    """Heads first, padded by NaN, reversed heads: no copy, no other entry read."""
    tensors, options = form("taylor2, normalized", tokens=40, heads=(4, 4, 4), batch=2)
    expected = evaluate(linear_attention, tensors, options)
    views = dict(tensors)
    for name in ("query", "key", "value"):
        x = tensors[name]
        room = torch.full((2, 4, 43, x.shape[-1] + 7), torch.nan, dtype=x.dtype)
        room[:, :, 2:42, 3:-4] = x.transpose(1, 2)
        views[name] = room[:, :, 2:42, 3:-4].transpose(1, 2)
    assert_same(evaluate(linear_attention, views, options), expected)
    views["query"] = tensors["query"].repeat_interleave(2, dim=-1)[..., ::2]  # copied
    assert_same(evaluate(linear_attention, views, options), expected)


@pytest.mark.parametrize("isa_name", available_isas())
def test_rows_are_taken_where_they_lie_or_copied_to_the_same_bits(isa_name):
    """Whole, aligned rows may be operands of a product without a copy, others not."""

    def odd(x):
        room = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype)
        room[..., 1:-2] = x
        return room[..., 1:-2]

    for tokens, dim, dim_v in ((100, 64, 64), (33, 96, 40), (15, 16, 16), (70, 31, 64)):
        shape = {"tokens": tokens, "dim": dim, "dim_v": dim_v, "state": True}
        tensors, options = problem(**shape, dtype=torch.bfloat16)
        moved = {
            n: odd(x) if x.dim() == 4 and n != "initial_state" else x for n, x in tensors.items()
        }
        for more in (
            {},
            {"reverse": True},
            {"is_causal": False},
            {"scale": -0.3, "chunk_size": 20},
        ):
            with isa(isa_name):
                got, again = (
                    linear_attention(**x, **options, **more, output_final_state=True)
                    for x in (tensors, moved)
                )
            exact = reference.linear_attention(**tensors, **options, **more)
            assert_same(dict(enumerate(got)), dict(enumerate(again)))
            assert error(got[0], exact) <= 1.2 * BUDGET[torch.bfloat16]


def test_gradient_without_an_output_or_without_the_state():
    tensors, options = form("elu, normalized", tokens=40, dim=5)
    for used in (0, 1):
        leaves = {n: x.clone().requires_grad_() for n, x in tensors.items()}
        wide = {n: x.clone().requires_grad_() for n, x in tensors.items()}
        results = linear_attention(**leaves, **options, output_final_state=True)
        expected = reference.linear_attention(**wide, **options, output_final_state=True)
        results[used].square().sum().backward()
        expected[used].square().sum().backward()
        for name in tensors:
            want = wide[name].grad
            want = torch.zeros_like(wide[name]) if want is None else want
            assert error(leaves[name].grad, want) < 1e-12, name


def test_plain_layout_of_the_taylor_state():
    """The BASED state is what its features give, and the way back is exact."""
    dim, dim_v, scale = 5, 3, 5**-0.5
    tensors, _ = problem(30, dim=dim, dim_v=dim_v)
    options = {"feature_map": "taylor2", "normalize": True}
    _, state = linear_attention(**tensors, **options, output_final_state=True)
    x = tensors["key"] * scale**0.5
    pairs = (x[..., :, None] * x[..., None, :]).flatten(-2) / 2**0.5
    plain = torch.cat([torch.ones_like(x[..., :1]), x, pairs], dim=-1)
    values = torch.cat([tensors["value"], torch.ones(1, 30, 2, 1)], dim=-1)
    expected = torch.einsum("bnhf,bnhv->bhfv", plain, values)
    assert error(attnext.taylor_state_to_plain(state, dim), expected) < 1e-14
    assert error(attnext.taylor_state_from_plain(expected, dim), state) < 1e-14


# ---- normalisers of their own --------------------------------------------------------------------


@settings(max_examples=30)
@given(problems(), st.sampled_from(["both", "query", "key"]))
def test_any_normalizer_in_double(given_problem, which):
    """Numerators and sums of features of different queries and keys, and all gradients."""
    tensors, options = given_problem
    assume(options.get("normalize"))
    for n, name in enumerate(("query", "key")):
        if which in ("both", name):
            tensors[f"normalizer_{name}"] = normal(*tensors[name].shape, seed=20 + n)
    check(tensors, options, budget=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature_map", ["elu", "taylor2"])
def test_normalizer_budget_and_decoding(feature_map, dtype):
    tensors, options = problem(
        tokens=40, heads=(4, 2, 4), dim=16, dim_v=20, dtype=dtype, state=True,
        feature_map=feature_map, normalize=True,
    )  # fmt: skip
    for n, name in enumerate(("query", "key")):
        tensors[f"normalizer_{name}"] = normal(*tensors[name].shape, dtype=dtype, seed=20 + n)
    if feature_map == "taylor2":  # weights that do not cancel
        tensors["normalizer_key"] = tensors["normalizer_query"][:, :, ::2].contiguous()
    check(tensors, options, gradients=False)
    out, final = linear_attention(**tensors, **options, output_final_state=True)
    state = tensors.pop("initial_state")
    pool = torch.full((3, *state.shape[1:]), torch.nan)
    pool[2] = state
    steps = []
    for t in range(0, 40, 2):
        new = {name: x[:, t : t + 2] for name, x in tensors.items()}
        steps.append(linear_attention_step(**new, state=pool, **options, slots=torch.tensor([2])))
    for got, expected in ((torch.cat(steps, 1), out), (pool[2], final[0])):
        assert error(got, expected) <= 2 * BUDGET[dtype]
    assert pool[:2].isnan().all()
    padding = linear_attention_step(**new, state=pool, **options, slots=torch.tensor([-1]), eps=0.0)
    assert not padding.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["normalizer_query", "normalizer_key"])
def test_one_normalizer_alone_rounds_a_gradient_once(name, dtype):
    """What both the numerator and the normaliser are made of has two gradients, which cancel."""
    tensors, _ = problem(tokens=200, dim=32, dim_v=32, dtype=dtype)
    tensors["value"] = tensors["value"] + 3
    tensors[name] = tensors[name.removeprefix("normalizer_")] + 0.3
    cotangent = normal(1, 200, 2, 32, dtype=dtype, seed=7)

    def gradients(cotangent, **named):
        leaves = [x.detach().requires_grad_() for x in named.values()]
        out = linear_attention(
            **dict(zip(named, leaves, strict=True)), feature_map="elu", normalize=True
        )
        return torch.autograd.grad(out, leaves, cotangent)

    exact = gradients(cotangent.double(), **{n: x.double() for n, x in tensors.items()})
    for got, right in zip(gradients(cotangent, **tensors), exact, strict=True):
        assert error(got, right) <= BUDGET[dtype]


def test_eps_beside_other_sums_is_not_rounded():
    """Not to torch's default dtype, as a number in torch.where is."""
    one = torch.ones(1, 1, 1, 1, dtype=F64)
    options = {"feature_map": "relu", "normalize": True, "eps": 0.1, "normalizer_key": one}
    _, total = linear_attention(one, one, one, **options, return_denominator=True)
    assert abs(total.item() - 1.1) < 1e-15
    step = linear_attention_step(one, one, one, one.new_zeros(1, 1, 1, 2), **options)
    assert abs(step.item() - 1 / 1.1) < 1e-15
    _, total = linear_attention(
        one, one, one, **{**options, "normalizer_query": -one, "eps": 0.0}, return_denominator=True
    )
    assert total.item() == 0
    signed = {**options, "feature_map": "identity", "normalizer_query": -one}
    _, total = linear_attention(one, one, one, **signed, return_denominator=True)
    assert abs(total.item() + 1.1) < 1e-15  # away from 0


@pytest.mark.parametrize("name", ["normalizer_query", "normalizer_key"])
def test_normalizer_errors(name):
    tensors, _ = problem()
    with pytest.raises(ValueError, match=f"{name} needs normalize"):
        linear_attention(**tensors, **{name: tensors["query"]})
    with pytest.raises(ValueError, match=f"{name} must have dtype and shape of"):
        linear_attention(**tensors, normalize=True, **{name: tensors["query"][:, 1:]})
    with pytest.raises(TypeError, match=f"{name} must be a floating-point tensor"):
        linear_attention_step(
            **{n: x[:, :1] for n, x in tensors.items()}, state=torch.zeros(1, 2, 4, 4).double(),
            normalize=True, **{name: 1},
        )  # fmt: skip
