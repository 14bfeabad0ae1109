# SPDX-License-Identifier: Apache-2.0
"""cvt between all types against torch, numpy and Python's integers; cvta between spaces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from .memory import Memory
from .snippets import apply, run
from .test_float import half_bits, same_half, to_bits
from .test_integer import KINDS, edges, wrap
from .words import DTYPE, Array

FLOATS = np.array(
    [
        *(0.0, -0.0, 0.5, -0.5, 1.5, 2.5, -2.5, 0.4999, 300.7, -300.7, 65519.0, 65520.0, 1e-8),
        *(-1e-8, 2.0**31, -(2.0**31), 3e9, 2.0**32, 1e19, -1e19, 1e30, 1e-40),
        *(np.inf, -np.inf, np.nan, 2**-24, 2**-25, 3 * 2**-25),
        *(1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11),
    ],
    np.float32,
)


@pytest.mark.parametrize("source", ["s8", "u8", *KINDS])
@pytest.mark.parametrize("target", ["s8", "u8", *KINDS])
def test_integers(source: str, target: str) -> None:
    a = edges(source)
    # A narrow result is extended into its register by its own signedness.
    wide = {"s8": "s16", "u8": "u16"}.get(target, target)
    got = apply(f"cvt.{target}.{source} {{o}}, {{a}};", wide, a=(source, a))
    np.testing.assert_array_equal(got, [wrap(int(x), target) for x in a])
    got = apply(f"cvt.sat.{target}.{source} {{o}}, {{a}};", wide, a=(source, a))
    info = np.iinfo(DTYPE[target])
    np.testing.assert_array_equal(got, [min(max(int(x), info.min), info.max) for x in a])


@pytest.mark.parametrize("source", ["s8", "u8", *KINDS])
@pytest.mark.parametrize("target", ["f16", "bf16", "f32", "f64"])
def test_integers_to_floats(source: str, target: str) -> None:
    a = edges(source)
    word = {"f16": "u16", "bf16": "u16"}.get(target, target)
    got = apply(f"cvt.rn.{target}.{source} {{o}}, {{a}};", word, a=(source, a))
    if word == "u16":
        if DTYPE[source].itemsize < 8:
            want = to_bits(torch.tensor(a.astype(np.float64)), target)
            np.testing.assert_array_equal(got, want)
    else:
        np.testing.assert_array_equal(got, a.astype(DTYPE[target]))


@pytest.mark.parametrize("target", ["s8", "u8", *KINDS])
@pytest.mark.parametrize(
    ("mode", "function"),
    [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)],
)
@pytest.mark.parametrize("source", ["f32", "f64"])
def test_floats_to_integers(source: str, mode: str, function: Any, target: str) -> None:
    a = FLOATS.astype(DTYPE[source])
    info = np.iinfo(DTYPE[target])
    wide = {"s8": "s16", "u8": "u16"}.get(target, target)
    got = apply(f"cvt.{mode}.{target}.{source} {{o}}, {{a}};", wide, a=(source, a))
    for x, value in zip(a, got, strict=True):
        if np.isnan(x):
            special = source == "f64" or target in ("s64", "u64")
            want = wrap(1 << (info.bits - 1), target) if special else 0
        elif np.isinf(x):
            want = info.max if x > 0 else info.min
        else:
            want = min(max(int(function(np.float64(x))), info.min), info.max)
        assert int(value) == want, x


def test_float_widths() -> None:
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(
            apply("cvt.f64.f32 {o}, {a};", "f64", a=("f32", FLOATS)), FLOATS.astype(np.float64)
        )
        wide = FLOATS.astype(np.float64) * (1 + 2.0**-30)
        got = apply("cvt.rn.f32.f64 {o}, {a};", "f32", a=("f64", wide))
        np.testing.assert_array_equal(got, wide.astype(np.float32))
    for kind in ("f16", "bf16"):
        bits, values = half_bits(FLOATS, kind)
        got = apply(f"cvt.rn.{kind}.f32 {{o}}, {{a}};", "u16", a=("f32", FLOATS))
        same_half(got, bits, kind)
        got = apply(f"cvt.f32.{kind} {{o}}, {{a}};", "f32", a=("u16", bits))
        np.testing.assert_array_equal(got, values.numpy().astype(np.float32))


def test_double_rounding_is_avoided() -> None:
    """float64 just above a tie of f16 or bf16: by way of float32 it would look like the tie."""
    for kind, bits in (("f16", 11), ("bf16", 8)):
        value = np.array([1 + 2.0**-bits + 2.0**-40])
        got = apply(f"cvt.rn.{kind}.f64 {{o}}, {{a}};", "u16", a=("f64", value))
        np.testing.assert_array_equal(got, half_bits(np.array([1 + 2.0 ** (1 - bits)]), kind)[0])


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
def test_rounding_in_place(mode: str) -> None:
    function = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode]
    got = apply(f"cvt.{mode}.f32.f32 {{o}}, {{a}};", "f32", a=("f32", FLOATS))
    np.testing.assert_array_equal(got, function(FLOATS))


def test_saturation_and_ftz() -> None:
    got = apply("cvt.sat.f32.f32 {o}, {a};", "f32", a=("f32", FLOATS))
    np.testing.assert_array_equal(got, np.nan_to_num(np.clip(FLOATS, 0, 1), nan=0.0))
    got = apply("cvt.ftz.f64.f32 {o}, {a};", "f64", a=("f32", FLOATS))
    tiny = np.abs(FLOATS) < np.finfo(np.float32).tiny
    np.testing.assert_array_equal(got, np.where(tiny, 0, FLOATS))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_packed_pairs(kind: str) -> None:
    """The first source goes to the high half."""
    a, b = FLOATS, FLOATS[::-1].copy()
    columns = {"a": ("f32", a), "b": ("f32", b)}
    got = apply(f"cvt.rn.{kind}x2.f32 {{o}}, {{a}}, {{b}};", "u32", **columns).view(np.uint16)
    same_half(got[1::2], half_bits(a, kind)[0], kind)
    same_half(got[0::2], half_bits(b, kind)[0], kind)
    got = apply(f"cvt.rn.relu.{kind}x2.f32 {{o}}, {{a}}, {{b}};", "u32", **columns).view(np.uint16)
    same_half(got[1::2], half_bits(np.where(a < 0, np.float32(0), a), kind)[0] & 0x7FFF, kind)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_towards_zero(kind: str) -> None:
    a = FLOATS[np.isfinite(FLOATS)]
    got = apply(f"cvt.rz.{kind}.f32 {{o}}, {{a}};", "u16", a=("f32", a))
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    value = torch.tensor(got).view(dtype).double().numpy()
    up = torch.tensor(got + np.uint16(1)).view(dtype).double().numpy()
    assert (np.abs(value) <= np.abs(a)).all()
    below_top = np.abs(a) < (65504 if kind == "f16" else 3e38)
    assert (np.abs(up) > np.abs(a))[below_top].all()


def test_tf32() -> None:
    a = FLOATS[np.isfinite(FLOATS)]
    bits = apply("cvt.rna.tf32.f32 {o}, {a};", "u32", a=("f32", a))
    assert not (bits & 0x1FFF).any()
    value = bits.view(np.float32).astype(np.float64)
    _, exponent = np.frexp(a.astype(np.float64))
    unit = 2.0 ** (np.maximum(exponent, -125) - 11.0)
    want = np.copysign(np.floor(np.abs(a) / unit + 0.5) * unit, a)  # nearest, ties away
    np.testing.assert_array_equal(value, want)
    tie = np.array([1 + 2.0**-11, 1 + 3 * 2.0**-11], np.float32)
    got = apply("cvt.rn.tf32.f32 {o}, {a};", "u32", a=("f32", tie)).view(np.float32)
    np.testing.assert_array_equal(got, np.array([1, 1 + 2.0**-9], np.float32))


def test_address_spaces() -> None:
    """A shared address made generic is found again, by cvta.to and by a generic load."""
    memory = Memory()
    out = memory.allocate("out", 3 * 4 * 32)
    body = """
        mov.u32 %r1, %tid.x;
        mov.u32 %r2, s;
        mad.lo.u32 %r2, %r1, 4, %r2;
        st.shared.u32 [%r2], %r1;
        cvt.u64.u32 %d1, %r2;
        cvta.shared.u64 %d2, %d1;
        ld.u32 %r3, [%d2];
        cvta.to.shared.u64 %d3, %d2;
        sub.u64 %d4, %d3, %d1;
        isspacep.shared %p1, %d2;
        selp.u32 %r5, 1, 0, %p1;
        ld.param.u64 %d5, [p0];
        cvta.to.global.u64 %d6, %d5;
        mad.wide.u32 %d6, %r1, 12, %d6;
        cvt.u32.u64 %r4, %d4;
        st.global.u32 [%d6], %r3;
        st.global.u32 [%d6+4], %r4;
        st.global.u32 [%d6+8], %r5;
        ret;
    """
    run(body, (out,), memory=memory, variables=".shared .align 4 .b8 s[128];").check()
    got: Array = out.array(np.uint32, (32, 3))
    np.testing.assert_array_equal(got[:, 0], np.arange(32))
    assert not got[:, 1].any()
    assert (got[:, 2] == 1).all()
