# SPDX-License-Identifier: Apache-2.0
"""Instructions into closures. Each opcode has one decoder, registered by name; a decoder looks at
types and modifiers once and gives a step that only touches register rows.

Modifiers are consumed: what a decoder does not ask for is unknown, and unknown raises.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from .lanes import Block, Machine, Step, guard_step, leaders
from .parser import (
    Address,
    Imm,
    Instruction,
    Operand,
    Pair,
    PtxError,
    Reg,
    Special,
    Symbol,
    Vector,
)
from .words import DTYPE, UNSIGNED, Array

Getter = Callable[[], Any]
Setter = Callable[[Any], None]
Decoder = Callable[["Code", "Mods"], Step]
DECODERS: dict[str, Decoder] = {}
# Warp instructions that name their partners in the last operand, and those of whole warps.
NAMED_GATES = ("shfl", "vote", "match", "redux", "elect")
ALIGNED_GATES = ("mma", "ldmatrix", "stmatrix", "movmatrix")
FULL_MASK = 0xFFFFFFFF
FLOATING = frozenset(("f16", "f16x2", "bf16", "bf16x2", "f32", "f64"))


def opcode(*names: str) -> Callable[[Decoder], Decoder]:
    """Registers a decoder."""

    def register(decoder: Decoder) -> Decoder:
        for name in names:
            DECODERS[name] = decoder
        return decoder

    return register


class Mods:
    """The modifiers of one instruction; every one must be taken."""

    def __init__(self, instruction: Instruction) -> None:
        self.ins = instruction
        self.left = list(instruction.mods)

    def take(self, *names: str) -> str | None:
        """The first of `names` that is present, removed; None if there is none."""
        for name in names:
            if name in self.left:
                self.left.remove(name)
                return name
        return None

    def has(self, name: str) -> bool:
        return self.take(name) is not None

    def drop(self, *names: str) -> None:
        """Modifiers that change nothing here."""
        self.left = [m for m in self.left if m not in names]

    def drop_prefix(self, *prefixes: str) -> None:
        self.left = [m for m in self.left if not m.startswith(prefixes)]

    def type(self) -> str:
        """The next type, in the order written."""
        for name in self.left:
            if name in DTYPE:
                self.left.remove(name)
                return name
        raise self.ins.error("no type")

    def finish(self) -> None:
        if self.left:
            raise self.ins.error(f"modifier .{self.left[0]} is not known here")


class Code:
    """Decodes one function for one machine."""

    def __init__(
        self,
        machine: Machine,
        symbols: dict[str, int],
        parameters: dict[str, bytes],
        local_names: set[str],
    ) -> None:
        self.machine = machine
        self.symbols = symbols  # addresses, each in its own space
        self.parameters = parameters
        self.local_names = local_names  # .local variables, and the .param variables of calls
        self.rows: dict[str, Array] = {}
        self.ins: Instruction
        self.pc = 0
        self.files: list[Array] = []  # all rows of a type lie together: thousands of registers
        by_type: dict[np.dtype[Any], list[str]] = {}
        for name, kind in machine.function.registers.items():
            by_type.setdefault(_row_dtype(kind), []).append(name)
        for dtype, names in by_type.items():
            self.files.append(np.zeros((len(names), machine.size), dtype))
            self.rows.update(zip(names, self.files[-1], strict=True))
        self.labels = machine.function.labels

    def poison(self) -> None:
        """What a register holds before it is written: NaN in every float type, and no zero."""
        for rows in self.files:
            if rows.dtype.kind == "b":
                rows[:, ::2], rows[:, 1::2] = True, False
            else:
                rows.view(np.uint16)[:] = 0xFFF1

    # ---- operands ----

    def row(self, operand: Operand) -> Array:
        if isinstance(operand, Reg):
            if operand.name not in self.rows:
                raise self.ins.error(f"register {operand.name} is not declared")
            return self.rows[operand.name]
        if isinstance(operand, Special):
            if operand.name not in self.machine.special:
                raise self.ins.error(f"special register %{operand.name} is not known")
            return self.machine.special[operand.name]
        raise self.ins.error(f"a register is wanted, not {operand}")

    def view(self, operand: Operand, dtype: np.dtype[Any]) -> Array:
        """The row seen as `dtype`: of a wider register, its low bytes."""
        row = self.row(operand)
        if dtype.kind == "b" or row.dtype.kind == "b":
            return row
        if row.dtype.itemsize >= dtype.itemsize:
            return row.view(dtype)[:: row.dtype.itemsize // dtype.itemsize]
        raise self.ins.error(f"register {operand} is narrower than {dtype}")

    def constant(self, operand: Imm | Symbol, dtype: np.dtype[Any]) -> Any:
        if isinstance(operand, Symbol):
            if operand.name not in self.symbols:
                raise self.ins.error(f"unknown symbol {operand.name}")
            return dtype.type(self.symbols[operand.name] + operand.offset)
        if dtype.kind == "b":
            return np.bool_(operand.value != 0)
        width = dtype.itemsize
        if operand.float_bits and dtype.kind == "f":
            unsigned = UNSIGNED[operand.float_bits // 8]
            value = unsigned.type(operand.value).view(f"f{operand.float_bits // 8}")
            return dtype.type(value)
        if dtype.kind == "f" and not operand.float_bits:
            raise self.ins.error("an integer literal where a float is wanted")
        return UNSIGNED[width].type(operand.value & ((1 << (8 * width)) - 1)).view(dtype)

    def get(self, operand: Operand, kind: str) -> Getter:
        """A closure that reads an operand for the running lanes, as the type `kind`."""
        return self.get_as(operand, DTYPE[kind])

    def get_as(self, operand: Operand, dtype: np.dtype[Any]) -> Getter:
        machine = self.machine
        if isinstance(operand, Imm | Symbol):
            value = self.constant(operand, dtype)
            return lambda: value
        view = self.view(operand, dtype)
        if isinstance(operand, Reg) and operand.negated:
            return lambda: ~view[machine.sel]
        return lambda: view[machine.sel]

    def put(self, operand: Operand, kind: str) -> Setter:
        """A closure that writes an operand: narrower values are extended by their signedness."""
        machine = self.machine
        if isinstance(operand, Reg) and operand.name == "_":
            return lambda value: None
        row, dtype = self.row(operand), DTYPE[kind]
        if row.dtype == bool:
            view = row
        elif row.dtype.itemsize == dtype.itemsize:
            view = row.view(dtype)
        elif row.dtype.itemsize > dtype.itemsize:
            # Floats and packed values are bits to a wider register; they come as unsigned.
            sign = "i" if dtype.kind == "i" else "u"
            view = row.view(f"{sign}{row.dtype.itemsize}")
            if dtype.kind == "f":
                bits = UNSIGNED[dtype.itemsize]

                def put_bits(value: Any) -> None:
                    view[machine.sel] = np.asarray(value, dtype).view(bits)

                return put_bits
        else:
            raise self.ins.error(f"register {operand} is narrower than .{kind}")

        def put(value: Any) -> None:
            view[machine.sel] = value

        return put

    def address(self, operand: Operand, narrow: bool = False) -> Getter:
        """uint64 addresses of the running lanes, a fresh array."""
        if not isinstance(operand, Address):
            raise self.ins.error("an address is wanted")
        machine, offset = self.machine, operand.offset
        if isinstance(operand.base, Reg):
            view = self.rows[operand.base.name]
            wrap = np.uint64(0xFFFFFFFF if view.dtype.itemsize == 4 else 0xFFFFFFFFFFFFFFFF)
            delta = np.uint64(offset & 0xFFFFFFFFFFFFFFFF)
            return lambda: (view[machine.sel].astype(np.uint64) + delta) & wrap
        value = int(self.constant(operand.base, np.dtype(np.uint64))) + offset
        return lambda: np.full(len(machine.lanes()), value, np.uint64)

    def parameter(self, operand: Operand, size: int) -> bytes | None:
        """The bytes of a kernel parameter at a fixed offset; None for any other operand."""
        if not isinstance(operand, Address) or not isinstance(operand.base, Symbol):
            return None
        data = self.parameters.get(operand.base.name)
        if data is None:
            return None
        start = operand.base.offset + operand.offset
        if start < 0 or start + size > len(data):
            raise self.ins.error(f"reads past the {len(data)} bytes of the parameter")
        return data[start : start + size]

    def vector(self, operand: Operand) -> tuple[Operand, ...]:
        return operand.items if isinstance(operand, Vector) else (operand,)

    def split_pair(self, operand: Operand) -> tuple[Operand, Operand | None]:
        """``d|p`` as two destinations."""
        return (operand.first, operand.second) if isinstance(operand, Pair) else (operand, None)

    def label(self, operand: Operand) -> int:
        if isinstance(operand, Symbol) and operand.name in self.labels:
            return self.labels[operand.name]
        raise self.ins.error(f"unknown label {operand}")

    # ---- instructions ----

    def step(self, pc: int, instruction: Instruction) -> Step:
        self.pc, self.ins = pc, instruction
        floating = any(m in FLOATING for m in instruction.mods)
        decoder = DECODERS.get(f"{instruction.op}:float") if floating else None
        decoder = decoder or DECODERS.get(instruction.op)
        if decoder is None:
            raise instruction.error(f"unknown instruction {instruction.op}")
        mods = Mods(instruction)
        try:
            step = decoder(self, mods)
        except (IndexError, ValueError) as error:
            raise instruction.error(f"operands not understood ({error})") from error
        mods.finish()
        if instruction.guard is None:
            return step
        row = self.row(instruction.guard)
        return guard_step(self.machine, row, instruction.guard.negated, step, pc)

    def gate(self, instruction: Instruction) -> Callable[[], tuple[Any, bool]] | None:
        """For a warp instruction: its member mask, and whether it needs the whole warp."""
        self.ins = instruction
        mask: Operand | None = None
        if instruction.op in NAMED_GATES:
            mask = instruction.args[-1]
        elif instruction.op == "bar" and "warp" in instruction.mods:
            mask = instruction.args[0]
        elif instruction.op in ALIGNED_GATES:
            return lambda: (FULL_MASK, True)
        if mask is None:
            return None
        if isinstance(mask, Imm):
            value = mask.value & FULL_MASK
            return lambda: (value, False)
        read, row = self.get(mask, "u32"), self.row(mask)

        def dynamic() -> tuple[Any, bool]:
            if isinstance(self.machine.sel, slice) and (row == FULL_MASK).all():
                return FULL_MASK, False
            return read().astype(np.uint64), False

        return dynamic

    def blocks(self) -> Blocks:
        """The function as basic blocks by their first instruction."""
        for instruction in self.machine.function.code:
            if instruction.op not in DECODERS and f"{instruction.op}:float" not in DECODERS:
                raise instruction.error(f"unknown instruction {instruction.op}")
        return Blocks(self)


class Blocks(dict[int, Block]):
    """Basic blocks by their first instruction, decoded when they are first reached: of a large
    kernel a small problem runs a third."""

    def __init__(self, code: Code) -> None:
        super().__init__()
        self.decoder, self.code = code, code.machine.function.code
        self.gates = {pc for pc, i in enumerate(self.code) if code.gate(i)}
        starts = [*leaders(self.code, code.labels, self.gates), len(self.code)]
        self.ends = dict(pairwise(starts))

    def __missing__(self, start: int) -> Block:
        end, decoder, first = self.ends[start], self.decoder, self.code[start]
        steps = [decoder.step(pc, self.code[pc]) for pc in range(start, end)]
        gate = decoder.gate(first)
        condition = None
        if gate and first.guard is not None:
            condition = decoder.get(first.guard, "pred")
        self[start] = Block(start, end, steps, gate, condition)
        return self[start]


def _row_dtype(kind: str) -> np.dtype[Any]:
    if kind == "pred":
        return np.dtype(bool)
    if kind not in DTYPE:
        raise PtxError(f"registers of type .{kind} are not supported")
    return UNSIGNED[max(2, DTYPE[kind].itemsize)]
