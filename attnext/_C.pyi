# SPDX-License-Identifier: Apache-2.0
# The compiled module, built from csrc/. Users' errors are raised in attnext.functional.
from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor

_Integers: TypeAlias = Sequence[int]

__version__: str

# After query, key and value: row_scale, bias, extra_key, extra_value, sink_logits (tensor or None);
# rules, head_rule (integers); scale, softcap (float); sinks (int); cu_queries, cu_keys (integers);
# out, lse; and, backward, dout, dlse, then where the gradients of the eight tensors go.
def window_forward(
    dtype: int, query: Tensor, key: Tensor, value: Tensor, /, *rest: Any
) -> None: ...
def window_backward(
    dtype: int, query: Tensor, key: Tensor, value: Tensor, /, *rest: Any
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
