# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels that have static figures: where they are, and how they are launched."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from attnext import _C

from .toolkit import FLAGS

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"

# What makes the other path of a main loop unreachable, so that each is counted alone.
PATHS: dict[str, tuple[str, ...]] = {
    "full": ("-DATTNEXT_ONLY_FULL",),  # no pair is masked
    "edge": ("-DATTNEXT_ONLY_EDGE",),  # pairs are compared with their intervals
    "whole": (),  # a kernel that has no two paths
}


@dataclass(frozen=True)
class Kernel:
    """One kernel of one source.

    ``entry`` is the symbol in the cubin, or a pattern (``*window_fwd*bfloat16*``) that exactly one
    symbol fits: a template's symbol is long. ``threads`` per block and ``dynamic_shared`` bytes are
    what the host launches it with; ``paths`` those of ``PATHS`` that its main loop has, none for a
    kernel without tensor instructions. Headers outside the source's folder must lie under
    ``include``: the cache of cubins is keyed on them. ``flags`` are those that it ships with.
    """

    name: str
    source: Path
    entry: str
    threads: int
    dynamic_shared: int = 0
    paths: tuple[str, ...] = ("full", "edge")
    include: tuple[Path, ...] = ()
    flags: tuple[str, ...] = FLAGS


def source_of(kernel: str) -> Path:
    """The file that has a kernel: window_forward_bf16_64 is in window_forward_bf16.cu."""
    found = re.match(r"window_(.*?)_(bf16|fp16|fp32)", kernel)
    if found is None:
        return CSRC / "cuda" / "window_sums.cu"
    family, dtype = found.groups()
    family = {"merge": "forward", "statistics": "query_gradient"}.get(family, family)
    return CSRC / "cuda" / f"window_{family}_{dtype}.cu"


KERNELS: tuple[Kernel, ...] = tuple(
    Kernel(
        facts["name"],
        source_of(facts["name"]),
        facts["name"],
        facts["threads"],
        facts["shared_bytes"],
        include=(CSRC,),
    )
    for facts in _C.cuda_kernels()
)


def select(patterns: Sequence[str]) -> list[Kernel]:
    """Kernels by name or pattern, all if none is given. Errors: ValueError if one fits none."""
    for pattern in patterns:
        if not any(fnmatch(kernel.name, pattern) for kernel in KERNELS):
            names = ", ".join(kernel.name for kernel in KERNELS)
            raise ValueError(f"no kernel is called {pattern!r}; there are {names}")
    return [k for k in KERNELS if not patterns or any(fnmatch(k.name, p) for p in patterns)]
