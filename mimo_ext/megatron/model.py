"""The model that our provider builds: megatron-core's MimoModel with the seam between its modules replaced."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.models.mimo import MimoModel as _CoreMimoModel
from megatron.core.models.mimo.config import MimoModelConfig
from megatron.core.models.mimo.submodules.base import ModalitySubmodules
from megatron.core.utils import unwrap_model

from mimo_ext.megatron.alignment import align
from mimo_ext.megatron.colocated import ColocatedBridges, modules_to_bridge, sizes_of
from mimo_ext.megatron.module_random import ModuleRandomState, tp_rank_in
from mimo_ext.megatron.role import MIMO_LANGUAGE_MODULE_KEY, ModuleLayout, RankRole
from mimo_ext.megatron.sharded import HeldRows, OwnPart, SequenceShards, ShardedDelivery, leave_mark
from mimo_ext.megatron.stage_io import ArrivingRows


class MimoModel(_CoreMimoModel):
    """MimoModel of megatron-core 0.19 for every `ModuleLayout`, with ragged modality rows.

    Args:
        mimo_config: as in megatron-core.
        cp_group, tp_group: groups of the language model, on its ranks.
        sharded_delivery: whether each rank of a language model with sequence or context parallelism receives the rows
            of its own part of the sequence only (see `mimo_ext.megatron.sharded`). None: where that is possible. It
            takes a communicator that knows the model, by its `model` or its `config`, and ``input_ids`` on the
            encoders' ranks; of modules on the same ranks, encoders with other parallel sizes than the language model.
            True: raise where it is not possible. Equal on all ranks.

    Attributes:
        role: `RankRole` of this rank, from ``mimo_config.module_to_grid_map``.
        released_roles: class attribute. True gives roles whose mode is a member of megatron-core's own enum, for
            programs that compare it by identity.
        row_counts: modality name -> queue with the per-sample row counts (``list[int]``) of the last output of that
            encoder. The communicator takes the entry when it sends the output. An entry that nobody took is replaced
            by the next forward's; an empty queue means that the counts are unknown.
        sharded: what sharded delivery needs between modules on ranks of their own, None where there is none. The
            communicator takes from it, too.
        pg_collection: groups of this rank's module, set by the provider; Float16Module reads it.
        model_type: what the schedule without a pipeline asks of every model.

    Of an encoder with pipeline stages megatron-core runs the layers on the first one; the copies that it builds on the
    others are not trained.

    Modules on the language model's ranks may have other TP, CP and DP sizes than it has: see
    `mimo_ext.megatron.colocated` for which samples each rank gets then. The bridges between them are built by the first
    forward or `build_bridges`; `close` ends them.

    Raises:
        ValueError: rank ranges overlap in part, or the grids' keys are not the modules' names; `sharded_delivery` is
            True and cannot be.
        RuntimeError: this rank is in no grid.
        NotImplementedError: modules share their ranks and are pipelined there.
    """

    released_roles: ClassVar[bool] = False
    _role_is_fixed = False
    sharded: ShardedDelivery | None = None
    _sharded_here: ShardedDelivery | None = None  # the same between modules on the same ranks
    _part: OwnPart | None = None  # while the language model's first stage runs

    def __init__(
        self,
        mimo_config: MimoModelConfig,
        cp_group: Any = None,
        tp_group: Any = None,
        *,
        sharded_delivery: bool | None = None,
    ) -> None:
        modality_names = list(mimo_config.modality_submodules_spec)
        grids = mimo_config.module_to_grid_map
        # Modules on the language model's ranks with other sizes; each draws its random numbers apart.
        self._random_states: dict[str, ModuleRandomState] = {}
        self._bridges: ColocatedBridges | None = None
        if grids:
            self._role = RankRole.from_grid_map(grids, modality_names)
            if self._role.mode == ModuleLayout.COLOCATED:
                _check_colocated(grids)
                for name in modules_to_bridge(grids):
                    self._random_states[name] = ModuleRandomState(tp_rank_in(grids[name]))
        else:
            self._role = RankRole.unified([*modality_names, MIMO_LANGUAGE_MODULE_KEY])
        if self.released_roles:
            self._role = self._role.as_released()
        # megatron-core's constructor derives a role (wrong for pipelines on shared ranks) and bridges (its own) from
        # the grids. It gets none, and `role` keeps ours.
        self._role_is_fixed = True
        super().__init__(dataclasses.replace(mimo_config, module_to_grid_map=None), cp_group, tp_group)
        self._role_is_fixed = False
        self.mimo_config = mimo_config
        for submodule in self.modality_submodules.values():
            # What finalize_model_grads asks of every pipelined module, to sum the gradients of tied embeddings.
            submodule.pre_process = submodule.is_first_stage
            submodule.share_embeddings_and_output_weights = False
            if not submodule.is_first_stage and type(submodule).forward is ModalitySubmodules.forward:
                # Built on every stage, but run on the first only: DDP would wait for gradients that never come.
                submodule.encoders.requires_grad_(False)
        self.pg_collection: Any = None
        self.model_type = ModelType.encoder_or_decoder
        self.row_counts: dict[str, deque[list[int]]] = {name: deque(maxlen=1) for name in modality_names}
        obstacle = self._obstacle_to_sharded_delivery(modality_names)
        if sharded_delivery is True and obstacle is not None:
            raise ValueError(f"Rank {_rank()}: sharded_delivery=True: {obstacle}.")
        if sharded_delivery is not False and obstacle is None:
            config = mimo_config.language_model_spec.params["config"]
            delivery = ShardedDelivery.of(grids, config, modality_names)
            if self.role.mode == ModuleLayout.NON_COLOCATED:
                self.sharded = delivery
                leave_mark(config, delivery)
            else:
                self._sharded_here = delivery

    @property
    def role(self) -> RankRole:
        """What this rank runs."""
        return self._role

    @role.setter
    def role(self, role: RankRole) -> None:
        if not self._role_is_fixed:
            self._role = role

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        modality_inputs: dict[str, dict[str, Any]] | None = None,
        packing_kwargs: dict[str, Any] | None = None,
        row_counts: Mapping[str, Sequence[int]] | None = None,
    ) -> tuple[Any, torch.Tensor | None]:
        """Run this rank's modules.

        Args:
            input_ids: ``[b, s]`` int64, placeholders of the modalities included. Encoder ranks need the ids of their
                own samples, for the row counts; ranks of both the language model's.
            position_ids: ``[b, s]`` or None.
            attention_mask: None, or as the language model takes it.
            loss_mask, labels: ``[b, s]`` or None.
            modality_inputs: modality name -> encoder name -> keyword arguments of the encoder.
            packing_kwargs: fields of PackedSeqParams, or None.
            row_counts: only for modules on the language model's ranks with other parallel sizes: modality name -> rows
                of each sample of this rank's lane of that *encoder*. Given on all ranks or on none; without it the
                ranks tell one another what is in their ``input_ids``, which needs it on the host.

        Returns:
            ``(output, loss_mask)``. Output of an encoder rank: modality name -> ``[rows, h]``; of a language rank
            before the last stage: ``{"language": hidden states}``; otherwise what the language model returns.
        """
        if self.role.mode == ModuleLayout.NON_COLOCATED:
            input_tensors = getattr(self, "input_tensors", None)
            if self.role.has_modality_modules:
                return self._forward_encoders(input_ids, modality_inputs, _with_rows(input_tensors)), loss_mask
            return self._forward_language_module(
                input_ids, position_ids, attention_mask, loss_mask, labels, input_tensors, packing_kwargs
            )
        if self._random_states:
            rows = self._forward_bridged_encoders(input_ids, modality_inputs or {}, row_counts or {}, packing_kwargs)
            return self._forward_language_module(
                input_ids, position_ids, attention_mask, loss_mask, labels, rows, packing_kwargs
            )
        return self._forward_all_modules(
            input_ids, position_ids, attention_mask, loss_mask, labels, modality_inputs, packing_kwargs
        )

    def _obstacle_to_sharded_delivery(self, modality_names: Sequence[str]) -> str | None:
        """Why the rows cannot be delivered in shards; None where they can. The same on all ranks."""
        config, grids = self.mimo_config.language_model_spec.params["config"], self.mimo_config.module_to_grid_map
        if not grids or not modality_names:
            return "expected encoders with grids"
        if self.role.mode != ModuleLayout.NON_COLOCATED and sorted(self._random_states) != sorted(modality_names):
            return "expected encoders on ranks of their own, or with other parallel sizes than the language model"
        shards = SequenceShards.of(grids[MIMO_LANGUAGE_MODULE_KEY], config)
        if shards.num_shards == 1:
            return "expected a language model with sequence parallelism or context parallelism"
        if self.role.has_language_module:
            sharding = getattr(self.partition_adapter, "cfg", None)
            splits = (False, False) if sharding is None else (sharding.use_cp, sharding.seq_parallel)
            if splits != (shards.cp > 1, shards.sequence_parallel):
                return f"expected a language model that splits its sequence by {shards}, got one that does not"
        without_token = [name for name in modality_names if name not in self.special_token_ids]
        if without_token:
            return f"expected special_token_ids of {list(modality_names)}, got none of {without_token}"
        if getattr(self.mimo_config, "kv_format", "sbhd") != "sbhd":
            return f"expected kv_format 'sbhd', got {self.mimo_config.kv_format!r}"
        for method in ("align_embeddings_by_token_positions", "get_text_embeddings", "_shard_language_inputs"):
            if getattr(type(self), method) is not getattr(MimoModel, method):
                return f"expected MimoModel's own {method}, got that of {type(self).__name__}"
        return None

    def build_bridges(self, timeout: timedelta | None = None, transport: str | None = None) -> None:
        """Build the bridges between modules on the same ranks now, not in the first forward. Collective.

        Does nothing where there are none to build, or where they have been built.

        Args:
            timeout: how long a wait for a peer may last before it raises; default that of `mimo_ext.Bridge`.
            transport: what carries the rows, as of `mimo_ext.Bridge`.
        """
        if self._bridges is not None or not self._random_states:
            return
        config = self.mimo_config.language_model_spec.params["config"]
        dtype = getattr(config, "pipeline_dtype", None) or getattr(config, "params_dtype", None) or torch.float32
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        self._bridges = ColocatedBridges(
            self.mimo_config.module_to_grid_map,
            dtype,
            device=device,
            transport=transport,
            timeout=timeout,
            sharded=self._sharded_here,
        )

    @property
    def colocated_bridges(self) -> ColocatedBridges | None:
        """The bridges between modules on the same ranks; None before they are built."""
        return self._bridges

    def close(self) -> None:
        """Close the bridges of `build_bridges`; collective. A later forward builds them again."""
        bridges, self._bridges = self._bridges, None
        if bridges is not None:
            bridges.close()

    def destroy(self) -> None:
        """`close`, under the released generation's name."""
        super().destroy()
        self.close()

    def _initialize_submodules(self) -> None:
        """Build this rank's modality submodules; those with random states of their own draw their weights from them."""
        for name, spec in self.mimo_config.modality_submodules_spec.items():
            stage = self.role.modules.get(name)
            if stage is None:
                continue
            with self._random_state_of(name):
                self.modality_submodules[name] = spec.module.from_spec(
                    spec, is_first_stage=stage.is_first_stage, is_last_stage=stage.is_last_stage
                )

    def _random_state_of(self, name: str) -> contextlib.AbstractContextManager[None]:
        state = self._random_states.get(name)
        return contextlib.nullcontext() if state is None else state.own()

    def _forward_bridged_encoders(
        self,
        input_ids: torch.Tensor,
        modality_inputs: Mapping[str, Any],
        row_counts: Mapping[str, Sequence[int]],
        packing_kwargs: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """Run the encoders on this rank's samples of theirs; returns the rows of its samples of the language model.

        Under sharded delivery, `HeldRows` of its part of the sequence. Every rank takes part in every bridge, also
        where its samples have none of the modality.
        """
        self.build_bridges()
        bridges = self._bridges
        assert bridges is not None
        for name in bridges.names:
            if name not in row_counts:
                if name not in self.special_token_ids:
                    raise ValueError(
                        f"No special token ID defined for modality {name}: expected one of "
                        f"{sorted(self.special_token_ids)}."
                    )
                bridges.tell_counts(name, input_ids, self.special_token_ids[name])
        rows: dict[str, Any] = {}
        for name, submodule in self.modality_submodules.items():
            inputs = modality_inputs.get(name)
            with self._random_state_of(name):
                output = None if inputs is None else submodule.forward(encoder_inputs=inputs)
            if output is not None:
                rows[name] = output
        num_samples = bridges.num_samples(input_ids)
        for name in bridges.names:
            counts, sent = (row_counts[name], None) if name in row_counts else bridges.hear_counts(name)
            output = rows.get(name)
            if output is None:
                output = self._empty_encoder_output(name)
            # Asked of the weights, not of this output: all ranks must answer alike.
            trains = any(p.requires_grad for p in self.modality_submodules[name].parameters())
            if not trains and output.requires_grad and output.size(0):
                raise ValueError(
                    f"Rank {_rank()}, module '{name}': expected inputs without gradients for an encoder whose weights "
                    "are all frozen, got some that require them; no gradient travels back to it."
                )
            dealt = None
            if self._sharded_here is not None and sent is not None and not row_counts and packing_kwargs is None:
                ids = input_ids, self.special_token_ids[name]
                dealt = sent, self._sharded_here.row_shards_of(name, MIMO_LANGUAGE_MODULE_KEY, *ids)
            carried = bridges.carry(name, output, counts, num_samples, trains=trains, row_shards=dealt)
            rows[name] = carried if dealt is None else HeldRows(carried)
        return rows

    def _forward_language_module(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        input_tensors: dict[str, torch.Tensor] | None,
        packing_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Any, torch.Tensor | None]:
        """Run the language model; on its first stage with the rows that have been announced, if there are any."""
        delivery, arriving = self._sharded_here, _held(input_tensors)
        if self.sharded is not None:
            delivery, arriving = self.sharded, dict(self.sharded.take(input_tensors))
        if arriving:
            assert delivery is not None
            if packing_kwargs is not None:
                raise ValueError(
                    f"Rank {_rank()}, module '{MIMO_LANGUAGE_MODULE_KEY}': expected no packing_kwargs, got "
                    f"{sorted(packing_kwargs)}: packed sequences need sharded_delivery=False."
                )
            sharding = self.partition_adapter.cfg
            if sharding.seq_parallel and sharding.tp_comm_overlap and input_ids.size(-1) != sharding.max_seq_len:
                raise ValueError(
                    f"Rank {_rank()}, module '{MIMO_LANGUAGE_MODULE_KEY}': tp_comm_overlap: expected sequences of "
                    f"length {sharding.max_seq_len} (max_sequence_length), got {input_ids.size(-1)}."
                )
            groups = sharding.cp_group, sharding.tp_group
            self._part = OwnPart(delivery, input_ids, self.special_token_ids, arriving, *groups)
        try:
            return super()._forward_language_module(
                input_ids, position_ids, attention_mask, loss_mask, labels, input_tensors, packing_kwargs
            )
        finally:
            self._part = None

    def get_text_embeddings(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, special_token_ids: dict[str, int]
    ) -> torch.Tensor:
        """Embeddings of the text positions, ``[rows, h]``: of all, or of this rank's part under sharded delivery."""
        if self._part is not None:
            return self._part.text_embeddings(unwrap_model(self.language_model).embedding, position_ids)
        return super().get_text_embeddings(input_ids, position_ids, special_token_ids)

    def _shard_language_inputs(
        self,
        embeddings: torch.Tensor | None,
        labels: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
        packed_seq_params: Any = None,
    ) -> tuple[Any, ...]:
        """Cut the sequence for context and sequence parallelism, on every stage of the language model.

        Raises:
            ValueError: the sequence does not divide into the parts of the ranks.
        """
        if getattr(self, "_part", None) is not None:  # programs may call it on a stand-in for the model
            # The embeddings are those of this rank's positions already.
            _, *others = super()._shard_language_inputs(None, labels, loss_mask, packed_seq_params)
            return embeddings, *others
        if self.partition_adapter is not None and packed_seq_params is None:
            sharding = self.partition_adapter.cfg
            parts = 2 * sharding.cp_group.size() if sharding.use_cp else 1
            parts *= sharding.tp_group.size() if sharding.seq_parallel else 1
            lengths = {"embeddings": embeddings, "labels": labels, "loss_mask": loss_mask}
            for name, tensor in lengths.items():
                length = None if tensor is None else tensor.size(0 if name == "embeddings" else 1)
                if length is not None and length % parts:
                    raise ValueError(
                        f"Rank {_rank()}, module '{MIMO_LANGUAGE_MODULE_KEY}': expected a sequence length divisible by "
                        f"{parts} for context and sequence parallelism, got {name} of length {length}."
                    )
        return super()._shard_language_inputs(embeddings, labels, loss_mask, packed_seq_params)

    def align_embeddings_by_token_positions(
        self,
        modality_embeddings: dict[str, torch.Tensor],
        input_ids: torch.Tensor,
        special_token_ids: dict[str, int],
    ) -> torch.Tensor:
        """Put the rows of every modality at the positions of its token, in the order of ``input_ids``.

        On the CPU wrong counts raise here. On CUDA nothing waits for the device: they end in a device-side assertion.

        Args:
            modality_embeddings: modality name -> ``[rows, h]``; "text" has one row per position of no modality.
            input_ids: ``[b, s]`` or ``[s]``.
            special_token_ids: modality name -> token id.

        Returns:
            ``[s, b, h]``, contiguous, in the dtype of the text embeddings (of the first modality where there are none).
            Positions that no modality fills are zero. Under sharded delivery: of this rank's positions.

        Raises:
            ValueError: no embeddings; unknown modality; rows of different width; the number of rows is not the number
                of positions; positions of a modality whose embeddings are missing.
        """
        part = getattr(self, "_part", None)  # programs may call it on a stand-in for the model
        if part is not None:
            return part.combine(modality_embeddings["text"])
        return align(modality_embeddings, input_ids, special_token_ids)

    def _attach_modality_split_sizes(
        self, output: torch.Tensor, input_ids: torch.Tensor | None, encoder_name: str
    ) -> None:
        """Record how many rows of ``output`` belong to each sample, for the bridge that sends them.

        The counts go to ``row_counts[encoder_name]`` and onto the tensor (``_mimo_bridge_split_sizes``, which the
        released communicator reads). Only an output that leaves the module is counted.

        Raises:
            ValueError: the encoder gave more or fewer rows than ``input_ids`` has positions for.
        """
        queue = self._queue_of(encoder_name)
        queue.clear()
        if self.sharded is not None:
            self.sharded.row_shards[encoder_name].clear()
        token_id = self.special_token_ids.get(encoder_name)
        # A program's stand-in for the role may have a mode only.
        is_last_stage = getattr(self.role, "is_last_stage", lambda name: True)
        if token_id is None or input_ids is None or output.dim() != 2 or not is_last_stage(encoder_name):
            return
        # The host must know the counts before it can say where the rows go. Free where input_ids live on the host.
        counts = (input_ids == token_id).sum(dim=1).tolist()
        if sum(counts) != output.size(0):
            raise ValueError(
                f"Rank {_rank()}, module '{encoder_name}': expected {sum(counts)} rows, one for each position of "
                f"token {token_id} in input_ids (per sample: {counts}), got an output of {output.size(0)} rows."
            )
        queue.append(counts)
        if self.sharded is not None:
            shards = self.sharded.row_shards_of(encoder_name, encoder_name, input_ids, token_id)
            self.sharded.row_shards[encoder_name].append(shards)
        output._mimo_bridge_split_sizes = counts

    def _queue_of(self, encoder_name: str) -> deque[list[int]]:
        """Where the row counts of an encoder go; nowhere in a model whose constructor was not run (a stub)."""
        queues: dict[str, deque[list[int]]] = self.__dict__.get("row_counts", {})
        return queues[encoder_name] if encoder_name in queues else deque()

    def _empty_encoder_output(self, encoder_name: str) -> torch.Tensor:
        """What an encoder sends for a batch without its modality: ``[0, h of the language model]``.

        Device and dtype are those of the encoder's weights, as in every other batch.
        """
        language_config = self.mimo_config.language_model_spec.params["config"]
        hidden = getattr(language_config, "hidden_size", None)
        if hidden is None:
            raise ValueError("Language model config must define hidden_size for empty modality output.")
        dtype = getattr(language_config, "params_dtype", None) or torch.float32
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        submodules = getattr(self, "modality_submodules", {})
        weights = submodules[encoder_name].parameters() if encoder_name in submodules else ()
        weight = next((p for p in weights if p.is_floating_point()), None)
        if weight is not None:
            dtype, device = weight.dtype, weight.device
        return torch.empty((0, hidden), device=device, dtype=dtype, requires_grad=True)


def _held(input_tensors: Any) -> dict[str, ArrivingRows | HeldRows]:
    """Those of the language model's inputs that are rows of its own part of the sequence."""
    if not isinstance(input_tensors, dict):
        return {}
    return {name: rows for name, rows in input_tensors.items() if isinstance(rows, HeldRows)}


def _with_rows(input_tensors: Any) -> Any:
    """What an encoder's stage has received, without the empty batches.

    A batch without the modality was not run by the first stage, which does not know how wide its features would be:
    later stages must not run it either.
    """
    if not isinstance(input_tensors, dict):
        return input_tensors
    return {name: x for name, x in input_tensors.items() if not isinstance(x, torch.Tensor) or x.size(0) > 0}


def _check_colocated(grids: dict[str, Any]) -> None:
    """Refuse by name what modules on the language model's ranks cannot do."""
    language = grids[MIMO_LANGUAGE_MODULE_KEY]
    first, end = language.rank_offset, language.rank_offset + language.size
    for name, grid in grids.items():
        if (grid.rank_offset, grid.size) != (language.rank_offset, language.size):
            raise ValueError(
                f"Rank {_rank()}: module '{name}' has ranks [{grid.rank_offset}, {grid.rank_offset + grid.size}), the "
                f"language module has [{first}, {end}). MimoModel runs all modules on the language module's ranks or "
                "none: ranges that overlap in part, and layouts that mix both, are not supported."
            )
        sizes = sizes_of(grid)
        if sizes.get("pp", 1) > 1:
            raise NotImplementedError(
                f"Rank {_rank()}: colocated module '{name}' has pipeline_model_parallel_size={sizes['pp']}; modules "
                "on the same ranks run without pipeline parallelism."
            )


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
