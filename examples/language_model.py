# SPDX-License-Identifier: Apache-2.0
"""Trains small language models of BASED's blocks, and compares what they learn with what they keep.

    python examples/language_model.py --steps 1000

Byte by byte they read Python's language reference, which ships with Python. Both have three blocks
and as many parameters: a short convolution, a sliding window, and either that window once more or
the same window with all bytes before it, through a state of fixed size, under one denominator. The
loss is that of a part of the text which nobody has trained on. Decoding goes on from a prefill,
byte by byte, and must say what the whole forward pass says.
"""

from __future__ import annotations

import argparse
import time
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import attnext

DIM, HEADS, FEATURES = 64, 4, 16  # queries and keys are as wide as values: equal parameters
WINDOW, LENGTH, BATCH = 8, 128, 8
MODELS = {
    "window alone": ("convolution", "window", "window"),
    "hybrid": ("convolution", "window", "hybrid"),
}


class Model(nn.Module):
    """Bytes ``[B, N]`` to logits ``[B, N, 256]``."""

    def __init__(self, mixers: tuple[str, ...]) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(256, DIM), nn.RMSNorm(DIM)
        self.blocks = nn.ModuleList(
            attnext.BasedBlock(
                DIM, mixer, num_heads=HEADS, feature_dim=FEATURES, window_size=WINDOW, rotary=True
            )
            for mixer in mixers
        )
        self.head = nn.Linear(DIM, 256, bias=False)

    def forward(self, codes: Tensor) -> Tensor:
        """Logits of all bytes."""
        x = self.embed(codes)
        for block in self.blocks:
            x = block(x)
        return self._leave(x)

    def prefill(self, codes: Tensor) -> tuple[Tensor, list[Any]]:
        """The same, and what the blocks keep."""
        x, kept = self.embed(codes), []
        for block in self.blocks:
            assert isinstance(block, attnext.BasedBlock)
            x, state = block.prefill(x)
            kept.append(state)
        return self._leave(x), kept

    def step(self, codes: Tensor, kept: list[Any]) -> Tensor:
        """Logits of the next bytes; ``kept`` is updated."""
        x = self.embed(codes)
        for block, state in zip(self.blocks, kept, strict=True):
            assert isinstance(block, attnext.BasedBlock)
            x = block.step(x, state)
        return self._leave(x)

    def _leave(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x))
        return logits


def reading() -> tuple[Tensor, Tensor]:
    """The bytes of the language reference: what is learned from, and the last eighth."""
    text = "\n".join(topics[name] for name in sorted(topics))
    codes = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    cut = codes.numel() - codes.numel() // 8
    return codes[:cut], codes[cut:]


def train(model: Model, codes: Tensor, steps: int) -> None:
    """The same bytes in the same order for every model."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 4e-3, total_steps=steps + 1, pct_start=0.1
    )
    for step in range(steps):
        starts = torch.randint(codes.numel() - LENGTH - 1, (BATCH,), generator=generator)
        batch = torch.stack([codes[start : start + LENGTH + 1] for start in starts.tolist()])
        loss = cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"  step {step:4d}  loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def evaluate(model: Model, codes: Tensor, count: int) -> float:
    """Loss on the first ``count`` pieces of unseen text, in nats a byte."""
    pieces = codes[: count * LENGTH + 1].unfold(0, LENGTH + 1, LENGTH)
    losses = [
        cross_entropy(model(piece[:, :-1]).flatten(0, 1), piece[:, 1:].flatten()).item()
        for piece in pieces.split(8)
    ]
    return sum(losses) / len(losses)


@torch.no_grad()
def decode(model: Model, prompt: Tensor, count: int) -> tuple[Tensor, float, int]:
    """Continues ``prompt`` greedily; also the largest difference from the whole forward pass, and
    the bytes kept."""
    logits, kept = model.prefill(prompt)
    codes, steps = [prompt], [logits[:, -1:]]
    for _ in range(count):
        codes.append(steps[-1].argmax(-1))
        steps.append(model.step(codes[-1], kept))
    text = torch.cat(codes, 1)
    whole = model(text)[:, prompt.shape[1] - 1 :]
    difference = (torch.cat(steps, 1) - whole).abs().max().item()
    return text, difference, sum(x.nbytes for x in kept)


def main(steps: int = 1000) -> dict[str, tuple[float, float]]:
    """Trains all; for each the loss on unseen text, and decoding's difference."""
    learned, unseen = reading()
    results, rows = {}, []
    for name, mixers in MODELS.items():
        print(name)
        torch.manual_seed(0)
        model = Model(mixers)
        start = time.process_time()
        train(model, learned, steps)
        seconds = time.process_time() - start
        loss = evaluate(model, unseen, 64 if steps < 100 else 384)
        text, difference, kept = decode(model, unseen[None, :LENGTH], 64)
        results[name] = (loss, difference)
        count = sum(p.numel() for p in model.parameters())
        rows.append(
            f"{name:18} {count:10,} {loss:9.3f} {loss / 0.6931:10.3f} {kept / 1024:9.1f} "
            f"{seconds:8.0f}   {difference:.0e}"
        )
        print("  " + repr(bytes(text[0, LENGTH:].tolist()).decode(errors="replace")))
    print(
        "model              parameters nats/byte  bits/byte  kept KiB  CPU s   decoding differs by"
    )
    print("\n".join(rows))
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Learns to read, with states of fixed size.")
    parser.add_argument("--steps", type=int, default=1000)
    main(parser.parse_args().steps)
