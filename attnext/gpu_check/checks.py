# SPDX-License-Identifier: Apache-2.0
"""What is asked of a problem, and of the way in which kernels are launched."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import attnext
from attnext.testing import assert_within_budget, evaluate

from .names import PROBLEMS
from .problems import DTYPES, Problem


def on_device(
    problem: Problem, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """Results and gradients of a problem, computed on a device and brought to the CPU."""
    results = evaluate(
        problem.function,
        problem.tensors(dtype, device),
        problem.options,
        problem.cotangents(dtype, device),
    )
    return {name: x.cpu() for name, x in results.items()}


def compare(
    problem: Problem, dtype: torch.dtype, results: list[dict[str, Tensor]]
) -> dict[str, float]:
    """Hold results to the error budget; the largest share of it that each has used."""
    return assert_within_budget(
        results,
        problem.specification,
        problem.tensors(dtype, "cpu"),
        problem.options,
        problem.cotangents(dtype, "cpu"),
    )


def check_problem(
    problem: Problem, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Any]:
    """Errors: AssertionError, or whatever the device raises.

    Numerics: every entry within the error budget, two runs equal bit for bit. The CPU kernels'
        result is held to the same budget, and the largest difference from it is told.
    """
    first, second = (on_device(problem, dtype, device) for _ in range(2))
    on_cpu = on_device(problem, dtype, "cpu")
    used = compare(problem, dtype, [first])
    compare(problem, dtype, [on_cpu])
    for name, x in first.items():
        same = torch.equal(x.nan_to_num(), second[name].nan_to_num())
        assert same, f"{name}: two runs of the same problem differ"
    differences = [
        float((x.double() - on_cpu[name].double()).nan_to_num().abs().max())
        for name, x in first.items()
        if x.numel()
    ]
    return {"used": used, "from_cpu": max(differences, default=0.0)}


# ---- how kernels are launched --------------------------------------------------------------------


def _sample(device: torch.device, tokens: int = 200) -> list[Tensor]:
    problem = PROBLEMS["dim-64"]
    tensors = problem.tensors(torch.bfloat16, device)
    return [x.repeat(1, -(-tokens // x.shape[1]), 1, 1)[:, :tokens] for x in tensors.values()]


def _call(*tensors: Tensor, window: int = 20, **options: Any) -> Any:
    function: Any = attnext.sliding_window_attention
    return function(*tensors, window, **options)


def graph_capture(device: torch.device) -> None:
    """A captured forward pass, replayed on other numbers."""
    q, k, v = _sample(device)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        _call(q, k, v)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = _call(q, k, v)
    for _ in range(2):
        q.copy_(q.flip(1))
        graph.replay()
        assert torch.equal(out, _call(q, k, v)), "a replayed graph gives another result"


def graph_capture_of_training(device: torch.device) -> None:
    """A captured forward and backward pass."""
    leaves = [x.requires_grad_() for x in _sample(device)]

    def step() -> tuple[Tensor, ...]:
        out = _call(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = step()
    graph.replay()
    for got, expected in zip(grads, step(), strict=True):
        assert torch.equal(got, expected), "a replayed graph gives another gradient"


def graph_capture_without_warm_up(device: torch.device) -> None:
    """It is refused, in words that say what to do."""
    q, k, v = _sample(device, tokens=173)  # a length that nothing else has
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            _call(q, k, v, window=23)
    except RuntimeError as error:
        assert "warm up" in str(error), f"another error: {error}"
        return
    raise AssertionError("no error")


def side_stream(device: torch.device) -> None:
    """Kernels wait for the stream on which they are called, and for no other."""
    q, k, v = _sample(device)
    expected = _call(q, k, v)
    late = torch.zeros_like(q)
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # clock cycles, some 30 ms
        late.copy_(q)
        out = _call(late, k, v)
    stream.synchronize()
    assert torch.equal(out, expected), "the result on a side stream differs"


def other_device(device: torch.device) -> None:
    """Tensors on a GPU that is not the current one (with one GPU: nothing to see)."""
    for index in range(torch.cuda.device_count()):
        if index == device.index:
            continue
        expected = _call(*_sample(device))
        out = _call(*_sample(torch.device("cuda", index)))
        assert torch.cuda.current_device() == device.index, "the current device has changed"
        major = [torch.cuda.get_device_capability(i)[0] for i in (index, device.index)]
        if major[0] == major[1]:
            assert torch.equal(out.cpu(), expected.cpu()), f"another result on device {index}"
        return


def packed_on_either_side(device: torch.device) -> None:
    """``cu_seqlens`` on the CPU and on the GPU."""
    tensors = [x[:1] for x in _sample(device)]
    ends = torch.tensor([0, 50, 200], dtype=torch.int32)
    one, other = (_call(*tensors, cu_seqlens_q=x) for x in (ends, ends.to(device)))
    assert torch.equal(one, other), "they give different results"


def autocast(device: torch.device) -> None:
    """float32 inputs under autocast give what bfloat16 inputs give."""
    tensors = _sample(device)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = _call(*(x.float() for x in tensors))
    assert out.dtype == torch.bfloat16 and torch.equal(out, _call(*tensors))


def compiled(device: torch.device) -> None:
    """``torch.compile`` in one graph, forward and backward (without the code generator)."""
    leaves = [x.requires_grad_() for x in _sample(device)]
    whole = torch.compile(_call, fullgraph=True, backend="aot_eager")
    results = []
    for function in (whole, _call):
        out = function(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected), "the compiled call gives another result"


def vmapped(device: torch.device) -> None:
    """``torch.vmap`` over a dimension that is no batch."""
    q, k, v = _sample(device)
    out = torch.vmap(_call)(*(torch.stack([x, x.flip(1)]) for x in (q, k, v)))
    assert torch.equal(out[1], _call(*(x.flip(1) for x in (q, k, v))))


def offsets_beyond_32_bits(device: torch.device) -> None:
    """Rows so far apart that elements are numbered beyond 2^31 (takes 4.3 GB of the GPU)."""
    tensors = [x[:1] for x in _sample(device)]
    _, tokens, heads, dim = tensors[0].shape
    row = heads * dim
    gap = -(-(2**31) // ((tokens - 1) * row)) * row
    whole = torch.empty((tokens - 1) * gap + 3 * row, dtype=torch.bfloat16, device=device)
    results = []
    for far in (True, False):
        leaves = tensors
        if far:
            leaves = [
                whole.as_strided(x.shape, (gap, gap, dim, 1), i * row).copy_(x)
                for i, x in enumerate(tensors)
            ]
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = _call(*leaves)
        results.append((out, *torch.autograd.grad(out.sum(), leaves)))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected), "rows far apart give another result"


def many_heads(device: torch.device) -> None:
    """More heads than a grid's second axis may have blocks: 70,000."""
    q, k, v = (x[:1, :33, :1].expand(70_000, -1, -1, -1) for x in _sample(device))
    out = _call(q, k, v)
    assert torch.equal(out[-1:], _call(q[:1], k[:1], v[:1])), "the last head differs"


LAUNCHES: dict[str, Callable[[torch.device], None]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        graph_capture,
        graph_capture_of_training,
        graph_capture_without_warm_up,
        side_stream,
        other_device,
        packed_on_either_side,
        offsets_beyond_32_bits,
        many_heads,
        autocast,
        compiled,
        vmapped,
    )
}


# ---- one check by its name -----------------------------------------------------------------------


def run_check(name: str, device: str) -> dict[str, Any]:
    """The record of one check: ``problem/dtype``, or one of ``LAUNCHES``. Raises nothing.

    ``fatal``: the device is of no more use to this process.
    """
    record: dict[str, Any] = {"name": name, "passed": False, "fatal": False}
    start = time.perf_counter()
    where = torch.device(device)
    try:
        if where.type == "cuda":
            torch.cuda.set_device(where)
        if name in LAUNCHES:
            LAUNCHES[name](where)
        else:
            problem, _, dtype = name.rpartition("/")
            record.update(check_problem(PROBLEMS[problem], DTYPES[dtype], where))
        record["passed"] = True
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        record["error"] = f"{type(error).__name__}: {error} ({last.name}:{last.lineno})"
    if where.type == "cuda":
        try:
            torch.cuda.synchronize(where)
        except RuntimeError as error:
            record.setdefault("error", f"{type(error).__name__}: {error}")
            record.update(passed=False, fatal=True)
    record["seconds"] = round(time.perf_counter() - start, 3)
    return record
