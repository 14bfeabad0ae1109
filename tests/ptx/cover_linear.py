# SPDX-License-Identifier: Apache-2.0
"""Problems that execute nearly every instruction of the kernels of linear attention, as cover.py
has them for windows, and why the rest is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from linear_problems import assert_close, evaluate, expect, problem
from torch import Tensor

import attnext
from attnext import reference
from attnext.gpu_check.linear import BUDGET, slack

from .cover import Reason
from .executor import Program, Report
from .linear import on_executor
from .problems import cut_out, findings
from .source import lone


class _Raised(torch.autograd.Function):
    """x, of whose gradient the number of one token and column is raised."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        ctx.by = by
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        grad[:, 30, :, 3] += ctx.by
        return grad, None


@dataclass(frozen=True)
class Problem:
    """A call of linear attention, with gradients of everything if they are wanted."""

    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    backward: bool = True
    dout: float = 0.0  # added to one number of the gradient of outputs

    few: float = 1.0  # what results may be off, times the budget

    def evaluate(self, function: Any = attnext.linear_attention) -> dict[str, Tensor]:
        def call(**given: Any) -> Any:
            results = function(**given)
            return results if not self.dout else (_Raised.apply(results[0], self.dout), results[1])

        found: dict[str, Tensor] = evaluate(call, self.tensors, self.options, self.backward)
        return found

    def is_right(self, results: dict[str, Tensor]) -> bool:
        dtype = self.tensors["query"].dtype
        more = slack(dtype, bool(self.options.get("normalize")), "beta" in self.tensors)
        budget = self.few * BUDGET[dtype]
        if self.dout or not self.tensors["value"].isfinite().all():
            wide = {n: x.double() for n, x in self.tensors.items()}
            expected = dataclasses.replace(self, tensors=wide).evaluate(reference.linear_attention)
            finite = {n: x.isfinite() for n, x in expected.items()}
            if any(not torch.equal(x.isfinite(), finite[n]) for n, x in results.items()):
                return False
            expected, results = (
                {n: x[n][f] for n, f in finite.items()} for x in (expected, results)
            )
        else:
            expected = expect(self.tensors, self.options, self.backward)
        try:
            assert_close(results, expected, budget, more)
        except AssertionError:
            return False
        return True


def run(
    of: Problem, find: Callable[[str], Program] = lone, **options: Any
) -> tuple[set[str], list[Report]]:
    """As problems.run."""
    return findings(on_executor(find=find, **options), of.evaluate, of.is_right)


Maker = Callable[[torch.dtype], Problem]
Edit = Callable[[dict[str, Tensor], dict[str, Any]], None]


def _make(
    tokens: int, *, backward: bool = True, dout: float = 0.0, few: float = 1.0,
    edit: Edit | None = None, **more: Any,
) -> Maker:  # fmt: skip
    """One head of 32 entries, with a state."""

    def make(dtype: torch.dtype) -> Problem:
        defaults = {"heads": (1, 1, 1), "dim": 32, "dim_v": 32, "state": True, "dtype": dtype}
        tensors, options = problem(tokens, **{**defaults, **more})
        if edit:
            edit(tensors, options)
        return Problem(tensors, options, backward, dout, few)

    return make


def _apart(tensors: dict[str, Tensor], options: dict[str, Any]) -> None:
    """Rows that do not begin at multiples of 16 bytes."""
    for name in ("query", "key", "value"):
        tensors[name] = cut_out(tensors[name], 5)


def _not_finite(tensors: dict[str, Tensor], options: dict[str, Any]) -> None:
    tensors["value"][:, 21, :, 3] = torch.nan
    tensors["value"][:, 40, :, 5] = torch.inf


def _constant(tensors: dict[str, Tensor], options: dict[str, Any]) -> None:
    """A decay that has no gradient."""
    options["decay"] = tensors.pop("decay")


def _gently(tensors: dict[str, Tensor], options: dict[str, Any]) -> None:
    """Less than what the delta rule makes grow where features are larger than 1."""
    tensors["beta"] *= 0.2


def _packed(*lengths: int) -> dict[str, Any]:
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return {"cu_seqlens": ends, "states": len(lengths)}


_ELU: dict[str, Any] = {"feature_map": "elu", "normalize": True}
_TAYLOR: dict[str, Any] = {"feature_map": "taylor2", "normalize": True, "dim": 16}
_MANY: dict[str, Any] = {**_TAYLOR, "dim": 17, "dim_v": 64}

PROBLEMS: dict[str, Maker] = {
    # whole chunks of whole rows, and what a chunk's end leaves out
    "plain": _make(150, dim_v=64),
    "wide": _make(80, dim=64),
    "plain, shared": _make(70, heads=(2, 1, 1), **_packed(0, 66, 4), backward=False),
    "plain, segments": _make(1300, dim=8, dim_v=8, heads=(1, 1, 2), backward=False),
    "plain, segments, no state": _make(520, dim=8, dim_v=8, state=False, backward=False),
    "plain, apart": _make(70, feature_map="relu", dim=21, dim_v=13, edit=_apart),
    "plain, not finite": _make(70, dim_v=64, edit=_not_finite, backward=False),
    "elu": _make(100, batch=2, **_ELU, decay="token"),
    "elu, no decay": _make(70, **_ELU, backward=False),
    "wide elu": _make(70, **_ELU, decay="token", dim=64),
    "relu": _make(90, feature_map="relu", dim_v=64, decay="head", **_packed(0, 66, 1, 23)),
    "wide relu": _make(20, feature_map="relu", decay="token", dim=64, reverse=True),
    "apart": _make(90, **_ELU, decay="token", dim=21, dim_v=13, edit=_apart),
    "shared": _make(20, **_ELU, decay="token", heads=(4, 2, 1), batch=2, dim=64, dim_v=32),
    "not causal": _make(70, **_ELU, is_causal=False, state=False),
    "segments": _make(560, **_ELU, decay="token", dim=8, dim_v=8),
    "decayed, not finite": _make(70, decay="token", edit=_not_finite, backward=False),
    "delta": _make(130, beta=True, decay="token", feature_map="relu", dim_v=64),
    "delta, packed": _make(90, beta=True, reverse=True, dim=20, dim_v=30, edit=_apart,
                           **_packed(0, 66, 1, 23)),
    "delta, elu": _make(20, beta=True, feature_map="elu", dim=3, dim_v=8, edit=_gently, few=2),
    "delta, shared": _make(20, beta=True, heads=(4, 2, 1), dim=8, dim_v=64),
    "delta, wide": _make(20, beta=True, dim=100, dim_v=8, heads=(1, 1, 2), decay="token"),
    "delta, not finite": _make(70, beta=True, edit=_not_finite, backward=False),
    "delta, gradients not finite": _make(70, beta=True, dout=torch.inf),
    "delta, blocks": _make(70, beta=True, window_size=30, state=False, heads=(1, 1, 2), dim=8,
                           dim_v=8),
    "Taylor, blocks": _make(70, **_TAYLOR, dim_v=8, window_size=40, state=False),
    "Taylor, many entries in blocks": _make(40, **_MANY, window_size=30, state=False),
    # 14 tokens in the last chunk: its whole rows are stored in two goes, each half of the columns
    "Taylor": _make(142, **_TAYLOR, dim_v=64),
    "Taylor, decayed": _make(70, **_TAYLOR, decay="token", dim_v=13),
    "Taylor, decayed, packed": _make(70, feature_map="taylor2", dim=16, dim_v=63, decay="token",
                                     reverse=True, edit=_apart, heads=(2, 1, 1),
                                     **_packed(0, 66, 4)),
    "Taylor, decayed, segments": _make(520, **{**_TAYLOR, "dim": 4}, dim_v=8, decay="token",
                                       backward=False),
    "Taylor, decayed, shared": _make(20, **_TAYLOR, dim_v=8, decay="token", heads=(1, 1, 2)),
    "Taylor, decayed, not finite": _make(70, **_TAYLOR, decay="token", edit=_not_finite,
                                         backward=False),
    "Taylor, few entries": _make(70, **{**_TAYLOR, "dim": 5}, dim_v=64, heads=(4, 2, 1),
                                 edit=_apart),
    "Taylor, not normalised": _make(70, feature_map="taylor2", dim=16, dim_v=63, reverse=True,
                                    edit=_apart, **_packed(0, 66, 4)),
    "Taylor, a scale that rounds": _make(70, **{**_TAYLOR, "dim": 12}, dim_v=8, backward=False),
    "Taylor, shared": _make(20, feature_map="taylor2", dim=16, dim_v=8, heads=(1, 1, 2)),
    "Taylor, segments": _make(520, **{**_TAYLOR, "dim": 4}, dim_v=8, backward=False),
    "Taylor, not finite": _make(70, **_TAYLOR, edit=_not_finite, backward=False),
    "Taylor, not causal": _make(70, **_TAYLOR, is_causal=False),
    "Taylor, many entries": _make(140, **{**_MANY, "dim_v": 48}, decay="token"),
    "Taylor, many entries apart": _make(20, **{**_MANY, "dim": 33, "dim_v": 9}, edit=_apart,
                                        heads=(2, 1, 1)),
    "Taylor, more entries": _make(66, feature_map="taylor2", dim=64, dim_v=64, decay="token",
                                  edit=_constant, **_packed(0, 64, 2)),
    "Taylor, many entries in segments": _make(520, **_MANY, heads=(1, 1, 2), backward=False),
    "Taylor, many entries, not finite": _make(70, **_MANY, edit=_not_finite, backward=False),
}  # fmt: skip

REASONS: tuple[Reason, ...] = (
    Reason(
        "four at once, or one by one: a chunk has 4 of them, and 2 in fp32",
        "sum += meetings[i];",
        "decay_gradient",
    ),
    Reason("gradients of outputs have rows for all heads", "group > 1 ? h /", "delta_back"),
    Reason("the same loop's first number", "mov.u32", "decay_gradient"),
    Reason("Taylor features have their scale inside", "x *= of_state;", "taylor"),
    Reason("there are two segments or more", "s < p.segments; ++s) {", "combine"),
    Reason("there are 1, 2 or 4 of them", "mine += double(of_query[", "decay_gradient"),
    Reason("for numbers of more than 32 bits, which the compiler's code asks for first", "div.s64"),
    Reason("for numbers of more than 32 bits, which the compiler's code asks for first", "rem.s64"),
)
