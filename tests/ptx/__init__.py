# SPDX-License-Identifier: Apache-2.0
"""Runs the PTX that nvcc emits, on a machine without a GPU, and checks every access.

program = load(compile_ptx(source))
memory = Memory()
x, y = memory.buffer("x", values), memory.allocate("y", 4096)
report = program.launch("scale", grid=8, block=128, params=[x, y, 1000], memory=memory)
report.check()
y.array(np.float32)
"""

from .checks import Finding
from .compile import compile_ptx
from .executor import Program, Report, WrongRun, load, pack
from .memory import Buffer, Memory
from .parser import PtxError, parse

__all__ = [
    "Buffer",
    "Finding",
    "Memory",
    "Program",
    "PtxError",
    "Report",
    "WrongRun",
    "compile_ptx",
    "load",
    "pack",
    "parse",
]
