"""The link between the pipeline stages of one module: rank to same-coordinate rank, over `mimo_ext.Bridge`.

The link between two modules is `mimo_ext.megatron.bridge_communicator`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from mimo_ext.megatron.adapters import is_single_shape
from mimo_ext.megatron.topology import GridShape

if TYPE_CHECKING:
    from mimo_ext import Bridge

Shape = list[int] | torch.Size


class StageCommunicator:
    """Transfers between the pipeline stages of one module, under the method names of Megatron's P2PCommunicator.

    Tensors are 3-D, `[s, b, h]` or whatever the stages exchange; a shape goes along with each, so that it may change
    from one microbatch to the next. A shape that is given to a receive is a promise and is checked. Sends do not wait
    for the peer. Received activations are leaves that require grad.

    Attributes:
        config: the ModelParallelConfig.
        prev_rank, next_rank: the peers in the neighbouring stages; None at the ends of the module.
        previous, next: the bridges from the previous stage and to the next one; None at the ends of the module.
    """

    virtual_pipeline_model_parallel_size = None

    def __init__(
        self,
        grid: GridShape,
        rank: int,
        config: Any,
        previous: Bridge | None,
        following: Bridge | None,
        get_pp_group: Callable[[], Any],
    ) -> None:
        self.module_name = grid.module
        self.config = config
        self.previous = previous
        self.next = following
        self._rank = rank
        self._stage = grid.pp_rank(rank)
        self._num_stages = grid.pp_size
        self._get_pp_group = get_pp_group
        index = grid.stage_ranks(self._stage).index(rank)
        self.prev_rank = grid.stage_ranks(self._stage - 1)[index] if previous is not None else None
        self.next_rank = grid.stage_ranks(self._stage + 1)[index] if following is not None else None

    @property
    def pp_group(self) -> Any:
        """The grid's own "pp" process group, where its owner has created one; not used for the transfers."""
        return self._get_pp_group()

    @property
    def is_pp_first_stage(self) -> bool:
        return self._stage == 0

    @property
    def is_pp_last_stage(self) -> bool:
        return self._stage == self._num_stages - 1

    @property
    def total_stages(self) -> int:
        """Pipeline stages of this module alone."""
        return self._num_stages

    @property
    def current_stage(self) -> int:
        """Stage of this rank within this module, from 0."""
        return self._stage

    def recv_forward(self, tensor_shapes: Any, is_first_stage: bool) -> Any:
        """One activation per shape, None where `is_first_stage`; a list where `tensor_shapes` is a list of shapes."""
        return self._each(tensor_shapes, lambda shape: None if is_first_stage else self._recv_activation(shape))

    def recv_backward(self, tensor_shapes: Any, is_last_stage: bool) -> Any:
        """One gradient per shape, None where `is_last_stage`; a list where `tensor_shapes` is a list of shapes."""
        return self._each(tensor_shapes, lambda shape: None if is_last_stage else self._recv_gradient(shape))

    def send_forward(self, output_tensors: torch.Tensor | list[torch.Tensor], is_last_stage: bool) -> None:
        if not is_last_stage:
            for tensor in output_tensors if isinstance(output_tensors, list) else [output_tensors]:
                self._next().send_forward(tensor)

    def send_backward(self, input_tensor_grads: Any, is_first_stage: bool) -> None:
        """Send one gradient or a list of them; None travels as "no gradient"."""
        if not is_first_stage:
            for grad in input_tensor_grads if isinstance(input_tensor_grads, list) else [input_tensor_grads]:
                self._previous().send_backward(grad)

    def send_forward_recv_backward(self, output_tensors: Any, tensor_shapes: Any, is_last_stage: bool) -> Any:
        """All sends, then one gradient per tensor: a list where `output_tensors` is one."""
        self.send_forward(output_tensors, is_last_stage)
        return self._each_like(
            output_tensors, tensor_shapes, lambda shape: None if is_last_stage else self._recv_gradient(shape)
        )

    def send_backward_recv_forward(self, input_tensor_grads: Any, tensor_shapes: Any, is_first_stage: bool) -> Any:
        """All sends, then one activation per gradient: a list where `input_tensor_grads` is one."""
        self.send_backward(input_tensor_grads, is_first_stage)
        return self._each_like(
            input_tensor_grads, tensor_shapes, lambda shape: None if is_first_stage else self._recv_activation(shape)
        )

    def send_forward_recv_forward(
        self, output_tensor: torch.Tensor, recv_prev: bool, tensor_shape: Any, overlap_p2p_comm: bool = False
    ) -> torch.Tensor | None:
        """Send to the next stage (None sends nothing) and receive from the previous one where `recv_prev`."""
        self._refuse_overlap(overlap_p2p_comm)
        if output_tensor is not None:
            self._next().send_forward(output_tensor)
        return self._recv_activation(tensor_shape) if recv_prev else None

    def send_backward_recv_backward(
        self, input_tensor_grad: torch.Tensor, recv_next: bool, tensor_shape: Any, overlap_p2p_comm: bool = False
    ) -> torch.Tensor | None:
        """Send to the previous stage (None sends nothing, as in Megatron) and receive from the next where
        `recv_next`.
        """
        self._refuse_overlap(overlap_p2p_comm)
        if input_tensor_grad is not None:
            self._previous().send_backward(input_tensor_grad)
        return self._recv_gradient(tensor_shape) if recv_next else None

    def send_forward_backward_recv_forward_backward(
        self,
        output_tensor: torch.Tensor,
        input_tensor_grad: torch.Tensor,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Both sends (None sends nothing), then both receives: `(activation, gradient)`."""
        if output_tensor is not None:
            self._next().send_forward(output_tensor)
        if input_tensor_grad is not None:
            self._previous().send_backward(input_tensor_grad)
        activation = self._recv_activation(tensor_shape) if recv_prev else None
        return activation, self._recv_gradient(tensor_shape) if recv_next else None

    def _recv_activation(self, shape: Any) -> torch.Tensor:
        return self._checked(self._previous().recv_forward(), shape, "an activation")

    def _recv_gradient(self, shape: Any) -> torch.Tensor | None:
        grad = self._next().recv_backward()
        return None if grad is None else self._checked(grad, shape, "a gradient")

    def _checked(self, tensor: torch.Tensor, shape: Any, what: str) -> torch.Tensor:
        if is_single_shape(shape) and tuple(shape) != tuple(tensor.shape):
            raise RuntimeError(
                f"rank {self._rank}, module {self.module_name}, stage {self._stage}: expected {what} of shape "
                f"{tuple(shape)}, got {tuple(tensor.shape)}"
            )
        return tensor

    def _previous(self) -> Bridge:
        return self._neighbour(self.previous, "previous", "first")

    def _next(self) -> Bridge:
        return self._neighbour(self.next, "next", "last")

    def _neighbour(self, bridge: Bridge | None, which: str, end: str) -> Bridge:
        if bridge is None:
            raise RuntimeError(
                f"rank {self._rank}, module {self.module_name}: expected a {which} pipeline stage, but stage "
                f"{self._stage} of {self._num_stages} is the {end}"
            )
        return bridge

    @staticmethod
    def _each(shapes: Any, receive: Callable[[Any], Any]) -> Any:
        if isinstance(shapes, list | tuple) and len(shapes) > 0 and not is_single_shape(shapes):
            return [receive(shape) for shape in shapes]
        return receive(shapes)

    @staticmethod
    def _each_like(sent: Any, shapes: Any, receive: Callable[[Any], Any]) -> Any:
        many = isinstance(shapes, list | tuple) and len(shapes) > 0 and not is_single_shape(shapes)
        if not isinstance(sent, list):
            return receive(shapes[0] if many else shapes)
        if many and len(shapes) != len(sent):
            raise ValueError(f"expected one shape per tensor, got {len(shapes)} shapes for {len(sent)} tensors")
        return [receive(shapes[i] if many else shapes) for i in range(len(sent))]

    @staticmethod
    def _refuse_overlap(overlap_p2p_comm: bool) -> None:
        if overlap_p2p_comm:
            # It returns the tensor before its shape has come; the schedules that ask for it interleave model chunks.
            raise NotImplementedError("overlap_p2p_comm=True: interleaved schedules are not supported between modules")
