# SPDX-License-Identifier: Apache-2.0
"""Checks in a process of their own: a kernel that faults or hangs costs one check, not the rest."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

Work = Callable[[str, str], dict[str, Any]]  # name of a check, device


def _serve(connection: Connection, work: Work, device: str) -> None:
    while (name := connection.recv()) is not None:
        record = work(name, device)
        connection.send(record)
        if record["fatal"]:
            return


class _Worker:
    def __init__(self, work: Work, device: str) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not outlive a fork
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work, device), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, name: str, patience: float) -> dict[str, Any]:
        lost = {"name": name, "passed": False, "fatal": True}
        try:
            self.connection.send(name)
            if self.connection.poll(patience):
                record: dict[str, Any] = self.connection.recv()
                return record
        except (EOFError, OSError):
            self.process.join(10)
            return lost | {"error": f"the process died, exit status {self.process.exitcode}"}
        return lost | {"error": f"no answer in {patience:g} s: the process was ended"}

    def stop(self) -> None:
        self.process.kill()
        self.process.join(10)
        self.connection.close()


def run_isolated(
    names: list[str], work: Work, device: str, patience: float
) -> Iterator[dict[str, Any]]:
    """The records of checks in turn. A new process takes over after a fatal one.

    Args: work is a function of a module; patience in seconds for one check, the start of its
        process included.
    """
    worker: _Worker | None = None
    try:
        for name in names:
            worker = worker or _Worker(work, device)
            record = worker.ask(name, patience)
            if record["fatal"]:
                worker.stop()
                worker = None
            yield record
    finally:
        if worker is not None:
            worker.stop()
