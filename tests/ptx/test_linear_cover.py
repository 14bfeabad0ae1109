# SPDX-License-Identifier: Apache-2.0
"""How much of the scans of linear attention a few problems execute.

The figures are printed (pytest -s). What is not executed is of features of a scan that these kinds
do not have, as is said in REASONS.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from . import cover
from .cover import Reason
from .lanes import leaders
from .linear import on_executor
from .metrics import Execution
from .test_coverage import LEAST, count
from .test_linear import evaluate, form, linear_attention

BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16

# Problems by the kernels that they are for.
DELTA: list[dict[str, Any]] = [
    {"tokens": 130, "dim": 32, "dim_v": 32},
    {"tokens": 97, "dim": 31, "dim_v": 24, "form": "reverse", "scale": -0.5},
    {"tokens": 70, "dim": 24, "dim_v": 70, "form": "identity", "feature_map": "relu", "batch": 2},
    {"tokens": 70, "dim": 7, "dim_v": 9, "form": "reverse", "feature_map": "elu",
     "heads": (1, 1, 2), "state": False},
    {"tokens": 30, "form": "reverse", "heads": (2, 2, 1), "states": 3,
     "cu_seqlens": torch.tensor([0, 0, 17, 30], dtype=torch.int32)},
    {"tokens": 40, "form": "reverse", "not finite": True},
]  # fmt: skip
TAYLOR: list[dict[str, Any]] = [
    {"tokens": 130, "dim": 64, "dim_v": 64, "normalize": True},
    {"tokens": 70, "dim": 20, "dim_v": 30, "heads": (1, 1, 2)},
    {"tokens": 70, "dim": 33, "dim_v": 24, "normalize": True, "heads": (2, 1, 1), "state": False},
    {"tokens": 530, "dim": 17, "dim_v": 8, "normalize": True, "is_causal": False},
    {"tokens": 70, "dim": 17, "dim_v": 8, "decay": "token", "grads": False},
    {"tokens": 40, "dim": 17, "dim_v": 8, "not finite": True},
    {"tokens": 30, "dim": 17, "form": "identity", "states": 3,
     "cu_seqlens": torch.tensor([0, 0, 17, 30], dtype=torch.int32)},
]  # fmt: skip

REASONS = (
    Reason("for numbers of more than 32 bits, which the compiler's code asks for first", ".s64 %"),
)


def run(kinds: tuple[str, ...], dtype: torch.dtype) -> dict[str, Execution]:
    executions: dict[str, Execution] = {}
    delta = "delta" in kinds
    for problem in DELTA if delta else TAYLOR:
        more = dict(problem)
        broken, grads = more.pop("not finite", False), more.pop("grads", True)
        more |= {"beta": True} if delta else {"feature_map": "taylor2"}
        tensors, options = form(more.pop("form", "identity"), dtype=dtype, **more)
        if broken:
            spoil(tensors)
        with on_executor(metrics=False) as recorder:
            evaluate(linear_attention, tensors, options, grads)
        for report in recorder.reports:
            if report.kernel.partition("scan_")[2].split("_", 2)[-1] in kinds or any(
                report.kernel.endswith(f"_{kind}") for kind in kinds
            ):
                count(executions, report)
    return executions


def spoil(tensors: dict[str, Tensor]) -> None:
    tensors["value"][:, 21, :, 3] = torch.nan


def unexplained(execution: Execution) -> list[str]:
    """Basic blocks that were not executed for none of the reasons."""
    code, ran = execution.function.code, execution.executed()
    starts = [*leaders(code, execution.function.labels, set()), len(code)]
    found = []
    for start, end in itertools.pairwise(starts):
        missed = [i for i, x in zip(code[start:end], ran[start:end], strict=True) if not x]
        texts = [i.text for i in missed]
        texts += [cover.line_of(*place) for i in missed for place in i.source]
        if missed and not any(r.what in text for r in REASONS for text in texts):
            found += [f"PTX line {i.line}: {i.text}: {i.source}" for i in missed]
    return found


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("kinds", [("delta", "delta_back"), ("taylor_wide", "fold_wide")], ids=str)
def test_nearly_every_instruction_is_executed(kinds: tuple[str, ...], dtype: torch.dtype) -> None:
    executions = run(kinds, dtype)
    assert executions
    for kernel, execution in executions.items():
        print(f"{kernel:40} {len(execution.lanes):6} {execution.coverage():8.2%}")
    low = {k: unexplained(e) for k, e in executions.items() if e.coverage() < LEAST}
    assert not low
