"""What a bridge refuses before it needs any other rank."""

import pytest
import torch.distributed as dist

import mimo_ext


def test_needs_torch_distributed():
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match=r"torch.distributed is not initialized$"):
        mimo_ext.Bridge(mimo_ext.Layout([0], name="images"), mimo_ext.Layout([1], name="language"))
