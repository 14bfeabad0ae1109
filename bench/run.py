# SPDX-License-Identifier: Apache-2.0
"""From cases to a record: prepare, check, time, weigh, write down."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from attnext import _C

from . import environment, memory, timing
from .cases import TRAINING, Case, LinearCase, RoutedCase, RouterCase
from .gate import Reference
from .linear_gate import LinearReference
from .peers import contenders_for
from .peers.contender import Contender
from .problem import Prepared, Problem, Unavailable
from .roofline import Roof, higher, roof
from .routed_gate import RoutedReference
from .router_gate import RouterReference

SCHEMA = 1


@dataclass(frozen=True)
class Settings:
    """How to measure.

    ``rounds`` and ``budget`` (seconds for the timing of one case in one mode) as in
    ``timing.interleave``; a contender whose single call takes longer than ``patience`` seconds is
    left out; ``contenders`` empty means all.
    """

    rounds: int = 25
    budget: float = 30.0
    patience: float = 10.0
    contenders: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    memory: bool = False
    timing: bool = True


Say = Callable[[str], None]
AnyReference = Reference | LinearReference | RoutedReference | RouterReference


def run(
    cases: Sequence[Case],
    settings: Settings,
    say: Say = lambda text: None,
    keep: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Measure and return the record.

    Args: say is told what is going on; keep is handed the record after every result, so that an
        interrupted run is not lost.
    """
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "environment": environment.describe(),
        "settings": asdict(settings),
        "results": [],
    }
    for case in cases:
        for dtype in settings.dtypes or case.dtypes:
            for mode in [m for m in case.modes if not settings.modes or m in settings.modes]:
                record["results"].append(run_case(case, dtype, mode, settings, say))
                keep(record)
    return record


def run_case(
    case: Case, dtype: str, mode: str, settings: Settings, say: Say = lambda text: None
) -> dict[str, Any]:
    """One entry of the record. A contender that is red, fails or stays out has no figure."""
    problem = Problem(case, getattr(torch, dtype))
    training = mode == TRAINING
    title = f"{case.name} {dtype} {mode}"
    references: dict[bool, AnyReference] = {}
    ready: dict[str, Prepared] = {}
    entries: list[dict[str, Any]] = []
    for contender in contenders_for(case, settings.contenders):
        say(f"{title}: preparing and checking {contender.name}")
        entry: dict[str, Any] = {"name": contender.name, "windowed": contender.windowed}
        entries.append(entry)
        try:
            prepared = _admit(contender, problem, training, references, settings, entry)
        except Unavailable as reason:
            entry.update(status="skipped", reason=str(reason))
        except Exception as error:  # a peer that breaks is a result too
            text = str(error).strip().splitlines() or [""]
            entry.update(status="failed", reason=f"{type(error).__name__}: {text[0][:200]}")
        else:
            if prepared is not None:
                ready[contender.name] = prepared
        gc.collect()

    result = {
        "case": case.name,
        "group": case.group,
        "problem": case.describe(),
        "length": case.num_queries,
        "keys": case.num_keys,
        "window": None if case.window is None else list(case.window),
        "tokens": case.tokens,
        "dtype": dtype,
        "mode": mode,
        "pairs": case.pairs,
        "flops": case.flops(mode),
        "bytes": case.traffic(mode, dtype),
        "contenders": entries,
    }
    before = roof(_C.isa(), dtype)
    if settings.timing and ready:
        timings = timing.interleave(
            {name: prepared.step for name, prepared in ready.items()},
            rounds=settings.rounds,
            budget=settings.budget,
            on_round=lambda r: say(f"{title}: round {r} of {settings.rounds}"),
        )
        _enter(result, timings, higher(before, roof(_C.isa(), dtype)))
    else:
        _enter(result, {}, before)
    del ready
    gc.collect()
    if settings.memory:
        for entry in entries:
            if entry["status"] == "ok":
                say(f"{title}: memory of {entry['name']}")
                _weigh(entry, case, dtype, mode)
    return result


def _enter(result: dict[str, Any], timings: dict[str, timing.Timing], top: Roof) -> None:
    """Write times, and what they mean under the roof, into a result."""
    result["peak_flops"], result["bandwidth"] = top.flops, top.bandwidth
    for entry in result["contenders"]:
        if entry["name"] not in timings:
            continue
        measured = timings[entry["name"]]
        entry["time"] = measured.asdict()
        if entry["windowed"]:
            entry["flops_per_second"] = result["flops"] / measured.median
            entry["bytes_per_second"] = result["bytes"] / measured.median
            if top.flops:
                entry["share_of_peak"] = entry["flops_per_second"] / top.flops


def _admit(
    contender: Contender,
    problem: Problem,
    training: bool,
    references: dict[bool, AnyReference],
    settings: Settings,
    entry: dict[str, Any],
) -> Prepared | None:
    """Prepare a contender and hold it against float64; None if it is red."""
    windowed = contender.windowed
    if not windowed:
        _refuse_hopeless(problem.case, training, settings.patience)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peers' deprecations are not ours to print
        start = time.perf_counter()
        prepared = contender.prepare(problem, training)
        entry["preparation"] = round(time.perf_counter() - start, 3)
        if prepared.detail:
            entry["detail"] = prepared.detail
        if prepared.searching:
            entry["searching"] = prepared.searching
        if windowed not in references:
            references[windowed] = reference_for(problem, training, windowed)
        verdict = references[windowed].check(prepared)
    entry["gate"] = {"rows": verdict.rows, "errors": verdict.errors}
    if not verdict.passed:
        entry.update(status="red", reason=verdict.sentence())
        return None
    if training:
        prepared = prepared.arm(problem.output_grad)
    start = time.perf_counter()
    prepared.step()
    seconds = time.perf_counter() - start
    if seconds > settings.patience:
        raise Unavailable(f"one call takes {seconds:.0f} s, the limit is {settings.patience:g} s")
    entry["status"] = "ok"
    return prepared


def reference_for(problem: Problem, training: bool, windowed: bool = True) -> AnyReference:
    """What results of a problem are held against."""
    case = problem.case
    if isinstance(case, LinearCase):
        return LinearReference(problem, training)
    if isinstance(case, RouterCase):
        return RouterReference(problem, training, windowed)
    if isinstance(case, RoutedCase):
        if not windowed:
            problem = replace(problem, case=case.over_all_blocks())
        return RoutedReference(problem, training)
    return Reference(problem, training, windowed)


def _refuse_hopeless(case: Case, training: bool, patience: float) -> None:
    """Whole attention at great length is not even tried: 200 GFLOP/s is more than it reaches."""
    pairs = case.batch * case.heads * case.num_queries * case.num_keys / (1 + case.is_causal)
    seconds = 4.0 * case.head_dim * pairs * (3.5 if training else 1.0) / 200e9
    if seconds > patience:
        raise Unavailable(f"one call would take {seconds:.0f} s or more, limit {patience:g} s")


def _weigh(entry: dict[str, Any], case: Case, dtype: str, mode: str) -> None:
    request = {
        "case": case.name,
        "contender": entry["name"],
        "mode": mode,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "isa": _C.isa(),
    }
    try:
        extra = memory.peak_bytes(request)
    except Exception as error:
        entry["memory_reason"] = f"{type(error).__name__}: {error}"[:200]
    else:
        entry["memory"] = {"bytes": extra, "bytes_per_token": extra / case.tokens}
