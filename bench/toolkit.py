# SPDX-License-Identifier: Apache-2.0
"""The CUDA toolkit's programs: where they are, and what they make, cached by all that goes in.

They come from PATH, from CUDA_HOME, or from their wheels in site-packages. Nothing is skipped when
one is missing: the error says how to get it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

WHEELS = {
    "nvcc": ("nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-cccl nvidia-cuda-runtime"),
    "nvdisasm": "nvidia-cuda-nvdisasm",
}
FLAGS = ("-O3", "-std=c++17")
HEADERS = (".h", ".cuh", ".inl")


class NoTool(RuntimeError):
    """A program of the CUDA toolkit is not on this machine."""


class Compiled(NamedTuple):
    """What nvcc made, and the path of what it said meanwhile."""

    path: Path
    log: Path


def _candidates(tool: str) -> list[Path]:
    found = [Path(p) for p in [shutil.which(tool)] if p]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            found.append(Path(os.environ[variable]) / "bin" / tool)
    for folder in sys.path:
        if folder.endswith("-packages"):
            found += sorted(Path(folder).glob(f"nvidia/*/bin/{tool}"))
    return found


def find(tool: str) -> Path:
    """The program to use; raises the sentence that says how to get one."""
    for path in _candidates(tool):
        if path.is_file() and os.access(path, os.X_OK):
            return path
    raise NoTool(
        f"no {tool}: put one on PATH, set CUDA_HOME to a CUDA toolkit, or run "
        f"`pip install {WHEELS[tool]}`"
    )


@functools.lru_cache(maxsize=8)
def version(program: Path) -> str:
    """What ``--version`` says: part of the cache's key."""
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(root) / "attnext-cuda"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"attnext-cuda-{os.getuid()}"
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _made(name: str, make: Callable[[Path], None]) -> Path:
    """The file of that name in the cache, made if it is not there."""
    path = _cache() / name
    if not path.is_file():
        with tempfile.TemporaryDirectory(dir=_cache()) as scratch:
            partial = Path(scratch) / name
            make(partial)
            partial.replace(path)  # whole or not at all: two processes may make the same file
    return path


def _run(command: Sequence[str | Path], about: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed on {about}:\n{done.stderr[-4000:]}")
    return done.stdout + done.stderr


def virtual(arch: str) -> str:
    """The architecture whose PTX the library has for one: 8.x share theirs (CMakeLists.txt)."""
    return "compute_80" if arch.startswith("sm_8") else arch.replace("sm_", "compute_")


def compile_cuda(
    source: str | Path,
    kind: str,
    *,
    arch: str = "sm_80",
    include: Sequence[Path] = (),
    flags: Sequence[str] = FLAGS,
) -> Compiled:
    """CUDA source (text, or a file) into `kind`: "ptx" or "cubin", which is made of the former.

    The key is the source, the headers in its folder and under `include`, the flags and nvcc's
    version.
    """
    nvcc = find("nvcc")
    if kind == "cubin":
        ptx = compile_cuda(source, "ptx", arch=virtual(arch), include=include, flags=flags).path
        return _compiled(nvcc, ptx, kind, arch, (), flags)
    return _compiled(nvcc, source, kind, virtual(arch), include, flags)


def _compiled(
    nvcc: Path,
    source: str | Path,
    kind: str,
    arch: str,
    include: Sequence[Path],
    flags: Sequence[str],
) -> Compiled:
    text = source.read_text() if isinstance(source, Path) else source
    key = hashlib.sha256("\0".join([version(nvcc), kind, arch, *flags, text]).encode())
    folders = [*include, *([source.parent] if isinstance(source, Path) and kind == "ptx" else [])]
    for folder in folders:
        for header in sorted(p for p in folder.rglob("*") if p.suffix in HEADERS):
            key.update(str(header.relative_to(folder)).encode() + header.read_bytes())
    stem = key.hexdigest()

    def make(out: Path) -> None:
        path = source if isinstance(source, Path) else out.with_suffix(".cu")
        if not isinstance(source, Path):
            path.write_text(text)
        command = [str(nvcc), f"-{kind}", f"-arch={arch}", *flags, *(f"-I{i}" for i in include)]
        log = out.with_suffix(".log")
        log.write_text(_run([*command, str(path), "-o", str(out)], path))
        log.replace(_cache() / log.name)  # before its product, which says that both are there

    path = _made(f"{stem}.{kind}", make)
    return Compiled(path, path.with_suffix(".log"))


def disassemble(cubin: Path) -> str:
    """The SASS of a cubin, as ``nvdisasm -c`` prints it."""
    nvdisasm = find("nvdisasm")
    key = hashlib.sha256(version(nvdisasm).encode() + cubin.read_bytes())

    def make(out: Path) -> None:
        out.write_text(_run([nvdisasm, "-c", cubin], cubin))

    return _made(f"{key.hexdigest()}.sass", make).read_text()
