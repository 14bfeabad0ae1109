# SPDX-License-Identifier: Apache-2.0
"""Linear attention: the public functions. Every user error is raised here."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .arguments import (
    DTYPE_NAMES,
    check_choice,
    check_cu_seqlens,
    check_dense,
    check_device,
    check_flag,
    check_integer,
    check_scale,
    check_tensor,
    finite_number,
    under_autocast,
)
from .autograd import spread
from .linear_ops import FEATURE_MAPS, linear_op, num_features, num_heads, step_op
from .ops import DTYPES, accumulator_dtype, unit_stride

_MAX_CHUNK = 1024


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: str = "identity",
    is_causal: bool = True,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    window_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    return_denominator: bool = False,
    normalizer_query: Tensor | None = None,
    normalizer_key: Tensor | None = None,
) -> Any:
    """Attention without softmax, as a recurrence over a state of fixed size.

    Per head, with features ``phi``: ``S_t = exp(decay_t) S_{t-1} + phi(k_t) u_t^T`` and
    ``o_t = scale phi(q_t)^T S_t``. ``u`` is the value, or with ``beta`` what the delta rule writes.

    Shapes:
        query ``[B, N, Hq, K]``, key ``[B, N, Hk, K]``, value ``[B, N, Hv, V]``; the result is
        ``[B, N, H, V]``, ``H`` being the largest of the three numbers of heads, of which the others
        are divisors: head ``h`` reads query head ``h // (H // Hq)``, and so on (Mamba-2 shares
        query and key among value heads). Any strides; no copies as long as the last axis has
        stride 1. States are ``[B, H, F, V]`` in float32 (float64 for float64) with ``F`` features;
        with ``normalize`` ``[B, H, F, V + 1]``, whose last column is the sum of the features.

    Args:
        feature_map: ``"identity"``; ``"elu"``, which is elu(x) + 1; ``"relu"``; ``"taylor2"``:
            features whose product is ``1 + s + s^2/2``, ``s = scale q . k``. Their state is packed:
            1, ``k_a``, and ``k_a k_b`` for ``a <= b`` in order of a, then b, without any weights:
            ``F = 1 + K + K (K + 1) / 2``. :func:`taylor_state_to_plain` gives the usual layout.
        is_causal: if not, every token sees the state after the last one.
        decay: natural logarithm, ``[H]`` (RetNet) or ``[B, N, H]`` (gated linear attention,
            Mamba-2); -inf forgets everything before. Differentiable. Needs ``is_causal``.
        beta: ``[B, N, H]``, the strength of the delta rule,
            ``u_t = beta_t (v_t - phi(k_t)^T exp(decay_t) S_{t-1})``. Differentiable. Needs
            ``is_causal``; not with ``normalize`` or ``"taylor2"``.
        normalize: divides by ``d = scale phi(q_t) . sum phi(k)``, decayed as the state is, and
            moved away from 0 by ``eps``: to ``d + eps``, or ``d - eps`` where it is negative, which
            features with signs can make it.
        scale: factor on ``q . k``; by default ``K ** -0.5`` for ``"identity"`` and ``"taylor2"``,
            else 1.
        initial_state: what the first token finds (by default 0). Differentiable.
        output_final_state: also returns the state after the last token. Differentiable.
        reverse: from the last token to the first; the initial state is then found by the last.
        window_size: cuts sequences into blocks of so many tokens, the last one shorter, that know
            nothing of each other. Not with states or ``cu_seqlens``.
        cu_seqlens: int32 ``[M + 1]``, where each of M sequences packed along the token axis ends;
            ``B`` must be 1, and states are ``[M, H, F, V]``.
        chunk_size: tokens worked on together, by default the kernel's choice. A matter of speed,
            and with ``beta`` of accuracy: the longer a chunk, the larger its triangular system.
        return_denominator: with ``normalize``, also returns what was divided by, ``[B, N, H]`` in
            the dtype of states, before the state. Differentiable: its logarithm is the lse with
            which :func:`merge_attentions` joins other keys, where features are positive.
        normalizer_query, normalizer_key: with ``normalize``, what ``d`` is made of in the place of
            query and key, in their shapes: rotary positions in the numerator alone, say. The last
            column of states is then the sum of the features of ``normalizer_key``.

    Numerics:
        float32, float64, bfloat16, float16 in and out. Products, sums, states and the division in
        float32 (float64 for float64), one rounding at the store: the error does not grow with the
        length. A CPU that multiplies tiles of bfloat16 (AMX) does so for outputs without a
        normaliser, decays and Taylor features: features, scores and what is read of a state are
        then rounded as they enter a product, sums and states are float32 as ever.
        On the CPU the bits do not depend on the number of threads or on other batch items; on a
        GPU they may depend on how many of these there are.

    Errors:
        ValueError, TypeError or NotImplementedError, naming the argument.

    Complexity:
        O(N F V) time, O(N (K + V)) memory and a few states. In half precision on the CPU, what
        normalised outputs lost as they were rounded is kept for the backward pass.

    Source:
        Linear transformers (arXiv 2006.16236), RetNet (2307.08621), GLA (2312.06635), Mamba-2
        (2405.21060), DeltaNet (2406.06484), gated DeltaNet (2412.06464), BASED (2402.18668).

    Example:
        >>> import torch, attnext
        >>> q, k, v = (torch.randn(1, 100, 4, 16) for _ in range(3))
        >>> out, state = attnext.linear_attention(
        ...     q, k, v, feature_map="taylor2", normalize=True, output_final_state=True
        ... )
        >>> out.shape, state.shape
        (torch.Size([1, 100, 4, 16]), torch.Size([1, 4, 153, 17]))
    """
    if is_compiling() or torch._C._is_any_autocast_enabled():
        query, key, value, normalizer_query, normalizer_key = under_autocast(
            query, key, value, normalizer_query, normalizer_key
        )
    for name, flag in (
        ("is_causal", is_causal),
        ("output_final_state", output_final_state),
        ("reverse", reverse),
        ("return_denominator", return_denominator),
    ):
        check_flag(name, flag)
    heads, number = _check_problem(query, key, value, feature_map, normalize, eps, scale)
    decay, beta = _check_gates(decay, beta, query, heads, is_causal, normalize, feature_map)
    if return_denominator and not normalize:
        raise ValueError("return_denominator needs normalize, without which nothing is divided")
    count = query.shape[0]
    if cu_seqlens is not None:
        check_cu_seqlens("cu_seqlens", cu_seqlens, query)
        count = cu_seqlens.shape[0] - 1
    if window_size is not None:
        check_integer("window_size", window_size, 1)
        if cu_seqlens is not None or initial_state is not None or output_final_state:
            raise ValueError(
                "window_size makes blocks without states: cu_seqlens, initial_state and "
                "output_final_state are not allowed with it"
            )
    if chunk_size is not None:
        check_integer("chunk_size", chunk_size, 1)
        if chunk_size > _MAX_CHUNK:
            raise ValueError(f"chunk_size must be at most {_MAX_CHUNK}, got {chunk_size}")
    if initial_state is not None:
        _check_state("initial_state", initial_state, query, value, heads, feature_map, normalize)
        if initial_state.shape[0] != count:
            raise ValueError(
                f"initial_state must have a state for each of {count} sequences, got "
                f"{initial_state.shape[0]}"
            )
        initial_state = initial_state.to(accumulator_dtype(query.dtype)).contiguous()
    sums = _check_normalizer(normalizer_query, normalizer_key, query, key, normalize)

    def run(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, normalize: bool) -> Any:
        return linear_op(
            unit_stride(q),
            unit_stride(k),
            unit_stride(v),
            decay,
            beta,
            state,
            cu_seqlens,
            FEATURE_MAPS.index(feature_map),
            is_causal,
            reverse,
            normalize,
            output_final_state,
            number,
            float(eps),
            0 if window_size is None else window_size,
            0 if chunk_size is None else chunk_size,
        )

    if sums is None:
        out, denominator, state = run(query, key, value, initial_state, normalize)
    else:
        out, denominator, state = _normalized_apart(run, (query, key, value), sums, initial_state)
        denominator = _off_zero(denominator, eps)
        out = (out / denominator[..., None]).to(query.dtype)
    results = [out]
    if return_denominator:
        results.append(denominator)
    if output_final_state:
        results.append(state)
    return out if len(results) == 1 else tuple(results)


def _off_zero(total: Tensor, eps: float) -> Tensor:
    """What a normaliser divides by."""
    return torch.where(total < 0, total - eps, total + eps)


def _normalized_apart(
    run: Any, numerator: tuple[Tensor, ...], sums: tuple[Tensor, Tensor], state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Numerators and sums of features, each of its own queries and keys, in the accumulator dtype:
    nothing is rounded before the division, nor are the gradients of what is in both before they
    meet."""
    acc = accumulator_dtype(numerator[0].dtype)
    query, key, value = (x.to(acc) for x in numerator)
    sum_query, sum_key = (
        wide if x is given else x.to(acc)
        for x, given, wide in zip(sums, numerator[:2], (query, key), strict=True)
    )
    one = value.new_ones(1).expand(*value.shape[:-1], 1)
    of_values = of_sums = None
    if state is not None:
        of_values, of_sums = state[..., :-1].contiguous(), state[..., -1:].contiguous()
    out, _, values = run(query, key, value, of_values, False)
    total, _, last = run(sum_query, sum_key, one, of_sums, False)
    return out, total.squeeze(-1), torch.cat([values, last], -1) if values.dim() == 4 else values


def linear_attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    *,
    feature_map: str = "identity",
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    scale: float | None = None,
    slots: Tensor | None = None,
    in_place: bool = True,
    normalizer_query: Tensor | None = None,
    normalizer_key: Tensor | None = None,
) -> Any:
    """Decoding: one token or a few of :func:`linear_attention`, against a state that is kept.

    Shapes:
        query ``[B, N, Hq, K]``, key ``[B, N, Hk, K]``, value ``[B, N, Hv, V]`` with a small ``N``;
        the result is ``[B, N, H, V]``. state: ``[B, H, F, V]`` (``V + 1`` with ``normalize``), as
        ``output_final_state`` gives it, float32 (float64 for float64), any strides as long as the
        last axis has stride 1.

    Args:
        slots: int32 or int64 ``[B]``: which of the states of a larger ``[S, H, F, V]`` each batch
            item has. None twice; -1: none at all, for padding, whose result is 0. On a GPU they
            are not looked at before: one that there is not gives NaN.
        in_place: updates ``state`` and returns the result alone; otherwise leaves it and returns
            ``(result, new state)``.
        feature_map, decay, beta, normalize, eps, scale, normalizer_query, normalizer_key: see
            :func:`linear_attention`.

    Numerics:
        As :func:`linear_attention`. No gradient: under ``torch.no_grad()`` where inputs ask for it.

    Errors:
        ValueError, TypeError or NotImplementedError, naming the argument.

    Complexity:
        One pass over the state (two with ``beta``) a token, whatever has gone by before.

    Source:
        The recurrences of :func:`linear_attention`.

    Example:
        >>> import torch, attnext
        >>> q, k, v = (torch.randn(1, 1, 4, 16) for _ in range(3))
        >>> state = torch.zeros(1, 4, 16, 16)
        >>> attnext.linear_attention_step(q, k, v, state).shape
        torch.Size([1, 1, 4, 16])
    """
    if torch._C._is_any_autocast_enabled():
        query, key, value, normalizer_query, normalizer_key = under_autocast(
            query, key, value, normalizer_query, normalizer_key
        )
    check_flag("in_place", in_place)
    heads, number = _check_problem(query, key, value, feature_map, normalize, eps, scale)
    decay, beta = _check_gates(decay, beta, query, heads, True, normalize, feature_map)
    _check_state("state", state, query, value, heads, feature_map, normalize)
    if state.dtype != accumulator_dtype(query.dtype):
        raise TypeError(
            f"state must be {accumulator_dtype(query.dtype)} beside {query.dtype} inputs, got "
            f"{state.dtype}"
        )
    if state.stride(-1) != 1 and state.shape[-1] > 1:
        raise ValueError(f"state must have unit stride on its last axis, got {state.stride()}")
    if slots is None:
        if state.shape[0] != query.shape[0]:
            raise ValueError(
                f"state must have a state for each of {query.shape[0]} batch items, got "
                f"{state.shape[0]}"
            )
    else:
        check_tensor("slots", slots, "an int32 or int64")
        if slots.shape != query.shape[:1]:
            raise ValueError(f"slots must be [B] = {(query.shape[0],)}, got {tuple(slots.shape)}")
        if slots.device != query.device and not slots.is_cpu:
            raise ValueError(
                f"slots must be on the CPU or the device of query, {query.device}, got "
                f"{slots.device}"
            )
    if in_place and any(n > 1 and s == 0 for n, s in zip(state.shape, state.stride(), strict=True)):
        raise ValueError(
            f"state must have a place for each of its numbers to be updated in place, got strides "
            f"{state.stride()} of shape {tuple(state.shape)}"
        )
    sums = _check_normalizer(normalizer_query, normalizer_key, query, key, normalize)
    tensors = (query, key, value, state, decay, beta, normalizer_query, normalizer_key)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise NotImplementedError(
            "linear_attention_step has no gradient: query, key, value, state, decay, beta and the "
            "normaliser's tensors must not require one, or call it under torch.no_grad()"
        )
    if not in_place:
        state = state.clone(memory_format=torch.contiguous_format)

    def run(q: Tensor, k: Tensor, v: Tensor, state: Tensor, normalize: bool) -> Tensor:
        result: Tensor = step_op(
            unit_stride(q),
            unit_stride(k),
            unit_stride(v),
            state,
            slots,
            decay,
            beta,
            FEATURE_MAPS.index(feature_map),
            normalize,
            number,
            float(eps),
        )
        return result

    if sums is None:
        out = run(query, key, value, state, normalize)
    else:
        q, k, v, sum_q, sum_k = (x.to(state.dtype) for x in (query, key, value, *sums))
        out = run(q, k, v, state[..., :-1], False)
        total = run(sum_q, sum_k, v.new_ones(*v.shape[:-1], 1), state[..., -1:], False)
        total = _off_zero(total, eps)
        if slots is not None:  # padding has no state, and gives 0
            total = torch.where((slots < 0).to(total.device)[:, None, None, None], 1.0, total)
        out = (out / total).to(query.dtype)
    return out if in_place else (out, state)


def taylor_state_to_plain(state: Tensor, head_dim: int, scale: float | None = None) -> Tensor:
    """A packed state of ``"taylor2"`` with a row for each of all ``1 + K + K^2`` features.

    Shapes:
        state ``[..., 1 + K + K (K + 1) / 2, V]``; the result is ``[..., 1 + K + K^2, V]``, in the
        order of BASED: 1, ``x_a``, and all ``x_a x_b``, ``x = k sqrt(scale)``, the products divided
        by ``sqrt(2)``. ``scale`` as in :func:`linear_attention`.

    Numerics:
        In the dtype of the state. Differentiable.

    Errors:
        ValueError or TypeError, naming the argument.

    Complexity:
        Linear.

    Source:
        BASED (arXiv 2402.18668).

    Example:
        >>> import torch, attnext
        >>> attnext.taylor_state_to_plain(torch.zeros(1, 4, 153, 64), 16).shape
        torch.Size([1, 4, 273, 64])
    """
    check_integer("head_dim", head_dim, 1)
    index, weight = _plain_layout(state, head_dim, scale, num_features("taylor2", head_dim))
    return state.index_select(-2, index) * weight


def taylor_state_from_plain(plain: Tensor, head_dim: int, scale: float | None = None) -> Tensor:
    """The way back of :func:`taylor_state_to_plain`.

    Shapes, Numerics, Errors, Complexity, Source:
        As there; of two rows for the same product the mean counts.

    Example:
        >>> import torch, attnext
        >>> attnext.taylor_state_from_plain(torch.zeros(1, 4, 273, 64), 16).shape
        torch.Size([1, 4, 153, 64])
    """
    check_integer("head_dim", head_dim, 1)
    index, weight = _plain_layout(plain, head_dim, scale, 1 + head_dim + head_dim**2)
    features = num_features("taylor2", head_dim)
    copies = plain.new_zeros(features, 1).index_add(0, index, plain.new_ones(len(index), 1))
    shape = (*plain.shape[:-2], features, plain.shape[-1])
    return plain.new_zeros(shape).index_add(-2, index, plain / weight) / copies


def _plain_layout(
    state: Tensor, head_dim: int, scale: float | None, rows: int
) -> tuple[Tensor, Tensor]:
    """For each plain feature the packed one, and its weight."""
    check_tensor("state", state, "a floating-point")
    if state.dim() < 2 or state.shape[-2] != rows:
        raise ValueError(
            f"state must have {rows} rows for head_dim {head_dim}, got {tuple(state.shape)}"
        )
    number = check_scale(scale, head_dim**-0.5)
    if number <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    packed = torch.zeros(head_dim, head_dim, dtype=torch.int64)
    a, b = torch.triu_indices(head_dim, head_dim)
    packed[a, b] = packed[b, a] = torch.arange(len(a)) + 1 + head_dim
    index = torch.cat([torch.arange(1 + head_dim), packed.flatten()]).to(state.device)
    weight = torch.ones(len(index), 1, dtype=torch.float64)
    weight[1 : 1 + head_dim] = math.sqrt(number)
    weight[1 + head_dim :] = number / math.sqrt(2)
    return index, weight.to(state)


# ---- checks


def _check_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: str,
    normalize: bool,
    eps: float,
    scale: float | None,
) -> tuple[int, float]:
    """What both functions take; returns the number of heads, and the scale as a number."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        check_dense(name, t)
    if query.dtype not in DTYPES:
        raise TypeError(f"query must be one of {DTYPE_NAMES}, got {query.dtype}")
    if query.dim() != 4:
        raise ValueError(
            f"query must be [batch, tokens, heads, head_dim], got shape {tuple(query.shape)}"
        )
    for name, t in (("key", key), ("value", value)):
        if t.dtype != query.dtype:
            raise TypeError(f"{name} must have the dtype of query, {query.dtype}, got {t.dtype}")
        check_device(name, t, query)
        if t.dim() != 4 or t.shape[:2] != query.shape[:2]:
            raise ValueError(
                f"{name} must be [batch, tokens, heads, dim] with the batch and tokens of query, "
                f"{tuple(query.shape[:2])}, got shape {tuple(t.shape)}"
            )
    if query.device.type not in ("cpu", "cuda", "meta"):
        raise NotImplementedError(
            f"query is on {query.device}: linear attention runs on CPU tensors (and meta, for "
            "shapes)"
        )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key must have the head_dim of query, {query.shape[-1]}, got {key.shape[-1]}"
        )
    if query.shape[-1] < 1 or value.shape[-1] < 1:
        raise ValueError(
            f"value and query must have head_dim at least 1, got {value.shape[-1]} and "
            f"{query.shape[-1]}"
        )
    heads = num_heads(query, key, value)
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.shape[2] < 1 or heads % t.shape[2]:
            raise ValueError(
                f"{name} must have a divisor of {heads} heads, the most of query, key and value, "
                f"got {t.shape[2]}"
            )
    check_choice("feature_map", feature_map, FEATURE_MAPS)
    check_flag("normalize", normalize)
    if finite_number("eps", eps) < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    scaled = feature_map in ("identity", "taylor2")
    return heads, check_scale(scale, query.shape[-1] ** -0.5 if scaled else 1.0)


def _check_gates(
    decay: Any,
    beta: Any,
    query: Tensor,
    heads: int,
    is_causal: bool,
    normalize: bool,
    feature_map: str,
) -> tuple[Tensor | None, Tensor | None]:
    """decay and beta as ``[batch, tokens, heads]`` in the accumulator dtype."""
    rows = (query.shape[0], query.shape[1], heads)
    for name, gate in (("decay", decay), ("beta", beta)):
        if gate is None:
            continue
        check_tensor(name, gate, "a floating-point", query)
        if gate.shape != rows and (name == "beta" or gate.shape != (heads,)):
            either = "" if name == "beta" else f"{(heads,)} or "
            raise ValueError(f"{name} must have shape {either}{rows}, got {tuple(gate.shape)}")
        if not is_causal:
            raise ValueError(f"{name} needs an order of tokens: is_causal must be True with it")
    if beta is not None and normalize:
        raise ValueError("beta, the delta rule, has no normaliser: normalize must be False with it")
    if beta is not None and feature_map == "taylor2":
        raise ValueError("beta, the delta rule, is not for feature_map 'taylor2'")
    acc = accumulator_dtype(query.dtype)
    if decay is not None:
        decay = spread(decay.to(acc), rows)
    if beta is not None:
        beta = beta.to(acc)
    return decay, beta


def _check_normalizer(
    normalizer_query: Any, normalizer_key: Any, query: Tensor, key: Tensor, normalize: bool
) -> tuple[Tensor, Tensor] | None:
    """Queries and keys of the normaliser, where it has its own."""
    if normalizer_query is None and normalizer_key is None:
        return None
    found = []
    for name, t, like in (
        ("normalizer_query", normalizer_query, query), ("normalizer_key", normalizer_key, key),
    ):  # fmt: skip
        if t is None:
            found.append(like)
            continue
        if not normalize:
            raise ValueError(f"{name} needs normalize, without which nothing is divided")
        check_tensor(name, t, "a floating-point", query)
        if t.dtype != like.dtype or t.shape != like.shape:
            raise ValueError(
                f"{name} must have dtype and shape of {name.removeprefix('normalizer_')}, "
                f"{like.dtype} {tuple(like.shape)}, got {t.dtype} {tuple(t.shape)}"
            )
        found.append(t)
    return found[0], found[1]


def _check_state(
    name: str,
    state: Any,
    query: Tensor,
    value: Tensor,
    heads: int,
    feature_map: str,
    normalize: bool,
) -> None:
    check_tensor(name, state, "a floating-point", query)
    features = num_features(feature_map, query.shape[-1])
    want = (heads, features, value.shape[-1] + int(normalize))
    if state.dim() != 4 or state.shape[1:] != want:
        raise ValueError(
            f"{name} must be [sequences, heads, features, columns] with the last three {want}, got "
            f"{tuple(state.shape)}"
        )
