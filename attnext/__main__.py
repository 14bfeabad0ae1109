# SPDX-License-Identifier: Apache-2.0
"""``python -m attnext``: window operators and a router on an image and a text, checked, timed."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import attnext

FORMATS = (".png", ".pdf", ".svg")
NEEDED = {"matplotlib": "matplotlib", "numpy": "numpy", "PIL": "pillow", "rich": "rich"}


def writable(text: str) -> Path:
    """A file that can be written, as an argument of a command line."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"there is no folder {path.parent} to write {path.name} to"
        )
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; a file is meant")
    existed = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be written: {error.strerror}") from None
    if not existed:
        path.unlink()
    return path


def picture(text: str) -> Path:
    """A picture that can be."""
    path = writable(text)
    if path.suffix.lower() not in FORMATS:
        raise argparse.ArgumentTypeError(f"{path.name!r} must end in one of {', '.join(FORMATS)}")
    return path


def _positive_int(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if not 1 <= number <= 1024:  # of many more torch dies
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 1024")
    return number


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number <= 60.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds in (0, 60]")
    return number


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m attnext",
        description="Runs window operators and a router on a real image and a real text, checks "
        "each against float64, times it beside torch's scaled_dot_product_attention, and draws "
        "where attention goes.",
        epilog="Exit status: 0 every check passed; 1 a check failed; "
        "2 wrong arguments or unreadable input.",
    )
    found.add_argument(
        "--image",
        type=Path,
        metavar="PATH",
        help="image to use (default: one shipped with matplotlib)",
    )
    found.add_argument(
        "--text", type=Path, metavar="PATH", help="text to use (default: one shipped with Python)"
    )
    found.add_argument(
        "--output",
        type=picture,
        default="attnext.png",
        metavar="PATH",
        help="picture to write (default: %(default)s)",
    )
    found.add_argument("--json", type=writable, metavar="PATH", help="write the figures there, too")
    found.add_argument(
        "--threads",
        type=_positive_int,
        metavar="N",
        help="threads for attnext and torch (default: torch's)",
    )
    found.add_argument(
        "--seconds",
        type=_positive,
        default=0.5,
        metavar="S",
        help="time spent on timing each row (default: %(default)s)",
    )
    found.add_argument("--version", action="version", version=f"attnext {attnext.__version__}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    command_line = parser()
    options = command_line.parse_args(arguments)
    if options.json is not None and options.json.resolve() == options.output.resolve():
        command_line.error(f"--json and --output are one file, {options.json}")
    missing = [
        package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None
    ]
    if missing:
        print(
            f"python -m attnext needs {' and '.join(missing)}: pip install 'attnext[demo]'",
            file=sys.stderr,
        )
        return 2

    from attnext.demo.errors import DemoError
    from attnext.demo.run import run

    try:
        attnext._C.isa()
    except ValueError as error:  # an ATTNEXT_ISA that there is not
        print(f"python -m attnext: {error}", file=sys.stderr)
        return 2
    try:
        passed = run(
            options.image,
            options.text,
            options.output,
            options.json,
            options.threads,
            options.seconds,
        )
    except DemoError as error:
        print(f"python -m attnext: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
