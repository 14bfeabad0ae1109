# SPDX-License-Identifier: Apache-2.0
"""Problems that execute nearly every instruction of the window kernels, and why the rest is not.

A problem is tiny and awkward in several ways at once. Each is made for a variant of the kernels:
plain or with score modifiers, and of a dtype and a bucket of head_dim.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.kernels import CSRC

from .lanes import leaders
from .metrics import Execution
from .problems import Problem, make


class Variant(NamedTuple):
    """Which kernels: those of a dtype, with or without score modifiers, of a bucket."""

    dtype: torch.dtype
    modified: bool
    bucket: int = 32

    @property
    def lead(self) -> int:
        """Additional keys for more than two steps of the widest kernel, and no walk in parts. In 16
        bits, sinks come to lie across words of a mask."""
        return 158 if self.dtype.itemsize == 2 else 70

    @property
    def has_long(self) -> bool:
        """Whether sequences of more than 64 queries have kernels of their own."""
        return self.dtype.itemsize == 2 and not self.modified and self.bucket in (64, 128)

    def make(
        self, op: str, queries: list[int], keys: list[int] | None = None, **more: Any
    ) -> Problem:
        """`dim` and `dim_v` are what a row lacks to the bucket."""
        dim, dim_v = self.bucket - more.pop("dim", 0), self.bucket - more.pop("dim_v", 0)
        reach = more.pop(
            "reach", [max(q, k) for q, k in zip(queries, keys or queries, strict=True)]
        )
        if self.modified:
            more = {"bias": reach, "row_scale": True, "softcap": 2.0, **more}
        return make(op, queries, keys, dim=dim, dim_v=dim_v, dtype=self.dtype, **more)


def value_not_finite(tensors: dict[str, Tensor]) -> None:
    """One number of it: the others still tell what is wrong."""
    tensors["value"].flatten(1, -3)[:, 7, :, 0] = torch.inf


def values_not_finite(tensors: dict[str, Tensor]) -> None:
    """An additional value too, of the first head."""
    value_not_finite(tensors)
    tensors["additional_values"][:, -1, :1, 1] = -torch.inf


def last_not_finite(tensors: dict[str, Tensor]) -> None:
    """The last key too, which only the last query attends."""
    values_not_finite(tensors)
    tensors["key"][:, -1] = torch.nan


def keys_not_finite(tensors: dict[str, Tensor]) -> None:
    """A key and a value of those that some queries attend."""
    value_not_finite(tensors)
    tensors["key"].flatten(1, -3)[:, 5] = torch.nan


def large(tensors: dict[str, Tensor]) -> None:
    tensors["query"] *= 60


def packed(tensors: dict[str, Tensor]) -> None:
    """Two sequences, each with its share of the keys."""
    for name, of in (("query", "q"), ("key", "k")):
        tokens = tensors[name].shape[1]
        tensors[f"cu_seqlens_{of}"] = torch.tensor([0, tokens * 3 // 4, tokens], dtype=torch.int32)


def packed_not_finite(tensors: dict[str, Tensor]) -> None:
    packed(tensors)
    keys_not_finite(tensors)
    values_not_finite(tensors)


def nobody(tensors: dict[str, Tensor]) -> None:
    """64 queries without keys, and as many keys without queries: tiles that have nothing to do."""
    tensors["cu_seqlens_q"] = torch.tensor([0, 64, 64, 70], dtype=torch.int32)
    tensors["cu_seqlens_k"] = torch.tensor([0, 0, 64, 70], dtype=torch.int32)


def none_of_the_first(tensors: dict[str, Tensor]) -> None:
    """Two sequences, of which the first has no keys."""
    tensors["cu_seqlens_q"] = torch.tensor([0, 50, 60], dtype=torch.int32)
    tensors["cu_seqlens_k"] = torch.tensor([0, 0, 70], dtype=torch.int32)


Maker = Callable[[Variant], Problem]


def problems_of(variant: Variant) -> dict[str, Maker]:
    """Those that reach all kernels of the variant."""
    return {**PROBLEMS, **(LENGTHS if variant.has_long else {})}


def _sliding(*shape: list[int], **options: Any) -> Maker:
    return lambda variant: variant.make("sliding_window_attention", *shape, **options)


def _neighborhood(*shape: list[int], **options: Any) -> Maker:
    return lambda variant: variant.make("neighborhood_attention", *shape, **options)


PROBLEMS: dict[str, Maker] = {
    # several steps, of which some are full and some are skipped; sinks across two steps or words of
    # a mask, and far from some boxes
    "sequence": _sliding([140], [180], window_size=70, heads=2, kv_heads=1, sinks=3, extra=30,
                         edit=packed),
    "left edge": _sliding([160], window_size=100),  # steps that begin before some rows' windows
    "part of a row": lambda variant: variant.make("sliding_window_attention", [140], sinks=3,
                                                  window_size=120, dim=8, dim_v=16,
                                                  extra=variant.lead, sink_logits=True, batch=2),
    "boxes": lambda variant: variant.make("window_attention", [2, 8, 8], window_size=(2, 4, 8),
                                          dim=16, spare=16, batch=2),
    "more boxes": _neighborhood([9, 2, 8], kernel_size=(5, 2, 8)),
    # rows that a tile lacks have no place in the bias' table, in steps that all others attend
    "rows to spare": _sliding([65], window_size=(63, 63), is_causal=False, reach=[63], dim_v=16,
                              spare=16),
    "no step": _sliding([70], [70], window_size=30, edit=nobody),
    # weights that would overflow: logits of one row are hundreds apart
    "large logits": _sliding([70], [128], window_size=None, is_causal=False, edit=large,
                             backward=False),
    # rows that are copied from their addresses
    "far": lambda variant: variant.make("neighborhood_attention", [3, 5, 6], kernel_size=3,
                                        boundary="zero_pad", dim=10, dim_v=13, batch=2,
                                        extra=variant.lead),
    # results of rows that end within 16 bytes, and are not shared by blocks in any bucket
    "odd": _sliding([64], window_size=6, dim=3, dim_v=5),
    "far boxes": _neighborhood([4, 6, 6], kernel_size=(2, 3, 3), dilation=2, dim=10, dim_v=13),
    # keys outside of the map, in a walk that is copied from its places
    "phantoms": _neighborhood([5, 2, 6], kernel_size=3, boundary="zero_pad", dim=8),
    # the last key of a tile is such a one only because its class starts at the second token
    "phantoms at the end": _neighborhood([141, 1, 1], kernel_size=(3, 1, 1), dilation=(2, 1, 1),
                                         boundary="zero_pad", dim=8),
    # a row by a warp
    "alone": _sliding([12], [24], window_size=6, sinks=2, sink_logits=True, heads=4, kv_heads=2,
                      extra=1, edit=packed_not_finite),
    "alone, boxes": _neighborhood([2, 2, 5], kernel_size=2, boundary="zero_pad", dim=8, extra=1,
                                  dilation=(1, 1, 2), batch=2, edit=keys_not_finite),
    # a walk by several blocks
    "parts": _sliding([1], [2900], window_size=None, heads=3, backward=False),
    "parts, alone": _sliding([2], [900], window_size=None, sink_logits=True, extra=2,
                             edit=last_not_finite, backward=False),
    "parts of boxes": _neighborhood([24, 24], kernel_size=24, backward=False),
}  # fmt: skip

# What of the above is a long sequence as a short one, and the other way round.
LENGTHS: dict[str, Maker] = {
    "short": _sliding([60], [140], window_size=70, heads=2, kv_heads=1, sinks=3, extra=2),
    "short, part of a row": lambda variant: variant.make(
        "sliding_window_attention", [60], sinks=3, window_size=50, dim=8, dim_v=16,
        extra=variant.lead, backward=False),
    "short, no step": _sliding([60], [70], window_size=30, edit=none_of_the_first),
    "short, large logits": _sliding([60], [128], window_size=None, is_causal=False, edit=large,
                                    backward=False),
    "long, part of a row": _sliding([70], window_size=30, dim=8, dim_v=16),
    "long, far": lambda variant: variant.make("sliding_window_attention", [140], window_size=60,
                                              dim=10, dim_v=13, extra=variant.lead),
    "long, alone": _sliding([140], window_size=70, sinks=2, sink_logits=True, extra=1,
                            heads=2, edit=packed_not_finite),
    "long, parts": _sliding([70], [1100], window_size=None, backward=False),
    "long, parts, alone": _sliding([70], [900], window_size=None, sink_logits=True, extra=2,
                                   edit=last_not_finite, backward=False),
}  # fmt: skip


class Reason(NamedTuple):
    """Why a basic block is not executed: one with `what` in the source lines that its instructions
    come from, or in their PTX."""

    why: str
    what: str
    of: str = ""  # kernels


REASONS = (
    Reason("for numbers of more than 32 bits, which the compiler's code asks for first", "div.s64"),
    Reason(
        "in a copy of the loop for lines after the first: sinks are keys of one line",
        "if (has_sinks) add_window(row.sinks);",
    ),
    Reason(
        "walked queries are copied in this way only if they are unaligned, or 32 GiB apart",
        "copy_chunk_async(to, source, from ? bytes : 0);",
        "key_gradient",
    ),
    Reason("all heads have the same tiles of keys", "return false;", "key_gradient"),
    Reason(
        "all heads have the same tiles of keys", "row.live &= mine < tile(a).count;", "key_gradient"
    ),
    Reason("a sum that is not finite, in the other rows that a lane has", "logf(sum)", "forward"),
    Reason("nothing is launched for a batch of 0", "batch < w.batch", "sink_gradient"),
    Reason("nothing is launched for a batch of 0", "mov.f32", "sink_gradient"),
)


def unexplained(
    kernel: str, execution: Execution, reasons: Sequence[Reason] = REASONS
) -> list[str]:
    """Basic blocks that were not executed for none of the reasons."""
    code, ran = execution.function.code, execution.executed()
    starts = [*leaders(code, execution.function.labels, set()), len(code)]
    found = []
    for start, end in itertools.pairwise(starts):
        missed = [i for i, x in zip(code[start:end], ran[start:end], strict=True) if not x]
        texts = [i.text for i in missed]
        texts += [line_of(*place) for i in missed for place in i.source]
        known = any(r.of in kernel and r.what in text for r in reasons for text in texts)
        if missed and not known:
            found += [f"PTX line {i.line}: {i.text}: {i.source}" for i in missed]
    return found


@functools.cache
def _lines(file: str) -> list[str]:
    path = CSRC / "cuda" / file
    return path.read_text().splitlines() if path.exists() else []


def line_of(file: str, line: int) -> str:
    """A line of our sources; nothing of the toolkit's."""
    lines = _lines(file)
    return lines[line - 1].strip() if 0 < line <= len(lines) else ""
