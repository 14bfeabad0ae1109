# SPDX-License-Identifier: Apache-2.0
"""The registered operators of window attention: schemas, implementations, fakes, autograd and vmap.

``functional.py`` normalises arguments and calls :func:`window_op`; nothing else should.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _C
from .autograd import (
    LIBRARY,
    differentiable,
    is_plain,
    needs_gradient,
    one_slice_at_a_time,
)
from .device_tables import DeviceTables

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# What every window op takes. `rules` holds 8 integers per rule and axis (AxisRule.fields),
# `head_rule` the rule of each head (empty: all the first). `row_scale` multiplies `scale` per query
# and head.
_PROBLEM = (
    "Tensor query, Tensor key, Tensor value, Tensor? row_scale, Tensor? bias, Tensor? extra_key, "
    "Tensor? extra_value, Tensor? sink_logits, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt[] rules, SymInt[] head_rule, float scale, float softcap, SymInt sinks"
)
LIBRARY.define(f"window_forward({_PROBLEM}) -> (Tensor, Tensor)")
LIBRARY.define(
    f"window_backward({_PROBLEM}, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, "
    "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_NUM_TENSORS = 10  # at the head of _PROBLEM; all but the last two are differentiable
_NUM_GRADS = 8
_BATCHED = (0, 1, 2, 3, 5, 6)  # those with a batch dimension


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of sums, statistics and modifiers beside inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_stride(t: Tensor) -> Tensor:
    """The kernels read rows; only a tensor whose last axis is strided is copied."""
    if t.stride()[-1] == 1 or t.shape[-1] == 1:
        return t
    return t.clone(memory_format=torch.contiguous_format)  # contiguous() leaves empty ones alone


def sequence_ends(cu_seqlens: Tensor, name: str, tokens: int) -> list[int]:
    ends: list[int] = cu_seqlens.tolist()
    if not ends or ends[0] != 0 or ends[-1] != tokens or sorted(ends) != ends:
        raise ValueError(
            f"{name} must rise from 0 to the number of tokens, {tokens}, got {_brief(ends)}"
        )
    return ends


def _brief(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{values[0]}, {values[1]}, ..., {values[-1]}]"


def _native(problem: tuple[Any, ...]) -> tuple[Any, ...]:
    """The problem as the binary takes it, with cu_seqlens as checked lists."""
    cu_q, cu_k = problem[_NUM_GRADS:_NUM_TENSORS]
    if cu_q is None:
        return problem
    return (
        *problem[:_NUM_GRADS],
        sequence_ends(cu_q, "cu_seqlens_q", problem[0].shape[1]),
        sequence_ends(cu_k, "cu_seqlens_k", problem[1].shape[1]),
        *problem[_NUM_TENSORS:],
    )


def _empty_output(query: Tensor, value: Tensor) -> Tensor:
    if query.shape[-1] == value.shape[-1]:  # cheaper than to spell out the shape
        return torch.empty_like(query, memory_format=torch.contiguous_format)
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _window_forward_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Any:
    lse = query.new_empty(query.shape[:-1], dtype=accumulator_dtype(query.dtype))
    return _empty_output(query, value), lse


def _window_forward_cpu(*problem: Any) -> tuple[Tensor, Tensor]:
    out, lse = _window_forward_fake(*problem)
    _C.window_forward(_native(problem), out, lse)
    return out, lse


def _window_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    """Fresh tensors for the gradients; those that are absent or not needed are empty."""
    query, needs = args[0], args[-1]
    return tuple(
        query.new_empty([0]) if t is None or not need else query.new_empty(t.shape, dtype=t.dtype)
        for t, need in zip(args[:_NUM_GRADS], _written(needs), strict=True)
    )


def _written(needs: list[bool]) -> list[bool]:
    """The kernels write the gradients of query, key, value and the extra keys in any case."""
    return [True, True, True, needs[3], needs[4], True, True, needs[7]]


def _backward_tensors(*args: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Fresh gradients, and what the binary takes after the problem."""
    problem, (out, lse, dout, dlse, needs) = args[:-5], args[-5:]
    grads = _window_backward_fake(*args)
    dout = unit_stride(dout)  # e.g. the expanded gradient of a sum
    given = tuple(
        g if t is not None and need else None
        for g, t, need in zip(grads, problem[:_NUM_GRADS], _written(needs), strict=True)
    )
    return grads, (out, lse, dout, dlse, given)


def _window_backward_cpu(*args: Any) -> tuple[Tensor, ...]:
    grads, tensors = _backward_tensors(*args)
    _C.window_backward(_native(args[:-5]), *tensors)
    return grads


# ---- CUDA ----------------------------------------------------------------------------------------


_TABLES = DeviceTables()


def _where(query: Tensor) -> tuple[int, int]:
    """Index of the device, and the stream on it that the caller works on."""
    return query.get_device(), torch.cuda.current_stream(query.device).cuda_stream


def _window_forward_cuda(*problem: Any) -> tuple[Tensor, Tensor]:
    query = problem[0]
    # The binary's CUDA runtime is not torch's: torch alone says which device is the current one.
    with torch.cuda.device(query.device):
        out, lse = _window_forward_fake(*problem)
        call = _C.CudaForward(_native(problem))
        workspace = query.new_empty(call.workspace_bytes, dtype=torch.uint8)
        queries = _TABLES.get(call.queries, query.device, "window_forward")
        call.run(out, lse, queries.data_ptr(), workspace.data_ptr(), *_where(query))
    return out, lse


def _window_backward_cuda(*args: Any) -> tuple[Tensor, ...]:
    problem, query = args[:-5], args[0]
    with torch.cuda.device(query.device):
        grads, tensors = _backward_tensors(*args)
        call = _C.CudaBackward(_native(problem))
        workspace = query.new_empty(call.workspace_bytes, dtype=torch.uint8)
        # Held until the launch: the second may drop the first.
        queries, keys = (
            _TABLES.get(tables, query.device, "window_backward")
            for tables in (call.queries, call.keys)
        )
        places = (t.data_ptr() for t in (queries, keys, workspace))
        call.run(*places, *_where(query), *tensors)
    return grads


LIBRARY.impl("window_forward", _window_forward_cpu, "CPU")
LIBRARY.impl("window_backward", _window_backward_cpu, "CPU")
LIBRARY.impl("window_forward", _window_forward_cuda, "CUDA")
LIBRARY.impl("window_backward", _window_backward_cuda, "CUDA")
torch.library.register_fake("attnext::window_forward", _window_forward_fake, lib=LIBRARY)
torch.library.register_fake("attnext::window_backward", _window_backward_fake, lib=LIBRARY)


def _forward(*problem: Any) -> tuple[Tensor, Tensor]:
    if is_plain(problem[:_NUM_TENSORS]):
        return (_window_forward_cpu if problem[0].is_cpu else _window_forward_cuda)(*problem)
    results: tuple[Tensor, Tensor] = torch.ops.attnext.window_forward.default(*problem)
    return results


def _backward(*args: Any) -> tuple[Tensor, ...]:
    if is_plain((*args[:_NUM_TENSORS], *args[-5:-1])):
        return (_window_backward_cpu if args[0].is_cpu else _window_backward_cuda)(*args)
    grads: tuple[Tensor, ...] = torch.ops.attnext.window_backward.default(*args)
    return grads


def _batched(
    apply: Any, size: int, in_dims: Any, args: tuple[Any, ...], more: tuple[int, ...]
) -> Any:
    """Runs an op over a vmapped dimension: folded into the batch where all that depends on it
    has a batch dimension, else one slice at a time. ``more``: further batched tensors."""
    mapped = {k for k, d in enumerate(in_dims) if isinstance(d, int)}
    folded = (*_BATCHED, *more)
    needs = args[-1] if more else [False] * _NUM_GRADS
    shared_grads = needs[4] or needs[7]  # of tensors without a batch: one per slice is due
    if mapped <= set(folded) and not shared_grads and args[_NUM_GRADS] is None:
        inputs, batch = list(args), 0
        for k in folded:
            t = args[k]
            if t is None:
                continue
            t = t.movedim(in_dims[k], 0) if k in mapped else t.expand(size, *t.shape)
            batch = t.shape[1]
            inputs[k] = t.reshape(size * batch, *t.shape[2:])
        outputs = apply(*inputs)
        return tuple(
            o.reshape(size, batch, *o.shape[1:]) if o.dim() > 1 else o for o in outputs
        ), tuple(0 if o.dim() > 1 else None for o in outputs)
    return one_slice_at_a_time(apply, size, in_dims, args)


# By their names: what stands in for a GPU in the tests takes their places.
_call = differentiable(
    "window",
    lambda *problem: _forward(*problem),
    lambda *args: _backward(*args),
    _batched,
    _NUM_TENSORS,
    _NUM_GRADS,
    num_results=2,
)


def window_op(want_lse: bool, *problem: Any) -> tuple[Tensor, Tensor | None]:
    """window_forward, entering autograd only when something needs a gradient: that costs more than
    a small window too. Without ``want_lse`` the second result may be None."""
    alone = not want_lse and problem[0].is_cpu and not needs_gradient(problem[:_NUM_GRADS])
    if not alone or not is_plain(problem[:_NUM_TENSORS]):
        results: tuple[Tensor, Tensor] = _call(*problem)
        return results
    return _without_lse(*problem), None


def _without_lse(*problem: Any) -> Tensor:
    out = _empty_output(problem[0], problem[2])
    _C.window_forward(_native(problem), out, None)
    return out
