# SPDX-License-Identifier: Apache-2.0
"""Trains two neighborhood-attention blocks to take the noise out of a photograph.

    python examples/denoise_image.py --steps 150

Tokens are patches of 4 x 4 pixels. The second block is dilated, so that two layers of 7 x 7 keys
see far. One half of the image is learned from, the other half is the test.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from torch import Tensor, nn

import attnext

PATCH, HEADS, DIM, NOISE = 4, 4, 64, 0.15


class Block(nn.Module):
    """Attention and a feed-forward layer, each with its norm, on ``[B, rows, columns, dim]``."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.norm, self.qkv, self.proj = (
            nn.LayerNorm(DIM),
            nn.Linear(DIM, 3 * DIM),
            nn.Linear(DIM, DIM),
        )
        self.feed = nn.Sequential(
            nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The tokens, once refined."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        x = x + self.proj(attnext.na2d(q, k, v, kernel_size=7, dilation=self.dilation).flatten(-2))
        return x + self.feed(x)


class Denoiser(nn.Module):
    """Patches in, patches out; what the blocks say is added to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(3 * PATCH**2, DIM), nn.Linear(DIM, 3 * PATCH**2)
        self.blocks = nn.Sequential(Block(dilation=1), Block(dilation=3))
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, patches: Tensor) -> Tensor:
        """The patches, cleaned."""
        return patches + self.leave(self.blocks(self.enter(patches)))


def photograph() -> Tensor:
    """Patches of a real photograph, ``[1, rows, columns, 3 * PATCH * PATCH]`` in 0..1."""
    with Image.open(str(get_sample_data("grace_hopper.jpg", asfileobj=False))) as opened:
        pixels = torch.from_numpy(np.array(opened.convert("RGB").resize((192, 256)))) / 255.0
    patches = pixels.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH)
    return patches.flatten(2)[None]


def psnr(patches: Tensor, clean: Tensor) -> float:
    """Peak signal to noise, in dB."""
    return -10.0 * torch.log10((patches.clamp(0, 1) - clean).square().mean()).item()


def main(steps: int = 150) -> tuple[float, float]:
    """Trains, and returns the PSNR of the unseen half before and after."""
    torch.manual_seed(0)
    clean = photograph()
    learn, test = clean.chunk(2, dim=2)  # left half, right half
    noisy_test = test + NOISE * torch.randn(test.shape)
    model = Denoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        loss = (model(learn + NOISE * torch.randn(learn.shape)) - learn).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.5f}")
    with torch.no_grad():
        before, after = psnr(noisy_test, test), psnr(model(noisy_test), test)
    print(f"unseen half: {before:.1f} dB noisy, {after:.1f} dB after")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Learns to denoise a photograph.")
    parser.add_argument("--steps", type=int, default=150, help="0: none")
    given = parser.parse_args()
    if given.steps < 0:
        parser.error(f"--steps must not be negative, got {given.steps}")
    main(given.steps)
