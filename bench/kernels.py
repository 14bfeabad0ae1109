# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels that have static figures: where they are, and how they are launched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from attnext import _C

from .toolkit import FLAGS

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"

# What makes the other path of a main loop unreachable, so that each is counted alone.
PATHS: dict[str, tuple[str, ...]] = {
    "full": ("-DATTNEXT_ONLY_FULL",),  # no pair is masked
    "edge": ("-DATTNEXT_ONLY_EDGE",),  # pairs are compared with their intervals
    "whole": ("-DATTNEXT_WHOLE_SCAN",),  # outputs are made, and tokens enter the state
}


@dataclass(frozen=True)
class Kernel:
    """One kernel of one source.

    ``source`` is a file or a text. ``entry`` is the symbol in the cubin, or a pattern
    (``*window_fwd*bfloat16*``) that exactly one symbol fits: a template's symbol is long.
    ``threads`` per block and ``dynamic_shared`` bytes are what the host launches it with; ``paths``
    those of ``PATHS`` that its main loop has, none for a kernel without tensor instructions.
    Headers outside the source's folder must lie under ``include``: the cache of cubins is keyed on
    them. ``flags`` are those that it ships with.
    """

    name: str
    source: Path | str
    entry: str
    threads: int
    dynamic_shared: int = 0
    paths: tuple[str, ...] = ("full", "edge")
    include: tuple[Path, ...] = ()
    flags: tuple[str, ...] = FLAGS
    instance: str = ""  # of the library's templates


def _instance(facts: dict[str, Any]) -> str:
    """The line that instantiates a kernel of the library."""
    shape = ", ".join(
        str(facts[x]).lower() for x in ("dim", "warps", "frags", "step", "modified", "slices")
    )
    routed = "ROUTED_" if facts["routed"] else ""
    return f"ATTNEXT_{routed}{facts['pass'].upper()}({facts['name']}, {facts['type']}, {shape})"


def _only(facts: dict[str, Any]) -> str:
    """A source with one kernel of the library: what the static figures need compiles in seconds."""
    header = "window_forward.cuh" if facts["pass"] == "forward" else "window_backward.cuh"
    return _alone(header, _instance(facts))


def _alone(header: str, instance: str) -> str:
    return (
        f'#include "cuda/{header}"\nnamespace attnext {{\nnamespace cuda {{\n{instance}\n}}\n}}\n'
    )


def _kernels(routed: bool) -> tuple[Kernel, ...]:
    return tuple(
        Kernel(
            facts["name"],
            _only(facts),
            facts["name"],
            32 * facts["warps"],
            facts["shared_bytes"],
            include=(CSRC,),
            instance=_instance(facts),
        )
        for facts in _C.cuda_kernels()
        if facts["routed"] == routed
    )


KERNELS = _kernels(routed=False)
ROUTED_KERNELS = _kernels(routed=True)

# Scans of linear attention: one path, whose branches are of the problem.
LINEAR_KERNELS: tuple[Kernel, ...] = tuple(
    Kernel(
        facts["name"],
        _alone("linear_entry.cuh", facts["instance"]),
        facts["name"],
        facts["threads"],
        facts["shared_bytes"],
        ("whole",),
        include=(CSRC,),
        instance=facts["instance"],
    )
    for facts in _C.cuda_linear_kernels()
)

# Those of them that most calls run.
LINEAR_MAIN: tuple[Kernel, ...] = tuple(
    kernel
    for kernel in LINEAR_KERNELS
    if kernel.name.removeprefix("linear_scan_bf16_") in ("64", "128", "taylor")
)

# Decoding: it has no tensor instructions.
STEP_KERNELS: tuple[Kernel, ...] = tuple(
    Kernel(
        f"linear_step_{name}",
        _alone("linear_step.cuh", f"ATTNEXT_STEP(linear_step_{name}, {kind})"),
        f"linear_step_{name}",
        256,
        paths=(),
        include=(CSRC,),
    )
    for name, kind in (("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "float"))
)

# What the tools that find the figures are tested with.
_FOLDER = ROOT / "tests" / "ptx" / "kernels"
_GEMM_SHARED = 2 * 2 * 64 * 32 * 2  # stages, operands, tile, bytes
SAMPLES: tuple[Kernel, ...] = (
    Kernel("sample gemm", _FOLDER / "samples.cu", "gemm", 128, _GEMM_SHARED, ("whole",)),
    Kernel("sample attention", _FOLDER / "samples.cu", "attention", 32, 0, ("whole",)),
    Kernel("sample softmax", _FOLDER / "samples.cu", "softmax_rows", 128, 0, ()),
    Kernel("sample paths bf16", _FOLDER / "paths.cu", "*stepped*bfloat16*", 64, 2 * 16 * 72 * 2),
    Kernel("sample paths fp16", _FOLDER / "paths.cu", "*stepped*half*", 64, 2 * 16 * 72 * 2),
)


def select(patterns: Sequence[str]) -> list[Kernel]:
    """Kernels by name or pattern, the library's if none is given. Errors: ValueError if one fits
    none."""
    known = (*KERNELS, *ROUTED_KERNELS, *LINEAR_KERNELS, *STEP_KERNELS, *SAMPLES)
    for pattern in patterns:
        if not any(fnmatch(kernel.name, pattern) for kernel in known):
            names = ", ".join(kernel.name for kernel in known)
            raise ValueError(f"no kernel is called {pattern!r}; there are {names}")
    if not patterns:
        return [*KERNELS, *ROUTED_KERNELS, *LINEAR_MAIN]
    return [k for k in known if any(fnmatch(k.name, p) for p in patterns)]
