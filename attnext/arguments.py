# SPDX-License-Identifier: Apache-2.0
"""What the public functions share: window rules from their arguments, and every check of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .geometry import BOUNDARIES, UNLIMITED
from .ops import DTYPES, accumulator_dtype, unit_stride, window_op

PerAxis = Any  # a value, or a tuple with one per token axis

_MAX_PHANTOMS = 2**20  # keys beyond the border, each of which costs as much as a real one
_FAR = 2**29  # coordinates of phantoms are 32-bit integers in the kernels' tables
_MAX_INTEGER = 2**62
_MAX_DISTANCE = 2**26  # of a table of ALiBi's
_MAX_DILATION = 2**12  # that is taken as it is, however short the axis
_SOFTCAPS = 2.0**-100, 2.0**100  # so that logits / softcap and the products by it are float32
DTYPE_NAMES = "float32, float64, bfloat16, float16"


# (left, right, stride, phase, dilation, is_causal, boundary, offset) per rule and axis, and the
# rule of each head (empty: all have the first).
Rules = tuple[list[tuple[Any, ...]], list[int]]
# The same, and the rules as the operator takes them.
Prepared = tuple[list[tuple[Any, ...]], list[int], list[int]]

_CACHE: dict[Any, Prepared] = {}
_CACHE_SIZE = 256


def _prepare(
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
        except (TypeError, AttributeError):  # not tensors, or options that are lists
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
    offset: PerAxis,
) -> Rules:
    rank = check_qkv(query, key, value)
    if boundary not in BOUNDARIES:
        raise ValueError(f"boundary must be one of {BOUNDARIES}, got {boundary!r}")
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
    key_window_size: PerAxis,
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
    elif boundary not in BOUNDARIES:
        raise ValueError(f"boundary must be one of {BOUNDARIES}, got {boundary!r}")
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


# ---- checks


def kind_of(x: Any) -> str:
    return f"a {x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__


def _layout(t: Tensor) -> str:
    return "a nested tensor" if t.is_nested else f"one of layout {t.layout}"


_CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CUDA_HEAD_DIM = 256


def _check_cuda(query: Tensor, value: Tensor) -> None:
    """What the CUDA kernels do not do."""
    if query.dtype not in _CUDA_DTYPES:
        raise NotImplementedError(
            f"query has dtype {query.dtype}: on CUDA float32, bfloat16 or float16 is allowed"
        )
    for name, t in (("query", query), ("value", value)):
        if t.shape[-1] > _CUDA_HEAD_DIM:
            raise NotImplementedError(
                f"{name} has head_dim {t.shape[-1]}: on CUDA at most {_CUDA_HEAD_DIM} is allowed"
            )


def check_qkv(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Checks the three inputs against each other; returns the number of token axes."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    dtype, rank = query.dtype, query.dim() - 3
    if query.layout != torch.strided or query.is_nested:
        raise TypeError(f"query must be a dense tensor, got {_layout(query)}")
    if dtype not in DTYPES:
        raise TypeError(f"query must be one of {DTYPE_NAMES}, got {dtype}")
    if not 1 <= rank <= 3:
        raise ValueError(
            "query must be [batch, *tokens, heads, head_dim] with 1 to 3 token axes, got shape "
            f"{tuple(query.shape)}"
        )
    q, k, v = query.shape, key.shape, value.shape
    for name, t in (("key", key), ("value", value)):
        if t.dtype != dtype:
            raise TypeError(f"{name} must have the dtype of query, {dtype}, got {t.dtype}")
        if t.device != query.device:
            raise ValueError(
                f"{name} must be on the device of query, {query.device}, got {t.device}"
            )
        if t.layout != torch.strided or t.is_nested:
            raise TypeError(f"{name} must be a dense tensor, got {_layout(t)}")
        if t.dim() != rank + 3:
            raise ValueError(
                f"{name} must have as many dimensions as query, {rank + 3}, got {t.dim()}"
            )
        if t.shape[0] != q[0]:
            raise ValueError(f"{name} must have the batch size of query, {q[0]}, got {t.shape[0]}")
    if query.device.type == "cuda":
        _check_cuda(query, value)
    elif query.device.type not in ("cpu", "meta"):
        raise NotImplementedError(
            f"query is on {query.device}: the kernels run on CPU and CUDA tensors (and meta, for "
            "shapes)"
        )
    if k[:-1] != v[:-1]:
        raise ValueError(
            f"value must have the token axes and heads of key, {tuple(k[1:-1])}, got "
            f"{tuple(v[1:-1])}"
        )
    if q[-1] != k[-1]:
        raise ValueError(f"key must have the head_dim of query, {q[-1]}, got {k[-1]}")
    if q[-1] < 1 or v[-1] < 1:
        raise ValueError(f"value and query must have head_dim at least 1, got {v[-1]} and {q[-1]}")
    if k[-2] < 1 or q[-2] < 1 or q[-2] % k[-2]:
        raise ValueError(
            f"query must have a multiple of the heads of key, got {q[-2]} and {k[-2]} heads"
        )
    return rank


def check_sequences(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Three inputs that fit, on one token axis."""
    if check_qkv(query, key, value) != 1:
        raise ValueError(f"query must be [B, N, H, D], got shape {tuple(query.shape)}")


def _is_int(x: Any) -> bool:
    return isinstance(x, int | torch.SymInt) and not isinstance(x, bool)


def check_integer(name: str, x: Any, minimum: int | None = None) -> None:
    if not _is_int(x):
        raise TypeError(f"{name} must be an int, got {x!r}")
    if minimum is not None and x < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {x}")
    if isinstance(x, int) and not -_MAX_INTEGER <= x <= _MAX_INTEGER:
        raise ValueError(f"{name} must be between -2**62 and 2**62, got {x}")


def check_flag(name: str, x: Any) -> None:
    if not isinstance(x, bool):
        raise TypeError(f"{name} must be a bool, got {x!r}")


def _per_axis(name: str, x: Any, rank: int, minimum: int | None = None) -> Sequence[int]:
    if _is_int(x):
        check_integer(name, x, minimum)
        return (x,) * rank
    if not isinstance(x, tuple | list):
        raise TypeError(f"{name} must be an int or a tuple of {rank}, got {x!r}")
    if len(x) != rank:
        raise ValueError(f"{name} must have one entry per token axis, {rank}, got {x!r}")
    for entry in x:
        check_integer(name, entry, minimum)
    return x


def _flags(name: str, x: Any, rank: int) -> Sequence[bool]:
    if isinstance(x, bool):
        return (x,) * rank
    if not isinstance(x, tuple | list) or not all(isinstance(f, bool) for f in x):
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
        if not isinstance(entry, int | torch.SymInt | tuple | None):
            raise TypeError(f"{name}: the entry of a head must be an int or a tuple, got {entry!r}")
    number: dict[Any, int] = {}
    head_rule = [number.setdefault((entry, _types(entry)), len(number)) for entry in x]
    return [entry for entry, _ in number], head_rule


def _per_axis_windows(x: Any, rank: int) -> Sequence[Any]:
    if _is_int(x):
        return (x,) * rank
    if not isinstance(x, tuple):
        raise TypeError(
            f"kernel_size must be an int, a tuple of {rank}, or a list with one of these per head, "
            f"got {x!r}"
        )
    if len(x) != rank:
        raise ValueError(f"kernel_size must have one entry per token axis, {rank}, got {x!r}")
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


def _check_packing(cu_seqlens_q: Any, cu_seqlens_k: Any, query: Tensor) -> None:
    if cu_seqlens_q is None:
        raise ValueError("cu_seqlens_k needs cu_seqlens_q")
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query)
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, query)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k must list as many sequences as cu_seqlens_q, got "
            f"{cu_seqlens_k.shape[0]} and {cu_seqlens_q.shape[0]} entries"
        )


def check_cu_seqlens(name: str, cu_seqlens: Any, query: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be an int32 tensor, got {kind_of(cu_seqlens)}")
    if cu_seqlens.device != query.device and not cu_seqlens.is_cpu:
        raise ValueError(
            f"{name} must be on the CPU or the device of query, {query.device}, got "
            f"{cu_seqlens.device}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{name} must be [N + 1] with N >= 1, got {tuple(cu_seqlens.shape)}")
    if query.shape[0] != 1:
        raise ValueError(f"query must have batch size 1 with {name}, got {query.shape[0]}")


def _on_host(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> tuple[Tensor, Tensor]:
    """Tables are made on the host: what lies on a GPU is fetched here, not anew in each pass."""
    ends_q = cu_seqlens_q.cpu() if cu_seqlens_q.is_cuda else cu_seqlens_q
    if cu_seqlens_k is cu_seqlens_q:
        return ends_q, ends_q
    return ends_q, cu_seqlens_k.cpu() if cu_seqlens_k.is_cuda else cu_seqlens_k


def check_modifier(name: str, t: Any, shape: tuple[Any, ...], query: Tensor) -> None:
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {kind_of(t)}")
    if t.device != query.device:
        raise ValueError(f"{name} must be on the device of query, {query.device}, got {t.device}")
    if t.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}")


def _check_bias(bias: Any, query: Tensor) -> None:
    rank = query.dim() - 3
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        raise TypeError(f"bias must be a floating-point tensor, got {kind_of(bias)}")
    if bias.device != query.device:
        raise ValueError(f"bias must be on the device of query, {query.device}, got {bias.device}")
    if bias.dim() != rank + 1 or bias.shape[0] != query.shape[-2]:
        raise ValueError(
            f"bias must be [heads, {', '.join(['2e - 1'] * rank)}] with {query.shape[-2]} heads, "
            f"got {tuple(bias.shape)}"
        )
    if any(n % 2 == 0 for n in bias.shape[1:]):
        raise ValueError(f"bias must have odd extents (2e - 1), got {tuple(bias.shape[1:])}")


def _row_scale(scale: Any, query: Tensor) -> tuple[float, Tensor | None]:
    """``scale`` as a number for all and, if it is a tensor, a factor per query and head."""
    if scale is None:
        return query.shape[-1] ** -0.5, None
    if isinstance(scale, Tensor):
        if not scale.is_floating_point():
            raise TypeError(
                f"scale must be a floating-point tensor or a number, got {kind_of(scale)}"
            )
        if scale.device != query.device:
            raise ValueError(
                f"scale must be on the device of query, {query.device}, got {scale.device}"
            )
        rows = query.shape[:-1]
        lead = len(rows) - scale.dim()
        fits = lead >= 0 and all(
            n == 1 or n == rows[lead + axis] for axis, n in enumerate(scale.shape)
        )
        if not fits:
            raise ValueError(
                f"scale must be a number, [heads] or broadcast to {tuple(rows)}, got "
                f"{tuple(scale.shape)}"
            )
        return 1.0, scale.to(accumulator_dtype(query.dtype)).expand(rows)
    return check_scale(scale, 1.0, "a number or a tensor"), None


def check_scale(scale: Any, default: float, allowed: str = "a number") -> float:
    """``scale`` as a float; ``default`` if it is None."""
    if scale is None:
        return default
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be {allowed}, got {scale!r}")
    return _finite("scale", scale)


def _finite(name: str, x: int | float) -> float:
    try:
        number = float(x)
    except OverflowError:
        number = math.inf
    if not -math.inf < number < math.inf:
        raise ValueError(f"{name} must be finite, got {x}")
    return number


def check_softcap(softcap: Any) -> float:
    """``softcap`` as a float; 0 for None."""
    if softcap is None:
        return 0.0
    if isinstance(softcap, bool) or not isinstance(softcap, int | float):
        raise TypeError(f"softcap must be a number, got {softcap!r}")
    if not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {softcap}")
    if not _SOFTCAPS[0] <= softcap <= _SOFTCAPS[1]:
        raise ValueError(f"softcap must be between 2**-100 and 2**100, got {softcap}")
    return float(softcap)


def _reach(rules: Sequence[Any], axis: int, rank: int, query: Tensor, key: Tensor) -> int:
    """A bound on |key - query| over the attended pairs of an axis, in units of the dilation."""
    worst = 0
    n_q, n_k = query.shape[1 + axis], key.shape[1 + axis]
    for left, right, stride, _, dilation, _, boundary, offset in rules[axis::rank]:
        window = left + right + stride - 1
        if boundary == "inward":  # windows of queries beyond the keys are shifted back to them
            overhang = max(0, n_q + offset - n_k, -offset)
            window = window + (overhang + dilation - 1) // dilation
        if boundary != "zero_pad":
            extent = max(n_k, n_q + offset, n_k - offset)
            window = min(window, (extent + dilation - 1) // dilation)
        worst = max(worst, window)
    return worst


def _alibi_table(
    slopes: Tensor,
    bias: Tensor | None,
    rules: Sequence[Any],
    sinks: int,
    packed: bool,
    query: Tensor,
    key: Tensor,
) -> Tensor:
    """ALiBi as a relative bias table, on top of ``bias`` if there is one: its gradient follows."""
    acc = accumulator_dtype(query.dtype)
    rank = query.dim() - 3
    table: Any = 0
    for a in range(rank):
        if bias is not None:
            reach = (bias.shape[1 + a] - 1) // 2
        elif sinks > 0 or packed:
            reach = max(query.shape[1], key.shape[1])
        else:
            reach = _reach(rules, a, rank, query, key)
        if reach > _MAX_DISTANCE:
            raise ValueError(
                f"alibi_slopes takes distances of at most {_MAX_DISTANCE}, and kernel_size, offset "
                f"and token axes give up to {reach}"
            )
        distance = torch.arange(-reach, reach + 1, device=query.device).abs() * rules[a][4]
        shape = [1] * rank
        shape[a] = -1
        table = table + distance.to(acc).reshape(shape)
    table = -slopes.to(acc).reshape(-1, *[1] * rank) * table
    return table if bias is None else table + bias.to(acc)


def under_autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors in the dtype of the active autocast, if there is one (float64 stays)."""
    device = getattr(tensors[0], "device", None)
    if device is None or device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return tensors
    cast = torch.get_autocast_dtype(device.type)
    return tuple(
        t.to(cast)
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    )


def _check_additional(keys: Any, values: Any, query: Tensor, key: Tensor, value: Tensor) -> None:
    if keys is None or values is None:
        raise ValueError("additional_keys and additional_values must be given together")
    for name, t, dim in (
        ("additional_keys", keys, key.shape[-1]),
        ("additional_values", values, value.shape[-1]),
    ):
        if not isinstance(t, Tensor) or t.dtype != query.dtype:
            raise TypeError(f"{name} must be a {query.dtype} tensor like query, got {kind_of(t)}")
        if t.dim() != 4:
            raise ValueError(f"{name} must be [B, E, heads, dim], got {tuple(t.shape)}")
        want = (query.shape[0], keys.shape[1], key.shape[-2], dim)
        check_modifier(name, t, want, query)


def attend(
    build: Any,
    options: tuple[Any, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Any,
    softcap: Any,
    alibi_slopes: Any,
    bias: Any,
    additional_keys: Any,
    additional_values: Any,
    sink_logits: Any,
    return_lse: Any,
    sinks: int = 0,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
) -> Any:
    """Checks the arguments of a public function, whose rules ``build`` makes of ``options``, and
    calls the operator. A small call costs as much in here as in the kernel."""
    check_flag("return_lse", return_lse)
    if is_compiling() or torch._C._is_any_autocast_enabled():
        query, key, value = under_autocast(query, key, value)
    rules, head_rule, fields = _prepare(build, options, query, key, value)
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        _check_packing(cu_seqlens_q, cu_seqlens_k, query)
        cu_seqlens_q, cu_seqlens_k = _on_host(cu_seqlens_q, cu_seqlens_k)
    if additional_keys is not None or additional_values is not None:
        additional_keys, additional_values = under_autocast(additional_keys, additional_values)
        _check_additional(additional_keys, additional_values, query, key, value)
        additional_keys = unit_stride(additional_keys)
        additional_values = unit_stride(additional_values)
    number, row_scale = _row_scale(scale, query)
    if bias is not None:
        _check_bias(bias, query)
    if alibi_slopes is not None:
        check_modifier("alibi_slopes", alibi_slopes, (query.shape[-2],), query)
        bias = _alibi_table(alibi_slopes, bias, rules, sinks, cu_seqlens_q is not None, query, key)
    if bias is not None:
        bias = bias.to(accumulator_dtype(query.dtype)).contiguous()
    if sink_logits is not None:
        check_modifier("sink_logits", sink_logits, (query.shape[-2],), query)
        sink_logits = sink_logits.to(accumulator_dtype(query.dtype)).contiguous()
    out, lse = window_op(
        return_lse,
        unit_stride(query),
        unit_stride(key),
        unit_stride(value),
        row_scale,
        bias,
        additional_keys,
        additional_values,
        sink_logits,
        cu_seqlens_q,
        cu_seqlens_k,
        fields,
        head_rule,
        number,
        check_softcap(softcap),
        sinks,
    )
    return (out, lse) if return_lse else out
