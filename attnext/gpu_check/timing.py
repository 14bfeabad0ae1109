# SPDX-License-Identifier: Apache-2.0
"""Cases timed beside their peers, two ways: whole calls, interleaved, each between two CUDA events,
the L2 cache overwritten before each; and the kernels of a call alone, by torch's profiler, which
leaves out what the host takes.

A figure is given only where the result is right: attnext's beside a few rows of float64, a peer's
beside attnext's.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .timed_case import FORWARD, TRAINING, Call, Case, Unavailable
from .timed_lists import LIST_CASES
from .timed_windows import WINDOW_CASES

CACHE_BYTES = 2**28  # more than the L2 of any GPU
AGREE = 0.03  # of the largest entry: two roundings to bf16, and sums in another order
PROFILED = 10  # calls

CASES: dict[str, Case] = {**WINDOW_CASES, **LIST_CASES}


def _assert_right(case: Case, inputs: list[Tensor], out: Tensor) -> None:
    """A few rows of attnext's result beside float64."""
    q, k, v = (x[0].flatten(0, -3).double().cpu() for x in inputs[:3])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    rows = torch.linspace(0, q.shape[0] - 1, 17).long()
    heads, keys = torch.arange(q.shape[1])[:, None, None], torch.arange(k.shape[0])
    mask = case.mask(torch.device("cpu"))
    allowed = mask(torch.zeros_like(heads), heads, rows[:, None], keys[None])
    scores = torch.einsum("ihd,jhd->hij", q[rows], k) * case.head_dim**-0.5
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    exact = torch.einsum("hij,jhd->ihd", weights, v)
    error = (out[0].flatten(0, -3)[rows.to(out.device)].double().cpu() - exact).abs().max()
    assert error <= 0.01 * exact.abs().max(), f"attnext differs from float64 by {error:.2g}"


def _step(call: Call, inputs: list[Tensor], mode: str) -> Callable[[], Any]:
    if mode == FORWARD:
        q, k, v, _ = inputs
        return lambda: call(q, k, v)
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    return lambda: torch.autograd.grad(call(*leaves), leaves, inputs[3])


def _milliseconds(step: Callable[[], Any], flush: Tensor) -> float:
    flush.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def time_case(case: Case, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """One record for each mode: milliseconds of each contender, or why it has none."""
    inputs = case.inputs(device)
    flush = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device)
    for mode in (FORWARD, TRAINING):
        steps: dict[str, Callable[[], Any]] = {}
        results: dict[str, Any] = {}
        expected: list[Tensor] = []
        for name, make in case.contenders.items():
            try:
                step = _step(make(device), inputs, mode)
                got = step()
                got = [got] if mode == FORWARD else list(got)
                torch.cuda.synchronize(device)
                if not expected:
                    if mode == FORWARD:
                        _assert_right(case, inputs, got[0])
                    expected = got
                off = max(_distance(x, y) for x, y in zip(got, expected, strict=True))
                if not (off <= AGREE or name in case.others):
                    raise Unavailable(f"differs from attnext by {off:.2g} of the largest entry")
                steps[name] = step
            except Exception as error:  # a peer may raise whatever it likes
                if name == "attnext":
                    raise
                torch.cuda.empty_cache()
                kind = "" if isinstance(error, Unavailable) else f"{type(error).__name__}: "
                results[name] = {"missing": kind + str(error).strip().split("\n")[0][:160]}
        timed = _interleave(steps, flush, seconds)
        for name, step in steps.items():
            timed[name]["kernels"] = kernel_milliseconds(step)
        results |= timed
        yield {"case": case.name, "about": case.describe(), "mode": mode,
               "flops": case.flops(mode), "results": results}  # fmt: skip


def _distance(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).abs().max() / y.double().abs().max())


def _interleave(
    steps: dict[str, Callable[[], Any]], flush: Tensor, seconds: float
) -> dict[str, Any]:
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(3):
            _milliseconds(step, flush)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(samples["attnext"]) < 5:
        for name, step in steps.items():
            samples[name].append(_milliseconds(step, flush))
    return {name: _summary(sample) for name, sample in samples.items()}


def kernel_milliseconds(step: Callable[[], Any]) -> float:
    """What the GPU itself is busy for in one call, a mean."""
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(PROFILED):
            step()
        torch.cuda.synchronize()
    busy = sum(event.self_device_time_total for event in profile.key_averages())
    return busy / PROFILED / 1e3


def _summary(sample: list[float]) -> dict[str, Any]:
    low, _, high = statistics.quantiles(sample, n=4, method="inclusive")
    return {"median": statistics.median(sample), "q25": low, "q75": high, "n": len(sample)}


def run_timing(name: str, device: str, seconds: float = 1.0) -> dict[str, Any]:
    """The record of one case, as ``isolation`` asks for it."""
    record: dict[str, Any] = {"name": name, "passed": False, "fatal": False, "rows": []}
    try:
        where = torch.device(device)
        torch.cuda.set_device(where)
        record["rows"] = list(time_case(CASES[name], where, seconds))
        record["passed"] = True
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {error}"
        record["fatal"] = True  # whatever it was: the next case has a fresh process
    return record
