"""Properties of plans, and of carrying them out, on random layouts: a slice of `make check-properties`, and what its
checks find where something is wrong.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from program import Checker, build, regressions

PROFILE = settings(
    max_examples=300, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.filter_too_much]
)


@pytest.fixture(scope="module")
def program() -> Path:
    if shutil.which("make") is None or shutil.which("g++") is None:
        pytest.skip("needs make and g++")
    return build()


@pytest.fixture(scope="module")
def checker(program: Path) -> Iterator[Checker]:
    with Checker(program) as asked:
        yield asked


def run(program: Path, *arguments: str) -> str:
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_properties_hold_and_plans_have_the_same_hashes_in_another_process(program: Path) -> None:
    first = run(program, "--cases", "1500", "--schedules", "200", "--seed", "7", "--jobs", "2")
    assert "1500 cases of seed 7: all properties hold" in first
    assert "200 schedules of seed 7: all properties hold" in first
    again = run(program, "--cases", "1500", "--schedules", "200", "--seed", "7", "--jobs", "1")
    digests = re.findall(r"digest (\w{16})", first)
    assert len(digests) == 2
    assert digests == re.findall(r"digest (\w{16})", again)
    assert digests != re.findall(r"digest (\w{16})", run(program, "--cases", "1500", "--schedules", "200"))


@pytest.mark.parametrize("case", regressions())
def test_what_once_failed_holds(checker: Checker, case: str) -> None:
    assert checker(case) == "ok"


@st.composite
def sides(draw: st.DrawFn, name: str, sharded: bool, first: int) -> tuple[str, int, int]:
    """Text of a side, its lanes and its ranks."""
    lanes, tp, cp = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    placement, sp = (draw(st.integers(0, 2)), draw(st.integers(0, 1))) if sharded else (0, 0)
    fields = {"lanes": lanes, "tp": tp, "cp": cp, "placement": placement, "sp": sp, "first": first}
    fields["mixed"] = draw(st.integers(0, 1))
    return " ".join(f"{name}.{field}={value}" for field, value in fields.items()), lanes, lanes * tp * cp


@st.composite
def cases(draw: st.DrawFn) -> str:
    sharded, ndim = draw(st.booleans()), draw(st.sampled_from([2, 3]))
    source, lanes, ranks = draw(sides("src", sharded, 0))
    destination, _, _ = draw(sides("dst", sharded, draw(st.sampled_from([0, 1, ranks]))))
    samples = draw(st.integers(0, 10))
    text = f"case {source} {destination} ndim={ndim} samples={samples} hidden={draw(st.sampled_from([1, 2, 3, 64]))}"
    if ndim == 2:
        rows = [draw(st.integers(0, 6)) for _ in range(samples)]
        text += f" rows={','.join(map(str, rows)) or '-'} told={2**lanes - 1}"
        if not sharded and draw(st.booleans()):
            text += f" shards={draw(st.integers(1, 2))} dealt={draw(st.integers(0, 99))}"
    else:
        batch = draw(st.integers(0, 2))
        text += f" batch_dim={batch} seq_dim={(batch + draw(st.integers(1, 2))) % 3} seq={draw(st.integers(0, 9))}"
    text += f" element={draw(st.sampled_from([1, 4, 64]))} path={draw(st.integers(0, 3))}"
    text += f" chunks={draw(st.sampled_from([1, 3, 8]))} chunk_bytes={draw(st.sampled_from([1, 65536]))}"
    text += f" microbatches={draw(st.integers(1, 3))} in_flight={draw(st.sampled_from([1, 32]))}"
    return text + f" turns={draw(st.integers(0, 1))} none={draw(st.integers(0, 3))}"


@PROFILE
@given(cases())
def test_properties_hold_for_what_hypothesis_draws(checker: Checker, case: str) -> None:
    assert checker(case) in ("ok", "refused")


def test_settings_that_cannot_be_are_refused_by_the_program(checker: Checker) -> None:
    assert checker("case samples=2 rows=1,1 told=1") == "ok"
    assert checker("case samples=2 rows=1") == "not a valid setting"
    assert checker("case samples=2 rows=1,2") == "not a valid setting"  # unequal samples that nobody tells
    assert "no field of that name" in checker("case sampels=2")
    assert "expected a number" in checker("case samples=2x")
    assert "expected 'case' or 'schedule'" in checker("something else")


def test_shards_of_rows_that_a_rank_cannot_know_are_refused_not_guessed(checker: Checker) -> None:
    assert checker("case src.lanes=2 dst.tp=2 dst.sp=1 samples=2 rows=3,1 told=3") == "refused"
    assert checker("case src.lanes=1 dst.tp=2 dst.sp=1 samples=2 rows=3,1 told=1") == "ok"


def test_the_simulator_finds_a_schedule_that_cannot_end(checker: Checker) -> None:
    # One microbatch under way at most, and a warm-up of more: the first stage waits for room, the second for the first.
    line = "schedule dp=1,1 tp=1,1 cp=1,1 pp=1,1 sp=0,0 slack=0,0 edges=1 microbatches=8 in_flight=1 extra_warmup=2"
    answer = checker(line)
    assert answer.startswith("deadlock:")
    assert "rank 0, caller waits for room to send, microbatch 3" in answer
    assert "rank 1, caller waits for room to send, microbatch 1" in answer
    assert checker(line.replace("in_flight=1", "in_flight=2")) == "ok"
