# SPDX-License-Identifier: Apache-2.0
"""The registered operator behind :func:`select_topk` on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _C
from .autograd import LIBRARY
from .ops import accumulator_dtype, unit_stride

SCORES = ("dot", "max_q", "relu_wsum", "group_prob")  # cpu::Score

# Indices, int32 `[B, lists, rows, k]`, and values, of query `[B, tokens, H, D]` and candidates
# `[B, N, Hc, D]`. These have the accumulator dtype, as have factors `[B, rows, H]` (weights, or
# log-sum-exp) and share. Integers are int64: each_end, of tokens ("max_q") or rows ("group_prob"),
# from which candidate or window on products do not count; begin and end `[1 or B, rows]`; overlap
# `[blocks, slots]`: windows, share: how much of each. exclude is a bool `[B, lists, rows,
# candidates]`. `samples` are tokens ("max_q") or heads of a row.
LIBRARY.define(
    "select_topk(Tensor query, Tensor candidates, Tensor? factors, Tensor? each_end, "
    "Tensor? begin, Tensor? end, Tensor? overlap, Tensor? share, Tensor? exclude, int score, "
    "int k, int samples, int lists, float scale, int force_first, int force_last, bool tie_high, "
    "bool by_score) -> (Tensor, Tensor)"
)


def _fake(query: Tensor, candidates: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    score, k, samples, lists = rest[7:11]
    tokens = query.shape[1]
    rows = (tokens + samples - 1) // samples if SCORES[score] == "max_q" else tokens
    shape = query.shape[0], lists, rows, k
    acc = accumulator_dtype(query.dtype)
    return query.new_empty(shape, dtype=torch.int32), query.new_empty(shape, dtype=acc)


def _cpu(query: Tensor, candidates: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    indices, values = _fake(query, candidates, *rest)
    *tensors, exclude, score, k, samples, _, scale, first, last, high, by_score = rest
    factors, each_end, begin, end, overlap, share = (
        None if t is None else t.contiguous() for t in tensors
    )
    _C.select_topk(
        unit_stride(query), unit_stride(candidates), factors, each_end, begin, end, overlap,
        share, exclude, (score, k, samples, scale, first, last, high, by_score), indices, values,
    )  # fmt: skip
    return indices, values


LIBRARY.impl("select_topk", _cpu, "CPU")
torch.library.register_fake("attnext::select_topk", _fake, lib=LIBRARY)

select_topk_op = torch.ops.attnext.select_topk
