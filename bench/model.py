# SPDX-License-Identifier: Apache-2.0
"""The least time that window attention can take on a GPU, resource by resource, on paper.

Each floor assumes that its resource is never idle and that all others are free; the largest one
binds. Nothing here has run: whatever is printed says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

LABEL = "modelled, never run on a GPU"
STEP = 64  # keys a step of the main loop
FRAGMENT = 16  # rows of a tensor instruction
WARP = 32
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Gpu:
    """Rates per SM and clock, but for the last two."""

    name: str
    multiprocessors: int
    clock: float  # Hz
    issue: float  # warp instructions
    tensor: dict[str, float]  # fused multiply-adds, by dtype
    fp32: float  # lanes of FFMA, FMUL, FADD
    special: float  # lanes of MUFU
    shared: float  # bytes
    l2: float  # bytes a clock, whole GPU
    dram: float  # bytes a second, whole GPU


# Whitepaper: "NVIDIA A100 Tensor Core GPU Architecture": 108 SMs, 1410 MHz, four schedulers an SM,
# 1024 FMA of 16 bits and 512 of TF32 a clock and SM, 5120 bytes a clock from L2, 1555 GB/s (40 GB).
# CUDA C++ Programming Guide, "Arithmetic Instructions", compute capability 8.0: 64 lanes of 32-bit
# floating point and 16 of exp2 a clock; "Shared Memory": 32 banks of 4 bytes a clock.
A100 = Gpu(
    name="A100 SXM4 40 GB (sm_80)", multiprocessors=108, clock=1.41e9, issue=4,
    tensor={"bfloat16": 1024, "float16": 1024, "float32": 512},
    fp32=64, special=16, shared=128, l2=5120, dram=1555e9,
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """`heads` heads of a sequence, batch included; a query attends `window` keys, itself among
    them; tiles of `rows` queries, `warp_rows` a warp."""

    length: int
    window: int
    head_dim: int
    dtype: str = "bfloat16"
    rows: int = 64
    warp_rows: int = 16
    heads: int = 1

    @property
    def tiles(self) -> int:
        return ceil(self.length / self.rows) * self.heads

    @property
    def flops(self) -> float:
        """In the window, two products."""
        return 4.0 * self.length * self.heads * min(self.window, self.length) * self.head_dim


@dataclass(frozen=True)
class Work:
    """What one tile takes, or all of them: warp instructions, and bytes."""

    full: float  # tensor instructions of steps without a mask
    edge: float  # and of those with one
    issue: float  # all instructions
    fma: float  # fused multiply-adds in the tensor instructions
    fp32: float
    special: float
    shared: float
    l2: float
    dram: float

    def times(self, n: float) -> Work:
        return Work(*(getattr(self, name) * n for name in self.__dataclass_fields__))


def forward(problem: Problem, full_ratio: float = 0.0, edge_ratio: float = 0.0) -> Work:
    """One tile in the middle of the sequence, forward.

    Args: full_ratio, edge_ratio are instructions per tensor instruction of the main loop, as
        ``bench static`` counts them; without them, only what the arithmetic itself needs is issued.
    """
    size = SIZES[problem.dtype]
    depth = 8 if problem.dtype == "float32" else 16  # of one m16n8 product
    dim = _up(problem.head_dim, 16)
    union = min(problem.window + problem.rows - 1, problem.length)
    keys = _up(union, 16)  # 64 a step, a short last one
    # Rows begin and end one key further each, so all of them attend [rows - 1, window).
    full_keys = max(0, problem.window // STEP - ceil((problem.rows - 1) / STEP)) * STEP
    full_keys = min(full_keys, keys)
    warps = ceil(problem.rows / problem.warp_rows)  # each reads all keys and values of the tile
    rows = warps * _up(problem.warp_rows, FRAGMENT)

    per_key = 2 * rows / FRAGMENT * dim / depth / 8  # two products, eight keys or columns wide
    full, edge = per_key * full_keys, per_key * (keys - full_keys)
    scores = rows * keys / WARP  # one a lane
    fp32, special = 2 * scores, scores  # scale and shift, add up; exp2
    tile = 2 * keys * dim * size  # keys and values
    loads = warps * tile / (WARP * 16)  # ldmatrix of four matrices: 16 bytes a lane
    least = full + edge + loads + fp32 + special + scores  # and the maximum
    issue = full * full_ratio + edge * edge_ratio if full_ratio and edge_ratio else least
    own = 2 * problem.rows * dim * size  # queries and output
    return Work(
        full=full, edge=edge, issue=issue, fma=(full + edge) * 16 * 8 * depth, fp32=fp32,
        special=special, shared=tile * (1 + warps), l2=tile + own,
        # The keys of neighbouring tiles overlap: from DRAM each comes once.
        dram=4 * problem.length * problem.heads * problem.head_dim * size / problem.tiles,
    )  # fmt: skip


def floors(work: Work, dtype: str, gpu: Gpu = A100) -> dict[str, float]:
    """Seconds by resource, at best, for work on the whole GPU."""
    clocks = gpu.multiprocessors * gpu.clock
    return {
        "issue slots": work.issue / (gpu.issue * clocks),
        "tensor pipe": work.fma / (gpu.tensor[dtype] * clocks),
        "fp32 pipe": work.fp32 * WARP / (gpu.fp32 * clocks),
        "special functions": work.special * WARP / (gpu.special * clocks),
        "shared memory": work.shared / (gpu.shared * clocks),
        "L2": work.l2 / (gpu.l2 * gpu.clock),
        "DRAM": work.dram / gpu.dram,
    }


def report(
    problem: Problem, full_ratio: float = 0.0, edge_ratio: float = 0.0, gpu: Gpu = A100
) -> Iterator[str]:
    """Lines to print; every block carries the label."""
    tile = forward(problem, full_ratio, edge_ratio)
    seconds = floors(tile.times(problem.tiles), problem.dtype, gpu)
    binding = max(seconds, key=lambda name: seconds[name])
    yield (
        f"{LABEL}: window forward on {gpu.name}, length {problem.length}, window "
        f"{problem.window}, head_dim {problem.head_dim}, {problem.dtype}, {problem.heads} heads, "
        f"tiles of {problem.rows} rows, {problem.warp_rows} a warp"
    )
    counted = full_ratio and edge_ratio
    ratios = f"{full_ratio:.2f} in full steps, {edge_ratio:.2f} in edge steps"
    yield (
        f"{LABEL}: {problem.tiles} tiles, each of {tile.full:.0f} HMMA in full steps and "
        f"{tile.edge:.0f} in edge steps; instructions per HMMA "
        + (ratios if counted else "not counted: issue slots of the arithmetic alone")
    )
    yield ""
    yield f"| floor ({LABEL}) | µs | of the binding one |"
    yield "| --- | ---: | ---: |"
    for name, value in seconds.items():
        share = value / seconds[binding]
        yield f"| {name}{' (binds)' if name == binding else ''} | {value * 1e6:.1f} | {share:.0%} |"
    yield ""
    yield (
        f"{LABEL}: at the floor {problem.flops / seconds[binding] / 1e12:.0f} TFLOP/s in the "
        "window; a kernel reaches less, as loads, barriers and the last wave do not overlap in full"
    )


def _up(n: int, unit: int) -> int:
    return ceil(n / unit) * unit
