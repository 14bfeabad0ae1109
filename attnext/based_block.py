# SPDX-License-Identifier: Apache-2.0
"""BASED's block (arXiv 2402.18668): a mixer of tokens and a gated feed-forward layer, each behind
its norm. Every mixer has ``forward``; ``prefill``, which also returns what decoding keeps; and
``step``, which updates it in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, pad, silu

from .arguments import (
    check_choice,
    check_flag,
    check_integer,
    check_layer_input,
    check_packing,
    check_tensor,
    kind_of,
)
from .based import BasedAttention, check_heads
from .functional import sliding_window_attention
from .rotary import rotary_embedding
from .window_cache import WindowCache

MIXERS = ("linear", "window", "hybrid", "convolution")


class SlidingWindowAttention(nn.Module):
    """A layer of softmax attention over the last tokens, with rotary positions.

    Shapes: ``[B, N, dim]`` in and out; a :class:`WindowCache` of ``window_size`` tokens for
        decoding, keys already turned.
    Args:
        dim: of the tokens; heads have ``dim // num_heads``, which must be even.
        num_heads: heads.
        window_size: keys that a token sees, its own included.
    Numerics, Errors, Complexity: those of :func:`sliding_window_attention`.
    Source: the local layers of BASED (arXiv 2402.18668).
    Example:

        >>> import torch, attnext
        >>> layer = attnext.SlidingWindowAttention(64, num_heads=4, window_size=8)
        >>> layer(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(self, dim: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_integer("window_size", window_size, 1)
        if dim // num_heads % 2:
            raise ValueError(
                f"dim must give heads of even size, got {dim} for {num_heads}: pairs are turned"
            )
        self.num_heads = num_heads
        self.window_size = window_size
        self.query, self.key, self.value, self.out = (
            nn.Linear(dim, dim, bias=False) for _ in range(4)
        )

    def _project(self, x: Tensor, offset: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        check_layer_input(x, self.query.in_features)
        query, key, value = (
            layer(x).unflatten(-1, (self.num_heads, -1))
            for layer in (self.query, self.key, self.value)
        )
        return (
            rotary_embedding(query, offset=offset),
            rotary_embedding(key, offset=offset),
            value,
        )

    def _leave(self, mixed: Tensor) -> Tensor:
        result: Tensor = self.out(mixed.flatten(-2))
        return result

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """``cu_seqlens``: where packed sequences end. Turns go on from one to the next: products
        depend on distances alone."""
        heads = self._project(x)
        if cu_seqlens is not None:
            check_packing(cu_seqlens, x)
        return self._leave(
            sliding_window_attention(*heads, self.window_size, cu_seqlens_q=cu_seqlens)
        )

    def prefill(self, x: Tensor) -> tuple[Tensor, WindowCache]:
        """``forward``, and the last keys and values."""
        query, key, value = self._project(x)
        mixed = sliding_window_attention(query, key, value, self.window_size)
        return self._leave(mixed), WindowCache.after(key, value, self.window_size)

    @torch.no_grad()
    def step(self, x: Tensor, kept: WindowCache) -> Tensor:
        """The next token or tokens; ``kept`` is updated in place."""
        if not isinstance(kept, WindowCache):
            raise TypeError(f"kept must be a WindowCache, got {kind_of(kept)}")
        query, key, value = self._project(x, kept.length)
        kept.check(key, value)
        if x.shape[1] == 0:
            return self._leave(value)
        outs = []
        for q, k, v in zip(*(t.split(1, dim=1) for t in (query, key, value)), strict=True):
            kept._push(k, v)
            outs.append(sliding_window_attention(q, *kept.seen(), None, is_causal=False))
        return self._leave(torch.cat(outs, dim=1))


class GatedConvolution(nn.Module):
    """A short causal convolution of each channel, gated by as many other channels.

    Shapes: ``[B, N, dim]`` in and out; ``[B, kernel_size - 1, inner]`` for decoding, the last
        inputs of the convolution, ``inner = expand * dim // 2``.
    Args:
        dim: of the tokens.
        kernel_size: tokens that a token sees, its own included.
        expand: width of the first projection, whose halves are filtered and gate.
    Numerics, Errors: those of torch's layers.
    Complexity: O(N kernel_size dim) beside the projections.
    Source: BaseConv of BASED (arXiv 2402.18668).
    Example:

        >>> import torch, attnext
        >>> layer = attnext.GatedConvolution(64)
        >>> layer(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(self, dim: int, kernel_size: int = 3, expand: int = 4) -> None:
        super().__init__()
        for name, number in (("dim", dim), ("kernel_size", kernel_size), ("expand", expand)):
            check_integer(name, number, 1)
        if expand * dim % 2:
            raise ValueError(f"expand * dim must be even, got {expand} * {dim}")
        inner = expand * dim // 2
        self.enter = nn.Linear(dim, expand * dim)
        self.kernel = nn.Parameter(torch.empty(inner, kernel_size))
        nn.init.uniform_(self.kernel, -(kernel_size**-0.5), kernel_size**-0.5)
        self.leave = nn.Linear(inner, dim)

    def _mix(
        self, x: Tensor, before: Tensor | None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The result, and all that the convolution has read."""
        check_layer_input(x, self.enter.in_features)
        if cu_seqlens is not None:
            check_packing(cu_seqlens, x)
        filtered, gate = self.enter(x).chunk(2, dim=-1)
        taps = self.kernel.shape[1]
        if before is None:
            read = pad(filtered, (0, 0, taps - 1, 0))
        else:
            read = torch.cat([before, filtered], dim=1)
        if x.shape[1] == 0:  # too few for torch's convolution
            return self.leave(filtered * gate), read
        if cu_seqlens is None:
            channels = read.transpose(1, 2)
            kernel = self.kernel[:, None]
            mixed = conv1d(channels, kernel, groups=kernel.shape[0]).transpose(1, 2)
        else:
            mixed = self._convolve_packed(read, cu_seqlens)
        return self.leave(silu(mixed) * gate), read

    def _convolve_packed(self, read: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Tap by tap, each of the tokens that have so many before them in their sequence."""
        last = self.kernel.shape[1] - 1
        tokens = read.shape[1] - last
        t = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        begin = cu_seqlens[torch.searchsorted(cu_seqlens, t, right=True) - 1]
        place = (t - begin).to(read.device)[:, None]
        mixed = read[:, last:] * self.kernel[:, last]
        for back in range(1, last + 1):
            earlier = read[:, last - back : last - back + tokens].where(place >= back, 0)
            mixed = mixed + earlier * self.kernel[:, last - back]
        return mixed

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """``cu_seqlens``: int32 ``[M + 1]``, where packed sequences end; the batch must be 1."""
        return self._mix(x, None, cu_seqlens)[0]

    def prefill(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``forward``, and the last inputs of the convolution."""
        out, read = self._mix(x, None)
        return out, read[:, x.shape[1] :].detach().clone()

    @torch.no_grad()
    def step(self, x: Tensor, kept: Tensor) -> Tensor:
        """The next token or tokens; ``kept`` is updated in place."""
        check_tensor("kept", kept, "a floating-point")
        check_layer_input(x, self.enter.in_features)
        inner, taps = self.kernel.shape
        if kept.shape != (x.shape[0], taps - 1, inner):
            raise ValueError(
                f"kept must be {(x.shape[0], taps - 1, inner)}, got {tuple(kept.shape)}"
            )
        out, read = self._mix(x, kept)
        kept.copy_(read[:, x.shape[1] :])
        return out


class GatedMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): ``leave(a * silu(g))``, ``a`` and ``g`` two projections."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.enter = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.leave = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.enter(x).chunk(2, dim=-1)
        result: Tensor = self.leave(value * silu(gate))
        return result


class BasedBlock(nn.Module):
    """A block of BASED: ``x + mixer(norm(x))``, then ``x + mlp(norm(x))``.

    The models of the paper stack mostly ``"convolution"``, and one ``"linear"`` followed by one
    ``"window"`` in every five; ``"hybrid"`` is both of these at once, under one denominator.

    Shapes: ``[B, N, dim]`` in and out.
    Args:
        dim: of the tokens.
        mixer: ``"linear"``: :class:`BasedAttention`; ``"window"``: :class:`SlidingWindowAttention`;
            ``"hybrid"``: :class:`BasedAttention` with a window; ``"convolution"``:
            :class:`GatedConvolution`.
        num_heads: heads of all but the convolution.
        feature_dim: head_dim of queries and keys of ``"linear"`` and ``"hybrid"``.
        window_size: keys with exact weights, of ``"window"`` and ``"hybrid"``.
        rotary: positions for ``"hybrid"``; ``"window"`` always has them.
        kernel_size, expand: of ``"convolution"``.
        hidden_dim: of the feed-forward layer, by default ``2 * dim``.
    Numerics, Errors, Complexity: those of the mixers; norms are root mean squares.
    Source: BASED (arXiv 2402.18668).
    Example:

        >>> import torch, attnext
        >>> block = attnext.BasedBlock(64, "hybrid", num_heads=4, window_size=16)
        >>> y, kept = block.prefill(torch.randn(2, 40, 64))
        >>> block.step(torch.randn(2, 1, 64), kept).shape
        torch.Size([2, 1, 64])
    """

    def __init__(
        self,
        dim: int,
        mixer: str,
        *,
        num_heads: int = 1,
        feature_dim: int = 16,
        window_size: int = 64,
        rotary: bool = False,
        kernel_size: int = 3,
        expand: int = 4,
        hidden_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("mixer", mixer, MIXERS)
        check_heads(dim, num_heads)
        for name, number in (
            ("feature_dim", feature_dim), ("window_size", window_size),
            ("kernel_size", kernel_size), ("expand", expand),
        ):  # fmt: skip
            check_integer(name, number, 1)
        check_flag("rotary", rotary)
        if hidden_dim is None:
            hidden_dim = 2 * dim
        check_integer("hidden_dim", hidden_dim, 1)
        self.mixer: Any
        if mixer == "window":
            self.mixer = SlidingWindowAttention(dim, num_heads, window_size)
        elif mixer == "convolution":
            self.mixer = GatedConvolution(dim, kernel_size, expand)
        else:
            window = window_size if mixer == "hybrid" else None
            turned = rotary and mixer == "hybrid"
            self.mixer = BasedAttention(dim, num_heads, feature_dim, window, turned)
        self.mixer_norm, self.mlp_norm = nn.RMSNorm(dim, eps=1e-5), nn.RMSNorm(dim, eps=1e-5)
        self.mlp = GatedMLP(dim, hidden_dim)

    def _norm(self, x: Tensor) -> Tensor:
        check_layer_input(x, self.mlp.enter.in_features)
        normed: Tensor = self.mixer_norm(x)
        return normed

    def _feed(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + mixed
        result: Tensor = x + self.mlp(self.mlp_norm(x))
        return result

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """``cu_seqlens``: int32 ``[M + 1]``, where packed sequences end, which then know nothing of
        each other; the batch must be 1."""
        return self._feed(x, self.mixer(self._norm(x), cu_seqlens))

    def prefill(self, x: Tensor) -> tuple[Tensor, Any]:
        """``forward``, and what the mixer keeps for decoding."""
        mixed, kept = self.mixer.prefill(self._norm(x))
        return self._feed(x, mixed), kept

    @torch.no_grad()
    def step(self, x: Tensor, kept: Any) -> Tensor:
        """The next token or tokens; ``kept`` is updated in place."""
        return self._feed(x, self.mixer.step(self._norm(x), kept))
