# SPDX-License-Identifier: Apache-2.0
"""Linear attention with stock operators, and with the package that users install for it.

In stock torch a sequence takes the chunked form, batched over heads and chunks: states come from
one batched product and a cumulative sum over chunks; within a chunk scores are masked. For the
Taylor map the score within a chunk is its polynomial, so that features are built for the states
only: all products as BASED's own code has them, or the symmetric half, whichever is faster. Heads
first outside the timing; the chunk is chosen by running a few.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import elu

from ..cases import LinearCase, LinearStepCase
from ..problem import AS_IS, Prepared, Problem, Unavailable, heads_first, leaves_of
from .contender import Contender, fastest
from .packages import import_package

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


def _enter(query: Tensor, key: Tensor, case: LinearCase) -> tuple[Tensor, Tensor]:
    """What scores are products of: scaled queries, or features."""
    if case.feature_map == "taylor2":
        return query * case.head_dim**-0.5, key
    if case.feature_map == "elu":
        return elu(query) + 1, elu(key) + 1
    return query, key


def _featured(query: Tensor, key: Tensor, case: LinearCase, packed: bool) -> tuple[Tensor, Tensor]:
    """What states are made of."""
    query, key = _enter(query, key, case)
    if case.feature_map == "taylor2":
        return _products(query, packed, True), _products(key, packed, False)
    return query, key


def _unpacked(state: Tensor, case: LinearCase) -> Tensor:
    """A state with a row for each of all products, where ``state`` has each once."""
    dim = case.head_dim
    a, b = torch.triu_indices(dim, dim)
    rows = torch.zeros(dim, dim, dtype=torch.long)
    rows[a, b] = rows[b, a] = torch.arange(len(a)) + 1 + dim
    index = torch.cat([torch.arange(1 + dim), rows.flatten()])
    return state[:, :, index].contiguous()


def chunked(
    query: Tensor, key: Tensor, value: Tensor, case: LinearCase, chunk: int, packed: bool = False
) -> Tensor:
    """Causal linear attention of ``[B, H, N, D]``; N is a multiple of the chunk."""
    query, key = _enter(query, key, case)
    taylor = case.feature_map == "taylor2"
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


def stepped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    case: LinearCase,
    packed: bool,
    batched: bool = True,
) -> Tensor:
    """One token ``[B, 1, H, D]``; the state, ``[B, H, F, V]``, is updated in place, by batched
    products or entry by entry. With a normaliser values get a column of ones."""
    phi_q, phi_k = _featured(query, key, case, packed)
    if case.normalize:
        value = torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)
    q, k, v = (x.to(state.dtype).flatten(0, -2) for x in (phi_q, phi_k, value))
    flat = state.flatten(0, 1)
    if batched:
        flat.baddbmm_(k[:, :, None], v[:, None, :])
        out = torch.bmm(q[:, None, :], flat)
    else:
        flat.addcmul_(k[:, :, None], v[:, None, :])
        out = (q[:, :, None] * flat).sum(1)
    out = out.view(*query.shape[:-1], -1)
    if case.normalize:
        out = out[..., :-1] / (out[..., -1:] + 1e-6)
    return out.to(query.dtype)


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


class TorchStep(Contender):
    name = "torch-step"
    about = "a step of linear attention in stock torch, in the fastest of its forms"
    ops = ("linear-step",)

    def prepare(self, problem: Problem, training: bool) -> Prepared:
        case = problem.case
        assert isinstance(case, LinearStepCase)

        def make(packed: bool, batched: bool) -> Prepared:
            leaves, layouts = leaves_of(problem, training, AS_IS, AS_IS)
            state = problem.state if packed else _unpacked(problem.state, case)
            query, key, value = leaves["query"], leaves["key"], leaves["value"]
            call = partial(stepped, query, key, value, state, case, packed, batched)
            return Prepared(call, leaves, layouts)

        forms = {}
        for packed in (False, True) if case.feature_map == "taylor2" else (True,):
            for batched in (False, True):
                name = "batched products" if batched else "entry by entry"
                if case.feature_map == "taylor2":
                    name += ", symmetric half" if packed else ", all features"
                forms[name] = partial(make, packed, batched)
        # The trial has moved the state on: once more, from the start.
        chosen = fastest(forms.items(), problem, False).detail
        return replace(forms[chosen](), detail=chosen)


class FastTransformers(Contender):
    name = "fast-transformers"
    about = "causal_dot_product of pytorch-fast-transformers, features and sums in torch; fp32"
    ops = ("linear",)

    def prepare(self, problem: Problem, training: bool) -> Prepared:
        case = problem.case
        assert isinstance(case, LinearCase)
        module = import_package("fast_transformers.causal_product", "pytorch-fast-transformers")
        if problem.dtype != torch.float32:
            raise Unavailable("has float32 only")
        product = module.causal_dot_product
        layout = heads_first(case.queries)

        def make(packed: bool) -> Prepared:
            leaves, layouts = leaves_of(problem, training, layout, layout)
            query, key, value = leaves["query"], leaves["key"], leaves["value"]

            def call() -> Tensor:
                phi_q, phi_k = _featured(query, key, case, packed)
                out: Tensor = product(phi_q.contiguous(), phi_k.contiguous(), value)
                if case.normalize:
                    sums = torch.einsum("bhnf,bhnf->bhn", phi_q, phi_k.cumsum(2))
                    out = out / (sums[..., None] + 1e-6)
                return out

            return Prepared(call, leaves, layouts)

        names = {True: "symmetric half", False: "all products"}
        if case.feature_map != "taylor2":
            return make(True)
        return fastest([(name, partial(make, p)) for p, name in names.items()], problem, training)
