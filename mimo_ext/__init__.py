"""Bridges between the modules of a multi-modal model that each have their own parallelism.

The root of the package needs torch only; `mimo_ext.megatron` is the layer for Megatron-Core programs.
"""

from ._extension import has_cuda
from .bridge import Bridge, BridgeError, BridgeTimeoutError, Handle, bridge
from .layout import Layout, Plan
from .row_shards import RowShards

__version__ = "0.1.0"

__all__ = [
    "Bridge",
    "BridgeError",
    "BridgeTimeoutError",
    "Handle",
    "Layout",
    "Plan",
    "RowShards",
    "bridge",
    "has_cuda",
]
