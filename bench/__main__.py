# SPDX-License-Identifier: Apache-2.0
"""``python -m bench``: list the cases, run them, and look at the record."""

from __future__ import annotations

import importlib
import sys

NEEDED = 3  # exit status: something has to be installed


def main() -> None:
    """Say in one sentence what is missing, or hand over to the command line."""
    for module, how in (
        ("torch", "pip install torch"),
        (
            "attnext._C",
            "pip install -e . in the root of the repository, which has the bench folder",
        ),
        ("click", "pip install 'attnext[bench]'"),
    ):
        try:
            importlib.import_module(module)
        except ImportError as error:
            print(f"bench needs {module.split('.')[0]}: {how} ({error})", file=sys.stderr)
            sys.exit(NEEDED)
    from .cli import cli

    cli(prog_name="python -m bench")


if __name__ == "__main__":
    main()
