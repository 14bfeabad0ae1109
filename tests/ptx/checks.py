# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a run, and who touched which byte when.

Order between threads is kept as a vector clock per warp: a barrier makes its participants know each
other's past, ``bar.warp.sync`` makes the lanes of one warp know each other's. Two accesses to one
granule, at least one of them a write, race unless the earlier is known to the later. Granules are
as wide as the narrowest access of the kernel, so no false sharing is reported.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .words import Array

NEVER = np.int32(2**31 - 1)  # the clock of a copy nobody has waited for
SEVERAL, COLLECTIVE = 32, 33  # reader "lanes": more than one lane; all lanes of an ldmatrix


@dataclass
class Finding:
    """One thing that is wrong; repeats of it at the same line are only counted."""

    kind: str
    kernel: str
    line: int
    text: str
    block: int
    thread: int
    address: int
    detail: str
    count: int = 1

    def __str__(self) -> str:
        return (
            f"{self.kind} in {self.kernel}, PTX line {self.line} ({self.text}), "
            f"block {self.block}, thread {self.thread}, address {self.address:#x}: "
            f"{self.detail} [{self.count} times]"
        )


@dataclass
class Findings:
    """Collects findings; the machine says where it stands before each instruction that can fail."""

    kernel: str = ""
    line: int = 0
    text: str = ""
    found: dict[tuple[str, int], Finding] = field(default_factory=dict)

    def at(self, line: int, text: str) -> None:
        self.line, self.text = line, text

    def add(
        self, kind: str, block: int, thread: int, address: int, detail: str, n: int = 1
    ) -> None:
        key = (kind, self.line)
        if key in self.found:
            self.found[key].count += n
        else:
            self.found[key] = Finding(
                kind, self.kernel, self.line, self.text, block, thread, address, detail, n
            )


class Clocks:
    """clock[block, w, v]: how much of warp v's past warp w knows; [w, w] is its own time."""

    def __init__(self, blocks: int, warps: int) -> None:
        self.now = np.zeros((blocks, warps, warps), np.int32)
        self.own = np.arange(warps)

    def reset(self) -> None:
        self.now[:] = 0

    def barrier_all(self, blocks: Array) -> None:
        """All warps of `blocks` met."""
        own = self.now[blocks][:, self.own, self.own] + 1
        self.now[blocks] = own[:, None, :]

    def barrier(self, block: int, warps: Array) -> None:
        self.now[block, warps, warps] += 1
        self.now[block, warps] = self.now[block, warps].max(axis=0)

    def warp_sync(self, blocks: Array, warps: Array) -> None:
        self.now[blocks, warps, warps] += 1


class AsyncCopies:
    """Which groups of cp.async each lane has committed and waited for, and when."""

    def __init__(self, lanes: int) -> None:
        self.committed = np.zeros(lanes, np.int32)
        self.done = np.full((lanes, 8), NEVER)

    def reset(self) -> None:
        self.committed[:] = 0
        self.done[:] = NEVER

    def commit(self, lanes: Array) -> None:
        self.committed[lanes] += 1
        if int(self.committed.max()) >= self.done.shape[1]:
            more = np.full_like(self.done, NEVER)
            self.done = np.concatenate([self.done, more], axis=1)

    def wait(self, lanes: Array, left: int, clock: Array, uncommitted: bool = False) -> None:
        """All but the last `left` groups of each lane are complete at `clock`."""
        groups = np.arange(self.done.shape[1])
        last = self.committed[lanes] - left + int(uncommitted)
        rows = self.done[lanes]
        finished = (groups < last[:, None]) & (rows == NEVER)
        self.done[lanes] = np.where(finished, clock[:, None], rows)


class SharedRaces:
    """Races on the shared memory of a batch of blocks. Threads are lanes of the batch."""

    def __init__(
        self, granules: int, blocks: int, threads: int, clocks: Clocks, copies: AsyncCopies
    ) -> None:
        self.clocks, self.copies, self.threads = clocks, copies, threads
        self.warps = threads // 32
        self.per_block = granules
        total = granules * blocks
        self.writer = np.zeros(total, np.int32)  # lane + 1
        self.written_at = np.zeros(total, np.int32)
        self.group = np.full(total, -1, np.int32)  # of an asynchronous write
        self.strong = np.zeros(total, bool)  # written by an atomic or a strong store
        self.read_at = np.zeros((self.warps, total), np.int32)  # clock + 1 of the reading warp
        self.reader = np.zeros((self.warps, total), np.int8)

    def reset(self) -> None:
        self.writer[:] = 0
        self.group[:] = -1
        self.read_at[:] = 0

    def _known(self, lanes: Array) -> tuple[Array, Array]:
        block, warp = lanes // self.threads, (lanes % self.threads) // 32
        return warp, self.clocks.now[block, warp]

    def _against_writer(
        self, lanes: Array, granules: Array, known: Array, anyone: bool, strong: bool
    ) -> tuple[Array, Array, Array]:
        """(race, early, writer): conflicts with the last write; `early`: a copy not waited for."""
        writer = self.writer[granules]
        if not writer.any():
            nothing = np.zeros(granules.shape, bool)
            return nothing, nothing, writer
        lane = np.maximum(writer - 1, 0)
        group = self.group[granules]
        when = self.written_at[granules]
        early = np.zeros(granules.shape, bool)
        if (group >= 0).any():
            done = self.copies.done[lane, np.maximum(group, 0)]
            when = np.where(group >= 0, done, when)
            early = (group >= 0) & (done == NEVER) & (writer > 0)
        knows = np.take_along_axis(known, (lane % self.threads) // 32, axis=1)
        other = (writer > 0) & (anyone | (writer != lanes[:, None] + 1))
        if strong:
            other &= ~self.strong[granules]
        return other & (knows <= when) & ~early, early, writer

    def read(
        self, lanes: Array, granules: Array, collective: bool, strong: bool
    ) -> list[tuple[str, Array, Array]]:
        warp, known = self._known(lanes)
        race, early, writer = self._against_writer(lanes, granules, known, collective, strong)
        found = [
            ("read-write race", race, writer),
            ("cp.async read before its wait", early, writer),
        ]
        if strong:  # later strong writes do not mind
            return found
        now = (known[np.arange(len(lanes)), warp] + 1)[:, None]
        w = warp[:, None]
        tag = np.full(granules.shape, COLLECTIVE, np.int8)
        if not collective:
            lane = np.broadcast_to((lanes % 32)[:, None], granules.shape)
            same_time = self.read_at[w, granules] == now
            earlier = self.reader[w, granules]
            clash = same_time & (earlier != lane)
            self.reader[w, granules] = lane
            clash |= self.reader[w, granules] != lane  # a broadcast within this instruction
            tag = np.where(clash, SEVERAL, lane).astype(np.int8)
            self.reader[w, granules] = tag
            tag = np.where(self.reader[w, granules] != tag, SEVERAL, tag).astype(np.int8)
        self.reader[w, granules] = tag
        self.read_at[w, granules] = now
        return found

    def write(
        self, lanes: Array, granules: Array, asynchronous: bool, strong: bool
    ) -> list[tuple[str, Array, Array]]:
        warp, known = self._known(lanes)
        race, early, writer = self._against_writer(lanes, granules, known, False, strong)
        read_at = self.read_at[:, granules]
        after_read = read_at > known.T[:, :, None]
        # Lanes of one warp that read since its last bar.warp.sync.
        mine = np.arange(self.warps)[:, None] == warp[None, :]
        if mine.any():
            lane = (lanes % 32)[None, :, None]
            reader = self.reader[:, granules]
            harmless = (reader == lane) | (reader == COLLECTIVE)
            after_read &= ~(mine[:, :, None] & harmless)
        unordered: Array = np.asarray(after_read.any(axis=0))
        culprit: Array = np.where(unordered, after_read.argmax(axis=0) * 32 + 1, 0)
        self.writer[granules] = (lanes + 1)[:, None]
        self.written_at[granules] = known[np.arange(len(lanes)), warp][:, None]
        self.group[granules] = self.copies.committed[lanes][:, None] if asynchronous else -1
        self.strong[granules] = strong
        return [
            ("write-write race", race, writer),
            ("write-read race", unordered, culprit),
            ("write into a pending cp.async", early, writer),
        ]


class GlobalRaces:
    """Races on global memory between blocks, and within a block by the same clocks.

    Of the readers of a granule only the last is kept, and whether several blocks read it. Atomics
    and strong (volatile, relaxed, acquire, release) accesses do not race with each other.
    """

    def __init__(self, granules: int, threads: int, clocks: Clocks) -> None:
        self.clocks, self.threads = clocks, threads
        self.first_block = 0
        self.writer = np.zeros(granules, np.int64)  # thread of the grid + 1
        self.strong = np.zeros(granules, bool)
        self.written_at = np.zeros(granules, np.int32)
        self.reader = np.zeros(granules, np.int64)
        self.read_at = np.zeros(granules, np.int32)
        self.many = np.zeros(granules, bool)  # read by several blocks

    def _who(self, lanes: Array) -> tuple[Array, Array, Array]:
        block = lanes // self.threads
        warp = (lanes % self.threads) // 32
        thread = lanes + self.first_block * self.threads
        return thread, block + self.first_block, self.clocks.now[block, warp]

    def _unordered(self, thread: Array, known: Array, other: Array, when: Array) -> Array:
        """Whether an access of thread `other` - 1 at `when` is unknown to `thread`."""
        there = other > 0
        before = np.maximum(other - 1, 0)
        same_block = before // self.threads == (thread // self.threads)[:, None]
        knows = np.take_along_axis(known, (before % self.threads) // 32, axis=1)
        return there & (before != thread[:, None]) & ~(same_block & (knows > when))

    def read(self, lanes: Array, granules: Array, strong: bool) -> list[tuple[str, Array, Array]]:
        thread, block, known = self._who(lanes)
        writer = self.writer[granules]
        race = np.zeros(granules.shape, bool)
        if writer.any():
            race = self._unordered(thread, known, writer, self.written_at[granules])
            if strong:
                race &= ~self.strong[granules]
        reader = self.reader[granules]
        elsewhere = (reader > 0) & ((reader - 1) // self.threads != block[:, None])
        self.many[granules] |= elsewhere
        self.reader[granules] = (thread + 1)[:, None]
        self.many[granules] |= (self.reader[granules] - 1) // self.threads != block[:, None]
        warp = (lanes % self.threads) // 32
        self.read_at[granules] = known[np.arange(len(lanes)), warp][:, None]
        return [("global read-write race", race, writer)]

    def write(self, lanes: Array, granules: Array, strong: bool) -> list[tuple[str, Array, Array]]:
        thread, _, known = self._who(lanes)
        writer = self.writer[granules]
        race = np.zeros(granules.shape, bool)
        if writer.any():
            race = self._unordered(thread, known, writer, self.written_at[granules])
            if strong:
                race &= ~self.strong[granules]
        reader = self.reader[granules]
        unordered = np.zeros(granules.shape, bool)
        if not strong:
            unordered = self._unordered(thread, known, reader, self.read_at[granules])
            unordered |= self.many[granules]
        warp = (lanes % self.threads) // 32
        self.writer[granules] = (thread + 1)[:, None]
        if not strong:  # two blocks in one instruction: the later one in the array won
            lost = self.writer[granules] != (thread + 1)[:, None]
            race |= lost
            writer = np.where(lost, self.writer[granules], writer)
        self.written_at[granules] = known[np.arange(len(lanes)), warp][:, None]
        self.strong[granules] = strong
        return [
            ("global write-write race", race, writer),
            ("global write-read race", unordered, reader),
        ]
