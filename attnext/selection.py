# SPDX-License-Identifier: Apache-2.0
"""The best candidates of every query: scores and top-k, without a matrix of all scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .arguments import (
    DTYPE_NAMES,
    check_choice,
    check_count,
    check_device,
    check_flag,
    check_integer,
    check_scale,
    check_tensor,
    without_autocast,
)
from .autograd import differentiable_once, is_plain, needs_gradient, refuse_forward_mode
from .ops import accumulator_dtype
from .plans import Blocks
from .pooling import Windows, bounds_of, check_cover
from .selection_ops import SCORES, select_topk_op
from .slices import slices

CAUSAL = ("none", "start", "end")

_SLICE = 2**19  # scores in flight on a CPU


def select_topk(
    query: Tensor,
    candidates: Tensor,
    k: int,
    *,
    score: str = "dot",
    causal: str = "none",
    query_blocks: Blocks | Windows | None = None,
    candidate_blocks: Blocks | Windows | None = None,
    ranges: tuple[Tensor, Tensor] | None = None,
    force_first: int = 0,
    force_last: int = 0,
    exclude: Tensor | None = None,
    weights: Tensor | None = None,
    lse: Tensor | None = None,
    windows: Windows | None = None,
    scale: float | None = None,
    tie: str = "low",
    order: str = "index",
    return_values: bool = False,
) -> Any:
    """The ``k`` candidates of highest score for every row of queries.

    ================ ============================================================= ============
    ``"dot"``        ``q . c``, a list per query head                              ``[B, H]``
    ``"max_q"``      the largest ``q . c`` of the queries of a row, per query head ``[B, H]``
    ``"relu_wsum"``  ``sum_h weights_h relu(q_h . c)``, one list for all heads     ``[B, 1]``
    ``"group_prob"`` ``exp(q . c - lse)`` of the windows that overlap a block,     ``[B, Hkv]``
                     each by the strides it shares with it, summed over the query
                     heads of a kv head
    ================ ============================================================= ============

    Shapes:
        query ``[B, rows, H, D]`` (``"max_q"``: ``[B, tokens, H, D]``), candidates
        ``[B, N, Hc, D]``; ``H`` is a multiple of ``Hc``. The result is int32 ``[B, heads, rows,
        k]``, the heads as in the table: lists for :meth:`BlockPlan.of`. With ``return_values``
        also their scores, of that shape.

    Args:
        k: slots. Those that no candidate is left for are -1, at the end, with value -inf.
        causal: ``"start"``: only candidates of which some query of the row sees a token; ``"end"``:
            only those that every query of the row sees whole. Needs the two geometries; the last
            query stands at the last key.
        query_blocks: which tokens the queries of a row are. For ``"max_q"``: needed always, a
            :class:`Windows` without overlap.
        candidate_blocks: which tokens the candidates (for ``"group_prob"``: the selected blocks)
            are.
        ranges: instead of ``causal``: int ``[rows]`` or ``[B, rows]``, the first candidate of a
            row and one past its last, for packed sequences or lengths that differ.
        force_first, force_last: so many of the first and of the last candidates that are allowed
            are always among the ``k``.
        exclude: bool, broadcasting to ``[B, heads, rows, N]``: never selected, nor forced.
        weights: ``[B, rows, H]``, of ``"relu_wsum"``.
        lse, windows: of ``"group_prob"``: the log-sum-exp ``[B, rows, H]`` of attention over the
            candidates, and which tokens they are. A window is counted by the queries that see it
            whole, unless ``causal`` is ``"none"``.
        scale: factor on ``q . c``; by default 1, of ``"group_prob"`` ``D ** -0.5``.
        tie: ``"low"`` or ``"high"``: which of equal candidates, by their index.
        order: ``"index"`` (rising) or ``"score"`` (falling; forced ones first, among themselves as
            equal ones: by their index, as ``tie`` has it).

    Numerics:
        Scores in float32 (float64 for float64), whatever the inputs are. NaN counts as the highest.
        Selection is deterministic, and passes no gradient; values are differentiable in query,
        candidates, weights and lse.

    Errors:
        ValueError or TypeError, naming the argument.

    Complexity:
        O(rows * candidates * D) time. On the CPU a kernel scores tiles of 32 rows and keeps the
        best; on a GPU, and in the gradient, torch has a bounded number of scores at a time (on a
        CPU half a million).

    Source:
        Routers of BiFormer (arXiv 2303.08810), MoBA (2502.13189), NSA (2502.11089); the indexer
        of DeepSeek Sparse Attention (DeepSeek-V3.2).

    Example:
        >>> import torch, attnext
        >>> q, k = torch.randn(2, 1, 1024, 4, 32)
        >>> blocks = attnext.Windows(1024, 64)
        >>> lists = attnext.select_topk(
        ...     attnext.block_pool(q, blocks), attnext.block_pool(k, blocks), 3, causal="start",
        ...     query_blocks=blocks, candidate_blocks=blocks, force_last=1)
        >>> plan = attnext.BlockPlan.of(lists, 1024, 64)
    """
    problem = _checked(
        query, candidates, k, score, causal, query_blocks, candidate_blocks, ranges, force_first,
        force_last, exclude, weights, lse, windows, scale, tie, order, return_values,
    )  # fmt: skip
    tensors = (query, candidates, weights, lse)
    refuse_forward_mode("select_topk", tensors)
    with torch.no_grad():
        indices, values = problem.select(*tensors)
    if not return_values:
        return indices
    # What vmap maps over does not say whether it has a gradient.
    mapped = not is_compiling() and torch._C._are_functorch_transforms_active()
    if mapped or needs_gradient(tensors):
        values = _Values.apply(problem, indices, values, *tensors)
    return indices, values


def fitting(k: int, count: int, force_first: int = 0, force_last: int = 0) -> tuple[int, int, int]:
    """``k``, ``force_first`` and ``force_last`` of :func:`select_topk`, no more than ``count``
    candidates can fill."""
    count = max(count, 1)
    first, last = min(force_first, count), min(force_last, count)
    return max(min(k, count), first + last), first, last


@dataclass(frozen=True, eq=False)
class _Problem:
    k: int
    score: str
    causal: str
    query_blocks: Any
    candidate_blocks: Any
    ranges: Any
    force_first: int
    force_last: int
    exclude: Tensor | None
    windows: Windows | None
    scale: float
    tie: str
    order: str
    rows: int
    num_candidates: int  # to select among
    heads: int
    offset: int  # of the first query, in key tokens
    scores_per_row: int  # of all heads
    acc: torch.dtype
    known: dict[Any, Tensor] = field(default_factory=dict)  # by device

    def select(self, query: Tensor, candidates: Tensor, weights: Any, lse: Any) -> Any:
        if query.device.type in ("cpu", "meta"):
            return self._select_by_kernel(query, candidates, lse if weights is None else weights)
        return self.select_in_torch(query, candidates, weights, lse)

    def _select_by_kernel(self, query: Tensor, candidates: Tensor, factors: Any) -> Any:
        acc, device = self.acc, query.device
        if accumulator_dtype(query.dtype) != acc:
            query = query.to(acc)
        begin, end = self._ranges(device)
        if begin is not None:
            begin, end = torch.broadcast_tensors(begin, end)
        each_end = index = share = exclude = None
        samples = 1
        if self.score == "max_q":
            samples = self.query_blocks.size
            if self.causal != "none":
                tokens = Windows(query.shape[1], 1)
                each_end = self._seen(tokens, self.candidate_blocks, self.causal, device)
        elif self.score == "relu_wsum":
            samples = query.shape[2]
        elif self.score == "group_prob":
            assert self.windows is not None
            samples = query.shape[2] // candidates.shape[2]
            index, share = overlaps(self.windows, self.candidate_blocks, device)
            share = share.to(acc)
            if self.causal != "none":
                each_end = self._whole_windows(device)
        if self.exclude is not None:
            exclude = self.exclude.expand(query.shape[0], self.heads, self.rows, -1)
        return select_topk_op(
            query, candidates.to(acc), None if factors is None else factors.to(acc), each_end,
            begin, end, index, share, exclude, SCORES.index(self.score), self.k, samples,
            self.heads, self.scale, self.force_first, self.force_last, self.tie == "high",
            self.order == "score",
        )  # fmt: skip

    def select_in_torch(
        self, query: Tensor, candidates: Tensor, weights: Any, lse: Any
    ) -> tuple[Tensor, Tensor]:
        """The same by torch's own operators, on any device: scores are written, slice by slice."""
        batch, device = query.shape[0], query.device
        candidates = candidates.to(self.acc)
        begin, end = self._ranges(device)
        parts = []
        for part in self.slices(batch, device):
            low, high = part.start, part.stop
            seen = self._most_seen(end, high)
            scores = self.scores(query, candidates, weights, lse, low, high, seen)
            allowed, forced = self._rules(
                None if begin is None else begin[..., low:high],
                None if end is None else end[..., low:high],
                low, high, seen, device,
            )  # fmt: skip
            parts.append(self._top(scores, allowed, forced))
        if not parts:
            empty = query.new_empty(batch, self.heads, 0, self.k, dtype=torch.int32)
            return empty, query.new_empty(empty.shape, dtype=self.acc)
        indices, values = zip(*parts, strict=True)
        if len(parts) == 1:
            return parts[0]
        return torch.cat(indices, 2), torch.cat(values, 2)

    def slices(self, batch: int, device: torch.device) -> Iterator[slice]:
        return slices(self.rows, batch * self.scores_per_row, _SLICE, device)

    def _ranges(self, device: Any) -> tuple[Any, Any]:
        """First candidate of each row and one past its last, ``[B or 1, rows]``; None: all."""
        if self.ranges is not None:
            return tuple((t if t.dim() == 2 else t[None]).to(device).long() for t in self.ranges)
        if self.causal == "none":
            return None, None
        seen = self._seen(self.query_blocks, self.candidate_blocks, self.causal, device)
        return None, seen[None]

    def _seen(self, queries: Any, candidates: Any, causal: str, device: Any) -> Tensor:
        """How many candidates, from the first, the queries of each row see."""
        first, past = bounds_of(queries, device)
        starts, ends = bounds_of(candidates, device)
        if causal == "start":
            return torch.searchsorted(starts, past - 1 + self.offset, right=True)
        return torch.searchsorted(ends - 1, first + self.offset, right=True)

    def _most_seen(self, end: Any, high: int) -> int:
        """Candidates that any row below ``high`` sees, if that is known without waiting."""
        if end is None or self.ranges is not None or end.device.type != "cpu" or is_compiling():
            return self.num_candidates
        return int(end[0, high - 1])

    def _rules(
        self, begin: Any, end: Any, low: int, high: int, seen: int, device: Any
    ) -> tuple[Any, Any]:
        """Masks that broadcast to ``[B, heads, rows, candidates]``; None: all, and nothing."""
        c = torch.arange(seen, device=device)
        allowed = forced = None
        begin = None if begin is None else begin[:, None, :, None]
        end = None if end is None else end[:, None, :, None]
        if end is not None:
            allowed = c < end
            if begin is not None:
                allowed = allowed & (c >= begin)
        if self.force_first:
            forced = c < self.force_first + (0 if begin is None else begin)
        if self.force_last:
            tail = c >= (seen if end is None else end) - self.force_last
            forced = tail if forced is None else forced | tail
        if self.exclude is not None:
            narrow = self.exclude
            if narrow.shape[2] != 1:
                narrow = narrow[:, :, low:high]
            keep = ~narrow[..., :seen]
            allowed = keep if allowed is None else allowed & keep
        return allowed, forced

    def _top(self, scores: Tensor, allowed: Any, forced: Any) -> tuple[Tensor, Tensor]:
        seen = scores.shape[-1]
        k = min(self.k, seen)
        if self.order == "index" and k == seen:
            index = torch.arange(seen, device=scores.device).expand(scores.shape)
            valid = None if allowed is None else allowed.expand(scores.shape)
        else:
            # Infinity is above every score and below every one: scores are kept within numbers.
            top = torch.finfo(scores.dtype).max
            rank = scores.nan_to_num(nan=top, posinf=top, neginf=-top)
            if forced is not None:
                rank = rank.masked_fill_(forced, math.inf)
            if allowed is not None:
                rank = rank.masked_fill_(~allowed, -math.inf)
            best, index = largest(rank, k, self.tie, ordered=self.order == "score")
            valid = None if allowed is None else best != -math.inf
        values = scores.gather(-1, index)
        if valid is not None:
            index = torch.where(valid, index, seen)
            values = torch.where(valid, values, -math.inf)
        if self.order == "index":
            if k != seen or valid is not None:
                index, place = index.sort(dim=-1)
                values = values.gather(-1, place)
        index = torch.where(index == seen, -1, index).int()
        if k < self.k:
            index = torch.nn.functional.pad(index, (0, self.k - k), value=-1)
            values = torch.nn.functional.pad(values, (0, self.k - k), value=-math.inf)
        return index, values

    def scores(
        self, query: Tensor, candidates: Tensor, weights: Any, lse: Any, low: int, high: int,
        seen: int,
    ) -> Tensor:  # fmt: skip
        """``[B, heads, rows, candidates]`` of the rows from ``low`` to ``high``."""
        acc = self.acc
        if self.windows is not None:
            seen_candidates = self._windows_seen(high, query.device)
        else:
            seen_candidates = seen
        c = candidates[:, :seen_candidates].to(acc)
        size = self.query_blocks.size if self.score == "max_q" else 1
        q = query[:, low * size : high * size].to(acc)
        kv_heads = c.shape[2]
        q = q * self.scale if self.scale != 1 else q
        grouped = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
        with without_autocast(q):
            s = grouped.flatten(2, 3) @ c.permute(0, 2, 3, 1)
        s = s.unflatten(2, grouped.shape[2:4]).flatten(1, 2)
        if self.score == "relu_wsum":
            w = weights[:, low:high].to(acc).transpose(1, 2)[..., None]
            return (torch.relu(s) * w).sum(1, keepdim=True)
        if self.score == "group_prob":
            return self._of_windows(s, lse, low, high, kv_heads, seen)
        if self.score == "max_q":
            if self.causal != "none":
                tokens = Windows(query.shape[1], 1)
                end = self._seen(tokens, self.candidate_blocks, self.causal, q.device)
                end = end[low * size : high * size, None]
                s = s.masked_fill(torch.arange(seen, device=q.device) >= end, -math.inf)
            missing = (high - low) * size - s.shape[2]
            if missing:
                s = torch.nn.functional.pad(s, (0, 0, 0, missing), value=-math.inf)
            s = s.unflatten(2, (high - low, size)).amax(3)
        return s

    def _of_windows(
        self, s: Tensor, lse: Tensor, low: int, high: int, kv_heads: int, seen: int
    ) -> Tensor:
        """Probabilities of windows, by their overlap summed to those of blocks."""
        assert self.windows is not None
        lse = lse[:, low:high].to(s.dtype).transpose(1, 2)[..., None]
        if self.causal != "none":
            end = self._whole_windows(s.device)[low:high, None]
            s = s.masked_fill_(torch.arange(s.shape[-1], device=s.device) >= end, -math.inf)
        p = s.sub_(torch.where(lse == -math.inf, math.inf, lse)).exp_()  # of large tables, in place
        p = p.unflatten(1, (kv_heads, -1)).sum(2)
        count = p.shape[-1]
        p = torch.nn.functional.pad(p, (0, 1))  # of windows that no row sees
        index, share = overlaps(self.windows, self.candidate_blocks, s.device)
        result: Any = p.new_zeros(*p.shape[:-1], seen)
        for column in range(index.shape[1]):
            part = p.index_select(-1, index[:seen, column].clamp(max=count))
            result = result + part * share[:seen, column].to(s.dtype)
        return result

    def _whole_windows(self, device: Any) -> Tensor:
        """How many windows, from the first, the queries of each row see whole."""
        if is_compiling():
            return self._seen(self.query_blocks, self.windows, "end", device)
        if device not in self.known:
            self.known[device] = self._seen(self.query_blocks, self.windows, "end", device)
        return self.known[device]

    def _windows_seen(self, high: int, device: torch.device) -> int:
        """The most of any row below ``high``, if that is known without waiting."""
        assert self.windows is not None
        if self.causal == "none" or device.type != "cpu" or is_compiling():
            return self.windows.num_blocks
        return int(self._whole_windows(device)[high - 1])


def overlaps(windows: Windows, blocks: Blocks | Windows, device: Any) -> tuple[Tensor, Tensor]:
    """Windows that overlap each block, ``[blocks, slots]``, and by how many tokens, in strides;
    spare slots have share 0."""
    first, past = bounds_of(blocks, device)
    starts, ends = windows.bounds(device)
    count = windows.num_blocks
    if isinstance(blocks, Windows):
        longest = blocks.size
    else:
        longest = int(blocks.counts.max()) if blocks.num_blocks else 0
    slots = min(count, (longest + windows.size - 2) // windows.stride + 1)
    low = torch.searchsorted(ends, first, right=True)
    index = low[:, None] + torch.arange(slots, device=device)
    inside = index < count
    index = index.clamp(max=max(count - 1, 0))
    if not count:
        return index, torch.zeros_like(index)
    common = torch.minimum(ends[index], past[:, None]) - torch.maximum(
        starts[index], first[:, None]
    )
    return index, torch.where(inside, common.clamp(min=0), 0) / windows.stride


def largest(rank: Tensor, k: int, tie: str, ordered: bool) -> tuple[Tensor, Tensor]:
    """The ``k`` largest and where they are, of equal ones the lowest (or highest) places; -inf is
    no number. ``ordered``: falling, equal ones by place too."""
    count = rank.shape[-1]
    if rank.device.type == "cpu" and is_plain((rank,)):
        # torch.topk promises nothing about ties, but with one more it tells whether there are any.
        best, index = rank.topk(min(k + 1, count), dim=-1)
        left, right = best[..., :-1], best[..., 1:]
        if not ordered:
            left, right = left[..., k - 1 :], right[..., k - 1 :]
        if not ((left == right) & (right != -math.inf)).any():
            return best[..., :k], index[..., :k]
    place = torch.arange(count, device=rank.device)
    if rank.dtype == torch.float64:
        place = place.flip(-1) if tie == "high" else place
        best, index = torch.sort(rank[..., place], dim=-1, descending=True, stable=True)
        return best[..., :k], place[index[..., :k]]
    # With the place in its lower half, no key equals another.
    bits = (rank + 0.0).view(torch.int32)  # -0 is 0
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    keys = keys | (place if tie == "high" else count - 1 - place)
    index = keys.topk(k, dim=-1).values & 0xFFFFFFFF
    index = index if tie == "high" else count - 1 - index
    return rank.gather(-1, index), index


class _Values(torch.autograd.Function):
    """The scores of selected candidates, with their gradients, slice by slice."""

    generate_vmap_rule = True

    @staticmethod
    def forward(problem: _Problem, indices: Tensor, values: Tensor, *tensors: Any) -> Any:
        return values.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.problem, indices, _, *tensors = inputs
        ctx.save_for_backward(indices, *tensors)

    @staticmethod
    @differentiable_once("select_topk")
    def backward(ctx: Any, grad: Tensor) -> Any:
        indices, *tensors = ctx.saved_tensors
        problem = ctx.problem
        wide: list[Any] = [None if t is None else t.detach().to(grad.dtype) for t in tensors]
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[3:]) if need]
        sums = [torch.zeros_like(wide[i]) for i in wanted]
        count = problem.num_candidates
        for part in problem.slices(indices.shape[0], grad.device):
            low, high = part.start, part.stop

            def scores_of(*some: Tensor, low: int = low, high: int = high) -> Tensor:
                given = dict(zip(wanted, some, strict=True))
                mixed = (given.get(i, t) for i, t in enumerate(wide))
                return problem.scores(*mixed, low, high, count)

            with without_autocast(grad):  # a backward pass may be called under one
                scores, chain, *_ = torch.func.vjp(scores_of, *(wide[i] for i in wanted))
            chosen = indices[:, :, low:high].long()
            spread = scores.new_zeros(*scores.shape[:-1], count + 1)
            to = torch.where(chosen < 0, count, chosen)
            spread = spread.scatter(-1, to, grad[:, :, low:high])
            with without_autocast(grad):
                shares = chain(spread[..., :count])
            sums = [total + share for total, share in zip(sums, shares, strict=True)]
        of = dict(zip(wanted, sums, strict=True))
        grads = [of[i].to(t.dtype) if i in of else None for i, t in enumerate(tensors)]
        return (None, None, None, *grads)


def _checked(
    query: Any, candidates: Any, k: Any, score: Any, causal: Any, query_blocks: Any,
    candidate_blocks: Any, ranges: Any, force_first: Any, force_last: Any, exclude: Any,
    weights: Any, lse: Any, windows: Any, scale: Any, tie: Any, order: Any, return_values: Any,
) -> _Problem:  # fmt: skip
    for name, choice, allowed in (
        ("score", score, SCORES), ("causal", causal, CAUSAL), ("tie", tie, ("low", "high")),
        ("order", order, ("index", "score")),
    ):  # fmt: skip
        check_choice(name, choice, allowed)
    check_flag("return_values", return_values)
    for name, t in (("query", query), ("candidates", candidates)):
        check_tensor(name, t, f"a {DTYPE_NAMES}")
        if t.dim() != 4:
            raise ValueError(f"{name} must be [B, tokens, H, D], got {tuple(t.shape)}")
    check_device("candidates", candidates, query)
    if candidates.shape[0] != query.shape[0] or candidates.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"candidates must have the batch and head_dim of query, {tuple(query.shape)}, got "
            f"{tuple(candidates.shape)}"
        )
    heads, kv_heads = query.shape[2], candidates.shape[2]
    if not kv_heads or heads % kv_heads:
        raise ValueError(
            f"query must have a multiple of the heads of candidates, {kv_heads}, got {heads}"
        )
    check_count("k", k)
    check_integer("force_first", force_first, 0)
    check_integer("force_last", force_last, 0)
    if force_first + force_last > k:
        raise ValueError(
            f"force_first and force_last must fit into k, {k}, got {force_first} and {force_last}"
        )
    scale = check_scale(scale, query.shape[-1] ** -0.5 if score == "group_prob" else 1.0)
    for name, t, of in (
        ("weights", weights, "relu_wsum"), ("lse", lse, "group_prob"),
        ("windows", windows, "group_prob"),
    ):  # fmt: skip
        if (t is None) == (score == of):
            raise ValueError(f"{name} must be given with score={of!r}, and only then")
        if t is not None and name != "windows":
            check_tensor(name, t, "a floating-point", query)
            if t.shape != query.shape[:3]:
                raise ValueError(
                    f"{name} must have shape {tuple(query.shape[:3])}, got {tuple(t.shape)}"
                )
    rows, count, offset = _check_blocks(
        query, candidates, score, causal, query_blocks, candidate_blocks, windows
    )
    if ranges is not None:
        _check_ranges(ranges, causal, query.shape[0], rows)
    list_heads = {"relu_wsum": 1, "group_prob": kv_heads}.get(score, heads)
    if exclude is not None:
        check_tensor("exclude", exclude, "a bool", query)
        want = (query.shape[0], list_heads, rows, count)
        if (
            exclude.dim() != 4
            or any(n not in (1, w) for n, w in zip(exclude.shape[:3], want[:3], strict=True))
            or exclude.shape[3] != count
        ):
            raise ValueError(
                f"exclude must broadcast to {want}, whole on the last axis, got "
                f"{tuple(exclude.shape)}"
            )
    return _Problem(
        k, score, causal, query_blocks, candidate_blocks, ranges, force_first, force_last, exclude,
        windows, scale, tie, order, rows, count, list_heads, offset,
        heads * candidates.shape[1] * (query_blocks.size if score == "max_q" else 1),
        accumulator_dtype(torch.promote_types(query.dtype, candidates.dtype)),
    )  # fmt: skip


def _check_blocks(
    query: Tensor, candidates: Tensor, score: str, causal: str, query_blocks: Any,
    candidate_blocks: Any, windows: Any,
) -> tuple[int, int, int]:  # fmt: skip
    """Rows, candidates to select among, and how far the first query stands into the keys."""
    for name, blocks, needed in (
        ("query_blocks", query_blocks, causal != "none" or score == "max_q"),
        ("candidate_blocks", candidate_blocks, causal != "none" or score == "group_prob"),
    ):
        if blocks is None and needed:
            raise ValueError(f"{name} must be given with causal={causal!r}, score={score!r}")
        if blocks is not None and not isinstance(blocks, (Blocks, Windows)):
            raise TypeError(f"{name} must be Blocks or Windows, got {type(blocks).__name__}")
        if isinstance(blocks, Blocks) and (len(blocks.extent) != 1 or blocks.order is not None):
            raise ValueError(f"{name} must be of one token axis, got {blocks.extent}")
        if isinstance(blocks, Blocks):
            check_cover(name, blocks)
    rows, count = query.shape[1], candidates.shape[1]
    if score == "max_q":
        if not isinstance(query_blocks, Windows) or query_blocks.stride != query_blocks.size:
            raise ValueError(f"query_blocks must be Windows without overlap, got {query_blocks!r}")
        if (query_blocks.num_tokens, query_blocks.phase, query_blocks.ragged) != (rows, 0, True):
            raise ValueError(f"query_blocks must cover the {rows} queries, got {query_blocks!r}")
        rows = query_blocks.num_blocks
    elif query_blocks is not None and query_blocks.num_blocks != rows:
        raise ValueError(f"query_blocks must be {rows} like query, got {query_blocks.num_blocks}")
    if score == "group_prob":
        if not isinstance(windows, Windows):
            raise TypeError(f"windows must be Windows, got {type(windows).__name__}")
        if windows.num_blocks != count:
            raise ValueError(f"windows must be {count} like candidates, got {windows.num_blocks}")
        if windows.num_tokens != _tokens(candidate_blocks):
            raise ValueError(
                f"windows must be of the {_tokens(candidate_blocks)} tokens of candidate_blocks, "
                f"got {windows.num_tokens}"
            )
        count = candidate_blocks.num_blocks
    elif candidate_blocks is not None and candidate_blocks.num_blocks != count:
        raise ValueError(
            f"candidate_blocks must be {count} like candidates, got {candidate_blocks.num_blocks}"
        )
    if query_blocks is None or candidate_blocks is None:
        return rows, count, 0
    return rows, count, _tokens(candidate_blocks) - _tokens(query_blocks)


def _check_ranges(ranges: Any, causal: str, batch: int, rows: int) -> None:
    if causal != "none":
        raise ValueError(f"ranges take the place of causal: it must be 'none', got {causal!r}")
    if not isinstance(ranges, tuple) or len(ranges) != 2:
        raise TypeError(f"ranges must be a pair of tensors, got {type(ranges).__name__}")
    for t in ranges:
        check_tensor("each of ranges", t, "an int32 or int64")
        if tuple(t.shape) not in ((rows,), (batch, rows)):
            raise ValueError(f"ranges must be [{rows}] or [{batch}, {rows}], got {tuple(t.shape)}")


def _tokens(blocks: Blocks | Windows) -> int:
    return blocks.num_tokens
