# SPDX-License-Identifier: Apache-2.0
"""How much can be looked up in how large a state: associative recall, drawn as a curve.

    python examples/recall.py

A sequence is pairs of a key and a value, new ones and ones that have been before. Wherever a key
comes again, its value is to be said: half of them have been among the last four pairs, the others
anywhere. Small models of two blocks of BASED learn it: a short convolution, which brings a key to
its value, then the mixer in question. Each is a point: the bytes that its mixer keeps for a
sequence, and the share of right answers on new sequences.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import attnext
from attnext.__main__ import picture

DIM, NEAR = 32, 4


class Task(NamedTuple):
    """Pairs of a sequence; how many keys and values there are, at least as many; and sequences of a
    training step."""

    pairs: int = 64
    words: int = 64
    batch: int = 16


class Entry(NamedTuple):
    """A mixer of :class:`attnext.BasedBlock` with its options."""

    series: str
    label: str
    mixer: str
    options: dict[str, Any]


def entries(pairs: int) -> list[Entry]:
    """All that the picture shows; full attention is a window as long as the sequence."""
    windows = [
        Entry("sliding window", f"W {w}", "window", {"window_size": w}) for w in (8, 16, 32, 64)
    ]
    linear = [
        Entry("Taylor, linear", f"d {d}", "linear", {"feature_dim": d}) for d in (4, 8, 12, 16)
    ]
    hybrid = [
        Entry("hybrid", f"d {d}, W 16", "hybrid", {"feature_dim": d, "window_size": 16})
        for d in (4, 8, 12)
    ]
    full = Entry("full attention", "all keys", "window", {"window_size": 2 * pairs})
    return [full, *windows, *linear, *hybrid]


class Point(NamedTuple):
    """What a model came to."""

    entry: Entry
    state_bytes: int
    accuracy: float
    seconds: float


def sequences(count: int, task: Task, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Words ``[B, 2 pairs]``, each key followed by its value; the values ``[B, pairs]``; and which
    of them can be known."""
    pairs, words, _ = task

    def chance() -> Tensor:
        return torch.rand(count, pairs, generator=generator)

    again, near, place = chance() < 2 / 3, chance() < 1 / 2, chance()
    again[:, : pairs // 4] = False
    row = torch.arange(count)
    which = torch.arange(pairs).repeat(count, 1)  # of the keys and values of this sequence
    unused = torch.full((count,), pairs // 4)
    for i in range(pairs // 4, pairs):
        back = (place[:, i] * torch.where(near[:, i], NEAR, i)).long()
        which[:, i] = torch.where(again[:, i], which[row, i - 1 - back], unused)
        unused = unused + ~again[:, i]
    keys = torch.rand(count, words, generator=generator).argsort(1).gather(1, which)
    values = torch.randint(words, (count, words), generator=generator).gather(1, which)
    return torch.stack([keys, values + words], dim=2).flatten(1), values, again


class Model(nn.Module):
    """Words ``[B, 2 pairs]`` to the values of their keys, ``[B, pairs, words]``."""

    def __init__(self, entry: Entry, words: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(2 * words, DIM)
        self.pair = attnext.BasedBlock(DIM, "convolution", expand=2, hidden_dim=DIM)
        self.recall = attnext.BasedBlock(DIM, entry.mixer, hidden_dim=DIM, **entry.options)
        self.head = nn.Sequential(nn.RMSNorm(DIM), nn.Linear(DIM, words, bias=False))

    def forward(self, words: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.recall(self.pair(self.embed(words)))[:, ::2])
        return logits

    def state_bytes(self, words: Tensor) -> int:
        """What the mixer keeps of one sequence."""
        kept: Any = self.recall.prefill(self.pair(self.embed(words[:1])))[1]
        return int(kept.nbytes)


def learn(entry: Entry, task: Task, steps: int) -> Point:
    """Trains one model; all see the same sequences."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model, start = Model(entry, task.words), time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * (1 - step / steps)
    )
    for _ in range(steps):
        words, values, known = sequences(task.batch, task, generator)
        loss = cross_entropy(model(words)[known], values[known])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        words, values, known = sequences(128, task, torch.Generator().manual_seed(2))
        right = (model(words).argmax(-1) == values)[known].float().mean().item()
        return Point(entry, model.state_bytes(words), right, time.perf_counter() - start)


def draw(points: list[Point], path: Path) -> None:
    """The curve, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    styles = {
        "sliding window": ("#8a8a8a", "s", (16, -12)),
        "Taylor, linear": ("#2b6cb0", "o", (13, -12)),
        "hybrid": ("#c05621", "D", (0, 8)),
        "full attention": ("#1a1a1a", "*", (-4, -16)),
    }
    for series, (colour, marker, shift) in styles.items():
        own = sorted((p.state_bytes, p.accuracy, p.entry.label) for p in points
                     if p.entry.series == series)  # fmt: skip
        sizes, rates = [p[0] for p in own], [p[1] for p in own]
        size = 12 if marker == "*" else 6
        axes.plot(sizes, rates, color=colour, marker=marker, markersize=size, label=series)
        for x, y, label in own:
            axes.annotate(label, (x, y), shift, textcoords="offset points", ha="center",
                          fontsize=8, color=colour)  # fmt: skip
    axes.set_xscale("log", base=2)
    ticks = [2**k for k in range(10, 17)]
    axes.set_xticks(ticks, [f"{t // 1024} KiB" for t in ticks])
    axes.set_xlim(1500, 49000)
    axes.set_ylim(0, 1.06)
    axes.set_xlabel("state of the mixer for one sequence, fp32")
    axes.set_ylabel("values recalled")
    axes.set_title("Associative recall against the size of the state", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", fontsize=9)
    figure.savefig(path, dpi=130)


def main(steps: int | None = None, quick: bool = False, output: Path | None = None) -> list[Point]:
    """Trains all, or with ``quick`` three on an easier task; prints and perhaps draws them."""
    task = Task()
    if steps is None:
        steps = 200 if quick else 800
    chosen = entries(task.pairs)
    if quick:
        task = Task(pairs=16, words=16, batch=32)
        chosen = [
            Entry("Taylor, linear", "d 2", "linear", {"feature_dim": 2}),
            Entry("hybrid", "d 2, W 16", "hybrid", {"feature_dim": 2, "window_size": 16}),
            Entry("full attention", "all keys", "window", {"window_size": 32}),
        ]
    print("mixer                        state bytes  recalled  seconds")
    points = []
    for entry in chosen:
        point = learn(entry, task, steps)
        points.append(point)
        name = f"{entry.series}, {entry.label}"
        print(f"{name:28} {point.state_bytes:11,} {point.accuracy:9.1%} {point.seconds:8.0f}",
              flush=True)  # fmt: skip
    if output is not None:
        draw(points, output)
        print(f"drawn: {output}")
    return points


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Recall against the size of the state.")
    parser.add_argument("--steps", type=int, help="of training (default: 800; quick: 200)")
    parser.add_argument("--quick", action="store_true", help="three models, easier, no picture")
    parser.add_argument("--output", type=picture, default="recall.png")
    given = parser.parse_args()
    if given.steps is not None and given.steps < 1:
        parser.error(f"--steps must be at least 1, got {given.steps}")
    main(given.steps, given.quick, None if given.quick else given.output)
