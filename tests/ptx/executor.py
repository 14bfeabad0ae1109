# SPDX-License-Identifier: Apache-2.0
"""The way in: load a PTX module, launch a kernel of it, read the report."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import (  # noqa: F401 - importing them registers the decoders
    instructions_async,
    instructions_control,
    instructions_convert,
    instructions_float,
    instructions_integer,
    instructions_matrix,
    instructions_memory,
    instructions_warp,
)
from .checks import Finding, Findings, GlobalRaces, SharedRaces
from .decode import Code
from .lanes import Machine
from .link import inline
from .memory import Buffer, Memories, Memory
from .metrics import Count, Execution, Traffic
from .parser import Function, Instruction, Module, PtxError, Variable, parse
from .words import DTYPE

Dim = int | tuple[int, ...]
Parameter = int | float | bytes | np.generic | Buffer
SHARED_LIMIT = 227 * 1024
BATCH_BYTES = 256 << 20  # registers, shared memory and shadows of one batch


class WrongRun(AssertionError):
    """A launch with findings."""


@dataclass
class Report:
    """What one launch did."""

    kernel: str
    findings: list[Finding]
    execution: Execution
    traffic: Traffic
    lane_instructions: int
    seconds: float
    blocks_at_once: int
    shared_bytes: int
    steps: int  # basic blocks of the batch that took most

    def check(self) -> Report:
        """Raises with all findings if there are any."""
        if self.findings:
            raise WrongRun("\n".join(str(f) for f in self.findings))
        return self

    def kinds(self) -> set[str]:
        """The kinds of the findings."""
        return {f.kind for f in self.findings}

    def instructions(self) -> dict[str, int]:
        """Warp instructions by class."""
        return self.execution.by_class()

    def coverage(self) -> float:
        return self.execution.coverage()

    def missed(self) -> list[Instruction]:
        return self.execution.missed()

    def sectors_over_ideal(self) -> float:
        return self.traffic.ratio("global")

    def conflicts_over_ideal(self) -> float:
        return self.traffic.ratio("shared")

    def traffic_by_line(self) -> dict[tuple[str, int], Count]:
        return self.traffic.counts

    @property
    def lanes_per_second(self) -> float:
        return self.lane_instructions / max(self.seconds, 1e-9)


@dataclass
class _Layout:
    """Where the variables of a kernel lie."""

    symbols: dict[str, int] = field(default_factory=dict)
    local_names: set[str] = field(default_factory=set)
    shared: int = 0
    local: int = 0


def _up(value: int, align: int) -> int:
    return -(-value // align) * align


def pack(kernel: Function, params: bytes | Sequence[Parameter]) -> dict[str, bytes]:
    """The bytes of each parameter, from one block laid out as the driver does or from values."""
    packed: dict[str, bytes] = {}
    if isinstance(params, bytes | bytearray):
        offset = 0
        for each in kernel.params:
            offset = _up(offset, each.align)
            packed[each.name] = bytes(params[offset : offset + each.size])
            offset += each.size
        if offset != len(params):
            raise PtxError(f"{kernel.name} takes {offset} bytes of parameters, not {len(params)}")
        return packed
    if len(params) != len(kernel.params):
        raise PtxError(f"{kernel.name} takes {len(kernel.params)} parameters, not {len(params)}")
    for each, value in zip(kernel.params, params, strict=True):
        packed[each.name] = _bytes_of(each, value)
        if len(packed[each.name]) != each.size:
            raise PtxError(f"parameter {each.name} has {each.size} bytes, not what was given")
    return packed


def _bytes_of(formal: Variable, value: Parameter) -> bytes:
    if isinstance(value, Buffer):
        return value.address.to_bytes(8, "little")
    if isinstance(value, bytes):
        return value
    if isinstance(value, np.generic):
        return value.tobytes()
    if isinstance(value, float):
        return np.array(value, f"f{formal.size}").tobytes()
    return (int(value) & ((1 << (8 * formal.size)) - 1)).to_bytes(formal.size, "little")


class Program:
    """A parsed module that can launch its kernels."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self._inlined: dict[str, Function] = {}
        self.step_limit = 2_000_000  # basic blocks of one batch: an endless loop ends

    @property
    def kernels(self) -> list[str]:
        return [f.name for f in self.module.functions.values() if f.is_entry]

    def kernel(self, name: str) -> Function:
        """A kernel by its mangled name, or by a part of it that only one kernel has."""
        found = [k for k in self.kernels if k == name] or [k for k in self.kernels if name in k]
        if len(found) != 1:
            raise PtxError(f"{name!r} names {len(found)} of the kernels {self.kernels}")
        if found[0] not in self._inlined:
            self._inlined[found[0]] = inline(self.module, self.module.functions[found[0]])
        return self._inlined[found[0]]

    def launch(
        self,
        name: str,
        grid: Dim,
        block: Dim,
        params: bytes | Sequence[Parameter],
        shared_bytes: int = 0,
        memory: Memory | None = None,
        *,
        races: bool = True,
        metrics: bool = True,
        blocks_at_once: int | None = None,
        only: range | None = None,
        step_limit: int | None = None,
        symbols: dict[str, Buffer] | None = None,
    ) -> Report:
        """Runs a kernel over the whole grid, or over the blocks `only` of it.

        `shared_bytes` is the dynamic shared memory. `symbols` gives buffers for .global variables
        of the module that outlive the launch; others are made afresh from their initialisers.
        """
        kernel, memory = self.kernel(name), memory or Memory()
        grid3, block3 = _three(grid), _three(block)
        if math.prod(block3) > kernel.max_threads or min(*grid3, *block3) < 1:
            raise PtxError(f"{kernel.name}: grid {grid3} and block {block3} cannot be launched")
        if grid3[1] > 65535 or grid3[2] > 65535:
            raise PtxError(f"{kernel.name}: grid {grid3}: y and z end at 65535")
        packed = pack(kernel, params)
        layout = self._layout(kernel, shared_bytes, memory, symbols or {}, packed)
        if layout.shared > SHARED_LIMIT:
            raise PtxError(f"{kernel.name}: {layout.shared} bytes of shared memory are too many")
        findings, traffic = Findings(kernel.name), Traffic(metrics)
        run = only or range(math.prod(grid3))
        at_once = min(len(run), blocks_at_once or _batch(kernel, block3, layout))
        machine = Machine(kernel, block3, grid3, at_once, findings)
        machine.step_limit = step_limit or self.step_limit
        for register, value in (("dynamic", shared_bytes), ("total", layout.shared)):
            machine.special[f"{register}_smem_size"] = np.full(machine.size, value, np.uint32)
        granule = {s: _granule(kernel, s) for s in ("shared", "global")}
        memory.space.granule = granule["global"]
        machine.memories = Memories(
            memory, findings, traffic, machine.threads, machine.size, layout.shared, layout.local,
            granule["shared"],
        )  # fmt: skip
        if races:
            per_block = machine.memories.stride // granule["shared"]
            machine.memories.shared_races = SharedRaces(
                per_block, at_once, machine.threads, machine.clocks, machine.copies
            )
            machine.memories.global_races = GlobalRaces(
                memory.space.data.size // granule["global"], machine.threads, machine.clocks
            )
        began = time.perf_counter()
        with np.errstate(all="ignore"):
            code = Code(machine, layout.symbols, packed, layout.local_names)
            blocks = code.blocks()
            for first in range(run.start, run.stop, at_once):
                machine.start(first, run.stop)
                code.poison()
                machine.run(blocks)
        return Report(
            kernel.name,
            list(findings.found.values()),
            machine.execution,
            traffic,
            machine.lane_steps,
            time.perf_counter() - began,
            at_once,
            layout.shared,
            machine.most_steps,
        )

    def _layout(
        self,
        kernel: Function,
        dynamic: int,
        memory: Memory,
        given: dict[str, Buffer],
        packed: dict[str, bytes],
    ) -> _Layout:
        """Static shared memory first, the dynamic part after it; module variables in the arena."""
        layout = _Layout()
        used = _used_names(kernel)
        variables = [v for v in self.module.variables.values() if v.name in used] + kernel.variables
        extern = [v for v in variables if v.space == "shared" and v.extern]
        for each in variables:
            if each.space == "shared" and not each.extern:
                layout.shared = _up(layout.shared, each.align)
                layout.symbols[each.name] = layout.shared
                layout.shared += each.size
            elif each.space in ("local", "param"):
                layout.local = _up(layout.local, each.align)
                layout.symbols[each.name] = layout.local
                layout.local_names.add(each.name)
                layout.local += each.size
            elif each.space in ("global", "const"):
                buffer = given.get(each.name)
                if buffer is None:
                    data = np.frombuffer(each.data or bytes(each.size), np.uint8)
                    buffer = memory.buffer(each.name, data, writable=each.space == "global")
                layout.symbols[each.name] = buffer.address
        if extern:
            layout.shared = _up(layout.shared, max(v.align for v in extern))
            layout.symbols.update({v.name: layout.shared for v in extern})
        layout.shared += dynamic
        for name, raw in packed.items():  # for kernels that take a parameter's address
            if name in used:
                values = np.frombuffer(raw, np.uint8)
                layout.symbols[name] = memory.buffer(name, values, writable=False).address
        return layout


def _used_names(kernel: Function) -> set[str]:
    """Every symbol the code mentions."""
    from .parser import Address, Symbol

    names = set()
    for instruction in kernel.code:
        for arg in instruction.args:
            base = arg.base if isinstance(arg, Address) else arg
            if isinstance(base, Symbol):
                names.add(base.name)
    return names


def _three(value: Dim) -> tuple[int, int, int]:
    whole = (value,) if isinstance(value, int) else tuple(value)
    x, y, z = (*whole, 1, 1)[:3]
    return x, y, z


def _batch(kernel: Function, block: tuple[int, int, int], layout: _Layout) -> int:
    """How many blocks run together: enough lanes to be fast, within the memory for state."""
    threads = _up(math.prod(block), 32)
    registers = 6 * len(kernel.registers) * threads
    shadows = layout.shared * (2 + 4 + 3 * (threads // 32))
    return max(1, min(BATCH_BYTES // max(1, registers + shadows), 8192 // threads or 1))


def _granule(kernel: Function, space: str) -> int:
    """The narrowest access to a space, 16 bytes at most 4: nothing finer can share a granule."""
    narrowest = 4
    for i in kernel.code:
        if i.op in ("ld", "st", "atom", "red") and (space in i.mods or not _has_space(i)):
            widths = [DTYPE[m].itemsize for m in i.mods if m in DTYPE]
            narrowest = min([narrowest, *widths])
        if i.op == "cp" and len(i.args) > 3 and space == "global":
            narrowest = min(narrowest, 1 if not _whole_or_nothing(i) else 4)
    return narrowest


def _whole_or_nothing(instruction: Instruction) -> bool:
    """Whether a cp.async reads all its bytes or none, as far as the text tells."""
    return "L2__cache_hint" in instruction.mods and len(instruction.args) == 4


def _has_space(instruction: Instruction) -> bool:
    spaces = ("global", "shared", "local", "const", "param", "shared__cta")
    return any(m in spaces for m in instruction.mods)


def load(ptx: str | Path) -> Program:
    """A program from PTX text or from a file."""
    text = ptx.read_text() if isinstance(ptx, Path) else ptx
    return Program(parse(text))


__all__ = ["Program", "Report", "WrongRun", "load", "pack"]
