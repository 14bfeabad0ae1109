# SPDX-License-Identifier: Apache-2.0
"""What a PTX type means in numpy, and the roundings numpy does not have.

bf16 has no numpy type: its values are held as uint16 bits and computed in float64 or float32.
Rounding twice (float64, then the target) is avoided with round-to-odd: a value that was inexact
keeps a set last bit, so that the second rounding cannot mistake it for a tie.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

DTYPE: dict[str, np.dtype[Any]] = {
    **{f"u{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    **{f"b{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    **{f"s{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "bf16": np.dtype(np.uint16),
    "tf32": np.dtype(np.uint32),
    "f16x2": np.dtype(np.uint32),
    "bf16x2": np.dtype(np.uint32),
    "pred": np.dtype(bool),
}
UNSIGNED = {n: np.dtype(f"u{n}") for n in (1, 2, 4, 8)}
CANONICAL_NAN32 = np.uint32(0x7FFFFFFF).view(np.float32)


def bf16_to_f32(bits: Array) -> Array:
    """Exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: Array, rounding: str = "rn") -> Array:
    """Nearest even, or towards zero; every NaN becomes the canonical 0x7fff."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    if rounding == "rn":
        up = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        rounded = (bits + up) >> np.uint32(16)
    else:
        rounded = bits >> np.uint32(16)
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def odd(exact_sum: Array, error: Array) -> Array:
    """`exact_sum` + `error` rounded to odd: float64 with a set last bit wherever it is inexact."""
    bits = exact_sum.view(np.uint64)
    inexact = (error != 0) & np.isfinite(exact_sum) & ((bits & np.uint64(1)) == 0)
    # Towards the true value: one step up or down leads to an odd neighbour.
    towards = np.where(error > 0, np.inf, -np.inf)
    return np.where(inexact, np.nextafter(exact_sum, towards), exact_sum)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b and its rounding error, exactly (Knuth)."""
    s = a + b
    t = s - a
    error = (a - (s - t)) + (b - t)
    return s, np.where(np.isfinite(s), error, 0.0)


def fma_odd(a: Array, b: Array, c: Array) -> Array:
    """a*b + c in float64 rounded to odd; a and b have at most 26 significant bits."""
    product = np.multiply(a, b, dtype=np.float64)
    total, error = two_sum(np.atleast_1d(product), np.atleast_1d(np.asarray(c, np.float64)))
    return odd(total, error)


def odd_f32(values: Array) -> Array:
    """float64 to float32, rounded to odd: the step before bf16."""
    nearest = values.astype(np.float32)
    return _f32_odd(nearest, values)


def _f32_odd(nearest: Array, values: Array) -> Array:
    wide = nearest.astype(np.float64)
    even = (nearest.view(np.uint32) & np.uint32(1)) == 0
    inexact = (wide != values) & np.isfinite(wide) & even
    towards = np.where(values > wide, np.float32(np.inf), np.float32(-np.inf))
    return np.where(inexact, np.nextafter(nearest, towards), nearest).astype(np.float32)


def f64_to_bf16(values: Array) -> Array:
    """One rounding to nearest even."""
    return f32_to_bf16(odd_f32(np.atleast_1d(values)))


def flush(values: Array) -> Array:
    """.ftz: subnormal float32 values become zeros of the same sign."""
    tiny = np.abs(values) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), values), values)


def halves(words: Array) -> tuple[Array, Array]:
    """The low and the high 16 bits of packed words."""
    return (words & np.uint32(0xFFFF)).astype(np.uint16), (words >> np.uint32(16)).astype(np.uint16)


def pack(low: Array, high: Array) -> Array:
    """Two arrays of 16 bits into words."""
    wide = high.astype(np.uint32) << np.uint32(16)
    return wide | low.astype(np.uint32)


def directed(values: Array, exact: Array, rounding: str) -> Array:
    """Moves float32 `values`, the nearest to `exact` (float64), to the rounding asked for."""
    if rounding == "rn":
        return values
    wide = values.astype(np.float64)
    down, up = np.float32(-np.inf), np.float32(np.inf)
    too_high, too_low = wide > exact, wide < exact
    if rounding == "rz":
        too_high, too_low = too_high & (exact > 0), too_low & (exact < 0)
        moved = np.where(too_high, np.nextafter(values, down), values)
        return np.where(too_low, np.nextafter(values, up), moved)
    if rounding == "rm":
        return np.where(too_high, np.nextafter(values, down), values)
    return np.where(too_low, np.nextafter(values, up), values)
