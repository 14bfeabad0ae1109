# SPDX-License-Identifier: Apache-2.0
"""The specification of what is built on linear attention: BASED's hybrid and block, SpikMamba's
spiking attention. Plain torch, dense, in float64, gradients by autograd; the recurrence itself is
in ``reference.py``."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .reference import sliding_window_attention


def based_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The weight of each pair written down: ``exp(s)`` in the window, ``1 + s + s^2/2`` before it.

    ``window_size`` 0: Taylor features alone.
    """
    query, key, value = (x.to(dtype) for x in (query, key, value))
    group = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(group, dim=2), value.repeat_interleave(group, dim=2)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * torch.einsum("bihd,bjhd->bhij", query, key)
    tokens = torch.arange(query.shape[1])
    age = tokens[:, None] - tokens
    weights = torch.where(age < window_size, scores.exp(), 1 + scores + scores.square() / 2)
    weights = torch.where(age < 0, 0.0, weights)
    if cu_seqlens is not None:
        sequence = torch.tensor([sum(int(end) <= t for end in cu_seqlens) for t in tokens])
        weights = torch.where(sequence[:, None] == sequence, weights, 0.0)
    return torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), value)


def rotary_embedding(x: Tensor, *, base: float = 10000.0, offset: int = 0) -> Tensor:
    """Pairs of entries as complex numbers, each turned by its axis' coordinate times its speed."""
    extents, dim = x.shape[1:-2], x.shape[-1]
    speeds = dim // (2 * len(extents))
    numbers = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    turned = numbers.clone()
    for index in torch.cartesian_prod(*(torch.arange(n) for n in extents)).view(-1, len(extents)):
        token = (slice(None), *index.tolist())
        for axis, coordinate in enumerate(index.tolist()):
            for speed in range(speeds):
                angle = (coordinate + (offset if axis == 0 else 0)) * base ** (-speed / speeds)
                turn = complex(math.cos(angle), math.sin(angle))
                pair = (*token, slice(None), axis * speeds + speed)
                turned[pair] = numbers[pair] * turn
    return torch.view_as_real(turned).flatten(-2)


def lif_spikes(
    x: Tensor,
    *,
    tau: float = 2.0,
    threshold: float = 1.0,
    surrogate_slope: float = 4.0,
    membrane: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Spikes ``[B, T, ...]`` and the membrane left, a time step at a time. A spike counts as the
    sigmoid beside it where gradients are concerned, and as a constant where it resets."""
    x = x.to(dtype)
    u = torch.zeros_like(x[:, 0]) if membrane is None else membrane.to(dtype)
    spikes = []
    for now in x.unbind(1):
        u = u + (now - u) / tau
        soft = torch.sigmoid(surrogate_slope * (u - threshold))
        hard = (u >= threshold).to(dtype)
        spikes.append(hard + soft - soft.detach())
        u = u * (1 - hard)
    return torch.stack(spikes, dim=1), u


def spiking_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    base: float = 10000.0,
    eps: float = 1e-6,
    rotate: Callable[..., Tensor] = rotary_embedding,
) -> Tensor:
    """Weights of turned features over a mean of those that are not turned, ``[B, *N, H, D]``."""
    query, key, value = (x.double() for x in (query, key, value))
    one_head = (query.shape[-2], query.shape[-1])

    def turn(x: Tensor) -> Tensor:  # the channels of all heads are one vector
        return rotate(x.flatten(-2)[..., None, :], base=base).squeeze(-2).unflatten(-1, one_head)

    features = [torch.nn.functional.elu(x) + 1 for x in (query, key)]
    plain_q, plain_k = (x.flatten(1, -3) for x in features)
    turned_q, turned_k = (turn(x).flatten(1, -3) for x in features)
    tokens = plain_q.shape[1]
    weights = torch.einsum("bihd,bjhd->bhij", turned_q, turned_k) / tokens
    total = torch.einsum("bihd,bjhd->bhi", plain_q, plain_k) / tokens + eps
    out = torch.einsum("bhij,bjhd->bihd", weights / total[..., None], value.flatten(1, -3))
    return out.unflatten(1, value.shape[1:-2])


def gated_convolution(x: Tensor, weights: dict[str, Tensor], prefix: str = "") -> Tensor:
    """BASED's short convolution: one half, filtered over the last tokens, gates the other."""
    weights = {name: w.double() for name, w in weights.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{prefix}{name}.weight"].T + weights[f"{prefix}{name}.bias"]

    filtered, gate = linear(x.double(), "enter").chunk(2, dim=-1)
    kernel = weights[f"{prefix}kernel"]  # [inner, taps], the last tap for the token itself
    taps = kernel.shape[1]
    mixed = torch.zeros_like(filtered)
    for t in range(x.shape[1]):
        for tap in range(taps):
            if t + tap - taps + 1 >= 0:
                mixed[:, t] += kernel[:, tap] * filtered[:, t + tap - taps + 1]
    return linear(mixed * torch.sigmoid(mixed) * gate, "leave")


def based_block(
    x: Tensor,
    weights: dict[str, Tensor],
    mixer: str,
    num_heads: int,
    window_size: int,
    eps: float,
    rotary: bool = False,
) -> Tensor:
    """A block from its parameters by name: ``x + mixer(norm x)``, then ``x + mlp(norm x)``.
    ``window_size`` is 0 for the linear one."""
    weights = {name: w.double() for name, w in weights.items()}
    x = x.double()

    def norm(x: Tensor, name: str) -> Tensor:
        mean = x.square().mean(-1, keepdim=True)
        return x / torch.sqrt(mean + eps) * weights[f"{name}.weight"]

    def heads(x: Tensor, name: str) -> Tensor:
        return (x @ weights[f"mixer.{name}.weight"].T).unflatten(-1, (num_heads, -1))

    y = norm(x, "mixer_norm")
    if mixer == "convolution":
        x = x + gated_convolution(y, weights, "mixer.")
    else:
        query, key, value = (heads(y, name) for name in ("query", "key", "value"))
        if rotary or mixer == "window":
            query, key = rotary_embedding(query), rotary_embedding(key)
        if mixer == "window":
            mixed = sliding_window_attention(query, key, value, window_size)
        else:
            mixed = based_attention(query, key, value, window_size)
        x = x + mixed.flatten(-2) @ weights["mixer.out.weight"].T
    up, gate = (norm(x, "mlp_norm") @ weights["mlp.enter.weight"].T).chunk(2, dim=-1)
    return x + (up * gate * torch.sigmoid(gate)) @ weights["mlp.leave.weight"].T
