# SPDX-License-Identifier: Apache-2.0
"""nvcc: where it is, and CUDA source into PTX with a cache keyed on all that goes in.

nvcc comes from PATH, from CUDA_HOME, or from its wheels in site-packages. Nothing is skipped when
it is missing: the error says how to get one.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HOW = (
    "no nvcc: put one on PATH, set CUDA_HOME to a CUDA toolkit, or run `pip install "
    "nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-cccl nvidia-cuda-runtime`"
)


class NoNvcc(RuntimeError):
    """There is no nvcc on this machine."""


def _candidates() -> list[Path]:
    found = [Path(p) for p in [shutil.which("nvcc")] if p]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            found.append(Path(os.environ[variable]) / "bin" / "nvcc")
    for folder in sys.path:
        if folder.endswith("-packages"):
            found += sorted(Path(folder).glob("nvidia/*/bin/nvcc"))
    return found


def find_nvcc() -> Path:
    """The nvcc to use; raises the sentence that says how to get one."""
    for path in _candidates():
        if path.is_file() and os.access(path, os.X_OK):
            return path
    raise NoNvcc(HOW)


@functools.lru_cache(maxsize=4)
def version(nvcc: Path) -> str:
    """What ``nvcc --version`` says: part of the cache's key."""
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(root) / "attnext-ptx"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"attnext-ptx-{os.getuid()}"
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def compile_ptx(
    source: str | Path,
    *,
    arch: str = "sm_80",
    include: Sequence[Path] = (),
    flags: Sequence[str] = ("-O3", "-std=c++17"),
) -> str:
    """The PTX of CUDA source (text, or a file). Headers under `include` are part of the key."""
    nvcc = find_nvcc()
    text = source.read_text() if isinstance(source, Path) else source
    key = hashlib.sha256("\0".join([version(nvcc), arch, *flags, text]).encode())
    folders = [*include, *([source.parent] if isinstance(source, Path) else [])]
    for folder in folders:
        for header in sorted(p for p in folder.rglob("*") if p.suffix in (".h", ".cuh", ".inl")):
            key.update(str(header.relative_to(folder)).encode() + header.read_bytes())
    cached = _cache() / f"{key.hexdigest()}.ptx"
    if cached.is_file():
        return cached.read_text()
    with tempfile.TemporaryDirectory() as scratch:
        path = source if isinstance(source, Path) else Path(scratch) / "kernel.cu"
        if not isinstance(source, Path):
            path.write_text(text)
        out = Path(scratch) / "kernel.ptx"
        command = [str(nvcc), "-ptx", f"-arch={arch}", *flags, *(f"-I{i}" for i in include)]
        done = subprocess.run([*command, str(path), "-o", str(out)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc failed on {path}:\n{done.stderr[-4000:]}")
        partial = cached.with_suffix(f".{os.getpid()}")
        partial.write_text(out.read_text())
        partial.replace(cached)  # two processes may compile the same source
    return cached.read_text()
