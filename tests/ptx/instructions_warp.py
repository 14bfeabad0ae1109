# SPDX-License-Identifier: Apache-2.0
"""Exchange inside a warp: shfl, vote, match, redux, elect, activemask.

The scheduler lets such an instruction run only when all lanes its mask names have arrived.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .decode import Code, Mods, opcode
from .lanes import Step
from .words import DTYPE, Array


def groups(lanes: Array, mask: Any) -> tuple[Array, int]:
    """(group of each lane, groups): lanes of one warp that name the same mask."""
    mask = np.broadcast_to(np.asarray(mask, np.uint64), lanes.shape)
    keys = (lanes // 32).astype(np.uint64) << np.uint64(32) | mask
    used, index = np.unique(keys, return_inverse=True)
    return index, len(used)


def bits_of(lanes: Array, group: Array, count: int, holds: Array) -> Array:
    """For each group the bits of its lanes for which something holds."""
    weights = np.where(holds, (1 << (lanes % 32)).astype(np.float64), 0.0)
    return np.bincount(group, weights=weights, minlength=count).astype(np.uint32)


@opcode("shfl")
def shuffle(code: Code, mods: Mods) -> Step:
    mods.drop("sync", "b32")
    mode = mods.take("up", "down", "bfly", "idx")
    target, flag = code.split_pair(code.ins.args[0])
    put, put_flag = code.put(target, "b32"), code.put(flag, "pred") if flag else None
    machine = code.machine
    value = code.get(code.ins.args[1], "b32")
    amount, clamp = (code.get(x, "u32") for x in code.ins.args[2:4])
    line, text = code.ins.line, code.ins.text
    everything = np.zeros(machine.size, np.uint32)
    running = np.zeros(machine.size, bool)

    def step() -> None:
        lanes = machine.lanes()
        lane, b, c = lanes % 32, np.int64(amount()) & 31, np.int64(clamp())
        segment = (c >> 8) & 31
        top = (lane & segment) | (c & 31 & ~segment)
        if mode == "up":
            source = lane - b
            inside = source >= top
        else:
            if mode == "down":
                source = lane + b
            elif mode == "bfly":
                source = lane ^ b
            else:
                source = (lane & segment) | (b & ~segment)
            inside = source <= top
        source = lanes - lane + np.where(inside, source, lane)
        everything[machine.sel] = value()
        if not isinstance(machine.sel, slice):
            running[:] = False
            running[lanes] = True
            lost = ~running[source]
            if lost.any():
                machine.findings.at(line, text)
                machine.report("shuffle reads a lane that does not take part", lanes[lost])
        result = everything[source]
        if put_flag:
            put_flag(inside)
        put(result)

    return step


@opcode("vote")
def vote(code: Code, mods: Mods) -> Step:
    mods.drop("sync")
    mode = mods.take("all", "any", "uni", "ballot")
    mods.drop("pred", "b32")
    p, mask = code.get(code.ins.args[1], "pred"), code.get(code.ins.args[2], "u32")
    put = code.put(code.ins.args[0], "u32" if mode == "ballot" else "pred")
    machine = code.machine

    def step() -> None:
        lanes = machine.lanes()
        group, count = groups(lanes, mask())
        yes = bits_of(lanes, group, count, np.broadcast_to(p(), lanes.shape))[group]
        if mode == "ballot":
            put(yes)
            return
        whole = bits_of(lanes, group, count, np.ones(len(lanes), bool))[group]
        if mode == "any":
            put(yes != 0)
        elif mode == "all":
            put(yes == whole)
        else:
            put((yes == 0) | (yes == whole))

    return step


@opcode("activemask")
def active_mask(code: Code, mods: Mods) -> Step:
    mods.drop("b32")
    put, machine = code.put(code.ins.args[0], "u32"), code.machine

    def step() -> None:
        lanes = machine.lanes()
        group, count = groups(lanes, 0)
        put(bits_of(lanes, group, count, np.ones(len(lanes), bool))[group])

    return step


@opcode("elect")
def elect(code: Code, mods: Mods) -> Step:
    """The lowest lane of the mask is the leader."""
    mods.drop("sync")
    target, flag = code.split_pair(code.ins.args[0])
    put, put_flag = code.put(target, "u32"), code.put(flag, "pred") if flag else None
    mask, machine = code.get(code.ins.args[1], "u32"), code.machine

    def step() -> None:
        lanes = machine.lanes()
        low = np.broadcast_to(np.asarray(mask(), np.uint32), lanes.shape)
        leader = np.bitwise_count((low & (~low + np.uint32(1))) - np.uint32(1))
        put(leader.astype(np.uint32))
        if put_flag:
            put_flag(lanes % 32 == leader)

    return step


@opcode("match")
def match(code: Code, mods: Mods) -> Step:
    mode = mods.take("any", "all")
    mods.drop("sync")
    kind = mods.type()
    target, flag = code.split_pair(code.ins.args[0])
    put, put_flag = code.put(target, "u32"), code.put(flag, "pred") if flag else None
    a, mask = code.get(code.ins.args[1], kind), code.get(code.ins.args[2], "u32")
    machine = code.machine

    def step() -> None:
        lanes = machine.lanes()
        group, count = groups(lanes, mask())
        _, value = np.unique(np.broadcast_to(a(), lanes.shape), return_inverse=True)
        pairs, cell = np.unique(group * (len(lanes) + 1) + value, return_inverse=True)
        everyone = np.ones(len(lanes), bool)
        same = bits_of(lanes, cell, len(pairs), everyone)[cell]
        if mode == "any":
            put(same)
            return
        whole = bits_of(lanes, group, count, everyone)[group]
        put(np.where(same == whole, whole, np.uint32(0)))
        if put_flag:
            put_flag(same == whole)

    return step


_REDUCE: dict[str, np.ufunc] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@opcode("redux")
def reduce(code: Code, mods: Mods) -> Step:
    mods.drop("sync")
    name = mods.take(*_REDUCE)
    if name is None:
        raise code.ins.error("this reduction is not known")
    ufunc, kind = _REDUCE[name], mods.type()
    a, mask = code.get(code.ins.args[1], kind), code.get(code.ins.args[2], "u32")
    put, machine = code.put(code.ins.args[0], kind), code.machine

    def step() -> None:
        lanes = machine.lanes()
        group, _ = groups(lanes, mask())
        order = np.argsort(group, kind="stable")
        values = np.broadcast_to(a(), lanes.shape)[order].astype(DTYPE[kind])
        starts = np.flatnonzero(np.diff(group[order], prepend=-1))
        put(ufunc.reduceat(values, starts)[group])

    return step
