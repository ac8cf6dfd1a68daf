"""The layers for sequence and context parallelism against Megatron's local ones on the whole sequence."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_mimo
import torch
import torch.distributed as dist
from launch import launch

LENGTH, BATCH, HEAD = 16, 2, 8


class Group:
    """A process group of one rank, for layers that only ask its size."""

    def __init__(self, size: int = 1) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


ALONE = SimpleNamespace(tp=Group(), cp=Group())


def attention_config(groups: int = 4, cp: int = 1, **kwargs: Any) -> Any:
    defaults = {"num_query_groups": groups, "kv_channels": HEAD, "context_parallel_size": cp}
    return tiny_mimo.config(4 * HEAD, 4, torch.float32, False, **(defaults | kwargs))


def attention(cls: Any, config: Any, pg_collection: Any, mask_type: str = "causal") -> Any:
    from megatron.core.transformer.enums import AttnMaskType

    return cls(
        config=config,
        layer_number=1,
        attn_mask_type=AttnMaskType[mask_type],
        attention_type="self",
        pg_collection=pg_collection,
    )


def qkv(groups: int) -> list[torch.Tensor]:
    """Queries, keys, values and the gradient of the output, of the whole sequence."""
    generator = torch.Generator().manual_seed(groups)
    sizes = [(LENGTH, BATCH, heads, HEAD) for heads in (4, groups, groups)] + [(LENGTH, BATCH, 4 * HEAD)]
    return [torch.randn(size, generator=generator) for size in sizes]


def run(layer: Any, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output of a core attention, and the gradients of its inputs."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors[:3]]
    output = layer(*leaves, None)
    output.backward(tensors[3])
    return [output.detach(), *(leaf.grad for leaf in leaves)]


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "causal": (4, {}),
    "two query groups": (2, {}),
    "one query group": (1, {}),
    "no mask": (2, {}),
    "window": (4, {"window_size": (5, 0)}),
    "scaled by layer, softmax with a sink": (4, {"softmax_type": "off-by-one"}),
}


@pytest.mark.parametrize("case", CASES)
def test_without_context_parallelism_it_is_megatrons_attention(case: str) -> None:
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    import mimo_ext.megatron as mimo

    groups, options = CASES[case]
    mask = "no_mask" if case == "no mask" else "causal"
    with mimo.cpu():
        config = attention_config(groups, **options)
        expected = run(attention(DotProductAttention, config, ALONE, mask), qkv(groups))
        got = run(attention(mimo.cpu_layers.DotProductAttention, config, ALONE, mask), qkv(groups))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def context_parallel_attention(rank: int, world_size: int) -> None:
    """Each CP rank's output and gradients against Megatron's attention over the whole sequence."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    import mimo_ext.megatron as mimo

    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    with mimo.cpu():
        for cp, group in ((4, dist.group.WORLD), (2, pairs[rank // 2])):
            mine = mimo.cpu_layers.zigzag_positions(LENGTH // cp, group.rank(), cp)
            for case, (groups, options) in CASES.items():
                mask = "no_mask" if case == "no mask" else "causal"
                whole = qkv(groups)
                expected = run(attention(DotProductAttention, attention_config(groups, **options), ALONE, mask), whole)
                layer = attention(
                    mimo.cpu_layers.DotProductAttention,
                    attention_config(groups, cp, **options),
                    SimpleNamespace(tp=Group(), cp=group),
                    mask,
                )
                got = run(layer, [tensor[mine] for tensor in whole])
                for name, a, b in zip(("output", "dq", "dk", "dv"), got, expected, strict=True):
                    torch.testing.assert_close(
                        a, b[mine], rtol=1e-5, atol=1e-6, msg=lambda t, w=(case, cp, rank, name): f"{w}: {t}"
                    )


def test_context_parallel_attention_equals_the_whole_sequence() -> None:
    launch(context_parallel_attention, 4, timeout=60)


def test_zigzag_is_where_megatron_puts_the_tokens() -> None:
    from megatron.core.utils import get_batch_on_this_cp_rank

    from mimo_ext.megatron.cpu_layers import zigzag_positions

    assert zigzag_positions(4, 0, 2).tolist() == [0, 1, 6, 7]
    assert zigzag_positions(4, 1, 2).tolist() == [2, 3, 4, 5]
    tokens = torch.arange(24)
    for cp in (2, 3, 4):
        together = torch.cat([zigzag_positions(24 // cp, rank, cp) for rank in range(cp)])
        assert torch.equal(together.sort().values, tokens)
        for rank in range(cp):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dist, "get_world_size", lambda group=None, cp=cp: cp)
                patch.setattr(dist, "get_rank", lambda group=None, rank=rank: rank)
                batch = get_batch_on_this_cp_rank({"ids": tokens[None]}, is_hybrid_cp=False)
            assert torch.equal(batch["ids"][0], zigzag_positions(24 // cp, rank, cp))


def test_context_parallel_attention_refuses_what_it_cannot_mask() -> None:
    import mimo_ext.megatron as mimo

    pair = SimpleNamespace(tp=Group(), cp=Group(2))
    with mimo.cpu():
        layer = attention(mimo.cpu_layers.DotProductAttention, attention_config(cp=2), pair)
        q, k, v, _ = qkv(4)
        with pytest.raises(ValueError, match=r"rank 0 of 2: expected attention_mask=None .* shape \(16, 32\)"):
            layer(q, k, v, torch.zeros(16, 32, dtype=torch.bool))
        with pytest.raises(ValueError, match="expected a sequence length divisible by 4, got 30"):
            layer(q[:15], k[:15], v[:15], None)
        with pytest.raises(AssertionError, match="Packed sequence is not supported"):
            layer(q, k, v, None, packed_seq_params=object())
        with pytest.raises(ValueError, match=r"layer 1: expected a context-parallel group of 2 ranks .* got 1"):
            attention(mimo.cpu_layers.DotProductAttention, attention_config(cp=2), ALONE)


@pytest.mark.parametrize(("kind", "weights"), [("LayerNorm", 2), ("RMSNorm", 1)])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norm_is_torchs_and_marked_for_sequence_parallelism(kind: str, weights: int, sequence_parallel: bool) -> None:
    from mimo_ext.megatron.cpu_layers import TorchNorm

    config = attention_config(
        normalization=kind, sequence_parallel=sequence_parallel, tensor_model_parallel_size=1 + sequence_parallel
    )
    norm = TorchNorm(config=config, hidden_size=8, eps=0.1)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected = getattr(torch.nn, kind)(8, eps=0.1)
    assert torch.equal(norm(x), expected(x))
    assert [p.sequence_parallel for p in norm.parameters()] == [sequence_parallel] * weights
    assert list(norm.state_dict()) == list(expected.state_dict())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("normalization", "L2Norm"),
        ("layernorm_zero_centered_gamma", True),
        ("persist_layer_norm", True),
        ("memory_efficient_layer_norm", True),
    ],
)
def test_norm_that_torch_does_not_have_is_refused(field: str, value: Any) -> None:
    from mimo_ext.megatron.cpu_layers import TorchNorm

    config = copy.copy(attention_config())
    setattr(config, field, value)
    with pytest.raises(ValueError, match=field):
        TorchNorm(config=config, hidden_size=8)


def test_layer_spec_is_megatrons_but_for_norms_and_attention() -> None:
    from megatron.core.models.backends import LNImpl
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.identity_op import IdentityOp

    from mimo_ext.megatron import cpu_layers

    theirs, ours = get_gpt_layer_local_spec(qk_layernorm=True), cpu_layers.get_gpt_layer_local_spec(qk_layernorm=True)
    attention_parts = ours.submodules.self_attention.submodules
    assert ours.module is theirs.module
    assert attention_parts.core_attention is cpu_layers.DotProductAttention
    assert attention_parts.linear_qkv is theirs.submodules.self_attention.submodules.linear_qkv
    for norm in (
        ours.submodules.input_layernorm,
        ours.submodules.pre_mlp_layernorm,
        attention_parts.q_layernorm,
        attention_parts.k_layernorm,
    ):
        assert norm is cpu_layers.TorchNorm
    plain = cpu_layers.get_gpt_layer_local_spec().submodules.self_attention.submodules
    assert plain.q_layernorm is plain.k_layernorm is IdentityOp
    assert theirs.submodules.input_layernorm is LNImpl  # what other specs use has not changed


def gpt(pg_collection: Any, tp: int, cp: int, position: str, spec: Any, **options: Any) -> Any:
    from megatron.core.models.gpt import GPTModel

    return GPTModel(
        config=tiny_mimo.config(
            tiny_mimo.HIDDEN,
            4,
            torch.float32,
            False,
            num_layers=2,
            num_query_groups=2,
            tensor_model_parallel_size=tp,
            context_parallel_size=cp,
            **options,
        ),
        transformer_layer_spec=spec,
        vocab_size=tiny_mimo.VOCAB,
        max_sequence_length=tiny_mimo.SEQ,
        position_embedding_type=position,
        pg_collection=pg_collection,
    )


def shard_of(parameter: torch.nn.Parameter, tensor: torch.Tensor, tp_rank: int) -> torch.Tensor:
    """This TP rank's part of a whole weight or gradient."""
    if tensor.shape == parameter.shape:
        return tensor
    axis = parameter.partition_dim
    return tensor.chunk(tensor.size(axis) // parameter.size(axis), dim=axis)[tp_rank]


def parallel_language_model(rank: int, world_size: int, cases: list[tuple[int, int, dict[str, Any]]]) -> None:
    """Token losses and all gradients of a GPT over TP (with SP) x CP against Megatron's local layers in one process."""
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.process_groups_config import ProcessGroupCollection

    import mimo_ext.megatron as mimo

    def groups_of(tp: int, cp: int) -> Any:
        grid = HyperCommGrid([tp, cp, world_size // (tp * cp)], ["tp", "cp", "pp"], backend="gloo")
        one = HyperCommGrid([1, world_size], ["pp", "tp"], backend="gloo").create_pg("pp")
        names = {"tp": grid.create_pg("tp"), "cp": grid.create_pg("cp"), "tp_cp": grid.create_pg(["tp", "cp"])}
        return ProcessGroupCollection(**names, pp=one, embd=one, ep=one, expt_tp=one, tp_ep=one, expt_dp=one)

    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, tiny_mimo.VOCAB, (2, tiny_mimo.SEQ), generator=generator)
    labels = torch.randint(0, tiny_mimo.VOCAB, (2, tiny_mimo.SEQ), generator=generator)
    weights = torch.rand(2, tiny_mimo.SEQ, generator=generator)
    positions = torch.arange(tiny_mimo.SEQ).expand(2, -1)
    with mimo.cpu():
        alone = groups_of(1, 1)
        for tp, cp, options in cases:
            position = options.pop("position")
            mimo.cpu.manual_seed(11, alone)
            qk_layernorm = options.get("qk_layernorm", False)
            whole = gpt(alone, 1, 1, position, get_gpt_layer_local_spec(qk_layernorm=qk_layernorm), **options)
            for parameter in whole.parameters():  # norms and biases start from other values than 1 and 0
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
            expected = whole(tokens, positions, None, labels=labels)
            (expected * weights).sum().backward()

            groups = groups_of(tp, cp)
            spec = mimo.cpu_layers.get_gpt_layer_local_spec(qk_layernorm=qk_layernorm)
            model = gpt(groups, tp, cp, position, spec, sequence_parallel=tp > 1, **options)
            full = dict(whole.named_parameters())
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(shard_of(parameter, full[name], groups.tp.rank()))
            mine = mimo.cpu_layers.zigzag_positions(tiny_mimo.SEQ // cp, groups.cp.rank(), cp)
            losses = model(tokens[:, mine], positions[:, mine], None, labels=labels[:, mine])
            torch.testing.assert_close(losses, expected[:, mine], rtol=1e-5, atol=1e-6)
            (losses * weights[:, mine]).sum().backward()
            for name, parameter in model.named_parameters():
                if getattr(parameter, "sequence_parallel", False) or (
                    "_layernorm" in name and "self_attention" in name
                ):
                    dist.all_reduce(parameter.grad, group=groups.tp)
                dist.all_reduce(parameter.grad, group=groups.cp)
                gradient = shard_of(parameter, full[name].grad, groups.tp.rank())
                error = float((parameter.grad - gradient).abs().max() / gradient.abs().max())
                assert error < 1e-5, (tp, cp, position, rank, name, error)


def test_language_model_over_context_and_sequence_parallel_ranks_equals_one_process() -> None:
    cases = [
        (1, 4, {"position": "rope"}),
        (1, 4, {"position": "learned_absolute", "normalization": "RMSNorm"}),
        (2, 1, {"position": "rope"}),
        (2, 1, {"position": "learned_absolute", "normalization": "RMSNorm", "qk_layernorm": True}),
        (2, 2, {"position": "rope", "qk_layernorm": True}),
        (2, 2, {"position": "learned_absolute"}),
        (2, 2, {"position": "rope", "rotary_interleaved": True, "recompute_granularity": "selective"}),
    ]
    launch(parallel_language_model, 4, cases, timeout=60)


def test_under_sequence_parallelism_the_embedding_does_not_scatter() -> None:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.spec_utils import ModuleSpec

    from mimo_ext.megatron._specs import leave_scattering_to_mimo_model

    class Other:
        def __init__(self, config: Any) -> None:
            self.config = config

    option = "scatter_embedding_sequence_parallel"
    plain = attention_config()
    parallel = attention_config(sequence_parallel=True, tensor_model_parallel_size=2)
    for module, config, given, expected in [
        (GPTModel, parallel, {}, {option: False}),
        (GPTModel, parallel, {option: True}, {option: False}),
        (GPTModel, plain, {}, {}),
        (Other, parallel, {}, {}),
    ]:
        spec = ModuleSpec(module=module, params={"config": config, **given})
        leave_scattering_to_mimo_model(spec)
        assert spec.params == {"config": config, **expected}
