# SPDX-License-Identifier: Apache-2.0
"""CUDA source into PTX, by the nvcc and the cache that the static figures use too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.toolkit import FLAGS, compile_cuda


def compile_ptx(
    source: str | Path,
    *,
    arch: str = "sm_80",
    include: Sequence[Path] = (),
    flags: Sequence[str] = FLAGS,
) -> str:
    """The PTX of CUDA source (text, or a file). Headers under `include` are part of the key."""
    return compile_cuda(source, "ptx", arch=arch, include=include, flags=flags).path.read_text()
