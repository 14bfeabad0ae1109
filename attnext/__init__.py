# SPDX-License-Identifier: Apache-2.0
"""Attention for long sequences, images, volumes and videos: fused kernels for PyTorch."""

# torch first: the binary then shares torch's own OpenMP runtime.
try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(
        "attnext needs PyTorch 2.6 or newer, and no torch is installed: pip install torch"
    ) from None

_TORCH_VERSION = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
if _TORCH_VERSION < (2, 6):
    raise ImportError(f"attnext needs PyTorch 2.6 or newer; found {torch.__version__}")

try:
    import attnext._C as _C
except ImportError as error:
    raise ImportError(
        f"attnext's compiled module could not be imported from {__path__[0]} ({error}); "
        "in a source tree, build it in place with: pip install -e ."
    ) from error

from . import compat as compat  # noqa: E402
from .based import (  # noqa: E402
    BasedAttention,
    BasedCache,
    based_attention,
    based_attention_step,
)
from .based_block import BasedBlock, GatedConvolution, SlidingWindowAttention  # noqa: E402
from .functional import (  # noqa: E402
    na1d,
    na2d,
    na3d,
    neighborhood_attention,
    sliding_window_attention,
    window_attention,
)
from .kv_cache import KVCache, LazyEvictionCache, StreamingCache, lazy_scores  # noqa: E402
from .landmark import landmark_attention  # noqa: E402
from .linear import (  # noqa: E402
    linear_attention,
    linear_attention_step,
    taylor_state_from_plain,
    taylor_state_to_plain,
)
from .merging import merge, merge_attentions  # noqa: E402
from .plans import BlockPlan, Blocks  # noqa: E402
from .pooling import Windows, block_pool, packed_blocks  # noqa: E402
from .rotary import rotary_embedding  # noqa: E402
from .routed import routed_attention  # noqa: E402
from .routers.biformer import (  # noqa: E402
    BiLevelRoutingAttention,
    bilevel_routing_attention,
)
from .routers.block_sparse import pooled_topk_plan  # noqa: E402
from .routers.duo import DuoCache, duo_attention, retrieval_scores  # noqa: E402
from .routers.flux import FluxAttention, LayerRouter  # noqa: E402
from .routers.hip import (  # noqa: E402
    InfiniteHipDecoder,
    hip_attention,
    hip_plan,
    infinite_hip_plan,
)
from .routers.longheads import longheads_attention, longheads_plan  # noqa: E402
from .routers.minference import minference_attention, minference_plan  # noqa: E402
from .routers.moba import moba_attention, moba_plan  # noqa: E402
from .routers.nsa import NativeSparseAttention, native_sparse_attention  # noqa: E402
from .routers.streaming import streaming_attention  # noqa: E402
from .routers.superlinear import superlinear_attention, superlinear_search  # noqa: E402
from .selection import select_topk  # noqa: E402
from .spiking import SpikingAttention, lif_spikes, spiking_attention  # noqa: E402
from .window_cache import WindowCache  # noqa: E402

__version__: str = _C.__version__

__all__ = [
    "BasedAttention",
    "BasedBlock",
    "BasedCache",
    "BiLevelRoutingAttention",
    "BlockPlan",
    "Blocks",
    "DuoCache",
    "FluxAttention",
    "GatedConvolution",
    "InfiniteHipDecoder",
    "KVCache",
    "LayerRouter",
    "LazyEvictionCache",
    "NativeSparseAttention",
    "SlidingWindowAttention",
    "SpikingAttention",
    "StreamingCache",
    "WindowCache",
    "Windows",
    "based_attention",
    "based_attention_step",
    "bilevel_routing_attention",
    "block_pool",
    "duo_attention",
    "hip_attention",
    "hip_plan",
    "infinite_hip_plan",
    "landmark_attention",
    "lazy_scores",
    "lif_spikes",
    "linear_attention",
    "linear_attention_step",
    "longheads_attention",
    "longheads_plan",
    "merge",
    "merge_attentions",
    "minference_attention",
    "minference_plan",
    "moba_attention",
    "moba_plan",
    "na1d",
    "na2d",
    "na3d",
    "native_sparse_attention",
    "neighborhood_attention",
    "packed_blocks",
    "pooled_topk_plan",
    "retrieval_scores",
    "rotary_embedding",
    "routed_attention",
    "select_topk",
    "sliding_window_attention",
    "spiking_attention",
    "streaming_attention",
    "superlinear_attention",
    "superlinear_search",
    "taylor_state_from_plain",
    "taylor_state_to_plain",
    "window_attention",
]
