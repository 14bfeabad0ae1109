# SPDX-License-Identifier: Apache-2.0
"""How much of a search or a sum is in flight at a time, where torch's operators make it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# A CPU wants temporaries that stay in its cache. A GPU has room, and each operator is a launch that
# costs as much as some hundred thousand entries do.
_ON_GPU = 32


def slices(
    total: int, entries: int, in_flight: int, device: torch.device, most: int | None = None
) -> Iterator[slice]:
    """Slices of ``range(total)``, each item of which costs ``entries`` temporary entries.

    Args:
        in_flight: entries at a time on a CPU.
        most: items at a time, at most.
    """
    if device.type not in ("cpu", "meta"):
        in_flight *= _ON_GPU
    size = max(1, in_flight // max(entries, 1))
    size = size if most is None else min(size, most)
    for begin in range(0, total, size):
        yield slice(begin, min(begin + size, total))
