# SPDX-License-Identifier: Apache-2.0
"""Every public function, and every tensor that it takes: what is no such tensor is refused by name,
and what it returns has the same shapes on the meta device."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

import attnext
from attnext.routers.duo import choose_full_heads, duo_mix, top_keys
from attnext.routers.hip import hip_attention, hip_plan, infinite_hip_plan
from attnext.routers.longheads import longheads_chunk_keys
from attnext.routers.minference import AShape, VerticalSlash


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ints(*shape: int, high: int = 2) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(0))


LINE = {"query": x(1, 12, 4, 8), "key": x(1, 12, 2, 8, seed=1), "value": x(1, 12, 2, 8, seed=2)}
MAP = {"query": x(1, 6, 5, 4, 8), "key": x(1, 6, 5, 2, 8), "value": x(1, 6, 5, 2, 8)}
SAME = {"query": x(1, 12, 2, 8), "key": x(1, 12, 2, 8), "value": x(1, 12, 2, 8)}
SPIKES = {"query": x(1, 3, 4, 2, 8), "key": x(1, 3, 4, 2, 8), "value": x(1, 3, 4, 2, 8)}
ENDS = torch.tensor([0, 5, 12], dtype=torch.int32)
MARKS = torch.arange(12) % 4 == 3
LISTS = torch.tensor([[0, -1], [0, 1], [1, 2]]).expand(1, 1, 3, 2).contiguous()
PLAN = attnext.BlockPlan.of(LISTS, 12, 4)
WINDOWS = attnext.Windows(12, 4)
LAYER = attnext.linear_attention(**SAME, output_final_state=True)[1]

CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "neighborhood_attention": (attnext.neighborhood_attention, {
        **MAP, "kernel_size": 3, "bias": x(4, 5, 5), "additional_keys": x(1, 2, 2, 8),
        "additional_values": x(1, 2, 2, 8), "scale": x(4),
    }),
    "sliding_window_attention": (attnext.sliding_window_attention, {
        **LINE, "window_size": 4, "sink_logits": x(4), "alibi_slopes": x(4), "cu_seqlens_q": ENDS,
        "cu_seqlens_k": ENDS.clone(),
    }),
    "window_attention": (attnext.window_attention, {**MAP, "window_size": 4, "bias": x(4, 7, 7)}),
    "linear_attention": (attnext.linear_attention, {
        **LINE, "decay": -x(1, 12, 4).abs(), "beta": x(1, 12, 4).sigmoid(), "cu_seqlens": ENDS,
        "initial_state": x(2, 4, 8, 8),
    }),
    "linear_attention_step": (attnext.linear_attention_step, {
        **{name: t[:, :1] for name, t in LINE.items()}, "state": x(3, 4, 8, 8),
        "slots": torch.tensor([1]), "decay": -x(1, 1, 4).abs(), "beta": x(1, 1, 4).sigmoid(),
        "in_place": False,
    }),
    "based_attention": (attnext.based_attention, {**LINE, "window_size": 4}),
    "spiking_attention": (attnext.spiking_attention, SPIKES),
    "lif_spikes": (attnext.lif_spikes, {"x": x(1, 5, 3), "membrane": x(1, 3)}),
    "rotary_embedding": (attnext.rotary_embedding, {"x": x(1, 12, 2, 8)}),
    "merge_attentions": (attnext.merge_attentions, {
        "outputs": [x(2, 3, 4), x(2, 3, 4)], "lses": [x(2, 3), x(2, 3)],
    }),
    "merge": (attnext.merge, {
        "outputs": [x(2, 3, 4), x(2, 3, 4)], "gates": x(3), "mode": "lerp",
    }),
    "routed_attention": (attnext.routed_attention, {
        **LINE, "plan": PLAN, "query_documents": ints(1, 12), "key_documents": ints(1, 12),
        "key_lengths": torch.tensor([9]), "sink_logits": x(4),
    }),
    "block_pool": (attnext.block_pool, {"x": x(1, 12, 2, 8), "blocks": 4, "weights": x(1, 12, 2)}),
    "packed_blocks": (attnext.packed_blocks, {"cu_seqlens": ENDS, "size": 4}),
    "select_topk": (attnext.select_topk, {
        "query": x(1, 3, 2, 8), "candidates": x(1, 3, 2, 8), "k": 2,
        "exclude": torch.zeros(1, 1, 3, 3, dtype=torch.bool),
    }),
    "select_topk of weighted heads": (attnext.select_topk, {
        "query": x(1, 3, 2, 8), "candidates": x(1, 3, 1, 8), "k": 2, "score": "relu_wsum",
        "weights": x(1, 3, 2),
    }),
    "landmark_attention": (attnext.landmark_attention, {**LINE, "is_landmark": MARKS}),
    "moba_attention": (attnext.moba_attention, {
        **LINE, "block_size": 4, "topk": 2, "cu_seqlens": ENDS,
    }),
    "native_sparse_attention": (attnext.native_sparse_attention, {
        **LINE, "gates": x(1, 12, 4, 3), "compress_size": 4, "compress_stride": 2,
        "block_size": 4, "num_blocks": 3, "window_size": 4,
    }),
    "bilevel_routing_attention": (attnext.bilevel_routing_attention, {
        **MAP, "region_size": 3, "topk": 2,
    }),
    "hip_attention": (hip_attention, {**LINE, "mask_k": 4, "window_size": 4}),
    "hip_plan": (hip_plan, {"query": LINE["query"], "key": LINE["key"], "mask_k": 4}),
    "infinite_hip_plan": (infinite_hip_plan, {
        "query": LINE["query"], "key": LINE["key"], "stages": ((2, 1, 2, 4),), "window_size": 2,
        "sinks": 1, "block_size": 2,
    }),
    "superlinear_attention": (attnext.superlinear_attention, {
        "search_query": x(1, 12, 4, 8), **LINE, "sw_index": 1, "key_starts": torch.tensor([1]),
        "query_positions": torch.arange(12)[None],
    }),
    "minference_attention": (attnext.minference_attention, {
        **SAME, "patterns": [VerticalSlash(4, 5), AShape(2, 4)],
    }),
    "longheads_attention": (attnext.longheads_attention, {
        **SAME, "chunk_size": 2, "num_chunks": 3, "chunk_keys": x(1, 6, 2, 8),
    }),
    "longheads_chunk_keys": (longheads_chunk_keys, {**SAME, "chunk_size": 4}),
    "streaming_attention": (attnext.streaming_attention, {**LINE, "sinks": 1, "window_size": 4}),
    "duo_attention": (attnext.duo_attention, {
        **LINE, "full_heads": [True, False], "window_size": 4, "sinks": 1,
    }),
    "duo_mix": (duo_mix, {**LINE, "gate": x(2), "teacher": x(1, 12, 4, 8)}),
    "choose_full_heads": (choose_full_heads, {"gate": x(3, 2)}),
    "top_keys": (top_keys, {"query": LINE["query"], "key": LINE["key"]}),
    "retrieval_scores": (attnext.retrieval_scores, {
        "attended": ints(2, 3, high=5), "output": ints(2, high=5), "prompt": ints(5),
        "needle": (1, 3),
    }),
    "BlockPlan.of": (attnext.BlockPlan.of, {
        "indices": LISTS, "query_extent": 12, "query_block": 4, "bias": x(1, 1, 3, 2),
    }),
    "BlockPlan.of_spans": (attnext.BlockPlan.of_spans, {
        "starts": LISTS[..., :1] * 0, "ends": LISTS[..., :1] * 0 + 3, "query_extent": 12,
        "query_block": 4, "key_extent": 12,
    }),
    "BlockPlan.of_mask": (attnext.BlockPlan.of_mask, {
        "mask": torch.ones(1, 1, 3, 3, dtype=torch.bool), "query_extent": 12, "query_block": 4,
    }),
}  # fmt: skip

OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "sparse": lambda t: t.to_sparse(),
    "nested": lambda t: torch.nested.nested_tensor([t.float()]),
    "complex": lambda t: t.to(torch.complex64),
    "a list": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "elsewhere": lambda t: t.to("meta"),
}
ALONE = ("rotary_embedding", "choose_full_heads", "packed_blocks", "BlockPlan")
READ = ("packed_blocks", "BlockPlan.of_mask")  # whose results have as many entries as numbers say
ANYWHERE = ("cu_seqlens", "slots", "key_starts", "query_positions")  # fetched from where they are


def numbers_of(name: str) -> list[str]:
    """The arguments of a call that are floating-point tensors."""
    given = CALLS[name][1]
    return [n for n, v in given.items() if isinstance(v, Tensor) and v.is_floating_point()]


def places() -> list[tuple[str, str, int | None, str]]:
    """A call, one of its tensors, which of a list it is, and what takes its place."""
    found: list[tuple[str, str, int | None]] = []
    for name, (_, given) in CALLS.items():
        for argument, value in given.items():
            if isinstance(value, Tensor):
                found.append((name, argument, None))
            elif isinstance(value, list) and isinstance(value[0], Tensor):
                found += [(name, argument, n) for n in range(len(value))]
    return [
        (name, argument, entry, kind)
        for name, argument, entry in found
        for kind in OTHERS
        if kind != "elsewhere" or not (name.startswith(ALONE) or argument.startswith(ANYWHERE))
    ]


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_right(name: str) -> None:
    function, given = CALLS[name]
    function(**given)


@pytest.mark.parametrize(("name", "argument", "entry", "kind"), places())
def test_other_tensors_are_refused_by_name(
    name: str, argument: str, entry: int | None, kind: str
) -> None:
    function, given = CALLS[name]
    changed = dict(given)
    if entry is None:
        changed[argument] = OTHERS[kind](given[argument])
    else:
        changed[argument] = [*given[argument]]
        changed[argument][entry] = OTHERS[kind](given[argument][entry])
    # A query elsewhere is where it should be: the others are not.
    names = "device" if kind == "elsewhere" and argument == "query" else argument
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=names):
        function(**changed)


def options_of(kind: type) -> list[tuple[str, str]]:
    """Calls, and arguments of each whose default is such a thing."""
    return [
        (name, parameter.name)
        for name, (function, _) in CALLS.items()
        for parameter in inspect.signature(function).parameters.values()
        if isinstance(parameter.default, kind)
    ]


@pytest.mark.parametrize(("name", "flag"), options_of(bool))
def test_flags_are_bools(name: str, flag: str) -> None:
    function, given = CALLS[name]
    with pytest.raises(TypeError, match=f"{flag} must be a bool"):
        function(**{**given, flag: 2})


@pytest.mark.parametrize("other", ["none of them", 5, ()], ids=type)
@pytest.mark.parametrize(("name", "choice"), options_of(str))
def test_choices_are_among_those_there_are(name: str, choice: str, other: Any) -> None:
    function, given = CALLS[name]
    with pytest.raises((ValueError, TypeError), match=f"{choice} must be"):
        function(**{**given, choice: other})


@pytest.mark.parametrize("name", [n for n in CALLS if n not in READ])
def test_shapes_without_numbers(name: str) -> None:
    """On the meta device the results have the shapes and dtypes that they have on the CPU."""
    function, given = CALLS[name]

    def away(t: Any) -> Any:
        return t.to("meta") if isinstance(t, Tensor) else t

    shapes = {
        key: value if key.startswith("cu_seqlens") else _pytree.tree_map(away, value)
        for key, value in given.items()
    }
    if name == "routed_attention":
        shapes["plan"] = attnext.BlockPlan.of(LISTS.to("meta"), 12, 4)
    real, fake = function(**given), function(**shapes)
    for a, b in zip(_pytree.tree_leaves(real), _pytree.tree_leaves(fake), strict=True):
        if isinstance(a, Tensor):
            assert b.is_meta and a.shape == b.shape and a.dtype == b.dtype


@pytest.mark.parametrize("name", [n for n in CALLS if n not in READ])
def test_compiled_in_one_piece(name: str) -> None:
    function, given = CALLS[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(leaves(function(**given)), leaves(compiled(**given)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", [n for n in CALLS if numbers_of(n)])
def test_mapped(name: str) -> None:
    """Over a dimension that floating-point tensors have."""
    function, given = CALLS[name]
    names = numbers_of(name)
    stacks = [torch.stack([given[n], given[n].flip(0), given[n] / 2]) for n in names]

    def call(*tensors: Tensor) -> list[Tensor]:
        return leaves(function(**{**given, **dict(zip(names, tensors, strict=True))}))

    mapped = torch.func.vmap(call)(*stacks)
    alone = [call(*(stack[n] for stack in stacks)) for n in range(3)]
    for a, parts in zip(mapped, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(parts))


def leaves(results: Any) -> list[Tensor]:
    if isinstance(results, attnext.BlockPlan):
        results = results.lists
    return [t for t in _pytree.tree_leaves(results) if isinstance(t, Tensor)]
