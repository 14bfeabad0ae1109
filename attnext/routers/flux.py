# SPDX-License-Identifier: Apache-2.0
"""Flux attention (arXiv 2604.07394): each layer of a frozen model chooses full or sparse attention
for a whole segment."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_flag, check_tensor, finite_number, kind_of
from ..merging import merge
from .inputs import check_integer, check_number, exact

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

_FULL_BIAS = 4.5  # of the logit for full attention, in the beginning


class LayerRouter(nn.Module):
    """Full or sparse attention, from the mean query of the ends of a segment.

    Shapes:
        query ``[B, N, H, D]``; logits ``[B, 2]``, for full and for sparse.

    Args:
        head_dim: of the queries.
        pool_tokens: first and last tokens that are averaged, each once where they meet.

    Numerics:
        The mean in float32 (float64 for float64), the layers in the dtype of their weights.

    Errors:
        ValueError or TypeError, naming the argument.

    Source:
        Flux attention (arXiv 2604.07394).

    Example:
        >>> import torch
        >>> from attnext.routers.flux import LayerRouter
        >>> LayerRouter(16)(torch.randn(2, 300, 4, 16)).shape
        torch.Size([2, 2])
    """

    def __init__(self, head_dim: int, pool_tokens: int = 100) -> None:
        super().__init__()
        check_integer("head_dim", head_dim, 1)
        check_integer("pool_tokens", pool_tokens, 1)
        self.pool_tokens = pool_tokens
        d = head_dim
        last = nn.Linear(d, 2)
        with torch.no_grad():
            last.bias[0] = _FULL_BIAS
        self.encoder = nn.Sequential(nn.Linear(d, 8 * d), nn.SiLU(), nn.Linear(8 * d, 2 * d))
        self.head = nn.Sequential(
            nn.Linear(2 * d, 4 * d), nn.SiLU(), nn.Linear(4 * d, d), nn.SiLU(), last
        )

    def pool(self, query: Tensor) -> Tensor:
        """The mean over the ends and the heads, ``[B, D]``."""
        check_tensor("query", query, "a floating-point")
        if query.dim() != 4 or query.shape[1] == 0:
            raise ValueError(f"query must be [B, N, H, D] with tokens, got {tuple(query.shape)}")
        tokens, most = query.shape[1], self.pool_tokens
        if tokens <= 2 * most:
            return exact(query).mean((1, 2))
        ends = torch.cat([query[:, :most], query[:, -most:]], 1)
        return exact(ends).mean((1, 2))

    def forward(self, query: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        pooled, head_dim = self.pool(query), self.encoder[0].in_features
        if pooled.shape[-1] != head_dim:
            raise ValueError(f"query must have head_dim {head_dim}, got {pooled.shape[-1]}")
        logits: Tensor = self.head(self.encoder(pooled.to(dtype)))
        return logits


class FluxAttention(nn.Module):
    """A layer's attention: two ways to attend, and a router that chooses one of them.

    In training both are computed and mixed by a straight-through Gumbel-softmax: the mix is a
    choice, its gradient that of the softmax. In inference the choice is the arg-max of a segment's
    prefill, only that way is computed, and decoding steps keep to it until the next prefill.

    Shapes:
        query ``[B, N, H, D]``, key ``[B, M, Hkv, D]``, value ``[B, M, Hkv, Dv]``; the result is
        that of the two ways, ``[B, N, H, Dv]``.

    Args:
        router: :class:`LayerRouter`.
        full, sparse: functions of query, key and value.

    Attributes:
        temperature: of the softmax: :func:`gumbel_temperature`.
        choice: for each batch item, whether it is full; of the last segment.

    Errors:
        ValueError or TypeError, naming the argument.

    Complexity:
        In training that of both ways; in inference one of them, after a wait for the choice where
        it is made on a device, once per segment.

    Source:
        Flux attention (arXiv 2604.07394).

    Example:
        >>> import torch, attnext
        >>> from attnext.routers.flux import FluxAttention, LayerRouter
        >>> layer = FluxAttention(
        ...     LayerRouter(16),
        ...     full=lambda q, k, v: attnext.sliding_window_attention(q, k, v, None),
        ...     sparse=lambda q, k, v: attnext.sliding_window_attention(q, k, v, 64, sinks=4))
        >>> q, k, v = (torch.randn(1, 200, heads, 16) for heads in (4, 2, 2))
        >>> _ = layer.eval()(q, k, v)
        >>> layer(q[:, -1:], k, v, decode=True).shape, layer.choice
        (torch.Size([1, 1, 4, 16]), (True,))
    """

    def __init__(self, router: LayerRouter, full: Attend, sparse: Attend) -> None:
        super().__init__()
        if not isinstance(router, nn.Module):
            raise TypeError(f"router must be a LayerRouter, got {kind_of(router)}")
        for name, way in (("full", full), ("sparse", sparse)):
            if not callable(way):
                raise TypeError(f"{name} must be callable, got {kind_of(way)}")
        self.router, self.full, self.sparse = router, full, sparse
        self.temperature = 1.5
        self.choice: tuple[bool, ...] | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, decode: bool = False) -> Tensor:
        check_flag("decode", decode)
        for name, t in (("query", query), ("key", key), ("value", value)):
            check_tensor(name, t, "a floating-point")
        if self.training:
            if decode:
                raise ValueError("decode is for inference: call eval() first")
            gates = straight_through(self.router(query), self.temperature)
            both = [self.full(query, key, value), self.sparse(query, key, value)]
            mixed: Tensor = merge(both, gates=gates[:, None, None], mode="raw")
            return mixed
        if not decode:
            logits = self.router(query)
            self.choice = tuple((logits[:, 0] >= logits[:, 1]).tolist())
        if self.choice is None or len(self.choice) != query.shape[0]:
            chosen = "none" if self.choice is None else f"one of {len(self.choice)} batch items"
            raise ValueError(
                f"decode needs the prefill's choice for {query.shape[0]} batch items, got {chosen}"
            )
        if len(set(self.choice)) <= 1:
            way = self.full if all(self.choice) else self.sparse
            return way(query, key, value)
        outs = []
        for b, full in enumerate(self.choice):
            way = self.full if full else self.sparse
            outs.append(way(query[b : b + 1], key[b : b + 1], value[b : b + 1]))
        return torch.cat(outs)


def straight_through(
    logits: Tensor, temperature: float, generator: torch.Generator | None = None
) -> Tensor:
    """One of two or more at random, as 0 and 1, with the gradient of a softmax.

    Gumbel noise makes the arg-max a draw from ``softmax(logits)``; the gradient is that of
    ``softmax((logits + noise) / temperature)``.
    """
    check_tensor("logits", logits, "a floating-point")
    if not logits.dim() or not logits.shape[-1]:
        raise ValueError(f"logits must be [..., choices], got shape {tuple(logits.shape)}")
    if finite_number("temperature", temperature) <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {kind_of(generator)}")
    uniform = torch.rand(
        logits.shape, generator=generator, device=logits.device, dtype=torch.float32
    )
    # Neither 0, nor 1, which rounding may give: the noise is finite.
    uniform = uniform.clamp(torch.finfo(torch.float32).tiny, 1 - torch.finfo(torch.float32).eps)
    noise = -torch.log(-torch.log(uniform))
    soft = torch.softmax((logits + noise.to(logits.dtype)) / temperature, -1)
    hard = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())


def gumbel_temperature(
    step: int, steps: int, start: float = 1.5, end: float = 1.0, share: float = 0.6
) -> float:
    """A cosine from ``start`` to ``end`` over the first ``share`` of the steps, then ``end``."""
    check_integer("step", step, 0)
    check_integer("steps", steps, 1)
    start, end = finite_number("start", start), finite_number("end", end)
    check_number("share", share, 0, 1)
    done = min(step / (share * steps), 1.0) if share else 1.0
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def sparsity_loss(sparsity: Tensor, target: float | Tensor, linear: Tensor, square: Tensor) -> Any:
    """``linear |d| + square d^2`` for ``d = sparsity - target``, with multipliers that ascend.

    Shapes: broadcast against each other; the result has their shape.
    Numerics: the gradient of the multipliers has its sign turned: what minimises the loss in all
        parameters raises them for as long as the target is missed.
    Source: Flux attention (arXiv 2604.07394), with one pair of multipliers a task.
    """
    for name, t in (("sparsity", sparsity), ("linear", linear), ("square", square)):
        check_tensor(name, t, "a floating-point")
    if isinstance(target, Tensor):
        check_tensor("target", target, "a floating-point")
    else:
        finite_number("target", target, "a number or a tensor")
    shapes = [t.shape for t in (sparsity, target, linear, square) if isinstance(t, Tensor)]
    try:
        torch.broadcast_shapes(*shapes)
    except RuntimeError:
        raise ValueError(
            "sparsity, target, linear and square must broadcast against each other, got shapes "
            f"{', '.join(map(str, map(tuple, shapes)))}"
        ) from None
    distance = (sparsity - target).abs()
    linear, square = (2 * x.detach() - x for x in (linear, square))
    return linear * distance + square * distance.square()
