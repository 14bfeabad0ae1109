# SPDX-License-Identifier: Apache-2.0
"""Bugs planted in what walks lists: each must be caught, and by what it should be."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import attnext
from attnext import BlockPlan, reference_routed, routed_ops, routed_tables
from attnext.testing import assert_within_budget, evaluate

from .executor import Program, WrongRun
from .planted import BLOCK, WRONG, Bug, planted_bug
from .routed import on_executor
from .source import header_with, lone
from .test_routed import lists, normal, qkv

_bug = functools.partial(planted_bug, "routed")
LIST, RULES = "list_walk.cuh", "../routed_rules.h"
TABLES = Path(routed_tables.__file__)

# Heads of 32; (tensors, plan, options), with gradients where the name says so.
PROBLEMS: dict[str, Any] = {
    "lists": lambda: (qkv((100,)), lists(100, 16, 3), {}),
    "lists, gradients": lambda: (qkv((100,)), lists(100, 16, 3), {}),
    "twice": lambda: (qkv((40,)), BlockPlan.of(torch.tensor([[[[1, 1], [0, 1], [2, 2]]]]), 40, 16),
                      {}),
    "part of a step": lambda: (qkv((64,), (40,)), _one_block(64, 40), {}),
    "diagonal": lambda: (qkv((64,)), _one_block(64, 64), {"is_causal": True}),
    "straddling": lambda: (qkv((100,)), lists(100, 48, 2), {}),
    "long blocks": lambda: (qkv((128,)),
                            BlockPlan.of(torch.tensor([[[[0, 1], [1, -1]]]]), 128, 100), {}),
    "causal": lambda: (qkv((100,)), lists(100, 50, 2), {"is_causal": True}),
    "window": lambda: (qkv((100,)), lists(100, 16, 4), {"window_size": (30, 9)}),
    "window, gradients": lambda: (qkv((100,)), lists(100, 16, 4),
                                  {"window_size": (30, 9), "sinks": 3}),
    "self": lambda: (qkv((40,)), lists(40, 16, 2, seed=1), {"exclude_self": True}),
    "heads": lambda: (qkv((40,), heads=4, kv_heads=2), lists(40, 16, 2, heads=2),
                      {"head_policy": ["list", "list", "dense", "list"]}),
    "boxes": lambda: (qkv((7, 9)), BlockPlan.of(torch.arange(6).view(1, 1, 6, 1), (7, 9), (4, 3)),
                      {}),
    "documents": lambda: (qkv((60,)), lists(60, 16, 3), _documents()),
    "within, gradients": lambda: (qkv((80,)), lists(80, 40, 2), {"within": (20, 5)}),
    "bias": lambda: (qkv((60,)), lists(60, 16, 3, bias=True), {"window_size": 20}),
}  # fmt: skip


def _documents() -> dict[str, torch.Tensor]:
    of_token = torch.tensor([[0] * 20 + [3] * 25 + [4] * 15])
    return {"query_documents": of_token, "key_documents": of_token}


def _one_block(queries: int, keys: int) -> BlockPlan:
    return BlockPlan.of(torch.zeros(1, 1, 1, 1).int(), queries, queries, keys, keys)


# Those that take seconds; the others say no more of the executor.
QUICK = ("cursor off by one", "window counted twice", "transposed window mirrored")
BUGS = [
    _bug("cursor off by one", "forward_bf16_32", "lists", WRONG,
         (LIST, "which < count && at(which) <= s;", "which < count && at(which) < s;")),
    _bug("cursor leaps over a run", "forward_bf16_32", "lists", WRONG,
         (LIST, "    while (step > 1) {\n", "    while (step > 2) {\n")),
    _bug("rows of an entry ignored", "forward_bf16_32", "lists", WRONG,
         (LIST, "      if (!x.rows.contains(row.place)) continue;\n", "")),
    _bug("tail of the last entry", "forward_bf16_32", "part of a step", WRONG,
         (LIST, "max(last.walk_end - last.walk_begin, 0)",
          "max(last.walk_end - last.walk_begin - 1, 0)")),
    _bug("a step full that ends the walk", "forward_bf16_32", "part of a step", WRONG,
         (LIST, "bool full = slot + kStep <= walk.total, skip", "bool full = true, skip")),
    _bug("a step full for some rows", "forward_bf16_32", "long blocks", WRONG,
         (LIST, "if (x.rows.begin > c.row_min || c.row_max >= x.rows.end) return false;", "")),
    _bug("a step full beyond the last key", "forward_bf16_32", "diagonal", WRONG,
         (LIST, "(max(c.near_hi_max, c.sink_max) <= begin && end <= c.hi_min)",
          "(max(c.near_hi_max, c.sink_max) <= begin && end <= c.hi_max)"),
         (LIST, "(c.sink_max <= begin && end <= c.near_lo_min) ||\n           (max(c.near_hi",
          "(c.sink_max <= begin && end <= c.near_lo_max) ||\n           (max(c.near_hi")),
    _bug("a step skipped too early", "forward_bf16_32", "causal", WRONG,
         (LIST, "c.hi_max <= begin) return true;", "c.hi_min <= begin) return true;")),
    _bug("window counted twice", "forward_bf16_32", "window", WRONG,
         (LIST, "add(row.sink_end, row.near.begin);", "add(row.sink_end, row.near.end);")),
    _bug("window of the tile's first row", "forward_bf16_32", "window", WRONG,
         (LIST, "static_cast<int32_t>(bottom.near_hi)};", "static_cast<int32_t>(top.near_hi)};")),
    _bug("lost self rule", "forward_bf16_32", "self", WRONG,
         (LIST, "      if (row.self >= 0) clear(row.self, row.self + 1);\n", "")),
    _bug("list of another head", "forward_bf16_32", "heads", WRONG,
         (LIST, "head / (static_cast<int32_t>(p->window.heads) / p->list_heads);",
          "head % p->list_heads;")),
    _bug("policy of another head", "forward_bf16_32", "heads", WRONG,
         (LIST, ">> (head % 16 * 2) & 3", ">> (head % 8 * 2 + 2) & 3")),
    _bug("order of rows ignored", "forward_bf16_32", "boxes", WRONG,
         (LIST, "p->row_order ? p->row_order[row.place] : row.place", "row.place")),
    _bug("order of keys ignored", "forward_bf16_32", "boxes", WRONG,
         (LIST, "p->walk_order ? p->walk_order[place] : place", "place")),
    _bug("the next document too", "forward_bf16_32", "documents", WRONG,
         (LIST, "int64_t(mine[token]) + 1)", "int64_t(mine[token]) + 2)")),
    _bug("near keys lose their bias", "forward_bf16_32_modified", "bias", WRONG,
         (LIST, "exact = kBiased && p->window.bias && count > 0;", "exact = false;")),
    _bug("no barrier before the first look-up", "forward_bf16_32", "lists", "read-write race",
         (BLOCK, "    set_finders();\n    __syncthreads();\n", "    set_finders();\n")),
    _bug("transposed range too short", "key_gradient_bf16_32", "within, gradients", WRONG,
         (RULES, "own + r.within[0] + 1", "own + r.within[0]")),
    _bug("transposed window mirrored", "key_gradient_bf16_32", "window, gradients", WRONG,
         (RULES, "between(own - r.around[1], x.lo, x.hi)",
          "between(own - r.around[0], x.lo, x.hi)")),
    _bug("sinks are keys like others, dK", "key_gradient_bf16_32", "window, gradients", WRONG,
         (RULES, "|| (has_besides(policy) && key < r.sinks)", "")),
    _bug("rows of an entry ignored, dK", "key_gradient_bf16_32", "lists, gradients", WRONG,
         (LIST, "      if (!x.rows.contains(row.place)) continue;\n", "")),
]  # fmt: skip

# (name, problem, old, new) of routed_tables.py.
TABLE_BUGS = [
    ("duplicate not removed", "twice",
     "    begin = torch.maximum(begin, before - ", "    torch.maximum(begin, before - "),
    ("all tiles of a block are its first", "long blocks",
     "tile = first_tile[source] + index", "tile = first_tile[source] + index * 0"),
    ("second tile of a block lost", "straddling",
     "most = (largest + rows - 2) // rows + 1", "most = (largest + rows - 2) // rows"),
    ("neighbours joined that list others", "lists", "same(walk_begin) & same(walk_end) & ", ""),
    ("places of another tile", "lists",
     "at = before[:-1] - before[tile_ptr][tile]", "at = before[:-1] * 1"),
]  # fmt: skip


def symptoms(name: str, bug: Bug | None = None) -> set[str]:
    """What is said of a problem with a bug in one kernel."""
    tensors, plan, options = PROBLEMS[name]()
    cotangents = None
    if name.endswith("gradients"):
        shape = tensors["query"].shape
        cotangents = normal(*shape, dtype=torch.bfloat16), normal(*shape[:-1])
    options = {"plan": plan, **options}

    def find(kernel: str) -> Program:
        return lone(kernel, *bug.edits) if bug and kernel == bug.kernel else lone(kernel)

    wrong: set[str] = set()
    with on_executor(find=find, metrics=False) as recorder:
        try:
            results = evaluate(attnext.routed_attention, tensors, options, cotangents)
            assert_within_budget(
                results, reference_routed.routed_attention, tensors, options, cotangents
            )
        except WrongRun:
            pass
        except AssertionError:
            wrong.add(WRONG)
    assert bug is None or any(r.kernel == bug.kernel for r in recorder.reports)
    return wrong.union(*(report.kinds() for report in recorder.reports))


def test_the_list_fits_the_sources() -> None:
    for bug in BUGS:
        for edit in bug.edits:
            header_with(edit)
    for _, _, old, _ in TABLE_BUGS:
        assert TABLES.read_text().count(old) == 1


@pytest.mark.heavy
@pytest.mark.parametrize("name", PROBLEMS)
def test_nothing_is_said_without_a_bug(name: str) -> None:
    assert not symptoms(name)


@pytest.mark.parametrize(
    "bug",
    [pytest.param(bug, marks=[pytest.mark.heavy] * (bug.name not in QUICK)) for bug in BUGS],
    ids=lambda bug: bug.name,
)
def test_planted_bug_is_caught(bug: Bug) -> None:
    assert bug.symptom in symptoms(bug.problem, bug)


@pytest.mark.parametrize(
    ("name", "old", "new"), [bug[1:] for bug in TABLE_BUGS], ids=[bug[0] for bug in TABLE_BUGS]
)
def test_planted_bug_of_tables_is_caught(
    name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: dict[str, Any] = {"__name__": "changed"}
    monkeypatch.setitem(__import__("sys").modules, "changed", type(routed_tables)("changed"))
    exec(compile(TABLES.read_text().replace(old, new), str(TABLES), "exec"), module)
    monkeypatch.setattr(routed_ops, "list_tables", module["list_tables"])
    assert symptoms(name)
