# SPDX-License-Identifier: Apache-2.0
"""One output from several: attention over parts of the keys, or by several branches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import check_choice, check_dense, check_device, check_flag, finite_number, kind_of
from .ops import accumulator_dtype

MODES = ("lse", "softmax", "sigmoid", "raw", "scaled", "lerp")
_PAIRS = ("scaled", "lerp")


def merge(
    outputs: Sequence[Tensor],
    lses: Sequence[Tensor] | None = None,
    gates: Tensor | float | None = None,
    mode: str = "lse",
    *,
    return_lse: bool = False,
) -> Any:
    """A weighted sum of outputs, ``sum_n w_n outputs[n]``, by one of six rules for the weights.

    ============= =========================================================================
    ``"lse"``     ``softmax(lses)``: attention over the union of disjoint key sets
    ``"softmax"`` ``softmax(gates)``: a mixture; -inf leaves a branch out
    ``"sigmoid"`` ``sigmoid(gates)``
    ``"raw"``     ``gates``
    ``"scaled"``  of two parts: the first keeps ``gates`` of its share under ``"lse"``, the
                  second takes what is left (attention calibration)
    ``"lerp"``    of two: ``gates`` and ``1 - gates``
    ============= =========================================================================

    Shapes:
        outputs: equal shapes ``[..., D]``; lses: ``[...]``, for ``"lse"`` and ``"scaled"`` only.
        gates: for ``"softmax"``, ``"sigmoid"`` and ``"raw"`` a tensor that broadcasts to
        ``[..., branches]``; for ``"scaled"`` and ``"lerp"`` a number or a tensor that broadcasts
        to ``[...]`` (per head: ``[H]``). The result is ``[..., D]``; with ``return_lse``, for
        ``"lse"`` only, also ``[...]``.

    Numerics:
        Weights and sums in float32 (float64 for float64), the output in the dtype of the first.
        A part without keys (lse -inf) has no weight, whatever its output holds; where all are
        such, the output is 0, the lse -inf and every gradient 0. Under ``"scaled"`` the first part
        keeps all where the second has no keys: weights sum to 1. Differentiable in outputs, lses
        and gates.

    Errors:
        ValueError or TypeError, naming the argument.

    Complexity:
        O(branches * elements).

    Source:
        FlashDecoding and ring attention (arXiv 2310.01889); gates as in native sparse attention
        (2502.11089) and DuoAttention (2410.10819); scaling as in attention calibration
        (2406.15765).

    Example:
        >>> import torch, attnext
        >>> near, far = torch.randn(2, 1, 8, 4, 16)
        >>> gate = torch.rand(4, requires_grad=True)
        >>> attnext.merge([near, far], gates=gate, mode="lerp").shape
        torch.Size([1, 8, 4, 16])
    """
    _check(outputs, lses, gates, mode, return_lse)
    acc = accumulator_dtype(outputs[0].dtype)
    total = None
    dropped = None  # rows of parts that had no keys
    if isinstance(gates, Tensor):
        gates = gates.to(acc)
    if mode in ("lse", "scaled"):
        assert lses is not None
        shares, total = _shares(torch.stack([lse.to(acc) for lse in lses]))
        weights = list(shares)
        dropped = [lse == -math.inf for lse in lses]
        if mode == "scaled":
            first = torch.where(dropped[1], weights[0], weights[0] * gates)
            weights = [first, torch.where(dropped[1], 0.0, 1 - first)]
    elif mode == "lerp":
        weights = [gates, 1 - gates]  # type: ignore[operator]
    else:
        assert isinstance(gates, Tensor)
        if mode == "softmax":
            weights = list(_shares(gates.movedim(-1, 0))[0])
            dropped = [gate == -math.inf for gate in gates.unbind(-1)]
        else:
            weights = list((gates.sigmoid() if mode == "sigmoid" else gates).unbind(-1))
    merged: Any = 0
    for n, (out, weight) in enumerate(zip(outputs, weights, strict=True)):
        part = out.to(acc)
        if dropped is not None:
            part = torch.where(dropped[n][..., None], 0.0, part)
        merged = merged + part * (weight[..., None] if isinstance(weight, Tensor) else weight)
    merged = merged.to(outputs[0].dtype)
    return (merged, total) if return_lse else merged


def merge_attentions(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over a union of disjoint key sets from the results over each: ``"lse"`` of
    :func:`merge`, and the lse of the union.

    Shapes:
        outputs: equal shapes ``[..., D]``; lses: ``[...]``. Returns the merged pair, the same.

    Numerics, Errors, Complexity, Source:
        As :func:`merge`.

    Example:
        >>> import torch, attnext
        >>> q, k, v = (torch.randn(1, 8, 2, 16) for _ in range(3))
        >>> parts = [attnext.sliding_window_attention(q, k[:, s], v[:, s], None, is_causal=False,
        ...                                           return_lse=True)
        ...          for s in (slice(0, 3), slice(3, 8))]
        >>> out, lse = attnext.merge_attentions(*zip(*parts))
    """
    out, lse = merge(outputs, lses, return_lse=True)
    return out, lse


def _shares(logits: Tensor) -> tuple[Tensor, Tensor]:
    """``softmax`` and ``logsumexp`` along the first axis; all -inf gives 0 and -inf."""
    top = logits.detach().amax(0)
    top = torch.where(top == -math.inf, 0.0, top)
    weights = torch.exp(logits - top)
    total = weights.sum(0)
    empty = total == 0
    safe = torch.where(empty, 1.0, total)
    return weights / safe, torch.where(empty, -math.inf, top + torch.log(safe))


def _check(outputs: Any, lses: Any, gates: Any, mode: Any, return_lse: bool) -> None:
    check_flag("return_lse", return_lse)
    check_choice("mode", mode, MODES)
    by_lse = mode in ("lse", "scaled")
    if by_lse and lses is None:
        raise ValueError(f"lses must be given with mode={mode!r}")
    if not by_lse and lses is not None:
        raise ValueError(f"lses have no part in mode={mode!r}: leave them out")
    for name, tensors in (("outputs", outputs), ("lses", lses)):
        if not isinstance(tensors, (tuple, list)) and (tensors is not None or name == "outputs"):
            raise TypeError(f"{name} must be a list or tuple of tensors, got {kind_of(tensors)}")
    if not outputs or (by_lse and len(outputs) != len(lses)):
        raise ValueError(
            f"outputs and lses must be equally many and not empty, got "
            f"{len(outputs)} and {len(lses) if by_lse else 'none'}"
        )
    if mode in _PAIRS and len(outputs) != 2:
        raise ValueError(f"outputs must be two with mode={mode!r}, got {len(outputs)}")
    if return_lse and mode != "lse":
        raise ValueError(f"return_lse must be False with mode={mode!r}: the sum has no lse")
    for name, tensors in (("outputs", outputs), ("lses", lses or ())):
        for t in tensors:
            if not isinstance(t, Tensor) or not t.is_floating_point():
                raise TypeError(f"{name} must be floating-point tensors, got {kind_of(t)}")
            check_dense(name, t)
            if t.device != outputs[0].device:
                raise ValueError(
                    f"{name} must be on {outputs[0].device} like the first output, got {t.device}"
                )
            shape = outputs[0].shape if name == "outputs" else outputs[0].shape[:-1]
            if t.shape != shape:
                raise ValueError(f"{name} must all have shape {tuple(shape)}, got {tuple(t.shape)}")
    _check_gates(gates, outputs, mode)


def _check_gates(gates: Any, outputs: Sequence[Tensor], mode: str) -> None:
    if mode == "lse":
        if gates is not None:
            raise ValueError("gates have no part in mode='lse': leave them out")
        return
    rows = tuple(outputs[0].shape[:-1])
    if mode in _PAIRS and isinstance(gates, (int, float)) and not isinstance(gates, bool):
        finite_number("gates", gates)
        return
    if not isinstance(gates, Tensor) or not gates.is_floating_point():
        kinds = "a number or a floating-point tensor" if mode in _PAIRS else "a floating-point"
        raise TypeError(
            f"gates must be {kinds}{'' if mode in _PAIRS else ' tensor'} with "
            f"mode={mode!r}, got {kind_of(gates)}"
        )
    check_dense("gates", gates)
    check_device("gates", gates, outputs[0], "the first output")
    want = rows if mode in _PAIRS else (*rows, len(outputs))
    lead = len(want) - gates.dim()
    fits = lead >= 0 and all(n in (1, want[lead + a]) for a, n in enumerate(gates.shape))
    if not fits or (mode not in _PAIRS and (not gates.dim() or gates.shape[-1] != want[-1])):
        raise ValueError(
            f"gates must broadcast to {want} with mode={mode!r}, got {tuple(gates.shape)}"
        )
