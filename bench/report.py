# SPDX-License-Identifier: Apache-2.0
"""Tables: views of a record, on a terminal (rich) or as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .run import SCHEMA

if TYPE_CHECKING:
    from rich.console import RenderableType

COLUMNS = (
    "contender", "median", "IQR", "n", "vs attnext", "GFLOP/s", "of peak", "GB/s",
    "extra memory", "error ÷ budget",
)  # fmt: skip
NONE = "–"
TIME_UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
BUSY = " (others were using the machine: do not trust the times)"
NO_WINDOW = "† solves another problem: attention over every key, without the window."


def load(path: Path) -> dict[str, Any]:
    """Read a record. Errors: ValueError if the file is none, or of another schema."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON file ({error})") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f"{path} is no record of this benchmark (schema {SCHEMA})")
    return record


def save(record: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def seconds(value: float) -> str:
    """Three digits and a unit.

    Example:
        >>> seconds(0.0123456)
        '12.3 ms'
    """
    unit, scale = next((u for u in TIME_UNITS if value >= u[1]), TIME_UNITS[-1])
    return f"{_three(value / scale)} {unit}"


def size(value: float) -> str:
    """Bytes in binary units.

    Example:
        >>> size(3 * 2**20)
        '3.00 MiB'
    """
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return f"{_three(value / scale)} {unit}"
    return f"{value:.0f} B"


def _three(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _own_time(result: dict[str, Any]) -> float | None:
    for entry in result["contenders"]:
        if entry["name"] == "attnext" and "time" in entry:
            return float(entry["time"]["median"])
    return None


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row for each contender that was admitted, in the order of ``COLUMNS``."""
    own = _own_time(result)
    table = []
    for entry in result["contenders"]:
        if entry.get("status") != "ok":
            continue
        name = entry["name"] + ("" if entry["windowed"] else " †")
        row = [name, NONE, NONE, NONE, NONE, NONE, NONE, NONE]
        if "time" in entry:
            t = entry["time"]
            row[1] = seconds(t["median"])
            row[2] = f"{seconds(t['q25'])} to {seconds(t['q75'])}"
            row[3] = str(t["n"])
            if own:
                row[4] = f"{t['median'] / own:.2f}×"
        if "flops_per_second" in entry:
            row[5] = f"{entry['flops_per_second'] / 1e9:.1f}"
            row[7] = f"{entry['bytes_per_second'] / 1e9:.1f}"
        if "share_of_peak" in entry:
            row[6] = f"{entry['share_of_peak']:.0%}"
        memory = entry.get("memory")
        row.append(
            f"{size(memory['bytes'])} ({memory['bytes_per_token']:.0f} B a token)"
            if memory
            else NONE
        )
        name, (error, budget) = max(
            entry["gate"]["errors"].items(), key=lambda item: _used(*item[1])
        )
        row.append(f"{_used(error, budget):.2f} ({name}, {error:.1e})")
        table.append(tuple(row))
    return table


def _used(error: float, budget: float) -> float:
    """Share of the budget; a result that is zero by nature has none and no error."""
    return error / budget if budget else 0.0


def title(result: dict[str, Any]) -> str:
    return f"{result['case']}, {result['dtype']}, {result['mode']}"


def caption(result: dict[str, Any]) -> str:
    """The problem, its useful work and the roof above it."""
    peak = result["peak_flops"]
    words = [
        result["problem"],
        *([f"{result['flops'] / 1e9:.3g} GFLOP in the window"] if result["flops"] else []),
        f"{size(result['bytes'])} read and written",
        f"measured FMA peak {peak / 1e9:.0f} GFLOP/s" if peak else "FMA peak n/a",
        f"copy {result['bandwidth'] / 1e9:.1f} GB/s",
    ]
    return "; ".join(words)


def remarks(result: dict[str, Any]) -> Iterator[str]:
    """What the table leaves out: variants chosen, contenders without a figure and why."""
    for entry in result["contenders"]:
        if entry.get("status") != "ok":
            yield f"{entry['name']} {entry['status']}: {entry['reason']}"
        elif "detail" in entry:
            yield f"{entry['name']}: {entry['detail']}"
        if "memory_reason" in entry:
            yield f"{entry['name']}, memory not measured: {entry['memory_reason']}"
    if any(not e["windowed"] and e.get("status") == "ok" for e in result["contenders"]):
        yield NO_WINDOW


def environment_lines(record: dict[str, Any]) -> Iterator[str]:
    """The head of a report."""
    e, s = record["environment"], record["settings"]
    yield f"{e['cpu']}, {e['cores']} cores, {e['memory_gib']} GiB, {e['system']}"
    yield (
        f"{e['threads']} threads; attnext {e['attnext']} (commit {e['commit'] or 'unknown'}) on "
        f"{e['isa']} of {', '.join(e['isas'])}; torch {e['torch']} on {e['torch_cpu_capability']}; "
        f"Python {e['python']}"
    )
    installed = [f"{name} {version}" for name, version in e["packages"].items() if version]
    missing = [name for name, version in e["packages"].items() if not version]
    yield "; ".join(
        filter(
            None,
            [
                ", ".join(installed),
                f"not installed: {', '.join(missing)}" if missing else "",
                f"{s['rounds']} interleaved rounds or {s['budget']:g} s a case",
                f"load {e['load']} at the start" + (BUSY if e["load"] > 0.5 * e["cores"] else ""),
                e["date"],
            ],
        )
    )


def markdown(record: dict[str, Any]) -> str:
    """The whole record as Markdown."""
    lines = [f"- {line}" for line in environment_lines(record)]
    for result in record["results"]:
        lines += ["", f"### {title(result)}", "", caption(result) + ".", ""]
        table = rows(result)
        if table:
            lines.append("| " + " | ".join(COLUMNS) + " |")
            lines.append("| --- |" + " ---: |" * (len(COLUMNS) - 1))
            lines += ["| " + " | ".join(row) + " |" for row in table]
            lines.append("")
        lines += [f"- {remark}" for remark in remarks(result)]
    return "\n".join(lines).rstrip() + "\n"


def renderable(result: dict[str, Any]) -> RenderableType:
    """One result as a rich table. Needs rich."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title(result), caption=caption(result), title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "contender" else "right")
    for row in rows(result):
        table.add_row(*row, style="bold" if row[0] == "attnext" else None)
    notes = [Text("  " + remark, style="dim") for remark in remarks(result)]
    return Group(table, *notes)
