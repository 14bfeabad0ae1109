# SPDX-License-Identifier: Apache-2.0
"""What a call adds to the resident memory, at its peak, output included.

Asked of a fresh process, which makes the call once to warm up, hands all free memory back, and
then holds the kernel's high-water mark around a second call against the resident size before it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMEOUT = 600  # seconds; compiled peers compile again
# Blocks from 64 KiB on are mapped and unmapped one by one, so freed memory really goes back.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_bytes(request: dict[str, Any]) -> int:
    """Extra resident bytes of one call.

    Args: request with the keys case, contender, mode, dtype, threads, isa.
    Errors: RuntimeError with the last line that the process wrote, if it failed.
    """
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", json.dumps(request)],
        env={**os.environ, **MALLOC, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(lines[-1])
    return int(done.stdout.split()[-1])


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _probe(request: dict[str, Any]) -> int:
    import torch

    from attnext import _C

    from .cases import CASES, TRAINING
    from .peers import CONTENDERS
    from .problem import Problem

    torch.set_num_threads(request["threads"])
    _C.set_isa(request["isa"])
    problem = Problem(CASES[request["case"]], getattr(torch, request["dtype"]))
    training = request["mode"] == TRAINING
    prepared = CONTENDERS[request["contender"]].prepare(problem, training)
    if training:
        prepared = prepared.arm(problem.output_grad)
    prepared.step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the mark falls to the present
    before = _status("VmRSS")
    result = prepared.step()
    after = _status("VmHWM")
    del result
    return max(after - before, 0)


if __name__ == "__main__":
    print(_probe(json.loads(sys.argv[1])))
