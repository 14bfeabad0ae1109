# SPDX-License-Identifier: Apache-2.0
"""The order of things in ``python -m attnext``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from attnext.demo import report
from attnext.demo.data import (
    clip_inputs,
    image_inputs,
    load_picture,
    load_text,
    next_byte_score,
    text_inputs,
)
from attnext.demo.jobs import Result, all_jobs, perform
from attnext.demo.picture import draw


def run(
    image: Path | None,
    text: Path | None,
    output: Path,
    record: Path | None,
    threads: int | None,
    seconds: float,
) -> bool:
    """Runs every job, prints the table, writes the picture; True when every check passed."""
    begin = time.perf_counter()
    if threads is not None:
        torch.set_num_threads(threads)
    out = report.console()
    about = report.environment()
    picture, reading = load_picture(image), load_text(text)
    rows, columns = picture.grid
    sources = {
        "image": f"{picture.source}: {rows} × {columns} patches of 8 × 8 pixels",
        "text": f"{reading.source}: {reading.codes.numel()} bytes",
    }
    report.show_environment(out, about, sources)

    results: list[Result] = []
    guesses: dict[str, Any] = {}
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=out,
        transient=True,
    ) as progress:
        bar = progress.add_task("features", total=None)
        shot, film, words = image_inputs(picture.pixels), clip_inputs(picture), text_inputs(reading)
        makers = list(all_jobs(shot, film, words))
        progress.update(bar, total=len(makers) + 1)
        for make in makers:
            job = make()
            progress.update(bar, description=job.title)
            result = perform(job, seconds)
            results.append(result)
            if job.title.startswith("sliding"):
                guesses["next_byte"], guesses["commonest_byte"] = next_byte_score(
                    reading, result.output
                )
            progress.advance(bar)
        progress.update(bar, description="picture")
        caption = (
            f"attnext {about['attnext']} · {picture.source} · {reading.source} · "
            "weights read off the operators: the gradient of one output with respect to the values"
        )
        draw(output, picture, reading, shot, words, caption)

    passed = all(result.check.passed for result in results)
    out.print(report.table(results))
    checked = sum(result.check.rows for result in results)
    out.print(
        f"\n[dim]error:[/] largest difference from float64 over {checked} query rows; "
        "[dim]budget:[/] twice the error of torch and one rounding (four times for the largest)."
    )
    out.print(
        f"Read with no training, {guesses['next_byte']:.0%} of the text's bytes are guessed from "
        f"the ones before (always the commonest byte: {guesses['commonest_byte']:.0%})."
    )
    out.print(f"Picture: {escape(str(output))}", soft_wrap=True)
    elapsed = time.perf_counter() - begin
    if record is not None:
        extra = {**guesses, "passed": passed, "picture": str(output), "seconds": elapsed}
        record.write_text(
            json.dumps(report.record(about, sources, results, extra), indent=2) + "\n"
        )
        out.print(f"Record: {escape(str(record))}", soft_wrap=True)
    verdict = "[bold green]every check passed[/]" if passed else "[bold red]a check FAILED[/]"
    out.print(f"{verdict} in {elapsed:.0f} s")
    return passed
