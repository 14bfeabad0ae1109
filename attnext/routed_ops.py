# SPDX-License-Identifier: Apache-2.0
"""The registered operators of routed attention. ``routed.py`` calls :func:`routed_op`; nothing else
should."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _C
from .autograd import LIBRARY, differentiable, one_slice_at_a_time
from .geometry import UNLIMITED
from .ops import _where, accumulator_dtype, unit_stride
from .routed_tables import Facts, Lists, ListTables, Remembered, facts, list_tables

HEAD_POLICIES = ("list", "dense", "streaming", "off")  # in the order of HeadPolicy in params.h
LANDMARK_POLICY = 4  # of landmark attention alone, on the CPU


class Rules(NamedTuple):
    """Who attends whom among what is listed, and what is attended besides."""

    is_causal: bool = False
    exclude_self: bool = False
    left: int = UNLIMITED  # of `within`
    right: int = UNLIMITED
    has_window: bool = False
    before: int = 0
    after: int = 0
    sinks: int = 0

    def integers(self) -> list[int]:
        return [int(x) for x in self]


# `rules`: those of Rules. `list_shape`: batch items and heads that have lists. Keys without offsets
# have the blocks of the queries, and without documents theirs.
_PROBLEM = (
    "Tensor query, Tensor key, Tensor value, Tensor? entry_bias, Tensor? sink_logits, "
    "Tensor lists, Tensor? ends, Tensor? indptr, Tensor query_offsets, Tensor? query_order, "
    "Tensor? key_offsets, Tensor? key_order, Tensor? query_documents, Tensor? key_documents, "
    "Tensor? key_lengths, SymInt[] head_policy, SymInt[] rules, SymInt[] list_shape, float scale, "
    "float softcap"
)
_NUM_GRADS = 5
_NUM_TENSORS = 15
_LIST_SHAPE = 17

LIBRARY.define(f"routed_forward({_PROBLEM}) -> (Tensor, Tensor)")
LIBRARY.define(
    f"routed_backward({_PROBLEM}, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, "
    "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:-1], dtype=accumulator_dtype(query.dtype))
    return query.new_empty((*query.shape[:-1], value.shape[-1])), lse


def _forward_cpu(*problem: Any) -> tuple[Tensor, Tensor]:
    out, lse = _forward_fake(*problem)
    _C.routed_forward(problem, out, lse)
    return out, lse


def written(problem: tuple[Any, ...], needs: list[bool]) -> list[bool]:
    """Which gradients a backward pass writes."""
    wanted = (True, True, True, *needs[3:])
    return [t is not None and n for t, n in zip(problem[:_NUM_GRADS], wanted, strict=True)]


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    """Fresh gradients; those that are not written are empty."""
    query, needs = args[0], args[-1]
    return tuple(
        query.new_empty(t.shape, dtype=t.dtype) if write else query.new_empty([0])
        for t, write in zip(args[:_NUM_GRADS], written(args, needs), strict=True)
    )


def _backward_cpu(*args: Any) -> tuple[Tensor, ...]:
    problem, (out, lse, dout, dlse, needs) = args[:-5], args[-5:]
    dquery, dkey, dvalue, dbias, dsinks = _backward_fake(*args)
    dout = unit_stride(dout)  # e.g. the expanded gradient of a sum
    bias, sink_logits = problem[3:_NUM_GRADS]
    copies = None
    if bias is not None and needs[3]:
        list_batch, list_heads = problem[_LIST_SHAPE]
        batch, kv_heads = problem[1].shape[0], problem[1].shape[-2]
        copies = bias.new_empty(
            (batch if list_batch == 1 else 1, kv_heads if list_heads == 1 else 1, *bias.shape)
        )
    wanted = dsinks if sink_logits is not None and needs[4] else None
    _C.routed_backward(problem, out, lse, dout, dlse, (dquery, dkey, dvalue, copies, wanted))
    if copies is not None:
        dbias = copies.sum((0, 1))
    return dquery, dkey, dvalue, dbias, dsinks


# ---- CUDA ----------------------------------------------------------------------------------------

_REMEMBERED = Remembered()
_PACKED_HEADS = 1024  # as many policies travel with the kernels' parameters
_BIAS, _DOCUMENTS, _POLICY, _RULES = 3, 12, 15, 16


def lists_of(problem: tuple[Any, ...]) -> Lists:
    query, key = problem[:2]
    lists, ends, indptr, query_offsets, query_order, *of_keys = problem[_NUM_GRADS:_DOCUMENTS]
    if of_keys[0] is None:
        of_keys = [query_offsets, query_order]
    list_batch, list_heads = problem[_LIST_SHAPE]
    return Lists(
        lists,
        ends,
        indptr,
        query_offsets,
        query_order,
        of_keys[0],
        of_keys[1],
        (list_batch, list_heads),
        math.prod(query.shape[1:-2]),
        math.prod(key.shape[1:-2]),
    )


def mixed_documents(problem: tuple[Any, ...]) -> bool:
    """Whether documents decrease somewhere. Waits for the device once for each tensor of them."""

    def falls(x: Tensor) -> bool:
        known: bool = _REMEMBERED.get((x,), "falls", lambda: bool((x.diff(dim=-1) < 0).any()))
        return known

    return any(falls(x) for x in problem[_DOCUMENTS : _DOCUMENTS + 2] if x is not None)


def known_of(problem: tuple[Any, ...]) -> tuple[bool, int]:
    """What a call is told of numbers on the device, RoutedFacts of plan.h."""
    return mixed_documents(problem), _facts(lists_of(problem)).query_block


def policies_of(problem: tuple[Any, ...]) -> Tensor | None:
    """The policies of many heads, where the lists are: int8 ``[heads]``."""
    policy = problem[_POLICY]
    if len(policy) <= _PACKED_HEADS:
        return None
    lists = problem[_NUM_GRADS]
    made: Tensor = _REMEMBERED.get(
        (lists,),
        ("policies", *policy),
        lambda: torch.tensor(policy, dtype=torch.int8).to(lists.device),
    )
    return made


def _facts(lists: Lists) -> Facts:
    """The plan is checked when it is first met, which waits for the device once."""
    known: Facts = _REMEMBERED.get(lists.tensors, "facts", lambda: facts(lists))
    return known


def longest_walk(problem: tuple[Any, ...], rows: int) -> int:
    """Keys that a tile of `rows` queries walks over, at most."""
    lists, policy = lists_of(problem), problem[_POLICY]
    known, (_, _, _, _, has_window, left, right, sinks) = _facts(lists), problem[_RULES]
    blocks = min(rows, lists.query_offsets.shape[0] - 1)
    near = sinks + (left + rows + right if has_window else 0)
    if HEAD_POLICIES.index("dense") in policy or (near and lists.query_order is not None):
        near = lists.num_keys
    listed = blocks * min(known.slots * known.run, lists.num_keys)
    if problem[_BIAS] is None and lists.ends is None:  # blocks are walked once
        listed = min(listed, lists.num_keys)
    return int(min(near, lists.num_keys) + listed)


def tables_of(problem: tuple[Any, ...], rows: int, by_key: bool, stream: int = 0) -> ListTables:
    """The problem's tables for tiles of `rows`, kept with the plan's lists."""
    lists, biased = lists_of(problem), problem[_BIAS] is not None
    known = _facts(lists)
    # Tables are made on the caller's stream: another one may not read them.
    key = (rows, by_key, biased, stream)
    tables: ListTables = _REMEMBERED.get(
        lists.tensors, key, lambda: list_tables(lists, known, rows, by_key, biased)
    )
    return tables


def _call(kind: Any, problem: tuple[Any, ...]) -> Any:
    policies = policies_of(problem)
    address = 0 if policies is None else policies.data_ptr()
    return kind(problem, *known_of(problem), address)


def _forward_cuda(*problem: Any) -> tuple[Tensor, Tensor]:
    query = problem[0]
    with torch.cuda.device(query.device):
        out, lse = _forward_fake(*problem)
        where = _where(query)
        call = _call(_C.CudaRoutedForward, problem)
        tables = tables_of(problem, call.query_rows, False, where[1])
        longest = longest_walk(problem, call.query_rows)
        workspace = query.new_empty(call.workspace_bytes(longest), dtype=torch.uint8)
        call.run(out, lse, tables.addresses(), longest, workspace.data_ptr(), *where)
    return out, lse


def _backward_cuda(*args: Any) -> tuple[Tensor, ...]:
    problem, (out, lse, dout, dlse, needs) = args[:-5], args[-5:]
    query = problem[0]
    with torch.cuda.device(query.device):
        grads = _backward_fake(*args)
        dout = unit_stride(dout)  # e.g. the expanded gradient of a sum
        where = _where(query)
        call = _call(_C.CudaRoutedBackward, problem)
        queries = tables_of(problem, call.query_rows, False, where[1])
        keys = tables_of(problem, call.key_rows, True, where[1])
        wanted = tuple(
            g if write else None for g, write in zip(grads, written(problem, needs), strict=True)
        )
        num_bytes = call.workspace_bytes(wanted[_BIAS] is not None, queries.entries.shape[0])
        workspace = query.new_empty(num_bytes, dtype=torch.uint8)
        call.run(
            queries.addresses(),
            keys.addresses(),
            workspace.data_ptr(),
            *where,
            out,
            lse,
            dout,
            dlse,
            wanted,
        )
    return grads


for _name, _cpu, _cuda, _fake in (
    ("routed_forward", _forward_cpu, _forward_cuda, _forward_fake),
    ("routed_backward", _backward_cpu, _backward_cuda, _backward_fake),
):
    LIBRARY.impl(_name, _cpu, "CPU")
    LIBRARY.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"attnext::{_name}", _fake, lib=LIBRARY)


def _forward(*problem: Any) -> tuple[Tensor, Tensor]:
    results: tuple[Tensor, Tensor] = torch.ops.attnext.routed_forward.default(*problem)
    return results


def _backward(*args: Any) -> tuple[Tensor, ...]:
    grads: tuple[Tensor, ...] = torch.ops.attnext.routed_backward.default(*args)
    return grads


def _sliced(
    apply: Any, size: int, in_dims: Any, args: tuple[Any, ...], more: tuple[int, ...]
) -> Any:
    """Lists may differ in each slice; the binary takes whole ones."""

    def whole(*slices: Any) -> Any:
        return apply(*(a.contiguous() if isinstance(a, Tensor) else a for a in slices))

    return one_slice_at_a_time(whole, size, in_dims, args)


# By their names: what stands in for a GPU in the tests takes their places.
_call = differentiable(
    "routed",
    lambda *problem: _forward(*problem),
    lambda *args: _backward(*args),
    _sliced,
    _NUM_TENSORS,
    _NUM_GRADS,
    num_results=2,
)


def routed_op(*problem: Any) -> tuple[Tensor, Tensor]:
    """Outputs and lse, entering autograd only where it is needed."""
    results: tuple[Tensor, Tensor] = _call(*problem)
    return results
