# SPDX-License-Identifier: Apache-2.0
"""The gate for routed methods: rows of a sample in float64, each by itself; gradients are those of
the sample's outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnext.testing import error_budget

from .cases import RouterCase
from .gate import Verdict
from .problem import Prepared, Problem
from .routers import Method, method_of

SAMPLE = 24  # queries


class RouterReference:
    """Expected results of a problem, and how far off they may be. Not ``windowed``: of attention to
    every key up to the query, on a map to every key."""

    def __init__(self, problem: Problem, training: bool, windowed: bool = True) -> None:
        case = problem.case
        assert isinstance(case, RouterCase)
        self.problem, self.training, self.case = problem, training, case
        count = case.num_queries
        self.rows = torch.arange(SAMPLE) * (count - 1) // (SAMPLE - 1)
        sent = torch.zeros_like(problem.output_grad).flatten(1, -3)
        sent[:, self.rows] = problem.output_grad.flatten(1, -3)[:, self.rows]
        self.sent = sent.view_as(problem.output_grad)
        found: Any = None
        if windowed:
            method = method_of(case)
            if method.route is not None:
                with torch.no_grad():
                    found = method.route(problem.query, problem.key, problem.value)
        else:
            method = Method(lambda *tensors: tensors[0], keys=self._every_key)
        self.expected = self._run(method, found, torch.float64)
        plain = self._run(method, found, torch.promote_types(problem.dtype, torch.float32))
        self.budget = {
            name: error_budget(exact, [plain[name]], problem.dtype)["largest"]
            for name, exact in self.expected.items()
        }

    def check(self, prepared: Prepared) -> Verdict:
        """Run a contender once and compare."""
        if self.training:
            prepared = prepared.arm(self.sent)
        results = prepared.results()
        errors = {}
        for name, exact in self.expected.items():
            got = results[name].flatten(1, -3).double()
            got = got[:, self.rows] if name == "out" else got
            error = (got - exact).abs().max().item()
            errors[name] = (error if got.isfinite().all() else float("nan"), self.budget[name])
        return Verdict(errors, len(self.rows))

    def _every_key(self, i: Tensor, found: None, h: int, num_keys: int) -> Tensor:
        j = torch.arange(num_keys)
        return j <= i[:, None] if self.case.is_causal else (j >= 0).expand(len(i), -1)

    def _run(self, method: Method, found: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        """Heads last, tokens on one axis; of the output the sample."""
        case, problem = self.case, self.problem
        group = case.heads // case.key_heads
        leaves = [
            t.to(dtype).flatten(1, -3).requires_grad_(self.training)
            for t in (problem.query, problem.key, problem.value)
        ]
        q, k, v = leaves
        with torch.set_grad_enabled(self.training):
            rows = [
                method.expected(q[0, i, h], k[0, :, h // group], v[0, :, h // group], i, found, h)
                for i in self.rows.tolist()
                for h in range(case.heads)
            ]
            out = torch.stack(rows).unflatten(0, (len(self.rows), case.heads))[None]
        results = {"out": out.detach()}
        if self.training:
            sent = self.sent.to(dtype).flatten(1, -3)[:, self.rows]
            grads = torch.autograd.grad(out, leaves, sent)
            results |= dict(zip(("query", "key", "value"), grads, strict=True))
        return results
