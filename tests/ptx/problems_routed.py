# SPDX-License-Identifier: Apache-2.0
"""Small problems of routed attention, and what a run of one on the executor says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import attnext
from attnext import BlockPlan, reference_routed
from attnext.testing import assert_within_budget, evaluate

from .executor import Program, Report
from .problems import close_to, findings, normal
from .routed import on_executor
from .source import lone


@dataclass(frozen=True)
class Problem:
    """A call of routed attention; with `backward`, gradients of what is floating, the plan's bias
    too."""

    tensors: dict[str, Tensor]
    plan: BlockPlan
    options: dict[str, Any] = field(default_factory=dict)
    backward: bool = True

    def all_tensors(self) -> dict[str, Tensor]:
        return self.tensors | ({} if self.plan.bias is None else {"bias": self.plan.bias})

    def cotangents(self) -> tuple[Tensor, Tensor] | None:
        query, value = self.tensors["query"], self.tensors["value"]
        shape = (*query.shape[:-1], value.shape[-1])
        made = normal(*shape, dtype=query.dtype, seed=4), normal(*shape[:-1], seed=5)
        return made if self.backward else None

    def evaluate(self) -> dict[str, Tensor]:
        function = with_bias(attnext.routed_attention, self.plan)
        return evaluate(function, self.all_tensors(), self.options, self.cotangents())

    def compare(self, results: dict[str, Tensor]) -> None:
        """Errors: AssertionError."""
        specification = with_bias(reference_routed.routed_attention, self.plan)
        tensors = self.all_tensors()
        assert_within_budget(results, specification, tensors, self.options, self.cotangents())

    def within_budget(self, results: dict[str, Tensor]) -> bool:
        if not all(x.isfinite().all() for x in self.tensors.values()):
            return close_to(self.evaluate(), results)
        try:
            self.compare(results)
        except AssertionError:
            return False
        return True


def with_bias(function: Any, plan: BlockPlan) -> Any:
    """``function`` of tensors, one of which may be the plan's bias."""

    def of_tensors(*, bias: Tensor | None = None, **rest: Any) -> Any:
        return function(plan=dataclasses.replace(plan, bias=bias), **rest)

    return of_tensors


def run(
    problem: Problem, find: Callable[[str], Program] = lone, **options: Any
) -> tuple[set[str], list[Report]]:
    """As problems.run."""
    executor = on_executor(find=find, **options)
    return findings(executor, problem.evaluate, problem.within_budget)


def qkv(
    queries: tuple[int, ...],
    keys: tuple[int, ...] | None = None,
    dim: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    *,
    batch: int = 1,
    heads: int = 1,
    kv_heads: int | None = None,
    dim_v: int | None = None,
) -> dict[str, Tensor]:
    kv = kv_heads or heads
    return {
        "query": normal(batch, *queries, heads, dim, dtype=dtype, seed=1),
        "key": normal(batch, *(keys or queries), kv, dim, dtype=dtype, seed=2),
        "value": normal(batch, *(keys or queries), kv, dim_v or dim, dtype=dtype, seed=3),
    }


def lists(
    tokens: int,
    block: int,
    slots: int,
    *,
    keys: int | None = None,
    key_block: int | None = None,
    batch: int = 1,
    heads: int = 1,
    bias: bool = False,
    seed: int = 0,
) -> BlockPlan:
    """Random lists, with empty slots and blocks named twice."""
    generator = torch.Generator().manual_seed(seed)
    keys, key_block = keys or tokens, key_block or block
    shape = (batch, heads, -(-tokens // block), slots)
    indices = torch.randint(-1, -(-keys // key_block), shape, generator=generator)
    numbers = normal(*shape, seed=seed) if bias else None
    return BlockPlan.of(indices, tokens, block, keys, key_block, bias=numbers)


def shuffled(plan: BlockPlan, which: str = "query_blocks") -> BlockPlan:
    """With queries, or keys (``"key_blocks"``), that are out of order."""
    blocks = getattr(plan, which)
    order = torch.randperm(blocks.num_tokens, generator=torch.Generator().manual_seed(0)).int()
    changed: Any = {which: dataclasses.replace(blocks, order=order)}
    return dataclasses.replace(plan, **changed)
