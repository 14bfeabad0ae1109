# SPDX-License-Identifier: Apache-2.0
"""Linear attention: against the recurrence in float64, and against itself in every other form."""

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from linear_problems import (
    BUDGET,
    DTYPES,
    F64,
    FORMS,
    MAPS,
    accumulator,
    assert_close,
    assert_same,
    check,
    error,
    evaluate,
    expect,
    form,
    normal,
    problem,
    slack,
    uniform,
)

import attnext
from attnext import linear_attention, linear_attention_step, reference
from attnext.testing import available_isas, isa, threads

# ---- against the recurrence ----------------------------------------------------------------------


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


@settings(max_examples=60)
@given(problems())
def test_anything_in_double(given_problem):
    check(*given_problem, budget=1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_budget(name, dtype):
    check(*form(name, dtype=dtype, chunk_size=8))  # several segments


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("feature_map", ["elu", "relu", "taylor2"])
def test_query_gradients_where_features_are_few(feature_map, is_causal, dtype):
    """A query's gradient is small beside the mean that it is taken from: no rounding of the outputs
    may be in it."""
    form = {"feature_map": feature_map, "normalize": True, "is_causal": is_causal}
    tensors, _ = problem(tokens=400, dim=8, dim_v=64, dtype=dtype)
    tensors["cotangent"] = normal(1, 400, 2, 64, dtype=dtype, seed=7)

    def gradient(query, cotangent, **others):
        query.requires_grad_()
        out = linear_attention(query, **others, **form)
        return torch.autograd.grad(out, query, cotangent)[0]

    exact = gradient(**{name: x.double() for name, x in tensors.items()})
    assert error(gradient(**tensors), exact) <= 1.25 * BUDGET[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa_name", available_isas())
@pytest.mark.parametrize("feature_map", ["elu", "taylor2"])
def test_gradients_beside_a_normaliser_of_values_with_a_mean(feature_map, isa_name, dtype):
    """A gradient takes the mean from each value: beside a large one neither the rounding of the
    outputs may be in it, nor features that are rounded for the one and not for the other."""
    options = {"feature_map": feature_map, "normalize": True, "chunk_size": 16}
    tensors, _ = problem(tokens=300, dim=16, dim_v=64, dtype=dtype)
    tensors["value"] = tensors["value"] + 3
    tensors["cotangent"] = normal(1, 300, 2, 64, dtype=dtype, seed=7)

    def gradients(cotangent, **named):
        leaves = [x.requires_grad_() for x in named.values()]
        return torch.autograd.grad(linear_attention(*leaves, **options), leaves, cotangent)

    exact = gradients(**{name: x.double() for name, x in tensors.items()})
    with isa(isa_name):
        for got, right in zip(gradients(**tensors), exact, strict=True):
            assert error(got, right) <= 1.1 * BUDGET[dtype]


@pytest.mark.parametrize("name", FORMS)
def test_every_instruction_set(name):
    for dtype in (torch.float32, torch.float16):
        tensors, options = form(name, dtype=dtype, tokens=70)
        expected = expect(tensors, options)
        for level in available_isas():
            with isa(level):
                got = evaluate(linear_attention, tensors, options)
            assert_close(got, expected, BUDGET[dtype], slack(tensors, options))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_does_not_grow_with_length(name, dtype):
    tensors, options = form(
        name, tokens=16384, heads=(1, 1, 1), dim=16, dim_v=16, dtype=dtype, state=False
    )
    got = linear_attention(**tensors, **options)
    expected = reference.linear_attention(**tensors, **options)
    first, last = (error(got[:, s], expected[:, s]) for s in (slice(0, 512), slice(-512, None)))
    assert max(first, last) <= BUDGET[dtype]
    assert last <= 2 * first


@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 31, 32, 33, 63, 64, 65, 129])
@pytest.mark.parametrize("name", ["elu, normalized", "taylor2, decayed, normalized", "delta"])
def test_lengths(name, tokens):
    got = check(*form(name, tokens=tokens, dim=5, dim_v=4), budget=1e-11) if tokens else None
    tensors, options = form(name, tokens=tokens, dim=5, dim_v=4)
    if got is None:
        got = evaluate(linear_attention, tensors, options)
        assert_same(
            {n: got[n] for n in ("final_state", "grad_initial_state")},
            {
                "final_state": tensors["initial_state"],
                "grad_initial_state": normal(
                    *tensors["initial_state"].shape, seed=13 if options.get("normalize") else 12
                ),
            },
        )
        assert got["out"].shape == (1, 0, 2, 4)


@pytest.mark.parametrize(
    "dim, dim_v", [(1, 1), (8, 8), (16, 64), (17, 33), (64, 64), (100, 40), (40, 100), (256, 256)]
)
@pytest.mark.parametrize("gate", ["none", "decay", "delta"])
def test_head_dims(dim, dim_v, gate):
    gates = {"none": {}, "decay": {"decay": "token"}, "delta": {"beta": True, "decay": "head"}}
    tokens = 70 if dim * dim_v < 2**14 else 34
    shape = {"tokens": tokens, "heads": (1, 1, 1), "dim": dim, "dim_v": dim_v}
    check(*problem(**shape, state=True, dtype=torch.float32, **gates[gate]))


@pytest.mark.parametrize(
    "tokens, dim, dim_v", [(1, 9, 15), (15, 7, 17), (33, 17, 33), (70, 40, 100)]
)
def test_pairs_that_are_not_full(tokens, dim, dim_v):
    """Of tokens, entries, columns and features."""
    shape = {"tokens": tokens, "dim_v": dim_v, "state": True, "dtype": torch.bfloat16}
    for feature_map in ("identity", "elu", "taylor2"):
        entries = min(dim, 15) if feature_map == "taylor2" else dim
        check(*problem(dim=entries, feature_map=feature_map, **shape), budget=5e-3)


def test_pairs_of_entries_in_a_long_chunk():
    """What is not full takes as much room as what is."""
    for tokens in (150, 250):
        check(*problem(tokens, dim=5, dim_v=8, dtype=torch.bfloat16, state=True,
                       feature_map="taylor2"), budget=5e-3)  # fmt: skip


def test_taylor_of_an_odd_and_a_large_head_dim():
    for dim in (15, 33):
        check(
            *problem(70, heads=(1, 1, 1), dim=dim, dim_v=20, dtype=torch.float32, state=True,
                     feature_map="taylor2", normalize=True)
        )  # fmt: skip


# ---- against itself ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in FORMS if n not in ("not causal", "reverse")])
def test_decoding_equals_prefill(name):
    """A token at a time, several at a time, and all at once: the same outputs and state."""
    tensors, options = form(name, tokens=40, batch=2)
    state = tensors.pop("initial_state")
    whole, last = linear_attention(
        **tensors, **options, initial_state=state, output_final_state=True
    )
    for size in (1, 3):
        kept, outs = state.clone(), []
        for t in range(0, 40, size):
            now = {n: x if x.dim() == 1 else x[:, t : t + size] for n, x in tensors.items()}
            before = kept.clone()
            fresh = linear_attention_step(**now, state=kept, **options, in_place=False)
            assert torch.equal(kept, before)
            outs.append(linear_attention_step(**now, state=kept, **options))
            assert torch.equal(outs[-1], fresh[0]) and torch.equal(kept, fresh[1])
        assert error(torch.cat(outs, dim=1), whole) < 1e-13
        assert error(kept, last) < 1e-13


@pytest.mark.parametrize("level", available_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_within_budget(dtype, level):
    for name in ("elu, normalized", "taylor2, decayed, normalized", "delta, decayed"):
        tensors, options = form(name, tokens=5, dtype=dtype, dim_v=37)
        expected, last = reference.linear_attention(**tensors, **options, output_final_state=True)
        state = tensors.pop("initial_state").clone()
        with isa(level):
            out = linear_attention_step(**tensors, state=state, **options)
        assert out.dtype == dtype and error(out, expected) <= BUDGET[dtype]
        assert error(state, last) <= BUDGET[torch.float32]


def test_step_with_slots():
    """Batch items have their states anywhere, strided; -1 has none; nothing else is touched."""
    tensors, options = form("elu, normalized", tokens=2, batch=3, state=False)
    pool = normal(7, 32, 2, 25).transpose(1, 2)  # heads inside features
    before = pool.clone()
    slots = torch.tensor([5, -1, 2], dtype=torch.int32)
    out = linear_attention_step(**tensors, state=pool, slots=slots, **options)
    for item, slot in ((0, 5), (2, 2)):
        one = {n: x[item : item + 1] for n, x in tensors.items()}
        state = before[slot : slot + 1].contiguous()
        assert torch.equal(linear_attention_step(**one, state=state, **options)[0], out[item])
        assert torch.equal(pool[slot], state[0])
    assert not out[1].any()
    untouched = [0, 1, 3, 4, 6]
    assert torch.equal(pool[untouched], before[untouched])


@settings(max_examples=20)
@given(st.integers(1, 60), st.sampled_from([n for n in FORMS if n != "not causal"]))
def test_a_sequence_cut_in_two(cut, name):
    """The state carried over, the whole is the same, gradients included."""
    tensors, options = form(name, tokens=60, dim=5, dim_v=4, chunk_size=3)

    def in_two(query, key, value, initial_state, decay=None, beta=None, **rest):
        state, results, reverse = initial_state, {}, rest["reverse"]
        parts = (slice(0, cut), slice(cut, None))
        for part in reversed(parts) if reverse else parts:
            *results[part.start], state = linear_attention(
                query[:, part],
                key[:, part],
                value[:, part],
                decay=decay if decay is None or decay.dim() == 1 else decay[:, part],
                beta=None if beta is None else beta[:, part],
                initial_state=state,
                **rest,
            )
        joined = zip(results[0], results[cut], strict=True)
        return *(torch.cat(pair, dim=1) for pair in joined), state

    options.setdefault("reverse", False)
    assert_close(
        evaluate(in_two, tensors, options), evaluate(linear_attention, tensors, options), 1e-12
    )


@pytest.mark.parametrize("name", FORMS)
def test_packed_equals_separate(name):
    bounds = [0, 0, 37, 38, 38, 100, 100]
    ends = torch.tensor(bounds, dtype=torch.int32)
    tensors, options = form(name, tokens=100, states=len(bounds) - 1, chunk_size=4)
    got = linear_attention(**tensors, **options, cu_seqlens=ends, output_final_state=True)
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        one = {
            m: x[n : n + 1] if m == "initial_state" else x if x.dim() == 1 else x[:, begin:end]
            for m, x in tensors.items()
        }
        out, state = linear_attention(**one, **options, output_final_state=True)
        assert torch.equal(got[0][:, begin:end], out)
        assert torch.equal(got[1][n : n + 1], state)


def test_blocks_equal_sequences():
    tensors, options = form("elu, normalized", tokens=50, state=False)
    ends = torch.tensor([0, 16, 32, 48, 50], dtype=torch.int32)
    for causal in (True, False):
        blocks = linear_attention(**tensors, **options, is_causal=causal, window_size=16)
        packed = linear_attention(**tensors, **options, is_causal=causal, cu_seqlens=ends)
        assert torch.equal(blocks, packed)


def test_reverse_is_a_flip():
    tensors, options = form("delta, decayed", tokens=45, decay="token")
    flipped = {n: x if n == "initial_state" else x.flip(1) for n, x in tensors.items()}
    out, state = linear_attention(**tensors, **options, reverse=True, output_final_state=True)
    other = linear_attention(**flipped, **options, output_final_state=True)
    assert torch.equal(out.flip(1), other[0]) and torch.equal(state, other[1])


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 64, 200, 1024])
@pytest.mark.parametrize("name", ["taylor2, decayed, normalized", "delta, decayed"])
def test_chunk_size_is_a_matter_of_speed(name, chunk_size):
    tensors, options = form(name, tokens=150, dim=6)
    got = evaluate(linear_attention, tensors, {**options, "chunk_size": chunk_size})
    assert_close(got, evaluate(linear_attention, tensors, options), 1e-12)


@pytest.mark.parametrize("name", FORMS)
def test_threads_and_neighbours_do_not_change_a_bit(name):
    """Rows few and many: segments are walked in turn and at once, heads also side by side."""
    for dtype, state, batch, heads in (
        (torch.float32, True, 5, 1),
        (torch.float32, False, 5, 1),
        (torch.bfloat16, True, 5, 1),
        (torch.float32, True, 2, 6),
        (torch.bfloat16, False, 2, 6),
    ):
        shape = {"tokens": 300, "batch": batch, "heads": (heads, heads, heads), "dim_v": 40}
        tensors, options = form(name, dtype=dtype, state=state, **shape)
        options["chunk_size"] = 4
        if tensors.get("decay") is not None and tensors["decay"].dim() == 1:
            tensors["decay"] = tensors["decay"].expand(batch, 300, heads)
        results = []
        for count in (1, 2, 3):
            with threads(count):
                results.append(evaluate(linear_attention, tensors, options))
                one = {n: x[:1] for n, x in tensors.items()}
                out, state = linear_attention(**one, **options, output_final_state=True)
                assert torch.equal(out, results[0]["out"][:1])
                assert torch.equal(state, results[0]["final_state"][:1])
                with_gradients = evaluate(linear_attention, one, options)
                assert torch.equal(with_gradients["out"], out)
        for other in results[1:]:
            assert_same(results[0], other)
        singles = []
        for count in (1, 2):
            with threads(count):
                singles.append(evaluate(linear_attention, one, options))
        assert_same(*singles)


@pytest.mark.parametrize("name", ["identity", "delta", "delta, decayed"])
@pytest.mark.parametrize("kind", ["plain", "state", "packed", "not finite"])
def test_one_head_gives_all_threads_work_and_the_same_bits(name, kind):
    """Large enough for threads; columns, segments and what both passes hold go to any of them."""
    more = {"state": kind in ("state", "packed")}
    if kind == "packed":
        ends = torch.tensor([0, 180, 180, 183, 400], dtype=torch.int32)
        more |= {"cu_seqlens": ends, "states": 4, "reverse": True}
    tensors, options = form(
        name,
        dtype=torch.float32,
        tokens=400,
        heads=(1, 1, 1),
        dim=30,
        dim_v=61,
        chunk_size=4,
        **more,
    )
    cotangent = normal(1, 400, 1, 61, dtype=torch.float32, seed=7)
    if kind == "not finite":
        cotangent[0, 210, 0, 50] = torch.inf

    def run():
        leaves = {n: x.clone().requires_grad_() for n, x in tensors.items()}
        out = linear_attention(**leaves, **options)
        return {"out": out} | dict(
            zip(leaves, torch.autograd.grad(out, list(leaves.values()), cotangent), strict=True)
        )

    results = []
    for count in (1, 2, 3, 8):
        with threads(count):
            results.append(run())
    for other in results[1:]:
        assert_same(results[0], other)


def test_more_rows_than_a_grid_has():
    tensors, options = problem(3, batch=66000, heads=(1, 1, 1), dim=2, dim_v=1, dtype=torch.float32)
    out = linear_attention(**tensors, **options)
    for item in (0, 65535, 65536, 65999):
        one = {n: x[item : item + 1] for n, x in tensors.items()}
        assert torch.equal(out[item], linear_attention(**one, **options)[0])


@pytest.mark.parametrize("feature_map", ["elu", "taylor2"])
def test_more_tokens_than_16_bits_count(feature_map):
    tensors, options = problem(
        70_001, heads=(1, 1, 1), dim=4, dim_v=5, feature_map=feature_map, dtype=torch.float32
    )
    out, state = linear_attention(**tensors, **options, output_final_state=True)

    def features(x, scale):
        x = x[0, :, 0].double()
        if feature_map == "elu":
            return torch.nn.functional.elu(x) + 1
        one, squares = torch.ones(len(x), 1), (x[:, :, None] * x[:, None]).flatten(1)
        return torch.cat([one, scale**0.5 * x, scale * 0.5**0.5 * squares], 1)

    query, key = (features(tensors[n], 4**-0.5) for n in ("query", "key"))
    sums = (key[:, :, None] * tensors["value"][0, :, 0, None].double()).cumsum(0)
    expected = (query[:, None] @ sums)[None]
    assert_close({"out": out}, {"out": expected}, 2e-6)
    if feature_map == "elu":
        assert_close({"state": state}, {"state": sums[-1][None, None]}, 2e-6)


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
