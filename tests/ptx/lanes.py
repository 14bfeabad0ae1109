# SPDX-License-Identifier: Apache-2.0
"""The machine: register rows, a program counter per lane, and who runs next.

All lanes of a batch of blocks run together. The lanes at the lowest program counter run one basic
block, so that diverged lanes meet again where their paths join. An instruction sees the running
lanes as `sel`: a full slice while nobody has diverged (register rows are then used in place), an
array of lane numbers otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .checks import AsyncCopies, Clocks, Findings
from .memory import Memories
from .metrics import Execution
from .parser import Function, Instruction, PtxError
from .words import Array

Step = Callable[[], None]
Select = slice | Array
EVERYONE = slice(None)
RUN, BARRIER, PARKED, EXITED = 0, 1, 2, 3
FULL_MASK = 0xFFFFFFFF


@dataclass
class Block:
    """A basic block: its steps, and whether its first instruction gathers a warp."""

    start: int
    end: int
    steps: list[Step]
    gate: Callable[[], tuple[Array | int, bool]] | None
    gate_guard: Callable[[], Array] | None


class Machine:
    """State of one batch of blocks."""

    def __init__(
        self,
        function: Function,
        block: tuple[int, int, int],
        grid: tuple[int, int, int],
        blocks: int,
        findings: Findings,
    ) -> None:
        self.function, self.block, self.grid, self.findings = function, block, grid, findings
        self.real_threads = block[0] * block[1] * block[2]
        self.threads = -(-self.real_threads // 32) * 32
        self.blocks = blocks
        self.size = self.threads * blocks
        self.warps = self.threads // 32
        self.all_lanes = np.arange(self.size)
        self.thread_of = self.all_lanes % self.threads
        self.block_of = self.all_lanes // self.threads
        self.sel: Select = EVERYONE
        self.pc = np.zeros(self.size, np.int32)
        self.state = np.zeros(self.size, np.int8)
        self.barrier_id = np.zeros(self.size, np.int32)
        self.barrier_count = np.zeros(self.size, np.int32)
        self.barrier_pc = np.zeros(self.size, np.int32)
        self.clocks = Clocks(blocks, self.warps)
        self.copies = AsyncCopies(self.size)
        self.execution = Execution.of(function)
        self.memories: Memories
        self.special: dict[str, Array] = {}
        self.lane_steps = 0
        self.step_limit = 2_000_000
        self.most_steps = 0
        self._fixed_specials()

    # ---- lanes ----

    def lanes(self) -> Array:
        """The running lanes as numbers."""
        return self.all_lanes if isinstance(self.sel, slice) else self.sel

    def _fixed_specials(self) -> None:
        t, (x, y, _) = self.thread_of, self.block
        lane = (self.all_lanes % 32).astype(np.uint32)
        one = np.uint32(1)
        values: dict[str, Array] = {
            "tid.x": t % x,
            "tid.y": t // x % y,
            "tid.z": t // (x * y),
            "laneid": lane,
            "warpid": t // 32,
            "nwarpid": np.full_like(t, self.warps),
            "lanemask_eq": one << lane,
            "lanemask_lt": (one << lane) - one,
            "lanemask_le": ((one << lane) - one) | (one << lane),
        }
        values["lanemask_gt"] = ~values["lanemask_le"]
        values["lanemask_ge"] = ~values["lanemask_lt"]
        for axis, n, g in zip("xyz", self.block, self.grid, strict=True):
            values[f"ntid.{axis}"] = np.full_like(t, n)
            values[f"nctaid.{axis}"] = np.full_like(t, g)
            values[f"ctaid.{axis}"] = np.zeros_like(t)
        for name in ("smid", "nsmid", "clock", "clock_hi", "gridid"):
            values[name] = np.zeros_like(t)
        self.special = {k: v.astype(np.uint32) for k, v in values.items()}
        for name in ("clock64", "globaltimer"):
            self.special[name] = np.zeros(self.size, np.uint64)

    def start(self, first_block: int, end: int) -> None:
        """Begins a batch: block `first_block` of the grid and those after it, before `end`."""
        number = self.block_of + first_block
        gx, gy, _ = self.grid
        self.special["ctaid.x"][:] = number % gx
        self.special["ctaid.y"][:] = number // gx % gy
        self.special["ctaid.z"][:] = number // (gx * gy)
        self.pc[:] = 0
        absent = (number >= end) | (self.thread_of >= self.real_threads)
        self.state[:] = np.where(absent, EXITED, RUN)
        self.clocks.reset()
        self.copies.reset()
        self.memories.reset_batch()
        self.memories.first_block = first_block
        if self.memories.shared_races:
            self.memories.shared_races.reset()
        if self.memories.global_races:
            self.memories.global_races.first_block = first_block

    # ---- scheduling ----

    def run(self, blocks: dict[int, Block]) -> None:
        """Runs the batch until every lane has left or nobody can go on."""
        code_end = len(self.function.code)
        for taken in range(self.step_limit):
            ready = self.state == RUN
            if not ready.any():
                if not self._stuck():
                    self.most_steps = max(self.most_steps, taken)
                    return
                continue
            current = int(self.pc[ready].min())
            if current >= code_end:
                self.state[ready & (self.pc >= code_end)] = EXITED
                continue
            here = (self.pc == current) & (ready | (self.state == PARKED))
            count = int(np.count_nonzero(here))
            block = blocks[current]
            self.sel = EVERYONE if count == self.size else np.flatnonzero(here)
            if block.gate is not None:
                self._gather(block)
                count = len(self.lanes())
                if not count:
                    continue
            lanes = self.lanes()
            self.state[self.sel] = RUN
            self.pc[self.sel] = block.end
            warps = (
                self.size // 32
                if count == self.size
                else int(np.count_nonzero(np.diff(lanes >> 5))) + 1
            )
            self.execution.issued[block.start : block.end] += warps
            self.execution.lanes[block.start : block.end] += count
            self.lane_steps += count * (block.end - block.start)
            for step in block.steps:
                step()
            # Full slices are only valid while nobody has left or waits.
        else:
            raise PtxError(f"{self.function.name}: more than {self.step_limit} basic blocks ran")

    def _gather(self, block: Block) -> None:
        """Lets only those lanes pass whose partners of the warp instruction have all arrived."""
        assert block.gate is not None
        lanes = self.lanes()
        named, aligned = block.gate()
        everyone = isinstance(self.sel, slice)
        if everyone and isinstance(named, int) and named == FULL_MASK:
            return
        passing = np.zeros(0, np.int64)
        if block.gate_guard is not None:
            holds = block.gate_guard()
            passing, lanes = lanes[~holds], lanes[holds]
            named = named if isinstance(named, int) else named[holds]
            if not len(lanes):
                return
        mask = np.broadcast_to(np.asarray(named, np.uint64), lanes.shape)
        warp, bit = lanes // 32, np.uint64(1) << (lanes % 32).astype(np.uint64)
        outside = (mask & bit) == 0
        code = self.function.code[block.start]
        self.findings.at(code.line, code.text)
        self.report("sync mask without the executing lane", lanes[outside])
        total = self.size // 32
        arrived = np.bincount(warp, weights=bit.astype(np.float64), minlength=total)
        alive_lanes = np.flatnonzero(self.state != EXITED)
        alive_bits = (1 << (alive_lanes % 32)).astype(np.float64)
        alive = np.bincount(alive_lanes // 32, weights=alive_bits, minlength=total)
        alive_mask = alive.astype(np.uint64)
        missing = mask & alive_mask[warp] & ~arrived.astype(np.uint64)[warp]
        if aligned:
            gone = lanes[alive_mask[warp] != FULL_MASK]
            self.report("warp instruction with lanes that have exited", gone)
        parked = lanes[missing != 0]
        if not len(parked):
            return
        self.state[parked] = PARKED
        self.sel = np.sort(np.concatenate([passing, lanes[missing == 0]]))

    def report(self, kind: str, lanes: Array, detail: str = "") -> None:
        if len(lanes):
            block, thread = divmod(int(lanes[0]), self.threads)
            block += self.memories.first_block
            self.findings.add(kind, block, thread, 0, detail, len(lanes))

    def _stuck(self) -> bool:
        """Nobody is ready: reports why; True if some lanes were freed so that the run can end."""
        parked = np.flatnonzero(self.state == PARKED)
        waiting = np.flatnonzero(self.state == BARRIER)
        if not len(parked) and not len(waiting):
            return False
        if len(parked):
            code = self.function.code[int(self.pc[parked[0]])]
            self.findings.at(code.line, code.text)
            self.report("sync mask names lanes that never arrive", parked)
            self.state[parked] = EXITED
        if len(waiting):
            code = self.function.code[int(self.barrier_pc[waiting[0]])]
            self.findings.at(code.line, code.text)
            self.report("deadlock at a barrier", waiting, "others of the block never arrive")
            self.state[waiting] = EXITED
        return True

    # ---- barriers ----

    def arrive(self, pc: int, number: Array | int, count: Array | int, aligned: bool) -> None:
        """The running lanes wait at a barrier; count 0 means all of the block that are left."""
        lanes = self.lanes()
        self.barrier_id[self.sel] = number
        self.barrier_count[self.sel] = count
        self.barrier_pc[self.sel] = pc
        self.state[self.sel] = BARRIER
        if isinstance(self.sel, slice) and isinstance(count, int) and count == 0:
            self.clocks.barrier_all(np.arange(self.blocks))
            self.state[:] = RUN
            return
        self._release(np.unique(self.block_of[lanes]), aligned)

    def release_after_exit(self) -> None:
        """Lanes have left: blocks may be complete without them."""
        if (self.state == BARRIER).any():
            self._release(np.unique(self.block_of[self.state == BARRIER]), False)

    def _release(self, blocks: Array, aligned: bool) -> None:
        for block in blocks:
            here = slice(int(block) * self.threads, (int(block) + 1) * self.threads)
            waiting = self.state[here] == BARRIER
            for number in np.unique(self.barrier_id[here][waiting]):
                mine = waiting & (self.barrier_id[here] == number)
                wanted = int(self.barrier_count[here][mine].max())
                left = int(np.count_nonzero(self.state[here] != EXITED))
                if np.count_nonzero(mine) < (wanted or left):
                    continue
                lanes = np.flatnonzero(mine) + here.start
                self._check_aligned(lanes, aligned)
                self.clocks.barrier(int(block), np.unique(self.thread_of[lanes] // 32))
                self.state[lanes] = RUN

    def _check_aligned(self, lanes: Array, aligned: bool) -> None:
        """The lanes of a warp must meet at one and the same aligned barrier instruction."""
        if not aligned:
            return
        warp, pc = lanes // 32, self.barrier_pc[lanes]
        mixed = (warp[1:] == warp[:-1]) & (pc[1:] != pc[:-1])
        self.report("divergent barrier", lanes[1:][mixed], "lanes of a warp at different barriers")


def guard_step(machine: Machine, predicate: Array, negated: bool, step: Step, pc: int) -> Step:
    """Runs `step` with those running lanes for which the predicate holds."""
    counted = machine.execution.lanes

    def guarded() -> None:
        outer = machine.sel
        holds = predicate[outer]
        if negated:
            holds = ~holds
        n = int(np.count_nonzero(holds))
        counted[pc] -= len(holds) - n
        if n == len(holds):
            step()
        elif n:
            machine.sel = machine.lanes()[holds]
            step()
            machine.sel = outer

    return guarded


def leaders(code: list[Instruction], labels: dict[str, int], gates: set[int]) -> list[int]:
    """Where basic blocks begin: labels, behind control flow and barriers, warp instructions."""
    starts = {0, *labels.values(), *gates}
    for pc, instruction in enumerate(code):
        if instruction.op in ("bra", "brx", "ret", "exit", "trap", "bar", "barrier", "call"):
            starts.add(pc + 1)
    return sorted(s for s in starts if s < len(code))
