# SPDX-License-Identifier: Apache-2.0
"""How much of the kernels that walk lists the problems of cover_routed.py execute, and that they
come out right; as test_coverage.py for windows."""

from __future__ import annotations

import pytest

from .cover import Variant
from .cover_routed import PROBLEMS
from .problems_routed import run
from .test_coverage import each_variant, executions_of, too_low

LEAST = 0.95


@pytest.mark.heavy
@each_variant
def test_most_instructions_are_executed(variant: Variant) -> None:
    executions = executions_of(run, PROBLEMS, variant)
    assert not too_low({k: e for k, e in executions.items() if k.startswith("routed")}, LEAST)
