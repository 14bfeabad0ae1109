# SPDX-License-Identifier: Apache-2.0
"""Keys and values of the tokens so far: a cache whose heads may differ in length, one of sinks and
a ring, and one that evicts what is rarely attended (LazyEviction, arXiv 2506.15969)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .arguments import (
    check_count,
    check_dense,
    check_device,
    check_flag,
    check_integer,
    check_scale,
    check_sequences,
    check_tensor,
    kind_of,
    under_autocast,
    without_autocast,
)
from .functional import sliding_window_attention
from .ops import DTYPES, accumulator_dtype
from .plans import BlockPlan
from .routed import routed_attention
from .routers.inputs import Rotary, check_choice, check_number, check_rotary, rotated
from .routers.streaming import streaming_attention


class KVCache:
    """Keys and values in buffers of a fixed capacity, as many of each head as it has.

    Shapes:
        ``key`` ``[B, capacity, Hkv, D]``, ``value`` ``[B, capacity, Hkv, Dv]``; ``lengths`` int64
        ``[B, Hkv]``. Rows are in the order of their tokens.

    Args:
        head_dim_v: of the values, by default ``head_dim``.

    Attributes:
        longest: no head has more rows. Known to the host: nothing here waits for the device.

    Numerics:
        Rows are kept as they are given. Nothing here records gradients.

    Errors:
        ValueError or TypeError, naming the argument: a cache that is full refuses, and drops
        nothing.

    Example:
        >>> import torch
        >>> from attnext.kv_cache import KVCache
        >>> cache = KVCache(1, 100, 2, 16)
        >>> cache.append(torch.randn(1, 30, 2, 16), torch.randn(1, 30, 2, 16))
        >>> cache.attend(torch.randn(1, 1, 4, 16)).shape
        torch.Size([1, 1, 4, 16])
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        self.key, self.value = _buffers(
            batch, capacity, kv_heads, head_dim, head_dim_v, dtype, device
        )
        self.lengths = torch.zeros(batch, kv_heads, dtype=torch.int64, device=self.key.device)
        self.longest = 0
        self._even = True  # every head has `longest` rows

    @torch.no_grad()
    def append(self, key: Tensor, value: Tensor) -> None:
        """New tokens, ``[B, n, Hkv, D]`` and ``[B, n, Hkv, Dv]``, behind those of every head."""
        count = _check_rows(key, value, self.key, self.value)
        if self.longest + count > self.key.shape[1]:
            raise ValueError(
                f"key has {count} tokens, and {self.key.shape[1] - self.longest} of the capacity "
                f"of {self.key.shape[1]} are left"
            )
        if self._even:
            to = slice(self.longest, self.longest + count)
            self.key[:, to], self.value[:, to] = key, value
        else:
            rows, heads = self._rows_and_heads()
            new = torch.arange(count, device=key.device)[:, None]
            at = (rows, self.lengths[:, None] + new, heads)
            self.key[at], self.value[at] = key, value
        self.lengths += count
        self.longest += count

    @torch.no_grad()
    def keep(self, indices: Tensor, *, complete: bool = False) -> None:
        """Keeps of each head the rows at ``indices``, int ``[B, Hkv, n]``, in that order, and moves
        them together; -1, only behind all others: no row. ``complete``: there is no -1."""
        check_flag("complete", complete)
        batch, _, kv_heads, _ = self.key.shape
        _check_indices("indices", indices, (batch, kv_heads))
        count = indices.shape[2]
        if count > self.key.shape[1]:
            raise ValueError(
                f"indices must name at most {self.key.shape[1]} rows, the capacity, got {count}"
            )
        if not is_compiling():
            here = indices.to(self.key.device)
            none = here < 0
            # One look at the device: too large, too small, a row behind none, none of a whole.
            wrong = torch.stack(
                [
                    (here >= self.lengths[..., None]).any(),
                    (here < -1).any(),
                    (none[..., :-1] & ~none[..., 1:]).any(),
                    none.any() if complete else none.new_zeros(()),
                ]
            ).tolist()
            if wrong[0]:
                raise ValueError(
                    f"indices must be below the rows of their heads, {self.lengths.tolist()}, got "
                    f"up to {int(indices.max())}"
                )
            if wrong[1]:
                raise ValueError(f"indices must be at least -1, got {int(indices.min())}")
            if wrong[2]:
                raise ValueError("indices must have -1 only behind all others of a head")
            if wrong[3]:
                raise ValueError("indices must not have -1 with complete=True")
        self._keep(indices, complete)

    def _keep(self, indices: Tensor, complete: bool) -> None:
        count = indices.shape[2]
        rows, heads = self._rows_and_heads()
        at = (rows, indices.to(self.key.device).clamp(min=0).transpose(1, 2), heads)
        self.key[:, :count], self.value[:, :count] = self.key[at], self.value[at]
        self.lengths.copy_((indices >= 0).sum(-1))
        self.longest, self._even = count, complete

    def attend(
        self,
        query: Tensor,
        *,
        blocks: Tensor | None = None,
        block_size: int = 64,
        scale: float | None = None,
        return_lse: bool = False,
    ) -> Any:
        """Attention of the last tokens, whose keys were appended, to the rows of their heads.

        Shapes:
            query ``[B, n, H, D]``, the tokens of the last ``n`` rows: each sees the rows up to its
            own. Returns ``[B, n, H, Dv]``, and ``[B, n, H]`` if ``return_lse``.

        Args:
            blocks: int ``[B or 1, H or Hkv or 1, n or 1, slots]``: the only blocks of
                ``block_size`` rows that are attended; -1, or one behind the last row: none.
        """
        check_integer("block_size", block_size, 1)
        check_flag("return_lse", return_lse)
        key, value = self.key[:, : self.longest], self.value[:, : self.longest]
        if blocks is None and self._even:
            return sliding_window_attention(
                query, key, value, None, scale=scale, return_lse=return_lse
            )
        check_tensor("query", query, "a floating-point")
        if query.dim() != 4:
            raise ValueError(f"query must be [B, n, H, D], got shape {tuple(query.shape)}")
        query, key, value = under_autocast(query, key, value)
        check_sequences(query, key, value)
        batch, count, heads = query.shape[:3]
        kv_heads = key.shape[2]
        last = torch.arange(1 - count, 1, device=key.device)
        ends = (self.lengths[:, :, None] + last)[..., None]  # [B, Hkv, n, 1]
        starts = torch.zeros_like(ends)
        if blocks is not None:
            _check_indices("blocks", blocks, (), rank=4)
            fits = (batch, 1), (heads, kv_heads, 1), (count, 1)
            if any(n not in allowed for n, allowed in zip(blocks.shape, fits, strict=False)):
                raise ValueError(
                    f"blocks must be [{batch} or 1, {heads} or {kv_heads} or 1, {count} or 1, "
                    f"slots], got {tuple(blocks.shape)}"
                )
            if blocks.shape[1] == heads:
                ends = ends.repeat_interleave(heads // kv_heads, 1)
            starts = _first_rows(blocks, block_size, self.longest)
            ends = torch.minimum(starts + block_size, ends).masked_fill(blocks < 0, 0)
            starts = starts.clamp(0, self.longest).expand(ends.shape)
        plan = BlockPlan.of_spans(starts, ends.clamp(min=0), count, 1, self.longest)
        return routed_attention(query, key, value, plan, scale=scale, return_lse=return_lse)

    def fetch(
        self, blocks: Tensor, block_size: int, *, rotary: Rotary | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Blocks of rows, one behind the other: int ``[B, Hkv, n]``, -1: none.

        Returns keys ``[B, n * block_size, Hkv, D]``, rotated to where they stand now, values, and
        bool ``[B, n * block_size, Hkv]``: which rows there are. The others are zeros.
        """
        check_integer("block_size", block_size, 1)
        _check_indices("blocks", blocks, (self.key.shape[0], self.key.shape[2]))
        if blocks.shape[2] * block_size >= 2**31:
            raise ValueError(
                f"block_size must give {blocks.shape[2]} blocks fewer than 2**31 rows, got "
                f"{block_size}"
            )
        within = torch.arange(block_size, device=self.key.device)
        first = _first_rows(blocks.to(self.key.device), block_size, self.key.shape[1])
        at = (first[..., None] + within).flatten(2)
        real = (at >= 0) & (at < self.lengths[..., None])
        rows, heads = self._rows_and_heads()
        found = (rows, at.clamp(0, max(self.key.shape[1] - 1, 0)).transpose(1, 2), heads)
        real = real.transpose(1, 2)
        keys, values = (
            torch.where(real[..., None], buffer[found], 0) for buffer in (self.key, self.value)
        )
        return rotated(rotary, keys, torch.arange(at.shape[2], device=at.device)), values, real

    def _rows_and_heads(self) -> tuple[Tensor, Tensor]:
        batch, _, kv_heads, _ = self.key.shape
        rows = torch.arange(batch, device=self.key.device)[:, None, None]
        return rows, torch.arange(kv_heads, device=self.key.device)


class StreamingCache:
    """The first tokens and the last ones, in a ring: memory that does not grow.

    Shapes:
        ``key`` and ``value`` ``[B, sinks + window_size, Hkv, D]``: sinks, then the ring.

    Args:
        sinks, window_size: tokens that are kept: the first, and the last with the newest.
        rotary: rotates keys and queries, which are cached as they are, to their positions within
            the cache; see :func:`attnext.routers.streaming.streaming_attention`.
        others: as of :class:`KVCache`.

    Attributes:
        seen: tokens so far.

    Source:
        StreamingLLM (arXiv 2309.17453).

    Example:
        >>> import torch
        >>> from attnext.kv_cache import StreamingCache
        >>> cache = StreamingCache(1, 2, 16, sinks=4, window_size=64)
        >>> for n in (100, 1):
        ...     x = torch.randn(1, n, 2, 16)
        ...     out = cache.step(x, x, x)
        >>> cache.seen, out.shape
        (101, torch.Size([1, 1, 2, 16]))
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        *,
        sinks: int = 4,
        window_size: int = 512,
        rotary: Rotary | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        check_integer("sinks", sinks, 0)
        check_integer("window_size", window_size, 1)
        check_rotary(rotary)
        self.sinks, self.window_size, self.rotary, self.seen = sinks, window_size, rotary, 0
        self.key, self.value = _buffers(
            batch, sinks + window_size, kv_heads, head_dim, head_dim_v, dtype, device
        )

    @property
    def count(self) -> int:
        """Tokens in the cache."""
        return min(self.seen, self.sinks + self.window_size)

    def positions(self) -> Tensor:
        """int64 ``[count]``: where the token of each row stands in the cache, by age."""
        at = torch.arange(self.count, device=self.key.device)
        oldest = max(self.seen - self.sinks, 0) % self.window_size
        if self.seen <= self.sinks + self.window_size:
            return at
        return torch.where(
            at < self.sinks, at, (at - self.sinks - oldest) % self.window_size + self.sinks
        )

    @torch.no_grad()
    def append(self, key: Tensor, value: Tensor) -> None:
        """New tokens, ``[B, n, Hkv, D]`` and ``[B, n, Hkv, Dv]``; the oldest in the ring go."""
        count = _check_rows(key, value, self.key, self.value)
        first = min(max(self.sinks - self.seen, 0), count)
        last = max(first, count - self.window_size)
        new = torch.cat([torch.arange(first), torch.arange(last, count)]).to(key.device)
        at = new + self.seen
        at = torch.where(at < self.sinks, at, (at - self.sinks) % self.window_size + self.sinks)
        self.key[:, at], self.value[:, at] = key[:, new], value[:, new]
        self.seen += count

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        return_lse: bool = False,
    ) -> Any:
        """Appends tokens and returns their attention, each to the sinks and the window up to it.

        Shapes:
            query ``[B, n, H, D]``, key ``[B, n, Hkv, D]``, value ``[B, n, Hkv, Dv]``; returns
            ``[B, n, H, Dv]``, and ``[B, n, H]`` if ``return_lse``.
        """
        _check_rows(key, value, self.key, self.value)
        check_step(query, key, value, scale)
        check_flag("return_lse", return_lse)
        if key.shape[1] == 1:
            newest = min(self.seen + 1, self.sinks + self.window_size) - 1
            asked = rotated(self.rotary, query, torch.full((1,), newest, device=key.device))
            self.append(key, value)
            at = self.positions()
            return sliding_window_attention(
                asked,
                rotated(self.rotary, self.key[:, : self.count], at),
                self.value[:, : self.count],
                None,
                is_causal=False,
                scale=scale,
                return_lse=return_lse,
            )
        age = self.positions().argsort()
        result = streaming_attention(
            query,
            torch.cat([self.key[:, age], key], 1),
            torch.cat([self.value[:, age], value], 1),
            sinks=self.sinks,
            window_size=self.window_size,
            rotary=self.rotary,
            scale=scale,
            return_lse=return_lse,
        )
        self.append(key, value)
        return result


def lazy_scores(last_hit: Tensor, interval: Tensor, step: int, variant: str = "code") -> Tensor:
    """How much each token of a cache is worth keeping.

    Shapes: integers of equal shape: the step of the last hit, and the longest time between two
    hits (0: none yet); float32 of that shape.

    Args:
        step: the current one.
        variant: ``"paper"``: ``2 sigmoid(-(step - last_hit) / interval)``, plus
            ``2 sigmoid(1 - interval)`` where the interval is not 0; at interval 0 the first term is
            its limit, 1 for a token hit in this step and else 0. ``"code"``: as the authors'
            program has it, with ``1 + (step - last_hit) / (interval + 1e-5)``.

    Example:
        >>> import torch
        >>> from attnext import lazy_scores
        >>> last_hit, interval = torch.tensor([7, 2]), torch.tensor([4, 4])
        >>> lazy_scores(last_hit, interval, step=7, variant="paper").argmax()
        tensor(0)
    """
    check_choice("variant", variant, ("paper", "code"))
    for name, t in (("last_hit", last_hit), ("interval", interval)):
        check_tensor(name, t, "an int32 or int64")
    check_device("interval", interval, last_hit, "last_hit")
    if interval.shape != last_hit.shape:
        raise ValueError(
            f"interval must have the shape of last_hit, {tuple(last_hit.shape)}, got "
            f"{tuple(interval.shape)}"
        )
    check_integer("step", step, 0)
    since, longest = (step - last_hit).float(), interval.float()
    never = longest == 0
    if variant == "code":
        recent = 2 * torch.sigmoid(-(1 + since / (longest + 1e-5)))
    else:
        recent = 2 * torch.sigmoid(-since / torch.where(never, 1.0, longest))
        recent = torch.where(never, (since == 0).float(), recent)
    return recent + torch.where(never, 0.0, 2 * torch.sigmoid(1 - longest))


class LazyEvictionCache:
    """A cache that keeps tokens by how they have been attended again, without a map of weights.

    Per query head and token it remembers the last step in which the token's weight was at least
    ``alpha``, and the longest time between two of these. Every ``window_size`` steps a cache above
    ``budget`` is cut to it: the last ``window_size`` tokens, and of the others those of the largest
    :func:`lazy_scores`. A weight is at least ``alpha`` where its logit is at least
    ``lse + log(alpha)``, so the logits of one query are all that is computed besides attention.

    With several query heads to a kv head, which share its rows, a row counts as much as to the head
    that needs it most. The published method keeps rows for every query head: give it as many kv
    heads as query heads.

    Args:
        capacity: rows of the buffers: at least ``budget + window_size``, and the longest prompt
            with ``window_size`` tokens more.
        budget: tokens kept, at least ``window_size``.
        alpha: a constant of the model, 1e-4 to 5e-4 in the paper.
        variant: of :func:`lazy_scores`.
        others: as of :class:`KVCache`.

    Source:
        LazyEviction (arXiv 2506.15969).

    Example:
        >>> import torch
        >>> from attnext.kv_cache import LazyEvictionCache
        >>> cache = LazyEvictionCache(1, 64, 4, 2, 16, budget=32, window_size=8)
        >>> for _ in range(100):
        ...     q, k, v = (torch.randn(1, 1, heads, 16) for heads in (4, 2, 2))
        ...     out = cache.step(q, k, v)
        >>> cache.rows.longest
        36
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        *,
        budget: int,
        window_size: int,
        alpha: float = 5e-4,
        variant: str = "code",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        for name, size in (("heads", heads), ("kv_heads", kv_heads), ("window_size", window_size)):
            check_integer(name, size, 1)
        if heads % kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, {kv_heads}, got {heads}")
        check_integer("budget", budget, window_size)
        check_integer("capacity", capacity, budget + window_size)
        check_number("alpha", alpha, 0.0, 1.0)
        check_choice("variant", variant, ("paper", "code"))
        if alpha == 0:
            raise ValueError("alpha must be above 0: every token would be hit in every step")
        self.rows = KVCache(
            batch, capacity, kv_heads, head_dim, head_dim_v, dtype=dtype, device=device
        )
        self.budget, self.window_size, self.alpha = budget, window_size, alpha
        self.variant, self.steps = variant, 0
        shape = (batch, heads, capacity)
        self.last_hit = torch.zeros(shape, dtype=torch.int32, device=self.rows.key.device)
        self.interval = torch.zeros_like(self.last_hit)

    def prefill(self, key: Tensor, value: Tensor) -> None:
        """The prompt, ``[B, n, Hkv, D]`` and ``[B, n, Hkv, Dv]``, hit at step 0."""
        if self.steps:
            raise ValueError(
                f"key: the prompt comes before decoding, and {self.steps} steps are done"
            )
        self.rows.append(key, value)

    @torch.no_grad()
    def step(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None
    ) -> Tensor:
        """The attention ``[B, 1, H, Dv]`` of the next token, whose key and value are appended."""
        heads, group = self.last_hit.shape[1], self.last_hit.shape[1] // self.rows.key.shape[2]
        check_tensor("query", query, "a floating-point")
        if query.dim() != 4 or query.shape[1:3] != (1, heads):
            raise ValueError(f"query must be [B, 1, {heads}, D], got {tuple(query.shape)}")
        _check_rows(key, value, self.rows.key, self.rows.value)
        check_step(query, key, value, scale)
        self.rows.append(key, value)
        self.steps += 1
        count = self.rows.longest
        self.last_hit[:, :, count - 1] = self.steps - 1
        self.interval[:, :, count - 1] = 0
        out: Tensor
        out, lse = self.rows.attend(query, scale=scale, return_lse=True)
        acc = accumulator_dtype(query.dtype)
        number = query.shape[-1] ** -0.5 if scale is None else scale
        keys = self.rows.key[:, :count].permute(0, 2, 3, 1).to(acc)  # [B, Hkv, D, n]
        with without_autocast(query):
            logits = query[:, 0].to(acc).unflatten(1, (-1, group)) @ keys * number
        hit = logits.flatten(1, 2) >= (lse[:, 0, :, None] + math.log(self.alpha))
        last, longest = self.last_hit[:, :, :count], self.interval[:, :, :count]
        longest.copy_(torch.where(hit, torch.maximum(longest, self.steps - last), longest))
        last.masked_fill_(hit, self.steps)
        if self.steps % self.window_size == 0 and count > self.budget:
            self._evict(count, group)
        return out

    def _evict(self, count: int, group: int) -> None:
        score = lazy_scores(
            self.last_hit[:, :, :count], self.interval[:, :, :count], self.steps, self.variant
        )
        score = score.unflatten(1, (-1, group)).amax(2)  # [B, Hkv, n]
        score[:, :, count - self.window_size :] = math.inf
        best = score.sort(dim=-1, descending=True, stable=True).indices[..., : self.budget]
        best = best.sort(-1).values
        self.rows._keep(best, True)
        mine = best.repeat_interleave(group, 1)
        for state in (self.last_hit, self.interval):
            state[:, :, : self.budget] = state.gather(2, mine)


def _first_rows(blocks: Tensor, block_size: int, rows: int) -> Tensor:
    """Where blocks begin; of those behind all rows, somewhere behind them."""
    return blocks.long().clamp(max=rows // block_size + 1) * block_size


def _buffers(
    batch: Any,
    capacity: Any,
    kv_heads: Any,
    head_dim: Any,
    head_dim_v: Any,
    dtype: Any,
    device: Any,
) -> tuple[Tensor, Tensor]:
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    for name, size, least in (
        ("batch", batch, 0),
        ("capacity", capacity, 1),
        ("kv_heads", kv_heads, 1),
        ("head_dim", head_dim, 1),
        ("head_dim_v", head_dim_v, 1),
    ):
        check_count(name, size, least)
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {DTYPES}, got {dtype}")
    shape = (batch, capacity, kv_heads)
    return (
        torch.zeros((*shape, head_dim), dtype=dtype, device=device),
        torch.zeros((*shape, head_dim_v), dtype=dtype, device=device),
    )


def _check_rows(key: Any, value: Any, keys: Tensor, values: Tensor) -> int:
    """New rows for the buffers; returns how many."""
    for name, t, buffer in (("key", key, keys), ("value", value, values)):
        if not isinstance(t, Tensor) or t.dtype != buffer.dtype:
            raise TypeError(f"{name} must be a {buffer.dtype} tensor, got {kind_of(t)}")
        check_dense(name, t)
        check_device(name, t, buffer, "the cache")
        want = (buffer.shape[0], key.shape[1] if key.dim() == 4 else 0, *buffer.shape[2:])
        if tuple(t.shape) != want:
            raise ValueError(
                f"{name} must be [{want[0]}, tokens, {want[2]}, {want[3]}] with the tokens of key, "
                f"got {tuple(t.shape)}"
            )
    return int(key.shape[1])


def check_step(query: Any, key: Tensor, value: Tensor, scale: Any) -> None:
    """What a step would find after it has appended."""
    check_sequences(query, key, value)
    if query.shape[1] != key.shape[1]:
        raise ValueError(f"query must have the tokens of key, {key.shape[1]}, got {query.shape[1]}")
    check_scale(scale, 1.0)


def _check_indices(name: str, t: Any, lead: tuple[int, ...], rank: int = 3) -> None:
    check_tensor(name, t, "an int32 or int64")
    if t.dim() != rank or tuple(t.shape[: len(lead)]) != lead:
        raise ValueError(
            f"{name} must have {rank} dimensions{f', the first {lead}' if lead else ''}, got "
            f"{tuple(t.shape)}"
        )
