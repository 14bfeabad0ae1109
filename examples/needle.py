# SPDX-License-Identifier: Apache-2.0
"""Finds needles in a long context with attention that searches, and shows what finds nothing.

    python examples/needle.py --tokens 131072

Nothing here is trained. Keys are made: every token has a part of its key in common with its passage
(1024 tokens), its paragraph (128) and its sentence (16), as near tokens of a text resemble each
other, besides a part of its own and noise; values say a letter. The last tokens each ask
for one needle, with the needle's own key. Searches look at few keys and conclude on their
neighbours, so a second run with needles that nothing around them resembles shows where they end.

The table says how many needles were found, how many keys of needles were attended at all, the time
of search and attention together, and the share of the context that was attended.

Only the last tokens attend, as in decoding: nothing takes the square of the context.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

import attnext
from attnext import BlockPlan, routed_attention
from attnext.routers.hip import hip_plan, infinite_hip_plan
from attnext.routers.longheads import longheads_chunk_keys, longheads_plan
from attnext.routers.superlinear import superlinear_attention, superlinear_search, window_of

DIM, LETTERS, WINDOW, SINKS = 64, 26, 512, 4
LEVELS = ((1024, 6.0), (128, 3.0), (16, 3.0))  # tokens that share a part, and its length
OWN, NOISE, SHARPNESS = 7.0, 0.5, 8.0

Result = tuple[Tensor, Callable[[], Tensor]]  # and bool [needles, tokens]: who was attended


class Haystack:
    """A context of made keys and values ``[1, N, 1, DIM]``, and queries for its needles."""

    def __init__(self, tokens: int, needles: int, seed: int, alone: bool) -> None:
        generator = torch.Generator().manual_seed(seed)

        def directions(count: int) -> Tensor:
            x = torch.randn(count, DIM, generator=generator)
            return x / x.norm(dim=-1, keepdim=True)

        shared = torch.zeros(tokens, DIM)
        for size, length in LEVELS:
            parts = directions(-(-tokens // size)) * length
            shared += parts.repeat_interleave(size, 0)[:tokens]
        own = directions(tokens) * OWN
        # One needle in each of equal parts of what is farther away than any window.
        room = tokens * 3 // 4 // needles
        self.at = torch.arange(needles) * room + torch.randint(
            room, (needles,), generator=generator
        )
        if alone:  # as long as before, and all of it their own
            length = (shared[self.at] + own[self.at]).norm(dim=-1, keepdim=True)
            shared[self.at], own[self.at] = 0.0, directions(needles) * length
        key = shared + own + NOISE * torch.randn(tokens, DIM, generator=generator)
        self.codes = directions(LETTERS)
        letter = torch.randint(LETTERS, (tokens,), generator=generator)
        self.answer = letter[self.at]
        self.key, self.value = (x.view(1, tokens, 1, DIM) for x in (key, self.codes[letter]))
        # All tokens ask for what they are themselves, but for the last.
        self.query = self.key.clone()
        self.query[0, -needles:, 0] = SHARPNESS * (shared + own)[self.at]
        # Superlinear has search queries: these ask for what a needle shares with its neighbours,
        # softly, for the scores also say in which shares spans are mixed.
        self.search_query = ((own if alone else shared)[self.at] / 4).view(1, needles, 1, DIM)

    def last(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query[:, -len(self.at) :], self.key, self.value

    def found(self, out: Tensor) -> int:
        """Needles whose letter is the nearest to what a query got."""
        said = (out[0, :, 0] @ self.codes.T).argmax(-1)
        return int((said == self.answer).sum())


def spans(begin: Tensor, end: Tensor, tokens: int) -> Tensor:
    """bool ``[needles, tokens]`` of spans ``[needles, slots]``."""
    edges = torch.zeros(begin.shape[0], tokens + 1)
    there = (end > begin).float()
    edges.scatter_add_(1, begin.long().clamp(0, tokens), there)
    edges.scatter_add_(1, end.long().clamp(0, tokens), -there)
    return edges.cumsum(1)[:, :-1] > 0


def near(needles: int, tokens: int, window: int, sinks: int) -> Tensor:
    at = torch.arange(tokens - needles, tokens)[:, None]
    j = torch.arange(tokens)
    return (j <= at) & ((j > at - window) | (j < sinks))


def listed(plan: BlockPlan, size: int, tokens: int) -> Tensor:
    lists = plan.lists[0, 0].long()
    return spans(lists * size, torch.where(lists < 0, 0, (lists + 1) * size), tokens)


def dense(hay: Haystack) -> Result:
    q, k, v = hay.last()
    out = attnext.sliding_window_attention(q, k, v, None)
    return out, lambda: near(q.shape[1], k.shape[1], k.shape[1], 0)


def window(hay: Haystack) -> Result:
    q, k, v = hay.last()
    out = attnext.sliding_window_attention(q, k, v, WINDOW, sinks=SINKS)
    return out, lambda: near(q.shape[1], k.shape[1], WINDOW, SINKS)


def hip(hay: Haystack) -> Result:
    q, k, v = hay.last()
    plan = hip_plan(q, k, query_block=1, query_stride=1)
    out = routed_attention(q, k, v, plan, is_causal=True, window_size=WINDOW, sinks=SINKS)
    beside = q.shape[1], k.shape[1], WINDOW, SINKS
    return out, lambda: listed(plan, 2, k.shape[1]) | near(*beside)


def infinite_hip(hay: Haystack) -> Result:
    q, k, v = hay.last()
    stages = ((1, 1, 256, 32768), (1, 1, 32, 8192), (1, 1, 8, 512))
    plan = infinite_hip_plan(q, k, stages=stages, sinks=64, window_size=WINDOW)
    out = routed_attention(q, k, v, plan, is_causal=True, window_size=WINDOW, sinks=64)
    beside = q.shape[1], k.shape[1], WINDOW, 64
    return out, lambda: listed(plan, 64, k.shape[1]) | near(*beside)


def superlinear(hay: Haystack) -> Result:
    q, k, v = hay.last()
    out = superlinear_attention(hay.search_query, q, k, v, sw_index=30)

    def attended() -> Tensor:
        found = superlinear_search(hay.search_query, k, sw_index=30)
        held = spans(found.starts[0, :, 0], found.ends[0, :, 0], k.shape[1])
        return held | near(q.shape[1], k.shape[1], window_of(30, 0.55), 0)

    return out, attended


def longheads(hay: Haystack, chunk_keys: Tensor) -> Result:
    q, k, v = hay.last()
    plan = longheads_plan(q, chunk_keys, k.shape[1])
    out = routed_attention(q, k, v, plan, is_causal=True)
    return out, lambda: listed(plan, 256, k.shape[1])


def timed(call: Callable[[Haystack], Result], hay: Haystack) -> tuple[Result, float]:
    """The result, and the shortest of a few times."""
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        result = call(hay)
        times.append(time.perf_counter() - begin)
    return result, min(times)


def run(tokens: int, needles: int, seed: int, alone: bool) -> dict[str, int]:
    """Prints the table, and returns how many needles each method found."""
    hay = Haystack(tokens, needles, seed, alone)
    begin = time.perf_counter()
    chunk_keys = longheads_chunk_keys(hay.query, hay.key, hay.value)
    filled = time.perf_counter() - begin
    methods: dict[str, Callable[[Haystack], Result]] = {
        "dense": dense,
        "window": window,
        "HiP": hip,
        "InfiniteHiP": infinite_hip,
        "LongHeads": lambda hay: longheads(hay, chunk_keys),
        "Superlinear": superlinear,
    }
    print(f"{tokens} tokens, {needles} needles {'alone' if alone else 'among their like'}")
    print(f"{'':14}{'found':>8}{'listed':>8}{'time':>12}{'keys attended':>16}")
    counts = {}
    for name, method in methods.items():
        (out, who), seconds = timed(method, hay)
        attended = who()
        counts[name] = hay.found(out)
        reached = int(attended[torch.arange(needles), hay.at].sum())
        share = attended.sum() / (tokens * needles)
        print(
            f"{name:14}{counts[name]:>5} / {needles}{reached:>4} / {needles}"
            f"{seconds * 1e3:>9.2f} ms{share.item():>15.2%}"
        )
    print(f"LongHeads' chunk keys, made once as the context came in: {filled:.2f} s\n")
    return counts


def main(arguments: list[str] | None = None) -> tuple[dict[str, int], dict[str, int]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--needles", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.tokens < 4096 or not 1 <= options.needles <= 64:
        parser.error("--tokens must be at least 4096, and --needles between 1 and 64")
    with torch.no_grad():
        found, alone = (
            run(options.tokens, options.needles, options.seed, alone) for alone in (False, True)
        )
    return found, alone


if __name__ == "__main__":
    main()
