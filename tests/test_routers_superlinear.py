# SPDX-License-Identifier: Apache-2.0
"""Superlinear attention's search: against loops in float64, and what must hold of it."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_routers_search import F64, normal, whole

import attnext
from attnext import reference_search as reference
from attnext.routers.superlinear import (
    span_length,
    stripe_table,
    superlinear_attention,
    superlinear_search,
    window_of,
)


@settings(max_examples=20)
@given(
    st.fractions(Fraction(1, 5), 1, max_denominator=30),
    st.fractions(0, 5, max_denominator=7),
    st.integers(1, 10**12),
)
def test_stripes_are_exact(power, factor, i):
    table = stripe_table(power, 3000)
    assert table == [reference.stripe(n, power) for n in range(len(table))]
    assert reference.stripe(len(table), power) > 3000
    tokens = torch.arange(0, 300)
    want = [reference.span_length(n, power, factor) for n in range(300)]
    assert span_length(tokens, power, factor, 300).tolist() == want
    root = reference.stripe(i, power)
    assert root**power.numerator <= i**power.denominator < (root + 1) ** power.numerator


def test_known_stripes():
    assert window_of(65, 0.55) == 2032 and window_of(3, 0.5) == 15 and window_of(0, 0.5) == 0
    assert len(stripe_table(0.55, 10**6)) - 1 == 1995
    # Squares, a root that double precision rounds down (15.999...), many that single misses.
    assert stripe_table(0.5, 100) == [n * n for n in range(11)]
    assert stripe_table(0.75, 40)[8] == 16 and window_of(7, 0.75) == 15
    wrong = torch.arange(8000).float().pow(1 / 0.55).floor().long()
    right = torch.tensor(stripe_table(0.55, 10**8)[:8000])
    assert (wrong - right).abs().max() > 1


@st.composite
def searches(draw):
    power = st.sampled_from([Fraction(1, 2), Fraction(11, 20), Fraction(2, 3), Fraction(1)])
    options = {
        "sw_index": draw(st.integers(0, 4)),
        "num_spans": draw(st.integers(1, 4)),
        "search_power": draw(power),
        "span_power": draw(power),
        "backward_factor": draw(st.sampled_from([Fraction(0), Fraction(1, 3), Fraction(1)])),
        "forward_factor": draw(st.sampled_from([Fraction(0), Fraction(1), Fraction(3, 2)])),
    }
    queries = draw(st.integers(0, 40))
    keys = draw(st.integers(0, 40))
    kv_heads, group, batch = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
    )
    seed = draw(st.integers(0, 2**31))
    tensors = {
        "search_query": whole(batch, queries, kv_heads * group, 3, seed=seed, most=1),
        "query": normal(batch, queries, kv_heads * group, 3, seed=seed + 1),
        "key": whole(batch, keys, kv_heads, 3, seed=seed + 2, most=1),
        "value": normal(batch, keys, kv_heads, 2, seed=seed + 3),
    }
    if keys and draw(st.booleans()):
        rows = draw(st.sampled_from([1, batch]))
        generator = torch.Generator().manual_seed(seed)
        at = torch.randint(0, keys, (rows, queries), generator=generator)
        options["query_positions"] = at
    if draw(st.booleans()):
        options["key_starts"] = torch.tensor([draw(st.integers(0, 12)) for _ in range(batch)])
    return tensors, options


@settings(max_examples=50)
@given(searches(), st.sampled_from([None, 1, 7]))
def test_superlinear(problem, chunk_size):
    tensors, options = problem
    found = superlinear_search(
        tensors["search_query"], tensors["key"], chunk_size=chunk_size, **options
    )
    want = reference.superlinear_spans(tensors["search_query"], tensors["key"], **options)
    for b, rows in enumerate(want):
        for i, row in enumerate(rows):
            for h, spans in enumerate(row):
                got = torch.stack([x[b, i, h] for x in found], -1).tolist()
                spans = [s if s[1] < s[2] else (s[0], *got[n][1:]) for n, s in enumerate(spans)]
                assert got[: len(spans)] == [list(s) for s in spans]
                assert all(g == [-1, 0, 0] for g in got[len(spans) :])
    out = superlinear_attention(**tensors, **options)
    want = reference.superlinear_attention(**tensors, **options)
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-9)


def test_superlinear_prefill_is_decoding():
    """Many queries share shifted slices of keys, single ones gather: both search alike."""
    s, q, k, v = (whole(2, 150, 2, 4, seed=n) for n in range(4))
    options = {"sw_index": 3, "search_power": 0.5, "backward_factor": 1}
    prefill = superlinear_attention(s, q, k[:, :, :1], v[:, :, :1], **options)
    for i in (0, 1, 20, 90, 149):
        step = superlinear_attention(
            s[:, i : i + 1], q[:, i : i + 1], k[:, : i + 1, :1], v[:, : i + 1, :1], **options
        )
        torch.testing.assert_close(prefill[:, i : i + 1], step)
    everything = superlinear_search(s, k[:, :, :1], **options)
    for chunk in (1, 13):
        again = superlinear_search(s, k[:, :, :1], **options, chunk_size=chunk)
        assert all(map(torch.equal, everything, again))


def test_superlinear_gradients():
    """The gates train the search: their gradient reaches search query and key."""
    tensors = [normal(1, 14, 2, 3, seed=1), normal(1, 14, 2, 3, seed=2)]
    tensors += [normal(1, 14, 1, 3, seed=3), normal(1, 14, 1, 3, seed=4)]
    options = {
        "sw_index": 1,
        "search_power": Fraction(1, 2),
        "num_spans": 2,
        "span_power": Fraction(1, 2),
        "backward_factor": Fraction(1, 2),
        "forward_factor": Fraction(0),
    }
    cotangent = normal(1, 14, 2, 3, seed=5)
    grads = []
    for op in (superlinear_attention, reference.superlinear_attention):
        leaves = [t.clone().requires_grad_() for t in tensors]
        grads.append(torch.autograd.grad(op(*leaves, **options), leaves, cotangent))
    for got, want in zip(*grads, strict=True):
        assert want.abs().max() > 0.01
        torch.testing.assert_close(got, want)


def test_superlinear_of_padded_batches():
    """Padding in front, of another length for each item, is as if it were not there."""
    s, q, k, v = (normal(2, 40, 2, 4, seed=n) for n in range(4))
    options = {"sw_index": 1, "search_power": 0.5}
    out = superlinear_attention(s, q, k, v, key_starts=torch.tensor([0, 13]), **options)
    for b, start in enumerate((0, 13)):
        alone = [x[b : b + 1, start:] for x in (s, q, k, v)]
        torch.testing.assert_close(out[b : b + 1, start:], superlinear_attention(*alone, **options))
        assert not out[b, :start].any()


def test_superlinear_without_anchors_is_the_window():
    s, q, k, v = (normal(1, 20, 2, 4, seed=n) for n in range(4))
    out = superlinear_attention(s, q, k, v, sw_index=65)
    torch.testing.assert_close(out, attnext.sliding_window_attention(q, k, v, None))
    # Half precision, and values that no span can hold.
    out = superlinear_attention(*(x.half() for x in (s, q, k, v)), sw_index=1, search_power=0.5)
    assert out.dtype == torch.float16 and out.isfinite().all()


def test_superlinear_nan_is_never_found():
    s, k = (normal(1, 40, 1, 4, seed=n) for n in range(2))
    k[0, 3] = math.nan
    spans = superlinear_search(s, k, sw_index=1, search_power=0.5, num_spans=8)
    assert (spans.anchors != 3).all() and (spans.anchors >= 0).any()
    # Gates that are no numbers count as equal.
    options = {"sw_index": 0, "search_power": 1, "num_spans": 2, "backward_factor": 0}
    options |= {"forward_factor": 0}
    s = torch.full((1, 2, 1, 4), math.inf, dtype=F64)
    k = torch.ones(1, 2, 1, 4, dtype=F64)
    v = torch.tensor([2.0, 4.0], dtype=F64).view(1, 2, 1, 1)
    assert superlinear_attention(s, k, k, v, **options)[0, 1].item() == 3.0


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"search_power": 0.0}, ValueError, "search_power"),
        ({"search_power": 1.5}, ValueError, "search_power"),
        ({"search_power": 0.123456}, ValueError, "search_power.*denominator"),
        ({"search_power": "half"}, TypeError, "search_power"),
        ({"backward_factor": -1}, ValueError, "backward_factor"),
        ({"num_spans": 0}, ValueError, "num_spans"),
        ({"num_spans": 17}, ValueError, "num_spans"),
        ({"sw_index": -1}, ValueError, "sw_index"),
        ({"sw_index": True}, TypeError, "sw_index"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
        ({"key_starts": torch.zeros(3, dtype=torch.int64)}, ValueError, "key_starts"),
        ({"query_positions": torch.zeros(1, 9)}, TypeError, "query_positions"),
        (
            {"query_positions": torch.full((1, 9), 9)},
            ValueError,
            "query_positions must be below .* 9, got 9",
        ),
        ({"search_query": torch.zeros(1, 8, 2, 4)}, ValueError, "search_query"),
    ],
)
def test_superlinear_errors(change, error, match):
    tensors = {n: torch.zeros(1, 9, 2, 4) for n in ("search_query", "query", "key", "value")}
    with pytest.raises(error, match=match):
        superlinear_attention(**{**tensors, **change})


@pytest.mark.parametrize("tokens", [40, 50])
def test_superlinear_search_under_autocast(tokens):
    """Scores stay in float32, also where they tie."""
    generator = torch.Generator().manual_seed(0)
    for query, key in (
        (torch.ones(1, 1, 1, 4), torch.ones(1, tokens, 1, 4)),
        tuple(torch.randn(1, tokens, 1, 4, generator=generator) for _ in range(2)),
    ):
        want = superlinear_search(query, key, sw_index=3, search_power=0.5)
        with torch.autocast("cpu", torch.bfloat16):
            got = superlinear_search(query, key, sw_index=3, search_power=0.5)
        assert torch.equal(got.anchors, want.anchors)


def test_keys_with_a_stride_of_their_own():
    """Whose other strides are multiples of head_dim all the same."""
    query = torch.randn(1, 20, 2, 8)
    wide = torch.full((1, 20, 2, 16), torch.nan)
    wide[..., ::2] = torch.randn(1, 20, 2, 8)
    key = wide[..., ::2]
    options = {"sw_index": 1, "search_power": 0.5}
    found = superlinear_search(query, key, **options)
    expected = superlinear_search(query, key.contiguous(), **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (found.anchors >= 0).any()


def test_superlinear_under_autocast():
    tensors = [torch.randn(1, 150, h, 16) for h in (4, 4, 2, 2)]
    options = {"sw_index": 3, "search_power": 0.5}
    expected = superlinear_attention(*(t.bfloat16() for t in tensors), **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(superlinear_attention(*tensors, **options), expected)


def test_large_numbers_of_superlinear_take_no_time():
    query = torch.randn(1, 40, 2, 8)
    for options in (
        {"sw_index": 2**40},
        {"sw_index": 0, "forward_factor": 10**5},
        {"sw_index": 0, "forward_factor": 10**400},
    ):
        out = superlinear_attention(query, query, query, query, **options)
        assert out.isfinite().all()
    assert window_of(2**40, 1) == 2**40 and window_of(3, 0.5) == 15


def test_superlinear_asks_for_a_search_query():
    query = torch.randn(1, 4, 2, 8)
    with pytest.raises(TypeError, match="search_query must be a floating-point tensor"):
        superlinear_attention(None, query, query, query)
