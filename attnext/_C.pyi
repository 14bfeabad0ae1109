# SPDX-License-Identifier: Apache-2.0
# The compiled module, built from csrc/. Users' errors are raised in attnext.functional.
from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor

_Optional: TypeAlias = Tensor | None
_Integers: TypeAlias = Sequence[int]

__version__: str

def window_forward(
    dtype: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_scale: _Optional,
    bias: _Optional,
    extra_key: _Optional,
    extra_value: _Optional,
    sink_logits: _Optional,
    rules: _Integers,
    head_rule: _Integers,
    scale: float,
    softcap: float,
    sinks: int,
    cu_queries: _Integers,
    cu_keys: _Integers,
    out: Tensor,
    lse: _Optional,
    /,
) -> None: ...
def window_backward(
    dtype: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_scale: _Optional,
    bias: _Optional,
    extra_key: _Optional,
    extra_value: _Optional,
    sink_logits: _Optional,
    rules: _Integers,
    head_rule: _Integers,
    scale: float,
    softcap: float,
    sinks: int,
    cu_queries: _Integers,
    cu_keys: _Integers,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: _Optional,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    drow_scale: _Optional,
    dbias: _Optional,
    dextra_key: _Optional,
    dextra_value: _Optional,
    dsink_logits: _Optional,
    /,
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
