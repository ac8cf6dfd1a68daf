"""The picture of a training step: who computed, transferred and waited when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimo_ext.timeline import RankTimeline, Span

# Of the palette of Okabe and Ito, which people with any colour vision can tell apart. Waits differ by hatching, too.
STYLES: dict[str, dict[str, Any]] = {
    "forward": {"facecolor": "#56B4E9", "edgecolor": "#2b6f96"},
    "backward": {"facecolor": "#009E73", "edgecolor": "#00513b"},
    "other": {"facecolor": "#BBBBBB", "edgecolor": "#777777"},
    "exposed": {"facecolor": "#FFFFFF", "edgecolor": "#D55E00", "hatch": "/////"},
    "idle": {"facecolor": "#F4F4F4", "edgecolor": "#DDDDDD"},
    "transfer forward": {"facecolor": "#0072B2", "edgecolor": "#0072B2"},
    "transfer backward": {"facecolor": "#E69F00", "edgecolor": "#E69F00"},
}
LABELS = {
    "forward": "forward of a microbatch",
    "backward": "backward",
    "other": "optimizer and the rest",
    "transfer forward": "transfer of activations",
    "transfer backward": "transfer of gradients",
    "exposed": "exposed: waits for a transfer",
    "idle": "idle: its peer still computes",
}
# Of a rank's row, which is 1 high: where a span begins, and its height. Row 0 is at the top.
TRACKS = {"compute": (0.06, 0.50), "transfer forward": (0.60, 0.14), "transfer backward": (0.77, 0.14)}


def draw(ranks: Sequence[RankTimeline], path: Path, title: str | None) -> None:
    """Draw timelines whose waits are divided (see `mimo_ext.timeline.split_waits`) to a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    start = min(timeline.begin_ns for timeline in ranks)
    total_ms = max(timeline.end_ns for timeline in ranks) / 1e6 - start / 1e6
    figure = Figure(figsize=(15, 1.9 + 0.78 * len(ranks)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    used = set()
    for row, timeline in enumerate(ranks):
        for span in sorted(timeline.spans, key=lambda s: s.begin_ns):
            style = _style_of(span)
            used.add(style)
            _draw_span(axes, row, span, style, start, total_ms)
        shares = ((timeline.seconds("exposed"), "exposed"), (timeline.seconds("idle"), "idle"))
        text = "\n".join(f"{1e3 * seconds:.1f} ms {word}" for seconds, word in shares)
        axes.text(total_ms * 1.006, row + 0.46, text, va="center", fontsize=8, color="#444444", linespacing=1.25)
    for row in range(1, len(ranks)):
        axes.axhline(row - 0.01, color="#CCCCCC", linewidth=0.6)
    labels = [f"rank {timeline.rank}\n{timeline.label}" for timeline in ranks]
    axes.set_yticks([row + 0.46 for row in range(len(ranks))], labels, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(0, total_ms), ylim=(len(ranks), 0), xlabel="ms")
    axes.set_title(title or "one training step", loc="left", fontsize=11)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    handles = [Patch(**STYLES[style], label=LABELS[style], linewidth=0.6) for style in LABELS if style in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _style_of(span: Span) -> str:
    if span.kind != "transfer":
        return span.kind
    return "transfer backward" if span.operation.endswith("backward") else "transfer forward"


def _draw_span(axes: Any, row: int, span: Span, style: str, start: int, total_ms: float) -> None:
    offset, height = TRACKS.get(style, TRACKS["compute"])
    begin, width = (span.begin_ns - start) / 1e6, (span.end_ns - span.begin_ns) / 1e6
    computes = style in ("forward", "backward")
    axes.broken_barh([(begin, width)], (row + offset, height), linewidth=0.5, **STYLES[style])
    if computes and span.microbatch is not None and width > 0.008 * total_ms:
        place = (begin + width / 2, row + offset + height / 2)
        axes.annotate(str(span.microbatch), place, ha="center", va="center_baseline", fontsize=8, color="black")
