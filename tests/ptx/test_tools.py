# SPDX-License-Identifier: Apache-2.0
"""The counters, and that no instruction goes untested."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from .decode import DECODERS
from .memory import Memory
from .snippets import run

# ---- counters ----


@pytest.mark.parametrize(
    ("stride", "width", "sectors", "ideal"),
    [(4, 4, 4, 4), (8, 4, 8, 4), (32, 4, 32, 4), (0, 4, 1, 1), (16, 16, 16, 16), (32, 16, 32, 16)],
)
def test_sectors(stride: int, width: int, sectors: int, ideal: int) -> None:
    memory = Memory()
    x = memory.buffer("x", np.zeros(32 * 32, np.uint8))
    target = "{%r10, %r11, %r12, %r13}" if width == 16 else "%r10"
    body = f"""mov.u32 %r1, %tid.x; ld.param.u64 %d1, [p0]; mad.wide.u32 %d1, %r1, {stride}, %d1;
        ld.global{".v4" if width == 16 else ""}.b32 {target}, [%d1]; ret;"""
    report = run(body, (x,), memory=memory).check()
    (count,) = (c for (space, _), c in report.traffic_by_line().items() if space == "global")
    assert (count.requests, count.actual, count.ideal) == (1, sectors, ideal)
    assert report.sectors_over_ideal() == sectors / ideal


@pytest.mark.parametrize(
    ("stride", "width", "wavefronts", "ideal"),
    [
        (4, 4, 1, 1),  # a word a bank
        (8, 4, 2, 1),
        (128, 4, 32, 1),  # all in one bank
        (132, 4, 1, 1),  # padded
        (0, 4, 1, 1),  # a broadcast
        (8, 8, 2, 2),
        (16, 16, 4, 4),
        (128, 16, 32, 4),
        (144, 16, 4, 4),
    ],
)
def test_bank_conflicts(stride: int, width: int, wavefronts: int, ideal: int) -> None:
    registers = {4: "%r10", 8: "{%r10, %r11}", 16: "{%r10, %r11, %r12, %r13}"}[width]
    vector = {4: "", 8: ".v2", 16: ".v4"}[width]
    body = f"""mov.u32 %r1, %tid.x; mov.u32 %r2, s; mad.lo.u32 %r2, %r1, {stride}, %r2;
        mov.u32 %r10, 0; mov.u32 %r11, 0; mov.u32 %r12, 0; mov.u32 %r13, 0;
        st.shared{vector}.b32 [%r2], {registers}; ret;"""
    report = run(body, variables=".shared .align 16 .b8 s[8192];")
    (count,) = report.traffic_by_line().values()
    assert (count.actual, count.ideal) == (wavefronts, ideal)
    assert report.conflicts_over_ideal() == wavefronts / ideal


def test_coverage_and_classes() -> None:
    body = """mov.u32 %r1, %tid.x; setp.gt.u32 %p1, %r1, 100; @%p1 add.u32 %r1, %r1, 1;
        @%p1 bra FAR; add.f32 %r2, %r1, %r1; ret; FAR: mul.f32 %r2, %r1, %r1; ret;"""
    report = run(body, threads=64)
    assert [i.op for i in report.missed()] == ["add", "mul", "ret"]  # a branch not taken has run
    assert report.coverage() == 5 / 8
    assert report.instructions() == {
        "move": 2, "compare": 2, "integer": 2, "control": 4, "float": 2,
    }  # fmt: skip
    assert report.lane_instructions == 64 * 6


def test_every_instruction_has_a_test() -> None:
    here = Path(__file__).parent
    text = "\n".join(p.read_text() for p in sorted(here.glob("test_*.py")))
    text += (here / "kernels" / "samples.cu").read_text()
    accepted = {"nop", "ldu", "prefetchu", "griddepcontrol", "nanosleep", "pragma", "discard"}
    accepted |= {"applypriority", "call"}  # hints that do nothing, and synonyms
    ops = {name.partition(":")[0] for name in DECODERS} - accepted
    untested = [op for op in sorted(ops) if not re.search(rf'["\s@.]{op}[.\s";]', text)]
    assert not untested
