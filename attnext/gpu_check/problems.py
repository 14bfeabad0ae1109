# SPDX-License-Identifier: Apache-2.0
"""What is checked: problems as plain data, and those of windows. The tests run from the same
list."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import attnext

from .. import reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# How tensors lie in memory: whole; heads first and transposed; cut out of a larger tensor, so that
# rows do not start at multiples of 16 bytes; as those, but one batch item read for all.
LAYOUTS = ("whole", "heads first", "cut out", "one for all")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A call of ``getattr(attnext, op)`` with tensors of random numbers.

    Modifiers: ``bias`` (extents ``e`` of the table ``[H, 2 e - 1, ...]``), ``alibi``,
    ``sink_logits``, ``additional`` (a number of keys), ``scale`` ("head" or "row": a tensor).
    ``ends``: where packed sequences of queries and of keys end. ``size``: how peaked the softmax
    is.
    """

    name: str
    op: str
    queries: tuple[int, ...]
    keys: tuple[int, ...] = ()
    batch: int = 1
    heads: int = 2
    kv_heads: int = 0
    head_dim: int = 32
    head_dim_v: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    bias: tuple[int, ...] = ()
    alibi: bool = False
    sink_logits: bool = False
    additional: int = 0
    scale: str = ""
    ends: tuple[tuple[int, ...], ...] = ()
    layout: str = "whole"
    size: float = 1.0

    def tensors(self, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
        """The tensor arguments: the same numbers on every device."""
        generator = torch.Generator().manual_seed(sum(map(ord, self.name)))

        def normal(*shape: int, dtype: torch.dtype = dtype, size: float = 1.0) -> Tensor:
            x = torch.randn(shape, generator=generator, dtype=torch.float64) * size
            return x.to(dtype).to(device)

        keys, kv_heads = self.keys or self.queries, self.kv_heads or self.heads
        dim_v = self.head_dim_v or self.head_dim
        tensors = {
            "query": normal(self.batch, *self.queries, self.heads, self.head_dim, size=self.size),
            "key": normal(self.batch, *keys, kv_heads, self.head_dim),
            "value": normal(self.batch, *keys, kv_heads, dim_v),
        }
        if self.additional:
            extra = (self.batch, self.additional, kv_heads)
            tensors["additional_keys"] = normal(*extra, self.head_dim)
            tensors["additional_values"] = normal(*extra, dim_v)
        tensors = {name: lay_out(x, self.layout) for name, x in tensors.items()}
        small = torch.float32
        if self.bias:
            table = (2 * extent - 1 for extent in self.bias)
            tensors["bias"] = normal(self.heads, *table, dtype=small)
        if self.alibi:
            tensors["alibi_slopes"] = normal(self.heads, dtype=small).abs() / 4
        if self.sink_logits:
            tensors["sink_logits"] = normal(self.heads, dtype=small)
        if self.scale:
            rows = (self.batch, *self.queries) if self.scale == "row" else ()
            tensors["scale"] = normal(*rows, self.heads, dtype=small).abs() * self.head_dim**-0.5
        for name, ends in zip(("cu_seqlens_q", "cu_seqlens_k"), self.ends, strict=False):
            tensors[name] = torch.tensor(ends, dtype=torch.int32)  # on the CPU beside any device
        return tensors

    @property
    def function(self) -> Callable[..., Any]:
        """What is called with the tensors and options."""
        called: Callable[..., Any] = getattr(attnext, self.op)
        return called

    @property
    def specification(self) -> Callable[..., Any]:
        """The same in plain torch; see ``attnext.reference``."""
        called: Callable[..., Any] = getattr(reference, self.op)
        return called

    def cotangents(self, dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Gradients of the two results."""
        generator = torch.Generator().manual_seed(len(self.name))
        rows = (self.batch, *self.queries, self.heads)
        dim_v = self.head_dim_v or self.head_dim
        dout = torch.randn(*rows, dim_v, generator=generator, dtype=torch.float64).to(dtype)
        dlse = torch.randn(rows, generator=generator, dtype=torch.float64).float()
        return lay_out(dout.to(device), self.layout), dlse.to(device)

    def describe(self) -> str:
        """One line: the shapes, and the options that are on."""
        words = [self.op, "x".join(map(str, self.queries))]
        if self.keys:
            words.append("keys " + "x".join(map(str, self.keys)))
        heads = f"H{self.heads}" + (f"/{self.kv_heads}" if self.kv_heads else "")
        dims = f"D{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v else "")
        words.append(f"B{self.batch} {heads} {dims}")
        words += [f"{name}={value}" for name, value in self.options.items()]
        words += [f"bias {'x'.join(map(str, self.bias))}"] if self.bias else []
        words += [word for word in ("alibi", "sink_logits") if getattr(self, word)]
        words += [f"{self.additional} additional keys"] if self.additional else []
        words += [f"scale per {self.scale}"] if self.scale else []
        words += ["packed"] if self.ends else []
        words += [] if self.layout == "whole" else [self.layout]
        return ", ".join(words)


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout. The head dimension keeps unit stride."""
    if layout == "heads first":
        return tensor.transpose(1, -2).contiguous().transpose(1, -2)
    if layout == "cut out":
        whole = tensor.new_full([extent + 2 for extent in tensor.shape], math.nan)
        part = whole[tuple(slice(1, -1) for _ in tensor.shape)]
        return part.copy_(tensor)
    if layout == "one for all":
        return lay_out(tensor[:1], "cut out").expand(tensor.shape)
    return tensor.contiguous()


def _problems() -> list[Problem]:
    problems: list[Problem] = []

    def add(
        op: str, name: str, queries: tuple[int, ...], *, more: Any = None, **options: Any
    ) -> None:
        problems.append(Problem(name=name, op=op, queries=queries, options=options, **(more or {})))

    def slide(name: str, tokens: int, window_size: Any, more: Any = None, **options: Any) -> None:
        add(
            "sliding_window_attention",
            name,
            (tokens,),
            more=more,
            window_size=window_size,
            **options,
        )

    def near(
        name: str, queries: tuple[int, ...], kernel_size: Any, more: Any = None, **options: Any
    ) -> None:
        add("neighborhood_attention", name, queries, more=more, kernel_size=kernel_size, **options)

    def tile(
        name: str, queries: tuple[int, ...], window_size: Any, more: Any = None, **options: Any
    ) -> None:
        add("window_attention", name, queries, more=more, window_size=window_size, **options)

    # Lengths around the tiles of 16, 64 and 128 rows, and steps of the walk.
    for n in (1, 15, 63, 64, 65, 129):
        slide(f"causal-{n}", n, n // 3 + 1, {"head_dim": 64})
        near(f"na1d-{n}", (n,), 7, {"kv_heads": 1})
    slide("dense-129", 129, None, {"head_dim": 64}, is_causal=False)
    slide("band-300", 300, (70, 3), {"head_dim": 64}, is_causal=False)
    for a, b in ((1, 65), (15, 15), (9, 31), (64, 3)):
        near(f"na2d-{a}x{b}", (a, b), (3, 5), {"kv_heads": 1})
    near("na3d-3x5x9", (3, 5, 9), 3)
    near("na3d-4x6x7-causal", (4, 6, 7), (2, 3, 3), is_causal=(True, False, False))
    tile("window-15x9", (15, 9), 7, {"bias": (7, 7)}, shift=3)
    tile("window-3d", (4, 6, 5), (2, 3, 4), shift=(1, 0, 2))
    tile("window-spare-rows", (10, 19), (12, 10), {"bias": (5, 10)}, shift=(17, 0))
    tile("window-overlap", (12, 12), 4, {"bias": (7, 7)}, key_window_size=6)

    # Head dimensions: each bucket, what does not fill one, values with a dimension of their own.
    for dim in (30, 64, 128, 256):
        more = {"head_dim": dim, "batch": 2}
        slide(f"dim-{dim}", 81, 20, more)
        near(f"dim-{dim}-modified", (9, 9), 5, more | {"bias": (5, 5), "scale": "row"}, softcap=5.0)
    slide("dim-8", 65, 9, {"head_dim": 8})
    slide("dims-64-30", 65, 20, {"head_dim": 64, "head_dim_v": 30})
    slide("dims-30-128", 65, 20, {"head_dim": 30, "head_dim_v": 128})

    # Heads that share keys; windows of their own.
    slide("heads-6-2", 100, 30, {"heads": 6, "kv_heads": 2, "batch": 2})
    near("heads-4-1", (10, 11), 5, {"heads": 4, "kv_heads": 1})
    slide("windows-per-head", 90, [5, 40, None, (3, 0)], {"heads": 4, "kv_heads": 2})

    # Rules.
    near("stride", (17, 13), 7, stride=(3, 2))
    near("dilation", (20, 11), 3, dilation=(4, 2))
    near("causal-dilated", (70,), 9, is_causal=True, dilation=3)
    near("strided-dilated-phase", (33, 8), (6, 4), stride=2, dilation=(3, 1), phase=(1, 0))
    for boundary in ("truncate", "zero_pad"):
        near(f"boundary-{boundary}", (11, 10), 5, boundary=boundary)
    near("kernel-beyond-axis", (5, 40), (9, 7))
    near("offset", (20,), 5, {"keys": (33,)}, offset=7, boundary="truncate")
    slide("decode-1", 1, None, {"keys": (700,), "heads": 8, "kv_heads": 2, "head_dim": 128})
    slide("decode-5", 5, 64, {"keys": (300,), "head_dim": 64}, sinks=3)
    slide("rows-without-keys", 80, 9, {"keys": (40,)})

    # Score modifiers.
    near("bias", (9, 12), 5, {"bias": (5, 5), "batch": 2})
    slide("softcap", 90, 30, {"head_dim": 64, "size": 3.0}, softcap=5.0)
    slide("alibi", 90, 30, {"alibi": True, "head_dim": 64})
    slide("alibi-sinks", 90, 20, {"alibi": True}, sinks=4)
    slide("sinks", 150, 17, {"head_dim": 64}, sinks=4)
    slide("sink-logits", 90, 30, {"sink_logits": True, "kv_heads": 1})
    slide("scale-per-head", 90, 30, {"scale": "head"})
    near("scale-per-row", (9, 9), 3, {"scale": "row"})
    slide("scale-zero", 40, 9, scale=0.0)
    slide("scale-negative", 40, 9, scale=-0.5)
    near("additional", (8, 9), 3, {"additional": 5, "batch": 2, "kv_heads": 1})
    slide("additional-70", 70, 9, {"additional": 70, "sink_logits": True})
    near(
        "everything", (10, 9), (3, 5),
        {"bias": (8, 6), "alibi": True, "sink_logits": True, "additional": 3, "scale": "row",
         "batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 64, "layout": "cut out"},
        stride=(1, 2), dilation=(2, 1), softcap=8.0,
    )  # fmt: skip

    # Packed sequences, one of them empty.
    ends = (0, 1, 64, 64, 130)
    slide("packed", 130, 20, {"ends": (ends,), "head_dim": 64})
    slide("packed-keys", 130, (30, 5), {"keys": (145,), "ends": (ends, (0, 3, 70, 75, 145))},
          is_causal=False, sinks=2)  # fmt: skip
    slide("packed-bias", 130, 9, {"ends": (ends,), "bias": (9,), "sink_logits": True})

    # Memory layouts, and tensors with nothing in them.
    for layout in LAYOUTS[1:]:
        shape: dict[str, Any] = {"layout": layout, "batch": 2, "head_dim": 64}
        slide(f"layout-{layout.replace(' ', '-')}", 70, 20, shape)
    slide("no-batch", 9, 3, {"batch": 0})
    near("no-queries", (0, 5), 3, {"keys": (4, 5), "bias": (8, 8), "sink_logits": True})
    near("no-keys", (4, 5), 3, {"keys": (4, 0), "sink_logits": True})
    return problems


WINDOWS: dict[str, Problem] = {problem.name: problem for problem in _problems()}
