# SPDX-License-Identifier: Apache-2.0
"""Long work cut to pieces: each item once, in pieces that keep to what may be in flight."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from attnext.slices import slices

COUNTS = st.integers(0, 300)


@given(COUNTS, COUNTS, st.integers(1, 2000), st.none() | st.integers(1, 50))
def test_each_item_once_and_not_too_many(total, entries, in_flight, most):
    found = list(slices(total, entries, in_flight, torch.device("cpu"), most))
    assert [i for part in found for i in range(part.start, part.stop)] == list(range(total))
    for part in found:
        count = part.stop - part.start
        assert count == 1 or count * entries <= in_flight
        assert most is None or count <= most


def test_a_gpu_takes_larger_pieces():
    on_cpu, on_gpu = (
        list(slices(10_000, 10, 1000, torch.device(kind))) for kind in ("cpu", "cuda")
    )
    assert len(on_cpu) == 100 and len(on_gpu) < 10
    assert on_gpu[-1].stop == 10_000
