# SPDX-License-Identifier: Apache-2.0
"""The gate for linear attention: the chunked form in float64, on all rows; of a step, the step.

The token loop of ``attnext.reference`` would keep a state for each token in training. The test
suite holds the kernels against that; here it is enough that results are those of the formula.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnext.testing import error_budget

from .cases import LinearCase, LinearStepCase
from .gate import Verdict
from .peers.linear import chunked, stepped
from .problem import Prepared, Problem


class LinearReference:
    """Expected results of a problem, and how far off they may be."""

    def __init__(self, problem: Problem, training: bool) -> None:
        self.problem = problem
        self.training = training
        self.expected = self._run(torch.float64)
        # Half precision is held to what float32 arithmetic gives, rounded.
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
        errors = {}
        for name, exact in self.expected.items():
            error = (results[name].double() - exact).abs().max().item()
            if not results[name].isfinite().all():
                error = float("nan")
            errors[name] = (error, self.budget[name])
        return Verdict(errors, self.problem.case.num_queries)

    def _run(self, dtype: torch.dtype) -> dict[str, Tensor]:
        case = self.problem.case
        assert isinstance(case, LinearCase)
        if isinstance(case, LinearStepCase):
            p = self.problem
            q, k, v, state = (t.to(dtype) for t in (p.query, p.key, p.value, p.state))
            return {"out": stepped(q, k, v, state, case, True)}
        query, key, value = (
            t.to(dtype).transpose(1, 2).requires_grad_(self.training)
            for t in (self.problem.query, self.problem.key, self.problem.value)
        )
        out = chunked(query, key, value, case, math.gcd(case.num_queries, 64))
        results = {"out": out.detach().transpose(1, 2)}
        if self.training:
            sent = self.problem.output_grad.to(dtype).transpose(1, 2)
            grads = torch.autograd.grad(out, (query, key, value), sent)
            names = ("query", "key", "value")
            results |= {n: g.transpose(1, 2) for n, g in zip(names, grads, strict=True)}
        return results
