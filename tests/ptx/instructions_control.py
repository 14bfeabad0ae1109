# SPDX-License-Identifier: Apache-2.0
"""Branches, exits, barriers and fences."""

from __future__ import annotations

import numpy as np

from .decode import Code, Mods, opcode
from .lanes import EXITED, Step
from .parser import Imm, Symbol, Vector


@opcode("bra")
def branch(code: Code, mods: Mods) -> Step:
    mods.drop("uni")
    machine, target = code.machine, code.label(code.ins.args[0])

    def step() -> None:
        machine.pc[machine.sel] = target

    return step


@opcode("brx")
def branch_by_table(code: Code, mods: Mods) -> Step:
    mods.drop("idx", "uni")
    machine, index, table = code.machine, code.get(code.ins.args[0], "u32"), code.ins.args[1]
    if not isinstance(table, Symbol) or table.name not in machine.function.tables:
        raise code.ins.error("no such table of branch targets")
    names = machine.function.tables[table.name]
    targets = np.array([code.labels[name] for name in names], np.int32)

    def step() -> None:
        machine.pc[machine.sel] = targets[index()]

    return step


@opcode("ret", "exit")
def leave(code: Code, mods: Mods) -> Step:
    mods.drop("uni")
    machine = code.machine

    def step() -> None:
        machine.state[machine.sel] = EXITED
        machine.release_after_exit()

    return step


@opcode("trap")
def trap(code: Code, mods: Mods) -> Step:
    machine, line, text = code.machine, code.ins.line, code.ins.text

    def step() -> None:
        machine.findings.at(line, text)
        machine.report("trap", machine.lanes())
        machine.state[machine.sel] = EXITED
        machine.release_after_exit()

    return step


@opcode("call")
def call(code: Code, mods: Mods) -> Step:
    """Calls of known functions are inlined before decoding; what is left ends the program."""
    mods.drop("uni")
    name = code.ins.args[1]
    if not isinstance(name, Symbol) or name.name != "__assertfail":
        raise code.ins.error("a call of a function that is not in the module")
    return trap(code, mods)


@opcode("bar", "barrier")
def barrier(code: Code, mods: Mods) -> Step:
    """bar.sync and barrier.sync: all of the block, or as many threads as the operand says."""
    machine = code.machine
    if mods.has("warp"):
        mods.drop("sync")

        def warp_sync() -> None:
            lanes = machine.lanes()
            warps = np.unique(lanes // 32)
            machine.clocks.warp_sync(warps // machine.warps, warps % machine.warps)

        return warp_sync
    mods.drop("cta")
    if not mods.has("sync"):
        raise code.ins.error("only the sync form of a barrier is known")
    aligned = mods.has("aligned") or code.ins.op == "bar"
    args, pc = code.ins.args, code.pc
    number = code.get(args[0], "u32")
    count = code.get(args[1], "u32") if len(args) > 1 else None
    if isinstance(args[0], Imm) and count is None:
        fixed = args[0].value
        return lambda: machine.arrive(pc, fixed, 0, aligned)
    return lambda: machine.arrive(pc, number(), count() if count else 0, aligned)


@opcode("membar", "fence", "griddepcontrol", "nanosleep", "pragma", "discard", "applypriority")
def fence(code: Code, mods: Mods) -> Step:
    """Memory is always in order here. Fences alone order nothing in the race checks."""
    mods.left.clear()
    return lambda: None


@opcode("nop")
def nothing(code: Code, mods: Mods) -> Step:
    """What the linker leaves where a function was inlined."""
    assert not any(isinstance(a, Vector) for a in code.ins.args)
    return lambda: None
