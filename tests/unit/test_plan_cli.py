"""`python -m mimo_ext plan`: what it prints, draws and refuses."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mimo_ext import Bridge
from mimo_ext.planning import Edge, EdgeError, Links, parse_layout
from mimo_ext.planning.command import main
from mimo_ext.planning.report import bytes_text, compare, seconds_text

FAN_IN = ["plan", "--source", "tp=4,dp=2", "--destination", "tp=8"]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def figures_of(text: str, start: str) -> list[str]:
    """The two figures of the first line that starts so."""
    line = next(line for line in text.splitlines() if line.strip().startswith(start))
    return re.split(r"\s{2,}", line.strip())[1:]


def test_totals_and_ranks_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, *FAN_IN, "--direction", "forward")
    assert "source       tp=4 cp=1, 2 lanes: [0 1 2 3] [4 5 6 7]" in text
    assert "destination  tp=8 cp=1, 1 lane: [8 9 10 11 12 13 14 15]" in text
    assert "2 samples, 1024 rows each: bfloat16 [2048, 4096], 16.0 MiB" in text
    assert "400 Gbit/s per network card, 3600 inside a host (8 ranks per host)" in text
    assert figures_of(text, "all bytes over network cards") == ["16.0 MiB", "16.0 MiB"]
    assert figures_of(text, "busiest network card, received") == ["2.0 MiB", "16.0 MiB"]
    ranks = [line.split() for line in text.splitlines() if line.split()[:1] in ([str(rank)] for rank in range(16))]
    assert ranks[:8] == [[str(rank), "2.0", "MiB", "-", "-", "-", "-"] for rank in range(8)]
    assert ranks[8:] == [[str(rank), "-", "2.0", "MiB", "14.0", "MiB", "14.0", "MiB", "-"] for rank in range(8, 16)]
    assert "backward" not in text


def test_both_directions_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, *FAN_IN)
    both = compare(EDGE, Links(), ("forward", "backward"))
    ours, leader = sum(c.ours.seconds for c in both), sum(c.leader.seconds for c in both)
    assert text.endswith(
        f"forward + backward: {seconds_text(ours)}, {seconds_text(leader)} by leader + broadcast: "
        f"{leader / ours:.2f}x as fast\n"
    )


EDGE = Edge(parse_layout("tp=4,dp=2", "source"), parse_layout("tp=8", "destination", 8), 2)


def test_json_has_the_same_figures_in_si_units(capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(printed(capsys, *FAN_IN, "--json"))
    forward, backward = compare(EDGE, Links(), ("forward", "backward"))
    assert result["bytes"] == 16 << 20
    assert result["links"] == {"nic": 50e9, "host": 450e9, "latency": 5e-6, "overhead": 0.5e-6, "ranks_per_host": 8}
    for comparison, got in zip((forward, backward), result["directions"], strict=True):
        assert got["direction"] == comparison.direction
        assert got["ratio"] == comparison.ratio
        assert got["ours"]["seconds"] == comparison.ours.seconds
        assert got["leader"]["seconds"] == comparison.leader.seconds
        assert got["ours"]["bytes"] == {path: comparison.ours.total(path) for path in ("nic", "host", "stays")}
    ranks = {entry.pop("rank"): entry for entry in result["directions"][0]["ours"]["ranks"]}
    assert ranks[0] == {"nic_out": 2 << 20, "nic_in": 0, "host_out": 0, "host_in": 0, "stays": 0}
    assert ranks[15] == {"nic_out": 0, "nic_in": 2 << 20, "host_out": 14 << 20, "host_in": 14 << 20, "stays": 0}


def test_options_of_the_cluster_and_of_the_microbatch_count(capsys: pytest.CaptureFixture[str]) -> None:
    options = shlex.split(
        "--samples 4 --rows 8 --hidden 16 --dtype float32 --ndim 3 --batch-dim 1 --json --broadcast tree "
        "--ranks-per-host 0 --nic-gbps 8 --nvlink-gbps 80 --latency-us 7 --overhead-us 0"
    )
    result = json.loads(printed(capsys, *FAN_IN, *options))
    assert (result["shape"], result["bytes"]) == ([8, 4, 16], 8 * 4 * 16 * 4)
    assert result["links"] == {"nic": 1e9, "host": 10e9, "latency": 7e-6, "overhead": 0.0, "ranks_per_host": 0}
    forward = result["directions"][0]
    assert forward["ours"]["bytes"]["nic"] == 0
    # Shape, payload, and three steps of a tree for each.
    assert forward["leader"]["rounds"] == 1 + 1 + 3 + 3


def test_chunks_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    free = [*FAN_IN, "--direction", "forward", "--overhead-us", "0", "--json"]
    for chunks in (1, 3):
        result = json.loads(printed(capsys, *free, "--max-chunks", str(chunks)))
        assert result["directions"][0]["ours"]["chunks"] == chunks
    # Bridge's own defaults are the command's.
    parameters = inspect.signature(Bridge).parameters
    fields = ("max_chunks", "min_chunk_bytes", "path")
    assert [getattr(EDGE, name) for name in fields] == [parameters[name].default for name in fields]


def test_the_path_is_chosen_and_told_with_its_alternatives(capsys: pytest.CaptureFixture[str]) -> None:
    for rows, best in ((1, "direct"), (4096, "pipelined")):
        text = printed(capsys, *FAN_IN, "--direction", "forward", "--rows", str(rows))
        (line,) = [line for line in text.splitlines() if line.startswith("  path: ")]
        result = json.loads(printed(capsys, *FAN_IN, "--direction", "forward", "--rows", str(rows), "--json"))
        (direction,) = result["directions"]
        times = direction["path_seconds"]
        assert list(times) == ["pipelined", "direct", "leader"]
        told = ", ".join(f"{path} {seconds_text(seconds)}" for path, seconds in times.items())
        assert line == f"  path: {best}; modelled: {told}"
        assert direction["ours"]["paths"] == [best] == [min(times, key=lambda path: times[path])]
        assert direction["ours"]["seconds"] == times[best]
        for path in times:
            given = json.loads(printed(capsys, *FAN_IN, "--rows", str(rows), "--path", path, "--json"))
            forward, backward = given["directions"]
            assert forward["ours"]["paths"] == backward["ours"]["paths"] == [path]
            assert forward["ours"]["seconds"] == times[path]


def test_ragged_rows_are_one_count_per_sample(capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(printed(capsys, *FAN_IN, "--rows", "5,0,7,1", "--hidden", "2", "--path", "leader", "--json"))
    assert (result["shape"], result["bytes"]) == ([13, 2], 13 * 2 * 2)
    assert result["directions"][0]["ours"]["bytes"]["nic"] == 13 * 2 * 2


def test_a_layout_that_the_released_class_refuses_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "plan", "--source", "tp=2", "--destination", "cp=2")
    assert "Megatron-Core's released class refuses this layout (context parallelism)" in text
    assert "released class" not in printed(capsys, *FAN_IN)


def test_many_ranks_are_cut_short(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "plan", "--source", "tp=8,dp=64", "--destination", "tp=8,cp=4,dp=16")
    assert "the first of 16 groups of lanes, which all do the same" in text
    assert "... and 32 more ranks (--json lists them)" in text
    assert max(map(len, text.splitlines())) <= 260


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--source", "tp=4"], "arguments are required: --destination"),
        (["--source", "tp=4", "--destination", ""], "destination: no size is given; expected some, as in 'tp=4,dp=2'"),
        (["--source", "tp=4", "--destination", "tp"], "destination: 'tp' is not of the form size=number"),
        (["--source", "tp=0", "--destination", "tp=1"], "source: tp must be a whole number of 1 or more, got '0'"),
        (["--source", "xp=2", "--destination", "tp=1"], "source: there is no 'xp'; use tp (tensor)"),
        (["--source", "tp=2,tp=2", "--destination", "tp=1"], "source: tp is given twice"),
        (
            ["--source", "ranks=0-2,tp=2,dp=2", "--destination", "tp=1"],
            "source: ranks=0-2 are 3 ranks, but tp=2 * dp=2 = 4",
        ),
        (["--source", "ranks=3-1", "--destination", "tp=1"], "source: ranks must be the first and the last"),
        (["--source", "cp_placement=round", "--destination", "tp=1"], "cp_placement must be one of replicated"),
        (["--source", "sequence_parallel=1", "--destination", "tp=1"], "sequence_parallel must be yes or no, got '1'"),
        (["--source", "order=tp-dp", "--destination", "tp=1"], "order must name each of tp-cp-dp-pp once, got 'tp-dp'"),
        (["--source", "vision: tp=x", "--destination", "tp=1"], "vision: tp must be a whole number"),
        (["--source", "tp=2000000", "--destination", "tp=1"], "source: 2000000 ranks are more than this command"),
        (["--source", "tp=1", "--destination", "tp=1", "--rows", "a"], "rows must be whole numbers, got 'a'"),
        (["--source", "tp=1", "--destination", "tp=1", "--rows", "0"], "rows must be 1 or more"),
        (["--source", "tp=1", "--destination", "tp=1", "--rows", "1,-2"], "rows must be 1 or more"),
        (
            ["--source", "tp=1", "--destination", "tp=1", "--rows", "1,2", "--samples", "3"],
            "2 row counts are given for 3",
        ),
        (["--source", "tp=1", "--destination", "tp=1", "--rows", "1,2", "--ndim", "3"], "are for 2-D tensors"),
        (
            ["--source", "tp=1", "--destination", "tp=1", "--samples", "0"],
            "samples (0) and hidden (4096) must be 1 or more",
        ),
        (
            ["--source", "tp=1", "--destination", "tp=1", "--max-chunks", "0"],
            "max_chunks (0) and min_chunk_bytes (65536)",
        ),
        (["--source", "tp=1", "--destination", "tp=1", "--nic-gbps", "0"], "bandwidth nic must be positive, got 0.0"),
        (["--source", "tp=1", "--destination", "tp=1", "--dtype", "int4"], "argument --dtype: invalid choice: 'int4'"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_exit_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    try:
        status = main(["plan", *arguments])
    except SystemExit as error:
        status = error.code
    output = capsys.readouterr()
    assert status == 2
    assert output.out == ""
    assert output.err.startswith("mimo_ext plan: ")
    assert words in output.err
    assert output.err.count("\n") == 1


def test_names_and_places_of_a_layout() -> None:
    layout = parse_layout(" vision : ranks=8-23, dp=4,tp=2 , pp=2,order=dp-tp-cp-pp,sequence_parallel=yes", "source", 3)
    assert (layout.name, layout.ranks, layout.order) == ("vision", tuple(range(8, 24)), ("dp", "tp", "cp", "pp"))
    assert (layout.tp, layout.dp, layout.pp, layout.sequence_parallel) == (2, 4, 2, True)
    assert parse_layout("tp=2", "source", 3).ranks == (3, 4)
    zigzag = parse_layout("cp=2,cp_placement=zigzag", "source")
    assert (zigzag.cp, zigzag.cp_placement, zigzag.name) == (2, "zigzag", "source")


def test_edges_that_cannot_be_are_refused() -> None:
    one = parse_layout("tp=1", "source")
    for values, words in (({"ndim": 4}, "4 axes"), ({"batch_dim": 2}, "batch axis must be 0 or 1, got 2")):
        with pytest.raises(EdgeError, match=words):
            Edge(one, one, 1, **values)


def test_sizes_are_written_for_people() -> None:
    assert [bytes_text(size) for size in (0, 1023, 1536, 3 << 20, 5 << 30)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 MiB",
        "5.0 GiB",
    ]
    assert [seconds_text(value) for value in (1.5e-6, 2.5e-3, 3.25)] == ["1.5 us", "2.5 ms", "3.25 s"]


# The picture


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


def test_the_picture_is_written_where_asked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    both, one = tmp_path / "new folder" / "both.png", tmp_path / "one.png"
    printed(capsys, *FAN_IN, "--png", str(both))
    printed(capsys, *FAN_IN, "--direction", "backward", "--png", str(one))
    assert png_size(both)[0] == png_size(one)[0] > 1000
    assert png_size(both)[1] > 1.5 * png_size(one)[1]


def test_without_matplotlib_the_picture_is_refused_in_words(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main([*FAN_IN, "--png", str(tmp_path / "a.png")]) == 2
    output = capsys.readouterr()
    assert output.err == ("mimo_ext plan: a picture needs matplotlib: pip install matplotlib, or leave out --png\n")
    assert output.out == ""
    assert main(FAN_IN) == 0


def arrows(source: str, destination: str, backward: bool = False, path: str = "pipelined") -> tuple[Any, Any, Any]:
    from mimo_ext.planning import picture

    src = parse_layout(source, "source")
    dst = parse_layout(destination, "destination", src.size)
    case = Edge(src, dst, max(len(src.lanes()), len(dst.lanes())), path=path)
    direction = "backward" if backward else "forward"
    (comparison,) = compare(case, Links(), (direction,))
    columns = picture._Columns(direction, comparison.ours)
    return columns, *picture._arrows_of(columns, comparison.ours)


def test_arrows_carry_what_the_plan_sends() -> None:
    columns, sent, copied = arrows("tp=2", "dp=2")
    assert sent == {(0, 2, False): 4 << 20, (0, 3, False): 4 << 20, (1, 2, False): 4 << 20, (1, 3, False): 4 << 20}
    assert copied == {}
    assert columns.sides == [[(0, 1)], [(2,), (3,)]]
    columns, sent, copied = arrows("tp=2", "dp=2", path="direct")
    assert sent == {(0, 2, False): 8 << 20, (1, 3, False): 8 << 20}
    columns, sent, copied = arrows("tp=2", "dp=2", backward=True)
    assert {key: size >> 20 for key, size in sent.items()} == {(2, 0, False): 8, (3, 1, False): 8}  # a lane each
    assert {key: size >> 20 for key, size in copied.items()} == {(0, 1, False): 8, (1, 0, False): 8}
    assert columns.sides == [[(0, 1)], [(2,), (3,)]]


def test_a_lane_is_one_box_where_there_are_many_ranks() -> None:
    columns, sent, copied = arrows("tp=8,dp=8", "tp=16,dp=2")
    assert columns.by_lane
    assert [len(boxes) for boxes in columns.boxes] == [4, 1]
    assert {key: size >> 20 for key, size in sent.items()} == {
        (("lane", lane), ("lane", 0), False): 8 for lane in range(4)
    }
    assert {key: size >> 20 for key, size in copied.items()} == {(("lane", 0), ("lane", 0), False): 32 * 15}


def test_lanes_that_do_not_fit_are_counted() -> None:
    columns, sent, _ = arrows("dp=40", "tp=2")
    assert [len(side) for side in columns.sides] == [16, 1]
    assert columns.left_out == [24, 0]
    assert len(sent) == 16


# The command from outside


def test_it_runs_as_a_module_and_imports_matplotlib_for_pictures_only() -> None:
    code = (
        "import runpy, sys; sys.argv = ['mimo_ext', *sys.argv[1:]]\n"
        "try: runpy.run_module('mimo_ext', run_name='__main__')\n"
        "except SystemExit as error: status = error.code\n"
        "assert not {'matplotlib', 'megatron'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, *FAN_IN], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("source       tp=4")


def test_the_help_states_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["plan", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "max over ranks and links of (bytes / bandwidth + overhead * messages) + latency * rounds" in text
    assert "Where it idealises" in text
