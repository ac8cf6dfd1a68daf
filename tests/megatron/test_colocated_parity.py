"""Training with both modules on the same ranks, against the same model in one process without parallelism."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from test_parity import assert_equals_one_process, forbid_upstream
from vlm_digits.check import COLOCATED_LAYOUTS, compare, record_reference

SEED, STEPS = 4, 10
FAN_IN = "images: ranks=0-3,dp=4; language: ranks=0-3,tp=2,dp=2"
FAN_OUT = "images: ranks=0-3,tp=2,dp=2; language: ranks=0-3,dp=4"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what the single process did."""
    folder = tmp_path_factory.mktemp("reference")
    record_reference(folder, SEED, STEPS)
    return folder


@pytest.mark.parametrize("layout", [COLOCATED_LAYOUTS[0], FAN_IN, FAN_OUT])
def test_losses_and_gradients_equal_one_process_and_nothing_of_upstreams_communicators_is_used(
    layout: str, reference: Path
) -> None:
    found = compare(layout, reference, SEED, STEPS, prepare=forbid_upstream)
    assert_equals_one_process(found, reference, STEPS)


def take_lanes_of_the_language_model() -> None:
    """Give the encoder the samples of the language model's lane, as one loader for both modules would."""
    from vlm_digits import trainer

    lane = trainer.Trainer._lane

    def wrong_lane(self: trainer.Trainer, name: str, microbatch: object) -> object:
        return lane(self, "language", microbatch)

    trainer.Trainer._lane = wrong_lane


def test_samples_of_the_wrong_lane_end_the_run(reference: Path) -> None:
    with pytest.raises(Exception, match=r"module 'images': expected \d+ rows"):
        compare(
            "images: ranks=0-1,dp=2; language: ranks=0-1,tp=2",
            reference,
            SEED,
            1,
            prepare=take_lanes_of_the_language_model,
        )


def leave_out_parallel_lanes() -> None:
    """Scale the encoder's gradients by the language model's number of ranks, not by the encoder's own."""
    from vlm_digits import trainer

    finalize = trainer.finalize_model_grads_multimodule

    def finalize_wrongly(*args: object, **kwargs: object) -> None:
        finalize(*args, **kwargs)
        grids = kwargs["infra"].module_to_grid_map
        for module, grid in kwargs["module_to_grid_tuple"]:
            if grid is grids["images"]:
                module.scale_gradients(grids["language"].shape[2] / grid.shape[2])

    trainer.finalize_model_grads_multimodule = finalize_wrongly


def test_a_factor_of_the_wrong_module_is_noticed(reference: Path) -> None:
    found = compare(FAN_IN, reference, SEED, 1, prepare=leave_out_parallel_lanes)
    assert not found.agrees
    assert found.first_layer_error == pytest.approx(0.5, rel=1e-2)
