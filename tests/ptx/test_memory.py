# SPDX-License-Identifier: Apache-2.0
"""Loads, stores, atomics, asynchronous copies and hints: where the bytes go."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from .executor import load, pack
from .memory import Memory
from .parser import PtxError
from .snippets import HEAD, apply, run
from .words import DTYPE

ADDRESS = "mov.u32 %r1, %tid.x; ld.param.u64 %d1, [p0]; ld.param.u64 %d2, [p1];"


@pytest.mark.parametrize(
    "kind", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64", "f32", "f64"]
)
@pytest.mark.parametrize("space", ["global", "generic"])
def test_widths_are_extended(kind: str, space: str) -> None:
    dtype = DTYPE[kind]
    bits = np.random.default_rng(1).integers(0, 255, 32 * dtype.itemsize, dtype=np.uint8)
    values = bits.view(dtype)
    memory = Memory()
    x, y = memory.buffer("x", values), memory.allocate("y", 8 * 32)
    where = ".global" if space == "global" else ""
    body = f"""{ADDRESS}
        mad.wide.u32 %d1, %r1, {dtype.itemsize}, %d1;
        mad.wide.u32 %d2, %r1, 8, %d2;
        ld{where}.{kind} %d3, [%d1];
        st{where}.b64 [%d2], %d3;
        ret;"""
    run(body, (x, y), memory=memory).check()
    got = y.array(np.uint64)
    if dtype.kind == "f":
        np.testing.assert_array_equal(got, values.view(f"u{dtype.itemsize}"))
    else:
        np.testing.assert_array_equal(got.view("i8" if dtype.kind == "i" else "u8"), values)


VECTORS = [(k, n) for k in ("b8", "b16", "b32", "b64") for n in (2, 4) if (k, n) != ("b64", 4)]


@pytest.mark.parametrize(("kind", "count"), VECTORS)
def test_vectors(kind: str, count: int) -> None:
    width = DTYPE[kind].itemsize
    values = np.arange(32 * count, dtype=DTYPE[kind])
    memory = Memory()
    x, y = memory.buffer("x", values), memory.allocate("y", values.nbytes)
    letter = {1: "h", 2: "h", 4: "r", 8: "d"}[width]
    registers = ", ".join(f"%{letter}{10 + i}" for i in range(count))
    body = f"""{ADDRESS}
        mad.wide.u32 %d1, %r1, {width * count}, %d1;
        mad.wide.u32 %d2, %r1, {width * count}, %d2;
        ld.global.nc.L1::no_allocate.L2::128B.v{count}.{kind} {{{registers}}}, [%d1];
        st.global.cs.v{count}.{kind} [%d2], {{{registers}}};
        ret;"""
    run(body, (x, y), memory=memory).check()
    np.testing.assert_array_equal(y.array(DTYPE[kind]), values)


def test_cache_policies_are_hints() -> None:
    memory = Memory()
    x, y = memory.buffer("x", np.arange(32)), memory.allocate("y", 256)
    body = f"""{ADDRESS}
        createpolicy.fractional.L2::evict_last.b64 %d9, 1.0;
        mad.wide.u32 %d1, %r1, 8, %d1;
        mad.wide.u32 %d2, %r1, 8, %d2;
        prefetch.global.L2 [%d1];
        ld.global.L2::cache_hint.b64 %d3, [%d1], %d9;
        st.global.L2::cache_hint.b64 [%d2], %d3, %d9;
        ret;"""
    run(body, (x, y), memory=memory).check()
    np.testing.assert_array_equal(y.array(np.int64), np.arange(32))
    found = run(body.replace("prefetch.global.L2 [%d1]", "prefetch.global.L2 [%d1+4096]"), (x, y),
                memory=memory)  # fmt: skip
    assert found.kinds() == {"global read out of bounds"}


def test_constants_locals_and_module_variables() -> None:
    memory = Memory()
    out = memory.allocate("out", 32 * 12)
    outside = """
        .const .align 4 .b8 table[16] = {1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4};
        .global .align 4 .u32 seed = 77;"""
    body = """
        mov.u32 %r1, %tid.x; and.b32 %r2, %r1, 3; shl.b32 %r2, %r2, 2;
        mov.u64 %d1, table; cvt.u64.u32 %d2, %r2; add.u64 %d1, %d1, %d2;
        ld.const.u32 %r3, [%d1];
        ld.global.u32 %r4, [seed];
        mov.u64 %d3, depot; add.u64 %d3, %d3, %d2;
        cvta.local.u64 %d4, %d3;
        st.local.u32 [%d3], %r1;
        ld.u32 %r5, [%d4];
        ld.param.u64 %d5, [p0]; mad.wide.u32 %d5, %r1, 12, %d5;
        st.global.u32 [%d5], %r3; st.global.u32 [%d5+4], %r4; st.global.u32 [%d5+8], %r5;
        ret;"""
    run(
        body, (out,), memory=memory, outside=outside, variables=".local .align 4 .b8 depot[16];"
    ).check()
    got = out.array(np.uint32, (32, 3))
    np.testing.assert_array_equal(got[:, 0], np.arange(32) % 4 + 1)
    assert (got[:, 1] == 77).all()
    np.testing.assert_array_equal(got[:, 2], np.arange(32))


def test_parameters_are_laid_out_as_the_driver_does() -> None:
    text = f"""{HEAD}
        .visible .entry k(.param .u64 out, .param .u8 a, .param .align 8 .b8 s[24],
            .param .f32 f) {{
        .reg .b64 %d<4>; .reg .b32 %r<5>; .reg .b16 %h<2>;
        ld.param.u64 %d0, [out];
        ld.param.u8 %h0, [a]; cvt.u32.u16 %r0, %h0;
        ld.param.u64 %d1, [s+8];
        mov.b64 %d2, s; ld.param.u32 %r1, [%d2+20];
        ld.param.f32 %r2, [f];
        st.global.u32 [%d0], %r0; st.global.u64 [%d0+8], %d1;
        st.global.u32 [%d0+16], %r1; st.global.b32 [%d0+20], %r2; ret; }}"""
    memory = Memory()
    out = memory.allocate("out", 24)
    struct_bytes = struct.pack("<qqii", 1, 2, 3, 4)
    raw = struct.pack("<QB7x", out.address, 9) + struct_bytes + struct.pack("<f", 2.5)
    program = load(text)
    assert pack(program.kernel("k"), raw) == pack(program.kernel("k"), [out, 9, struct_bytes, 2.5])
    program.launch("k", 1, 1, raw, memory=memory).check()
    got = out.array()
    assert got[0:4].view(np.uint32) == 9 and got[8:16].view(np.int64) == 2
    assert got[16:20].view(np.int32) == 4 and got[20:24].view(np.float32) == 2.5
    for wrong in (raw[:-1], raw + b"\0", [out]):
        with pytest.raises(PtxError, match="parameters"):
            program.launch("k", 1, 1, wrong, memory=memory)


ATOMICS: list[tuple[str, str, Any]] = [
    ("add", "u32", lambda old, x: old + x),
    ("min", "s32", min),
    ("max", "s32", max),
    ("and", "b32", lambda old, x: old & x),
    ("or", "b32", lambda old, x: old | x),
    ("xor", "b32", lambda old, x: old ^ x),
    ("exch", "b32", lambda old, x: x),
    ("inc", "u32", lambda old, x: 0 if old >= x else old + 1),
    ("dec", "u32", lambda old, x: x if old == 0 or old > x else old - 1),
    ("add", "u64", lambda old, x: old + x),
    ("add", "f32", lambda old, x: old + x),
    ("add", "f64", lambda old, x: old + x),
]


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(("op", "kind", "function"), ATOMICS)
def test_atomics_happen_one_after_the_other(op: str, kind: str, function: Any, space: str) -> None:
    dtype = DTYPE[kind]
    values = np.random.default_rng(3).integers(0, 50, 64).astype(dtype)
    memory = Memory()
    x, old = memory.buffer("x", values), memory.allocate("old", 64 * dtype.itemsize)
    cells = memory.buffer("cells", np.full(4, 7, dtype))
    width, letter = dtype.itemsize, "r" if dtype.itemsize == 4 else "d"
    prepare, finish, where = "", "", "%d3"
    if space == "shared":
        where = "%r5"
        prepare = f"""mad.lo.u32 %r6, %r1, {width}, s; mad.wide.u32 %d6, %r1, {width}, %d3;
            setp.lt.u32 %p1, %r1, 4; @%p1 ld.global.b{8 * width} %{letter}9, [%d6];
            @%p1 st.shared.b{8 * width} [%r6], %{letter}9; bar.sync 0;
            mad.lo.u32 %r5, %r2, {width}, s;"""
        prepare = prepare.replace(", s;", ", %r7;").replace("mad.lo", "mov.u32 %r7, s; mad.lo", 1)
        finish = f"""bar.sync 0; @%p1 ld.shared.b{8 * width} %{letter}9, [%r6];
            @%p1 st.global.b{8 * width} [%d6], %{letter}9;"""
    body = f"""{ADDRESS} ld.param.u64 %d3, [p2]; and.b32 %r2, %r1, 3;
        mad.wide.u32 %d1, %r1, {width}, %d1; mad.wide.u32 %d2, %r1, {width}, %d2;
        {prepare}
        mad.wide.u32 %d3, %r2, {width}, %d3;
        ld.global.b{8 * width} %{letter}10, [%d1];
        atom.{space}.{op}.{kind} %{letter}11, [{where}], %{letter}10;
        st.global.b{8 * width} [%d2], %{letter}11;
        {finish}
        ret;"""
    variables = ".shared .align 8 .b8 s[32];"
    run(body, (x, old, cells), threads=64, memory=memory, variables=variables).check()
    state, seen = [dtype.type(7)] * 4, []
    for i, value in enumerate(values):
        seen.append(state[i % 4])
        state[i % 4] = dtype.type(function(state[i % 4], value))
    np.testing.assert_array_equal(cells.array(dtype), state)
    np.testing.assert_array_equal(old.array(dtype), seen)


def test_compare_and_swap_and_red() -> None:
    memory = Memory()
    cell, old = memory.buffer("cell", np.array([5, 0], np.uint32)), memory.allocate("old", 128)
    body = f"""{ADDRESS} mad.wide.u32 %d2, %r1, 4, %d2; add.u32 %r2, %r1, 5; add.u32 %r3, %r1, 6;
        atom.global.cas.b32 %r4, [%d1], %r2, %r3;
        red.global.add.u32 [%d1+4], 2;
        st.global.u32 [%d2], %r4; ret;"""
    run(body, (cell, old), memory=memory).check()
    np.testing.assert_array_equal(cell.array(np.uint32), [37, 64])  # lane i swaps 5 + i for 6 + i
    np.testing.assert_array_equal(old.array(np.uint32), np.arange(32) + 5)


def test_packed_red() -> None:
    memory = Memory()
    cell, other = memory.buffer("cell", np.array([1, 2], np.float16)), memory.allocate("o", 4)
    body = f"{ADDRESS} red.global.add.noftz.f16x2 [%d1], 0x3C003800; ret;"  # (0.5, 1.0)
    run(body, (cell, other), memory=memory).check()
    np.testing.assert_array_equal(cell.array(np.float16), [17, 34])


@pytest.mark.parametrize(("size", "cache"), [(4, "ca"), (8, "ca"), (16, "ca"), (16, "cg")])
def test_cp_async_fills_with_zeros(size: int, cache: str) -> None:
    """Lane i copies i % (size + 1) bytes; nothing behind them is read."""
    memory = Memory()
    values = np.arange(32 * size, dtype=np.uint8) + 1
    x, out = memory.buffer("x", values), memory.allocate("out", 32 * size)
    wanted = np.arange(32) % (size + 1)
    inside = np.arange(size) < wanted[:, None]
    x.set_written(inside)
    kind = {4: ".b32", 8: ".v2.b32", 16: ".v4.b32"}[size]
    registers = (
        "{" + ", ".join(f"%r{10 + i}" for i in range(size // 4)) + "}" if size > 4 else "%r10"
    )
    body = f"""{ADDRESS} rem.u32 %r2, %r1, {size + 1};
        mov.u32 %r3, s; mad.lo.u32 %r3, %r1, {size}, %r3;
        mad.wide.u32 %d1, %r1, {size}, %d1; mad.wide.u32 %d2, %r1, {size}, %d2;
        cp.async.{cache}.shared.global.L2::128B [%r3], [%d1], {size}, %r2;
        cp.async.commit_group; cp.async.wait_group 0;
        ld.shared{kind} {registers}, [%r3];
        st.global{kind} [%d2], {registers}; ret;"""
    run(body, (x, out), memory=memory, variables=".shared .align 16 .b8 s[512];").check()
    want = np.where(inside, values.reshape(32, size), 0)
    np.testing.assert_array_equal(out.array(np.uint8, (32, size)), want)
    ignoring = body.replace(f"{size}, %r2;", f"{size}, %p1;").replace(
        "cp.async.ca", "setp.ge.u32 %p1, %r1, 4; cp.async.ca"
    )
    if "%p1" in ignoring and cache == "ca":
        x.set_written(np.ones(32 * size))
        run(ignoring, (x, out), memory=memory, variables=".shared .align 16 .b8 s[512];").check()
        want = np.where(np.arange(32)[:, None] < 4, values.reshape(32, size), 0)
        np.testing.assert_array_equal(out.array(np.uint8, (32, size)), want)


def test_wait_all_completes_what_was_not_committed() -> None:
    memory = Memory()
    x, out = memory.buffer("x", np.arange(32, dtype=np.uint32)), memory.allocate("out", 128)
    body = f"""{ADDRESS} mov.u32 %r3, s; mad.lo.u32 %r3, %r1, 4, %r3;
        mad.wide.u32 %d1, %r1, 4, %d1; mad.wide.u32 %d2, %r1, 4, %d2;
        cp.async.ca.shared.global [%r3], [%d1], 4;
        cp.async.wait_all;
        ld.shared.b32 %r4, [%r3]; st.global.b32 [%d2], %r4; ret;"""
    run(body, (x, out), memory=memory, variables=".shared .align 16 .b8 s[128];").check()
    np.testing.assert_array_equal(out.array(np.uint32), np.arange(32))


def test_buffers_show_what_was_written() -> None:
    memory = Memory()
    out = memory.allocate("out", 64)
    assert np.isnan(out.array(np.float32)).all()
    body = "ld.param.u64 %d1, [p0]; st.global.f32 [%d1+8], 0f3F800000; ret;"
    run(body, (out,), threads=1, memory=memory).check()
    np.testing.assert_array_equal(out.written(np.float32), np.arange(16) == 2)


def test_apply_itself() -> None:
    """The test harness hands every element to its own thread, over several blocks."""
    a = np.arange(1000, dtype=np.uint32)
    np.testing.assert_array_equal(apply("mov.b32 {o}, {a};", "u32", a=("u32", a)), a)
