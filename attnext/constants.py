# SPDX-License-Identifier: Apache-2.0
"""Tensors that depend on a few numbers alone, made once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.compiler import is_compiling

P = ParamSpec("P")
R = TypeVar("R")


def constant(maxsize: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Remembers results, but for what a mode such as ``FakeTensorMode`` or a transform of
    ``torch.func`` makes of them: its tensors are of no use outside, nor real ones in it. (A
    compiler would not remember either.)"""

    def remembering(function: Callable[P, R]) -> Callable[P, R]:
        remembered = functools.lru_cache(maxsize)(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if (
                is_compiling()
                or torch._C._len_torch_dispatch_stack()
                or torch._C._are_functorch_transforms_active()
            ):
                return function(*args, **kwargs)
            return remembered(*args, **kwargs)  # type: ignore[arg-type]

        return call

    return remembering
