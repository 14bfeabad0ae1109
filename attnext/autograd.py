# SPDX-License-Identifier: Apache-2.0
"""What the operators' autograd functions share: reverse mode, once, and rules for vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

# Runs an operator over a vmapped dimension: batched(apply, size, in_dims, args, more), where `more`
# are the places of tensors beside those of the problem.
Batched = Callable[[Any, int, Any, tuple[Any, ...], tuple[int, ...]], Any]


def differentiable(
    name: str,
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]],
    batched: Batched,
    num_tensors: int,
    num_grads: int,
    num_results: int,
    results_asked: Callable[[Any, Any], Any] = lambda plain, grads: grads,
) -> Any:
    """``apply`` of forward(*problem) with its gradients.

    A problem begins with ``num_tensors`` tensors, of which the first ``num_grads`` have gradients;
    the rest is plain. backward takes the problem, its first two results, the gradients of all
    results and a list of the gradients that are needed. ``results_asked(plain, grads)``: None in
    the place of gradients of results that nobody asked for.
    """

    class Backward(torch.autograd.Function):
        """Exists for its vmap rule, and to refuse a second derivative."""

        @staticmethod
        def forward(*args: Any) -> Any:
            return backward(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(f"attnext: {name} has no second derivative")

        @staticmethod
        def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
            needs = len(args) - 1
            more = tuple(range(needs - num_results - 2, needs))
            return batched(Backward.apply, info.batch_size, in_dims, args, more)

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(*problem: Any) -> Any:
            return forward(*problem)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs[:num_tensors], *output[:2])
            ctx.plain = inputs[num_tensors:]
            ctx.set_materialize_grads(False)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            *tensors, out, second = ctx.saved_tensors
            nothing = (None,) * len(ctx.plain)
            dout, *rest = results_asked(ctx.plain, grads)
            if dout is None and all(g is None for g in rest):
                return (None,) * num_tensors + nothing
            if dout is None:
                dout = torch.zeros_like(out)
            needs = [bool(n) for n in ctx.needs_input_grad[:num_grads]]
            run = Backward.apply if transforms_are_active() else backward
            found = run(*tensors, *ctx.plain, out, second, dout, *rest, needs)
            wanted = (
                g if t is not None and need else None
                for g, t, need in zip(found, tensors[:num_grads], needs, strict=True)
            )
            return (*wanted, *(None,) * (num_tensors - num_grads), *nothing)

        @staticmethod
        def vmap(info: Any, in_dims: Any, *problem: Any) -> Any:
            return batched(Forward.apply, info.batch_size, in_dims, problem, ())

    return Forward.apply


def one_slice_at_a_time(apply: Any, size: int, in_dims: Any, args: tuple[Any, ...]) -> Any:
    """Runs an op over a vmapped dimension that nothing folds into the batch."""
    slices = [
        apply(
            *(
                a.select(d, i) if isinstance(d, int) else a
                for a, d in zip(args, in_dims, strict=True)
            )
        )
        for i in range(size)
    ]
    outputs = tuple(torch.stack(parts) for parts in zip(*slices, strict=True))
    return outputs, (0,) * len(outputs)


def transforms_are_active() -> bool:
    """Under torch.func a tensor's requires_grad does not tell, and vmap needs its rule."""
    return not is_compiling() and torch._C._are_functorch_transforms_active()


def needs_autograd(leaves: tuple[Any, ...]) -> bool:
    """Whether an operator on them, or None, must enter autograd."""
    if torch.is_grad_enabled():
        for t in leaves:
            if t is not None and t.requires_grad:
                return True
    return transforms_are_active()
