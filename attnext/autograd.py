# SPDX-License-Identifier: Apache-2.0
"""What the operators share: reverse mode, once, and rules for vmap.

Where nothing but autograd stands between a call and the kernels, calls go there past the
dispatcher, which costs more than a small window. All else (compilers, tracers, torch.func, modes,
subclasses) meets the registered operators, which know their gradients and vmap themselves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

LIBRARY = torch.library.Library("attnext", "DEF")

# Runs an operator over a vmapped dimension: batched(apply, size, in_dims, args, more), where `more`
# are the places of tensors beside those of the problem.
Batched = Callable[[Any, int, Any, tuple[Any, ...], tuple[int, ...]], Any]


def differentiable(
    op: str,
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]],
    batched: Batched,
    num_tensors: int,
    num_grads: int,
    num_results: int,
    num_saved: int = 2,
    results_asked: Callable[[Any, Any], Any] = lambda plain, grads: grads,
) -> Any:
    """Gives the operators ``{op}_forward`` and ``{op}_backward`` their gradients and vmap rules,
    and returns the call of it all: forward(*problem) on plain tensors, with gradients from backward
    where they are needed, on others the operator.

    A problem begins with ``num_tensors`` tensors, of which the first ``num_grads`` have gradients;
    the rest is plain. backward takes the problem, its first ``num_saved`` results, the gradients of
    the ``num_results`` that have one, and a list of the gradients that are needed.
    ``results_asked(plain, grads)``: of the gradients of all results those that backward takes, None
    in the place of what nobody asked for.
    """
    forward_op = getattr(torch.ops.attnext, f"{op}_forward").default
    backward_op = getattr(torch.ops.attnext, f"{op}_backward").default

    def save(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:num_tensors], *output[:num_saved])
        ctx.plain = inputs[num_tensors:]
        ctx.set_materialize_grads(False)

    def gradients(run: Callable[..., tuple[Tensor, ...]], ctx: Any, *grads: Tensor | None) -> Any:
        tensors, saved = ctx.saved_tensors[:num_tensors], ctx.saved_tensors[num_tensors:]
        nothing = (None,) * len(ctx.plain)
        dout, *rest = results_asked(ctx.plain, grads)
        if dout is None and all(g is None for g in rest):
            return (None,) * num_tensors + nothing
        if dout is None:
            dout = torch.zeros_like(saved[0])
        needs = [bool(n) for n in ctx.needs_input_grad[:num_grads]]
        found = run(*tensors, *ctx.plain, *saved, dout, *rest, needs)
        wanted = (
            g if t is not None and need else None
            for g, t, need in zip(found, tensors[:num_grads], needs, strict=True)
        )
        return (*wanted, *(None,) * (num_tensors - num_grads), *nothing)

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise _no_second_derivative(f"attnext::{op}_forward")

    class Backward(torch.autograd.Function):
        """Exists for its vmap rule, and to refuse a second derivative."""

        @staticmethod
        def forward(*args: Any) -> Any:
            return backward(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        backward = staticmethod(refuse)

        @staticmethod
        def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
            needs = len(args) - 1
            more = tuple(range(needs - num_results - num_saved, needs))
            return batched(Backward.apply, info.batch_size, in_dims, args, more)

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(*problem: Any) -> Any:
            return forward(*problem)

        setup_context = staticmethod(save)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            followed = torch.is_grad_enabled() and not is_compiling()  # by a second derivative
            return gradients(Backward.apply if followed else backward, ctx, *grads)

        @staticmethod
        def vmap(info: Any, in_dims: Any, *problem: Any) -> Any:
            return batched(Forward.apply, info.batch_size, in_dims, problem, ())

    names = f"attnext::{op}_forward", f"attnext::{op}_backward"
    of_op = functools.partial(gradients, backward_op)
    torch.library.register_autograd(names[0], of_op, setup_context=save, lib=LIBRARY)
    torch.library.register_autograd(names[1], refuse, lib=LIBRARY)
    # torch.func wants autograd.Functions of this kind.
    for name, function in zip(names, (Forward, Backward), strict=True):
        LIBRARY.impl(name, function.apply, "FuncTorchDynamicLayerFrontMode")

    def call(*problem: Any) -> Any:
        if not is_plain(problem[:num_tensors]):
            refuse_forward_mode(names[0], problem[:num_grads])
            return forward_op(*problem)
        function: Any = Forward.apply if needs_gradient(problem[:num_grads]) else forward
        return function(*problem)

    return call


def _no_second_derivative(name: str) -> NotImplementedError:
    return NotImplementedError(f"{name} has no second derivative")


class _Refusing(torch.autograd.Function):
    """Gradients that depend on tensors in a way that is not known."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, count: int, *tensors: Tensor) -> Any:
        return tuple(t.clone() for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise _no_second_derivative(ctx.name)


def differentiable_once(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For the backward of an autograd.Function that saves what its gradients depend on: these raise
    NotImplementedError when they are differentiated. torch's ``once_differentiable`` takes them for
    constants wherever the gradients of results, and not what was saved, depend on nothing."""

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def once(ctx: Any, *grads: Any) -> Any:
            if is_compiling():
                return backward(ctx, *grads)
            with torch.no_grad():
                found = backward(ctx, *grads)
            found = found if isinstance(found, tuple) else (found,)
            given = [g for g in found if g is not None]
            if not torch.is_grad_enabled() or not given:
                return found
            causes = [t for t in (*ctx.saved_tensors, *grads) if t is not None]
            refusing = iter(_Refusing.apply(name, len(given), *given, *causes))
            return tuple(None if g is None else next(refusing) for g in found)

        return once

    return decorate


def one_slice_at_a_time(apply: Any, size: int, in_dims: Any, args: tuple[Any, ...]) -> Any:
    """Runs an op over a vmapped dimension that nothing folds into the batch."""

    def slice_of(a: Any, dim: Any, i: int) -> Any:
        if not isinstance(dim, int):
            return a
        return a.select(dim, i) if size else a.new_zeros(a.shape[:dim] + a.shape[dim + 1 :])

    slices = [
        apply(*(slice_of(a, d, i) for a, d in zip(args, in_dims, strict=True)))
        for i in range(max(size, 1))  # of none, for the shapes of its results
    ]
    outputs = tuple(torch.stack(parts)[:size] for parts in zip(*slices, strict=True))
    return outputs, (0,) * len(outputs)


_TYPES = (Tensor, torch.nn.Parameter)


_SERIAL = 32768  # numbers that torch adds up in one thread
_ROW = 4096


def spread(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``t`` broadcast to ``shape``. A gradient that ends in a single number torch adds up in as
    many parts as it has threads, whose number its bits should not depend on: it is summed in rows
    first."""
    count = math.prod(shape)
    if t.numel() != 1 or not t.requires_grad or count < _SERIAL:
        return t.expand(shape)
    rows = (count + _ROW - 1) // _ROW
    return t.reshape(1, 1).expand(rows, 1).expand(rows, _ROW).reshape(-1)[:count].reshape(shape)


def is_plain(tensors: tuple[Any, ...]) -> bool:
    """Whether nothing but autograd is between a call with these (or None) and the kernels."""
    if (
        is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    for t in tensors:
        if t is not None and not (
            type(t) in _TYPES
            and (t.is_cpu or t.is_cuda)
            and not t.is_neg()
            and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        ):
            return False
    return True


def needs_gradient(leaves: tuple[Any, ...]) -> bool:
    """Whether autograd has a part in a call with these, or None."""
    if torch.is_grad_enabled():
        for t in leaves:
            if t is not None and t.requires_grad:
                return True
    return False


def refuse_forward_mode(name: str, tensors: tuple[Any, ...]) -> None:
    """Errors: NotImplementedError if one of the tensors (or None) has a tangent."""
    if is_compiling() or forward_ad._current_level < 0:
        return
    for t in tensors:
        if t is not None and forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(f"{name} has no forward-mode derivative")
