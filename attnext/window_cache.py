# SPDX-License-Identifier: Apache-2.0
"""What decoding with a sliding window keeps: a ring of the last keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arguments import check_count, check_dense, check_device, check_integer, check_tensor, kind_of


@dataclass
class WindowCache:
    """The keys and values of the last ``W`` tokens of each sequence of a batch, and the number of
    tokens that there have been.

    Shapes: keys ``[B, W, H, K]``, values ``[B, W, H, V]``; token ``t`` lies in slot ``t % W``.
    Softmax attention does not ask in which order keys lie.

    Errors: ValueError or TypeError, naming the argument.

    Example:
        >>> import torch, attnext
        >>> k, v = torch.randn(2, 1, 100, 2, 16)
        >>> cache = attnext.WindowCache.after(k, v, window_size=8)
        >>> _ = cache.push(*torch.randn(2, 1, 1, 2, 16))
        >>> cache.length, cache.seen()[0].shape
        (101, torch.Size([1, 8, 2, 16]))
    """

    keys: Tensor
    values: Tensor
    length: int = 0

    def __post_init__(self) -> None:
        _check_pair("keys", self.keys, "values", self.values)
        if not self.keys.shape[1]:
            raise ValueError(f"keys must have a slot, got shape {tuple(self.keys.shape)}")
        check_integer("length", self.length, 0)

    @property
    def window_size(self) -> int:
        return self.keys.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory of what is kept."""
        return self.keys.nbytes + self.values.nbytes

    @classmethod
    def after(cls, key: Tensor, value: Tensor, window_size: int) -> WindowCache:
        """What is left of a whole prompt, ``[B, N, H, K]`` and ``[B, N, H, V]``; copies, without a
        gradient."""
        _check_pair("key", key, "value", value)
        check_count("window_size", window_size)
        length = key.shape[1]
        turn = length % window_size if length > window_size else 0

        def ring(x: Tensor) -> Tensor:
            kept = x.new_zeros(x.shape[0], window_size, *x.shape[2:])
            kept[:, : min(length, window_size)] = x[:, -window_size:]
            return kept.roll(turn, dims=1)

        with torch.no_grad():
            return cls(ring(key.detach()), ring(value.detach()), length)

    def push(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | None:
        """Takes in one token, ``[B, 1, H, ...]``; returns the one that leaves the window, if any
        does."""
        self.check(key, value)
        if key.shape[1] != 1 or value.shape[1] != 1:
            raise ValueError(
                f"key and value must be of one token, got shapes {tuple(key.shape)} and "
                f"{tuple(value.shape)}"
            )
        return self._push(key, value)

    def _push(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | None:
        slot = self.length % self.window_size
        places = slice(slot, slot + 1)
        full = self.length >= self.window_size
        left = (self.keys[:, places].clone(), self.values[:, places].clone()) if full else None
        self.keys[:, places] = key
        self.values[:, places] = value
        self.length += 1
        return left

    def seen(self) -> tuple[Tensor, Tensor]:
        """The keys and values that are there: views."""
        count = min(self.length, self.window_size)
        return self.keys[:, :count], self.values[:, :count]

    def check(self, key: Tensor, value: Tensor) -> None:
        """Errors: TypeError or ValueError where new keys or values are not like those kept."""
        for name, new, kept in (("key", key, self.keys), ("value", value, self.values)):
            if not isinstance(new, Tensor) or new.dtype != kept.dtype:
                raise TypeError(
                    f"{name} must have the dtype of the cache, {kept.dtype}, got {kind_of(new)}"
                )
            check_dense(name, new)
            check_device(name, new, kept, "the cache")
            want = (kept.shape[0], *kept.shape[2:])
            if new.dim() != 4 or (new.shape[0], *new.shape[2:]) != want:
                raise ValueError(
                    f"{name} must be [batch, tokens, heads, dim] with batch, heads and dim of the "
                    f"cache, {want}, got shape {tuple(new.shape)}"
                )


def _check_pair(key_name: str, key: Any, value_name: str, value: Any) -> None:
    for name, t in ((key_name, key), (value_name, value)):
        check_tensor(name, t, "a floating-point")
        if t.dim() != 4:
            raise ValueError(f"{name} must be [B, N, H, D], got shape {tuple(t.shape)}")
    check_device(value_name, value, key, key_name)
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"{value_name} must have the batch, tokens and heads of {key_name}, "
            f"{tuple(key.shape[:3])}, got {tuple(value.shape[:3])}"
        )
