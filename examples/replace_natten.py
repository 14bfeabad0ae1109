# SPDX-License-Identifier: Apache-2.0
"""Runs a model written for NATTEN without NATTEN, old checkpoints included.

    python examples/replace_natten.py

A call to ``natten.na2d`` needs another import and nothing else. A module of the early releases,
whose kernels took a relative bias table ``rpb``, is this class: it has their parameter names, so a
checkpoint loads with ``load_state_dict``.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from torch import Tensor, nn

from attnext import na2d, neighborhood_attention, reference  # was: from natten import na2d
from attnext.compat.bias import natten_rpb


class NeighborhoodAttention2D(nn.Module):
    """The attention of NAT and DiNAT on ``[B, rows, columns, dim]``."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int, dilation: int = 1) -> None:
        super().__init__()
        self.num_heads, self.kernel_size, self.dilation = num_heads, kernel_size, dilation
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value, ``[B, rows, columns, heads, dim / heads]``: views, no copies."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)

    def forward(self, x: Tensor) -> Tensor:
        """Every token after attending its neighborhood."""
        q, k, v = self.heads(x)
        bias = natten_rpb(self.rpb)
        out = neighborhood_attention(q, k, v, self.kernel_size, dilation=self.dilation, bias=bias)
        return self.proj(out.flatten(-2))


def photograph() -> Tensor:
    """Patch tokens of a real photograph, ``[1, 32, 28, 48]``."""
    with Image.open(str(get_sample_data("grace_hopper.jpg", asfileobj=False))) as opened:
        pixels = torch.from_numpy(np.array(opened.convert("RGB").resize((112, 128)))) / 255.0
    return pixels.unfold(0, 4, 4).unfold(1, 4, 4).flatten(2)[None] - 0.5


def main() -> tuple[float, float]:
    """Largest difference of module and call from the reference in float64."""
    torch.manual_seed(0)
    x = photograph()
    checkpoint = {  # as an early NATTEN module would have saved it
        "qkv.weight": torch.randn(144, 48) / 7,
        "qkv.bias": torch.randn(144) / 7,
        "proj.weight": torch.randn(48, 48) / 7,
        "proj.bias": torch.zeros(48),
        "rpb": torch.randn(3, 13, 13),
    }
    module = NeighborhoodAttention2D(dim=48, num_heads=3, kernel_size=7, dilation=2)
    module.load_state_dict(checkpoint)
    with torch.no_grad():
        q, k, v = module.heads(x)
        exact = reference.neighborhood_attention(q, k, v, 7, dilation=2, bias=module.rpb)
        expected = exact.flatten(-2) @ module.proj.weight.double().T
        old = (module(x) - expected).abs().max().item()
        new = na2d(q, k, v, kernel_size=7, stride=2, dilation=1, is_causal=(True, False))
        exact = reference.na2d(q, k, v, 7, 2, 1, (True, False))
    difference = (new - exact).abs().max().item()
    print(f"module of an early release: {old:.1e} from float64")
    print(f"na2d with stride and a causal axis: {difference:.1e} from float64")
    return old, difference


if __name__ == "__main__":
    argparse.ArgumentParser(description="A model written for NATTEN, without NATTEN.").parse_args()
    main()
