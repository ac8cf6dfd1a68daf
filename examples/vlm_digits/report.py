"""What the user sees: the progress bar, the final table and the picture."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from .layout import VlmLayout


@dataclass
class History:
    """Points (step, value) of the curves."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    accuracies: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Transfer:
    """One arrow of the picture: `sender` gives `receiver` a part of what one microbatch moves.

    Either is (module, rank). Where modules share ranks, a rank also gives to itself: that part is copied, not sent.
    """

    sender: tuple[str, int]
    receiver: tuple[str, int]
    share: float = 0.0  # of the payload of the microbatch
    copy: bool = False  # handed on to a replica in the same lane

    @property
    def stays(self) -> bool:
        """Whether it never leaves its rank."""
        return self.sender[1] == self.receiver[1]


class Progress:
    """Progress bar with loss, accuracy on held-out numbers and samples per second; silent where not enabled."""

    def __init__(self, steps: int, batch: int, enabled: bool) -> None:
        self.batch, self.bar = batch, None
        if enabled:
            from tqdm import tqdm

            layout = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            self.bar = tqdm(total=steps, desc="training", file=sys.stderr, bar_format=layout, mininterval=0.5)

    def advance(self, history: History) -> None:
        """One step is done."""
        if self.bar is None:
            return
        self.bar.update(1)
        shown = {}
        if history.losses:
            shown["loss"] = f"{history.losses[-1][1]:.4f}"
        if history.accuracies:
            shown["accuracy"] = f"{history.accuracies[-1][1]:.1%}"
        rate = self.bar.format_dict["rate"] or self.bar.n / max(self.bar.format_dict["elapsed"], 1e-9)
        shown["samples/s"] = f"{rate * self.batch:.0f}"
        self.bar.set_postfix(shown, refresh=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.refresh()
            self.bar.close()


def final_table(result: dict[str, Any], held_out: int) -> str:
    """A few lines that say how the run ended."""
    lines = [
        ("layout", f"{result['layout']}  ({result['ranks']} ranks)"),
        ("accuracy", f"{result['accuracy']:.1%} of {held_out} held-out numbers read without an error"),
        (
            "loss",
            f"{result['loss']:.5f} after {result['steps']} steps of {result['batch']} numbers",
        ),
        ("time", f"{result['seconds']:.1f} s of training, {result['samples_per_second']:.0f} samples/s"),
        ("picture", result["picture"]),
    ]
    if "timeline" in result:
        lines.append(("timeline", result["timeline"]))
    return "\n".join(f"  {name:<9} {text}" for name, text in lines)


def draw(
    path: Path,
    layout: VlmLayout,
    transfers: Sequence[Transfer],
    history: History,
    images: Sequence[Any],
    texts: Sequence[str],
    numbers: Sequence[str],
) -> None:
    """Draw the curves, the layout with who sends what to whom, and some held-out numbers with the model's reading.

    Args:
        path: PNG file to write; its folder is made where it is missing.
        layout: the modules and their ranks.
        transfers: the arrows.
        history: the curves.
        images: ``[8, 8 n]`` pictures of the first held-out numbers.
        texts: what the model read, at least one for every image.
        numbers: what the images show.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(11, 9.5), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=[3.2, 3.6, 1.6])
    _draw_curves(top, history)
    _draw_layout(middle, layout, transfers)
    _draw_readings(bottom, images, texts, numbers)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_curves(figure: Any, history: History) -> None:
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(*zip(*history.losses, strict=True), color="tab:blue")
    loss.set(title="training loss per answer token", xlabel="step", yscale="log")
    steps, values = zip(*history.accuracies, strict=True)
    accuracy.plot(steps, [100 * value for value in values], color="tab:green", marker=".")
    accuracy.set(
        title=f"held-out numbers read without an error: {values[-1]:.1%}", xlabel="step", ylabel="%", ylim=(0, 101)
    )
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)


def _draw_layout(figure: Any, layout: VlmLayout, transfers: Sequence[Transfer]) -> None:
    """Ranks as boxes: a column per pipeline stage, a group of boxes per lane; arrows for the messages."""
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    axes = figure.subplots()
    axes.set_title(
        "one microbatch, forward: the share of its payload on each arrow (gradients take the same ways back)"
    )
    axes.axis("off")
    place: dict[tuple[str, int], tuple[float, float]] = {}
    column = 0
    colors = {"images": "#cfe2f3", "language": "#d9ead3"}
    modules = sorted(layout.modules.values(), key=lambda module: module.name != "images")  # as the data flows
    tallest = max(module.tp * module.dp + 0.5 * (module.dp - 1) for module in modules)
    for module in modules:
        for stage in range(module.pp):
            height = module.tp * module.dp + 0.5 * (module.dp - 1)
            for rank in module.ranks:
                if module.stage(rank) != stage:
                    continue
                lane = module.lane(rank)
                index = (rank - module.first_rank) % (module.tp * module.dp)
                x, y = 3.4 * column, (tallest - height) / 2 + index + 0.5 * lane
                place[module.name, rank] = (x, y)
                box = FancyBboxPatch(
                    (x - 0.62, y - 0.33),
                    1.24,
                    0.66,
                    boxstyle="round,pad=0.03",
                    facecolor=colors[module.name],
                    edgecolor="gray",
                )
                axes.add_patch(box)
                axes.text(
                    x, y, f"rank {rank}\nlane {lane}, tp {index % module.tp}", ha="center", va="center", fontsize=8
                )
            title = module.name if module.pp == 1 else f"{module.name}, stage {stage}"
            axes.text(3.4 * column, -0.9, title, ha="center", va="center", weight="bold")
            column += 1
    for transfer in transfers:
        (x0, y0), (x1, y1) = place[transfer.sender], place[transfer.receiver]
        if transfer.copy:
            # Both ways bulge to the right of the boxes, one further than the other.
            bulge = "arc3,rad=-0.35" if y1 > y0 else "arc3,rad=0.6"
            arrow = FancyArrowPatch(
                (x0 + 0.66, y0), (x1 + 0.66, y1), connectionstyle=bulge, arrowstyle="-|>", mutation_scale=9
            )
            arrow.set(color="tab:orange", linestyle="--")
        else:
            arrow = FancyArrowPatch((x0 + 0.66, y0), (x1 - 0.66, y1), arrowstyle="-|>", mutation_scale=11)
            arrow.set(color="tab:gray" if transfer.stays else "tab:blue")
            if transfer.share:
                at = 0.3
                axes.text(
                    x0 + 0.66 + at * (x1 - x0 - 1.32),
                    y0 + at * (y1 - y0),
                    f"{100 * transfer.share:.3g}%",
                    fontsize=7,
                    ha="center",
                    va="center",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
                )
        axes.add_patch(arrow)
    if not all(transfer.stays for transfer in transfers):
        axes.plot([], [], color="tab:blue", label="sent across")
    if any(transfer.stays for transfer in transfers):
        axes.plot([], [], color="tab:gray", label="stays on its rank")
    if any(transfer.copy for transfer in transfers):
        axes.plot([], [], color="tab:orange", linestyle="--", label="handed on to the replicas of a lane")
    axes.legend(loc="lower center", ncols=3, fontsize=8, frameon=False)
    axes.set(xlim=(-1.2, 3.4 * (column - 1) + 1.4), ylim=(tallest + 0.3, -1.3))


def _draw_readings(figure: Any, images: Sequence[Any], texts: Sequence[str], numbers: Sequence[str]) -> None:
    count = len(images)
    row = figure.subplots(1, count, squeeze=False)[0]
    for axes, image, text, number in zip(row, images, texts[:count], numbers[:count], strict=True):
        height, width = image.shape
        axes.imshow(image, cmap="gray_r", vmin=-1.0, vmax=1.0)
        middle = width / 2 - 0.5
        axes.set_xlim(middle - 2 * height, middle + 2 * height)  # room for four digits: all numbers at one scale
        axes.set_frame_on(False)
        right = text == number
        axes.set_title(text or "(nothing)", color="tab:green" if right else "tab:red", fontsize=13)
        axes.set_xlabel("" if right else f"is {number}", color="tab:red", fontsize=9)
        axes.set(xticks=[], yticks=[])
    figure.suptitle("held-out numbers and what the model read", fontsize=10)
