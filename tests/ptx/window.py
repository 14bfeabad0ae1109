# SPDX-License-Identifier: Apache-2.0
"""attnext's CUDA kernels under the executor: the public functions run on it as on a GPU.

The library plans, packs the parameters and sizes the grid; here they are only carried out. Inside
``on_executor()`` every window op of attnext does its forward and backward pass this way.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnext import _C, ops

from .executor import Program, Report
from .memory import Buffer, Memory
from .source import lone


@dataclass(frozen=True)
class DeviceTensor:
    """What the binary asks of a tensor, at an address of the executor's memory."""

    address: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    is_cpu: bool = False
    is_cuda: bool = True

    def data_ptr(self) -> int:
        return self.address

    def stride(self) -> tuple[int, ...]:
        return self.strides


def put(
    memory: Memory, name: str, tensor: Tensor | None, writable: bool = False
) -> DeviceTensor | None:
    """Copies a tensor with all its storage; what the tensor does not show counts as unwritten."""
    if tensor is None:
        return None
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    buffer = memory.buffer(name, storage.view(torch.uint8).numpy(), writable=writable)
    shown = torch.zeros(storage.numel(), dtype=torch.uint8)
    shown.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(1)
    buffer.set_written(shown.repeat_interleave(tensor.element_size()).numpy())
    address = buffer.address + int(tensor.storage_offset()) * tensor.element_size()
    return DeviceTensor(
        address, tensor.dtype, tuple(tensor.shape), tuple(map(int, tensor.stride()))
    )


@dataclass
class Output:
    """An uninitialised tensor in the executor's memory."""

    buffer: Buffer
    tensor: DeviceTensor

    @classmethod
    def like(cls, memory: Memory, name: str, x: Tensor) -> Output:
        buffer = memory.allocate(name, max(1, x.numel()) * x.element_size())
        return cls(buffer, DeviceTensor(buffer.address, x.dtype, tuple(x.shape), x.stride()))

    def get(self) -> Tensor:
        """The result; every entry must have been written."""
        numel = int(np.prod(self.tensor.shape))
        size = self.tensor.dtype.itemsize
        assert self.buffer.written().reshape(-1)[: numel * size].all(), "not all was written"
        data = torch.from_numpy(self.buffer.array())[: numel * size]
        return data.view(self.tensor.dtype).reshape(self.tensor.shape)


@dataclass
class Recorder:
    """Every launch that was carried out, and how."""

    reports: list[Report] = field(default_factory=list)
    metrics: bool = False
    races: bool = True
    find: Callable[[str], Program] = lone  # who has a kernel
    calls: int = 0

    def carry_out(self, memory: Memory, launches: list[dict[str, Any]]) -> None:
        self.calls += 1
        for launch in launches:
            report = self.find(launch["kernel"]).launch(
                launch["kernel"],
                launch["grid"],
                launch["threads"],
                launch["params"],
                launch["shared_bytes"],
                memory=memory,
                metrics=self.metrics,
                races=self.races,
            )
            self.reports.append(report)
            report.check()


_NAMES = ("query", "key", "value", "row_scale", "bias", "extra_key", "extra_value", "sink_logits")


def _native(memory: Memory, problem: tuple[Any, ...]) -> tuple[Any, ...]:
    native = ops._native(problem)
    tensors = [put(memory, n, t) for n, t in zip(_NAMES, native, strict=False)]
    return (*tensors, *native[len(_NAMES) :])


def _tables(memory: Memory, name: str, tables: Any) -> int:
    return memory.buffer(name, np.frombuffer(tables.data(), np.uint8), writable=False).address


def forward(recorder: Recorder, *problem: Any) -> tuple[Tensor, Tensor]:
    memory = Memory()
    fakes = ops._window_forward_fake(*problem)
    out, lse = (Output.like(memory, n, x) for n, x in zip(("out", "lse"), fakes, strict=True))
    call = _C.CudaForward(_native(memory, problem))
    queries = _tables(memory, "queries", call.queries)
    workspace = memory.allocate("workspace", max(1, call.workspace_bytes))
    recorder.carry_out(memory, call.launches(out.tensor, lse.tensor, queries, workspace.address))
    return out.get(), lse.get()


def backward(recorder: Recorder, *args: Any) -> tuple[Tensor, ...]:
    memory = Memory()
    problem, (out, lse, dout, dlse, needs) = args[:-5], args[-5:]
    fakes = ops._window_backward_fake(*args)
    if dout.stride(-1) != 1 and dout.shape[-1] > 1:
        dout = dout.contiguous()
    call = _C.CudaBackward(_native(memory, problem))
    grads = [
        Output.like(memory, f"d{name}", fake) if tensor is not None and need else None
        for name, fake, tensor, need in zip(
            _NAMES, fakes, problem[: ops._NUM_GRADS], ops._written(needs), strict=True
        )
    ]
    given = [
        put(memory, name, x)
        for name, x in (("out", out), ("lse", lse), ("dout", dout), ("dlse", dlse))
    ]
    queries = _tables(memory, "queries", call.queries)
    keys = _tables(memory, "keys", call.keys)
    workspace = memory.allocate("workspace", max(1, call.workspace_bytes))
    recorder.carry_out(
        memory,
        call.launches(
            queries, keys, workspace.address, *given, tuple(g and g.tensor for g in grads)
        ),
    )
    return tuple(g.get() if g else fake for g, fake in zip(grads, fakes, strict=True))


@contextlib.contextmanager
def on_executor(**options: Any) -> Iterator[Recorder]:
    """Runs the window ops of attnext on the executor; the recorder has the reports."""
    recorder = Recorder(**options)
    names = ("_forward", "_without_lse", "_backward")
    kept = {name: getattr(ops, name) for name in names}
    ops._forward = functools.partial(forward, recorder)
    ops._without_lse = lambda *problem: forward(recorder, *problem)[0]
    ops._backward = functools.partial(backward, recorder)
    try:
        yield recorder
        assert recorder.calls, "all went past the executor"
    finally:
        for name, function in kept.items():
            setattr(ops, name, function)
