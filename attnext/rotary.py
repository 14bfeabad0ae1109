# SPDX-License-Identifier: Apache-2.0
"""Positions as rotations (arXiv 2104.09864), on one to three token axes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .arguments import DTYPE_NAMES, check_dense, check_integer, finite_number, under_autocast
from .ops import DTYPES, accumulator_dtype


def rotary_embedding(x: Tensor, *, base: float = 10000.0, offset: int = 0) -> Tensor:
    """Turns pairs of entries by angles that grow with the position, so that the product of a
    turned query and a turned key depends on how far apart they are.

    Shapes:
        x ``[B, *tokens, H, D]`` with one to three token axes; the result is the same. ``D`` is a
        multiple of twice the number of axes.

    Args:
        base: with A axes there are ``n = D / (2 A)`` speeds, ``base ** (-i / n)``. Entries ``2 i``
            and ``2 i + 1`` are a pair; the first ``n`` pairs turn with the first axis, and so on.
        offset: position of the first token, on the first axis: what decoding has behind it.

    Numerics:
        Angles in float64, products in float32 (float64 for float64), one rounding at the store.
        Differentiable.

    Errors:
        ValueError or TypeError, naming the argument.

    Complexity:
        Linear.

    Source:
        RoFormer (arXiv 2104.09864); on several axes as in MLLA (2405.16605).

    Example:
        >>> import torch, attnext
        >>> attnext.rotary_embedding(torch.randn(1, 14, 14, 4, 32)).shape
        torch.Size([1, 14, 14, 4, 32])
    """
    if is_compiling() or torch._C._is_any_autocast_enabled():
        (x,) = under_autocast(x)
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be one of {DTYPE_NAMES}, got {x.dtype}")
    check_dense("x", x)
    rank = x.dim() - 3
    if not 1 <= rank <= 3:
        raise ValueError(
            f"x must be [batch, *tokens, heads, head_dim] with 1 to 3 token axes, got shape "
            f"{tuple(x.shape)}"
        )
    if x.shape[-1] < 1 or x.shape[-1] % (2 * rank):
        raise ValueError(
            f"x must have a head_dim that is a multiple of {2 * rank}, two for each token axis, "
            f"got {x.shape[-1]}"
        )
    if finite_number("base", base) <= 0:
        raise ValueError(f"base must be positive, got {base}")
    check_integer("offset", offset, 0)

    count = x.shape[-1] // (2 * rank)
    speeds = base ** (torch.arange(count, dtype=torch.float64, device=x.device) / -count)
    angles = []
    for axis in range(rank):
        first = offset if axis == 0 else 0
        places = torch.arange(x.shape[axis + 1], dtype=torch.float64, device=x.device) + first
        shape = [1] * rank + [count]
        shape[axis] = -1
        turns = (places[:, None] * speeds).reshape(shape)
        angles.append(turns.expand(*x.shape[1:-2], count))
    angle = torch.cat(angles, dim=-1)[..., None, :]  # the same for all heads
    acc = accumulator_dtype(x.dtype)
    cos, sin = angle.cos().to(acc), angle.sin().to(acc)
    even, odd = x.to(acc).unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return pairs.flatten(-2).to(x.dtype)
