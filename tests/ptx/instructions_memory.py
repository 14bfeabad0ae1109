# SPDX-License-Identifier: Apache-2.0
"""Loads, stores, atomics and prefetch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .decode import Code, Mods, opcode
from .instructions_float import round16, unpack16
from .lanes import Step
from .parser import Address, Symbol
from .words import DTYPE, UNSIGNED, Array

STRONG = ("volatile", "relaxed", "acquire", "release", "acq_rel", "mmio")
HINTS = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "weak", "cta", "gpu", "sys", "cluster")


def access(code: Code, mods: Mods) -> tuple[str, bool, int, str]:
    """(space, strong, words, type) of a load or a store; cache hints are dropped."""
    strong = mods.take(*STRONG) is not None
    space = mods.take(
        "global", "shared", "shared__cta", "local", "const", "param", "param__entry", "param__func"
    )
    space = {"shared__cta": "shared", "const": "global", None: "generic"}.get(space, space)
    if space and space.startswith("param"):
        base = code.ins.args[0 if code.ins.op == "st" else 1]
        name = base.base.name if isinstance(base, Address) and isinstance(base.base, Symbol) else ""
        space = "local" if name in code.local_names else "global"
    mods.drop(*HINTS)
    mods.drop_prefix("L1__", "L2__")
    vector = mods.take("v2", "v4", "v8")
    return space or "generic", strong, int(vector[1]) if vector else 1, mods.type()


def marker(code: Code) -> Callable[[], None]:
    """Tells the checks and the counters which line is running."""
    findings, traffic = code.machine.findings, code.machine.memories.traffic
    line, text = code.ins.line, code.ins.text

    def mark() -> None:
        findings.line, findings.text, traffic.line = line, text, line

    return mark


@opcode("ld", "ldu")
def load(code: Code, mods: Mods) -> Step:
    space, strong, count, kind = access(code, mods)
    targets = code.vector(code.ins.args[0])
    dtype = DTYPE[kind]
    width = dtype.itemsize
    puts = [code.put(t, kind) for t in targets]
    constant = code.parameter(code.ins.args[1], width * count)
    if constant is not None:  # known since the launch
        values = np.frombuffer(constant, dtype)

        def from_parameters() -> None:
            for put, value in zip(puts, values, strict=True):
                put(value)

        return from_parameters
    if len(targets) != count:
        raise code.ins.error("as many registers as words are wanted")
    address, machine, mark = code.address(code.ins.args[1]), code.machine, marker(code)
    memories = machine.memories

    def step() -> None:
        mark()
        words = memories.load(space, machine.lanes(), address(), width, count, strong=strong)
        for i, put in enumerate(puts):
            put(words[:, i].view(dtype))

    return step


@opcode("st")
def store(code: Code, mods: Mods) -> Step:
    space, strong, count, kind = access(code, mods)
    sources = code.vector(code.ins.args[1])
    if len(sources) != count:
        raise code.ins.error("as many registers as words are wanted")
    unsigned = UNSIGNED[DTYPE[kind].itemsize]
    gets = [code.get(s, kind) for s in sources]
    address, machine, mark = code.address(code.ins.args[0]), code.machine, marker(code)
    memories, width = machine.memories, unsigned.itemsize

    def step() -> None:
        mark()
        lanes = machine.lanes()
        values = np.empty((len(lanes), count), unsigned)
        for i, read in enumerate(gets):
            values[:, i] = np.asarray(read()).view(unsigned)
        memories.store(space, lanes, address(), values, width, strong=strong)

    return step


def _inc(old: Any, limit: Any) -> Any:
    return np.where(old >= limit, old.dtype.type(0), old + old.dtype.type(1))


def _dec(old: Any, limit: Any) -> Any:
    return np.where((old == 0) | (old > limit), limit, old - old.dtype.type(1))


_ATOMIC: dict[str, Callable[..., Any]] = {
    "add": lambda old, b: old + b,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, b: b,
    "inc": _inc,
    "dec": _dec,
    "cas": lambda old, b, c: np.where(old == b, c, old),
}


@opcode("atom", "red")
def atomic(code: Code, mods: Mods) -> Step:
    """Lanes that share an address go one after the other, in lane order."""
    mods.drop(*STRONG, *HINTS, "noftz")
    mods.drop_prefix("L2__")
    space = mods.take("global", "shared", "shared__cta") or "generic"
    space = "shared" if space == "shared__cta" else space
    name = mods.take(*_ATOMIC)
    if name is None:
        raise code.ins.error("this atomic operation is not known")
    operation, kind = _ATOMIC[name], mods.type()
    packed = kind in ("f16", "bf16", "f16x2", "bf16x2")
    dtype = DTYPE[{"f16": "b16", "f16x2": "b32"}.get(kind, kind)]
    kind_bits = kind if not packed else ("b32" if kind.endswith("x2") else "b16")
    args = list(code.ins.args)
    put = code.put(args.pop(0), kind_bits) if code.ins.op == "atom" else None
    address = code.address(args.pop(0))
    gets = [code.get(a, kind_bits) for a in args[: 2 if name == "cas" else 1]]
    machine, mark = code.machine, marker(code)

    def combine(old: Array, *operands: Array) -> Array:
        if not packed:
            return np.asarray(operation(old, *operands))
        parts = [unpack16(x, kind) for x in (old, *operands)]
        halves = [
            round16(operation(*pair), kind).astype(dtype) for pair in zip(*parts, strict=True)
        ]
        return halves[0] if len(halves) == 1 else halves[0] | (halves[1] << dtype.type(16))

    def step() -> None:
        mark()
        lanes = machine.lanes()
        target, offsets, ok = machine.memories.atomic(space, lanes, address(), dtype.itemsize)
        operands = [np.broadcast_to(g(), lanes.shape) for g in gets]
        result = np.zeros(len(lanes), dtype)
        left, words = np.flatnonzero(ok), target.data.view(dtype)
        while len(left):
            _, first = np.unique(offsets[left], return_index=True)
            now = left[first]
            where = offsets[now] // dtype.itemsize
            result[now] = words[where]
            words[where] = combine(words[where], *(x[now] for x in operands))
            left = np.delete(left, first)
        if put:
            put(result)

    return step


@opcode("prefetch", "prefetchu")
def prefetch(code: Code, mods: Mods) -> Step:
    """Moves nothing here, but must name memory that exists."""
    space = mods.take("global", "local") or "global"
    mods.drop("L1", "L2")
    mods.drop_prefix("L2__")
    address, machine, mark = code.address(code.ins.args[0]), code.machine, marker(code)

    def step() -> None:
        mark()
        machine.memories.resolve(space, machine.lanes(), address(), 1, 1, False)

    return step


@opcode("createpolicy")
def create_policy(code: Code, mods: Mods) -> Step:
    """A cache hint: its value is never looked at."""
    mods.left.clear()
    put = code.put(code.ins.args[0], "b64")
    return lambda: put(np.uint64(0))


@opcode("isspacep")
def is_space(code: Code, mods: Mods) -> Step:
    wanted = mods.take("global", "shared", "shared__cta", "local", "const", "param")
    mods.drop("u64")
    wanted = "shared" if wanted == "shared__cta" else wanted
    a, put = code.get(code.ins.args[1], "u64"), code.put(code.ins.args[0], "pred")
    memories = code.machine.memories
    return lambda: put(next(w for n, w, _ in memories.generic(a()) if n == wanted))
