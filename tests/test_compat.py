# SPDX-License-Identifier: Apache-2.0
"""Position tables of other libraries: their own index formulas, restated, against the bias."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import attnext
from attnext import reference
from attnext.compat import hat_bias, hat_table, natten_rpb, swin_bias, swin_table
from attnext.testing import available_isas, isa

F64 = torch.float64


@pytest.fixture(params=["reference", *available_isas()])
def ops(request):
    if request.param == "reference":
        yield reference
    else:
        with isa(request.param):
            yield attnext


def normal(*shape):
    return torch.randn(shape, dtype=F64)


@pytest.mark.parametrize("window", [(5,), (3, 4), (2, 3, 4), (1, 6)], ids=str)
def test_swin_table_entry_by_entry(window):
    table = normal(math.prod(2 * w - 1 for w in window), 3)
    bias = swin_bias(table, window)
    tokens = list(itertools.product(*map(range, window)))
    for query, key in itertools.product(tokens, tokens):
        row = 0
        for i, j, w in zip(query, key, window, strict=True):
            row = row * (2 * w - 1) + i - j + w - 1  # Swin counts query - key
        entry = tuple(j - i + w - 1 for i, j, w in zip(query, key, window, strict=True))
        assert torch.equal(bias[(slice(None), *entry)], table[row])
    assert torch.equal(swin_table(bias), table)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_swin_window_of_one_side(rank):
    table = normal(7**rank, 2)
    assert torch.equal(swin_bias(table, 4), swin_bias(table, (4,) * rank))


@pytest.mark.parametrize("windows", [(4, 6), (4, 7), (3, 3), (3, 6), (16, 24)], ids=str)
def test_hat_table_entry_by_entry(windows):
    w, wide = windows
    side = w + wide - 1
    table = normal(side**2, 2)
    bias = hat_bias(table, w, wide)
    reach = bias.shape[1] // 2
    slots = [torch.stack(torch.meshgrid(*[torch.arange(n)] * 2, indexing="ij")).flatten(1)
             for n in (w, wide)]  # fmt: skip
    index = slots[1][:, None, :] - slots[0][:, :, None] + w - wide + 1
    index = index[0] * side + index[1]  # negative rows reach the table from its end
    wanted = table[index]
    margin = (wide - w) // 2
    for q, k in itertools.islice(itertools.product(range(w * w), range(wide * wide)), 0, None, 7):
        offset = slots[1][:, k] - margin - slots[0][:, q]
        got = bias[:, offset[0] + reach, offset[1] + reach]
        assert torch.equal(got, wanted[q, k])
    assert torch.equal(hat_table(bias, w, wide), table)
    assert hat_bias(torch.ones(side**2, 1, dtype=F64), w, wide).sum() == side**2


def test_overlapping_cross_attention(ops):
    """HAT's own procedure: unfold a zero-padded map, attend, add the table by its index."""
    w, wide, heads, dim = 4, 6, 2, 3
    query, key, value = (normal(1, 8, 12, heads, dim) for _ in range(3))
    table = normal((w + wide - 1) ** 2, heads)

    def unfold(x):
        image = x.flatten(3).permute(0, 3, 1, 2)
        patches = F.unfold(image, wide, stride=w, padding=(wide - w) // 2)
        return patches.unflatten(1, (heads, dim, wide * wide)).permute(0, 4, 1, 3, 2)[0]

    tiles = query.unflatten(2, (3, w)).unflatten(1, (2, w)).transpose(2, 3).flatten(3, 4)
    tiles = tiles.flatten(0, 2).transpose(1, 2)
    slots = [torch.stack(torch.meshgrid(*[torch.arange(n)] * 2, indexing="ij")).flatten(1)
             for n in (w, wide)]  # fmt: skip
    index = slots[1][:, None, :] - slots[0][:, :, None] + w - wide + 1
    rows = index[0] * (w + wide - 1) + index[1]
    expected = F.scaled_dot_product_attention(
        tiles, unfold(key), unfold(value), table[rows].permute(2, 0, 1)[None]
    )
    expected = expected.transpose(1, 2).unflatten(0, (1, 2, 3)).unflatten(3, (w, w))
    expected = expected.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    out = ops.window_attention(
        query, key, value, w, key_window_size=wide, bias=hat_bias(table, w, wide)
    )
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)


def test_relative_bias_of_early_natten(ops):
    """Its index formula by position in the axis: where the window was shifted inward, so is it."""
    kernel, length, dilation, heads = 5, 23, 2, 2
    query, key, value = (normal(1, length, heads, 4) for _ in range(3))
    rpb = normal(heads, 2 * kernel - 1)
    logits = torch.full((heads, length, length), -math.inf, dtype=F64)
    half = kernel // 2
    for i in range(length):
        group, t = i % dilation, i // dilation
        n = len(range(group, length, dilation))
        start = min(max(t - half, 0), n - kernel)
        first = half  # place in the table of the first key: later where the window sticks out
        if t < half:
            first = kernel - 1 - t
        elif t + half >= n:
            first = n - t - 1
        for step in range(kernel):
            j = group + dilation * (start + step)
            dot = torch.einsum("hd,hd->h", query[0, i], key[0, j]) * 4**-0.5
            logits[:, i, j] = dot + rpb[:, first + step]
    expected = torch.einsum("hij,jhd->ihd", logits.softmax(-1), value[0])[None]
    out = ops.neighborhood_attention(
        query, key, value, kernel, dilation=dilation, bias=natten_rpb(rpb)
    )
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)


def test_gradients_reach_the_stored_table():
    for convert, rows in (
        (lambda table: swin_bias(table, 3), 25),
        (lambda table: hat_bias(table, 2, 4), 25),
        (lambda table: swin_table(swin_bias(table, 3)), 25),
        (lambda table: hat_table(hat_bias(table, 2, 5), 2, 5), 36),
    ):
        assert torch.autograd.gradcheck(convert, normal(rows, 2).requires_grad_())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: swin_bias(torch.zeros(9), 2), "table must have shape"),
        (lambda: swin_bias(torch.zeros(10, 1), 2), "10 rows"),
        (lambda: swin_bias(torch.zeros(9, 1), (2, 3)), "9 rows"),
        (lambda: swin_bias(torch.zeros(9, 1), 0), "9 rows"),
        (lambda: swin_bias(torch.zeros(1, 2), ()), "1 to 3 axes"),
        (lambda: swin_bias(torch.zeros(81, 1), (2, 2, 2, 2)), "1 to 3 axes"),
        (lambda: swin_table(torch.zeros(2, 4, 4)), "bias must have shape"),
        (lambda: swin_table(torch.zeros(5)), "bias must have shape"),
        (lambda: hat_bias(torch.zeros(24, 1), 2, 4), r"table must have shape \[25, heads\]"),
        (lambda: hat_bias(torch.zeros(25, 1), 4, 2), "at most key_window_size"),
        (lambda: hat_table(torch.zeros(1, 5, 4), 2, 4), "bias must have shape"),
        (lambda: natten_rpb(torch.zeros(1, 4)), "rpb must have shape"),
    ],
)
def test_tables_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
