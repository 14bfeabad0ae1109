# SPDX-License-Identifier: Apache-2.0
"""What the machine can do, measured: fused multiply-adds a second and bytes a second."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

SECONDS = 0.25  # each measurement
STREAM_BYTES = 256 * 2**20  # beyond any cache


@dataclass(frozen=True)
class Roof:
    """``flops`` is None where the binary has no micro-kernel for that dtype on this machine."""

    flops: float | None
    bandwidth: float


def roof(isa: str, dtype: str) -> Roof:
    """Measure, with the threads that torch has now. Take the higher of two, as the run around them
    heats the machine up and others may use it: a roof is what was reached."""
    return Roof(_peak(isa, dtype), _bandwidth())


def higher(a: Roof, b: Roof) -> Roof:
    flops = [roof.flops for roof in (a, b) if roof.flops is not None]
    return Roof(max(flops, default=None), max(a.bandwidth, b.bandwidth))


def _peak(isa: str, dtype: str) -> float | None:
    try:
        from attnext import _C

        return float(_C.fma_peak(isa, dtype, SECONDS))
    except (AttributeError, ImportError, TypeError, ValueError, RuntimeError):
        return None


def _bandwidth() -> float:
    """Bytes a second of a copy far beyond the caches: one read and one write each."""
    source = torch.zeros(STREAM_BYTES, dtype=torch.uint8)
    target = torch.zeros_like(source)
    best = float("inf")
    start = time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        begin = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - begin)
    return 2 * STREAM_BYTES / best
