# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments that public functions share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .ops import DTYPES, sequence_ends

_MAX_INTEGER = 2**62
_SOFTCAPS = 2.0**-100, 2.0**100  # so that logits / softcap and the products by it are float32
DTYPE_NAMES = "float32, float64, bfloat16, float16"
INDEX_DTYPES = (torch.int32, torch.int64)
_KINDS: dict[str, Callable[[torch.dtype], bool]] = {
    "a floating-point": lambda dtype: dtype.is_floating_point,
    f"a {DTYPE_NAMES}": lambda dtype: dtype in DTYPES,
    "an int32 or int64": lambda dtype: dtype in INDEX_DTYPES,
    "an int32": lambda dtype: dtype == torch.int32,
    "a bool": lambda dtype: dtype == torch.bool,
}


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


def has_numbers(t: Tensor) -> bool:
    """Whether what a tensor holds can be looked at: no compiler, mode or transform stands before
    it, and it is not for shapes only."""
    return not (
        is_compiling()
        or t.is_meta
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.is_functorch_wrapped_tensor(t)
    )


def check_dense(name: str, t: Tensor) -> None:
    if t.layout != torch.strided or t.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got {_layout(t)}")


def check_device(name: str, t: Tensor, like: Tensor, of: str = "query") -> None:
    if t.device != like.device:
        raise ValueError(f"{name} must be on the device of {of}, {like.device}, got {t.device}")


def check_tensor(name: str, t: Any, kind: str, like: Tensor | None = None) -> None:
    """A dense tensor of a kind of numbers, one of ``_KINDS``; on the device of query, ``like``."""
    if not isinstance(t, Tensor) or not _KINDS[kind](t.dtype):
        raise TypeError(f"{name} must be {kind} tensor, got {kind_of(t)}")
    check_dense(name, t)
    if like is not None:
        check_device(name, t, like)


def check_layer_input(x: Any, dim: int) -> None:
    """What a layer projects: sequences of tokens of ``dim`` entries."""
    check_tensor("x", x, "a floating-point")
    if x.dim() != 3 or x.shape[-1] != dim:
        raise ValueError(f"x must be [batch, tokens, {dim}], got shape {tuple(x.shape)}")


def check_qkv(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Checks the three inputs against each other; returns the number of token axes."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        check_dense(name, t)
    dtype, rank = query.dtype, query.dim() - 3
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
        check_device(name, t, query)
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


def is_int(x: Any) -> bool:
    return isinstance(x, (int, torch.SymInt)) and not isinstance(x, bool)


def check_integer(name: str, x: Any, minimum: int | None = None) -> None:
    if not is_int(x):
        raise TypeError(f"{name} must be an int, got {x!r}")
    if minimum is not None and x < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {x}")
    if isinstance(x, int) and not -_MAX_INTEGER <= x <= _MAX_INTEGER:
        raise ValueError(f"{name} must be between -2**62 and 2**62, got {x}")


def check_count(name: str, x: Any, minimum: int = 1) -> None:
    """An int that 32 bits hold: there are as many entries of a result."""
    check_integer(name, x, minimum)
    if x >= 2**31:
        raise ValueError(f"{name} must be below 2**31, got {x}")


def check_choice(name: str, x: Any, allowed: tuple[str, ...]) -> None:
    # Others may compare entry by entry, arrays for one.
    if not isinstance(x, str) or x not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {x!r}")


def check_flag(name: str, x: Any) -> None:
    if not isinstance(x, bool):
        raise TypeError(f"{name} must be a bool, got {x!r}")


def check_cu_seqlens(name: str, cu_seqlens: Any, query: Tensor) -> None:
    check_tensor(name, cu_seqlens, "an int32")
    if cu_seqlens.device != query.device and not cu_seqlens.is_cpu:
        raise ValueError(
            f"{name} must be on the CPU or the device of query, {query.device}, got "
            f"{cu_seqlens.device}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{name} must be [N + 1] with N >= 1, got {tuple(cu_seqlens.shape)}")
    if query.shape[0] != 1:
        raise ValueError(f"query must have batch size 1 with {name}, got {query.shape[0]}")


def check_packing(cu_seqlens: Any, query: Tensor) -> None:
    """``cu_seqlens`` of a function that hands them on under another name, or to no operator: also
    what they hold, where it can be read."""
    check_cu_seqlens("cu_seqlens", cu_seqlens, query)
    if has_numbers(cu_seqlens):
        sequence_ends(cu_seqlens, "cu_seqlens", query.shape[1])


def check_modifier(name: str, t: Any, shape: tuple[Any, ...], query: Tensor) -> None:
    check_tensor(name, t, "a floating-point", query)
    if t.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}")


def check_scale(scale: Any, default: float, allowed: str = "a number") -> float:
    """``scale`` as a float; ``default`` if it is None."""
    if scale is None:
        return default
    return finite_number("scale", scale, allowed)


def finite_number(name: str, x: Any, allowed: str = "a number") -> float:
    """A finite number as a float."""
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{name} must be {allowed}, got {x!r}")
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
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)):
        raise TypeError(f"softcap must be a number, got {softcap!r}")
    if not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {softcap}")
    if not _SOFTCAPS[0] <= softcap <= _SOFTCAPS[1]:
        raise ValueError(f"softcap must be between 2**-100 and 2**100, got {softcap}")
    return float(softcap)


def without_autocast(like: Tensor) -> Any:
    """A context in which nothing is cast: inputs that were, and what was widened since."""
    if not (is_compiling() or torch._C._is_any_autocast_enabled()) or like.device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(like.device.type, enabled=False)


def under_autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors in the dtype of the active autocast, if there is one (float64 stays)."""
    if not isinstance(tensors[0], Tensor):
        return tensors  # to be refused
    device = tensors[0].device
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return tensors
    cast = torch.get_autocast_dtype(device.type)
    return tuple(
        t.to(cast)
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    )
