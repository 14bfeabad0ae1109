# SPDX-License-Identifier: Apache-2.0
"""Wall time of several calls, taken in turn: A B C A B C ..., in one process.

Whatever slows the machine down for a while then slows all of them. A call's output is allocated
inside its timing and freed outside. Quick calls are repeated within a sample, slow ones appear in
fewer rounds, spread over the whole run.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

SAMPLE = 2e-3  # seconds that a sample lasts at least: the clock and the loop then cost nothing
FEWEST = 5  # samples below which a median and its spread say little


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the samples, and what they come to."""

    median: float
    q25: float
    q75: float
    minimum: float
    n: int
    inner: int  # calls a sample
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: list[float], inner: int) -> Timing:
        """Summarise. Quartiles are those of the samples themselves (inclusive method)."""
        if len(samples) > 1:
            q25, _, q75 = statistics.quantiles(samples, n=4, method="inclusive")
        else:
            q25 = q75 = samples[0]
        kept = tuple(float(f"{sample:.6g}") for sample in samples)
        return cls(statistics.median(samples), q25, q75, min(samples), len(samples), inner, kept)

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    budget: float,
    on_round: Callable[[int], None] = lambda r: None,
) -> dict[str, Timing]:
    """Time every call in ``rounds`` rounds, or in as many as its share of ``budget`` allows.

    Args: budget in seconds for all calls together; a call that would use more than its equal share
        takes part in every second, third, ... round, but in ``FEWEST`` at least.
    """
    plan: dict[str, tuple[int, int]] = {}
    for name, call in calls.items():
        estimate = _warm(call)
        inner = max(1, math.ceil(SAMPLE / estimate))
        affordable = int(budget / len(calls) / (estimate * inner))
        plan[name] = inner, min(rounds, max(FEWEST, affordable))

    samples: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for r in range(rounds):
            for name, call in calls.items():
                inner, n = plan[name]
                if (r + 1) * n // rounds > r * n // rounds:
                    samples[name].append(_sample(call, inner))
            gc.collect()
            on_round(r + 1)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing.of(samples[name], plan[name][0]) for name in calls}


def _warm(call: Callable[[], object]) -> float:
    """Call until caches, allocator and threads have settled; seconds of the quickest call."""
    best = math.inf
    start = time.perf_counter()
    for _ in range(100):
        best = min(best, _sample(call, 1))
        if time.perf_counter() - start > 0.1:
            break
    return best


def _sample(call: Callable[[], object], inner: int) -> float:
    if inner == 1:
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
        del result  # a big output is unmapped here, outside the timing
        return seconds
    repeat = range(inner)
    start = time.perf_counter()
    for _ in repeat:
        call()
    return (time.perf_counter() - start) / inner
