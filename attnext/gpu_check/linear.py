# SPDX-License-Identifier: Apache-2.0
"""``python -m attnext.gpu_check.linear``: linear attention on this machine's GPU, held to the CPU
kernels in float64, and timed beside what its traffic alone would take."""

from __future__ import annotations

import argparse
import fnmatch
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import linear
from ..linear_ops import num_features
from ..reference import linear_features
from .problems import DTYPES, lay_out
from .timing import kernel_milliseconds

# Root mean square, relative: of 16 bits, the rounding of an output and of one operand on the way.
BUDGET = {torch.float32: 2e-6, torch.bfloat16: 2.5e-3, torch.float16: 4e-4}


def slack(dtype: torch.dtype, normalize: bool, beta: bool = False) -> dict[str, float]:
    """What of 16 bits has been rounded more often. Outputs that are read off the state alone, whose
    copy and whose features are rounded. Gradients: features of queries and keys, and the state's
    gradient. That of a normalised query is one of a mean, ``dO . (v - o)`` with the rounded
    ``o``; that of a decay has the rounding of features in it, which beside a normaliser have one
    sign, so that it adds up. Under the delta rule (``beta``) what a token writes has been found
    from a rounded copy of the state, and keys have three parts."""
    if dtype.itemsize > 2:
        return {}
    return {
        "out": 1.25 if beta else 1.1,
        "final_state": 1.25,
        "grad_query": 2.5 if normalize else 1.5,
        "grad_key": 2.0 if beta else 1.5,
        "grad_value": 2.0 if normalize else 1.25,
        "grad_decay": 2.0 if beta else 1.75 if normalize else 1.25,
        "grad_beta": 1.5,
        "grad_initial_state": 1.5,
    }


_call: Any = linear.linear_attention  # options come as a mapping
_step: Any = linear.linear_attention_step


@dataclass(frozen=True, kw_only=True)
class LinearProblem:
    """A call of :func:`attnext.linear_attention` on random numbers. ``heads``: of query, key and
    value. ``decay``: None, "head" or "token". ``beta``: the delta rule. ``steps``: of
    :func:`attnext.linear_attention_step` on the state instead."""

    name: str
    tokens: int
    batch: int = 1
    heads: tuple[int, int, int] = (2, 2, 2)
    head_dim: int = 64
    head_dim_v: int = 64
    decay: str | None = None
    beta: bool = False
    state: bool = True
    steps: bool = False
    ends: tuple[int, ...] = ()
    layout: str = "whole"
    options: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
        """The tensor arguments that have gradients: the same numbers on every device."""
        generator = torch.Generator().manual_seed(sum(map(ord, self.name)))

        def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            return lay_out(x.to(kind).to(device), self.layout)

        rows, most = (self.batch, self.tokens), max(self.heads)
        tensors = {
            name: normal(*rows, heads, dim)
            for name, heads, dim in zip(
                ("query", "key", "value"),
                self.heads,
                (self.head_dim, self.head_dim, self.head_dim_v),
                strict=True,
            )
        }
        if self.decay:
            shape = (most,) if self.decay == "head" else (*rows, most)
            tensors["decay"] = -normal(*shape, kind=torch.float32).abs() / 8
        if self.beta:
            tensors["key"] = torch.nn.functional.normalize(tensors["key"].float(), dim=-1).to(dtype)
            tensors["beta"] = normal(*rows, most, kind=torch.float32).sigmoid()
        if self.state:
            shape = (max(self.batch, len(self.ends) - 1), 40, most)
            tensors["initial_state"] = self._state_of(
                normal(*shape, self.head_dim, kind=torch.float64),
                normal(*shape, self.head_dim_v, kind=torch.float64),
            ).to(device)
        return tensors

    def _state_of(self, key: Tensor, value: Tensor) -> Tensor:
        """What earlier tokens leave: of numbers that are no sums of features a normaliser may come
        out near 0."""
        features = linear_features(key.cpu() / 2, self.options.get("feature_map", "identity"))
        value = value.cpu()
        if self.options.get("normalize"):
            value = torch.cat([value, torch.ones_like(value[..., :1])], -1)
        return torch.einsum("bnhf,bnhd->bhfd", features, value).float()

    def results(
        self, dtype: torch.dtype, device: torch.device | str, wide: bool = False
    ) -> dict[str, Tensor]:
        """Results and gradients; ``wide``: in float64, of the same numbers and cotangents."""
        leaves = {
            name: (x.double() if wide else x).requires_grad_(not self.steps)
            for name, x in self.tensors(dtype, device).items()
        }
        if self.steps:
            state = leaves.pop("initial_state")
            out, last = _step(**leaves, state=state, **self.options, in_place=False)
            return {"out": out.cpu(), "final_state": last.cpu()}
        options = {**self.options, "output_final_state": self.state}
        if self.ends:
            options["cu_seqlens"] = torch.tensor(self.ends, dtype=torch.int32)
        found = _call(**leaves, **options)
        named = dict(zip(("out", "final_state"), found if self.state else (found,), strict=False))
        generator = torch.Generator().manual_seed(1)
        cotangents = [
            torch.randn(x.shape, generator=generator, dtype=torch.float64)
            .to(dtype if name == "out" else torch.float32)
            .to(x.dtype)
            .to(device)
            for name, x in named.items()
        ]
        grads = torch.autograd.grad(list(named.values()), list(leaves.values()), cotangents)
        named |= {f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}
        return {name: x.detach().cpu() for name, x in named.items()}


def _problems() -> list[LinearProblem]:
    elu = {"feature_map": "elu", "normalize": True}
    taylor = {"feature_map": "taylor2", "normalize": True}
    made = [
        LinearProblem(name=f"length-{n}", tokens=n, options=elu, decay="token")
        for n in (1, 63, 64, 65, 129, 1000)
    ]
    for dim, dim_v in ((16, 64), (53, 30), (128, 100), (64, 128), (256, 200)):
        more: dict[str, Any] = {"head_dim": dim, "head_dim_v": dim_v, "tokens": 200}
        made += [
            LinearProblem(name=f"dims-{dim}-{dim_v}", **more),
            LinearProblem(name=f"dims-{dim}-{dim_v}-gated", options=elu, decay="token", **more),
        ]
    ends = (0, 0, 290, 291, 291, 1500)
    return [
        *made,
        LinearProblem(name="many-blocks", tokens=700, batch=20, heads=(16, 16, 16)),
        LinearProblem(name="segments", tokens=4096, decay="head"),
        LinearProblem(name="segments-normalized", tokens=4097, options=elu, decay="token"),
        LinearProblem(name="not-causal", tokens=900, options={**elu, "is_causal": False}),
        LinearProblem(name="reverse", tokens=900, options={"reverse": True}, decay="token"),
        LinearProblem(name="delta", tokens=300, beta=True, heads=(4, 4, 4)),
        LinearProblem(name="delta-gated", tokens=1000, beta=True, decay="token", head_dim_v=100),
        LinearProblem(name="taylor", tokens=1000, head_dim=16, options=taylor),
        LinearProblem(name="taylor-small", tokens=200, head_dim=5, batch=3, options=taylor),
        LinearProblem(
            name="taylor-decayed", tokens=1000, head_dim=16, decay="token", options=taylor
        ),
        LinearProblem(
            name="taylor-decayed-packed",
            tokens=1500,
            ends=ends,
            heads=(4, 2, 1),
            head_dim=16,
            head_dim_v=100,
            decay="token",
            options={"feature_map": "taylor2"},
        ),
        LinearProblem(
            name="taylor-decayed-many", tokens=700, head_dim=33, decay="token", options=taylor
        ),
        LinearProblem(
            name="taylor-decayed-reverse",
            tokens=300,
            head_dim=64,
            head_dim_v=40,
            decay="token",
            options={"feature_map": "taylor2", "reverse": True},
        ),
        LinearProblem(
            name="taylor-not-causal",
            tokens=900,
            head_dim=16,
            options={**taylor, "is_causal": False},
        ),
        LinearProblem(name="delta-packed", tokens=1500, ends=ends, beta=True, decay="token"),
        LinearProblem(name="delta-shared", tokens=200, beta=True, heads=(2, 1, 6), head_dim=128),
        LinearProblem(
            name="delta-wide", tokens=200, beta=True, decay="token", head_dim=256, head_dim_v=130
        ),
        LinearProblem(name="step", tokens=1, batch=33, decay="token", steps=True),
        LinearProblem(name="step-taylor", tokens=3, head_dim=16, options=taylor, steps=True),
        LinearProblem(name="step-taylor-wide", tokens=1, head_dim=64, options=taylor, steps=True),
        LinearProblem(name="step-delta", tokens=10, beta=True, decay="token", steps=True),
        LinearProblem(name="step-delta-wide", tokens=3, beta=True, head_dim=256, steps=True),
        LinearProblem(name="step-wide", tokens=2, head_dim_v=200, options=elu, steps=True),
        LinearProblem(name="relu", tokens=300, options={"feature_map": "relu"}),
        LinearProblem(name="blocks", tokens=300, options={"window_size": 90}, state=False),
        LinearProblem(name="packed", tokens=1500, ends=ends, decay="token", options=elu),
        LinearProblem(
            name="packed-not-causal", tokens=1500, ends=ends, options={**elu, "is_causal": False}
        ),
        LinearProblem(name="shared-keys", tokens=200, heads=(2, 1, 6), decay="token"),
        LinearProblem(name="layout-heads-first", tokens=200, batch=2, layout="heads first"),
        LinearProblem(
            name="layout-cut-out", tokens=200, batch=2, layout="cut out", decay="token", options=elu
        ),
    ]


PROBLEMS: dict[str, LinearProblem] = {problem.name: problem for problem in _problems()}


def error(got: Tensor, exact: Tensor) -> float:
    """Relative, root mean square."""
    size = exact.double().square().mean().sqrt().item()
    return (got.double() - exact.double()).square().mean().sqrt().item() / (size or 1.0)


def compare(problem: LinearProblem, dtype: torch.dtype, results: Mapping[str, Tensor]) -> float:
    """The largest share of the budget that a result uses. Errors: AssertionError."""
    exact = problem.results(dtype, "cpu", wide=True)
    more = slack(dtype, bool(problem.options.get("normalize")), problem.beta)
    most = 0.0
    for name, x in results.items():
        off = error(x, exact[name])
        used = off / BUDGET[dtype] / more.get(name, 1.0)
        assert used <= 1, f"{name}: error {off:.2e} is {used:.2f} of the budget"
        most = max(most, used)
    return most


def check(problem: LinearProblem, dtype: torch.dtype, device: torch.device | str) -> float:
    """As compare; and two runs are equal bit for bit."""
    first, second = (problem.results(dtype, device) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), f"{name}: two runs of the same problem differ"
    return compare(problem, dtype, first)


# ---- timing --------------------------------------------------------------------------------------

CASES: list[
    tuple[int, int, int, int, Mapping[str, Any]]
] = [  # batch, tokens, heads, head_dim, options
    (8, 4096, 16, 64, {}),
    (8, 4096, 16, 64, {"feature_map": "elu", "normalize": True}),
    (8, 4096, 16, 64, {"decay": "token"}),
    (8, 4096, 16, 128, {}),
    (8, 1024, 8, 64, {}),
    (1, 16384, 16, 128, {}),
    (8, 4096, 16, 16, {"feature_map": "taylor2", "normalize": True}),  # values of 64
    (8, 4096, 16, 64, {"decay": "token", "beta": True}),
    (2, 4096, 8, 64, {"feature_map": "taylor2", "normalize": True}),
]
STEPS: list[tuple[int, int, int, Mapping[str, Any]]] = [  # batch, heads, head_dim, options
    (1, 16, 64, {}),
    (128, 16, 64, {}),
    (8, 16, 16, {"feature_map": "taylor2", "normalize": True}),  # values of 64
    (128, 16, 16, {"feature_map": "taylor2", "normalize": True}),
    (128, 32, 128, {"beta": True}),
]


def time_case(
    device: torch.device, batch: int, tokens: int, heads: int, dim: int, given: Mapping[str, Any]
) -> str:
    """Milliseconds of the forward pass and of both, bfloat16: of a call, median of 20, and of its
    kernels alone; the least traffic a second in that time."""
    options = dict(given)
    rows, dim_v = (batch, tokens, heads), max(dim, 64)
    leaves = [
        torch.randn((*rows, d), device=device, dtype=torch.bfloat16).requires_grad_()
        for d in (dim, dim, dim_v)
    ]
    if options.pop("decay", None):
        decay = -torch.rand(batch, tokens, heads, device=device) / 8
        options["decay"] = decay.requires_grad_()
        leaves.append(options["decay"])
    if options.pop("beta", None):
        options["beta"] = torch.rand(batch, tokens, heads, device=device).requires_grad_()
        leaves.append(options["beta"])
        leaves[1] = torch.nn.functional.normalize(leaves[1].detach(), dim=-1).requires_grad_()
    dout = torch.randn((*rows, dim_v), device=device, dtype=torch.bfloat16)

    def forward() -> Any:
        with torch.no_grad():
            return _call(*leaves[:3], **options)

    def both() -> Any:
        return torch.autograd.grad(_call(*leaves[:3], **options), leaves, dout)

    words = [f"B{batch} N{tokens} H{heads} D{dim} {dict(given)}:"]
    bytes_of = batch * tokens * heads * 2  # of one column
    # What each pass must read and write at least.
    traffic = {"forward": 2 * dim + 2 * dim_v, "with gradients": 6 * dim + 5 * dim_v}
    for name, run in (("forward", forward), ("with gradients", both)):
        for _ in range(3):
            run()
        times = []
        for _ in range(20):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        median, kernels = sorted(times)[10], kernel_milliseconds(run)
        rate = traffic[name] * bytes_of / kernels / 1e9
        words.append(f"{name} {median:.3f} ms, kernels {kernels:.3f} ms ({rate:.2f} TB/s)")
    return " ".join(words)


@torch.no_grad()
def time_step(
    device: torch.device, batch: int, heads: int, dim: int, given: Mapping[str, Any]
) -> str:
    """Microseconds of one token in place, bfloat16, median of 50; the state's traffic a second."""
    options = dict(given)
    dim_v = max(dim, 64)
    leaves = [
        torch.randn((batch, 1, heads, d), device=device, dtype=torch.bfloat16)
        for d in (dim, dim, dim_v)
    ]
    if options.pop("beta", None):
        options["beta"] = torch.rand(batch, 1, heads, device=device)
    rows = num_features(options.get("feature_map", "identity"), dim)
    columns = dim_v + bool(options.get("normalize"))
    state = torch.rand(batch, heads, rows, columns, device=device)
    times = []
    for _ in range(53):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        _step(*leaves, state, **options)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    median = sorted(times[3:])[25]
    moved = 2 * state.nbytes / median / 1e9
    return f"step B{batch} H{heads} D{dim} {dict(given)}: {1e3 * median:.1f} us ({moved:.2f} TB/s)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 every check passed, 1 one failed, 2 no GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m attnext.gpu_check.linear",
        description="Holds linear attention on a GPU to float64, and times a few cases.",
    )
    parser.add_argument(
        "--only",
        default="*",
        metavar="PATTERN",
        help="problems to run, as in a shell (default: all)",
    )
    parser.add_argument("--device", type=int, default=0, help="number of the GPU (default: 0)")
    parser.add_argument("--no-timing", action="store_true", help="leaves the timing out")
    options = parser.parse_args(arguments)
    if not fnmatch.filter(PROBLEMS, options.only):
        parser.error(f"--only {options.only!r} is no problem: {', '.join(PROBLEMS)}")
    if not torch.cuda.is_available():
        print(f"{parser.prog}: torch sees no GPU here", file=sys.stderr)
        return 2
    device = torch.device("cuda", options.device)
    failed = 0
    for name in fnmatch.filter(PROBLEMS, options.only):
        for kind, dtype in DTYPES.items():
            try:
                said = f"{check(PROBLEMS[name], dtype, device):.2f} of the budget"
            except Exception as wrong:
                last = traceback.extract_tb(wrong.__traceback__)[-1]
                said = f"FAILED: {type(wrong).__name__}: {wrong} ({last.name}:{last.lineno})"
                failed += 1
            print(f"{name}/{kind}: {said}", flush=True)
    if not options.no_timing:
        for case in CASES:
            print(time_case(device, *case), flush=True)
        for step in STEPS:
            print(time_step(device, *step), flush=True)
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
