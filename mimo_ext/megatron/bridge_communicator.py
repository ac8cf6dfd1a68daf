"""`BridgeCommunicator`: the public surface of Megatron's class of that name, over one `mimo_ext.Bridge`."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, ClassVar, NoReturn

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator as _MegatronBridge
from megatron.core.pipeline_parallel.bridge_communicator import CommRole, RankCommInfo

from mimo_ext import Bridge, BridgeError, Layout
from mimo_ext._arguments import checked_ints
from mimo_ext._setup import Setup, refuse_bridge
from mimo_ext.megatron.adapters import SPLIT_SIZES_ATTRIBUTE, is_single_shape
from mimo_ext.megatron.topology import DEFAULT_DIM_MAPPING, GridShape, check_dim_mapping
from mimo_ext.planning.links import Links

__all__ = ["BridgeCommunicator", "CommRole", "RankCommInfo", "default_device", "device_of"]


class BridgeCommunicator(_MegatronBridge):
    """The edge from one module to another: activations forward, gradients back, between any two layouts.

    It is accepted wherever Megatron's own class is (a subclass that calls none of its parent's code). The constructor
    is collective over the default process group: every rank calls it with equal arguments, also ranks in neither
    grid. The ranks compare their arguments once; no other collective, and no barrier, is run.

    A lane is the ranks of a boundary stage that share the same samples: one per dp (and gtp_remat) coordinate.
    `comm_map` and the leaders describe the edge as Megatron's class does: the last rank of each source lane and the
    first of each destination lane, and which of them share samples. The data itself does not go through leaders: it
    moves by `bridge.plan`, in which every rank of a lane carries a part. Hence every rank of a boundary stage calls
    each operation, tensor- and context-parallel copies included, with equal tensors on the copies of a lane. Lane
    counts need not divide one another, and context parallelism needs nothing special: gradients of tensor-parallel
    copies are taken once, those of context-parallel copies are summed.

    Ranks of a grid outside its boundary stage may call the operations, too: nothing is sent, and None is returned.

    Args:
        src_grid, dest_grid: `HyperCommGrid`s, or anything with `rank_offset`, `size`, `shape` and `dim_names`.
        dim_mapping: axes of sequence, batch and hidden in 3-D tensors; default `{"s": 1, "b": 0, "h": 2}`. 2-D tensors
            are `[rows, h]`.
        comm_dtype: of activations and gradients; default `torch.get_default_dtype()`. Other dtypes are refused.
        src_module_name, dest_module_name: for messages.
        tensor_ndim: 2 or 3.
        timeout: how long an operation waits for a peer before it raises `BridgeTimeoutError`; default that of
            `Bridge`.
        device: where received tensors live; default the current CUDA device if the default group is NCCL's, else the
            CPU.
        max_in_flight: microbatches per direction that are sent but have not arrived; a further send waits.
        path, links, transport: as of `Bridge`: how the replicas of a lane come by their copies, and what carries them.
        setup: as of `Bridge`: set it up together with others.

    Attributes:
        bridge: the `mimo_ext.Bridge`.
        comm_map: rank of either grid -> `RankCommInfo`. A rank that leads on both sides is a SENDER whose
            `recv_from_ranks` is filled, too.
        src_tp_leaders, dest_tp_leaders: leader of each lane, in the order of the lanes.
        src_local_leader_rank, dest_local_leader_rank: leader of this rank's lane (of whatever stage); None outside
            the grid.
        src_grid_broadcast_ranks, dest_grid_broadcast_ranks: this rank's lane in the boundary stage; else empty.
        src_grid_broadcast_pg, dest_grid_broadcast_pg, bridge_pg: None: nothing is broadcast, and the bridge's own
            connections are not for the functions of `torch.distributed`.
        current_rank, src_grid, dest_grid, dim_mapping, comm_dtype, src_module_name, dest_module_name, tensor_ndim: as
            given, or as the defaults say.

    Raises:
        ValueError, TypeError: arguments that cannot work, or that differ between ranks; on every rank.
    """

    # What Megatron's class keeps here would be shared with it.
    _broadcast_pg_cache: ClassVar[dict[str, Any]] = {}
    _bridge_pg_cache: ClassVar[dict[str, Any]] = {}

    # Open communicators by number, so that all ranks close them in the same order. Holds none of them alive.
    _live: ClassVar[weakref.WeakValueDictionary[int, BridgeCommunicator]] = weakref.WeakValueDictionary()
    _numbers: ClassVar[itertools.count[int]] = itertools.count()

    def __init__(
        self,
        src_grid: Any,
        dest_grid: Any,
        dim_mapping: dict[str, int] | None = None,
        comm_dtype: torch.dtype | None = None,
        src_module_name: str | None = None,
        dest_module_name: str | None = None,
        tensor_ndim: int = 3,
        *,
        timeout: timedelta | None = None,
        device: torch.device | str | None = None,
        max_in_flight: int | None = None,
        path: str | None = None,
        links: Links | None = None,
        transport: str | None = None,
        setup: Setup | None = None,
    ) -> None:
        self.src_grid, self.dest_grid = src_grid, dest_grid
        self.src_module_name, self.dest_module_name = src_module_name, dest_module_name
        self.tensor_ndim = tensor_ndim
        self.comm_dtype = torch.get_default_dtype() if comm_dtype is None else comm_dtype
        self.dim_mapping = dict(DEFAULT_DIM_MAPPING) if dim_mapping is None else dim_mapping
        self.src_grid_broadcast_pg = self.dest_grid_broadcast_pg = self.bridge_pg = None
        source, destination = src_module_name or "source", dest_module_name or "destination"
        name = f"{source} -> {destination}"
        if not dist.is_initialized():
            raise RuntimeError(f"bridge '{name}': expected an initialised default process group")
        self.current_rank = dist.get_rank()
        try:
            options = self._check_arguments()
            self._layouts = _layout(source, src_grid), _layout(destination, dest_grid)
            options["device"] = device_of(device)
        except Exception as error:
            if setup is None:
                refuse_bridge(name, error)  # the others are told: they would wait for this rank
            kind = type(error) if type(error) in (TypeError, ValueError) else ValueError
            raise kind(f"bridge '{name}', rank {self.current_rank}: {error}") from error
        given = {"timeout": timeout, "max_in_flight": max_in_flight, "path": path, "links": links, "setup": setup}
        given["transport"] = transport
        options.update({key: value for key, value in given.items() if value is not None})
        # Gradients may come first, or alone: Megatron's class allows both.
        options["unpaired_backward"] = True
        self.bridge = Bridge(*self._layouts, ndim=tensor_ndim, dtype=self.comm_dtype, name=name, **options)
        # Asked once: a closed bridge is on neither side.
        self._sends, self._receives = self.bridge.is_source, self.bridge.is_destination
        self._describe()
        self._number = next(self._numbers)
        BridgeCommunicator._live[self._number] = self

    def _check_arguments(self) -> dict[str, Any]:
        """Options of the bridge."""
        if self.tensor_ndim not in (2, 3):
            raise ValueError(f"tensor_ndim: expected 2 or 3, got {self.tensor_ndim!r}")
        check_dim_mapping(self.dim_mapping)
        if not isinstance(self.comm_dtype, torch.dtype):
            raise TypeError(f"comm_dtype: expected a torch.dtype, got {self.comm_dtype!r}")
        if self.tensor_ndim == 2:
            return {}
        return {"batch_dim": self.dim_mapping["b"], "seq_dim": self.dim_mapping["s"]}

    def _describe(self) -> None:
        source, destination = self._layouts
        self.src_grid_broadcast_ranks = _lane_of(self.current_rank, source.lanes(-1))
        self.dest_grid_broadcast_ranks = _lane_of(self.current_rank, destination.lanes(0))
        self.src_tp_leaders, self.src_local_leader_rank = self.get_leader_rank(self.src_grid, is_src=True)
        self.dest_tp_leaders, self.dest_local_leader_rank = self.get_leader_rank(self.dest_grid, is_src=False)
        self.comm_map: dict[int, RankCommInfo] = {}
        self.build_comm_map(self.src_tp_leaders, self.dest_tp_leaders)

    def __repr__(self) -> str:
        return f"BridgeCommunicator({self.bridge.name}, {self.tensor_ndim}-D, {self.comm_dtype})"

    # -- who is who ------------------------------------------------------------------------------------------------

    def is_current_rank_in_grid(self, grid: Any) -> bool:
        """True if this rank is one of the grid's."""
        return bool(grid.rank_offset <= self.current_rank < grid.rank_offset + grid.size)

    def get_boundary_pp_stage_ranks(self, grid: Any, is_src: bool) -> list[list[int]]:
        """Ranks of each lane of the grid's last pipeline stage (`is_src`) or of its first; tp varies fastest."""
        return [list(lane) for lane in _layout("grid", grid).lanes(-1 if is_src else 0)]

    def get_leader_rank(self, grid: Any, is_src: bool) -> tuple[list[int], int | None]:
        """Leader of each lane of the grid, and the leader of this rank's lane.

        The last rank of each lane of the last pipeline stage leads (`is_src`), or the first of each lane of the
        first. This rank's lane counts in whatever stage it is; outside the grid there is none.
        """
        layout = _layout("grid", grid)
        leaders = [lane[-1] if is_src else lane[0] for lane in layout.lanes(-1 if is_src else 0)]
        if not self.is_current_rank_in_grid(grid):
            return leaders, None
        lanes = layout.lanes(GridShape.from_grid("grid", grid).pp_rank(self.current_rank))
        return leaders, next(leader for leader, lane in zip(leaders, lanes, strict=True) if self.current_rank in lane)

    def build_comm_map(self, src_tp_leaders: list[int], dest_tp_leaders: list[int]) -> None:
        """Fill `comm_map`: each source leader with the destination leaders whose lanes share samples with its own."""
        for grid in (self.src_grid, self.dest_grid):
            for rank in range(grid.rank_offset, grid.rank_offset + grid.size):
                self.comm_map[rank] = RankCommInfo(role=CommRole.MEMBER)
        sources, destinations = len(src_tp_leaders), len(dest_tp_leaders)
        for j, receiver in enumerate(dest_tp_leaders):
            self.comm_map[receiver] = RankCommInfo(role=CommRole.RECEIVER)
            # Lane i of k holds the samples from i / k to (i + 1) / k of the microbatch.
            shared = range(j * sources // destinations, -(-(j + 1) * sources // destinations))
            self.comm_map[receiver].recv_from_ranks.extend(src_tp_leaders[i] for i in shared)
        for i, sender in enumerate(src_tp_leaders):
            self.comm_map[sender].role = CommRole.SENDER
            shared = range(i * destinations // sources, -(-(i + 1) * destinations // sources))
            self.comm_map[sender].send_to_ranks.extend(dest_tp_leaders[j] for j in shared)

    @property
    def _batch_dim(self) -> int:
        """The axis along which lanes are cut."""
        return 0 if self.tensor_ndim == 2 else self.dim_mapping["b"]

    @property
    def row_parts(self) -> int:
        """Rows without counts must split into so many equal parts on each source rank, to be cut for the lanes."""
        return math.lcm(len(self.src_tp_leaders), len(self.dest_tp_leaders)) // len(self.src_tp_leaders)

    @property
    def meets_itself(self) -> bool:
        """True if this rank sends samples that it also receives: it must send before it receives."""
        if not self.src_grid_broadcast_ranks or not self.dest_grid_broadcast_ranks:
            return False
        return self.dest_grid_broadcast_ranks[0] in self.comm_map[self.src_grid_broadcast_ranks[-1]].send_to_ranks

    # -- the six operations ----------------------------------------------------------------------------------------

    def send_forward(self, tensor_to_send: torch.Tensor, *, row_counts: Sequence[int] | None = None) -> None:
        """Send this lane's output; returns once enqueued.

        Args:
            tensor_to_send: of `tensor_ndim` dimensions and `comm_dtype`; looked at on the source's boundary ranks.
            row_counts: 2-D only: rows of each sample of this lane. Default: the tensor's attribute
                `_mimo_bridge_split_sizes`, and without that one as many rows in each sample.

        Raises:
            ValueError: this rank is not in the source grid; wrong dimensions, dtype, device or rows. Nothing has been
                sent then.
        """
        self._require(self.src_grid, "send_forward", "source")
        if self._sends:
            self.bridge.send_forward(tensor_to_send, row_counts=self._rows(tensor_to_send, row_counts))

    def recv_forward(self) -> torch.Tensor | None:
        """This lane's input: a leaf that requires grad (unless one side runs under `torch.no_grad()`).

        Raises:
            ValueError: this rank is not in the destination grid.
        """
        self._require(self.dest_grid, "recv_forward", "destination")
        return self.bridge.recv_forward() if self._receives else None

    def send_backward(self, grad_tensor: torch.Tensor | None) -> None:
        """Send the gradient of the oldest input that waits for one; None says that there is none.

        Where no input waits, the gradient is that of the next one; its samples are split evenly over the source lanes.

        Raises:
            ValueError: this rank is not in the destination grid; another shape or dtype than the input's.
        """
        self._require(self.dest_grid, "send_backward", "destination")
        if self._receives:
            self.bridge.send_backward(grad_tensor)

    def recv_backward(self) -> torch.Tensor | None:
        """The gradient of the oldest output that waits for one, in the output's shape; None where there is none.

        Raises:
            ValueError: this rank is not in the source grid.
        """
        self._require(self.src_grid, "recv_backward", "source")
        return self.bridge.recv_backward() if self._sends else None

    def send_forward_recv_backward(
        self,
        input_tensor: torch.Tensor,
        grad_shape: Sequence[int] | None = None,
        *,
        row_counts: Sequence[int] | None = None,
    ) -> torch.Tensor | None:
        """`send_forward(input_tensor)`, then `recv_backward()`.

        Args:
            grad_shape: the gradient's shape, where the caller knows it; another one is a RuntimeError.
        """
        self._require(self.src_grid, "send_forward_recv_backward", "source")
        self.send_forward(input_tensor, row_counts=row_counts)
        return self._expect(grad_shape, self.recv_backward(), "gradient")

    def send_backward_recv_forward(
        self, grad_tensor: torch.Tensor | None, forward_shape: Sequence[int] | None = None
    ) -> torch.Tensor | None:
        """`send_backward(grad_tensor)`, then `recv_forward()`.

        Args:
            forward_shape: the next input's shape, where the caller knows it; another one is a RuntimeError.
        """
        self._require(self.dest_grid, "send_backward_recv_forward", "destination")
        self.send_backward(grad_tensor)
        return self._expect(forward_shape, self.recv_forward(), "activation")

    def _require(self, grid: Any, operation: str, side: str) -> None:
        where = f"bridge '{self.bridge.name}', rank {self.current_rank}: {operation}"
        if not self.is_current_rank_in_grid(grid):
            first, end = grid.rank_offset, grid.rank_offset + grid.size
            got = f"got rank {self.current_rank}"
            raise ValueError(f"{where}: expected a rank of the {side} grid, [{first}, {end}), {got}")
        if self.bridge.closed:
            raise BridgeError(f"{where}: the bridge is closed")

    def _rows(self, tensor: Any, row_counts: Sequence[int] | None) -> list[int] | None:
        """Rows per sample of a 2-D output, given or marked on it."""
        where = f"bridge '{self.bridge.name}', rank {self.current_rank}: send_forward"
        given = None if row_counts is None else checked_ints(where, "row_counts", row_counts)
        marked = getattr(tensor, SPLIT_SIZES_ATTRIBUTE, None)
        if marked is None or (self.tensor_ndim == 3 and given is not None):
            return given  # the bridge refuses row counts of 3-D tensors
        marked = checked_ints(where, SPLIT_SIZES_ATTRIBUTE, marked)
        if self.tensor_ndim == 3:
            # The batch axis is cut by samples. Marks that say so, too, are fine.
            if len(set(marked)) > 1:
                raise ValueError(
                    f"{where}: expected a batch axis of equal parts in a 3-D tensor, got {SPLIT_SIZES_ATTRIBUTE}="
                    f"{marked}; rows that vary are 2-D"
                )
            return None
        if given is not None and given != marked:
            raise ValueError(f"{where}: expected rows per sample {given} (row_counts), got a tensor marked {marked}")
        return marked

    def _expect(self, shape: Any, tensor: torch.Tensor | None, what: str) -> torch.Tensor | None:
        if tensor is not None and is_single_shape(shape) and tuple(shape) != tuple(tensor.shape):
            raise RuntimeError(
                f"bridge '{self.bridge.name}', rank {self.current_rank}: expected a {what} of shape {tuple(shape)}, "
                f"got {tuple(tensor.shape)}"
            )
        return tensor

    # -- the end ---------------------------------------------------------------------------------------------------

    def close(self, abort: bool = False) -> None:
        """Wait for what is in flight (`abort`: do not), end its threads, free its connections. May be repeated."""
        BridgeCommunicator._live.pop(self._number, None)
        self.bridge.close(abort)

    @classmethod
    def destroy_bridge_pgs(cls) -> None:
        """Close every open communicator of this class and free its connections.

        What is in flight is waited for, unless the default process group is gone already. All are closed, also where
        one of them raises; the first error is raised then. May be called at any time, and again.
        """
        errors: list[Exception] = []
        for number in sorted(BridgeCommunicator._live):
            communicator = BridgeCommunicator._live.get(number)
            if not isinstance(communicator, cls):
                continue
            try:
                communicator.close(abort=not dist.is_initialized())
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    @classmethod
    def destroy_broadcast_pgs(cls) -> None:
        """As `destroy_bridge_pgs`: nothing is broadcast."""
        cls.destroy_bridge_pgs()

    # -- what only transfers through leaders need ------------------------------------------------------------------

    def _refuse_leader_path(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("this step of a transfer through leader ranks does not exist here: see bridge.plan")

    _get_or_create_broadcast_pg = _get_or_create_bridge_pg = _refuse_leader_path
    _communicate_shapes = _as_per_peer_tensors = _split_tensor_at_batch_dim = _refuse_leader_path


def default_device() -> torch.device:
    """The current CUDA device if the default process group is NCCL's, else the CPU."""
    if "nccl" in dist.get_backend() and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def device_of(device: Any) -> torch.device:
    """The device of that name, `default_device` for None. TypeError for what names none."""
    if device is None:
        return default_device()
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise TypeError(f"device: expected a torch.device or the name of one, got {device!r}") from None


def _layout(name: str, grid: Any) -> Layout:
    GridShape.from_grid(name, grid)  # says what is missing, and what contradicts itself
    return Layout.from_grid(grid, name=name)


def _lane_of(rank: int, lanes: Sequence[Sequence[int]]) -> list[int]:
    return next((list(lane) for lane in lanes if rank in lane), [])
