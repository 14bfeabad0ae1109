# SPDX-License-Identifier: Apache-2.0
"""Floating point: f32 and f64, and f16 and bf16 alone or packed in pairs.

add, sub, mul, fma, div, rcp and sqrt round once, as the hardware does. The approximations (ex2,
lg2, sin, cos, tanh, rsqrt, div.approx, div.full) are computed in float64 and rounded: they are
closer to the truth than the hardware, never further. f64 fma keeps the product's error and is
within an ulp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .decode import Code, Getter, Mods, Setter, opcode
from .lanes import Step
from .parser import Operand
from .words import (
    Array,
    bf16_to_f32,
    directed,
    f64_to_bf16,
    flush,
    fma_odd,
    halves,
    odd,
    pack,
    two_sum,
)

Function = Callable[..., Any]
NAN16 = np.uint16(0x7FFF)


def reader(code: Code, operand: Operand, kind: str, ftz: bool) -> Getter:
    """Reads an operand as numpy numbers: bf16 comes as float32, packed types are refused."""
    if kind == "bf16":
        bits = code.get(operand, "b16")
        return lambda: bf16_to_f32(np.asarray(bits()))
    get = code.get(operand, kind)
    if ftz and kind == "f32":
        return lambda: flush(get())
    return get


def writer(code: Code, operand: Operand, kind: str, ftz: bool, sat: bool = False) -> Setter:
    put = code.put(operand, kind)
    if not (ftz and kind == "f32") and not sat:
        return put

    def finished(value: Any) -> None:
        if sat:  # NaN becomes zero
            value = np.fmin(np.fmax(np.where(np.isnan(value), 0, value), 0), 1)
        put(flush(value) if ftz and kind == "f32" else value)

    return finished


# ---- f16 and bf16, alone or in pairs ----


def unpack16(words: Any, kind: str) -> list[Array]:
    """float64 components, low half first."""
    words = np.atleast_1d(words)
    parts = list(halves(words)) if kind.endswith("x2") else [words]
    if kind.startswith("bf16"):
        return [bf16_to_f32(p).astype(np.float64) for p in parts]
    return [p.view(np.float16).astype(np.float64) for p in parts]


def round16(values: Array, kind: str) -> Array:
    """float64 (exact or rounded to odd) to the bits of f16 or bf16."""
    if kind.startswith("bf16"):
        return f64_to_bf16(values)
    return np.where(np.isnan(values), NAN16, values.astype(np.float16).view(np.uint16))


def half_step(code: Code, mods: Mods, kind: str, sources: Sequence[Operand], op: Function) -> Step:
    """Applies a function of float64 components; .relu, .sat and .ftz are handled here."""
    relu, sat = mods.has("relu"), mods.has("sat")
    mods.drop("ftz")  # f16 subnormals are kept: they are exact here, and no result depends on it
    bits = "b32" if kind.endswith("x2") else "b16"
    gets = [code.get(x, bits) for x in sources]
    put = code.put(code.ins.args[0], bits)

    def step() -> None:
        inputs = [unpack16(g(), kind) for g in gets]
        results = []
        for operands in zip(*inputs, strict=True):
            value = op(*operands)
            if relu:
                value = np.where(value > 0, value, np.where(np.isnan(value), value, 0.0))
            if sat:
                value = np.clip(np.nan_to_num(value, nan=0.0, posinf=1.0, neginf=0.0), 0, 1)
            results.append(round16(value, kind))
        put(pack(*results) if len(results) == 2 else results[0])

    return step


def add_odd(a: Any, b: Any) -> Array:
    return odd(*two_sum(a, b))


# ---- arithmetic ----

_HALF: dict[str, Function] = {
    "add": add_odd,
    "sub": lambda a, b: add_odd(a, -b),
    "mul": np.multiply,
    "fma": fma_odd,
}


def _exact(op: str) -> Function:
    """The result of an f32 operation in float64, exact or rounded to odd."""
    return _HALF["fma" if op == "mad" else op]


def _fma64(a: Any, b: Any, c: Any) -> Any:
    """a*b + c with the product's error kept (Dekker's split), within an ulp of one rounding."""
    p = a * b
    split = 134217729.0
    ah = a * split - (a * split - a)
    bh = b * split - (b * split - b)
    al, bl = a - ah, b - bh
    error = ((ah * bh - p) + ah * bl + al * bh) + al * bl
    total, lost = two_sum(np.atleast_1d(p), np.atleast_1d(c))
    result = total + (lost + np.where(np.isfinite(error), error, 0.0))
    return np.where(np.isfinite(p), result, p + c)


@opcode("add:float", "sub:float", "mul:float", "fma:float", "mad:float")
def arithmetic(code: Code, mods: Mods) -> Step:
    op, kind = code.ins.op, mods.type()
    rounding = mods.take("rn", "rz", "rm", "rp") or "rn"
    count = 3 if op in ("fma", "mad") else 2
    sources = code.ins.args[1 : 1 + count]
    if "16" in kind:
        return half_step(code, mods, kind, sources, _exact(op))
    ftz, sat = mods.has("ftz"), mods.has("sat")
    gets = [reader(code, x, kind, ftz) for x in sources]
    put = writer(code, code.ins.args[0], kind, ftz, sat)
    a, b = gets[:2]
    simple: dict[str, Function] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    if kind == "f64":
        if rounding != "rn":
            raise code.ins.error("directed rounding of f64 is not implemented")
        if count == 3:
            return lambda: put(_fma64(a(), b(), gets[2]()))
        return lambda: put(simple[op](a(), b()))
    if rounding == "rn" and count == 2:
        plain = simple[op]
        return lambda: put(plain(a(), b()))
    exact = _exact(op)

    def step() -> None:
        value = np.atleast_1d(exact(*(np.asarray(g(), np.float64) for g in gets)))
        put(directed(value.astype(np.float32), value, rounding))

    return step


def _rounded(op: Function) -> Function:
    """Computes in float64, then rounds to the type of the first operand."""
    return lambda a, *rest: op(
        np.asarray(a, np.float64), *(np.asarray(x, np.float64) for x in rest)
    ).astype(np.asarray(a).dtype)


_UNARY: dict[str, Function] = {
    "rcp": lambda a: np.asarray(a).dtype.type(1) / a,
    "sqrt": np.sqrt,
    "rsqrt": _rounded(lambda a: 1 / np.sqrt(a)),
    "ex2": _rounded(np.exp2),
    "lg2": _rounded(np.log2),
    "sin": _rounded(np.sin),
    "cos": _rounded(np.cos),
    "tanh": _rounded(np.tanh),
}


@opcode(*(f"{name}:float" for name in _UNARY))
def special(code: Code, mods: Mods) -> Step:
    kind = mods.type()
    mods.take("approx", "rn", "rz", "rm", "rp")
    op = _UNARY[code.ins.op]
    if "16" in kind:
        return half_step(code, mods, kind, code.ins.args[1:2], op)
    ftz = mods.has("ftz")
    a = reader(code, code.ins.args[1], kind, ftz)
    put = writer(code, code.ins.args[0], kind, ftz)
    return lambda: put(op(a()))


@opcode("div:float")
def divide(code: Code, mods: Mods) -> Step:
    kind, ftz = mods.type(), mods.has("ftz")
    mode = mods.take("approx", "full", "rn")
    if mode is None:
        raise code.ins.error("this rounding of div is not implemented")
    a, b = (reader(code, x, kind, ftz) for x in code.ins.args[1:3])
    put = writer(code, code.ins.args[0], kind, ftz)
    return lambda: put(a() / b())


# ---- signs and extremes ----

_SIGN = {"f16": 0x8000, "bf16": 0x8000, "f16x2": 0x80008000, "bf16x2": 0x80008000}
_SIGN.update({"f32": 0x80000000, "f64": 0x8000000000000000})
_BITS = {"f16": "b16", "bf16": "b16", "f16x2": "b32", "bf16x2": "b32", "f32": "b32", "f64": "b64"}


@opcode("neg:float", "abs:float")
def sign(code: Code, mods: Mods) -> Step:
    kind, ftz = mods.type(), mods.has("ftz")
    bits, op = _BITS[kind], code.ins.op
    a, put = code.get(code.ins.args[1], bits), code.put(code.ins.args[0], bits)
    operands: Callable[[], Any] = a
    if ftz and kind == "f32":
        operands = lambda: flush(np.asarray(a()).view(np.float32)).view(np.uint32)  # noqa: E731
    if op == "neg":
        return lambda: put((x := operands()) ^ x.dtype.type(_SIGN[kind]))
    return lambda: put((x := operands()) & ~x.dtype.type(_SIGN[kind]))


@opcode("copysign:float")
def copy_sign(code: Code, mods: Mods) -> Step:
    """The sign of a on the magnitude of b."""
    kind = mods.type()
    a, b = (code.get(x, kind) for x in code.ins.args[1:3])
    put = code.put(code.ins.args[0], kind)
    return lambda: put(np.copysign(b(), a()))


def extreme_of(a: Any, b: Any, op: str, nan: bool) -> Any:
    """min or max with -0 below +0; NaN loses unless `nan`."""
    if op == "min":
        value = np.minimum(a, b) if nan else np.fmin(a, b)
        zero = np.where(np.signbit(a) | np.signbit(b), -0.0, 0.0)
    else:
        value = np.maximum(a, b) if nan else np.fmax(a, b)
        zero = np.where(np.signbit(a) & np.signbit(b), -0.0, 0.0)
    return np.where((a == 0) & (b == 0), zero, value).astype(np.asarray(value).dtype)


@opcode("min:float", "max:float")
def extreme(code: Code, mods: Mods) -> Step:
    kind, op = mods.type(), code.ins.op
    propagate, magnitude = mods.has("NaN"), mods.has("xorsign")
    mods.drop("abs")
    sources = code.ins.args[1:]

    def choose(*values: Any) -> Any:
        result = values[0]
        for value in values[1:]:
            if magnitude:
                flipped = np.signbit(result) ^ np.signbit(value)
                result = extreme_of(np.abs(result), np.abs(value), op, propagate)
                result = np.where(flipped, -result, result)
            else:
                result = extreme_of(result, value, op, propagate)
        return result

    if "16" in kind:
        return half_step(code, mods, kind, sources, choose)
    ftz = mods.has("ftz")
    gets = [reader(code, x, kind, ftz) for x in sources]
    put = writer(code, code.ins.args[0], kind, ftz)
    return lambda: put(choose(*(g() for g in gets)))


@opcode("testp:float")
def test_property(code: Code, mods: Mods) -> Step:
    kind = mods.type()
    name = mods.take("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    a, put = code.get(code.ins.args[1], kind), code.put(code.ins.args[0], "pred")
    tiny = np.finfo(np.float32 if kind == "f32" else np.float64).tiny
    tests: dict[str | None, Function] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda x: (np.abs(x) < tiny) & (x != 0),
    }
    test = tests[name]
    return lambda: put(test(a()))
