# SPDX-License-Identifier: Apache-2.0
"""Bi-level routing attention (BiFormer, arXiv 2303.08810): each region of an image attends the
regions most like it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import (
    check_choice,
    check_flag,
    check_integer,
    check_qkv,
    check_scale,
    check_tensor,
    under_autocast,
)
from ..merging import merge, merge_attentions
from ..plans import BlockPlan, Blocks, per_axis
from ..pooling import block_pool
from ..routed import routed_attention
from ..selection import select_topk

PADDING = ("mask", "zero")
SOFT = ("bias", "mix", "scale")


def bilevel_routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_size: int | tuple[int, ...],
    topk: int,
    *,
    key_region_size: int | tuple[int, ...] | None = None,
    scale: float | None = None,
    padding: str = "mask",
    soft: str | None = None,
    differentiable_routing: bool = False,
    return_plan: bool = False,
) -> Any:
    """Queries of a region attend all tokens of the ``topk`` regions of highest product of means.

    Means are over the tokens there are and over all heads: every head has the same regions.

    Shapes:
        query ``[B, *X, H, D]``, key ``[B, *Y, Hkv, D]``, value ``[B, *Y, Hkv, Dv]`` with 1 to 3
        token axes of any lengths; the result is ``[B, *X, H, Dv]``, with ``return_plan`` also the
        :class:`BlockPlan`.

    Args:
        region_size: tokens per axis of a query region; those at the end of an axis are what is
            left. ``key_region_size``: of a key region, by default the same.
        topk: key regions per query region, at most as many as there are.
        scale: factor on ``q . k``, by default ``D ** -0.5`` (the published model:
            ``(H * D) ** -0.5``).
        padding: what the cut regions at the border hold besides their tokens: nothing
            (``"mask"``), or zero keys with zero values up to the full size, which take part in the
            softmax as in the published model (``"zero"``).
        soft: what the routing weights, the softmax of ``scale`` times the products of the kept
            regions, do: nothing (None); ``"bias"``: their logarithm is added to the logits of
            the region; ``"mix"``: each region is attended alone and the results are averaged by
            them; ``"scale"``: keys and values of the region are multiplied by them.
        differentiable_routing: with ``soft``, whether the weights pass a gradient to the means.

    Numerics:
        As :func:`routed_attention`; routing in float32 (float64 for float64). Which regions are
        chosen passes no gradient.

    Errors:
        ValueError, TypeError or NotImplementedError, naming the argument.

    Complexity:
        O(N topk region + regions^2) time, O(N) memory; nothing is gathered.

    Source:
        BiFormer (arXiv 2303.08810).

    Example:
        >>> import torch, attnext
        >>> q, k, v = (torch.randn(1, 14, 9, 2, 16) for _ in range(3))
        >>> attnext.bilevel_routing_attention(q, k, v, (4, 4), topk=2).shape
        torch.Size([1, 14, 9, 2, 16])
    """
    _check_options(topk, padding, soft, differentiable_routing, scale)
    check_flag("return_plan", return_plan)
    query, key, value = under_autocast(query, key, value)
    rank = check_qkv(query, key, value)
    sizes = per_axis("region_size", region_size, rank, 1)
    key_sizes = sizes
    if key_region_size is not None:
        key_sizes = per_axis("key_region_size", key_region_size, rank, 1)
    scale = check_scale(scale, query.shape[-1] ** -0.5)

    learned = soft is not None and differentiable_routing
    means_q = _means(query if learned else query.detach(), sizes, key.shape[-2])
    means_k = _means(key if learned else key.detach(), key_sizes, key.shape[-2])
    if topk > means_k.shape[1]:
        raise ValueError(f"topk must be at most the key regions, {means_k.shape[1]}, got {topk}")
    lists, products = select_topk(means_q, means_k, topk, return_values=True)
    queries = Blocks.of(tuple(query.shape[1:-2]), sizes, query.device)
    keys = Blocks.of(tuple(key.shape[1:-2]), key_sizes, query.device)

    def plan(lists: Tensor, bias: Tensor | None = None) -> BlockPlan:
        return BlockPlan.of(lists, queries.extent, queries, keys.extent, keys, bias=bias)

    weights = None if soft is None else torch.softmax(products * scale, -1)
    whole = plan(lists, None if soft != "bias" else torch.log_softmax(products * scale, -1))
    if soft in ("mix", "scale"):
        assert weights is not None
        out, lse = _region_by_region(query, key, value, plan, lists, weights, queries, scale, soft)
    else:
        out, lse = routed_attention(query, key, value, whole, scale=scale, return_lse=True)
    if padding == "zero":
        missing = math.prod(key_sizes) - keys.counts[lists.long()]  # zero keys of each region
        count = _per_token(missing.sum(-1), queries)  # exp(0) each, with values of zero
        zeros = out.new_zeros(()).expand(out.shape)
        absent = torch.log(count.to(lse.dtype)).expand(lse.shape)
        out = merge_attentions((out, zeros), (lse, absent))[0]
    return (out, whole) if return_plan else out


def _check_options(
    topk: Any, padding: Any, soft: Any, differentiable_routing: Any, scale: Any
) -> None:
    check_integer("topk", topk, 1)
    check_choice("padding", padding, PADDING)
    if soft is not None:
        check_choice("soft", soft, SOFT)
    if padding == "zero" and soft in ("bias", "mix"):
        raise ValueError(f"padding must be 'mask' with soft={soft!r}, got 'zero'")
    check_flag("differentiable_routing", differentiable_routing)
    check_scale(scale, 1.0)


def _means(x: Tensor, sizes: tuple[int, ...], kv_heads: int) -> Tensor:
    """Region means over all channels, ``[B, regions, 1, Hkv D]``; query heads that share a kv head
    are summed, which is what their products with it sum to."""
    pooled = block_pool(x, sizes, dtype=torch.promote_types(x.dtype, torch.float32))
    pooled = pooled.flatten(1, -3).unflatten(-2, (kv_heads, -1)).sum(-2)
    return pooled.flatten(-2)[:, :, None]


def _per_token(x: Tensor, blocks: Blocks) -> Tensor:
    """``[B, heads, blocks]`` of the blocks as ``[B, *tokens, heads]`` of their tokens."""
    spread = x.transpose(1, 2).repeat_interleave(
        blocks.counts.long(), 1, output_size=blocks.num_tokens
    )
    if blocks.order is not None:
        raster = torch.empty_like(blocks.order.long())
        raster[blocks.order.long()] = torch.arange(blocks.num_tokens, device=x.device)
        spread = spread[:, raster]
    return spread.unflatten(1, blocks.extent)


def _region_by_region(
    query: Tensor, key: Tensor, value: Tensor, plan: Any, lists: Tensor, weights: Tensor,
    queries: Blocks, scale: float, soft: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Each listed region attended alone, then joined: what no additive bias can say."""
    gates = _per_token(weights[:, 0].transpose(1, 2), queries)  # [B, *X, topk]
    outputs, lses = [], []
    for slot in range(lists.shape[-1]):
        weight = gates[..., slot, None, None]
        q = query if soft == "mix" else (query * weight).to(query.dtype)
        out, lse = routed_attention(
            q, key, value, plan(lists[..., slot : slot + 1]), scale=scale, return_lse=True
        )
        outputs.append(out if soft == "mix" else (out * weight).to(out.dtype))
        lses.append(lse)
    if soft == "mix":
        return merge(outputs, gates=gates[..., None, :], mode="raw"), lses[0]
    return merge_attentions(outputs, lses)


class BiLevelRoutingAttention(nn.Module):
    """A layer of BiFormer: projections, bi-level routing attention, a depthwise convolution of the
    values beside it.

    Shapes: ``[B, dim, H, W]`` in and out; with ``channels_last`` ``[B, H, W, dim]``.
    Args:
        dim: channels. num_heads: heads.
        n_win: regions per side: regions are of ``(H // n_win, W // n_win)`` tokens, and where
            that does not divide, there are more, cut at the border. ``region_size`` instead fixes
            their size.
        topk: regions that a region attends.
        scale: by default ``head_dim ** -0.5``; the published model has ``dim ** -0.5``.
        side_dwconv: kernel of the depthwise convolution; 0: none.
        padding, soft, differentiable_routing: see :func:`bilevel_routing_attention`.
        channels_last: tokens as ``[B, H, W, dim]``.
    Numerics, Complexity: those of :func:`bilevel_routing_attention`.
    Errors: ValueError or TypeError, naming the argument.
    Source: BiFormer (arXiv 2303.08810).
    Example:

        >>> import torch, attnext
        >>> layer = attnext.BiLevelRoutingAttention(64, num_heads=2, n_win=7, topk=4)
        >>> layer(torch.randn(1, 64, 30, 28)).shape
        torch.Size([1, 64, 30, 28])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int = 7,
        topk: int = 4,
        *,
        region_size: int | tuple[int, int] | None = None,
        scale: float | None = None,
        side_dwconv: int = 5,
        padding: str = "mask",
        soft: str | None = None,
        differentiable_routing: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        for name, number in (("dim", dim), ("num_heads", num_heads), ("n_win", n_win)):
            check_integer(name, number, 1)
        _check_options(topk, padding, soft, differentiable_routing, scale)
        check_flag("channels_last", channels_last)
        if region_size is not None:
            per_axis("region_size", region_size, 2, 1)
        check_integer("side_dwconv", side_dwconv, 0)
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, {num_heads}, got {dim}")
        if side_dwconv and side_dwconv % 2 == 0:
            raise ValueError(f"side_dwconv must be odd or 0, got {side_dwconv}")
        self.num_heads = num_heads
        self.n_win = n_win
        self.topk = topk
        self.region_size = region_size
        self.options: dict[str, Any] = {
            "scale": scale, "padding": padding, "soft": soft,
            "differentiable_routing": differentiable_routing,
        }  # fmt: skip
        self.channels_last = channels_last
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.out = nn.Conv2d(dim, dim, 1)
        self.lepe = (
            nn.Conv2d(dim, dim, side_dwconv, padding=side_dwconv // 2, groups=dim)
            if side_dwconv
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        check_tensor("x", x, "a floating-point")
        if x.dim() != 4:
            raise ValueError(f"x must have four dimensions, got shape {tuple(x.shape)}")
        if not self.channels_last:
            x = x.permute(0, 2, 3, 1)
        if x.shape[-1] != self.qkv.in_channels:
            raise ValueError(f"x must have {self.qkv.in_channels} channels, got {x.shape[-1]}")
        size: Any = self.region_size
        if size is None:
            size = tuple(n // self.n_win for n in x.shape[1:3])
            if 0 in size:
                raise ValueError(
                    f"x must have at least n_win, {self.n_win}, tokens per side, got "
                    f"{tuple(x.shape[1:3])}"
                )
        qkv = nn.functional.linear(x, self.qkv.weight.flatten(1), self.qkv.bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        mixed = bilevel_routing_attention(q, k, v, size, self.topk, **self.options).flatten(-2)
        if self.lepe is not None:
            mixed = mixed + self.lepe(v.flatten(-2).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        result = nn.functional.linear(mixed, self.out.weight.flatten(1), self.out.bias)
        return result if self.channels_last else result.permute(0, 3, 1, 2)
