"""Training over many layouts against the same model in one process without parallelism, schedule or bridge."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from vlm_digits.check import LAYOUTS, STEPS, TOLERANCE, Comparison, check_layouts, compare, record_reference

SEED = 3


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what the single process did."""
    folder = tmp_path_factory.mktemp("reference")
    record_reference(folder, SEED, STEPS)
    return folder


def assert_equals_one_process(found: Comparison, reference: Path, steps: int) -> None:
    assert len(found.losses) == steps
    assert found.losses[-1] < found.losses[0]
    assert found.loss_error <= TOLERANCE
    assert found.first_layer_error <= TOLERANCE
    assert found.worst_gradient[1] <= TOLERANCE, found.worst_gradient
    everything = torch.load(reference / "reference.pt", weights_only=True)["fp32"]["gradients"][0]
    assert set(found.gradient_errors) == set(everything)  # no parameter of either module was left out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_equal_one_process(layout: str, reference: Path) -> None:
    assert_equals_one_process(compare(layout, reference, SEED, STEPS), reference, STEPS)


def forbid_upstream() -> None:
    """Make the constructors of Megatron's own transfers raise, on this rank."""
    from megatron.core.models.mimo.comm import colocated_communicator
    from megatron.core.pipeline_parallel import bridge_communicator, multimodule_communicator, p2p_communication

    def refuse(self: object, *args: object, **kwargs: object) -> None:
        raise AssertionError(f"{type(self).__name__} of megatron-core was constructed")

    for upstream in (
        bridge_communicator.BridgeCommunicator,
        p2p_communication.P2PCommunicator,
        multimodule_communicator.MultiModulePipelineCommunicator,
        colocated_communicator.ColocatedBridgeCommunicator,
    ):
        upstream.__init__ = refuse
        with pytest.raises(AssertionError, match="was constructed"):
            upstream()


@pytest.mark.parametrize("layout", ["images: dp=2; language: tp=2", "images: dp=2; language: dp=2,pp=2"])
def test_nothing_of_upstreams_bridge_is_used(layout: str, reference: Path) -> None:
    found = compare(layout, reference, SEED, STEPS, prepare=forbid_upstream)
    assert found.agrees, (found.loss_error, found.worst_gradient)


def scale_encoder_wrongly() -> None:
    """Make this rank's encoder gradients 1 % too large, as a wrong correction for unequal DP would."""
    from vlm_digits import trainer

    finalize = trainer.finalize_model_grads_multimodule

    def finalize_wrongly(*args: object, **kwargs: object) -> None:
        finalize(*args, **kwargs)
        infra = kwargs["infra"]
        for module, grid in kwargs["module_to_grid_tuple"]:
            if grid is infra.module_to_grid_map["images"]:
                module.scale_gradients(1.01)

    trainer.finalize_model_grads_multimodule = finalize_wrongly


def test_a_wrong_factor_is_noticed(reference: Path) -> None:
    found = compare("images: dp=2; language: tp=1", reference, SEED, 2, prepare=scale_encoder_wrongly)
    assert not found.agrees
    assert found.first_layer_error == pytest.approx(0.01, rel=1e-2)
    language = [error for name, error in found.gradient_errors.items() if name.startswith("language_model")]
    assert max(language) <= TOLERANCE  # only what is wrong is reported: the first update has a learning rate of 0


def swap_two_samples() -> None:
    """Let the last encoder lane see its samples in reverse order, as a bridge that delivers to wrong rows would."""
    import torch.distributed as dist
    from vlm_digits.data import NumberBatch

    lane = NumberBatch.lane

    def reversed_lane(self: NumberBatch, index: int, lanes: int) -> NumberBatch:
        mine = lane(self, index, lanes)
        if dist.get_rank() == 1:
            mine.images = mine.images.flip(0)
        return mine

    NumberBatch.lane = reversed_lane


def test_wrong_rows_are_noticed(reference: Path) -> None:
    found = compare("images: dp=2; language: tp=1", reference, SEED, 1, prepare=swap_two_samples)
    assert not found.agrees
    assert found.first_layer_error > 100 * TOLERANCE


def test_table_and_exit_code(capfd: pytest.CaptureFixture[str]) -> None:
    assert check_layouts(SEED, ("images: tp=1; language: tp=1", "images: dp=2; language: tp=1"), steps=2) == 0
    out = capfd.readouterr().out
    assert "images: dp=2; language: tp=1" in out
    assert out.rstrip().endswith("all 2 layouts agree within 0.0001")
