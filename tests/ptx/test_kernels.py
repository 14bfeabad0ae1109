# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled by nvcc, run whole: results against float64, and bugs planted in the source."""

from __future__ import annotations

import functools
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from . import mutate
from .compile import compile_ptx
from .executor import Parameter, Program, Report, load
from .memory import Buffer, Memory
from .words import Array

SOURCE = Path(__file__).parent / "kernels" / "samples.cu"
GEMM_SHARED = 2 * 2 * 64 * 32 * 2  # stages, operands, tile, bytes


@functools.lru_cache(maxsize=4)
def program(*defines: str, arch: str = "sm_80") -> Program:
    flags = ("-O3", "-std=c++17", *(f"-D{d}" for d in defines))
    return load(compile_ptx(SOURCE, flags=flags, arch=arch))


@pytest.mark.parametrize("n", [1, 127, 128, 129, 1000])
def test_vector_add_has_a_tail(n: int) -> None:
    rng = np.random.default_rng(n)
    x, y = rng.standard_normal((2, n)).astype(np.float32)
    memory = Memory()
    out = memory.allocate("out", 4 * n)
    params: list[Parameter] = [memory.buffer("x", x), memory.buffer("y", y), out]
    report = program().launch("vector_add", -(-n // 128), 128, [*params, n], memory=memory)
    np.testing.assert_array_equal(report.check() and out.array(np.float32), x + y)
    assert report.coverage() == 1.0 or n == 128  # where no thread leaves early
    # One element too many is outside all three buffers.
    report = program().launch("vector_add", -(-n // 128) + 1, 128, [*params, n + 1], memory=memory)
    assert report.kinds() == {"global read out of bounds", "global write out of bounds"}


@pytest.mark.parametrize(("n", "threads"), [(1, 32), (1000, 128), (5000, 256)])
def test_block_sum(n: int, threads: int) -> None:
    x = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    memory = Memory()
    partial = memory.allocate("partial", 4 * 3)
    params: list[Parameter] = [memory.buffer("x", x), partial, n]
    program().launch("block_sum", 3, threads, params, memory=memory).check()
    got = partial.array(np.float32).astype(np.float64).sum()
    np.testing.assert_allclose(got, x.astype(np.float64).sum(), atol=1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(5, 1), (7, 33), (4, 200)])
def test_softmax_rows(rows: int, columns: int) -> None:
    x = (np.random.default_rng(columns).standard_normal((rows, columns)) * 30).astype(np.float32)
    memory = Memory()
    out = memory.allocate("out", x.nbytes)
    params: list[Parameter] = [memory.buffer("x", x), out, rows, columns]
    program().launch("softmax_rows", -(-rows // 4), 128, params, memory=memory).check()
    want = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
    want /= want.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(out.array(np.float32, x.shape), want, atol=3e-6)


def bf16(values: Array) -> tuple[Array, Array]:
    """(bits, the values they stand for)."""
    rounded = torch.tensor(values).bfloat16()
    return rounded.view(torch.uint16).numpy(), rounded.double().numpy()


def gemm(
    m: int,
    n: int,
    k: int,
    *defines: str,
    arch: str = "sm_80",
    candidate: Program | None = None,
) -> tuple[Report, Buffer, Array]:
    """(report, out, what out should be). Rows of B are as long as its tile grid."""
    rng = np.random.default_rng(m + n + k)
    (a_bits, a), (b_bits, b) = bf16(rng.standard_normal((m, k))), bf16(rng.standard_normal((k, n)))
    memory = Memory()
    out = memory.allocate("out", 4 * m * n)
    params: list[Parameter] = [memory.buffer("a", a_bits), memory.buffer("b", b_bits), out, m, n, k]
    grid = (-(-n // 64), -(-m // 64))
    ready = candidate or program(*defines, arch=arch)
    return (
        ready.launch("gemm", grid, 128, params, GEMM_SHARED, memory),
        out,
        np.einsum("ik,kj->ij", a, b),
    )


def close(out: Buffer, want: Array) -> bool:
    return np.allclose(out.array(np.float32, want.shape), want, atol=1e-4)


@pytest.mark.parametrize("shape", [(64, 64, 32), (64, 64, 128), (100, 96, 64), (130, 200, 96)])
def test_gemm(shape: tuple[int, int, int]) -> None:
    report, out, want = gemm(*shape)
    report.check()
    assert close(out, want)
    assert report.conflicts_over_ideal() == 1.0
    assert report.instructions()["mma"] == -(-shape[0] // 64) * -(-shape[1] // 64) * (
        4 * 8 * shape[2] // 16
    )


@pytest.mark.parametrize("arch", ["sm_86", "sm_90", "sm_120"])
def test_gemm_for_other_architectures(arch: str) -> None:
    report, out, want = gemm(100, 64, 64, arch=arch)
    report.check()
    assert close(out, want)


# Each planted bug with what must be said about it; "result" where only the numbers can tell.
BUGS = {
    "BUG_NO_WAIT": "cp.async read before its wait",
    "BUG_WAIT_TOO_FEW": "cp.async read before its wait",
    "BUG_NO_BARRIER_AFTER_WAIT": "read-write race",
    "BUG_NO_BARRIER_BEFORE_COPY": "write-read race",
    "BUG_WRONG_STAGE": "cp.async read before its wait",
    "BUG_LOST_PREDICATE": "global read out of bounds",
    "BUG_TAIL": "global write out of bounds",
    "BUG_FRAGMENT_ORDER": "result",
    "BUG_NO_SWIZZLE": "conflicts",
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs(bug: str) -> None:
    report, out, want = gemm(100, 96, 128, bug)
    symptom = BUGS[bug]
    if symptom == "result":
        assert not report.findings and not close(out, want)
    elif symptom == "conflicts":
        assert not report.findings and close(out, want)
        assert report.conflicts_over_ideal() > 1.5
    else:
        assert symptom in report.kinds(), [str(f) for f in report.findings]


def test_results_do_not_depend_on_how_many_blocks_run_together() -> None:
    _, out, want = gemm(130, 128, 64)
    first = out.array(np.float32, want.shape)
    memory = Memory()
    rng = np.random.default_rng(130 + 128 + 64)
    a, b = bf16(rng.standard_normal((130, 64)))[0], bf16(rng.standard_normal((64, 128)))[0]
    alone = memory.allocate("out", out.size)
    params: list[Parameter] = [memory.buffer("a", a), memory.buffer("b", b), alone, 130, 128, 64]
    report = (
        program().launch("gemm", (2, 3), 128, params, GEMM_SHARED, memory, blocks_at_once=1).check()
    )
    assert report.blocks_at_once == 1
    np.testing.assert_array_equal(alone.array(np.float32, want.shape), first)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (16, 16), (17, 40), (50, 33)])
def test_attention(n: int, m: int) -> None:
    """Parameters come as one struct in bytes; rows and keys end where they like."""
    rng = np.random.default_rng(n * m)
    (q_bits, q), (k_bits, k), (v_bits, v) = (
        bf16(rng.standard_normal((length, 32)) * 2) for length in (n, m, m)
    )
    memory = Memory()
    buffers = [memory.buffer(x, b) for x, b in (("q", q_bits), ("k", k_bits), ("v", v_bits))]
    out = memory.allocate("out", 4 * n * 32)
    scale = 32**-0.5
    addresses = [b.address for b in (*buffers, out)]
    params = struct.pack("<4Q2if4x", *addresses, n, m, scale * np.log2(np.e))
    program().launch("attention", -(-n // 16), 32, params, memory=memory).check()
    scores = np.einsum("id,jd->ij", q, k) * scale
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    want = np.einsum("ij,jd->id", weights / weights.sum(axis=1, keepdims=True), v)
    assert out.written(np.float32).all()
    np.testing.assert_allclose(out.array(np.float32, (n, 32)), want, atol=2e-2)


def softmax_passes(candidate: Program) -> bool:
    """The test of softmax_rows as a question."""
    x = (np.random.default_rng(0).standard_normal((5, 70)) * 30).astype(np.float32)
    memory = Memory()
    out = memory.allocate("out", x.nbytes)
    params: list[Parameter] = [memory.buffer("x", x), out, *x.shape]
    report = candidate.launch("softmax_rows", 2, 128, params, memory=memory)
    want = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
    want /= want.sum(axis=1, keepdims=True)
    return not report.findings and np.allclose(out.array(np.float32, x.shape), want, atol=3e-6)


def gemm_passes(candidate: Program) -> bool:
    report, out, want = gemm(70, 64, 96, candidate=candidate)
    return not report.findings and report.conflicts_over_ideal() == 1.0 and close(out, want)


@pytest.mark.parametrize("kernel", ["softmax_rows", "gemm"])
def test_mutants_are_caught(kernel: str) -> None:
    passes = {"softmax_rows": softmax_passes, "gemm": gemm_passes}[kernel]
    assert passes(program())
    x, memory = np.zeros((5, 70), np.float32), Memory()
    if kernel == "gemm":
        report = gemm(70, 64, 96)[0]
    else:
        params: list[Parameter] = [memory.buffer("x", x), memory.allocate("out", x.nbytes), 5, 70]
        report = program().launch(kernel, 2, 128, params, memory=memory)
    executed = [bool(n) for n in report.execution.lanes]
    outcome = mutate.run(program(), kernel, passes, count=60, executed=executed, step_limit=2000)
    # Address arithmetic for negative numbers and for loops that do not run has equivalent mutants.
    assert outcome.share >= 0.7, "\n".join(map(str, outcome.survivors))


@pytest.mark.parametrize("flags", [("-O3", "-lineinfo"), ("-G",)])
def test_debug_builds(flags: tuple[str, ...]) -> None:
    """Line tables are skipped; without optimisation every address is generic."""
    assert softmax_passes(load(compile_ptx(SOURCE, flags=(*flags, "-std=c++17"))))


INTRINSICS = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
__device__ __noinline__ float polynomial(float x, int n) {
  float y = 0.f;
  for (int i = 0; i < n; ++i) y = y * x + i;
  return y;
}
extern "C" __global__ void many(const float* x, const int* n, float* out, long long* whole,
                                int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const float v = x[i];
  const int k = n[i];
  float* o = out + i * 12;
  o[0] = polynomial(v, k & 7);
  o[1] = expf(v);
  o[2] = logf(fabsf(v) + 1.f);
  o[3] = sinf(v);
  o[4] = tanhf(v);
  o[5] = v / (1.f + fabsf(v));
  o[6] = rsqrtf(fabsf(v) + 0.5f);
  o[7] = __bfloat162float(__float2bfloat16(v) * __float2bfloat16(3.f));
  o[8] = __half2float(__hadd(__float2half(v), __float2half(0.25f)));
  o[9] = fmaxf(floorf(v), fminf(v, ceilf(-v)));
  o[10] = static_cast<float>(pow(static_cast<double>(fabsf(v)) + 0.1, 1.5));
  o[11] = erff(v);
  long long* w = whole + i * 6;
  w[0] = static_cast<long long>(k) * k / 7;
  w[1] = (static_cast<long long>(k) << 20) % 1000003;
  w[2] = __popc(k) + __clz(k) + __ffs(k) + __brev(k) % 100;
  w[3] = __umulhi(k, 0x9E3779B9u) + __byte_perm(k, i, 0x3715);
  w[4] = __double2ll_rn(v * 1000.0) + __float2int_rz(v * 7.f);
  const unsigned char bytes[4] = {3, 1, 4, 1};
  w[5] = bytes[k & 3] + (k > 10 ? min(k, 77) : max(k, -5));
}
"""


def test_code_of_the_math_library() -> None:
    """What nvcc makes of ordinary CUDA: the whole math library, in both precisions."""
    count = 300
    rng = np.random.default_rng(9)
    x = (rng.standard_normal(count) * 4).astype(np.float32)
    n = rng.integers(-1000, 1000, count).astype(np.int32)
    memory = Memory()
    out, whole = memory.allocate("out", 4 * 12 * count), memory.allocate("whole", 8 * 6 * count)
    params: list[Parameter] = [memory.buffer("x", x), memory.buffer("n", n), out, whole, count]
    load(compile_ptx(INTRINSICS)).launch("many", 3, 128, params, memory=memory).check()
    got, v = out.array(np.float32, (count, 12)), x.astype(np.float64)
    poly = np.zeros(count)
    for i in range(7):
        poly = np.where((n & 7) > i, poly * v + i, poly)
    three = torch.tensor(x).bfloat16() * torch.tensor(3.0).bfloat16()
    half = torch.tensor(x).half() + torch.tensor(0.25).half()
    want = [
        poly, np.exp(v), np.log1p(np.abs(v)), np.sin(v), np.tanh(v), v / (1 + np.abs(v)),
        1 / np.sqrt(np.abs(v) + 0.5), three.float().numpy(), half.float().numpy(),
        np.fmax(np.floor(v), np.fmin(v, np.ceil(-v))), (np.abs(v) + 0.1) ** 1.5,
        torch.erf(torch.tensor(v)).numpy(),
    ]  # fmt: skip
    for column, values in enumerate(want):
        np.testing.assert_allclose(
            got[:, column], values, rtol=3e-6, atol=3e-6, err_msg=f"{column}"
        )
    integers = whole.array(np.int64, (count, 6))
    for i in range(count):
        k, u = int(n[i]), int(n[i]) & 0xFFFFFFFF
        lowest = (u & -u).bit_length()
        reverse = int(f"{u:032b}"[::-1], 2) % 100  # __brev is unsigned
        big = k << 20
        bytes_of = u.to_bytes(4, "little") + i.to_bytes(4, "little")
        permuted = int.from_bytes([bytes_of[5], bytes_of[1], bytes_of[7], bytes_of[3]], "little")
        twice = int(np.rint(np.float64(np.float32(x[i])) * 1000.0))
        clamped = min(k, 77) if k > 10 else max(k, -5)
        assert integers[i].tolist() == [
            int(k * k // 7),
            abs(big) % 1000003 * (1 if big >= 0 else -1),
            u.bit_count() + (32 - u.bit_length()) + lowest + reverse,
            ((u * 0x9E3779B9 >> 32) + permuted) & 0xFFFFFFFF,
            twice + int(np.float32(x[i]) * np.float32(7)),
            (3, 1, 4, 1)[k & 3] + clamped,
        ], i
