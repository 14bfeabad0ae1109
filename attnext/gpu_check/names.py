# SPDX-License-Identifier: Apache-2.0
"""All problems of windows and lists, by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

from .problems import WINDOWS, Problem
from .routed import ROUTED

PROBLEMS: Mapping[str, Problem] = {**WINDOWS, **ROUTED}


def names(patterns: list[str], dtypes: list[str]) -> list[str]:
    """``problem/dtype`` for all problems that match one of the patterns (all, without any).

    Errors: ValueError for a pattern that fits nothing.
    """
    chosen: set[str] = set()
    for pattern in patterns or ["*"]:
        fitting = fnmatch.filter(PROBLEMS, pattern)
        if not fitting:
            raise ValueError(f"no problem is called {pattern!r}; --list names them")
        chosen.update(fitting)
    return [f"{name}/{dtype}" for name in PROBLEMS if name in chosen for dtype in dtypes]
