# SPDX-License-Identifier: Apache-2.0
"""Which mutants of a kernel its tests catch.

A test is a problem of cover.py or cover_routed.py with all that its run looks at. Of a mutant only
its own kernel is run first, on the memory that the launch found without it: where that leaves the
same bytes and nothing is found, the whole problem would say nothing either.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .executor import Program, Report
from .memory import Memory
from .mutate import Mutant, Outcome, apply, mutants
from .parser import PtxError
from .source import lone
from .words import Array

# Makes a problem and runs it with kernels from `find`; gives what run of problems.py does.
Recipe = Callable[[Callable[[str], Program]], tuple[set[str], list[Report]]]


@dataclass
class Launch:
    """One launch of the kernel: what it was given and what it left."""

    arguments: tuple[str, Any, Any, Any, int]
    memory: Memory  # before
    after: Array
    report: Report


class Watched:
    """A program that notes how its kernel is launched."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.launches: list[Launch] = []

    def launch(
        self, name: str, grid: Any, threads: Any, params: Any, shared: int, *, memory: Memory,
        **options: Any,
    ) -> Report:  # fmt: skip
        arguments = (name, grid, threads, params, shared)
        before = copy.deepcopy(memory)
        report = self.program.launch(*arguments, memory, **options)
        after = memory.space.data.copy()
        self.launches.append(Launch(arguments, before, after, report))
        return report


class Subject:
    """A kernel and what its problems do with it."""

    def __init__(self, kernel: str, recipes: dict[str, Recipe]) -> None:
        self.kernel, self.recipes = kernel, recipes
        self.program = lone(kernel)
        self.launches: dict[str, list[Launch]] = {}
        for name, recipe in recipes.items():
            watched: Any = Watched(self.program)
            wrong, _ = recipe(self._with(watched))
            assert not wrong, name
            if watched.launches:
                self.launches[name] = watched.launches
        executions = [x.report.execution for some in self.launches.values() for x in some]
        self.executed = np.any([e.executed() for e in executions], axis=0)

    def _with(self, program: Program) -> Callable[[str], Program]:
        """Where kernels are found: this one in `program`."""
        return lambda name: program if name == self.kernel else lone(name)

    def sample(self, count: int, seed: int) -> list[Mutant]:
        found = mutants(self.program.kernel(self.kernel), list(self.executed))
        random.Random(seed).shuffle(found)
        return found[:count]

    def catches(self, mutant: Mutant) -> bool:
        """Whether any problem tells the mutant from the kernel; the quick ones are asked first."""
        asked = [
            (launch.report.lane_instructions, name, launch)
            for name, some in self.launches.items()
            for launch in some
            if launch.report.execution.lanes[mutant.pc] or launch.report.execution.issued[mutant.pc]
        ]
        asked.sort(key=lambda x: x[0])
        return any(self._differs(mutant, name, launch) for _, name, launch in asked)

    def _differs(self, mutant: Mutant, name: str, launch: Launch) -> bool:
        limit = 3 * launch.report.steps + 1000
        mutated = apply(self.program, self.kernel, mutant, limit)
        memory = copy.deepcopy(launch.memory)
        try:
            report = mutated.launch(*launch.arguments, memory, metrics=False)
        except PtxError:
            return True
        if report.findings:
            return True
        if np.array_equal(memory.space.data[: len(launch.after)], launch.after):
            return False
        mutated.step_limit = 2_000_000
        wrong, _ = self.recipes[name](self._with(mutated))
        return bool(wrong)

    def run(self, count: int, seed: int = 0) -> Outcome:
        outcome = Outcome([], [])
        for mutant in self.sample(count, seed):
            (outcome.caught if self.catches(mutant) else outcome.survivors).append(mutant)
        return outcome
