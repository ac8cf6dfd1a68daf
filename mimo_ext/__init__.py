"""Bridges between the modules of a multi-modal model that each have their own parallelism.

The root of the package needs torch only; `mimo_ext.megatron` is the layer for Megatron-Core programs.
"""

from ._differentiable import bridge
from ._extension import has_cuda
from ._setup import Setup
from ._version import __version__
from .bridge import Bridge, BridgeError, BridgeTimeoutError, Handle
from .layout import Layout, Plan
from .row_shards import RowShards

__all__ = [
    "Bridge",
    "BridgeError",
    "BridgeTimeoutError",
    "Handle",
    "Layout",
    "Plan",
    "RowShards",
    "Setup",
    "__version__",
    "bridge",
    "has_cuda",
]
