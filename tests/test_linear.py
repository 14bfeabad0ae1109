# SPDX-License-Identifier: Apache-2.0
"""Linear attention: against the recurrence in float64, and against itself in every other form."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_problems import (
    BUDGET,
    DTYPES,
    FORMS,
    MAPS,
    assert_close,
    assert_same,
    check,
    error,
    evaluate,
    expect,
    form,
    normal,
    problem,
    problems,
    slack,
)

from attnext import linear_attention, linear_attention_step, reference
from attnext.testing import available_isas, isa, threads

# ---- against the recurrence ----------------------------------------------------------------------


@settings(max_examples=60)
@given(problems())
def test_anything_in_double(given_problem):
    check(*given_problem, budget=1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_budget(name, dtype):
    check(*form(name, dtype=dtype, chunk_size=8))  # several segments


# Not beside a normaliser of features with signs: their sums come near 0.
@pytest.mark.parametrize("isa_name", available_isas())
@pytest.mark.parametrize(
    ("feature_map", "normalize"),
    [(f, n) for f in MAPS for n in (False, True) if (f, n) != ("identity", True)],
)
def test_halves_are_rounded_at_the_store_alone(feature_map, normalize, isa_name):
    """Outputs and gradients, of values with a mean too: a product of operands in bf16 shows. What
    tiles of matrices do of it without a normaliser may take an output a little over the budget."""
    for tokens, dim, dim_v, mean in ((300, 16, 32, 0), (150, 24, 40, 3), (410, 9, 70, 1)):
        options = {"feature_map": feature_map, "normalize": normalize}
        shape = {"tokens": tokens, "dim": dim, "dim_v": dim_v, "dtype": torch.bfloat16}
        tensors, _ = problem(**shape, **options)
        tensors["value"] = (tensors["value"].double() + mean).to(torch.bfloat16)
        for is_causal in (True, False):
            call = {**options, "is_causal": is_causal}
            with isa(isa_name):
                got = evaluate(linear_attention, tensors, call)
            in_tiles = isa_name == "amx" and not normalize and feature_map != "taylor2"
            more = {"out": 1.15 if in_tiles else 1}
            assert_close(got, expect(tensors, call), BUDGET[torch.bfloat16], more)


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
