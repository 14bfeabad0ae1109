# SPDX-License-Identifier: Apache-2.0
"""Blocks that an SM holds at once, from what a kernel takes and what an architecture has.

Source: CUDA C++ Programming Guide, "Compute Capabilities", technical specifications per compute
capability; the granularities and the reserved shared memory are those of NVIDIA's
``cuda_occupancy.h``, against which the tests hold this file.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
SUBPARTITIONS = 4  # of an SM, each with its own scheduler and a quarter of the registers
REGISTER_UNIT = 256  # registers, allocated per warp
SHARED_UNIT = 128  # bytes
RESERVED = 1024  # bytes of shared memory that the system takes per block
MAX_REGISTERS = 255  # per thread
MAX_THREADS = 1024  # per block


@dataclass(frozen=True)
class Limits:
    """What one SM has."""

    registers: int
    shared: int  # bytes
    threads: int
    blocks: int

    @property
    def shared_per_block(self) -> int:
        """Static and dynamic bytes that one block may have."""
        return self.shared - RESERVED


LIMITS = {
    80: Limits(registers=65536, shared=164 * 1024, threads=2048, blocks=32),
    86: Limits(registers=65536, shared=100 * 1024, threads=1536, blocks=16),
    89: Limits(registers=65536, shared=100 * 1024, threads=1536, blocks=24),
    90: Limits(registers=65536, shared=228 * 1024, threads=2048, blocks=32),
    100: Limits(registers=65536, shared=228 * 1024, threads=2048, blocks=32),
    120: Limits(registers=65536, shared=100 * 1024, threads=1536, blocks=24),
}  # fmt: skip


@dataclass(frozen=True)
class Occupancy:
    """``by`` names all that allow no more blocks: registers, shared memory, warps or blocks."""

    blocks: int
    by: tuple[str, ...]
    share: float  # of the warps the SM could hold


def occupancy(arch: int, *, registers: int, threads: int, shared: int) -> Occupancy:
    """`registers` per thread; `threads` and `shared` (bytes, static and dynamic) per block."""
    limits = LIMITS[arch]
    warps = _up(threads, WARP) // WARP
    allowed = {
        "registers": _by_registers(limits, registers, warps),
        "shared memory": _by_shared(limits, shared),
        "warps": limits.threads // WARP // warps if threads <= MAX_THREADS else 0,
        "blocks": limits.blocks,
    }
    blocks = min(allowed.values())
    by = tuple(name for name, n in allowed.items() if n == blocks)
    return Occupancy(blocks, by, blocks * warps * WARP / limits.threads)


def _by_registers(limits: Limits, registers: int, warps: int) -> int:
    per_warp = _up(max(registers, 1) * WARP, REGISTER_UNIT)
    # A launch is checked as if its warps were a multiple of the subpartitions.
    if registers > MAX_REGISTERS or per_warp * _up(warps, SUBPARTITIONS) > limits.registers:
        return 0
    per_subpartition = limits.registers // SUBPARTITIONS // per_warp
    return per_subpartition * SUBPARTITIONS // warps


def _by_shared(limits: Limits, shared: int) -> int:
    if shared > limits.shared_per_block:
        return 0
    return limits.shared // _up(shared + RESERVED, SHARED_UNIT)


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
