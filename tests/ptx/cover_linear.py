# SPDX-License-Identifier: Apache-2.0
"""Problems that execute nearly every instruction of the kernels of linear attention, as cover.py
has them for windows, and why the rest is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from linear_problems import assert_close, evaluate, expect, problem
from torch import Tensor

import attnext
from attnext.gpu_check.linear import BUDGET, slack

from .cover import Reason
from .executor import Program, Report
from .linear import on_executor
from .problems import close_to, cut_out, findings
from .source import lone

_call: Any = attnext.linear_attention  # its options come as a mapping


@dataclass(frozen=True)
class Problem:
    """A call of linear attention, with gradients of everything if they are wanted."""

    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    backward: bool = True

    def evaluate(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = evaluate(_call, self.tensors, self.options, self.backward)
        return found

    def is_right(self, results: dict[str, Tensor]) -> bool:
        dtype = self.tensors["query"].dtype
        if not all(x.isfinite().all() for x in self.tensors.values()):
            return close_to(self.evaluate(), results)
        expected = expect(self.tensors, self.options, self.backward)
        more = slack(dtype, bool(self.options.get("normalize")), "beta" in self.tensors)
        try:
            assert_close(results, expected, BUDGET[dtype], more)
        except AssertionError:
            return False
        return True


def run(
    of: Problem, find: Callable[[str], Program] = lone, **options: Any
) -> tuple[set[str], list[Report]]:
    """As problems.run."""
    return findings(on_executor(find=find, **options), of.evaluate, of.is_right)


Maker = Callable[[torch.dtype], Problem]


def _make(
    tokens: int, *, backward: bool = True, edit: Callable[[dict[str, Tensor]], None] | None = None,
    **more: Any,
) -> Maker:  # fmt: skip
    """One head of 32 entries, with a state."""

    def make(dtype: torch.dtype) -> Problem:
        defaults = {"heads": (1, 1, 1), "dim": 32, "dim_v": 32, "state": True, "dtype": dtype}
        tensors, options = problem(tokens, **{**defaults, **more})
        if edit:
            edit(tensors)
        return Problem(tensors, options, backward)

    return make


def _apart(tensors: dict[str, Tensor]) -> None:
    """Rows that do not begin at multiples of 16 bytes."""
    for name in ("query", "key", "value"):
        tensors[name] = cut_out(tensors[name], 5)


def _not_finite(tensors: dict[str, Tensor]) -> None:
    tensors["value"][:, 21, :, 3] = torch.nan
    tensors["value"][:, 40, :, 5] = torch.inf


def _forgotten(tensors: dict[str, Tensor]) -> None:
    tensors["decay"][:, ::7] = -50.0
    tensors["value"][:, :, :, :8] = 0


def _negative(tensors: dict[str, Tensor]) -> None:
    """Sums that are less than 0."""
    tensors["query"][:, ::2] *= -1


PACKED = torch.tensor([0, 0, 66, 67, 90], dtype=torch.int32)
_ELU: dict[str, Any] = {"feature_map": "elu", "normalize": True}
_TAYLOR: dict[str, Any] = {"feature_map": "taylor2", "normalize": True, "dim": 16}
_MANY: dict[str, Any] = {"feature_map": "taylor2", "normalize": True, "dim": 17, "dim_v": 64}

PROBLEMS: dict[str, Maker] = {
    # whole chunks of whole rows, and what a chunk's end leaves out
    "plain": _make(150, dim_v=64),
    "wide": _make(80, dim=64),
    "elu": _make(100, batch=2, **_ELU, decay="token"),
    "relu": _make(90, feature_map="relu", dim_v=21, dim=30, reverse=True),
    "relu, decayed": _make(90, feature_map="relu", dim_v=80, decay="head", cu_seqlens=PACKED,
                           states=4),
    "rows apart": _make(90, **_ELU, decay="token", dim=21, dim_v=13, edit=_apart),
    "plain rows apart": _make(70, dim=21, dim_v=13, edit=_apart),
    "shared": _make(20, **_ELU, decay="token", heads=(4, 2, 1), batch=2, dim=8, dim_v=8),
    "not causal": _make(70, **_ELU, is_causal=False, state=False),
    "segments": _make(560, **_ELU, decay="token", dim=8, dim_v=8),
    "one token": _make(1, **_ELU, decay="token", state=False),
    "not finite": _make(70, edit=_not_finite, backward=False),
    "decayed, not finite": _make(70, decay="token", edit=_not_finite, backward=False),
    "delta": _make(130, beta=True, decay="token", feature_map="elu"),
    "delta, packed": _make(90, beta=True, cu_seqlens=PACKED, states=4, reverse=True,
                           feature_map="relu", dim=20, dim_v=30, edit=_apart),
    "delta, shared": _make(20, beta=True, heads=(1, 1, 3), dim=8, dim_v=64, decay="head"),
    "delta, not finite": _make(70, beta=True, edit=_not_finite, backward=False),
    "Taylor": _make(130, **_TAYLOR, dim_v=64),
    "Taylor, decayed": _make(70, **_TAYLOR, decay="token", dim_v=13, backward=False, edit=_apart),
    "Taylor, few entries": _make(70, **{**_TAYLOR, "dim": 5}, dim_v=8, heads=(2, 1, 1), edit=_apart),
    "Taylor, not normalised": _make(70, feature_map="taylor2", dim=16, dim_v=8, reverse=True),
    "Taylor, not finite": _make(70, **_TAYLOR, edit=_not_finite, backward=False),
    "Taylor, not causal": _make(70, **_TAYLOR, is_causal=False),
    "Taylor, many entries": _make(70, **_MANY),
    "Taylor, many entries apart": _make(70, **{**_MANY, "dim": 33, "dim_v": 9}, decay="token",
                                        edit=_apart, backward=False),
    "Taylor, many entries, not finite": _make(70, **_MANY, edit=_not_finite, backward=False),
}  # fmt: skip

REASONS: tuple[Reason, ...] = ()
