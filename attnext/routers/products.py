# SPDX-License-Identifier: Apache-2.0
"""The registered operators by which routers score keys that they name one by one, and keep the
best."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C
from ..autograd import LIBRARY
from .inputs import Rows, exact

# Of the key at each place, the largest product with those queries of the list that see it.
#
# query `[B, lists, rows, samples, D]` in float32 (float64 for float64), reach int64 `[rows,
# samples]`: the last key that each sees, key `[B, N, Hkv, D]`, at int64 `[B, lists, rows, places]`,
# taken into the keys there are; the result is as `at`. Keys that no query sees are `lowest`, and so
# are those with NaN among their products; nothing is less.
LIBRARY.define(
    "largest_products(Tensor query, Tensor reach, Tensor key, Tensor at, float lowest) -> Tensor"
)


def _fake(query: Tensor, reach: Tensor, key: Tensor, at: Tensor, lowest: float) -> Tensor:
    return query.new_empty(at.shape)


def _cpu(query: Tensor, reach: Tensor, key: Tensor, at: Tensor, lowest: float) -> Tensor:
    found = _fake(query, reach, key, at, lowest)
    if key.stride(-1) != 1 and key.shape[-1] > 1:
        key = key.contiguous()
    query, reach, at = query.contiguous(), reach.contiguous(), at.contiguous()
    _C.largest_products(query, reach, key, at, lowest, found)
    return found


def largest_products_in_torch(
    query: Tensor, reach: Tensor, key: Tensor, at: Tensor, lowest: float
) -> Tensor:
    """The same by torch's own operators, on any device: rows are copied, all products written."""
    batch, lists = query.shape[:2]
    rows = Rows(key)
    item = torch.arange(batch, device=at.device)[:, None, None, None]
    head = torch.arange(lists, device=at.device) // (lists // rows.heads)
    at = at.clamp(0, rows.tokens - 1)
    found = exact(rows(item, at, head[:, None, None]))
    products = query @ found.transpose(-1, -2)  # [B, lists, rows, samples, places]
    products.masked_fill_(at.unsqueeze(3) > reach[..., None], lowest)
    return products.amax(3).nan_to_num(lowest, torch.inf, lowest).clamp(min=lowest)


LIBRARY.impl("largest_products", _cpu, "CPU")
LIBRARY.impl("largest_products", largest_products_in_torch, "CUDA")
torch.library.register_fake("attnext::largest_products", _fake, lib=LIBRARY)

largest_products = torch.ops.attnext.largest_products

# Places of the `count` largest of each row, int64, rising; of equal ones the first. No NaN.
LIBRARY.define("best_places(Tensor numbers, int count) -> Tensor")


def _best_places_fake(numbers: Tensor, count: int) -> Tensor:
    return numbers.new_empty((*numbers.shape[:-1], count), dtype=torch.int64)


def _best_places_cpu(numbers: Tensor, count: int) -> Tensor:
    places = _best_places_fake(numbers, count)
    if places.numel():
        _C.best_places(numbers.contiguous(), count, places)
    return places


def best_places_in_torch(numbers: Tensor, count: int) -> Tensor:
    """The same by torch's own operators, on any device."""
    best = numbers.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return best.sort(-1).values


LIBRARY.impl("best_places", _best_places_cpu, "CPU")
LIBRARY.impl("best_places", best_places_in_torch, "CUDA")
torch.library.register_fake("attnext::best_places", _best_places_fake, lib=LIBRARY)

best_places = torch.ops.attnext.best_places
