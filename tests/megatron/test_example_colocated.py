"""The example with both modules on the same ranks: trains and reads as on ranks of their own, draws what moves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

APART = "images: dp=2; language: tp=2"
FAN_IN = "images: ranks=0-3,dp=4; language: ranks=0-3,tp=2,dp=2"
FAN_OUT = "images: ranks=0-3,tp=2,dp=2; language: ranks=0-3,dp=4"
STEPS = 12


def train_rank(rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    """What each layout gives after a few steps from the same seed, on rank 0."""
    from vlm_digits.data import TEST, Numbers
    from vlm_digits.launch import hide_gpus, quiet
    from vlm_digits.layout import parse_layout
    from vlm_digits.run import plan_transfers
    from vlm_digits.trainer import Recipe, Trainer

    from mimo_ext.megatron import cpu

    quiet()
    hide_gpus()
    found: dict[str, dict[str, Any]] = {}
    with cpu():
        numbers = Numbers(seed=6)
        for text in (APART, FAN_IN, FAN_OUT):
            layout = parse_layout(text)
            trainer = Trainer(layout, numbers, Recipe(seed=6, warmup=2))
            transfers = plan_transfers(layout, trainer)
            losses = []
            for step in range(STEPS):
                losses.append(trainer.mean_loss([trainer.gradients(step)]))
                if step == 2:
                    trainer.exact(numbers.batch(TEST, 0, 32))  # evaluation between two steps changes nothing
                trainer.update()
            batch = numbers.batch(TEST, 1, 32)
            reading = trainer.read(batch)
            found[text] = {
                "losses": losses,
                "texts": reading.texts,
                "accuracies": (trainer.exact(batch), reading.accuracy),
                "transfers": [(t.sender, t.receiver, t.share, t.copy) for t in transfers],
            }
            trainer.close()
    return found


def test_a_seed_gives_the_same_training_on_shared_ranks_as_on_ranks_of_their_own() -> None:
    results = launch(train_rank, 4, timeout=240.0)
    assert all(result[FAN_IN]["texts"] == results[0][FAN_IN]["texts"] for result in results)
    apart, fan_in, fan_out = (results[0][layout] for layout in (APART, FAN_IN, FAN_OUT))
    for shared in (fan_in, fan_out):
        torch.testing.assert_close(torch.tensor(shared["losses"]), torch.tensor(apart["losses"]), rtol=1e-5, atol=0)
        assert shared["texts"] == apart["texts"]
        assert shared["accuracies"] == apart["accuracies"]
        assert abs(shared["accuracies"][0] - shared["accuracies"][1]) < 1e-6
    assert apart["losses"][-1] < apart["losses"][0] - 0.3
    assert len(set(apart["texts"])) > 1

    # The picture: every sample's rows go to its language lane once, and what stays on its rank is no message.
    for shared, lanes in ((fan_in, [0, 0, 1, 1]), (fan_out, [0, 1, 2, 3])):
        sent = [transfer for transfer in shared["transfers"] if not transfer[3]]
        shares = [0.0] * (max(lanes) + 1)
        for (giver, _), (taker, receiver), share, _ in sent:
            assert (giver, taker) == ("images", "language")
            shares[lanes[receiver]] += share
        assert shares == [1 / len(shares)] * len(shares)
        assert {sender for (_, sender), (_, receiver), _, _ in sent if sender == receiver}
    # What is on a rank already, or as small as this, goes to every rank by itself: no rank forwards anything.
    for shared in (fan_in, fan_out):
        assert not any(copy for _, _, _, copy in shared["transfers"])
    pairs = {(sender, receiver) for (_, sender), (_, receiver), _, _ in fan_in["transfers"]}
    assert pairs == {(a, b) for lane in ((0, 1), (2, 3)) for a in lane for b in lane}


@pytest.mark.leaks  # matplotlib keeps its fonts open
def test_the_picture_shows_each_module_on_its_ranks(tmp_path: Path) -> None:
    from vlm_digits.layout import parse_layout
    from vlm_digits.report import History, Transfer, draw

    layout = parse_layout(FAN_OUT)
    history = History([(1, 2.0), (2, 1.0)], [(2, 0.5)])
    image = torch.zeros(8, 8)
    stays, moves = (Transfer(("images", rank), ("language", 0), 0.5) for rank in (0, 1))
    sizes = []
    for transfers in ([stays], [stays, moves]):
        picture = tmp_path / "out" / f"{len(transfers)}.png"
        draw(picture, layout, transfers, history, [image], ["1"], ["2"])
        assert picture.read_bytes().startswith(b"\x89PNG")
        sizes.append(picture.stat().st_size)
    assert sizes[1] > sizes[0]  # another arrow was drawn
    assert stays.stays
    assert not moves.stays
