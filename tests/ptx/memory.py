# SPDX-License-Identifier: Apache-2.0
"""Memory that checks: one arena for global memory, one array each for shared and local memory.

Every byte has a shadow that says whether it was written. Buffers of the arena stand apart by a
guard gap, so an access that leaves its buffer hits none. A failed access is reported and skipped:
a load gives zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .checks import Findings, GlobalRaces, SharedRaces
from .metrics import Traffic
from .parser import PtxError
from .words import UNSIGNED, Array

ARENA = 0x7_0000_0000
SHARED_WINDOW = 0x7E00_0000_0000
LOCAL_WINDOW = 0x7F00_0000_0000
WINDOW_BYTES = 0x0080_0000_0000
GUARD = 4096
ALIGN = 256
_COUNT = np.arange(64)
_EVERY: Array = np.array(True)
_ALL_WRITTEN = {n: UNSIGNED[n].type(int("01" * n, 16)) for n in (1, 2, 4, 8)}


class Space:
    """Bytes with shadows; offsets into `data` come here resolved and in bounds."""

    def __init__(self, size: int, granule: int = 4) -> None:
        size = -(-size // 16) * 16
        self.data = np.zeros(size, np.uint8)
        self.written = np.zeros(size, np.uint8)
        self.granule = granule
        self.races: Any = None

    def units(self, offsets: Array, width: int, count: int) -> Array:
        """[lanes, count] indices of words of `width` bytes."""
        units = (offsets >> (width.bit_length() - 1))[
            :, None
        ]  # a division takes many times as long
        return units if count == 1 else units + _COUNT[:count]

    def load(self, offsets: Array, width: int, count: int) -> tuple[Array, Array]:
        """(words [lanes, count], whether all bytes of a word were written)."""
        units = self.units(offsets, width, count)
        words = self.data.view(UNSIGNED[width])[units]
        return words, self.written.view(UNSIGNED[width])[units] == _ALL_WRITTEN[width]

    def store(self, offsets: Array, values: Array, width: int) -> Array:
        """Stores words [lanes, count]; gives where another lane's different word won."""
        units = self.units(offsets, width, values.shape[1])
        words = self.data.view(UNSIGNED[width])
        words[units] = values
        self.written.view(UNSIGNED[width])[units] = _ALL_WRITTEN[width]
        return words[units] != values

    def granules(self, offsets: Array, size: int) -> Array:
        """[lanes, k] indices of the granules that `size` bytes at each offset cover."""
        return self.units(offsets, self.granule, max(1, size // self.granule))


@dataclass
class Buffer:
    """A named range of the arena."""

    memory: Memory
    name: str
    address: int
    size: int
    writable: bool

    @property
    def _slice(self) -> slice:
        start = self.address - ARENA
        return slice(start, start + self.size)

    def array(self, dtype: DTypeLike = np.uint8, shape: tuple[int, ...] = (-1,)) -> Array:
        """A copy of the contents."""
        return self.memory.space.data[self._slice].copy().view(dtype).reshape(shape)

    def written(self, dtype: DTypeLike = np.uint8, shape: tuple[int, ...] = (-1,)) -> Array:
        """Which elements have all their bytes written."""
        width = np.dtype(dtype).itemsize
        shadow = self.memory.space.written[self._slice].reshape(-1, width)
        return shadow.astype(bool).all(axis=1).reshape(shape)

    def set_written(self, mask: Array) -> None:
        """One flag a byte: marks padding as unwritten, so that a read of it is reported."""
        self.memory.space.written[self._slice] = np.asarray(mask, np.uint8).reshape(-1)


class Memory:
    """Global memory: registered buffers in one arena."""

    def __init__(self) -> None:
        self.space = Space(1 << 16)
        self.buffers: list[Buffer] = []
        self.end = GUARD
        self.starts = np.zeros(0, np.int64)
        self.ends = np.zeros(0, np.int64)
        self.writable = np.zeros(0, bool)

    def allocate(
        self,
        name: str,
        size: int,
        *,
        fill: int = 0xFF,
        written: bool = False,
        writable: bool = True,
    ) -> Buffer:
        """`size` bytes of `fill` (0xFF reads as NaN in every float type), unwritten by default."""
        start = -(-self.end // ALIGN) * ALIGN
        self.end = start + size + GUARD
        if self.end > self.space.data.size:
            grown = Space(max(2 * self.space.data.size, self.end + GUARD))
            grown.data[: self.space.data.size] = self.space.data
            grown.written[: self.space.data.size] = self.space.written
            self.space = grown
        self.space.data[start : start + size] = fill
        self.space.written[start : start + size] = written
        buffer = Buffer(self, name, ARENA + start, size, writable)
        self.buffers.append(buffer)
        self.starts = np.append(self.starts, start)
        self.ends = np.append(self.ends, start + size)
        self.writable = np.append(self.writable, writable)
        return buffer

    def buffer(self, name: str, values: ArrayLike, *, writable: bool = True) -> Buffer:
        """A buffer that holds `values`."""
        raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        made = self.allocate(name, raw.size, written=True, writable=writable)
        self.space.data[made._slice] = raw
        return made

    def inside(self, offsets: Array, size: Array | int, write: bool) -> Array:
        """Which accesses lie in one buffer (and may write there)."""
        if not self.buffers:
            return np.zeros(len(offsets), bool)
        k = np.searchsorted(self.starts, offsets, "right") - 1
        ok = (k >= 0) & (offsets + size <= self.ends[k])
        if write:
            ok &= self.writable[k]
        return ok

    def holder(self, first: int, end: int) -> Buffer | None:
        """The buffer that has all of a range."""
        k = int(self.starts.searchsorted(first, "right")) - 1
        return self.buffers[k] if k >= 0 and end <= self.ends[k] else None

    def describe(self, offset: int) -> str:
        """The buffer an offset of the arena is in or nearest above."""
        k = int(np.searchsorted(self.starts, offset, "right")) - 1
        if k < 0:
            return "below every buffer"
        found = self.buffers[k]
        return f"{found.name} + {offset - int(self.starts[k])} of {found.size} bytes"


class Memories:
    """All that the lanes of a batch can address."""

    def __init__(
        self,
        memory: Memory,
        findings: Findings,
        traffic: Traffic,
        threads: int,
        lanes: int,
        shared_bytes: int,
        local_bytes: int,
        granule: int,
    ) -> None:
        self.memory, self.findings, self.traffic = memory, findings, traffic
        self.threads, self.shared_bytes, self.local_bytes = threads, shared_bytes, local_bytes
        self.stride = -(-max(shared_bytes, 16) // 16) * 16
        self.shared = Space(self.stride * (lanes // threads), granule)
        self.local_stride = -(-max(local_bytes, 16) // 16) * 16
        self.local = Space(self.local_stride * lanes)
        self.first_block = 0
        self.constant = False  # the last access was to what no launch can write: it cannot race
        self.shared_races: SharedRaces | None = None
        self.global_races: GlobalRaces | None = None

    def reset_batch(self) -> None:
        for space in (self.shared, self.local):
            space.data[:] = 0xFF
            space.written[:] = 0

    def report(self, kind: str, lanes: Array, addresses: Array, bad: Array, detail: str) -> None:
        """Reports the first of the `bad` lanes."""
        if not bad.any():
            return
        first = int(np.flatnonzero(bad)[0])
        block, thread = divmod(int(lanes[first]), self.threads)
        self.findings.add(
            kind, block + self.first_block, thread, int(addresses[first]), detail, int(bad.sum())
        )

    def resolve(
        self, space: str, lanes: Array, addresses: Array, size: Array | int, align: int, write: bool
    ) -> tuple[Array, Array]:
        """(offsets into the space, which lanes may go on); the others are reported."""
        self.constant = False
        if isinstance(size, int) and len(addresses):
            offsets = self._resolve_all(space, lanes, addresses, size, align, write)
            if offsets is not None:
                return offsets, _EVERY
        misaligned = addresses % np.uint64(align) != 0
        self.report(f"misaligned {space} access", lanes, addresses, misaligned, f"needs {align}")
        if space == "global":
            offsets = addresses.astype(np.int64) - ARENA
            inside = self.memory.inside(offsets, size, write)
        elif space == "shared":
            inside = addresses + np.asarray(size, np.uint64) <= self.shared_bytes
            offsets = addresses.astype(np.int64) + lanes // self.threads * self.stride
        else:
            inside = addresses + np.asarray(size, np.uint64) <= self.local_bytes
            offsets = addresses.astype(np.int64) + lanes * self.local_stride
        if not inside.all():
            first = int(np.flatnonzero(~inside)[0])
            where = f"{self.shared_bytes if space == 'shared' else self.local_bytes} bytes there"
            if space == "global":
                where = self.memory.describe(int(offsets[first]))
            word = "write" if write else "read"
            self.report(f"{space} {word} out of bounds", lanes, addresses, ~inside, where)
        return offsets, inside & ~misaligned

    def _resolve_all(
        self, space: str, lanes: Array, addresses: Array, size: int, align: int, write: bool
    ) -> Array | None:
        """The offsets, if nothing is wrong with any: nearly always so, and found in few steps."""
        if int(np.bitwise_or.reduce(addresses)) & (align - 1):
            return None
        first, end = int(addresses.min()), int(addresses.max()) + size
        if space == "global":
            buffer = self.memory.holder(first - ARENA, end - ARENA)
            if buffer is None or (write and not buffer.writable):
                return None
            self.constant = not buffer.writable
            return addresses.view(np.int64) - ARENA
        if end > (self.shared_bytes if space == "shared" else self.local_bytes):
            return None
        if space == "shared":
            return addresses.view(np.int64) + lanes // self.threads * self.stride
        return addresses.view(np.int64) + lanes * self.local_stride

    def _space(self, space: str) -> Space:
        return {"global": self.memory.space, "shared": self.shared, "local": self.local}[space]

    def _races(self, found: list[tuple[str, Array, Array]], lanes: Array, where: Array) -> None:
        for kind, bad, other in found:
            if bad.any():
                row, column = (int(x[0]) for x in np.nonzero(bad))
                block, thread = divmod(int(other[row, column]) - 1, self.threads)
                shown = f"with block {block}, thread {thread}"
                if not kind.startswith("global"):
                    shown = f"with thread {thread} of the block"
                self.report(kind, lanes, where, np.asarray(bad.any(axis=1)), shown)

    def generic(self, addresses: Array) -> list[tuple[str, Array, int]]:
        """Splits generic addresses into (space, which, base)."""
        shared = (addresses >= SHARED_WINDOW) & (addresses < SHARED_WINDOW + WINDOW_BYTES)
        local = (addresses >= LOCAL_WINDOW) & (addresses < LOCAL_WINDOW + WINDOW_BYTES)
        parts = [("shared", shared, SHARED_WINDOW), ("local", local, LOCAL_WINDOW)]
        return [("global", ~(shared | local), 0), *parts]

    def load(
        self,
        space: str,
        lanes: Array,
        addresses: Array,
        width: int,
        count: int,
        *,
        strong: bool = False,
        collective: bool = False,
    ) -> Array:
        """Words [lanes, count] of `width` bytes, zeros where the access is not allowed."""
        if space == "generic":
            result = np.zeros((len(lanes), count), UNSIGNED[width])
            for part, which, base in self.generic(addresses):
                if which.any():
                    there = addresses[which] - np.uint64(base)
                    result[which] = self.load(part, lanes[which], there, width, count)
            return result
        size = width * count
        offsets, ok = self.resolve(space, lanes, addresses, size, size, False)
        if not ok.all():
            result = np.zeros((len(lanes), count), UNSIGNED[width])
            if ok.any():
                result[ok] = self._load(
                    space, lanes[ok], addresses[ok], offsets[ok], width, count, strong, collective
                )
            return result
        return self._load(space, lanes, addresses, offsets, width, count, strong, collective)

    def _load(
        self,
        space: str,
        lanes: Array,
        addresses: Array,
        offsets: Array,
        width: int,
        count: int,
        strong: bool,
        collective: bool,
    ) -> Array:
        target = self._space(space)
        words, written = target.load(offsets, width, count)
        if not written.all():
            bad = np.asarray(~written.all(axis=1))
            where = ""
            if space == "global":
                where = self.memory.describe(int(offsets[np.flatnonzero(bad)[0]]))
            self.report(f"read of unwritten {space} memory", lanes, addresses, bad, where)
        self.track(space, lanes, addresses, offsets, width * count, False, strong, collective)
        return words

    def track(
        self,
        space: str,
        lanes: Array,
        addresses: Array,
        offsets: Array,
        size: int,
        write: bool,
        strong: bool = False,
        collective: bool = False,
        asynchronous: bool = False,
    ) -> None:
        """Counts the traffic of an access and looks for races."""
        if space == "local":
            return
        self.traffic.add(space, lanes, addresses, size)
        if space == "shared" and self.shared_races:
            granules = self.shared.granules(offsets, size)
            if write:
                found = self.shared_races.write(lanes, granules, asynchronous, strong)
            else:
                found = self.shared_races.read(lanes, granules, collective, strong)
            self._races(found, lanes, addresses)
        elif space == "global" and self.global_races and not self.constant:
            granules = self.memory.space.granules(offsets, size)
            tracker = self.global_races
            call = tracker.write if write else tracker.read
            self._races(call(lanes, granules, strong), lanes, addresses)

    def store(
        self,
        space: str,
        lanes: Array,
        addresses: Array,
        values: Array,
        width: int,
        *,
        strong: bool = False,
        asynchronous: bool = False,
    ) -> None:
        """Stores words [lanes, count] where allowed."""
        if space == "generic":
            for part, which, base in self.generic(addresses):
                if which.any():
                    there = addresses[which] - np.uint64(base)
                    self.store(part, lanes[which], there, values[which], width, strong=strong)
            return
        size = width * values.shape[1]
        offsets, ok = self.resolve(space, lanes, addresses, size, size, True)
        if not ok.all():
            lanes, addresses, offsets, values = (x[ok] for x in (lanes, addresses, offsets, values))
            if not len(lanes):
                return
        self.track(
            space, lanes, addresses, offsets, size, True, strong, False, asynchronous=asynchronous
        )
        lost = self._space(space).store(offsets, values, width)
        if lost.any():
            kind = f"two lanes of one {space} store write different values"
            self.report(kind, lanes, addresses, np.asarray(lost.any(axis=1)), "the same address")

    def atomic(
        self, space: str, lanes: Array, addresses: Array, width: int
    ) -> tuple[Space, Array, Array]:
        """(space, offsets, which lanes) of a read-modify-write, checked and tracked."""
        if space == "generic":
            kinds = [k for k in self.generic(addresses) if k[1].any()]
            if len(kinds) != 1:
                raise PtxError("an atomic instruction whose lanes address several spaces")
            space, _, base = kinds[0]
            addresses = addresses - np.uint64(base)
        offsets, ok = self.resolve(space, lanes, addresses, width, width, True)
        ok = np.broadcast_to(ok, lanes.shape)
        if ok.any():
            target = self._space(space)
            _, written = target.load(offsets[ok], width, 1)
            self.report(
                f"read of unwritten {space} memory", lanes[ok], addresses[ok], ~written[:, 0], ""
            )
            self.track(space, lanes[ok], addresses[ok], offsets[ok], width, True, strong=True)
        return self._space(space), offsets, ok
