# SPDX-License-Identifier: Apache-2.0
"""Bugs planted in attnext's CUDA kernels: each must be caught, and by what it should be.

Each runs through the public function, on a problem that is right without it.
"""

from __future__ import annotations

import functools

import pytest

from . import problems
from .executor import Program, Report
from .planted import BUGS, CONFLICTS, Bug, problem
from .source import header_with, lone


def symptoms(name: str, bug: Bug | None = None) -> set[str]:
    """What is said of a problem with a bug in one kernel."""

    def find(kernel: str) -> Program:
        return lone(kernel, *bug.edits) if bug and kernel == bug.kernel else lone(kernel)

    wrong, reports = problems.run(problem(name), find, metrics=name == "wide rows")
    if bug:
        assert any(r.kernel == bug.kernel for r in reports), [r.kernel for r in reports]
    return wrong | looks(name, reports)


def looks(name: str, reports: list[Report]) -> set[str]:
    """What only the counters tell, of the forward pass."""
    first = reports[0]
    said = set()
    if first.conflicts_over_ideal() > 1.2:
        said.add(CONFLICTS)
    if name != "infinite" and first.lane_instructions > 4e6:
        said.add("one-row path")
    return said


def test_the_list_fits_the_sources() -> None:
    assert len(BUGS) >= 20 and len({bug.name for bug in BUGS}) == len(BUGS)
    for bug in BUGS:
        for edit in bug.edits:
            header_with(edit)


@functools.lru_cache(maxsize=None)
def said_without_bug(name: str) -> frozenset[str]:
    return frozenset(symptoms(name))


@pytest.mark.parametrize("name", sorted({bug.problem for bug in BUGS}))
def test_nothing_is_said_without_a_bug(name: str) -> None:
    assert not said_without_bug(name)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_caught(bug: Bug) -> None:
    assert bug.symptom in symptoms(bug.problem, bug)
