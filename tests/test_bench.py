# SPDX-License-Identifier: Apache-2.0
"""The benchmark's arithmetic, its gate, and one tiny case from the command line to the plots."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("click", reason="the command line of the benchmark needs click")

from click.testing import CliRunner, Result

from attnext.testing import threads
from bench import timing
from bench.cases import CASES, GROUPS, Case, select
from bench.cli import cli
from bench.gate import Reference
from bench.peers import CONTENDERS, contenders_for
from bench.problem import Prepared, Problem, Unavailable
from bench.report import load, markdown
from bench.run import reference_for

ROOT = Path(__file__).resolve().parent.parent
QUICK = (  # no compilation
    "attnext", "sdpa-dense", "sdpa-tiles", "gather", "gather-blocks", "sdpa-masked",
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def test_from_the_command_line_to_table_and_plot(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    names = [word for name in QUICK for word in ("-c", name)]
    limits = ("--rounds", "3", "--budget", "0.5", "--quiet")
    command = ["run", "smoke-2d", *names, *limits, "--threads", "1", "--json", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "bench", *command],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = load(path)
    assert record["environment"]["torch"] == torch.__version__
    for result in record["results"]:
        for entry in result["contenders"]:
            assert entry["status"] == "ok", entry
            assert entry["time"]["n"] == 3
            assert entry["time"]["q25"] <= entry["time"]["median"] <= entry["time"]["q75"]
            assert set(entry["gate"]["errors"]) >= {"out"}
    training = record["results"][1]
    assert training["mode"] == "fwd+bwd"
    assert set(training["contenders"][0]["gate"]["errors"]) == {
        "out", "query", "key", "value", "bias",
    }  # fmt: skip

    table = bench("table", str(path))
    assert table.exit_code == 0
    assert table.output == markdown(record)
    assert "| attnext |" in table.output

    pytest.importorskip("matplotlib")
    plots = bench("plot", str(path), "-o", str(tmp_path))
    assert plots.exit_code == 0, plots.output
    assert (tmp_path / "versus.png").stat().st_size > 1000


def test_searches_are_drawn(tmp_path: Path) -> None:
    plots = pytest.importorskip("bench.plots")
    environment = {"cpu": "", "threads": 1, "isa": "", "commit": "", "date": "2000-01-01"}
    results = [
        {
            "case": f"{method}-{tokens}", "group": "router-length",
            "problem": f"{method}, {tokens}", "tokens": tokens, "mode": "fwd", "dtype": "float32",
            "contenders": [
                {"name": "attnext", "time": {"median": tokens / 1e5}, "searching": tokens / 2e5}
            ],
        }
        for method in ("hip", "infinite-hip") for tokens in (8192, 16384)
    ]  # fmt: skip
    record = {"environment": environment, "results": results}
    written = plots.draw(record, tmp_path)
    assert [path.name for path in written] == ["router-length.png"]
    assert written[0].stat().st_size > 10_000


def test_mistakes_are_named() -> None:
    for arguments, word in (
        (("run", "no-such-case"), "no-such-case"),
        (("run", "smoke-1d", "-c", "nobody"), "nobody"),
        (("run", "smoke-1d", "--isa", "vax"), "vax"),
        (("table", __file__), "no JSON file"),
    ):
        done = bench(*arguments)
        assert isinstance(done.exception, SystemExit), done.exception
        assert done.exit_code != 0
        assert word in done.output


MANY_SOFTMAXES = ("smoke-nsa", "smoke-superlinear", "smoke-landmark")
SMOKE_ROUTERS = [c.name for c in CASES.values() if c.op == "router" and c.group == "smoke"]


@pytest.mark.parametrize("name", ["smoke-1d", "smoke-2d", "smoke-routed", *SMOKE_ROUTERS])
@pytest.mark.parametrize("training", [False, True])
def test_peers_solve_the_case(name: str, training: bool) -> None:
    problem = Problem(CASES[name], torch.float32)
    reference = reference_for(problem, training)
    for contender in contenders_for(problem.case, QUICK):
        if contender.name == "sdpa-masked" and name in MANY_SOFTMAXES:
            with pytest.raises(Unavailable, match="more than one softmax"):
                contender.prepare(problem, training)
            continue
        verdict = reference.check(contender.prepare(problem, training))
        assert verdict.passed, f"{contender.name}: {verdict.sentence()}"


def test_the_gate_shuts_on_one_wrong_key() -> None:
    """Attention one key too wide passes nowhere."""
    problem = Problem(CASES["smoke-1d"], torch.float32)
    assert problem.case.window is not None
    wide = Case(**{**_fields(problem.case), "window": (problem.case.window[0] + 1,)})
    prepared = CONTENDERS["attnext"].prepare(Problem(wide, torch.float32), True)
    verdict = Reference(problem, True).check(prepared)
    assert not verdict.passed
    assert all(error > 100 * budget for error, budget in verdict.errors.values())


def test_the_gate_shuts_on_nan() -> None:
    problem = Problem(CASES["smoke-1d"], torch.float32)
    good = CONTENDERS["attnext"].prepare(problem, False)
    bad = Prepared(lambda: good.call() * float("nan"), good.leaves, good.layouts)
    assert not Reference(problem, False).check(bad).passed


def test_work_of_a_case() -> None:
    """Pairs counted by hand: 64 causal queries with windows of 16, the first 15 shorter."""
    case = CASES["smoke-1d"]
    pairs = sum(min(i + 1, 16) for i in range(64)) * case.heads
    assert case.pairs == pairs
    assert case.flops("fwd") == 4 * case.head_dim * pairs
    assert case.flops("fwd+bwd") == 3.5 * case.flops("fwd")
    inward = CASES["na2d-56-k7"]
    assert inward.pairs == inward.batch * inward.heads * 56 * 56 * 49
    sinks = CASES["swa-8192-512-sinks"]
    plain = CASES["swa-8192-512"]
    assert sinks.pairs - plain.pairs == 8 * sum(min(max(i - 511, 0), 4) for i in range(8192))


def test_names_select_cases() -> None:
    assert {case.group for case in CASES.values()} == set(GROUPS)
    assert [case.name for case in select(["na"])] == [
        case.name for case in CASES.values() if case.group == "na"
    ]
    assert len(select(["swa-*", "swa-4096-256"])) == sum(name.startswith("swa-") for name in CASES)


def test_rounds_interleave_and_slow_calls_take_part_less_often() -> None:
    order: list[str] = []

    def call(name: str, seconds: float) -> None:
        order.append(name)
        torch.empty(1)
        end = timing.time.perf_counter() + seconds
        while timing.time.perf_counter() < end:
            pass

    calls = {"a": lambda: call("a", 0.003), "b": lambda: call("b", 0.03)}
    found = timing.interleave(calls, rounds=8, budget=0.2)
    assert found["a"].n == 8
    assert found["b"].n == timing.FEWEST
    assert found["b"].minimum >= 0.03
    rounds = "".join(order).lstrip("a").lstrip("b")  # what follows the warm-up
    assert rounds.count("a") == 8 and "bb" not in rounds and rounds.count("b") == 5


def test_a_contender_may_stay_out() -> None:
    with pytest.raises(Unavailable, match="softcap"):
        CONTENDERS["sdpa-dense"].prepare(
            Problem(CASES["swa-8192-512-softcap"], torch.float32), False
        )
    with pytest.raises(Unavailable, match="GiB"):
        Problem(CASES["smoke-1d"], torch.float32).afford("everything", 1e15)


def test_a_record_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"schema": 0}), encoding="utf-8")
    with pytest.raises(ValueError, match="schema"):
        load(path)


def _fields(case: Case) -> dict[str, object]:
    return {name: getattr(case, name) for name in case.__dataclass_fields__}
