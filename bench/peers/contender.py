# SPDX-License-Identifier: Apache-2.0
"""What a contender is, and how one is chosen among its own variants."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

from ..cases import Case
from ..problem import Prepared, Problem, Unavailable

HOPELESS = 1.5  # times the best so far


class Contender(ABC):
    """Someone who solves cases."""

    name: str
    about: str
    #: False: solves the case without its window, to show what the window saves. It is then held
    #: against that other problem, and its figures are marked.
    windowed: bool = True
    #: What it has a form for.
    ops: tuple[str, ...] = ("sliding", "neighborhood", "window")

    def is_meant_for(self, case: Case) -> bool:
        """Whether to be listed at all; what fails later is listed with the reason."""
        return True

    @abstractmethod
    def prepare(self, problem: Problem, training: bool) -> Prepared:
        """Do all that is done once. Errors: Unavailable, with the reason."""


def fastest(
    variants: Iterable[tuple[str, Callable[[], Prepared]]], problem: Problem, training: bool
) -> Prepared:
    """The variant whose single call is fastest; its name becomes the detail of the result.

    Two rounds, so that one disturbance does not decide; those far behind drop out after one.
    Errors: Unavailable, with the last reason, if every variant is.
    """
    best: dict[str, float] = {}
    ready: dict[str, Prepared] = {}
    reason: Unavailable | None = None
    for name, make in variants:
        try:
            prepared = make()
        except Unavailable as unavailable:
            reason = unavailable
            continue
        if training:
            prepared = prepared.arm(problem.output_grad)
        seconds = _seconds(prepared)
        if seconds > HOPELESS * min(best.values(), default=seconds):
            continue
        best[name], ready[name] = seconds, prepared
    if not best:
        raise reason or Unavailable("has no variant for this case")
    for name, prepared in ready.items():
        best[name] = min(best[name], _seconds(prepared))
    name = min(best, key=lambda name: best[name])
    chosen = ready[name]
    detail = ", ".join(filter(None, (name, chosen.detail)))
    return Prepared(chosen.call, chosen.leaves, chosen.layouts, detail)


def _seconds(prepared: Prepared) -> float:
    prepared.step()
    start = time.perf_counter()
    prepared.step()
    return time.perf_counter() - start
