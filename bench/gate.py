# SPDX-License-Identifier: Apache-2.0
"""No figure on a wrong result: every contender against float64, on the case that is timed.

The reference is ``attnext.reference.attention`` over rows of the case: all of them, or, where that
would take minutes, stretches spread over the whole length. The gradient of the output is zero on
the other rows, so the gradients are checked everywhere, as what those rows contribute.

In half precision, a budget that lets plain torch pass is too wide to see one wrong key among
hundreds; the same case in fp32 sees it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnext import reference
from attnext.testing import error_budget

from .cases import Case
from .problem import Prepared, Problem

STRETCH = 64  # consecutive rows that share the gathered keys
# The error budget is that of the test suite. The gate is there to catch wrong results, not to count
# a peer's digits (the gradients of torch's flash attention use up to twice the budget), so it opens
# at a few budgets: far below what one wrong key would cost.
SLACK = 4.0
WORK = 6e9  # float64 operations that one check may take: a few seconds of two cores, all told


@dataclass(frozen=True)
class Verdict:
    """Largest error and its budget for the output and each gradient."""

    errors: dict[str, tuple[float, float]]
    rows: int

    def _wrong(self) -> list[str]:
        return [  # written so that NaN is wrong
            f"{name} is off by {error:.2g}, {SLACK:g} times the budget of {budget:.2g} are allowed"
            for name, (error, budget) in self.errors.items()
            if not error <= SLACK * budget
        ]

    @property
    def passed(self) -> bool:
        return not self._wrong()

    def sentence(self) -> str:
        return "; ".join(self._wrong()) or f"passed on {self.rows} rows"


class Reference:
    """Expected results of a problem on the checked rows, and how far off they may be."""

    def __init__(self, problem: Problem, training: bool, windowed: bool = True) -> None:
        self.problem = problem
        self.training = training
        self.windowed = windowed
        self.rows = _rows(problem.case, windowed)
        self.output_grad = torch.zeros_like(problem.output_grad)
        grads = self.output_grad.flatten(1, -3)
        grads[:, self.rows] = problem.output_grad.flatten(1, -3)[:, self.rows]
        self.expected = self._run(torch.float64)
        # The same formula at the precision of the inputs, also on inputs moved by a rounding:
        # one evaluation of few numbers may come out right by luck.
        plain = [self._run(problem.dtype)]
        few = problem.case.num_queries <= 4 * STRETCH
        plain += [self._run(problem.dtype, seed) for seed in range(1, 7 if few else 2)]
        self.budget = {
            name: error_budget(exact, [one[name] for one in plain], problem.dtype)["largest"]
            for name, exact in self.expected.items()
        }

    def check(self, prepared: Prepared) -> Verdict:
        """Run a contender once and compare."""
        if self.training:
            prepared = prepared.arm(self.output_grad)
        results = prepared.results()
        errors = {}
        for name, exact in self.expected.items():
            got = results[name].double()
            if name == "out":
                got = got.flatten(1, -3)[:, self.rows]
            error = (got - exact).abs().max().item()
            if not results[name].isfinite().all():
                error = float("nan")
            errors[name] = (error, self.budget[name])
        return Verdict(errors, len(self.rows))

    def _run(self, dtype: torch.dtype, seed: int | None = None) -> dict[str, Tensor]:
        """Results in ``dtype``; with a seed, of inputs moved by about one rounding each."""
        problem = self.problem
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        inputs = [_moved(t, generator) for t in (problem.query, problem.key, problem.value)]
        case = problem.case
        # Sums over stretches are kept wide: only what happens within one is rounded to dtype.
        wide = torch.promote_types(dtype, torch.float32)
        total = {"query": torch.zeros_like(problem.query, dtype=wide)}
        total["key"] = torch.zeros_like(problem.key, dtype=wide)
        total["value"] = torch.zeros_like(problem.value, dtype=wide)
        if problem.bias is not None:
            total["bias"] = torch.zeros_like(problem.bias, dtype=wide)
        outs = []
        for part in _stretches(case, self.rows, self.windowed):
            query = _taken(inputs[0], part.rows, dtype, self.training)
            key = _taken(inputs[1], part.keys, dtype, self.training)
            value = _taken(inputs[2], part.keys, dtype, self.training)
            table = None
            if problem.bias is not None:
                table = problem.bias.to(dtype, copy=True).requires_grad_(self.training)
            with torch.set_grad_enabled(self.training):
                out = reference.attention(
                    query,
                    key,
                    value,
                    part.mask,
                    softcap=case.softcap,
                    logit_bias=part.logit_bias(problem.alibi_slopes, table),
                    dtype=dtype,
                )
            outs.append(out.detach())
            if self.training:
                sent = problem.output_grad.flatten(1, -3)[:, part.rows].to(dtype)
                leaves = [query, key, value] + ([] if table is None else [table])
                grads = torch.autograd.grad(out, leaves, sent)
                total["query"].flatten(1, -3).index_add_(1, part.rows, grads[0].to(wide))
                total["key"].flatten(1, -3).index_add_(1, part.keys, grads[1].to(wide))
                total["value"].flatten(1, -3).index_add_(1, part.keys, grads[2].to(wide))
                if table is not None:
                    total["bias"] += grads[3]
        result = {"out": torch.cat(outs, dim=1)}
        if self.training:
            result.update({name: grad.to(dtype) for name, grad in total.items()})
        return result


@dataclass(frozen=True)
class _Stretch:
    rows: Tensor
    keys: Tensor
    mask: Tensor
    delta: list[Tensor] = field(default_factory=list)  # key minus query, per axis, in tokens
    dilation: int = 1

    def logit_bias(self, slopes: Tensor | None, table: Tensor | None) -> Tensor | None:
        result = None
        if slopes is not None:
            distance = torch.stack([d.abs() for d in self.delta]).sum(0)
            result = -slopes.double().view(-1, 1, 1) * distance
        if table is not None:
            index: list[Tensor | slice] = [slice(None)]
            for a, delta in enumerate(self.delta):
                extent = (table.shape[a + 1] + 1) // 2
                step = delta.div(self.dilation, rounding_mode="floor") + extent - 1
                index.append(step.where(self.mask, 0))
            gathered = table[tuple(index)]
            result = gathered if result is None else result + gathered
        return result


def _rows(case: Case, windowed: bool) -> Tensor:
    every = case.batch * case.heads * case.num_queries * case.num_keys
    pairs = case.pairs if windowed else every
    per_row = 14.0 * case.head_dim * pairs / case.num_queries  # 4 D forward, 10 D backward
    stretches = -(-case.num_queries // STRETCH)
    # A stretch computes the union of its windows: about two of them in 1-D, five of an image.
    union = 2 if case.rank == 1 else 5
    affordable = max(int(WORK / (union * per_row * STRETCH)), 4)
    if stretches > affordable:
        chosen = torch.linspace(0, stretches - 1, affordable).round().long().unique()
    else:
        chosen = torch.arange(stretches)
    rows = (chosen[:, None] * STRETCH + torch.arange(STRETCH)).flatten()
    return rows[rows < case.num_queries]


def _stretches(case: Case, rows: Tensor, windowed: bool) -> Iterator[_Stretch]:
    axes = [reference.Axis(**axis) for axis in case.axes]
    if not windowed:
        axes = [
            axis._replace(left=m, right=m, stride=1, dilation=1, boundary="truncate")
            for axis, m in zip(axes, case.key_extents, strict=True)
        ]
    for part in rows.split(STRETCH):
        points = torch.stack(torch.unravel_index(part, case.queries), dim=-1).tolist()
        attended = [
            torch.zeros(len(points), m, dtype=torch.bool) for m in case.key_extents
        ]  # per axis: row of the stretch, key coordinate
        for r, point in enumerate(points):
            for a, (axis, i, m) in enumerate(zip(axes, point, case.key_extents, strict=True)):
                attended[a][r, reference.attended_keys(axis, i, m)] = True
        mask = attended[0]
        for more in attended[1:]:
            mask = (mask[:, :, None] & more[:, None, :]).flatten(1)
        position = [torch.tensor(points)[:, a] + axis.offset for a, axis in enumerate(axes)]
        for sink in range(case.sinks):
            mask[:, sink] |= position[0] >= sink
        keys = mask.any(dim=0).nonzero().squeeze(1)
        coordinates = torch.unravel_index(keys, case.key_extents)
        delta = [y[None, :] - x[:, None] for x, y in zip(position, coordinates, strict=True)]
        yield _Stretch(part, keys, mask[:, keys], delta, case.dilation)


def _taken(tensor: Tensor, index: Tensor, dtype: torch.dtype, training: bool) -> Tensor:
    return tensor.flatten(1, -3)[:, index].to(dtype).requires_grad_(training)


def _moved(tensor: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return tensor
    noise = torch.rand(tensor.shape, generator=generator) * 2 - 1
    wide = torch.promote_types(tensor.dtype, torch.float64)
    return (tensor.to(wide) * (1 + torch.finfo(tensor.dtype).eps * noise)).to(tensor.dtype)
