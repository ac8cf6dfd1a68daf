"""What one rank sends and receives in a multi-module pipeline, by dictionaries keyed by module name.

Every combined operation is made of these four; a caller sends before it receives. All arguments of a send are checked
before the first byte leaves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from mimo_ext._arguments import checked_ints
from mimo_ext.megatron.adapters import (
    SPLIT_SIZES_ATTRIBUTE,
    _prepare_tensor_for_comm,
    _restore_tensor_from_comm,
    is_single_shape,
)
from mimo_ext.megatron.overlap import Handle, Post, Receives

if TYPE_CHECKING:
    from mimo_ext import Bridge, RowShards


@dataclass
class Input:
    """Where one entry of the input dictionary comes from, and its gradient goes to."""

    key: str
    bridge: Bridge
    is_hop: bool  # from the previous stage of the same module
    posts_ahead: bool = True  # False: what a receive states is known only when the schedule asks for it
    destination: str = ""  # the module that it comes to
    sharded: bool = False  # the model says which rows it takes, when it runs
    # Shapes of what was received and waits for its gradient; not of sharded rows, which come when the model runs.
    waiting: deque[torch.Size] = field(default_factory=deque)
    gradients_ahead: int = 0  # sent before the inputs that they belong to were received


@dataclass
class Sent:
    """What must be known of an output when its gradient comes: the schedule may have freed it by then."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


@dataclass
class Output:
    """Where one module's output goes to, and its gradient comes from."""

    module: str
    bridges: list[Bridge]
    is_hop: bool  # to the next stage of the same module
    ndim: int | None  # None: 2 or 3, as the stages please
    destinations: list[str] = field(default_factory=list)  # modules, one per bridge; none for a hop
    row_parts: int = 1  # 2-D without row counts: rows must split into so many equal parts to be cut for the lanes
    in_flight: deque[Sent] = field(default_factory=deque)
    gradients_ahead: int = 0  # received before the outputs that they belong to were sent


class ArrivingRows:
    """Rows that the schedule has asked for, and whose receive waits for the model to say which of them it takes.

    Attributes:
        tensor: the leaf that the schedule was given; without rows until `wait`. Its gradient is sent back.
    """

    def __init__(self, tensor: torch.Tensor, bridge: Bridge) -> None:
        self.tensor = tensor
        self._bridge = bridge
        self._handle: Handle | None = None

    def post(self, row_shards: RowShards) -> None:
        """Receive this rank's rows of samples that are dealt so."""
        self._handle = self._bridge.irecv_forward(row_shards=row_shards)

    def wait(self) -> torch.Tensor:
        """`tensor` with its rows, ``[rows, h]``."""
        assert self._handle is not None
        rows = self._handle.wait()
        self.tensor.data = rows.detach()
        return self.tensor.requires_grad_(rows.requires_grad)


class Sharding(Protocol):
    """What a model says of encoders whose rows go to its language model in shards."""

    modules: frozenset[str]
    row_shards: dict[str, deque[RowShards]]
    arriving: dict[str, deque[ArrivingRows]]


class StageIO:
    """The four transfers of one rank.

    Args:
        rank: this rank, for messages.
        dtype, device: what outputs must be.
        inputs, outputs: the links of this rank.
        own_bridges: those of the bridges from this rank to itself that cannot deliver before this rank has sent.
    """

    def __init__(
        self,
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
        inputs: Sequence[Input],
        outputs: Sequence[Output],
        own_bridges: Sequence[Bridge] = (),
    ) -> None:
        self._rank = rank
        self._dtype = dtype
        self._device = device
        self._inputs = list(inputs)
        self._outputs = list(outputs)
        self._input_keys = sorted(source.key for source in inputs)
        self._output_keys = sorted(output.module for output in outputs)
        # Bridge -> how many sends this rank is ahead of its own receives: [forward, backward].
        self._ahead = {id(bridge): [0, 0] for bridge in own_bridges}
        self._sharding: Sharding | None = None
        self._sharded_to = ""
        self._activations = [
            self._receives(source.bridge, source.bridge.irecv_forward, source.key, "activation", source.posts_ahead)
            for source in inputs
        ]
        self._gradients = [
            [self._receives(bridge, bridge.irecv_backward, out.module, "gradient") for bridge in out.bridges]
            for out in outputs
        ]

    def share(self, sharding: Sharding | None, destination: str) -> None:
        """From now on the rows of `sharding.modules` go to module `destination` in shards; None: those of no module."""
        self._sharding, self._sharded_to = sharding, destination
        modules = frozenset() if sharding is None else sharding.modules
        for index, source in enumerate(self._inputs):
            sharded = not source.is_hop and source.key in modules and source.destination == destination
            if sharded != source.sharded:
                source.sharded, source.posts_ahead = sharded, not sharded
                source.waiting.clear()
                source.gradients_ahead = 0
                self._activations[index] = self._receives(
                    source.bridge, source.bridge.irecv_forward, source.key, "activation", source.posts_ahead
                )

    def _receives(self, bridge: Bridge, post: Post, key: str, what: str, posts_ahead: bool = True) -> Receives:
        # A rank that would wait for itself must be told so when the schedule asks, not before.
        ahead = posts_ahead and id(bridge) not in self._ahead
        return Receives(bridge, post, f"{self._where(key)}: {what} over '{bridge.name}'", ahead)

    @property
    def links(self) -> tuple[list[Receives], list[Receives]]:
        """The receives of activations and those of gradients, one entry per link."""
        return self._activations, [link for links in self._gradients for link in links]

    def recv_forward(self, tensor_shape: Any) -> dict[str, torch.Tensor]:
        """All inputs of this stage: leaves that require grad, by key."""
        for source in self._inputs:
            self._count_receive(source.bridge, 0, source.key)
        # All are posted before the first is waited for: several encoders arrive side by side.
        pending = [
            (source, None if source.sharded else link.take())
            for source, link in zip(self._inputs, self._activations, strict=True)
        ]
        tensors: dict[str, torch.Tensor] = {}
        for source, handle in pending:
            if handle is None:
                tensors[source.key] = self._announce(source)
                continue
            tensor = handle.wait()
            if source.is_hop:
                restored = _restore_tensor_from_comm(tensor)
                if restored is not tensor:  # handed out as a leaf, so that its gradient is stored once
                    restored = restored.detach().requires_grad_(tensor.requires_grad)
                tensor = restored
                self._check_shape(tensor, tensor_shape, source.key)
            tensors[source.key] = tensor
        for source in self._inputs:
            tensor = tensors[source.key]
            if source.sharded or not tensor.requires_grad:  # not: one side runs under torch.no_grad()
                continue
            if source.gradients_ahead:
                source.gradients_ahead -= 1
            else:
                source.waiting.append(tensor.shape)
        return tensors

    def send_forward(
        self,
        output_dict: Any,
        queues: Mapping[str, deque[list[int]]] | None,
        row_counts: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Send all outputs of this stage.

        Rows per sample of 2-D outputs are in `row_counts` by module, in `queues` (one entry per output) or marked on
        the output.
        """
        given = self._given_row_counts(row_counts)
        tensors = [self._entry(output_dict, out.module, "output_dict", self._output_keys) for out in self._outputs]
        for output, tensor in zip(self._outputs, tensors, strict=True):
            self._check_output(tensor, output)
        counts_of = [
            self._take_row_counts(t, out, queues, given.get(out.module))
            for out, t in zip(self._outputs, tensors, strict=True)
        ]
        shards_of = [self._take_row_shards(out) for out in self._outputs]
        for output, links, tensor, counts, shards in zip(
            self._outputs, self._gradients, tensors, counts_of, shards_of, strict=True
        ):
            gradient_follows = torch.is_grad_enabled() and not output.gradients_ahead
            if gradient_follows:
                output.in_flight.append(Sent(tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad))
            elif torch.is_grad_enabled():
                output.gradients_ahead -= 1
            for index, (bridge, link) in enumerate(zip(output.bridges, links, strict=True)):
                if output.is_hop:
                    bridge.send_forward(_prepare_tensor_for_comm(tensor))
                else:
                    dealt = shards is not None and output.destinations[index] == self._sharded_to
                    options: dict[str, Any] = {"row_shards": shards} if dealt else {"row_counts": counts}
                    bridge.send_forward(tensor, **options)
                    self._count_send(bridge, 0)
                if gradient_follows:
                    link.expect()

    def recv_backward(self, tensor_shape: Any) -> dict[str, torch.Tensor | None]:
        """The gradients of all outputs of this stage, each summed over the modules that it went to."""
        for output in self._outputs:
            for bridge in output.bridges:
                self._count_receive(bridge, 1, output.module)
        pending = [
            (output, [link.take() for link in links])
            for output, links in zip(self._outputs, self._gradients, strict=True)
        ]
        grads: dict[str, torch.Tensor | None] = {}
        for output, handles in pending:
            total: torch.Tensor | None = None
            for handle in handles:
                grad = handle.wait()
                if grad is not None:
                    total = grad if total is None else total + grad
            if output.is_hop and total is not None:
                total = _restore_tensor_from_comm(total)
                self._check_shape(total, tensor_shape, output.module)
            sent = output.in_flight.popleft() if output.in_flight else None
            if sent is None:
                output.gradients_ahead += 1
            if total is None and sent is not None and sent.requires_grad:
                # The schedule runs this output's backward in any case, and needs a gradient for it.
                total = torch.zeros(sent.shape, dtype=sent.dtype, device=sent.device)
            grads[output.module] = total
        return grads

    def send_backward(self, grad_dict: Any) -> None:
        """Send the gradients of all inputs of this stage; None says that there is none."""
        grads = [self._entry(grad_dict, source.key, "grad_dict", self._input_keys) for source in self._inputs]
        for source, grad in zip(self._inputs, grads, strict=True):
            self._check_gradient(grad, source)
        for source, grad in zip(self._inputs, grads, strict=True):
            if source.waiting:
                source.waiting.popleft()
            elif not source.sharded:
                source.gradients_ahead += 1
            source.bridge.send_backward(_prepare_tensor_for_comm(grad) if source.is_hop else grad)
            self._count_send(source.bridge, 1)

    def _announce(self, source: Input) -> torch.Tensor:
        """A leaf for rows that the model is going to receive."""
        assert self._sharding is not None
        tensor = torch.empty(0, dtype=self._dtype, device=self._device, requires_grad=torch.is_grad_enabled())
        self._sharding.arriving[source.key].append(ArrivingRows(tensor, source.bridge))
        return tensor

    def _take_row_shards(self, output: Output) -> RowShards | None:
        sharding = self._sharding
        if sharding is None or output.module not in sharding.modules or self._sharded_to not in output.destinations:
            return None
        queue = sharding.row_shards[output.module]
        if not queue:
            raise ValueError(
                f"{self._where(output.module)}: expected an output of which the model knows where its rows go, got "
                "one without: give input_ids to the encoder's ranks, once for each output that is sent, or build the "
                "model with sharded_delivery=False"
            )
        return queue.popleft()

    def _where(self, module: str) -> str:
        return f"rank {self._rank}, module {module}"

    def _count_send(self, bridge: Bridge, direction: int) -> None:
        if id(bridge) in self._ahead:
            self._ahead[id(bridge)][direction] += 1

    def _count_receive(self, bridge: Bridge, direction: int, key: str) -> None:
        if id(bridge) not in self._ahead:
            return
        if self._ahead[id(bridge)][direction] == 0:
            raise RuntimeError(
                f"{self._where(key)}: expected a send over this bridge before a receive from it, got the "
                "receive first: the rank is on both sides and would wait for itself. Modules on the same ranks "
                "exchange tensors inside the model: make no communicator for them and train with "
                "forward_backward_no_pipelining (MimoModel builds the bridges, see its build_bridges)"
            )
        self._ahead[id(bridge)][direction] -= 1

    def _entry(self, tensors: Any, key: str, what: str, expected: list[str]) -> Any:
        if not isinstance(tensors, dict):
            raise TypeError(
                f"{self._where(key)}: expected {what} as a dict with keys {expected}, got {type(tensors).__name__}"
            )
        if key not in tensors:
            raise ValueError(
                f"{self._where(key)}: expected {what} with keys {expected}, got {sorted(map(str, tensors))}"
            )
        value = tensors[key]
        if isinstance(value, list):  # the schedule's form for model chunks
            if len(value) != 1:
                raise ValueError(f"{self._where(key)}: expected one tensor per module, got a list of {len(value)}")
            value = value[0]
        return value

    def _check_output(self, tensor: Any, output: Output) -> None:
        where = self._where(output.module)
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{where}: expected an output tensor, got {type(tensor).__name__}")
        if output.ndim is not None and tensor.ndim != output.ndim:
            raise ValueError(
                f"{where}: expected an output of {output.ndim} dimensions (module_output_ndim), got shape "
                f"{tuple(tensor.shape)}"
            )
        if output.is_hop:
            try:
                _prepare_tensor_for_comm(tensor)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        if tensor.dtype != self._dtype:
            raise TypeError(f"{where}: expected an output of {self._dtype} (config.pipeline_dtype), got {tensor.dtype}")
        if tensor.device.type != self._device.type:
            raise ValueError(f"{where}: expected an output on {self._device}, got one on {tensor.device}")

    def _check_gradient(self, grad: Any, source: Input) -> None:
        where = self._where(source.key)
        if grad is None:
            return
        if not isinstance(grad, torch.Tensor):
            raise TypeError(f"{where}: expected a gradient or None, got {type(grad).__name__}")
        if grad.dtype != self._dtype:
            raise TypeError(f"{where}: expected a gradient of {self._dtype} (config.pipeline_dtype), got {grad.dtype}")
        if grad.device.type != self._device.type:
            raise ValueError(f"{where}: expected a gradient on {self._device}, got one on {grad.device}")
        shape = source.waiting[0] if source.waiting else None
        if shape is not None and grad.shape != shape:
            raise ValueError(
                f"{where}: expected a gradient of its input's shape {tuple(shape)}, got {tuple(grad.shape)}"
            )

    def _given_row_counts(self, row_counts: Any) -> dict[str, list[int]]:
        """`row_counts=` of a send, for modules of this rank that send something."""
        if row_counts is None:
            return {}
        if not isinstance(row_counts, Mapping):
            raise TypeError(f"rank {self._rank}: expected row_counts as a dict, got {type(row_counts).__name__}")
        unknown = sorted(str(name) for name in row_counts if name not in self._output_keys)
        if unknown:
            raise ValueError(f"rank {self._rank}: expected row_counts with keys of {self._output_keys}, got {unknown}")
        return {
            name: checked_ints(self._where(name), "row_counts", counts)
            for name, counts in row_counts.items()
            if counts is not None
        }

    def _take_row_counts(
        self,
        tensor: torch.Tensor,
        output: Output,
        queues: Mapping[str, deque[list[int]]] | None,
        given: list[int] | None,
    ) -> list[int] | None:
        if tensor.ndim != 2:
            if given is not None and not output.is_hop:
                raise ValueError(
                    f"{self._where(output.module)}: expected a 2-D output [rows, h] for row_counts, got shape "
                    f"{tuple(tensor.shape)}"
                )
            return None
        marked = getattr(tensor, SPLIT_SIZES_ATTRIBUTE, None)
        counts = None if marked is None else checked_ints(self._where(output.module), SPLIT_SIZES_ATTRIBUTE, marked)
        if given is not None:
            if counts is not None and counts != given:
                raise ValueError(
                    f"{self._where(output.module)}: expected rows per sample {given} (row_counts), got an output "
                    f"marked {counts}"
                )
            counts = given
        queue = None if queues is None else queues.get(output.module)
        if queue:
            queued = checked_ints(self._where(output.module), "model.row_counts", queue.popleft())
            if counts is not None and counts != queued:
                said = "row_counts" if given is not None else "an output marked"
                raise RuntimeError(
                    f"{self._where(output.module)}: expected rows per sample {queued} (model.row_counts), got "
                    f"{said} {counts}: a forward was run whose output was not sent, or an output was sent twice"
                )
            counts = queued
        if output.is_hop:
            return None
        if counts is not None and any(rows < 0 for rows in counts):
            raise ValueError(f"{self._where(output.module)}: expected rows per sample of 0 or more, got {counts}")
        if counts is not None and sum(counts) != tensor.shape[0]:
            raise ValueError(
                f"{self._where(output.module)}: expected {sum(counts)} rows (rows per sample {counts}), got an output "
                f"of shape {tuple(tensor.shape)}"
            )
        if counts is None and tensor.shape[0] % output.row_parts:
            raise ValueError(
                f"{self._where(output.module)}: expected rows that split evenly into {output.row_parts} parts for the "
                f"lanes downstream, got an output of shape {tuple(tensor.shape)}; where samples differ in their rows, "
                "pass row_counts"
            )
        return counts

    def _check_shape(self, tensor: torch.Tensor, shape: Any, module: str) -> None:
        if isinstance(shape, list) and len(shape) == 1 and not is_single_shape(shape):
            shape = shape[0]
        if is_single_shape(shape) and tuple(shape) != tuple(tensor.shape):
            raise RuntimeError(
                f"{self._where(module)}: expected shape {tuple(shape)} from the neighbouring stage, got "
                f"{tuple(tensor.shape)}"
            )
