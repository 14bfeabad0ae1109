# SPDX-License-Identifier: Apache-2.0
"""Plots: views of a record. Needs matplotlib."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Result = dict[str, Any]
Entry = dict[str, Any]
Series = dict[str, list[tuple[float, float, float, float]]]  # x, y, and the quartiles of y


def draw(record: dict[str, Any], folder: Path) -> list[Path]:
    """Write whatever plots the record has the figures for; the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    sweeps: tuple[tuple[str, str, str, Callable[[Result], float], Callable[..., Any]], ...] = (
        ("time-length", "length", "time per token (µs)", _length, _time_per_token),
        ("time-window", "window", "time (ms)", _window, _time),
        ("memory-window", "window", "extra memory (bytes per token)", _window, _memory),
        ("memory-length", "length", "extra memory (bytes per token)", _length, _memory),
    )
    for name, group, label, x, y in sweeps:
        by_mode: dict[str, Series] = {}
        for (mode, dtype), results in _by_mode(record, group).items():
            series = _series(results, x, y)
            if series:
                by_mode[f"{mode}, {dtype}"] = series
        if by_mode:
            axis = "tokens" if group == "length" else "window (keys)"
            written.append(_lines(by_mode, axis, label, record, folder / f"{name}.png"))
    routers = [r for r in record["results"] if r["group"] == "router-length"]
    if routers:
        written.append(_searches(routers, record, folder / "router-length.png"))
    bars = [r for r in record["results"] if r["group"] not in ("length", "window")]
    if any(_ratios(r) for r in bars):
        written.append(_bars(bars, record, folder / "versus.png"))
    return written


def _length(result: Result) -> float:
    return float(result["length"])


def _window(result: Result) -> float:
    return float(result["window"][0])


def _time(entry: Entry, result: Result) -> tuple[float, float, float] | None:
    if "time" not in entry:
        return None
    return tuple(1e3 * entry["time"][key] for key in ("median", "q25", "q75"))


def _time_per_token(entry: Entry, result: Result) -> tuple[float, float, float] | None:
    times = _time(entry, result)
    if times is None:
        return None
    a, b, c = (1e3 * t / result["tokens"] for t in times)
    return a, b, c


def _memory(entry: Entry, result: Result) -> tuple[float, float, float] | None:
    if "memory" not in entry:
        return None
    value = float(entry["memory"]["bytes_per_token"])
    return value, value, value


def _by_mode(record: dict[str, Any], group: str) -> dict[tuple[str, str], list[Result]]:
    found: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in record["results"]:
        if result["group"] == group:
            found[result["mode"], result["dtype"]].append(result)
    return found


def _series(
    results: list[Result],
    x: Callable[[Result], float],
    y: Callable[[Entry, Result], tuple[float, float, float] | None],
) -> Series:
    series: Series = defaultdict(list)
    for result in results:
        for entry in result["contenders"]:
            values = y(entry, result)
            if values is not None:
                series[entry["name"]].append((x(result), *values))
    return {name: sorted(points) for name, points in series.items()}


def _lines(
    by_mode: dict[str, Series], axis: str, label: str, record: dict[str, Any], path: Path
) -> Path:
    figure, axes = plt.subplots(
        1, len(by_mode), figsize=(6.4 * len(by_mode), 4.8), sharey=True, squeeze=False
    )
    names = sorted({name for series in by_mode.values() for name in series})
    colours = {name: f"C{n % 10}" for n, name in enumerate(names)}
    for ax, (mode, series) in zip(axes[0], by_mode.items(), strict=True):
        for name, points in series.items():
            xs, ys, lows, highs = zip(*points, strict=True)
            own = name == "attnext"
            ax.plot(xs, ys, "o-", label=name, color=colours[name], lw=2.5 if own else 1.2)
            ax.fill_between(xs, lows, highs, color=colours[name], alpha=0.2, lw=0)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel(axis)
        ax.set_title(mode)
        ax.grid(True, which="both", alpha=0.25)
    axes[0][0].set_ylabel(label)
    axes[0][-1].legend(fontsize=8)
    return _finish(figure, record, path)


# What the time of a method's search is to grow as.
_GROWTH: dict[str, tuple[str, str, Callable[[float], float]]] = {
    "hip": (":", "T log T", lambda t: t * math.log(t)),
    "superlinear": ("-.", "T^1.5", lambda t: t**1.5),
}


def _searches(results: list[Result], record: dict[str, Any], path: Path) -> Path:
    """Whole calls of routed methods and their searches against length, beside T log T and T^1.5."""
    figure, ax = plt.subplots(figsize=(6.4, 4.8))
    methods = sorted({str(r["problem"]).split(",")[0] for r in results})
    for colour, method in enumerate(methods):
        points = sorted(
            (r["tokens"], e["time"]["median"], e["searching"])
            for r in results
            for e in r["contenders"]
            if str(r["problem"]).split(",")[0] == method and "time" in e and "searching" in e
        )
        if not points:
            continue
        tokens, whole, search = zip(*points, strict=True)
        ax.plot(tokens, whole, "o-", color=f"C{colour}", label=method)
        ax.plot(tokens, search, "o--", color=f"C{colour}", label=f"{method}, search alone")
        if method in _GROWTH:
            style, growth, curve = _GROWTH[method]
            guide = [search[0] * curve(t) / curve(tokens[0]) for t in tokens]
            ax.plot(tokens, guide, style, color="0.4", lw=1, label=f"growth of {growth}")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("tokens")
    ax.set_ylabel("seconds")
    ax.grid(True, which="both", alpha=0.25)
    ax.legend(fontsize=8, handlelength=3.5)
    return _finish(figure, record, path)


def _ratios(result: Result) -> dict[str, float]:
    times = {e["name"]: e["time"]["median"] for e in result["contenders"] if "time" in e}
    own = times.pop("attnext", None)
    return {} if own is None else {name: t / own for name, t in times.items()}


def _bars(results: list[Result], record: dict[str, Any], path: Path) -> Path:
    """How many times the time of attnext every contender takes, a group of bars a case."""
    shown = [(r, _ratios(r)) for r in results if _ratios(r)]
    names = list(dict.fromkeys(name for _, ratios in shown for name in ratios))
    figure, ax = plt.subplots(figsize=(8, 0.6 + 0.18 * sum(len(r) + 1.5 for _, r in shown)))
    place, ticks = 0.0, []
    for result, ratios in shown:
        start = place
        for name, ratio in ratios.items():
            ax.barh(place, ratio, color=f"C{names.index(name) % 10}")
            text = f" {ratio:.2g}×" if ratio < 10 else f" {ratio:.0f}×"
            ax.annotate(text, (ratio, place), va="center", fontsize=7)
            place += 1
        ticks.append(
            (0.5 * (start + place - 1), f"{result['case']}\n{result['dtype']} {result['mode']}")
        )
        place += 1.5
    ax.set_yticks([t for t, _ in ticks], [text for _, text in ticks], fontsize=7)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.axvline(1, color="k", lw=1)
    ax.set_xlabel("time, as a multiple of attnext's")
    _bar_legend(ax, names)
    return _finish(figure, record, path)


def _bar_legend(ax: Axes, names: list[str]) -> None:
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{n % 10}") for n in range(len(names))]
    ax.legend(handles, names, fontsize=7, loc="lower right")


def _finish(figure: Any, record: dict[str, Any], path: Path) -> Path:
    e = record["environment"]
    foot = f"{e['cpu']}, {e['threads']} threads, {e['isa']}; commit {e['commit']}; {e['date'][:10]}"
    figure.text(0.01, 0.005, foot, fontsize=6, color="0.4")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
