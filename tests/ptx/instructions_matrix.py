# SPDX-License-Identifier: Apache-2.0
"""Matrix fragments: ldmatrix, stmatrix, movmatrix and mma.sync.

A fragment is a permutation: element (row, column) of a matrix lies in some lane, register and half.
The permutations are built once from the rules of the PTX ISA and applied with one `take`.

Numerics of mma: products are exact (bf16, f16 and tf32 products fit float32). tf32 products, which
stand in for fp32 ones, are summed as an H100 does it, bit for bit (`tensor_core_sum`), since its
rounding tells there. Beside a result in bf16 or f16 it does not: those sums over k are formed in
float32 and added to C. f16 accumulators are rounded once at the end. tf32 operands lose their low
13 bits first, as the tensor cores ignore them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .decode import Code, Mods, opcode
from .instructions_memory import marker
from .lanes import Step
from .words import Array, bf16_to_f32

LANE = np.arange(32)
GROUP, PLACE = LANE // 4, LANE % 4


def fragment(rows: int, columns: int, per_register: int, which: str) -> Array:
    """index[row, column] into [lane, register, part] flattened, for operand A, B or C.

    Rows (columns for B) go by groups of four lanes, 8 at a time; along the other axis a lane holds
    `per_register` neighbours, then the same `4 * per_register` further on.
    """
    tall, wide = (columns, rows) if which == "B" else (rows, columns)
    step = 4 * per_register
    registers = (tall // 8) * (wide // step)
    index = np.zeros((tall, wide), np.int64)
    for register in range(registers):
        # A and C put the two row halves first, then the next columns.
        down, along = register % (tall // 8), register // (tall // 8)
        for part in range(per_register):
            flat = (LANE * registers + register) * per_register + part
            index[GROUP + 8 * down, PLACE * per_register + part + step * along] = flat
    return index.T if which == "B" else index


class Gatherer:
    """Reads fragments of whole warps into matrices."""

    def __init__(self, code: Code, operand: Any, shape: tuple[int, int], part: str, which: str):
        self.machine = code.machine
        items = code.vector(operand)
        self.gets = [code.get(x, "b32") for x in items]
        self.part = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32, "tf32": np.uint32}[
            part
        ]
        per_register = 4 // np.dtype(self.part).itemsize
        if which == "C" and part == "f32":
            per_register = 1
        self.kind = part
        if which == "C" and part == "f32":
            self.index = accumulator(*shape)
        else:
            self.index = fragment(*shape, per_register, which)
        wanted = shape[0] * shape[1] // 32 // per_register
        if len(self.gets) != wanted:
            raise code.ins.error(f"operand {which} has {len(self.gets)} registers, not {wanted}")

    def __call__(self) -> Array:
        count = len(self.machine.lanes())
        words = np.empty((count, len(self.gets)), np.uint32)
        for i, get in enumerate(self.gets):
            words[:, i] = get()
        parts = words.view(self.part).reshape(count // 32, -1)
        matrix = parts[:, self.index]
        if self.kind == "bf16":
            return bf16_to_f32(matrix)
        if self.kind == "tf32":
            return (matrix & np.uint32(0xFFFFE000)).view(np.float32)
        return matrix.astype(np.float32)


def accumulator(rows: int, columns: int) -> Array:
    """index[row, column] for 32-bit accumulators: two columns of row g, then of row g + 8."""
    index = np.zeros((rows, columns), np.int64)
    registers = rows * columns // 32
    for register in range(registers):
        flat = LANE * registers + register
        index[GROUP + 8 * (register // 2 % 2), 2 * PLACE + register % 2 + 8 * (register // 4)] = (
            flat
        )
    return index


def tensor_core_sum(left: Array, right: Array, start: Array) -> Array:
    """left @ right + start of [..., m, k], [..., k, n] and [..., m, n] as an H100's tensor cores
    have it.

    All products and the addend are aligned to the largest exponent among them, what lies more than
    25 bits below it is cut off, the rest is added up exactly and cut off to float32. A product's
    exponent is the sum of its factors', whether its mantissa carries or not. Found by comparing
    with that GPU's results for random operands: every one of 196,608 is equal (a few are kept in
    h100_mma.npz). Infinities and NaN are left to ordinary arithmetic.
    """
    plain = np.matmul(left, right) + start
    a, b, c = (x.astype(np.float64) for x in (left, right, start))
    exponent = _exponent(a)[..., :, :, None] + _exponent(b)[..., None, :, :]
    top = np.maximum(exponent.max(-2), _exponent(c))
    unit = np.ldexp(1.0, np.maximum(top, -126) - 25)
    with np.errstate(invalid="ignore"):
        products = np.trunc(a[..., :, :, None] * b[..., None, :, :] / unit[..., None, :])
        total = (products.sum(-2) + np.trunc(c / unit)) * unit
        rounded = total.astype(np.float32)
        away = np.abs(rounded.astype(np.float64)) > np.abs(total)
    rounded = np.where(away, np.nextafter(rounded, np.float32(0)), rounded)
    return np.where(np.isfinite(plain), rounded, plain)


def _exponent(x: Array) -> Array:
    return np.where(x == 0, -1000, np.frexp(x)[1] - 1)


@opcode("mma")
def mma(code: Code, mods: Mods) -> Step:
    mods.drop("sync", "aligned")
    shape = mods.take("m16n8k16", "m16n8k8", "m16n8k4")
    if shape is None or not mods.has("row") or not mods.has("col"):
        raise code.ins.error("this shape or layout of mma is not known")
    k = int(shape.rpartition("k")[2])
    result, first, second, addend = mods.left
    mods.left.clear()
    allowed = {"f16": (8, 16), "bf16": (8, 16), "tf32": (4, 8)}
    if first != second or k not in allowed.get(first, ()) or result != addend:
        raise code.ins.error("these types of mma are not known")
    if result not in ("f32", "f16") or (result == "f16" and first != "f16"):
        raise code.ins.error("these accumulators of mma are not known")
    d, a, b, c = code.ins.args[:4]
    left = Gatherer(code, a, (16, k), first, "A")
    right = Gatherer(code, b, (k, 8), first, "B")
    start = Gatherer(code, c, (16, 8), result, "C")
    puts = [code.put(x, "b32") for x in code.vector(d)]
    machine = code.machine
    scatter = np.argsort(start.index.reshape(-1))

    def step() -> None:
        if first == "tf32":
            total = tensor_core_sum(left(), right(), start())
        else:
            total = np.matmul(left(), right()) + start()
        if len(machine.lanes()) % 32:
            return  # reported by the scheduler
        flat = total.reshape(len(total), -1)[:, scatter]
        if result == "f16":
            flat = flat.astype(np.float16)
        words = np.ascontiguousarray(flat).view(np.uint32).reshape(-1, len(puts))
        for i, put in enumerate(puts):
            put(words[:, i])

    def guarded() -> None:
        if len(machine.lanes()) % 32 == 0:
            step()

    return guarded


def _matrix_modifiers(code: Code, mods: Mods) -> tuple[int, bool]:
    mods.drop("sync", "aligned", "m8n8", "shared", "shared__cta", "b16")
    count = {"x1": 1, "x2": 2, "x4": 4}[mods.take("x1", "x2", "x4") or "x1"]
    return count, mods.has("trans")


@opcode("ldmatrix")
def load_matrix(code: Code, mods: Mods) -> Step:
    """Lanes 8i .. 8i+7 address the rows of matrix i; lane l gets columns 2(l%4), +1 of row l/4."""
    count, trans = _matrix_modifiers(code, mods)
    puts = [code.put(x, "b32") for x in code.vector(code.ins.args[0])]
    address, machine, mark = code.address(code.ins.args[1]), code.machine, marker(code)

    def step() -> None:
        mark()
        lanes = machine.lanes()
        if len(lanes) % 32:
            return
        warps = lanes.reshape(-1, 32)[:, : 8 * count]
        rows = address().reshape(-1, 32)[:, : 8 * count]
        words = machine.memories.load(
            "shared", warps.reshape(-1), rows.reshape(-1), 4, 4, collective=True
        )
        matrices = words.view(np.uint16).reshape(-1, count, 8, 8)
        if trans:
            matrices = matrices.swapaxes(2, 3)
        parts = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, 32)
        for i, put in enumerate(puts):
            put(parts[:, i].reshape(-1))

    return step


@opcode("stmatrix")
def store_matrix(code: Code, mods: Mods) -> Step:
    """The inverse of ldmatrix."""
    count, trans = _matrix_modifiers(code, mods)
    gets = [code.get(x, "b32") for x in code.vector(code.ins.args[1])]
    address, machine, mark = code.address(code.ins.args[0]), code.machine, marker(code)

    def step() -> None:
        mark()
        lanes = machine.lanes()
        if len(lanes) % 32:
            return
        warps = lanes.reshape(-1, 32)[:, : 8 * count]
        rows = address().reshape(-1, 32)[:, : 8 * count]
        words = np.stack([np.broadcast_to(g(), lanes.shape).reshape(-1, 32) for g in gets], axis=1)
        matrices = np.ascontiguousarray(words).view(np.uint16).reshape(-1, count, 8, 8)
        if trans:
            matrices = matrices.swapaxes(2, 3)
        values = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, 4)
        machine.memories.store("shared", warps.reshape(-1), rows.reshape(-1), values, 4)

    return step


@opcode("movmatrix")
def move_matrix(code: Code, mods: Mods) -> Step:
    """Transposes an 8x8 matrix of 16 bits in registers."""
    mods.drop("sync", "aligned", "m8n8", "trans", "b16")
    a, put, machine = (
        code.get(code.ins.args[1], "b32"),
        code.put(code.ins.args[0], "b32"),
        code.machine,
    )

    def step() -> None:
        words = np.broadcast_to(a(), machine.lanes().shape)
        if len(words) % 32:
            return
        matrix = np.ascontiguousarray(words).view(np.uint16).reshape(-1, 8, 8).swapaxes(1, 2)
        put(np.ascontiguousarray(matrix).view(np.uint32).reshape(-1))

    return step
