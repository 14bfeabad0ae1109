# SPDX-License-Identifier: Apache-2.0
"""attnext itself, through its public functions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import attnext

from ..cases import LinearCase, LinearStepCase, RoutedCase, RouterCase
from ..problem import AS_IS, Prepared, Problem, leaves_of
from ..routers import method_of
from .contender import Contender


class Attnext(Contender):
    name = "attnext"
    about = "this library, heads last, no preparation"
    ops = (*Contender.ops, "linear", "linear-step", "routed", "router")

    def prepare(self, problem: Problem, training: bool) -> Prepared:
        case = problem.case
        leaves, layouts = leaves_of(problem, training, AS_IS, AS_IS)
        options: dict[str, Any] = {}
        if case.softcap is not None:
            options["softcap"] = case.softcap
        if problem.alibi_slopes is not None:
            options["alibi_slopes"] = problem.alibi_slopes
        if "bias" in leaves:
            options["bias"] = leaves["bias"]
        q, k, v = leaves["query"], leaves["key"], leaves["value"]

        def sliding() -> Tensor:
            window = None if case.window is None else case.window[0]
            return attnext.sliding_window_attention(q, k, v, window, sinks=case.sinks, **options)

        def neighborhood() -> Tensor:
            kernel, dilation = case.window, case.dilation
            assert kernel is not None
            return attnext.neighborhood_attention(q, k, v, kernel, 1, dilation, **options)

        def window() -> Tensor:
            assert case.window is not None
            return attnext.window_attention(q, k, v, case.window, case.shift, **options)

        def linear() -> Tensor:
            assert isinstance(case, LinearCase)
            feature_map, normalize = case.feature_map, case.normalize
            out: Tensor = attnext.linear_attention(
                q, k, v, feature_map=feature_map, normalize=normalize
            )
            return out

        def routed() -> Tensor:
            assert isinstance(case, RoutedCase)
            out: Tensor = attnext.routed_attention(q, k, v, case.plan, is_causal=case.is_causal)
            return out

        if isinstance(case, RouterCase):
            method = method_of(case)
            searching = method.seconds_of_routing(problem.query, problem.key, problem.value)
            detail = f"its search takes {searching * 1e3:.1f} ms" if searching else ""
            return Prepared(lambda: method.whole(q, k, v), leaves, layouts, detail, searching)

        state = problem.state if isinstance(case, LinearStepCase) else None

        def step() -> Tensor:
            assert isinstance(case, LinearCase) and state is not None
            feature_map, normalize = case.feature_map, case.normalize
            out: Tensor = attnext.linear_attention_step(
                q, k, v, state, feature_map=feature_map, normalize=normalize
            )
            return out

        calls = {
            "sliding": sliding,
            "neighborhood": neighborhood,
            "window": window,
            "linear": linear,
            "routed": routed,
            "linear-step": step,
        }
        return Prepared(calls[case.op], leaves, layouts)
