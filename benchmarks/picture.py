"""The records as a picture: how much faster, and how close to the links' limit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from records import Record, size_text


def draw(records: Sequence[Record], file: Path) -> None:
    """A PNG of two panels that share their lines: ratios with their range, and link efficiency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [record for record in records if record.ratio_median is not None]
    methods = list(dict.fromkeys(record.method for record in shown))
    lines = list(dict.fromkeys((record.name, record.layout, record.bytes) for record in shown))
    height = 0.8 / max(1, len(methods))
    figure, (left, right) = pyplot.subplots(
        1,
        2,
        sharey=True,
        layout="constrained",
        figsize=(11, 1.5 + 0.32 * len(lines) * max(1, len(methods))),
        width_ratios=(2, 1),
    )
    for index, method in enumerate(methods):
        own = [record for record in shown if record.method == method]
        places = [
            lines.index((record.name, record.layout, record.bytes)) + (index - (len(methods) - 1) / 2) * height
            for record in own
        ]
        medians = [record.ratio_median or 0.0 for record in own]
        spread = [
            [median - (record.ratio_lo or 0.0) for median, record in zip(medians, own, strict=True)],
            [(record.ratio_hi or 0.0) - median for median, record in zip(medians, own, strict=True)],
        ]
        left.barh(places, medians, height, xerr=spread, label=method, ecolor="black", capsize=2)
        right.barh(places, [record.efficiency or 0.0 for record in own], height)
    left.axvline(1, color="black", linewidth=0.8)
    left.set_yticks(range(len(lines)), [f"{name}  {layout}  {size_text(size)}" for name, layout, size in lines])
    left.invert_yaxis()
    left.set_xlabel("times as fast as Megatron-Core's BridgeCommunicator (median, range of the pairs)")
    right.axvline(1, color="black", linewidth=0.8)
    right.set_xlabel("link efficiency (1 = the links' limit)")
    figure.suptitle("Forward and backward on an emulated cluster: gloo, one shaped link per rank")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=max(1, len(methods)))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
