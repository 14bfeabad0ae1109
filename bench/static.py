# SPDX-License-Identifier: Apache-2.0
"""What a cubin tells without a GPU: registers, spills, shared memory, blocks per SM, and the
instructions of the main loop per tensor instruction.

Registers and spills are those of the kernel as it ships. A path of the main loop is counted in a
build of its own, in which the other path is unreachable (``kernels.PATHS``).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from . import sass
from .kernels import PATHS, Kernel
from .occupancy import LIMITS, Occupancy, occupancy
from .toolkit import Compiled, compile_cuda, disassemble, find, version

ARCHITECTURES = tuple(LIMITS)
BUDGET = Path(__file__).with_name("static_budget.json")
HOW = "python -m bench static --write-budget"
_PTXAS = re.compile(
    r"Compiling entry function '(?P<entry>[^']+)'"
    r"|Function properties for (?P<function>\S+)"
    r"|(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads"
    r"|Used (?P<registers>\d+) registers(?P<rest>.*)"
)


@dataclass(frozen=True)
class Resources:
    """What ptxas says of a kernel; bytes, and registers per thread."""

    registers: int
    stack: int
    spills: int  # stores and loads
    shared: int  # static


@dataclass(frozen=True)
class Count:
    """Instructions in one trip around the main loop, without NOPs.

    ``every`` has all that lies in the loop, ``lean`` the leanest iteration
    (``sass.leanest_iteration``); ``mix`` is that of the lean one by class.
    """

    tensor: int
    every: int
    lean: int
    mix: dict[str, int]


@dataclass(frozen=True)
class Figures:
    """One kernel on one architecture."""

    kernel: str
    arch: int
    resources: Resources
    shared: int  # static and dynamic
    occupancy: Occupancy
    loops: dict[str, Count] = field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """What a budget limits, by the names it uses."""
        found: dict[str, float] = {
            "registers": self.resources.registers,
            "stack bytes": self.resources.stack,
            "spill bytes": self.resources.spills,
            "blocks per SM": self.occupancy.blocks,
        }
        for path, count in self.loops.items():
            # Rounded: the budget is read by people.
            found[f"instructions per HMMA, {path}"] = round(count.every / count.tensor, 2)
            found[f"instructions per HMMA, {path}, lean"] = round(count.lean / count.tensor, 2)
        return found


# ---- from the toolkit's words to figures ----


def resources(log: str) -> dict[str, Resources]:
    """The kernels in what ``ptxas -v`` prints, by symbol."""
    found: dict[str, Resources] = {}
    entry = function = ""
    frame = (0, 0)
    for line in _PTXAS.finditer(log):
        if line["entry"]:
            entry, frame = line["entry"], (0, 0)
        elif line["function"]:
            function = line["function"]
        elif line["stack"]:
            if function == entry:
                frame = (int(line["stack"]), int(line["stores"]) + int(line["loads"]))
        elif entry:
            shared = re.search(r"(\d+) bytes smem", line["rest"])
            found[entry] = Resources(
                int(line["registers"]), *frame, int(shared[1]) if shared else 0
            )
    return found


def count(function: sass.Function) -> Count:
    """The main loop of a kernel. Errors: SassError if no loop has tensor instructions."""
    flow = sass.graph(function)
    loop = sass.main_loop(flow)
    if loop is None:
        raise sass.SassError(f"{function.name}: no loop with tensor instructions")
    every, lean = sass.mix(loop.code(flow)), sass.mix(sass.leanest_iteration(flow, loop))
    return Count(every[sass.TENSOR], every.total(), lean.total(), dict(lean))


def symbol(kernel: Kernel, symbols: Iterable[str]) -> str:
    """The one symbol that a kernel's ``entry`` means. Errors: ValueError if it is not one."""
    symbols = list(symbols)
    found = [s for s in symbols if fnmatchcase(s, kernel.entry)]
    if len(found) != 1:
        raise ValueError(
            f"{kernel.name}: {len(found)} symbols of its source fit {kernel.entry!r}: "
            f"{', '.join(sorted(found or symbols))}"
        )
    return found[0]


def _compile(kernel: Kernel, arch: int, defines: tuple[str, ...]) -> Compiled:
    flags = (*kernel.flags, *defines, "-Xptxas", "-v")
    return compile_cuda(
        kernel.source, "cubin", arch=f"sm_{arch}", include=kernel.include, flags=flags
    )


@functools.lru_cache(maxsize=4)
def _parsed(cubin: Path) -> dict[str, sass.Function]:
    return sass.parse(disassemble(cubin))


def measure(kernel: Kernel, arch: int, *, loops: bool = True) -> Figures:
    """All figures of a kernel; without `loops` those of a plain build: no disassembly."""
    found = resources(_compile(kernel, arch, ()).log.read_text())
    own = found[symbol(kernel, found)]
    shared = own.shared + kernel.dynamic_shared
    held = occupancy(arch, registers=own.registers, threads=kernel.threads, shared=shared)
    counts = {}
    for path in kernel.paths if loops else ():
        functions = _parsed(_compile(kernel, arch, PATHS[path]).path)
        counts[path] = count(functions[symbol(kernel, functions)])
    return Figures(kernel.name, arch, own, shared, held, counts)


def measure_all(
    kernels: Sequence[Kernel], architectures: Sequence[int], *, loops: bool = True, jobs: int = 1
) -> list[Figures]:
    """Kernel by kernel; `jobs` compilations at once."""
    builds = {
        (k.source, k.include, k.flags, arch, defines): (k, arch, defines)
        for arch in architectures  # not side by side: some are made of the same PTX
        for k in kernels
        for defines in [(), *(PATHS[path] for path in (k.paths if loops else ()))]
    }
    with ThreadPoolExecutor(jobs) as pool:  # fills the cache
        list(pool.map(lambda build: _compile(*build), builds.values()))
    # By source and architecture, so that a disassembly is parsed once for all its kernels.
    order = sorted(
        ((k, arch) for k in kernels for arch in architectures),
        key=lambda pair: (str(pair[0].source), pair[1]),
    )
    found = {(k.name, arch): measure(k, arch, loops=loops) for k, arch in order}
    return [found[k.name, arch] for k in kernels for arch in architectures]


# ---- the budget ----


def load_budget(path: Path | None = None) -> dict[str, Any]:
    """``kernels``: limits by kernel, architecture and figure; ``nvcc``: its release then."""
    budget: dict[str, Any] = json.loads((path or BUDGET).read_text(encoding="utf-8"))
    return budget


def write_budget(
    figures: Iterable[Figures], names: Iterable[str], path: Path | None = None
) -> None:
    """Let the budget be what the figures are; what was not measured stays, if `names` has it."""
    path = path or BUDGET
    kept = load_budget(path)["kernels"] if path.is_file() else {}
    kernels: dict[str, dict[str, dict[str, float]]] = {n: kept.get(n, {}) for n in names}
    for each in figures:
        kernels[each.kernel][str(each.arch)] = each.numbers()
    budget = {"nvcc": nvcc_release(), "kernels": {n: k for n, k in kernels.items() if k}}
    path.write_text(json.dumps(budget, indent=1) + "\n", encoding="utf-8")


def over_budget(figures: Figures, budget: dict[str, Any]) -> list[str]:
    """A sentence for each figure that is worse than its limit, or has none."""
    limits = budget["kernels"].get(figures.kernel, {}).get(str(figures.arch))
    what = f"{figures.kernel}, sm_{figures.arch}"
    if limits is None:
        return [f"{what}: no budget; {HOW}"]
    sentences = []
    for name, value in figures.numbers().items():
        least = name == "blocks per SM"
        if name not in limits:
            sentences.append(f"{what}: {name} has no budget; {HOW}")
        elif (value < limits[name]) if least else (value > limits[name]):
            bound = "at least" if least else "at most"
            sentences.append(
                f"{what}: {name} is {value:g}, {bound} {limits[name]:g} allowed "
                f"(the budget is from nvcc {budget['nvcc']}, this is {nvcc_release()})"
            )
    return sentences


def nvcc_release() -> str:
    """As in ``13.0.88``."""
    found = re.search(r"\bV([\d.]+)", version(find("nvcc")))
    return found[1] if found else "of unknown release"


# ---- tables ----

COLUMNS = (
    "kernel", "sm", "registers", "stack", "spills", "shared", "blocks/SM", "held back by", "warps",
    "path", "HMMA", "per HMMA", "lean",
)  # fmt: skip
NOTE = (
    "Bytes for stack, spills (stores and loads) and shared (static and dynamic). Warps: share of "
    "those an SM can hold. HMMA: tensor instructions in the main loop. Per HMMA: instructions in "
    "the loop, NOPs left out; lean: in the shortest iteration with all HMMA and all asynchronous "
    "copies, that is without what a branch skips."
)


def rows(figures: Iterable[Figures]) -> Iterator[tuple[str, ...]]:
    """A line for each path, in the order of ``COLUMNS``."""
    for f in figures:
        own = f.resources
        head = (
            f.kernel, str(f.arch), str(own.registers), str(own.stack), str(own.spills),
            str(f.shared), str(f.occupancy.blocks), ", ".join(f.occupancy.by),
            f"{f.occupancy.share:.0%}",
        )  # fmt: skip
        if not f.loops:
            yield (*head, *["–"] * 4)
        for path, c in f.loops.items():
            ratios = (f"{c.every / c.tensor:.2f}", f"{c.lean / c.tensor:.2f}")
            yield (*head, path, str(c.tensor), *ratios)


def mixes(figures: Iterable[Figures]) -> list[tuple[str, ...]]:
    """The lean iteration by class, a head and a line for each path; empty without loops."""
    counted = [(f, path, c) for f in figures for path, c in f.loops.items()]
    classes = [sass.TENSOR, *sass.CLASSES, sass.OTHER]
    used = [name for name in classes if any(c.mix.get(name) for _, _, c in counted)]
    lines = [
        (f.kernel, str(f.arch), path, *(str(c.mix.get(name, 0)) for name in used))
        for f, path, c in counted
    ]
    return [("kernel", "sm", "path", *used), *lines] if lines else []


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table; the first column is text, the others are figures."""
    table = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    table += ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join(table)
