# SPDX-License-Identifier: Apache-2.0
"""What is built and shipped, and what an import says when something is missing."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import attnext
from attnext import _C

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(attnext.__file__).parent


def python(code: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a fresh interpreter, with `path` before everything else."""
    paths = [*([] if path is None else [path]), PACKAGE.parent]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd="/"
    )


def import_error(path: Path) -> str:
    """The one sentence with which ``import attnext`` fails under `path`."""
    result = python("import attnext", path)
    assert result.returncode == 1, result.stdout
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: attnext"), result.stderr
    return last.removeprefix("ImportError: ")


# ---- import --------------------------------------------------------------------------------------


def test_import_without_torch(tmp_path: Path) -> None:
    stub = 'raise ModuleNotFoundError("No module named \'torch\'", name="torch")\n'
    (tmp_path / "torch.py").write_text(stub)
    sentence = import_error(tmp_path)
    assert "2.6" in sentence and "no torch" in sentence


@pytest.mark.parametrize("version", ["1.13.1", "2.5.1+cu124", "2.0.0a0+git1234"])
def test_import_with_an_old_torch(tmp_path: Path, version: str) -> None:
    (tmp_path / "torch.py").write_text(f"__version__ = {version!r}\n")
    sentence = import_error(tmp_path)
    assert "2.6" in sentence and version in sentence


def test_a_broken_torch_keeps_its_own_error(tmp_path: Path) -> None:
    stub = 'raise ModuleNotFoundError("No module named \'sympy\'", name="sympy")\n'
    (tmp_path / "torch.py").write_text(stub)
    result = python("import attnext", tmp_path)
    assert result.stderr.strip().endswith("No module named 'sympy'")


def test_import_without_the_binary(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "attnext", ignore=shutil.ignore_patterns("*.so"))
    sentence = import_error(tmp_path)
    assert str(tmp_path) in sentence and "pip install" in sentence


def test_import_with_a_broken_binary(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "attnext", ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / "attnext" / Path(_C.__file__).name).write_bytes(b"not a binary")
    assert str(tmp_path) in import_error(tmp_path)


# ---- what is shipped -----------------------------------------------------------------------------


def test_version_is_stated_once() -> None:
    stated = re.findall(r'^version = "(.+?)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert stated == [attnext.__version__]


def test_stubs_name_what_the_binary_has() -> None:
    stub = (PACKAGE / "_C.pyi").read_text()
    stated = set(re.findall(r"^(?:def |class )?(\w+)[(:]", stub, re.M))
    hidden = {name for name in stated | set(dir(_C)) if name[0] == "_"} - {"__version__"}
    assert stated - hidden == set(dir(_C)) - hidden


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel built from the sources where torch must not be touched, and its build folder."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    ignored = shutil.ignore_patterns("*.so", ".git", ".venv*", "build*", "*.egg-info", ".*_cache")
    shutil.copytree(ROOT, sources, ignore=ignored)
    trap = folder / "trap"
    trap.mkdir()
    (trap / "torch.py").write_text('raise SystemExit("the build imported torch")\n')
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-v"]
    result = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(sources)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(trap),
            "ATTNEXT_BUILD_DIR": str(folder / "build"),
            "ATTNEXT_CUDA": "off",  # minutes, and nothing below asks for it
        },
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    (built,) = folder.glob("attnext-*.whl")
    return built, folder / "build"


@pytest.mark.heavy
def test_wheel_content(wheel: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(wheel[0]) as archive:
        names = archive.namelist()
        metadata = next(name for name in names if name.endswith("METADATA"))
        required = archive.read(metadata).decode()
    inside = {name for name in names if name.startswith("attnext/")}
    sources = {
        str(path.relative_to(PACKAGE.parent))
        for path in PACKAGE.rglob("*")
        if path.suffix in (".py", ".pyi") or path.name == "py.typed"
    }
    binaries = {name for name in inside if name.endswith(".so")}
    assert len(binaries) == 1
    assert inside - binaries == sources
    assert {"attnext/py.typed", "attnext/_C.pyi"} <= inside
    assert any(name.endswith("licenses/LICENSE") for name in names)
    outside = {name.split("/")[0] for name in names} - {"attnext"}
    assert all(name.endswith(".dist-info") for name in outside)
    assert re.search(r"^Requires-Dist: torch>=2\.6$", required, re.M)


@pytest.mark.heavy
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_instruction_sets_share_no_code(wheel: tuple[Path, Path]) -> None:
    """The linker keeps one copy of a weak symbol: none may exist both in a unit and elsewhere."""
    objects = list(wheel[1].rglob("*.o"))
    units = {path for path in objects if path.name.startswith("unit_")}
    assert len(units) >= 2 or os.uname().machine != "x86_64"
    holders: defaultdict[str, set[Path]] = defaultdict(set)
    for path in objects:
        listing = subprocess.run(
            ["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True
        )
        for line in listing.stdout.splitlines():
            kind, _, symbol = line.split(maxsplit=1)[1].partition(" ")
            if kind in "WVu":
                holders[symbol].add(path)
    shared = {s: p for s, p in holders.items() if len(p) > 1 and p & units}
    assert not shared, shared
    foreign = [
        symbol
        for symbol, paths in holders.items()
        if paths & units and re.search(r"\b(std|__gnu_cxx|pybind11)::", symbol)
    ]
    assert not foreign, foreign


# ---- what is loaded ------------------------------------------------------------------------------


def test_one_openmp_runtime() -> None:
    """The kernels' threads are torch's: one runtime, torch's own copy of it."""
    code = (
        "import attnext, torch; "
        "x = torch.randn(1, 64, 2, 8); attnext.na1d(x, x, x, 3); "
        "maps = open('/proc/self/maps').read().splitlines(); "
        "print(*{line.split()[-1] for line in maps if 'gomp' in line}, sep='\\n')"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    runtimes = result.stdout.split()
    assert len(runtimes) == 1, runtimes
    assert Path(torch.__file__).parent in Path(runtimes[0]).parents


def test_the_binary_asks_for_no_framework() -> None:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    listing = subprocess.run(
        ["readelf", "--dynamic", _C.__file__], capture_output=True, text=True, check=True
    )
    needed = re.findall(r"NEEDED.*\[(.+?)\]", listing.stdout)
    assert needed and not [name for name in needed if re.search("torch|c10|python|cuda", name)]


# What the binary asks of a tensor, without a GPU to have one on.
CALL_ON_CUDA = """
import torch, attnext
from attnext import _C

class OnCuda:
    is_cpu, is_cuda, device = False, True, "cuda:0"
    def __init__(self, *shape):
        x = self.x = torch.empty(shape)
        self.dtype, self.shape, self.stride, self.data_ptr = x.dtype, x.shape, x.stride, x.data_ptr

rows, lse = OnCuda(1, 70, 2, 32), OnCuda(1, 70, 2)
problem = (rows, rows, rows, *(None,) * 7, [8, 0, 1, 0, 1, 1, 1, 0], [], 0.5, 0.0, 0)
x = torch.ones(1, 70, 2, 32)
assert torch.equal(attnext.sliding_window_attention(x, x, x, 9), x)
print(_C.cuda_architectures)
try:
    _C.CudaForward(problem).run(rows, lse, 16, 16, 0, 0)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_call_without_a_driver_names_the_operator(tmp_path: Path) -> None:
    """Also with kernels built in: .ci/run says where such a module is. It imports, its CPU part
    works, and its CUDA part says what is missing."""
    modules = [Path(_C.__file__)]
    if folder := os.environ.get("ATTNEXT_CUDA_MODULE"):
        modules += Path(folder).glob("_C*.so")
        assert len(modules) == 2
    for k, module in enumerate(modules):
        package = tmp_path / str(k) / "attnext"
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so"))
        shutil.copy(module, package)
        result = python(CALL_ON_CUDA, package.parent)
        assert result.returncode == 0, result.stderr
        architectures, error = result.stdout.splitlines()
        assert error.startswith("attnext window_forward: ")
        assert ("driver" in error or "device" in error) if architectures else "nvcc" in error
        if k == 1:
            versions = [entry.partition("-")[0] for entry in architectures.split()]
            assert versions == ["80", "90", "120"]


def test_the_binary_exports_its_entry_only() -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    listing = subprocess.run(
        ["nm", "--dynamic", "--defined-only", _C.__file__],
        capture_output=True,
        text=True,
        check=True,
    )
    exported = {line.split()[-1] for line in listing.stdout.splitlines()}
    assert {name for name in exported if "attnext" in name} == set()
    assert "PyInit__C" in exported


def test_an_instruction_set_can_be_forced() -> None:
    for name in _C.available_isas():
        code = "from attnext import _C; print(_C.isa())"
        environment = {**os.environ, "ATTNEXT_ISA": name}
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment
        )
        assert result.stdout.strip() == name, result.stderr


def test_the_best_instruction_set_is_taken() -> None:
    """The last, but for bf16 pairs on Intel's cores, where they are slower than numbers."""
    expected = _C.available_isas()[-1]
    if expected == "avx512bf16" and "GenuineIntel" in Path("/proc/cpuinfo").read_text():
        expected = "avx512"
    environment = {n: x for n, x in os.environ.items() if n != "ATTNEXT_ISA"}
    code = "from attnext import _C; print(_C.isa())"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert result.stdout.strip() == expected, result.stderr


def test_an_unknown_instruction_set_is_named() -> None:
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "import attnext, torch; x = torch.ones(1, 4, 1, 8); attnext.na1d(x, x, x, 3)",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "ATTNEXT_ISA": "mmx"},
    )
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "mmx" in last and all(name in last for name in _C.available_isas())


def test_nothing_that_an_old_compiler_stops_at() -> None:
    """That of the oldest torch that is supported, 2.6, knows neither locals() nor unions in
    isinstance()."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
            assert name != "locals", f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and name == "isinstance":
                assert not isinstance(node.args[1], ast.BinOp), f"{path}:{node.lineno}"
