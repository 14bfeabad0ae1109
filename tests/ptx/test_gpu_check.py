# SPDX-License-Identifier: Apache-2.0
"""A small part of what ``python -m attnext.gpu_check`` asks of a GPU, asked of the executor."""

from __future__ import annotations

import pytest

from attnext.gpu_check.checks import compare, on_device
from attnext.gpu_check.names import PROBLEMS
from attnext.gpu_check.problems import DTYPES

from . import routed, window


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("causal-65", "bf16"),
        ("na1d-15", "fp32"),
        ("na2d-9x31", "fp16"),
        ("window-15x9", "bf16"),
        ("packed", "fp16"),
        ("no-batch", "bf16"),
        ("no-queries", "bf16"),
        ("no-keys", "fp16"),
        ("routed-blocks-1-64", "bf16"),
        ("routed-maps-3d", "bf16"),
        ("routed-decode", "bf16"),
        ("routed-no-batch", "bf16"),
        ("routed-no-queries", "bf16"),
        ("routed-no-keys", "bf16"),
    ],
)
def test_problem(name: str, dtype: str) -> None:
    problem = PROBLEMS[name]
    family = routed if name.startswith("routed-") else window
    with family.on_executor() as recorder:
        results = on_device(problem, DTYPES[dtype], "cpu")
    assert recorder.reports or "no-batch" in name
    compare(problem, DTYPES[dtype], [results])
