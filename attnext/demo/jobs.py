# SPDX-License-Identifier: Apache-2.0
"""The jobs: an operator on a real input, torch's way of doing it, and the oracle's verdict."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import attnext
from attnext import reference
from attnext.demo import peers
from attnext.demo.checks import Box, Check, boxes, compare
from attnext.demo.data import Inputs

WINDOW, KERNEL, SMALL_KERNEL, DILATION = 8, 13, 7, 4
TEXT_WINDOW, SINKS, DECODE_STEPS = 512, 4, 32
REGION, REGIONS = 8, 4  # tokens of a region on each axis, and how many a region attends
CLIP_KERNEL, CLIP_CAUSAL = (3, 7, 7), (True, False, False)

Run = Callable[[], Any]


@dataclass(frozen=True)
class Job:
    """One row of the table."""

    title: str
    call: str  # what a user would write
    tokens: str
    keys: float  # keys a query attends, on average
    peer: str  # torch's way, in words
    run: Run
    rival: Run
    check: Callable[[Any, Any], Check]  # of the outputs of run and rival


@dataclass(frozen=True)
class Result:
    """What became of a job: medians in milliseconds."""

    job: Job
    output: Any
    check: Check
    milliseconds: float
    rival_milliseconds: float
    repeats: int


def relative_bias(heads: int = 4, window: int = WINDOW) -> Tensor:
    """A bias ``[H, 2w-1, 2w-1]`` that falls with the distance, faster from head to head."""
    step = torch.arange(1 - window, window).float()
    distance = torch.hypot(step[:, None], step[None, :])
    return -torch.arange(1, heads + 1)[:, None, None] * 0.15 * distance


def _neighborhood_check(
    data: Inputs, kernel: Any, bias: Tensor | None = None, **rule: Any
) -> Callable[[Tensor, Tensor], Check]:
    """Boxes of rows of a neighborhood call; `rule` as in ``attnext.neighborhood_attention``."""

    def oracle(box: Box, inputs: Inputs, dtype: torch.dtype) -> Tensor:
        out = reference.neighborhood_attention(
            box.of(inputs.query),
            inputs.key,
            inputs.value,
            kernel,
            offset=box.start,
            bias=bias,
            dtype=dtype,
            **rule,
        )
        assert isinstance(out, Tensor)
        return out

    return lambda out, other: compare([(out, other, oracle)], data, boxes(data.extents))


def _dense_mask(data: Inputs, kernel: tuple[int, ...], dilation: int, causal: Any) -> Tensor:
    """Torch's mask for a neighborhood call, ``[N, N]``, in the inputs' dtype."""
    rank = len(kernel)
    causal = causal if isinstance(causal, tuple) else (causal,) * rank
    axes = [
        reference.Axis(k - 1 if c else k // 2, 0 if c else k - 1 - k // 2, 1, 0, dilation, c)
        for k, c in zip(kernel, causal, strict=True)
    ]
    mask = reference.dense_mask(axes, data.extents, data.extents)
    return peers.additive(mask, data.query.dtype)


def _neighborhood(
    title: str, data: Inputs, kernel: tuple[int, ...], dilation: int = 1, causal: Any = False
) -> Job:
    op = attnext.na2d if len(kernel) == 2 else attnext.na3d
    mask = _dense_mask(data, kernel, dilation, causal)
    size = kernel[0] if len(set(kernel)) == 1 else kernel
    options = f", dilation={dilation}" * (dilation > 1) + f", is_causal={causal}" * bool(causal)
    return Job(
        title=title,
        call=f"{op.__name__}(q, k, v, {size}{options})",
        tokens=" × ".join(map(str, data.extents)),
        keys=(mask == 0).sum(-1).float().mean().item(),
        peer="dense + mask",
        run=lambda: op(data.query, data.key, data.value, kernel, 1, dilation, causal),
        rival=lambda: peers.dense(data.query, data.key, data.value, mask),
        check=_neighborhood_check(data, kernel, dilation=dilation, is_causal=causal),
    )


def neighborhood(data: Inputs) -> Job:
    """Every patch attends the 13 x 13 patches around it."""
    return _neighborhood("2-D neighborhood", data, (KERNEL, KERNEL))


def dilated(data: Inputs) -> Job:
    """49 keys spread over 25 x 25 patches."""
    return _neighborhood("2-D, dilated", data, (SMALL_KERNEL, SMALL_KERNEL), DILATION)


def causal(data: Inputs) -> Job:
    """Only patches above and to the left."""
    return _neighborhood("2-D, causal", data, (KERNEL, KERNEL), causal=True)


def bfloat16(data: Inputs) -> Job:
    """The first job at half the bytes."""
    half = Inputs(*(t.bfloat16() for t in (data.query, data.key, data.value)))
    return _neighborhood("2-D, bfloat16", half, (KERNEL, KERNEL))


def clip(data: Inputs) -> Job:
    """Space around, time backwards."""
    return _neighborhood("3-D clip", data, CLIP_KERNEL, causal=CLIP_CAUSAL)


def shifted_windows(data: Inputs) -> Job:
    """Swin's shifted windows with a relative bias, the grid not a multiple of the window."""
    shift = WINDOW // 2
    bias = relative_bias()
    rows, columns = data.extents
    tiles = peers.Tiles((rows, columns), WINDOW, shift, bias)
    counts = [
        torch.bincount((torch.arange(n) - shift).div(WINDOW, rounding_mode="floor") + 1)
        for n in data.extents
    ]
    squares = [(c.float() ** 2).sum().item() for c in counts]
    return Job(
        title="shifted windows",
        call=f"window_attention(q, k, v, {WINDOW}, shift={shift}, bias=bias)",
        tokens=" × ".join(map(str, data.extents)),
        keys=squares[0] * squares[1] / (rows * columns),
        peer="tiles + mask",
        run=lambda: attnext.window_attention(
            data.query, data.key, data.value, WINDOW, shift, bias=bias
        ),
        rival=lambda: tiles(data.query, data.key, data.value),
        check=_neighborhood_check(
            data, WINDOW, bias, stride=WINDOW, phase=shift, boundary="truncate"
        ),
    )


def routed_mask(data: Inputs) -> Tensor:
    """Who attends whom under bi-level routing, bool ``[N, N]``; the list is the router's own."""
    _, plan = attnext.bilevel_routing_attention(
        data.query, data.key, data.value, REGION, REGIONS, return_plan=True
    )
    blocks = plan.query_blocks
    assert blocks.order is not None
    region = torch.empty(blocks.num_tokens, dtype=torch.long)
    region[blocks.order.long()] = torch.arange(blocks.num_blocks).repeat_interleave(
        blocks.counts.long()
    )
    chosen = torch.zeros(blocks.num_blocks, blocks.num_blocks, dtype=torch.bool)
    chosen.scatter_(1, plan.lists[0, 0].long(), True)
    return chosen[region][:, region]


def routed_regions(data: Inputs) -> Job:
    """BiFormer's two levels: each region attends the few regions that look most like it."""
    seen = routed_mask(data)
    mask = peers.additive(seen, data.query.dtype)

    def oracle(box: Box, inputs: Inputs, dtype: torch.dtype) -> Tensor:
        rows = box.of(seen.unflatten(0, data.extents)[None]).flatten(0, -2)
        query, key, value = (
            t.flatten(1, -3) for t in (box.of(inputs.query), inputs.key, inputs.value)
        )
        out = reference.attention(query, key, value, rows, dtype=dtype)
        assert isinstance(out, Tensor)
        return out

    return Job(
        title="routed regions",
        call=f"bilevel_routing_attention(q, k, v, {REGION}, {REGIONS})",
        tokens=" × ".join(map(str, data.extents)),
        keys=seen.sum(-1).float().mean().item(),
        peer="dense + mask",
        run=lambda: attnext.bilevel_routing_attention(
            data.query, data.key, data.value, REGION, REGIONS
        ),
        rival=lambda: peers.dense(data.query, data.key, data.value, mask),
        check=lambda out, other: compare([(out, other, oracle)], data, boxes(data.extents)),
    )


def _text_check(data: Inputs, first: int, starts: list[int]) -> Callable[[Tensor, Tensor], Check]:
    """Rows of a causal call whose outputs begin at query `first`.

    Keys after a row change nothing, so they are left out.
    """

    def oracle(box: Box, inputs: Inputs, dtype: torch.dtype) -> Tensor:
        start = box.start[0] + first
        end = start + box.size[0]
        out = reference.sliding_window_attention(
            inputs.query[:, start:end],
            inputs.key[:, :end],
            inputs.value[:, :end],
            TEXT_WINDOW,
            sinks=SINKS,
            dtype=dtype,
        )
        assert isinstance(out, Tensor)
        return out

    chosen = [Box((start,), (16,)) for start in starts]
    return lambda out, other: compare([(out, other, oracle)], data, chosen)


def sliding_window(data: Inputs) -> Job:
    """A text read left to right: 512 bytes back, and the first four bytes always."""
    length = data.query.shape[1]
    window = min(TEXT_WINDOW, length)
    bands = peers.Bands(length, window, SINKS)
    return Job(
        title="sliding window, sinks, GQA",
        call=f"sliding_window_attention(q, k, v, {window}, sinks={SINKS})",
        tokens=str(length),
        keys=(bands.mask == 0).sum().item() / length,
        peer="bands + mask",
        run=lambda: attnext.sliding_window_attention(
            data.query, data.key, data.value, window, sinks=SINKS
        ),
        rival=lambda: bands(data.query, data.key, data.value),
        check=_text_check(data, 0, [0, window - 8, length // 2, length - 16]),
    )


def decode(data: Inputs) -> Job:
    """32 steps of one query each, against a cache that grows."""
    length = data.query.shape[1]
    window = min(TEXT_WINDOW, length)
    ends = range(length - DECODE_STEPS + 1, length + 1)

    def steps(step: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        outs = [step(data.query[:, n - 1 : n], data.key[:, :n], data.value[:, :n]) for n in ends]
        return torch.cat(outs, 1)

    return Job(
        title=f"decode, {DECODE_STEPS} steps",
        call=f"sliding_window_attention(q[:, -1:], k, v, {window}, sinks={SINKS})",
        tokens=f"1 of {length}",
        keys=float(min(window + SINKS, length)),
        peer="sliced cache",
        run=lambda: steps(
            lambda q, k, v: attnext.sliding_window_attention(q, k, v, window, sinks=SINKS)
        ),
        rival=lambda: steps(lambda q, k, v: peers.decode_step(q, k, v, window, SINKS)),
        check=_text_check(data, length - DECODE_STEPS, [0, 16]),
    )


def training_step(data: Inputs) -> Job:
    """Forward and backward: outputs and all three gradients."""
    kernel = (KERNEL, KERNEL)
    mask = _dense_mask(data, kernel, 1, False)
    toward = torch.randn(data.value.shape, generator=torch.Generator().manual_seed(3))

    def step(forward: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (data.query, data.key, data.value)]
        out = forward(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, toward))

    return Job(
        title="2-D, forward + backward",
        call=f"na2d(q, k, v, {KERNEL}).backward(grad)",
        tokens=" × ".join(map(str, data.extents)),
        keys=(mask == 0).sum(-1).float().mean().item(),
        peer="dense + mask",
        run=lambda: step(lambda q, k, v: attnext.na2d(q, k, v, KERNEL)),
        rival=lambda: step(lambda q, k, v: peers.dense(q, k, v, mask)),
        check=_gradient_check(data, toward),
    )


def _gradient_check(data: Inputs, toward: Tensor) -> Callable[[Any, Any], Check]:
    """Gradients at a corner and in the middle; a key's gradient needs all queries that see it."""
    chosen = boxes(data.extents)
    chosen = [chosen[0], chosen[len(chosen) // 2]]

    @functools.cache
    def oracles(box: Box, inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
        start = tuple(max(a - KERNEL, 0) for a in box.start)
        end = [
            min(a + s + KERNEL, n)
            for a, s, n in zip(box.start, box.size, data.extents, strict=True)
        ]
        around = Box(start, tuple(e - a for a, e in zip(start, end, strict=True)))
        query = around.of(inputs.query)
        q, k, v = (t.detach().to(dtype).requires_grad_() for t in (query, inputs.key, inputs.value))
        out = reference.neighborhood_attention(q, k, v, KERNEL, offset=start, dtype=dtype)
        inner = Box(tuple(a - b for a, b in zip(box.start, start, strict=True)), box.size)
        grads = torch.autograd.grad(out, (q, k, v), around.of(toward).to(dtype))
        inside = [inner.of(out.detach()), inner.of(grads[0]), box.of(grads[1]), box.of(grads[2])]
        return [part.clone() for part in inside]

    def oracle(which: int, box: Box, inputs: Inputs, dtype: torch.dtype) -> Tensor:
        return oracles(box, inputs, dtype)[which]

    def check(outs: Any, others: Any) -> Check:
        wanted = [functools.partial(oracle, which) for which in range(len(outs))]
        found = compare(list(zip(outs, others, wanted, strict=True)), data, chosen)
        oracles.cache_clear()
        return found

    return check


def all_jobs(image: Inputs, film: Inputs, text: Inputs) -> Iterator[Callable[[], Job]]:
    """The table's rows; each is built when its turn comes, so that one mask lives at a time."""
    for make in (
        neighborhood,
        dilated,
        causal,
        bfloat16,
        shifted_windows,
        routed_regions,
        training_step,
    ):
        yield functools.partial(make, image)
    yield functools.partial(clip, film)
    for make in (sliding_window, decode):
        yield functools.partial(make, text)


def perform(job: Job, seconds: float) -> Result:
    """Runs a job and its rival in turn for about `seconds`, then checks the first output."""
    output, other = job.run(), job.rival()
    ours: list[float] = []
    theirs: list[float] = []
    stop = time.perf_counter() + seconds
    while len(ours) < 3 or (time.perf_counter() < stop and len(ours) < 50):
        for run, times in ((job.run, ours), (job.rival, theirs)):
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
    return Result(
        job,
        output,
        job.check(output, other),
        statistics.median(ours) * 1e3,
        statistics.median(theirs) * 1e3,
        len(ours),
    )
