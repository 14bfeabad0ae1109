# SPDX-License-Identifier: Apache-2.0
"""Linear attention with stock operators: the chunked form, batched over heads and chunks.

States come from one batched product and a cumulative sum over chunks; within a chunk scores are
masked. For the Taylor map the score within a chunk is its polynomial, so that features are built
for the states only: all products as BASED's own code has them, or the symmetric half, whichever is
faster. Heads first outside the timing; the chunk is chosen by running a few.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import elu

from ..cases import LinearCase
from ..problem import Prepared, Problem, Unavailable, heads_first, leaves_of
from .contender import Contender, fastest

CHUNKS = (32, 64, 128, 256)


def _products(x: Tensor, packed: bool, weighted: bool) -> Tensor:
    """1, x, and the products of its entries, so that those of q and k give 1 + s + s^2/2."""
    ones = torch.ones_like(x[..., :1])
    if not packed:
        pairs = (x[..., :, None] * x[..., None, :]).flatten(-2)
        return torch.cat([ones, x, pairs / 2 if weighted else pairs], dim=-1)
    a, b = torch.triu_indices(x.shape[-1], x.shape[-1])
    pairs = x[..., a] * x[..., b]
    if weighted:
        pairs = pairs * torch.where(a == b, 0.5, 1.0).to(x.dtype)
    return torch.cat([ones, x, pairs], dim=-1)


def chunked(
    query: Tensor, key: Tensor, value: Tensor, case: LinearCase, chunk: int, packed: bool = False
) -> Tensor:
    """Causal linear attention of ``[B, H, N, D]``; N is a multiple of the chunk."""
    taylor = case.feature_map == "taylor2"
    if taylor:
        query = query * case.head_dim**-0.5
    elif case.feature_map == "elu":
        query, key = elu(query) + 1, elu(key) + 1
    query, key, value = (x.unflatten(2, (-1, chunk)) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2)
    if taylor:
        scores = 1 + scores + scores.square() / 2
        query, key = _products(query, packed, True), _products(key, packed, False)
    scores = scores.tril()
    sums = key.transpose(-1, -2) @ value
    before = sums.cumsum(2) - sums
    out = scores @ value + query @ before
    if case.normalize:
        sums = key.sum(-2, keepdim=True)
        before = sums.cumsum(2) - sums
        out = out / (scores.sum(-1, keepdim=True) + (query * before).sum(-1, keepdim=True) + 1e-6)
    return out.flatten(2, 3)


class TorchChunked(Contender):
    name = "torch-chunked"
    about = "linear attention in chunks, with batched products of stock torch"
    ops = ("linear",)

    def prepare(self, problem: Problem, training: bool) -> Prepared:
        case = problem.case
        assert isinstance(case, LinearCase)
        layout = heads_first(case.queries)

        def make(chunk: int, packed: bool) -> Prepared:
            if case.num_queries % chunk:
                raise Unavailable(f"length {case.num_queries} is no multiple of a chunk")
            leaves, layouts = leaves_of(problem, training, layout, layout)
            query, key, value = leaves["query"], leaves["key"], leaves["value"]
            call = partial(chunked, query, key, value, case, chunk, packed)
            return Prepared(call, leaves, layouts)

        def variants() -> Iterator[tuple[str, partial[Prepared]]]:
            for packed in (False, True) if case.feature_map == "taylor2" else (False,):
                for chunk in CHUNKS:
                    name = f"chunks of {chunk}" + (", symmetric half" if packed else "")
                    yield name, partial(make, chunk, packed)

        return fastest(variants(), problem, training)
