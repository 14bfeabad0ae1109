# SPDX-License-Identifier: Apache-2.0
"""``python -m attnext.gpu_check`` as far as it goes without a GPU: here its device is the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from attnext import geometry
from attnext.gpu_check import __main__ as command
from attnext.gpu_check import report, timing
from attnext.gpu_check.checks import LAUNCHES, run_check
from attnext.gpu_check.isolation import run_isolated
from attnext.gpu_check.names import PROBLEMS, names
from attnext.gpu_check.problems import DTYPES, LAYOUTS, WINDOWS, lay_out
from attnext.gpu_check.routed import ROUTED, plan_of
from attnext.gpu_check.timed_case import FORWARD, Case
from attnext.gpu_check.timed_lists import LIST_CASES
from attnext.gpu_check.timed_windows import WINDOW_CASES
from attnext.routed_ops import HEAD_POLICIES


def run(*arguments: str) -> tuple[int, str, str]:
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        status = command.main(arguments)
    return status, out.getvalue(), error.getvalue()


# ---- problems ------------------------------------------------------------------------------------


def test_the_list_has_what_it_should() -> None:
    problems = WINDOWS.values()
    assert {len(p.queries) for p in problems} == {1, 2, 3}
    assert {1, 15, 63, 64, 65, 129} <= {n for p in problems for n in p.queries}
    assert {30, 64, 128, 256} <= {p.head_dim for p in problems}
    assert {p.layout for p in problems} == set(LAYOUTS)
    options = {name for p in problems for name in p.options}
    assert {"stride", "dilation", "is_causal", "boundary", "softcap", "sinks", "shift"} <= options
    for field in ("bias", "alibi", "sink_logits", "additional", "scale", "ends", "kv_heads"):
        assert any(getattr(p, field) for p in problems), field
    assert len({p.describe() for p in problems}) == len(WINDOWS)


def test_the_list_has_what_routed_attention_takes() -> None:
    problems = ROUTED.values()
    assert {len(p.queries) for p in problems} == {1, 2, 3}
    assert {30, 64, 128, 256} <= {p.head_dim for p in problems}
    options = {name for p in problems for name in p.options}
    assert options == {
        "is_causal", "within", "exclude_self", "window_size", "sinks", "head_policy", "softcap",
        "scale",
    }  # fmt: skip
    policies = {x for p in problems for x in p.options.get("head_policy", ())}
    assert policies == set(HEAD_POLICIES)
    assert {p.documents for p in problems} == {"", "in order", "mixed"}
    for field in ("slot_bias", "lengths", "sink_logits", "kv_heads"):
        assert any(getattr(p, field) for p in problems), field
    plans = [plan_of(name, torch.device("cpu")) for name in ROUTED]
    assert any(p.ends is not None for p in plans) and any(p.indptr is not None for p in plans)
    assert any(p.query_blocks.order is not None and p.key_blocks.order is None for p in plans)


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_are_well_posed(name: str) -> None:
    """The CPU kernels pass each of them, in one dtype."""
    record = run_check(f"{name}/fp32", "cpu")
    assert record["passed"], record["error"]
    assert set(record["used"]) >= {"out", "lse", "grad_query", "grad_key", "grad_value"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_values(layout: str) -> None:
    x = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    x = x[:1].expand(x.shape) if layout == "one for all" else x
    y = lay_out(x, layout)
    assert torch.equal(x, y) and y.stride(-1) == 1


def test_problems_are_chosen_by_pattern() -> None:
    assert names(["dim-6*", "bias"], ["bf16"]) == [
        "dim-64/bf16",
        "dim-64-modified/bf16",
        "bias/bf16",
    ]
    assert len(names([], [*DTYPES])) == 3 * len(PROBLEMS)
    with pytest.raises(ValueError, match="nothing"):
        names(["nothing"], ["bf16"])


def test_a_wrong_result_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnext.gpu_check import checks

    right = checks.on_device

    def wrong(*arguments: Any) -> dict[str, torch.Tensor]:
        results = right(*arguments)
        return results | {"grad_key": results["grad_key"] * 1.01}

    monkeypatch.setattr(checks, "on_device", wrong)
    record = run_check("causal-15/fp32", "cpu")
    assert not record["passed"] and "grad_key" in record["error"]

    def unsteady(problem: Any, dtype: Any, device: Any) -> dict[str, torch.Tensor]:
        results = right(problem, dtype, device)
        calls.append(1)
        if len(calls) == 2:
            results["out"] = results["out"].nextafter(torch.tensor(9.0))
        return results

    calls: list[int] = []
    monkeypatch.setattr(checks, "on_device", unsteady)
    record = run_check("causal-15/fp32", "cpu")
    assert not record["passed"] and "two runs" in record["error"]


# ---- processes -----------------------------------------------------------------------------------


def troublesome(name: str, device: str) -> dict[str, Any]:
    if name == "dies":
        os._exit(7)
    if name == "hangs":
        time.sleep(600)
    return {"name": name, "passed": True, "fatal": name == "last words", "process": os.getpid()}


def test_what_dies_or_hangs_costs_one_check() -> None:
    asked = ["a", "dies", "b", "last words", "c", "hangs", "d", "e"]
    records = list(run_isolated(asked, troublesome, "cpu", patience=15.0))
    assert [record["name"] for record in records] == asked
    found = {record["name"]: record for record in records}
    assert "exit status 7" in found["dies"]["error"] and "no answer" in found["hangs"]["error"]
    processes = [record.get("process") for record in records]
    assert processes[2] == processes[3] and processes[6] == processes[7]
    assert len({*processes} - {None}) == 4


# ---- times ---------------------------------------------------------------------------------------


CPU = torch.device("cpu")


def check_case(case: Case, dense: torch.Tensor) -> torch.Tensor:
    """A case's own accounts of who attends whom (``dense``: ``[heads or 1, queries, keys]``), and
    that a wrong result of it would be noticed. Returns attnext's."""
    index = torch.arange(dense.shape[-1])
    heads = torch.arange(case.heads)[:, None, None]
    mask = case.mask(CPU)(torch.zeros_like(heads), heads, index[:, None], index)
    assert torch.equal(
        mask.expand(case.heads, -1, -1), dense.repeat_interleave(case.heads // dense.shape[0], 0)
    )
    assert case.pairs == case.batch * int(dense.sum()) * case.heads // dense.shape[0]
    inputs = case.inputs(CPU)
    out = case.contenders["attnext"](CPU)(*inputs[:3])
    timing._assert_right(case, inputs, out)
    with pytest.raises(AssertionError, match="float64"):
        timing._assert_right(case, inputs, out * 1.1)
    return out


@pytest.mark.parametrize("name", WINDOW_CASES)
def test_cases_are_the_windows_they_say(name: str) -> None:
    """The mask for FlexAttention, the dense one and attnext's own rule, on fewer tokens."""
    full = WINDOW_CASES[name]
    tokens = tuple(max(9, n // 256) if len(full.tokens) == 1 else 9 for n in full.tokens)
    window = tuple(min(w, n - 2) for w, n in zip(full.window, tokens, strict=True))
    dilation = min(full.dilation, 2)
    window = tuple(w // dilation for w in window)
    case = dataclasses.replace(
        full, tokens=tokens, window=window, dilation=dilation, batch=1, heads=2,
        kv_heads=min(full.kv_heads, 1), head_dim=8, dtype="float32",
    )  # fmt: skip
    out = check_case(case, geometry.dense_mask(case.rules, tokens, tokens)[None])
    others = case.contenders
    torch.testing.assert_close(others["SDPA, dense mask"](CPU)(*case.inputs(CPU)[:3]), out)


@pytest.mark.parametrize("name", LIST_CASES)
def test_cases_are_the_lists_they_say(name: str) -> None:
    full = LIST_CASES[name]
    on_map = len(full.tokens) > 1
    case = dataclasses.replace(
        full, tokens=(10, 13) if on_map else (130,), block=(4, 5) if on_map else (16,),
        query_block=full.query_block, slots=3, batch=1, heads=4, kv_heads=min(full.kv_heads, 2),
        head_dim=8, dtype="float32",
    )  # fmt: skip
    order = case.plan.key_blocks.order
    places = torch.arange(130) if order is None else order.long()
    keys, queries = (
        torch.arange(x.num_blocks).repeat_interleave(x.counts.long())
        for x in (case.plan.key_blocks, case.plan.query_blocks)
    )
    dense = torch.zeros((case.plan.lists.shape[1], 130, 130), dtype=torch.bool)
    for head, lists in enumerate(case.plan.lists[0].tolist()):
        for row in range(130):
            for block in lists[int(queries[row])]:
                dense[head, places[row], places[keys == block]] |= block >= 0
    check_case(case, dense if on_map else dense.tril())


# ---- the command and its report ------------------------------------------------------------------


def test_list() -> None:
    status, out, _ = run("--list")
    assert status == 0
    assert all(name in out for name in (*PROBLEMS, *LAUNCHES, *timing.CASES))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence() -> None:
    status, out, error = run()
    assert status == 2 and not out
    assert error.startswith("python -m attnext.gpu_check: ") and error.count("\n") == 1


def test_obstacles(monkeypatch: pytest.MonkeyPatch) -> None:
    def obstacle() -> str:
        found = report.obstacle(0)
        assert found
        return found

    monkeypatch.setattr(report._C, "cuda_architectures", "")
    assert "nvcc" in obstacle()
    monkeypatch.setattr(report._C, "cuda_architectures", "80-real 120")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in obstacle()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in obstacle()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "no CUDA device 0" in obstacle()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "Some GPU" in obstacle() and "7.5" in obstacle()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    assert report.obstacle(0) is None


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("80-real", (8, 0), True),
        ("80-real", (8, 9), True),
        ("86-real", (8, 0), False),
        ("80-real", (9, 0), False),
        ("80-real 90-real", (9, 0), True),
        ("120", (12, 0), True),
        ("120", (13, 0), True),
        ("120", (10, 0), False),
        ("80-virtual", (12, 0), True),
        ("90a-real", (9, 0), True),
        ("", (8, 0), False),
    ],
)
def test_which_gpus_a_build_is_for(built: str, capability: tuple[int, int], runs: bool) -> None:
    assert report.covers(built, capability) == runs


def test_wrong_arguments() -> None:
    status, _, error = run("--only", "nothing-of-the-kind")
    assert status == 2 and "nothing-of-the-kind" in error
    status, _, error = run("--timed", "no-such-*")
    assert status == 2 and "no-such-*" in error
    with pytest.raises(SystemExit) as exit:
        run("--dtype", "fp64")
    assert exit.value.code == 2


@pytest.mark.parametrize("fails", [False, True])
def test_report(fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run on the CPU in place of a GPU, with times that are made up."""

    def work(name: str, device: str) -> dict[str, Any]:
        if name in LAUNCHES:
            return {"name": name, "passed": True, "fatal": False, "seconds": 0.1}
        record = run_check(name, "cpu")
        if fails and name.endswith("fp16"):
            record |= {"passed": False, "error": "RuntimeError: an illegal\nmemory access"}
        return record

    def run_timing(name: str, device: str, seconds: float) -> dict[str, Any]:
        ours = timing._summary([2.0, 1.0, 3.0]) | {"kernels": 1.25}
        results = {"attnext": ours, "NATTEN": {"missing": "not here"}}
        row = {"about": name, "mode": FORWARD, "flops": 1e12, "results": results}
        return {"name": name, "passed": True, "fatal": False, "rows": [row]}

    def in_process(names: list[str], work: Any, device: str, patience: float) -> Any:
        return (work(name, device) for name in names)

    monkeypatch.setattr(command, "obstacle", lambda device: None)
    monkeypatch.setattr(command, "names", lambda only, dtypes: [f"causal-15/{d}" for d in dtypes])
    monkeypatch.setattr(command, "run_check", work)
    monkeypatch.setattr(command, "run_timing", run_timing)
    monkeypatch.setattr(command, "run_isolated", in_process)
    status, out, _ = run("--output", str(tmp_path / "found"))
    record = json.loads((tmp_path / "found.json").read_text())
    text = (tmp_path / "found.md").read_text()
    assert status == int(fails) and "found.md" in out
    total = 3 + len(LAUNCHES)
    assert f"**{total - fails} of {total} checks passed.**" in text
    assert len(record["checks"]) == total and len(record["timings"]) == len(timing.CASES)
    assert record["environment"]["torch"] == torch.__version__ in text
    assert (
        "| `causal-15/bf16` |" in text
        and "attnext: 2.000 (1.500 to 2.500, n 3); kernels 1.250 [800.0]" in text
    )
    assert "NATTEN: none (not here)" in text
    assert ("compute-sanitizer" in text) == fails == ("an illegal memory access" in text)
