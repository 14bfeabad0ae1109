# SPDX-License-Identifier: Apache-2.0
"""Floating point against exact rational arithmetic, and against numpy where numpy is exact."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from .snippets import apply
from .words import DTYPE, Array


def f32_edges() -> Array:
    rng = np.random.default_rng(0)
    known = [0.0, -0.0, 1.0, -1.0, 1.5, 3.0, 1e-40, -1e-40, 1e-38, 3.4e38, -3.4e38, 1 + 2**-23]
    known += [np.inf, -np.inf, np.nan, 65504.0, 2.0**-24]
    drawn = rng.standard_normal(12) * 10.0 ** rng.integers(-20, 20, 12)
    return np.array([*known, *drawn], np.float32)


def tuples(count: int) -> tuple[Array, ...]:
    values = f32_edges() if count == 2 else f32_edges()[::2]
    rows = np.array(list(itertools.product(values, repeat=count)), np.float32)
    return tuple(rows.T.copy())


def round_f32(value: Fraction) -> np.float32:
    """One rounding to nearest even, from first principles."""
    if value == 0:
        return np.float32(0)
    sign, value = (-1, -value) if value < 0 else (1, value)
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    if Fraction(2) ** exponent > value:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    quotient = round(value / unit)  # Fraction rounds half to even
    finite = quotient * unit < 2**128
    return np.float32(sign * float(quotient * unit) if finite else sign * np.inf)


def same(got: Array, want: Array) -> None:
    np.testing.assert_array_equal(got, want)  # NaNs are equal here
    zero = want == 0
    np.testing.assert_array_equal(np.signbit(got[zero]), np.signbit(want[zero]))


@pytest.mark.parametrize("op", ["add", "sub", "mul", "div"])
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_basic_arithmetic(op: str, kind: str) -> None:
    a, b = (x.astype(DTYPE[kind]) for x in tuples(2))
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[op]
    with np.errstate(all="ignore"):
        want = function(a, b)
    modifier = ".rn" if op == "div" else ""
    same(apply(f"{op}{modifier}.{kind} {{o}}, {{a}}, {{b}};", kind, a=(kind, a), b=(kind, b)), want)


def test_division_approximations() -> None:
    a, b = tuples(2)
    with np.errstate(all="ignore"):
        want = a / b
    for mode in ("approx", "full"):
        same(apply(f"div.{mode}.f32 {{o}}, {{a}}, {{b}};", "f32", a=("f32", a), b=("f32", b)), want)


def test_flush_to_zero() -> None:
    a, b = tuples(2)
    tiny = np.finfo(np.float32).tiny

    def flush(x: Array) -> Array:
        return np.where(np.abs(x) < tiny, np.copysign(np.float32(0), x), x)

    with np.errstate(all="ignore"):
        want = flush(flush(a) * flush(b))
    same(apply("mul.ftz.f32 {o}, {a}, {b};", "f32", a=("f32", a), b=("f32", b)), want)


def test_saturation() -> None:
    a, b = tuples(2)
    with np.errstate(all="ignore"):
        want = np.nan_to_num(np.clip(a + b, 0, 1), nan=0.0)
    got = apply("add.sat.f32 {o}, {a}, {b};", "f32", a=("f32", a), b=("f32", b))
    np.testing.assert_array_equal(got, want)


def test_fma_rounds_once() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 3000)).astype(np.float32)
    near = -(a.astype(np.float64) * b).astype(np.float32)
    c = np.where(np.arange(3000) % 2, near, np.float32(2.0) ** rng.integers(-40, 40, 3000))
    c = c.astype(np.float32)
    got = apply("fma.rn.f32 {o}, {a}, {b}, {c};", "f32", a=("f32", a), b=("f32", b), c=("f32", c))
    for i in range(len(a)):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        assert got[i] == round_f32(exact), i
    # A tie that two roundings would get wrong: the product is just above half an ulp of c.
    x, y, z = (np.array([v], np.float32) for v in (1 + 2**-23, 2**-24 + 2**-47, 1.0))
    got = apply("fma.rn.f32 {o}, {a}, {b}, {c};", "f32", a=("f32", x), b=("f32", y), c=("f32", z))
    assert got[0] == np.float32(1 + 2**-23)


def test_fma_of_special_values() -> None:
    a, b, c = tuples(3)
    with np.errstate(all="ignore"):
        want = (a.astype(np.longdouble) * b + c).astype(np.float32)
    got = apply("fma.rn.f32 {o}, {a}, {b}, {c};", "f32", a=("f32", a), b=("f32", b), c=("f32", c))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    infinite = np.isinf(want)
    np.testing.assert_array_equal(got[infinite], want[infinite])
    got = apply("mad.rn.f32 {o}, {a}, {b}, {c};", "f32", a=("f32", a), b=("f32", b), c=("f32", c))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))


def test_fma_f64() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, 500))
    c = -(a * b) * (1 + 2.0**-50 * rng.integers(-2, 3, 500))
    got = apply("fma.rn.f64 {o}, {a}, {b}, {c};", "f64", a=("f64", a), b=("f64", b), c=("f64", c))
    for i in range(len(a)):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        assert abs(Fraction(float(got[i])) - exact) <= abs(exact) * Fraction(1, 2**52)


@pytest.mark.parametrize("rounding", ["rz", "rm", "rp"])
@pytest.mark.parametrize("op", ["add", "mul"])
def test_directed_rounding(rounding: str, op: str) -> None:
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((2, 500)).astype(np.float32)
    got = apply(f"{op}.{rounding}.f32 {{o}}, {{a}}, {{b}};", "f32", a=("f32", a), b=("f32", b))
    for x, y, value in zip(a, b, got, strict=True):
        fx, fy = Fraction(float(x)), Fraction(float(y))
        exact = fx + fy if op == "add" else fx * fy
        down = rounding == "rm" or (rounding == "rz" and exact > 0)
        other = np.nextafter(value, np.float32(np.inf if down else -np.inf))
        if down:
            assert Fraction(float(value)) <= exact < Fraction(float(other))
        else:
            assert Fraction(float(other)) < exact <= Fraction(float(value))


@pytest.mark.parametrize(
    ("text", "function"),
    [
        ("rcp.rn.f32", lambda x: 1 / x),
        ("rcp.approx.ftz.f32", lambda x: 1 / x),
        ("sqrt.rn.f32", np.sqrt),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x)),
        ("ex2.approx.ftz.f32", np.exp2),
        ("lg2.approx.f32", np.log2),
        ("sin.approx.f32", np.sin),
        ("cos.approx.f32", np.cos),
        ("tanh.approx.f32", np.tanh),
    ],
)
def test_special_functions(text: str, function: Any) -> None:
    a = np.concatenate([np.linspace(-90, 90, 181), [np.inf, -np.inf, np.nan, 0.0]]).astype(
        np.float32
    )
    got = apply(f"{text} {{o}}, {{a}};", "f32", a=("f32", a))
    with np.errstate(all="ignore"):
        want = function(a.astype(np.float64))
    np.testing.assert_allclose(got, want.astype(np.float32), rtol=2.0**-22)


def test_f64_functions() -> None:
    a = np.linspace(0.1, 50, 100)
    np.testing.assert_array_equal(apply("rcp.rn.f64 {o}, {a};", "f64", a=("f64", a)), 1 / a)
    np.testing.assert_array_equal(apply("sqrt.rn.f64 {o}, {a};", "f64", a=("f64", a)), np.sqrt(a))


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_extremes_and_signs(kind: str) -> None:
    a, b = (x.astype(DTYPE[kind]) for x in tuples(2))
    columns = {"a": (kind, a), "b": (kind, b)}
    for op in ("min", "max"):
        got = apply(f"{op}.{kind} {{o}}, {{a}}, {{b}};", kind, **columns)
        want = np.array([_extreme(op, x, y) for x, y in zip(a, b, strict=True)])
        same(got, want)
    if kind == "f32":
        got = apply("max.NaN.f32 {o}, {a}, {b};", kind, **columns)
        np.testing.assert_array_equal(got, np.maximum(a, b))
        got = apply("min.xorsign.abs.f32 {o}, {a}, {b};", kind, **columns)
        want = np.fmin(np.abs(a), np.abs(b))
        want = np.where(np.signbit(a) ^ np.signbit(b), -want, want)
        np.testing.assert_array_equal(got, want)
    same(apply(f"neg.{kind} {{o}}, {{a}};", kind, **columns), -a)
    same(apply(f"abs.{kind} {{o}}, {{a}};", kind, **columns), np.abs(a))
    same(apply(f"copysign.{kind} {{o}}, {{a}}, {{b}};", kind, **columns), np.copysign(b, a))


def _extreme(op: str, x: float, y: float) -> float:
    """NaN loses; -0 is below +0."""
    if np.isnan(x):
        return y
    if np.isnan(y):
        return x
    key = lambda v: (v, not np.signbit(v))  # noqa: E731
    return min(x, y, key=key) if op == "min" else max(x, y, key=key)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_comparisons(kind: str) -> None:
    a, b = (x.astype(DTYPE[kind]) for x in tuples(2))
    unordered = np.isnan(a) | np.isnan(b)
    ordered = {"eq": a == b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    ordered["ne"] = (a < b) | (a > b)
    wanted = {**ordered, **{n + "u": w | unordered for n, w in ordered.items()}}
    wanted |= {"num": ~unordered, "nan": unordered}
    for name, want in wanted.items():
        got = apply(f"setp.{name}.{kind} {{o}}, {{a}}, {{b}};", "pred", a=(kind, a), b=(kind, b))
        np.testing.assert_array_equal(got, want, name)


def test_testp() -> None:
    a = f32_edges()
    tiny = np.finfo(np.float32).tiny
    wanted = {
        "finite": np.isfinite(a),
        "infinite": np.isinf(a),
        "number": ~np.isnan(a),
        "notanumber": np.isnan(a),
        "normal": np.isfinite(a) & (np.abs(a) >= tiny),
        "subnormal": (a != 0) & (np.abs(a) < tiny),
    }
    for name, want in wanted.items():
        got = apply(f"testp.{name}.f32 {{o}}, {{a}};", "pred", a=("f32", a))
        np.testing.assert_array_equal(got, want, name)


# ---- f16 and bf16: torch rounds them independently ----

TORCH = {"f16": torch.float16, "bf16": torch.bfloat16}


def half_bits(values: Array, kind: str) -> tuple[Array, torch.Tensor]:
    rounded = torch.tensor(values).to(TORCH[kind])
    return rounded.view(torch.uint16).numpy(), rounded.double()


def to_bits(values: torch.Tensor, kind: str) -> Array:
    return values.to(TORCH[kind]).view(torch.uint16).numpy()


def same_half(got: Array, want: Array, kind: str) -> None:
    exponent = 0x7C00 if kind == "f16" else 0x7F80
    nan = lambda x: (x & 0x7FFF) > exponent  # noqa: E731
    np.testing.assert_array_equal(nan(got), nan(want))
    np.testing.assert_array_equal(got[~nan(want)], want[~nan(want)])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_arithmetic(kind: str, packed: bool) -> None:
    rng = np.random.default_rng(6)
    raw = rng.standard_normal((3, 400)) * 10.0 ** rng.integers(-3, 3, (3, 400))
    raw[0, :3] = [np.inf, np.nan, 0.0]
    (a, x), (b, y), (c, z) = (half_bits(r, kind) for r in raw)
    word, name = ("u32", kind + "x2") if packed else ("u16", kind)
    columns = {
        n: (word, v.view(np.uint32) if packed else v) for n, v in zip("abc", (a, b, c), strict=True)
    }

    def check(text: str, want: torch.Tensor) -> None:
        same_half(apply(text, word, **columns).view(np.uint16), to_bits(want, kind), kind)

    check(f"add.{name} {{o}}, {{a}}, {{b}};", x + y)
    check(f"sub.{name} {{o}}, {{a}}, {{b}};", x - y)
    check(f"mul.{name} {{o}}, {{a}}, {{b}};", x * y)
    check(f"fma.rn.{name} {{o}}, {{a}}, {{b}}, {{c}};", x * y + z)
    total = x * y + z
    relu = torch.where(total.isnan(), total, total.clamp(min=0))
    check(f"fma.rn.relu.{name} {{o}}, {{a}}, {{b}}, {{c}};", relu)
    check(f"min.{name} {{o}}, {{a}}, {{b}};", torch.fmin(x, y))
    check(f"max.{name} {{o}}, {{a}}, {{b}};", torch.fmax(x, y))
    check(f"max.NaN.{name} {{o}}, {{a}}, {{b}};", torch.maximum(x, y))
    check(f"neg.{name} {{o}}, {{a}};", -x)
    check(f"abs.{name} {{o}}, {{a}};", x.abs())
    ftz = ".ftz" if kind == "bf16" else ""
    check(f"ex2.approx{ftz}.{name} {{o}}, {{a}};", torch.exp2(x))
    check(f"tanh.approx.{name} {{o}}, {{a}};", torch.tanh(x))
    if not packed:
        got = apply(f"setp.lt.{kind} {{o}}, {{a}}, {{b}};", "pred", **columns)
        np.testing.assert_array_equal(got, (x < y).numpy())


def test_bf16_sum_rounds_once() -> None:
    """1 + 2^-8 is a tie of bf16; what lies far below must decide it."""
    a, b = np.float32(1 + 2**-7), np.float32(2**-8)
    bits = [half_bits(np.array([v]), "bf16")[0] for v in (a, b, 2.0**-60)]
    text = "fma.rn.bf16 {o}, {a}, {b}, {c};"
    one, tiny = half_bits(np.array([1.0]), "bf16")[0], bits[2]
    got = apply(text, "u16", a=("u16", one), b=("u16", bits[1]), c=("u16", bits[0]))
    want = half_bits(np.array([1 + 2**-6]), "bf16")[0]  # tie to even
    np.testing.assert_array_equal(got, want)
    got = apply("add.bf16 {o}, {a}, {b};", "u16", a=("u16", one), b=("u16", tiny))
    np.testing.assert_array_equal(got, one)
