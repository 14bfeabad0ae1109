# SPDX-License-Identifier: Apache-2.0
"""What the run tells: the environment, the table, the record for machines."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

import attnext
from attnext import _C
from attnext.demo.jobs import Result


def environment() -> dict[str, Any]:
    """What the run stands on, as plain values."""
    return {
        "attnext": attnext.__version__,
        "isa": _C.isa(),
        "available_isas": list(_C.available_isas()),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def console() -> Console:
    """The terminal, or 116 columns where there is none to ask."""
    found = Console()
    return found if found.is_terminal else Console(width=116)


def show_environment(out: Console, about: dict[str, Any], sources: dict[str, str]) -> None:
    """The head of the report."""
    isas = f"{about['isa']} (of {', '.join(about['available_isas'])})"
    devices = ", ".join(about["cuda_devices"]) or "none"
    lines = {
        "attnext": f"{about['attnext']}, torch {about['torch']}, Python {about['python']}",
        "runs on": f"{about['cpu']}, {about['threads']} threads; kernels {isas}",
        "CUDA": f"{devices} (the operators run on the CPU)",
        **{name: escape(source) for name, source in sources.items()},
    }
    grid = Table.grid(padding=(0, 2))
    for name, value in lines.items():
        grid.add_row(f"[dim]{name}[/]", value)
    out.print(Panel(grid, border_style="dim", expand=False))


def table(results: list[Result]) -> Table:
    """A row per job: what it is, whether it is right, how long it takes."""
    found = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    found.add_column("operator")
    found.add_column("tokens\n[dim]keys a query", justify="right", no_wrap=True)
    found.add_column("error\n[dim]of budget", justify="right", no_wrap=True)
    found.add_column("attnext\n[dim]ms", justify="right", no_wrap=True)
    found.add_column("torch\n[dim]ms, how", justify="right", no_wrap=True)
    found.add_column("times\n[dim]faster", justify="right", no_wrap=True)
    for result in results:
        job, check = result.job, result.check
        sign = "[green]✓[/]" if check.passed else "[bold red]✗[/]"
        found.add_row(
            f"{job.title}\n[dim]{escape(job.call)}[/]",
            f"{job.tokens}\n[dim]{job.keys:.0f}[/]",
            f"{check.error:.1e} {sign}\n[dim]{check.used:.0%}[/]  ",
            f"{result.milliseconds:.2f}",
            f"{result.rival_milliseconds:.2f}\n[dim]{job.peer}[/]",
            f"{result.rival_milliseconds / result.milliseconds:.1f}",
        )
    return found


def record(
    about: dict[str, Any], sources: dict[str, str], results: list[Result], extra: dict[str, Any]
) -> dict[str, Any]:
    """The run as plain values, for ``--json``."""
    return {
        "environment": about,
        "inputs": sources,
        "jobs": [
            {
                "title": r.job.title,
                "call": r.job.call,
                "tokens": r.job.tokens,
                "keys_per_query": r.job.keys,
                "max_error": r.check.error,
                "budget_used": r.check.used,
                "rows_checked": r.check.rows,
                "passed": r.check.passed,
                "attnext_ms": r.milliseconds,
                "torch_ms": r.rival_milliseconds,
                "torch_way": r.job.peer,
                "repeats": r.repeats,
            }
            for r in results
        ],
        **extra,
    }
