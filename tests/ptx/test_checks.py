# SPDX-License-Identifier: Apache-2.0
"""Every check finds the smallest program that is wrong in its way, and spares its right twin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from .checks import Finding
from .executor import Report, WrongRun
from .memory import Memory
from .snippets import run

SHARED = ".shared .align 16 .b8 s[256];"
START = """
    mov.u32 %r1, %tid.x; mov.u32 %r2, s; mad.lo.u32 %r3, %r1, 4, %r2; xor.b32 %r4, %r1, 1;
    mad.lo.u32 %r4, %r4, 4, %r2; xor.b32 %r5, %r1, 32; mad.lo.u32 %r5, %r5, 4, %r2;
    ld.param.u64 %d1, [p0]; mad.wide.u32 %d2, %r1, 4, %d1;
"""  # %r3: own word, %r4: the neighbour's, %r5: that of the other warp; %d2: own word of the buffer


def go(body: str, *, threads: int = 64, values: Any = None, **options: Any) -> Report:
    memory = options.pop("memory", None) or Memory()
    buffer = memory.buffer("x", np.arange(64, dtype=np.uint32) if values is None else values)
    return run(START + body + " ret;", (buffer,), threads=threads, memory=memory, variables=SHARED,
               **options)  # fmt: skip


def only(report: Report) -> Finding:
    assert len(report.findings) == 1, [str(f) for f in report.findings]
    with pytest.raises(WrongRun, match="PTX line"):
        report.check()
    return report.findings[0]


# ---- single accesses ----


def test_global_bounds() -> None:
    found = only(go("ld.global.u32 %r9, [%d2+4];"))
    assert found.kind == "global read out of bounds"
    assert found.thread == 63 and "x + 256 of 256" in found.detail and found.count == 1
    assert found.text == "ld.global.u32 %r9, [%d2+4]"
    assert only(go("st.global.u32 [%d2+-4], %r1;")).kind == "global write out of bounds"
    assert only(go("mov.u64 %d3, 64; ld.global.u32 %r9, [%d3];")).thread == 0
    assert not go("ld.global.u32 %r9, [%d2];").findings


def test_a_skipped_load_gives_zero_and_the_run_goes_on() -> None:
    memory = Memory()
    out = memory.allocate("out", 128)
    body = """mov.u32 %r1, %tid.x; ld.param.u64 %d1, [p0]; mad.wide.u32 %d2, %r1, 4, %d1;
        ld.global.u32 %r2, [%d1+4096]; st.global.u32 [%d2], %r2; ret;"""
    assert run(body, (out,), memory=memory).kinds() == {"global read out of bounds"}
    assert not out.array(np.uint32).any()


def test_alignment() -> None:
    report = go("ld.global.u64 %d9, [%d2+-0];", threads=63)
    assert only(report).kind == "misaligned global access"
    assert only(go("and.b32 %r6, %r1, 31; add.u32 %r6, %r6, %r2; st.shared.u16 [%r6], 0;",
                   threads=2)).kind == "misaligned shared access"  # fmt: skip


def test_read_only_buffers() -> None:
    memory = Memory()
    x = memory.buffer("x", np.zeros(32, np.uint32), writable=False)
    body = "ld.param.u64 %d1, [p0]; st.global.u32 [%d1], 1; ret;"
    assert only(run(body, (x,), threads=1, memory=memory)).kind == "global write out of bounds"


def test_shared_bounds() -> None:
    assert only(go("st.shared.u32 [%r3+4], %r1;")).kind == "shared write out of bounds"
    assert only(go("st.shared.u32 [%r3+256], %r1;")).count == 64
    assert not go("st.shared.u32 [%r3+256], %r1;", shared=256).findings


def test_local_bounds() -> None:
    body = "mov.u64 %d1, a; st.local.u32 [%d1+8], 1; ret;"
    report = run(body, variables=".local .align 4 .b8 a[8];", threads=1)
    # Local memory is kept in units of 16 bytes; the bound is that of the kernel's variables.
    assert only(report).kind == "local write out of bounds"


def test_unwritten_memory() -> None:
    assert only(go("ld.shared.u32 %r9, [%r3];")).kind == "read of unwritten shared memory"
    memory = Memory()
    x = memory.allocate("x", 128)
    body = "ld.param.u64 %d1, [p0]; ld.global.u32 %r1, [%d1+8]; ret;"
    found = only(run(body, (x,), threads=1, memory=memory))
    assert found.kind == "read of unwritten global memory" and "x + 8" in found.detail
    x.set_written(np.arange(128) != 9)  # one byte of the word is padding
    assert only(run(body, (x,), threads=1, memory=memory)).count == 1
    x.set_written(np.arange(128) != 12)
    assert not run(body, (x,), threads=1, memory=memory).findings


def test_a_block_does_not_see_the_shared_memory_of_the_one_before() -> None:
    body = """setp.eq.u32 %p1, %r9, 0; mov.u32 %r9, %ctaid.x; setp.ne.u32 %p1, %r9, 0;
        @%p1 bra READ; st.shared.u32 [%r3], %r1; READ: ld.shared.u32 %r8, [%r3];"""
    for at_once in (1, 2):
        found = only(go(body, grid=2, blocks_at_once=at_once))
        assert found.kind == "read of unwritten shared memory" and found.block == 1


# ---- races on shared memory ----

WRITE_READ = "st.shared.u32 [%r3], %r1; {between} ld.shared.u32 %r9, [{other}];"
READ_WRITE = """st.shared.u32 [%r3], %r1; bar.sync 0; ld.shared.u32 %r9, [{other}]; {between}
    st.shared.u32 [%r3], %r9;"""
WRITE_WRITE = "st.shared.u32 [%r3], %r1; {between} st.shared.u32 [{other}], %r1;"


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (WRITE_READ, "read-write race"),
        (READ_WRITE, "write-read race"),
        (WRITE_WRITE, "write-write race"),
    ],
)
def test_shared_races(body: str, kind: str) -> None:
    neighbour, stranger, own = "%r4", "%r5", "%r3"
    sync = "bar.warp.sync 0xffffffff;"
    assert only(go(body.format(between="", other=stranger))).kind == kind
    assert only(go(body.format(between=sync, other=stranger))).kind == kind
    assert only(go(body.format(between="", other=neighbour))).kind == kind
    assert not go(body.format(between=sync, other=neighbour)).findings
    assert not go(body.format(between="bar.sync 0;", other=stranger)).findings
    assert not go(body.format(between="", other=own)).findings
    # A barrier of one warp only orders nothing between the two.
    half = "shr.u32 %r7, %r1, 5; add.u32 %r7, %r7, 1; bar.sync %r7, 32;"
    assert only(go(body.format(between=half, other=stranger))).kind == kind
    assert not go(body.format(between=half, other=neighbour)).findings


def test_many_readers_are_all_remembered() -> None:
    """Both warps read word 0, then the second one writes it: the first is not ordered with that."""
    body = """setp.eq.u32 %p1, %r1, 0; @%p1 st.shared.u32 [%r2], 5; bar.sync 0;
        ld.shared.u32 %r9, [%r2]; setp.eq.u32 %p2, %r1, 40; {between}
        @%p2 st.shared.u32 [%r2], 6;"""
    assert only(go(body.format(between=""))).kind == "write-read race"
    assert only(go(body.format(between="bar.warp.sync -1;"))).kind == "write-read race"
    assert not go(body.format(between="bar.sync 0;")).findings


def test_neighbouring_bytes_do_not_race() -> None:
    body = """add.u32 %r6, %r2, %r1; st.shared.u8 [%r6], %r1; bar.sync 0;
        xor.b32 %r7, %r1, 1; add.u32 %r7, %r2, %r7; ld.shared.u8 %r9, [%r7];"""
    assert not go(body).findings
    assert only(go(body.replace("bar.sync 0;", ""))).kind == "read-write race"


def test_atomics_on_shared_memory() -> None:
    zero = "setp.eq.u32 %p1, %r1, 0; @%p1 st.shared.u32 [%r2], 0; {between}"
    body = zero + "atom.shared.add.u32 %r9, [%r2], 1; {after} ld.shared.u32 %r9, [%r2];"
    barrier = "bar.sync 0;"
    assert not go(body.format(between=barrier, after=barrier)).findings
    assert go(body.format(between="", after=barrier)).kinds() == {"write-write race"}
    assert go(body.format(between=barrier, after="")).kinds() == {"read-write race"}


def test_lanes_of_one_store() -> None:
    found = only(go("st.shared.u32 [%r2], %r1;", threads=32))
    assert found.kind == "two lanes of one shared store write different values"
    assert not go("st.shared.u32 [%r2], 7;", threads=32).findings


# ---- asynchronous copies ----

COPY = "cp.async.ca.shared.global [%r3], [%d2], 4; cp.async.commit_group; "
COPIED_TWICE = COPY + "cp.async.ca.shared.global [%r3+256], [%d2], 4; cp.async.commit_group; "


def test_copies_are_waited_for() -> None:
    early, race = "cp.async read before its wait", "read-write race"
    read_own, read_other = "ld.shared.u32 %r9, [%r3];", "ld.shared.u32 %r9, [%r5];"
    wait = "cp.async.wait_group 0; "
    assert only(go(COPY + read_own)).kind == early
    assert not go(COPY + wait + read_own).findings
    assert only(go(COPY + "bar.sync 0;" + read_other)).kind == early
    assert only(go(COPY + wait + read_other)).kind == race
    assert only(go(COPY + "bar.sync 0;" + wait + read_other)).kind == race
    assert not go(COPY + wait + "bar.sync 0;" + read_other).findings


def test_groups_complete_in_order() -> None:
    options = {"shared": 256}
    first, second = "ld.shared.u32 %r9, [%r3];", "ld.shared.u32 %r9, [%r3+256];"
    early = "cp.async read before its wait"
    assert not go(COPIED_TWICE + "cp.async.wait_group 1;" + first, **options).findings
    assert only(go(COPIED_TWICE + "cp.async.wait_group 1;" + second, **options)).kind == early
    assert only(go(COPIED_TWICE + "cp.async.wait_group 2;" + first, **options)).kind == early
    # A group that was never committed is not waited for.
    forgotten = COPY.replace("cp.async.commit_group;", "cp.async.wait_group 0;")
    assert only(go(forgotten + first)).kind == early


def test_copies_must_not_overwrite_what_is_still_read() -> None:
    body = """st.shared.u32 [%r3], %r1; bar.sync 0; ld.shared.u32 %r9, [%r5]; {between}
        cp.async.ca.shared.global [%r3], [%d2], 4;"""
    assert only(go(body.format(between=""))).kind == "write-read race"
    assert not go(body.format(between="bar.sync 0;")).findings
    assert only(go(COPY + "st.shared.u32 [%r3], %r1;")).kind == "write into a pending cp.async"


def test_matrices_need_the_barrier_too() -> None:
    """ldmatrix reads rows that other lanes wrote, even where its own address is its own row."""
    body = """cp.async.ca.shared.global [%r3], [%d2], 4; cp.async.commit_group;
        cp.async.wait_group 0; {between} and.b32 %r6, %r1, 7; mad.lo.u32 %r6, %r6, 16, %r2;
        ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r9}}, [%r6];"""
    assert only(go(body.format(between=""), threads=32)).kind == "read-write race"
    assert not go(body.format(between="bar.warp.sync -1;"), threads=32).findings


# ---- races on global memory ----


def test_blocks_must_not_write_the_same_word() -> None:
    body = "st.global.u32 [%d2], %r1;"
    for at_once in (1, 2):
        found = only(go(body, grid=2, blocks_at_once=at_once))
        assert found.kind == "global write-write race"
    assert not go(body).findings
    assert not go("atom.global.add.u32 %r9, [%d1], 1;", grid=2).findings


@pytest.mark.parametrize("at_once", [1, 2])
def test_blocks_must_not_read_what_another_writes(at_once: int) -> None:
    body = """mov.u32 %r6, %ctaid.x; setp.eq.u32 %p1, %r6, {reader}; @%p1 bra READ;
        st.global.u32 [%d2], %r1; bra END; READ: ld.global.u32 %r9, [%d2]; END:"""
    for reader in (0, 1):
        kinds = go(body.format(reader=reader), grid=2, blocks_at_once=at_once).kinds()
        assert len(kinds) == 1 and kinds < {"global read-write race", "global write-read race"}


def test_global_memory_inside_a_block() -> None:
    body = """st.global.u32 [%d2], %r1; {between} xor.b32 %r6, %r1, 32;
        mad.wide.u32 %d3, %r6, 4, %d1; ld.global.u32 %r9, [%d3];"""
    assert only(go(body.format(between=""))).kind == "global read-write race"
    assert not go(body.format(between="bar.sync 0;")).findings


# ---- warps and barriers ----


def test_divergent_barrier() -> None:
    body = """setp.lt.u32 %p1, %r1, 40; @%p1 bra A; bar.sync 0; bra END; A: bar.sync 0; END:"""
    assert only(go(body)).kind == "divergent barrier"
    whole_warps = body.replace("40", "32")
    assert not go(whole_warps).findings


def test_deadlock() -> None:
    body = (
        """setp.lt.u32 %p1, %r1, 32; @%p1 bra A; bar.sync 1, 64; bra END; A: bar.sync 2, 64; END:"""
    )
    assert only(go(body)).kind == "deadlock at a barrier"


def test_masks() -> None:
    named = "sync mask without the executing lane"
    assert only(go("vote.sync.any.pred %p1, %p1, 0xffff;")).kind == named
    missing = """setp.lt.u32 %p1, %r1, 16; @%p1 bra END; shfl.sync.idx.b32 %r9, %r1, 0, 31, -1;
        mov.u32 %r9, 1; END: bar.sync 0;"""
    assert "sync mask names lanes that never arrive" in go(missing).kinds()
    source = "shfl.sync.idx.b32 %r9, %r1, 0, 31, 0xffff0000; bra END;"
    body = f"setp.lt.u32 %p1, %r1, 16; @%p1 bra END; {source} END:"
    assert only(go(body, threads=32)).kind == "shuffle reads a lane that does not take part"


def test_matrix_instructions_need_whole_warps() -> None:
    body = "movmatrix.sync.aligned.m8n8.trans.b16 %r9, %r1;"
    assert only(go(body, threads=48)).kind == "warp instruction with lanes that have exited"
    assert not go(body).findings


def test_checks_can_be_left_out() -> None:
    assert not go("st.global.u32 [%d2], %r1;", grid=2, races=False).findings
