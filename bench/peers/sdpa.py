# SPDX-License-Identifier: Apache-2.0
"""torch's own scaled_dot_product_attention, over all keys."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ..cases import Case
from ..masks import Masks
from ..problem import Layout, Prepared, Problem, heads_first, leaves_of
from .contender import Contender


def grouped(case: Case) -> tuple[Layout, Layout]:
    """Layouts for one query: the heads that share keys become the rows of one small matrix."""

    def arrange(t: Tensor) -> Tensor:  # [B, 1, H, D] -> [B, Hkv, H / Hkv, D]
        return t.squeeze(1).unflatten(1, (case.key_heads, -1))

    rows = Layout(arrange, lambda t: t.flatten(1, 2).unsqueeze(1))
    return rows, heads_first(case.key_extents)


class SdpaDense(Contender):
    name = "sdpa-dense"
    about = "scaled_dot_product_attention, the window as an additive mask made beforehand"

    def prepare(self, problem: Problem, training: bool) -> Prepared:
        problem.refuse_options("softcap")
        case = problem.case
        masks = Masks(problem)
        if case.num_queries == 1:
            return self._one_query(problem, training, masks)
        problem.refuse_grouped_heads()
        pairs = case.num_queries * case.num_keys
        per_head = case.bias or case.alibi
        problem.afford("the mask", pairs * (case.heads if per_head else 1) * 2)
        problem.afford("its index", pairs * 8 / problem.dtype.itemsize * 3)
        layout = heads_first(case.queries)
        leaves, layouts = leaves_of(problem, training, layout, heads_first(case.key_extents))
        q, k, v = leaves["query"], leaves["key"], leaves["value"]

        i, j = torch.arange(case.num_queries)[:, None], torch.arange(case.num_keys)[None, :]
        mask = masks.mask(i, j)
        if case.bias and training:  # the table is learned: spread it in every call
            index, forbidden = masks.bias_index(i, j, mask), masks.scores(i, j, mask)
            table = leaves["bias"]

            def with_bias() -> Tensor:
                added = table.flatten(1)[:, index] + forbidden
                return sdpa(q, k, v, attn_mask=added.unsqueeze(0))

            return Prepared(with_bias, leaves, layouts)
        scores = masks.scores(i, j, mask, problem.bias)
        scores = scores.view(1, -1, *mask.shape)
        return Prepared(lambda: sdpa(q, k, v, attn_mask=scores), leaves, layouts)

    @staticmethod
    def _one_query(problem: Problem, training: bool, masks: Masks) -> Prepared:
        problem.refuse_options("bias", "alibi", "sinks")
        query, key = grouped(problem.case)
        leaves, layouts = leaves_of(problem, training, query, key)
        seen = masks.mask(torch.tensor(0), torch.arange(problem.case.num_keys)).nonzero()
        begin, end = int(seen.min()), int(seen.max()) + 1
        q, k, v = leaves["query"], leaves["key"], leaves["value"]
        return Prepared(
            lambda: sdpa(q, k[:, :, begin:end], v[:, :, begin:end]),
            leaves,
            layouts,
            "keys sliced, no mask",
        )


class SdpaNoWindow(Contender):
    name = "sdpa-no-window"
    about = "another problem: scaled_dot_product_attention over every key (or every past key)"
    windowed = False

    def is_meant_for(self, case: Case) -> bool:
        plain = not (case.bias or case.alibi or case.softcap or case.sinks)
        return plain and case.num_queries > 1 and case.group != "call"

    def prepare(self, problem: Problem, training: bool) -> Prepared:
        case = problem.case
        problem.refuse_grouped_heads()
        layout = heads_first(case.queries)
        leaves, layouts = leaves_of(problem, training, layout, layout)
        q, k, v = leaves["query"], leaves["key"], leaves["value"]
        causal = case.is_causal
        return Prepared(lambda: sdpa(q, k, v, is_causal=causal), leaves, layouts)
