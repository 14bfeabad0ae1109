# SPDX-License-Identifier: Apache-2.0
"""Bugs planted in what walks lists: each must be caught, and by what it should be."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from attnext import BlockPlan, routed_ops, routed_tables

from .executor import Program
from .planted import BLOCK, WRONG, Bug, planted_bug
from .problems import normal
from .problems_routed import Problem, lists, qkv, run, shuffled
from .source import header_with, lone

_bug = functools.partial(planted_bug, "routed")
LIST, RULES, ENTRIES = "list_walk.cuh", "../routed_rules.h", "entry_bias.cuh"
FORWARD, BACKWARD = "window_forward.cuh", "window_backward.cuh"
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
    "bias, gradients": lambda: (qkv((90,), batch=2), lists(90, 16, 3, bias=True),
                                {"softcap": 1.0, "window_size": 9}),
    "bias of long blocks, gradients": lambda: (qkv((100,)), lists(100, 70, 3, bias=True), {}),
    "packed": lambda: (_with_sinks(qkv((40,), heads=4, kv_heads=1)), _of_tokens(), {}),
    "packed, gradients": lambda: (qkv((40,), heads=4, kv_heads=1), _of_tokens(), {}),
    "packed with bias, gradients": lambda: (qkv((40,), heads=8, kv_heads=2), _of_tokens(bias=True),
                                            {}),
    "packed parts": lambda: (qkv((1,), (600,), heads=4, kv_heads=1),
                             lists(1, 1, 30, keys=600, key_block=16), {}),
    "spans": lambda: (qkv((40,)), _spans(), {}),
    "mixed documents": lambda: (qkv((60,)), shuffled(lists(60, 16, 3)), _documents(mixed=True)),
    "shuffled": lambda: (qkv((70,)), shuffled(lists(70, 16, 3)), {"window_size": 9, "sinks": 2}),
    "shuffled, gradients": lambda: (qkv((70,)), shuffled(lists(70, 16, 3)),
                                    {"window_size": 9, "is_causal": True, "exclude_self": True}),
    "shuffled self, gradients": lambda: (qkv((150,)), shuffled(lists(150, 16, 4)),
                                         {"within": (20, 20), "exclude_self": True}),
    "shuffled with bias, gradients": lambda: (qkv((70,)), shuffled(lists(70, 16, 3, bias=True)),
                                              {"window_size": 30}),
    "alike": lambda: (qkv((64,), (128,)),
                      BlockPlan.of(torch.tensor([0, 1]).repeat(32).view(1, 1, 64, 1), 64, 1, 128,
                                   64), {}),
    "gap": lambda: (qkv((40,), (60,)),
                    BlockPlan.of(torch.tensor([[[[0, 2]]]]), 40, 40, 60, 16), {}),
    "apart": lambda: (qkv((64,), (256,)),
                      BlockPlan.of(torch.arange(4).view(1, 1, 4, 1), 64, 16, 256, 64), {}),
    "many heads": lambda: (qkv((2,), dim=8, heads=1026, kv_heads=1), lists(2, 2, 1),
                           {"head_policy": ["dense", "list"] * 513}),
}  # fmt: skip


def _of_tokens(bias: bool = False) -> BlockPlan:
    return lists(40, 1, 2, key_block=16, bias=bias)


def _with_sinks(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"sink_logits": normal(tensors["query"].shape[-2])}


def _spans() -> BlockPlan:
    starts, ends = torch.tensor([[[[0, 10]]]]), torch.tensor([[[[30, 40]]]])
    return BlockPlan.of_spans(starts, ends, 40, 40, bias=torch.tensor([[[[0.0, 3.0]]]]))


def _documents(mixed: bool = False) -> dict[str, torch.Tensor]:
    of_token = torch.tensor([[0] * 20 + [3] * 25 + [4] * 15])
    if mixed:
        of_token = of_token.view(1, 3, 20).mT.reshape(1, 60)
    return {"query_documents": of_token, "key_documents": of_token}


def _one_block(queries: int, keys: int) -> BlockPlan:
    return BlockPlan.of(torch.zeros(1, 1, 1, 1).int(), queries, queries, keys, keys)


# Those that take seconds; the others say no more of the executor.
QUICK = ("cursor off by one", "window counted twice", "transposed window mirrored")
BUGS = [
    _bug("cursor off by one", "forward_bf16_32", "lists", WRONG,
         (LIST, "entries[e].at <= listed; };", "entries[e].at < listed; };")),
    _bug("cursor leaps over a run", "forward_bf16_32", "lists", WRONG,
         (LIST, "      while (step > 1) {\n", "      while (step > 2) {\n")),
    _bug("rows of an entry ignored", "forward_bf16_32", "lists", WRONG,
         (LIST, "if (walk.has_row(which, row)) add_run", "add_run")),
    _bug("tail of the last entry", "forward_bf16_32", "part of a step", WRONG,
         (LIST, "last.walk_end - last.walk_begin;", "last.walk_end - last.walk_begin - 1;")),
    _bug("a step full that ends the walk", "forward_bf16_32", "part of a step", WRONG,
         (LIST, "bool full = end <= walk.total, skip", "bool full = true, skip")),
    _bug("a step full for some rows", "forward_bf16_32", "long blocks", WRONG,
         (LIST, "if (c.rows & ~rows) return false;", "")),
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
         (LIST, "near_hi = max(near_hi, static_cast<int32_t>(x.near_hi));",
          "if (i == 0) near_hi = static_cast<int32_t>(x.near_hi);")),
    _bug("lost self rule", "forward_bf16_32", "self", WRONG,
         (LIST, "if (row.self >= 0) mine &= ~part(row.self, row.self + 1, w);", "")),
    _bug("list of another head", "forward_bf16_32", "heads", WRONG,
         (LIST, "head / (static_cast<int32_t>(p->window.heads) / p->list_heads);",
          "head % p->list_heads;")),
    _bug("policy of another head", "forward_bf16_32", "heads", WRONG,
         (LIST, ">> (head % 16 * 2) & 3", ">> (head % 8 * 2 + 2) & 3")),
    _bug("order of rows ignored", "forward_bf16_32", "boxes", WRONG,
         (LIST, "p->row_order ? p->row_order[place] : place", "place")),
    _bug("order of keys ignored", "forward_bf16_32", "boxes", WRONG,
         (LIST, "is_listed(run) && p->walk_order ? p->walk_order[place] : place", "place")),
    _bug("the next document too", "forward_bf16_32", "documents", WRONG,
         (LIST, "walked, mine + past);", "walked, mine + 2 * past);")),
    _bug("near keys lose their bias", "forward_bf16_32_modified", "bias", WRONG,
         (LIST, "(kBiased && p->window.bias && count > 0);", "false;")),
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
         (LIST, "if (walk.has_row(which, row)) add_run", "add_run")),
    _bug("half of a tile's rows", "forward_bf16_32", "lists", WRONG,
         (LIST, "entries[run].rows[index / 32]", "entries[run].rows[0]")),
    _bug("rows of another warp", "forward_bf16_32", "apart", WRONG,
         (LIST, "use ? 1u << row.index % 32 : 0", "use ? 1u << row.index % 16 : 0")),
    _bug("policies beyond the parameters ignored", "forward_bf16_32", "many heads",
         "global read out of bounds",
         (LIST, "if (p.policies) return static_cast<HeadPolicy>(p.policies[head]);", "")),
    # ---- heads that share a tile ----
    _bug("two rows of one head", "forward_bf16_32", "packed", "global write-write race",
         (LIST, "row.head = r - row.index * p->packed;", "row.head = 0;")),
    _bug("places of a whole tile", "forward_bf16_32", "packed", WRONG,
         (LIST, "places = p->rows / static_cast<int32_t>(packed(launch));", "places = p->rows;")),
    _bug("sink of a pack's first head", "forward_bf16_32", "packed", WRONG,
         (FORWARD, "w.sink_logits)[head + row.head]", "w.sink_logits)[head]")),
    _bug("statistics of a pack's first head", "query_gradient_bf16_32", "packed, gradients", WRONG,
         (BACKWARD, "row.token, head + row.head)];\n    spread<kFrags>(mine.lse, lse);",
          "row.token, head)];\n    spread<kFrags>(mine.lse, lse);")),
    _bug("parts of a pack's first head", "merge_bf16", "packed parts", "global write-write race",
         (FORWARD, "const int32_t head = first_head + row.head;",
          "const int32_t head = first_head;")),
    _bug("packs begin at every head", "bias_gradient_bf16_32", "packed with bias, gradients",
         WRONG, (ENTRIES, "static_cast<int32_t>(i % packs) * p.packed;",
                 "static_cast<int32_t>(i % packs);")),
    # ---- out of order ----
    _bug("window of rows in order", "forward_bf16_32", "shuffled", WRONG,
         (LIST, "bool scattered = p->row_order;", "bool scattered = false;")),
    _bug("sinks of the first row", "forward_bf16_32", "shuffled", WRONG,
         (LIST, "max(lo, sink_hi)};", "max(lo, sink_hi - 1)};")),
    _bug("windows walked in the order of places", "key_gradient_bf16_32", "shuffled, gradients",
         WRONG, (LIST, "return is_listed(run) && p->walk_order ?", "return p->walk_order ?")),
    _bug("places taken for tokens", "key_gradient_bf16_32", "shuffled, gradients", WRONG,
         (LIST, "!(p->scattered && (listed || exact))", "true")),
    _bug("a step skipped by its places", "key_gradient_bf16_32", "shuffled self, gradients", WRONG,
         (LIST, "    if (listed && walk.p->scattered) return false;\n", "")),
    _bug("lost self rule, pair by pair", "key_gradient_bf16_32", "shuffled self, gradients", WRONG,
         (LIST, "    found &= token != row.self;\n", "")),
    _bug("tokens taken for places", "key_gradient_bf16_32_modified",
         "shuffled with bias, gradients", WRONG,
         (LIST, "p->walk_places ? p->walk_places[token] : token", "token")),
    _bug("documents not looked at", "forward_bf16_32", "mixed documents", WRONG,
         (LIST, "if (found && p->mixed) {", "if (false) {")),
    _bug("document of the place", "forward_bf16_32", "mixed documents", WRONG,
         (LIST, "row_documents()[token_of_row(first_row + row.index)]",
          "row_documents()[first_row + row.index]")),
    # ---- gradients of slots' biases ----
    _bug("sums of entries not cleared", "bias_gradient_bf16_32", "bias, gradients",
         "read of unwritten global memory",
         (ENTRIES, "e < tile[1] - tile[0]; e += 32", "e < tile[1] - tile[0] - 1; e += 32")),
    _bug("warps share their sums", "bias_gradient_bf16_32", "bias, gradients",
         "global write-write race",
         (ENTRIES, "(split * Kernel::kWarps + k.warp)", "(split * Kernel::kWarps)")),
    _bug("tiles share their sums", "bias_gradient_bf16_32", "bias, gradients",
         "global write-write race", (ENTRIES, "(k.walk.entries - k.p.entries);", "0;")),
    _bug("sums over the edge of an entry", "bias_gradient_bf16_32", "bias, gradients", WRONG,
         (ENTRIES, "if (lane >= step && other == entry)", "if (lane >= step)")),
    _bug("one batch item's gradient", "bias_gradient_bf16_32", "bias, gradients", WRONG,
         (ENTRIES, "p.list_batch == 1 ? static_cast<int32_t>(p.window.batch) : 1", "1")),
    _bug("gradient of what the cap is taken of", "bias_gradient_bf16_32", "bias, gradients", WRONG,
         (BACKWARD, "kWanted == Wanted::kBias ? of_logit : of_product", "of_product")),
    _bug("sums of some warps", "merge_bias", "bias, gradients", WRONG,
         (ENTRIES, "int64_t(p.splits) * p.rows; ++i", "int64_t(p.splits); ++i")),
    _bug("a slot's first entry", "merge_bias", "bias of long blocks, gradients", WRONG,
         (ENTRIES, "at < p.slot_ptr[slot + 1]; ++at",
          "at < min(p.slot_ptr[slot + 1], p.slot_ptr[slot] + 1); ++at")),
]  # fmt: skip

# (name, problem, old, new) of routed_tables.py.
TABLE_BUGS = [
    ("duplicate not removed", "twice",
     "        begin = torch.maximum(begin, before - ", "        torch.maximum(begin, before - "),
    ("all tiles of a block are its first", "long blocks",
     "tile = first_tile[source] + index\n", "tile = first_tile[source] + index * 0\n"),
    ("second tile of a block lost", "straddling",
     "most = (largest + rows - 2) // rows + 1", "most = (largest + rows - 2) // rows"),
    ("neighbours joined that list others", "lists",
     "& same(found.walk_begin) & same(found.walk_end), True", ", True"),
    ("rows lost where walks are joined", "alike", "rows = sums[last] - sums[first] + rows", "pass"),
    ("walks joined over a gap", "gap", "& follows, False", ", False"),
    ("walks joined of other rows", "alike", "same(found.rows) & follows", "follows"),
    ("entries of a tile at one place", "lists",
     "at = before[:-1] - before[tile_ptr][tile]", "at = before[:-1] * 0"),
    ("the last slot's bias", "spans", "torch.sort(slot, descending=True", "torch.sort(slot"),
    ("a key of two spans twice", "spans", "row, begin, end, slot = _pieces(", "_pieces("),
    ("slots of entries in another order", "bias, gradients",
     "of_slot.indices.int()", "of_slot.indices.flip(0).int()"),
]  # fmt: skip


def symptoms(name: str, bug: Bug | None = None) -> set[str]:
    """What is said of a problem with a bug in one kernel."""
    tensors, plan, options = PROBLEMS[name]()
    problem = Problem(tensors, plan, options, name.endswith("gradients"))

    def find(kernel: str) -> Program:
        return lone(kernel, *bug.edits) if bug and kernel == bug.kernel else lone(kernel)

    wrong, reports = run(problem, find, metrics=False)
    assert bug is None or any(r.kernel == bug.kernel for r in reports)
    return wrong


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
