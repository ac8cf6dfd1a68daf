"""Which rows of a 2-D tensor each rank of a destination lane takes: `RowShards`, for `row_shards=` of a bridge."""

from __future__ import annotations

from ._extension import _C

RowShards = _C.RowShards
