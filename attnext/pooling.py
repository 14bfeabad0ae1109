# SPDX-License-Identifier: Apache-2.0
"""One vector for each block of tokens: what routers score."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arguments import (
    check_choice,
    check_device,
    check_flag,
    check_integer,
    check_tensor,
    has_numbers,
)
from .ops import accumulator_dtype
from .plans import Blocks, per_axis
from .routed_tables import Remembered

REDUCTIONS = ("mean", "sum", "max", "min", "min_max")


@dataclass(frozen=True)
class Windows:
    """Runs of ``size`` tokens, one every ``stride`` tokens, that may overlap.

    Window ``w`` holds the tokens from ``phase + w * stride``, ``size`` of them or those that are
    left. Without ``ragged`` there are no windows that the end of the sequence cuts.

    Example:
        >>> import attnext
        >>> [attnext.Windows(100, 32, 16, ragged=ragged).num_blocks for ragged in (True, False)]
        [7, 5]
    """

    num_tokens: int
    size: int
    stride: int = 0
    phase: int = 0
    ragged: bool = True

    def __post_init__(self) -> None:
        check_integer("num_tokens", self.num_tokens, 0)
        check_integer("size", self.size, 1)
        check_integer("stride", self.stride, 0)
        check_integer("phase", self.phase, 0)
        check_flag("ragged", self.ragged)
        if not self.stride:
            object.__setattr__(self, "stride", self.size)

    @property
    def num_blocks(self) -> int:
        room = self.num_tokens - self.phase
        return max(
            0, -(-room // self.stride) if self.ragged else (room - self.size) // self.stride + 1
        )

    def bounds(self, device: Any = None) -> tuple[Tensor, Tensor]:
        """First token of each window, and one past its last."""
        starts = torch.arange(self.num_blocks, device=device) * self.stride + self.phase
        return starts, (starts + self.size).clamp(max=self.num_tokens)

    def counts(self, device: Any = None) -> Tensor:
        starts, ends = self.bounds(device)
        return (ends - starts).int()


def bounds_of(blocks: Blocks | Windows, device: Any) -> tuple[Tensor, Tensor]:
    """First token of each block of a sequence, and one past its last."""
    if isinstance(blocks, Windows):
        return blocks.bounds(device)
    offsets = blocks.offsets.to(device).long()
    return offsets[:-1], offsets[1:]


def packed_blocks(
    cu_seqlens: Tensor, size: int, *, num_tokens: int | None = None
) -> tuple[Blocks, Tensor]:
    """Blocks of ``size`` tokens that start anew in every sequence of a packed batch.

    Shapes: cu_seqlens int32 ``[N + 1]``, where each sequence ends; best on the CPU, since it is
        read there. Returns the blocks, on its device, and int32 ``[N + 1]``, the blocks of which
        sequence ``n`` are ``first[n]`` to ``first[n + 1]``.

    Args:
        num_tokens: where cu_seqlens ends. Given, it is not read on the host, nor checked, and the
            number of blocks does not depend on it: it is ``num_tokens // size + N``, the last ones
            empty.

    Errors: ValueError or TypeError, naming the argument.

    Example:
        >>> import torch
        >>> from attnext import packed_blocks
        >>> blocks, first = packed_blocks(torch.tensor([0, 5, 5, 9], dtype=torch.int32), 4)
        >>> blocks.offsets.tolist(), first.tolist()
        ([0, 4, 5, 9], [0, 2, 2, 3])
    """
    check_tensor("cu_seqlens", cu_seqlens, "an int32")
    if cu_seqlens.dim() != 1 or not cu_seqlens.shape[0]:
        raise ValueError(f"cu_seqlens must be [N + 1], got {tuple(cu_seqlens.shape)}")
    check_integer("size", size, 1)
    ends = cu_seqlens.long()
    if num_tokens is None:
        ends = ends.cpu()
        if int(ends[0]) or (ends.diff() < 0).any():
            raise ValueError(f"cu_seqlens must rise from 0, got {ends.tolist()[:8]}")
    else:
        check_integer("num_tokens", num_tokens, 0)
    sequences = ends.shape[0] - 1
    first = torch.cat([ends.new_zeros(1), (-(-ends.diff() // size)).cumsum(0)])
    if num_tokens is None:
        num_tokens, count = int(ends[-1]), int(first[-1])
    else:
        count = num_tokens // size + sequences
    block = torch.arange(count, device=ends.device)
    sequence = torch.searchsorted(first[1:], block, right=True)
    of = sequence.clamp(max=max(sequences - 1, 0))
    starts = ends[of] + (block - first[of]) * size
    starts = torch.where(sequence < sequences, starts, num_tokens)
    offsets = torch.cat([starts, starts.new_full((1,), num_tokens)])
    device = cu_seqlens.device
    return Blocks((num_tokens,), offsets.int().to(device)), first.int().to(device)


def block_pool(
    x: Tensor,
    blocks: int | tuple[int, ...] | Blocks | Windows,
    reduce: str = "mean",
    *,
    weights: Tensor | None = None,
    dtype: torch.dtype | None = None,
    return_counts: bool = False,
) -> Any:
    """Reduces the tokens of each block to one.

    Shapes:
        x ``[B, *tokens, H, D]`` with 1 to 3 token axes; the result is ``[B, *grid, H, D]`` for
        sizes and ``[B, blocks, H, D]`` for :class:`Blocks` and :class:`Windows`, with
        ``return_counts`` also int32 ``[*grid]`` or ``[blocks]``, the tokens of each.

    Args:
        blocks: tokens of a block (of a map: the sides of a box), the last of an axis being what is
            left; or :class:`Blocks` of any lengths (:func:`packed_blocks`: a packed batch); or
            :class:`Windows` that overlap.
        reduce: ``"mean"`` (over the tokens there are: no padding counts), ``"sum"``, ``"max"``,
            ``"min"``, or ``"min_max"``: ``[..., 2 D]``, minima then maxima, whose product with
            ``cat(query.clamp(max=0), query.clamp(min=0))`` bounds ``query . key`` from above.
        weights: of ``"sum"`` and ``"mean"``, broadcasting to ``[B, *tokens, H]``; the mean is then
            ``sum(w x) / sum(w)``. Differentiable.
        dtype: of the result; by default that of ``x``.

    Numerics:
        Sums in float32 (float64 for float64), one rounding at the store. A block without tokens,
        or without weight, gives 0. Among equal maxima the gradient is shared. Differentiable.

    Errors:
        ValueError or TypeError, naming the argument.

    Complexity:
        O(tokens * size / stride).

    Source:
        Region means of BiFormer (arXiv 2303.08810) and MoBA (2502.13189), compression windows of
        NSA (2502.11089), bounds of Quest (2406.10774).

    Example:
        >>> import torch, attnext
        >>> keys = torch.randn(1, 100, 2, 16)
        >>> attnext.block_pool(keys, 32).shape
        torch.Size([1, 4, 2, 16])
        >>> attnext.block_pool(torch.randn(1, 14, 9, 2, 16), (4, 4), "max").shape
        torch.Size([1, 4, 3, 2, 16])
    """
    _check(x, blocks, reduce, weights, dtype, return_counts)
    acc = accumulator_dtype(x.dtype)
    pool, counts, grid = _pooling(x, blocks)
    dtype = x.dtype if dtype is None else dtype
    if reduce in ("mean", "sum"):
        values, total = x.to(acc), counts
        if weights is not None:
            weights = weights.to(acc)[..., None]
            values = values * weights
            if reduce == "mean":
                total = pool(weights, "sum")
        result = pool(values, "sum")
        if reduce == "mean":
            total = total if weights is not None else total.to(acc)[:, None, None]
            result = torch.where(total == 0, 0.0, result / torch.where(total == 0, 1.0, total))
    elif reduce == "min_max":
        result = torch.cat([pool(x, "min"), pool(x, "max")], -1)
    else:
        result = pool(x, reduce)
    result = result.unflatten(1, grid) if len(grid) > 1 else result
    result = result.to(dtype)
    return (result, counts.reshape(grid)) if return_counts else result


Pool = Callable[[Tensor, str], Tensor]


def _pooling(x: Tensor, blocks: Any) -> tuple[Pool, Tensor, tuple[int, ...]]:
    """A reduction ``(tensor, op) -> [B, blocks, H, D]``, the counts, and the grid of the blocks."""
    if isinstance(blocks, Blocks):
        return (
            lambda t, op: _over_segments(t, blocks, op),
            blocks.counts.to(x.device),
            (blocks.num_blocks,),
        )
    if isinstance(blocks, Windows):
        counts = blocks.counts(x.device)
        return lambda t, op: _over_windows(t, blocks, op), counts, (blocks.num_blocks,)
    extents = x.shape[1:-2]
    sizes = per_axis("blocks", blocks, len(extents), 1)

    def over_boxes(t: Tensor, op: str) -> Tensor:
        for axis, size in enumerate(sizes):
            t = _over_axis(t, axis + 1, size, op)
        return t.flatten(1, len(sizes))

    sides = [Windows(n, s).counts(x.device) for n, s in zip(extents, sizes, strict=True)]
    counts = sides[0]
    for side in sides[1:]:
        counts = (counts[:, None] * side).flatten()
    return over_boxes, counts, tuple(side.shape[0] for side in sides)


def _reduce(x: Tensor, axis: int, op: str) -> Tensor:
    if op == "max":
        return x.amax(axis)
    if op == "min":
        return x.amin(axis)
    if not (x.device.type == "cpu" and x.dtype == torch.float32) or x.stride(-2) != x.shape[-1]:
        return x.sum(axis)
    # On the CPU a product with ones reads at the speed of memory, a sum over an outer axis does
    # not, ten times over.
    rows = x.flatten(axis + 1)
    ones = torch.ones(1, x.shape[axis], dtype=x.dtype)
    with torch.autocast("cpu", enabled=False):
        return (ones @ rows).squeeze(-2).unflatten(-1, x.shape[axis + 1 :])


def _over_axis(x: Tensor, axis: int, size: int, op: str) -> Tensor:
    """Blocks of ``size`` along one axis, the last as long as is left."""
    if size == 1:
        return x
    whole, rest = divmod(x.shape[axis], size)
    parts = []
    if whole or not rest:
        parts = [
            _reduce(x.narrow(axis, 0, whole * size).unflatten(axis, (whole, size)), axis + 1, op)
        ]
    if rest:
        tail = x.narrow(axis, whole * size, rest).unflatten(axis, (1, rest))
        parts.append(_reduce(tail, axis + 1, op))
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


_COVERS = Remembered()
_IDENTITY = {"sum": 0.0, "max": -math.inf, "min": math.inf}
_JOIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}


def _over_windows(x: Tensor, windows: Windows, op: str) -> Tensor:
    """Blocks of what divides size and stride first, then each window from its blocks."""
    step = math.gcd(windows.size, windows.stride)
    parts = _over_axis(x[:, windows.phase :], 1, step, op)
    stride, size, count = windows.stride // step, windows.size // step, windows.num_blocks
    if not count:
        return x.new_zeros(x.shape[0], 0, *x.shape[2:])
    missing = (count - 1) * stride + size - parts.shape[1]
    if missing > 0:
        parts = torch.nn.functional.pad(parts, (0, 0, 0, 0, 0, missing), value=_IDENTITY[op])
    last = (count - 1) * stride + 1
    result = parts[:, :last:stride]
    for m in range(1, size):
        result = _JOIN[op](result, parts[:, m : m + last : stride])
    return result


def check_cover(name: str, blocks: Blocks) -> None:
    """That blocks hold each of their tokens once, where there are numbers to read."""
    offsets, order, count = blocks.offsets, blocks.order, blocks.num_tokens
    if not has_numbers(offsets):
        return

    def check_offsets() -> None:
        if offsets[0] != 0 or offsets[-1] != count or bool((offsets.diff() < 0).any()):
            raise ValueError(
                f"{name} must have offsets that rise from 0 to {count} tokens, got "
                f"{offsets.tolist()}"
            )

    def check_order() -> None:
        assert order is not None
        places = torch.arange(count, device=order.device)
        if order.shape != (count,) or not torch.equal(order.long().sort()[0], places):
            raise ValueError(f"{name} must have an order that names each of {count} tokens once")

    if offsets.is_cuda:
        _COVERS.get((offsets,), count, check_offsets)
    else:  # few, in memory that numpy may share and change unseen
        check_offsets()
    if order is not None:
        _COVERS.get((order,), count, check_order)


def _over_segments(x: Tensor, blocks: Blocks, op: str) -> Tensor:
    batch, heads, dim = x.shape[0], x.shape[-2], x.shape[-1]
    rows = x.flatten(1, -3)
    if blocks.order is not None:
        rows = rows[:, blocks.order.to(x.device).long()]
    counts = blocks.counts.to(x.device).long()
    if not rows.numel() or not counts.numel():
        return rows.new_zeros(batch, counts.shape[0], heads, dim)
    acc = accumulator_dtype(x.dtype)
    rows = (
        rows.transpose(0, 1).reshape(rows.shape[1], -1).to(acc)
    )  # exact: maxima stay what they are
    # Lengths are looked at where nobody waits for them: compiled, nothing else has.
    unsafe = rows.device.type != "cpu"
    result = torch.segment_reduce(rows, op, lengths=counts, axis=0, unsafe=unsafe)
    result = torch.where((counts == 0)[:, None], 0.0, result)
    return result.reshape(-1, batch, heads, dim).transpose(0, 1).to(x.dtype)


def _check(x: Any, blocks: Any, reduce: Any, weights: Any, dtype: Any, return_counts: Any) -> None:
    check_tensor("x", x, "a floating-point")
    if not 4 <= x.dim() <= 6:
        raise ValueError(f"x must be [B, *tokens, H, D], 1 to 3 token axes, got {tuple(x.shape)}")
    extents = tuple(x.shape[1:-2])
    if isinstance(blocks, Windows) and extents != (blocks.num_tokens,):
        raise ValueError(f"blocks must be of {extents} tokens, got {blocks.num_tokens}")
    if isinstance(blocks, Blocks):
        if extents != blocks.extent:
            raise ValueError(f"blocks must be of {extents} tokens, got {blocks.extent}")
        check_cover("blocks", blocks)
    if not isinstance(blocks, (Blocks, Windows)):
        per_axis("blocks", blocks, len(extents), 1)
    check_choice("reduce", reduce, REDUCTIONS)
    check_flag("return_counts", return_counts)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype!r}")
    if weights is None:
        return
    if reduce not in ("mean", "sum"):
        raise ValueError(f"weights have no part in reduce={reduce!r}: leave them out")
    check_tensor("weights", weights, "a floating-point")
    check_device("weights", weights, x, "x")
    want = (x.shape[0], *extents, x.shape[-2])
    if weights.dim() != len(want) or any(
        n not in ((1, w) if a in (0, len(want) - 1) else (w,))
        for a, (n, w) in enumerate(zip(weights.shape, want, strict=True))
    ):
        raise ValueError(
            f"weights must be {want}, or 1 in place of the first or the last, got "
            f"{tuple(weights.shape)}"
        )
