# SPDX-License-Identifier: Apache-2.0
"""BASED (arXiv 2402.18668): Taylor linear attention, and its hybrid with a sliding window."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .arguments import check_integer
from .functional import sliding_window_attention
from .linear import linear_attention, linear_attention_step
from .merging import merge_attentions


def based_attention(
    query: Tensor, key: Tensor, value: Tensor, window_size: int, *, scale: float | None = None
) -> Tensor:
    """Softmax attention over the last tokens and Taylor linear attention over all older ones, with
    one denominator for both.

    Every key has a weight: ``exp(s)`` if it is among the last ``window_size``, the query's own
    included, else ``1 + s + s^2/2``, with ``s = scale q . k``.

    Shapes:
        query ``[B, N, H, K]``, key ``[B, N, Hkv, K]``, value ``[B, N, Hkv, V]``; the result is
        ``[B, N, H, V]``. ``H`` is a multiple of ``Hkv``.

    Args:
        window_size: keys with exact weights.
        scale: by default ``K ** -0.5``.

    Numerics:
        As :func:`linear_attention`; the two parts are each rounded to the dtype once, and joined in
        float32 (float64 for float64). Differentiable.

    Errors:
        ValueError, TypeError or NotImplementedError, naming the argument.

    Complexity:
        O(N (window + K^2) V) time.

    Source:
        BASED (arXiv 2402.18668), whose layers have one or the other.

    Example:
        >>> import torch, attnext
        >>> q, k, v = (torch.randn(1, 100, 4, 16) for _ in range(3))
        >>> attnext.based_attention(q, k, v, 32).shape
        torch.Size([1, 100, 4, 16])
    """
    check_integer("window_size", window_size, 1)
    near, near_lse = sliding_window_attention(
        query, key, value, window_size, scale=scale, return_lse=True
    )
    if query.shape[1] <= window_size:
        return near
    far, total = linear_attention(
        query[:, window_size:],
        key[:, :-window_size],
        value[:, :-window_size],
        feature_map="taylor2",
        normalize=True,
        eps=0.0,  # no weight is below 1/2
        scale=scale,
        return_denominator=True,
    )
    late, _ = merge_attentions(
        (near[:, window_size:], far), (near_lse[:, window_size:], torch.log(total))
    )
    return torch.cat([near[:, :window_size], late], dim=1)


class BasedAttention(nn.Module):
    """A layer of BASED: narrow queries and keys, Taylor features, a state of fixed size.

    Shapes: ``[B, N, dim]`` in and out; ``[B, H, F, dim // H + 1]`` for the state.
    Args:
        dim: of the tokens; values have ``dim // num_heads``.
        num_heads: heads.
        feature_dim: head_dim of queries and keys; ``F = 1 + d + d (d + 1) / 2``.
        window_size: None is the layer of the paper. A number gives the last tokens their exact
            weight, under one denominator: :func:`based_attention`.
    Numerics, Errors, Complexity: those of :func:`linear_attention`.
    Source: BASED (arXiv 2402.18668).
    Example:

        >>> import torch, attnext
        >>> layer = attnext.BasedAttention(64, num_heads=4)
        >>> layer(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self, dim: int, num_heads: int, feature_dim: int = 16, window_size: int | None = None
    ) -> None:
        super().__init__()
        for name, number in (("num_heads", num_heads), ("feature_dim", feature_dim)):
            check_integer(name, number, 1)
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, {num_heads}, got {dim}")
        if window_size is not None:
            check_integer("window_size", window_size, 1)
        self.num_heads = num_heads
        self.window_size = window_size
        self.query = nn.Linear(dim, num_heads * feature_dim, bias=False)
        self.key = nn.Linear(dim, num_heads * feature_dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        layers = (self.query, self.key, self.value)
        return tuple(layer(x).unflatten(-1, (self.num_heads, -1)) for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self._project(x)
        if self.window_size is None:
            mixed = linear_attention(query, key, value, feature_map="taylor2", normalize=True)
        else:
            mixed = based_attention(query, key, value, self.window_size)
        result: Tensor = self.out(mixed.flatten(-2))
        return result

    def prefill(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``forward``, and the state after the last token. Without a window only."""
        self._refuse_window()
        mixed, state = linear_attention(
            *self._project(x), feature_map="taylor2", normalize=True, output_final_state=True
        )
        return self.out(mixed.flatten(-2)), state

    @torch.no_grad()
    def step(self, x: Tensor, state: Tensor, slots: Tensor | None = None) -> Tensor:
        """The next token or tokens; the state is updated in place. Without a window only."""
        self._refuse_window()
        query, key, value = self._project(x)
        mixed = linear_attention_step(
            query, key, value, state, feature_map="taylor2", normalize=True, slots=slots
        )
        result: Tensor = self.out(mixed.flatten(-2))
        return result

    def _refuse_window(self) -> None:
        if self.window_size is not None:
            raise NotImplementedError(
                f"window_size is {self.window_size}: states are for layers without a window"
            )
