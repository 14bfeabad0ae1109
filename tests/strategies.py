# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies: rules on an axis, and whole attention problems.

A problem draws its shape and its options; what its tensors hold comes from a seed. Tensors come in
the layouts that callers have: whole, heads first and transposed, cut out of a larger tensor whose
other entries are NaN, or one batch item read for all.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from attnext import reference
from attnext.reference import Axis

BOUNDARIES = ("inward", "truncate", "zero_pad")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HEAD_DIMS = (1, 2, 7, 8, 16, 30, 32, 53, 64, 77, 122)
LAYOUTS = ("whole", "heads first", "cut out", "one for all")


@st.composite
def axes(draw: st.DrawFn, most: int = 40) -> tuple[Axis, int, int]:
    """A rule on one axis and the extents of queries and keys."""
    stride = draw(st.integers(1, 9))
    causal = draw(st.booleans())
    axis = Axis(
        left=draw(st.integers(0, 12)),
        right=0 if causal else draw(st.integers(0, 12)),
        stride=stride,
        phase=draw(st.integers(-2 * stride, 2 * stride)),
        dilation=draw(st.integers(1, 6)),
        is_causal=causal,
        boundary=draw(st.sampled_from(BOUNDARIES)),
        offset=draw(st.integers(-20, 20)),
    )
    return axis, draw(st.integers(0, most)), draw(st.integers(0, most))


class Problem:
    """A call: ``getattr(attnext, op)(**tensors, **options)``, and cotangents of its results.

    Not a dataclass: Hypothesis would print one field by field, whole tensors included.
    """

    def __init__(
        self,
        op: str,
        tensors: dict[str, Tensor],
        options: dict[str, Any],
        cotangents: tuple[Tensor, Tensor],
        layouts: dict[str, str] | None = None,
    ) -> None:
        self.op, self.tensors, self.options = op, tensors, options
        self.cotangents, self.layouts = cotangents, layouts or {}

    def __repr__(self) -> str:
        shapes = {
            name: f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} {self.layouts.get(name)}"
            for name, x in self.tensors.items()
        }
        return f"Problem({self.op}, {shapes}, {self.options})"


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout. The head dimension keeps unit stride."""
    if layout == "heads first":
        return tensor.transpose(1, -2).contiguous().transpose(1, -2)
    if layout == "cut out":
        shape = [extent + 2 for extent in tensor.shape]
        whole = torch.full(shape, torch.nan, dtype=tensor.dtype)
        part = whole[tuple(slice(1, -1) for _ in shape)]
        part.copy_(tensor)
        return part
    if layout == "one for all":
        return tensor[:1].contiguous().expand(tensor.shape)
    return tensor.contiguous()


@st.composite
def problems(
    draw: st.DrawFn,
    ops: tuple[str, ...] = (
        "neighborhood_attention",
        "sliding_window_attention",
        "window_attention",
    ),
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    most: int = 1,
) -> Problem:
    """A problem of one of the ops; ``most`` scales how many tokens it has."""
    op = draw(st.sampled_from(ops))
    rank = 1 if op == "sliding_window_attention" else draw(st.sampled_from((1, 2, 2, 3)))
    limit = round({1: 70, 2: 11, 3: 5}[rank] * most ** (1 / rank))
    extent = st.one_of(st.integers(1, limit), st.integers(limit // 2, limit))
    queries = tuple(draw(extent) for _ in range(rank))
    keys = queries if draw(st.booleans()) else tuple(draw(extent) for _ in range(rank))
    batch = draw(st.sampled_from((1, 1, 2, 3)))
    nothing = draw(st.sampled_from((None,) * 12 + ("batch", "queries", "keys")))
    batch = 0 if nothing == "batch" else batch
    queries = (0, *queries[1:]) if nothing == "queries" else queries
    keys = (*keys[:-1], 0) if nothing == "keys" else keys
    kv_heads = draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 3))
    dtype = draw(st.sampled_from(dtypes))
    dim = draw(st.sampled_from(HEAD_DIMS))
    dim_v = draw(st.one_of(st.just(dim), st.sampled_from(HEAD_DIMS)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    small = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype

    options: dict[str, Any] = {}
    if op == "neighborhood_attention":
        options = draw(_neighborhoods(queries, keys, heads))
    elif op == "sliding_window_attention":
        options = draw(_sliding_windows(queries[0], keys[0], heads, batch))
    else:
        options = draw(_windows(queries))
        keys = queries
    packed = options.pop("packed", None)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    size = draw(st.sampled_from((1.0, 1.0, 3.0)))  # how peaked the softmax is
    tensors = {
        "query": normal(batch, *queries, heads, dim) * size,
        "key": normal(batch, *keys, kv_heads, dim),
        "value": normal(batch, *keys, kv_heads, dim_v),
    }
    if draw(st.integers(0, 3)) == 0:
        extra = draw(st.integers(1, 5))
        tensors["additional_keys"] = normal(batch, extra, kv_heads, dim)
        tensors["additional_values"] = normal(batch, extra, kv_heads, dim_v)
    layouts = {name: draw(st.sampled_from(LAYOUTS)) for name in tensors}
    tensors = {name: lay_out(x, layouts[name]) for name, x in tensors.items()}
    if draw(st.integers(0, 3)) == 0:
        tensors["sink_logits"] = normal(heads, dtype=small)
    if draw(st.integers(0, 3)) == 0:
        tensors["alibi_slopes"] = normal(heads, dtype=small).abs() / 4
    if draw(st.integers(0, 2)) == 0:
        spare = draw(st.integers(0, 2))
        extents = [reach + 1 + spare for reach in _reach(op, options, queries, keys, heads, packed)]
        tensors["bias"] = normal(heads, *(2 * e - 1 for e in extents), dtype=small)
    kind = draw(st.sampled_from((None, None, "number", "head", "row")))
    if kind == "number":
        options["scale"] = draw(st.sampled_from((0.0, 0.125, -0.5, 1.3)))
    elif kind == "head":
        tensors["scale"] = normal(heads, dtype=small) * dim**-0.5
    elif kind == "row":
        tensors["scale"] = normal(batch, *queries, heads, dtype=small).abs() * dim**-0.5
    if draw(st.integers(0, 3)) == 0:
        options["softcap"] = draw(st.sampled_from((0.7, 5.0, 30.0)))
    if packed is not None:
        tensors |= {
            name: torch.tensor(bounds, dtype=torch.int32)
            for name, bounds in zip(("cu_seqlens_q", "cu_seqlens_k"), packed, strict=True)
        }

    layouts["cotangent"] = draw(st.sampled_from(LAYOUTS))
    cotangents = (
        lay_out(normal(batch, *queries, heads, dim_v), layouts["cotangent"]),
        normal(batch, *queries, heads, dtype=small),
    )
    return Problem(op, tensors, options, cotangents, layouts)


@st.composite
def _neighborhoods(
    draw: st.DrawFn, queries: tuple[int, ...], keys: tuple[int, ...], heads: int
) -> dict[str, Any]:
    rank = len(queries)

    def per_axis(strategy: st.SearchStrategy) -> Any:
        return tuple(draw(strategy) for _ in range(rank)) if draw(st.booleans()) else draw(strategy)

    causal = per_axis(st.sampled_from((False, False, True)))
    causal_axes = causal if isinstance(causal, tuple) else (causal,) * rank

    def kernel() -> tuple[Any, ...]:
        sizes: list[Any] = []
        for a in range(rank):
            if draw(st.integers(0, 3)) == 0:
                side = st.integers(0, keys[a] // 2 + 1)
                sizes.append((draw(side), 0 if causal_axes[a] else draw(side)))
            else:
                sizes.append(draw(st.integers(1, keys[a] + 2)))
        return tuple(sizes)

    kernels = [kernel()]
    if draw(st.integers(0, 3)) == 0:
        kernels = [kernel() for _ in range(heads)]
    boundary = draw(st.sampled_from(BOUNDARIES))
    strides = [draw(st.integers(1, 5)) for _ in range(rank)]
    if boundary == "inward":  # windows that follow one another leave no query out of its own
        for a in range(rank):
            sizes = [k[a] if isinstance(k[a], int) else sum(k[a]) + 1 for k in kernels]
            strides[a] = strides[a] if causal_axes[a] else min(strides[a], *sizes)
    return {
        "kernel_size": kernels[0] if len(kernels) == 1 else kernels,
        "stride": min(strides) if draw(st.booleans()) else tuple(strides),
        "dilation": per_axis(st.sampled_from((1, 1, 2, 3, 5))),
        "is_causal": causal,
        "boundary": boundary,
        "phase": per_axis(st.integers(-3, 6)),
        "offset": draw(st.sampled_from((None, None, per_axis(st.integers(-6, 6))))),
    }


@st.composite
def _sliding_windows(
    draw: st.DrawFn, num_queries: int, num_keys: int, heads: int, batch: int
) -> dict[str, Any]:
    causal = draw(st.booleans())
    side = st.one_of(st.just(-1), st.integers(0, num_keys + 2))

    def window() -> Any:
        kind = draw(st.sampled_from(("count", "count", "sides", "all")))
        if kind == "count":
            return draw(st.integers(1, num_keys + 2))
        if kind == "sides":
            return draw(side), draw(st.sampled_from((0, -1))) if causal else draw(side)
        return None

    window_size: Any = window()
    if draw(st.integers(0, 3)) == 0:
        window_size = [window() for _ in range(heads)]
    options = {
        "window_size": window_size,
        "is_causal": causal,
        "sinks": draw(st.sampled_from((0, 0, 0, 1, 4, 9))),
    }
    if batch == 1 and draw(st.integers(0, 2)) == 0:
        cuts = draw(st.integers(0, 4))
        options["packed"] = [
            [0, *sorted(draw(st.integers(0, n)) for _ in range(cuts)), n]
            for n in (num_queries, num_keys)
        ]
    return options


@st.composite
def _windows(draw: st.DrawFn, queries: tuple[int, ...]) -> dict[str, Any]:
    tile = tuple(draw(st.integers(1, n + 2)) for n in queries)
    options: dict[str, Any] = {
        "window_size": tile,
        "shift": tuple(draw(st.integers(-w, 2 * w)) for w in tile),
    }
    if draw(st.booleans()):
        options["key_window_size"] = tuple(w + draw(st.integers(0, 5)) for w in tile)
    options["boundary"] = draw(st.sampled_from((None, None, *BOUNDARIES)))
    return options


def _reach(
    op: str,
    options: dict[str, Any],
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    heads: int,
    packed: Any,
) -> list[int]:
    """Largest attended |key - query| on each axis, in steps of the dilation.

    Read off the rules that the reference builds, not off the options.
    """
    rules: list[tuple[Any, int, int]] = []
    keep = reference.windowed_attention

    def note(query: Tensor, key: Tensor, value: Tensor, heads_rules: Any, **rest: Any) -> Tensor:
        rules.append((heads_rules, query.shape[1:-2], key.shape[1:-2], rest.get("sinks", 0)))
        return query

    shapes = [torch.zeros(1, *extents, heads, 1) for extents in (queries, keys, keys)]
    bounds = {}
    if packed is not None:
        bounds = {
            name: torch.tensor(x)
            for name, x in zip(("cu_seqlens_q", "cu_seqlens_k"), packed, strict=True)
        }
    reference.windowed_attention = note
    try:
        getattr(reference, op)(*shapes, **options, **bounds)
    finally:
        reference.windowed_attention = keep

    reach = [0] * len(queries)
    for heads_rules, num_queries, num_keys, sinks in rules:
        for rule in set(map(tuple, heads_rules)):
            for a, axis in enumerate(rule):
                for i in range(num_queries[a]):
                    position = i + axis.offset
                    attended = reference.attended_keys(axis, i, num_keys[a])
                    ends = [*attended[:1], *attended[-1:]]
                    ends += range(min(sinks, num_keys[a]))
                    steps = (abs(j - position) // axis.dilation for j in ends)
                    reach[a] = max(reach[a], *steps, 0)
    return reach
