# SPDX-License-Identifier: Apache-2.0
"""How much of the kernels that walk lists the problems of cover_routed.py execute, and that they
come out right; as test_coverage.py for windows."""

from __future__ import annotations

import pytest
import torch

from .cover import Variant
from .cover_routed import PROBLEMS
from .metrics import Execution
from .problems_routed import run
from .test_coverage import SWEEP, count

BF16, FP32 = torch.bfloat16, torch.float32
LEAST = 0.8


@pytest.mark.heavy
@pytest.mark.parametrize(
    "variant",
    [
        Variant(BF16, False),
        Variant(BF16, True),
        pytest.param(Variant(FP32, True), marks=SWEEP),
        *(
            pytest.param(Variant(dtype, modified, bucket), marks=SWEEP)
            for dtype, modified in ((BF16, False), (BF16, True), (FP32, True))
            for bucket in (64, 128, 256)
        ),
    ],
    ids=lambda v: f"{str(v.dtype)[6:]}_{v.bucket}{'_modified' if v.modified else ''}",
)
def test_most_instructions_are_executed(variant: Variant) -> None:
    executions: dict[str, Execution] = {}
    for name, make in PROBLEMS.items():
        wrong, reports = run(make(variant), metrics=False)
        assert not wrong, (name, wrong)
        for report in reports:
            count(executions, report)
    executions = {k: e for k, e in executions.items() if k.startswith("routed")}
    for kernel, execution in executions.items():
        print(f"{kernel:40} {len(execution.lanes):6} {execution.coverage():8.2%}")
    low = {k: e.coverage() for k, e in executions.items() if e.coverage() < LEAST}
    assert not low
