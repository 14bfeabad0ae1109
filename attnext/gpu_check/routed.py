# SPDX-License-Identifier: Apache-2.0
"""The problems of routed attention, as plain data."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import attnext

from .. import reference_routed
from ..plans import BlockPlan, Blocks
from .problems import Problem

Plan = Callable[[torch.Generator], BlockPlan]


@dataclass(frozen=True, kw_only=True)
class RoutedProblem(Problem):
    """A call of ``attnext.routed_attention``.

    ``plan`` makes the plan, on the CPU; ``slot_bias`` gives its slots biases. ``documents``: "in
    order", or "mixed". ``lengths``: keys of each batch item.
    """

    op: str = "routed_attention"
    plan: Plan
    slot_bias: bool = False
    documents: str = ""
    lengths: tuple[int, ...] = ()

    def tensors(self, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
        tensors = super().tensors(dtype, device)
        generator = torch.Generator().manual_seed(len(self.name))
        if self.slot_bias:
            shape = plan_of(self.name, torch.device("cpu")).lists.shape
            tensors["bias"] = torch.randn(shape, generator=generator).to(device)
        if self.documents:
            for name, extent in (("query", self.queries), ("key", self.keys or self.queries)):
                documents = torch.randint(
                    0, 3, (self.batch, math.prod(extent)), generator=generator
                )
                if self.documents == "in order":
                    documents = documents.sort(-1).values
                tensors[f"{name}_documents"] = documents.to(device)
        if self.lengths:
            tensors["key_lengths"] = torch.tensor(self.lengths).to(device)
        return tensors

    def _of(self, module: Any) -> Callable[..., Any]:
        def of_tensors(*, query: Tensor, bias: Tensor | None = None, **rest: Any) -> Any:
            plan = dataclasses.replace(plan_of(self.name, query.device), bias=bias)
            return module.routed_attention(query, plan=plan, **rest)

        return of_tensors

    @property
    def function(self) -> Callable[..., Any]:
        return self._of(attnext)

    @property
    def specification(self) -> Callable[..., Any]:
        return self._of(reference_routed)

    def describe(self) -> str:
        words = [super().describe()]
        words += ["biases of slots"] if self.slot_bias else []
        words += [f"documents {self.documents}"] if self.documents else []
        words += [f"key lengths {self.lengths}"] if self.lengths else []
        return ", ".join(words)


@functools.lru_cache(maxsize=256)
def plan_of(name: str, device: torch.device) -> BlockPlan:
    """A problem's plan on a device: one for all its calls."""
    plan = ROUTED[name].plan(torch.Generator().manual_seed(sum(map(ord, name))))

    def there(x: Tensor | None) -> Any:
        return None if x is None else x.to(device)

    queries, keys = (
        dataclasses.replace(x, offsets=there(x.offsets), order=there(x.order))
        for x in (plan.query_blocks, plan.key_blocks)
    )
    lists = (there(x) for x in (plan.lists, plan.ends, plan.indptr))
    return BlockPlan(queries, keys, *lists)


# ---- plans: lists are random, some slots are empty and some blocks named twice -------------------


def _lists(
    queries: Any, block: Any, slots: int, keys: Any = None, key_block: Any = None,
    shape: tuple[int, int] = (1, 1), empty: float = 0.2, shuffled: bool = False,
) -> Plan:  # fmt: skip
    def make(generator: torch.Generator) -> BlockPlan:
        rows = Blocks.of(queries, block)
        columns = Blocks.of(queries if keys is None else keys, key_block or block)
        if shuffled:
            order = torch.randperm(rows.num_tokens, generator=generator).int()
            rows = dataclasses.replace(rows, order=order)
        size = (*shape, rows.num_blocks, slots)
        indices = torch.randint(0, max(1, columns.num_blocks), size, generator=generator)
        absent = torch.rand(size, generator=generator) < (empty if columns.num_blocks else 2)
        indices = indices.masked_fill(absent, -1)
        return BlockPlan.of(indices, rows.extent, rows, columns.extent, columns)

    return make


def _spans(queries: int, block: int, slots: int, keys: int, longest: int) -> Plan:
    def make(generator: torch.Generator) -> BlockPlan:
        size = (1, 1, -(-queries // block), slots)
        starts = torch.randint(0, keys, size, generator=generator)
        ends = starts + torch.randint(-5, longest, size, generator=generator)
        return BlockPlan.of_spans(starts, ends.clamp(max=keys), queries, block, keys)

    return make


def _mask(queries: Any, block: Any, share: float, shape: tuple[int, int] = (1, 1)) -> Plan:
    """As rows of lists of unlike lengths (CSR)."""

    def make(generator: torch.Generator) -> BlockPlan:
        blocks = Blocks.of(queries, block)
        size = (*shape, blocks.num_blocks, blocks.num_blocks)
        mask = torch.rand(size, generator=generator) < share
        return BlockPlan.of_mask(mask, queries, block)

    return make


def _uneven(generator: torch.Generator) -> BlockPlan:
    """Blocks of 0 to 80 tokens."""
    queries = Blocks((100,), torch.tensor([0, 3, 3, 83, 100], dtype=torch.int32))
    keys = Blocks((90,), torch.tensor([0, 1, 81, 81, 90], dtype=torch.int32))
    return BlockPlan.of(torch.tensor([[[[0, 1], [1, 1], [3, 0], [2, 1]]]]), 100, queries, 90, keys)


def _problems() -> list[RoutedProblem]:
    problems: list[RoutedProblem] = []

    def add(
        name: str, queries: tuple[int, ...], plan: Plan, more: Any = None, **rules: Any
    ) -> None:
        problems.append(
            RoutedProblem(
                name=f"routed-{name}", queries=queries, plan=plan, options=rules, **(more or {})
            )
        )

    # Blocks of queries and of keys, around the tiles of 64 rows and the steps of the walk.
    for block, key_block in ((1, 1), (1, 64), (16, 16), (40, 100), (64, 64), (128, 1), (128, 128)):
        plan = _lists(201, block, 3, 190, key_block)
        add(f"blocks-{block}-{key_block}", (201,), plan, {"keys": (190,)})
    add("blocks-uneven", (100,), _uneven, {"keys": (90,)})
    add("maps", (9, 13), _lists((9, 13), (5, 4), 3, (7, 11), (4, 4)), {"keys": (7, 11)})
    add("maps-3d", (3, 6, 7), _lists((3, 6, 7), (2, 3, 4), 3))
    add("csr", (150,), _mask(150, 16, 0.4, (2, 1)), {"batch": 2})
    add("csr-all", (150,), _mask(150, 32, 1.0), is_causal=True)
    add("spans", (150,), _spans(150, 1, 3, 170, 40), {"keys": (170,)})
    add("spans-of-blocks", (150,), _spans(150, 16, 3, 170, 90), {"keys": (170,)}, is_causal=True)
    add("nothing-listed", (90,), _lists(90, 16, 2, empty=1.0))
    add("no-slots", (90,), _lists(90, 16, 0), sinks=3)

    # Who has lists, and head dimensions.
    for lists in ((1, 1), (2, 1), (1, 2), (2, 4)):
        more = {"batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 64}
        add(f"lists-{lists[0]}-{lists[1]}", (130,), _lists(130, 16, 4, shape=lists), more)
    for dim in (30, 64, 128, 256):
        more = {"head_dim": dim, "kv_heads": 1}
        add(f"dim-{dim}", (100,), _lists(100, 16, 3), more, is_causal=True)
        more |= {"slot_bias": True, "sink_logits": True}
        add(f"dim-{dim}-modified", (100,), _lists(100, 16, 3), more, softcap=5.0, window_size=9)
    add("dims-30-128", (100,), _lists(100, 16, 3), {"head_dim": 30, "head_dim_v": 128})

    # Rules and policies.
    add("window", (150,), _lists(150, 16, 3), window_size=(30, 9), sinks=4)
    add("within", (150,), _lists(150, 32, 3), within=(40, 5), exclude_self=True)
    add("streaming", (150,), _lists(150, 16, 3), {"heads": 4, "kv_heads": 2},
        head_policy=("list", "dense", "streaming", "off"), window_size=20, sinks=3,
        is_causal=True)  # fmt: skip
    add("lengths", (90,), _lists(90, 16, 3), {"batch": 3, "lengths": (90, 0, 33)}, is_causal=True)
    for documents in ("in order", "mixed"):
        name, more = documents.replace(" ", "-"), dict[str, Any](documents=documents, batch=2)
        add(f"documents-{name}", (120,), _lists(120, 16, 4), more, window_size=(9, 9))
        add(f"documents-{name}-of-maps", (9, 13), _lists((9, 13), (4, 5), 4), more,
            head_policy=("list", "dense"))  # fmt: skip
    add("shuffled", (120,), _lists(120, 16, 4, shuffled=True), is_causal=True, window_size=20,
        sinks=2)  # fmt: skip
    add("decode", (1,), _lists(1, 1, 30, 2000, 32), {"keys": (2000,), "heads": 8, "kv_heads": 2},
        sinks=4, window_size=50)  # fmt: skip

    # Modifiers.
    biased: dict[str, Any] = {"slot_bias": True}
    add("bias", (150,), _lists(150, 16, 4), biased | {"batch": 2}, window_size=9, sinks=3)
    add("bias-of-heads", (150,), _lists(150, 70, 4, shape=(1, 2)), biased)
    add("bias-of-spans", (120,), _spans(120, 16, 4, 130, 60), biased | {"keys": (130,)})
    add("bias-shuffled", (120,), _lists(120, 16, 4, shuffled=True), biased, window_size=20)
    add("bias-of-maps", (9, 13), _lists((9, 13), (4, 5), 3), biased)
    add("softcap", (120,), _lists(120, 16, 4), {"size": 3.0}, softcap=5.0)
    add("sink-logits", (120,), _lists(120, 16, 4), {"sink_logits": True, "kv_heads": 1})
    add("scale-negative", (80,), _lists(80, 16, 3), scale=-0.5)

    # Memory layouts, and tensors with nothing in them.
    for layout in ("heads first", "cut out", "one for all"):
        more = dict[str, Any](layout=layout, batch=2, head_dim=64)
        add(f"layout-{layout.replace(' ', '-')}", (100,), _lists(100, 16, 3), more)
    add("no-batch", (33,), _lists(33, 16, 2), {"batch": 0, "slot_bias": True})
    add("no-queries", (0,), _lists(0, 16, 2, 33), {"keys": (33,), "slot_bias": True})
    add("no-keys", (33,), _lists(33, 16, 2, 0), {"keys": (0,), "sink_logits": True})
    return problems


ROUTED: dict[str, RoutedProblem] = {problem.name: problem for problem in _problems()}
