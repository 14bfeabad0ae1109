# SPDX-License-Identifier: Apache-2.0
"""The command line. Exit status: 0, or 1 if attnext has no figure or a kernel is over its budget, 2
usage, 3 package or program missing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch

from attnext import _C

from . import kernels, model, report, static
from .cases import CASES, GROUPS, MODES, select
from .peers import CONTENDERS, contenders_for
from .run import Settings, run
from .toolkit import NoTool

RED = 1
NEEDED = 3
DTYPES = ("float32", "float64", "bfloat16", "float16")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def cli() -> None:
    """Benchmarks of attnext: checked against float64, interleaved with its peers."""


@cli.command("list")
def list_() -> None:
    """Name the cases, their groups, and the contenders."""
    for group, about in GROUPS.items():
        click.echo(f"{group}: {about}")
        for case in CASES.values():
            if case.group == group:
                flops = case.flops("fwd")
                work = f"{flops / 1e9:.3g} GFLOP forward; " if flops else ""
                kinds = f"{', '.join(case.dtypes)}; {', '.join(case.modes)}"
                click.echo(f"  {case.name:24} {case.describe()}; {work}{kinds}")
    click.echo("contenders")
    for contender in CONTENDERS.values():
        click.echo(f"  {contender.name:24} {contender.about}")


@cli.command("run")
@click.argument("patterns", metavar="CASE...", nargs=-1, required=True)
@click.option("--isa", help="Instruction set of attnext's kernels (peers keep torch's choice).")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of torch; default: all.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES))
@click.option("--mode", "modes", multiple=True, type=click.Choice(MODES))
@click.option(
    "--contender", "-c", "names", multiple=True, help="Only these; default: all that apply."
)
@click.option("--rounds", type=click.IntRange(min=1), default=Settings.rounds, show_default=True)
@click.option(
    "--budget",
    type=click.FloatRange(min=0),
    default=Settings.budget,
    show_default=True,
    help="Seconds to time one case in one mode, about.",
)
@click.option(
    "--patience",
    type=click.FloatRange(min=0),
    default=Settings.patience,
    show_default=True,
    help="Leave out a contender whose call takes more seconds.",
)
@click.option(
    "--memory/--no-memory", default=False, help="Extra memory of a call, in a process of its own."
)
@click.option("--timing/--no-timing", default=True, help="Without: only check, and weigh if asked.")
@click.option(
    "--json",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the record there.",
)
@click.option("--quiet", is_flag=True, help="No progress and no tables.")
def run_(
    patterns: tuple[str, ...],
    isa: str | None,
    threads: int | None,
    dtypes: tuple[str, ...],
    modes: tuple[str, ...],
    names: tuple[str, ...],
    rounds: int,
    budget: float,
    patience: float,
    memory: bool,
    timing: bool,
    path: Path | None,
    quiet: bool,
) -> None:
    """Measure cases, named one by one, by group or by pattern ('swa-*').

    No contender has a figure before its result on that very case has been held against float64.
    """
    try:
        cases = select(patterns)
        contenders_for(cases[0], names)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    for name in names:
        if not any(contenders_for(case, (name,)) for case in cases):
            click.echo(f"-c {name}: it is for none of these cases", err=True)
    if isa is not None:
        allowed = list(_C.available_isas())
        if isa not in allowed:
            raise click.UsageError(f"--isa {isa}: this machine and build have {', '.join(allowed)}")
        _C.set_isa(isa)
    if threads is not None:
        torch.set_num_threads(threads)
    if path is not None and not path.parent.is_dir():
        raise click.UsageError(f"--json {path}: there is no folder {path.parent}")
    if path is not None:
        existed = path.exists()
        try:
            path.open("ab").close()
        except OSError as error:
            raise click.UsageError(f"--json {path}: {error.strerror}") from error
        if not existed:
            path.unlink()
    settings = Settings(
        rounds=rounds, budget=budget, patience=patience, contenders=names,
        modes=modes, dtypes=dtypes, memory=memory, timing=timing,
    )  # fmt: skip

    def keep(record: dict[str, Any]) -> None:
        if path is not None:
            report.save(record, path)

    with _progress(quiet) as say:
        record = run(cases, settings, say, keep)
    if not quiet:
        _show(record)
    unmeasured = [
        report.title(result)
        for result in record["results"]
        for entry in result["contenders"]
        if entry["name"] == "attnext" and entry["status"] != "ok"
    ]
    if unmeasured:
        click.echo(f"attnext has no figure on: {'; '.join(unmeasured)}", err=True)
        sys.exit(RED)


@cli.command()
@click.argument(
    "path", metavar="RECORD", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
def table(path: Path) -> None:
    """Print a record as Markdown."""
    click.echo(report.markdown(_load(path)), nl=False)


@cli.command()
@click.argument(
    "path", metavar="RECORD", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option("--out", "-o", type=click.Path(file_okay=False, path_type=Path), default=Path("."))
def plot(path: Path, out: Path) -> None:
    """Draw a record: time against length and window, memory, and the ratios to attnext."""
    record = _load(path)
    try:
        from .plots import draw
    except ImportError as error:
        click.echo(f"plots need matplotlib: pip install 'attnext[bench]' ({error})", err=True)
        sys.exit(NEEDED)
    written = draw(record, out)
    if not written:
        raise click.ClickException(f"{path} holds no figures to draw")
    for each in written:
        click.echo(each)


@cli.command("static")
@click.argument("patterns", metavar="[KERNEL]...", nargs=-1)
@click.option(
    "--arch",
    "architectures",
    multiple=True,
    type=click.Choice([str(arch) for arch in static.ARCHITECTURES]),
    help="Only these; default: all.",
)
@click.option("--loops/--no-loops", default=True, help="Count the main loop's instructions.")
@click.option("--mix", is_flag=True, help="Also the main loop's instructions by class.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--check", is_flag=True, help="Exit 1 if a figure is over its budget.")
@click.option("--write-budget", is_flag=True, help="Let the figures be the budget.")
def static_(
    patterns: tuple[str, ...],
    architectures: tuple[str, ...],
    loops: bool,
    mix: bool,
    jobs: int,
    check: bool,
    write_budget: bool,
) -> None:
    """What CUDA kernels take, from their cubins: no GPU is needed, none is asked.

    Registers, spills, shared memory, blocks per SM, and the instructions of the main loop.
    """
    if write_budget and not loops:
        raise click.UsageError("--write-budget needs the loops: leave out --no-loops")
    try:
        chosen = kernels.select(patterns)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    numbers = [int(a) for a in architectures] or static.ARCHITECTURES
    with _tools():
        figures = static.measure_all(chosen, numbers, loops=loops, jobs=jobs)
        click.echo(static.markdown(static.COLUMNS, static.rows(figures)))
        click.echo(f"\n{static.NOTE}")
        table = static.mixes(figures) if mix else []
        if table:
            click.echo("\n" + static.markdown(table[0], table[1:]))
        if write_budget:
            known = (
                *kernels.KERNELS,
                *kernels.ROUTED_KERNELS,
                *kernels.LINEAR_MAIN,
                *kernels.SAMPLES,
            )
            static.write_budget(figures, [kernel.name for kernel in known])
        budget = static.load_budget() if check else {}
        worse = [s for f in figures if check for s in static.over_budget(f, budget)]
    for sentence in worse:
        click.echo(sentence, err=True)
    if worse:
        sys.exit(RED)


@cli.command("model")
@click.option("--length", type=click.IntRange(min=1), default=65536, show_default=True)
@click.option("--window", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--head-dim", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--heads", type=click.IntRange(min=1), default=16, show_default=True)
@click.option(
    "--rows", type=click.IntRange(min=1), default=64, show_default=True, help="Queries of a tile."
)
@click.option(
    "--warp-rows", type=click.IntRange(min=1), default=16, show_default=True, help="Of a warp."
)
@click.option(
    "--dtype", type=click.Choice(list(model.SIZES)), default="bfloat16", show_default=True
)
@click.option("--kernel", "name", help="Count the instructions of this one's main loop.")
def model_(name: str | None, **problem: Any) -> None:
    """The least time of a window forward on an A100, on paper: modelled, never run on a GPU."""
    full = edge = 0.0
    if name is not None:
        try:
            (kernel,) = kernels.select([name])
        except ValueError as error:
            raise click.UsageError(f"--kernel names one kernel: {error}") from error
        if set(kernel.paths) != {"full", "edge"}:
            raise click.UsageError(f"--kernel {name}: it has no full and edge path")
        with _tools():
            loops = static.measure(kernel, 80).loops
        full, edge = (loops[path].lean / loops[path].tensor for path in ("full", "edge"))
    for line in model.report(model.Problem(**problem), full, edge):
        click.echo(line)


@contextlib.contextmanager
def _tools() -> Iterator[None]:
    """A missing program is a sentence, not a traceback."""
    try:
        yield
    except NoTool as error:
        click.echo(error, err=True)
        sys.exit(NEEDED)


def _load(path: Path) -> dict[str, Any]:
    try:
        return report.load(path)
    except ValueError as error:
        raise click.ClickException(str(error)) from error


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A line that says what is going on: on a terminal only, and only with rich."""
    try:
        from rich.console import Console
    except ImportError:
        if not quiet:
            click.echo("no progress and plain tables: rich is not installed", err=True)
        yield lambda text: None
        return
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda text: None
        return
    with console.status("starting") as status:
        yield lambda text: status.update(text)


def _show(record: dict[str, Any]) -> None:
    try:
        from rich.console import Console
    except ImportError:
        click.echo(report.markdown(record), nl=False)
        return
    console = Console()
    if not console.is_terminal:
        click.echo(report.markdown(record), nl=False)
        return
    for line in report.environment_lines(record):
        console.print(line, style="dim", highlight=False)
    for result in record["results"]:
        console.print(report.renderable(result))
