# SPDX-License-Identifier: Apache-2.0
"""Where nvcc and nvdisasm are looked for, and the cache of what they make."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import toolkit

NOTHING = 'extern "C" __global__ void nothing() {}\n'


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No toolkit anywhere; a folder to put one."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("tool", ["nvcc", "nvdisasm"])
def test_without_a_program_one_sentence_says_how_to_get_it(bare: Path, tool: str) -> None:
    with pytest.raises(
        toolkit.NoTool, match=rf"no {tool}: .*PATH.*CUDA_HOME.*pip install nvidia-cuda-{tool}"
    ):
        toolkit.find(tool)


@pytest.mark.parametrize("tool", ["nvcc", "nvdisasm"])
@pytest.mark.parametrize("place", ["PATH", "CUDA_HOME", "wheel"])
def test_where_a_program_is_looked_for(
    place: str, tool: str, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = bare / "site-packages"
    folder = {
        "PATH": bare / "tools",
        "CUDA_HOME": bare / "cuda" / "bin",
        "wheel": packages / "nvidia" / "cu13" / "bin",
    }[place]
    folder.mkdir(parents=True)
    program = folder / tool
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    if place == "PATH":
        monkeypatch.setenv("PATH", str(folder))
    elif place == "CUDA_HOME":
        monkeypatch.setenv("CUDA_HOME", str(folder.parent))
    else:
        monkeypatch.setattr("sys.path", [str(packages)])
    assert toolkit.find(tool) == program


@pytest.mark.parametrize("kind", ["ptx", "cubin"])
def test_the_cache_is_keyed_on_content(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, header = tmp_path / "k.cu", tmp_path / "k.cuh"
    source.write_text('#include "k.cuh"\n' + NOTHING)
    header.write_text("__device__ int one;\n")
    flags = (*toolkit.FLAGS, "-Xptxas", "-v") if kind == "cubin" else toolkit.FLAGS
    first = toolkit.compile_cuda(source, kind, flags=flags)
    assert ("Compiling entry function 'nothing'" in first.log.read_text()) == (kind == "cubin")

    def made() -> int:
        return len(list((tmp_path / "cache" / "attnext-cuda").glob(f"*.{kind}")))

    written = first.path.stat().st_mtime_ns
    assert toolkit.compile_cuda(source, kind, flags=flags) == first
    assert first.path.stat().st_mtime_ns == written
    assert made() == 1
    header.write_text("__device__ int two;\n")
    toolkit.compile_cuda(source, kind, flags=flags)
    assert made() == 2
    toolkit.compile_cuda(source, kind, flags=(*flags, "-DX"))
    assert made() == 3
    with pytest.raises(RuntimeError, match="nvcc failed"):
        toolkit.compile_cuda("not CUDA", kind)
    assert made() == 3
