"""How the communicator begins on real ranks: one meeting for all of its bridges, few connections, no collective."""

from __future__ import annotations

import re
from collections import Counter
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pipeline_model as pm
import pytest
import torch
import torch.distributed as dist
from launch import launch
from pipeline_model import grid

import mimo_ext
from mimo_ext._agreement import Meeting
from mimo_ext.megatron.communicator import MultiModulePipelineCommunicator

TIMEOUT = timedelta(seconds=30)
# Two encoders on the same ranks, so that their edges share connections; the language model has two stages.
TOPOLOGY = {"images": ["language"], "audio": ["language"], "language": []}


def grids() -> dict[str, Any]:
    return {"images": grid(0, dp=2), "audio": grid(0, dp=2), "language": grid(2, dp=2, pp=2)}


def make(**options: Any) -> MultiModulePipelineCommunicator:
    return MultiModulePipelineCommunicator(
        grids(), TOPOLOGY, SimpleNamespace(pipeline_dtype=torch.float64), pm.AXES, timeout=TIMEOUT, **options
    )


def value(seed: int, rank: int) -> torch.Tensor:
    return torch.arange(6, dtype=torch.float64).reshape(3, 1, 2) + 100 * seed + 10 * rank


def step(communicator: MultiModulePipelineCommunicator, rank: int, seed: int) -> None:
    """One microbatch through all three modules, every value compared."""
    if rank < 2:
        images, audio = value(seed, rank), value(seed + 50, rank)
        grads = communicator.send_forward_recv_backward({"images": images, "audio": audio}, [()])
        both = 4 * (images + audio)
        assert torch.equal(grads["images"], both)  # type: ignore[arg-type]
        assert torch.equal(grads["audio"], 2 * both)  # type: ignore[arg-type]
    elif rank < 4:
        inputs = communicator.recv_forward([()])
        assert torch.equal(inputs["images"], value(seed, rank - 2))
        assert torch.equal(inputs["audio"], value(seed + 50, rank - 2))
        grads = communicator.send_forward_recv_backward({"language": inputs["images"] + inputs["audio"]}, [()])
        communicator.send_backward({"images": grads["language"], "audio": 2 * grads["language"]})  # type: ignore[operator]
    elif rank < 6:
        x = communicator.recv_forward([()])["language"]
        assert torch.equal(x, value(seed, rank - 4) + value(seed + 50, rank - 4))
        communicator.send_backward({"language": 4 * x.detach()})


def meets_once(rank: int, world_size: int) -> None:
    counts: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "all_gather",
            "all_gather_object",
            "all_reduce",
            "barrier",
            "broadcast",
            "new_group",
            "send",
            "recv",
        ):
            patch.setattr(dist, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))
        compare = Meeting.compare

        def counted(self: Meeting, text: str) -> Any:
            counts["meetings"] += 1
            return compare(self, text)

        patch.setattr(Meeting, "compare", counted)
        communicator = make()
    assert counts == {"meetings": 1}
    bridges = [edge.bridge for edge in communicator.bridge_comms] + list(communicator._hops.values())
    held = [bridge._groups for bridge in bridges if bridge._groups is not None]
    # Two edges between the same ranks share, rank by rank; a hop joins one rank with another.
    mine = {0: [(0, 2)] * 2, 1: [(1, 3)] * 2, 2: [(0, 2)] * 2 + [(2, 4)], 3: [(1, 3)] * 2 + [(3, 5)], 4: [(2, 4)]}
    assert [groups.ranks for groups in held] == {**mine, 5: [(3, 5)], 6: []}[rank]
    assert len({groups.forward for groups in held}) == len({groups.ranks for groups in held})
    step(communicator, rank, 0)
    communicator.close()


def test_all_bridges_are_agreed_on_at_once_and_share_connections() -> None:
    launch(meets_once, 7)


def two_at_once(rank: int, world_size: int, folder: str) -> None:
    for world in range(2):
        first, second = make(), make()
        step(first, rank, 1)
        step(second, rank, 2)
        for communicator in (first, second) if rank % 2 else (second, first):
            communicator.close()
        left_open = make()
        step(left_open, rank, 3)
        third = make()
        left_open.close(abort=True)
        step(third, rank, 4)  # what was aborted beside it is not its business
        if world == 0:
            dist.destroy_process_group()
            rendezvous = f"file://{folder}/second"
            dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=TIMEOUT)
    third.close()


def test_communicators_beside_and_after_one_another_do_not_mix(tmp_path: Path) -> None:
    launch(two_at_once, 6, str(tmp_path))


def one_differs(rank: int, world_size: int) -> list[str]:
    texts = []
    with pytest.raises(RuntimeError) as caught:
        make(module_output_ndim={"audio": 2} if rank == 4 else None)
    texts.append(str(caught.value))
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:  # something that the communicator does not see
            patch.setattr(mimo_ext._version, "__version__", "0.0.7")
        with pytest.raises(RuntimeError) as caught:
            make()
    texts.append(str(caught.value))
    with pytest.raises(NotImplementedError if rank == 0 else ValueError, match="device 'meta'") as refused:
        make(device="meta" if rank == 0 else None)
    texts.append(str(refused.value))
    communicator = make()
    step(communicator, rank, 5)
    communicator.close()
    return texts


def test_what_one_rank_has_otherwise_is_told_to_all() -> None:
    for rank, (ndim, version, refused) in enumerate(launch(one_differs, 6)):
        head = f"rank {rank}: the ranks were given different models:\n  rank(s) "
        assert ndim == head + "4: module_output_ndim.audio: expected 3, got 2"
        assert version.startswith(head + "1: bridges.0: expected audio -> language: ")
        assert re.search(r"got .*mimo_ext=0\.0\.7 ", version)
        assert "device 'meta' is not supported" in refused
        assert (f"rank {rank}: rank 0 refused its arguments (1 rank(s) in all): bridge" in refused) == (rank > 0)
