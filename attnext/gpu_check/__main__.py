# SPDX-License-Identifier: Apache-2.0
"""The command line of ``python -m attnext.gpu_check``."""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .checks import LAUNCHES, run_check
from .isolation import run_isolated
from .names import PROBLEMS, names
from .problems import DTYPES
from .report import environment, markdown, obstacle
from .timing import CASES, run_timing


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m attnext.gpu_check",
        description="Runs attnext's CUDA kernels on this machine's GPU: holds a fixed list of "
        "problems, forward and backward, to float64, checks how they are launched, times a few "
        "cases beside their peers, and writes a report to paste into an issue. Builds nothing.",
        epilog="Exit status: 0 every check passed; 1 a check failed; 2 wrong arguments, or there "
        "is no GPU or no kernel to run on it.",
    )
    found.add_argument("--list", action="store_true", help="name what is checked, and end")
    found.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="problems by name, e.g. 'dim-*'",
    )
    found.add_argument(
        "--dtype", action="append", choices=[*DTYPES], help="only this (default: all three)"
    )
    found.add_argument("--device", type=int, default=0, metavar="N", help="which GPU (default: 0)")
    found.add_argument("--no-timing", action="store_true", help="check only")
    found.add_argument(
        "--timed", default="*", metavar="PATTERN", help="cases to time, e.g. 'lists-*'"
    )
    found.add_argument(
        "--seconds", type=float, default=1.0, metavar="S",
        help="spent on timing each case in each mode (default: %(default)s)",
    )  # fmt: skip
    found.add_argument(
        "--patience", type=float, default=300.0, metavar="S",
        help="seconds after which a check counts as hung (default: %(default)s)",
    )  # fmt: skip
    found.add_argument(
        "--output", type=Path, default=Path("attnext-gpu-check"), metavar="PATH",
        help="report to write, PATH.md and PATH.json (default: %(default)s)",
    )  # fmt: skip
    return found


def _show_list() -> None:
    for name, problem in PROBLEMS.items():
        print(f"{name:24} {problem.describe()}")
    for name, function in LAUNCHES.items():
        print(f"{name:32} {(function.__doc__ or '').strip().splitlines()[0]}")
    for name, case in CASES.items():
        print(f"{name:24} timed: {case.describe()}")


def _run(options: argparse.Namespace, chosen: list[str], timed: list[str]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "environment": environment(options.device), "checks": [], "timings": []
    }  # fmt: skip
    for name, value in record["environment"].items():
        print(f"{name:20} {value}")
    device = f"cuda:{options.device}"
    for check in run_isolated(chosen, run_check, device, options.patience):
        record["checks"].append(check)
        print(f"{'ok  ' if check['passed'] else 'FAIL'} {check['name']} {check.get('error', '')}")
    work = functools.partial(run_timing, seconds=options.seconds)
    for timing in run_isolated(timed, work, device, max(600.0, options.patience)):
        record["timings"].append(timing)
        print(f"timed {timing['name']} {timing.get('error', '')}")
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = parser().parse_args(arguments)
    if options.list:
        _show_list()
        return 0
    try:
        chosen = names(options.only, options.dtype or [*DTYPES])
        timed = [] if options.no_timing else fnmatch.filter(CASES, options.timed)
        if not (timed or options.no_timing):
            raise ValueError(f"no case is called {options.timed!r}; --list names them")
    except ValueError as error:
        print(f"python -m attnext.gpu_check: {error}", file=sys.stderr)
        return 2
    reason = obstacle(options.device)
    if reason is not None:
        print(f"python -m attnext.gpu_check: {reason}", file=sys.stderr)
        return 2
    if not options.only:
        chosen += LAUNCHES
    paths = [options.output.with_name(options.output.name + end) for end in (".md", ".json")]
    if not options.output.parent.is_dir():
        print(f"python -m attnext.gpu_check: no folder {options.output.parent}", file=sys.stderr)
        return 2
    record = _run(options, chosen, timed)
    text = markdown(record)
    paths[0].write_text(text)
    paths[1].write_text(json.dumps(record, indent=1) + "\n")
    failed = [check["name"] for check in record["checks"] if not check["passed"]]
    print(f"\n{len(chosen) - len(failed)} of {len(chosen)} checks passed")
    print(f"Please paste {paths[0]} into an issue, whatever it says; {paths[1]} has everything.")
    broken = [timing for timing in record["timings"] if not timing["passed"]]
    return 1 if failed or broken else 0


if __name__ == "__main__":
    sys.exit(main())
