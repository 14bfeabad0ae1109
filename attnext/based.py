# SPDX-License-Identifier: Apache-2.0
"""BASED (arXiv 2402.18668): Taylor linear attention, and its hybrid with a sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .arguments import (
    check_count,
    check_device,
    check_flag,
    check_integer,
    check_layer_input,
    check_packing,
    check_scale,
    check_sequences,
    kind_of,
    under_autocast,
    without_autocast,
)
from .functional import sliding_window_attention
from .linear import linear_attention, linear_attention_step
from .linear_ops import num_features
from .merging import merge_attentions
from .ops import accumulator_dtype
from .rotary import rotary_embedding
from .window_cache import WindowCache

# No weight is below 1/2, so nothing is divided by 0.
_TAYLOR: dict[str, Any] = {"feature_map": "taylor2", "normalize": True, "eps": 0.0}


@dataclass
class BasedCache:
    """What decoding with :func:`based_attention` keeps: as much after a million tokens as after a
    thousand.

    Shapes: ``window`` holds the last ``W`` keys and values; ``state``, ``[B, H, F, V + 1]`` in
    float32 (float64 for float64), is the Taylor state of all older ones, as
    :func:`linear_attention` has it with ``normalize``.

    Example:
        >>> import torch, attnext
        >>> q, k, v = torch.randn(3, 1, 100, 2, 16)
        >>> _, cache = attnext.based_attention(q, k, v, 32, output_final_cache=True)
        >>> cache.window.length, cache.state.shape
        (100, torch.Size([1, 2, 153, 17]))
    """

    window: WindowCache
    state: Tensor

    @property
    def nbytes(self) -> int:
        """Memory of what is kept."""
        return self.window.nbytes + self.state.nbytes

    def check(self, key: Tensor, value: Tensor) -> None:
        """Errors: TypeError or ValueError where the window and the state are not those of one
        sequence, or new keys or values not like those kept."""
        if not isinstance(self.window, WindowCache):
            raise TypeError(f"cache.window must be a WindowCache, got {kind_of(self.window)}")
        self.window.check(key, value)
        acc = accumulator_dtype(key.dtype)
        if not isinstance(self.state, Tensor) or self.state.dtype != acc:
            raise TypeError(f"cache.state must be a {acc} tensor, got {kind_of(self.state)}")
        check_device("cache.state", self.state, key, "key")
        batch, features, columns = (
            key.shape[0], num_features("taylor2", key.shape[3]), value.shape[3] + 1,
        )  # fmt: skip
        shape, heads = self.state.shape, key.shape[2]
        if len(shape) != 4 or shape != (batch, shape[1], features, columns) or shape[1] % heads:
            raise ValueError(
                f"cache.state must be {(batch, 'heads', features, columns)} with a multiple of the "
                f"{heads} heads of key, got {tuple(shape)}"
            )


def based_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    output_final_cache: bool = False,
) -> Any:
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
        cu_seqlens: int32 ``[M + 1]``, where each of M sequences packed along the token axis ends;
            ``B`` must be 1.
        output_final_cache: also returns a :class:`BasedCache`, with which
            :func:`based_attention_step` goes on. It has no gradient. Not with ``cu_seqlens``.

    Numerics:
        As :func:`linear_attention`. Parts are joined in float32 (float64 for float64). On the CPU
        the whole of it is in float32 for bf16 and fp16, so that the result and each gradient is
        rounded once; on CUDA the two parts are, and their gradients. Differentiable.

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
    check_flag("output_final_cache", output_final_cache)
    if output_final_cache:
        check_count("window_size", window_size)  # rows of the cache
    if is_compiling() or torch._C._is_any_autocast_enabled():
        query, key, value = under_autocast(query, key, value)
    check_sequences(query, key, value)
    scale = check_scale(scale, query.shape[-1] ** -0.5)
    if key.shape[1] != query.shape[1]:
        raise ValueError(f"key must have the tokens of query, {query.shape[1]}, got {key.shape[1]}")
    if cu_seqlens is not None:
        check_packing(cu_seqlens, query)
        if output_final_cache:
            raise ValueError(
                "cu_seqlens must be None with output_final_cache: a cache is of one end"
            )
    with without_autocast(query):
        wide = (query, key, value)
        if query.device.type == "cpu":
            acc = accumulator_dtype(query.dtype)
            wide = (query.to(acc), key.to(acc), value.to(acc))
        out, state = _both_parts(*wide, window_size, scale, cu_seqlens, output_final_cache)
        out = out.to(query.dtype)
    if not output_final_cache:
        return out
    if state is None:
        rows = num_features("taylor2", query.shape[-1])
        shape = (query.shape[0], query.shape[2], rows, value.shape[-1] + 1)
        state = query.new_zeros(shape, dtype=accumulator_dtype(query.dtype))
    return out, BasedCache(WindowCache.after(key, value, window_size), state.detach())


def _both_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int,
    scale: float,
    cu_seqlens: Tensor | None,
    output_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """The output, and the state of all keys that are older than the window, if there is one."""
    out, near_lse = sliding_window_attention(
        query, key, value, window_size, scale=scale, cu_seqlens_q=cu_seqlens, return_lse=True
    )
    if query.shape[1] <= window_size:
        return out, None
    new, bounds, has_older = query[:, window_size:], None, None
    if cu_seqlens is not None:
        bounds, has_older = _older_parts(cu_seqlens, query.shape[1], window_size)
        has_older = has_older.to(query.device)
        # What others get is dropped below. Nor may their NaN reach another sequence's keys.
        new = new.where(has_older[:, None, None], 0)
    far, total, *state = linear_attention(
        new,
        key[:, :-window_size],
        value[:, :-window_size],
        **_TAYLOR,
        scale=scale,
        cu_seqlens=bounds,
        return_denominator=True,
        output_final_state=output_state,
    )
    if has_older is None:
        far_lse = torch.log(total)
    else:
        far_lse = torch.log(total.where(has_older[:, None], 1))
        far_lse = far_lse.where(has_older[:, None], -torch.inf)
    late, _ = merge_attentions((out[:, window_size:], far), (near_lse[:, window_size:], far_lse))
    return torch.cat([out[:, :window_size], late], dim=1), state[0] if state else None


def _older_parts(cu_seqlens: Tensor, tokens: int, window_size: int) -> tuple[Tensor, Tensor]:
    """Of all keys but the last ``window_size``, beside all queries but the first: bounds at which,
    in turn, a sequence begins and its keys end that a query of its own is a window behind; and for
    each key whether it is one of these. What is between them meets queries of other sequences."""
    begins, ends = cu_seqlens[:-1], cu_seqlens[1:]
    parts = torch.stack([begins, torch.maximum(ends - window_size, begins)], dim=1).flatten()
    bounds = torch.cat([parts, ends[-1:]]).clamp(max=tokens - window_size)
    places = torch.arange(tokens - window_size, dtype=bounds.dtype, device=bounds.device)
    return bounds, torch.searchsorted(bounds, places, right=True) % 2 == 1


def based_attention_step(
    query: Tensor, key: Tensor, value: Tensor, cache: BasedCache, *, scale: float | None = None
) -> Tensor:
    """Decoding: one token or a few of :func:`based_attention`. A key that leaves the window goes
    into the Taylor state; the cache is updated in place.

    Shapes:
        query ``[B, N, H, K]``, key ``[B, N, Hkv, K]``, value ``[B, N, Hkv, V]`` with a small ``N``;
        the result is ``[B, N, H, V]``.

    Args:
        cache: what ``output_final_cache`` gave, or a step before left. All sequences of the batch
            have the same length.
        scale: that of the prefill.

    Numerics:
        As :func:`based_attention`; what is read from the state is rounded with the sum only. No
        gradient: under ``torch.no_grad()`` where inputs ask for it.

    Errors:
        ValueError, TypeError or NotImplementedError, naming the argument.

    Complexity:
        O(window + K^2) V a token, whatever has gone by before.

    Source:
        As :func:`based_attention`.

    Example:
        >>> import torch, attnext
        >>> q, k, v = (torch.randn(1, 100, 4, 16) for _ in range(3))
        >>> _, cache = attnext.based_attention(q, k, v, 32, output_final_cache=True)
        >>> new = (torch.randn(1, 1, 4, 16) for _ in range(3))
        >>> attnext.based_attention_step(*new, cache).shape
        torch.Size([1, 1, 4, 16])
    """
    if not isinstance(cache, BasedCache):
        raise TypeError(f"cache must be a BasedCache, got {type(cache).__name__}")
    if is_compiling() or torch._C._is_any_autocast_enabled():
        query, key, value = under_autocast(query, key, value)
    cache.check(key, value)
    if not isinstance(query, Tensor) or query.dtype != key.dtype:
        raise TypeError(f"query must have the dtype of key, {key.dtype}, got {kind_of(query)}")
    want = (*key.shape[:2], cache.state.shape[1], key.shape[3])
    if query.shape != want or value.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"query must be [batch, tokens, heads, head_dim] with batch, tokens and head_dim of "
            f"key and the heads of the cache, {want}, and value have those tokens, got shapes "
            f"{tuple(query.shape)} and {tuple(value.shape)}"
        )
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value, cache.state)):
        raise NotImplementedError(
            "based_attention_step has no gradient: query, key, value and cache.state must not "
            "require one, or call it under torch.no_grad()"
        )
    scale = check_scale(scale, query.shape[-1] ** -0.5)
    if query.shape[1] == 0:
        return query.new_empty(*query.shape[:-1], value.shape[-1])
    outs = []
    for q, k, v in zip(*(x.split(1, dim=1) for x in (query, key, value)), strict=True):
        left = cache.window._push(k, v)
        near, lse = sliding_window_attention(
            q, *cache.window.seen(), None, is_causal=False, scale=scale, return_lse=True
        )
        if left is not None:
            far, total = _read_older(q, *left, cache.state, scale)
            near, _ = merge_attentions((near, far), (lse, torch.log(total)))
        outs.append(near)
    return torch.cat(outs, dim=1)


def _read_older(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One more key into the state; its mean of values, and the sum of its weights.

    The state with its sums is that of values with a 1 beside them, so that the sum comes out as one
    more column. Unrounded: it would not fit into a half.
    """
    acc = state.dtype
    one = value.new_ones((), dtype=acc).expand(*value.shape[:-1], 1)
    with_one = torch.cat([value.to(acc), one], dim=-1)
    with without_autocast(state):
        sums = linear_attention_step(
            query.to(acc), key.to(acc), with_one, state, feature_map="taylor2", scale=scale
        )
    total = sums[..., -1]
    return sums[..., :-1] / total[..., None], total


class BasedAttention(nn.Module):
    """A layer of BASED: narrow queries and keys, Taylor features, a state of fixed size.

    Shapes: ``[B, N, dim]`` in and out; ``[B, H, F, dim // H + 1]`` for the state.
    Args:
        dim: of the tokens; values have ``dim // num_heads``.
        num_heads: heads.
        feature_dim: head_dim of queries and keys; ``F = 1 + d + d (d + 1) / 2``.
        window_size: None is the layer of the paper. A number gives the last tokens their exact
            weight, under one denominator: :func:`based_attention`.
        rotary: with a window, turns queries and keys by their positions
            (:func:`rotary_embedding`); weights stay positive. ``feature_dim`` must be even.
    Numerics, Errors, Complexity: those of :func:`linear_attention`.
    Source: BASED (arXiv 2402.18668).
    Example:

        >>> import torch, attnext
        >>> layer = attnext.BasedAttention(64, num_heads=4)
        >>> layer(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        feature_dim: int = 16,
        window_size: int | None = None,
        rotary: bool = False,
    ) -> None:
        super().__init__()
        check_integer("feature_dim", feature_dim, 1)
        check_heads(dim, num_heads)
        if window_size is not None:
            check_integer("window_size", window_size, 1)
        check_flag("rotary", rotary)
        if rotary and (window_size is None or feature_dim % 2):
            raise ValueError(
                f"rotary needs a window_size and an even feature_dim, got {window_size} and "
                f"{feature_dim}"
            )
        self.num_heads = num_heads
        self.window_size = window_size
        self.rotary = rotary
        self.query = nn.Linear(dim, num_heads * feature_dim, bias=False)
        self.key = nn.Linear(dim, num_heads * feature_dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def _project(self, x: Tensor, offset: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        check_layer_input(x, self.query.in_features)
        query, key, value = (
            layer(x).unflatten(-1, (self.num_heads, -1))
            for layer in (self.query, self.key, self.value)
        )
        if self.rotary:
            query, key = (rotary_embedding(t, offset=offset) for t in (query, key))
        return query, key, value

    def _leave(self, mixed: Tensor) -> Tensor:
        result: Tensor = self.out(mixed.flatten(-2))
        return result

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """``cu_seqlens``: where packed sequences end, as :func:`based_attention` takes it. Turns
        go on from one to the next: products depend on distances alone."""
        heads = self._project(x)
        if self.window_size is None:
            return self._leave(linear_attention(*heads, **_TAYLOR, cu_seqlens=cu_seqlens))
        return self._leave(based_attention(*heads, self.window_size, cu_seqlens=cu_seqlens))

    def prefill(self, x: Tensor) -> tuple[Tensor, Any]:
        """``forward``, and what :meth:`step` goes on with: the state after the last token, or with
        a window a :class:`BasedCache`."""
        heads = self._project(x)
        if self.window_size is None:
            mixed, state = linear_attention(*heads, **_TAYLOR, output_final_state=True)
            kept = state.detach()
        else:
            mixed, kept = based_attention(*heads, self.window_size, output_final_cache=True)
        return self._leave(mixed), kept

    @torch.no_grad()
    def step(self, x: Tensor, kept: Any, slots: Tensor | None = None) -> Tensor:
        """The next token or tokens; ``kept`` is updated in place. ``slots`` as in
        :func:`linear_attention_step`, for layers without a window."""
        if self.window_size is None:
            step = linear_attention_step(*self._project(x), kept, **_TAYLOR, slots=slots)
            return self._leave(step)
        if slots is not None:
            raise NotImplementedError(
                f"slots are for layers without a window; window_size is {self.window_size}"
            )
        if not isinstance(kept, BasedCache):
            raise TypeError(f"kept must be a BasedCache, got {type(kept).__name__}")
        if not isinstance(kept.window, WindowCache):
            raise TypeError(f"kept.window must be a WindowCache, got {kind_of(kept.window)}")
        return self._leave(based_attention_step(*self._project(x, kept.window.length), kept))


def check_heads(dim: int, num_heads: int) -> None:
    """Errors: TypeError or ValueError where ``dim`` entries do not make ``num_heads`` heads."""
    check_integer("num_heads", num_heads, 1)
    check_integer("dim", dim, 1)
    if dim % num_heads:
        raise ValueError(f"dim must be a multiple of num_heads, {num_heads}, got {dim}")
