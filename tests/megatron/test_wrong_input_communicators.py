"""What one rank alone gives the communicators that is wrong: refused there by name, and no other rank waits for it.

Real gloo ranks. `CONSTRUCTION`: each kind is given by one rank; the others' error names it, at once. `OPERATIONS`: calls
on a communicator that works; nothing is sent, and it goes on working. Then: a training loop that one rank leaves.
"""

# ruff: noqa: E501 - the tables have a line for each kind
from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import launch
from pipeline_model import grid

from mimo_ext.megatron.communicator import BridgeCommunicator, MultiModulePipelineCommunicator

WORLD_SIZE = 4  # two encoders on rank 0, the language model's two lanes on ranks 1 and 2; rank 3 is in no module
TIMEOUT = timedelta(seconds=30)
AT_ONCE_S = 5.0  # far less than any timeout: nobody waits for the one that refuses
TOPOLOGY = {"images": ["language"], "audio": ["language"], "language": []}
DIMS = {"images": 2, "audio": 2}


def grids(**changed: Any) -> dict[str, Any]:
    return {"images": grid(0, dp=1), "audio": grid(0, dp=1), "language": grid(1, dp=2), **changed}


def odd(**changes: Any) -> SimpleNamespace:
    """A grid of two ranks, but for what is changed."""
    return SimpleNamespace(**{"rank_offset": 1, "size": 2, "shape": [2], "dim_names": ["dp"], **changes})


def pipeline(**arguments: Any) -> MultiModulePipelineCommunicator:
    given = {
        "module_to_grid_map": grids(),
        "topology": TOPOLOGY,
        "config": SimpleNamespace(pipeline_dtype=torch.float32),
        "dim_mapping": {"s": 0, "b": 1, "h": 2},
        "module_output_ndim": DIMS,
        "timeout": TIMEOUT,
    }
    return MultiModulePipelineCommunicator(**{**given, **arguments})


def edge(**arguments: Any) -> BridgeCommunicator:
    given = {
        "src_grid": grid(0, dp=1),
        "dest_grid": grid(1, dp=2),
        "src_module_name": "images",
        "dest_module_name": "language",
        "timeout": TIMEOUT,
    }
    return BridgeCommunicator(**{**given, **arguments})


@dataclass(frozen=True)
class Wrong:
    """One kind of wrong arguments of a constructor, and what its message must hold besides the rank."""

    kind: str
    make: Callable[..., Any]
    arguments: dict[str, Any]
    error: type[Exception]
    pieces: tuple[str, ...]


def wrong(kind: str, error: type[Exception], *pieces: str, make: Any = pipeline, **arguments: Any) -> Wrong:
    return Wrong(kind, make, arguments, error, pieces)


CONSTRUCTION = [
    wrong("a topology that is a list", TypeError, "topology: expected a dict", "got ['images'] (list)", topology=["images"]),
    wrong("a module downstream by name", TypeError, "topology: module images: expected a list of modules, got 'language'", topology={**TOPOLOGY, "images": "language"}),
    wrong("a module downstream twice", ValueError, "topology: module images lists language twice", topology={**TOPOLOGY, "images": ["language"] * 2}),
    wrong("an unknown module downstream", ValueError, "topology: expected modules among ['audio', 'images', 'language'], got 'text'", topology={**TOPOLOGY, "images": ["text"]}),
    wrong("a module without downstream", ValueError, "topology and grids differ: expected entries for ['audio', 'images', 'language'], got ['images', 'language']", topology={"images": ["language"], "language": []}),
    wrong("a cycle", ValueError, "cycle: ", topology={**TOPOLOGY, "language": ["images"]}),
    wrong("grids in a list", TypeError, "module_to_grid_map: expected a dict", module_to_grid_map=[grid(0, dp=1)]),
    wrong("no module", ValueError, "module_to_grid_map: expected at least one module, got none", module_to_grid_map={}, topology={}),
    wrong("a grid that is None", TypeError, "module language: expected a grid, got NoneType without rank_offset, size, shape, dim_names", module_to_grid_map=grids(language=None)),
    wrong("a grid without a shape", TypeError, "module language: expected a grid, got SimpleNamespace without shape, dim_names", module_to_grid_map=grids(language=SimpleNamespace(rank_offset=1, size=2))),
    wrong("a grid of half ranks", TypeError, "module language: expected a grid of whole numbers", "shape=[1.5]", module_to_grid_map=grids(language=odd(shape=[1.5]))),
    wrong("a grid of another size than its shape", ValueError, "module language: expected a size of 2 for shape (2,), got 3", module_to_grid_map=grids(language=odd(size=3))),
    wrong("a grid before the first rank", ValueError, "module language: expected a rank_offset of 0 or more, got -1", module_to_grid_map=grids(language=odd(rank_offset=-1))),
    wrong("a grid with a dim twice", ValueError, "module language: expected one positive size per distinct dim", module_to_grid_map=grids(language=odd(shape=[2, 1], dim_names=["dp", "dp"]))),
    wrong("a grid beyond the world", ValueError, "module language: expected ranks below the world size 4, got [1, 9)", module_to_grid_map=grids(language=grid(1, dp=8))),
    wrong("a dim that no bridge knows", ValueError, "module 'language': unknown dim 'usp' of size 2", module_to_grid_map=grids(language=grid(1, usp=2))),
    wrong("pipelines on common ranks", ValueError, "images (ranks [0, 2)) and language (ranks [1, 3)) overlap", "got 2 and 1", module_to_grid_map=grids(images=grid(0, pp=2), audio=grid(3, dp=1))),
    wrong("axes in a list", TypeError, "dim_mapping: expected a dict", "got [0, 1, 2] (list)", dim_mapping=[0, 1, 2]),
    wrong("one axis twice", ValueError, "dim_mapping: expected 's', 'b' and 'h' on the axes 0, 1 and 2", "got {'s': 0, 'b': 0, 'h': 2}", dim_mapping={"s": 0, "b": 0, "h": 2}),
    wrong("axes by name", ValueError, "dim_mapping: expected 's', 'b' and 'h' on the axes", "'b': 'second'", dim_mapping={"s": 0, "b": "second", "h": 2}),
    wrong("outputs of four dimensions", ValueError, "module_output_ndim: expected 2 or 3 for module images, got 4", module_output_ndim={"images": 4}),
    wrong("dimensions of an unknown module", ValueError, "module_output_ndim: expected modules among ['audio', 'images', 'language'], got 'image'", module_output_ndim={"image": 2}),
    wrong("dimensions in a list", TypeError, "module_output_ndim: expected a dict", "got [2, 2] (list)", module_output_ndim=[2, 2]),
    wrong("no config", TypeError, "config.pipeline_dtype: expected a torch.dtype, got None", config=None),
    wrong("a dtype by name", TypeError, "config.pipeline_dtype: expected a torch.dtype, got 'bfloat16'", config=SimpleNamespace(pipeline_dtype="bfloat16")),
    wrong("no device", TypeError, "device: expected a torch.device or the name of one, got 'kitchen'", device="kitchen"),
    wrong("seconds as a timeout", TypeError, "timeout: expected a datetime.timedelta, got 30 (int)", timeout=30),
    wrong("no time at all", ValueError, "timeout must be positive (1 ms or more), got 0:00:00", timeout=timedelta(0)),
    wrong("an unknown path", ValueError, "path: expected one of auto, pipelined, direct, leader, got 'fast'", path="fast"),
    wrong("links by name", TypeError, "links: expected mimo_ext.planning.links.Links, got 'nvlink'", links="nvlink"),
    wrong("a model that counts no rows", TypeError, "expected a model with row_counts (mimo_ext.megatron.model.MimoModel), got Linear", model=torch.nn.Linear(1, 1)),
    wrong("shards by name", TypeError, "sharded_delivery: expected True, False or None, got 'yes'", sharded_delivery="yes"),
    wrong("shards without a model", ValueError, "sharded_delivery=True: expected a model that delivers in shards", "got none", sharded_delivery=True),
    wrong("an edge of four dimensions", ValueError, "tensor_ndim: expected 2 or 3, got 4", make=edge, tensor_ndim=4),
    wrong("an edge with axes in a list", TypeError, "dim_mapping: expected a dict", make=edge, dim_mapping=[0, 1, 2]),
    wrong("an edge with a dtype by name", TypeError, "comm_dtype: expected a torch.dtype, got 'float32'", make=edge, comm_dtype="float32"),
    wrong("an edge from no grid", TypeError, "module images: expected a grid, got NoneType without rank_offset", make=edge, src_grid=None),
    wrong("an edge to half a grid", TypeError, "module language: expected a grid of whole numbers", make=edge, dest_grid=odd(shape=[1.5])),
    wrong("an edge to ranks beyond the world", ValueError, "expected ranks of the process group (4 ranks), got [4, 5]", make=edge, dest_grid=grid(4, dp=2)),
    wrong("an edge on no device", TypeError, "device: expected a torch.device or the name of one, got 'kitchen'", make=edge, device="kitchen"),
    wrong("an edge with nothing in flight", ValueError, "max_in_flight must be positive, got 0", make=edge, max_in_flight=0),
]  # fmt: skip


def constructions(rank: int, world_size: int) -> list[tuple[str, str, float]]:
    outcomes = []
    for index, kind in enumerate(CONSTRUCTION):
        begin = time.monotonic()
        try:
            kind.make(**(kind.arguments if rank == index % world_size else {}))
            outcomes.append(("nothing", "", 0.0))
        except Exception as error:
            outcomes.append((type(error).__name__, str(error), time.monotonic() - begin))
    with pipeline() as communicator:  # and nobody is out of step
        exchange(communicator, rank)
    return outcomes


def outputs(seed: float) -> dict[str, torch.Tensor]:
    return {"images": torch.arange(12.0).view(4, 3) + seed, "audio": torch.arange(8.0).view(2, 4) - seed}


def begin(communicator: MultiModulePipelineCommunicator, rank: int, seed: float) -> dict[str, torch.Tensor]:
    """Activations, every value compared."""
    if rank == 0:
        communicator.send_forward(outputs(seed))
    if rank not in (1, 2):
        return {}
    inputs = communicator.recv_forward([()])
    for name, sent in outputs(seed).items():
        assert torch.equal(inputs[name].detach(), sent.chunk(2)[rank - 1]), name
    return inputs


def end(communicator: MultiModulePipelineCommunicator, rank: int, seed: float, inputs: dict[str, torch.Tensor]) -> None:
    """Their gradients."""
    if inputs:
        communicator.send_backward({name: 3 * x.detach() for name, x in inputs.items()})
    if rank == 0:
        for name, gradient in communicator.recv_backward([()]).items():
            assert torch.equal(gradient, 3 * outputs(seed)[name]), name  # type: ignore[arg-type]


def exchange(communicator: MultiModulePipelineCommunicator, rank: int, seed: float = 1.0) -> None:
    end(communicator, rank, seed, begin(communicator, rank, seed))


@pytest.fixture(scope="module")
def refused_at_construction() -> list[list[tuple[str, str, float]]]:
    return launch(constructions, WORLD_SIZE)


@pytest.mark.parametrize("index", range(len(CONSTRUCTION)), ids=[kind.kind for kind in CONSTRUCTION])
def test_the_constructor_refuses_and_all_hear_of_it(
    index: int, refused_at_construction: list[list[tuple[str, str, float]]]
) -> None:
    kind, refuses = CONSTRUCTION[index], index % WORLD_SIZE
    for rank, outcomes in enumerate(refused_at_construction):
        error, text, seconds = outcomes[index]
        assert seconds < AT_ONCE_S, text
        assert f"rank {rank}: " in text
        for piece in kind.pieces:
            assert piece in text or piece.replace("'", "\\'") in text, text  # others may quote it
        if rank == refuses:
            assert error == kind.error.__name__, text
            continue
        assert error == "ValueError", text
        named = f"rank {refuses} refused its arguments (1 rank(s) in all): ", rf"\(rank {refuses}\) .?refused: "
        assert named[0] in text or re.search(named[1], text), text


# --- Operations


@dataclass(frozen=True)
class Refused:
    """A call that is refused on the ranks `on` while a microbatch waits for its gradients."""

    kind: str
    on: tuple[int, ...]
    call: Callable[[MultiModulePipelineCommunicator, dict[str, torch.Tensor]], Any]
    error: type[Exception]
    pieces: tuple[str, ...]


def sends(kind: str, error: type[Exception], *pieces: str, given: Callable[[], Any], both: bool = False, **options: Any) -> Refused:  # fmt: skip
    def call(communicator: MultiModulePipelineCommunicator, _: Any) -> None:
        if both:
            communicator.send_forward_recv_backward(given(), [()], **options)
        else:
            communicator.send_forward(given(), **options)

    return Refused(kind, (0,), call, error, pieces)


def returns(kind: str, error: type[Exception], *pieces: str, given: Callable[[dict[str, torch.Tensor]], Any], both: bool = False) -> Refused:  # fmt: skip
    def call(communicator: MultiModulePipelineCommunicator, inputs: dict[str, torch.Tensor]) -> None:
        gradients = given({name: x.detach().clone() for name, x in inputs.items()})
        if both:
            communicator.send_backward_recv_forward(gradients, [()])
        else:
            communicator.send_backward(gradients)

    return Refused(kind, (1, 2), call, error, pieces)


def changed(**given: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {**outputs(0.0), **given}


def marked(rows: Any) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        found = outputs(0.0)
        found["images"]._mimo_bridge_split_sizes = rows  # type: ignore[attr-defined]
        return found

    return make


IMAGES, AUDIO = "rank 0, module images: ", ", module audio: "
OPERATIONS = [
    sends("an output of another name", ValueError, "rank 0, module images: expected output_dict with keys ['audio', 'images'], got ['image']", given=lambda: {"image": torch.ones(4, 3)}),
    sends("an output that is no dict", TypeError, "expected output_dict as a dict with keys ['audio', 'images'], got Tensor", given=lambda: torch.ones(4, 3)),
    sends("no output", TypeError, IMAGES + "expected an output tensor, got NoneType", given=changed(images=None)),
    sends("two outputs of one module", ValueError, IMAGES + "expected one tensor per module, got a list of 2", given=changed(images=[torch.ones(4, 3)] * 2)),
    sends("an output of three axes", ValueError, IMAGES + "expected an output of 2 dimensions (module_output_ndim), got shape (1, 4, 3)", given=changed(images=torch.ones(1, 4, 3))),
    sends("an output of another dtype, after a good one", TypeError, "rank 0, module audio: expected an output of torch.float32 (config.pipeline_dtype), got torch.float64", given=changed(audio=torch.ones(2, 4).double())),
    sends("an output on another device", ValueError, IMAGES + "expected an output on cpu, got one on meta", given=changed(images=torch.ones(4, 3, device="meta"))),
    sends("an odd number of rows for two lanes", ValueError, IMAGES + "expected rows that split evenly into 2 parts", "got an output of shape (3, 3)", given=changed(images=torch.ones(3, 3))),
    sends("row counts in a list", TypeError, "rank 0: expected row_counts as a dict, got list", given=changed(), row_counts=[1, 3]),
    sends("row counts of another module", ValueError, "rank 0: expected row_counts with keys of ['audio', 'images'], got ['image']", given=changed(), row_counts={"image": [1, 3]}),
    sends("half rows", TypeError, IMAGES + "row_counts: expected a list of ints, got [1.5, 2.5]", given=changed(), row_counts={"images": [1.5, 2.5]}),
    sends("a number as row counts", TypeError, IMAGES + "row_counts: expected a list of ints, got 4", given=changed(), row_counts={"images": 4}),
    sends("row counts of fewer rows", ValueError, IMAGES + "expected 3 rows (rows per sample [1, 2]), got an output of shape (4, 3)", given=changed(), row_counts={"images": [1, 2]}),
    sends("negative row counts", ValueError, IMAGES + "expected rows per sample of 0 or more, got [5, -1]", given=changed(), row_counts={"images": [5, -1]}),
    sends("row counts against the output's own", ValueError, IMAGES + "expected rows per sample [1, 3] (row_counts), got an output marked [2, 2]", given=marked([2, 2]), row_counts={"images": [1, 3]}),
    sends("an output that is marked with text", TypeError, IMAGES + "_mimo_bridge_split_sizes: expected a list of ints, got 'even'", given=marked("even")),
    sends("the same with its gradient", TypeError, IMAGES + "expected an output of torch.float32", given=changed(images=torch.ones(4, 3).double()), both=True),
    returns("a gradient of another name", ValueError, ", module images: expected grad_dict with keys ['audio', 'images'], got ['audio', 'image']", given=lambda x: {"image": x["images"], "audio": x["audio"]}),
    returns("a gradient that is no dict", TypeError, "expected grad_dict as a dict with keys ['audio', 'images'], got Tensor", given=lambda x: x["images"]),
    returns("a gradient that is a number", TypeError, AUDIO + "expected a gradient or None, got float", given=lambda x: {**x, "audio": 1.0}),
    returns("a gradient of another dtype, after a good one", TypeError, ", module images: expected a gradient of torch.float32 (config.pipeline_dtype), got torch.float64", given=lambda x: {**x, "images": x["images"].double()}),
    returns("a gradient of another shape, after a good one", ValueError, ", module images: expected a gradient of its input's shape (2, 3), got (1, 5)", given=lambda x: {**x, "images": torch.ones(1, 5)}),
    returns("a gradient on another device", ValueError, AUDIO + "expected a gradient on cpu, got one on meta", given=lambda x: {**x, "audio": x["audio"].to("meta")}),
    returns("the same with the next activation", ValueError, AUDIO + "expected a gradient of its input's shape (1, 4), got (4, 1)", given=lambda x: {**x, "audio": x["audio"].T}, both=True),
    Refused("a model that counts no rows", (0, 1, 2, 3), lambda c, _: c.bind(torch.nn.Linear(1, 1)), TypeError, ("expected a model with row_counts", "got Linear")),
    Refused("the stage of a rank without a module", (3,), lambda c, _: c.current_stage, ValueError, ("rank 3 is in no module: expected it in one of ", "'language': '[1, 3)'")),
    Refused("stages up to an unknown module", (0, 3), lambda c, _: c.compute_total_pipeline_stages(c.topology, c.module_to_grid_map, 0, "text"), ValueError, ("expected one of the modules ['audio', 'images', 'language'], got 'text'",)),
    Refused("microbatches by name", (0, 1), lambda c, _: c.overlap("all").__enter__(), ValueError, ("num_microbatches: expected an integer of 0 or more, got 'all'",)),
    Refused("a trace that was not begun", (0, 1, 2), lambda c, _: c.finish_trace(), RuntimeError, ("finish_trace without start_trace",)),
    Refused("the leaders' path", (0,), lambda c, _: c.bridge_comms[0]._communicate_shapes(), NotImplementedError, ("leader ranks does not exist here",)),
    Refused("an edge's receive where it sends", (0,), lambda c, _: c.bridge_comms[0].recv_forward(), ValueError, ("bridge 'audio -> language', rank 0: recv_forward: expected a rank of the destination grid, [1, 3), got rank 0",)),
    Refused("an edge's send from outside", (3,), lambda c, _: c.bridge_comms[0].send_forward(torch.ones(2, 4)), ValueError, ("bridge 'audio -> language', rank 3: send_forward: expected a rank of the source grid, [0, 1), got rank 3",)),
    Refused("an edge's half rows", (0,), lambda c, _: c.bridge_comms[0].send_forward(torch.ones(2, 4), row_counts=[0.5, 1.5]), TypeError, ("bridge 'audio -> language', rank 0: send_forward: row_counts: expected a list of ints, got [0.5, 1.5]",)),
]  # fmt: skip


def moved(communicator: MultiModulePipelineCommunicator) -> list[Any]:
    return [
        counters[key]
        for link in communicator.telemetry().values()
        for counters in link.values()
        for key in ("sends", "receives", "bytes_sent", "bytes_received")
    ]


def operations(rank: int, world_size: int) -> list[tuple[str, str] | None]:
    outcomes: list[tuple[str, str] | None] = []
    with pipeline() as communicator:
        inputs = begin(communicator, rank, 2.0)
        before = moved(communicator)
        for case in OPERATIONS:
            if rank not in case.on:
                outcomes.append(None)
                continue
            try:
                case.call(communicator, inputs)
                outcomes.append(("nothing", ""))
            except Exception as error:
                outcomes.append((type(error).__name__, str(error)))
            assert moved(communicator) == before, case.kind
        # Nothing of what was refused is in the way.
        end(communicator, rank, 2.0, inputs)
        exchange(communicator, rank, 5.0)
    with pytest.raises(RuntimeError, match=f"rank {rank}: recv_forward on a closed MultiModulePipelineCommunicator"):
        communicator.recv_forward([()])
    return outcomes


@pytest.fixture(scope="module")
def refused_in_operation() -> list[list[tuple[str, str] | None]]:
    return launch(operations, WORLD_SIZE)


@pytest.mark.parametrize("index", range(len(OPERATIONS)), ids=[case.kind for case in OPERATIONS])
def test_an_operation_refuses_and_sends_nothing(
    index: int, refused_in_operation: list[list[tuple[str, str] | None]]
) -> None:
    case = OPERATIONS[index]
    for rank, outcomes in enumerate(refused_in_operation):
        found = outcomes[index]
        assert (found is not None) == (rank in case.on)
        if found is None:
            continue
        error, text = found
        assert error == case.error.__name__, text
        for piece in case.pieces:
            assert piece in text, text
        if case.kind.startswith(("a gradient", "an output", "half", "no output")):
            assert f"rank {rank}, module " in text, text


def test_the_tables_have_at_least_twenty_five_kinds() -> None:
    kinds = [kind.kind for kind in CONSTRUCTION] + [case.kind for case in OPERATIONS]
    assert len(set(kinds)) >= 25
    assert len({kind.kind for kind in CONSTRUCTION}) == len(CONSTRUCTION)
    assert len({case.kind for case in OPERATIONS}) == len(OPERATIONS)


# --- A training loop


def train(rank: int, world_size: int, wrong: int) -> tuple[str, str, float]:
    """Microbatches, until all are stopped: in the second one rank `wrong` hands in what is refused."""
    found, start = ("nothing", "", 0.0), time.monotonic()
    try:
        with pipeline() as communicator:
            for step in range(8):
                bad = rank == wrong and step == 1
                if rank == 0:
                    given = outputs(step)
                    communicator.send_forward({**given, "images": given["images"].double()} if bad else given)
                    communicator.recv_backward([()])
                elif rank < 3:
                    gradients = {name: x.detach() for name, x in communicator.recv_forward([()]).items()}
                    communicator.send_backward({**gradients, "audio": torch.ones(1, 9)} if bad else gradients)
    except (RuntimeError, TypeError, ValueError) as error:
        found = type(error).__name__, str(error), time.monotonic() - start
    dist.barrier()  # all are still here: it is no process that has ended
    return found


@pytest.mark.parametrize("wrong", [0, 2])
def test_all_ranks_of_a_schedule_hear_who_refused_and_why(wrong: int) -> None:
    found = launch(train, WORLD_SIZE, wrong)
    kind, reason, _ = found[wrong]
    expected = {0: ("TypeError", "module images: expected an output of torch.float32"), 2: ("ValueError", "module audio: expected a gradient of its input's shape (1, 4), got (1, 9)")}  # fmt: skip
    assert kind == expected[wrong][0]
    assert expected[wrong][1] in reason
    assert found[3] == ("nothing", "", 0.0)  # in no module
    for rank, (kind, text, seconds) in enumerate(found[:3]):
        if rank != wrong:
            assert kind == "BridgeError", text
            assert f"rank {wrong} gave up: {expected[wrong][0]}: rank {wrong}, " in text, text
            assert seconds < found[wrong][2] + AT_ONCE_S, text
