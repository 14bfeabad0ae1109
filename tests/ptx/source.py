# SPDX-License-Identifier: Apache-2.0
"""One kernel of attnext as a source of its own: seconds to compile instead of a file's half minute.

The headers are pasted in, so that a test can change a few words of them before nvcc sees them.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import NamedTuple

from bench.kernels import CSRC, KERNELS, LINEAR_KERNELS, ROUTED_KERNELS

from .compile import compile_ptx
from .executor import Program, load

FLAGS = ("-O3", "-std=c++17", "-lineinfo")  # the lines of our sources change no instruction


class Edit(NamedTuple):
    """A change of a header: `old` must occur in it exactly once."""

    file: str
    old: str
    new: str

    def apply(self, text: str) -> str:
        count = text.count(self.old)
        assert count == 1, f"{self.file} has {count} times: {self.old}"
        return text.replace(self.old, self.new)


def source_of(kernel: str) -> str:
    """The source file that instantiates a kernel: window_forward_bf16_64 is in
    window_forward_bf16.cu."""
    if kernel in ("window_sink_gradient", "window_merge_bias"):
        return "window_sums.cu"
    if kernel == "routed_merge_bias":
        return "routed_sums.cu"
    if kernel.startswith("linear_"):
        scan = re.match(r"linear_scan_(bf16|fp16|fp32)", kernel)
        if scan:
            return f"{scan.group()}.cu"
        return "linear_step.cu" if kernel.startswith("linear_step") else "linear_sums.cu"
    found = re.match(r"(window|routed)_(.*?)_(bf16|fp16|fp32)", kernel)
    assert found, kernel
    family, part, dtype = found.groups()
    part = {"merge": "forward", "statistics": "query_gradient"}.get(part, part)
    return f"{family}_{part}_{dtype}.cu"


def header_with(edit: Edit) -> str:
    """The changed text; raises where the edit does not fit."""
    return edit.apply((CSRC / "cuda" / edit.file).read_text())


def _paste(path: Path, edits: tuple[Edit, ...], seen: set[Path]) -> str:
    """A file with what it includes of ours, each header once."""
    path = path.resolve()
    if path in seen:
        return ""
    seen.add(path)
    text = path.read_text()
    for edit in edits:
        if path == (CSRC / "cuda" / edit.file).resolve():
            text = edit.apply(text)
    return _marked(path, text, edits, seen)


def _marked(path: Path, text: str, edits: tuple[Edit, ...], seen: set[Path]) -> str:
    """Text of a file with its includes pasted, so that the compiler still knows its lines."""
    lines = [f'#line 1 "{path.name}"']
    for number, line in enumerate(text.splitlines(), 1):
        included = re.match(r'#include "(.*?)"', line)
        if included:
            lines.append(_paste(path.parent / included.group(1), edits, seen))
            lines.append(f'#line {number + 1} "{path.name}"')
        else:
            lines.append("" if line == "#pragma once" else line)
    return "\n".join(lines) + "\n"


def _only(kernel: str, text: str) -> str:
    """Source text that instantiates lists of kernels, with one kernel of them."""
    listed = [k for k in (*KERNELS, *ROUTED_KERNELS, *LINEAR_KERNELS) if k.name == kernel]
    lines = []
    for line in text.splitlines():
        if re.match(r"ATTNEXT_\w+_KERNELS_\d+\(", line):
            line = listed.pop().instance if listed else ""
        elif re.match(r"ATTNEXT_\w+\(", line) and not re.search(rf"\({kernel}\b", line):
            continue
        lines.append(line)
    return "\n".join(lines) + "\n"


@functools.lru_cache(maxsize=64)
def lone(kernel: str, *edits: Edit, arch: str = "sm_80") -> Program:
    """A program of one kernel."""
    path = CSRC / "cuda" / source_of(kernel)
    pasted = _marked(path, _only(kernel, path.read_text()), edits, set())
    program = load(compile_ptx(pasted, flags=FLAGS, arch=arch))
    assert program.kernels == [kernel], f"{kernel} is not the only one of {program.kernels}"
    return program
