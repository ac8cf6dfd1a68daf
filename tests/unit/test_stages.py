"""Pipeline stages across modules: against a search over all paths, and every case that the document of Megatron
names.
"""

from __future__ import annotations

import itertools
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_ext._extension import _C
from mimo_ext.megatron.topology import GridShape, count_stages


def grid(rank_offset: int, **dims: int) -> SimpleNamespace:
    size = 1
    for extent in dims.values():
        size *= extent
    return SimpleNamespace(rank_offset=rank_offset, size=size, shape=list(dims.values()), dim_names=list(dims))


MODEL = {"images": ["llm"], "audio": ["llm"], "llm": ["generator"], "generator": []}
GRIDS = {
    "images": grid(0, tp=2, pp=2),
    "audio": grid(4, pp=3, dp=2),
    "llm": grid(10, tp=2, cp=1, dp=2, pp=4),
    "generator": grid(26, dp=2),
}


def all_paths(downstream: list[list[int]]) -> list[list[int]]:
    paths = [[node] for node in range(len(downstream))]
    for path in paths:  # grows while it is walked
        paths += [[*path, to] for to in downstream[path[-1]]]
    return paths


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    """A DAG of up to 7 nodes in a random order of names, and its weights."""
    count = draw(st.integers(1, 7))
    order = draw(st.permutations(range(count)))
    pairs = [pair for pair in itertools.combinations(order, 2) if draw(st.booleans())]
    downstream = [[to for start, to in pairs if start == node] for node in range(count)]
    return draw(st.lists(st.integers(0, 9), min_size=count, max_size=count)), downstream


@settings(deadline=None)
@given(graphs())
def test_longest_path_is_the_best_of_all_paths(graph: tuple[list[int], list[list[int]]]) -> None:
    weights, downstream = graph
    names = [f"m{i}" for i in range(len(weights))]
    paths = all_paths(downstream)
    assert _C.longest_path(weights, downstream, names, -1) == max(sum(weights[n] for n in p) for p in paths)
    for target in range(len(weights)):
        expected = max(sum(weights[n] for n in p) for p in paths if p[-1] == target)
        assert _C.longest_path(weights, downstream, names, target) == expected


@settings(deadline=None)
@given(graphs(), st.data())
def test_a_cycle_is_refused_and_named(graph: tuple[list[int], list[list[int]]], data: st.DataObject) -> None:
    weights, downstream = graph
    path = data.draw(st.sampled_from(all_paths(downstream)))
    downstream[path[-1]].append(path[0])
    names = [f"m{i}" for i in range(len(weights))]
    with pytest.raises(ValueError, match="cycle") as caught:
        _C.longest_path(weights, downstream, names, data.draw(st.integers(-1, len(weights) - 1)))
    cycle = re.findall(r"m\d+", str(caught.value))
    assert len(cycle) >= 2
    assert cycle[0] == cycle[-1]
    for start, to in itertools.pairwise(cycle):
        assert names.index(to) in downstream[names.index(start)], str(caught.value)


@settings(deadline=None)
@given(graphs(), st.data())
def test_stages_up_to_a_rank_against_all_paths(graph: tuple[list[int], list[list[int]]], data: st.DataObject) -> None:
    weights, downstream = graph
    names = [f"m{i}" for i in range(len(weights))]
    dims = [data.draw(st.permutations(["tp", "dp", "pp"])) for _ in names]
    others = [{"tp": data.draw(st.integers(1, 2)), "dp": data.draw(st.integers(1, 2))} for _ in names]
    grids: dict[str, Any] = {}
    offset = 0
    for name, order, sizes, weight in zip(names, dims, others, weights, strict=True):
        grids[name] = grid(offset, **{dim: {**sizes, "pp": weight + 1}[dim] for dim in order})
        offset += grids[name].size
    topology = {name: [names[to] for to in downstream[i]] for i, name in enumerate(names)}
    rank = data.draw(st.integers(0, offset - 1))
    (module,) = [n for n in names if grids[n].rank_offset <= rank < grids[n].rank_offset + grids[n].size]
    stage = rank - grids[module].rank_offset
    for dim, extent in zip(grids[module].dim_names, grids[module].shape, strict=True):
        if dim == "pp":
            stage %= extent
            break
        stage //= extent
    target = names.index(module)
    before = max(sum(weights[n] + 1 for n in p[:-1]) for p in all_paths(downstream) if p[-1] == target)
    assert count_stages(topology, grids, rank=rank) == before + stage + 1
    assert count_stages(topology, grids, rank=rank, module_name=module) == before + stage + 1


def test_the_longer_encoder_counts() -> None:
    assert count_stages(MODEL, GRIDS) == 3 + 4 + 1
    assert count_stages(MODEL, {**GRIDS, "images": grid(0, pp=5)}) == 5 + 4 + 1


@pytest.mark.parametrize(
    ("rank", "stages"),
    [(0, 1), (1, 1), (2, 2), (4, 1), (5, 2), (6, 3), (7, 1), (10, 4), (13, 4), (14, 5), (25, 7), (26, 8), (27, 8)],
)
def test_stages_up_to_a_rank(rank: int, stages: int) -> None:
    assert count_stages(MODEL, GRIDS, rank=rank) == stages


def test_a_rank_in_several_modules_counts_to_the_furthest_or_to_the_one_asked_for() -> None:
    grids = {"images": grid(0, dp=2), "llm": grid(0, dp=2), "judge": grid(2, pp=2)}
    topology = {"images": ["llm"], "llm": ["judge"], "judge": []}
    assert count_stages(topology, grids, rank=1) == 2
    assert count_stages(topology, grids, rank=1, module_name="images") == 1
    assert count_stages(topology, grids, rank=1, module_name="llm") == 2


def test_a_grid_without_pp_is_one_stage_and_needs_no_more_than_shape_and_dims() -> None:
    grids = {
        "a": SimpleNamespace(shape=[8], dim_names=["dp"]),
        "b": SimpleNamespace(shape=(2, 3), dim_names=("tp", "pp")),
    }
    assert count_stages({"a": ["b"], "b": []}, grids) == 4
    assert count_stages({"a": ["b"]}, grids) == 4  # a module without an entry feeds none


@pytest.mark.parametrize(
    ("topology", "options", "match"),
    [
        ({"a": ["b"], "b": ["a"]}, {}, "a -> b -> a|b -> a -> b"),
        ({"a": ["a"], "b": []}, {}, "a -> a"),
        ({"a": ["a"], "b": []}, {"rank": 1}, "a -> a"),
        ({"a": ["c"], "b": []}, {}, r"expected modules among \['a', 'b'\], got 'c'"),
        ({"c": ["a"]}, {}, r"expected modules among \['a', 'b'\], got 'c'"),
        ({"a": ["b", "b"], "b": []}, {}, "a lists b twice"),
        ({"a": ["b"], "b": []}, {"rank": 2}, r"rank 2 is in no module: .*'a': '\[0, 1\)', 'b': '\[1, 2\)'"),
        ({"a": ["b"], "b": []}, {"rank": 1, "module_name": "a"}, r"rank 1 is in no module: expected it in one of {'a'"),
        ({"a": ["b"], "b": []}, {"rank": 1, "module_name": "c"}, r"expected one of the modules \['a', 'b'\], got 'c'"),
    ],
)
def test_what_is_refused(topology: dict[str, list[str]], options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        count_stages(topology, {"a": grid(0, dp=1), "b": grid(1, dp=1)}, **options)


def test_no_module_at_all_has_no_terminal_one() -> None:
    with pytest.raises(ValueError, match="at least one module without outgoing edges"):
        count_stages({}, {})


def test_time_is_linear_where_paths_are_exponential() -> None:
    diamonds = 300  # 2^300 paths
    topology: dict[str, list[str]] = {}
    for i in range(diamonds):
        topology.update({f"{i}": [f"{i}l", f"{i}r"], f"{i}l": [f"{i + 1}"], f"{i}r": [f"{i + 1}"]})
    topology[f"{diamonds}"] = []
    grids = {name: grid(0, pp=2 if name.endswith("l") else 1) for name in topology}
    start = time.perf_counter()
    assert count_stages(topology, grids) == 3 * diamonds + 1
    assert count_stages(topology, grids, rank=0, module_name=f"{diamonds}") == 3 * diamonds + 1
    assert time.perf_counter() - start < 1.0


@settings(deadline=None)
@given(
    st.permutations(["tp", "cp", "dp", "pp"]), st.lists(st.integers(1, 3), min_size=4, max_size=4), st.integers(0, 5)
)
def test_stage_ranks_keep_the_other_coordinates(order: list[str], extents: list[int], offset: int) -> None:
    shape = GridShape.from_grid("m", grid(offset, **dict(zip(order, extents, strict=True))))
    stages = [shape.stage_ranks(stage) for stage in range(shape.pp_size)]
    assert sorted(itertools.chain(*stages)) == list(shape.ranks)
    stride = 1
    for dim, extent in zip(order, extents, strict=True):
        if dim == "pp":
            break
        stride *= extent
    for stage, ranks in enumerate(stages):
        assert ranks == [rank + stage * stride for rank in stages[0]]
        assert all(shape.pp_rank(rank) == stage for rank in ranks)
