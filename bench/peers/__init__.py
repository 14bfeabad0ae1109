# SPDX-License-Identifier: Apache-2.0
"""Who takes part. Each peer is written as its friends would write it; see the files."""

from __future__ import annotations

from ..cases import Case
from .contender import Contender
from .flex import Flex, FlexTiles
from .linear import FastTransformers, TorchChunked, TorchStep
from .naive import Gather
from .own import Attnext
from .packages import LocalAttention, Natten
from .routed import FlexLists, GatherBlocks, SdpaAllBlocks, SdpaMasked
from .sdpa import SdpaDense, SdpaNoWindow
from .swin import SwinRoll
from .tiles import CompiledTiles, SdpaTiles

CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Attnext(),
        SdpaDense(),
        SdpaNoWindow(),
        SdpaTiles(),
        CompiledTiles(),
        SwinRoll(),
        Flex(),
        FlexTiles(),
        Natten(),
        LocalAttention(),
        Gather(),
        TorchChunked(),
        FlexLists(),
        GatherBlocks(),
        SdpaAllBlocks(),
        SdpaMasked(),
        FastTransformers(),
        TorchStep(),
    )
}


def contenders_for(case: Case, names: tuple[str, ...] = ()) -> list[Contender]:
    """The contenders that are meant for a case, all of them or those called ``names``.

    Errors: ValueError for a name that nobody has.
    """
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        raise ValueError(
            f"no contender is called {unknown[0]!r}; there are {', '.join(CONTENDERS)}"
        )
    return [
        contender
        for name, contender in CONTENDERS.items()
        if (not names or name in names)
        and case.op in contender.ops
        and contender.is_meant_for(case)
    ]
