# SPDX-License-Identifier: Apache-2.0
"""What a run costs: instructions by class, global sectors and shared wavefronts over the ideal,
and which instructions were executed at all."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .parser import Function, Instruction
from .words import Array

SECTOR = 32  # bytes a global request moves at least
BANKS, BANK_BYTES = 32, 4

CLASSES = {
    "mma": ("mma",),
    "ldmatrix": ("ldmatrix", "stmatrix", "movmatrix"),
    "cp.async": ("cp",),
    "memory": ("ld", "st", "atom", "red", "prefetch", "ldu"),
    "control": ("bra", "brx", "ret", "exit", "call", "trap"),
    "barrier": ("bar", "barrier", "membar", "fence"),
    "warp": ("shfl", "vote", "match", "redux", "activemask", "elect"),
    "special function": ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh", "div"),
    "convert": ("cvt", "cvta"),
    "move": ("mov", "selp", "prmt"),
    "compare": ("setp", "set", "testp"),
}
_CLASS_OF = {op: name for name, ops in CLASSES.items() for op in ops}


def class_of(instruction: Instruction) -> str:
    """The class an instruction is counted in."""
    named = _CLASS_OF.get(instruction.op)
    if named:
        return named
    floating = any(m.startswith(("f16", "bf16", "f32", "f64")) for m in instruction.mods)
    return "float" if floating else "integer"


def phases(lanes: Array, addresses: Array, size: int) -> tuple[Array, Array, int]:
    """(words [phases, slots] with -1 for nothing, phase of each lane, phases in all).

    Shared memory serves a warp 128 bytes at a time: 32 lanes of 4 bytes, 16 of 8, 8 of 16.
    """
    words = max(1, size // BANK_BYTES)
    group = min(32, BANKS // words)
    phase, slot = lanes // group, lanes % group
    used, index = np.unique(phase, return_inverse=True)
    table = np.full((len(used), group, words), -1, np.int64)
    table[index, slot] = (addresses.astype(np.int64) // BANK_BYTES)[:, None] + np.arange(words)
    return table.reshape(len(used), group * words), used, len(used)


@dataclass
class Count:
    """Requests at one PTX line: what they took and what they would take at best."""

    space: str
    requests: int = 0
    actual: int = 0
    ideal: int = 0


@dataclass
class Traffic:
    """Sectors and wavefronts by PTX line."""

    enabled: bool = True
    line: int = 0
    counts: dict[tuple[str, int], Count] = field(default_factory=dict)

    def add(self, space: str, lanes: Array, addresses: Array, size: int) -> None:
        if not self.enabled:
            return
        count = self.counts.setdefault((space, self.line), Count(space))
        warps = lanes // 32
        if space == "global":
            requests = int(np.count_nonzero(np.diff(warps))) + 1
            first = addresses.astype(np.int64) // SECTOR
            last = (addresses.astype(np.int64) + (size - 1)) // SECTOR
            touched = np.unique(np.concatenate([warps << 44 | first, warps << 44 | last]))
            key = np.unique((warps << 48) | (addresses.astype(np.int64) & ((1 << 48) - 1)))
            distinct = np.bincount((key >> 48) - int(warps.min()))
            ideal = -(-(distinct * size) // SECTOR)
            actual, best = len(touched), int(ideal.sum())
        else:
            table, _, requests = phases(lanes, addresses, size)
            table = np.sort(table, axis=1)
            fresh = np.ones(table.shape, bool)
            fresh[:, 1:] = table[:, 1:] != table[:, :-1]
            fresh &= table >= 0
            rows = np.broadcast_to(np.arange(len(table))[:, None], table.shape)
            banks = np.bincount(
                rows[fresh] * BANKS + table[fresh] % BANKS, minlength=len(table) * BANKS
            )
            actual, best = int(banks.reshape(-1, BANKS).max(axis=1).sum()), requests
        count.requests += requests
        count.actual += actual
        count.ideal += best

    def ratio(self, space: str) -> float:
        """Actual over ideal; 1.0 if there was no traffic."""
        found = [c for c in self.counts.values() if c.space == space]
        ideal = sum(c.ideal for c in found)
        return sum(c.actual for c in found) / ideal if ideal else 1.0


@dataclass
class Execution:
    """How often each instruction ran: by warps that issued it, and by lanes whose guard held."""

    function: Function
    issued: Array
    lanes: Array

    @classmethod
    def of(cls, function: Function) -> Execution:
        size = len(function.code)
        return cls(function, np.zeros(size, np.int64), np.zeros(size, np.int64))

    def by_class(self) -> dict[str, int]:
        """Warp instructions by class."""
        total: Counter[str] = Counter()
        for instruction, n in zip(self.function.code, self.issued, strict=True):
            total[class_of(instruction)] += int(n)
        return dict(total)

    def executed(self) -> Array:
        """Which instructions some lane executed with its guard true. A branch that was decided has
        run, taken or not: where it leads has instructions of its own."""
        branches = np.array([i.op == "bra" for i in self.function.code], bool)
        return (self.lanes > 0) | (branches & (self.issued > 0))

    def missed(self) -> list[Instruction]:
        """Instructions that never ran."""
        return [i for i, ran in zip(self.function.code, self.executed(), strict=True) if not ran]

    def coverage(self) -> float:
        """The executed share of all instructions."""
        return 1 - len(self.missed()) / max(1, len(self.lanes))
