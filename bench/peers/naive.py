# SPDX-License-Identifier: Apache-2.0
"""The first thing one writes: gather every query's keys, multiply, softmax, multiply."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..cases import Case
from ..masks import Masks
from ..problem import Prepared, Problem, heads_first, leaves_of
from .contender import Contender


class Gather(Contender):
    name = "gather"
    about = "keys gathered for each query (unfold), then plain matmul and softmax"

    def is_meant_for(self, case: Case) -> bool:
        return case.num_queries > 1

    def prepare(self, problem: Problem, training: bool) -> Prepared:
        case = problem.case
        problem.refuse_grouped_heads()
        masks = Masks(problem)
        per_axis = [max(end - begin for begin, end in axis) for axis in case.intervals]
        pairs = case.num_queries * (math.prod(per_axis) + case.sinks)
        copies = 2 + 4 * training
        problem.afford(
            "its gathered keys", case.batch * case.heads * pairs * case.head_dim * copies
        )
        keys, mask = _neighbours(masks, per_axis)
        i = torch.arange(case.num_queries)[:, None]
        learned = case.bias and training
        scores = masks.scores(i, keys, mask, None if learned else problem.bias)
        spread = masks.bias_index(i, keys, mask) if learned else None

        query, key = heads_first(case.queries), heads_first(case.key_extents)
        leaves, layouts = leaves_of(problem, training, query, key)
        q, k, v = leaves["query"], leaves["key"], leaves["value"]
        scale, softcap = case.head_dim**-0.5, case.softcap
        index = keys.flatten()

        def gathered(t: Tensor) -> Tensor:  # [B, H, N, K, D]
            return t.index_select(2, index).unflatten(2, keys.shape)

        def call() -> Tensor:
            logits = torch.matmul(gathered(k), (q * scale).unsqueeze(-1)).squeeze(-1)
            if softcap is not None:
                logits = torch.tanh(logits / softcap) * softcap
            added = scores
            if spread is not None:
                added = scores + leaves["bias"].flatten(1)[:, spread]
            weights = torch.softmax(logits + added, dim=-1)
            return torch.matmul(weights.unsqueeze(-2), gathered(v)).squeeze(-2)

        return Prepared(call, leaves, layouts)


def _neighbours(masks: Masks, per_axis: list[int]) -> tuple[Tensor, Tensor]:
    """Key tokens ``[N, K]`` of every query and which of them it attends."""
    case = masks.case
    keys = torch.zeros(case.num_queries, 1, dtype=torch.int64)
    mask = torch.ones(case.num_queries, 1, dtype=torch.bool)
    for a, size in enumerate(per_axis):
        axis, x = masks.axes[a], masks.query_coordinates[a]
        u = axis.begin[x][:, None] + torch.arange(size)
        real = u < axis.end[x][:, None]
        y = axis.query_class[x][:, None] + case.dilation * u.where(real, axis.begin[x][:, None])
        keys = (keys[:, :, None] * case.key_extents[a] + y[:, None, :]).flatten(1)
        mask = (mask[:, :, None] & real[:, None, :]).flatten(1)
    if case.sinks:
        sinks = torch.arange(case.sinks).expand(len(keys), -1)
        own = masks.mask(torch.arange(len(keys))[:, None], sinks)
        mask = torch.cat([own, mask & (keys >= case.sinks)], dim=1)
        keys = torch.cat([sinks, keys], dim=1)
    return keys, mask
