# SPDX-License-Identifier: Apache-2.0
"""How exact is exact enough, and on which kernels: what the tests of attnext are written with.

One error budget serves all of them. An op may differ from the float64 result by at most twice what
the same formula in plain torch, at the precision of the inputs, differs from it, plus one rounding
of the output. Nothing is tuned by hand, so a kernel that loses digits has no constant to hide
behind.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def available_isas() -> list[str]:
    """Names of the instruction sets this machine and this build can run the CPU kernels on."""
    from attnext import _C

    return list(_C.available_isas())


@contextlib.contextmanager
def isa(name: str) -> Iterator[None]:
    """Run the CPU kernels of one instruction set."""
    from attnext import _C

    before = _C.isa()
    _C.set_isa(name)
    try:
        yield
    finally:
        _C.set_isa(before)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def evaluate(
    function: Callable[..., Any],
    tensors: Mapping[str, Tensor],
    options: Mapping[str, Any] | None = None,
    cotangents: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """``out``, ``lse`` and, given cotangents of both, ``grad_x`` of every floating tensor ``x``."""
    leaves = {
        name: tensor.detach().requires_grad_(cotangents is not None and tensor.is_floating_point())
        for name, tensor in tensors.items()
    }
    out, lse = function(**leaves, **(options or {}), return_lse=True)
    results = {"out": out.detach(), "lse": lse.detach()}
    if cotangents is not None:
        names = [name for name, leaf in leaves.items() if leaf.requires_grad]
        grads = torch.autograd.grad(
            (out, lse),
            [leaves[name] for name in names],
            (cotangents[0].to(out.dtype), cotangents[1].to(lse.dtype)),
        )
        results |= {f"grad_{name}": grad for name, grad in zip(names, grads, strict=True)}
    return results


def error_budget(exact: Tensor, plain: list[Tensor], dtype: torch.dtype) -> dict[str, float]:
    """Root-mean-square and largest error that a result in ``dtype`` may have.

    Shapes: exact is the float64 result, plain what the same formula gives in plain torch at the
        precision of the inputs: several evaluations that differ by nothing but rounding, because a
        single small tensor may come out right by luck. All have one shape.
    Numerics: ``2 * (error of plain + one rounding of the output)``. Luck may be another factor of 2
        in the largest of many errors, and ``1 + 2 / sqrt(n)``, at most 2, in the mean of n that are
        independent: entries along the last axis share the error of their weights and count as one,
        and a few rows with far larger errors than the rest are few. The largest catches the wrong
        entry that a mean hides.
    Errors: ValueError where plain is not finite though exact is: nothing can be held against that.
    Complexity: linear.
    Source: FlashAttention's and attention-gym's rule of twice the low-precision reference's error.
    Example:

        >>> exact = torch.ones(99, dtype=torch.float64)
        >>> error_budget(exact, [torch.ones(99)], torch.float32)["root-mean-square"] == 2**-23
        True
    """
    finite = torch.isfinite(exact)
    magnitude = exact[finite].double()
    errors = [other[finite].double() - magnitude for other in plain]
    for error in errors:
        if not torch.isfinite(error).all():
            raise ValueError("the plain formula is not finite where the exact result is")
    rounding = torch.finfo(dtype).eps / 2
    count = _independent(torch.stack([other.double() - exact.double() for other in plain]))
    luck = {"largest": 2.0, "root-mean-square": min(2.0, 1 + 2 / math.sqrt(count))}
    budget = {}
    for name, norm in _NORMS.items():
        allowed = max(map(norm, errors)) + rounding * norm(magnitude)
        budget[name] = 2 * luck[name] * allowed
    return budget


def assert_within_budget(
    actual: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
    reference: Callable[..., Any],
    tensors: Mapping[str, Tensor],
    options: Mapping[str, Any] | None = None,
    cotangents: tuple[Tensor, Tensor] | None = None,
) -> dict[str, float]:
    """Hold results of ``evaluate`` against the error budget.

    Shapes: ``actual`` is ``evaluate(op, tensors, options, cotangents)``, or several of them, say
        one for each instruction set; ``reference`` takes what ``op`` takes, and ``dtype`` and
        ``average`` as ``attnext.reference`` does.
    Numerics: infinite and NaN entries must be those of the float64 result. Half-precision inputs
        are held to what float32 arithmetic gives, with weights rounded to the dtype as matrix units
        take them, rounded to the dtype of the result; float64 to twice the errors of float32,
        scaled by the ratio of the two precisions.
    Errors: AssertionError naming the result, its error and its budget.
    Complexity: a few evaluations of the reference.
    Source: ``error_budget``.
    Example:

        >>> from attnext import reference
        >>> x = {name: torch.randn(1, 5, 2, 4) for name in ("query", "key", "value")}
        >>> def op(**inputs):
        ...     return reference.attention(**inputs, dtype=torch.float32)
        >>> fractions = assert_within_budget(evaluate(op, x), reference.attention, x)
        >>> max(fractions.values()) <= 1
        True

    Returns the largest fraction of its budget that each result has used.
    """
    options = dict(options or {})
    actuals = [actual] if isinstance(actual, Mapping) else list(actual)
    stored = tensors["query"].dtype
    generator = torch.Generator().manual_seed(0)

    def run(
        dtype: torch.dtype, inputs: Mapping[str, Tensor], given: Any = cotangents, **more: Any
    ) -> dict[str, Tensor]:
        return evaluate(reference, inputs, {**options, **more, "dtype": dtype}, given)

    def plain_run(inputs: Mapping[str, Tensor], noise: torch.Generator | None) -> dict[str, Tensor]:
        def average(logits: Tensor, values: Tensor) -> Any:
            return _Recomputed.apply(logits, values, stored, noise)

        given = cotangents
        if noise and cotangents:  # a sum of these alone would err the same in all evaluations
            out, lse = (_move(x.float(), torch.float32, noise) for x in cotangents)
            given = out, lse
        return run(torch.float32, inputs, given, average=average)

    exact = run(torch.float64, _cast(tensors, torch.float64))
    single = _cast(tensors, torch.float32)
    # A gradient of few entries needs more samples of its rounding error than a large one.
    samples = 10 if min(result.numel() for result in exact.values()) < _FEW else 4
    plain = [plain_run(single, None)]
    plain += [plain_run(_jitter(single, generator), generator) for _ in range(samples)]
    if stored == torch.float64:  # what float32 loses, in proportion: nothing is more exact
        truth = run(torch.float64, _cast(single, torch.float64))
        ratio = torch.finfo(stored).eps / torch.finfo(torch.float32).eps
        ratio *= 2  # what is compared with errs as much itself
        plain = [
            {name: exact[name] + ratio * (x - truth[name]) for name, x in results.items()}
            for results in plain
        ]

    fractions: dict[str, float] = {}
    for name, result in ((n, r) for results in actuals for n, r in results.items()):
        expected, others = exact[name], [results[name].to(result.dtype) for results in plain]
        assert result.shape == expected.shape, (
            f"{name} has shape {tuple(result.shape)}, not {tuple(expected.shape)}"
        )
        finite = torch.isfinite(expected)
        same = torch.equal(result.double()[~finite].nan_to_num(), expected[~finite].nan_to_num())
        assert same and torch.isfinite(result[finite]).all(), (
            f"{name} is not finite where the exact result is, or the other way round"
        )
        if name == "out":
            empty = exact["lse"] == -torch.inf
            assert not result[empty].any(), "out is not exactly 0 in a row without keys"
        error = result.double()[finite] - expected[finite]
        for norm, allowed in error_budget(expected, others, result.dtype).items():
            got = _NORMS[norm](error)
            assert got <= allowed, (
                f"{name} ({result.dtype}): {norm} error {got:.3e} exceeds the budget {allowed:.3e}"
            )
            used = got / allowed if allowed else 0.0
            fractions[name] = max(fractions.get(name, 0.0), used)
    return fractions


class _Recomputed(torch.autograd.Function):
    """``reference.softmax_average`` as an op computes it that keeps no matrix of weights.

    Exponentials are in base 2. The backward pass recomputes the weights from lse, and reads the sum
    over keys in the derivative of the softmax off the stored output: ``sum(dO * O) - dLSE``. What
    the conversions of lse between the bases lose is left out, since two that cancel would hide what
    its rounding costs. ``noise`` makes the products take weights that are off by a rounding to
    ``stored``, which is how matrix units take them.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, values: Tensor, stored: torch.dtype, noise: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        logits = logits / math.log(2)
        top = logits.amax(dim=-1, keepdim=True)
        top = torch.where(top == -torch.inf, 0.0, top)
        weights = torch.exp2(logits - top)
        total = weights.sum(dim=-1, keepdim=True)
        lse = (top.double() * math.log(2) + torch.log(total.double())).to(weights.dtype)
        used = _move(weights, stored, noise) if noise else weights
        out = torch.einsum("bhij,bjhd->bihd", used, values)
        out = out / torch.where(total == 0, 1.0, total).transpose(1, 2)
        ctx.stored, ctx.noise = stored, noise
        ctx.save_for_backward(logits, values, out.to(stored).to(out.dtype), lse)
        return out, lse.squeeze(-1).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        logits, values, out, lse = ctx.saved_tensors
        grad_out, grad_lse = grads
        lse = torch.where(lse == -torch.inf, torch.inf, lse)  # a row without keys: weights 0
        exponents = logits.double() - lse.double() * math.log2(math.e)
        weights = torch.exp2(exponents.to(logits.dtype))
        used = _move(weights, ctx.stored, ctx.noise) if ctx.noise else weights
        grad_weights = torch.einsum("bihd,bjhd->bhij", grad_out, values)
        delta = ((grad_out * out).sum(dim=-1) - grad_lse).transpose(1, 2).unsqueeze(-1)
        grad_values = torch.einsum("bhij,bihd->bjhd", used, grad_out)
        return weights * (grad_weights - delta), grad_values, None, None


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def _independent(errors: Tensor) -> float:
    """How many errors a mean square is made of: participation ratio of rows [samples, *rows, n]."""
    squares = errors.nan_to_num().square().mean(dim=0)
    squares = squares.sum(dim=-1) if squares.ndim else squares
    total = squares.sum().square().item()
    return total / squares.square().sum().item() if total else math.inf


_FEW = 16
_NORMS = {"root-mean-square": _root_mean_square, "largest": _largest}


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: x.to(dtype) if x.is_floating_point() else x for n, x in tensors.items()}


def _move(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Each entry moved by up to one unit in the last place of ``dtype``, about as rounding does."""
    noise = torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1
    return (x.double() * (1 + torch.finfo(dtype).eps * noise)).to(x.dtype)


def _jitter(tensors: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """The same inputs, each entry moved by about one rounding."""
    return {
        name: _move(x, x.dtype, generator) if x.is_floating_point() else x
        for name, x in tensors.items()
    }
