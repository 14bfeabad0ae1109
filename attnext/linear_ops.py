# SPDX-License-Identifier: Apache-2.0
"""The registered operators of linear attention. ``linear.py`` calls :func:`linear_op` and
:func:`step_op`; nothing else should."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import _C
from .autograd import LIBRARY, differentiable, needs_gradient, one_slice_at_a_time
from .device_tables import DeviceTables
from .ops import accumulator_dtype, sequence_ends, unit_stride

FEATURE_MAPS = ("identity", "elu", "relu", "taylor2")  # in the order of FeatureMap in params.h

# decay and beta are [batch, tokens, heads] in the accumulator dtype, heads being the most of query,
# key and value. window_size 0: sequences are whole; chunk_size 0: the kernel's choice. followed: by
# a backward pass.
_PROBLEM = (
    "Tensor query, Tensor key, Tensor value, Tensor? decay, Tensor? beta, Tensor? initial_state, "
    "Tensor? cu_seqlens, int feature_map, bool is_causal, bool reverse, bool normalize, "
    "bool output_final_state, float scale, float eps, SymInt window_size, SymInt chunk_size, "
    "bool followed"
)
_NUM_GRADS = 6
_NUM_GIVEN = 7  # what the backward pass takes after the problem
_NUM_TENSORS = 7  # with cu_seqlens
_DECAY, _BETA, _FEATURE_MAP, _NORMALIZE, _OUTPUT_STATE = 3, 4, 7, 10, 11

# Beside `out` come what it was divided by, what it lost as it was rounded, and the final state;
# empty where they are not wanted.
LIBRARY.define(f"linear_forward({_PROBLEM}) -> (Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define(
    f"linear_backward({_PROBLEM}, Tensor out, Tensor denominator, Tensor remainder, Tensor dout, "
    "Tensor? ddenominator, Tensor? dfinal_state, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "linear_step(Tensor query, Tensor key, Tensor value, Tensor(a!) state, Tensor? slots, "
    "Tensor? decay, Tensor? beta, int feature_map, bool normalize, float scale, float eps) "
    "-> Tensor"
)


def num_features(feature_map: str, head_dim: int) -> int:
    """Rows of the state."""
    return 1 + head_dim + head_dim * (head_dim + 1) // 2 if feature_map == "taylor2" else head_dim


def num_heads(query: Tensor, key: Tensor, value: Tensor) -> int:
    """The heads that have a state: those of the tensor with most."""
    most = query.shape[2]
    for t in (key, value):
        if t.shape[2] > most:
            most = t.shape[2]
    return most


def _native(problem: tuple[Any, ...]) -> tuple[Any, ...]:
    """The problem as the binary takes it, with cu_seqlens as a checked list."""
    problem = problem[:-1]
    cu_seqlens = problem[_NUM_GRADS]
    if cu_seqlens is None:
        return problem
    ends = sequence_ends(cu_seqlens, "cu_seqlens", problem[0].shape[1])
    return (*problem[:_NUM_GRADS], ends, *problem[_NUM_TENSORS:])


def _keeps_remainder(problem: tuple[Any, ...]) -> bool:
    """Whether the backward pass will want more of the outputs than their dtype holds: beside a
    normaliser they are what a key's gradient takes values from. The CUDA kernels do without."""
    query, followed = problem[0], problem[-1]
    half = query.dtype in (torch.bfloat16, torch.float16)
    kept: bool = followed and problem[_NORMALIZE] and half and query.device.type == "cpu"
    return kept


def _forward_fake(*problem: Any) -> tuple[Tensor, ...]:
    query, key, value = problem[:3]
    cu_seqlens, feature_map = problem[_NUM_GRADS : _NUM_GRADS + 2]
    normalize, output_state = problem[_NORMALIZE], problem[_OUTPUT_STATE]
    batch, tokens, _, dim = query.shape
    heads, acc = num_heads(query, key, value), accumulator_dtype(query.dtype)
    rows = (batch, tokens, heads)
    count = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    features = num_features(FEATURE_MAPS[feature_map], dim)
    state = (count, heads, features, value.shape[-1] + int(normalize))
    outputs = (*rows, value.shape[-1])
    return (
        query.new_empty(outputs),
        query.new_empty(rows if normalize else (0,), dtype=acc),
        query.new_empty(outputs if _keeps_remainder(problem) else (0,)),
        query.new_empty(state if output_state else (0,), dtype=acc),
    )


def _wanted_results(problem: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Of what the fake gives, what is to be written."""
    out, denominator, remainder, state = results
    return (
        out,
        denominator if problem[_NORMALIZE] else None,
        remainder if _keeps_remainder(problem) else None,
        state if problem[_OUTPUT_STATE] else None,
    )


def _forward_cpu(*problem: Any) -> tuple[Tensor, ...]:
    results = _forward_fake(*problem)
    _C.linear_forward(_native(problem), *_wanted_results(problem, results))
    return results


def _per_head(t: Tensor, heads: int) -> Tensor:
    """Room for a gradient with a row per head; heads that share a row are summed at more digits."""
    shape = (*t.shape[:2], heads, t.shape[3])
    return t.new_empty(shape, dtype=t.dtype if t.shape[2] == heads else accumulator_dtype(t.dtype))


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    """Fresh gradients; those of decay, beta and state are empty where not needed."""
    tensors, needs = args[:_NUM_GRADS], args[-1]
    grads = [t.new_empty(t.shape) for t in tensors[:3]]
    for t, need in zip(tensors[3:], needs[3:], strict=True):
        grads.append(tensors[0].new_empty([0]) if t is None or not need else t.new_empty(t.shape))
    return tuple(grads)


def _backward_tensors(*args: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Fresh gradients, those of query, key and value with a row per head, and what the binary takes
    after the problem."""
    problem, given = args[:-_NUM_GIVEN], args[-_NUM_GIVEN:]
    out, denominator, remainder, dout, ddenominator, dstate, needs = given
    heads = num_heads(*problem[:3])
    grads = tuple(_per_head(t, heads) for t in problem[:3])
    more = _backward_fake(*args)[3:]
    wanted = tuple(
        g if t is not None and need else None
        for g, t, need in zip(more, problem[3:_NUM_GRADS], needs[3:], strict=True)
    )
    dout = unit_stride(dout)  # e.g. the expanded gradient of a sum
    if dstate is not None:
        dstate = dstate.contiguous()
    return (*grads, *more), (
        out,
        denominator if problem[_NORMALIZE] else None,
        remainder if _keeps_remainder(problem) else None,
        dout,
        ddenominator,
        dstate,
        (*grads, *wanted),
    )


def _shared(grads: tuple[Tensor, ...], problem: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Gradients of what heads share: the sums over them."""
    return (
        *(
            g if t.shape[2] == g.shape[2] else g.unflatten(2, (t.shape[2], -1)).sum(3).to(t.dtype)
            for g, t in zip(grads[:3], problem[:3], strict=True)
        ),
        *grads[3:],
    )


def _backward_cpu(*args: Any) -> tuple[Tensor, ...]:
    problem = args[:-_NUM_GIVEN]
    grads, tensors = _backward_tensors(*args)
    _C.linear_backward(_native(problem), *tensors)
    return _shared(grads, problem)


def _step_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    batch, tokens = query.shape[:2]
    return query.new_empty((batch, tokens, num_heads(query, key, value), value.shape[-1]))


def _step_cpu(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor, slots: Tensor | None, *rest: Any
) -> Tensor:
    out = _step_fake(query, key, value)
    chosen = None if slots is None else _slot_list(slots, state.shape[0])
    _C.linear_step(query, key, value, state, chosen, *rest, out)  # type: ignore[call-arg]
    return out


def _slot_list(slots: Tensor, count: int) -> list[int]:
    chosen: list[int] = slots.tolist()
    if any(not -1 <= slot < count for slot in chosen):
        raise ValueError(f"slots must be between -1 and {count - 1}, got {chosen}")
    used = [slot for slot in chosen if slot >= 0]
    if len(set(used)) < len(used):
        raise ValueError(f"slots must not name a state twice, got {chosen}")
    return chosen


# ---- CUDA ----------------------------------------------------------------------------------------

_TABLES = DeviceTables()
_MAX_HEAD_DIM, _MAX_TAYLOR_DIM = 256, 64


@dataclass(frozen=True, eq=False)
class _Sequences:
    """A list of sequences as a kernel reads it; one object for the same list."""

    content: bytes

    def data(self) -> bytes:
        return self.content


_sequences = functools.lru_cache(maxsize=64)(_Sequences)


def check_cuda(problem: tuple[Any, ...]) -> None:
    """Errors: NotImplementedError for what the CUDA kernels lack."""
    query, value = problem[0], problem[2]
    feature_map = problem[_FEATURE_MAP]
    what = ""
    if query.dtype == torch.float64:
        what = "float64"
    elif FEATURE_MAPS[feature_map] == "taylor2" and query.shape[-1] > _MAX_TAYLOR_DIM:
        what = f"feature_map 'taylor2' with a head_dim above {_MAX_TAYLOR_DIM}"
    elif max(query.shape[-1], value.shape[-1]) > _MAX_HEAD_DIM:
        what = f"a head_dim above {_MAX_HEAD_DIM}"
    if what:
        raise NotImplementedError(f"linear attention on a GPU does not have {what} yet")


def _run_cuda(call: Any, query: Tensor, op: str, *tensors: Any) -> None:
    table = None  # held until the launch: other threads may drop it
    if call.sequences:
        table = _TABLES.get(_sequences(call.sequences), query.device, op)
    sequences = 0 if table is None else table.data_ptr()
    workspace = query.new_empty(call.workspace_bytes, dtype=torch.uint8)
    stream = torch.cuda.current_stream(query.device).cuda_stream
    call.run(sequences, workspace.data_ptr(), query.get_device(), stream, *tensors)


def _forward_cuda(*problem: Any) -> tuple[Tensor, ...]:
    query = problem[0]
    check_cuda(problem)
    with torch.cuda.device(query.device):
        results = _forward_fake(*problem)
        call = _C.CudaLinearForward(_native(problem))
        out, denominator, _, state = _wanted_results(problem, results)
        _run_cuda(call, query, "linear_forward", out, denominator, state)
    return results


def _backward_cuda(*args: Any) -> tuple[Tensor, ...]:
    problem, query = args[:-_NUM_GIVEN], args[0]
    check_cuda(problem)
    with torch.cuda.device(query.device):
        grads, (out, denominator, _, *tensors) = _backward_tensors(*args)
        call = _C.CudaLinearBackward(_native(problem), tensors[-1][_DECAY] is not None)
        _run_cuda(call, query, "linear_backward", out, denominator, *tensors)
        return _shared(grads, problem)


def check_step_cuda(query: Tensor, beta: Tensor | None) -> None:
    """Errors: NotImplementedError for what the CUDA kernels lack."""
    if query.dtype == torch.float64:
        raise NotImplementedError("linear_attention_step on a GPU does not have float64 yet")
    if beta is not None and query.shape[-1] > _MAX_HEAD_DIM:
        raise NotImplementedError(
            f"linear_attention_step on a GPU does not have the delta rule (beta) with a head_dim "
            f"above {_MAX_HEAD_DIM} yet"
        )


def _step_cuda(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor, slots: Tensor | None, *rest: Any
) -> Tensor:
    """Slots are not looked at: that would wait for the GPU. One out of range gives NaN."""
    check_step_cuda(query, rest[1])
    with torch.cuda.device(query.device):
        out = _step_fake(query, key, value)
        chosen = None if slots is None else slots.to(query.device, torch.int64).contiguous()
        stream = torch.cuda.current_stream(query.device).cuda_stream
        address = 0 if chosen is None else chosen.data_ptr()
        _C.cuda_linear_step(
            query.get_device(), stream, address, query, key, value, state, *rest, out
        )
    return out


for _name, _cpu, _cuda, _fake in (
    ("linear_forward", _forward_cpu, _forward_cuda, _forward_fake),
    ("linear_backward", _backward_cpu, _backward_cuda, _backward_fake),
    ("linear_step", _step_cpu, _step_cuda, _step_fake),
):
    LIBRARY.impl(_name, _cpu, "CPU")
    LIBRARY.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"attnext::{_name}", _fake, lib=LIBRARY)


def _forward(*problem: Any) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = torch.ops.attnext.linear_forward.default(*problem)
    return results


def _backward(*args: Any) -> tuple[Tensor, ...]:
    grads: tuple[Tensor, ...] = torch.ops.attnext.linear_backward.default(*args)
    return grads


def _batched(
    apply: Any, size: int, in_dims: Any, args: tuple[Any, ...], more: tuple[int, ...]
) -> Any:
    """Runs an op over a vmapped dimension, folded into the batch, which every tensor has; packed
    sequences one slice at a time. ``more``: tensors beside the first."""
    if args[_NUM_GRADS] is None:
        inputs, batch = list(args), 0
        for k in (*range(_NUM_GRADS), *more):
            t, dim = args[k], in_dims[k]
            if t is None:
                continue
            if t.dim() - isinstance(dim, int) > 1:  # not one of those that are empty
                t = t.movedim(dim, 0) if isinstance(dim, int) else t.expand(size, *t.shape)
                batch = t.shape[1]
                inputs[k] = t.reshape(size * batch, *t.shape[2:])
            elif isinstance(dim, int):
                inputs[k] = t.new_empty([0])
        outputs = apply(*inputs)
        return tuple(
            o.reshape(size, batch, *o.shape[1:]) if o.dim() > 1 else o for o in outputs
        ), tuple(0 if o.dim() > 1 else None for o in outputs)
    return one_slice_at_a_time(apply, size, in_dims, args)


def _results_asked(plain: Any, grads: Any) -> Any:
    dout, ddenominator, _, dstate = grads
    return (
        dout,
        ddenominator if plain[_NORMALIZE - _NUM_TENSORS] else None,
        dstate if plain[_OUTPUT_STATE - _NUM_TENSORS] else None,
    )


# By their names: what stands in for a GPU in the tests takes their places.
_call = differentiable(
    "linear",
    lambda *problem: _forward(*problem),
    lambda *args: _backward(*args),
    _batched,
    _NUM_TENSORS,
    _NUM_GRADS,
    num_results=3,
    num_saved=3,
    results_asked=_results_asked,
)


def linear_op(*problem: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, denominators and final state (empty if not wanted), entering autograd only where it
    is needed."""
    out, denominator, _, state = _call(*problem, _may_be_followed(problem[:_NUM_GRADS]))
    return out, denominator, state


def _may_be_followed(leaves: tuple[Any, ...]) -> bool:
    """Whether a backward pass may come."""
    transformed = not is_compiling() and torch._C._are_functorch_transforms_active()
    return transformed or needs_gradient(leaves)


_STATE = 3  # of a step's problem


def _map_step(info: Any, in_dims: Any, *problem: Any) -> Any:
    if in_dims[_STATE] is None:
        raise NotImplementedError("linear_attention_step under vmap needs a state for each slice")

    def step(*args: Any) -> tuple[Tensor]:
        return (torch.ops.attnext.linear_step.default(*args),)

    (out,), (dim,) = one_slice_at_a_time(step, info.batch_size, in_dims, problem)
    return out, dim


torch.library.register_vmap("attnext::linear_step", _map_step, lib=LIBRARY)


def step_op(*problem: Any) -> Tensor:
    """Outputs of a step; the state is updated in place."""
    out: Tensor = torch.ops.attnext.linear_step.default(*problem)
    state = problem[_STATE]
    if not is_compiling() and not state.is_inference():  # a compiler goes by the schema
        torch.autograd.graph.increment_version(state)
    return out
