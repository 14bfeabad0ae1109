# SPDX-License-Identifier: Apache-2.0
"""A few cases timed beside their peers: torch's SDPA with a mask, FlashAttention-2 as torch has it
(its local windows), FlexAttention, NATTEN.

Calls are interleaved, each between two CUDA events, the L2 cache overwritten before each. A figure
is given only where the result is right: attnext's beside a few rows of float64, a peer's beside
attnext's.
"""

from __future__ import annotations

import functools
import importlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import attnext
from attnext.geometry import AxisRule, axis_intervals, dense_mask

CACHE_BYTES = 2**28  # more than the L2 of any GPU
AGREE = 0.03  # of the largest entry: two roundings to bf16, and sums in another order
FORWARD, TRAINING = "forward", "forward + backward"


@dataclass(frozen=True, kw_only=True)
class Case:
    """``op``: sliding (causal), neighborhood or window, as the public functions have them."""

    name: str
    op: str
    tokens: tuple[int, ...]
    window: tuple[int, ...]
    batch: int = 1
    heads: int = 8
    head_dim: int = 64
    dilation: int = 1
    shift: int = 0
    dtype: str = "bfloat16"

    @functools.cached_property
    def rules(self) -> tuple[AxisRule, ...]:
        if self.op == "sliding":
            return tuple(
                AxisRule.from_kernel_size(w, is_causal=True, boundary="truncate")
                for w in self.window
            )
        if self.op == "window":
            return tuple(
                AxisRule(w // 2, w - 1 - w // 2, w, self.shift, boundary="truncate")
                for w in self.window
            )
        return tuple(AxisRule.from_kernel_size(w, dilation=self.dilation) for w in self.window)

    @functools.cached_property
    def pairs(self) -> int:
        """Pairs of a query and a key it attends, over batch and heads."""
        counts = (
            sum(end - begin for begin, end in axis_intervals(rule, n, n))
            for rule, n in zip(self.rules, self.tokens, strict=True)
        )
        return self.batch * self.heads * math.prod(counts)

    def flops(self, mode: str) -> float:
        """2 D a pair for q.k and for p.v; the backward pass has five such products."""
        return self.pairs * self.head_dim * (4.0 if mode == FORWARD else 14.0)

    def inputs(self, device: torch.device) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (4, self.batch, *self.tokens, self.heads, self.head_dim)
        dtype = getattr(torch, self.dtype)
        return list(torch.randn(shape, generator=generator).to(dtype).to(device).unbind(0))

    def describe(self) -> str:
        words = [self.op, "x".join(map(str, self.tokens)), "x".join(map(str, self.window))]
        words += [f"dilation {self.dilation}"] if self.dilation > 1 else []
        words += [f"shift {self.shift}"] if self.shift else []
        return ", ".join([*words, f"B{self.batch} H{self.heads} D{self.head_dim}", self.dtype])


CASES = {
    case.name: case
    for case in (
        Case(name="causal-4096-256", op="sliding", tokens=(4096,), window=(256,), batch=4),
        Case(name="causal-16384-1024", op="sliding", tokens=(16384,), window=(1024,), head_dim=128),
        Case(name="na2d-64-13", op="neighborhood", tokens=(64, 64), window=(13, 13), batch=4),
        Case(name="na2d-56-7", op="neighborhood", tokens=(56, 56), window=(7, 7), batch=16,
             heads=4, head_dim=32),
        Case(name="na2d-56-7-d8", op="neighborhood", tokens=(56, 56), window=(7, 7), batch=16,
             heads=4, head_dim=32, dilation=8),
        Case(name="na3d-5x7x7", op="neighborhood", tokens=(16, 32, 32), window=(5, 7, 7), heads=4),
        Case(name="window-56-7", op="window", tokens=(56, 56), window=(7, 7), batch=16, heads=4,
             head_dim=32, shift=3),
    )
}  # fmt: skip


class Unavailable(Exception):
    """A peer cannot take part; the text says why."""


# ---- contenders: functions of query, key, value with heads last ----------------------------------

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def _attnext(case: Case, device: torch.device) -> Call:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if case.op == "sliding":
            out: Tensor = attnext.sliding_window_attention(q, k, v, case.window[0])
        elif case.op == "window":
            out = attnext.window_attention(q, k, v, case.window, case.shift)
        else:
            out = attnext.neighborhood_attention(q, k, v, case.window, dilation=case.dilation)
        return out

    return call


def _heads_first(x: Tensor) -> Tensor:
    return x.flatten(1, -3).transpose(1, 2)


def _sdpa(case: Case, device: torch.device) -> Call:
    """Dense: every query against every key, the window as a mask made beforehand."""
    mask = dense_mask(case.rules, case.tokens, case.tokens).to(device)
    added = torch.zeros(mask.shape, dtype=getattr(torch, case.dtype), device=device)
    added.masked_fill_(~mask, -math.inf)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = map(_heads_first, (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=added)
        return out.transpose(1, 2).unflatten(1, case.tokens)

    return call


def _flash(case: Case, device: torch.device) -> Call:
    """FlashAttention-2 with its own local window, by the operator under torch's SDPA."""
    if case.op != "sliding":
        raise Unavailable("has windows on one axis only")
    n, window = case.tokens[0], case.window[0]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, n, n, 0.0, True, False, scale=case.head_dim**-0.5,
            window_size_left=window - 1, window_size_right=0,
        )[0]  # fmt: skip
        return out

    return call


def mask_of(case: Case, device: torch.device) -> Callable[..., Tensor]:
    """The mask as FlexAttention asks for it, from the indices of a query and a key."""
    axes = []
    step = math.prod(case.tokens)
    for rule, n in zip(case.rules, case.tokens, strict=True):
        step //= n
        begin, end = torch.tensor(axis_intervals(rule, n, n), device=device).unbind(-1)
        axes.append((step, n, rule.dilation, begin, end))

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        inside = i >= 0
        for step, n, dilation, begin, end in axes:
            x, y = i // step % n, j // step % n
            if dilation > 1:
                inside = inside & (x % dilation == y % dilation)
                y = y // dilation
            inside = inside & (begin[x] <= y) & (y < end[x])
        return inside

    return mask


def _flex(case: Case, device: torch.device) -> Call:
    """Compiled, tokens in raster order."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n = math.prod(case.tokens)
    blocks = create_block_mask(mask_of(case, device), None, None, n, n, device=str(device))
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = compiled(*map(_heads_first, (q, k, v)), block_mask=blocks)
        return out.transpose(1, 2).unflatten(1, case.tokens)

    return call


def _natten(case: Case, device: torch.device) -> Call:
    if case.op == "window":
        raise Unavailable("has no shifted windows")
    try:
        natten = importlib.import_module("natten")
    except ImportError as error:
        raise Unavailable("not installed") from error
    function = getattr(natten, f"na{len(case.tokens)}d")
    options = {"kernel_size": case.window, "dilation": case.dilation}
    if case.op == "sliding":
        options["is_causal"] = True
    return lambda q, k, v: function(q, k, v, **options)


CONTENDERS = {"attnext": _attnext, "SDPA, dense mask": _sdpa, "FlashAttention-2": _flash,
              "FlexAttention": _flex, "NATTEN": _natten}  # fmt: skip


# ---- time ----------------------------------------------------------------------------------------


def _assert_right(case: Case, inputs: list[Tensor], out: Tensor) -> None:
    """A few rows of attnext's result beside float64."""
    q, k, v = (x[0].flatten(0, -3).double().cpu() for x in inputs[:3])
    rows = torch.linspace(0, q.shape[0] - 1, 17).long()
    mask, keys = mask_of(case, torch.device("cpu")), torch.arange(k.shape[0])
    allowed = mask(keys, keys, rows[:, None], keys[None])
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
        for name, make in CONTENDERS.items():
            try:
                step = _step(make(case, device), inputs, mode)
                got = step()
                got = [got] if mode == FORWARD else list(got)
                torch.cuda.synchronize(device)
                if not expected:
                    if mode == FORWARD:
                        _assert_right(case, inputs, got[0])
                    expected = got
                off = max(_distance(x, y) for x, y in zip(got, expected, strict=True))
                if not off <= AGREE:
                    raise Unavailable(f"differs from attnext by {off:.2g} of the largest entry")
                steps[name] = step
            except Exception as error:  # a peer may raise whatever it likes
                if name == "attnext":
                    raise
                torch.cuda.empty_cache()
                kind = "" if isinstance(error, Unavailable) else f"{type(error).__name__}: "
                results[name] = {"missing": kind + str(error).strip().split("\n")[0][:160]}
        results |= _interleave(steps, flush, seconds)
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
