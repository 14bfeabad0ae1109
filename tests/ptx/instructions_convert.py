# SPDX-License-Identifier: Apache-2.0
"""cvt and cvta: between all scalar types, into packed pairs, and between address spaces."""

from __future__ import annotations

from typing import Any

import numpy as np

from .decode import Code, Mods, opcode
from .instructions_float import reader
from .lanes import Step
from .memory import LOCAL_WINDOW, SHARED_WINDOW
from .words import DTYPE, Array, directed, f32_to_bf16, f64_to_bf16, flush, pack

ROUND_INT = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
FLOATS = ("f16", "bf16", "f32", "f64", "tf32")


def to_tf32(values: Any, rounding: str) -> Array:
    """f32 with 10 bits of mantissa: rna is to nearest, ties away; rn ties to even; rz truncates."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    special = (bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    up: Any
    if rounding == "rna":
        up = np.uint32(0x1000)
    elif rounding == "rn":
        up = np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    else:
        up = np.uint32(0)
    return np.where(special, bits, (bits + up) & np.uint32(0xFFFFE000))


def to_half(values: Array, kind: str, rounding: str) -> Array:
    """float64 (exact) to the bits of f16 or bf16."""
    if kind == "bf16":
        if rounding == "rz":
            return f32_to_bf16(directed(values.astype(np.float32), values, "rz"), "rz")
        return f64_to_bf16(values)
    rounded = directed16(values.astype(np.float16), values, rounding)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.view(np.uint16))


def directed16(nearest: Array, exact: Array, rounding: str) -> Array:
    if rounding == "rn":
        return nearest
    wide = nearest.astype(np.float64)
    goals: dict[str, Any] = {"rm": -np.inf, "rp": np.inf}
    towards = goals.get(rounding, np.where(exact > 0, -np.inf, np.inf))
    goal = np.broadcast_to(towards, wide.shape).astype(np.float16)
    wrong = np.where(goal < 0, wide > exact, wide < exact)
    return np.where(wrong, np.nextafter(nearest, goal), nearest)


def float_to_int(values: Array, kind: str, source: str) -> Array:
    """Integral float64 values, clamped; NaN gives what the PTX ISA says for the pair of types."""
    info = np.iinfo(DTYPE[kind])
    wide = source == "f64" or kind in ("s64", "u64")
    invalid = (1 << (info.bits - 1)) if wide else 0
    top = float(info.max)  # for 64 bits this is 2^63 or 2^64, one too many
    low = np.clip(values, float(info.min), top)
    safe = np.where(np.isnan(values) | (low >= top), 0.0, low)
    result = safe.astype(DTYPE[kind])
    result = np.where(low >= top, DTYPE[kind].type(info.max), result)
    bits = np.array(invalid, np.uint64).astype(f"u{info.bits // 8}").view(DTYPE[kind])
    return np.where(np.isnan(values), bits, result)


def clamp_negative(values: Any) -> Any:
    """.relu: what is not above zero, -0 included, becomes +0; NaN stays."""
    return np.where((values > 0) | np.isnan(values), values, np.zeros_like(values))


@opcode("cvt")
def convert(code: Code, mods: Mods) -> Step:
    target, source = mods.type(), mods.type()
    ftz, sat, relu = mods.has("ftz"), mods.has("sat"), mods.has("relu")
    satfinite = mods.has("satfinite")
    integral = mods.take("rni", "rzi", "rmi", "rpi")
    rounding = mods.take("rna", "rn", "rz", "rm", "rp") or "rn"
    args = code.ins.args
    if target in ("f16x2", "bf16x2"):
        high, low = (reader(code, x, source, ftz) for x in args[1:3])
        put = code.put(args[0], "b32")
        kind = target[:-2]

        def packed() -> None:
            parts = []
            for read in (low, high):
                x = np.atleast_1d(np.asarray(read(), np.float64))
                x = clamp_negative(x) if relu else x
                parts.append(to_half(_finite(x, kind) if satfinite else x, kind, rounding))
            put(pack(*parts))

        return packed
    read = reader(code, args[1], source, ftz)
    if target == "tf32":
        put = code.put(args[0], "b32")
        return lambda: put(to_tf32(clamp_negative(read()) if relu else read(), rounding))
    if source not in FLOATS and target not in FLOATS:
        return _int_to_int(code, read, target, source, sat)
    if target not in FLOATS:
        whole = ROUND_INT[integral or "rzi"]
        put = code.put(args[0], target)
        return lambda: put(
            float_to_int(whole(np.atleast_1d(np.asarray(read(), np.float64))), target, source)
        )
    bits = {"f16": "b16", "bf16": "b16"}.get(target, target)
    put = code.put(args[0], bits)

    def to_float() -> None:
        x = np.atleast_1d(np.asarray(read()))
        if target == "f32" and rounding == "rn" and x.dtype.kind in "iu" and not sat:
            put(x.astype(np.float32))  # straight: 64-bit integers do not fit float64
            return
        wide = x.astype(np.float64)
        if integral:
            wide = ROUND_INT[integral](wide)
        if relu:
            wide = clamp_negative(wide)
        if sat:
            wide = np.clip(np.where(np.isnan(wide), 0.0, wide), 0.0, 1.0)
        if target == "f64":
            put(wide)
        elif target == "f32":
            result = directed(wide.astype(np.float32), wide, rounding)
            put(flush(result) if ftz else result)
        else:
            put(to_half(_finite(wide, target) if satfinite else wide, target, rounding))

    return to_float


def _finite(values: Array, kind: str) -> Array:
    top = 65504.0 if kind == "f16" else float(np.uint32(0x7F7F0000).view(np.float32))
    return np.where(np.isnan(values), values, np.clip(values, -top, top))


def _int_to_int(code: Code, read: Any, target: str, source: str, sat: bool) -> Step:
    put, dtype = code.put(code.ins.args[0], target), DTYPE[target]
    if not sat:
        return lambda: put(np.asarray(read()).astype(dtype))
    info, from_info = np.iinfo(dtype), np.iinfo(DTYPE[source])
    low, high = max(info.min, from_info.min), min(info.max, from_info.max)
    return lambda: put(np.clip(read(), DTYPE[source].type(low), DTYPE[source].type(high)))


@opcode("cvta")
def convert_address(code: Code, mods: Mods) -> Step:
    """Global, constant and parameter addresses are generic already; the others get a window."""
    to = mods.has("to")
    space = mods.take("global", "shared", "shared__cta", "local", "const", "param", "param__entry")
    kind = mods.type()
    base = {"shared": SHARED_WINDOW, "shared__cta": SHARED_WINDOW, "local": LOCAL_WINDOW}
    delta = np.uint64(base.get(space or "", 0))
    a, put = code.get(code.ins.args[1], kind), code.put(code.ins.args[0], kind)
    if to:
        return lambda: put(a() - delta)
    return lambda: put(a() + delta)
