# SPDX-License-Identifier: Apache-2.0
"""SpikMamba's spiking attention: leaky integrate-and-fire neurons make queries and keys of spikes,
which attend by linear attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.functional import elu

from .arguments import (
    DTYPE_NAMES,
    check_dense,
    check_device,
    check_flag,
    check_integer,
    check_tensor,
    finite_number,
    kind_of,
    under_autocast,
    without_autocast,
)
from .autograd import differentiable_once
from .based import check_heads
from .linear import linear_attention
from .ops import DTYPES, accumulator_dtype
from .rotary import rotary_embedding


class _Lif(torch.autograd.Function):
    """Spikes and the last membrane. The loop over time keeps no graph: one potential a step is
    saved, and the way back is a loop of its own."""

    @staticmethod
    def forward(
        x: Tensor, membrane: Tensor, tau: float, threshold: float, slope: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        potentials = []
        for now in x.unbind(1):
            potential = membrane + (now - membrane) / tau
            potentials.append(potential)
            membrane = torch.where(potential >= threshold, 0.0, potential)
        before = torch.stack(potentials, dim=1)
        return (before >= threshold).to(x.dtype), membrane, before

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.plain = inputs[2:]
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(output[2], *inputs[:2])  # the potentials, and what they depend on
        ctx.set_materialize_grads(False)

    @staticmethod
    @differentiable_once("lif_spikes")
    def backward(ctx: Any, dspikes: Tensor | None, dmembrane: Tensor | None, _: Any) -> Any:
        potentials, *_ = ctx.saved_tensors
        tau, threshold, slope = ctx.plain
        grad = torch.zeros_like(potentials[:, 0]) if dmembrane is None else dmembrane
        grads = []
        for t in range(potentials.shape[1] - 1, -1, -1):
            potential = potentials[:, t]
            grad = torch.where(potential >= threshold, 0.0, grad)
            if dspikes is not None:
                soft = torch.sigmoid(slope * (potential - threshold))
                grad = grad + dspikes[:, t] * (slope * soft * (1 - soft))
            grads.append(grad / tau)
            grad = grad - grads[-1]
        return torch.stack(grads[::-1], dim=1), grad, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        size, (x, membrane, *plain) = info.batch_size, args
        folded = [
            (t.expand(size, *t.shape) if d is None else t.movedim(d, 0)).flatten(0, 1)
            for t, d in zip((x, membrane), in_dims, strict=False)
        ]
        results = _Lif.apply(*folded, *plain)
        return tuple(t.unflatten(0, (size, -1)) for t in results), (0, 0, 0)


def lif_spikes(
    x: Tensor,
    *,
    tau: float = 2.0,
    threshold: float = 1.0,
    surrogate_slope: float = 4.0,
    membrane: Tensor | None = None,
    output_membrane: bool = False,
) -> Any:
    """Leaky integrate-and-fire neurons: ``u += (x_t - u) / tau``; where ``u >= threshold`` there is
    a spike, and ``u`` is 0 again.

    Shapes:
        x ``[B, T, ...]``, time on the second axis; the spikes, 0 or 1, are the same. membrane
        ``[B, ...]``.

    Args:
        tau: time constant, at least 1.
        surrogate_slope: the gradient of a spike is that of ``sigmoid(surrogate_slope (u -
            threshold))``. Where it resets, a spike is a constant.
        membrane: what is there before the first step (by default 0). Differentiable.
        output_membrane: also returns what is left after the last, in float32 (float64 for
            float64): the ``membrane`` of the steps that follow. Differentiable.

    Numerics:
        The membrane in float32 (float64 for float64). Gradients of first order; their sigmoid is
        torch's, which rounds a number's last bit by its place in memory.

    Errors:
        ValueError or TypeError, naming the argument.

    Complexity:
        Linear; one potential for each entry is kept for the gradient.

    Source:
        Surrogate gradients (arXiv 1901.09948); as in SpikMamba (2410.16746).

    Example:
        >>> import torch, attnext
        >>> attnext.lif_spikes(torch.tensor([[1.5, 1.5, 0.0]]))
        tensor([[0., 1., 0.]])
    """
    if is_compiling() or torch._C._is_any_autocast_enabled():
        (x,) = under_autocast(x)
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be one of {DTYPE_NAMES}, got {x.dtype}")
    check_dense("x", x)
    if x.dim() < 2 or x.shape[1] < 1:
        raise ValueError(f"x must be [batch, time, ...] with time at least 1, got {tuple(x.shape)}")
    _check_neuron(tau, threshold, surrogate_slope)
    check_flag("output_membrane", output_membrane)
    acc = accumulator_dtype(x.dtype)
    rest = (x.shape[0], *x.shape[2:])
    if membrane is None:
        membrane = x.new_zeros(rest, dtype=acc)
    else:
        check_tensor("membrane", membrane, "a floating-point")
        check_device("membrane", membrane, x, "x")
        if membrane.shape != rest:
            raise ValueError(f"membrane must be {rest}, got {tuple(membrane.shape)}")
    spikes, left, _ = _Lif.apply(x.to(acc), membrane.to(acc), tau, threshold, surrogate_slope)
    spikes = spikes.to(x.dtype)
    return (spikes, left) if output_membrane else spikes


def _check_neuron(tau: Any, threshold: Any, surrogate_slope: Any) -> None:
    for name, number, least in (
        ("tau", tau, 1.0),
        ("threshold", threshold, 0.0),
        ("surrogate_slope", surrogate_slope, 0.0),
    ):
        if finite_number(name, number) < least:
            raise ValueError(f"{name} must be at least {least:g}, got {number}")


def spiking_attention(
    query: Tensor, key: Tensor, value: Tensor, *, base: float = 10000.0, eps: float = 1e-6
) -> Tensor:
    """Linear attention among all tokens, with features ``phi(x) = elu(x) + 1``: 1 without a spike,
    2 with one. Rotary positions turn the features that weigh values, and not those that the weights
    are divided by:
    ``o_i = sum_j (R_i phi(q_i)) . (R_j phi(k_j)) v_j / (phi(q_i) . sum_j phi(k_j) + n eps)`` over
    ``n`` tokens.

    Shapes:
        query, key ``[B, *tokens, H, D]`` with one to three token axes, value ``[B, *tokens, H,
        V]``; the result is the last. A window is a sequence of its own: it stands in the batch.
        ``H D`` is a multiple of twice the number of axes: turned are the channels of all heads as
        one vector (:func:`rotary_embedding` of ``[B, *tokens, 1, H D]``).

    Args:
        base: of the rotary speeds.
        eps: keeps the denominator, which is not below ``D``, off 0; the released code has it.

    Numerics:
        Everything in float32 (float64 for float64), one rounding at the store; the sums of spikes'
        features are exact integers. Differentiable. The bits do not depend on threads or other
        batch items where queries and keys are spikes: torch, which makes the features, rounds elu
        of other numbers by their place in memory.

    Errors:
        ValueError or TypeError, naming the argument.

    Complexity:
        O(n D V) time and O(n (D + V)) memory.

    Source:
        SpikMamba (arXiv 2410.16746), after MLLA (2405.16605).

    Example:
        >>> import torch, attnext
        >>> q, k = (torch.randn(2, 4, 8, 8, 2, 16) for _ in range(2))  # clips of 4 frames
        >>> q, k = (attnext.lif_spikes(3 * x).flatten(0, 1) for x in (q, k))
        >>> attnext.spiking_attention(q, k, torch.randn(8, 8, 8, 2, 16)).shape
        torch.Size([8, 8, 8, 2, 16])
    """
    if is_compiling() or torch._C._is_any_autocast_enabled():
        query, key, value = under_autocast(query, key, value)
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor) or t.dtype not in DTYPES or t.dtype != query.dtype:
            raise TypeError(f"{name} must be like query one of {DTYPE_NAMES}, got {kind_of(t)}")
        check_dense(name, t)
        check_device(name, t, query)
    rank = query.dim() - 3
    if not 1 <= rank <= 3 or key.shape != query.shape or value.shape[:-1] != query.shape[:-1]:
        raise ValueError(
            "query and key must be [batch, *tokens, heads, head_dim] with 1 to 3 token axes, and "
            f"value the same but for head_dim, got shapes {tuple(query.shape)}, "
            f"{tuple(key.shape)} and {tuple(value.shape)}"
        )
    channels = math.prod(query.shape[-2:])
    if channels < 1 or channels % (2 * rank):
        raise ValueError(
            f"query must have a multiple of {2 * rank} channels in all heads together, got "
            f"{channels}"
        )
    if finite_number("eps", eps) < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    acc = accumulator_dtype(query.dtype)
    features = [elu(x.to(acc)) + 1 for x in (query, key)]
    with without_autocast(query):
        turned_q, turned_k = (
            rotary_embedding(x.flatten(-2)[..., None, :], base=base)
            .reshape(x.shape)
            .flatten(1, rank)
            for x in features
        )
        plain_q, plain_k = (x.flatten(1, rank) for x in features)
        mixed = linear_attention(
            turned_q, turned_k, value.to(acc).flatten(1, rank), is_causal=False, normalize=True,
            normalizer_query=plain_q, normalizer_key=plain_k, eps=eps,
            scale=1 / max(plain_q.shape[1], 1),
        )  # fmt: skip
    return mixed.to(query.dtype).unflatten(1, query.shape[1 : rank + 1])


class SpikingAttention(nn.Module):
    """A layer of SpikMamba: queries and keys are spikes of projected tokens, values the tokens
    themselves; a convolution of the values beside it says where they are.

    Shapes: ``[B, T, rows, columns, dim]`` in and out, frames of ``grid``; tokens attend those of
        their own frame, and membranes remember the frames before. The membrane is ``[B, rows *
        columns, 2 dim]``.
    Args:
        dim: of the tokens, a multiple of 4 and of ``num_heads``.
        num_heads: heads.
        grid: rows and columns; every token has batch statistics of its own.
        tau, threshold, surrogate_slope: see :func:`lif_spikes`.
    Numerics, Errors, Complexity: those of :func:`spiking_attention`.
    Source: SpikMamba (arXiv 2410.16746), whose released code has one sequence of all frames of a
        batch where this has a sequence for each clip: that is ``B`` = 1.
    Example:

        >>> import torch, attnext
        >>> layer = attnext.SpikingAttention(32, num_heads=2, grid=(8, 8))
        >>> layer(torch.randn(2, 3, 8, 8, 32)).shape
        torch.Size([2, 3, 8, 8, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        *,
        tau: float = 2.0,
        threshold: float = 1.0,
        surrogate_slope: float = 4.0,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if dim % 4:
            raise ValueError(f"dim must be a multiple of 4, a pair for each axis, got {dim}")
        if not isinstance(grid, tuple) or len(grid) != 2:
            raise TypeError(f"grid must be a tuple (rows, columns), got {grid!r}")
        for size in grid:
            check_integer("grid", size, 1)
        _check_neuron(tau, threshold, surrogate_slope)
        self.num_heads = num_heads
        self.grid = grid
        self.neuron = {"tau": tau, "threshold": threshold, "surrogate_slope": surrogate_slope}
        self.enter = nn.Linear(dim, 2 * dim)
        self.norm = nn.BatchNorm1d(math.prod(grid))
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(
        self, x: Tensor, membrane: Tensor | None = None, output_membrane: bool = False
    ) -> Any:
        """With ``output_membrane`` also what the frames leave behind, the ``membrane`` of those
        that follow."""
        check_tensor("x", x, "a floating-point")
        check_flag("output_membrane", output_membrane)
        dim = self.enter.in_features
        if x.dim() != 5 or x.shape[2:] != (*self.grid, dim):
            raise ValueError(
                f"x must be [batch, time, rows, columns, dim] ending in {(*self.grid, dim)}, got "
                f"shape {tuple(x.shape)}"
            )
        clips = x.shape[:2]
        frames = x.flatten(0, 1)
        driven = self.norm(self.enter(frames.flatten(1, 2))).unflatten(0, clips)
        spikes, left = lif_spikes(driven, membrane=membrane, output_membrane=True, **self.neuron)
        heads = spikes.flatten(0, 1).unflatten(1, self.grid)
        query, key, value = (
            t.unflatten(-1, (self.num_heads, -1)) for t in (*heads.chunk(2, dim=-1), frames)
        )
        mixed = spiking_attention(query, key, value).flatten(-2)
        nearby = self.position(frames.movedim(-1, 1)).movedim(1, -1)
        out = (mixed + nearby).unflatten(0, clips)
        return (out, left) if output_membrane else out
