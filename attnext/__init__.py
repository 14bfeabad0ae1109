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
    from . import _C
except ImportError as error:
    raise ImportError(
        f"attnext's compiled module could not be imported from {__path__[0]} ({error}); "
        "in a source tree, build it in place with: pip install -e ."
    ) from error

from .based import (  # noqa: E402
    BasedAttention,
    BasedCache,
    based_attention,
    based_attention_step,
)
from .based_block import BasedBlock, GatedConvolution, SlidingWindowAttention  # noqa: E402
from .functional import (  # noqa: E402
    merge_attentions,
    na1d,
    na2d,
    na3d,
    neighborhood_attention,
    sliding_window_attention,
    window_attention,
)
from .linear import (  # noqa: E402
    linear_attention,
    linear_attention_step,
    taylor_state_from_plain,
    taylor_state_to_plain,
)
from .rotary import rotary_embedding  # noqa: E402
from .spiking import SpikingAttention, lif_spikes, spiking_attention  # noqa: E402
from .window_cache import WindowCache  # noqa: E402

__version__: str = _C.__version__

__all__ = [
    "BasedAttention",
    "BasedBlock",
    "BasedCache",
    "GatedConvolution",
    "SlidingWindowAttention",
    "SpikingAttention",
    "WindowCache",
    "based_attention",
    "based_attention_step",
    "lif_spikes",
    "linear_attention",
    "linear_attention_step",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention",
    "rotary_embedding",
    "sliding_window_attention",
    "spiking_attention",
    "taylor_state_from_plain",
    "taylor_state_to_plain",
    "window_attention",
]
