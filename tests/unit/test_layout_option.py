"""The example's --layout option: what it means, and what it says to layouts that cannot work."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from vlm_digits.layout import LayoutError, check_batch, check_world, parse_layout  # noqa: E402
from vlm_digits.train import usual_batch  # noqa: E402


def test_ranks_are_given_out_in_order() -> None:
    layout = parse_layout("images: tp=2,dp=2; language: dp=2,pp=2")
    images, language = layout.modules["images"], layout.modules["language"]
    assert (list(images.ranks), list(language.ranks)) == ([0, 1, 2, 3], [4, 5, 6, 7])
    assert [images.lane(rank) for rank in images.ranks] == [0, 0, 1, 1]
    assert [images.stage(rank) for rank in images.ranks] == [0, 0, 0, 0]
    assert [language.lane(rank) for rank in language.ranks] == [0, 1, 0, 1]
    assert [language.stage(rank) for rank in language.ranks] == [0, 0, 1, 1]
    assert layout.world_size == 8
    assert [list(layout.modules_of(rank)) for rank in (0, 3, 4, 7)] == [["images"]] * 2 + [["language"]] * 2
    assert not layout.colocated


def test_order_of_modules_is_the_users() -> None:
    layout = parse_layout("language: tp=2; images: dp=3")
    assert (list(layout.modules["language"].ranks), list(layout.modules["images"].ranks)) == ([0, 1], [2, 3, 4])


def test_modules_may_have_the_same_ranks() -> None:
    layout = parse_layout("images: ranks=0-3,tp=2,dp=2; language: dp=4, ranks = 0 - 3")
    assert layout.colocated
    assert layout.world_size == 4
    assert list(layout.modules_of(3)) == ["images", "language"]
    assert [layout.modules["images"].lane(rank) for rank in range(4)] == [0, 0, 1, 1]
    assert [layout.modules["language"].lane(rank) for rank in range(4)] == [0, 1, 2, 3]
    assert str(layout) == "images: ranks=0-3,tp=2,dp=2; language: ranks=0-3,dp=4"
    with pytest.raises(LayoutError, match="needs 4 ranks shared by all modules, but 8 were started"):
        check_world(layout, 8)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("images: ranks=0-3,dp=4; language: ranks=4-5,tp=2", "images: dp=4; language: tp=2"),
        ("images: ranks=2-3,dp=2; language: ranks=0-1,tp=2", "images: ranks=2-3,dp=2; language: ranks=0-1,tp=2"),
        ("images: ranks=0; language: ranks=0", "images: ranks=0,tp=1; language: ranks=0,tp=1"),
        ("images: dp=2; language: ranks=0-1,tp=2", "images: ranks=0-1,dp=2; language: ranks=0-1,tp=2"),
    ],
)
def test_named_ranks_are_written_where_they_say_something(text: str, plain: str) -> None:
    layout = parse_layout(text)
    assert str(layout) == plain
    assert parse_layout(plain) == layout


@pytest.mark.parametrize("text", ["images: dp=2; language: tp=2", "images:dp = 2 ;language: tp=2,pp=1;"])
def test_writing_varies(text: str) -> None:
    assert str(parse_layout(text)) == "images: dp=2; language: tp=2"


@pytest.mark.parametrize("text", ["images: tp=1; language: tp=1", "images:; language:"])
def test_one_rank_each(text: str) -> None:
    layout = parse_layout(text)
    assert layout.world_size == 2
    assert str(layout) == "images: tp=1; language: tp=1"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["'images' is missing"]),
        ("images: dp=2", ["'language' is missing"]),
        ("image: dp=2; language: tp=2", ["no module 'image'", "images and language"]),
        ("images: dp=2; images: dp=2; language: tp=1", ["'images' is given twice"]),
        ("images dp=2; language: tp=2", ["'images dp=2'", "for example"]),
        ("images: xp=2; language: tp=2", ["images", "no size 'xp'", "tp (tensor)"]),
        ("images: dp=2,dp=2; language: tp=2", ["dp is given twice"]),
        ("images: dp; language: tp=2", ["dp must be a whole number", "''"]),
        ("images: dp=0; language: tp=2", ["images: dp must be a whole number of 1 or more", "'0'"]),
        ("images: dp=2; language: tp=-2", ["language: tp must be", "'-2'"]),
        ("images: dp=1.5; language: tp=2", ["'1.5'"]),
        ("images: dp=2; language: tp=3", ["language: tp=3", "4 attention heads"]),
        ("images: tp=8; language: tp=1", ["images: tp=8", "4 attention heads"]),
        ("images: pp=2; language: tp=1", ["images: pp=2 is not possible", "use tp or dp"]),
        ("images: dp=2; language: pp=3", ["language: pp=3", "2 transformer layers"]),
        ("images: ranks=0-1,dp=2; language: ranks=1-2,tp=2", ["images (ranks 0-1)", "language (ranks 1-2)", "overlap"]),
        ("images: ranks=0-3,dp=4; language: ranks=0-1,tp=2", ["overlap in part"]),
        ("images: ranks=0-1,dp=2; language: ranks=3-4,tp=2", ["no module runs on rank 2"]),
        ("images: ranks=2-3,dp=2; language: ranks=2-3,tp=2", ["no module runs on ranks 0-1"]),
        ("images: ranks=0-1,dp=2; language: ranks=0-1,pp=2", ["language: pp=2 is not possible on ranks that both"]),
        ("images: ranks=0-3,dp=2; language: tp=2", ["images: ranks=0-3 are 4 ranks", "1 * 2 * 1 = 2"]),
        ("images: ranks=0-1,ranks=0-1,dp=2; language: tp=2", ["images: ranks is given twice"]),
        ("images: ranks=1-0,dp=2; language: tp=2", ["images: ranks must be the first and the last", "'1-0'"]),
        ("images: ranks=,dp=2; language: tp=2", ["images: ranks must be the first and the last", "''"]),
        ("images: dp=2; language: cp=2", ["language: cp > 1 is not possible"]),
    ],
)
def test_refuses(text: str, words: list[str]) -> None:
    with pytest.raises(LayoutError) as error:
        parse_layout(text)
    for word in words:
        assert word in str(error.value)


def test_batch_must_split_over_the_lanes() -> None:
    layout = parse_layout("images: dp=3; language: dp=2")
    check_batch(layout, 36, 2)
    with pytest.raises(LayoutError, match=r"images: dp=3 does not divide a microbatch of 16 samples \(batch 32 in 2"):
        check_batch(layout, 32, 2)
    with pytest.raises(LayoutError, match="33 samples does not split into 2 equal microbatches"):
        check_batch(layout, 33, 2)
    with pytest.raises(LayoutError, match="must be 1 or more"):
        check_batch(layout, 0, 2)


@pytest.mark.parametrize(
    ("text", "microbatches", "batch"),
    [
        ("images: dp=2; language: tp=2", 2, 32),
        ("images: dp=3; language: dp=2", 2, 36),
        ("images: dp=5; language:", 4, 40),
    ],
)
def test_usual_batch_splits(text: str, microbatches: int, batch: int) -> None:
    layout = parse_layout(text)
    assert usual_batch(layout, microbatches) == batch
    check_batch(layout, batch, microbatches)


def test_ranks_that_were_started() -> None:
    layout = parse_layout("images: dp=2; language: tp=2")
    check_world(layout, 4)
    with pytest.raises(LayoutError, match=r"needs 4 ranks = 2 \(images: dp=2\) \+ 2 \(language: tp=2\), but 3 were"):
        check_world(layout, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layout", "images: dp=2; language: tp=3"], "language: tp=3 does not divide the 4 attention heads"),
        (["--layout", "images: ranks=0-1,dp=2; language: ranks=1-2,tp=2"], "overlap in part"),
        (["--batch", "7"], "a batch of 7 samples does not split into 2 equal microbatches"),
        (["--layout", "images: dp=3; language: tp=1", "--batch", "32"], "images: dp=3 does not divide a microbatch"),
        (["--steps", "0"], "--steps"),
    ],
)
def test_refused_before_any_rank_starts(arguments: list[str], words: str) -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "vlm_digits" / "train.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")},
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert time.monotonic() - started < 10  # it does not even import torch
