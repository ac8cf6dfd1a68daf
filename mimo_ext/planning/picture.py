"""A picture of who sends what to whom."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .edge import Edge
from .links import NIC, Load, Transfer
from .report import Comparison, bytes_text, ratio_text, seconds_text
from .traffic import PAYLOAD, PAYLOAD_IN_LANE, Traffic

MAX_RANKS = 16  # of one column that are drawn one by one; above, a lane is one box
MAX_LANES = 16  # of one column that are drawn
SENT, COPIED, STAYING = "tab:blue", "tab:orange", "tab:gray"
COLORS = ("#cfe2f3", "#d9ead3")  # of the source, of the destination
GAP, WIDTH = 5.0, 1.5  # between the middles of the columns; of a box

_Arrows = dict[tuple[Hashable, Hashable, bool], int]  # (from, to, whether it stays on its rank) -> bytes


def draw(path: Path, edge: Edge, comparisons: Sequence[Comparison]) -> None:
    """Draw every direction by the plan and by leader + broadcast, side by side.

    Args:
        path: PNG file to write; its folder is made where it is missing.
        edge: what is moved.
        comparisons: what to draw, one row each.

    Raises:
        ImportError: there is no matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install matplotlib, or leave out --png") from error

    columns = [_Columns(comparison.direction, comparison.ours) for comparison in comparisons]
    height = max(2.6, 0.36 * max(column.height for column in columns)) + 0.9
    figure = Figure(figsize=(13, height * len(comparisons) + 0.9), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    plots = figure.subplots(len(comparisons), 2, squeeze=False)
    for row, comparison, column in zip(plots, comparisons, columns, strict=True):
        fast = "" if comparison.ratio is None else f", {ratio_text(comparison.ratio)} as fast"
        shown = [(traffic, *_arrows_of(column, traffic)) for traffic in (comparison.ours, comparison.leader)]
        # What is handed on inside of a box is written, not drawn.
        drawn = [(key, size) for _, *both in shown for arrows in both for key, size in arrows.items()]
        widest = max((size for (one, other, _), size in drawn if one != other or not column.by_lane), default=1)
        for axes, (traffic, arrows, copies), more in zip(row, shown, (fast, ""), strict=True):
            axes.set_title(
                f"{comparison.direction}, {traffic.method}: {seconds_text(traffic.seconds)}{more}", fontsize=10
            )
            _draw_traffic(axes, column, traffic, arrows, copies, widest)
    groups = comparisons[0].ours.part.groups if comparisons else 1
    of_groups = f"; the first of {groups} equal groups of lanes" if groups > 1 else ""
    dtype = str(edge.dtype).removeprefix("torch.")
    figure.suptitle(f"one microbatch: {dtype} {list(edge.shape)}, {bytes_text(edge.size)}{of_groups}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(str(path))


class _Columns:
    """Where every rank (or, where they are many, every lane) has its box. The source is on the left."""

    def __init__(self, direction: str, traffic: Traffic) -> None:
        self.backward = direction == "backward"
        part = traffic.part
        lanes = (part.receivers, part.senders) if self.backward else (part.senders, part.receivers)
        self.by_lane = max(sum(map(len, side)) for side in lanes) > MAX_RANKS
        self.sides = [[*side[:MAX_LANES]] for side in lanes]
        self.left_out = [len(side) - len(shown) for side, shown in zip(lanes, self.sides, strict=True)]
        self.boxes: list[dict[Hashable, tuple[float, float]]] = [{}, {}]  # of a side: name -> middle
        self.box_of: list[dict[int, Hashable]] = [{}, {}]  # of a side: rank -> name
        heights = [self._height(side) for side in self.sides]
        self.height = max(heights)
        for index, side in enumerate(self.sides):
            y = (self.height - heights[index]) / 2
            for number, lane in enumerate(side):
                for rank in lane:
                    name: Hashable = ("lane", number) if self.by_lane else rank
                    self.box_of[index][rank] = name
                    if name not in self.boxes[index]:
                        self.boxes[index][name] = (GAP * index, y)
                        y += 1.0
                y += 0.4

    def _height(self, side: Sequence[Sequence[int]]) -> float:
        return (len(side) if self.by_lane else sum(map(len, side))) + 0.4 * (len(side) - 1)

    def text(self, index: int, name: Hashable, loads: dict[tuple[int, str, str], Load]) -> str:
        """What a box says; a lane's also how much the busiest network card of its ranks carries in a direction."""
        if not isinstance(name, tuple):
            return f"rank {name}"
        lane = self.sides[index][name[1]]
        title = f"ranks {min(lane)}-{max(lane)}" if len(lane) > 1 else f"rank {lane[0]}"
        most = max(loads.get((rank, NIC, way), Load()).size for rank in lane for way in ("out", "in"))
        return f"{title}\n{bytes_text(most)} per card" if most else title


def _arrows_of(columns: _Columns, traffic: Traffic) -> tuple[_Arrows, _Arrows]:
    """Bytes from box to box: what is sent across, and what is handed on in the receiving lanes."""
    sender, receiver = (1, 0) if columns.backward else (0, 1)
    sent = [transfer for phase in traffic.phases if phase.name == PAYLOAD for transfer in phase.transfers]
    copied = [
        transfer
        for phase in traffic.phases
        for transfer in (phase.transfers if phase.name == PAYLOAD_IN_LANE else phase.copies)
    ]
    boxes = columns.box_of[receiver]
    return _summed(sent, columns.box_of[sender], boxes), _summed(copied, boxes, boxes)


def _draw_traffic(
    axes: Any, columns: _Columns, traffic: Traffic, arrows: _Arrows, copies: _Arrows, widest: int
) -> None:
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    axes.axis("off")
    loads = traffic.loads()
    for index, boxes in enumerate(columns.boxes):
        for name, (x, y) in boxes.items():
            corner = (x - WIDTH / 2, y - 0.34)
            style = "round,pad=0.02"
            axes.add_patch(
                FancyBboxPatch(corner, WIDTH, 0.68, boxstyle=style, facecolor=COLORS[index], edgecolor="gray")
            )
            axes.text(x, y, columns.text(index, name, loads), ha="center", va="center", fontsize=7)
        title = ("source", "destination")[index]
        axes.text(GAP * index, -1.0, title, ha="center", va="center", weight="bold", fontsize=9)
        if columns.left_out[index]:
            below = f"and {columns.left_out[index]} more lanes"
            axes.text(GAP * index, columns.height - 0.2, below, ha="center", va="center", fontsize=8)
    sender, receiver = (1, 0) if columns.backward else (0, 1)
    outward = 1 if receiver == 1 else -1
    for (one, other, stays), size in arrows.items():
        (x0, y0), (x1, y1) = columns.boxes[sender][one], columns.boxes[receiver][other]
        arrow = FancyArrowPatch(
            (x0 + outward * (WIDTH / 2 + 0.03), y0), (x1 - outward * (WIDTH / 2 + 0.03), y1), arrowstyle="-|>"
        )
        arrow.set(color=STAYING if stays else SENT, linewidth=_width(size, widest), alpha=0.75, mutation_scale=8)
        axes.add_patch(arrow)
    for (one, other, _), size in copies.items():
        (x0, y0), (x1, y1) = columns.boxes[receiver][one], columns.boxes[receiver][other]
        x = x0 + outward * (WIDTH / 2 + 0.05)
        if one == other:  # a lane in one box
            words = f"  {bytes_text(size)}\n  handed on inside"
            axes.text(x, y0, words, color=COPIED, fontsize=7, va="center", ha="left" if outward > 0 else "right")
            continue
        both = copies.get((other, one, False)) == size
        if both and y1 > y0:
            continue  # one line with two heads, drawn upwards
        bulge = outward * (0.35 if y1 < y0 else -0.35)
        style = "<|-|>" if both else "-|>"
        arrow = FancyArrowPatch((x, y0), (x, y1), connectionstyle=f"arc3,rad={bulge}", arrowstyle=style)
        arrow.set(color=COPIED, linestyle=(0, (4, 2)), linewidth=_width(size, widest), alpha=0.6, mutation_scale=7)
        axes.add_patch(arrow)
    _legend(axes, arrows, copies)
    ends = columns.boxes[receiver]
    tallest = max((abs(ends[one][1] - ends[other][1]) for one, other, _ in copies), default=0.0)
    room = WIDTH / 2 + (2.0 if columns.by_lane else 0.4 + 0.2 * tallest)
    left, right = (WIDTH, room) if receiver == 1 else (room, WIDTH)
    axes.set(xlim=(-left, GAP + right), ylim=(columns.height + 0.4, -1.6))


def _summed(transfers: Iterable[Transfer], names: dict[int, Hashable], others: dict[int, Hashable]) -> _Arrows:
    """Boxes that are not drawn are left out."""
    sums: _Arrows = defaultdict(int)
    for transfer in transfers:
        one, other = names.get(transfer.sender), others.get(transfer.receiver)
        if one is not None and other is not None and transfer.size:
            sums[one, other, transfer.sender == transfer.receiver] += transfer.size
    return sums


def _width(size: int, widest: int) -> float:
    return 0.5 + 3.5 * size / widest


def _legend(axes: Any, arrows: _Arrows, copies: _Arrows) -> None:
    def sizes(chosen: Sequence[int]) -> str:
        low, high = bytes_text(min(chosen)), bytes_text(max(chosen))
        return low if low == high else f"{low} to {high}"

    kinds = (
        (SENT, "-", "sent", [size for key, size in arrows.items() if not key[2]]),
        (STAYING, "-", "stays on its rank", [size for key, size in arrows.items() if key[2]]),
        (COPIED, "--", "handed on in the lane", list(copies.values())),
    )
    for color, style, words, chosen in kinds:
        if chosen:
            axes.plot([], [], color=color, linestyle=style, label=f"{words}: {sizes(chosen)} each")
    if arrows or copies:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=3, fontsize=7, frameon=False)
