# SPDX-License-Identifier: Apache-2.0
"""The registered operators: schemas, CPU implementations, fakes, autograd and vmap.

``functional.py`` normalises arguments and calls :func:`window_op`; nothing else should.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _C

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

_LIBRARY = torch.library.Library("attnext", "DEF")

# What every window op takes. `rules` holds 8 integers per rule and axis (AxisRule.fields), `head_rule`
# the rule of each head (empty: all the first). `row_scale` multiplies `scale` per query and head.
_PROBLEM = (
    "Tensor query, Tensor key, Tensor value, Tensor? row_scale, Tensor? bias, Tensor? extra_key, "
    "Tensor? extra_value, Tensor? sink_logits, SymInt[] rules, SymInt[] head_rule, float scale, "
    "float softcap, SymInt sinks, SymInt[] cu_seqlens_q, SymInt[] cu_seqlens_k"
)
_LIBRARY.define(f"window_forward({_PROBLEM}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"window_backward({_PROBLEM}, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, "
    "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_NUM_TENSORS = 8  # the tensors at the head of _PROBLEM


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of sums, statistics and modifiers beside inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_problem(tensors: tuple[Tensor | None, ...]) -> int:
    """Everything must live on the CPU in the dtype that the kernels will read."""
    query, key, value, row_scale, bias, extra_key, extra_value, sink_logits = tensors
    assert query is not None
    code = _DTYPES.get(query.dtype)
    if code is None:
        raise TypeError(f"query must be float32, float64, bfloat16 or float16, got {query.dtype}")
    acc = accumulator_dtype(query.dtype)
    for t in (key, value, extra_key, extra_value):
        if t is not None and (t.dtype != query.dtype or t.device.type != "cpu"):
            raise TypeError(f"expected a {query.dtype} CPU tensor, got {t.dtype} on {t.device}")
    for t in (row_scale, bias, sink_logits):
        if t is not None and (t.dtype != acc or t.device.type != "cpu"):
            raise TypeError(f"expected a {acc} CPU tensor, got {t.dtype} on {t.device}")
    return code


def _output_shape(query: Tensor, value: Tensor) -> list[Any]:
    return [*query.shape[:-1], value.shape[-1]]


def _window_forward_cpu(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Any, Any]:
    code = _check_problem((query, key, value, *rest[: _NUM_TENSORS - 3]))
    out = query.new_empty(_output_shape(query, value))
    lse = query.new_empty(query.shape[:-1], dtype=accumulator_dtype(query.dtype))
    _C.window_forward(code, query, key, value, *rest, out, lse)
    return out, lse


def _window_forward_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Any, Any]:
    lse = query.new_empty(query.shape[:-1], dtype=accumulator_dtype(query.dtype))
    return query.new_empty(_output_shape(query, value)), lse


def _gradients_like(tensors: tuple[Tensor | None, ...], needs: list[bool]) -> list[Tensor]:
    """Fresh tensors for the gradients; absent or unwanted ones are empty."""
    query = tensors[0]
    assert query is not None
    grads = []
    for t, need in zip(tensors, needs, strict=True):
        grads.append(query.new_empty(t.shape if t is not None and need else [0], dtype=t.dtype)
                     if t is not None else query.new_empty([0]))
    return grads


def _window_backward_cpu(*args: Any) -> tuple[Tensor, ...]:
    problem, (out, lse, dout, dlse, needs) = args[:-5], args[-5:]
    tensors = problem[:_NUM_TENSORS]
    code = _check_problem(tensors)
    acc = accumulator_dtype(tensors[0].dtype)
    for t, dtype in ((out, out.dtype), (dout, out.dtype), (lse, acc), (dlse, acc)):
        if t is not None and t.dtype != dtype:
            raise TypeError(f"expected {dtype}, got {t.dtype}")
    # The kernels always write the gradients of query, key, value and the extra keys.
    needs = [True, True, True, needs[3], needs[4], True, True, needs[7]]
    grads = _gradients_like(tensors, needs)
    if dout.stride(-1) != 1 and dout.shape[-1] > 1:  # e.g. the expanded gradient of a sum
        dout = dout.contiguous()
    dq, dk, dv, dscale, dbias, dek, dev, dsink = (
        g if t is not None and need else None
        for g, t, need in zip(grads, tensors, needs, strict=True)
    )
    _C.window_backward(
        code, *problem, out, lse, dout, dlse, dq, dk, dv, dscale, dbias, dek, dev, dsink
    )
    return tuple(grads)


def _window_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    needs = args[-1]
    needs = [True, True, True, needs[3], needs[4], True, True, needs[7]]
    return tuple(_gradients_like(args[:_NUM_TENSORS], needs))


_LIBRARY.impl("window_forward", _window_forward_cpu, "CPU")
_LIBRARY.impl("window_backward", _window_backward_cpu, "CPU")
torch.library.register_fake("attnext::window_forward", _window_forward_fake, lib=_LIBRARY)
torch.library.register_fake("attnext::window_backward", _window_backward_fake, lib=_LIBRARY)

_forward = torch.ops.attnext.window_forward.default
_backward = torch.ops.attnext.window_backward.default


class _Window(torch.autograd.Function):
    """window_forward with its gradients, for reverse mode once."""

    @staticmethod
    def forward(*problem: Any) -> Any:
        return _forward(*problem)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:_NUM_TENSORS], *output)
        ctx.plain = inputs[_NUM_TENSORS:]
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        *tensors, out, lse = ctx.saved_tensors
        nothing = (None,) * len(ctx.plain)
        if dout is None and dlse is None:
            return (None,) * _NUM_TENSORS + nothing
        if dout is None:
            dout = torch.zeros_like(out)
        needs = [bool(n) for n in ctx.needs_input_grad[:_NUM_TENSORS]]
        grads = _WindowBackward.apply(*tensors, *ctx.plain, out, lse, dout, dlse, needs)
        wanted = (
            g if t is not None and need else None
            for g, t, need in zip(grads, tensors, needs, strict=True)
        )
        return (*wanted, *nothing)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *problem: Any) -> Any:
        return _batched(_Window.apply, info, in_dims, problem, 2)


class _WindowBackward(torch.autograd.Function):
    """window_backward; exists for its vmap rule, and to refuse a second derivative."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return _backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("attnext: window attention has no second derivative")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _batched(_WindowBackward.apply, info, in_dims, args, _NUM_TENSORS)


def _batched(apply: Any, info: Any, in_dims: Any, args: Any, num_outputs: int) -> Any:
    """Runs an op over a vmapped dimension, by folding it into the batch where all that depends on
    it has a batch dimension, else one slice at a time."""
    size = info.batch_size
    if not any(isinstance(d, int) for d in in_dims):
        raise AssertionError("nothing is batched")
    slices = []
    for index in range(size):
        slices.append(
            apply(
                *(
                    a.select(d, index) if isinstance(a, Tensor) and isinstance(d, int) else a
                    for a, d in zip(args, in_dims, strict=True)
                )
            )
        )
    outputs = tuple(torch.stack([s[k] for s in slices]) for k in range(num_outputs))
    return outputs, (0,) * num_outputs


def window_op(*problem: Any) -> tuple[Tensor, Tensor]:
    """window_forward, entering autograd only when something needs a gradient."""
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in problem[:_NUM_TENSORS]
    ):
        return _Window.apply(*problem)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return _Window.apply(*problem)  # under torch.func: requires_grad does not tell
    return _forward(*problem)
