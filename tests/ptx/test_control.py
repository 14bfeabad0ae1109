# SPDX-License-Identifier: Apache-2.0
"""Divergence, loops, tables of branches, calls, barriers and the way a kernel ends."""

from __future__ import annotations

import numpy as np
import pytest

from .executor import load
from .memory import Memory
from .parser import PtxError, parse
from .snippets import HEAD, apply, kernel, run


def collatz(n: int) -> int:
    steps = 0
    while n != 1:
        n = n // 2 if n % 2 == 0 else 3 * n + 1
        steps += 1
    return steps


def test_loops_with_a_length_of_their_own_in_every_lane() -> None:
    a = np.arange(1, 200, dtype=np.uint32)
    text = """
        mov.u32 %r1, {a}; mov.u32 %r2, 0;
        LOOP: setp.eq.u32 %p1, %r1, 1;
        @%p1 bra DONE;
        and.b32 %r3, %r1, 1;
        setp.eq.u32 %p2, %r3, 0;
        @%p2 bra EVEN;
        mad.lo.u32 %r1, %r1, 3, 1;
        bra.uni NEXT;
        EVEN: shr.u32 %r1, %r1, 1;
        NEXT: add.u32 %r2, %r2, 1;
        bra.uni LOOP;
        DONE: mov.u32 {o}, %r2;
    """
    got = apply(text, "u32", a=("u32", a))
    np.testing.assert_array_equal(got, [collatz(int(n)) for n in a])


def test_guards() -> None:
    a = np.arange(64, dtype=np.uint32)
    text = """
        setp.lt.u32 %p1, {a}, 10; mov.u32 {o}, 0;
        @%p1 add.u32 {o}, {a}, 100;
        @!%p1 sub.u32 {o}, {a}, 5;
    """
    np.testing.assert_array_equal(
        apply(text, "u32", a=("u32", a)), np.where(a < 10, a + 100, a - 5)
    )


def test_brx() -> None:
    a = np.arange(64, dtype=np.uint32) % 3
    text = """
        TABLE: .branchtargets ZERO, ONE, TWO;
        brx.idx {a}, TABLE;
        ZERO: mov.u32 {o}, 10; bra OUT;
        ONE: mov.u32 {o}, 21; bra OUT;
        TWO: mov.u32 {o}, 32;
        OUT:
    """
    np.testing.assert_array_equal(apply(text, "u32", a=("u32", a)), a * 11 + 10)


def test_scopes_keep_names_apart() -> None:
    text = """
        { .reg .b32 t; mov.b32 t, 1; add.u32 {o}, {a}, t; }
        { .reg .b32 t; mov.b32 t, 2; add.u32 {o}, {o}, t; { .reg .pred t; setp.eq.u32 t, {a}, 0;
          @t add.u32 {o}, {o}, 100; } add.u32 {o}, {o}, t; }
    """
    a = np.arange(32, dtype=np.uint32)
    got = apply(text, "u32", a=("u32", a))
    np.testing.assert_array_equal(got, a + 5 + 100 * (a == 0))


def test_calls_are_inlined() -> None:
    """A function that branches, calls another and is called twice."""
    text = f"""{HEAD}
        .func (.param .b32 ret) twice (.param .b32 x) {{
            .reg .b32 %r<3>; ld.param.u32 %r1, [x]; add.u32 %r2, %r1, %r1;
            st.param.b32 [ret+0], %r2; ret; }}
        .func (.param .b32 out) f (.param .b32 a) {{
            .reg .b32 %r<4>; .reg .pred %p<2>;
            ld.param.u32 %r1, [a]; setp.gt.u32 %p1, %r1, 20; @%p1 bra BIG;
            {{ .param .b32 p0; st.param.b32 [p0+0], %r1; .param .b32 q;
              call.uni (q), twice, (p0); ld.param.b32 %r2, [q+0]; }}
            st.param.b32 [out+0], %r2; ret;
            BIG: st.param.b32 [out+0], 7; ret; }}
        .visible .entry k(.param .u64 to) {{
            .reg .b32 %r<5>; .reg .b64 %d<3>; .reg .pred %p<2>;
            mov.u32 %r1, %tid.x; mov.u32 %r3, 0;
            {{ .param .b32 p0; st.param.b32 [p0+0], %r1; .param .b32 q;
              call.uni (q), f, (p0); ld.param.b32 %r2, [q+0]; }}
            setp.lt.u32 %p1, %r1, 4;
            {{ .param .b32 p0; st.param.b32 [p0+0], %r2; .param .b32 q; st.param.b32 [q+0], 0;
              @%p1 call (q), f, (p0); ld.param.b32 %r3, [q+0]; }}
            add.u32 %r2, %r2, %r3;
            ld.param.u64 %d1, [to]; mad.wide.u32 %d1, %r1, 4, %d1;
            st.global.u32 [%d1], %r2; ret; }}"""
    memory = Memory()
    out = memory.allocate("out", 128)
    load(text).launch("k", 1, 32, [out], memory=memory).check()
    i = np.arange(32)
    first = np.where(i > 20, 7, 2 * i)
    np.testing.assert_array_equal(out.array(np.uint32), first + np.where(i < 4, 2 * first, 0))


def test_recursion_is_refused() -> None:
    text = f"{HEAD} .func f () {{ call f; ret; }} .visible .entry k() {{ call f; ret; }}"
    with pytest.raises(PtxError, match="recursion"):
        load(text).launch("k", 1, 1, [])


def test_three_dimensional_grids_and_blocks() -> None:
    memory = Memory()
    out = memory.allocate("out", 4 * 2 * 3 * 2 * 60)
    terms = ["%ctaid.z", "%ctaid.y", "%ctaid.x", "%tid.z", "%tid.y", "%tid.x"]
    sizes = ["%nctaid.z", "%nctaid.y", "%nctaid.x", "%ntid.z", "%ntid.y", "%ntid.x"]
    walk = "\n".join(
        f"mov.u32 %r2, {n}; mov.u32 %r3, {t}; mad.lo.u32 %r1, %r1, %r2, %r3;"
        for t, n in zip(terms, sizes, strict=True)
    )
    body = f"""mov.u32 %r1, 0; {walk} ld.param.u64 %d1, [p0];
        mad.wide.u32 %d1, %r1, 4, %d1; st.global.u32 [%d1], %r1; ret;"""
    for at_once in (1, 5, None):
        report = run(body, (out,), threads=(5, 4, 3), grid=(2, 3, 2), memory=memory,
                     blocks_at_once=at_once)  # fmt: skip
        report.check()
        np.testing.assert_array_equal(out.array(np.uint32), np.arange(720))


REVERSE = """
    mov.u32 %r1, %tid.x; mov.u32 %r2, s; mad.lo.u32 %r3, %r1, 4, %r2;
    st.shared.u32 [%r3], %r1;
    {barrier}
    sub.u32 %r4, 63, %r1; mad.lo.u32 %r3, %r4, 4, %r2;
    ld.shared.u32 %r5, [%r3];
    ld.param.u64 %d1, [p0]; mad.wide.u32 %d1, %r1, 4, %d1; st.global.u32 [%d1], %r5; ret;
"""


@pytest.mark.parametrize(
    "barrier",
    ["bar.sync 0;", "barrier.sync 3;", "barrier.sync.aligned 0;", "bar.sync 1, 64;",
     "barrier.cta.sync 2, 64;", "mov.u32 %r9, 4; bar.sync %r9, 64;"],
)  # fmt: skip
def test_barriers_order_shared_memory(barrier: str) -> None:
    memory = Memory()
    out = memory.allocate("out", 256)
    variables = ".shared .align 4 .b8 s[256];"
    body = REVERSE.format(barrier=barrier)
    run(body, (out,), threads=64, memory=memory, variables=variables).check()
    np.testing.assert_array_equal(out.array(np.uint32), np.arange(64)[::-1])


def test_fences_are_accepted() -> None:
    a = np.arange(32, dtype=np.uint32)
    text = "membar.gl; fence.acq_rel.gpu; fence.sc.cta; mov.u32 {o}, {a};"
    np.testing.assert_array_equal(apply(text, "u32", a=("u32", a)), a)


def test_threads_that_left_are_not_waited_for() -> None:
    body = """mov.u32 %r1, %tid.x; setp.ge.u32 %p1, %r1, 40; @%p1 exit; bar.sync 0; ret;"""
    run(body, threads=64).check()


def test_trap_is_reported() -> None:
    body = "mov.u32 %r1, %tid.x; setp.eq.u32 %p1, %r1, 9; @%p1 trap; ret;"
    report = run(body)
    assert report.kinds() == {"trap"} and report.findings[0].thread == 9


def test_an_endless_loop_ends() -> None:
    with pytest.raises(PtxError, match="basic blocks"):
        run("L: bra L;", step_limit=1000)


def test_launch_limits() -> None:
    for options in ({"threads": 1025}, {"grid": (1, 65536)}, {"grid": 0}):
        with pytest.raises(PtxError, match="grid"):
            run("ret;", **options)
    bounded = kernel("ret;").replace("k()", "k()\n.maxntid 64, 2, 1\n.minnctapersm 2\n")
    load(bounded).launch("k", 1, 128, []).check()
    with pytest.raises(PtxError, match="block"):
        load(bounded).launch("k", 1, 160, [])
    with pytest.raises(PtxError, match="shared memory"):
        run("ret;", shared=1 << 20)


def test_parser_keeps_lines_and_says_what_it_does_not_know() -> None:
    module = parse(f"{HEAD}.visible .entry k()\n{{\n/* two\nlines */ ret; // end\n}}\n")
    assert module.target == "sm_90"
    assert module.functions["k"].code[0].line == 7
    for text in ("ld.global.u32 %r1, [a b];", ".nonsense x;", "add.u32 %r1, %r1"):
        with pytest.raises(PtxError, match=r"PTX line \d+"):
            run(text)
    with pytest.raises(PtxError, match="names 0 of the kernels"):
        load(HEAD).launch("k", 1, 1, [])
