# SPDX-License-Identifier: Apache-2.0
"""Integer instructions against Python's own integers, element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from .parser import PtxError
from .snippets import apply
from .words import DTYPE, Array

KINDS = ("s16", "u16", "s32", "u32", "s64", "u64")


def edges(kind: str, more: int = 20) -> Array:
    """The values where integer arithmetic goes wrong, and random ones."""
    info = np.iinfo(DTYPE[kind])
    rng = np.random.default_rng(info.bits)
    known = [info.min, info.min + 1, info.max, info.max - 1, 0, 1, 2, 3, info.max // 2]
    drawn = rng.integers(info.min, info.max, more, dtype=DTYPE[kind], endpoint=True)
    return np.unique(np.concatenate([np.array(known, DTYPE[kind]), drawn]))


def grid(*axes: Array) -> tuple[Array, ...]:
    """All combinations, as flat columns that keep the type of their axis."""
    return tuple(x.reshape(-1) for x in np.meshgrid(*axes, indexing="ij"))


def pairs(kind: str, count: int = 2) -> tuple[Array, ...]:
    values = edges(kind, 20 if count == 2 else 3)
    return grid(*([values] * count))


def wrap(value: int, kind: str) -> int:
    bits = 8 * DTYPE[kind].itemsize
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> (bits - 1) else value


def expect(function: Callable[..., int], kind: str, *columns: Array) -> Array:
    rows = zip(*(c.tolist() for c in columns), strict=True)
    return np.array([wrap(function(*row), kind) for row in rows], DTYPE[kind])


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("op", "function"),
    [
        ("add", lambda a, b: a + b),
        ("sub", lambda a, b: a - b),
        ("mul.lo", lambda a, b: a * b),
        ("min", min),
        ("max", max),
    ],
)
def test_two_operands(op: str, function: Any, kind: str) -> None:
    a, b = pairs(kind)
    got = apply(f"{op}.{kind} {{o}}, {{a}}, {{b}};", kind, a=(kind, a), b=(kind, b))
    np.testing.assert_array_equal(got, expect(function, kind, a, b))


@pytest.mark.parametrize("kind", KINDS)
def test_high_product(kind: str) -> None:
    a, b = pairs(kind)
    bits = 8 * DTYPE[kind].itemsize
    got = apply(f"mul.hi.{kind} {{o}}, {{a}}, {{b}};", kind, a=(kind, a), b=(kind, b))
    np.testing.assert_array_equal(got, expect(lambda x, y: (x * y) >> bits, kind, a, b))


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32"])
def test_wide_product_and_sum(kind: str) -> None:
    a, b = pairs(kind)
    wide = f"{kind[0]}{16 * DTYPE[kind].itemsize}"
    got = apply(f"mul.wide.{kind} {{o}}, {{a}}, {{b}};", wide, a=(kind, a), b=(kind, b))
    np.testing.assert_array_equal(got, expect(lambda x, y: x * y, wide, a, b))
    c = np.resize(edges(wide), len(a))
    text = f"mad.wide.{kind} {{o}}, {{a}}, {{b}}, {{c}};"
    got = apply(text, wide, a=(kind, a), b=(kind, b), c=(wide, c))
    np.testing.assert_array_equal(got, expect(lambda x, y, z: x * y + z, wide, a, b, c))


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_multiply_add(kind: str) -> None:
    a, b, c = pairs(kind, 3)
    columns = {"a": (kind, a), "b": (kind, b), "c": (kind, c)}
    got = apply(f"mad.lo.{kind} {{o}}, {{a}}, {{b}}, {{c}};", kind, **columns)
    np.testing.assert_array_equal(got, expect(lambda x, y, z: x * y + z, kind, a, b, c))
    bits = 8 * DTYPE[kind].itemsize
    got = apply(f"mad.hi.{kind} {{o}}, {{a}}, {{b}}, {{c}};", kind, **columns)
    np.testing.assert_array_equal(got, expect(lambda x, y, z: (x * y >> bits) + z, kind, a, b, c))


def test_24_bit_products() -> None:
    a, b = (x % (1 << 24) for x in pairs("u32"))
    got = apply("mul24.lo.u32 {o}, {a}, {b};", "u32", a=("u32", a), b=("u32", b))
    np.testing.assert_array_equal(got, a * b)
    text = "mad24.lo.u32 {o}, {a}, {b}, {b};"
    got = apply(text, "u32", a=("u32", a), b=("u32", b))
    np.testing.assert_array_equal(got, a * b + b)


@pytest.mark.parametrize("op", ["add", "sub"])
def test_saturation(op: str) -> None:
    a, b = pairs("s32")
    got = apply(f"{op}.sat.s32 {{o}}, {{a}}, {{b}};", "s32", a=("s32", a), b=("s32", b))
    exact = a.astype(np.int64) + (b.astype(np.int64) if op == "add" else -b.astype(np.int64))
    np.testing.assert_array_equal(got, np.clip(exact, -(2**31), 2**31 - 1))


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_division(kind: str) -> None:
    a, b = pairs(kind)
    keep = b != 0
    a, b = a[keep], b[keep]
    columns = {"a": (kind, a), "b": (kind, b)}
    got = apply(f"div.{kind} {{o}}, {{a}}, {{b}};", kind, **columns)
    np.testing.assert_array_equal(got, expect(truncated, kind, a, b))
    got = apply(f"rem.{kind} {{o}}, {{a}}, {{b}};", kind, **columns)
    np.testing.assert_array_equal(got, expect(lambda x, y: x - truncated(x, y) * y, kind, a, b))


@pytest.mark.parametrize(("kind", "bits"), [("u32", 32), ("u64", 64)])
def test_carries_make_a_double_word(kind: str, bits: int) -> None:
    a, b, c = pairs(kind, 3)
    mask = (1 << bits) - 1
    columns = {"a": (kind, a), "b": (kind, b), "c": (kind, c)}
    text = f"add.cc.{kind} {{o}}, {{a}}, {{b}}; addc.{kind} {{o1}}, {{c}}, {{b}};"
    low, high = apply(text, (kind, kind), **columns)
    text = f"sub.cc.{kind} {{o}}, {{a}}, {{b}}; subc.{kind} {{o1}}, {{c}}, {{b}};"
    under, over = apply(text, (kind, kind), **columns)
    text = (
        f"mad.lo.cc.{kind} {{o}}, {{a}}, {{b}}, {{c}}; madc.hi.{kind} {{o1}}, {{a}}, {{b}}, {{c}};"
    )
    bottom, top = apply(text, (kind, kind), **columns)
    for i, (x, y, z) in enumerate(zip(a.tolist(), b.tolist(), c.tolist(), strict=True)):
        total = x + (z << bits) + y + (y << bits)
        assert (int(low[i]), int(high[i])) == (total & mask, total >> bits & mask)
        total = x + (z << bits) - y - (y << bits)
        assert (int(under[i]), int(over[i])) == (total & mask, total >> bits & mask)
        total = x * y + z + (z << bits)
        assert (int(bottom[i]), int(top[i])) == (total & mask, total >> bits & mask)


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_shifts_clamp_their_count(kind: str) -> None:
    bits = 8 * DTYPE[kind].itemsize
    values, counts = edges(kind), np.array([0, 1, 5, 15, 16, 31, 32, 33, 63, 64, 200, 2**31])
    a, n = grid(values, counts)
    columns = {"a": (kind, a), "n": ("u32", n)}
    got = apply(f"shr.{kind} {{o}}, {{a}}, {{n}};", kind, **columns)
    np.testing.assert_array_equal(got, expect(lambda x, y: x >> min(y, 128), kind, a, n))
    got = apply(f"shl.b{bits} {{o}}, {{a}}, {{n}};", kind, **columns)
    np.testing.assert_array_equal(got, expect(lambda x, y: x << min(y, 128), kind, a, n))


@pytest.mark.parametrize("side", ["l", "r"])
@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shift(side: str, mode: str) -> None:
    a, b = pairs("u32")
    n = np.resize([0, 1, 7, 31, 32, 33, 100], len(a))

    def one(low: int, high: int, count: int) -> int:
        count = count % 32 if mode == "wrap" else min(count, 32)
        both = high << 32 | low
        return (both << count) >> 32 if side == "l" else both >> count

    text = f"shf.{side}.{mode}.b32 {{o}}, {{a}}, {{b}}, {{n}};"
    got = apply(text, "u32", a=("u32", a), b=("u32", b), n=("u32", n))
    np.testing.assert_array_equal(got, expect(one, "u32", a, b, n))


@pytest.mark.parametrize("kind", ["u16", "u32", "u64"])
def test_logic(kind: str) -> None:
    a, b = pairs(kind)
    bits = 8 * DTYPE[kind].itemsize
    for op, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        got = apply(f"{op}.b{bits} {{o}}, {{a}}, {{b}};", kind, a=(kind, a), b=(kind, b))
        np.testing.assert_array_equal(got, function(a, b))
    np.testing.assert_array_equal(apply(f"not.b{bits} {{o}}, {{a}};", kind, a=(kind, a)), ~a)
    got = apply(f"cnot.b{bits} {{o}}, {{a}};", kind, a=(kind, a))
    np.testing.assert_array_equal(got, (a == 0).astype(a.dtype))


def test_logic_of_predicates() -> None:
    a, b = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    columns = {"a": ("pred", a), "b": ("pred", b)}
    for op, want in (("and", a & b), ("or", a | b), ("xor", a ^ b)):
        got = apply(f"{op}.pred {{o}}, {{a}}, {{b}};", "pred", **columns)
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(apply("not.pred {o}, {a};", "pred", **columns), a == 0)
    np.testing.assert_array_equal(apply("mov.pred {o}, {b};", "pred", **columns), b == 1)


@pytest.mark.parametrize("table", [0x80, 0xFE, 0x96, 0xE8, 0xCA, 0x01, 0x3D])
def test_lop3(table: int) -> None:
    a, b, c = pairs("u32", 3)
    text = f"lop3.b32 {{o}}, {{a}}, {{b}}, {{c}}, {table:#x};"
    got = apply(text, "u32", a=("u32", a), b=("u32", b), c=("u32", c))
    # The table is the function's value on these three columns of bits, by its definition.
    for bit in range(32):
        x, y, z = ((v >> np.uint32(bit) & np.uint32(1)).astype(int) for v in (a, b, c))
        np.testing.assert_array_equal(got >> np.uint32(bit) & 1, table >> (4 * x + 2 * y + z) & 1)


@pytest.mark.parametrize("kind", ["s32", "s64"])
def test_neg_and_abs(kind: str) -> None:
    a = edges(kind)
    np.testing.assert_array_equal(
        apply(f"neg.{kind} {{o}}, {{a}};", kind, a=(kind, a)), expect(lambda x: -x, kind, a)
    )
    np.testing.assert_array_equal(
        apply(f"abs.{kind} {{o}}, {{a}};", kind, a=(kind, a)), expect(abs, kind, a)
    )


@pytest.mark.parametrize("kind", ["u32", "u64"])
def test_bits(kind: str) -> None:
    a = edges(kind)
    bits = 8 * DTYPE[kind].itemsize
    want = [x.bit_count() for x in a.tolist()]
    np.testing.assert_array_equal(apply(f"popc.b{bits} {{o}}, {{a}};", "u32", a=(kind, a)), want)
    want = [bits - x.bit_length() for x in a.tolist()]
    np.testing.assert_array_equal(apply(f"clz.b{bits} {{o}}, {{a}};", "u32", a=(kind, a)), want)
    want = [int(f"{x:0{bits}b}"[::-1], 2) for x in a.tolist()]
    np.testing.assert_array_equal(apply(f"brev.b{bits} {{o}}, {{a}};", kind, a=(kind, a)), want)
    got = apply(f"bfind.{kind} {{o}}, {{a}};", "s32", a=(kind, a))
    np.testing.assert_array_equal(got, [x.bit_length() - 1 for x in a.tolist()])
    got = apply(f"bfind.shiftamt.{kind} {{o}}, {{a}};", "s32", a=(kind, a))
    want = [bits - x.bit_length() if x else -1 for x in a.tolist()]
    np.testing.assert_array_equal(got, want)
    signed = "s" + kind[1:]
    values = edges(signed)
    got = apply(f"bfind.{signed} {{o}}, {{a}};", "s32", a=(signed, values))
    np.testing.assert_array_equal(
        got, [(~x if x < 0 else x).bit_length() - 1 for x in values.tolist()]
    )


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(kind: str) -> None:
    bits = 8 * DTYPE[kind].itemsize
    starts = lengths = np.array([0, 1, 5, 8, 31, 32, 63, 64, 255])
    a, s, n = grid(edges(kind, 5), starts, lengths)

    def extract(value: int, start: int, length: int) -> int:
        """Bit by bit, as the ISA's pseudocode reads."""
        at = lambda i: value >> min(i, bits - 1) & 1  # noqa: E731
        sign = 0
        if kind[0] == "s" and length:
            sign = at(min(start + length - 1, bits - 1))
        result = 0
        for i in range(bits):
            inside = i < length and start + i < bits
            result |= (at(start + i) if inside else sign) << i
        return result

    text = f"bfe.{kind} {{o}}, {{a}}, {{s}}, {{n}};"
    got = apply(text, kind, a=(kind, a), s=("u32", s), n=("u32", n))
    np.testing.assert_array_equal(got, expect(extract, kind, a, s, n))

    def insert(value: int, into: int, start: int, length: int) -> int:
        for i in range(length):
            if start + i < bits:
                into = (
                    into & ~(1 << (start + i)) | (value >> i & 1) << (start + i)
                    if i < bits
                    else into
                )
        return into

    if kind[0] == "u":
        b = a[::-1].copy()
        text = f"bfi.b{bits} {{o}}, {{a}}, {{b}}, {{s}}, {{n}};"
        got = apply(text, kind, a=(kind, a), b=(kind, b), s=("u32", s), n=("u32", n))
        np.testing.assert_array_equal(got, expect(insert, kind, a, b, s, n))


@pytest.mark.parametrize("mode", ["", ".f4e", ".b4e", ".rc8", ".ecl", ".ecr", ".rc16"])
def test_prmt(mode: str) -> None:
    rng = np.random.default_rng(3)
    a, b, c = rng.integers(0, 1 << 32, (3, 200), dtype=np.uint32)
    tables = {
        ".f4e": ["3210", "4321", "5432", "6543"],
        ".b4e": ["5670", "6701", "7012", "0123"],
        ".rc8": ["0000", "1111", "2222", "3333"],
        ".ecl": ["3210", "3211", "3222", "3333"],
        ".ecr": ["0000", "1110", "2210", "3210"],
        ".rc16": ["1010", "3232", "1010", "3232"],
    }  # the ISA's table, bytes 3 to 0

    def one(x: int, y: int, control: int) -> int:
        source = x.to_bytes(4, "little") + y.to_bytes(4, "little")
        result = 0
        for i in range(4):
            s = control >> 4 * i & 15 if not mode else int(tables[mode][control & 3][3 - i])
            byte = source[s & 7]
            result |= (255 * (byte >> 7) if s & 8 else byte) << 8 * i
        return result

    text = f"prmt.b32{mode} {{o}}, {{a}}, {{b}}, {{c}};"
    got = apply(text, "u32", a=("u32", a), b=("u32", b), c=("u32", c))
    np.testing.assert_array_equal(got, expect(one, "u32", a, b, c))


@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_sad(kind: str) -> None:
    a, b, c = pairs(kind, 3)
    text = f"sad.{kind} {{o}}, {{a}}, {{b}}, {{c}};"
    got = apply(text, kind, a=(kind, a), b=(kind, b), c=(kind, c))
    np.testing.assert_array_equal(got, expect(lambda x, y, z: z + abs(x - y), kind, a, b, c))


@pytest.mark.parametrize("first", ["s32", "u32"])
@pytest.mark.parametrize("second", ["s32", "u32"])
def test_dot_products(first: str, second: str) -> None:
    rng = np.random.default_rng(4)
    a, b, c = rng.integers(0, 1 << 32, (3, 100), dtype=np.uint32)
    x = a.view(np.int8 if first[0] == "s" else np.uint8).reshape(-1, 4).astype(int)
    y = b.view(np.int8 if second[0] == "s" else np.uint8).reshape(-1, 4).astype(int)
    columns = {"a": ("u32", a), "b": ("u32", b), "c": ("u32", c)}
    got = apply(f"dp4a.{first}.{second} {{o}}, {{a}}, {{b}}, {{c}};", "u32", **columns)
    np.testing.assert_array_equal(got, ((x * y).sum(axis=1) + c) % 2**32)
    x = a.view(np.int16 if first[0] == "s" else np.uint16).reshape(-1, 2).astype(int)
    for part, columns_of_b in (("lo", y[:, :2]), ("hi", y[:, 2:])):
        got = apply(f"dp2a.{part}.{first}.{second} {{o}}, {{a}}, {{b}}, {{c}};", "u32", **columns)
        np.testing.assert_array_equal(got, ((x * columns_of_b).sum(axis=1) + c) % 2**32)


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u16"])
def test_setp(kind: str) -> None:
    a, b = pairs(kind)
    names = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    if kind[0] == "u":
        names |= {"lo": a < b, "ls": a <= b, "hi": a > b, "hs": a >= b}
    for name, want in names.items():
        got = apply(f"setp.{name}.{kind} {{o}}, {{a}}, {{b}};", "pred", a=(kind, a), b=(kind, b))
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("join", ["and", "or", "xor"])
def test_setp_joins_and_gives_the_complement(join: str) -> None:
    a, b = pairs("s32")
    c = np.arange(len(a)) % 2
    function = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[join]
    text = f"setp.lt.{join}.s32 {{o}}|{{o1}}, {{a}}, {{b}}, {{c}};"
    first, second = apply(text, ("pred", "pred"), a=("s32", a), b=("s32", b), c=("pred", c))
    np.testing.assert_array_equal(first, function(a < b, c != 0))
    np.testing.assert_array_equal(second, function(~(a < b), c != 0))
    text = f"setp.lt.{join}.s32 {{o}}, {{a}}, {{b}}, !{{c}};"
    got = apply(text, "pred", a=("s32", a), b=("s32", b), c=("pred", c))
    np.testing.assert_array_equal(got, function(a < b, c == 0))


def test_set_selp_slct() -> None:
    a, b = pairs("s32")
    columns = {"a": ("s32", a), "b": ("s32", b)}
    got = apply("set.lt.u32.s32 {o}, {a}, {b};", "u32", **columns)
    np.testing.assert_array_equal(got, np.where(a < b, 0xFFFFFFFF, 0))
    got = apply("set.lt.f32.s32 {o}, {a}, {b};", "f32", **columns)
    np.testing.assert_array_equal(got, np.where(a < b, 1.0, 0.0))
    p = np.arange(len(a)) % 3 == 0
    got = apply("selp.b32 {o}, {a}, {b}, {p};", "s32", p=("pred", p), **columns)
    np.testing.assert_array_equal(got, np.where(p, a, b))
    got = apply("slct.b32.s32 {o}, {a}, {b}, {a};", "s32", **columns)
    np.testing.assert_array_equal(got, np.where(a >= 0, a, b))


def test_mov_packs_and_unpacks() -> None:
    a, b = (x.astype(np.uint32) for x in pairs("u32"))
    got = apply("mov.b64 {o}, {{a}, {b}};", "u64", a=("u32", a), b=("u32", b))
    np.testing.assert_array_equal(got, a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32))
    low, high = apply("mov.b64 {{o}, {o1}}, {a};", ("u32", "u32"), a=("u64", got))
    np.testing.assert_array_equal(low, a)
    np.testing.assert_array_equal(high, b)
    low, high = apply("mov.b32 {{o}, {o1}}, {a};", ("u16", "u16"), a=("u32", a))
    np.testing.assert_array_equal(low, a & 0xFFFF)
    np.testing.assert_array_equal(high, a >> 16)
    got = apply("mov.b32 {o}, {{a}, {b}};", "u32", a=("u16", low), b=("u16", high))
    np.testing.assert_array_equal(got, a)


def test_special_registers() -> None:
    zeros = np.zeros(100)
    x, lane, warp, n = apply(
        "mov.u32 {o}, %tid.x; mov.u32 {o1}, %laneid; mov.u32 {o2}, %warpid; mov.u32 {o3}, %ntid.x;",
        ("u32",) * 4,
        a=("u32", zeros),
    )
    np.testing.assert_array_equal(x, np.arange(100))
    np.testing.assert_array_equal(lane, np.arange(100) % 32)
    np.testing.assert_array_equal(warp, np.arange(100) // 32)
    assert (n == 128).all()


def test_what_is_unknown_raises_with_its_line() -> None:
    a = np.zeros(4)
    for text in ("frob.b32 {o}, {a};", "add.frob.s32 {o}, {a}, {a};", "add.s32 {o}, {a}, %nix;"):
        with pytest.raises(PtxError, match=r"PTX line \d+"):
            apply(text, "u32", a=("u32", a))
