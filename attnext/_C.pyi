# SPDX-License-Identifier: Apache-2.0
# The compiled module, built from csrc/. Users' errors are raised in attnext.functional.
from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor

_Integers: TypeAlias = Sequence[int]

__version__: str

# `problem`: what the operators take, with cu_seqlens as integers; `grads`: where the gradients of
# its first eight tensors go.
def window_forward(problem: tuple[Any, ...], out: Tensor, lse: Tensor | None) -> None: ...
def window_backward(
    problem: tuple[Any, ...],
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    grads: tuple[Tensor | None, ...],
) -> None: ...
def axis_intervals(rule: _Integers, num_queries: int, num_keys: int) -> list[tuple[int, int]]: ...
def inverse_intervals(
    rule: _Integers, num_queries: int, num_keys: int
) -> list[tuple[int, int]]: ...
def tile_plan(
    rules: Sequence[_Integers],
    query_extent: _Integers,
    key_extent: _Integers,
    lanes: int,
    vectors: int,
) -> dict[str, Any]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def available_isas() -> list[str]: ...
def num_threads() -> int: ...
def lanes(dtype: str) -> tuple[int, int]: ...
def fma_peak(isa: str, dtype: str, seconds: float) -> float: ...
