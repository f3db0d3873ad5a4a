"""Several small charts in one PNG: lines over x, or groups of bars."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from latentray.reporting.curves import INK, LINES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart: `lines` name -> points (x, y), or `bars` group -> name -> height."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, float]]] = dataclasses.field(default_factory=dict)
    bars: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)


def save(charts: Sequence[Panel], path: Path | str, *, columns: int = 2, dpi: int = 130) -> None:
    """Write the charts, left to right and top to bottom. Raises ValueError for none."""
    if not charts:
        raise ValueError("no charts to draw")
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no global state

    columns = min(columns, len(charts))
    rows = math.ceil(len(charts) / columns)
    with matplotlib.rc_context({"font.size": 9.0}):
        figure = Figure(figsize=(5.4 * columns, 3.4 * rows), layout="constrained", dpi=dpi)
        for place, chart in enumerate(charts):
            axes = figure.add_subplot(rows, columns, place + 1)
            _lines(axes, chart)
            _bars(axes, chart)
            axes.set_title(chart.title, color=INK, fontsize=10, loc="left")
            axes.set_xlabel(chart.x_label, color=INK)
            axes.set_ylabel(chart.y_label, color=INK)
            axes.tick_params(colors=INK, length=3)
            axes.grid(True, axis="y", color=INK, alpha=0.18, linewidth=0.6)
            for side, spine in axes.spines.items():
                spine.set_visible(side in ("left", "bottom"))
                spine.set_color(INK)
            if len(axes.get_legend_handles_labels()[1]) > 1:
                axes.legend(frameon=False, labelcolor=INK, fontsize=8)
        figure.savefig(path, format="png", facecolor="white")


def _lines(axes, chart: Panel) -> None:  # type: ignore[no-untyped-def]
    for (name, points), color in zip(chart.lines.items(), LINES, strict=False):
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=color, linewidth=1.7, marker="o" if len(xs) < 12 else "", markersize=3, label=name)


def _bars(axes, chart: Panel) -> None:  # type: ignore[no-untyped-def]
    if not chart.bars:
        return
    names = list(dict.fromkeys(name for group in chart.bars.values() for name in group))
    width = 0.8 / len(names)
    for k, (name, color) in enumerate(zip(names, LINES, strict=False)):
        places = [i + (k - (len(names) - 1) / 2) * width for i in range(len(chart.bars))]
        axes.bar(places, [group.get(name, 0.0) for group in chart.bars.values()], width, color=color, label=name)
    axes.set_xticks(range(len(chart.bars)), list(chart.bars), fontsize=8)
