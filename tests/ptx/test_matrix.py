# SPDX-License-Identifier: Apache-2.0
"""Fragments against the tables of the PTX ISA, written here a second time as loops over lanes.

groupID = lane >> 2 and threadID_in_group = lane % 4 are the ISA's words, and so are the formulas.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from .instructions_matrix import tensor_core_sum
from .memory import Memory
from .snippets import run
from .words import Array, bf16_to_f32

FULL = 32


def a_element(lane: int, i: int, kind: str, k: int) -> tuple[int, int]:
    """(row, column) of element a_i of the A fragment."""
    group, thread = lane >> 2, lane % 4
    if kind == "tf32":
        row = group if i in (0, 2) else group + 8
        return row, thread if i < 2 else thread + 4
    if k == 8:
        row = group if i < 2 else group + 8
        return row, thread * 2 + (i & 1)
    row = group if i < 2 or 4 <= i < 6 else group + 8
    column = thread * 2 + (i & 1)
    return row, column if i < 4 else column + 8


def b_element(lane: int, i: int, kind: str, k: int) -> tuple[int, int]:
    """(row, column) of element b_i of the B fragment."""
    group, thread = lane >> 2, lane % 4
    if kind == "tf32":
        return thread + 4 * i, group
    return thread * 2 + (i & 1) + (8 if i >= 2 else 0), group


def c_element(lane: int, i: int) -> tuple[int, int]:
    """(row, column) of element c_i of a 16x8 accumulator."""
    group, thread = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), thread * 2 + (i & 1)


def encode(values: Array, kind: str) -> tuple[Array, Array]:
    """(bits, the float64 values the tensor core sees)."""
    if kind == "f32":
        narrow = values.astype(np.float32)
        return narrow.view(np.uint32), narrow.astype(np.float64)
    if kind == "tf32":  # the low 13 bits are there and must not matter
        bits = values.astype(np.float32).view(np.uint32)
        return bits, (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    rounded = torch.tensor(values).to(dtype)
    return rounded.view(torch.uint16).numpy(), rounded.double().numpy()


def pack(bits: Array, place: list[list[tuple[int, int]]]) -> Array:
    """[lane, register] words from a matrix and the element table place[lane][i]."""
    rows = [[bits[rc] for rc in lane] for lane in place]
    return np.ascontiguousarray(np.array(rows, bits.dtype)).view(np.uint32).reshape(32, -1)


def mma_text(op: str, a: int, b: int, c: int, swap_a: bool = False) -> str:
    """Loads the fragments of each lane, runs one mma and stores the result."""
    lines = ["mov.u32 %r90, %tid.x;"]
    for n, (letter, count) in enumerate((("1", a), ("2", b), ("3", c))):
        lines.append(f"ld.param.u64 %d{n}, [p{n}]; mad.wide.u32 %d{n}, %r90, {4 * count}, %d{n};")
        lines += [f"ld.global.b32 %r{letter}{i}, [%d{n}+{4 * i}];" for i in range(count)]
    vector = lambda letter, count: "{" + ", ".join(f"%r{letter}{i}" for i in range(count)) + "}"  # noqa: E731
    lines.append(f"{op} {vector('4', c)}, {vector('1', a)}, {vector('2', b)}, {vector('3', c)};")
    lines.append(f"ld.param.u64 %d3, [p3]; mad.wide.u32 %d3, %r90, {4 * c}, %d3;")
    lines += [f"st.global.b32 [%d3+{4 * i}], %r4{i};" for i in range(c)]
    return "\n".join([*lines, "ret;"])


MMA = [("bf16", 16, "f32"), ("bf16", 8, "f32"), ("f16", 16, "f32"), ("f16", 8, "f32")]
MMA += [("f16", 16, "f16"), ("f16", 8, "f16"), ("tf32", 8, "f32"), ("tf32", 4, "f32")]


@pytest.mark.parametrize(("kind", "k", "result"), MMA)
def test_mma(kind: str, k: int, result: str) -> None:
    rng = np.random.default_rng(8)
    a_bits, a = encode(rng.standard_normal((16, k)), kind)
    b_bits, b = encode(rng.standard_normal((k, 8)), kind)
    c_bits, c = encode(rng.standard_normal((16, 8)), result)
    per = 1 if kind == "tf32" else 2
    a_place = [[a_element(t, i, kind, k) for i in range(16 * k // 32)] for t in range(32)]
    b_place = [[b_element(t, i, kind, k) for i in range(8 * k // 32)] for t in range(32)]
    c_place = [[c_element(t, i) for i in range(4)] for t in range(32)]
    for place, shape in ((a_place, (16, k)), (b_place, (k, 8)), (c_place, (16, 8))):
        covered = sorted(rc for lane in place for rc in lane)  # a table names every element once
        assert covered == list(itertools.product(range(shape[0]), range(shape[1])))
    memory = Memory()
    c_words = pack(c_bits, c_place)
    buffers = [
        memory.buffer("a", pack(a_bits, a_place)),
        memory.buffer("b", pack(b_bits, b_place)),
        memory.buffer("c", c_words),
        memory.allocate("d", 4 * c_words.size),
    ]
    op = f"mma.sync.aligned.m16n8k{k}.row.col.{result}.{kind}.{kind}.{result}"
    text = mma_text(op, 16 * k // 32 // per, 8 * k // 32 // per, c_words.shape[1])
    run(text, tuple(buffers), memory=memory).check()
    words = buffers[3].array(np.float32 if result == "f32" else np.float16, (32, 4))
    got = np.zeros((16, 8))
    for lane, i in itertools.product(range(32), range(4)):
        got[c_element(lane, i)] = words[lane, i]
    tolerance = 1e-6 if result == "f32" else 2e-3
    np.testing.assert_allclose(got, a @ b + c, rtol=tolerance, atol=tolerance * 4)


# What an H100 made of random fragments whose numbers differ by up to 2^12: registers of 8 warps.
H100 = np.load(Path(__file__).with_name("h100_mma.npz"))


def recorded(kind: str, letter: str) -> Array:
    """[warp, row, column], in float32."""
    words = H100[f"{kind}_{letter}"]
    k = 8 if kind == "tf32" else 16
    if letter in "cd":
        parts, shape = words, (16, 8)
        place = [[c_element(t, i) for i in range(4)] for t in range(32)]
    else:
        parts = words.view({"tf32": np.float32, "fp16": np.float16, "bf16": np.uint16}[kind])
        parts = bf16_to_f32(parts) if kind == "bf16" else parts.astype(np.float32)
        element, shape = (a_element, (16, k)) if letter == "a" else (b_element, (k, 8))
        place = [[element(t, i, kind, k) for i in range(parts.shape[2])] for t in range(32)]
    matrix = np.full((len(words), *shape), np.nan, np.float32)
    for lane, i in itertools.product(range(32), range(parts.shape[2])):
        matrix[(slice(None), *place[lane][i])] = parts[:, lane, i]
    return matrix


@pytest.mark.parametrize("kind", ["bf16", "fp16", "tf32"])
def test_sums_are_those_of_an_h100(kind: str) -> None:
    a, b, c, d = (recorded(kind, letter) for letter in "abcd")
    np.testing.assert_array_equal(tensor_core_sum(a, b, c), d)
    assert not np.array_equal(np.matmul(a, b) + c, d), "ordinary sums would do as well"


def test_tf32_mma_is_that_of_an_h100() -> None:
    text = mma_text("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", 4, 2, 4)
    for warp in range(8):
        memory = Memory()
        given = [memory.buffer(x, H100[f"tf32_{x}"][warp]) for x in "abc"]
        result = memory.allocate("d", 4 * 128)
        run(text, (*given, result), memory=memory).check()
        np.testing.assert_array_equal(result.array(np.float32, (32, 4)), H100["tf32_d"][warp])


def test_sums_that_are_not_finite() -> None:
    a, b, c = (
        np.ones((16, 8), np.float32),
        np.ones((8, 8), np.float32),
        np.zeros((16, 8), np.float32),
    )
    a[0, 0], a[1, 0], c[2, 0] = np.inf, np.nan, -np.inf
    total = tensor_core_sum(a, b, c)
    assert np.isposinf(total[0]).all() and np.isnan(total[1]).all() and total[2, 0] == -np.inf
    assert (total[3:] == 8).all() and (total[2, 1:] == 8).all()


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(count: int, trans: bool) -> None:
    """Lane l holds row l / 4, elements 2 (l % 4) and the next, of each matrix."""
    matrices = np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8)
    memory = Memory()
    source, out = memory.buffer("m", matrices), memory.allocate("out", 4 * count * 32)
    # The rows lie in shared memory in reverse order, so that each lane's address matters.
    registers = ", ".join(f"%r{10 + i}" for i in range(count))
    shape = f"x{count}.trans" if trans else f"x{count}"
    stores = "\n".join(f"st.global.b32 [%d2+{4 * i}], %r{10 + i};" for i in range(count))
    body = f"""
        mov.u32 %r1, %tid.x;
        setp.ge.u32 %p1, %r1, {8 * count};
        mov.u32 %r2, s;
        sub.u32 %r3, {8 * count - 1}, %r1;
        @%p1 mov.u32 %r3, 0;
        mad.lo.u32 %r2, %r3, 16, %r2;
        ld.param.u64 %d1, [p0];
        mad.wide.u32 %d1, %r1, 16, %d1;
        @%p1 bra LOADED;
        ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d1];
        st.shared.v4.b32 [%r2], {{%r4, %r5, %r6, %r7}};
        LOADED: bar.warp.sync 0xffffffff;
        ldmatrix.sync.aligned.m8n8.{shape}.shared.b16 {{{registers}}}, [%r2];
        ld.param.u64 %d2, [p1];
        mad.wide.u32 %d2, %r1, {4 * count}, %d2;
        {stores}
        ret;
    """
    run(body, (source, out), memory=memory, variables=".shared .align 16 .b8 s[512];").check()
    got = out.array(np.uint16, (32, count, 2))
    for lane, i, e in itertools.product(range(32), range(count), range(2)):
        row, column = lane // 4, 2 * (lane % 4) + e
        want = matrices[i, column, row] if trans else matrices[i, row, column]
        assert got[lane, i, e] == want


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_stmatrix(count: int, trans: bool) -> None:
    values = np.arange(32 * count * 2, dtype=np.uint16).reshape(32, count, 2)
    memory = Memory()
    source, out = memory.buffer("f", values), memory.allocate("out", count * 128)
    registers = ", ".join(f"%r{10 + i}" for i in range(count))
    shape = f"x{count}.trans" if trans else f"x{count}"
    loads = "\n".join(f"ld.global.b32 %r{10 + i}, [%d1+{4 * i}];" for i in range(count))
    body = f"""
        mov.u32 %r1, %tid.x;
        ld.param.u64 %d1, [p0];
        mad.wide.u32 %d1, %r1, {4 * count}, %d1;
        {loads}
        rem.u32 %r2, %r1, {8 * count};
        mov.u32 %r3, s;
        mad.lo.u32 %r3, %r2, 16, %r3;
        stmatrix.sync.aligned.m8n8.{shape}.shared.b16 [%r3], {{{registers}}};
        bar.warp.sync 0xffffffff;
        setp.ge.u32 %p1, %r1, {8 * count};
        @%p1 bra END;
        ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r3];
        ld.param.u64 %d2, [p1];
        mad.wide.u32 %d2, %r1, 16, %d2;
        st.global.v4.b32 [%d2], {{%r4, %r5, %r6, %r7}};
        END: ret;
    """
    run(body, (source, out), memory=memory, variables=".shared .align 16 .b8 s[512];").check()
    got = out.array(np.uint16, (count, 8, 8))
    for lane, i, e in itertools.product(range(32), range(count), range(2)):
        row, column = lane // 4, 2 * (lane % 4) + e
        assert values[lane, i, e] == (got[i, column, row] if trans else got[i, row, column])


def test_movmatrix() -> None:
    values = np.arange(64, dtype=np.uint16).reshape(32, 2)
    memory = Memory()
    source, out = memory.buffer("f", values), memory.allocate("out", 128)
    body = """
        mov.u32 %r1, %tid.x;
        ld.param.u64 %d1, [p0];
        mad.wide.u32 %d1, %r1, 4, %d1;
        ld.global.b32 %r2, [%d1];
        movmatrix.sync.aligned.m8n8.trans.b16 %r3, %r2;
        ld.param.u64 %d2, [p1];
        mad.wide.u32 %d2, %r1, 4, %d2;
        st.global.b32 [%d2], %r3;
        ret;
    """
    run(body, (source, out), memory=memory).check()
    np.testing.assert_array_equal(out.array(np.uint16, (8, 8)), values.reshape(8, 8).T)
