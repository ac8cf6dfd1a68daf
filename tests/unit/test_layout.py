"""Layouts from ranks, grids and meshes; what does not fit is refused by name."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch

from mimo_ext import Layout


def test_lanes_and_stages():
    layout = Layout(range(8), tp=2, dp=2, pp=2, name="language")
    assert layout.lanes(0) == ((0, 1), (2, 3))
    assert layout.lanes() == layout.lanes(1) == ((4, 5), (6, 7))
    assert layout.size == 8
    with pytest.raises(IndexError, match="layout of module 'language': pipeline stage 2 of 2"):
        layout.lanes(2)


def test_layouts_are_values():
    assert Layout([0, 1], tp=2) == Layout(range(2), tp=2)
    assert hash(Layout([0, 1], tp=2)) == hash(Layout(range(2), tp=2))
    assert Layout([0, 1], tp=2) != Layout([0, 1], dp=2)
    with pytest.raises(AttributeError):
        Layout([0]).tp = 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": range(3), "tp": 2}, r"module 'images': tp=2 \* cp=1 \* dp=1 \* pp=1 needs 2 ranks, got 3"),
        ({"ranks": [0, 0], "tp": 2}, "rank 0 is listed twice"),
        ({"ranks": [-1]}, "ranks must not be negative, got -1"),
        ({"ranks": [0], "tp": 0}, "size of dim 'tp' must be positive, got 0"),
        ({"ranks": [0, 1], "tp": 2, "order": ("dp",)}, r"tp=2, but order \('dp',\) lacks 'tp'"),
        ({"ranks": [0], "order": ("tp", "ep")}, "unknown dim 'ep'"),
        ({"ranks": [0], "order": ("tp", "tp")}, "dim 'tp' is given twice"),
        ({"ranks": [0], "cp_placement": "zig"}, "expected 'replicated', 'contiguous' or 'zigzag', got 'zig'"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Layout(**arguments, name="images")


def test_from_grid_needs_four_attributes_only():
    grid = SimpleNamespace(rank_offset=4, size=8, shape=[2, 1, 2, 2], dim_names=["tp", "cp", "dp", "pp"])
    layout = Layout.from_grid(grid, name="language")
    assert (layout.tp, layout.dp, layout.pp) == (2, 2, 2)
    assert layout.lanes(0) == ((4, 5), (6, 7))
    assert Layout.from_grid(SimpleNamespace(rank_offset=0, size=2, shape=[2, 1], dim_names=["dp", "ep"])).dp == 2


def test_from_grid_honours_the_order_of_dims():
    grid = SimpleNamespace(rank_offset=0, size=4, shape=[2, 2], dim_names=["dp", "tp"])
    assert Layout.from_grid(grid).lanes() == ((0, 2), (1, 3))


def test_from_grid_refuses_dims_that_it_does_not_know():
    grid = SimpleNamespace(rank_offset=0, size=4, shape=[2, 2], dim_names=["tp", "ep"])
    with pytest.raises(ValueError, match="grid of module 'moe': unknown dim 'ep' of size 2"):
        Layout.from_grid(grid, name="moe")
    grid = SimpleNamespace(rank_offset=0, size=3, shape=[2], dim_names=["tp"])
    with pytest.raises(ValueError, match="tp=2 needs 2 ranks, got 3"):
        Layout.from_grid(grid)


def mesh(shape, names):
    """What `from_mesh` reads of a DeviceMesh; a real one needs a process group."""
    ranks = torch.arange(int(torch.tensor(shape).prod())).view(shape)
    return SimpleNamespace(mesh=ranks, mesh_dim_names=names)


def test_from_mesh():
    layout = Layout.from_mesh(mesh([2, 3], ("replicate", "tensor")), dp="replicate", tp="tensor", name="x")
    assert layout.lanes() == ((0, 1, 2), (3, 4, 5))
    assert Layout.from_mesh(mesh([2, 3], ("tp", "dp"))).lanes() == ((0, 3), (1, 4), (2, 5))


def test_from_mesh_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="expected a DeviceMesh with mesh_dim_names, got none"):
        Layout.from_mesh(mesh([2], None))
    with pytest.raises(ValueError, match="unknown dim 'fsdp' of size 2"):
        Layout.from_mesh(mesh([2, 2], ("fsdp", "tp")))


def test_layouts_can_be_copied_and_pickled():
    layout = Layout(range(8), tp=2, cp=2, dp=2, order=("dp", "tp", "cp"), cp_placement="zigzag", name="images")
    for other in (copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        assert other == layout
        assert hash(other) == hash(layout)
        assert other.lanes() == layout.lanes()
