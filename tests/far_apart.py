# SPDX-License-Identifier: Apache-2.0
"""Tensors whose entries are more than 2**31 elements apart."""

from pathlib import Path

import torch
from torch import Tensor


def far_apart(folder: Path, dim: int) -> list[Tensor]:
    """Query, key and value with a stride along `dim` that takes them beyond 2**31 elements: in
    sparse files, of which a few pages are real."""
    shape, strides = (2, 6, 2, 8), [96, 16, 8, 1]
    strides[dim] = 2**31 + 24 if dim != 1 else 2**29 + 24  # five steps of tokens cross 2**31
    size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 96
    assert size > 2**31
    parts = []
    for i, name in enumerate(("query", "key", "value")):
        path = str(folder / name)
        storage = torch.from_file(path, shared=True, size=size, dtype=torch.bfloat16)
        view = storage.as_strided(shape, strides)
        generator = torch.Generator().manual_seed(i)
        view.copy_(torch.randn(shape, generator=generator, dtype=torch.float64))
        parts.append(view)
    return parts
