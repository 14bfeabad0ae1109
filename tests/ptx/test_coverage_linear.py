# SPDX-License-Identifier: Apache-2.0
"""How much of the kernels of linear attention the problems of cover_linear.py execute, and that
they come out right; as test_coverage.py for windows. That of a step is in test_linear_step.py."""

from __future__ import annotations

import pytest
import torch

from .cover import unexplained
from .cover_linear import PROBLEMS, REASONS, run
from .test_coverage import LEAST, executions_of, too_low

# Of kernels that are one template those of one bucket.
COVERED = (
    "scan_{}_32", "scan_{}_32_gated", "scan_{}_32_delta", "scan_{}_32_delta_back", "scan_{}_taylor",
    "scan_{}_taylor_gated", "scan_{}_fold", "scan_{}_taylor_wide", "scan_{}_fold_wide",
    "numbers_{}", "fold_{}", "combine", "decay_gradient",
)  # fmt: skip


@pytest.mark.heavy
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.sweep)], ids=str
)
def test_nearly_every_instruction_is_executed(dtype: torch.dtype) -> None:
    executions = executions_of(run, PROBLEMS, dtype)
    short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    names = ["linear_" + name.format(short) for name in COVERED]
    low = too_low({name: executions[name] for name in names}, LEAST)
    low = {name: x for name, x in low.items() if "scan" in name}  # others: mostly divisions
    left = {name: unexplained(name, executions[name], REASONS) for name in names}
    assert not any(left.values()), "\n".join(f"{k}: {x}" for k, some in left.items() for x in some)
    assert not low
