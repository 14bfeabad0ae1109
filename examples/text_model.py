# SPDX-License-Identifier: Apache-2.0
"""Trains a byte-level language model whose layers look 128 bytes back, and decodes with a cache.

    python examples/text_model.py --steps 60

Eight query heads share two key heads; positions come from ALiBi slopes; four attention sinks keep
the start of the text in sight. Decoding feeds one byte at a time and must say what the whole
forward pass says.
"""

from __future__ import annotations

import argparse
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import attnext

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 8, 2, 16, 2
DIM, WINDOW, SINKS, LENGTH = HEADS * HEAD_DIM, 128, 4, 512

Cache = tuple[Tensor, Tensor]


class Layer(nn.Module):
    """Sliding-window attention and a feed-forward layer on ``[B, N, DIM]``."""

    slopes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(DIM), nn.Linear(DIM, DIM)
        self.qkv = nn.Linear(DIM, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.feed = nn.Sequential(
            nn.LayerNorm(DIM), nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM)
        )
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, HEADS + 1).float())

    def forward(self, x: Tensor, past: Cache | None) -> tuple[Tensor, Cache]:
        """The tokens refined, and all keys and values so far."""
        heads = self.qkv(self.norm(x)).unflatten(-1, (-1, HEAD_DIM))
        q, k, v = heads.split((HEADS, KV_HEADS, KV_HEADS), dim=2)
        if past is not None:
            k, v = torch.cat((past[0], k), 1), torch.cat((past[1], v), 1)
        out = attnext.sliding_window_attention(
            q, k, v, WINDOW, sinks=SINKS, alibi_slopes=self.slopes
        )
        x = x + self.proj(out.flatten(2))
        return x + self.feed(x), (k, v)


class Model(nn.Module):
    """Bytes ``[B, N]`` to logits ``[B, N, 256]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(256, DIM), nn.Linear(DIM, 256)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, codes: Tensor, past: list[Cache] | None = None) -> tuple[Tensor, list[Cache]]:
        """Logits, and the cache to hand in with the bytes that follow."""
        x, caches = self.embed(codes), []
        for number, layer in enumerate(self.layers):
            x, cache = layer(x, past[number] if past else None)
            caches.append(cache)
        return self.head(x), caches


def reading() -> Tensor:
    """The bytes of Python's language reference, ``[N]``."""
    text = "\n".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def decode(model: Model, prompt: Tensor, count: int) -> tuple[Tensor, float]:
    """Continues `prompt` greedily; also the largest difference from one whole forward pass."""
    with torch.no_grad():
        logits, caches = model(prompt)
        codes, steps = [prompt], [logits[:, -1:]]
        for _ in range(count):
            codes.append(steps[-1].argmax(-1))
            logits, caches = model(codes[-1], caches)  # one query, len(cache) + 1 keys
            steps.append(logits)
        text = torch.cat(codes, 1)
        whole, _ = model(text)
    difference = (torch.cat(steps, 1) - whole[:, prompt.shape[1] - 1 :]).abs().max().item()
    return text, difference


def main(steps: int = 60) -> tuple[float, float, float]:
    """Trains and decodes; first loss, last loss, difference of decoding and forward pass."""
    torch.manual_seed(0)
    codes, model = reading(), Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        starts = torch.randint(codes.numel() - LENGTH - 1, (4,))
        batch = torch.stack([codes[start : start + LENGTH + 1] for start in starts.tolist()])
        logits, _ = model(batch[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step:3d}  loss {losses[-1]:.3f}")
    text, difference = decode(model, codes[None, :200], 48)
    print(f"loss {losses[0]:.2f} at first, {losses[-1]:.2f} at last")
    print(f"decoding differs from the whole forward pass by {difference:.1e}; it continues with")
    print(repr(bytes(text[0, 200:].tolist()).decode(errors="replace")))
    return losses[0], losses[-1], difference


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Learns to read, with sliding windows.")
    parser.add_argument("--steps", type=int, default=60, help="at least 1")
    given = parser.parse_args()
    if given.steps < 1:
        parser.error(f"--steps must be at least 1, got {given.steps}")
    main(given.steps)
