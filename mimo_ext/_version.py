"""What a rank tells the others of itself: ranks that run different code would plan different messages."""

from __future__ import annotations

import functools

import torch

from ._arguments import digest_of
from ._extension import _C

__version__ = "0.1.0"


def library_text() -> str:
    """Equal on ranks that may work together: this package, its messages, its plans, and torch."""
    return f"mimo_ext={__version__} wire={_C.WIRE_VERSION} planner={_planner()} torch={torch.__version__.split('+')[0]}"


@functools.cache
def _planner() -> str:
    """Sixteen digits that another planner would not have: the messages of two plans that use all of its parts."""
    sharded = _C.Layout(list(range(4, 8)), [("tp", 2), ("cp", 2)], "zigzag", True, "destination").boundary(0)
    flat = _C.Layout(list(range(3)), [("dp", 3)], "replicated", False, "source").boundary(0)
    copies = _C.Layout(list(range(2, 6)), [("tp", 2), ("dp", 2)], "replicated", False, "destination").boundary(0)
    dense = _C.Microbatch(ndim=3, batch_dim=1, seq_dim=0, samples=6, shape=[16, 1, 4], element_size=4)
    ragged = _C.Microbatch(ndim=2, batch_dim=0, seq_dim=0, samples=6, shape=[1, 8], rows=[9, 1, 0, 8, 7, 2])
    digits = 0
    for destination, microbatch in ((sharded, dense), (copies, ragged)):
        for path in ("pipelined", "direct", "leader", "auto"):
            plan = _C.Plan(flat, destination, microbatch, max_chunks=3, min_chunk_bytes=8, path=path)
            for text in (plan.to_string(4096), plan.reversed().to_string(4096)):
                digits = digits * 31 + digest_of(text)
    return f"{digits % 2**64:016x}"
