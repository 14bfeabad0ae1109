# SPDX-License-Identifier: Apache-2.0
"""Relative-position tables of other libraries as the ``bias`` of attnext, and back.

The ``bias`` of attnext has one axis per token axis behind its heads, ``[heads, 2e - 1, ...]``, and
the entry for an offset is found at ``key - query + e - 1``. Every conversion here only moves
entries, so a checkpoint converts without loss and gradients pass through to the stored table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_dense


def swin_bias(table: Tensor, window_size: int | Sequence[int]) -> Tensor:
    """Swin's flattened table, which counts offsets as query - key, as a ``bias``.

    Shapes: table ``[(2w_0 - 1) * (2w_1 - 1) * ..., heads]``, result
        ``[heads, 2w_0 - 1, 2w_1 - 1, ...]``. An int means one and the same side on every axis; how
        many axes there are is then read off the number of rows.
    Numerics: exact and differentiable.
    Errors: TypeError, or ValueError where the rows are not those of the window.
    Complexity: one copy of the table.
    Source: Liu et al., Swin Transformer, arXiv:2103.14030; in three axes Video Swin,
        arXiv:2106.13230.
    Example:

        >>> table = torch.arange(9.0).view(9, 1)
        >>> swin_bias(table, 2)[0, 0]  # the key one row above; one column left, same, right
        tensor([8., 7., 6.])
    """
    _check_tensor(table, "table")
    if table.dim() != 2:
        raise ValueError(f"table must have shape [entries, heads], got {tuple(table.shape)}")
    sides = _sides(table.shape[0], window_size)
    grid = table.t().unflatten(1, [2 * side - 1 for side in sides])
    return grid.flip(tuple(range(1, grid.dim())))


def swin_table(bias: Tensor) -> Tensor:
    """The inverse of ``swin_bias``.

    Shapes: bias ``[heads, 2w_0 - 1, ...]``, result ``[(2w_0 - 1) * ..., heads]``.
    Numerics: exact and differentiable.
    Errors: TypeError, or ValueError where an axis has an even number of offsets.
    Complexity: one copy of the table.
    Source: ``swin_bias``.
    Example:

        >>> table = torch.randn(13 * 13, 3)
        >>> torch.equal(swin_table(swin_bias(table, 7)), table)
        True
    """
    _check_bias(bias, "bias")
    return bias.flip(tuple(range(1, bias.dim()))).flatten(1).t()


def hat_bias(table: Tensor, window_size: int, key_window_size: int) -> Tensor:
    """The table of HAT's overlapping cross-attention as a ``bias``.

    HAT numbers the slots of a query tile and of the larger box of its keys from their own corners
    and indexes with ``key slot - query slot + w - w_k + 1``, row by row: numbers that are mostly
    negative and reach the table by wrapping around its end as a whole.

    Shapes: table ``[(w + w_k - 1)**2, heads]``, result ``[heads, 2e - 1, 2e - 1]`` with
        ``e = w + ceil((w_k - w) / 2)``. Where ``w_k - w`` is odd the farthest row and column above
        and left of the query belong to no key; they are zero.
    Numerics: exact and differentiable.
    Errors: TypeError, or ValueError where the rows are not those of the windows.
    Complexity: one copy of the table.
    Source: Chen et al., HAT, arXiv:2205.04437.
    Example:

        >>> hat_bias(torch.randn(39 * 39, 6), 16, 24).shape
        torch.Size([6, 39, 39])
    """
    _check_tensor(table, "table")
    index = _hat_index(window_size, key_window_size)
    if table.dim() != 2 or table.shape[0] != index.numel():
        raise ValueError(
            f"table must have shape [{index.numel()}, heads] for window_size={window_size} and "
            f"key_window_size={key_window_size}, got {tuple(table.shape)}"
        )
    spare = (key_window_size - window_size) % 2
    return torch.nn.functional.pad(table[index.to(table.device)].movedim(-1, 0), (spare, 0) * 2)


def hat_table(bias: Tensor, window_size: int, key_window_size: int) -> Tensor:
    """The inverse of ``hat_bias``.

    Shapes: bias ``[heads, 2e - 1, 2e - 1]``, result ``[(w + w_k - 1)**2, heads]``.
    Numerics: exact and differentiable.
    Errors: TypeError, or ValueError where the extents are not those of the windows.
    Complexity: one copy of the table.
    Source: ``hat_bias``.
    Example:

        >>> table = torch.randn(25, 2)
        >>> torch.equal(hat_table(hat_bias(table, 2, 4), 2, 4), table)
        True
    """
    _check_tensor(bias, "bias")
    index = _hat_index(window_size, key_window_size)
    spare = (key_window_size - window_size) % 2
    expected = (index.shape[0] + spare,) * 2
    if bias.dim() != 3 or bias.shape[1:] != expected:
        raise ValueError(
            f"bias must have shape [heads, {expected[0]}, {expected[1]}] for "
            f"window_size={window_size} and key_window_size={key_window_size}, "
            f"got {tuple(bias.shape)}"
        )
    entries = bias[:, spare:, spare:].flatten(1).t()
    return entries[index.flatten().argsort().to(bias.device)]


def natten_rpb(rpb: Tensor) -> Tensor:
    """The relative positional bias of the first NATTEN releases as a ``bias``.

    It counts offsets as attnext does, key - query in steps of the dilation, so this checks the
    shape and returns its argument.

    Shapes: rpb ``[heads, 2k - 1, ...]`` for a kernel of k keys, result the same.
    Numerics: exact and differentiable.
    Errors: TypeError, or ValueError where an axis has an even number of offsets.
    Complexity: none.
    Source: Hassani et al., Neighborhood Attention Transformer, arXiv:2204.07143.
    Example:

        >>> natten_rpb(torch.zeros(4, 13, 13)).shape
        torch.Size([4, 13, 13])
    """
    _check_bias(rpb, "rpb")
    return rpb


def _check_tensor(x: Any, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    check_dense(name, x)


def _check_side(name: str, x: Any) -> None:
    if not isinstance(x, int) or isinstance(x, bool):
        raise TypeError(f"{name} must be an int, got {x!r}")


def _check_bias(bias: Tensor, name: str) -> None:
    _check_tensor(bias, name)
    if not 2 <= bias.dim() <= 4 or any(extent % 2 == 0 for extent in bias.shape[1:]):
        raise ValueError(
            f"{name} must have shape [heads, 2e - 1, ...] with 1 to 3 axes of an odd number of "
            f"offsets, got {tuple(bias.shape)}"
        )


def _sides(rows: int, window_size: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(window_size, int) and not isinstance(window_size, bool):
        candidates = [(window_size,) * rank for rank in (1, 2, 3)]
    elif isinstance(window_size, (tuple, list)):
        if not 1 <= len(window_size) <= 3:
            raise ValueError(f"window_size must have 1 to 3 axes, got {window_size}")
        for side in window_size:
            _check_side("window_size", side)
        candidates = [tuple(window_size)]
    else:
        raise TypeError(f"window_size must be an int or one per axis, got {window_size!r}")
    for sides in candidates:
        if all(side >= 1 for side in sides) and math.prod(2 * s - 1 for s in sides) == rows:
            return sides
    raise ValueError(
        f"table has {rows} rows, which is not the number of offsets in window_size={window_size}: "
        "the product of 2w - 1 over its axes"
    )


def _hat_index(window_size: int, key_window_size: int) -> Tensor:
    """Rows of HAT's table by key - query, from the smallest offset to the largest, on two axes."""
    _check_side("window_size", window_size)
    _check_side("key_window_size", key_window_size)
    if not 1 <= window_size <= key_window_size:
        raise ValueError(
            "window_size must be at least 1 and at most key_window_size, "
            f"got {window_size} and {key_window_size}"
        )
    count = window_size + key_window_size - 1
    slots = torch.arange(1 - window_size, key_window_size) + window_size - key_window_size + 1
    return (slots[:, None] * count + slots) % count**2
