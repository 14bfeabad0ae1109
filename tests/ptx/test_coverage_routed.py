# SPDX-License-Identifier: Apache-2.0
"""How much of the kernels that walk lists the problems of cover_routed.py execute, and that they
come out right; as test_coverage.py for windows."""

from __future__ import annotations

import pytest

from .cover import Variant, unexplained
from .cover_routed import PROBLEMS, REASONS
from .problems_routed import run
from .test_coverage import LEAST, each_variant, executions_of, too_low


@pytest.mark.heavy
@each_variant
def test_nearly_every_instruction_is_executed(variant: Variant) -> None:
    executions = executions_of(run, PROBLEMS, variant)
    executions = {k: e for k, e in executions.items() if k.startswith("routed")}
    low = too_low(executions, LEAST)
    left = {k: unexplained(k, e, REASONS) for k, e in executions.items()}
    assert not any(left.values()), "\n".join(f"{k}: {x}" for k, some in left.items() for x in some)
    assert not low
