# SPDX-License-Identifier: Apache-2.0
"""The gate for routed attention: each query block by itself, in float64, over copies of its keys.
Of a long problem, the blocks of a sample; gradients are then those of the sample's outputs."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from attnext.testing import error_budget

from .cases import RoutedCase
from .gate import Verdict
from .problem import Prepared, Problem

SAMPLE = 64  # query blocks


class RoutedReference:
    """Expected results of a problem, and how far off they may be."""

    def __init__(self, problem: Problem, training: bool) -> None:
        self.problem, self.training = problem, training
        case = problem.case
        assert isinstance(case, RoutedCase)
        self.case = case
        blocks = case.plan.query_blocks
        order = torch.arange(case.num_queries) if blocks.order is None else blocks.order.long()
        bounds = blocks.offsets.tolist()
        self.tokens = [order[a:b] for a, b in itertools.pairwise(bounds)]
        # A gradient of a key has a part of every block that lists it: training takes them all.
        step = 1 if training else max(1, len(self.tokens) // SAMPLE)
        self.sample = range(0, len(self.tokens), step)
        self.expected = self._run(torch.float64)
        plain = self._run(torch.promote_types(problem.dtype, torch.float32))
        self.budget = {
            name: error_budget(exact, [plain[name]], problem.dtype)["largest"]
            for name, exact in self.expected.items()
        }

    def check(self, prepared: Prepared) -> Verdict:
        """Run a contender once and compare."""
        if self.training:
            prepared = prepared.arm(self.problem.output_grad)
        results = prepared.results()
        rows = torch.cat([self.tokens[i] for i in self.sample])
        errors = {}
        for name, exact in self.expected.items():
            got = results[name].flatten(1, -3).double()
            got = got[:, rows] if name == "out" else got
            error = (got - exact).abs().max().item()
            errors[name] = (error if got.isfinite().all() else float("nan"), self.budget[name])
        return Verdict(errors, len(rows))

    def _run(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """``[B, tokens, H, D]``; of the output the tokens of the sample, block after block."""
        case, problem = self.case, self.problem
        query, key, value = (
            t.to(dtype).flatten(1, -3).transpose(1, 2)
            for t in (problem.query, problem.key, problem.value)
        )
        sent = problem.output_grad.to(dtype).flatten(1, -3).transpose(1, 2)
        grads = [torch.zeros_like(t) for t in (query, key, value)]
        heads = case.lists.shape[1]
        outs = []
        for i in self.sample:
            rows, parts = self.tokens[i], []
            for h in range(heads):
                mine = slice(None) if heads == 1 else slice(h, h + 1)
                columns = torch.cat([self.tokens[int(j)] for j in case.lists[0, h, i] if j >= 0])
                leaves = [
                    t[:, mine][:, :, at].requires_grad_(self.training)
                    for t, at in ((query, rows), (key, columns), (value, columns))
                ]
                scores = leaves[0] @ leaves[1].transpose(-1, -2) * case.head_dim**-0.5
                if case.is_causal:
                    scores = scores.masked_fill(columns > rows[:, None], float("-inf"))
                out = scores.softmax(-1) @ leaves[2]
                parts.append(out.detach())
                if self.training:
                    found = torch.autograd.grad(out, leaves, sent[:, mine][:, :, rows])
                    for total, grad, at in zip(grads, found, (rows, columns, columns), strict=True):
                        total[:, mine] = total[:, mine].index_add(2, at, grad)
            outs.append(torch.cat(parts, 1))
        results = {"out": torch.cat(outs, 2).transpose(1, 2)}
        if self.training:
            names = ("query", "key", "value")
            results |= {n: g.transpose(1, 2) for n, g in zip(names, grads, strict=True)}
        return results
