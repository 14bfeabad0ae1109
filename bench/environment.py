# SPDX-License-Identifier: Apache-2.0
"""Where and with what figures were taken: the head of every record."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import attnext
from attnext import _C

PACKAGES = ("natten", "local-attention", "pytorch-fast-transformers", "numpy")


def describe() -> dict[str, Any]:
    """CPU, threads, versions, commit and date; JSON values only."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "threads": torch.get_num_threads(),
        "isa": _C.isa(),
        "isas": list(_C.available_isas()),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "attnext": attnext.__version__,
        "commit": _commit(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    fields: dict[str, str] = {}
    for line in lines[:30]:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name, family, model = (fields.get(key) for key in ("model name", "cpu family", "model"))
    return f"{name or 'unknown'} (family {family}, model {model})"


def _commit() -> str | None:
    """Commit of the working tree, with ``+`` where tracked files differ from it."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
