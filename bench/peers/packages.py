# SPDX-License-Identifier: Apache-2.0
"""Packages that users install for local attention; each takes part if it is installed."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from torch import Tensor

from ..cases import Case
from ..problem import AS_IS, Layout, Prepared, Problem, Unavailable, heads_first, leaves_of
from .contender import Contender, fastest


def import_package(module: str, package: str) -> Any:
    """Errors: Unavailable, if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{package} is not installed ({error})") from error


class Natten(Contender):
    """NATTEN's only CPU backend is FlexAttention; it asks for the lse, which compiled
    FlexAttention does not return on the CPU, so the uncompiled form is what there is."""

    name = "natten"
    about = "NATTEN's Flex backend, not compiled (its compiled form does not run on the CPU)"

    def is_meant_for(self, case: Case) -> bool:
        return case.op == "neighborhood"

    def prepare(self, problem: Problem, training: bool) -> Prepared:
        case = problem.case
        natten = import_package("natten", "natten")
        problem.refuse_options("bias", "alibi", "softcap", "sinks")
        if training:
            raise Unavailable("FlexAttention has no backward pass on the CPU")
        # Scores, their mask and their softmax are whole matrices, the latter twice.
        pairs = case.num_queries * case.num_keys
        problem.afford("its scores", case.batch * case.heads * pairs * 4)
        leaves, layouts = leaves_of(problem, training, AS_IS, AS_IS)
        q, k, v = leaves["query"], leaves["key"], leaves["value"]
        function = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[case.rank]

        def call() -> Tensor:
            result: Tensor = function(
                q, k, v, kernel_size=case.window, dilation=case.dilation, backend="flex-fna"
            )
            return result

        return Prepared(call, leaves, layouts)


class LocalAttention(Contender):
    """Blocks of ``w`` queries against their own and ``n`` blocks before; its exact mode keeps
    ``n w`` keys before the query, so a window of W keys is any ``n w = W - 1``."""

    name = "local-attention"
    about = "the local-attention package, exact window, no rotary embedding; blocks by trial"

    def is_meant_for(self, case: Case) -> bool:
        return case.op == "sliding" and case.num_queries > 1

    def prepare(self, problem: Problem, training: bool) -> Prepared:
        case = problem.case
        module = import_package("local_attention.local_attention", "local-attention")
        problem.refuse_options("bias", "alibi", "softcap", "sinks")
        problem.refuse_grouped_heads()
        assert case.window is not None
        before = case.window[0] - 1
        blocks = [w for w in range(16, before + 1) if before % w == 0 and before // w <= 16]
        if not blocks:
            raise Unavailable(f"no block size reaches exactly {before} keys back")
        blocks = sorted(blocks)[-4:]
        pairs = case.num_queries * (before + blocks[-1])
        problem.afford("its scores", case.batch * case.heads * pairs * (3 + 2 * training))

        def variant(w: int) -> Prepared:
            layer = module.LocalAttention(
                window_size=w,
                causal=True,
                look_backward=before // w,
                exact_windowsize=True,
                autopad=True,
                use_rotary_pos_emb=False,
            )
            layout: Layout = heads_first(case.queries)
            leaves, layouts = leaves_of(problem, training, layout, layout)
            q, k, v = leaves["query"], leaves["key"], leaves["value"]
            return Prepared(lambda: layer(q, k, v), leaves, layouts)

        return fastest([(f"blocks of {w}", partial(variant, w)) for w in blocks], problem, training)
