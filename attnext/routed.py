# SPDX-License-Identifier: Apache-2.0
"""Attention over lists of key blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import reference_routed
from .plans import BlockPlan


def routed_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, **options: Any
) -> Any:
    """Stand-in until the kernels are there: the specification, in the dtype of the inputs."""
    results = reference_routed.routed_attention(
        query, key, value, plan, dtype=query.dtype, **options
    )
    return results
