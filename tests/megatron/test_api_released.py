"""Names of the released generation that docs/api.toml lists and no other test looks at."""

from __future__ import annotations

import pytest
import torch

from mimo_ext.megatron.config import MegatronMIMOParallelismConfig, MimoParallelismConfig, ModuleParallelismConfig
from mimo_ext.megatron.provider import MegatronMIMOProvider, MimoModelProvider


def test_expert_tensor_parallel_ranks_count() -> None:
    sizes = ModuleParallelismConfig(tensor_model_parallel_size=4, data_parallel_size=2, expert_tensor_parallel_size=2)
    assert sizes.dense_model_parallel_size == 4
    assert sizes.expert_data_parallel_size == 4
    sizes.finalize(8)
    with pytest.raises(ValueError, match=r"TP \* CP \* DP must be divisible .*ETP=3, EP=1"):
        ModuleParallelismConfig(data_parallel_size=4, expert_tensor_parallel_size=3).finalize(4)


@pytest.mark.parametrize("kind", [MimoParallelismConfig, MegatronMIMOParallelismConfig])
def test_config_carries_token_ids(kind: type[MimoParallelismConfig]) -> None:
    modules = {"language": ModuleParallelismConfig(data_parallel_size=1)}
    assert kind(modules).special_token_ids == {}
    assert kind(modules).special_token_ids is not kind(modules).special_token_ids
    assert kind(modules, {"images": 9}).special_token_ids == {"images": 9}


class Part(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trained = torch.nn.Parameter(torch.ones(2))
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("positions", torch.arange(4))


@pytest.mark.parametrize("face", [MimoModelProvider, MegatronMIMOProvider])
def test_what_ddp_leaves_on_the_cpu_is_moved(monkeypatch: pytest.MonkeyPatch, face: type[MimoModelProvider]) -> None:
    """DDP moves trained parameters itself, nothing moves the others."""
    moved: list[tuple[int, str]] = []

    def to(tensor: torch.Tensor, device: str) -> torch.Tensor:
        moved.append((tensor.numel(), device))
        return tensor

    monkeypatch.setattr("torch.Tensor.to", to)
    monkeypatch.setattr("torch.cuda.current_device", lambda: "the GPU")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    face._move_frozen_params_to_device(Part())
    assert moved == []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    face._move_frozen_params_to_device(Part())
    assert moved == [(3, "the GPU"), (4, "the GPU")]
