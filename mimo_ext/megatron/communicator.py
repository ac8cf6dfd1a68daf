"""`MultiModulePipelineCommunicator`: Megatron's pipeline schedule across modules, over `mimo_ext.Bridge`.

The class is accepted wherever Megatron's own is (it is a subclass that calls none of its parent's code) and answers
to the same six operations. One bridge per edge of the topology joins the last stage of a module with the first of the
next; the stages inside a module are joined by bridges from rank to same-coordinate rank. No send waits for its peer
and every combined operation sends before it receives, so that encoders of unequal depth cannot block one another.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.multimodule_communicator import (
    MultiModulePipelineCommunicator as _MegatronCommunicator,
)

from mimo_ext import Bridge, Layout
from mimo_ext._setup import Setup
from mimo_ext.megatron.adapters import _prepare_tensor_for_comm, _restore_tensor_from_comm
from mimo_ext.megatron.bridge_communicator import BridgeCommunicator, device_of
from mimo_ext.megatron.hop import Shape, StageCommunicator
from mimo_ext.megatron.pipeline_hooks import PipelineHooks
from mimo_ext.megatron.role import MIMO_LANGUAGE_MODULE_KEY
from mimo_ext.megatron.sharded import delivery_of
from mimo_ext.megatron.stage_io import Input, Output, StageIO
from mimo_ext.megatron.topology import (
    DEFAULT_DIM_MAPPING,
    agree,
    check_dim_mapping,
    check_modules,
    check_output_ndim,
    count_stages,
    warn_of_assumed_axes,
)
from mimo_ext.planning.links import Links

__all__ = [
    "BridgeCommunicator",
    "MultiModulePipelineCommunicator",
    "RankModuleInfo",
    "Shape",
    "_prepare_tensor_for_comm",
    "_restore_tensor_from_comm",
    "logger",
]

logger = logging.getLogger(__name__)


@dataclass
class RankModuleInfo:
    """What a rank is in one of its modules.

    Attributes:
        pp_rank: pipeline stage of this rank within the module.
        pp_size: number of pipeline stages of the module.
        p2p_communicator: transfers between the stages of the module.
        bridge_comms_as_src_module: bridges to downstream modules; empty before the module's last stage.
        bridge_comms_as_dest_module: bridges from upstream modules; empty after the module's first stage.
        is_source_stage: this is the first stage of a module that nothing feeds.
        is_terminal_stage: this is the last stage of a module that feeds nothing.
    """

    pp_rank: int
    pp_size: int
    p2p_communicator: StageCommunicator | None
    bridge_comms_as_src_module: list[BridgeCommunicator] | None
    bridge_comms_as_dest_module: list[BridgeCommunicator] | None
    is_source_stage: bool | None = True
    is_terminal_stage: bool | None = True


class MultiModulePipelineCommunicator(PipelineHooks, _MegatronCommunicator):
    """Communicator for a multi-module pipeline.

    The constructor is collective over the default process group. Every rank calls it with equal arguments, whether or
    not it is in a module. Where the arguments differ or cannot work it raises on every rank, before any process group
    is made. Use it as a context manager, or call `close()`.

    Args:
        module_to_grid_map: grid of each module (`HyperCommGrid`, or anything with `rank_offset`, `size`, `shape`,
            `dim_names`), e.g. `{"images": grid_a, "language": grid_b}`.
        topology: downstream modules of each module, e.g. `{"images": ["language"], "language": []}`.
        config: a ModelParallelConfig; its `pipeline_dtype` (`params_dtype` where that is None) is what travels.
        dim_mapping: axes of sequence, batch and hidden in 3-D tensors; default `{"s": 1, "b": 0, "h": 2}`, as in
            Megatron's class, although Megatron's own modules give `[s, b, h]`: a warning says so where it matters. 2-D
            tensors are `[rows, h]`.
        module_output_ndim: dimensions of a module's output, 2 or 3; default 3.
        timeout: how long an operation waits for a peer before it raises `BridgeTimeoutError`; default that of
            `Bridge`.
        device: where received tensors live; default the current CUDA device if the default group is NCCL's, else the
            CPU.
        model: see `bind`.
        sharded_delivery: False: whole tensors also to a language model whose ranks use a part each. None: as the model
            says (its argument of this name), if its encoders' outputs have two dimensions; without `model`, the one
            that was built with this very `config` (``get_model_config(model)``). True: raise where that is not so.
        path, links: as of `Bridge`: how the ranks of a lane that hold the same come by their copies between modules,
            and what links "auto" chooses that for.
        transport: as of `Bridge`: what carries the tensors; of all bridges.

    Raises:
        ValueError, TypeError: arguments that cannot work; rank, module, expected and got are named.
        RuntimeError: the ranks were given different arguments.
    """

    def __init__(
        self,
        module_to_grid_map: dict[str, Any],
        topology: dict[str, list[str]],
        config: Any,
        dim_mapping: dict[str, int] | None = None,
        module_output_ndim: dict[str, int] | None = None,
        *,
        timeout: timedelta | None = None,
        device: torch.device | str | None = None,
        model: torch.nn.Module | None = None,
        sharded_delivery: bool | None = None,
        path: str | None = None,
        links: Links | None = None,
        transport: str | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError("expected an initialised default process group (torch.distributed.init_process_group)")
        self.module_to_grid_map = module_to_grid_map
        self.topology = topology
        self.config = config
        self.dim_mapping = dim_mapping
        self.module_output_ndim = {} if module_output_ndim is None else module_output_ndim
        self.current_rank = dist.get_rank()
        self.timeout = timeout
        self._path, self._link_model, self._transport = path, links, transport
        self.bridge_comms: list[BridgeCommunicator] = []
        self.rank_module_map: dict[str, RankModuleInfo] = {}
        self._hops: dict[tuple[str, int], Bridge] = {}  # (module, stage) -> bridge from that stage to the next
        self._row_counts: Mapping[str, deque[list[int]]] | None = None
        self._bridges: list[BridgeCommunicator | Bridge] = []  # all, in the order of their construction
        self._sharded_delivery = sharded_delivery
        self._sharding: Any = None  # of the bound model, where its rows go in shards
        self._closed = False

        # The bridges are described first, then the ranks meet once for all of them, and then they are connected.
        self._setup = setup = Setup("MultiModulePipelineCommunicator")
        refusal: Exception | None = None
        try:
            self.device = device_of(device)
            self._check_arguments()
            if model is not None:
                self.bind(model)
            else:
                self._choose_delivery(delivery_of(config))
            self._build_bridge_comms()
            self._build_hops()
        except Exception as error:
            refusal = error
        agree(setup.compare, None if refusal is not None else self._describe(), refusal)
        if dim_mapping is None and self.current_rank == 0:
            warn_of_assumed_axes(logger, self.topology, self.module_to_grid_map, self._output_ndim)
        try:
            setup.connect()
        except BaseException:
            self.close(abort=True)
            raise
        self._build_rank_module_info_map()

    # -- construction ----------------------------------------------------------------------------------------------

    def _check_arguments(self) -> None:
        self._axes = dict(DEFAULT_DIM_MAPPING)
        if self.dim_mapping is not None:
            check_dim_mapping(self.dim_mapping)
            self._axes = dict(self.dim_mapping)
        self._grids = check_modules(self.module_to_grid_map, self.topology, dist.get_world_size())
        check_output_ndim(self.module_output_ndim, self._grids)
        for name, grid in self.module_to_grid_map.items():
            Layout.from_grid(grid, name=name)  # unknown dims
        dtype = getattr(self.config, "pipeline_dtype", None) or getattr(self.config, "params_dtype", None)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"config.pipeline_dtype: expected a torch.dtype, got {dtype!r}")
        if self._sharded_delivery not in (None, True, False):
            raise TypeError(f"sharded_delivery: expected True, False or None, got {self._sharded_delivery!r}")
        self._dtype = dtype

    def _describe(self) -> dict[str, Any]:
        return {
            "grids": {
                name: {"rank_offset": grid.rank_offset, "shape": grid.shape, "dim_names": grid.dim_names}
                for name, grid in self._grids.items()
            },
            "topology": {name: sorted(destinations) for name, destinations in self.topology.items()},
            "module_output_ndim": {name: self._output_ndim(name) for name in self._grids},
            "dim_mapping": self._axes,
            "pipeline_dtype": self._dtype,
            "device": self.device.type,
            "sharded_delivery": [] if self._sharding is None else sorted(self._sharding.modules),
            "bridges": {str(index): text for index, text in enumerate(self._setup.description)},
        }

    def _output_ndim(self, module_name: str) -> int:
        return int(self.module_output_ndim.get(module_name, 3))

    def _bridge_options(self) -> dict[str, Any]:
        # 1F1B has at most one microbatch per stage under way; this bounds the forward-only schedule, too.
        options: dict[str, Any] = {"device": self.device, "max_in_flight": self.total_stages + 1, "setup": self._setup}
        given = {"timeout": self.timeout, "transport": self._transport}
        return {**options, **{key: value for key, value in given.items() if value is not None}}

    def _build_bridge_comms(self) -> None:
        """Describe one bridge per edge of the topology: on every rank, in one sorted order."""
        for source in sorted(self.topology):
            for destination in sorted(self.topology[source]):
                edge = BridgeCommunicator(
                    self.module_to_grid_map[source],
                    self.module_to_grid_map[destination],
                    self._axes,
                    self._dtype,
                    source,
                    destination,
                    self._output_ndim(source),
                    path=self._path,
                    links=self._link_model,
                    **self._bridge_options(),
                )
                self.bridge_comms.append(edge)
                self._bridges.append(edge)

    def _build_hops(self) -> None:
        """Describe the bridges between consecutive stages of the modules: on every rank, in one sorted order."""
        for name in sorted(self._grids):
            grid = self._grids[name]
            for stage in range(grid.pp_size - 1):
                # Lanes of one rank each: every rank exchanges all that it holds with its own coordinate.
                ours, theirs = grid.stage_ranks(stage), grid.stage_ranks(stage + 1)
                # 3-D, as P2PCommunicator's: stages may exchange 2-D and 3-D tensors in turn (see the adapters).
                hop = Bridge(
                    Layout(ranks=ours, dp=len(ours), name=f"{name} stage {stage}"),
                    Layout(ranks=theirs, dp=len(theirs), name=f"{name} stage {stage + 1}"),
                    ndim=3,
                    batch_dim=self._axes["b"],
                    seq_dim=self._axes["s"],
                    dtype=self._dtype,
                    unpaired_backward=True,  # as the edges
                    name=f"{name} stage {stage} -> stage {stage + 1}",
                    **self._bridge_options(),
                )
                self._hops[name, stage] = hop
                self._bridges.append(hop)

    def _build_rank_module_info_map(self) -> None:
        """Find out what this rank is in each of its modules, and what it sends and receives there."""
        inputs: list[Input] = []
        outputs: list[Output] = []
        for name, raw_grid in self.module_to_grid_map.items():
            if not self.is_current_rank_in_grid(raw_grid):
                continue
            grid = self._grids[name]
            stage, last = grid.pp_rank(self.current_rank), grid.pp_size - 1
            previous, following = self._hops.get((name, stage - 1)), self._hops.get((name, stage))
            incoming = [edge for edge in self.bridge_comms if edge.dest_module_name == name and stage == 0]
            outgoing = [edge for edge in self.bridge_comms if edge.src_module_name == name and stage == last]
            self.rank_module_map[name] = RankModuleInfo(
                pp_rank=stage,
                pp_size=grid.pp_size,
                p2p_communicator=StageCommunicator(
                    grid, self.current_rank, self.config, previous, following, _pp_group_getter(raw_grid)
                ),
                bridge_comms_as_src_module=outgoing,
                bridge_comms_as_dest_module=incoming,
                is_source_stage=stage == 0 and self._is_source_module(name),
                is_terminal_stage=stage == last and self._is_sink_module(name),
            )
            inputs += [
                Input(str(edge.src_module_name), edge.bridge, is_hop=False, destination=name) for edge in incoming
            ]
            if previous is not None:
                inputs.append(Input(name, previous, is_hop=True))
            if outgoing:
                parts = math.lcm(*(edge.row_parts for edge in outgoing))
                bridges, ndim = [edge.bridge for edge in outgoing], self._output_ndim(name)
                to = [str(edge.dest_module_name) for edge in outgoing]
                outputs.append(Output(name, bridges, is_hop=False, ndim=ndim, destinations=to, row_parts=parts))
            if following is not None:
                outputs.append(Output(name, [following], is_hop=True, ndim=None))
        own = [edge.bridge for edge in self.bridge_comms if edge.meets_itself]
        self._io = StageIO(self.current_rank, self._dtype, self.device, inputs, outputs, own)
        self._share_rows()

    def _share_rows(self) -> None:
        """Let rows go to the language model in shards, where the bound model wants it."""
        if hasattr(self, "_io"):  # else bound by the constructor, which comes back here
            self._io.share(self._sharding, MIMO_LANGUAGE_MODULE_KEY)
            self._links = self._io.links

    def bind(self, model: torch.nn.Module) -> MultiModulePipelineCommunicator:
        """Take the rows of each sample from `model.row_counts[module]`, queues that the model fills once per forward.

        `mimo_ext.megatron.model.MimoModel` has them; wrappers are looked through by their `.module`. Each 2-D output
        that is sent takes one entry. Without a model, or where a queue is empty, the attribute
        `_mimo_bridge_split_sizes` of the output tensor is used, and without that one the rows are split evenly
        between the samples.

        A model with `sharded` (see its `sharded_delivery`) also says which ranks of the language model use which rows,
        and those alone travel. `recv_forward` then returns leaves that have their rows only when the model has run.
        All ranks bind their models, or none does. (A communicator that was given the model's own config knows this
        much without.)

        Returns:
            self.

        Raises:
            TypeError: `model` has no `row_counts`.
            ValueError: `sharded_delivery=True`, and the model or the dimensions of its outputs do not allow it.
        """
        inner: Any = model
        while not hasattr(inner, "row_counts") and hasattr(inner, "module"):
            inner = inner.module
        if not hasattr(inner, "row_counts"):
            raise TypeError(
                f"expected a model with row_counts (mimo_ext.megatron.model.MimoModel), got {type(inner).__name__}"
            )
        self._row_counts = inner.row_counts
        self._choose_delivery(getattr(inner, "sharded", None))
        self._share_rows()
        return self

    def _choose_delivery(self, sharding: Any) -> None:
        """Deliver to the language model as the model's `sharded` says, where that is possible and wanted.

        Raises:
            ValueError: it is wanted in any case.
        """
        obstacle = ""
        if sharding is None:
            obstacle = (
                "a model that delivers in shards (see its sharded_delivery), as model= or by its config; got none"
            )
        elif others := sorted(name for name in sharding.modules if self._output_ndim(name) != 2):
            obstacle = f"outputs of 2 dimensions, got others of {others}"
        elif others := sorted(n for n in sharding.modules if MIMO_LANGUAGE_MODULE_KEY not in self.topology.get(n, [])):
            obstacle = f"encoders that feed '{MIMO_LANGUAGE_MODULE_KEY}', got {others} that do not"
        if obstacle and self._sharded_delivery is True:
            raise ValueError(f"sharded_delivery=True: expected {obstacle}")
        self._sharding = None if obstacle or self._sharded_delivery is False else sharding

    # -- where this rank stands ------------------------------------------------------------------------------------

    @property
    def is_pp_first_stage(self) -> bool:
        """True if this rank is in the first pipeline stage of a module that nothing feeds."""
        return any(bool(info.is_source_stage) for info in self.rank_module_map.values())

    @property
    def is_pp_last_stage(self) -> bool:
        """True if this rank is in the last pipeline stage of a module that feeds nothing."""
        return any(bool(info.is_terminal_stage) for info in self.rank_module_map.values())

    def is_module_pp_first_stage(self, module_name: str) -> bool:
        """True if this rank is in the first pipeline stage of the module."""
        info = self.rank_module_map.get(module_name)
        return info is not None and info.pp_rank == 0

    def _is_source_module(self, module_name: str) -> bool:
        """True if no module feeds this one."""
        return all(module_name not in destinations for destinations in self.topology.values())

    def _is_sink_module(self, module_name: str) -> bool:
        """True if this module feeds no other."""
        return not self.topology.get(module_name)

    def is_current_rank_in_grid(self, grid: Any) -> bool:
        """True if this rank is one of the grid's."""
        return bool(grid.rank_offset <= self.current_rank < grid.rank_offset + grid.size)

    @property
    def total_stages(self) -> int:
        """Pipeline stages along the longest path through the modules."""
        stages = self.compute_total_pipeline_stages(self.topology, self.module_to_grid_map)
        return (stages - 1) * self._lead + 1

    @property
    def current_stage(self) -> int:
        """Stage of this rank in the whole pipeline, from 0; the last of them for a rank in several modules.

        Raises:
            ValueError: this rank is in no module.
        """
        stages = self.compute_total_pipeline_stages(self.topology, self.module_to_grid_map, rank=self.current_rank)
        return (stages - 1) * self._lead

    @staticmethod
    def compute_total_pipeline_stages(
        topology: dict[str, list[str]],
        module_to_grid_map: dict[str, Any],
        rank: int | None = None,
        module_name: str | None = None,
    ) -> int:
        """Number of pipeline stages along the longest path of the module graph, in time linear in the graph.

        Each module weighs its pipeline-parallel size. With images and audio both feeding llm, which feeds a
        generator, that is `max(pp(images), pp(audio)) + pp(llm) + pp(generator)`.

        Args:
            topology: downstream modules of each module; a module without an entry feeds none.
            module_to_grid_map: grid of each module.
            rank: count only up to and including the stage that this rank holds in its module, which then weighs
                `pp_rank + 1`. For a rank in several modules the largest count is returned.
            module_name: with `rank`, the one module of that rank to count to.

        Raises:
            ValueError: a cycle (named), no module that feeds none, an unknown module, or a rank that is not in the
                module (in any module, if no `module_name` is given).
        """
        return count_stages(topology, module_to_grid_map, rank, module_name)

    # -- the six operations of the schedule ------------------------------------------------------------------------

    def recv_forward(self, tensor_shape: Shape | None = None, is_first_stage: bool = False) -> dict[str, torch.Tensor]:
        """Receive this stage's inputs.

        Args:
            tensor_shape: shape of what comes from the previous stage of the same module, where it is fixed (it is then
                checked); the schedule's `[()]` and None leave it open. Between modules shapes always travel.
            is_first_stage: not used (Megatron's schedule passes it).

        Returns:
            Leaves that require grad: one per upstream module, keyed by its name, on a module's first stage; else one
                keyed
            by the module itself. Empty where nothing feeds this stage.
        """
        with self._operation("recv_forward"):
            return self._io.recv_forward(tensor_shape)

    def send_forward(
        self,
        output_dict: dict[str, torch.Tensor],
        is_last_stage: bool = False,
        *,
        row_counts: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Send this stage's outputs, without waiting for the receivers.

        Args:
            output_dict: one tensor per module of this rank that feeds another stage, keyed by module name; between
                modules of `module_output_ndim` dimensions. Not looked at where this stage feeds none (a loss is
                fine).
            is_last_stage: not used.
            row_counts: rows of each sample of this rank's lane, by module, for 2-D outputs whose samples differ. They
                reach the receivers, whatever the numbers of lanes, and cut the gradient on its way back. Default: what
                the model has queued (see `bind`), or the attribute `_mimo_bridge_split_sizes` of the output; without
                either the rows are split evenly. Sources that contradict one another are refused.

        Raises:
            ValueError, TypeError: a missing key, a wrong shape, dtype or device, row counts that do not fit the output,
                rows that do not split evenly and have no counts; nothing has been sent then.
            RuntimeError: row counts differ from those that the model has queued.
        """
        with self._operation("send_forward"):
            self._io.send_forward(output_dict, self._row_counts, row_counts)

    def send_forward_recv_backward(
        self,
        output_dict: dict[str, torch.Tensor],
        tensor_shape: Shape | None = None,
        is_last_stage: bool = False,
        *,
        row_counts: Mapping[str, Sequence[int]] | None = None,
    ) -> dict[str, torch.Tensor | None]:
        """`send_forward(output_dict, row_counts=row_counts)`, then `recv_backward(tensor_shape)`."""
        with self._operation("send_forward_recv_backward"):
            self._io.send_forward(output_dict, self._row_counts, row_counts)
            return self._io.recv_backward(tensor_shape)

    def send_backward_recv_forward(
        self, grad_dict: dict[str, torch.Tensor | None], tensor_shape: Shape | None = None, is_first_stage: bool = False
    ) -> dict[str, torch.Tensor]:
        """`send_backward(grad_dict)`, then `recv_forward(tensor_shape)`."""
        with self._operation("send_backward_recv_forward"):
            self._io.send_backward(grad_dict)
            return self._io.recv_forward(tensor_shape)

    def recv_backward(
        self, tensor_shape: Shape | None = None, is_last_stage: bool = False
    ) -> dict[str, torch.Tensor | None]:
        """Receive the gradients of this stage's outputs, in the order in which these were sent.

        Returns:
            One gradient per module of this rank that feeds another stage: summed over all that it feeds. Where none
                of them
            has one, it is zeros if the output requires grad (its backward must run), else None. Empty on the last
            stage.
        """
        with self._operation("recv_backward"):
            return self._io.recv_backward(tensor_shape)

    def send_backward(self, grad_dict: dict[str, torch.Tensor | None], is_first_stage: bool = False) -> None:
        """Send the gradients of this stage's inputs, keyed as `recv_forward` returned them; None says that there is
        none.

        Raises:
            ValueError, TypeError: a missing key or something that is no tensor; nothing has been sent then.
        """
        with self._operation("send_backward"):
            self._io.send_backward(grad_dict)

    # -- the end ---------------------------------------------------------------------------------------------------

    def close(self, abort: bool = False) -> None:
        """Wait for what is in flight (`abort`: do not), end the bridges' threads and free their process groups.

        Receives that a failed schedule has left posted (see `overlap`) are not waited for, nor is what else is in
        flight on their bridges. Later operations raise RuntimeError. May be called twice. All bridges are closed, also
        where one of them raises; the first error is raised then.
        """
        self._closed = True
        errors: list[Exception] = []
        given_up = [link.bridge for links in self._links for link in links if link.posted]
        while self._bridges:
            try:
                closing = self._bridges.pop()
                bridge = closing.bridge if isinstance(closing, BridgeCommunicator) else closing
                closing.close(abort or any(bridge is other for other in given_up))
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def __enter__(self) -> MultiModulePipelineCommunicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            # Peers of a rank that failed may never come: they are not waited for.
            self.close(abort=error is not None)
        except Exception:
            if error is None:
                raise
            # What went wrong first is what the user must see.
            logger.warning("rank %d: closing the communicator after an error", self.current_rank, exc_info=True)


def _pp_group_getter(grid: Any) -> Any:
    return lambda: grid.get_pg(["pp"])
