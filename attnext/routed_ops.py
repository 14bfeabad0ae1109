# SPDX-License-Identifier: Apache-2.0
"""The registered operators of routed attention. ``routed.py`` calls :func:`routed_op`; nothing else
should."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _C
from .ops import LIBRARY, accumulator_dtype, transforms_are_active

HEAD_POLICIES = ("list", "dense", "streaming", "off")  # in the order of HeadPolicy in params.h

# Integers of `rules`: is_causal, exclude_self, left and right of `within`, whether there is a
# window, left and right of it, sinks. `list_shape`: batch items and heads that have lists. Keys
# without offsets have the blocks of the queries, and without documents theirs: an autograd.Function
# that is compiled takes no tensor twice.
_PROBLEM = (
    "Tensor query, Tensor key, Tensor value, Tensor? entry_bias, Tensor? sink_logits, "
    "Tensor lists, Tensor? ends, Tensor? indptr, Tensor query_offsets, Tensor? query_order, "
    "Tensor? key_offsets, Tensor? key_order, Tensor? query_documents, Tensor? key_documents, "
    "Tensor? key_lengths, SymInt[] head_policy, SymInt[] rules, SymInt[] list_shape, float scale, "
    "float softcap"
)
_NUM_GRADS = 5
_NUM_TENSORS = 15
_LIST_SHAPE = 17

LIBRARY.define(f"routed_forward({_PROBLEM}) -> (Tensor, Tensor)")
LIBRARY.define(
    f"routed_backward({_PROBLEM}, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, "
    "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:-1], dtype=accumulator_dtype(query.dtype))
    return query.new_empty((*query.shape[:-1], value.shape[-1])), lse


def _forward_cpu(*problem: Any) -> tuple[Tensor, Tensor]:
    out, lse = _forward_fake(*problem)
    _C.routed_forward(problem, out, lse)
    return out, lse


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    """Fresh gradients; those that are absent or not needed are empty."""
    query, needs = args[0], args[-1]
    return tuple(
        query.new_empty([0]) if t is None or not need else query.new_empty(t.shape, dtype=t.dtype)
        for t, need in zip(args[:_NUM_GRADS], (True, True, True, *needs[3:]), strict=True)
    )


def _backward_cpu(*args: Any) -> tuple[Tensor, ...]:
    problem, (out, lse, dout, dlse, needs) = args[:-5], args[-5:]
    dquery, dkey, dvalue, dbias, dsinks = _backward_fake(*args)
    if dout.stride(-1) != 1 and dout.shape[-1] > 1:  # e.g. the expanded gradient of a sum
        dout = dout.contiguous()
    bias, sink_logits = problem[3:_NUM_GRADS]
    copies = None
    if bias is not None and needs[3]:
        list_batch, list_heads = problem[_LIST_SHAPE]
        batch, kv_heads = problem[1].shape[0], problem[1].shape[-2]
        copies = bias.new_empty(
            (batch if list_batch == 1 else 1, kv_heads if list_heads == 1 else 1, *bias.shape)
        )
    wanted = dsinks if sink_logits is not None and needs[4] else None
    _C.routed_backward(problem, out, lse, dout, dlse, (dquery, dkey, dvalue, copies, wanted))
    if copies is not None:
        dbias = copies.sum((0, 1))
    return dquery, dkey, dvalue, dbias, dsinks


for _name, _cpu, _fake in (
    ("routed_forward", _forward_cpu, _forward_fake),
    ("routed_backward", _backward_cpu, _backward_fake),
):
    LIBRARY.impl(_name, _cpu, "CPU")
    torch.library.register_fake(f"attnext::{_name}", _fake, lib=LIBRARY)


def _forward(*problem: Any) -> tuple[Tensor, Tensor]:
    results: tuple[Tensor, Tensor] = torch.ops.attnext.routed_forward.default(*problem)
    return results


def _backward(*args: Any) -> tuple[Tensor, ...]:
    grads: tuple[Tensor, ...] = torch.ops.attnext.routed_backward.default(*args)
    return grads


class _Routed(torch.autograd.Function):
    """routed_forward with its gradients, for reverse mode once."""

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
        nothing = (None,) * (_NUM_TENSORS - _NUM_GRADS + len(ctx.plain))
        if dout is None and dlse is None:
            return (None,) * _NUM_GRADS + nothing
        if dout is None:
            dout = torch.zeros_like(out)
        needs = [bool(n) for n in ctx.needs_input_grad[:_NUM_GRADS]]
        backward = _RoutedBackward.apply if transforms_are_active() else _backward
        grads = backward(*tensors, *ctx.plain, out, lse, dout, dlse, needs)
        wanted = (
            g if t is not None and need else None
            for g, t, need in zip(grads, tensors[:_NUM_GRADS], needs, strict=True)
        )
        return (*wanted, *nothing)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *problem: Any) -> Any:
        return _sliced(_Routed.apply, info.batch_size, in_dims, problem)


class _RoutedBackward(torch.autograd.Function):
    """routed_backward; exists for its vmap rule, and to refuse a second derivative."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return _backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("attnext: routed attention has no second derivative")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _sliced(_RoutedBackward.apply, info.batch_size, in_dims, args)


def _sliced(apply: Any, size: int, in_dims: Any, args: tuple[Any, ...]) -> Any:
    """Runs an op over a vmapped dimension, one slice at a time: lists may differ in each."""
    slices = [
        apply(
            *(
                a.select(d, i).contiguous() if isinstance(d, int) else a
                for a, d in zip(args, in_dims, strict=True)
            )
        )
        for i in range(size)
    ]
    outputs = tuple(torch.stack(parts) for parts in zip(*slices, strict=True))
    return outputs, (0,) * len(outputs)


def routed_op(*problem: Any) -> tuple[Tensor, Tensor]:
    """Outputs and lse, entering autograd only where it is needed."""
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in problem[:_NUM_GRADS]
    )
    function: Any = _Routed.apply if needs_grad or transforms_are_active() else _forward
    results: tuple[Tensor, Tensor] = function(*problem)
    return results
