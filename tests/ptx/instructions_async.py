# SPDX-License-Identifier: Apache-2.0
"""cp.async and its groups.

The bytes are copied at once, but the checks see them as pending until the copying thread has waited
for the group, and as unordered to other threads until a barrier after that wait.
"""

from __future__ import annotations

import numpy as np

from .decode import Code, Mods, opcode
from .instructions_memory import marker
from .lanes import Step
from .parser import Imm, Reg


@opcode("cp")
def copy_async(code: Code, mods: Mods) -> Step:
    if not mods.has("async"):
        raise code.ins.error("only the non-bulk cp.async is known")
    if mods.has("commit_group"):
        machine = code.machine
        return lambda: machine.copies.commit(machine.lanes())
    if mods.has("wait_all"):
        return _wait(code, 0, everything=True)
    if mods.has("wait_group"):
        left = code.ins.args[0]
        if not isinstance(left, Imm):
            raise code.ins.error("the number of groups must be a literal")
        return _wait(code, left.value, everything=False)
    return _copy(code, mods)


def _wait(code: Code, left: int, everything: bool) -> Step:
    """wait_all also completes copies that were never committed."""
    machine = code.machine

    def step() -> None:
        lanes = machine.lanes()
        block, warp = lanes // machine.threads, (lanes % machine.threads) // 32
        clock = machine.clocks.now[block, warp, warp]
        machine.copies.wait(lanes, left, clock, everything)
        if everything:
            machine.copies.commit(lanes)

    return step


def _copy(code: Code, mods: Mods) -> Step:
    cached = mods.take("ca", "cg")
    mods.drop("shared", "shared__cta", "global")
    hinted = "L2__cache_hint" in mods.left
    mods.drop_prefix("L2__")
    args = list(code.ins.args)
    size_operand = args[2]
    if not isinstance(size_operand, Imm) or size_operand.value not in (4, 8, 16):
        raise code.ins.error("cp.async copies 4, 8 or 16 bytes")
    size = size_operand.value
    if cached == "cg" and size != 16:
        raise code.ins.error("cp.async.cg copies 16 bytes")
    extra = args[3 : len(args) - 1 if hinted else len(args)]
    target, source = code.address(args[0]), code.address(args[1])
    machine, mark = code.machine, marker(code)
    memories, width = machine.memories, 4
    source_size = None
    ignore = None
    if extra and isinstance(extra[0], Reg) and code.row(extra[0]).dtype == bool:
        ignore = code.get(extra[0], "pred")
    elif extra:
        source_size = code.get(extra[0], "u32")

    def step() -> None:
        mark()
        lanes, to, origin = machine.lanes(), target(), source()
        words = np.zeros((len(lanes), size // width), np.uint32)
        wanted = np.full(len(lanes), size)
        if source_size:
            wanted[:] = source_size()
            memories.report(
                "cp.async source size over its copy size", lanes, origin, wanted > size, ""
            )
            wanted = np.minimum(wanted, size)
        if ignore:
            wanted[np.broadcast_to(ignore(), wanted.shape)] = 0
        misaligned = origin % np.uint64(size) != 0
        memories.report("misaligned global access", lanes, origin, misaligned, f"needs {size}")
        wanted[misaligned] = 0
        whole = wanted == size
        if whole.all():
            words = memories.load("global", lanes, origin, width, size // width)
        else:
            if whole.any():
                words[whole] = memories.load(
                    "global", lanes[whole], origin[whole], width, size // width
                )
            for part in np.unique(wanted[~whole]):  # the rest is filled with zeros
                some = wanted == part
                for i in range(int(part)):
                    there = origin[some] + np.uint64(i)
                    byte = memories.load("global", lanes[some], there, 1, 1)
                    words.view(np.uint8)[some, i] = byte[:, 0]
        memories.store("shared", lanes, to, words, width, asynchronous=True)

    return step
