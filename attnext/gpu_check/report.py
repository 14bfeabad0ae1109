# SPDX-License-Identifier: Apache-2.0
"""What was found, as plain values (the record) and as text to paste into an issue."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shutil
import subprocess
from typing import Any

import torch

import attnext
from attnext import _C

from .names import PROBLEMS

SANITIZER = (
    "CUDA's own checker says which access of which kernel is wrong, race by race: "
    "`compute-sanitizer --target-processes all --tool memcheck python -m attnext.gpu_check "
    "--no-timing --only {name}`, and the same with `--tool racecheck`."
)

TIMES = (
    "Milliseconds of a call: median of interleaved samples, the L2 cache overwritten before each "
    "(quartiles); then of its kernels alone, and their useful TFLOP/s."
)


def covers(built: str, capability: tuple[int, int]) -> bool:
    """Whether kernels built for a list like "80-real 120" run on a GPU of that capability.

    Real code serves later minor versions of its major one; PTX (no "-real") serves all later ones.
    """
    own = capability[0] * 10 + capability[1]
    for entry in built.split():
        number, _, kind = entry.partition("-")
        version = int("".join(c for c in number if c.isdigit()))
        if kind != "virtual" and version // 10 == capability[0] and version <= own:
            return True
        if kind != "real" and version <= own:
            return True
    return False


def obstacle(device: int) -> str | None:
    """Why nothing can be checked, in one sentence; None if it can."""
    if not _C.cuda_architectures:
        return (
            "this build of attnext has no CUDA kernels: install it where nvcc is found, with "
            "ATTNEXT_CUDA=on to be told if it is not"
        )
    if torch.version.cuda is None:
        return f"this torch, {torch.__version__}, is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    if not 0 <= device < torch.cuda.device_count():
        return f"there is no CUDA device {device}, only {torch.cuda.device_count()}"
    capability = torch.cuda.get_device_capability(device)
    if not covers(_C.cuda_architectures, capability):
        return (
            f"the kernels are built for {_C.cuda_architectures}, which "
            f"{torch.cuda.get_device_name(device)} (compute capability "
            f"{capability[0]}.{capability[1]}) does not run: see ATTNEXT_CUDA_ARCHITECTURES"
        )
    return None


def environment(device: int) -> dict[str, Any]:
    """GPU, driver, versions; JSON values only."""
    about: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "attnext": attnext.__version__,
        "kernels for": _C.cuda_architectures,
        "torch": str(torch.__version__),
        "CUDA of torch": torch.version.cuda,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "CPU kernels": _C.isa(),
    }
    for name in ("triton", "natten"):
        try:
            about[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            about[name] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "GPU": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "SMs": properties.multi_processor_count,
            "memory": f"{properties.total_memory / 2**30:.1f} GiB",
            "GPUs": torch.cuda.device_count(),
            "driver": _driver(),
        }
    return about


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[0].strip() or None


def markdown(record: dict[str, Any]) -> str:
    """The record as an issue would show it: what failed comes first."""
    checks, timings = record["checks"], record["timings"]
    failed = [check for check in checks if not check["passed"]]
    verdict = f"{len(checks) - len(failed)} of {len(checks)} checks passed"
    lines = ["# attnext on a GPU", "", f"**{verdict}.**", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in record["environment"].items()]
    if failed:
        lines += ["", "## Failed", ""]
        lines += [f"- `{c['name']}` ({_about(c['name'])}): {_line(c['error'])}" for c in failed]
        lines += ["", SANITIZER.format(name=failed[0]["name"].partition("/")[0])]
    held = [check for check in checks if check["passed"] and "used" in check]
    if held:
        lines += ["", "## Held to float64", ""]
        lines += ["Largest share of the error budget, and largest difference from the CPU kernels."]
        lines += ["", "| problem | of the budget | in | from the CPU |", "|---|---|---|---|"]
        for check in held:
            result, used = max(check["used"].items(), key=lambda item: item[1], default=("-", 0.0))
            lines.append(f"| `{check['name']}` | {used:.0%} | {result} | {check['from_cpu']:.1e} |")
    launches = [check for check in checks if "/" not in check["name"]]
    if launches:
        lines += ["", "## Launches", ""]
        lines += [f"- `{c['name']}`: {'passed' if c['passed'] else 'FAILED'}" for c in launches]
    if timings:
        lines += ["", "## Times", "", TIMES, ""]
        for timing in timings:
            if not timing["passed"]:
                lines.append(f"- `{timing['name']}`: {_line(timing['error'])}")
            for row in timing["rows"]:
                lines.append(f"- {row['about']}, {row['mode']}")
                lines += [f"  - {_figure(n, r, row['flops'])}" for n, r in row["results"].items()]
    return "\n".join(lines) + "\n"


def _figure(name: str, result: dict[str, Any], flops: float) -> str:
    if "missing" in result:
        return f"{name}: none ({result['missing']})"
    return (
        f"{name}: {result['median']:.3f} ({result['q25']:.3f} to {result['q75']:.3f}, "
        f"n {result['n']}); kernels {result['kernels']:.3f} "
        f"[{flops / result['kernels'] / 1e9:.1f}]"
    )


def _line(text: str) -> str:
    return " ".join(text.split())[:500]


def _about(name: str) -> str:
    problem = PROBLEMS.get(name.rpartition("/")[0])
    return problem.describe() if problem else "launch"
