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

# ---- Routed attention: `problem` in the order of its schema; `grads` of its first five tensors

def routed_forward(problem: tuple[Any, ...], out: Tensor, lse: Tensor) -> None: ...
def routed_backward(
    problem: tuple[Any, ...],
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    grads: tuple[Tensor | None, ...],
) -> None: ...

# Of the key at each place the largest product with the queries of the list that see it. `query`
# [B, lists, rows, samples, D], `reach` [rows, samples], `at` and `out` [B, lists, rows, places].
def largest_products(
    query: Tensor, reach: Tensor, key: Tensor, at: Tensor, lowest: float, out: Tensor
) -> None: ...

# As attnext/selection_ops.py has it; `choice`: score, k, samples, scale, force_first, force_last,
# tie_high, by_score.
def select_topk(
    query: Tensor,
    candidates: Tensor,
    factors: Tensor | None,
    each_end: Tensor | None,
    begin: Tensor | None,
    end: Tensor | None,
    overlap: Tensor | None,
    share: Tensor | None,
    exclude: Tensor | None,
    choice: tuple[int, int, int, float, int, int, bool, bool],
    indices: Tensor,
    values: Tensor,
) -> None: ...

# Of the `count` largest of each row, rising.
def best_places(numbers: Tensor, count: int, places: Tensor) -> None: ...

# ---- Linear attention: `problem` as above; `grads` of its first six tensors

def linear_forward(
    problem: tuple[Any, ...],
    out: Tensor,
    denominator: Tensor | None,
    remainder: Tensor | None,
    final_state: Tensor | None,
) -> None: ...
def linear_backward(
    problem: tuple[Any, ...],
    out: Tensor,
    denominator: Tensor | None,
    remainder: Tensor | None,
    dout: Tensor,
    ddenominator: Tensor | None,
    dfinal_state: Tensor | None,
    grads: tuple[Tensor | None, ...],
) -> None: ...
def linear_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    slots: _Integers | None,
    decay: Tensor | None,
    beta: Tensor | None,
    feature_map: int,
    normalize: bool,
    scale: float,
    eps: float,
    out: Tensor,
) -> None: ...

# ---- Geometry, and the machine

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

# ---- CUDA: a problem worked out. Tables and scratch are addresses of the caller's memory ---------

cuda_architectures: str  # this build has kernels for; empty: none

class CudaTables:
    """Who attends whom, as a kernel reads it: the same object for the same geometry."""

    useful_pairs: float
    computed_pairs: float

    def data(self) -> bytes: ...

class CudaForward:
    queries: CudaTables
    workspace_bytes: int

    def __init__(self, problem: tuple[Any, ...]) -> None: ...
    def launches(
        self, out: Any, lse: Any, queries: int, workspace: int
    ) -> list[dict[str, Any]]: ...
    def run(
        self, out: Tensor, lse: Tensor, queries: int, workspace: int, device: int, stream: int
    ) -> None: ...

class CudaBackward:
    queries: CudaTables
    keys: CudaTables
    workspace_bytes: int

    def __init__(self, problem: tuple[Any, ...]) -> None: ...
    def launches(
        self, queries: int, keys: int, workspace: int, /, *tensors: Any
    ) -> list[dict[str, Any]]: ...
    def run(
        self,
        queries: int,
        keys: int,
        workspace: int,
        device: int,
        stream: int,
        /,
        *tensors: Any,
    ) -> None: ...

_Addresses: TypeAlias = tuple[int, int, int, int, int, int]  # routed_tables.ListTables.addresses

class CudaRoutedForward:
    query_rows: int  # of a tile: places of the order of queries

    def __init__(
        self, problem: tuple[Any, ...], mixed_documents: bool, query_block: int, policies: int
    ) -> None: ...
    def workspace_bytes(self, longest_walk: int) -> int: ...
    def launches(
        self, out: Any, lse: Any, queries: _Addresses, longest_walk: int, workspace: int
    ) -> list[dict[str, Any]]: ...
    def run(
        self,
        out: Tensor,
        lse: Tensor,
        queries: _Addresses,
        longest_walk: int,
        workspace: int,
        device: int,
        stream: int,
    ) -> None: ...

class CudaRoutedBackward:
    query_rows: int
    key_rows: int

    def __init__(
        self, problem: tuple[Any, ...], mixed_documents: bool, query_block: int, policies: int
    ) -> None: ...
    def workspace_bytes(self, of_bias: bool, num_entries: int) -> int: ...
    def launches(
        self, queries: _Addresses, keys: _Addresses, workspace: int, /, *tensors: Any
    ) -> list[dict[str, Any]]: ...
    def run(
        self,
        queries: _Addresses,
        keys: _Addresses,
        workspace: int,
        device: int,
        stream: int,
        /,
        *tensors: Any,
    ) -> None: ...

class CudaLinearForward:
    sequences: bytes  # of packed sequences, to be uploaded
    workspace_bytes: int

    def __init__(self, problem: tuple[Any, ...]) -> None: ...
    def launches(
        self, sequences: int, workspace: int, out: Any, denominator: Any, final_state: Any
    ) -> list[dict[str, Any]]: ...
    def run(
        self,
        sequences: int,
        workspace: int,
        device: int,
        stream: int,
        out: Tensor,
        denominator: Tensor | None,
        final_state: Tensor | None,
    ) -> None: ...

class CudaLinearBackward:
    sequences: bytes
    workspace_bytes: int

    def __init__(self, problem: tuple[Any, ...], of_decay: bool) -> None: ...
    def launches(
        self,
        sequences: int,
        workspace: int,
        out: Any,
        denominator: Any,
        dout: Any,
        ddenominator: Any,
        dfinal_state: Any,
        grads: tuple[Any, ...],
    ) -> list[dict[str, Any]]: ...
    def run(
        self,
        sequences: int,
        workspace: int,
        device: int,
        stream: int,
        out: Tensor,
        denominator: Tensor | None,
        dout: Tensor,
        ddenominator: Tensor | None,
        dfinal_state: Tensor | None,
        grads: tuple[Tensor | None, ...],
    ) -> None: ...

def cuda_linear_step_launches(
    slots: int,
    query: Any,
    key: Any,
    value: Any,
    state: Any,
    decay: Any,
    beta: Any,
    feature_map: int,
    normalize: bool,
    scale: float,
    eps: float,
    out: Any,
) -> list[dict[str, Any]]: ...
def cuda_linear_step(device: int, stream: int, slots: int, /, *arguments: Any) -> None: ...
def cuda_linear_kernels() -> list[dict[str, Any]]: ...
def cuda_kernels() -> list[dict[str, Any]]: ...
