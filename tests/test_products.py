# SPDX-License-Identifier: Apache-2.0
"""The operator by which routers score single keys: on every instruction set, beside its definition
and beside the form for other devices."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import LAYOUTS, lay_out

from attnext.routers.products import (
    best_places,
    best_places_in_torch,
    largest_products,
    largest_products_in_torch,
)
from attnext.testing import available_isas, isa, threads

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LOWEST = -3e38


def by_definition(query, reach, key, at):
    """Scores of whole numbers are exact in any order."""
    found = torch.full(at.shape, LOWEST, dtype=query.dtype)
    group = query.shape[1] // key.shape[2]
    for b, h, r, n in torch.cartesian_prod(*(torch.arange(x) for x in at.shape)).tolist():
        place = min(max(int(at[b, h, r, n]), 0), key.shape[1] - 1)
        row = key[b, place, h // group].to(query.dtype)
        seen = [q for q, last in zip(query[b, h, r], reach[r], strict=True) if place <= last]
        products = [float((q * row).sum()) for q in seen]
        if products and not any(math.isnan(x) for x in products):
            found[b, h, r, n] = max(LOWEST, *products)
    return found


@st.composite
def searches(draw):
    batch, kv_heads, rows = (draw(st.integers(1, 2)) for _ in range(3))
    heads = kv_heads * draw(st.sampled_from([1, 3]))
    samples = draw(st.sampled_from([1, 2, 7, 16, 17, 33, 70]))
    dim = draw(st.sampled_from([1, 3, 8, 30, 64]))
    tokens, places = draw(st.integers(1, 40)), draw(st.sampled_from([1, 5, 64, 90]))
    dtype = draw(st.sampled_from(DTYPES))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def whole(*shape, low=-3, high=4):
        return torch.randint(low, high, shape, generator=generator)

    query = whole(batch, heads, rows, samples, dim).to(acc)
    key = whole(batch, tokens, kv_heads, dim).to(dtype)
    reach = whole(rows, samples, low=-tokens - 1, high=2 * tokens)
    at = whole(batch, heads, rows, places, low=-2, high=tokens + 3)
    if draw(st.booleans()):  # spoils some rows of keys and all products of a query that has one
        key[:, :: draw(st.integers(2, 5)), :, 0] = draw(st.sampled_from([math.nan, math.inf]))
        query[..., 0, 0] = draw(st.sampled_from([0.0, math.nan, -math.inf]))
    return query, reach, lay_out(key, draw(st.sampled_from(LAYOUTS))), at


@given(searches(), st.sampled_from(available_isas()))
def test_largest_products(problem, name):
    with isa(name):
        got = largest_products(*problem, LOWEST)
    want = by_definition(*problem)
    assert torch.equal(got, want)
    assert torch.equal(largest_products_in_torch(*problem, LOWEST), want)


def test_it_does_not_depend_on_threads():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 9, 32, 64, generator=generator)
    key = torch.randn(2, 500, 2, 64, generator=generator)
    at = torch.randint(0, 500, (2, 4, 9, 300), generator=generator)
    reach = torch.randint(0, 500, (9, 32), generator=generator)
    results = []
    for n in (1, 2, 3):
        with threads(n):
            results.append(largest_products(query, reach, key, at, LOWEST))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    rows = key.double()[:, at[0, 3, 4]][0, :, 1]
    exact = (query[0, 3, 4].double() @ rows.T).masked_fill(at[0, 3, 4] > reach[4, :, None], LOWEST)
    torch.testing.assert_close(results[0][0, 3, 4].double(), exact.amax(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("places", [0, 5])
def test_it_is_an_operator(places):
    query, key = torch.randn(1, 2, 3, 4, 8), torch.randn(1, 20, 1, 8)
    at = torch.randint(0, 20, (1, 2, 3, places))
    arguments = (query, torch.randint(0, 20, (3, 4)), key, at, LOWEST)
    torch.library.opcheck(largest_products, arguments)


@pytest.mark.parametrize(
    "change",
    [
        {"query": torch.ones(1, 3, 3, 4, 8)},
        {"query": torch.ones(1, 2, 3, 4, 7)},
        {"query": torch.ones(1, 2, 3, 4, 8, dtype=torch.float64)},
        {"reach": torch.ones(3, 5, dtype=torch.int64)},
        {"reach": torch.ones(3, 4, dtype=torch.int32)},
        {"key": torch.ones(2, 20, 2, 8)},
        {"key": torch.ones(1, 0, 2, 8)},
        {"at": torch.zeros(1, 2, 4, 5, dtype=torch.int64)},
    ],
    ids=lambda change: next(f"{k} {tuple(v.shape)} {v.dtype}" for k, v in change.items()),
)
def test_what_does_not_fit_is_refused(change):
    arguments = {
        "query": torch.ones(1, 2, 3, 4, 8),
        "reach": torch.ones(3, 4, dtype=torch.int64),
        "key": torch.ones(1, 20, 2, 8),
        "at": torch.zeros(1, 2, 3, 5, dtype=torch.int64),
    }
    with pytest.raises((TypeError, ValueError)):
        largest_products(**{**arguments, **change}, lowest=LOWEST)


@given(st.integers(0, 2**31), st.integers(1, 50), st.integers(1, 50), st.sampled_from(DTYPES[:2]))
def test_the_first_of_equal_ones_are_kept(seed, places, count, dtype):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 4, (2, 3, places), generator=generator).to(dtype)
    scores = torch.where(scores == 1, -scores.new_zeros(()), scores)  # -0 equals 0
    if seed % 2:
        scores = scores + torch.randn(scores.shape, generator=generator, dtype=dtype) * (scores > 0)
    scores, count = scores.masked_fill(scores == -3, -torch.inf), min(count, places)
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    for found in (best_places(scores, count), best_places_in_torch(scores, count)):
        assert torch.equal(found, order.sort(-1).values)


def test_operator_of_places():
    scores = torch.rand(3, 4, 10).transpose(1, 2)
    torch.library.opcheck(best_places, (scores, 3))
    assert best_places(scores, 0).shape == (3, 10, 0)
    for wrong, count in ((scores, 5), (scores.half(), 2), (scores.long(), 2)):
        with pytest.raises((TypeError, ValueError)):
            best_places(wrong, count)
