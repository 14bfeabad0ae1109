# SPDX-License-Identifier: Apache-2.0
"""attnext's CUDA kernels of routed attention under the executor: as window.py does for windows."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from attnext import _C, routed_ops
from attnext.routed_tables import ListTables

from .memory import Memory
from .window import Output, Recorder, put

_NAMES = (
    "query", "key", "value", "bias", "sink_logits", "lists", "ends", "indptr", "query_offsets",
    "query_order", "key_offsets", "key_order", "query_documents", "key_documents", "key_lengths",
)  # fmt: skip


class DeviceIntegers:
    """What the binary asks of a tensor of integers."""

    is_cpu, is_cuda = False, True

    def __init__(self, tensor: Tensor, address: int) -> None:
        self.dtype, self.shape, self.address = tensor.dtype, tensor.shape, address

    def data_ptr(self) -> int:
        return self.address

    def numel(self) -> int:
        return self.shape.numel()

    def is_contiguous(self) -> bool:
        return True


def _native(memory: Memory, problem: tuple[Any, ...]) -> tuple[Any, ...]:
    tensors: list[Any] = []
    for name, t in zip(_NAMES, problem, strict=False):
        there: Any = put(memory, name, t)
        integers = t is not None and not t.is_floating_point()
        tensors.append(DeviceIntegers(t, there.address) if integers else there)
    return (*tensors, *problem[len(_NAMES) :])


def _tables(memory: Memory, side: str, tables: ListTables) -> Any:
    def address(name: str, x: Tensor) -> int:
        there = put(memory, f"{name} {side}", x) if x.numel() else None
        return there.address if there else 0

    return tables.addresses(address)


def _call(memory: Memory, kind: Any, problem: tuple[Any, ...]) -> Any:
    policies = put(memory, "policies", routed_ops.policies_of(problem))
    return kind(
        _native(memory, problem),
        *routed_ops.known_of(problem),
        policies.address if policies else 0,
    )


def forward(recorder: Recorder, *problem: Any) -> tuple[Tensor, Tensor]:
    memory = Memory()
    fakes = routed_ops._forward_fake(*problem)
    out, lse = (Output.like(memory, n, x) for n, x in zip(("out", "lse"), fakes, strict=True))
    call = _call(memory, _C.CudaRoutedForward, problem)
    queries = _tables(memory, "queries", routed_ops.tables_of(problem, call.query_rows, False))
    longest = routed_ops.longest_walk(problem, call.query_rows)
    workspace = memory.allocate("workspace", max(1, call.workspace_bytes(longest)))
    recorder.carry_out(
        memory, call.launches(out.tensor, lse.tensor, queries, longest, workspace.address)
    )
    return out.get(), lse.get()


def backward(recorder: Recorder, *args: Any) -> tuple[Tensor, ...]:
    problem, (out, lse, dout, dlse, needs) = args[:-5], args[-5:]
    memory = Memory()
    fakes = routed_ops._backward_fake(*args)
    if dout.stride(-1) != 1 and dout.shape[-1] > 1:
        dout = dout.contiguous()
    call = _call(memory, _C.CudaRoutedBackward, problem)
    written = routed_ops.written(problem, needs)
    grads = [
        Output.like(memory, f"d{name}", fake) if write else None
        for name, fake, write in zip(_NAMES, fakes, written, strict=False)
    ]
    given = [
        put(memory, name, x)
        for name, x in (("out", out), ("lse", lse), ("dout", dout), ("dlse", dlse))
    ]
    queries = _tables(memory, "queries", routed_ops.tables_of(problem, call.query_rows, False))
    keys = _tables(memory, "keys", routed_ops.tables_of(problem, call.key_rows, True))
    num_bytes = call.workspace_bytes(written[routed_ops._BIAS], queries[2])
    workspace = memory.allocate("workspace", max(1, num_bytes))
    recorder.carry_out(
        memory,
        call.launches(
            queries, keys, workspace.address, *given, tuple(g and g.tensor for g in grads)
        ),
    )
    return tuple(g.get() if g else fake for g, fake in zip(grads, fakes, strict=True))


@contextlib.contextmanager
def on_executor(**options: Any) -> Iterator[Recorder]:
    """Runs routed attention on the executor; the recorder has the reports."""
    recorder = Recorder(**options)
    kept = routed_ops._forward, routed_ops._backward
    routed_ops._forward = functools.partial(forward, recorder)
    routed_ops._backward = functools.partial(backward, recorder)
    try:
        yield recorder
        assert recorder.calls, "all went past the executor"
    finally:
        routed_ops._forward, routed_ops._backward = kept
