# SPDX-License-Identifier: Apache-2.0
"""Shifted windows the way vision models write them: roll, cut, attend, paste, roll back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ..cases import Case
from ..masks import Masks
from ..problem import AS_IS, Prepared, Problem, Unavailable, leaves_of
from .contender import Contender


class SwinRoll(Contender):
    name = "swin-roll"
    about = "torch.roll, window partition, scaled_dot_product_attention under bias and mask, back"

    def is_meant_for(self, case: Case) -> bool:
        return case.op == "window" and case.rank == 2

    def prepare(self, problem: Problem, training: bool) -> Prepared:
        case = problem.case
        problem.refuse_options("softcap", "alibi")
        problem.refuse_grouped_heads()
        assert case.window is not None
        if case.queries[0] % case.window[0] or case.queries[1] % case.window[1]:
            raise Unavailable("needs an image that its windows divide")
        leaves, layouts = leaves_of(problem, training, AS_IS, AS_IS)
        masks = Masks(problem)

        # The same journey, made by the token indices, says which pairs meet and which may.
        tokens = torch.arange(case.num_queries).view(1, *case.queries, 1, 1)
        box = self._cut(tokens, case).view(-1, case.window[0] * case.window[1])  # [windows, w²]
        i, j = box[:, :, None], box[:, None, :]
        mask = masks.mask(i, j)
        scores = masks.scores(i, j, mask).unsqueeze(1)
        scores = scores.repeat(case.batch, 1, 1, 1)  # [B windows, 1, w², w²]
        if problem.bias is not None:
            # Which entry of the table a pair uses depends on its slots alone.
            near = _slots(case.window)
            table = leaves["bias"]
            if not training:
                scores = scores + problem.bias.flatten(1)[:, near]

        q, k, v = leaves["query"], leaves["key"], leaves["value"]

        def call() -> Tensor:
            added = scores
            if training and "bias" in leaves:
                added = scores + table.flatten(1)[:, near]
            cut_q, cut_k, cut_v = (self._cut(t, case) for t in (q, k, v))
            return self._paste(sdpa(cut_q, cut_k, cut_v, attn_mask=added), case)

        return Prepared(call, leaves, layouts)

    @staticmethod
    def _cut(t: Tensor, case: Case) -> Tensor:
        """``[B, Y, X, H, D]`` to ``[B windows, H, w², D]``."""
        assert case.window is not None
        (wy, wx), (heads, dim) = case.window, t.shape[-2:]
        t = t.roll((-case.shift, -case.shift), (1, 2))
        t = t.unflatten(2, (-1, wx)).unflatten(1, (-1, wy)).permute(0, 1, 3, 5, 2, 4, 6)
        return t.reshape(-1, heads, wy * wx, dim)

    @staticmethod
    def _paste(t: Tensor, case: Case) -> Tensor:
        assert case.window is not None
        (wy, wx), (ny, nx) = case.window, case.queries
        t = t.view(-1, ny // wy, nx // wx, case.heads, wy, wx, case.head_dim)
        t = t.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, ny, nx, case.heads, case.head_dim)
        return t.roll((case.shift, case.shift), (1, 2))


def _slots(window: tuple[int, ...]) -> Tensor:
    """Entry of the flattened relative table for each pair of slots of one window."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(w) for w in window), indexing="ij"))
    flat = grid.flatten(1)
    delta = flat[:, None, :] - flat[:, :, None]  # key minus query
    return (delta[0] + window[0] - 1) * (2 * window[1] - 1) + delta[1] + window[1] - 1
