# SPDX-License-Identifier: Apache-2.0
"""Random problems of routed attention: blocks, lists, rules and tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from strategies import lay_out
from torch import Tensor

import attnext
from attnext import BlockPlan, Blocks, reference_routed

EXTENTS = {  # per number of axes: queries, and what keys may have
    1: [(1,), (5,), (16,), (33,), (70,), (131,)],
    2: [(1, 1), (4, 5), (7, 9), (12, 3)],
    3: [(2, 3, 4), (3, 1, 5)],
}
BLOCKS = (1, 2, 3, 7, 16, 64, 128)


@dataclasses.dataclass(frozen=True)
class Problem:
    tensors: Mapping[str, Tensor]
    plan: BlockPlan  # its bias is among the tensors
    options: Mapping[str, Any]
    cotangents: tuple[Tensor, Tensor]

    def call(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` of the tensors, the plan's bias being one of them."""

        def of_tensors(*, bias: Tensor | None = None, **rest: Any) -> Any:
            return function(plan=dataclasses.replace(self.plan, bias=bias), **rest)

        return of_tensors


def attend(problem: Problem) -> Callable[..., Any]:
    return problem.call(attnext.routed_attention)


def specification(problem: Problem) -> Callable[..., Any]:
    return problem.call(reference_routed.routed_attention)


@st.composite
def plans(draw: Any, queries: tuple[int, ...], keys: tuple[int, ...], shape: Any) -> BlockPlan:
    """Lists that are ragged, empty, unsorted, and name blocks twice."""
    rank = len(queries)
    block = lambda: tuple(draw(st.sampled_from(BLOCKS)) for _ in range(rank))  # noqa: E731
    q, k = block(), block()
    nq, nk = Blocks.of(queries, q).num_blocks, Blocks.of(keys, k).num_blocks
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    batch, heads = shape
    form = draw(st.sampled_from(("padded", "csr", "mask", *(("spans",) * (rank == 1)))))
    slots = draw(st.integers(0, 5))

    def integers(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=generator)

    if form == "padded":
        lists = integers(-1, nk, batch, heads, nq, slots)
        return BlockPlan.of(lists, queries, q, keys, k)
    if form == "mask":
        mask = torch.rand((batch, heads, nq, nk), generator=generator) < draw(
            st.sampled_from((0.0, 0.3, 1.0))
        )
        return BlockPlan.of_mask(mask, queries, q, keys, k)
    if form == "csr":
        counts = integers(0, slots + 1, batch, heads, nq)
        ends = counts.flatten().cumsum(0).reshape(counts.shape)
        indptr = torch.cat([ends - counts, ends[..., -1:]], -1)
        total = int(counts.sum())
        return BlockPlan.of_csr(indptr, integers(-1, nk, total), queries, q, keys, k)
    starts = integers(0, keys[0] + 1, batch, heads, nq, slots)
    lengths = integers(-2, keys[0] + 1, batch, heads, nq, slots)
    return BlockPlan.of_spans(
        starts.int(), (starts + lengths).clamp(max=keys[0]), queries[0], q[0], keys[0]
    )


@st.composite
def problems(
    draw: Any,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.bfloat16, torch.float16),
) -> Problem:
    dtype = draw(st.sampled_from(dtypes))
    rank = draw(st.sampled_from((1, 1, 1, 2, 3)))
    queries = draw(st.sampled_from(EXTENTS[rank]))
    keys = draw(st.sampled_from((queries, *EXTENTS[rank])))
    batch = draw(st.sampled_from((1, 2)))
    kv_heads, group = draw(st.sampled_from(((1, 1), (2, 1), (1, 3), (2, 2))))
    heads = kv_heads * group
    dim, dim_v = draw(st.sampled_from(((8, 8), (16, 5), (30, 33), (64, 64))))
    shape = (draw(st.sampled_from((1, batch))), draw(st.sampled_from((1, kv_heads, heads))))
    plan = draw(plans(queries, keys, shape))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def normal(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(of)

    acc = torch.float64 if dtype == torch.float64 else torch.float32
    layout = draw(st.sampled_from(("contiguous", "heads first", "cut out")))
    tensors = {
        "query": lay_out(normal(batch, *queries, heads, dim), layout),
        "key": lay_out(normal(batch, *keys, kv_heads, dim), layout),
        "value": lay_out(normal(batch, *keys, kv_heads, dim_v), layout),
    }
    if draw(st.booleans()):
        tensors["bias"] = normal(*plan.lists.shape, of=acc)
    if draw(st.booleans()):
        tensors["sink_logits"] = normal(heads, of=acc)
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["scale"] = 0.5
    if draw(st.booleans()):
        options["softcap"] = 3.0
    if draw(st.booleans()):
        n, m = math.prod(queries), math.prod(keys)
        options["query_documents"] = torch.randint(0, 3, (batch, n), generator=generator)
        options["key_documents"] = torch.randint(0, 3, (batch, m), generator=generator)
    if rank == 1 and draw(st.booleans()):
        options |= draw(rules(batch, heads, keys[0]))
    cotangents = normal(batch, *queries, heads, dim_v), normal(batch, *queries, heads, of=acc)
    return Problem(tensors, plan, options, cotangents)


@st.composite
def rules(draw: Any, batch: int, heads: int, keys: int) -> dict[str, Any]:
    side = st.one_of(st.none(), st.integers(0, 40))
    options: dict[str, Any] = {
        "is_causal": draw(st.booleans()),
        "exclude_self": draw(st.booleans()),
        "sinks": draw(st.integers(0, 5)),
        "within": draw(st.one_of(st.none(), st.tuples(side, side))),
        "window_size": draw(st.one_of(st.none(), st.integers(1, 40), st.tuples(side, side))),
    }
    if draw(st.booleans()):
        policy = st.sampled_from(("list", "dense", "streaming", "off"))
        options["head_policy"] = [draw(policy) for _ in range(heads)]
    if draw(st.booleans()):
        lengths = [draw(st.integers(0, keys)) for _ in range(batch)]
        options["key_lengths"] = torch.tensor(lengths)
    return options
