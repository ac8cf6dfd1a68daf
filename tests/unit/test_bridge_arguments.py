"""What a bridge refuses before it needs any other rank."""

import pytest
import torch.distributed as dist

import mimo_ext
from mimo_ext._agreement import require_cpu_backend


def test_needs_torch_distributed():
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match=r"torch.distributed is not initialized$"):
        mimo_ext.Bridge(mimo_ext.Layout([0], name="images"), mimo_ext.Layout([1], name="language"))


def test_a_group_without_cpu_tensors_is_refused():
    class NcclOnly:
        def _get_backend(self, device):
            raise RuntimeError(f"No backend type associated with device type {device}")

    with pytest.raises(RuntimeError, match=r"expected a process group that takes CPU tensors.*cpu:gloo,cuda:nccl"):
        require_cpu_backend("images -> language", NcclOnly())
