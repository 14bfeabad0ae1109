# SPDX-License-Identifier: Apache-2.0
"""Sums of branches: each rule against its definition, gradients, and rows that saw nothing."""

import math

import pytest
import torch

from attnext import merge, merge_attentions, sliding_window_attention

F64 = torch.float64
MODES = ("lse", "softmax", "sigmoid", "raw", "scaled", "lerp")


def normal(*shape, dtype=F64):
    return torch.randn(shape, dtype=F64).to(dtype)


def parts(mode, rows=(2, 5, 3), branches=3, dtype=F64):
    branches = 2 if mode in ("scaled", "lerp") else branches
    outputs = [normal(*rows, 4, dtype=dtype) for _ in range(branches)]
    lses = [normal(*rows) for _ in range(branches)] if mode in ("lse", "scaled") else None
    gates = {"lse": None, "scaled": normal(rows[-1]), "lerp": normal(*rows)}.get(
        mode, normal(rows[-1], branches)
    )
    return outputs, lses, gates


def by_row(outputs, lses, gates, mode):
    """The definitions, one row at a time."""
    out = torch.zeros_like(outputs[0], dtype=F64)
    rows = outputs[0].shape[:-1]
    for row in torch.cartesian_prod(*map(torch.arange, rows)).tolist():
        at = tuple(row)
        if gates is not None:
            want = rows if mode in ("scaled", "lerp") else (*rows, len(outputs))
            gate = gates.expand(want)[at]
        if mode in ("lse", "scaled"):
            mass = torch.stack([lse[at] for lse in lses]).exp()
            weights = mass / mass.sum()
            if mode == "scaled":
                kept = gate * weights[0]
                weights = torch.stack([kept, weights[1] + weights[0] - kept])
        elif mode == "softmax":
            weights = gate.exp() / gate.exp().sum()
        elif mode == "sigmoid":
            weights = 1 / (1 + torch.exp(-gate))
        elif mode == "lerp":
            weights = torch.stack([gate, 1 - gate])
        else:
            weights = gate
        out[at] = sum(w * o[at].double() for w, o in zip(weights, outputs, strict=True))
    return out


@pytest.mark.parametrize("mode", MODES)
def test_each_rule_is_its_definition(mode):
    outputs, lses, gates = parts(mode)
    torch.testing.assert_close(
        merge(outputs, lses, gates, mode), by_row(outputs, lses, gates, mode)
    )
    if mode in ("scaled", "lerp"):
        number = torch.tensor(0.3, dtype=F64)
        torch.testing.assert_close(
            merge(outputs, lses, 0.3, mode), by_row(outputs, lses, number, mode)
        )


@pytest.mark.parametrize("mode", MODES)
def test_sums_are_in_float32(mode):
    """Of bfloat16: exact to one rounding of the output."""
    outputs, lses, gates = parts(mode, rows=(40, 7, 3), dtype=torch.bfloat16)
    out = merge(outputs, lses, gates, mode)
    expected = by_row(outputs, lses, gates, mode)
    size = sum(o.double().abs() for o in outputs) * (1 if gates is None else 1 + gates.abs().max())
    assert out.dtype == torch.bfloat16
    assert ((out.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-6 * size).all()


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode):
    outputs, lses, gates = parts(mode, rows=(2, 3))
    leaves = [*outputs, *(lses or []), *([] if gates is None else [gates])]
    count = len(outputs)

    def function(*leaves):
        given = leaves[count : 2 * count] if lses else None
        return merge(leaves[:count], given, None if gates is None else leaves[-1], mode)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in leaves])


def test_gradient_of_lerp_is_the_difference():
    """What DuoAttention trains: ``d gate = dO . (full - streaming)``, summed over tokens."""
    full, streaming, cotangent = normal(3, 2, 7, 4, 8)
    gate = torch.rand(4, dtype=F64).requires_grad_()
    merge([full, streaming], gates=gate, mode="lerp").backward(cotangent)
    torch.testing.assert_close(gate.grad, (cotangent * (full - streaming)).sum((0, 1, 3)))


@pytest.mark.parametrize("mode", ["lse", "scaled", "softmax"])
def test_parts_without_keys(mode):
    """They add nothing and pass no gradient, though their outputs are NaN."""
    rows = 4
    outputs, lses, gates = parts(mode, rows=(rows, 3), branches=2)
    if mode == "softmax":
        gates = normal(rows, 3, 2)
    for row, gone in ((1, (0,)), (2, (1,)), (3, (0, 1))):
        for n in gone:
            outputs[n][row] = math.nan
            if mode == "softmax":
                gates[row, :, n] = -math.inf
            else:
                lses[n][row] = -math.inf
    leaves = [*outputs, *(lses or []), *([] if gates is None else [gates])]
    for leaf in leaves:
        leaf.requires_grad_()
    out = merge(outputs, lses, gates, mode)
    assert torch.isfinite(out).all() and not out[3].any()
    torch.testing.assert_close(out[1], outputs[1][1])
    torch.testing.assert_close(out[2], outputs[0][2])  # also scaled: nobody could take the rest
    out.sum().backward()
    for leaf in leaves:
        assert torch.isfinite(leaf.grad).all()
    for n in (0, 1):
        assert not outputs[n].grad[3].any() and not outputs[n].grad[2 - (1 - n)].any()
        torch.testing.assert_close(outputs[n].grad[2 - n], torch.ones(3, 4, dtype=F64))


def test_scaled_is_attention_calibration():
    """The map with the columns of S scaled by beta and what they lose given to the others in
    proportion, formed whole (the definition), from two partial attentions."""
    tokens, beta = 12, 0.4
    q, k, v = normal(3, 1, tokens, 2, 8)
    chosen = torch.zeros(tokens, dtype=torch.bool)
    chosen[[2, 3, 7, 11]] = True
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5
    weights = torch.softmax(logits.masked_fill(~seen, -math.inf), -1)
    on_chosen = weights * chosen
    others = weights * ~chosen
    lost = (1 - beta) * on_chosen.sum(-1, keepdim=True)
    calibrated = beta * on_chosen + others + lost * others / others.sum(-1, keepdim=True)
    expected = torch.einsum("bhij,bjhd->bihd", calibrated, v)

    results = []
    for columns in (chosen, ~chosen):
        part = logits.masked_fill(~(seen & columns), -math.inf)
        lse = part.logsumexp(-1)
        share = torch.exp(part - lse.clamp(min=-1e300)[..., None])
        results.append((torch.einsum("bhij,bjhd->bihd", share, v), lse.transpose(1, 2)))
    outputs, lses = zip(*results, strict=True)
    torch.testing.assert_close(merge(outputs, lses, beta, "scaled"), expected)


def test_merge_attentions_is_a_mode():
    q, k, v = normal(3, 1, 9, 2, 4)
    pieces = [
        sliding_window_attention(q, k[:, s], v[:, s], None, is_causal=False, return_lse=True)
        for s in (slice(0, 4), slice(4, 9))
    ]
    outputs, lses = zip(*pieces, strict=True)
    out, lse = merge(outputs, lses, return_lse=True)
    whole = sliding_window_attention(q, k, v, None, is_causal=False, return_lse=True)
    for a, b, c in zip((out, lse), merge_attentions(outputs, lses), whole, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("mode", MODES)
def test_compile_whole_graph(mode):
    outputs, lses, gates = parts(mode)
    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")
    expected = merge(outputs, lses, gates, mode)
    torch.testing.assert_close(compiled(outputs, lses, gates, mode), expected)


def x(*shape):
    return torch.zeros(shape)


TWO, LSES = [x(2, 3)] * 2, [x(2)] * 2
WRONG = {
    "return_lse": (lambda: merge(TWO, LSES, return_lse="x"), TypeError, "return_lse must be a"),
    "mode": (lambda: merge(TWO, LSES, mode="mean"), ValueError, "mode must be one of .*'mean'"),
    "no lses": (lambda: merge(TWO), ValueError, "lses must be given with mode='lse'"),
    "lses not read": (lambda: merge(TWO, LSES, 0.5, "lerp"), ValueError, "lses have no part in"),
    "gates not read": (lambda: merge(TWO, LSES, x(2)), ValueError, "gates have no part in"),
    "no gates": (lambda: merge(TWO, gates=None, mode="raw"), TypeError, "gates must be .*NoneType"),
    "three": (
        lambda: merge([x(2, 3)] * 3, gates=0.5, mode="lerp"), ValueError, "outputs must be two",
    ),
    "lse of a mixture": (
        lambda: merge(TWO, gates=x(2, 2), mode="softmax", return_lse=True), ValueError,
        "return_lse must be False",
    ),
    "number of gates": (
        lambda: merge(TWO, gates=x(2, 3), mode="sigmoid"), ValueError,
        r"gates must broadcast to \(2, 2\) .*\(2, 3\)",
    ),
    "gates without branches": (
        lambda: merge(TWO, gates=x(1), mode="raw"), ValueError, "gates must broadcast",
    ),
    "integer gates": (
        lambda: merge(TWO, gates=x(2, 2).int(), mode="raw"), TypeError, "gates must be .*int32",
    ),
    "infinite": (
        lambda: merge(TWO, gates=math.inf, mode="lerp"), ValueError, "gates must be finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_call(name):
    call, exception, message = WRONG[name]
    with pytest.raises(exception, match=message):
        call()
