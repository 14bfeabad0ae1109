# SPDX-License-Identifier: Apache-2.0
"""A call of window attention: the arguments that all public functions share, checked, and the
operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .arguments import (
    check_cu_seqlens,
    check_dense,
    check_device,
    check_flag,
    check_modifier,
    check_scale,
    check_softcap,
    check_tensor,
    kind_of,
    under_autocast,
)
from .autograd import spread
from .ops import accumulator_dtype, unit_stride, window_op
from .window_rules import prepare

_MAX_DISTANCE = 2**26  # of a table of ALiBi's


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
    rules, head_rule, fields = prepare(build, options, query, key, value)
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


def _on_host(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> tuple[Tensor, Tensor]:
    """Tables are made on the host: what lies on a GPU is fetched here, not anew in each pass."""
    ends_q = cu_seqlens_q.cpu() if cu_seqlens_q.is_cuda else cu_seqlens_q
    if cu_seqlens_k is cu_seqlens_q:
        return ends_q, ends_q
    return ends_q, cu_seqlens_k.cpu() if cu_seqlens_k.is_cuda else cu_seqlens_k


def _check_bias(bias: Any, query: Tensor) -> None:
    rank = query.dim() - 3
    check_tensor("bias", bias, "a floating-point", query)
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
        check_dense("scale", scale)
        check_device("scale", scale, query)
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
        return 1.0, spread(scale.to(accumulator_dtype(query.dtype)), rows)
    return check_scale(scale, 1.0, "a number or a tensor"), None


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
    table = spread(-slopes.to(acc).reshape(-1, *[1] * rank), (len(slopes), *table.shape)) * table
    return table if bias is None else table + bias.to(acc)


def _check_additional(keys: Any, values: Any, query: Tensor, key: Tensor, value: Tensor) -> None:
    if keys is None or values is None:
        raise ValueError("additional_keys and additional_values must be given together")
    for name, t, dim in (
        ("additional_keys", keys, key.shape[-1]),
        ("additional_values", values, value.shape[-1]),
    ):
        if not isinstance(t, Tensor) or t.dtype != query.dtype:
            raise TypeError(f"{name} must be a {query.dtype} tensor like query, got {kind_of(t)}")
        check_dense(name, t)
        if t.dim() != 4:
            raise ValueError(f"{name} must be [B, E, heads, dim], got {tuple(t.shape)}")
        want = (query.shape[0], keys.shape[1], key.shape[-2], dim)
        check_modifier(name, t, want, query)
