# SPDX-License-Identifier: Apache-2.0
"""Native sparse attention (NSA, arXiv 2502.11089): compressed windows of keys, the blocks that
these say matter, and a sliding window, summed by gates."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import (
    check_choice,
    check_flag,
    check_integer,
    check_layer_input,
    check_scale,
    check_sequences,
    check_tensor,
    kind_of,
    under_autocast,
)
from ..constants import constant
from ..functional import sliding_window_attention
from ..merging import merge
from ..plans import BlockPlan, Blocks
from ..pooling import Windows, block_pool
from ..routed import routed_attention
from ..selection import fitting, select_topk


def native_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor,
    *,
    compressed: tuple[Tensor, Tensor] | None = None,
    window_kv: tuple[Tensor, Tensor] | None = None,
    compress_size: int = 32,
    compress_stride: int = 16,
    block_size: int = 64,
    num_blocks: int = 16,
    initial_blocks: int = 1,
    local_blocks: int = 2,
    window_size: int = 512,
    share_selection: bool = True,
    scale: float | None = None,
    return_plan: bool = False,
) -> Any:
    """Causal attention as ``sum_n sigmoid(gates_n) O_n`` of three branches.

    Compressed: the query attends one key for each whole window of ``compress_size`` tokens that it
    sees to the end. Selected: the ``num_blocks`` blocks in which these weights lie, a window giving
    to each block it overlaps by the number of strides it shares with it; the first
    ``initial_blocks`` and the last ``local_blocks`` are always among them. Window: the last
    ``window_size`` keys.

    Shapes:
        query ``[B, Nq, H, D]``, key ``[B, Nk, Hkv, D]``, value ``[B, Nk, Hkv, Dv]``, gates
        ``[B, Nq, H, 3]`` (logits, in the order compressed, selected, window); the result is
        ``[B, Nq, H, Dv]``, with ``return_plan`` also the :class:`BlockPlan` of the second branch.
        The last query stands at the last key. Any number of query heads per kv head, any sizes.

    Args:
        compressed: keys and values of the windows, ``[B, windows, Hkv, D]`` and
            ``[B, windows, Hkv, Dv]`` for ``Windows(Nk, compress_size, compress_stride,
            ragged=False)``; by default the means of key and value.
        window_kv: keys and values of the third branch, in the shapes of key and value, which they
            are by default; the paper gives each branch its own.
        num_blocks: blocks per query, the forced ones among them; with fewer, all there are.
        share_selection: all query heads of a kv head select by the sum of their weights, the same
            blocks. False: each for itself.
        scale: by default ``D ** -0.5``.

    Numerics:
        As :func:`routed_attention` and :func:`merge`. The choice passes no gradient: what makes
        windows worth choosing learns through the compressed branch.

    Errors:
        ValueError, TypeError or NotImplementedError, naming the argument.

    Complexity:
        O(Nq (Nk / compress_stride + num_blocks block_size + window_size) D) time, O(N) memory.

    Source:
        NSA (arXiv 2502.11089).

    Example:
        >>> import torch, attnext
        >>> q, k, v = (torch.randn(1, 200, heads, 32) for heads in (4, 2, 2))
        >>> gates = torch.zeros(1, 200, 4, 3)
        >>> attnext.native_sparse_attention(q, k, v, gates, num_blocks=3, window_size=64).shape
        torch.Size([1, 200, 4, 32])
    """
    _check_options(
        compress_size=compress_size, compress_stride=compress_stride, block_size=block_size,
        num_blocks=num_blocks, initial_blocks=initial_blocks, local_blocks=local_blocks,
        window_size=window_size, share_selection=share_selection, scale=scale,
    )  # fmt: skip
    check_flag("return_plan", return_plan)
    query, key, value = under_autocast(query, key, value)
    check_sequences(query, key, value)
    _check_gates(query, gates)
    num_queries, num_keys, group = query.shape[1], key.shape[1], query.shape[2] // key.shape[2]
    windows = Windows(num_keys, compress_size, compress_stride, ragged=False)
    if compressed is None:
        short_key, short_value = (block_pool(x, windows) for x in (key, value))
    else:
        _check_pair("compressed", compressed, key, value, windows.num_blocks)
        short_key, short_value = under_autocast(*compressed)
    if window_kv is None:
        window_kv = key, value
    else:
        _check_pair("window_kv", window_kv, key, value, num_keys)
    scale = check_scale(scale, query.shape[-1] ** -0.5)

    coarse, lse = _compressed_branch(query, short_key, short_value, windows, scale)
    blocks = Windows(num_keys, block_size)
    candidates = short_key.detach()
    if not share_selection:
        candidates = candidates.repeat_interleave(group, 2)
    count, first, last = fitting(num_blocks, blocks.num_blocks, initial_blocks, local_blocks)
    lists = select_topk(
        query.detach(), candidates, count, score="group_prob", lse=lse.detach(),
        windows=windows, causal="start", query_blocks=Windows(num_queries, 1),
        candidate_blocks=blocks, force_first=first, force_last=last, scale=scale,
    )  # fmt: skip
    plan = BlockPlan.of(lists, num_queries, 1, num_keys, block_size)
    fine = routed_attention(query, key, value, plan, is_causal=True, scale=scale)
    near = sliding_window_attention(query, *window_kv, window_size, scale=scale)
    out = merge([coarse, fine, near], gates=gates, mode="sigmoid")
    return (out, plan) if return_plan else out


def _check_options(
    *, initial_blocks: Any, local_blocks: Any, share_selection: Any, scale: Any, **sizes: Any
) -> None:
    for name, number in sizes.items():
        check_integer(name, number, 1)
    for name, number in (("initial_blocks", initial_blocks), ("local_blocks", local_blocks)):
        check_integer(name, number, 0)
    if initial_blocks + local_blocks > sizes["num_blocks"]:
        raise ValueError(
            f"num_blocks must be at least initial_blocks + local_blocks, {initial_blocks} + "
            f"{local_blocks}, got {sizes['num_blocks']}"
        )
    check_flag("share_selection", share_selection)
    check_scale(scale, 1.0)


def _all_options(given: dict[str, Any]) -> dict[str, Any]:
    """The options of :func:`native_sparse_attention` that a layer has, checked."""
    tensors = ("compressed", "window_kv", "return_plan")
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(native_sparse_attention).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in tensors
    }
    for name in given:
        if name not in defaults:
            raise TypeError(f"options must be among {tuple(defaults)}, got {name!r}")
    options = defaults | given
    _check_options(**options)
    return options


def _compressed_branch(
    query: Tensor, key: Tensor, value: Tensor, windows: Windows, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each query to the windows that end before or at it: a staircase."""
    blocks, ends = _stairs(query.shape[1], windows, query.device)
    plan = BlockPlan.of_spans(
        torch.zeros_like(ends), ends, query.shape[1], blocks, windows.num_blocks
    )
    out, lse = routed_attention(query, key, value, plan, scale=scale, return_lse=True)
    return out, lse


@constant(maxsize=64)
def _stairs(num_queries: int, windows: Windows, device: torch.device) -> tuple[Blocks, Tensor]:
    """Blocks of queries that see equally many windows, and how many, ``[1, 1, blocks, 1]``."""
    offset = windows.num_tokens - num_queries
    first_end = windows.size - 1 - offset  # the query at which the first window ends
    steps = [first_end + n * windows.stride for n in range(windows.num_blocks)]
    edges = [0, *(step for step in steps if 0 < step < num_queries), num_queries]
    edges = edges if num_queries else [0]
    seen = [
        min(max((edge - first_end) // windows.stride + 1, 0), windows.num_blocks)
        for edge in edges[:-1]
    ]
    with torch.inference_mode(False):
        offsets = torch.tensor(edges, dtype=torch.int32, device=device)
        ends = torch.tensor(seen, dtype=torch.int32, device=device).reshape(1, 1, -1, 1)
    return Blocks((num_queries,), offsets), ends


def _check_gates(query: Tensor, gates: Any) -> None:
    check_tensor("gates", gates, "a floating-point", query)
    want = (*query.shape[:3], 3)
    if tuple(gates.shape) != want:
        raise ValueError(f"gates must have shape {want}, got {tuple(gates.shape)}")


def _check_pair(name: str, pair: Any, key: Tensor, value: Tensor, count: int) -> None:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name} must be a pair of keys and values, got {kind_of(pair)}")
    for what, t, like in zip(("keys", "values"), pair, (key, value), strict=True):
        want = (like.shape[0], count, *like.shape[2:])
        check_tensor(f"{name} {what}", t, "a floating-point", like)
        if tuple(t.shape) != want:
            raise ValueError(f"{name} {what} must have shape {want}, got {tuple(t.shape)}")


class NativeSparseAttention(nn.Module):
    """A layer of NSA: projections, gates from the tokens, compression by means or by learning.

    Shapes: ``[B, N, dim]`` in and out.
    Args:
        dim: of the tokens. num_heads, kv_heads: of queries, and of keys and values (default: as
            many). head_dim: default ``dim // num_heads``.
        window_kv: whether the window has keys and values of its own.
        compress: ``"mean"``, or ``"mlp"``: a position embedding and two layers over a window, one
            for keys and one for values.
        options: of :func:`native_sparse_attention`.
    Numerics, Complexity: those of :func:`native_sparse_attention`.
    Errors: ValueError or TypeError, naming the argument.
    Source: NSA (arXiv 2502.11089).
    Example:

        >>> import torch, attnext
        >>> layer = attnext.NativeSparseAttention(64, 4, kv_heads=2, num_blocks=3, window_size=32)
        >>> layer(torch.randn(1, 150, 64)).shape
        torch.Size([1, 150, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        compress: str = "mean",
        window_kv: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if kv_heads is None else kv_heads
        for name, number in (("dim", dim), ("num_heads", num_heads), ("kv_heads", kv_heads)):
            check_integer(name, number, 1)
        if num_heads % kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of kv_heads, {kv_heads}, got {num_heads}"
            )
        if head_dim is None and dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, {num_heads}, got {dim}")
        head_dim = dim // num_heads if head_dim is None else head_dim
        check_integer("head_dim", head_dim, 1)
        check_choice("compress", compress, ("mean", "mlp"))
        check_flag("window_kv", window_kv)
        self.num_heads, self.kv_heads, self.head_dim = num_heads, kv_heads, head_dim
        self.options = _all_options(options)
        self.query = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.key = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.value = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.window_kv = None
        if window_kv:
            self.window_kv = nn.Linear(dim, 2 * kv_heads * head_dim, bias=False)
        self.gates = nn.Linear(dim, 3 * num_heads)
        self.out = nn.Linear(num_heads * head_dim, dim, bias=False)
        self.compress = None
        if compress == "mlp":
            size = self.options["compress_size"]
            self.compress = nn.ModuleList(_Compression(size, head_dim) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        check_layer_input(x, self.query.in_features)
        q = self.query(x).unflatten(-1, (self.num_heads, -1))
        k, v = (f(x).unflatten(-1, (self.kv_heads, -1)) for f in (self.key, self.value))
        gates = self.gates(x).unflatten(-1, (self.num_heads, 3))
        compressed = None
        if self.compress is not None:
            stride = self.options["compress_stride"]
            of_keys, of_values = self.compress
            compressed = (of_keys(k, stride), of_values(v, stride))
        window_kv = None
        if self.window_kv is not None:
            window_kv = self.window_kv(x).unflatten(-1, (2, self.kv_heads, -1)).unbind(-3)
        mixed = native_sparse_attention(
            q, k, v, gates, compressed=compressed, window_kv=window_kv, **self.options
        )
        result: Tensor = self.out(mixed.flatten(-2))
        return result


class _Compression(nn.Module):
    """Windows ``[B, N, H, D]`` to ``[B, windows, H, D]``."""

    def __init__(self, size: int, head_dim: int) -> None:
        super().__init__()
        self.size = size
        self.positions = nn.Parameter(torch.randn(size, head_dim) / math.sqrt(head_dim))
        self.layers = nn.Sequential(
            nn.Linear(size * head_dim, 2 * head_dim), nn.GELU(), nn.Linear(2 * head_dim, head_dim)
        )

    def forward(self, x: Tensor, stride: int) -> Tensor:
        if x.shape[1] < self.size:
            return x[:, :0]
        windows = x.unfold(1, self.size, stride).transpose(-2, -1)  # [B, windows, H, size, D]
        result: Tensor = self.layers((windows + self.positions).flatten(-2))
        return result
