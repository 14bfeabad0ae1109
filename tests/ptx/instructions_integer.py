# SPDX-License-Identifier: Apache-2.0
"""Integer arithmetic, bits, comparisons, selection and moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .decode import Code, Mods, opcode
from .lanes import Step
from .parser import Imm, Vector
from .words import DTYPE, UNSIGNED, Array

Binary = Callable[[Any, Any], Any]


def wide_product(a: Any, b: Any, kind: str) -> tuple[Any, Any]:
    """(low, high) halves of the exact product, as the type's unsigned words."""
    width = DTYPE[kind].itemsize
    unsigned = UNSIGNED[width].type
    if width <= 4:
        both = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{2 * width}").type
        product = (np.asarray(a).astype(both) * np.asarray(b).astype(both)).view(f"u{2 * width}")
        return product.astype(unsigned), (product >> both(8 * width).view(f"u{2 * width}")).astype(
            unsigned
        )
    ua, ub = np.asarray(a).view(np.uint64), np.asarray(b).view(np.uint64)
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    a0, a1, b0, b1 = ua & low, ua >> half, ub & low, ub >> half
    middle = a1 * b0 + ((a0 * b0) >> half)
    other = a0 * b1 + (middle & low)
    high = a1 * b1 + (middle >> half) + (other >> half)
    if kind[0] == "s":  # the sign bit weighs -2^63 instead of 2^63
        sign = np.uint64(63)
        high = high - np.where(ua >> sign, ub, 0) - np.where(ub >> sign, ua, 0)
    return ua * ub, high


def saturate(exact: Array, kind: str) -> Array:
    """int64 values clamped into a type of at most 32 bits."""
    info = np.iinfo(DTYPE[kind])
    return np.clip(exact, info.min, info.max).astype(DTYPE[kind])


@opcode("add", "sub")
def add_sub(code: Code, mods: Mods) -> Step:
    kind, saturated, carry = mods.type(), mods.has("sat"), mods.has("cc")
    op: Binary = np.add if code.ins.op == "add" else np.subtract
    a, b = (code.get(x, kind) for x in code.ins.args[1:3])
    put = code.put(code.ins.args[0], kind)
    if carry:
        return _carry_step(code, kind, use=False)
    if saturated:
        return lambda: put(saturate(np.asarray(op(np.int64(a()), np.int64(b()))), kind))
    return lambda: put(op(a(), b()))


@opcode("addc", "subc")
def add_with_carry(code: Code, mods: Mods) -> Step:
    kind = mods.type()
    mods.drop("cc")
    return _carry_step(code, kind, use=True)


def _carry_row(code: Code) -> Array:
    """The condition code CC.CF: carry of an addition, borrow of a subtraction."""
    return code.rows.setdefault("%cc", np.zeros(code.machine.size, bool))


def _carry_step(code: Code, kind: str, use: bool) -> Step:
    machine, flag = code.machine, _carry_row(code)
    subtract = code.ins.op.startswith("sub")
    unsigned = "u" + kind[1:]
    word = DTYPE[unsigned].type
    a, b = (code.get(x, unsigned) for x in code.ins.args[1:3])
    put = code.put(code.ins.args[0], unsigned)
    keep = "cc" in code.ins.mods

    def step() -> None:
        x, y, extra = a(), b(), word(0)
        if use:
            extra = flag[machine.sel].astype(word)
        if subtract:
            total = x - y - extra
            out = (x < y) | ((x == y) & (extra != 0))
        else:
            total = x + y + extra
            out = (total < x) | ((total == x) & (extra != 0) & (y != 0))
        put(total)
        if keep:
            flag[machine.sel] = out

    return step


@opcode("mul", "mad", "mul24", "mad24", "madc")
def multiply(code: Code, mods: Mods) -> Step:
    kind, part = mods.type(), mods.take("lo", "hi", "wide")
    op = code.ins.op
    if op.endswith("24"):
        part = "lo"
    if op == "madc" or "cc" in mods.left:
        mods.drop("cc")
        return _mad_carry(code, kind, part or "lo")
    saturated = mods.has("sat")
    result = kind
    if part == "wide":
        result = f"{kind[0]}{2 * int(kind[1:])}"
    a, b = (code.get(x, kind) for x in code.ins.args[1:3])
    put = code.put(code.ins.args[0], result)
    if part == "wide":
        wide = DTYPE[result].type
        product: Binary = lambda x, y: wide(x) * wide(y)  # noqa: E731
    elif part == "hi":
        product = lambda x, y: wide_product(x, y, kind)[1].view(DTYPE[kind])  # noqa: E731
    else:
        product = np.multiply
    if not op.startswith("mad"):
        return lambda: put(product(a(), b()))
    c = code.get(code.ins.args[3], result)
    if saturated:
        return lambda: put(saturate(np.asarray(np.int64(product(a(), b())) + np.int64(c())), kind))
    return lambda: put(product(a(), b()) + c())


def _mad_carry(code: Code, kind: str, part: str) -> Step:
    machine, flag = code.machine, _carry_row(code)
    use, keep = code.ins.op == "madc", "cc" in code.ins.mods
    unsigned = "u" + kind[1:]
    word = DTYPE[unsigned].type
    a, b = (code.get(x, kind) for x in code.ins.args[1:3])
    c, put = code.get(code.ins.args[3], unsigned), code.put(code.ins.args[0], unsigned)

    def step() -> None:
        x = wide_product(a(), b(), kind)[part == "hi"]
        y = c()
        extra = flag[machine.sel].astype(word) if use else word(0)
        total = x + y + extra
        out = (total < x) | ((total == x) & (extra != 0) & (y != 0))
        put(total)
        if keep:
            flag[machine.sel] = out

    return step


def divide(a: Any, b: Any, kind: str) -> tuple[Any, Any]:
    """(quotient, remainder) truncated towards zero; a zero divisor gives all ones and a."""
    zero = np.asarray(b) == 0
    safe = np.where(zero, 1, b).astype(DTYPE[kind])
    if kind[0] != "s":
        quotient, rest = a // safe, a % safe
    else:
        unsigned = UNSIGNED[DTYPE[kind].itemsize]
        ua, ub = np.abs(a).view(unsigned), np.abs(safe).view(unsigned)
        quotient, rest = (ua // ub).view(DTYPE[kind]), (ua % ub).view(DTYPE[kind])
        quotient = np.where((a < 0) != (safe < 0), -quotient, quotient)
        rest = np.where(np.asarray(a) < 0, -rest, rest)
    ones = DTYPE[kind].type(-1) if kind[0] == "s" else ~DTYPE[kind].type(0)
    return np.where(zero, ones, quotient), np.where(zero, a, rest)


@opcode("div", "rem")
def div_rem(code: Code, mods: Mods) -> Step:
    kind, which = mods.type(), int(code.ins.op == "rem")
    a, b = (code.get(x, kind) for x in code.ins.args[1:3])
    put = code.put(code.ins.args[0], kind)
    return lambda: put(divide(np.atleast_1d(a()), np.atleast_1d(b()), kind)[which])


def shift_left(a: Any, n: Any) -> Any:
    width = 8 * a.dtype.itemsize
    moved = a << np.minimum(n, width - 1).astype(a.dtype)
    return np.where(n >= width, a.dtype.type(0), moved)


def shift_right(a: Any, n: Any) -> Any:
    """Arithmetic for signed types, logical otherwise; counts beyond the width are clamped."""
    width = 8 * a.dtype.itemsize
    moved = a >> np.minimum(n, width - 1).astype(a.dtype)
    return moved if a.dtype.kind == "i" else np.where(n >= width, a.dtype.type(0), moved)


@opcode("shl", "shr")
def shift(code: Code, mods: Mods) -> Step:
    kind = mods.type()
    op: Binary = shift_left if code.ins.op == "shl" else shift_right
    a, n = code.get(code.ins.args[1], kind), code.get(code.ins.args[2], "u32")
    put = code.put(code.ins.args[0], kind)
    return lambda: put(op(np.asarray(a()), np.asarray(n())))


@opcode("shf")
def funnel_shift(code: Code, mods: Mods) -> Step:
    left, wrap = mods.take("l", "r") == "l", mods.take("wrap", "clamp") == "wrap"
    kind = mods.type()
    low, high, n = (code.get(x, "u32") for x in code.ins.args[1:4])
    put = code.put(code.ins.args[0], kind)

    def step() -> None:
        both = np.uint64(low()) | (np.uint64(high()) << np.uint64(32))
        count = (
            np.uint64(n()) & np.uint64(31) if wrap else np.minimum(np.uint64(n()), np.uint64(32))
        )
        if left:
            put(((both << count) >> np.uint64(32)).astype(np.uint32))
        else:
            put((both >> count).astype(np.uint32))

    return step


_LOGIC: dict[str, Binary] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@opcode("and", "or", "xor")
def logic(code: Code, mods: Mods) -> Step:
    kind, op = mods.type(), _LOGIC[code.ins.op]
    a, b = (code.get(x, kind) for x in code.ins.args[1:3])
    put = code.put(code.ins.args[0], kind)
    return lambda: put(op(a(), b()))


@opcode("lop3")
def lop3(code: Code, mods: Mods) -> Step:
    """Any function of three bits; the table is indexed by 4a + 2b + c."""
    kind = mods.type()
    table = code.ins.args[4]
    if not isinstance(table, Imm):
        raise code.ins.error("the table of lop3 must be a literal")
    chosen = [i for i in range(8) if table.value >> i & 1]
    a, b, c = (code.get(x, kind) for x in code.ins.args[1:4])
    put = code.put(code.ins.args[0], kind)

    def step() -> None:
        x, y, z = a(), b(), c()
        result = np.zeros_like(x | y | z)
        for i in chosen:
            result = result | ((x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z))
        put(result)

    return step


def reverse_bits(a: Any) -> Any:
    width = 8 * a.dtype.itemsize
    unit = a.dtype.type
    step = width // 2
    mask = ~unit(0)
    while step:
        mask = mask ^ (mask << unit(step))
        a = ((a >> unit(step)) & mask) | ((a << unit(step)) & ~mask)
        step //= 2
    return a


def leading_zeros(a: Any) -> Any:
    width = 8 * a.dtype.itemsize
    step = 1
    while step < width:
        a = a | (a >> a.dtype.type(step))
        step *= 2
    return np.uint32(width) - np.bitwise_count(a).astype(np.uint32)


def negate(a: Any) -> Any:
    return a.dtype.type(0) - a


_UNARY: dict[str, Callable[[Any], Any]] = {
    "not": np.invert,
    "cnot": lambda a: (a == 0).astype(a.dtype),
    "neg": negate,
    "abs": np.abs,
    "brev": reverse_bits,
    "popc": lambda a: np.bitwise_count(a).astype(np.uint32),
    "clz": leading_zeros,
}


@opcode(*_UNARY)
def unary(code: Code, mods: Mods) -> Step:
    kind, op = mods.type(), _UNARY[code.ins.op]
    result = "u32" if code.ins.op in ("popc", "clz") else kind
    a, put = code.get(code.ins.args[1], kind), code.put(code.ins.args[0], result)
    return lambda: put(op(a()))


@opcode("bfind")
def bfind(code: Code, mods: Mods) -> Step:
    """The position of the highest bit that differs from the sign; -1 if there is none."""
    amount, kind = mods.has("shiftamt"), mods.type()
    a, put = code.get(code.ins.args[1], kind), code.put(code.ins.args[0], "u32")
    unsigned, width = UNSIGNED[DTYPE[kind].itemsize], 8 * DTYPE[kind].itemsize

    def step() -> None:
        x = a()
        x = np.where(x < 0, ~x, x).view(unsigned)
        zeros = leading_zeros(x)
        position = zeros if amount else np.uint32(width - 1) - zeros
        put(np.where(x == 0, np.uint32(0xFFFFFFFF), position))

    return step


@opcode("bfe")
def bit_field_extract(code: Code, mods: Mods) -> Step:
    kind = mods.type()
    width = 8 * DTYPE[kind].itemsize
    a = code.get(code.ins.args[1], kind)
    start, length = (code.get(x, "u32") for x in code.ins.args[2:4])
    put = code.put(code.ins.args[0], kind)

    def step() -> None:
        x = np.asarray(a())
        s, n = np.int64(start()) & 0xFF, np.int64(length()) & 0xFF
        top = np.minimum(s + n, width)  # the field ends with the word
        keep = np.maximum(top - s, 0)
        shifted = shift_left(x.view(UNSIGNED[width // 8]), width - top).view(x.dtype)
        field = shift_right(shifted, width - keep)
        if x.dtype.kind == "i":  # a field beyond the word is all sign
            field = np.where(s >= width, x >> x.dtype.type(width - 1), field)
        put(np.where((n == 0) | ((keep == 0) & (x.dtype.kind == "u")), x.dtype.type(0), field))

    return step


@opcode("bfi")
def bit_field_insert(code: Code, mods: Mods) -> Step:
    kind = mods.type()
    word, width = DTYPE[kind].type, 8 * DTYPE[kind].itemsize
    a, b = (code.get(x, kind) for x in code.ins.args[1:3])
    start, length = (code.get(x, "u32") for x in code.ins.args[3:5])
    put = code.put(code.ins.args[0], kind)

    def step() -> None:
        s, n = np.int64(start()) & 0xFF, np.int64(length()) & 0xFF
        ones = shift_left(np.asarray(word(1)), n) - word(1)
        mask = shift_left(ones, s)
        put((b() & ~mask) | (shift_left(np.asarray(a()), np.asarray(s)) & mask))

    def checked() -> None:
        assert width in (32, 64)
        step()

    return checked


@opcode("prmt")
def permute_bytes(code: Code, mods: Mods) -> Step:
    """Four bytes picked from the eight of {b, a}; bit 3 of a selector repeats the byte's sign."""
    mods.drop("b32")
    mode = mods.take("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")
    a, b, c = (code.get(x, "u32") for x in code.ins.args[1:4])
    put = code.put(code.ins.args[0], "u32")

    def selectors(control: Any) -> list[Any]:
        n = control & np.uint32(3)
        if mode is None:
            return [(control >> np.uint32(4 * i)) & np.uint32(15) for i in range(4)]
        if mode == "f4e":
            return [n + np.uint32(i) for i in range(4)]
        if mode == "b4e":
            return [(n - np.uint32(i)) & np.uint32(7) for i in range(4)]
        if mode == "rc8":
            return [n] * 4
        if mode == "ecl":
            return [np.maximum(n, np.uint32(i)) for i in range(4)]
        if mode == "ecr":
            return [np.minimum(n, np.uint32(i)) for i in range(4)]
        base = (n & np.uint32(1)) * np.uint32(2)
        return [base, base + np.uint32(1)] * 2

    def step() -> None:
        both: Any = np.uint64(a()) | (np.uint64(b()) << np.uint64(32))
        result: Any = np.uint32(0)
        for i, s in enumerate(selectors(c())):
            byte = (both >> (np.uint64(s & np.uint32(7)) * np.uint64(8))) & np.uint64(0xFF)
            sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
            byte = np.where((s & np.uint32(8)) != 0, sign, byte)
            result = result | (byte.astype(np.uint32) << np.uint32(8 * i))
        put(result)

    return step


@opcode("sad")
def absolute_difference(code: Code, mods: Mods) -> Step:
    kind = mods.type()
    a, b, c = (code.get(x, kind) for x in code.ins.args[1:4])
    put = code.put(code.ins.args[0], kind)

    def step() -> None:
        x, y = a(), b()
        put(c() + np.where(x < y, y - x, x - y))

    return step


@opcode("dp4a", "dp2a")
def dot_product(code: Code, mods: Mods) -> Step:
    """Four products of bytes, or two of 16 bits by a byte, added to c."""
    high = mods.take("lo", "hi") == "hi"
    first, second = mods.type(), mods.type()
    signed = "s" in (first[0], second[0])
    a, b = (code.get(x, "u32") for x in code.ins.args[1:3])
    result = "s32" if signed else "u32"
    c, put = code.get(code.ins.args[3], result), code.put(code.ins.args[0], result)
    four = code.ins.op == "dp4a"

    def piece(word: Any, kind: str, i: int, bits: int) -> Any:
        part = (word >> np.uint32(bits * i)) & np.uint32((1 << bits) - 1)
        value = part.astype(np.int64)
        return value - ((value >> (bits - 1)) << bits) if kind[0] == "s" else value

    def step() -> None:
        x, y, total = a(), b(), np.int64(c())
        for i in range(4 if four else 2):
            left = piece(x, first, i, 8 if four else 16)
            total = total + left * piece(y, second, i + 2 * (high and not four), 8)
        put(total)

    return step


@opcode("min", "max")
def extreme(code: Code, mods: Mods) -> Step:
    kind = mods.type()
    op: Binary = np.minimum if code.ins.op == "min" else np.maximum
    relu = mods.has("relu")
    a, b = (code.get(x, kind) for x in code.ins.args[1:3])
    put = code.put(code.ins.args[0], kind)
    if relu:
        return lambda: put(np.maximum(op(a(), b()), DTYPE[kind].type(0)))
    return lambda: put(op(a(), b()))


# ---- comparison and selection ----

COMPARE: dict[str, Binary] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a != b) & ~nan(a, b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "num": lambda a, b: ~nan(a, b),
    "nan": lambda a, b: nan(a, b),
}
COMPARE.update({"lo": COMPARE["lt"], "ls": COMPARE["le"]})
COMPARE.update({"hi": COMPARE["gt"], "hs": COMPARE["ge"]})


def _unordered(opposite: Binary) -> Binary:
    """Holds for NaN too: wherever the opposite ordered comparison does not."""
    return lambda a, b: ~opposite(a, b)


for _name, _opposite in zip(
    ("eq", "ne", "lt", "le", "gt", "ge"), ("ne", "eq", "ge", "gt", "le", "lt"), strict=True
):
    COMPARE[_name + "u"] = _unordered(COMPARE[_opposite])


def nan(a: Any, b: Any) -> Any:
    """Whether either is NaN; integers never are."""
    if np.asarray(a).dtype.kind != "f":
        return np.bool_(False)
    return np.isnan(a) | np.isnan(b)


def comparison(code: Code, mods: Mods, first: int) -> tuple[Callable[[], Any], Binary | None, int]:
    """(comparison of two operands from `first` on, the boolean operator, next operand)."""
    from .instructions_float import reader  # the two modules share comparisons

    name = mods.take(*COMPARE)
    if name is None:
        raise code.ins.error("no comparison")
    joined = mods.take("and", "or", "xor")
    ftz = mods.has("ftz")
    kind = mods.type()
    a, b = (reader(code, x, kind, ftz) for x in code.ins.args[first : first + 2])
    compare = COMPARE[name]
    return lambda: compare(a(), b()), _LOGIC.get(joined or ""), first + 2


@opcode("setp")
def set_predicate(code: Code, mods: Mods) -> Step:
    compare, join, following = comparison(code, mods, 1)
    first, second = code.split_pair(code.ins.args[0])
    put = code.put(first, "pred")
    put_second = code.put(second, "pred") if second else None
    c = code.get(code.ins.args[following], "pred") if join else None

    def step() -> None:
        holds = compare()
        other = ~holds
        if join and c:
            third = c()
            holds, other = join(holds, third), join(other, third)
        put(holds)
        if put_second:
            put_second(other)

    return step if join or second else lambda: put(compare())


@opcode("set")
def set_word(code: Code, mods: Mods) -> Step:
    result = next(m for m in mods.left if m in DTYPE)
    mods.left.remove(result)
    compare, join, following = comparison(code, mods, 1)
    put = code.put(code.ins.args[0], result)
    c = code.get(code.ins.args[following], "pred") if join else None
    if result in ("u32", "s32", "b32", "u16", "s16"):
        yes = DTYPE[result].type(-1) if result[0] == "s" else ~DTYPE[result].type(0)
    else:
        yes = DTYPE[result].type(0x3F80 if result == "bf16" else 1)

    def step() -> None:
        holds = compare()
        if join and c:
            holds = join(holds, c())
        put(np.where(holds, yes, DTYPE[result].type(0)))

    return step


@opcode("selp")
def select(code: Code, mods: Mods) -> Step:
    kind = mods.type()
    a, b = (code.get(x, kind) for x in code.ins.args[1:3])
    p, put = code.get(code.ins.args[3], "pred"), code.put(code.ins.args[0], kind)
    return lambda: put(np.where(p(), a(), b()))


@opcode("slct")
def select_by_sign(code: Code, mods: Mods) -> Step:
    mods.drop("ftz")
    kind, by = mods.type(), mods.type()
    a, b = (code.get(x, kind) for x in code.ins.args[1:3])
    c, put = code.get(code.ins.args[3], by), code.put(code.ins.args[0], kind)
    return lambda: put(np.where(c() >= 0, a(), b()))


@opcode("mov")
def move(code: Code, mods: Mods) -> Step:
    """Also packs {low, .., high} into a word and takes it apart."""
    kind = mods.type()
    target, source = code.ins.args
    whole = 8 * DTYPE[kind].itemsize
    if isinstance(source, Vector):
        part = whole // len(source.items)
        parts = [code.get(x, f"b{part}") for x in source.items]
        put, word = code.put(target, f"b{whole}"), UNSIGNED[whole // 8].type

        def pack() -> None:
            result: Any = word(0)
            for i, read in enumerate(parts):
                result = result | (np.asarray(read()).astype(word) << word(part * i))
            put(result)

        return pack
    if isinstance(target, Vector):
        part = whole // len(target.items)
        read, small = code.get(source, f"b{whole}"), UNSIGNED[part // 8]
        puts = [code.put(x, f"b{part}") for x in target.items]

        def unpack() -> None:
            word = np.array(read())
            for i, put in enumerate(puts):
                put((word >> word.dtype.type(part * i)).astype(small))

        return unpack
    a, put = code.get(source, kind), code.put(target, kind)
    return lambda: put(a())
