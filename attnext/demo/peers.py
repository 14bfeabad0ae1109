# SPDX-License-Identifier: Apache-2.0
"""Torch's ways of doing the same: ``scaled_dot_product_attention`` fed as well as it can be.

Each takes heads-last tensors and returns the output heads-last. Masks are built beforehand, by the
caller, and cost the peer nothing; what must happen at each call (padding, tiling) is in the call.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `mask` holds, -inf elsewhere: what SDPA would make of it at each call."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Every query against every key, the rest masked."""
    out = scaled_dot_product_attention(
        query.flatten(1, -3).transpose(1, 2),
        key.flatten(1, -3).transpose(1, 2),
        value.flatten(1, -3).transpose(1, 2),
        attn_mask=mask,
        enable_gqa=query.shape[-2] != key.shape[-2],
    )
    return out.transpose(1, 2).unflatten(1, query.shape[1:-2])


class Tiles:
    """Shifted windows the usual way: pad, cut into tiles, one dense attention per tile, put back.

    The grid is padded in front so that the first, cut tile is whole; padded keys are masked.
    """

    def __init__(self, extents: tuple[int, int], window: int, shift: int, bias: Tensor) -> None:
        self.extents, self.window = extents, window
        self.front = (window - shift) % window
        self.back = [-(side + self.front) % window for side in extents]
        self.padding = (0, 0, 0, 0, self.front, self.back[1], self.front, self.back[0])
        place = torch.arange(window)
        step = place[None, :] - place[:, None] + window - 1  # key - query, counted from 0
        down, across = step[:, None, :, None], step[None, :, None, :]
        table = bias[:, down, across].reshape(bias.shape[0], window**2, window**2)
        real = pad(torch.ones(1, *extents, 1, 1, dtype=torch.bool), self.padding)
        self.mask = table + additive(self._cut(real).transpose(-1, -2), bias.dtype)

    def _cut(self, grid: Tensor) -> Tensor:
        """``[B, rows, columns, H, D]`` to ``[B * tiles, H, window^2, D]``."""
        w, (batch, rows, columns, heads, dim) = self.window, grid.shape
        tiles = grid.view(batch, rows // w, w, columns // w, w, heads, dim)
        return tiles.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, heads, w * w, dim)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (self._cut(pad(t, self.padding)) for t in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        w, front, (rows, columns) = self.window, self.front, self.extents
        batch, heads, dim = query.shape[0], query.shape[-2], value.shape[-1]
        assert batch == 1
        down = (rows + front + self.back[0]) // w
        grid = out.view(batch, down, -1, heads, w, w, dim).permute(0, 1, 4, 2, 5, 3, 6)
        grid = grid.reshape(batch, down * w, -1, heads, dim)
        return grid[:, front : front + rows, front : front + columns]


class Bands:
    """A causal window of W keys and sinks: blocks of W queries against 2 W keys and the sinks."""

    def __init__(self, length: int, window: int, sinks: int) -> None:
        self.window, self.sinks, self.blocks = window, sinks, -(-length // window)
        self.tail = self.blocks * window - length
        block = torch.arange(self.blocks)[:, None, None] * window
        query = block + torch.arange(window)[:, None]
        key = block - window + torch.arange(2 * window)
        band = (key <= query) & (key > query - window) & (key >= 0)
        sink = torch.arange(sinks)
        outside = (sink <= query - window).expand(-1, -1, sinks)  # within the band they count once
        self.mask = additive(torch.cat((outside, band), -1), torch.float32)[:, None]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        w, b = self.window, self.blocks
        batch, length, heads, _ = query.shape
        assert batch == 1
        q = pad(query, (0, 0, 0, 0, 0, self.tail)).view(b, w, heads, -1).transpose(1, 2)

        def bands(t: Tensor) -> Tensor:
            rows = pad(t[0], (0, 0, 0, 0, w, self.tail)).unfold(0, 2 * w, w)  # [blocks, H, D, 2W]
            first = t[0, : self.sinks].permute(1, 2, 0).expand(b, -1, -1, -1)
            return torch.cat((first, rows), -1).transpose(-1, -2)

        out = scaled_dot_product_attention(
            q,
            bands(key),
            bands(value),
            attn_mask=self.mask,
            enable_gqa=heads != key.shape[-2],
        )
        return out.transpose(1, 2).reshape(1, b * w, heads, -1)[:, :length]


def decode_step(query: Tensor, key: Tensor, value: Tensor, window: int, sinks: int) -> Tensor:
    """One query against the sinks and the last `window` keys, cut out of the cache."""
    if key.shape[1] > window + sinks:
        key = torch.cat((key[:, :sinks], key[:, -window:]), 1)
        value = torch.cat((value[:, :sinks], value[:, -window:]), 1)
    return dense(query, key, value, None)
