# SPDX-License-Identifier: Apache-2.0
"""The picture: who attends whom (drawn from the geometry), and where attention goes.

The maps are not computed beside the operator but by it: the gradient of one query's output with
respect to the values is that query's row of attention weights, so a backward call tells it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.patches as shapes
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from torch import Tensor

import attnext
from attnext.demo.data import Inputs, Picture, Text
from attnext.demo.jobs import (
    DILATION,
    KERNEL,
    REGION,
    REGIONS,
    SINKS,
    SMALL_KERNEL,
    TEXT_WINDOW,
    WINDOW,
    routed_mask,
)
from attnext.geometry import AxisRule, axis_mask

INK, PAPER, GRID = "#1d2733", "#ffffff", "#d5dbe1"
SEEN, QUERY, OTHER = "#2a78b5", "#e8590c", "#f1f4f7"
QUERY_COLOURS = ("#e8590c", "#0ca678", "#d6336c")
COLUMNS, LINES = 140, 4  # of text
HEAT = LinearSegmentedColormap.from_list("heat", ["#f8f9fa", "#ffe066", "#ff922b", "#c92a2a"])

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention_row(attend: Attend, data: Inputs, place: Sequence[int], head: int) -> Tensor:
    """The weights with which query `place` of `head` attends every key, ``[*tokens]``."""
    value = data.value.detach().clone().requires_grad_()
    out = attend(data.query, data.key, value)
    (weights,) = torch.autograd.grad(out[(0, *place, head, 0)], value)
    group = data.query.shape[-2] // data.key.shape[-2]
    return weights[0, ..., head // group, 0]


def _bare(axes: Axes, title: str, note: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(GRID)
    axes.set_title(title, fontsize=10.5, color=INK, fontweight="bold", pad=5)
    axes.set_xlabel(note, fontsize=8.5, color=INK, labelpad=4)


def _cells(axes: Axes, seen: np.ndarray[Any, Any]) -> None:
    """A grid of cells: 0 unseen, 1 seen, 2 the query. Many cells have no room for edges."""
    colours = LinearSegmentedColormap.from_list("cells", [OTHER, SEEN, QUERY], N=3)
    edges: dict[str, Any] = {}
    if len(seen) <= 20:
        edges = {"edgecolors": PAPER, "linewidth": 0.8}
    axes.pcolormesh(seen, cmap=colours, vmin=0, vmax=2, **edges)
    axes.invert_yaxis()
    axes.set_aspect("equal")


def _two_queries(
    axes: Axes, rule: AxisRule, queries: Sequence[tuple[int, int]], title: str, note: str, side: int
) -> None:
    """What some queries of a ``side x side`` grid see, the same rule on both axes."""
    mask = axis_mask(rule, side, side)
    seen = torch.zeros(side, side)
    for row, column in queries:
        seen[mask[row][:, None] & mask[column][None, :]] = 1
    for row, column in queries:
        seen[row, column] = 2
    _cells(axes, seen.numpy())
    _bare(axes, title, note)


def _tiles(axes: Axes, side: int, window: int, shift: int) -> None:
    """The tiles of shifted windows, one query's in colour."""
    rule = AxisRule.from_kernel_size(window, stride=window, phase=shift, boundary="truncate")
    _two_queries(
        axes,
        rule,
        [(side // 2, side // 2), (0, 0)],
        "Shifted windows",
        f"window {window}, shift {shift}",
        side,
    )
    for edge in range(shift, side, window):
        axes.axhline(edge, color=INK, linewidth=1.0)
        axes.axvline(edge, color=INK, linewidth=1.0)


def _sliding(axes: Axes, length: int, window: int, sinks: int) -> None:
    """The whole mask of a causal sliding window with sinks: queries down, keys across."""
    rule = AxisRule(left=window - 1, right=0, is_causal=True, boundary="truncate")
    mask = axis_mask(rule, length, length)
    row, column = torch.arange(length)[:, None], torch.arange(length)[None, :]
    seen = (mask | ((column < sinks) & (column <= row))).float()
    seen.fill_diagonal_(2)
    _cells(axes, seen.numpy())
    _bare(axes, "Sliding window", f"window {window}, {sinks} sinks; keys →, queries ↓")


def _lists(axes: Axes, data: Inputs) -> None:
    """Which regions of the image each region attends: queries down, keys across."""
    blocks = attnext.Blocks.of(data.extents, REGION)
    assert blocks.order is not None
    first = blocks.order[blocks.offsets[:-1].long()].long()
    seen = routed_mask(data)[first][:, first].float()
    _cells(axes, seen.numpy())
    _bare(axes, "Routed", f"{REGIONS} of {len(first)} regions each; keys →, queries ↓")


def _geometry(row: Sequence[Axes], data: Inputs) -> None:
    """Who attends whom, six small grids."""
    side = 15
    around = AxisRule.from_kernel_size(7)
    _two_queries(
        row[0], around, [(9, 9), (0, 0)], "Neighborhood", "kernel 7; shifts inward at edges", side
    )
    apart = AxisRule.from_kernel_size(5, dilation=2)
    _two_queries(row[1], apart, [(8, 8), (1, 1)], "Dilated", "kernel 5, dilation 2", side)
    before = AxisRule.from_kernel_size(7, is_causal=True)
    _two_queries(row[2], before, [(9, 9), (2, 3)], "Causal", "kernel 7 on both axes", side)
    _tiles(row[3], side, 4, 2)
    _sliding(row[4], side, 5, 2)
    _lists(row[5], data)


def _points(data: Inputs) -> list[tuple[int, int]]:
    """Three queries well apart; on the portrait: a face, a flag, a row of ribbons."""
    rows, columns = data.extents
    return [
        (int(rows * y), int(columns * x)) for y, x in ((0.40, 0.52), (0.58, 0.11), (0.84, 0.86))
    ]


def _mark(axes: Axes, point: tuple[int, int], colour: str) -> None:
    axes.add_patch(
        shapes.Rectangle(point[::-1], 1, 1, facecolor=colour, edgecolor=PAPER, linewidth=1.0)
    )


def _photograph(axes: Axes, picture: Picture, points: Sequence[tuple[int, int]]) -> None:
    rows, columns = picture.grid
    axes.imshow(picture.pixels.numpy(), extent=(0, columns, rows, 0))
    for point, colour in zip(points, QUERY_COLOURS, strict=True):
        centre = (point[1] + 0.5, point[0] + 0.5)
        axes.add_patch(shapes.Circle(centre, 2.2, fill=False, edgecolor=PAPER, linewidth=4.0))
        axes.add_patch(shapes.Circle(centre, 2.2, fill=False, edgecolor=colour, linewidth=2.2))
    _bare(axes, "Three queries", f"{rows} × {columns} patches")


def _map(
    axes: Axes,
    picture: Picture,
    weights: Sequence[Tensor],
    points: Sequence[tuple[int, int]],
    title: str,
    note: str,
) -> None:
    """The faded photograph under each query's weights, in its colour; frames hold what it sees."""
    rows, columns = picture.grid
    frame = (0.0, float(columns), float(rows), 0.0)
    grey = picture.pixels.mean(-1).numpy() * 0.4 + 0.58
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=frame)
    for weight, point, colour in zip(weights, points, QUERY_COLOURS, strict=True):
        layer = np.empty((rows, columns, 4), dtype=np.float32)
        layer[...] = to_rgba(colour)
        layer[..., 3] = (weight / weight.max()).sqrt().numpy()
        axes.imshow(layer, extent=frame)
        seen = weight.nonzero()
        (top, left), (bottom, right) = seen.amin(0).tolist(), seen.amax(0).tolist()
        size = (right - left + 1, bottom - top + 1)
        axes.add_patch(
            shapes.Rectangle((left, top), *size, fill=False, edgecolor=colour, linewidth=1.0)
        )
        _mark(axes, point, colour)
    _bare(axes, title, note)


def _outline_regions(axes: Axes, data: Inputs, points: Sequence[tuple[int, int]]) -> None:
    """The regions that the queries' own are routed to, in place of the frame around all of them."""
    for frame in [patch for patch in axes.patches if not patch.get_fill()]:
        frame.remove()
    rows, columns = data.extents
    seen = routed_mask(data)
    for (y, x), colour in zip(points, QUERY_COLOURS, strict=True):
        of_query = seen[y * columns + x].view(rows, columns)
        for top in range(0, rows, REGION):
            for left in range(0, columns, REGION):
                if of_query[top, left]:
                    size = (min(REGION, columns - left), min(REGION, rows - top))
                    axes.add_patch(
                        shapes.Rectangle(
                            (left, top), *size, fill=False, edgecolor=colour, linewidth=1.2
                        )
                    )


def _maps(row: Sequence[Axes], data: Inputs, picture: Picture) -> None:
    """Where attention goes on the image under five rules."""
    points = _points(data)
    _photograph(row[0], picture, points)
    wide = 2 * KERNEL + 5
    ways: list[tuple[str, str, Attend]] = [
        ("na2d", f"kernel {wide}", lambda q, k, v: attnext.na2d(q, k, v, wide)),
        (
            "na2d, dilated",
            f"kernel {SMALL_KERNEL}, dilation {DILATION}",
            lambda q, k, v: attnext.na2d(q, k, v, SMALL_KERNEL, dilation=DILATION),
        ),
        (
            "na2d, causal",
            f"kernel {wide}",
            lambda q, k, v: attnext.na2d(q, k, v, wide, is_causal=True),
        ),
        (
            "window_attention",
            f"window {2 * WINDOW}, shift {WINDOW}",
            lambda q, k, v: attnext.window_attention(q, k, v, 2 * WINDOW, WINDOW),
        ),
        (
            "bilevel_routing_attention",
            f"{REGIONS} regions of {REGION} × {REGION}",
            lambda q, k, v: attnext.bilevel_routing_attention(q, k, v, REGION, REGIONS),
        ),
    ]
    for axes, (title, note, attend) in zip(row[1:], ways, strict=True):
        weights = [attention_row(attend, data, point, head=0) for point in points]
        _map(axes, picture, weights, points, title, note)
    _outline_regions(row[-1], data, points)


def _text(axes: Axes, text: Text, data: Inputs) -> None:
    """The bytes before one query, shaded by how much it attends them."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attnext.sliding_window_attention(q, k, v, TEXT_WINDOW, sinks=SINKS)

    query = _telling_query(text)
    weights = attention_row(attend, data, (query,), head=3)
    first = max(query + 1 - LINES * COLUMNS, 0)
    shade = (weights / weights.max()).sqrt()
    for place in range(first, query + 1):
        line, column = divmod(place - first, COLUMNS)
        colour = QUERY if place == query else HEAT(float(shade[place]))
        axes.add_patch(shapes.Rectangle((column, line), 1, 1, color=colour, linewidth=0))
        code = int(text.codes[place])
        if 32 < code < 127:
            strong = place == query or shade[place] > 0.8
            axes.text(
                column + 0.5,
                line + 0.55,
                chr(code),
                family="monospace",
                fontsize=9.5,
                ha="center",
                va="center",
                color=PAPER if strong else INK,
            )
    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(LINES, 0)
    _bare(
        axes,
        "sliding_window_attention: a byte attends what followed the same letters before",
        f"the query is the last, orange byte; the next one is {chr(int(text.codes[query + 1]))!r}",
    )


def _telling_query(text: Text) -> int:
    """The first place, inside a word, whose last bytes occurred shortly before, twice and more."""
    raw = bytes(text.codes.tolist())
    shown = min(LINES * COLUMNS, TEXT_WINDOW) - 16
    for letters in (6, 5, 4, 3):
        for place in range(shown, len(raw) - 1):
            word = raw[place + 1 - letters : place + 2]
            if word.isalpha() and raw.count(word, place - shown, place) >= 3:
                return place
    return len(raw) // 2


def draw(
    path: Path, picture: Picture, text: Text, image: Inputs, reading: Inputs, caption: str
) -> None:
    """Writes the picture to `path`; the suffix decides the format."""
    rows, columns = picture.grid
    cell = 2.7  # inches across one of six panels
    heights = [cell + 0.95, min(max(cell * rows / columns, 1.2), 5.4) + 0.95, 0.33 * LINES + 0.75]
    figure = plt.figure(figsize=(16.8, sum(heights) + 0.3), facecolor=PAPER, layout="constrained")
    parts = figure.subfigures(3, 1, height_ratios=heights)
    top, middle, bottom = np.asarray(parts)
    for part, title in ((top, "Who attends whom"), (middle, "Where attention goes")):
        part.suptitle(title, fontsize=13, color=INK, fontweight="bold", x=0.005, ha="left")
    _geometry(top.subplots(1, 6), image)
    _maps(middle.subplots(1, 6), image, picture)
    _text(bottom.subplots(1, 1), text, reading)
    figure.supxlabel(caption, fontsize=8.5, color=INK)
    figure.savefig(path, dpi=110, facecolor=PAPER)
    plt.close(figure)
