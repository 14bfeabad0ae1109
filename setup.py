# SPDX-License-Identifier: Apache-2.0
"""Thin driver: setuptools asks for the module ``attnext._C``, CMake builds it.

CMakeLists.txt is the only list of sources and flags. Environment: ``ATTNEXT_CUDA=on|off|auto``,
``CMAKE_ARGS`` (extra configure arguments), ``CMAKE_BUILD_PARALLEL_LEVEL``, ``CXX``,
``ATTNEXT_BUILD_DIR`` (where to build, if what is built is to be looked at afterwards).
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


def cmake_command() -> str:
    """The cmake of the build environment, else the one on PATH.

    The wheel's program is asked for first: a build under isolation has it, and a shim of that
    name on PATH may point to an environment which is gone.
    """
    try:
        from cmake import CMAKE_BIN_DIR

        return str(Path(CMAKE_BIN_DIR) / "cmake")
    except ImportError:
        found = shutil.which("cmake")
        if found is None:
            raise CompileError("attnext needs cmake >= 3.24 to build: pip install cmake") from None
        return found


def ninja_command() -> str | None:
    """The ninja of the build environment, else the one on PATH, else None (CMake then decides)."""
    try:
        from ninja import BIN_DIR

        return str(Path(BIN_DIR) / "ninja")
    except ImportError:
        return shutil.which("ninja")


class CMakeBuild(build_ext):
    """Configures and builds in a temporary folder: no stale path of an earlier build is met."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        output.mkdir(parents=True, exist_ok=True)
        cuda = os.environ.get("ATTNEXT_CUDA", "auto").lower()
        if cuda not in ("on", "off", "auto"):
            raise CompileError(f"ATTNEXT_CUDA is {cuda!r}; allowed: on, off, auto")
        configure = [
            cmake_command(),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DATTNEXT_OUTPUT_DIR={output}",
            f"-DATTNEXT_VERSION={self.distribution.get_version()}",
            f"-DATTNEXT_CUDA={cuda}",
        ]
        ninja = ninja_command()
        if ninja is not None:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(len(os.sched_getaffinity(0))))
        with tempfile.TemporaryDirectory(prefix="attnext-build-") as temporary:
            build = os.environ.get("ATTNEXT_BUILD_DIR") or temporary
            self._run([*configure, "--fresh", "-S", str(ROOT), "-B", build])
            self._run([configure[0], "--build", build, "--target", "_C", "--parallel", jobs])
        if not Path(self.get_ext_fullpath(ext.name)).exists():
            raise CompileError(f"the build ended without {self.get_ext_fullpath(ext.name)}")

    def _run(self, command: list[str]) -> None:
        self.announce(shlex.join(command), level=2)
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"building attnext failed: {error}") from error


setup(ext_modules=[Extension("attnext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
