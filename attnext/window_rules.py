# SPDX-License-Identifier: Apache-2.0
"""Window rules of the public functions from their arguments, which are checked here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .arguments import check_choice, check_integer, check_qkv, is_int
from .geometry import BOUNDARIES, UNLIMITED

PerAxis: TypeAlias = int | bool | Sequence[Any]  # a value, or a tuple with one per token axis
_MAX_PHANTOMS = 2**20  # keys beyond the border, each of which costs as much as a real one
_FAR = 2**29  # coordinates of phantoms are 32-bit integers in the kernels' tables
_MAX_DILATION = 2**12  # that is taken as it is, however short the axis

# (left, right, stride, phase, dilation, is_causal, boundary, offset) per rule and axis, and the
# rule of each head (empty: all have the first).
Rules = tuple[list[tuple[Any, ...]], list[int]]
# The same, and the rules as the operator takes them.
Prepared = tuple[list[tuple[Any, ...]], list[int], list[int]]

_CACHE: dict[Any, Prepared] = {}
_CACHE_SIZE = 256


def prepare(
    build: Any, options: tuple[Any, ...], query: Tensor, key: Tensor, value: Tensor
) -> Prepared:
    """``build(query, key, value, *options)``, which checks all it is given, remembered by all that
    the checks look at: a small call costs more in checks than in arithmetic."""
    signature = None
    if not is_compiling():
        try:
            signature = (
                build,
                query.shape,
                key.shape,
                value.shape,
                query.dtype,
                key.dtype,
                value.dtype,
                query.device,
                key.device,
                value.device,
                query.layout,
                key.layout,
                value.layout,
                options,
                *map(_types, options),  # 1 and True are equal
            )
            found = _CACHE.get(signature)
            if found is not None:
                return found
        # Of what is no dense tensor, and of options that are lists.
        except (TypeError, AttributeError, RuntimeError):
            signature = None
    prepared = _with_fields(build(query, key, value, *options))
    if signature is not None:
        if len(_CACHE) >= _CACHE_SIZE:
            _CACHE.clear()
        _CACHE[signature] = prepared
    return prepared


def _types(x: Any) -> Any:
    return tuple(map(_types, x)) if type(x) is tuple else type(x)


def _with_fields(prepared: Rules) -> Prepared:
    rules, head_rule = prepared
    fields = [
        field
        for left, right, stride, phase, dilation, causal, boundary, offset in rules
        for field in (
            left,
            right,
            stride,
            phase,
            dilation,
            int(causal),
            BOUNDARIES.index(boundary),
            offset,
        )
    ]
    return rules, head_rule, fields


def neighborhood_rules(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis,
    dilation: PerAxis,
    is_causal: PerAxis,
    boundary: str,
    phase: PerAxis,
    offset: PerAxis | None,
) -> Rules:
    rank = check_qkv(query, key, value)
    check_choice("boundary", boundary, BOUNDARIES)
    strides = _per_axis("stride", stride, rank, minimum=1)
    dilations = _per_axis("dilation", dilation, rank, minimum=1)
    phases = _per_axis("phase", phase, rank)
    causal = _flags("is_causal", is_causal, rank)
    if offset is None:
        offset = tuple(
            key.shape[1 + a] - query.shape[1 + a] if causal[a] else 0 for a in range(rank)
        )
    offsets = _per_axis("offset", offset, rank)
    if boundary == "zero_pad":
        _check_near("offset", offsets)
        _check_near("phase", phases)
    dilations = [
        _shortened(dilations[a], query.shape[1 + a], key.shape[1 + a], offsets[a])
        for a in range(rank)
    ]
    if isinstance(kernel_size, list) and len(kernel_size) == rank == query.shape[-2] > 1:
        if all(is_int(size) for size in kernel_size):
            raise ValueError(
                f"kernel_size is a list with an entry for each of {rank} heads and as many axes: "
                f"give a tuple for axes, or tuples in the list for heads, got {kernel_size!r}"
            )
    windows, head_rule = _per_head("kernel_size", kernel_size, query)
    rules = []
    for entry in windows:
        for a, size in enumerate(_per_axis_windows(entry, rank)):
            left, right = _kernel_sides(size, causal[a])
            if boundary == "zero_pad" and max(left, right, strides[a]) > _MAX_PHANTOMS:
                raise ValueError(
                    f"kernel_size and stride must not exceed {_MAX_PHANTOMS} with "
                    f"boundary='zero_pad', got {size!r} and {strides[a]}"
                )
            if boundary == "inward" and not causal[a] and strides[a] > left + right + 1:
                raise ValueError(
                    f"stride must not exceed kernel_size, got {strides[a]} > {left + right + 1} "
                    f"on axis {a}"
                )
            rules.append(
                (left, right, strides[a], phases[a], dilations[a], causal[a], boundary, offsets[a])
            )
    return rules, head_rule


def sliding_rules(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: Any,
    is_causal: bool,
    sinks: int,
    packed: bool,
) -> Rules:
    rank = check_qkv(query, key, value)
    if rank != 1:
        raise ValueError(f"query must be [B, N, H, D], got shape {tuple(query.shape)}")
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be a bool, got {is_causal!r}")
    check_integer("sinks", sinks, minimum=0)
    offset = 0 if packed else key.shape[1] - query.shape[1]
    windows, head_rule = _per_head("window_size", window_size, query)
    rules = []
    for window in windows:
        left, right = _window_sides(window, is_causal)
        rules.append((left, right, 1, 0, 1, is_causal, "truncate", offset))
    return rules, head_rule


def partition_rules(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: PerAxis,
    shift: PerAxis,
    key_window_size: PerAxis | None,
    boundary: str | None,
) -> Rules:
    rank = check_qkv(query, key, value)
    sizes = _per_axis("window_size", window_size, rank, minimum=1)
    shifts = _per_axis("shift", shift, rank)
    key_sizes: Sequence[int] = sizes
    if key_window_size is not None:
        key_sizes = _per_axis("key_window_size", key_window_size, rank, minimum=1)
        for size, key_size in zip(sizes, key_sizes, strict=True):
            if key_size < size or key_size > _MAX_PHANTOMS:
                raise ValueError(
                    f"key_window_size must be between window_size, {size}, and {_MAX_PHANTOMS}, "
                    f"got {key_size}"
                )
    if boundary is None:
        boundary = "truncate" if key_window_size is None else "zero_pad"
    else:
        check_choice("boundary", boundary, BOUNDARIES)
    if boundary == "zero_pad":
        _check_near("shift", shifts)
        if max(sizes) > _MAX_PHANTOMS:
            raise ValueError(
                f"window_size must not exceed {_MAX_PHANTOMS} with boundary='zero_pad', got "
                f"{window_size!r}"
            )
    if key.shape[1:-2] != query.shape[1:-2]:
        raise ValueError(
            f"key must have the token axes of query, {tuple(query.shape[1:-2])}, got "
            f"{tuple(key.shape[1:-2])}"
        )
    rules = []
    for size, key_size, start in zip(sizes, key_sizes, shifts, strict=True):
        left = size // 2 + (key_size - size) // 2
        right = key_size - 1 - left
        rules.append((_side(left), _side(right), size, start, 1, False, boundary, 0))
    return rules, []


def _check_near(name: str, coordinates: Sequence[int]) -> None:
    for x in coordinates:
        if not -_FAR <= x <= _FAR:
            raise ValueError(
                f"{name} must be between -{_FAR} and {_FAR} with boundary='zero_pad', got {x}"
            )


def _shortened(dilation: int, n_q: int, n_k: int, offset: int) -> int:
    """A dilation beyond all coordinates parts all tokens, as every longer one does: tables have a
    row for each class of tokens."""
    if dilation <= _MAX_DILATION:
        return dilation
    return max(_MAX_DILATION, min(dilation, max(n_q, n_k) + abs(offset) + 1))


def _per_axis(name: str, x: Any, rank: int, minimum: int | None = None) -> Sequence[int]:
    if is_int(x):
        check_integer(name, x, minimum)
        return (x,) * rank
    if not isinstance(x, (tuple, list)):
        raise TypeError(f"{name} must be an int or a tuple of {rank}, got {x!r}")
    if len(x) != rank:
        raise ValueError(f"{name} must have one entry per token axis, {rank}, got {x!r}")
    for entry in x:
        check_integer(name, entry, minimum)
    return x


def _flags(name: str, x: Any, rank: int) -> Sequence[bool]:
    if isinstance(x, bool):
        return (x,) * rank
    if not isinstance(x, (tuple, list)) or not all(isinstance(f, bool) for f in x):
        raise TypeError(f"{name} must be a bool or a tuple of bools, got {x!r}")
    if len(x) != rank:
        raise ValueError(f"{name} must have one entry per token axis, {rank}, got {x!r}")
    return x


def _per_head(name: str, x: Any, query: Tensor) -> tuple[list[Any], list[int]]:
    """Distinct windows, and which of them each head has (empty: all have the first)."""
    if not isinstance(x, list):
        return [x], []
    if len(x) != query.shape[-2]:
        raise ValueError(
            f"{name} as a list must have one entry per query head, {query.shape[-2]}, got {len(x)}"
        )
    for entry in x:
        if isinstance(entry, list):
            raise TypeError(f"{name}: the entry of a head must be an int or a tuple, got {entry!r}")
        if not isinstance(entry, (int, torch.SymInt, tuple, type(None))):
            raise TypeError(f"{name}: the entry of a head must be an int or a tuple, got {entry!r}")
    number: dict[Any, int] = {}
    head_rule = [number.setdefault((entry, _types(entry)), len(number)) for entry in x]
    return [entry for entry, _ in number], head_rule


def _per_axis_windows(x: Any, rank: int) -> Sequence[Any]:
    if is_int(x):
        return (x,) * rank
    if not isinstance(x, tuple):
        raise TypeError(
            f"kernel_size must be an int, a tuple of {rank}, or a list with one of these per head, "
            f"got {x!r}"
        )
    if rank == 1 and len(x) == 2 and all(is_int(side) for side in x):
        return (x,)  # (left, right)
    if len(x) != rank:
        raise ValueError(
            f"kernel_size must have an int or (left, right) per token axis, {rank}, got {x!r}"
        )
    return x


def _kernel_sides(size: Any, causal: bool) -> tuple[int, int]:
    if isinstance(size, tuple):
        return _sides("kernel_size", size, causal)
    check_integer("kernel_size", size, 1)
    return _around_self(size, causal)


def _around_self(size: int, causal: bool) -> tuple[int, int]:
    left = size - 1 if causal else size // 2
    return _side(left), _side(size - 1 - left)


def _side(keys: int) -> int:
    return min(keys, UNLIMITED) if isinstance(keys, int) else keys


def _window_sides(window: Any, causal: bool) -> tuple[int, int]:
    if window is None:
        return UNLIMITED, 0 if causal else UNLIMITED
    if isinstance(window, tuple):
        return _sides("window_size", window, causal)
    check_integer("window_size", window, 1)
    return _around_self(window, causal)


def _sides(name: str, sides: tuple[Any, ...], causal: bool) -> tuple[int, int]:
    if len(sides) != 2:
        raise ValueError(f"{name} must be an int or (left, right), got {sides!r}")
    for side in sides:
        check_integer(name, side, -1)
    left, right = (UNLIMITED if side == -1 else _side(side) for side in sides)
    if causal:
        if sides[1] not in (0, -1):
            raise ValueError(f"{name}: right must be 0 or -1 when causal, got {sides!r}")
        right = 0
    return left, right
