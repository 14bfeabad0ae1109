# SPDX-License-Identifier: Apache-2.0
"""attnext's CUDA kernels of linear attention under the executor: as window.py does for windows."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnext import _C, linear, linear_ops

from .memory import Memory
from .window import Output, Recorder, put

_NAMES = ("query", "key", "value", "decay", "beta", "initial_state")
_RESULTS = ("out", "denominator", "remainder", "final_state")


def _native(memory: Memory, problem: tuple[Any, ...]) -> tuple[Any, ...]:
    native = linear_ops._native(problem)
    tensors = [put(memory, n, t) for n, t in zip(_NAMES, native, strict=False)]
    return (*tensors, *native[len(_NAMES) :])


def _on_gpu(problem: tuple[Any, ...]) -> tuple[Any, ...]:
    """As an operator on a GPU takes it, which keeps nothing of what outputs lose."""
    return (*problem[:-1], False)


def _room(memory: Memory, call: Any) -> tuple[int, int]:
    """Addresses of the list of sequences, and of scratch."""
    workspace = memory.allocate("workspace", max(1, call.workspace_bytes)).address
    if not call.sequences:
        return 0, workspace
    sequences = np.frombuffer(call.sequences, np.uint8)
    return memory.buffer("sequences", sequences, writable=False).address, workspace


def forward(recorder: Recorder, *problem: Any) -> tuple[Tensor, ...]:
    problem = _on_gpu(problem)
    linear_ops.check_cuda(problem)
    memory = Memory()
    fakes = linear_ops._forward_fake(*problem)
    results = [
        None if fake is None else Output.like(memory, name, fake)
        for name, fake in zip(_RESULTS, linear_ops._wanted_results(problem, fakes), strict=True)
    ]
    call = _C.CudaLinearForward(_native(memory, problem))
    out, denominator, _, state = (r and r.tensor for r in results)
    recorder.carry_out(memory, call.launches(*_room(memory, call), out, denominator, state))
    return tuple(r.get() if r else fake for r, fake in zip(results, fakes, strict=True))


def backward(recorder: Recorder, *args: Any) -> tuple[Tensor, ...]:
    problem = _on_gpu(args[: -linear_ops._NUM_GIVEN])
    linear_ops.check_cuda(problem)
    memory = Memory()
    fakes, tensors = linear_ops._backward_tensors(*problem, *args[-linear_ops._NUM_GIVEN :])
    out, denominator, _, *given, wanted = tensors
    grads = [
        None if w is None else Output.like(memory, f"d{name}", w)
        for name, w in zip(_NAMES, wanted, strict=True)
    ]
    names = ("out", "denominator", "dout", "ddenominator", "dfinal_state")
    given = [out, denominator, *given]
    on_device: Any = [put(memory, name, x) for name, x in zip(names, given, strict=True)]
    call: Any = _C.CudaLinearBackward(
        _native(memory, problem), wanted[linear_ops._DECAY] is not None
    )
    recorder.carry_out(
        memory,
        call.launches(
            *_room(memory, call),
            *on_device,
            tuple(g and g.tensor for g in grads),
        ),
    )
    results = tuple(g.get() if g else fake for g, fake in zip(grads, fakes, strict=True))
    return linear_ops._shared(results, problem)


def step(
    recorder: Recorder, query: Tensor, key: Tensor, value: Tensor, state: Tensor, *rest: Any
) -> Tensor:
    slots, decay, beta, *options = rest
    linear_ops.check_step_cuda(query, beta)
    memory = Memory()
    out = Output.like(memory, "out", linear_ops._step_fake(query, key, value))
    tensors = {"query": query, "key": key, "value": value, "state": state}
    given: list[Any] = [put(memory, n, x, writable=n == "state") for n, x in tensors.items()]
    states = memory.buffers[-1]
    given += [put(memory, n, x) for n, x in (("decay", decay), ("beta", beta))]
    chosen = 0
    if slots is not None:
        chosen = memory.buffer("slots", slots.long().numpy(), writable=False).address
    given += [*options, out.tensor]
    recorder.carry_out(memory, _C.cuda_linear_step_launches(chosen, *given))
    storage = torch.empty(0, dtype=torch.uint8).set_(state.untyped_storage())
    storage.copy_(torch.from_numpy(states.array()))
    return out.get()


@contextlib.contextmanager
def on_executor(**options: Any) -> Iterator[Recorder]:
    """Runs linear attention on the executor; the recorder has the reports."""
    recorder = Recorder(**options)
    kept = linear_ops._forward, linear_ops._backward, linear.step_op
    linear_ops._forward = functools.partial(forward, recorder)
    linear_ops._backward = functools.partial(backward, recorder)
    linear.step_op = functools.partial(step, recorder)
    try:
        yield recorder
        assert recorder.calls, "all went past the executor"
    finally:
        linear_ops._forward, linear_ops._backward, linear.step_op = kept
