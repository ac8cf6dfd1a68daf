"""Shared by all levels: the folder of the tests is importable (tests/launch.py), one thread per process, no leaks."""

import sys
from collections.abc import Iterator
from multiprocessing import forkserver, get_context
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
get_context("forkserver").set_forkserver_preload(["torch", "torch.distributed", "mimo_ext"])

from leaks import Level  # noqa: E402

WITH_RANKS = ("distributed", "megatron", "faults", "soak")  # folders of tests that start ranks


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """The tests that start ranks: threads, descriptors, groups and bridges of this process return to their level."""
    if request.path.parent.name not in WITH_RANKS or request.node.get_closest_marker("leaks"):
        yield
        return
    forkserver.ensure_running()  # kept for all tests
    before = Level.now()
    yield
    left = before.growth()
    assert not left, f"left behind: {'; '.join(left)}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the GPU are skipped, with the reason in the report, where they cannot run; they never pass silently."""
    reason = None
    if not torch.cuda.is_available():
        reason = "needs an NVIDIA GPU: torch.cuda.is_available() is False"
    else:
        import mimo_ext

        if not mimo_ext.has_cuda():
            reason = "needs the CUDA kernels: this extension was built without (MIMO_EXT_CUDA)"
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
